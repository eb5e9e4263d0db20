"""Signal processing of the LTX-2.3 vocoder: anti-aliased SnakeBeta, causal STFT, x3 resampler.

Everything computes in float32 and works on [B, T, C] (BigVGAN, arXiv:2206.04658). The checkpoint
holds its low-pass filters and STFT bases, which were rounded to bfloat16 before training: they are
parameters here, and the analytic formulas only initialise them.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from omniforcing_jax.models.audio.mel import LOG_FLOOR, mel_filterbank

# Taps of the x2 low-pass filters
FILTER_TAPS = 12
# An output of `AntialiasedSnake` depends on this many inputs to each side
SNAKE_REACH = FILTER_TAPS // 2 - 1
_SNAKE_EPS = 1e-9

# Hann-windowed sinc of the resampler: zero crossings and cutoff over Nyquist
_RESAMPLER_ZEROS = 6
_RESAMPLER_ROLLOFF = 0.99
# An output of `upsample_waveform` depends on this many inputs to each side
RESAMPLER_REACH = math.ceil(_RESAMPLER_ZEROS / _RESAMPLER_ROLLOFF)


def _extend(x: jax.Array, reach: int) -> jax.Array:
    """x [B, T, C] with its first and last value repeated `reach` times before and after it."""
    first, last = (jnp.repeat(end, reach, axis=1) for end in (x[:, :1], x[:, -1:]))
    return jnp.concatenate([first, x, last], axis=1)


def upsample_waveform(waveform: jax.Array, ratio: int) -> jax.Array:
    """Resamples [B, N, S] to [B, N * ratio, S] by a Hann-windowed sinc; ends are repeated."""
    taps = resampler_filter(ratio)
    flat = rearrange(waveform, "B N S -> (B S) N 1")
    flat = _extend(flat, RESAMPLER_REACH)
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
    return rearrange(upsampled, "(B S) N 1 -> B N S", B=waveform.shape[0])


def resampler_filter(ratio: int) -> np.ndarray:
    """Hann-windowed sinc of 2 * 7 * ratio + 1 taps with sum close to 1, float32.

    t = (n / ratio - 7) * 0.99;  h[n] = sinc(t) cos^2(pi clip(t, -6, 6) / 12) * 0.99 / ratio
    """
    taps = np.arange(2 * RESAMPLER_REACH * ratio + 1)
    t = (taps / ratio - RESAMPLER_REACH) * _RESAMPLER_ROLLOFF
    window = np.cos(np.pi * np.clip(t, -_RESAMPLER_ZEROS, _RESAMPLER_ZEROS) / 12) ** 2
    return (np.sinc(t) * window * _RESAMPLER_ROLLOFF / ratio).astype(np.float32)


def kaiser_lowpass(key, shape, dtype=jnp.float32) -> jax.Array:
    """Initialiser of the x2 filters: Kaiser-windowed sinc at half Nyquist, sum 1, (1, 1, 12)."""
    del key
    taps = shape[-1]
    half = taps // 2
    # Kaiser's formulas for the attenuation of 12 taps over a transition of 0.3 sample rates: 51 dB
    attenuation = 2.285 * (half - 1) * math.pi * 4 * 0.3 + 7.95
    shape_parameter = 0.1102 * (attenuation - 8.7)
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


class Stored(nn.Module):
    """Holds one parameter, for use elsewhere, where the checkpoint has it (such as lowpass/filter).

    Attributes:
      place: path of the parameter below this module.
      initializer: of the parameter.
      shape: of the parameter.
    """

    place: str
    initializer: nn.initializers.Initializer
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        """The parameter in float32."""
        name, _, rest = self.place.partition("/")
        if rest:
            return Stored(rest, self.initializer, self.shape, name=name)()
        return jnp.asarray(self.param(name, self.initializer, self.shape), jnp.float32)


class SnakeBeta(nn.Module):
    """x + sin^2(x exp(alpha)) / (exp(beta) + 1e-9): alpha and beta (C,) are learnt."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., C]."""
        alpha, beta = (
            jnp.asarray(self.param(name, nn.initializers.zeros, x.shape[-1:]), jnp.float32)
            for name in ("alpha", "beta")
        )
        alpha, beta = (jnp.expand_dims(p, range(x.ndim - 1)) for p in (alpha, beta))
        return x + jnp.square(jnp.sin(x * jnp.exp(alpha))) / (jnp.exp(beta) + _SNAKE_EPS)


class AntialiasedSnake(nn.Module):
    """SnakeBeta evaluated at twice the rate: upsample x2, activate, low-pass and decimate.

      u[2i]     = 2 sum_d f[5 - 2d] x[i + d],  d = -3 .. 2
      u[2i + 1] = 2 sum_d f[6 - 2d] x[i + d],  d = -2 .. 3
      y[i]      = sum_m g[m] snake(u)[2i + m - 5],  m = 0 .. 11
    with x and then snake(u) continued beyond their ends by their end values. Even and odd samples
    are an axis of two, and every tap is one shifted product, which XLA fuses into two passes; a
    depthwise convolution took three times as long (CPU).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, C] -> [B, T, C] in x's dtype."""
        dtype, x = x.dtype, x.astype(jnp.float32)
        snake = SnakeBeta(name="act")
        shape = (1, 1, FILTER_TAPS)
        f = Stored("filter", kaiser_lowpass, shape, name="upsample")().reshape(FILTER_TAPS)
        g = Stored("lowpass/filter", kaiser_lowpass, shape, name="downsample")()
        if self.is_initializing():
            return snake(x)  # of the same shape; tracing 200 activations would take seconds
        batch, length, channels = x.shape
        x = _extend(x, 3)  # [B, T + 6, C]
        none = jnp.zeros((1,), f.dtype)
        even = jnp.concatenate([f[1::2][::-1], none])
        odd = jnp.concatenate([none, f[0::2][::-1]])
        taps = 2.0 * jnp.stack([even, odd], axis=1)[:, None, None, :, None]  # [7, 1, 1, 2, 1]
        u = sum(taps[d] * x[:, d : d + length, None] for d in range(7))  # [B, T, 2, C]
        u = snake(u).reshape(batch, 2 * length, channels)
        u = _extend(u, 5).reshape(batch, length + 5, 2, channels)
        taps = g.reshape(6, 1, 1, 2, 1)
        y = jnp.sum(sum(taps[d] * u[:, d : d + length] for d in range(6)), axis=2)
        return y.astype(dtype)


class CausalLogMel(nn.Module):
    """ln(max(mel_basis @ |STFT|, 1e-5)) of frames that end with their own hop.

    Frame i covers samples [(i + 1) hop - n_fft, (i + 1) hop); samples before the clip are zero. The
    parameters are `mel_basis` (mel_bins, n_fft / 2 + 1) and `stft_fn/forward_basis`
    (n_fft + 2, 1, n_fft): windowed cosines, then sines.

    Attributes:
      sample_rate: of the waveform, Hz.
      n_fft, hop: window and step, samples.
      mel_bins: M.
    """

    sample_rate: int
    n_fft: int
    hop: int
    mel_bins: int

    @nn.compact
    def __call__(self, waveform: jax.Array) -> jax.Array:
        """waveform [B, N, S], N a multiple of `hop` -> [B, N / hop, M, S]."""

        def slaney(key, shape, dtype=jnp.float32):
            del key
            filters = mel_filterbank(
                self.n_fft, self.sample_rate, self.mel_bins, 0.0, self.sample_rate / 2
            )
            return jnp.asarray(filters.T, dtype).reshape(shape)

        mel_basis = self.param("mel_basis", slaney, (self.mel_bins, self.n_fft // 2 + 1))
        shape = (self.n_fft + 2, 1, self.n_fft)
        forward_basis = Stored("forward_basis", fourier_basis, shape, name="stft_fn")()
        spectrum = lax.conv_general_dilated(
            rearrange(waveform, "B N S -> (B S) N 1"),
            jnp.transpose(forward_basis, (2, 1, 0)),
            window_strides=(self.hop,),
            padding=[(self.n_fft - self.hop, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=lax.Precision.HIGHEST,
        )  # [B S, T, n_fft + 2]
        real, imaginary = jnp.split(spectrum, 2, axis=-1)
        magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary))
        mel_basis = jnp.asarray(mel_basis, jnp.float32)
        mel = jnp.einsum("NTF,MF->NTM", magnitude, mel_basis, precision=lax.Precision.HIGHEST)
        log_mel = jnp.log(jnp.maximum(mel, LOG_FLOOR))
        return rearrange(log_mel, "(B S) T M -> B T M S", B=waveform.shape[0])
