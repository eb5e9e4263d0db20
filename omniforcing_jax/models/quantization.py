"""Weight-only int8: integers with one scale per output channel, multiplied without being expanded.

A weight w of an output channel becomes round(w / s) with s = max |w| / 127 over its inputs, so the
error of a weight is at most s / 2. Activations are not quantised: x W = (x V) s, where V holds the
integers, which bfloat16 and float32 represent exactly. In the device's memory the weights are int8,
half the size of bfloat16.
"""

from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

MODES = ("none", "int8")
# {name of a quantised parameter: axis of a channel's inputs, which share one scale}; each row of an
# embedding table is a channel
INPUT_AXIS = {"kernel": -2, "embedding": -1}

_MAX_INT8 = 127


@flax.struct.dataclass
class Int8Array:
    """values * scale: values int8 [...], scale float32, of size 1 along the input axis."""

    values: jax.Array
    scale: jax.Array


def check_mode(mode: str) -> None:
    """Raises ValueError unless `mode` is one of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"quantize must be one of {', '.join(MODES)}, not {mode!r}")


def quantize(array: jax.Array, axis: int) -> Int8Array:
    """Rounds to int8 with one scale for each channel, the entries along `axis`.

    Args:
      array: [...] floating point, finite.
      axis: the input axis, see `INPUT_AXIS`.
    """
    x = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / _MAX_INT8, 1.0)
    return Int8Array(jnp.round(x / scale).astype(jnp.int8), scale)


def dequantize(array: Int8Array, dtype: jnp.dtype) -> jax.Array:
    """The array that the integers stand for, [...] in `dtype`."""
    return (array.values.astype(jnp.float32) * array.scale).astype(dtype)


def matmul(x: jax.Array, kernel: jax.Array | Int8Array, dtype: jnp.dtype) -> jax.Array:
    """x W: x [..., E] in any dtype, kernel [E, M] -> [..., M] in `dtype`, summed in float32."""
    weights = kernel.values if isinstance(kernel, Int8Array) else kernel
    y = jnp.matmul(x.astype(dtype), weights.astype(dtype), preferred_element_type=jnp.float32)
    if isinstance(kernel, Int8Array):
        y = y * jnp.expand_dims(
            kernel.scale[0], range(y.ndim - 1)
        )  # one per column, so it can wait until after the sum
    return y.astype(dtype)


def take_rows(table: jax.Array | Int8Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding table [V, D] at ids [...] -> [..., D] in `dtype`."""
    if isinstance(table, Int8Array):
        return dequantize(jax.tree.map(lambda leaf: leaf[ids], table), dtype)
    return table[ids].astype(dtype)


def initializer(
    init: nn.initializers.Initializer, axes: tuple[str | None, ...], mode: str, input_axis: int
) -> Callable[..., jax.Array | Int8Array]:
    """A parameter's initialiser with logical axis names on the array, or on values and scales.

    Args:
      init: of the array.
      axes: logical names of its axes.
      mode: one of `MODES`.
      input_axis: see `INPUT_AXIS`; the scales, of size 1 there, get no name for it.
    """
    named = nn.with_logical_partitioning(init, axes)
    if mode == "none":
        return named
    scale_axes = list(axes)
    scale_axes[input_axis] = None

    def quantized(key: jax.Array, shape: tuple[int, ...]) -> Int8Array:
        array = quantize(init(key, shape), input_axis)
        box = lambda leaf, names: nn.LogicallyPartitioned(leaf, names)  # noqa: E731
        return Int8Array(box(array.values, axes), box(array.scale, tuple(scale_axes)))

    return quantized
