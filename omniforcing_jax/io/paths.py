"""Paths on local disks and on object storage (gs://, s3://), as Orbax takes them.

Local paths need nothing. gs:// needs gcsfs, s3:// needs s3fs (the extra `storage`); arrays travel
by TensorStore, which speaks both itself. Training data (ArrayRecord) must be on a local or mounted
file system, as its reader opens plain files.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath

TEMPORARY = ".new"  # ends the names of files that are not complete


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on object storage: no appending, and folders exist only by their files."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike) -> epath.Path:
    """The path, made absolute if it is local."""
    if is_remote(path):
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.fspath(path)))


def user_cache(name: str) -> pathlib.Path:
    """Folder `omniforcing_jax/NAME` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "omniforcing_jax" / name


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name for a local file that appears under its own name, complete, at the end.

    If the block raises, or the process dies, an older file of that name stays what it was.
    """
    handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private, the result is for sharing
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
