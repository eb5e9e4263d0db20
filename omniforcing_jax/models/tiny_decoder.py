"""A tiny decoder of LTX-2's video latents: 1 % of the VAE decoder's operations, a softer picture.

Normalised latents [B, f, h, w, C] -> pixels [B, F, 32h, 32w, 3], F = 8 (f - 1) + 1. All layers work
on single frames but the memory blocks, which also see the frame before, so it is causal: a stream
needs one frame per memory block, and waits for nothing.
Source: TAEHV (MIT) in its layout for LTX-2, the weight files `taeltx_2` and `taeltx2_3`. Layers
have the numbers of these files; those between them have no weights.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.ranges import hold_fields

NUM_STAGES = 3  # each doubles time, height and width
_BLOCKS_PER_STAGE = 3
_LAYERS_PER_STAGE = 6  # the blocks, an upsampling, growth in time, a convolution
_FIRST_BLOCK = 3  # behind the limit of the latents, a convolution and its ReLU
_COMPRESSION = 2**NUM_STAGES
FIRST = f"layers_{_FIRST_BLOCK}"  # memory block, of the latents' size

# {layer: the last input frame [B, 1, h, w, C]} of every memory block
Memory = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TinyDecoderConfig:
    """Architecture of a tiny decoder.

    Attributes:
      latent_channels: C.
      widths: channels of the stages, and behind the last.
      patch_size: side of the square of pixels that the last layer makes.

    Raises:
      ValueError: sizes that are no positive whole numbers.
    """

    latent_channels: int = 128
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    patch_size: int = 4

    def __post_init__(self):
        hold_fields(self)

    @classmethod
    def from_metadata(cls, settings: Mapping[str, Any]) -> "TinyDecoderConfig":
        """Reads the fields, which checkpoint_converters.tiny_decoder writes into config.json.

        Raises:
          ValueError: settings that are missing or unknown, or sizes as above.
        """
        names = tuple(field.name for field in dataclasses.fields(cls))
        raise_problems("tiny_decoder", find_problems(settings, required=names, known=names))
        return cls(**settings)

    @property
    def temporal_compression(self) -> int:
        """Pixel frames per latent, the first excepted: 8."""
        return _COMPRESSION

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along height and width: 32."""
        return _COMPRESSION * self.patch_size


def _conv(features: int, index: int, dtype: jnp.dtype, bias: bool = True):
    """The layer of number `index` of the file."""
    return nn.Conv(features, (3, 3), use_bias=bias, dtype=dtype, name=f"layers_{index}")


class MemoryBlock(nn.Module):
    """relu(x + conv(relu(conv(relu(conv([x, x of the frame before])))))), in x's width."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, last: jax.Array) -> jax.Array:
        """x [B, F, H, W, C], and the frame [B, 1, H, W, C] before it."""
        before = jnp.concatenate([last.astype(x.dtype), x[:, :-1]], axis=1)
        y = jnp.concatenate([x, before], axis=-1)
        for i in (0, 2, 4):
            conv = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f"conv_{i}")
            y = conv(nn.relu(y) if i else y)
        return nn.relu(x + y)


class TinyDecoder(nn.Module):
    """The network."""

    config: TinyDecoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array, memory: Memory | None) -> tuple[jax.Array, Memory]:
        """[B, f, h, w, C] -> (about [0, 1] as [B, 8f, 32h, 32w, 3], memory for what follows)."""
        c, kept = self.config, {}
        x = 3 * jnp.tanh(latents.astype(jnp.float32) / 3)
        x = nn.relu(_conv(c.widths[0], 1, self.dtype)(x.astype(self.dtype)))
        for stage in range(NUM_STAGES):
            index = _FIRST_BLOCK + stage * _LAYERS_PER_STAGE
            for i in range(index, index + _BLOCKS_PER_STAGE):
                name = f"layers_{i}"
                last = jnp.zeros_like(x[:, :1]) if memory is None else memory[name]
                kept[name] = x[:, -1:]
                x = MemoryBlock(self.dtype, name=name)(x, last)
            # A 1x1 convolution gives the same before the upsampling as behind it.
            name, width = f"growth_{index + 4}", 2 * x.shape[-1]
            x = nn.Conv(width, (1, 1), use_bias=False, dtype=self.dtype, name=name)(x)
            x = rearrange(x, "b f h w (t c) -> b (f t) h w c", t=2)
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = _conv(c.widths[stage + 1], index + 5, self.dtype, bias=False)(x)
        last_layer = _FIRST_BLOCK + NUM_STAGES * _LAYERS_PER_STAGE + 1
        x = _conv(3 * c.patch_size**2, last_layer, self.dtype)(nn.relu(x))
        # unlike the VAE's, colours come first and rows before columns
        p = c.patch_size
        return rearrange(x, "b f h w (c p q) -> b f (h p) (w q) c", p=p, q=p), kept


def decode_chunk(
    config: TinyDecoderConfig,
    params: Mapping[str, Any],
    latents: jax.Array,
    memory: Memory | None = None,
    dtype=jnp.float32,
) -> tuple[jax.Array, Memory]:
    """Decodes the next latents of a stream; however it is cut, the whole clip is the same.

    Args:
      params: of the network.
      latents: normalised, [B, f, h, w, C].
      memory: what the call before returned; None starts a clip.
      dtype: of the computation and the result.

    Returns:
      Pixels [B, 8(f-1)+1, 32h, 32w, 3] of a first chunk, [B, 8f, 32h, 32w, 3] of any other, about
      [-1, 1], not clipped; and the memory for the next call.
    """
    with jax.named_scope("tiny_decoder"):
        video, kept = TinyDecoder(config, dtype).apply({"params": params}, latents, memory)
    if memory is None:
        video = video[:, config.temporal_compression - 1 :]
    return 2 * video - 1, kept


def init_params(config: TinyDecoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters."""
    latents = jnp.zeros((1, 1, 1, 1, config.latent_channels))
    return TinyDecoder(config).init(key, latents, None)["params"]


def convolutions(config: TinyDecoderConfig) -> Iterator[tuple[int, int, int, int]]:
    """Of each convolution: area of its kernel, input and output channels, positions per latent."""
    positions, width = 1, config.widths[0]
    yield 9, config.latent_channels, width, positions
    for following in config.widths[1:]:
        yield from [(9, 4 * width, width, positions)] * _BLOCKS_PER_STAGE  # 2 + 1 + 1 times width
        yield 1, width, 2 * width, positions
        positions *= 8
        yield 9, width, following, positions
        width = following
    yield 9, width, 3 * config.patch_size**2, positions


def decoder_flops(config: TinyDecoderConfig, latents: int) -> int:
    """Floating-point operations (2 per multiply-add) for `latents` of them, frames times area."""
    return sum(2 * latents * math.prod(convolution) for convolution in convolutions(config))
