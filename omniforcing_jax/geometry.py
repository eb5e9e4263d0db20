"""A whole clip in one forward pass: its sizes, its positions, and the network called on it.

Training looks at whole clips where sampling looks at blocks: score networks see a clip at one
noise level, bidirectionally; a student in stage II sees it under the block-causal masks, with a
noise level of its own for every block.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.inputs import ClipMask, Modality, Pathways
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import ClipRope, clip_rope
from omniforcing_jax.sampling import flow
from omniforcing_jax.types import AVLatents


@dataclasses.dataclass(frozen=True)
class Clip:
    """Sizes of a clip in latents, and where it lies in time.

    Attributes:
      video_frames, audio_frames: latents.
      height, width: of the video, in latents (32 pixels each).
      frame_rate: pixel frames per second; positions are in seconds.
      video_start, audio_start: latents before the clip. A window from the middle of a rollout is
        positioned like the blocks behind block 0, whatever its true time: its first latent stands
        for as many pixel frames as the others.
    """

    video_frames: int
    audio_frames: int
    height: int
    width: int
    frame_rate: float = 24.0
    video_start: int = 0
    audio_start: int = 0

    @classmethod
    def from_blocks(
        cls, layout: BlockLayout, num_blocks: int, height: int, width: int, *, start: bool = True
    ) -> "Clip":
        """`num_blocks` blocks: the first ones (`start`), or uniform ones from the middle."""
        if start:
            video, audio = layout.num_video_frames(num_blocks), layout.num_audio_frames(num_blocks)
            return cls(video, audio, height, width, layout.frame_rate)
        return cls(
            num_blocks * layout.video_frames,
            num_blocks * layout.audio_frames,
            height,
            width,
            layout.frame_rate,
            layout.first_video_frames,
            layout.first_audio_frames,
        )

    @property
    def patches(self) -> int:
        """P, tokens per video latent."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """T_v; there are `audio_frames` audio tokens."""
        return self.video_frames * self.patches

    def rope(self, model: Transformer) -> ClipRope:
        """RoPE tables that cover the clip."""
        return clip_rope(
            model.config,
            video_frames=self.video_start + self.video_frames,
            audio_frames=self.audio_start + self.audio_frames,
            height=self.height,
            width=self.width,
            frame_rate=self.frame_rate,
        )

    def mask(self, layout: BlockLayout) -> ClipMask:
        """The block-causal masks of this clip, for `Transformer.causal`."""
        return ClipMask(layout, self.video_frames, self.audio_frames, self.patches)

    def zeros(self, model: Transformer, batch: int) -> AVLatents:
        """A clip of zeros, [B, T, C] float32."""
        video = (batch, self.video_tokens, model.config.video_channels)
        return AVLatents(
            jnp.zeros(video), jnp.zeros((batch, self.audio_frames, model.config.audio_channels))
        )


def draw_noise(keys: jax.Array, clip: Clip, model: Transformer) -> AVLatents:
    """Noise [B, T, C] float32 from [B] keys: a sample's noise depends on its own key alone."""
    shapes = AVLatents(*(x.shape[1:] for x in jax.tree.leaves(clip.zeros(model, 1))))

    def draw(key: jax.Array) -> AVLatents:
        video_key, audio_key = jax.random.split(key)
        return AVLatents(
            jax.random.normal(video_key, shapes.video), jax.random.normal(audio_key, shapes.audio)
        )

    return jax.vmap(draw)(keys)


def clip_velocity(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: tuple[jax.Array, jax.Array],
    clip: Clip,
    keep: Pathways | None = None,
) -> AVLatents:
    """Velocity of a noisy clip in one forward pass.

    Args:
      model: bidirectional, or with `causal` set to the clip's mask.
      x: [B, T, C] noisy tokens.
      sigma: [B] of the samples, or AVLatents [B, G] of equal groups of each stream's tokens.
      contexts: (video, audio) text contexts [B, S, text_dim].
      keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).

    Returns:
      AVLatents [B, T, C] float32.
    """
    streams = _modalities(model, x, sigma, contexts, clip)
    (video, audio), _ = model.apply({"params": params}, *streams, keep=keep)
    return AVLatents(video, audio)


def audio_attention_entropy(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: tuple[jax.Array, jax.Array],
    clip: Clip,
) -> jax.Array:
    """Entropy of the audio self-attention, [L, T_a + sinks], see `ops.attention_entropy`.

    Arguments as `clip_velocity`.
    """
    streams = _modalities(model, x, sigma, contexts, clip)
    _, measured = model.apply({"params": params}, *streams, mutable=["diagnostics"])
    (entropy,) = jax.tree.leaves(measured)
    return entropy


def _modalities(model, x, sigma, contexts, clip: Clip) -> tuple[Modality, Modality]:
    rope = clip.rope(model)
    video_frames = clip.video_start + np.arange(clip.video_frames)
    audio_frames = clip.audio_start + np.arange(clip.audio_frames)
    sinks = model.config.num_audio_sinks > 0
    if not isinstance(sigma, AVLatents):
        sigma = AVLatents(sigma[:, None], sigma[:, None])
    video = Modality(
        x.video,
        sigma.video,
        rope.video_rope(video_frames),
        rope.video_cross_rope(video_frames),
        contexts[0],
    )
    audio = Modality(
        x.audio,
        sigma.audio,
        rope.audio_rope(audio_frames, sinks),
        rope.audio_cross_rope(audio_frames, sinks),
        contexts[1],
    )
    return video, audio


def clip_x0(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: tuple[jax.Array, jax.Array],
    clip: Clip,
) -> AVLatents:
    """The clean prediction x0 = x - sigma v of a noisy clip; arguments as `clip_velocity`."""
    velocity = clip_velocity(model, params, x, sigma, contexts, clip)
    if not isinstance(sigma, AVLatents):
        sigma = AVLatents(sigma, sigma)
    return jax.tree.map(flow.velocity_to_x0, x, velocity, sigma)


def sigmas_per_frame(block_sigma: jax.Array, layout: BlockLayout, clip: Clip) -> AVLatents:
    """A noise level per block [B, K] -> per video latent [B, F] and per audio latent [B, T_a].

    An audio latent takes the level of its own block. (Matching by the ratio of frame counts instead
    gives latents at the border the level of a neighbour, which never happens while sampling.)
    """
    video = layout.block_of_video_frame(np.arange(clip.video_frames))
    audio = layout.block_of_audio_frame(np.arange(clip.audio_frames))
    return AVLatents(block_sigma[:, video], block_sigma[:, audio])
