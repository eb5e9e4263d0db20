"""Linear layers in 8 bits: one scale per output channel, multiplied without being expanded.

A weight w of an output channel becomes v = w / s, rounded to int8 or float8 (e4m3), where the
channel's largest |w| is the largest number of that dtype: s = max |w| / 127, or / 448. In the
device's memory the weights are half the size of bfloat16. There are two ways to multiply:

* Weights only: x W = (x V) s. Activations are left as they are; bfloat16 and float32 represent V
  exactly, so the error is that of the weights.
* 8-bit products: x is rounded as well, with a scale of its own for each token, t = max |x| / 127
  or / 448, so that x W = (U V) t s. Integers are summed in int32, float8 in float32.

qwix has the same product of two quantised sides (`lax.dot_general`, then both scales); where only
the weights are quantised it expands them first, and its scales have the dtype of the array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

MODES = ("none", "int8")  # of a text encoder
# {name of a quantised parameter: axis of a channel's inputs, which share one scale}; each row of an
# embedding table is a channel
INPUT_AXIS = {"kernel": -2, "embedding": -1}


class Precision(NamedTuple):
    """dtype of the weights, and whether products are of that dtype, too."""

    dtype: Any
    products: bool = False


INT8 = Precision(jnp.int8)
# of a sampler's transformer
PRECISIONS = {
    "int8": INT8,
    "fp8": Precision(jnp.float8_e4m3fn),
    "w8a8-int8": Precision(jnp.int8, products=True),
    "w8a8-fp8": Precision(jnp.float8_e4m3fn, products=True),
}


@flax.struct.dataclass
class QuantizedArray:
    """values * scale.

    Attributes:
      values: int8 or float8_e4m3fn [...].
      scale: float32, of size 1 along the input axis.
      products: whether what it is multiplied with is rounded to the dtype of the values.
    """

    values: jax.Array
    scale: jax.Array
    products: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def ndim(self) -> int:
        """Axes of the values."""
        return self.values.ndim


def check_mode(mode: str, modes: Any = MODES) -> None:
    """Raises ValueError unless `mode` is one of `modes`."""
    if mode not in modes:
        raise ValueError(f"quantize must be one of {', '.join(modes)}, not {mode!r}")


def quantize(
    array: jax.Array, axis: int, precision: Precision = INT8, scale: jax.Array | None = None
) -> QuantizedArray:
    """Rounds with one scale for each channel, the entries along `axis`.

    Args:
      array: [...] floating point. What is not finite makes its channel's scale not finite.
      axis: the input axis, see `INPUT_AXIS`.
      scale: of the channels, of size 1 along `axis`, where it is known and large enough.
    """
    x = array.astype(jnp.float32)
    dtype = jnp.dtype(precision.dtype)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = 127.0 if is_integer else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    own = jnp.where(largest == 0, 1.0, largest / limit)
    # float8 rounds half a step more than its largest number to that
    scale = own if scale is None else jnp.where(largest <= 1.03 * limit * scale, scale, own)
    values = x / scale
    values = (jnp.round(values) if is_integer else values).astype(dtype)
    return QuantizedArray(values, scale, precision.products)


def host_memory() -> jax.sharding.Sharding:
    """The computer's memory, where weights wait to be quantised.

    Raises:
      ValueError: JAX has no CPU.
    """
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ValueError(
            "weights are read into the computer's memory to be quantised, by JAX on its CPU: name "
            "that in JAX_PLATFORMS, too, such as cuda,cpu"
        ) from error


def dequantize(array: QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    """The array that the 8-bit numbers stand for, [...] in `dtype`."""
    return (array.values.astype(jnp.float32) * array.scale).astype(dtype)


def quantize_kernel(
    kernel: jax.Array, precision: Precision, scale: jax.Array | None = None
) -> QuantizedArray:
    """A linear layer's kernel [E, M], with scales [1, M] if they are known, for `matmul`.

    Values and scales of 8-bit products lie as [M, E] and [M, 1]: GPUs multiply 8-bit numbers in
    that order only, and would turn them in every block, with a second copy of all weights.
    """
    if precision.products:
        return quantize(kernel.T, -1, precision, None if scale is None else scale.T)
    return quantize(kernel, -2, precision, scale)


def expanded(array: jax.Array | QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    """`dequantize`, or an array that is none as it is."""
    return dequantize(array, dtype) if isinstance(array, QuantizedArray) else array


def matmul(x: jax.Array, kernel: jax.Array | QuantizedArray, dtype: jnp.dtype) -> jax.Array:
    """x W: x [..., E] in any dtype, kernel [E, M] -> [..., M] in `dtype`, summed in float32, or in
    int32."""
    if not isinstance(kernel, QuantizedArray):
        y = jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
        return y.astype(dtype)
    values = kernel.values
    if kernel.products:
        rounded = quantize(x, -1, Precision(values.dtype))
        is_integer = jnp.issubdtype(values.dtype, jnp.integer)
        y = jax.lax.dot_general(
            rounded.values,
            values,
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if is_integer else jnp.float32,
        )
        y = y.astype(jnp.float32) * rounded.scale
    else:
        y = jnp.matmul(x.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32)
    return scaled(y, kernel).astype(dtype)


def matmul_by_heads(
    x: jax.Array, kernel: jax.Array | QuantizedArray, dtype: jnp.dtype, over_heads: bool
) -> jax.Array:
    """A product to heads, or from them, with weights that lie by heads.

    Args:
      x: [..., E], or [..., N, H] in any dtype.
      kernel: [N, H, E]; quantised with scales [N, H, 1] if it makes heads, [1, 1, E] if not.
      over_heads: x has heads, over which is summed.

    Returns:
      [..., N, H], or [..., E], in `dtype`.
    """
    axes = ((x.ndim - 2, x.ndim - 1), (0, 1)) if over_heads else ((x.ndim - 1,), (2,))
    how = (axes, ((), ()))
    if not isinstance(kernel, QuantizedArray):
        return jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), how)
    x, dtypes = x.astype(dtype), {"preferred_element_type": jnp.float32}
    values, scale = kernel.values.astype(dtype), kernel.scale
    if kernel.products:
        rounded = quantize(x, axes[0], Precision(kernel.values.dtype))
        x, values = rounded.values, kernel.values
        if jnp.issubdtype(values.dtype, jnp.integer):
            dtypes = {"preferred_element_type": jnp.int32}
    y = jax.lax.dot_general(x, values, how, **dtypes).astype(jnp.float32)
    if kernel.products:
        ones = (1,) * (1 if over_heads else 2)
        y = y * rounded.scale.reshape(*x.shape[: x.ndim - len(axes[0])], *ones)
    scale = scale[0, 0] if over_heads else scale[..., 0]  # [E], or [N, H]
    return (y * jnp.expand_dims(scale, range(y.ndim - scale.ndim))).astype(dtype)


def scaled(y: jax.Array, kernel: QuantizedArray) -> jax.Array:
    """y [..., M], summed over a kernel's values, times the scales of its M channels: float32."""
    # one per column, so it can wait until after the sum
    return y * jnp.expand_dims(kernel.scale.reshape(-1), range(y.ndim - 1))


def put(
    buffer: jax.Array | QuantizedArray, x: jax.Array, start: jax.Array | int, axis: int
) -> jax.Array | QuantizedArray:
    """A buffer with x in it from `start` on along `axis`, rounded where the buffer is.

    Args:
      buffer: [...]; quantised over its last axis.
      x: as the buffer, but for its length along `axis`, which is not the last one.
    """
    if isinstance(buffer, QuantizedArray):
        x = quantize(x, -1, Precision(buffer.values.dtype))

    def update(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)

    return jax.tree.map(update, buffer, x)


def take_rows(table: jax.Array | QuantizedArray, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding table [V, D] at ids [...] -> [..., D] in `dtype`."""
    if isinstance(table, QuantizedArray):
        return dequantize(jax.tree.map(lambda leaf: leaf[ids], table), dtype)
    return table[ids].astype(dtype)


def initializer(
    init: nn.initializers.Initializer, axes: tuple[str | None, ...], mode: str, input_axis: int
) -> Callable[..., jax.Array | QuantizedArray]:
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

    def quantized(key: jax.Array, shape: tuple[int, ...]) -> QuantizedArray:
        array = quantize(init(key, shape), input_axis)
        box = lambda leaf, names: nn.LogicallyPartitioned(leaf, names)  # noqa: E731
        return QuantizedArray(box(array.values, axes), box(array.scale, tuple(scale_axes)))

    return quantized
