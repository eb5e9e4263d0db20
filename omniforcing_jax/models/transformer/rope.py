"""Rotary position embedding over seconds and pixels.

Angles reach 1.6e4 rad, where one fp32 ulp is 1e-3 rad: the tables are therefore formed on the host
in the reference's order of operations (float64 frequencies rounded to fp32, then fp32 products),
never inside a jitted function whose fusions might reorder them.

A clip's table factorises over its axes. `ClipRope` holds one small table per axis and assembles the
rows of any frames on the device (exactly: it adds zeros), so a stream of an hour needs a few
megabytes.
"""

from functools import partial

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.ops.attention import platform

VIDEO_TEMPORAL_COMPRESSION = 8  # pixel frames per latent frame, after the first
VIDEO_SPATIAL_COMPRESSION = 32  # pixels per latent, both directions
AUDIO_LATENTS_PER_SECOND = 25
_MEL_FRAMES_PER_LATENT = 4
_MEL_HOP, _MEL_SAMPLE_RATE = np.float32(160), np.float32(16000)


@flax.struct.dataclass
class Rope:
    """Rotation table: cos and sin [B or 1, T, N, H/2] float32, one band of frequencies per head."""

    cos: jax.Array
    sin: jax.Array

    def rotate(self, x: jax.Array, rope_type: str) -> jax.Array:
        """Rotates the pairs of channels of x [..., T, N, H], in float32; returns x's dtype.

        "split" pairs channel j with j + H/2, "interleaved" channel 2j with 2j + 1.
        """
        new_axes = range(x.ndim - self.cos.ndim)
        cos, sin = jnp.expand_dims(self.cos, new_axes), jnp.expand_dims(self.sin, new_axes)
        half = x.shape[-1] // 2
        x32 = x.astype(jnp.float32)
        if platform() == "tpu":
            # Halves of 64 channels fill half a register, and are written padded. A product with
            # ones and minus ones is exact, and goes on in the kernel that rotates.
            if rope_type == "split":
                cos, sin = (jnp.concatenate([t, t], axis=-1) for t in (cos, sin))
            else:
                cos, sin = (jnp.repeat(t, 2, axis=-1) for t in (cos, sin))
            # by heads, as attention reads it: or the product's operands are laid out anew
            x, cos, sin = (jnp.swapaxes(t, -3, -2) for t in (x, cos, sin))  # [..., N, T, H]
            partner = jnp.einsum(
                "...h,hk->...k",
                x,
                jnp.asarray(_partners(x.shape[-1], rope_type), x.dtype),
                precision="highest",
                preferred_element_type=jnp.float32,
            )
            out = x.astype(jnp.float32) * cos + partner * sin
            return jnp.swapaxes(out.astype(x.dtype), -3, -2)
        if rope_type == "split":
            x1, x2 = x32[..., :half], x32[..., half:]
            out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        else:
            pairs = x32.reshape(*x.shape[:-1], half, 2)
            x1, x2 = pairs[..., 0], pairs[..., 1]
            out = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)
        return out.astype(x.dtype)


def _partners(channels: int, rope_type: str) -> np.ndarray:
    """[H, H] that takes each pair of channels (x1, x2) to (-x2, x1)."""
    index = np.arange(channels)
    first, second = (index[: channels // 2], index[channels // 2 :])
    if rope_type != "split":
        first, second = index[::2], index[1::2]
    matrix = np.zeros((channels, channels))
    matrix[second, first], matrix[first, second] = -1, 1
    return matrix


def frequencies(num: int, theta: float, dtype: str = "float64") -> np.ndarray:
    """f_k = theta^(k / (num - 1)) * pi / 2 for k < num: float32, formed in `dtype`."""
    exponents = np.linspace(0.0, 1.0, num, dtype=dtype)
    grid = np.power(np.asarray(theta, dtype), exponents) * np.asarray(np.pi / 2, dtype)
    return grid.astype(np.float32)


def axis_angles(positions: np.ndarray, max_position: float, freqs: np.ndarray) -> np.ndarray:
    """phi = f * (2 p / max - 1) in fp32: positions [...] -> angles [..., len(freqs)]."""
    fraction = positions.astype(np.float32) / np.float32(max_position)
    return freqs * (fraction * np.float32(2) - np.float32(1))[..., None]


def video_time_bounds(num_frames: int, frame_rate: float) -> np.ndarray:
    """[F, 2] float32 seconds covered by each latent frame: [0, 1/fps], [1/fps, 9/fps], …"""
    index = np.arange(num_frames, dtype=np.float32)
    edges = np.stack([index, index + 1], axis=-1) * VIDEO_TEMPORAL_COMPRESSION
    pixel_frames = np.maximum(edges + 1 - VIDEO_TEMPORAL_COMPRESSION, 0)
    return pixel_frames / np.float32(frame_rate)


def audio_time_bounds(num_frames: int, start: int = 0) -> np.ndarray:
    """[T, 2] float32 seconds covered by each audio latent: [0, 0.01], [0.01, 0.05], …

    A negative `start` continues the 25 Hz clock before zero (sinks with incremental RoPE).
    """
    index = np.arange(start, num_frames, dtype=np.float32)
    edges = np.stack([index, index + 1], axis=-1) * _MEL_FRAMES_PER_LATENT
    mel_frames = edges + 1 - _MEL_FRAMES_PER_LATENT
    if start >= 0:
        mel_frames = np.maximum(mel_frames, 0)
    return mel_frames * _MEL_HOP / _MEL_SAMPLE_RATE


def _pixel_bounds(size: int) -> np.ndarray:
    index = np.arange(size, dtype=np.float32)
    return np.stack([index, index + 1], axis=-1) * VIDEO_SPATIAL_COMPRESSION


@flax.struct.dataclass
class AxisTable:
    """cos and sin [positions, n] float32 of one axis."""

    cos: jax.Array
    sin: jax.Array

    def rows(self, index: jax.Array) -> "AxisTable":
        """Rows at integer positions `index` [T]."""
        return AxisTable(self.cos[index], self.sin[index])


@flax.struct.dataclass
class GridRope:
    """A `Rope` of F x h x w tokens, as the sum of a small table for each axis.

    Every channel belongs to one axis; the tables of the others are zero there, so that the sum is
    exact. It is formed where it is used, in the kernel that rotates: that reads three small tables
    then, and not two float32 numbers for every pair of channels.

    Attributes:
      parts: tables that broadcast to [F, h, w, N, H/2].
      shape: F, h, w.
    """

    parts: tuple[AxisTable, ...]
    shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)

    @property
    def cos(self) -> jax.Array:
        """[1, T, N, H/2] of T = F h w tokens."""
        return self._sum([part.cos for part in self.parts])

    @property
    def sin(self) -> jax.Array:
        """[1, T, N, H/2]."""
        return self._sum([part.sin for part in self.parts])

    def _sum(self, parts: list[jax.Array]) -> jax.Array:
        table = jnp.broadcast_to(sum(parts[1:], parts[0]), (*self.shape, *parts[0].shape[3:]))
        return table.reshape(1, -1, *table.shape[3:])

    def rotate(self, x: jax.Array, rope_type: str) -> jax.Array:
        """As `Rope.rotate`."""
        return Rope(self.cos, self.sin).rotate(x, rope_type)


@flax.struct.dataclass
class ClipRope:
    """All rotation tables of a grid of latents, one small table per axis.

    `video_time` and `video_cross` have a row per latent frame, `audio` and `audio_cross` a row per
    audio latent; the cross tables serve the cross-modal attention (time only, audio width).
    """

    video_time: AxisTable
    video_rows: AxisTable
    video_columns: AxisTable
    video_cross: AxisTable
    audio: AxisTable
    audio_cross: AxisTable
    sinks: AxisTable | None
    sinks_cross: AxisTable | None
    heads: int = flax.struct.field(pytree_node=False)
    video_dim: int = flax.struct.field(pytree_node=False)

    def video_rope(self, frames: jax.Array) -> GridRope:
        """Self-attention table of the latent frames with indices `frames` [F]."""
        axes = (self.video_time.rows(frames), self.video_rows, self.video_columns)
        parts = tuple(
            AxisTable(self._of_axis(table.cos, axis, 1.0), self._of_axis(table.sin, axis, 0.0))
            for axis, table in enumerate(axes)
        )
        return GridRope(parts, self._grid(frames))

    def _of_axis(self, table: jax.Array, axis: int, padding: float) -> jax.Array:
        """[positions, n] -> what an axis adds; channels go round time, rows and columns, and
        those that are left over come first and are not rotated."""
        table = jnp.pad(table[..., None], ((0, 0), (0, 0), (axis, 2 - axis)))
        table = table.reshape(table.shape[0], -1)
        pad = self.video_dim // 2 - table.shape[1]
        table = jnp.pad(table, ((0, 0), (pad, 0)), constant_values=padding if axis == 0 else 0.0)
        table = rearrange(table, "T (N h) -> T N h", N=self.heads)
        return jnp.expand_dims(table, [other for other in range(3) if other != axis])

    def _grid(self, frames: jax.Array) -> tuple[int, int, int]:
        return frames.shape[0], self.video_rows.cos.shape[0], self.video_columns.cos.shape[0]

    def video_cross_rope(self, frames: jax.Array) -> GridRope:
        """Cross-modal table; the tokens of a frame share one row."""

        def part(table: jax.Array) -> jax.Array:
            return rearrange(table, "F (N h) -> F 1 1 N h", N=self.heads)

        table = self.video_cross.rows(frames)
        return GridRope((AxisTable(part(table.cos), part(table.sin)),), self._grid(frames))

    def audio_rope(self, frames: jax.Array, sinks: bool = False) -> Rope:
        """Self-attention table [1, (S +) T, N, H/2] of the audio latents `frames` [T]."""
        return self._heads(_with_sinks(self.audio.rows(frames), self.sinks if sinks else None))

    def audio_cross_rope(self, frames: jax.Array, sinks: bool = False) -> Rope:
        """Cross-modal table [1, (S +) T, N, H/2] of the audio latents `frames` [T]."""
        table = self.audio_cross.rows(frames)
        return self._heads(_with_sinks(table, self.sinks_cross if sinks else None))

    def _heads(self, table: AxisTable) -> Rope:
        split = partial(rearrange, pattern="T (N h) -> 1 T N h", N=self.heads)
        return Rope(split(table.cos), split(table.sin))


def _with_sinks(table: AxisTable, sinks: AxisTable | None) -> AxisTable:
    if sinks is None:
        return table
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), sinks, table)


def clip_rope(
    config: TransformerConfig,
    *,
    video_frames: int,
    audio_frames: int,
    height: int,
    width: int,
    frame_rate: float = 24.0,
) -> ClipRope:
    """Tables for `video_frames` x `height` x `width` latents and `audio_frames` audio latents.

    Raises:
      ValueError: a size that is not positive.
    """
    sizes = {
        "video_frames": video_frames,
        "audio_frames": audio_frames,
        "height": height,
        "width": width,
        "frame_rate": frame_rate,
    }
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, not {value}")
    return rope_at(
        config,
        video_time_bounds(video_frames, frame_rate),
        audio_time_bounds(audio_frames),
        height,
        width,
    )


def rope_at(
    config: TransformerConfig,
    video_time: np.ndarray,
    audio_time: np.ndarray,
    height: int,
    width: int,
) -> ClipRope:
    """Tables for latents at any times.

    Args:
      video_time: [F, 2] float32 seconds, begin and end of `height` x `width` video latents.
      audio_time: [T, 2] float32 seconds of the audio latents; they may be negative.
    """
    theta, dtype = config.rope_theta, config.rope_frequency_dtype
    video_freqs = frequencies(config.video_dim // 6, theta, dtype)
    audio_freqs = frequencies(config.audio_dim // 2, theta, dtype)
    seconds, max_height, max_width = config.video_max_position
    cross_seconds = max(seconds, config.audio_max_position)

    def table(bounds, max_position, freqs):
        middle = (bounds[:, 0] + bounds[:, 1]) / np.float32(2)
        angles = axis_angles(middle, max_position, freqs)
        return AxisTable(jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))

    sinks = sinks_cross = None
    if config.num_audio_sinks:
        if config.sink_rope == "identity":
            shape = (config.num_audio_sinks, audio_freqs.size)
            sinks = sinks_cross = AxisTable(jnp.ones(shape), jnp.zeros(shape))
        else:
            before = audio_time_bounds(0, start=-config.num_audio_sinks)
            sinks = table(before, config.audio_max_position, audio_freqs)
            sinks_cross = table(before, cross_seconds, audio_freqs)
    rope = ClipRope(
        video_time=table(video_time, seconds, video_freqs),
        video_rows=table(_pixel_bounds(height), max_height, video_freqs),
        video_columns=table(_pixel_bounds(width), max_width, video_freqs),
        video_cross=table(video_time, cross_seconds, audio_freqs),
        audio=table(audio_time, config.audio_max_position, audio_freqs),
        audio_cross=table(audio_time, cross_seconds, audio_freqs),
        sinks=sinks,
        sinks_cross=sinks_cross,
        heads=config.video_heads,
        video_dim=config.video_dim,
    )
    chex.assert_equal_shape([rope.video_cross.cos[:1], rope.audio_cross.cos[:1]])
    return rope
