"""Sizes and places of clips and blocks, and what the transformer needs to know of them.

Everything that calls the transformer comes through here: `stream_ropes` places tokens in time and
space, `modalities` joins them with latents, noise levels and text, and `draw_noise` starts a clip.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.inputs import ClipMask, Modality
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import (
    AUDIO_LATENTS_PER_SECOND,
    VIDEO_SPATIAL_COMPRESSION,
    VIDEO_TEMPORAL_COMPRESSION,
    ClipRope,
    GridRope,
    Rope,
    audio_time_bounds,
    rope_at,
    video_time_bounds,
)
from omniforcing_jax.types import AVLatents, Contexts


@dataclasses.dataclass(frozen=True)
class ClipGeometry:
    """Sizes of a clip in latents, and where it lies in time.

    Attributes:
      video_frames, audio_frames: latents.
      height, width: of the video, in latents (32 pixels each).
      frame_rate: pixel frames per second; positions are in seconds.
      video_start, audio_start: latents before the clip. A window from the middle of a rollout is
        positioned like the blocks behind block 0, whatever its true time: its first latent stands
        for as many pixel frames as the others.

    Raises:
      ValueError: a size or rate is not positive.
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
    ) -> "ClipGeometry":
        """`num_blocks` blocks: the first ones (`start`), or uniform ones from the middle.

        `height` and `width` are in latents.
        """
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

    @classmethod
    def from_pixels(
        cls,
        frames: int,
        height: int,
        width: int,
        frame_rate: float = 24.0,
        *,
        spatial_compression: int = VIDEO_SPATIAL_COMPRESSION,
    ) -> "ClipGeometry":
        """A clip given in pixel frames and pixels, with sound as long as the video.

        Raises:
          ValueError: `frames` is not 8k + 1, height or width do not fit the VAE's compression, or
            see `audio_frames_for`.
        """
        step, size = VIDEO_TEMPORAL_COMPRESSION, spatial_compression
        if frames < 1 or (frames - 1) % step:
            below = max(frames - 1, 0) // step * step + 1
            raise ValueError(
                f"a clip has {step}k + 1 frames, not {frames}; nearest: {below} or {below + step}"
            )
        if min(height, width) < size or height % size or width % size:
            raise ValueError(
                f"height and width must be positive multiples of {size} pixels, not "
                f"{height}x{width}"
            )
        audio_frames = audio_frames_for(frames, frame_rate)
        video_frames = (frames - 1) // step + 1
        return cls(video_frames, audio_frames, height // size, width // size, frame_rate)

    def __post_init__(self):
        for name in ("video_frames", "audio_frames", "height", "width", "frame_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def patches(self) -> int:
        """P, tokens per video latent."""
        return self.height * self.width

    @property
    def pixel_frames(self) -> int:
        """Pixel frames from the beginning to the clip's end."""
        return (self.video_start + self.video_frames - 1) * VIDEO_TEMPORAL_COMPRESSION + 1

    @property
    def video_tokens(self) -> int:
        """T_v; there are `audio_frames` audio tokens."""
        return self.video_frames * self.patches

    def rope(self, model: Transformer, appended: AVLatents | None = None) -> ClipRope:
        """RoPE tables that cover the clip, and behind it what is appended to it.

        Args:
          appended: [n, 2] float32 seconds, begin and end of each appended latent of both streams.
        """
        video = video_time_bounds(self.video_start + self.video_frames, self.frame_rate)
        audio = audio_time_bounds(self.audio_start + self.audio_frames)
        if appended is not None:
            video = np.concatenate([video, appended.video])
            audio = np.concatenate([audio, appended.audio])
        return rope_at(model.config, video, audio, self.height, self.width)

    def stream_ropes(
        self,
        model: Transformer,
        rope: ClipRope | None = None,
        appended: tuple[int, int] = (0, 0),
    ) -> "StreamRopes":
        """Where the clip's tokens are, with the sinks of the model.

        Args:
          rope: covers the clip.
          appended: video and audio latents behind the clip's, which `rope` covers, too.
        """
        rope = self.rope(model) if rope is None else rope
        return stream_ropes(
            rope,
            self.video_start + np.arange(self.video_frames + appended[0]),
            self.audio_start + np.arange(self.audio_frames + appended[1]),
            sinks=model.config.num_audio_sinks > 0,
        )

    def mask(self, layout: BlockLayout) -> ClipMask:
        """The block-causal masks of this clip, for `Transformer.causal`."""
        return ClipMask(layout, self.video_frames, self.audio_frames, self.patches)


def audio_frames_for(frames: int, frame_rate: float) -> int:
    """Audio latents that last as long as `frames` pixel frames: round(25 frames / frame_rate).

    Raises:
      ValueError: the clip is shorter than half an audio latent, or a number is not positive.
    """
    if frames < 1 or not frame_rate > 0:
        raise ValueError(f"frames and frame_rate must be positive, not {frames} and {frame_rate}")
    audio_frames = round(frames / frame_rate * AUDIO_LATENTS_PER_SECOND)
    if audio_frames < 1:
        raise ValueError(
            f"{frames} frames at {frame_rate:g} frames per second are too short for sound: an "
            f"audio latent lasts {1 / AUDIO_LATENTS_PER_SECOND:g} s; ask for more frames"
        )
    return audio_frames


def draw_noise(keys: jax.Array, clip: ClipGeometry, model: Transformer) -> AVLatents:
    """Noise [B, T, C] float32 from [B] keys: a sample's noise depends on its own key alone."""
    video_shape = (clip.video_tokens, model.config.video_channels)
    audio_shape = (clip.audio_frames, model.config.audio_channels)
    return _draw(keys, video_shape, audio_shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(keys: jax.Array, video_shape, audio_shape) -> AVLatents:
    return jax.vmap(lambda key: normal_latents(key, video_shape, audio_shape))(keys)


def normal_latents(key: jax.Array, video_shape, audio_shape) -> AVLatents:
    """Normal numbers of these shapes, float32: the one draw that all samplers and losses make."""
    video_key, audio_key = jax.random.split(key)
    return AVLatents(
        jax.random.normal(video_key, video_shape), jax.random.normal(audio_key, audio_shape)
    )


class StreamRopes(NamedTuple):
    """Where the tokens of one forward pass are: RoPE tables, [1, T, N, H/2] each.

    Attributes:
      first_latent: [F] boolean, the video latent with index 0, which stands for a single frame
        (the encoder is causal), while every other one stands for eight. LTX-2.5 marks it by its
        keyframe embedding. In a stream it is the only one of block 0 with layout `prefix`, the
        first of four with `merged`, and none of any later block: those count on behind block 0,
        also at positions relative to the window, as block 0 is never evicted. The keys of the
        cache hold the mark, as the refresh writes them from marked tokens. What is appended to a
        clip (keyframes, references) is not marked either, as in LTX-2's own code.
    """

    video: Rope | GridRope
    video_cross: Rope | GridRope
    audio: Rope
    audio_cross: Rope
    first_latent: jax.Array


def stream_ropes(
    rope: ClipRope, video_frames: jax.Array, audio_frames: jax.Array, *, sinks: bool
) -> StreamRopes:
    """Tables of the video latents [F] and audio latents [T_a] with these indices.

    Args:
      rope: tables that cover them.
      sinks: whether the sink tokens stand in front of the audio.
    """
    return StreamRopes(
        rope.video_rope(video_frames),
        rope.video_cross_rope(video_frames),
        rope.audio_rope(audio_frames, sinks),
        rope.audio_cross_rope(audio_frames, sinks),
        jnp.asarray(video_frames) == 0,
    )


def modalities(
    x: AVLatents,
    sigma: AVLatents,
    ropes: StreamRopes,
    contexts: Contexts | tuple[None, None] = (None, None),
    *,
    context_mask: jax.Array | None = None,
    global_sigma: AVLatents | None = None,
    video_bias: jax.Array | None = None,
) -> tuple[Modality, Modality]:
    """What the transformer is called with, for video and audio.

    Args:
      x: [B, T, C] noisy tokens.
      sigma: [B, G] noise levels of G equal groups of each stream's tokens.
      ropes: of the tokens, from `stream_ropes`.
      contexts: [B, S, text_dim] of each stream; None where text keys and values are given instead.
      context_mask: [B, S] boolean, True = attend; None attends to all of the text.
      global_sigma: [B] the samples' own noise levels, where they are not max(sigma).
      video_bias: [B or 1, F, F] added to the logits of the video's self-attention.
    """
    if global_sigma is None:
        global_sigma = AVLatents(None, None)
    patches = x.video.shape[1] // ropes.first_latent.shape[0]
    video = Modality(
        latents=x.video,
        sigma=sigma.video,
        rope=ropes.video,
        cross_rope=ropes.video_cross,
        context=contexts[0],
        context_mask=context_mask,
        global_sigma=global_sigma.video,
        keyframes=jnp.repeat(ropes.first_latent, patches)[None],
        self_bias=video_bias,
    )
    audio = Modality(
        latents=x.audio,
        sigma=sigma.audio,
        rope=ropes.audio,
        cross_rope=ropes.audio_cross,
        context=contexts[1],
        context_mask=context_mask,
        global_sigma=global_sigma.audio,
    )
    return video, audio


def join_blocks(first: AVLatents, rest: AVLatents) -> AVLatents:
    """Block 0 [B, T, C] and the later blocks [K - 1, B, T, C] -> a clip [B, T, C]."""

    def join(first, rest):
        rest = jnp.moveaxis(rest, 0, 1).reshape(rest.shape[1], -1, rest.shape[3])
        return jnp.concatenate([first, rest], axis=1)

    return jax.tree.map(join, first, rest)


def split_blocks(clip: AVLatents, layout: BlockLayout, patches: int) -> tuple[AVLatents, AVLatents]:
    """A clip [B, T, C] -> block 0 [B, T, C] and the later blocks [K - 1, B, T, C]."""

    def split(x, first, later):
        rest = x[:, first:].reshape(x.shape[0], -1, later, x.shape[2])
        return x[:, :first], jnp.moveaxis(rest, 1, 0)

    video = split(clip.video, layout.first_video_frames * patches, layout.video_frames * patches)
    audio = split(clip.audio, layout.first_audio_frames, layout.audio_frames)
    return AVLatents(video[0], audio[0]), AVLatents(video[1], audio[1])
