"""Compiled programs are kept on disk, so that a program that is started again starts fast."""

import argparse
import gc
import hashlib
import os
import pathlib
import platform

import jax

from omniforcing_jax.io.paths import user_cache

MAX_BYTES = "jax_compilation_cache_max_size"
_MAX_BYTES = 10 * 10**9  # what was used longest ago goes first
MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --no-compilation-cache; see `use_cache`."""
    parser.add_argument(
        "--no-compilation-cache", action="store_true", help="compile everything again"
    )


def use_cache(enabled: bool = True) -> None:
    """Keeps what is compiled from now on in the user's cache folder, and takes it from there.

    That folder grows to 10 GB, or to JAX_COMPILATION_CACHE_MAX_SIZE bytes (-1: without end). Two
    variables come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    # Tracing makes many objects that stay, and each search for garbage goes through them.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    config = jax.config
    if not enabled:
        config.update("jax_enable_compilation_cache", False)
    if not config.jax_enable_compilation_cache:
        return
    if MIN_SECONDS.upper() not in os.environ:
        config.update(MIN_SECONDS, 0.0)  # a stream has dozens of small programs
    if config.jax_compilation_cache_dir:
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # JAX gives up where one has no time of its last use: it is killed between writing the two
        for program in folder.glob("*-cache"):
            program.with_name(f"{program.name.removesuffix('-cache')}-atime").touch()
    except (OSError, RuntimeError):  # no place to write to: all is compiled as it always was
        return
    config.update("jax_compilation_cache_dir", str(folder))
    if MAX_BYTES.upper() not in os.environ:
        config.update(MAX_BYTES, _MAX_BYTES)


def default_folder() -> pathlib.Path:
    """`omniforcing_jax/compiled/PROCESSOR` in the user's cache folder.

    JAX does not tell processors apart, whose instructions differ; a home may be shared by several.
    """
    processor = platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # another system
        processor += platform.processor()
    return user_cache("compiled") / hashlib.sha256(processor.encode()).hexdigest()[:12]
