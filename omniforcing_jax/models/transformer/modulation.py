"""Timestep embedding and AdaLN-single (PixArt-alpha, arXiv 2310.00426) as LTX-2 uses them.

A sigma tensor [B, G] gives one noise level to each of G equal, contiguous groups of tokens: one per
sample (G = 1), per frame (G = F) or per token (G = T). Modulation has the same G axis, so that the
hundreds of tokens of a frame share one row and no copies of it are made.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from omniforcing_jax.distributed.partitioning import WHOLE, WeightRules, constrain
from omniforcing_jax.models.transformer.layers import linear

NUM_SINUSOIDS = 256


def timestep_embedding(timestep: jax.Array, dim: int = NUM_SINUSOIDS) -> jax.Array:
    """[cos(t w) | sin(t w)], w_i = 10000^(-i / (dim/2)): timestep [...] -> [..., dim] float32."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[..., None] * jnp.expand_dims(freqs, range(timestep.ndim))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class AdaLN(nn.Module):
    """timestep [B, G] -> modulation [B, G, rows, dim] and embedded timestep [B, G, dim].

    Attributes:
      dim: width of the stream that is modulated.
      rows: shifts, scales and gates for each group of tokens.
      dtype: of the computation and of both results.
    """

    dim: int
    rows: int
    dtype: jnp.dtype
    rules: WeightRules = WeightRules()

    @nn.compact
    def __call__(self, timestep: jax.Array) -> tuple[jax.Array, jax.Array]:
        how = self.dtype, self.rules
        x = timestep_embedding(timestep).astype(self.dtype)  # [B, G, 256]
        x = linear(self.dim, (None, "embed"), *how, name="linear_1")(x)
        embedded = linear(self.dim, ("embed", None), *how, name="linear_2")(nn.silu(x))
        rows = linear(self.rows * self.dim, ("embed", "mlp"), *how, name="linear")(
            nn.silu(embedded)
        )
        # Every device needs all of these few numbers: they meet thousands of tokens.
        rows = constrain(rows, "batch", *(WHOLE,) * timestep.ndim)
        return rearrange(rows, "B G (k D) -> B G k D", k=self.rows), embedded


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x * (1 + scale) + shift: x [B, T, D], scale and shift [B, G, D] -> [B, T, D]."""
    y = rearrange(x, "B (G t) D -> B G t D", G=scale.shape[1])
    y = y * (1 + scale[:, :, None]) + shift[:, :, None]
    return rearrange(y, "B G t D -> B (G t) D")


def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x * gate: x [B, T, D], gate [B, G, D] -> [B, T, D]."""
    y = rearrange(x, "B (G t) D -> B G t D", G=gate.shape[1]) * gate[:, :, None]
    return rearrange(y, "B G t D -> B (G t) D")
