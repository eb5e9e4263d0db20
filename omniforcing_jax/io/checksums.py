"""Checksums of stored files, so that a damaged or half-copied one is named and not used.

    FOLDER/SHA256SUMS    a line for each file, which `sha256sum -c SHA256SUMS` reads, too

Who writes a folder of weights lists its files there when they are complete, and whoever reads it
compares. Several processes share the work: each hashes a part. SHA-256 as most processors have
instructions for it; files are hashed on threads. A JSON file carries the checksum of its content.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from omniforcing_jax.io.paths import locate

FILE = "SHA256SUMS"
SEAL = "checksum"  # of a JSON file's content, among its fields
_PART = ".SHA256SUMS."  # and the number of the process that has hashed it
_READ_BYTES = 1 << 20
_NUM_THREADS = min(16, os.cpu_count() or 1)
# Where there should be a file is none; other errors of the system say nothing of what is there.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MAX_LISTED = 3  # damaged files that are named


class DamagedFile(OSError):
    """A file is not what was written: its content differs, or it is missing."""


def hash_files(files: Sequence[epath.Path]) -> list[str]:
    """SHA-256 of each file, in hexadecimal digits."""
    return _each(_hash_file, files)


def _each(read: Callable[[epath.Path], Any], files: Iterable[epath.Path]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(read, files))


def _hash_file(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _hash_if_there(file: epath.Path) -> str | None:
    try:
        return _hash_file(file)
    except (*NO_FILE, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # as ValueError: no name, but of a damaged list
            return None
        raise


def write_part(folder: str | os.PathLike, part: int, count: int = 1, *, within: str = "") -> None:
    """Hashes one process's part of a folder's files; `write` puts the parts together.

    Args:
      folder: whose files are complete.
      part: number of the process.
      count: every `count`-th file, beginning with that of its number; 1: all.
      within: only the files in this sub-folder.
    """
    folder = locate(folder)
    names = [name for name in _names(folder) if name.startswith(within)][part % count :: count]
    _write_list(folder / f"{_PART}{part}", dict(zip(names, _hashes(folder, names), strict=True)))


def write(folder: str | os.PathLike) -> str:
    """Lists the checksums of all files in a folder, hashing those that are in no part.

    Returns:
      SHA-256 of the list, which tells whether a list is the one that was written.
    """
    folder = locate(folder)
    parts = [path for path in folder.iterdir() if path.name.startswith(_PART)]
    known = {name: digest for part in parts for name, digest in _read_list(part).items()}
    names = _names(folder)
    rest = [name for name in names if name not in known]
    known |= zip(rest, _hashes(folder, rest), strict=True)
    _write_list(folder / FILE, {name: known[name] for name in names})
    for part in parts:
        part.unlink()
    return _hash_file(folder / FILE)


def verify(
    folder: str | os.PathLike, *, expected: str | None = None, index: int = 0, count: int = 1
) -> None:
    """Compares a folder's files with its list; without a list there is nothing to compare.

    Args:
      folder: of an earlier `write`.
      expected: what `write` returned; None where nobody has kept it, and the list may be missing.
      index, count: every `count`-th file, beginning with the `index`-th.

    Raises:
      DamagedFile: names the files that are not as they were written, and those that are missing.
      OSError: one of them could not be read.
    """
    folder = locate(folder)
    file = folder / FILE
    try:
        listed = _read_list(file)
    except NO_FILE:
        if expected is None:
            return
        raise DamagedFile(
            f"{file} is missing: {folder} is no complete copy; copy it again"
        ) from None
    if expected is not None and _hash_file(file) != expected:
        raise DamagedFile(f"{file} is damaged, or of other weights; copy {folder} again")
    names = sorted(listed)[index::count]
    found = dict(zip(names, _each(_hash_if_there, [folder / name for name in names]), strict=True))
    missing = [name for name in names if found[name] is None]
    changed = [name for name in names if found[name] not in (None, listed[name])]
    problems = [f"{_listed(folder, missing)} missing"] * bool(missing)
    problems += [f"{_listed(folder, changed)} damaged (another checksum)"] * bool(changed)
    if problems:
        raise DamagedFile(f"{'; '.join(problems)}; copy {folder} again, or make it again")


def _listed(folder: epath.Path, names: Sequence[str]) -> str:
    shown = ", ".join(str(folder / name) for name in names[:_MAX_LISTED])
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _names(folder: epath.Path) -> list[str]:
    """Paths of all files below a folder, but for the lists themselves."""
    found = []
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif path.parent != folder or not path.name.startswith((FILE, _PART)):
                found.append(os.fspath(path)[len(os.fspath(folder)) :].lstrip("/"))
    return sorted(found)


def _hashes(folder: epath.Path, names: Iterable[str]) -> list[str]:
    return hash_files([folder / name for name in names])


def _write_list(file: epath.Path, digests: Mapping[str, str]) -> None:
    file.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def _read_list(file: epath.Path) -> dict[str, str]:
    try:
        pairs = [line.split("  ", 1) for line in file.read_text().splitlines()]
        return {name: digest for digest, name in pairs}
    except ValueError:
        raise DamagedFile(f"{file} is damaged: no list of checksums") from None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its content; `check_seal` takes it out again."""
    return {**content, SEAL: _digest(content)}


def check_seal(file: str | os.PathLike, content: dict[str, Any]) -> dict[str, Any]:
    """The object in a file without its checksum, if it has one.

    Raises:
      DamagedFile: the content is not what was sealed.
    """
    content = dict(content)
    if SEAL in content and content.pop(SEAL) != _digest(content):
        raise DamagedFile(
            f"{file} is damaged, or was changed by hand (another checksum); copy it again, or, if "
            f"you changed it, remove its {SEAL!r}"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # as it comes back from the file
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
