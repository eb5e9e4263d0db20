"""Streaming video decode: latents go in as they are generated, uint8 frames come out.

Two ways, because the published decoder looks 13 (LTX-2.3) to 22 (LTX-2.0) latent frames ahead:

* "window" runs the decoder as it was trained, over the new latents and some of their neighbours. It
  approximates the decode of the whole clip, and equals it if `look_back` and `look_ahead` cover the
  receptive field.
* "causal" runs every convolution causally and stores the last two frames of its input between
  chunks. It equals the causal decode of the whole clip however it is cut, and computes nothing
  twice, but the published weights were not trained for it.

Counts are in latent frames. With a compression of 8, latent 0 is pixel frame 0 and latent i > 0 is
pixel frames 8i-7 .. 8i. A window that starts at latent a > 0 loses the first seven frames of a, so
its first frame is pixel frame 8a; at a = 0 it starts as the clip does. Nothing is padded.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniforcing_jax.models.video_vae.layers import ConvCache
from omniforcing_jax.models.video_vae.model import VideoVAEConfig, check_latents, decode_chunk

MODES = ("window", "causal")
FINITE = np.bool_(True)  # of a stream that has not begun


@struct.dataclass
class CausalVideoState:
    """Stream state of mode "causal".

    num_latents: latents received so far, a host integer (a leaf, so that checkpoints keep it).
    cache: last two input frames [B, 2, h, w, C] of every convolution, laid out as the parameters;
      `conv_in` holds the last two latents. Not read while num_latents is 0.
    finite: [] boolean, whether all pixels of the last decode were numbers.
    """

    num_latents: int
    cache: ConvCache
    finite: jax.Array


@struct.dataclass
class WindowVideoState:
    """Stream state of mode "window".

    num_latents: latents received so far, a host integer (a leaf, so that checkpoints keep it).
    latents: [B, n, h, w, C] float32, the last n of them: those the next window needs.
    tail: [B, m, H, W, 3] pixels of the latents held back, as the last window saw them; m is 0
      until a first frame has been emitted.
    finite: [] boolean, whether all pixels of the last decode were numbers.
    """

    num_latents: int
    latents: jax.Array
    tail: jax.Array
    finite: jax.Array


StreamState = CausalVideoState | WindowVideoState


def to_uint8(video: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> round(clip((x + 1) * 127.5, 0, 255)) as uint8."""
    scaled = (video.astype(jnp.float32) + 1.0) * 127.5
    return jnp.round(jnp.clip(scaled, min=0.0, max=255.0)).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames=("cache",))
def _causal_step(config, params, latents, cache, dtype):
    """Decodes a chunk; without a cache it is the first one."""
    video, cache = decode_chunk(config, params, latents, cache, causal=True, dtype=dtype)
    return to_uint8(video), cache, jnp.isfinite(video).all()


@partial(jax.jit, static_argnums=(0, 1, 6, 7, 8, 9))
def _window_step(
    config, dtype, params, history, latents, tail, first, stop, num_blend, num_old_latents
):
    """Decodes one window.

    Its frames [first, stop) are emitted, the frames from `stop` on are the new tail, and its
    latents from `num_old_latents` on the new history. The first `num_blend` frames from `first`
    on fade from the previous window's estimate (`tail`) to this one's.
    """
    window = jnp.concatenate([history, latents.astype(history.dtype)], axis=1)
    video, _ = decode_chunk(config, params, window, causal=False, dtype=dtype)
    # With few new latents the fade outlasts the emitted frames and goes on in the new tail.
    video = video[:, first:]
    if num_blend:
        weight = jnp.arange(1, num_blend + 1, dtype=jnp.float32) / (num_blend + 1)
        weight = weight[None, :, None, None, None]
        old, new = (part[:, :num_blend].astype(jnp.float32) for part in (tail, video))
        faded = ((1.0 - weight) * old + weight * new).astype(dtype)
        video = jnp.concatenate([faded, video[:, num_blend:]], axis=1)
    count = stop - first
    shown, tail = to_uint8(video[:, :count]), video[:, count:]
    return shown, tail, window[:, num_old_latents:], jnp.isfinite(video).all()


class StreamingVideoDecoder:
    """Decodes a stream of latents chunk by chunk.

    Usage:
      state = decoder.init(batch, height, width)
      state, frames = decoder.push(state, latents)   # once per chunk
      state, frames = decoder.flush(state)           # the frames still held back

    Chunks may differ in length; each new combination of length and position is compiled once, and
    with a constant length nothing is compiled after the first few. Both modes return
    8 (n - 1) + 1 frames for n latents in total, flush included. All state is in the returned
    value: saved with `jax.device_get` and given back later, the stream continues unchanged.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        params: dict[str, Any],
        *,
        mode: str = "window",
        look_back: int = 4,
        look_ahead: int = 1,
        blend: int = 1,
        dtype=jnp.float32,
    ):
        """
        Args:
          params: tree {decoder, per_channel_statistics}; other entries are ignored.
          mode: "window" or "causal". The other options are for "window" alone.
          look_back: latents decoded again to the left of the first new frame, at least 1.
          look_ahead: latents to the right of a frame before it is emitted.
          blend: latents over which a window fades into the next one. They are held back as well,
            so frames lag by `look_ahead + blend` latents; 0 and 0 give the lowest latency.
          dtype: compute dtype.

        Raises:
          ValueError: for an unknown mode, an option out of range, or mode "window" with a decoder
            that was trained causal.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        for name, value, least in (
            ("look_back", look_back, 1),
            ("look_ahead", look_ahead, 0),
            ("blend", blend, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if mode == "window" and config.causal_decoder:
            raise ValueError("this decoder was trained causal: use mode='causal'")
        self.config = config
        self.mode = mode
        self.dtype = dtype
        self._look_back = look_back
        self._blend = blend
        self._held_back = look_ahead + blend if mode == "window" else 0
        self._params = {
            "decoder": jax.tree.map(lambda p: jnp.asarray(p, dtype), params["decoder"]),
            "per_channel_statistics": params["per_channel_statistics"],
        }
        self._window_step = partial(_window_step, config, dtype, self._params)

    def frames_after(self, num_latents: int, flushed: bool = False) -> int:
        """Frames returned in total once `num_latents` latents were pushed.

        8 (n - held - 1) + 1, or 0 if that is negative, with held = look_ahead + blend ("window")
        or 0 ("causal", or after `flush`).
        """
        held_back = 0 if flushed else self._held_back
        return self.config.pixel_frames(max(0, num_latents - held_back))

    def init(self, batch: int, height: int, width: int) -> StreamState:
        """State before the first latent, for videos of `height` x `width` pixels.

        Raises:
          ValueError: if the size is no multiple of the spatial compression, or too small.
        """
        h, w = self.config.latent_size(height, width)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        shape = (batch, 1, h, w, self.config.latent_channels)
        check_latents(self.config, shape)
        if self.mode == "window":
            history = jnp.zeros((batch, 0, *shape[2:]), jnp.float32)
            return WindowVideoState(0, history, self._no_frames(history, self.dtype), FINITE)
        step = partial(_causal_step, self.config, cache=None, dtype=self.dtype)
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        _, cache, _ = jax.eval_shape(step, self._params, latents)
        cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)
        return CausalVideoState(0, cache, FINITE)

    def push(self, state: StreamState, latents: jax.Array) -> tuple[StreamState, jax.Array]:
        """Decodes the next latents.

        Args:
          state: from `init`, `push` or `flush`. Mode "causal" reuses its buffers: do not use the
            old state again; copy it first to be able to go back.
          latents: normalised, [B, f >= 1, h, w, C].

        Returns:
          The next state, and the next frames uint8 [B, n, H, W, 3];
          n = frames_after(N + f) - frames_after(N) may be 0.

        Raises:
          ValueError: if the shape does not fit the stream.
        """
        previous = state.latents if self.mode == "window" else state.cache["conv_in"]
        check_latents(self.config, latents.shape)
        expected = (previous.shape[0], latents.shape[1], *previous.shape[2:])
        if latents.shape != expected:
            raise ValueError(f"this stream takes latents of shape {expected}, got {latents.shape}")
        if self.mode == "window":
            return self._push_window(state, latents)
        num_latents = int(state.num_latents)
        cache = state.cache if num_latents else None
        step = partial(_causal_step, self.config, self._params, dtype=self.dtype)
        frames, cache, finite = step(latents, cache)
        return CausalVideoState(num_latents + latents.shape[1], cache, finite), frames

    def warm_up(self, state: StreamState, blocks: Iterable[jax.Array]) -> None:
        """Compiles what a stream needs whose chunks have the shapes of `blocks`.

        Args:
          state: from `init`.
          blocks: the latents of the stream's chunks; only as many are read as differ.
        """
        before = None
        for latents in blocks:
            state, frames = self.push(state, latents)
            shapes = jax.tree.map(np.shape, (state, frames))
            if shapes == before:
                break
            before = shapes
        jax.block_until_ready(self.flush(state))

    def flush(self, state: StreamState) -> tuple[StreamState, jax.Array]:
        """Ends the clip: the frames still held back, and the state of a new clip of the same size.

        In mode "causal" nothing is held back and the frames are [B, 0, H, W, 3].
        """
        finite = state.finite
        if self.mode == "causal":
            batch, _, h, w, _ = state.cache["conv_in"].shape
            frames = self._no_frames(state.cache["conv_in"], jnp.uint8)
        else:
            batch, num_history, h, w, _ = state.latents.shape
            if 0 < int(state.num_latents) <= self._held_back:
                # Nothing was decoded so far, the history is the clip.
                none = state.latents[:, :0]
                stop = self.config.pixel_frames(num_history)
                window = state.latents, none, state.tail
                frames, _, _, finite = self._window_step(*window, 0, stop, 0, 0)
            else:
                frames = to_uint8(state.tail)
        step = self.config.spatial_compression
        return self.init(batch, h * step, w * step).replace(finite=finite), frames

    def _push_window(self, state: WindowVideoState, latents: jax.Array):
        before, after = int(state.num_latents), int(state.num_latents) + latents.shape[1]
        if after <= self._held_back:
            history = jnp.concatenate([state.latents, latents.astype(jnp.float32)], axis=1)
            state = WindowVideoState(after, history, state.tail, state.finite)
            return state, self._no_frames(latents, jnp.uint8)
        # Positions in latents and pixel frames of the clip, then relative to the window.
        start = before - state.latents.shape[1]
        origin = start * self.config.temporal_compression
        first = self.frames_after(before) - origin
        stop = self.frames_after(after) - origin
        num_old_latents = max(0, after - self._held_back - self._look_back) - start
        num_blend = min(self._blend * self.config.temporal_compression, state.tail.shape[1])
        frames, tail, history, finite = self._window_step(
            state.latents, latents, state.tail, first, stop, num_blend, num_old_latents
        )
        return WindowVideoState(after, history, tail, finite), frames

    def _no_frames(self, latents: jax.Array, dtype) -> jax.Array:
        """[B, 0, H, W, 3] for latents [B, f, h, w, C]."""
        step = self.config.spatial_compression
        batch, _, h, w, _ = latents.shape
        return jnp.zeros((batch, 0, h * step, w * step, 3), dtype)


def seam_error(full: np.ndarray, streamed: np.ndarray, borders: Sequence[int]) -> dict[str, float]:
    """How much worse a streamed decode is where two chunks meet than elsewhere.

    Args:
      full, streamed: the same clip [F, H, W, 3] decoded at once and in chunks, same value range.
      borders: index of the first frame of every chunk but the first one.

    Returns:
      seam: mean absolute error of the two frames at each border, averaged.
      median: median over all frames of the frame's mean absolute error.
      ratio: seam / median. When at least half the frames are exact the median is 0, and the mean
        over all frames stands in for it; 1.0 when everything is exact. Always finite.

    Raises:
      ValueError: for clips of different shape, no border, or a border outside 1 .. F-1.
    """
    full, streamed = np.asarray(full), np.asarray(streamed)
    if full.shape != streamed.shape or full.ndim != 4:
        raise ValueError(f"clips must share a shape [F, H, W, 3]: {full.shape}, {streamed.shape}")
    if not borders or min(borders) < 1 or max(borders) >= len(full):
        raise ValueError(f"borders must lie in 1 .. {len(full) - 1}, got {list(borders)}")
    difference = np.abs(full.astype(np.float32) - streamed.astype(np.float32))
    per_frame = difference.mean(axis=(1, 2, 3), dtype=np.float64)
    seam = float(np.mean([per_frame[[border - 1, border]] for border in borders]))
    median = float(np.median(per_frame))
    reference = median if median > 0 else float(per_frame.mean())
    ratio = seam / reference if reference > 0 else 1.0
    return {"seam": seam, "median": median, "ratio": ratio}
