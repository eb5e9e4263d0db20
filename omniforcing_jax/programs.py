"""How programs take their arguments, and how they end: alike, whichever it is.

    @programs.entry
    def main(argv: list[str] | None = None) -> int: ...

Exit statuses: 0 done; 1 it failed at work; 2 the input is refused; 130 interrupted (Ctrl-C); 141
the reader of its output is gone; 143 stopped by SIGTERM; an exception may carry another
(`exit_status`). What went wrong is said in one line on standard error (a list of problems in one
line each). Only for what nobody expected there is a traceback, in a file that the line names.
"""

import argparse
import contextlib
import dis
import errno
import functools
import inspect
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from omniforcing_jax.ranges import OPTIONS, Range

FAILED, REFUSED = 1, 2
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # as a shell reports these signals

# Whose errors are meant to be read; a program's own module is called __main__.
_OWN = (
    *("omniforcing_jax", "checkpoint_converters", "configs", "launch", "benchmarks", "pocket"),
    *("__main__", "tests"),
)
_REFUSED_FILES = (
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError),
)
_REFUSED_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore, and with it Orbax, raises ValueError, shutil.copytree an error that lists others,
# ArrayRecord a RuntimeError, and what is written in Rust a plain Exception.
_NUMBER_IN_TEXT = re.compile(r"(?:os_error_code='|\[Errno |\(os error )(\d+)")
_NO_ROOM_TEXTS = tuple(os.strerror(number) for number in _NO_ROOM)


class Terminated(KeyboardInterrupt):
    """SIGTERM; what cleans up after Ctrl-C cleans up after it as well."""


# -- the end ---------------------------------------------------------------------------------------


def entry(main: Callable[..., int | None]) -> Callable[..., int]:
    """A program's `main` that ends as this module says; its result is the exit status."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            with sigterm_interrupts():
                status = main(*args, **kwargs) or 0
                _flush_stdout()
                return status
        except BrokenPipeError:
            _forget_stdout()
            return BROKEN_PIPE
        except KeyboardInterrupt as interrupt:
            stopped = isinstance(interrupt, Terminated)
            say(with_notes(interrupt) or ("stopped by SIGTERM" if stopped else "interrupted"))
            return TERMINATED if stopped else INTERRUPTED
        except Exception as error:
            status, text = explain(error)
            if status is None:
                status, text = FAILED, f"{text}; {_write_traceback(error, main)}"
            say("\n".join(_shortened(line, 2000) for line in f"error: {text}".split("\n")))
            return status

    return run


def explain(error: Exception) -> tuple[int | None, str]:
    """(exit status, what went wrong and what would be right); None for what nobody expected."""
    status, text = getattr(error, "exit_status", None), with_notes(error)
    kind = type(error)
    if number := full_disk_number(error):
        return status or FAILED, text if _is_own(kind) else _full_disk_text(error, number)
    if isinstance(error, OSError) and not _is_own(kind):
        refused = isinstance(error, _REFUSED_FILES) or error.errno in _REFUSED_NUMBERS
        return status or (REFUSED if refused else FAILED), _os_error_text(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text[:1000]:
        return status or FAILED, f"not enough memory: {_first_line(text) or 'no more is given'}"
    raised_here = isinstance(error, ValueError | ImportError | FloatingPointError)
    if _is_own(kind) or (raised_here and _raised_by_us(error)):
        refused = isinstance(error, ValueError | ImportError)
        return status or (REFUSED if refused else FAILED), text
    if kind.__module__.startswith("absl.flags"):
        return REFUSED, text
    notes = with_notes(error).removeprefix(str(error)).split("\n")
    return None, ", ".join(filter(None, [f"{kind.__name__}: {_first_line(str(error))}", *notes]))


def system_number(error: BaseException) -> int | None:
    """The system's number of an error, whichever library raised it; None if it does not say one."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _NUMBER_IN_TEXT.search(str(error))):
        number = int(match[1])
    return number


def full_disk_number(error: BaseException) -> int | None:
    """The system's number of an error of a full disk, whichever library raised it."""
    number = system_number(error)
    if number is None and isinstance(error, RuntimeError):
        found = (n for n, text in zip(_NO_ROOM, _NO_ROOM_TEXTS, strict=True) if text in str(error))
        number = next(found, None)
    return number if number in _NO_ROOM else None


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """What goes wrong inside is a failure (status 1), although the input may be at fault."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "exit_status"):
            error.exit_status = FAILED
        raise


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, raises `Terminated` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)  # None: not set from Python


@contextlib.contextmanager
def when_interrupted(text: str) -> Iterator[None]:
    """What Ctrl-C or SIGTERM inside is answered with: what is on disk now, and what to do."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            stopped = isinstance(interrupt, Terminated)
            interrupt.args = (f"{'stopped by SIGTERM' if stopped else 'interrupted'}; {text}",)
        raise


def with_notes(error: BaseException) -> str:
    """An error's message and its notes, such as where an unfinished clip lies."""
    notes = (note for note in getattr(error, "__notes__", ()) if not note.startswith("-----"))
    return "\n".join(filter(None, [str(error), *notes]))


def _terminate(signum, frame) -> NoReturn:
    raise Terminated


def _is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _OWN


def _raised_by_us(error: BaseException) -> bool:
    """Whether one of our modules raised it, rather than a library that it was passed on from."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").split(".")[0] not in _OWN:
        return False
    # by a `raise`, not by a function in C that it called, as `int` or NumPy's `reshape` are
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _os_error_text(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return with_notes(error)
    text = f"{_shortened(str(error.filename))}: {error.strerror}"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def _full_disk_text(error: BaseException, number: int) -> str:
    where = f"{error.filename}: " if getattr(error, "filename", None) else ""
    text = f"{where}{os.strerror(number)}; make room, or write to another place"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}…{text[-19:]}"


def _first_line(text: str) -> str:
    return _shortened(text.strip().partition("\n")[0], 400)


def say(text: str) -> None:
    """Prints to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _flush_stdout() -> None:
    """Flushes now what Python would flush at its end, where errors cannot be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the work is done, and nobody waits for the rest
        _forget_stdout()
    except OSError:
        _forget_stdout()
        raise


def _forget_stdout() -> None:
    """Nobody reads it: what is buffered would fail again at the end of Python, with a traceback."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_traceback(error: Exception, main: Callable) -> str:
    """Writes the traceback to a new file; says where, or shows it if that fails, too."""
    home = inspect.getmodule(main)
    spec = getattr(home, "__spec__", None)
    name = (spec.name if spec else main.__module__).removesuffix(".__main__")
    text = "".join(traceback.format_exception(error))
    options = {"prefix": f"{name}-", "suffix": ".traceback.txt", "delete": False}
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", **options) as file:
            file.write(text)
        return f"this was not expected: the traceback is in {file.name}, please report it"
    except OSError:
        return f"this was not expected, please report it:\n{text}"


# -- the arguments ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser for `python -m PROGRAM` that says what is wrong in one line.

    An option of `type=int` or `type=float` takes finite numbers in the range of its name, see
    `ranges.OPTIONS`; `number` makes the type of one that has another.
    """

    def __init__(self, program: str, doc: str):
        """`doc` is the docstring of the program's module, which --help shows."""
        shown = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m {program}", description=doc, formatter_class=shown)

    def parse_known_args(self, args=None, namespace=None):
        """See `argparse.ArgumentParser`."""
        for action in self._actions:
            if action.type in (int, float):
                action.type = number(action.type, OPTIONS.get(action.dest, _ANY))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(REFUSED, f"error: {_shortened(message, 600)} (--help lists the options)\n")


def number(kind: type, within: Range) -> Callable[[str], int | float]:
    """An option's type: an `int` or a `float` in a range."""

    def read(text: str) -> int | float:
        if kind is int and not re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is no whole number")
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is no number") from None
        if value not in within:
            raise argparse.ArgumentTypeError(f"must be {within}, not {value}")
        return value

    return read


_ANY = Range(-(2**31), 2**31 - 1)


def _quoted(text: str) -> str:
    return repr(_shortened(text, 60))
