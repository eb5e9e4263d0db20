"""The published sizes compile: weights, cache and text keys are shapes, nothing is allocated."""

import pytest

from launch import aot_compile
from omniforcing_jax import kv_cache
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.kv_cache import CacheConfig
from omniforcing_jax.models.config import TransformerConfig

PARAMETERS = {"2.0": 18_876_174_592, "2.3": 18_988_838_144}


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_full_size_block_step_compiles(version):
    args = aot_compile.parse_arguments(["--size", "full", "--version", version, "--target", "cpu"])
    compiled, _ = aot_compile.compile_block_step(args)
    cache = kv_cache.cache_bytes(
        CacheConfig(BlockLayout.prefix(), args.window),
        TransformerConfig(),
        batch=1,
        patches=16 * 24,
        dtype="bfloat16",
    )
    held = compiled.memory_analysis().argument_size_in_bytes
    levels = 5 if version == "2.3" else 1  # text keys depend on the noise level there
    text = levels * 48 * 2 * 1024 * (4096 + 2048) * 2
    # The step gets text keys and values, so it does not take the weights that make them.
    unused = 48 * 2 * (4096**2 + 2048**2) * 2
    assert held == pytest.approx(2 * PARAMETERS[version] + cache + text - unused, rel=0.01)


def test_unknown_topology(capsys):
    assert aot_compile.main(["--target", "v99:1x1"]) == 2
    assert "v5p:2x2x1" in capsys.readouterr().err
