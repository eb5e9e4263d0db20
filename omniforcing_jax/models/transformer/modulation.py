"""Timestep embedding and AdaLN-single (PixArt-alpha, arXiv 2310.00426) as LTX-2 uses them.

A sigma tensor [B, G] gives one noise level to each of G equal, contiguous groups of tokens: one per
sample (G = 1), per frame (G = F) or per token (G = T). Modulation keeps the G axis, so a frame's
hundreds of tokens share one row instead of each carrying a copy.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.distributed.partitioning import WHOLE, WeightRules, constrain
from omniforcing_jax.models.transformer.layers import linear

NUM_SINUSOIDS = 256


def timestep_embedding(timestep: jax.Array, dim: int = NUM_SINUSOIDS) -> jax.Array:
    """[cos(t w) | sin(t w)], w_i = 10000^(-i / (dim/2)): timestep [...] -> [..., dim] float32."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[..., None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class AdaLN(nn.Module):
    """timestep [B, G] -> modulation [B, G, rows, dim] and embedded timestep [B, G, dim]."""

    dim: int
    rows: int
    dtype: jnp.dtype
    rules: WeightRules = WeightRules()

    @nn.compact
    def __call__(self, timestep: jax.Array) -> tuple[jax.Array, jax.Array]:
        how = self.dtype, self.rules
        x = timestep_embedding(timestep).astype(self.dtype)
        x = linear(self.dim, (None, "embed"), *how, name="linear_1")(x)
        embedded = linear(self.dim, ("embed", None), *how, name="linear_2")(nn.silu(x))
        rows = linear(self.rows * self.dim, ("embed", "mlp"), *how, name="linear")(
            nn.silu(embedded)
        )
        # few numbers that every product with thousands of tokens needs whole
        rows = constrain(rows, "batch", *(WHOLE,) * timestep.ndim)
        return rows.reshape(*timestep.shape, self.rows, self.dim), embedded


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over channels, without a weight, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over channels, without weights, in fp32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def by_group(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, D] -> [B, G, T/G, D]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2])


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x * (1 + scale) + shift: x [B, T, D], scale and shift [B, G, D]."""
    y = by_group(x, scale.shape[1]) * (1 + scale[:, :, None]) + shift[:, :, None]
    return y.reshape(x.shape)


def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x * gate: x [B, T, D], gate [B, G, D]."""
    return (by_group(x, gate.shape[1]) * gate[:, :, None]).reshape(x.shape)
