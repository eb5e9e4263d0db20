"""Paths on local disks and on object storage (gs://, s3://), as Orbax takes them.

Local paths need nothing. gs:// needs gcsfs, s3:// needs s3fs (the extra `storage`); arrays travel
by TensorStore, which speaks both itself. Training data (ArrayRecord) must be on a local or mounted
file system, as its reader opens plain files.
"""

import os

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on object storage: no appending, and folders exist only by their files."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike) -> epath.Path:
    """The path, made absolute if it is local."""
    if is_remote(path):
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.fspath(path)))
