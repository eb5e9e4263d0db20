"""Outputs that appear at once, complete, or not at all: folders, and safetensors files."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from rich import progress as rich_progress

from checkpoint_converters.safetensors_io import (
    ConversionError,
    Table,
    table_bytes,
    write_safetensors,
)
from omniforcing_jax import programs
from omniforcing_jax.io import outputs

SPARE_BYTES = 64 << 20


class DiskFullError(ConversionError):
    """No room for the output: a single line, as nothing is wrong with the inputs."""

    exit_status = programs.FAILED

    def __init__(self, line: str):
        super().__init__([line])
        self.args = (line,)


def folder_problems(
    output: pathlib.Path,
    overwrite: bool,
    num_bytes: int,
    program: str,
    inputs: Iterable[str | os.PathLike | None] = (),
) -> list[str]:
    """Whether a folder can be written: place free, parent writable, disk large enough.

    `program` may replace what it wrote, which says so (`omniforcing_jax.io.outputs`).
    """
    partial = partial_path(output)
    if output.exists() and not output.is_dir():
        problems = [f"{output}: is a file; choose another --output"]
    else:
        problems = outputs.problems(output, program, overwrite=overwrite, inputs=inputs)
    if partial.exists() and not overwrite:
        problems.append(
            f"{partial}: left by an interrupted conversion, or another one is running; "
            "delete it or pass --overwrite"
        )
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"{parent}: cannot be written to; choose another --output")
        return problems
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SPARE_BYTES:
        problems.append(
            f"{parent}: {free / 1e9:.1f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB needed; "
            "free some space, choose another --output, or convert fewer --components"
        )
    return problems


def file_problems(
    output: pathlib.Path,
    overwrite: bool,
    num_bytes: int,
    program: str,
    inputs: Iterable[str | os.PathLike | None] = (),
) -> list[str]:
    """As `folder_problems`, for a safetensors file."""
    if output.is_dir():
        problems = [f"{output}: is a folder, --output is a .safetensors file"]
    else:
        problems = outputs.problems(output, program, overwrite=overwrite, inputs=inputs)
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        return [*problems, f"{output.parent}: not a folder that can be written to"]
    needed = num_bytes + SPARE_BYTES
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        problems.append(f"{output.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")
    return problems


def existing_parent(output: pathlib.Path) -> pathlib.Path:
    """The folder that holds `output`, or the nearest above it that is there."""
    folder = output.parent
    return next(path for path in (folder, *folder.parents) if path.exists())


def partial_path(output: pathlib.Path) -> pathlib.Path:
    """Where a conversion to `output` is built: same file system, so that it can be renamed."""
    return output.parent / f".{output.name}.partial"


def _old_path(output: pathlib.Path) -> pathlib.Path:
    """Where an earlier output is for the moment in which the new one takes its name."""
    return output.parent / f".{output.name}.old"


@contextlib.contextmanager
def appearing(
    output: pathlib.Path,
    *,
    owner: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
    num_bytes: int | None = None,
) -> Iterator[pathlib.Path]:
    """Yields a new folder, renamed to `output` when the block ends without an exception.

    On an exception, Ctrl-C or SIGTERM, it is removed; an older `output` stays as it was until the
    new one is complete and on disk.

    Args:
      output: folder to create.
      owner: whether this process creates, renames and removes.
      barrier: waits for all processes at the point of a name.
      num_bytes: what will be written, if that is known.

    Raises:
      DiskFullError: there was no room.
    """
    partial, old = partial_path(output), _old_path(output)
    with explaining_a_full_disk(output, partial, num_bytes):
        try:
            if owner:
                if old.exists() and not output.exists():  # killed between two renames
                    old.rename(output)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier("created")
            yield partial
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
    old = _old_path(output)
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


@contextlib.contextmanager
def explaining_a_full_disk(
    output: pathlib.Path, partial: pathlib.Path, num_bytes: int | None = None
) -> Iterator[None]:
    """Raises `DiskFullError` for any error of a full disk; what removes `partial` goes inside."""
    try:
        yield
    except Exception as error:
        number = programs.full_disk_number(error)
        if number is None:
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


def write_file(
    output: pathlib.Path,
    table: Table,
    metadata: Mapping[str, str],
    make: Callable[[str], np.ndarray],
    *,
    show_progress: bool = False,
) -> None:
    """Writes a safetensors file; one that is there is replaced when the new one is complete.

    Args:
      output: file to create, `.safetensors`, an absolute path.
      table, metadata, make: see `safetensors_io.write_safetensors`.
      show_progress: draw a progress bar.

    Raises:
      DiskFullError: there was no room.
    """
    partial, num_bytes = partial_path(output), table_bytes(table)
    with explaining_a_full_disk(output, partial, num_bytes):
        try:
            with progress_bar(show_progress, "exporting", num_bytes) as advance:
                write_safetensors(partial, table, metadata, make, advance)
            partial.rename(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


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
