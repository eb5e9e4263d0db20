"""Sound and pictures to latents as they arrive, equal to encoding the whole clip at once.

Both VAE encoders are causal, so each block of latents needs what its convolutions have seen last,
and nothing of the future but the spectrogram's: a mel frame is made of 512 samples (32 ms) at
16 kHz on both sides of its time, and resampling looks a few samples further.

A stream is encoded in steps of fixed size, first one latent, then a block at a time, however it is
cut into pushes: the same latents come out, bit for bit, and two programs are compiled in all.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniforcing_jax.io.media_files import SOUND_RATE_STEP, check_sample_rate
from omniforcing_jax.models.audio import mel
from omniforcing_jax.models.audio.vae import AudioVAEConfig, encode_audio_chunk
from omniforcing_jax.models.video_vae.layers import ConvCache
from omniforcing_jax.models.video_vae.model import VideoVAEConfig, encode_chunk

_STEREO = 2
_ALL_THERE = 2**30  # stands for the length of a sound that has not ended


@struct.dataclass
class AudioEncoderState:
    """State of a sound between two pushes; a pytree that `jax.device_get` copies.

    Attributes:
      sample_rate: of the sound, Hz (host integer, as all numbers here).
      samples: [B, n, 2] float32 on the host: what the next latents still need.
      first_sample: where `samples` begins; negative for the silence before the sound.
      history: last input rows of every convolution, None before the first latent.
      num_latents: latents encoded so far.
      flushed: whether the sound has ended.
    """

    sample_rate: int
    samples: np.ndarray
    first_sample: int
    history: dict | None
    num_latents: int
    flushed: bool


class StreamingAudioEncoder:
    """Encodes a sound into audio latents while it arrives.

    A latent lasts 1/25 s: latent i stands for the samples up to i / 25 s and needs
    `look_ahead(sample_rate)` more of them. The first one stands for the very beginning.
    """

    def __init__(
        self,
        config: AudioVAEConfig,
        params: Mapping[str, Any],
        *,
        step: int = 25,
        dtype: jnp.dtype = jnp.float32,
    ):
        """
        Args:
          config: audio VAE.
          params: {encoder, per_channel_statistics}; other entries are ignored.
          step: latents that are encoded at a time, after the first one: those of a block
            (`BlockLayout.audio_frames`).
          dtype: compute dtype.

        Raises:
          ValueError: the VAE was loaded without its encoder, or `step` is less than 1.
        """
        self.config, self.dtype = config, dtype
        self._params = encoder_params(params, "audio VAE")
        if step < 1:
            raise ValueError(f"step must be at least 1 latent, not {step}")
        self._step = step
        spectrum = config.mel
        self._hops = config.downsampling * spectrum.hop  # samples of the spectrogram per latent
        if spectrum.sample_rate != SOUND_RATE_STEP * self._hops or spectrum.n_fft > 2 * self._hops:
            raise ValueError(
                f"audio latents of {self._hops} samples at {spectrum.sample_rate} Hz are not 1/25 s"
            )

    def look_ahead(self, sample_rate: int) -> int:
        """Samples that a latent needs beyond its own end."""
        spectrum = self.config.mel
        half = math.ceil(spectrum.n_fft // 2 * sample_rate / spectrum.sample_rate)
        return half + mel.resampling_reach(sample_rate, spectrum.sample_rate)

    def samples_for(self, num_latents: int, sample_rate: int) -> int:
        """Samples that the first `num_latents` latents are made of, at least one."""
        return (num_latents - 1) * sample_rate // SOUND_RATE_STEP + self.look_ahead(sample_rate)

    def latents_after(self, num_samples: int, sample_rate: int, flushed: bool = False) -> int:
        """Latents that so many samples give, before and after the end of the sound is known."""
        if flushed:
            return num_samples * SOUND_RATE_STEP // sample_rate + 1 if num_samples else 0
        ready = (num_samples - self.look_ahead(sample_rate)) * SOUND_RATE_STEP // sample_rate
        return 0 if ready < 0 else 1 + ready // self._step * self._step

    def init(self, batch: int, sample_rate: int) -> AudioEncoderState:
        """State before the first sample.

        Raises:
          ValueError: `batch` is less than 1, or see `check_sample_rate`.
        """
        check_sample_rate(sample_rate)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        before = self._window(sample_rate, 0, 1)[0]  # silence, which mirroring replaces
        samples = np.zeros((batch, -before, _STEREO), np.float32)
        return AudioEncoderState(sample_rate, samples, before, None, 0, False)

    def push(
        self, state: AudioEncoderState, waveform: np.ndarray
    ) -> tuple[AudioEncoderState, jax.Array]:
        """Encodes the next samples.

        Args:
          state: from `init` or the previous call; not modified.
          waveform: [B, n, 2] float32 in [-1, 1] at the sound's rate, n of any size.

        Returns:
          The new state and normalised latents [B, t, C] float32, t a multiple of `step` but for the
          first one, and often 0; see `latents_after`.

        Raises:
          ValueError: the sound has ended, or a waveform of another shape.
        """
        if state.flushed:
            raise ValueError("this sound was flushed; begin a new one with init")
        waveform = np.asarray(waveform, np.float32)
        batch = state.samples.shape[0]
        if waveform.ndim != 3 or waveform.shape[::2] != (batch, _STEREO):
            raise ValueError(
                f"this sound takes a waveform [{batch}, n, {_STEREO}], got {waveform.shape}"
            )
        state = state.replace(samples=np.concatenate([state.samples, waveform], axis=1))
        num_samples = state.first_sample + state.samples.shape[1]
        return self._encode(state, self.latents_after(num_samples, state.sample_rate), None)

    def flush(self, state: AudioEncoderState) -> tuple[AudioEncoderState, jax.Array]:
        """Ends the sound: the latents [B, t, C] that waited for more of it.

        Raises:
          ValueError: the sound has ended before, or is shorter than 33 ms, which has no spectrum.
        """
        if state.flushed:
            raise ValueError("this sound was flushed already")
        num_samples = state.first_sample + state.samples.shape[1]
        rate, spectrum = state.sample_rate, self.config.mel
        total = -(-num_samples * spectrum.sample_rate // rate)
        if 0 < total <= spectrum.n_fft // 2:
            raise ValueError(
                f"the sound lasts {num_samples} samples at {rate} Hz; its spectrum needs more than "
                f"{spectrum.n_fft // 2 / spectrum.sample_rate:g} s"
            )
        state, latents = self._encode(state, self.latents_after(num_samples, rate, True), total)
        return state.replace(flushed=True), latents

    def encode(
        self, waveform: np.ndarray, sample_rate: int, num_latents: int | None = None
    ) -> jax.Array:
        """The latents of a whole sound.

        Args:
          waveform: [B, n, 2] float32 in [-1, 1].
          num_latents: how many: the rest of a longer sound is not encoded, and a shorter one is
            followed by silence. None is all of it.

        Returns:
          [B, t, C] float32 normalised latents.

        Raises:
          ValueError: a waveform of another shape, or one too short for a spectrum where
            `num_latents` is None.
        """
        waveform = np.asarray(waveform, np.float32)
        if num_latents is not None:
            most, spectrum = self.samples_for(num_latents, sample_rate), self.config.mel
            # what lies beyond the latents may be mirrored, if there is enough for a spectrum
            least = most - self.look_ahead(sample_rate)
            least = max(least, spectrum.n_fft // 2 * sample_rate // spectrum.sample_rate + 1)
            silence = most - waveform.shape[1] if waveform.shape[1] < least else 0
            waveform = np.pad(waveform[:, :most], ((0, 0), (0, max(silence, 0)), (0, 0)))
        state, latents = self.push(self.init(waveform.shape[0], sample_rate), waveform)
        if num_latents is None or latents.shape[1] < num_latents:
            latents = jnp.concatenate([latents, self.flush(state)[1]], axis=1)
        return latents[:, :num_latents]

    def _encode(
        self, state: AudioEncoderState, wanted: int, total: int | None
    ) -> tuple[AudioEncoderState, jax.Array]:
        """Steps until there are `wanted` latents; `total` is the length at 16 kHz, if known."""
        batch, rate = state.samples.shape[0], state.sample_rate
        samples, first, history = state.samples, state.first_sample, state.history
        done, pieces = state.num_latents, []
        while done < wanted:
            count = self._step if done else 1
            begin, end = self._window(rate, done, count)
            window = samples[:, begin - first : end - first]
            missing = end - begin - window.shape[1]  # after the end
            latents, history = _encode_step(
                self._params,
                np.pad(window, ((0, 0), (0, missing), (0, 0))),
                history,
                np.int32(self._hops * (done - 2)),
                np.int32(_ALL_THERE if total is None else total),
                config=self.config,
                sample_rate=rate,
                count=count,
                dtype=self.dtype,
            )
            pieces.append(latents[:, : wanted - done])
            done += count
            kept = self._window(rate, done, self._step)[0]
            samples, first = samples[:, max(0, kept - first) :], max(kept, first)
        empty = jnp.zeros((batch, 0, self.config.latent_width), jnp.float32)
        latents = jnp.concatenate([empty, *pieces], axis=1)
        done = min(done, wanted) if total is not None else done
        waiting = samples.copy()  # a view would keep all of them in memory
        return AudioEncoderState(rate, waiting, first, history, done, False), latents

    def _window(self, rate: int, latent: int, count: int) -> tuple[int, int]:
        """Samples that `count` latents from `latent` on are made of.

        It begins with a whole latent's samples, which keeps the phase of the resampling.
        """
        own, reach = (
            rate // SOUND_RATE_STEP,
            mel.resampling_reach(rate, self.config.mel.sample_rate),
        )
        return (latent - 2) * own - reach, (latent + count - 1) * own + self.look_ahead(rate)


@functools.partial(jax.jit, static_argnames=("config", "sample_rate", "count", "dtype"))
def _encode_step(params, window, history, start, total, *, config, sample_rate, count, dtype):
    """The next `count` latents [B, count, C] of the samples `StreamingAudioEncoder._window` names.

    Args:
      start: number of the window's first sample at 16 kHz, its reach aside.
      total: 16 kHz samples of the sound; beyond both of its ends it is mirrored.
    """
    spectrum = config.mel
    target, own = spectrum.sample_rate, config.downsampling * spectrum.hop
    # up to the end of a latent: what is added has no influence on the frames below
    reach = mel.resampling_reach(sample_rate, target)
    length = (count + 2) * sample_rate // SOUND_RATE_STEP + 2 * reach
    window = jnp.pad(window, ((0, 0), (0, length - window.shape[1]), (0, 0)))
    samples = mel.resample_window(window, sample_rate, target)  # [B, (count + 2) own, 2]
    frames = 1 if history is None else config.downsampling * count
    # the frame of the last latent is centred at the window's (count + 1)th border
    first = (count + 1) * own - (frames - 1) * spectrum.hop - spectrum.n_fft // 2
    index = first + jnp.arange((frames - 1) * spectrum.hop + spectrum.n_fft)
    place = jnp.abs(start + index)
    place = jnp.where(place >= total, 2 * (total - 1) - place, place)
    mirrored = samples[:, jnp.clip(place - start, 0, samples.shape[1] - 1)]
    log_mel = mel.log_mel_frames(mirrored, frames, spectrum)
    return encode_audio_chunk(params, config, log_mel, history, dtype=dtype)


class StreamingResampler:
    """`mel.resample` of a sound that arrives in pieces, such as to the rate it is played at.

    It works in steps of 1/25 s, so its results do not depend on how the sound is cut; those of a
    step come `reach` samples after its end. Between equal rates samples pass unchanged.
    """

    def __init__(self, source_rate: int, target_rate: int):
        """
        Args:
          source_rate, target_rate: in Hz.

        Raises:
          ValueError: see `check_sample_rate`.
        """
        for rate in (source_rate, target_rate):
            check_sample_rate(rate)
        self.source_rate, self.target_rate = source_rate, target_rate
        self.reach = mel.resampling_reach(source_rate, target_rate)

    def init(self, batch: int) -> np.ndarray:
        """State before the first sample: the samples [B, n, 2] that the next results still need."""
        return np.zeros((batch, self.reach, _STEREO), np.float32)

    def push(self, state: np.ndarray, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes the next samples [B, n, 2]; returns the new state and [B, m, 2] at the new rate."""
        samples = np.concatenate([state, np.asarray(waveform, np.float32)], axis=1)
        if self.source_rate == self.target_rate:
            return samples[:, :0], samples
        own, start, pieces = self.source_rate // SOUND_RATE_STEP, 0, []
        while (stop := start + own + 2 * self.reach) <= samples.shape[1]:
            pieces.append(_resample(samples[:, start:stop], self.source_rate, self.target_rate))
            start += own
        return samples[:, start:].copy(), np.concatenate([samples[:, :0], *pieces], axis=1)

    def flush(self, state: np.ndarray) -> np.ndarray:
        """The last samples [B, m, 2]: N of them have then become ceil(N target / source)."""
        waiting = state.shape[1] - self.reach
        more = self.source_rate // SOUND_RATE_STEP + 2 * self.reach
        silence = np.zeros((state.shape[0], more, _STEREO), np.float32)
        resampled = self.push(state, silence)[1]
        return resampled[:, : -(-waiting * self.target_rate // self.source_rate)]


_resample = jax.jit(mel.resample_window, static_argnums=(1, 2))


@struct.dataclass
class VideoEncoderState:
    """State of a clip between two pushes; a pytree that `jax.device_get` copies.

    Attributes:
      frames: [B, n, H, W, 3] float32 on the host: frames that do not fill a step yet.
      cache: last two input frames of every convolution, None before the first latent.
      num_latents: latents encoded so far (host integer).
    """

    frames: np.ndarray
    cache: ConvCache | None
    num_latents: int


class StreamingVideoEncoder:
    """Encodes a clip into video latents while it arrives.

    The first frame makes a latent of its own, every eight more another one.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        params: Mapping[str, Any],
        *,
        step: int = 3,
        dtype: jnp.dtype = jnp.float32,
    ):
        """
        Args:
          config: video VAE.
          params: {encoder, per_channel_statistics}; other entries are ignored.
          step: latents that are encoded at a time, after the first one: those of a block
            (`BlockLayout.video_frames`).
          dtype: compute dtype.

        Raises:
          ValueError: the VAE was loaded without its encoder, or `step` is less than 1.
        """
        self.config, self.dtype = config, dtype
        self._params = encoder_params(params, "video VAE")
        if step < 1:
            raise ValueError(f"step must be at least 1 latent, not {step}")
        self._step = step

    def init(self, batch: int, height: int, width: int) -> VideoEncoderState:
        """State before the first frame of clips of `height` x `width` pixels.

        Raises:
          ValueError: the size is no multiple of the spatial compression, or `batch` less than 1.
        """
        self.config.latent_size(height, width)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        return VideoEncoderState(np.zeros((batch, 0, height, width, 3), np.float32), None, 0)

    def push(
        self, state: VideoEncoderState, frames: np.ndarray
    ) -> tuple[VideoEncoderState, jax.Array]:
        """Encodes the next frames.

        Args:
          state: from `init` or the previous call; not modified.
          frames: [B, n, H, W, 3] float32 in [-1, 1] (`fit_pixels`), n of any number.

        Returns:
          The new state and normalised latents [B, f, h, w, C] float32; f may be 0.

        Raises:
          ValueError: frames of another shape than the clip's.
        """
        frames = np.asarray(frames, np.float32)
        expected = (state.frames.shape[0], *state.frames.shape[2:])
        if frames.ndim != 5 or (frames.shape[0], *frames.shape[2:]) != expected:
            raise ValueError(
                f"this clip takes frames [B, n, H, W, 3] of {expected}: {frames.shape}"
            )
        if state.frames.shape[1]:  # a whole clip is not copied
            frames = np.concatenate([state.frames, frames], axis=1)
        cache, done, start, pieces = state.cache, state.num_latents, 0, []
        while (stop := start + self._frames_needed(done)) <= frames.shape[1]:
            chunk = frames[:, start:stop]
            latents, cache = _encode_frames(self.config, self._params, chunk, cache, self.dtype)
            pieces.append(latents)
            done, start = done + latents.shape[1], stop
        waiting = frames[:, start:].copy()  # a view would keep all of them in memory
        return VideoEncoderState(waiting, cache, done), self._joined(frames, pieces)

    def flush(self, state: VideoEncoderState) -> tuple[VideoEncoderState, jax.Array]:
        """Ends the clip: the latents of the frames that waited, and the state of a new clip.

        Of the last frames, those that do not fill a latent (of eight) are not encoded.
        """
        batch, waiting, height, width, _ = state.frames.shape
        new, pieces = waiting // self.config.temporal_compression, []
        if new:
            more = self._frames_needed(state.num_latents) - waiting
            frames = np.pad(state.frames, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)), "edge")
            latents, _ = _encode_frames(self.config, self._params, frames, state.cache, self.dtype)
            pieces = [latents[:, :new]]
        return self.init(batch, height, width), self._joined(state.frames, pieces)

    def _frames_needed(self, num_latents: int) -> int:
        """Frames of the next step."""
        return self._step * self.config.temporal_compression if num_latents else 1

    def _joined(self, frames: np.ndarray, pieces: list[jax.Array]) -> jax.Array:
        h, w = self.config.latent_size(*frames.shape[2:4])
        empty = jnp.zeros((frames.shape[0], 0, h, w, self.config.latent_channels), jnp.float32)
        return jnp.concatenate([empty, *pieces], axis=1)


_encode_frames = jax.jit(encode_chunk, static_argnums=(0, 4))


def encoder_params(params: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The part of a VAE's parameters that encodes.

    Raises:
      ValueError: they were loaded without the encoder; `what` names the VAE.
    """
    if "encoder" not in params:
        raise ValueError(
            f"the {what} was loaded without its encoder; use load_encoders, or "
            "load_pipeline(..., encoders=True)"
        )
    return {name: params[name] for name in ("encoder", "per_channel_statistics")}
