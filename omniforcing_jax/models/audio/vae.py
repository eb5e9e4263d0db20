"""Audio VAE of LTX-2: log-mel spectrogram <-> latents, 25 per second.

2-D convolutions over (time, mel bin) that are causal in time: each pads two zero rows before its
input and none after. Both networks are therefore causal, and a clip can be encoded and decoded in
chunks without error if every convolution is given the last rows of its previous input
(`encode_audio_chunk`, `decode_audio_chunk`).
Axis letters: B batch, T time rows, W frequency columns, C channels.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from omniforcing_jax.models.audio.mel import MelConfig, check_log_mel
from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.models.norms import rms_norm
from omniforcing_jax.ranges import Layers, hold_fields

NORM_EPS = 1e-6

# Settings of `ddconfig` with a single supported value
_FIXED = {
    "double_z": True,
    "in_channels": 2,
    "out_ch": 2,
    "attn_resolutions": [],
    "mid_block_add_attention": False,
    "norm_type": "pixel",
    "causality_axis": "height",
}
_READ = ("ch", "ch_mult", "num_res_blocks", "z_channels", "mel_bins")
# No effect on the network: attention would use `resolution`, and `downsample_time` is not read
# by the reference either
_WITHOUT_EFFECT = ("resolution", "dropout", "downsample_time")


@dataclasses.dataclass(frozen=True)
class AudioVAEConfig:
    """Architecture of the audio VAE.

    Attributes:
      base_channels: width of the outermost level.
      channel_multipliers: width of each level, outermost first, in units of `base_channels`.
      num_res_blocks: residual blocks per encoder level; the decoder has one more.
      latent_channels: channels per latent mel bin.
      mel: the spectrogram it works on.
    """

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: Layers = 2
    latent_channels: int = 8
    mel: MelConfig = dataclasses.field(default_factory=MelConfig)

    def __post_init__(self):
        hold_fields(self)
        if len(self.channel_multipliers) != 3:
            raise ValueError(
                f"ch_mult has {len(self.channel_multipliers)} levels; LTX-2 audio latents are "
                "4 mel frames by 4 mel bins, which takes exactly 3"
            )
        if self.mel.mel_bins % self.downsampling:
            raise ValueError(
                f"mel_bins must be a multiple of {self.downsampling}, not {self.mel.mel_bins}"
            )

    @classmethod
    def from_metadata(cls, audio_vae: Mapping[str, Any]) -> "AudioVAEConfig":
        """Reads `config["audio_vae"]` of an LTX-2 checkpoint.

        Raises:
          ValueError: an unknown or unsupported setting in `model.params.ddconfig`, or mel settings
            that contradict each other.
        """
        ddconfig = dict(audio_vae["model"]["params"]["ddconfig"])
        if ddconfig.get("attn_resolutions", ...) is None:
            ddconfig["attn_resolutions"] = []
        required = (*_FIXED, *_READ)
        problems = find_problems(
            ddconfig, required=required, fixed=_FIXED, known=(*required, *_WITHOUT_EFFECT)
        )
        mel = MelConfig.from_metadata(audio_vae.get("preprocessing", {}))
        if ddconfig.get("mel_bins", mel.mel_bins) != mel.mel_bins:
            problems.append(
                f"mel_bins is {ddconfig['mel_bins']} but preprocessing.mel.n_mel_channels is "
                f"{mel.mel_bins}"
            )
        raise_problems("audio_vae ddconfig", problems)
        return cls(
            base_channels=ddconfig["ch"],
            channel_multipliers=ddconfig["ch_mult"],
            num_res_blocks=ddconfig["num_res_blocks"],
            latent_channels=ddconfig["z_channels"],
            mel=mel,
        )

    @property
    def downsampling(self) -> int:
        """Mel frames per latent (after the first) and mel bins per latent bin."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_bins(self) -> int:
        """Frequency bins of a latent."""
        return self.mel.mel_bins // self.downsampling

    @property
    def latent_width(self) -> int:
        """Features of a latent as the transformer sees it, index c * latent_bins + f."""
        return self.latent_channels * self.latent_bins

    def num_mel_frames(self, num_latents: int) -> int:
        """Mel frames that `decode_audio` makes of so many latents: 4 T - 3."""
        return max(0, self.downsampling * num_latents - (self.downsampling - 1))


def norm_silu(x: jax.Array) -> jax.Array:
    """silu(x / sqrt(mean_c x^2 + 1e-6)): the norm over the channels, in float32; x's dtype."""
    return nn.silu(rms_norm(x, NORM_EPS).astype(x.dtype))


class CausalConv(nn.Module):
    """3x3 convolution of [B, T, W, C], causal in time and zero padded in frequency.

    Attributes:
      features: channels of the result.
      stride: in both axes.
      width_padding: zero columns before and after.
    """

    features: int
    stride: int = 1
    width_padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(
        self, x: jax.Array, history: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the rows x [B, T, W, C].

        Args:
          history: [B, 3 - stride, W, C], the rows before `x`; None at the start of a clip, which
            has two rows of zeros before it.

        Returns:
          The convolution, and the last input rows: the history of the next call. With stride 2 a
          clip's first call takes an odd number of rows and the others an even one.
        """
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if history is None:
            history = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        rows = jnp.concatenate([history, x], axis=1)  # [B, T + 2, W, C]
        y = lax.conv_general_dilated(
            rows,
            kernel.astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(0, 0), self.width_padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return y + bias.astype(x.dtype)[None, None, None], rows[:, self.stride - 3 :]


class MelResBlock(nn.Module):
    """x + conv2(silu(norm(conv1(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    features: int

    @nn.compact
    def __call__(self, x, history=None):
        history, new = history or {}, {}
        y = x
        for name in ("conv1", "conv2"):
            conv = CausalConv(self.features, name=name)
            y, new[name] = conv(norm_silu(y), history.get(name))
        if x.shape[-1] != self.features:
            shortcut = nn.Conv(
                self.features,
                (1, 1),
                dtype=x.dtype,
                precision=lax.Precision.HIGHEST,
                name="nin_shortcut",
            )
            x = shortcut(x)
        return x + y, new


class Upsample(nn.Module):
    """Nearest x2 in time and frequency, then a convolution.

    The first row of the clip is dropped, so T rows become 2 T - 1 and stay aligned with the
    causal downsampling of the encoder.
    """

    @nn.compact
    def __call__(self, x, history, start: bool):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        y, history = CausalConv(x.shape[-1], name="conv")(x, history)
        return (y[:, 1:] if start else y), history


class Level(nn.Module):
    """Residual blocks at one resolution, then, if `resample` names one, a change to another.

    Attributes:
      features: channels of the result.
      blocks: names of the residual blocks.
      resample: "downsample" (a convolution of stride 2), "upsample", or "".
    """

    features: int
    blocks: tuple[str, ...]
    resample: str = ""

    @nn.compact
    def __call__(self, x, history=None, start: bool = True):
        """x [B, T, W, C] -> the result and the histories of its convolutions; see `Upsample`."""
        history, new = history or {}, {}
        for name in self.blocks:
            x, new[name] = MelResBlock(self.features, name=name)(x, history.get(name))
        if self.resample == "downsample":
            conv = CausalConv(self.features, stride=2, width_padding=(0, 1), name="downsample")
            x, new["downsample"] = conv(x, history.get("downsample"))
        elif self.resample:
            x, new["upsample"] = Upsample(name="upsample")(x, history.get("upsample"), start)
        return x, new


_MID_BLOCKS = ("block_1", "block_2")


class AudioEncoder(nn.Module):
    """Log-mel [B, T, M, 2] -> mean of the latent distribution [B, ceil(T / 4), M / 4, c].

    `history` is a tree of the last input rows of every convolution, None at the start. A clip's
    first rows are 4 t - 3, and 4 t in a continued clip, if more are to follow.
    """

    config: AudioVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, log_mel: jax.Array, history: dict | None = None) -> tuple[jax.Array, dict]:
        config = self.config
        history, new = history or {}, {}
        conv_in = CausalConv(config.base_channels, name="conv_in")
        x, new["conv_in"] = conv_in(log_mel.astype(self.dtype), history.get("conv_in"))
        blocks = tuple(f"block_{i}" for i in range(config.num_res_blocks))
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            name, resample = f"down_{level}", "downsample" if level != last else ""
            layer = Level(multiplier * config.base_channels, blocks, resample, name=name)
            x, new[name] = layer(x, history.get(name))
        x, new["mid"] = Level(x.shape[-1], _MID_BLOCKS, name="mid")(x, history.get("mid"))
        # Mean and log-variance; the reference uses the mean only
        conv_out = CausalConv(2 * config.latent_channels, name="conv_out")
        x, new["conv_out"] = conv_out(norm_silu(x), history.get("conv_out"))
        return x[..., : config.latent_channels], new


class AudioDecoder(nn.Module):
    """Latents [B, T, M / 4, c] -> log-mel [B, 4 T - 3, M, 2]; 4 T rows in a continued clip.

    `history` is a tree of the last two input rows of every convolution, None at the start. `start`
    says whether the first latent is the first of the clip.
    """

    config: AudioVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, latents: jax.Array, history: dict | None = None, start: bool = True
    ) -> tuple[jax.Array, dict]:
        config = self.config
        history, new = history or {}, {}
        width = config.channel_multipliers[-1] * config.base_channels
        x = latents.astype(self.dtype)  # [B, T, M / 4, c]
        x, new["conv_in"] = CausalConv(width, name="conv_in")(x, history.get("conv_in"))
        x, new["mid"] = Level(width, _MID_BLOCKS, name="mid")(x, history.get("mid"))
        blocks = tuple(f"block_{i}" for i in range(config.num_res_blocks + 1))
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            name, resample = f"up_{level}", "upsample" if level else ""
            layer = Level(multiplier * config.base_channels, blocks, resample, name=name)
            x, new[name] = layer(x, history.get(name), start)
        conv_out = CausalConv(2, name="conv_out")
        x, new["conv_out"] = conv_out(norm_silu(x), history.get("conv_out"))
        return x, new


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode_audio(
    params: Mapping[str, Any],
    config: AudioVAEConfig,
    log_mel: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Encodes a log-mel spectrogram to normalised latents (the distribution's mean).

    Args:
      params: {encoder, per_channel_statistics: {mean, std}}; other entries are ignored.
      config: architecture.
      log_mel: [B, T, mel_bins, 2], natural log.
      dtype: compute dtype; norms, statistics and the result are fp32.

    Returns:
      [B, ceil(T / 4), C] float32, (mean - mean_of_means) / std_of_means, C index c * bins + f.

    Raises:
      ValueError: no frames, or other mel bins or channels than the model's.
    """
    return encode_audio_chunk(params, config, log_mel, None, dtype=dtype)[0]


def encode_audio_chunk(
    params: Mapping[str, Any],
    config: AudioVAEConfig,
    log_mel: jax.Array,
    history: dict | None,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, dict]:
    """Encodes the next mel frames of a clip; concatenated chunks equal `encode_audio`.

    Args:
      params: as for `encode_audio`.
      config: architecture.
      log_mel: [B, T, mel_bins, 2], the frames that follow those already encoded: 4 t - 3 of them at
        the start and 4 t after that, for t latents; another number only at the end of the clip.
      history: what the previous call returned, None at the start.
      dtype: compute dtype, the same for all chunks.

    Returns:
      latents [B, t, C] float32 as of `encode_audio`, and the new history.

    Raises:
      ValueError: no frames, or other mel bins or channels than the model's.
    """
    check_log_mel(log_mel, config.mel.mel_bins)
    encoder = AudioEncoder(config, dtype)
    with jax.named_scope("audio_encoder"):
        mean, history = encoder.apply({"params": params["encoder"]}, log_mel, history)
    latents = einops.rearrange(mean.astype(jnp.float32), "B T f c -> B T (c f)")
    statistics = _statistics(params)
    return (latents - statistics["mean"]) / statistics["std"], history


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_audio(
    params: Mapping[str, Any],
    config: AudioVAEConfig,
    latents: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Decodes the normalised latents of a whole clip.

    Args:
      params: {decoder, per_channel_statistics: {mean, std}}; other entries are ignored.
      config: architecture.
      latents: [B, T, C], feature index c * bins + f.
      dtype: compute dtype; norms, statistics and the result are fp32.

    Returns:
      log-mel [B, 4 T - 3, mel_bins, 2] float32.

    Raises:
      ValueError: no latents, or another latent width than the model's.
    """
    return decode_audio_chunk(params, config, latents, None, start=True, dtype=dtype)[0]


def decode_audio_chunk(
    params: Mapping[str, Any],
    config: AudioVAEConfig,
    latents: jax.Array,
    history: dict | None,
    *,
    start: bool,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, dict]:
    """Decodes the next latents of a clip; concatenated chunks equal `decode_audio`.

    Args:
      params: as for `decode_audio`.
      config: architecture.
      latents: [B, t, C], the latents that follow those already decoded.
      history: what the previous call returned, or `init_decoder_history` at the start.
      start: True for the first chunk of a clip (static).
      dtype: compute dtype, the same for all chunks.

    Returns:
      log-mel [B, 4 t - 3 (first chunk) or 4 t, mel_bins, 2] float32, and the new history.

    Raises:
      ValueError: no latents, or another latent width than the model's.
    """
    check_latents(latents, config)
    statistics = _statistics(params)
    latents = latents.astype(jnp.float32) * statistics["std"] + statistics["mean"]
    latents = einops.rearrange(latents, "B T (c f) -> B T f c", c=config.latent_channels)
    decoder = AudioDecoder(config, dtype)
    with jax.named_scope("audio_decoder"):
        log_mel, history = decoder.apply({"params": params["decoder"]}, latents, history, start)
    return log_mel.astype(jnp.float32), history


# so that its shapes are found once, and not for each stream
_decode_chunk = jax.jit(decode_audio_chunk, static_argnames=("config", "start", "dtype"))


def init_decoder_history(
    params: Mapping[str, Any],
    config: AudioVAEConfig,
    batch: int,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> dict:
    """Zero history for `decode_audio_chunk`: a tree of [B, 2, W, C] arrays in `dtype`."""
    latents = jax.ShapeDtypeStruct((batch, 1, config.latent_width), jnp.float32)
    how = {"config": config, "start": True, "dtype": dtype}
    _, history = _decode_chunk.eval_shape(params, latents=latents, history=None, **how)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), history)


def check_latents(latents: jax.Array, config: AudioVAEConfig) -> None:
    """Raises ValueError unless `latents` is [B, T >= 1, config.latent_width]."""
    if latents.ndim != 3 or latents.shape[2] != config.latent_width:
        raise ValueError(
            f"audio latents must be [B, T, {config.latent_width}] ({config.latent_channels} "
            f"channels x {config.latent_bins} mel bins), shape is {tuple(latents.shape)}"
        )
    if latents.shape[1] == 0:
        raise ValueError("audio latents are empty: T is 0, at least 1 is needed")


def _statistics(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    statistics = params["per_channel_statistics"]
    return {
        name: jnp.asarray(statistics[name], jnp.float32)[None, None] for name in ("mean", "std")
    }
