"""Layers of the LTX-2 convolutional video VAE.

Axis letters: B batch, F frames, H height, W width, C channels; activations are [B, F, H, W, C].

Every convolution has kernel 3 and pads time by repeating frames: a causal one puts its first frame
twice in front, a non-causal one its first frame in front and its last frame behind. To go on with
the next chunk of a stream, a causal layer needs the last two frames of its input, a non-causal one
the frame before the chunk: its cache. None for a cache means that the clip starts here. A whole
clip is decoded causally as one such chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from omniforcing_jax.models.norms import rms_norm

# Nested dict with the layout of the parameters, one array per convolution: [B, 2, H, W, C] of a
# causal one, [B, 1, H, W, C] of a non-causal one.
ConvCache = dict[str, Any]

KERNEL_SIZE = 3
_CACHED_FRAMES = KERNEL_SIZE - 1


def pixel_norm_silu(x: jax.Array) -> jax.Array:
    """silu(x / sqrt(mean_c(x^2) + 1e-8)) over the channels, in float32; x's dtype."""
    return nn.silu(rms_norm(x, 1e-8)).astype(x.dtype)


def patchify(video: jax.Array, patch: int) -> jax.Array:
    """[B, F, H*q, W*r, C] -> [B, F, H, W, (C r q)]: width comes before height in the channels."""
    return rearrange(video, "b f (h q) (w r) c -> b f h w (c r q)", q=patch, r=patch)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
    """Inverse of `patchify`."""
    return rearrange(x, "b f h w (c r q) -> b f (h q) (w r) c", q=patch, r=patch)


def space_to_depth(x: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """[B, F*t, H*s, W*s, C] -> [B, F, H, W, (C t s s)] for stride (t, s, s)."""
    t, p, q = stride
    return rearrange(x, "b (f t) (h p) (w q) c -> b f h w (c t p q)", t=t, p=p, q=q)


def depth_to_space(x: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """Inverse of `space_to_depth`."""
    t, p, q = stride
    return rearrange(x, "b f h w (c t p q) -> b (f t) (h p) (w q) c", t=t, p=p, q=q)


def pad_time(
    x: jax.Array, causal: bool, cache: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Adds the two frames a kernel of 3 needs: [B, F, H, W, C] -> [B, F + 2, H, W, C].

    Returns the padded input and the cache for the next chunk. Where that begins is the caller's
    choice when not causal, so all of x is returned, and the frame before it is the cache.
    """
    if not causal:
        past = x[:, :1] if cache is None else cache.astype(x.dtype)
        return jnp.concatenate([past, x, x[:, -1:]], axis=1), x
    past = jnp.repeat(x[:, :1], _CACHED_FRAMES, axis=1) if cache is None else cache
    padded = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    return padded, padded[:, -_CACHED_FRAMES:]


def frames_before(inputs: ConvCache, latent: int, num_latents: int, continued: bool) -> ConvCache:
    """The cache of a chunk that begins inside another one, which was decoded without `causal`.

    Args:
      inputs: what `model.decode_chunk` returned for the other one.
      latent: of the other one, at which the chunk begins, 1 ... num_latents.
      num_latents: of the other one.
      continued: whether the other one had a cache; otherwise its first latent is one frame.
    """
    first = 0 if continued else 1  # latents that are one frame everywhere

    def frame_before(x: jax.Array) -> jax.Array:
        per_latent = (x.shape[1] - first) // max(num_latents - first, 1)
        end = first + (latent - first) * per_latent
        return x[:, end - 1 : end]

    return jax.tree.map(frame_before, inputs)


class CausalConv3d(nn.Module):
    """3x3x3 convolution with repeated frames in time and zeros or reflection in space.

    The convolution itself adds the zeros. XLA fuses the other paddings with the normalisation that
    comes before, whose result is written to memory in any case.

    Attributes:
      features: channels of the result.
      padding_mode: "zeros" or "reflect".
      dtype: of the computation and the result.
    """

    features: int
    padding_mode: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, causal: bool, cache: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, F, H, W, C] -> ([B, F, H, W, features], cache as of `pad_time`)."""
        shape = (KERNEL_SIZE, KERNEL_SIZE, KERNEL_SIZE, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, cache = pad_time(x.astype(self.dtype), causal, cache)
        if self.padding_mode == "reflect":
            x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
            padding = [(0, 0), (0, 0), (0, 0)]
        else:
            padding = [(0, 0), (1, 1), (1, 1)]
        x = conv3d(x, kernel.astype(self.dtype), padding)
        return x + bias.astype(self.dtype)[None, None, None, None], cache


def conv3d(x: jax.Array, kernel: jax.Array, padding: list[tuple[int, int]]) -> jax.Array:
    """Convolution of [B, F, H, W, C]; `padding` of the three axes, none in time.

    XLA's 3-D convolution is slow on CPUs. There, the sum of three 2-D convolutions, one for each
    time step of the kernel, takes a quarter of the time, and its gradients a third.
    """

    def by_frames(x, kernel):
        batch, frames = x.shape[0], x.shape[1] - kernel.shape[0] + 1

        def tap(time: int) -> jax.Array:
            rows = x[:, time : time + frames].reshape(-1, *x.shape[2:])
            return jax.lax.conv_general_dilated(
                rows,
                kernel[time],
                window_strides=(1, 1),
                padding=padding[1:],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        y = sum(tap(time) for time in range(kernel.shape[0]))
        return y.reshape(batch, frames, *y.shape[1:])

    def at_once(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1, 1),
            padding=padding,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )

    return jax.lax.platform_dependent(x, kernel, cpu=by_frames, default=at_once)


class ResBlock(nn.Module):
    """x + conv2(silu(norm(conv1(silu(norm(x)))))), of x's width."""

    padding_mode: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, causal: bool, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        past, new = cache or {}, {}
        y = x
        for name in ("conv1", "conv2"):
            conv = CausalConv3d(x.shape[-1], self.padding_mode, self.dtype, name=name)
            y, new[name] = conv(pixel_norm_silu(y), causal, past.get(name))
        return x + y, new


class ResBlocks(nn.Module):
    """`num_layers` residual blocks, one after the other ("res_x" in a checkpoint's block list)."""

    num_layers: int
    padding_mode: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, causal: bool, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        past, new = cache or {}, {}
        for i in range(self.num_layers):
            name = f"res_blocks_{i}"
            block = ResBlock(self.padding_mode, self.dtype, name=name)
            x, new[name] = block(x, causal, past.get(name))
        return x, new


class SpaceToDepthDownsample(nn.Module):
    """Convolution and space-to-depth, plus the channel-averaged space-to-depth of the input.

    With a temporal stride the clip's first frame is doubled, so that it forms a pair of its own and
    every later frame is paired with frames of its past only.
    """

    features: int
    stride: tuple[int, int, int]
    padding_mode: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, causal: bool, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        t, p, q = self.stride
        if t == 2 and cache is None:
            x = jnp.concatenate([x[:, :1], x], axis=1)
        skip = space_to_depth(x, self.stride)  # [B, f, h, w, (features group)]
        skip = skip.reshape(*skip.shape[:-1], self.features, -1).mean(axis=-1)
        conv = CausalConv3d(
            self.features // (t * p * q), self.padding_mode, self.dtype, name="conv"
        )
        y, conv_cache = conv(x, causal, None if cache is None else cache["conv"])
        return space_to_depth(y, self.stride) + skip, {"conv": conv_cache}


class DepthToSpaceUpsample(nn.Module):
    """Convolution and depth-to-space.

    With a temporal stride the clip's first frame yields one frame, every other frame two.

    Attributes:
      multiplier: the result has 1 / multiplier of the input's channels.
      stride: factors of (time, height, width).
      residual: adds the depth-to-space of the input, with its channels repeated.
    """

    multiplier: int
    stride: tuple[int, int, int]
    residual: bool
    padding_mode: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, causal: bool, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        volume = self.stride[0] * self.stride[1] * self.stride[2]
        features = volume * x.shape[-1] // self.multiplier
        conv = CausalConv3d(features, self.padding_mode, self.dtype, name="conv")
        y, conv_cache = conv(x, causal, None if cache is None else cache["conv"])
        y = depth_to_space(y, self.stride)
        if self.residual:
            skip = depth_to_space(x, self.stride)
            y = y + jnp.tile(skip, (1, 1, 1, 1, volume // self.multiplier))
        if cache is None:
            y = y[:, self.stride[0] - 1 :]
        return y, {"conv": conv_cache}
