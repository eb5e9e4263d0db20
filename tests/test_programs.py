"""How programs end, and that all of them end so."""

import argparse
import ast
import errno
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from omniforcing_jax import programs
from omniforcing_jax.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = (
    "omniforcing_jax",
    "checkpoint_converters",
    "launch",
    "benchmarks",
    "pocket",
    "examples",
)


def program_files() -> list[pathlib.Path]:
    """All modules that can be started."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return [file for file in files if 'if __name__ == "__main__"' in file.read_text()]


@pytest.mark.parametrize("file", program_files(), ids=lambda file: file.stem)
def test_every_program_has_the_entry(file):
    """`main` is wrapped, here or where the stages share it, and its result is the exit status."""
    last = ast.unparse(ast.parse(file.read_text()).body[-1])
    assert ".exit(main())" in last or "multihost.end(" in last
    if "training.main" in last:
        file = ROOT / "launch" / "training.py"
    functions = [x for x in ast.parse(file.read_text()).body if isinstance(x, ast.FunctionDef)]
    (main,) = (x for x in functions if x.name == "main")
    assert [ast.unparse(x) for x in main.decorator_list] == ["programs.entry"]
    assert ast.unparse(main.returns) == "int"


def ended(capsys, error: BaseException) -> tuple[int, str]:
    """(exit status, standard error) of a program in which this is raised."""

    @programs.entry
    def main() -> int:
        raise error

    status = main()
    return status, capsys.readouterr().err


class Known(RuntimeError):
    exit_status = 7


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("--x must be 3"), 2, "error: --x must be 3\n"),
        (FloatingPointError("not finite"), 1, "error: not finite\n"),
        (Known("lost"), 7, "error: lost\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: a: No such file\n"),
        (OSError(errno.ENAMETOOLONG, "Too long", "b" * 300), 2, None),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "error: a: Input/output error\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (programs.Terminated(), 143, "stopped by SIGTERM\n"),
        (BrokenPipeError(), 141, ""),
        (RuntimeError(f"x.riegeli: {os.strerror(errno.ENOSPC)}"), 1, None),
        (MemoryError(), 1, "error: not enough memory: no more is given\n"),
    ],
)
def test_one_line(capsys, error, status, text):
    found = ended(capsys, error)
    assert found[0] == status
    assert found[1].count("\n") == (text != "") and len(found[1]) < 250
    assert text is None or found[1] == text


def test_full_disk_says_so(capsys):
    status, text = ended(capsys, RuntimeError(f"riegeli: {os.strerror(errno.ENOSPC)} at 12"))
    assert (status, text) == (
        1, "error: No space left on device; make room, or write to another place\n"
    )  # fmt: skip


def test_the_unexpected_has_its_traceback_in_a_file(capsys, tmp_path, monkeypatch):
    """Also a ValueError that a library raised, since nobody wrote it for the user to read."""
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))

    @programs.entry
    def main(call) -> int:
        return call()

    for call, kind in ((lambda: np.zeros((2, 3)).reshape(4), "ValueError"),
                       (lambda: {}["missing"], "KeyError"),
                       (lambda: json.loads("{"), "JSONDecodeError")):  # fmt: skip
        assert main(call) == 1
        text = capsys.readouterr().err
        (file,) = tmp_path.iterdir()
        assert text.startswith(f"error: {kind}: ") and text.count("\n") == 1
        assert str(file) in text and file.name.startswith("tests.test_programs-")
        assert "in main\n" in file.read_text() and kind in file.read_text()
        file.unlink()


def test_what_an_interruption_leaves_is_said(capsys):
    for interrupt, how in ((KeyboardInterrupt, "interrupted"),
                           (programs.Terminated, "stopped by SIGTERM")):  # fmt: skip
        with pytest.raises(interrupt) as caught, programs.when_interrupted("nothing was written"):
            raise interrupt
        assert ended(capsys, caught.value)[1] == f"{how}; nothing was written\n"


def test_failures_at_work(capsys):
    @programs.entry
    def main() -> int:
        with programs.at_work():
            raise ValueError("the data changed")

    assert main() == 1
    assert capsys.readouterr().err == "error: the data changed\n"


PROGRAM = textwrap.dedent(
    """
    import signal, sys, time
    from omniforcing_jax import programs

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let `command &` ignore it

    @programs.entry
    def main():
        if sys.argv[1] == "print":
            for number in range(100_000):
                print(number)
        with programs.when_interrupted("nothing was written"):
            print("ready", flush=True)
            if sys.argv[1] == "wait":
                time.sleep(600)

    sys.exit(main())
    """
)


def start(what: str, stdout=subprocess.PIPE) -> subprocess.Popen:
    """A process of `PROGRAM`."""
    command = [sys.executable, "-c", PROGRAM, what]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
def test_signals(number, status, how):
    process = start("wait")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, text = process.communicate(timeout=240)
    assert (process.returncode, text) == (status, f"{how}; nothing was written\n")


def test_a_reader_that_leaves():
    process = start("print")
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert (process.wait(240), process.stderr.read()) == (141, "")


def test_nothing_is_left_to_be_flushed_into_a_closed_pipe(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)

    @programs.entry
    def main() -> int:
        sys.stdout.write("the end of a clip")
        return 0

    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main() == 0
        stdout.flush()  # as Python does when it exits, which would raise
        assert os.path.samestat(os.fstat(stdout.fileno()), os.stat(os.devnull))


def test_standard_output_without_room():
    with open("/dev/full", "w") as full:
        process = start("print", full)
        _, text = process.communicate(timeout=240)
    assert process.returncode == 1
    assert text == "error: No space left on device; make room, or write to another place\n"


def parsed(kind, text: str):
    parser = programs.Parser("tests.program", "Does nothing.")
    parser.add_argument("--x", type=kind)
    return parser.parse_args([f"--x={text}"]).x


@pytest.mark.parametrize("text", ["inf", "nan", "-inf", "1e400", "1e16", "", "x", "0x10", "1_0_"])
def test_numbers_are_finite(text, capsys):
    for kind in (float, int):
        with pytest.raises(SystemExit) as caught:
            parsed(kind, text)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_bounds(capsys):
    assert parsed(int, "-12") == -12 and parsed(float, "2.5") == 2.5
    assert parsed(programs.number(int, COUNT), "1") == 1
    for kind, text, said in (
        (int, str(2**70), "'1180591620717411303424' is no whole number"),
        (int, str(2**31), "at least -2147483648, not 2147483648"),
        (programs.number(int, Range(1, 8)), "9", "must be at least 1 and at most 8, not 9"),
        (programs.number(float, POSITIVE), "0", "must be more than 0, not 0.0"),
        (programs.number(float, NOT_NEGATIVE), "-1", "must be at least 0, not -1.0"),
    ):
        with pytest.raises(SystemExit):
            parsed(kind, text)
        assert said in capsys.readouterr().err


def test_programs_describe_themselves(capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("launch.plot_scaling").main(["--help"])
    assert caught.value.code == 0
    assert "python -m launch.plot_scaling" in capsys.readouterr().out
    assert issubclass(programs.Parser, argparse.ArgumentParser)
