"""Streaming video decode: latents go in as they are generated, uint8 frames come out.

Three ways, because the published decoder looks 13 (LTX-2.3) to 22 (LTX-2.0) latent frames ahead:

* "window" runs the decoder as it was trained, over the latents that are not final yet. What comes
  before them is kept, one frame of each convolution's input, and what follows them is missing: it
  approximates the decode of the whole clip, and equals it if `look_ahead` covers the receptive
  field.
* "causal" runs every convolution causally and stores the last two frames of its input between
  chunks. It equals the causal decode of the whole clip however it is cut, and computes nothing
  twice, but the published weights were not trained for it.
* "tiny" runs another network, which is causal and small: exact as well, of a softer picture.

Counts are in latent frames. With a compression of 8, latent 0 is pixel frame 0 and latent i > 0 is
pixel frames 8i-7 .. 8i.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniforcing_jax.models import tiny_decoder
from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.models.video_vae.layers import ConvCache, frames_before
from omniforcing_jax.models.video_vae.model import VideoVAEConfig, check_latents, decode_chunk

MODES = ("window", "causal", "tiny")
FINITE = np.bool_(True)  # of a stream that has not begun


@struct.dataclass
class CausalVideoState:
    """Stream state of the modes "causal" and "tiny".

    num_latents: latents received so far, a host integer (a leaf, so that checkpoints keep it).
    cache: not read while num_latents is 0. Causal: last two input frames [B, 2, h, w, C] of every
      convolution, laid out as the parameters; `conv_in` holds the last two latents. Tiny: last
      input frame [B, 1, h, w, C] of every memory block.
    finite: [] boolean, whether all pixels of the last decode were numbers.
    """

    num_latents: int
    cache: ConvCache | tiny_decoder.Memory
    finite: jax.Array


@struct.dataclass
class WindowVideoState:
    """Stream state of mode "window".

    num_latents: latents received so far, a host integer (a leaf, so that checkpoints keep it).
    latents: [B, n, h, w, C] float32, the last n of them: those the next window decodes again.
    cache: the frame [B, 1, h, w, C] before them of every convolution's input, laid out as the
      parameters. Not read while they are all of the clip.
    tail: [B, m, H, W, 3] pixels of the latents held back, as the last window saw them; m is 0
      until a first frame has been emitted.
    finite: [] boolean, whether all pixels of the last decode were numbers.
    """

    num_latents: int
    latents: jax.Array
    cache: ConvCache
    tail: jax.Array
    finite: jax.Array


StreamState = CausalVideoState | WindowVideoState


def to_uint8(video: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> round(clip((x + 1) * 127.5, 0, 255)) as uint8."""
    scaled = (video.astype(jnp.float32) + 1.0) * 127.5
    return jnp.round(jnp.clip(scaled, min=0.0, max=255.0)).astype(jnp.uint8)


# for shapes: traced once for all streams of a size, as a server opens many
_decode = jax.jit(decode_chunk, static_argnames=("config", "causal", "dtype"))


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames=("cache",))
def _causal_step(config, params, latents, cache, dtype):
    """Decodes a chunk; without a cache it is the first one."""
    if isinstance(config, TinyDecoderConfig):
        video, cache = tiny_decoder.decode_chunk(config, params, latents, cache, dtype)
    else:
        video, cache = decode_chunk(config, params, latents, cache, causal=True, dtype=dtype)
    return to_uint8(video), cache, jnp.isfinite(video).all()


@partial(
    jax.jit,
    static_argnames=("config", "dtype", "first", "stop", "num_blend", "num_old_latents"),
)
def _window_step(
    config,
    dtype,
    params,
    history,
    latents,
    cache,
    tail,
    *,
    first,
    stop,
    num_blend,
    num_old_latents,
):
    """Decodes one window; without a cache it starts the clip.

    Its frames [first, stop) are emitted, the frames from `stop` on are the new tail, and its
    latents from `num_old_latents` on the new history. The first `num_blend` frames from `first`
    on fade from the previous window's estimate (`tail`) to this one's.
    """
    window = jnp.concatenate([history, latents.astype(history.dtype)], axis=1)
    video, inputs = decode_chunk(config, params, window, cache, causal=False, dtype=dtype)
    if num_old_latents:
        cache = frames_before(inputs, num_old_latents, window.shape[1], cache is not None)
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
    return shown, tail, window[:, num_old_latents:], cache, jnp.isfinite(video).all()


class StreamingVideoDecoder:
    """Decodes a stream of latents chunk by chunk.

    Usage:
      state = decoder.init(batch, height, width)
      state, frames = decoder.push(state, latents)   # once per chunk
      state, frames = decoder.flush(state)           # the frames still held back

    Chunks may differ in length; each new combination of length and position is compiled once, and
    with a constant length nothing is compiled after the first few. All modes return
    8 (n - 1) + 1 frames for n latents in total, flush included. All state is in the returned
    value: saved with `jax.device_get` and given back later, the stream continues unchanged.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        params: dict[str, Any],
        *,
        mode: str = "window",
        tiny: TinyDecoderConfig | None = None,
        look_back: int = 0,
        look_ahead: int = 2,
        blend: int = 0,
        dtype=jnp.float32,
    ):
        """
        Args:
          config: of the video VAE.
          params: tree {decoder, per_channel_statistics}; other entries are ignored. In mode "tiny"
            that of the tiny decoder.
          mode: one of `MODES`.
          tiny: network of mode "tiny". The options that follow are for "window" alone.
          look_back: latents decoded again to the left of the first new frame, which then are seen
            with more of what follows them.
          look_ahead: latents to the right of a frame before it is emitted.
          blend: latents over which a window fades into the next one. They are held back as well,
            so frames lag by `look_ahead + blend` latents; 0 and 0 give the lowest latency. The same
            lag is spent better on `look_ahead` (docs/streaming.md).
          dtype: compute dtype.

        Raises:
          ValueError: for an unknown mode, an option out of range, or mode "window" with a decoder
            that was trained causal, or "tiny" without its network, or with one of other latents.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        latents = {"look_back": look_back, "look_ahead": look_ahead, "blend": blend}
        for name, value in latents.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        if mode == "window" and config.causal_decoder:
            raise ValueError("this decoder was trained causal: use mode='causal'")
        if mode == "tiny":
            _check_tiny(config, tiny)
        self.config = config
        self.mode = mode
        self.dtype = dtype
        self._look_back = look_back
        self._blend = blend
        self._held_back = look_ahead + blend if mode == "window" else 0
        network, weights = (tiny, params) if mode == "tiny" else (config, params["decoder"])
        self._params = weights = jax.tree.map(lambda p: jnp.asarray(p, dtype), weights)
        if mode != "tiny":
            statistics = params["per_channel_statistics"]
            self._params = {"decoder": weights, "per_channel_statistics": statistics}
        self._causal_step = partial(_causal_step, network, self._params, dtype=dtype)
        self._window_step = partial(_window_step, config, dtype, self._params)

    def frames_after(self, num_latents: int, flushed: bool = False) -> int:
        """Frames returned in total once `num_latents` latents were pushed.

        8 (n - held - 1) + 1, or 0 if that is negative, with held = look_ahead + blend ("window")
        or 0 (other modes, or after `flush`).
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
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.mode == "window":
            step = partial(_decode, self.config, causal=False, dtype=self.dtype)
            _, cache = jax.eval_shape(step, self._params, latents)
        else:
            _, cache, _ = jax.eval_shape(partial(self._causal_step, cache=None), latents)
        cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)
        if self.mode != "window":
            return CausalVideoState(0, cache, FINITE)
        history = jnp.zeros((batch, 0, *shape[2:]), jnp.float32)
        tail = self._no_frames((batch, h, w), self.dtype)
        return WindowVideoState(0, history, cache, tail, FINITE)

    def push(self, state: StreamState, latents: jax.Array) -> tuple[StreamState, jax.Array]:
        """Decodes the next latents.

        Args:
          state: from `init`, `push` or `flush`. All modes but "window" reuse its buffers: do not
            use the old state again; copy it first to be able to go back.
          latents: normalised, [B, f >= 1, h, w, C].

        Returns:
          The next state, and the next frames uint8 [B, n, H, W, 3];
          n = frames_after(N + f) - frames_after(N) may be 0.

        Raises:
          ValueError: if the shape does not fit the stream.
        """
        check_latents(self.config, latents.shape)
        batch, h, w = self._size(state)
        expected = (batch, latents.shape[1], h, w, self.config.latent_channels)
        if latents.shape != expected:
            raise ValueError(f"this stream takes latents of shape {expected}, got {latents.shape}")
        if self.mode == "window":
            return self._push_window(state, latents)
        num_latents = int(state.num_latents)
        cache = state.cache if num_latents else None
        frames, cache, finite = self._causal_step(latents, cache)
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

        Only in mode "window" anything is held back; in others the frames are [B, 0, H, W, 3].
        """
        finite = state.finite
        batch, h, w = self._size(state)
        if self.mode != "window":
            frames = self._no_frames((batch, h, w), jnp.uint8)
        elif 0 < int(state.num_latents) <= self._held_back:
            # Nothing was decoded so far, the history is the clip.
            none = state.latents[:, :0]
            stop = self.config.pixel_frames(state.latents.shape[1])
            window = state.latents, none, None, state.tail
            how = {"first": 0, "stop": stop, "num_blend": 0, "num_old_latents": 0}
            frames, *_, finite = self._window_step(*window, **how)
        else:
            frames = to_uint8(state.tail)
        step = self.config.spatial_compression
        return self.init(batch, h * step, w * step).replace(finite=finite), frames

    def _push_window(self, state: WindowVideoState, latents: jax.Array):
        before, after = int(state.num_latents), int(state.num_latents) + latents.shape[1]
        if after <= self._held_back:
            history = jnp.concatenate([state.latents, latents.astype(jnp.float32)], axis=1)
            state = state.replace(num_latents=after, latents=history)
            return state, self._no_frames(self._size(state), jnp.uint8)
        # Positions in latents and pixel frames of the clip, then relative to the window.
        start = before - state.latents.shape[1]
        origin = self.config.pixel_frames(start)
        frames, tail, history, cache, finite = self._window_step(
            state.latents,
            latents,
            state.cache if start else None,
            state.tail,
            first=self.frames_after(before) - origin,
            stop=self.frames_after(after) - origin,
            num_blend=min(self._blend * self.config.temporal_compression, state.tail.shape[1]),
            num_old_latents=max(0, after - self._held_back - self._look_back) - start,
        )
        cache = state.cache if cache is None else cache
        return WindowVideoState(after, history, cache, tail, finite), frames

    def _size(self, state: StreamState) -> tuple[int, int, int]:
        """Batch, height and width of the stream's latents."""
        if self.mode == "window":
            array = state.latents
        else:
            array = state.cache["conv_in" if self.mode == "causal" else tiny_decoder.FIRST]
        return array.shape[0], *array.shape[2:4]

    def _no_frames(self, size: tuple[int, int, int], dtype) -> jax.Array:
        """[B, 0, H, W, 3] for latents of (batch, height, width)."""
        step = self.config.spatial_compression
        batch, h, w = size
        return jnp.zeros((batch, 0, h * step, w * step, 3), dtype)


def _check_tiny(config: VideoVAEConfig, tiny: TinyDecoderConfig | None) -> None:
    """Raises ValueError unless `tiny` can stand in for the VAE's decoder."""
    if tiny is None:
        raise ValueError(
            "the checkpoint has no tiny decoder; python -m checkpoint_converters.tiny_decoder adds "
            "one from TAEHV's taeltx_2 (LTX-2.0) or taeltx2_3 (2.3 and 2.5)"
        )
    names = ("latent_channels", "temporal_compression", "spatial_compression")
    own, usual = ([getattr(c, name) for name in names] for c in (tiny, config))
    if own != usual:
        raise ValueError(
            f"the tiny decoder has {own}, the video VAE {usual} ({', '.join(names)}): they are for "
            "different models"
        )


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
