"""Convolutions over time, [B, T, C], of which vocoders are made.

They compute in `dtype`, sum in float32 and give `dtype`. In float32 their precision is HIGHEST, as
TPUs and GPUs would otherwise round the operands.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def conv1d(
    features: int,
    kernel: int,
    name: str,
    dilation: int = 1,
    use_bias: bool = True,
    dtype: jnp.dtype = jnp.float32,
):
    """A module that convolves [B, T, C] to [B, T, features]; `kernel` is odd."""
    reach = dilation * (kernel // 2)
    return nn.Conv(
        features,
        (kernel,),
        kernel_dilation=(dilation,),
        padding=[(reach, reach)],
        use_bias=use_bias,
        dtype=dtype,
        precision=lax.Precision.HIGHEST,
        name=name,
    )


def conv_transpose1d(x: jax.Array, kernel: jax.Array, bias: jax.Array, rate: int) -> jax.Array:
    """Transposed convolution, y[j] = b + sum_i x[i] kernel[j + (k - rate) / 2 - i rate].

    Written as a plain convolution that makes the `rate` samples of each input frame side by side:
    one over frames with zeros between them multiplies those too, and on CPUs XLA has no fast
    kernel for its gradient (ten times slower, forward and backward).

    Args:
      x: [B, T, C].
      kernel: (k, in, out), not flipped.
      bias: (out,).
      rate: upsampling factor; k - rate is even.

    Returns:
      [B, T * rate, out].
    """
    size, width, features = kernel.shape
    shift = (size - rate) // 2
    # Sample s of frame q meets frame q - m by tap m * rate + s + shift: m from -after to before.
    before, after = (size - 1 - shift) // rate, (rate - 1 + shift) // rate
    left = after * rate - shift
    taps = jnp.pad(kernel, ((left, (before + after + 1) * rate - size - left), (0, 0), (0, 0)))
    taps = taps.reshape(-1, rate, width, features)[::-1].swapaxes(1, 2)
    y = lax.conv_general_dilated(
        x,
        taps.reshape(-1, width, rate * features),
        window_strides=(1,),
        padding=[(before, after)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=lax.Precision.HIGHEST,
    )
    return y.reshape(x.shape[0], -1, features) + bias[None, None]


class ConvTranspose(nn.Module):
    """Parameters of a `conv_transpose1d`."""

    features: int
    kernel_size: int
    rate: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        operands = (jnp.asarray(value, self.dtype) for value in (x, kernel, bias))
        return conv_transpose1d(*operands, self.rate)
