"""What all converters share: check everything, then stream into a folder that appears at once."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from rich import progress as rich_progress

from checkpoint_converters import orbax_writer
from checkpoint_converters.checks import SPARE_BYTES, existing_parent, output_problems
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo, read_middle

FORMAT = 1
DTYPE_CHOICES = {
    "keep": None,
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
MESH_AXES = ("fsdp", "tensor")
_SAMPLE_BYTES = 4096  # of each tensor that goes into a component's fingerprint


class DiskFullError(ConversionError):
    """No room for the output: a single line, as nothing is wrong with the inputs."""

    def __init__(self, line: str):
        super().__init__([line])
        self.args = (line,)


class Plan(NamedTuple):
    """A conversion whose inputs were found to be in order.

    Attributes:
      config_json: content of `config.json`.
      tensors: {official key: tensor} of the components to stream.
      components: those to stream.
      copies: component folders of an already converted checkpoint, to be copied as they are.
      copied_fingerprints: {component: fingerprint} of these.
      files: other files that belong to the checkpoint, copied into its folder.
    """

    config_json: dict
    tensors: Mapping[str, TensorInfo]
    components: tuple[str, ...]
    copies: tuple[pathlib.Path, ...] = ()
    copied_fingerprints: Mapping[str, str] = {}
    files: tuple[pathlib.Path, ...] = ()


def parse_mesh(text: str) -> dict[str, int]:
    """'fsdp=8,tensor=2' -> {"fsdp": 8, "tensor": 2}.

    Raises:
      ValueError: not of this form, or another axis than fsdp and tensor.
    """
    mesh: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh {text!r}: {part!r} must be AXIS=SIZE with AXIS one of {MESH_AXES} and "
                "SIZE at least 1, for example fsdp=8 or fsdp=8,tensor=2"
            )
        mesh[name] = int(size)
    return mesh


def config_content(
    family: str, model_version: str, config: dict, components: tuple[str, ...],
    files: tuple[pathlib.Path, ...], student: dict | None = None,
) -> dict:  # fmt: skip
    """Content of `config.json` of a converted checkpoint."""
    return {
        "format": FORMAT,
        "family": family,
        "model_version": model_version,
        "config": config,
        "student": student,
        "components": list(components),
        "source": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
    }


def run(
    plan: Plan,
    problems: list[str],
    output: pathlib.Path,
    *,
    dtype: np.dtype | None = None,
    mesh: Mapping[str, int] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict:
    """Writes a converted checkpoint, or raises and leaves nothing behind.

    With several JAX processes on a shared file system each writes its own share.

    Args:
      plan: what to write.
      problems: problems found so far; the output's are added.
      output: folder to create.
      dtype: dtype to store, None keeps the file's.
      mesh: see `orbax_writer.plan_leaves`.
      overwrite: replace an earlier conversion.
      show_progress: draw a progress bar.

    Returns:
      The content of `config.json`: the plan's, and "fingerprints".

    Raises:
      ConversionError: all problems at once.
      DiskFullError: a `ConversionError` as well; the disk was full, and nothing is left behind.
    """
    output = pathlib.Path(output).absolute()
    index, count, barrier = _processes()
    partial = partial_path(output)
    leaves: dict[str, list[orbax_writer.Leaf]] = {}
    if not problems:  # otherwise the stacks may have holes
        leaves = {
            component: orbax_writer.plan_leaves(plan.tensors, component, dtype, mesh)
            for component in plan.components
        }
    copied = [f for folder in plan.copies for f in folder.rglob("*") if f.is_file()]
    copied += plan.files
    every = [leaf for group in leaves.values() for leaf in group]
    num_bytes = sum(leaf.num_bytes for leaf in every)
    num_bytes += sum(file.stat().st_size for file in copied)
    problems = problems + output_problems(output, partial, overwrite, num_bytes)
    if problems:
        raise ConversionError(problems)
    fingerprints = {component: fingerprint(group) for component, group in leaves.items()}
    content = plan.config_json | {"fingerprints": fingerprints | dict(plan.copied_fingerprints)}
    read_bytes = sum(source.info.num_bytes for leaf in every for source in leaf.sources)
    barrier("checked")
    show = show_progress and index == 0
    with appearing(output, partial, owner=index == 0, barrier=barrier, num_bytes=num_bytes):
        with progress_bar(show, "converting", read_bytes // count) as advance:
            for component, group in leaves.items():
                orbax_writer.write_component(
                    partial / component, group, advance=advance, share=(index, count)
                )
        if index == 0:
            for folder in plan.copies:
                shutil.copytree(folder, partial / folder.name)
            for file in plan.files:
                shutil.copyfile(file, partial / file.name)
            (partial / "config.json").write_text(json.dumps(content, indent=1))
    return content


def fingerprint(leaves: Iterable[orbax_writer.Leaf]) -> str:
    """Tells the weights of a component apart from all others, without reading them in full.

    A hash of every tensor's name, place, shape and dtypes, and of 4 KiB from its middle: training a
    model further changes all of its tensors. What this gives is the same on any machine, and for
    any chunks.
    """
    digest = hashlib.sha256()
    for leaf in leaves:
        for source in leaf.sources:
            info = source.info
            what = [leaf.path, source.layer, list(info.shape), info.dtype_code, leaf.dtype.name]
            digest.update(json.dumps(what).encode())
            digest.update(read_middle(info, _SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def partial_path(output: pathlib.Path) -> pathlib.Path:
    """Where a conversion to `output` is built: same file system, so that it can be renamed."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def appearing(
    output: pathlib.Path,
    partial: pathlib.Path,
    *,
    owner: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
    num_bytes: int | None = None,
) -> Iterator[None]:
    """Creates `partial`, and renames it to `output` when the block ends without an exception.

    On an exception, SIGINT or SIGTERM, `partial` is removed; an older `output` stays as it was
    until the new one is complete and on disk.

    Raises:
      DiskFullError: there was no room for `partial`, whose size is `num_bytes` if it is known.
    """
    with sigterm_as_exit(), explaining_a_full_disk(output, partial, num_bytes):
        try:
            if owner:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier("created")
            yield
            os.sync()
            barrier("written")
            if owner:
                _rename(partial, output)
            barrier("renamed")
        except BaseException:
            if owner:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _rename(partial: pathlib.Path, output: pathlib.Path) -> None:
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore, and with it Orbax, raises ValueError, shutil.copytree an error that lists others, and
# what is written in Rust a plain Exception
_NUMBER_IN_TEXT = re.compile(r"(?:os_error_code='|\[Errno |\(os error )(\d+)")


@contextlib.contextmanager
def explaining_a_full_disk(
    output: pathlib.Path, partial: pathlib.Path, num_bytes: int | None = None
) -> Iterator[None]:
    """Raises `DiskFullError` for any error of a full disk; what removes `partial` goes inside."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := _NUMBER_IN_TEXT.search(str(error))):
            number = int(match[1])
        if number not in _NO_ROOM:
            raise
        raise DiskFullError(_full_disk(output, partial, number, num_bytes)) from error


def _full_disk(
    output: pathlib.Path, partial: pathlib.Path, number: int, num_bytes: int | None
) -> str:
    folder = existing_parent(output)
    space = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free in {folder}"
    if num_bytes is not None:
        space = f"{(num_bytes + SPARE_BYTES) / 1e9:.1f} GB are needed, {space}"
    left = "nothing was left behind"
    if partial.exists():
        left = f"what there is of it is in {partial}, which can be deleted"
    return (
        f"{output}: {os.strerror(number)} while it was being written; {space}; {left}; make room, "
        "or choose another --output"
    )


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that the cleaning up runs; SIGINT already raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def progress_bar(show: bool, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes, speed and remaining time; yields the function that counts finished bytes."""
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, disable=not show) as bar:
        task = bar.add_task(title, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def join_processes(distributed: bool) -> None:
    """Joins a multi-process JAX launch, which `run` then finds."""
    if distributed:
        import jax

        jax.distributed.initialize()


def _processes() -> tuple[int, int, Callable[[str], None]]:
    """(index, count, barrier) of the JAX processes; one if nobody started several."""
    # jax is not imported for this: it would cost start-up time and memory
    if "jax" not in sys.modules:
        return 0, 1, lambda name: None
    import jax
    from jax.experimental import multihost_utils

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return 0, 1, lambda name: None
    return jax.process_index(), jax.process_count(), multihost_utils.sync_global_devices
