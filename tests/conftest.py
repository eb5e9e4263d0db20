"""Shared fixtures: the golden files in tests/golden (see its README) and their weights."""

import functools
import gc
import os
import pathlib
from collections.abc import Iterator
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile what they test, and leave the user's cache alone.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Two lanes: TEST_XLA=default compiles as users' programs are compiled, and runs the tests marked
# `default_xla`. Otherwise, as the suite compiles thousands of programs that run for milliseconds,
# most of its time would be XLA's:
if os.environ.get("TEST_XLA") != "default":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # With jaxlib 0.10's concurrent scheduler, a program may be compiled differently from one
    # process to the next: other roundings where bits are compared, other orders of messages. Its
    # older emitters compile twice as fast; later versions have none, and end at unknown flags. Cut
    # into parts for LLVM, as is the default, a program costs a quarter more of the two processors.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        " --xla_cpu_parallel_codegen_split_count=1"
        # of devices that are threads here, and wait for each other: on a busy machine XLA's 40
        # seconds, after which it ends the process, may be too few
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        + " --xla_cpu_use_fusion_emitters=false"
        * version("jaxlib").startswith("0.10."),
    )

import hypothesis
import jax
import numpy as np
import pytest

from tests.ports import reserved_port

# Operands of different ranks are a mistake more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples every time, however long they take: a busy machine finds no fault.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_collection_finish():
    """Leaves the libraries' own objects, which stay, out of every search for garbage.

    Tracing makes many objects, and so many searches: they took a tenth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a module compiled: a thousand tests' programs are gigabytes, and the process may
    run out of memory maps, which ends it in the middle of a compilation."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port for a server that is told its port, kept free while the test runs."""
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder with the reference weights (`*.safetensors`) and outputs (`*.npz`)."""
    return GOLDEN


@pytest.fixture(scope="session")
def ltx20():
    """Inputs and outputs of the LTX-2.0 reference at tiny size."""
    return np.load(GOLDEN / "ltx2_tiny_expected.npz")


@pytest.fixture(scope="session")
def ltx23():
    """Inputs and outputs of the LTX-2.3 reference at tiny size."""
    return np.load(GOLDEN / "ltx23_tiny_expected.npz")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """Makes and converts a tiny random checkpoint of a version; returns its folder."""
    from checkpoint_converters import ltx2, synthetic

    folders = {}

    def make(version: str) -> pathlib.Path:
        if version not in folders:
            folder = tmp_path_factory.mktemp(f"ltx{version}")
            source = folder / "tiny.safetensors"
            arguments = ["--size", "tiny", "--version", version, "--output", str(source)]
            assert not synthetic.main(arguments)
            folders[version] = folder / "checkpoint"
            assert not ltx2.main(["--input", str(source), "--output", str(folders[version])])
        return folders[version]

    return make


@pytest.fixture(scope="session")
def random_gemma(tmp_path_factory):
    """Makes and converts a tiny random Gemma 3 that fits `random_checkpoint`; returns its folder.

    What it was converted from lies beside it, as `hf`.
    """
    from checkpoint_converters import gemma3, synthetic_gemma

    folder = tmp_path_factory.mktemp("gemma")
    synthetic_gemma.write(folder / "hf", "tiny")
    gemma3.convert(folder / "hf", folder / "gemma")
    return folder / "gemma"


@pytest.fixture(scope="session")
def random_pipeline(random_checkpoint):
    """The same checkpoints, loaded."""
    import jax.numpy as jnp

    from omniforcing_jax.pipeline import load_pipeline

    return functools.cache(
        lambda version: load_pipeline(random_checkpoint(version), dtype=jnp.float32)
    )
