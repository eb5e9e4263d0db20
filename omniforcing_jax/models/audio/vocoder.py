"""Log-mel spectrogram to stereo waveform: the vocoders of LTX-2.

Their convolutions compute in float32 or bfloat16; what carries a phase does so in float32 in any
case: snakes, the spectrogram between the stages, resampling, and the waveform itself.

LTX-2.0 has one HiFi-GAN, 24 kHz. LTX-2.3 has a BigVGAN (a HiFi-GAN with anti-aliased snake
activations) to 16 kHz and a second one that, from the spectrogram of that waveform, predicts the
difference between the waveform resampled to 48 kHz and the result (bandwidth extension, BWE).
Axis letters: B batch, T time, M mel bin, S stereo channel, C channels.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.models.audio import bigvgan
from omniforcing_jax.models.audio.mel import check_log_mel
from omniforcing_jax.models.audio.wave_layers import ConvTranspose, conv1d
from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.ranges import hold_fields

STEREO = 2
_SLOPE = 0.1
# The activation before the last convolution uses PyTorch's default slope in the reference
_LAST_SLOPE = 0.01
# Kernel of the first and last convolution
_END_KERNEL = 7
_MEL_BINS = 64


@dataclasses.dataclass(frozen=True)
class HiFiGANConfig:
    """A HiFi-GAN or BigVGAN: log-mel [B, T, M, 2] -> waveform [B, T * hop, 2].

    Attributes:
      resblock: "1" is HiFi-GAN with leaky ReLU, "AMP1" BigVGAN with anti-aliased SnakeBeta.
      initial_channels: width after the first convolution; halved by every upsampling, rounded
        down.
      upsample_rates: factor of every upsampling.
      upsample_kernel_sizes: kernels of the transposed convolutions.
      resblock_kernel_sizes: kernels of the residual blocks that run in parallel.
      resblock_dilation_sizes: dilations in each of them.
      final_activation: "tanh", "clamp" (to [-1, 1]) or "none".
      final_bias: whether the last convolution has a bias.
    """

    resblock: Literal["1", "AMP1"] = "1"
    initial_channels: int = 1024
    upsample_rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    final_activation: Literal["tanh", "clamp", "none"] = "tanh"
    final_bias: bool = True

    def __post_init__(self):
        hold_fields(self)
        pairs = (
            ("upsample_rates", "upsample_kernel_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        )
        for first, second in pairs:
            lengths = len(vars(self)[first]), len(vars(self)[second])
            if lengths[0] != lengths[1] or lengths[0] == 0:
                raise ValueError(
                    f"vocoder {first} and {second} must be equally long and not empty, "
                    f"lengths are {lengths[0]} and {lengths[1]}"
                )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"vocoder upsample_kernel_sizes {kernel} does not fit upsample_rates {rate}: "
                    "the kernel must exceed the rate by an even number to give whole frames"
                )
        if any(kernel % 2 == 0 for kernel in self.resblock_kernel_sizes):
            raise ValueError(
                f"vocoder resblock_kernel_sizes must be odd, not {self.resblock_kernel_sizes}"
            )
        if self.initial_channels < 2 ** len(self.upsample_rates):
            raise ValueError(
                f"vocoder upsample_initial_channel {self.initial_channels} cannot be halved "
                f"{len(self.upsample_rates)} times"
            )

    @property
    def hop(self) -> int:
        """Samples per input frame."""
        return math.prod(self.upsample_rates)

    def input_span(self, first: int, last: int) -> tuple[int, int]:
        """First and last input frame that output samples `first` ... `last` depend on.

        Walks the network backwards; indices may be negative (frames before the clip).
        """
        snake_reach = bigvgan.SNAKE_REACH if self.resblock == "AMP1" else 0
        reach = _END_KERNEL // 2 + snake_reach
        first, last = first - reach, last + reach
        block_reach = max(
            sum((kernel // 2) * (dilation + 1) + 2 * snake_reach for dilation in dilations)
            for kernel, dilations in zip(
                self.resblock_kernel_sizes, self.resblock_dilation_sizes, strict=True
            )
        )
        upsamplings = zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True)
        for rate, kernel in reversed(list(upsamplings)):
            first, last = first - block_reach, last + block_reach
            # Input i reaches outputs i * rate - padding ... i * rate - padding + kernel - 1
            padding = (kernel - rate) // 2
            first = -((kernel - 1 - padding - first) // rate)
            last = (last + padding) // rate
        return first - _END_KERNEL // 2, last + _END_KERNEL // 2


@dataclasses.dataclass(frozen=True)
class BandwidthExtensionConfig:
    """Second stage of the LTX-2.3 vocoder.

    Attributes:
      generator: predicts the residual at the output rate.
      input_rate, output_rate: sample rates before and after, Hz.
      n_fft, hop: window and step of the first stage's spectrogram, in samples at input_rate.
    """

    generator: HiFiGANConfig
    input_rate: int = 16000
    output_rate: int = 48000
    n_fft: int = 512
    hop: int = 80

    def __post_init__(self):
        hold_fields(self)
        if self.output_rate % self.input_rate:
            raise ValueError(
                f"bwe output_sampling_rate {self.output_rate} must be a multiple of "
                f"input_sampling_rate {self.input_rate}"
            )
        if self.generator.hop != self.hop * self.ratio:
            raise ValueError(
                f"bwe upsample_rates multiply to {self.generator.hop}, but hop_length {self.hop} "
                f"at {self.input_rate} Hz is {self.hop * self.ratio} samples at "
                f"{self.output_rate} Hz"
            )
        if self.n_fft < self.hop:
            raise ValueError(f"bwe n_fft {self.n_fft} is shorter than hop_length {self.hop}")

    @property
    def ratio(self) -> int:
        """Output samples per input sample."""
        return self.output_rate // self.input_rate

    def input_span(self, first: int, last: int) -> tuple[int, int]:
        """First and last input sample that output samples `first` ... `last` depend on."""
        first_frame, last_frame = self.generator.input_span(first, last)
        reach = bigvgan.RESAMPLER_REACH
        return (
            min((first_frame + 1) * self.hop - self.n_fft, -(-first // self.ratio) - reach),
            max((last_frame + 1) * self.hop - 1, last // self.ratio + reach),
        )


@dataclasses.dataclass(frozen=True)
class VocoderConfig:
    """A vocoder: one HiFi-GAN, and for LTX-2.3 a bandwidth extension.

    Attributes:
      generator: first stage.
      bandwidth_extension: second stage, or None.
      sample_rate: of the waveform `vocode` returns, Hz.
    """

    generator: HiFiGANConfig = HiFiGANConfig()
    bandwidth_extension: BandwidthExtensionConfig | None = None
    sample_rate: int = 24000

    def __post_init__(self):
        hold_fields(self)
        extension = self.bandwidth_extension
        if extension is None:
            return
        if extension.output_rate != self.sample_rate:
            raise ValueError(
                f"sample_rate {self.sample_rate} differs from the bandwidth extension's "
                f"{extension.output_rate}"
            )
        if self.generator.hop % extension.hop:
            raise ValueError(
                f"the first stage's {self.generator.hop} samples per mel frame must be a multiple "
                f"of bwe hop_length {extension.hop}"
            )

    @classmethod
    def from_metadata(cls, vocoder: Mapping[str, Any]) -> "VocoderConfig":
        """Reads `config["vocoder"]` of an LTX-2 checkpoint: flat (2.0) or {vocoder, bwe} (2.3).

        Raises:
          ValueError: unknown or unsupported settings, by name.
        """
        if "bwe" not in vocoder:
            rates = [vocoder[name] for name in _RATE_NAMES if name in vocoder]
            generator = _generator_from_metadata(vocoder, "vocoder", _RATE_NAMES)
            return cls(generator=generator, sample_rate=rates[0] if rates else 24000)
        raise_problems("vocoder", find_problems(vocoder, known=("vocoder", "bwe")))
        bwe = vocoder["bwe"]
        n_fft = bwe.get("n_fft", 512)
        fixed = {"win_size": n_fft, "num_mels": _MEL_BINS}
        raise_problems("vocoder.bwe", find_problems(bwe, fixed=fixed))
        extension = BandwidthExtensionConfig(
            generator=_generator_from_metadata(bwe, "vocoder.bwe", _BWE_NAMES),
            input_rate=bwe.get("input_sampling_rate", 16000),
            output_rate=bwe.get("output_sampling_rate", 48000),
            n_fft=n_fft,
            hop=bwe.get("hop_length", 80),
        )
        return cls(
            generator=_generator_from_metadata(vocoder["vocoder"], "vocoder.vocoder", _RATE_NAMES),
            bandwidth_extension=extension,
            sample_rate=extension.output_rate,
        )

    @property
    def has_snakes(self) -> bool:
        """Whether it is made of BigVGANs, whose snakes turn rounding into noise."""
        return self.generator.resblock == "AMP1"

    @property
    def mel_bins(self) -> int:
        """Mel bins of the input."""
        return _MEL_BINS

    @property
    def hop(self) -> int:
        """Samples per mel frame of the waveform `vocode` returns."""
        extension = self.bandwidth_extension
        return self.generator.hop * (1 if extension is None else extension.ratio)

    def _frame_span(self) -> tuple[int, int]:
        """Mel frames, relative to a frame, that its samples depend on."""
        span = 0, self.hop - 1
        if self.bandwidth_extension is not None:
            span = self.bandwidth_extension.input_span(*span)
        return self.generator.input_span(*span)

    @property
    def left_context(self) -> int:
        """Mel frames before a frame that its samples depend on."""
        return -self._frame_span()[0]

    @property
    def right_context(self) -> int:
        """Mel frames after a frame that its samples depend on: the look-ahead of streaming."""
        return self._frame_span()[1]


# The reference loader of 2.0 reads the second spelling, its files hold the first
_RATE_NAMES = ("output_sampling_rate", "output_sample_rate")
_BWE_NAMES = (
    "input_sampling_rate",
    "output_sampling_rate",
    "hop_length",
    "n_fft",
    "win_size",
    "num_mels",
)
_GENERATOR_NAMES = (
    "resblock",
    "stereo",
    "activation",
    "upsample_initial_channel",
    "upsample_rates",
    "upsample_kernel_sizes",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
    "use_tanh_at_final",
    "use_bias_at_final",
    "apply_final_activation",
)


def _generator_from_metadata(settings, where, other_names) -> HiFiGANConfig:
    """Reads one network's settings; absent ones have the defaults of the reference loader."""
    resblock = str(settings.get("resblock", HiFiGANConfig.resblock))
    fixed = {"stereo": True} | ({"activation": "snakebeta"} if resblock == "AMP1" else {})
    known = (*_GENERATOR_NAMES, *other_names)
    raise_problems(where, find_problems(settings, fixed=fixed, known=known))
    if not settings.get("apply_final_activation", True):
        final_activation = "none"
    elif settings.get("use_tanh_at_final", True):
        final_activation = "tanh"
    else:
        final_activation = "clamp"
    lists = [name for name in _GENERATOR_NAMES if name.endswith(("_rates", "_sizes"))]
    return HiFiGANConfig(
        resblock=resblock,
        initial_channels=settings.get("upsample_initial_channel", 1024),
        final_activation=final_activation,
        final_bias=settings.get("use_bias_at_final", True),
        **{name: settings[name] for name in lists if name in settings},
    )


class WaveResBlock(nn.Module):
    """For every dilation: x + conv(act(dilated conv(act(x))))."""

    kernel_size: int
    dilations: tuple[int, ...]
    snake: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        for i, dilation in enumerate(self.dilations):
            y = _activate(x, self.snake, f"acts1_{i}")
            y = conv1d(channels, self.kernel_size, f"convs1_{i}", dilation, dtype=self.dtype)(y)
            y = _activate(y, self.snake, f"acts2_{i}")
            x = x + conv1d(channels, self.kernel_size, f"convs2_{i}", dtype=self.dtype)(y)
        return x


def _activate(x, snake, name, slope=_SLOPE):
    """Anti-aliased SnakeBeta, or leaky ReLU. Called inside a compact method."""
    return bigvgan.AntialiasedSnake(name=name)(x) if snake else nn.leaky_relu(x, slope)


class HiFiGAN(nn.Module):
    """HiFi-GAN, or BigVGAN with anti-aliased snakes, as the config says."""

    config: HiFiGANConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, log_mel: jax.Array) -> jax.Array:
        """log_mel [B, T, M, 2] -> waveform [B, T * hop, 2], both float32."""
        config = self.config
        snake = config.resblock == "AMP1"
        x = einops.rearrange(log_mel.astype(jnp.float32), "B T M S -> B T (S M)")
        x = conv1d(config.initial_channels, _END_KERNEL, "conv_pre", dtype=self.dtype)(x)
        blocks = list(
            zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        upsamplings = zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
        for level, (rate, kernel_size) in enumerate(upsamplings):
            if not snake:
                x = nn.leaky_relu(x, _SLOPE)
            upsample = ConvTranspose(
                x.shape[-1] // 2, kernel_size, rate, self.dtype, name=f"ups_{level}"
            )
            x = upsample(x)  # [B, T * rates so far, C]
            parallel = [
                WaveResBlock(
                    *block, snake, self.dtype, name=f"resblocks_{level * len(blocks) + i}"
                )(x)
                for i, block in enumerate(blocks)  # kernel, dilations
            ]
            x = sum(parallel) / len(blocks)
        x = _activate(x.astype(jnp.float32), snake, "act_post", _LAST_SLOPE)
        x = conv1d(STEREO, _END_KERNEL, "conv_post", use_bias=config.final_bias)(x)
        if config.final_activation == "tanh":
            return jnp.tanh(x)
        return jnp.clip(x, -1.0, 1.0) if config.final_activation == "clamp" else x


class BandwidthExtendedVocoder(nn.Module):
    """LTX-2.3: log-mel [B, T, M, 2] -> waveform [B, T * hop, 2] at the extension's output rate."""

    config: VocoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        extension = self.config.bandwidth_extension
        self.vocoder = HiFiGAN(self.config.generator, self.dtype)
        self.bwe_generator = HiFiGAN(extension.generator, self.dtype)
        self.mel_stft = bigvgan.CausalLogMel(
            extension.input_rate, extension.n_fft, extension.hop, _MEL_BINS
        )

    def __call__(self, log_mel: jax.Array) -> jax.Array:
        waveform = self.vocoder(log_mel)  # [B, N, 2] at the extension's input rate
        residual = self.bwe_generator(self.mel_stft(waveform))  # [B, N * ratio, 2]
        skip = bigvgan.upsample_waveform(waveform, self.config.bandwidth_extension.ratio)
        return jnp.clip(residual + skip, -1.0, 1.0)


def vocoder_module(
    config: VocoderConfig, dtype: jnp.dtype = jnp.float32
) -> HiFiGAN | BandwidthExtendedVocoder:
    """The Linen module whose parameter tree is the checkpoint's `vocoder` component."""
    if config.bandwidth_extension is None:
        return HiFiGAN(config.generator, dtype)
    return BandwidthExtendedVocoder(config, dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def vocode(
    params: Mapping[str, Any],
    config: VocoderConfig,
    log_mel: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Synthesises the waveform of a clip.

    Args:
      params: tree of the `vocoder` component.
      config: architecture.
      log_mel: [B, T, 64, 2], natural log, 100 frames per second.
      dtype: of the convolutions, whatever the inputs' dtypes are.

    Returns:
      [B, T * config.hop, 2] float32 in [-1, 1] at `config.sample_rate`.

    Raises:
      ValueError: no frames, or another number of mel bins or channels.
    """
    check_log_mel(log_mel, config.mel_bins)
    with jax.named_scope("vocoder"):
        return vocoder_module(config, dtype).apply({"params": params}, log_mel)
