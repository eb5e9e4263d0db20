"""Normalisation over the last axes, without weights and in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, eps: float, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, or axes: x [..., D] -> [..., D] float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + eps)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the last axis: x [..., D] -> [..., D] float32."""
    x = x.astype(jnp.float32)
    return rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), eps)
