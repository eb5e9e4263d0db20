"""Losses of video VAE, audio VAE, vocoder and causal video decoder.

Latents are perturbed by noise of a fixed size s while an autoencoder learns, z = m + s n. The
Kullback-Leibler divergence of N(m, s²) from N(0, 1) is (m² + s² - 1)/2 - ln s, of which m²/2 alone
has a gradient: the penalty keeps the latents of the order of 1, and the noise keeps what is near in
latents near in pixels, so that a diffusion model may miss a little. (LTX-2 learns s, but nothing
reads it.)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio.mel import LOG_FLOOR, log_mel_spectrogram
from omniforcing_jax.models.audio.vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from omniforcing_jax.models.audio.vocoder import VocoderConfig, vocoder_module
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.models.video_vae.model import VideoDecoder, VideoEncoder, VideoVAEConfig
from pocket.pretraining.step import Scalars

# window, hop of the spectrograms that waveforms are compared by
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))
_LOG_EPS = 1e-3
# Initial sizes of kernels away from their own place and of residual branches, and of all pixels
_OFF_CENTRE, _BRANCH, _DARK = 0.1, 0.3, -0.8
_SIDE = 3.0  # gain of the difference between the channels of sound
_MIDDLE_LEVEL = -7.0  # of log-mels, between silence and loud sound


@dataclasses.dataclass(frozen=True)
class LatentNoise:
    """How latents are regularised; see the module's docstring."""

    noise: float = 0.1  # s
    penalty: float = 1e-3  # weight of mean(m²)/2 in the loss

    def apply(self, mean: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(perturbed latents, penalty [])."""
        noisy = mean + self.noise * jax.random.normal(key, mean.shape)
        return noisy, 0.5 * self.penalty * jnp.mean(jnp.square(mean))


def to_video(frames: jax.Array) -> jax.Array:
    """uint8 pixels -> [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class ErrorLoss:
    """absolute * mean |e| + square * mean e².

    Balls cover a twentieth of the picture and tones a part of the spectrogram: the median of most
    places is the empty, silent world, and with the absolute error alone a decoder makes nothing
    else. It is there for sharp edges.
    """

    absolute: float
    square: float

    def __call__(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Arrays of one shape -> []."""
        error = prediction - target
        absolute = jnp.mean(jnp.abs(error))
        return self.absolute * absolute + self.square * jnp.mean(jnp.square(error))


@dataclasses.dataclass(frozen=True)
class VideoLoss:
    """Reconstruction of a window of a clip; parameters {encoder, decoder}.

    With `causal`, the decoder is run causally, on the latents of a trained encoder; parameters
    {decoder}.
    """

    config: VideoVAEConfig
    latents: LatentNoise
    error: ErrorLoss
    causal: bool = False

    def __call__(self, params, frozen, batch, key) -> tuple[jax.Array, Scalars]:
        """batch["frames"] [B, F, H, W, 3] uint8; `frozen` has the encoder of `causal`."""
        video = to_video(batch["frames"])
        mean = self.encode(frozen if self.causal else params, batch)
        latents, penalty = self.latents.apply(mean, key)
        decoder = VideoDecoder(self.config)
        prediction, _ = decoder.apply({"params": params["decoder"]}, latents, self.causal)
        # in dB, of values that range over 2
        scalars = {"psnr": 10 * jnp.log10(4 / jnp.mean(jnp.square(prediction - video)))}
        error = self.error(prediction, video)
        if self.causal:
            return error, scalars
        return error + penalty, scalars | {"latent_rms": _rms(mean)}

    def encode(self, params, batch) -> jax.Array:
        """Means of the latents [B, f, h, w, C], not normalised."""
        video = to_video(batch["frames"])
        mean, _ = VideoEncoder(self.config).apply({"params": params["encoder"]}, video)
        return mean[..., : self.config.latent_channels]


@dataclasses.dataclass(frozen=True)
class AudioVAELoss:
    """Reconstruction of a log-mel spectrogram and of its sides; parameters {encoder, decoder}.

    The difference of the two channels, which is where a ball is heard, has an error of its own: it
    is a small part of theirs, and was not learnt at all without.
    """

    config: AudioVAEConfig
    latents: LatentNoise
    error: ErrorLoss

    def __call__(self, params, frozen, batch, key) -> tuple[jax.Array, Scalars]:
        """batch["waveform"] [B, N, 2] float32."""
        del frozen
        log_mel = log_mel_spectrogram(batch["waveform"], self.config.mel)
        mean, _ = AudioEncoder(self.config).apply({"params": params["encoder"]}, log_mel)
        latents, penalty = self.latents.apply(mean, key)
        prediction, _ = AudioDecoder(self.config).apply({"params": params["decoder"]}, latents)
        length = min(prediction.shape[1], log_mel.shape[1])
        prediction, log_mel = prediction[:, :length], log_mel[:, :length]
        sides = prediction[..., 0] - prediction[..., 1], log_mel[..., 0] - log_mel[..., 1]
        scalars = {
            "mel_error": jnp.mean(jnp.abs(prediction - log_mel)),
            "side_error": jnp.mean(jnp.abs(sides[0] - sides[1])),
            "latent_rms": _rms(mean),
        }
        return self.error(prediction, log_mel) + self.error(*sides) + penalty, scalars

    def encode(self, params, batch) -> jax.Array:
        """Means of the latents [B, T, C], not normalised."""
        log_mel = log_mel_spectrogram(batch["waveform"], self.config.mel)
        mean, _ = AudioEncoder(self.config).apply({"params": params["encoder"]}, log_mel)
        return jnp.swapaxes(mean, 2, 3).reshape(*mean.shape[:2], -1)  # from [B, T, f, c]


@dataclasses.dataclass(frozen=True)
class VocoderLoss:
    """Waveforms from spectrograms, half of them as the audio VAE decodes them.

    The right channel is that of another sound. Both channels of one ring with the same tones, and
    to play their mean on either side, which is right but for a fifth of the power, is learnt first.

    The loss is waveform * (mean e² / mean y² + `_unheard`) + the mean over `RESOLUTIONS` of
    `spectral_loss`.
    Nothing is adversarial: the tones of the world stand in a fixed phase to the spectrogram's
    frames, so the waveform can be told from the spectrogram. With the absolute error, or without
    the power below the fraction, silence is left too slowly: a tone in the wrong phase is worse.
    """

    config: VocoderConfig
    vae: AudioVAEConfig
    waveform: float

    def __call__(self, params, frozen, batch, key) -> tuple[jax.Array, Scalars]:
        """batch["waveform"] [B, N, 2] float32, N a multiple of the hop; `frozen` is the VAE."""
        del key
        waveform = batch["waveform"]
        log_mel = log_mel_spectrogram(waveform, self.vae.mel)
        latents = audio_vae.encode_audio(frozen, self.vae, log_mel)
        decoded = audio_vae.decode_audio(frozen, self.vae, latents)
        # whole latents end a little before the waveform does
        frames = min(waveform.shape[1] // self.config.hop, decoded.shape[1])
        waveform = waveform[:, : frames * self.config.hop]
        half = waveform.shape[0] // 2
        log_mel = jnp.concatenate([log_mel[:half, :frames], decoded[half:, :frames]])
        log_mel, waveform = _other_right(log_mel), _other_right(waveform)
        prediction = vocoder_module(self.config).apply({"params": params}, log_mel)
        noise = _noise_ratio(prediction, waveform)
        side = _noise_ratio(
            prediction[..., 0] - prediction[..., 1], waveform[..., 0] - waveform[..., 1]
        )
        spectral = [spectral_loss(prediction, waveform, *size) for size in RESOLUTIONS]
        spectral = sum(spectral) / len(spectral)
        scalars = {
            "spectral": spectral,
            "snr_db": -10 * jnp.log10(noise),
            "side_snr_db": -10 * jnp.log10(side),
        }
        unheard = _unheard(prediction, waveform)
        return self.waveform * (noise + unheard) + spectral, scalars | {"unheard": unheard}


def _other_right(x: jax.Array) -> jax.Array:
    """[B, ..., 2] with the right channel of the sample before."""
    return jnp.stack([x[..., 0], jnp.roll(x[..., 1], 1, axis=0)], axis=-1)


def _noise_ratio(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """mean e² / mean y²; of silence, which has no such ratio, a finite number."""
    return jnp.mean(jnp.square(prediction - target)) / (jnp.mean(jnp.square(target)) + 1e-6)


def _unheard(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over channels of (e² / y²)²: 1 for one that is silent, little for one that has noise.

    By the plain ratio a tone of many that is never played costs as much as a little noise on all
    others; it came last, if at all. Channels with less than a tenth of the mean power count as
    if they had that.
    """
    error, power = (jnp.mean(jnp.square(x), axis=1) for x in (prediction - target, target))
    return jnp.mean(jnp.square(error / (power + 0.1 * jnp.mean(power) + 1e-6)))


def spectral_loss(prediction: jax.Array, target: jax.Array, window: int, hop: int) -> jax.Array:
    """|| |Y| - |X| || / || |Y| || + mean |ln(|Y| + 0.001) - ln(|X| + 0.001)| of [B, N, 2].

    Spectral convergence and log magnitude (Yamamoto et al., Parallel WaveGAN, arXiv 1910.11480),
    with magnitudes in units of a sine's amplitude.
    """
    x, y = (_magnitudes(waveform, window, hop) for waveform in (prediction, target))
    power = jnp.sqrt(jnp.sum(jnp.square(y)) + 1e-8)
    convergence = jnp.sqrt(jnp.sum(jnp.square(y - x)) + 1e-8) / power
    return convergence + jnp.mean(jnp.abs(jnp.log(y + _LOG_EPS) - jnp.log(x + _LOG_EPS)))


def _magnitudes(waveform: jax.Array, window: int, hop: int) -> jax.Array:
    starts = np.arange(0, waveform.shape[1] - window + 1, hop)
    frames = waveform[:, starts[:, None] + np.arange(window)]  # [B, T, window, 2]
    taper = np.hanning(window + 1)[:-1]
    taper = jnp.asarray(taper * 2 / taper.sum())[None, None, :, None]
    spectrum = jnp.fft.rfft(frames * taper, axis=2)
    # the square root of 0 has no gradient
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-10)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def init_audio_vae(config: AudioVAEConfig, key: jax.Array) -> dict[str, Any]:
    """Random {encoder, decoder} that learn to hear; see `_focused`."""
    frames = config.downsampling
    log_mel = jnp.zeros((1, frames, config.mel.mel_bins, 2))
    latents = jnp.zeros((1, 1, config.latent_bins, config.latent_channels))

    @jax.jit
    def init(key):
        params = {
            "encoder": AudioEncoder(config).init(key, log_mel)["params"],
            "decoder": AudioDecoder(config).init(key, latents)["params"],
        }
        params = _focused(params, _audio_taps, float(np.log(LOG_FLOOR)))
        first = params["encoder"]["conv_in"]
        # What differs between the channels is small beside what they share, and would drown in it:
        # half of the features hear nothing else.
        half = first["kernel"].shape[-1] // 2
        difference = jnp.array([1.0, -1.0])[None, None, :, None] * first["kernel"][:, :, :1, half:]
        first["kernel"] = first["kernel"].at[..., half:].set(_SIDE * difference)
        # Norms keep directions only: silence and sound must lie on different sides of 0.
        first["bias"] = -_MIDDLE_LEVEL * jnp.sum(first["kernel"], axis=(0, 1, 2))
        return params

    return init(key)


def _audio_taps(names: list[str]) -> list[tuple[int, ...]]:
    """(time, frequency) of the kernel's places that look at the output's own place."""
    if "nin_shortcut" in names:
        return [(0, 0)]
    if "downsample" in names:  # four places become one
        return [(1, 0), (1, 1), (2, 0), (2, 1)]
    return [(2, 1)]  # causal: two rows of the past come first


def init_video_vae(config: VideoVAEConfig, key: jax.Array) -> dict[str, Any]:
    """Random {encoder, decoder} that learn to see; see `_focused`."""
    params = video_vae.init_params(config, key)
    params = {name: params[name] for name in ("encoder", "decoder")}
    return _focused(params, _video_taps, _DARK)


def _video_taps(names: list[str]) -> list[tuple[int, ...]]:
    """(time, height, width); the encoder is causal, the decoder is not."""
    return [(2, 1, 1) if names[0] == "encoder" else (1, 1, 1)]


def _focused(params: dict[str, Any], taps: Callable, silence: float) -> dict[str, Any]:
    """{encoder, decoder} that look at latents and pictures where they are.

    With kernels N(0, 1/fan_in) a decoder unlearns to look at its latents before they mean anything,
    and makes the mean clip for a thousand steps. Here kernels are strong where they look at the
    output's own place, so that what is at one place in a clip is there in all layers; residual
    branches start small; and the decoder's last convolution is 0, so that what is learnt first is
    to read the clip out of its features, which are random but differ between clips.

    Args:
      params: with kernels of variance 1/fan_in.
      taps: names of a kernel's path -> the places of the kernel that are strong.
      silence: what the decoder makes of all latents.
    """

    def start(path, kernel):
        names = [part.key for part in path]
        if names[-1] != "kernel":
            return kernel
        strong = taps(names)
        # N(0, 1/fan_in) in all places -> the same variance in the strong ones alone
        gain = (math.prod(kernel.shape[:-2]) / len(strong)) ** 0.5
        focused = _OFF_CENTRE * kernel
        for place in strong:
            focused = focused.at[place].set(gain * kernel[place])
        return _BRANCH * focused if names[-2] == "conv2" else focused

    params = jax.tree_util.tree_map_with_path(start, params)
    last = params["decoder"]["conv_out"]
    last["kernel"] = jnp.zeros_like(last["kernel"])
    last["bias"] = jnp.full_like(last["bias"], silence)
    return params


def init_vocoder(config: VocoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters that are two vocoders side by side, one for each channel of the sound.

    Half of all features come from the left channel and make the left waveform. Both halves start
    alike, and nothing keeps them apart later. Spectrograms are taken as if they were centred at
    `_MIDDLE_LEVEL`; the last convolution is 0, see `_focused`: a tone in the wrong phase teaches
    silence first, and silence is hard to leave.

    Raises:
      ValueError: the vocoder has a bandwidth extension.
    """
    if config.bandwidth_extension is not None:
        raise ValueError("a vocoder with a bandwidth extension cannot be trained here")
    log_mel = jnp.zeros((1, 1, config.mel_bins, 2))
    params = jax.jit(lambda key: vocoder_module(config).init(key, log_mel)["params"])(key)

    def side_by_side(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.tile(leaf[: len(leaf) // 2], 2)
        inputs, outputs = leaf.shape[-2] // 2, leaf.shape[-1] // 2
        own = 2**0.5 * leaf[..., :inputs, :outputs]  # half the inputs, the same variance
        none = jnp.zeros_like(own)
        left, right = (jnp.concatenate(pair, axis=-1) for pair in ((own, none), (none, own)))
        return jnp.concatenate([left, right], axis=-2)

    params = jax.tree.map(side_by_side, params)
    params["conv_post"] = jax.tree.map(jnp.zeros_like, params["conv_post"])
    first = params["conv_pre"]
    first["bias"] = -_MIDDLE_LEVEL * jnp.sum(first["kernel"], axis=(0, 1))
    return params


def channel_statistics(latents: Iterator[jax.Array]) -> dict[str, np.ndarray]:
    """Mean and standard deviation of every channel, [C] float32, over all other axes.

    Args:
      latents: arrays [..., C], not normalised.

    Raises:
      ValueError: there are none, or a channel is constant.
    """
    count, total, squares = 0, 0.0, 0.0
    for array in latents:
        flat = np.asarray(array, np.float64).reshape(-1, array.shape[-1])
        count += len(flat)
        total, squares = total + flat.sum(0), squares + (flat**2).sum(0)
    if not count:
        raise ValueError("there are no latents to take statistics of")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    if not std.min() > 0:
        constant = np.flatnonzero(~(std > 0)).tolist()
        raise ValueError(f"the latents' channels {constant} are constant: the encoder is broken")
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
