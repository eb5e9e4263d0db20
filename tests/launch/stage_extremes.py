"""Extremes in the flags of the stages, in one process: a JSON list of [arguments, status, stderr].

    python -m tests.launch.stage_extremes FOLDER CASES

absl's flags belong to a process: they cannot be defined in that of other tests.
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile

from absl import flags

from launch import training

VALUES = ("inf", "nan", "1e400", str(2**70), "-1", "0", "", "x", "x" * 5000)


def ended(stage: str, arguments: list[str]) -> tuple[int, str]:
    """(status, standard error)."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = training.main(stage, arguments)
        except SystemExit as end:
            status = end.code
    flags.FLAGS.unparse_flags()
    return status, text.getvalue()


def main(folder: str, number: str) -> None:
    tempfile.tempdir = folder
    training.train = None  # nothing comes so far
    own = flags.FLAGS.flags_by_module_dict()["launch.training"]
    names = [f"--{flag.name}" for flag in own if flag.name != "config"]
    names += [f"--config.{name}" for name in ("loss.video", "batch_size", "ema", "clip", "no.such")]
    cases = itertools.product(names, VALUES)
    config = "--config=configs/stage1.py:tiny"
    wrong = [[f"--config={value}"] for value in ("", "x", "/", "configs/stage1.py:x", "README.md")]
    every = wrong + [[config, f"{name}={value}"] for name, value in cases]
    results = [(arguments, *ended("stage1", arguments)) for arguments in every[: int(number)]]
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
