"""8-bit weights and products of the sampler's linear layers; Gemma's: text/test_gemma.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.models.quantization import (
    PRECISIONS,
    dequantize,
    matmul,
    matmul_by_heads,
    quantize,
    quantize_kernel,
)
from omniforcing_jax.sampling.weights import split_by_heads
from omniforcing_jax.scaling.devices import check_products


def test_float8_rounds_each_weight_to_a_sixteenth():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((20, 5)).astype(np.float32) * np.array([1, 9, 0, 1e-3, 5])
    array = quantize(jnp.asarray(weights, jnp.float32), -2, PRECISIONS["fp8"])
    assert array.values.dtype == jnp.float8_e4m3fn and array.scale.shape == (1, 5)
    largest = np.abs(np.asarray(array.values, np.float32)).max(0)
    np.testing.assert_array_equal(largest, [448, 448, 0, 448, 448])
    error = np.abs(np.asarray(dequantize(array, jnp.float32)) - weights)
    # three bits behind the point; below 2^-6 in steps of 2^-9
    allowed = np.maximum(np.abs(weights) / 16, np.asarray(array.scale) * 2.0**-10)
    assert (error <= 1.0001 * allowed).all() and error[:, 2].max() == 0


@pytest.mark.parametrize("name", PRECISIONS)
def test_products(name):
    """That of what the numbers stand for; and exact where rounding changes nothing."""
    precision, rng = PRECISIONS[name], np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 3, 40)) * np.array([1, 30, 1e-3])[:, None], jnp.float32)
    kernel = quantize_kernel(jnp.asarray(rng.standard_normal((40, 6)), jnp.float32), precision)
    assert kernel.products == name.startswith("w8a8")
    assert kernel.values.shape == ((6, 40) if kernel.products else (40, 6))
    operand = dequantize(quantize(x, -1, precision), jnp.float32) if kernel.products else x
    y = jax.jit(matmul, static_argnums=2)(x, kernel, jnp.float32)
    expanded = np.asarray(dequantize(kernel, jnp.float32))
    expected = np.asarray(operand, np.float64) @ (expanded.T if kernel.products else expanded)
    size = np.abs(np.asarray(operand, np.float64)).sum(-1, keepdims=True)
    assert (np.abs(y - expected) / size).max() < 5e-6
    assert jnp.asarray(matmul(x, kernel, jnp.bfloat16)).dtype == jnp.bfloat16
    heads = split_by_heads(kernel, 2, False)  # [N, H, E]
    assert heads.values.shape == (2, 3, 40) and heads.scale.shape == (2, 3, 1)
    found = matmul_by_heads(x, heads, jnp.float32, False)
    np.testing.assert_allclose(found.reshape(y.shape), y, rtol=1e-5, atol=1e-6)
    heads = split_by_heads(kernel, 4, True)
    assert heads.values.shape == (4, 10, 6)
    found = matmul_by_heads(x.reshape(2, 3, 4, 10), heads, jnp.float32, True)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)

    limit = 448 if "fp8" in name else 127
    whole = rng.integers(-8, 9, (4, 40)).astype(np.float32)
    weights = rng.integers(-8, 9, (40, 6)).astype(np.float32)
    whole[:, 0] = weights[0] = limit  # so that both scales are 1
    whole[3] = 0
    kernel = quantize_kernel(jnp.asarray(weights), precision)
    found = matmul(jnp.asarray(whole), kernel, jnp.float32)
    np.testing.assert_array_equal(found, whole @ weights)
    whole[1, 5] = np.nan  # is not hidden, and stays with its token
    found = np.asarray(matmul(jnp.asarray(whole), kernel, jnp.float32))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 3]]).all()


def test_a_device_without_float8_is_named():
    for name in PRECISIONS:
        check_products(name, "NVIDIA H200")
        check_products(name, "cpu")
    check_products("w8a8-int8", "TPU v6 lite")
    with pytest.raises(ValueError, match="TPU v6 lite multiplies no float8: use w8a8-int8, or fp8"):
        check_products("w8a8-fp8", "TPU v6 lite")
