"""Reading files that may be damaged: what is damage, and what only the system could not read."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from etils import epath

from omniforcing_jax import programs
from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checksums
from omniforcing_jax.io.checksums import DamagedFile

_NO_FILE_NUMBERS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # those of `checksums.NO_FILE`

T = TypeVar("T")


def attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """(what was read, "") if all processes could read theirs, or else (None, what was damaged).

    What the system could not read is tried once more, as the file may be good.

    Raises:
      OSError: on all processes, if one could not read for another reason than damage. On that one
        it may be any error.
    """
    for _ in range(2):
        result = error = None
        try:
            result = read()
        except Exception as problem:
            error = problem
        damaged = error is not None and is_damage(error)
        if damaged or not isinstance(error, OSError):
            break
    if not multihost.all_true(error is None or damaged):
        if error is None or damaged:
            raise OSError("another process could not read its part of a checkpoint: it says why")
        raise error
    if multihost.all_true(error is None):
        return result, ""
    return None, "another process could not read its part" if error is None else (
        str(error) or repr(error)
    )


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise for damaged weights, and print of it, as one error.

    Raises:
      DamagedFile: the first thing that they found.
      OSError: the system could not read a file, which may be good.
    """
    try:
        yield
    except Exception as error:
        first = _first_cause(error)
        if not is_damage(error):
            number = programs.system_number(first)
            if isinstance(error, OSError) or number is None:
                raise
            _silence_other_arrays()
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        _silence_other_arrays()
        text = " ".join(str(first).split())[:300]
        raise DamagedFile(
            f"{path} cannot be read ({text}): it is damaged or no complete copy; copy it again, or "
            "make it again"
        ) from error


def _silence_other_arrays() -> None:
    """Orbax leaves the reads of all arrays behind, each of which tells of its failure when it goes:
    in the log of asyncio, or, at the end of Python, as an exception that is ignored."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if "orbax" not in getattr(code, "co_filename", ""):
            before(unraisable)

    sys.unraisablehook = hook


def is_damage(error: Exception) -> bool:
    """Whether such an error is raised for damaged files, by us, Python, Orbax or TensorStore.

    Running out of memory is none, nor is what the system says of a file that may be good: EIO,
    EACCES, EMFILE, a storage that does not answer.
    """
    if isinstance(error, OSError):
        return isinstance(error, (DamagedFile, *checksums.NO_FILE))
    if not isinstance(error, (ValueError, KeyError)) and type(error) is not Exception:
        return False
    return programs.system_number(_first_cause(error)) in (None, *_NO_FILE_NUMBERS)


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
