"""LTX-2's latent upsamplers: video latents [B, f, h, w, C] twice as large, or twice as many.

A convolutional network between two stacks of residual blocks. It was trained on latents as the VAE
has them, so normalised ones are scaled before and after. The group norms average over all frames of
a clip: it is neither causal nor fit for streams.
Source: "LatentUpsampler" of Lightricks LTX-2, with the published kinds: spatial x2 (LTX-2.0: by the
rational resampler; later: by a pixel shuffle), spatial x1.5 and temporal x2.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.models.video_vae.layers import conv3d, depth_to_space
from omniforcing_jax.models.video_vae.model import latent_statistics
from omniforcing_jax.ranges import Layers, hold_fields

# scale of the rational resampler: (factor of the pixel shuffle, stride of the blur behind it)
RATIONAL_SCALES = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}
_GROUPS, _EPS = 32, 1e-5
_BLUR_SIZE = 5
_FIXED_SETTINGS = {"_class_name": "LatentUpsampler", "dims": 3}


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    """Architecture of an upsampler.

    Attributes:
      channels: C of the latents.
      width: channels in between, a multiple of 32.
      num_blocks: residual blocks before, and as many behind the upsampling.
      temporal: doubles the frames, f -> 2 f - 1, instead of height and width.
      scale: factor of height and width, of a spatial one.
      rational: a spatial one upsamples by the rational resampler.

    Raises:
      ValueError: sizes or a scale that are not supported.
    """

    channels: int = 128
    width: int = 512
    num_blocks: Layers = 4
    temporal: bool = False
    scale: float = 2.0
    rational: bool = False

    def __post_init__(self):
        hold_fields(self)
        if self.width % _GROUPS:
            raise ValueError(f"upsampler: width {self.width} must be a multiple of {_GROUPS}")
        scales = tuple(RATIONAL_SCALES) if self.rational else (2.0,)
        if not self.temporal and self.scale not in scales:
            raise ValueError(
                f"upsampler: spatial_scale is {self.scale}, must be one of "
                f"{', '.join(f'{scale:g}' for scale in scales)}"
            )

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any]) -> "UpsamplerConfig":
        """Reads the `config` of an upsampler's file; absent settings as the reference loader.

        Raises:
          ValueError: settings that are unknown or that this implementation does not have.
        """
        read = ("in_channels", "mid_channels", "num_blocks_per_stage", "spatial_upsample")
        read += ("temporal_upsample", "spatial_scale", "rational_resampler")
        problems = find_problems(config, fixed=_FIXED_SETTINGS, known=(*_FIXED_SETTINGS, *read))
        spatial = config.get("spatial_upsample", True)
        temporal = config.get("temporal_upsample", False)
        if spatial == temporal:
            problems.append("just one of spatial_upsample and temporal_upsample must be true")
        raise_problems("upsampler", problems)
        return cls(
            channels=config.get("in_channels", 128),
            width=config.get("mid_channels", 512),
            num_blocks=config.get("num_blocks_per_stage", 4),
            temporal=temporal,
            scale=config.get("spatial_scale", 2.0),
            rational=not temporal and config.get("rational_resampler", False),
        )

    @property
    def component(self) -> str:
        """Its name among a converted checkpoint's components."""
        return "temporal_upsampler" if self.temporal else "spatial_upsampler"

    def output_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latents of the result."""
        if self.temporal:
            return 2 * frames - 1, height, width
        factor, stride = RATIONAL_SCALES[self.scale]
        return frames, -(-factor * height // stride), -(-factor * width // stride)


class Conv3d(nn.Module):
    """3x3x3 convolution of [B, F, H, W, C] with zeros all around."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        x = conv3d(x, kernel.astype(self.dtype), [(0, 0), (1, 1), (1, 1)])
        return x + bias.astype(self.dtype)[None, None, None, None]


def _group_norm(dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=_GROUPS, epsilon=_EPS, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """silu(x + norm(conv(silu(norm(conv(x))))))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv3d(x.shape[-1], self.dtype, name="conv1")(x)
        y = nn.silu(_group_norm(self.dtype, "norm1")(y))
        y = Conv3d(x.shape[-1], self.dtype, name="conv2")(y)
        return nn.silu(x + _group_norm(self.dtype, "norm2")(y))


class LatentUpsampler(nn.Module):
    """The network, on latents [B, f, h, w, C] that are not normalised."""

    config: UpsamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = Conv3d(c.width, self.dtype, name="initial_conv")(x)
        x = nn.silu(_group_norm(self.dtype, "initial_norm")(x))
        for i in range(c.num_blocks):
            x = ResBlock(self.dtype, name=f"res_blocks_{i}")(x)
        x = self._upsample(x)
        for i in range(c.num_blocks):
            x = ResBlock(self.dtype, name=f"post_upsample_res_blocks_{i}")(x)
        return Conv3d(c.channels, self.dtype, name="final_conv")(x)

    def _upsample(self, x: jax.Array) -> jax.Array:
        c = self.config
        if c.temporal:  # the first latent stands for one frame only, and stays one
            x = Conv3d(2 * c.width, self.dtype, name="up")(x)
            return depth_to_space(x, (2, 1, 1))[:, 1:]
        factor, stride = RATIONAL_SCALES[c.scale]
        name = "rational_up" if c.rational else "up"
        # each frame by itself
        conv = nn.Conv(factor**2 * c.width, (3, 3), padding=1, dtype=self.dtype, name=name)
        x = depth_to_space(conv(x), (1, factor, factor))
        if not c.rational:
            return x
        size = (1, 1, _BLUR_SIZE, _BLUR_SIZE)
        blur = self.param("blur", nn.initializers.constant(_BLUR_SIZE**-2), size)
        return x if stride == 1 else _blur(x, blur, stride)


def _blur(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Every `stride`-th row and column of [B, F, H, W, C], filtered by `kernel` [1, 1, k, k]."""
    rows, channels = x.reshape(-1, *x.shape[2:]), x.shape[-1]
    kernel = jnp.broadcast_to(kernel[0, 0, :, :, None, None], (*kernel.shape[2:], 1, channels))
    y = jax.lax.conv_general_dilated(
        rows,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=[(_BLUR_SIZE // 2, _BLUR_SIZE // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("dtype",))
def upsample(
    config: UpsamplerConfig,
    params: Mapping[str, Any],
    vae_params: Mapping[str, Any],
    latents: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Upsamples normalised latents.

    Args:
      params: of the network.
      vae_params: of the video VAE the latents belong to; its statistics are read.
      latents: [B, f, h, w, C].
      dtype: of the computation.

    Returns:
      Normalised latents [B, f', h', w', C] float32, of the size `config.output_size` says.
    """
    mean, std = latent_statistics(vae_params)
    x = latents.astype(jnp.float32) * std + mean
    x = LatentUpsampler(config, dtype).apply({"params": params}, x)
    return (x.astype(jnp.float32) - mean) / std


def init_params(config: UpsamplerConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters."""
    return LatentUpsampler(config).init(key, jnp.zeros((1, 2, 1, 1, config.channels)))["params"]
