"""Compiled programs are kept on disk, so that a program that is started again starts fast."""

import argparse
import hashlib
import os
import pathlib
import platform

import jax

from omniforcing_jax.io.paths import user_cache

MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --no-compilation-cache; see `use_cache`."""
    parser.add_argument(
        "--no-compilation-cache", action="store_true", help="compile everything again"
    )


def use_cache(enabled: bool = True) -> None:
    """Keeps what is compiled from now on in the user's cache folder, and takes it from there.

    Two variables come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    config = jax.config
    if not enabled:
        config.update("jax_enable_compilation_cache", False)
    if not config.jax_enable_compilation_cache:
        return
    if MIN_SECONDS.upper() not in os.environ:
        config.update(MIN_SECONDS, 0.0)  # a stream has dozens of small programs
    if config.jax_compilation_cache_dir:
        return
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no place to write to: programs are compiled as they always were
        return
    config.update("jax_compilation_cache_dir", str(folder))


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
