"""How much arithmetic a block and its decoding cost, counted from the model's own shapes.

A multiply-add is two operations. Counted are the matrix products (which are over 99 % of the work):
linear layers, attention, and the embeddings and heads; norms, modulation and softmax are not.
"""

import math
from collections.abc import Iterator

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.video_vae.layers import KERNEL_SIZE
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.sampling.student import RolloutConfig


def forward_flops(
    config: TransformerConfig,
    *,
    video_tokens: int,
    audio_tokens: int,
    video_keys: int,
    audio_keys: int,
    text_tokens: int,
) -> int:
    """Operations of one forward pass of one sample with text keys and values at hand.

    Args:
      video_tokens, audio_tokens: tokens of this call (with the sinks, where they take part).
      video_keys, audio_keys: what they attend to: themselves and the history.
    """
    d, c = config.video_dim, config.audio_dim
    v, a = video_tokens, audio_tokens
    video_linear = v * (4 * d * d + 2 * d * d + 8 * d * d)  # self, text q and out, feed-forward
    audio_linear = a * (4 * c * c + 2 * c * c + 8 * c * c)
    a2v_linear = v * (d * c + c * d) + a * 2 * c * c
    v2a_linear = a * 2 * c * c + v * 2 * d * c
    attention = 2 * (
        v * d * (video_keys + text_tokens)
        + a * c * (audio_keys + text_tokens)
        + v * c * audio_keys
        + a * c * video_keys
    )
    layer = video_linear + audio_linear + a2v_linear + v2a_linear + attention
    ends = 2 * v * d * config.video_channels + 2 * a * c * config.audio_channels
    return 2 * (config.num_layers * layer + ends)


def text_flops(config: TransformerConfig, text_tokens: int) -> int:
    """Operations of `Transformer.text_kv` for one sample at one noise level."""
    d, c = config.video_dim, config.audio_dim
    layer = text_tokens * 2 * (d * d + c * c)
    projection = 0
    if config.caption_channels is not None:
        projection = text_tokens * (config.caption_channels * (d + c) + d * d + c * c)
    return 2 * (config.num_layers * layer + projection)


def block_flops(
    config: TransformerConfig, rollout: RolloutConfig, block: int, text_tokens: int
) -> int:
    """Operations to generate block `block` of one sample: denoising steps and refresh."""
    layout: BlockLayout = rollout.cache.layout
    held = min(block, rollout.cache.capacity)
    sinks = config.num_audio_sinks
    video = layout.video_frames_in(block) * rollout.patches
    audio = layout.audio_frames_in(block) + (sinks if block == 0 else 0)
    video_history = layout.num_video_frames(held) * rollout.patches if held else 0
    audio_history = layout.num_audio_frames(held) + sinks if held else 0
    one = forward_flops(
        config,
        video_tokens=video,
        audio_tokens=audio,
        video_keys=video + video_history,
        audio_keys=audio + audio_history,
        text_tokens=text_tokens,
    )
    return one * (rollout.num_steps + 1)


def _decoder_convs(config: VideoVAEConfig) -> Iterator[tuple[int, int, int, int]]:
    """Of each convolution: input and output channels, frames and height relative to the latents."""
    time = space = 1
    width = config.bottleneck_channels
    yield config.latent_channels, width, time, space
    for stage in reversed(config.decoder_blocks):
        if stage.kind == "res_x":
            yield from [(width, width, time, space)] * (2 * stage.num_layers)
            continue
        yield width, math.prod(stage.stride) * width // stage.multiplier, time, space
        width //= stage.multiplier
        time, space = time * stage.stride[0], space * stage.stride[1]
    yield width, 3 * config.patch_size**2, time, space


def video_decoder_flops(
    config: VideoVAEConfig, latent_frames: int, height: int, width: int, *, continued: bool = False
) -> int:
    """Floating-point operations (2 per multiply-add) of the convolutions of one decode.

    Args:
      latent_frames: of the clip, or of a part of it.
      height, width: pixels, multiples of 32.
      continued: it is a part behind others; the first latent of a clip is one frame only.

    Raises:
      ValueError: if the clip's size is not one the decoder can produce.
    """
    latent_area = math.prod(config.latent_size(height, width))
    total = 0
    for inputs, outputs, time, space in _decoder_convs(config):
        frames = time * latent_frames if continued else time * (latent_frames - 1) + 1
        positions = frames * latent_area * space**2
        total += 2 * KERNEL_SIZE**3 * inputs * outputs * positions
    return total
