"""Signal processing of the LTX-2.3 vocoder: anti-aliased SnakeBeta, causal STFT, x3 resampler.

Everything is fp32 and works on [B, T, C] (BigVGAN, arXiv:2206.04658). The
checkpoint carries its own low-pass filters and STFT bases, rounded to bfloat16 and used as such in
training: they are parameters here, and the analytic formulas only initialise them.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from omniforcing_jax.models.audio.mel import LOG_FLOOR, mel_filterbank

# Taps of the x2 low-pass filters
FILTER_TAPS = 12
# An output of `antialiased_snake` depends on this many inputs to each side
SNAKE_REACH = FILTER_TAPS // 2 - 1
_SNAKE_EPS = 1e-9

# Hann-windowed sinc of the resampler: zero crossings and cutoff over Nyquist
_RESAMPLER_ZEROS = 6
_RESAMPLER_ROLLOFF = 0.99
# An output of `upsample_waveform` depends on this many inputs to each side
RESAMPLER_REACH = math.ceil(_RESAMPLER_ZEROS / _RESAMPLER_ROLLOFF)


def snake_beta(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """x + sin^2(x exp(alpha)) / (exp(beta) + 1e-9), per channel."""
    return x + jnp.square(jnp.sin(x * jnp.exp(alpha))) / (jnp.exp(beta) + _SNAKE_EPS)


def antialiased_snake(
    x: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    up_filter: jax.Array,
    down_filter: jax.Array,
) -> jax.Array:
    """SnakeBeta evaluated at twice the rate: upsample x2, activate, low-pass and decimate.

      u[2i]     = 2 sum_d f[5 - 2d] x[i + d],  d = -3 .. 2
      u[2i + 1] = 2 sum_d f[6 - 2d] x[i + d],  d = -2 .. 3
      y[i]      = sum_m g[m] snake(u)[2i + m - 5],  m = 0 .. 11
    with x and then snake(u) continued beyond their ends by their end values. Even and odd samples
    are an axis of two, and every tap is one shifted product, which XLA fuses into two passes; a
    depthwise convolution took three times as long (CPU).

    Args:
      x: [B, T, C].
      alpha, beta: (C,), logarithms of frequency and amplitude.
      up_filter, down_filter: (12,) taps f and g.

    Returns:
      [B, T, C].
    """
    batch, length, channels = x.shape
    x = _extend(x, x[:, :1], x[:, -1:], 3, 3)
    none = jnp.zeros((1,), up_filter.dtype)
    even = jnp.concatenate([up_filter[1::2][::-1], none])
    odd = jnp.concatenate([none, up_filter[0::2][::-1]])
    taps = 2.0 * jnp.stack([even, odd], axis=1)[:, :, None]  # [7, 2, 1]
    u = sum(taps[d] * x[:, d : d + length, None] for d in range(7))  # [B, T, 2, C]
    u = snake_beta(u, alpha, beta).reshape(batch, 2 * length, channels)
    u = _extend(u, u[:, :1], u[:, -1:], 5, 5).reshape(batch, length + 5, 2, channels)
    taps = down_filter.reshape(6, 2, 1)
    return jnp.sum(sum(taps[d] * u[:, d : d + length] for d in range(6)), axis=2)


def _extend(x, first, last, before, after):
    """Repeats `first` and `last` ([B, 1, C]) before and after x along time."""
    return jnp.concatenate(
        [jnp.repeat(first, before, axis=1), x, jnp.repeat(last, after, axis=1)], axis=1
    )


def upsample_waveform(waveform: jax.Array, ratio: int) -> jax.Array:
    """Resamples [B, N, S] to [B, N * ratio, S] by a Hann-windowed sinc; ends are repeated."""
    batch, length, channels = waveform.shape
    taps = resampler_filter(ratio)
    reach = RESAMPLER_REACH
    flat = jnp.moveaxis(waveform, 2, 1).reshape(batch * channels, length, 1)
    flat = _extend(flat, flat[:, :1], flat[:, -1:], reach, reach)
    # Zero insertion by lhs_dilation. The filter's centre is tap reach * ratio; the padding makes
    # output n ratio the one centred on input n.
    upsampled = lax.conv_general_dilated(
        flat,
        jnp.asarray(ratio * taps[::-1].copy())[:, None, None],
        window_strides=(1,),
        padding=[(0, ratio - 1)],
        lhs_dilation=(ratio,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(upsampled.reshape(batch, channels, -1), 1, 2)


def resampler_filter(ratio: int) -> np.ndarray:
    """Hann-windowed sinc of 2 * 7 * ratio + 1 taps with sum close to 1, float32.

    t = (n / ratio - 7) * 0.99;  h[n] = sinc(t) cos^2(pi clip(t, -6, 6) / 12) * 0.99 / ratio
    """
    taps = np.arange(2 * RESAMPLER_REACH * ratio + 1)
    t = (taps / ratio - RESAMPLER_REACH) * _RESAMPLER_ROLLOFF
    window = np.cos(np.pi * np.clip(t, -_RESAMPLER_ZEROS, _RESAMPLER_ZEROS) / 12) ** 2
    return (np.sinc(t) * window * _RESAMPLER_ROLLOFF / ratio).astype(np.float32)


def causal_log_mel(
    waveform: jax.Array, forward_basis: jax.Array, mel_basis: jax.Array, hop: int
) -> jax.Array:
    """ln(max(mel_basis @ |STFT|, 1e-5)) of frames that end with their own hop.

    Frame i covers samples [(i + 1) hop - n_fft, (i + 1) hop); samples before the clip are zero.

    Args:
      waveform: [B, N, S] with N a multiple of `hop`.
      forward_basis: (n_fft + 2, 1, n_fft): windowed cosines, then sines.
      mel_basis: (mel_bins, n_fft / 2 + 1).
      hop: samples per frame.

    Returns:
      [B, N / hop, mel_bins, S].
    """
    batch, length, channels = waveform.shape
    n_fft = forward_basis.shape[-1]
    flat = jnp.moveaxis(waveform, 2, 1).reshape(batch * channels, length, 1)
    spectrum = lax.conv_general_dilated(
        flat,
        jnp.transpose(forward_basis, (2, 1, 0)),
        window_strides=(hop,),
        padding=[(n_fft - hop, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=lax.Precision.HIGHEST,
    )  # [B S, T, n_fft + 2]
    real, imaginary = jnp.split(spectrum, 2, axis=-1)
    magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary))
    mel = jnp.einsum("NTF,MF->NTM", magnitude, mel_basis, precision=lax.Precision.HIGHEST)
    log_mel = jnp.log(jnp.maximum(mel, LOG_FLOOR))
    log_mel = log_mel.reshape(batch, channels, *log_mel.shape[1:])
    return jnp.moveaxis(log_mel, 1, 3)


def kaiser_lowpass(key, shape, dtype=jnp.float32) -> jax.Array:
    """Initialiser of the x2 filters: Kaiser-windowed sinc at half Nyquist, sum 1, (1, 1, 12)."""
    del key
    taps = shape[-1]
    half = taps // 2
    # Kaiser's formulas for the attenuation of `taps` over a transition of 0.3 sample rates
    attenuation = 2.285 * (half - 1) * math.pi * 4 * 0.3 + 7.95
    if attenuation > 50.0:
        shape_parameter = 0.1102 * (attenuation - 8.7)
    else:
        shape_parameter = 0.5842 * (attenuation - 21.0) ** 0.4 + 0.07886 * (attenuation - 21.0)
    time = np.arange(-half, half) + 0.5
    filter_ = np.kaiser(taps, shape_parameter) * 0.5 * np.sinc(0.5 * time)
    return jnp.asarray(filter_ / filter_.sum(), dtype).reshape(shape)


def fourier_basis(key, shape, dtype=jnp.float32) -> jax.Array:
    """Initialiser of `forward_basis`: Hann-windowed cosines and negative sines."""
    del key
    n_fft = shape[-1]
    phase = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    basis = np.concatenate([np.cos(phase), -np.sin(phase)]) * window
    return jnp.asarray(basis, dtype).reshape(shape)


class LowPass(nn.Module):
    """Holds a filter of shape (1, 1, 12)."""

    @nn.compact
    def __call__(self) -> jax.Array:
        taps = self.param("filter", kaiser_lowpass, (1, 1, FILTER_TAPS))
        return jnp.asarray(taps, jnp.float32).reshape(FILTER_TAPS)


class Downsample(nn.Module):
    """Holds the decimation filter at the checkpoint's path (`lowpass/filter`)."""

    @nn.compact
    def __call__(self) -> jax.Array:
        return LowPass(name="lowpass")()


class SnakeBeta(nn.Module):
    """Holds log frequency and log amplitude of every channel."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        alpha = self.param("alpha", nn.initializers.zeros, (self.channels,))
        beta = self.param("beta", nn.initializers.zeros, (self.channels,))
        return jnp.asarray(alpha, jnp.float32), jnp.asarray(beta, jnp.float32)


class AntialiasedSnake(nn.Module):
    """Parameters of `antialiased_snake`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha, beta = SnakeBeta(x.shape[-1], name="act")()
        up_filter = LowPass(name="upsample")()
        down_filter = Downsample(name="downsample")()
        if self.is_initializing():
            return x  # of the same shape; tracing 200 activations would take seconds
        return antialiased_snake(x, alpha, beta, up_filter, down_filter)


class FourierBasis(nn.Module):
    """Holds the STFT basis (n_fft + 2, 1, n_fft)."""

    n_fft: int

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.n_fft + 2, 1, self.n_fft)
        return jnp.asarray(self.param("forward_basis", fourier_basis, shape), jnp.float32)


class CausalLogMel(nn.Module):
    """Parameters of `causal_log_mel`."""

    sample_rate: int
    n_fft: int
    hop: int
    mel_bins: int

    @nn.compact
    def __call__(self, waveform: jax.Array) -> jax.Array:
        def slaney(key, shape, dtype=jnp.float32):
            del key
            filters = mel_filterbank(
                self.n_fft, self.sample_rate, self.mel_bins, 0.0, self.sample_rate / 2
            )
            return jnp.asarray(filters.T, dtype).reshape(shape)

        mel_basis = self.param("mel_basis", slaney, (self.mel_bins, self.n_fft // 2 + 1))
        forward_basis = FourierBasis(self.n_fft, name="stft_fn")()
        return causal_log_mel(
            waveform, forward_basis, jnp.asarray(mel_basis, jnp.float32), self.hop
        )
