"""Waveform to log-mel spectrogram: the front end of the LTX-2 audio VAE.

Two pure functions on waveforms [B, N, S] (batch, samples, stereo channel): windowed-sinc resampling
to 16 kHz, then a magnitude mel spectrogram at 100 frames per second in natural log.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.ranges import NOT_NEGATIVE, hold_fields

LOG_FLOOR = 1e-5

# Width of the resampling filter in zero crossings, and its cutoff as a fraction of Nyquist
_SINC_ZEROS = 6
_SINC_ROLLOFF = 0.99


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """Spectrogram settings.

    Attributes:
      sample_rate: rate the spectrogram is computed at, Hz.
      n_fft: samples per (Hann) window and FFT.
      hop: samples from one frame to the next.
      mel_bins: number of mel bands between f_min and f_max (Hz).
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 160
    mel_bins: int = 64
    f_min: Annotated[float, NOT_NEGATIVE] = 0.0
    f_max: float = 8000.0

    def __post_init__(self):
        hold_fields(self)

    @classmethod
    def from_metadata(cls, preprocessing: Mapping[str, Any]) -> "MelConfig":
        """Reads `config["audio_vae"]["preprocessing"]` of an LTX-2 checkpoint.

        Raises:
          ValueError: mono audio, a window shorter than the FFT, or non-causal framing.
        """
        audio, stft, mel = (preprocessing.get(name, {}) for name in ("audio", "stft", "mel"))
        n_fft = stft.get("filter_length", 1024)
        settings = {f"audio.{name}": value for name, value in audio.items()}
        settings |= {f"stft.{name}": value for name, value in stft.items()}
        fixed = {"audio.stereo": True, "stft.causal": True, "stft.win_length": n_fft}
        raise_problems("audio_vae preprocessing", find_problems(settings, fixed=fixed))
        return cls(
            sample_rate=audio.get("sampling_rate", 16000),
            n_fft=n_fft,
            hop=stft.get("hop_length", 160),
            mel_bins=mel.get("n_mel_channels", 64),
            f_min=mel.get("mel_fmin", 0),
            f_max=mel.get("mel_fmax", 8000),
        )


def resample(waveform: jax.Array, source_rate: int, target_rate: int) -> jax.Array:
    """Resamples by a Hann-windowed sinc (Smith, "Digital Audio Resampling").

    With both rates divided by their greatest common divisor, output sample n is
      y[n] = (2 f_c / f_s) sum_k x[k] sinc(u) cos^2(pi u / 12),  u = 2 f_c (n / f_t - k / f_s),
    for |u| < 6, where 2 f_c = 0.99 min(f_s, f_t). Samples outside the clip count as zero.

    Args:
      waveform: [B, N, S], any float dtype.
      source_rate: its sample rate f_s, Hz.
      target_rate: wanted sample rate f_t, Hz.

    Returns:
      [B, ceil(N f_t / f_s), S] float32.

    Raises:
      ValueError: empty waveform, wrong rank or a rate that is not a positive integer.
    """
    _check_waveform(waveform)
    for name, rate in (("source_rate", source_rate), ("target_rate", target_rate)):
        if int(rate) != rate or rate < 1:
            raise ValueError(f"{name} must be a positive whole number of Hz, not {rate!r}")
    waveform = jnp.asarray(waveform, jnp.float32)
    source, target = _reduced(source_rate, target_rate)
    if source == target:
        return waveform
    length, reach = waveform.shape[1], resampling_reach(source_rate, target_rate)
    padded = jnp.pad(waveform, ((0, 0), (reach, reach + source), (0, 0)))
    return resample_window(padded, source_rate, target_rate)[:, : -(-length * target // source)]


def resampling_reach(source_rate: int, target_rate: int) -> int:
    """Samples on each side of a sample's place that `resample` makes it of."""
    source, target = _reduced(source_rate, target_rate)
    return 0 if source == target else _sinc_kernel(source, target)[1]


def resample_window(window: jax.Array, source_rate: int, target_rate: int) -> jax.Array:
    """`resample` of a piece of a waveform whose neighbours are known.

    With both rates divided by their greatest common divisor to f_s and f_t, every f_s samples give
    f_t new ones.

    Args:
      window: [B, N, S] float32, the piece with `resampling_reach` samples more on each side; it
        begins at a multiple of f_s samples of the waveform.

    Returns:
      [B, f_t floor((N - 2 reach) / f_s), S] float32.
    """
    source, target = _reduced(source_rate, target_rate)
    if source == target:
        return window
    kernel, _ = _sinc_kernel(source, target)
    batch, _, channels = window.shape
    flat = rearrange(window, "B N S -> (B S) N 1")
    # One kernel row per output phase: [B S, N / source, target]
    phases = lax.conv_general_dilated(
        flat,
        jnp.asarray(kernel),
        window_strides=(source,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(phases.reshape(batch, channels, -1), 1, 2)


def _reduced(source_rate: int, target_rate: int) -> tuple[int, int]:
    divisor = math.gcd(int(source_rate), int(target_rate))
    return int(source_rate) // divisor, int(target_rate) // divisor


def log_mel_spectrogram(waveform: jax.Array, config: MelConfig) -> jax.Array:
    """ln(max(|STFT| @ mel filterbank, 1e-5)) with centred, reflect-padded frames.

    Args:
      waveform: [B, N, 2] in [-1, 1] at `config.sample_rate`.
      config: spectrogram settings.

    Returns:
      [B, 1 + N // hop, mel_bins, 2] float32.

    Raises:
      ValueError: not stereo, or too short for the reflect padding (N must exceed n_fft / 2).
    """
    _check_stereo(waveform)
    half = config.n_fft // 2
    if waveform.shape[1] <= half:
        raise ValueError(
            f"waveform has {waveform.shape[1]} samples at {config.sample_rate} Hz; the spectrogram "
            f"reflects half a window at each end and needs at least {half + 1}"
        )
    waveform = jnp.asarray(waveform, jnp.float32)
    padded = jnp.pad(waveform, ((0, 0), (half, half), (0, 0)), mode="reflect")
    return log_mel_frames(padded, 1 + waveform.shape[1] // config.hop, config)


def log_mel_frames(samples: jax.Array, num_frames: int, config: MelConfig) -> jax.Array:
    """`log_mel_spectrogram` without its padding: frame j is of samples[hop j : hop j + n_fft].

    Args:
      samples: [B, N, 2] float32, N at least hop (num_frames - 1) + n_fft.
      num_frames: T (static).
      config: spectrogram settings.

    Returns:
      [B, T, mel_bins, 2] float32.
    """
    starts = np.arange(num_frames)[:, None] * config.hop
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)
    frames = samples[:, starts + np.arange(config.n_fft)]  # [B, T, n_fft, S]
    frames = frames * jnp.asarray(window, jnp.float32)[None, None, :, None]
    magnitude = jnp.abs(jnp.fft.rfft(frames, axis=2))  # [B, T, n_fft / 2 + 1, S]
    filterbank = jnp.asarray(
        mel_filterbank(
            config.n_fft, config.sample_rate, config.mel_bins, config.f_min, config.f_max
        )
    )
    mel = jnp.einsum("BTFS,FM->BTMS", magnitude, filterbank, precision=lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, LOG_FLOOR))


@functools.partial(jax.jit, static_argnames=("sample_rate", "config"))
def waveform_to_log_mel(waveform: jax.Array, sample_rate: int, config: MelConfig) -> jax.Array:
    """Resamples to `config.sample_rate`, then `log_mel_spectrogram`.

    Args:
      waveform: [B, N, 2] in [-1, 1] at `sample_rate` Hz.
      sample_rate: its rate, Hz.
      config: spectrogram settings.

    Returns:
      [B, T, mel_bins, 2] float32 with T = 1 + N_resampled // hop.

    Raises:
      ValueError: not stereo, empty, too short, or a sample rate that is not a positive integer.
    """
    _check_stereo(waveform)
    return log_mel_spectrogram(resample(waveform, sample_rate, config.sample_rate), config)


@functools.lru_cache(maxsize=8)
def mel_filterbank(
    n_fft: int, sample_rate: int, mel_bins: int, f_min: float, f_max: float
) -> np.ndarray:
    """Triangular filters on the Slaney mel scale, each of area one (Slaney normalisation).

    Returns:
      [n_fft / 2 + 1, mel_bins] float32.
    """
    frequencies = np.linspace(0.0, sample_rate // 2, n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(_hz_to_mel(f_min), _hz_to_mel(f_max), mel_bins + 2))
    width = np.diff(edges)
    distance = edges[None, :] - frequencies[:, None]  # [F, mel_bins + 2]
    rising = -distance[:, :-2] / width[:-1]
    falling = distance[:, 2:] / width[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters = (triangles * 2.0 / (edges[2:] - edges[:-2])).astype(np.float32)
    filters.setflags(write=False)  # the cache hands out one array
    return filters


# The Slaney scale is linear (200/3 Hz per mel) below 1 kHz = mel 15 and logarithmic above
_HZ_PER_MEL = 200.0 / 3.0
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _HZ_PER_MEL
    return _LOG_START_MEL + math.log(hz / _LOG_START_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    logarithmic = _LOG_START_HZ * np.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return np.where(mel < _LOG_START_MEL, _HZ_PER_MEL * mel, logarithmic)


@functools.lru_cache(maxsize=8)
def _sinc_kernel(source: int, target: int) -> tuple[np.ndarray, int]:
    """Filter of every output phase, [taps, 1, target] float32, and its reach to the left.

    Formed in float64: the phases divide small numbers by each other.
    """
    cutoff = min(source, target) * _SINC_ROLLOFF
    reach = math.ceil(_SINC_ZEROS * source / cutoff)
    taps = np.arange(-reach, reach + source)[:, None] / source
    phase = np.arange(target)[None, :] / target
    u = np.clip((taps - phase) * cutoff, -_SINC_ZEROS, _SINC_ZEROS)
    window = np.cos(u * np.pi / (2 * _SINC_ZEROS)) ** 2
    kernel = np.sinc(u) * window * cutoff / source
    return kernel[:, None, :].astype(np.float32), reach


def check_log_mel(log_mel: jax.Array, mel_bins: int) -> None:
    """Raises ValueError unless `log_mel` is [B, T >= 1, mel_bins, 2]."""
    if log_mel.ndim != 4 or tuple(log_mel.shape[2:]) != (mel_bins, 2):
        raise ValueError(
            f"log_mel must be [B, T, {mel_bins}, 2] (time, mel bin, stereo channel), shape is "
            f"{tuple(log_mel.shape)}"
        )
    if log_mel.shape[1] == 0:
        raise ValueError("log_mel is empty: it has 0 frames, at least 1 is needed")


def _check_waveform(waveform) -> None:
    if waveform.ndim != 3:
        raise ValueError(f"waveform must be [B, N, S], shape is {tuple(waveform.shape)}")
    if waveform.shape[1] == 0:
        raise ValueError("waveform is empty: it has 0 samples")


def _check_stereo(waveform) -> None:
    _check_waveform(waveform)
    if waveform.shape[2] != 2:
        raise ValueError(
            f"waveform must be stereo [B, N, 2], shape is {tuple(waveform.shape)}; "
            "repeat a mono channel, and put channels last"
        )
