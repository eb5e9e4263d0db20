"""Training in several processes that are stopped, killed, hang, or run out of disk space.

Slow: each start takes ten seconds, and the kill of one must be noticed by the others.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from omniforcing_jax.distributed import multihost
from omniforcing_jax.training.metrics import read_records
from tests.ports import reserved_port
from tests.training.toy_stage import train_toy

pytestmark = pytest.mark.slow
STEPS = 20


def launch(run, count: int = 2, mishap: str = "none:0:-1", steps: int = STEPS) -> list:
    """Runs all processes to their ends: (exit status, how it ended, standard error) of each."""
    with reserved_port() as port:
        return launch_at(port, run, count, mishap, steps)


def launch_at(port: int, run, count: int, mishap: str, steps: int) -> list:
    result = f"{run}.npz"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.toy_job",
             *map(str, (i, count, port, run, result, steps, mishap))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
        )
        for i in range(count)
    ]  # fmt: skip
    what, victim, _ = mishap.split(":")
    ended = []
    for i, process in enumerate(processes):
        if what == "stop" and i == int(victim):
            process.kill()
        out, err = process.communicate(timeout=300)
        (line,) = re.findall("ended: (.*)", out) or [""]  # Gloo's threads write between and before
        ended.append((process.returncode, line, err))
    return ended


def finish(run, count: int = 2) -> None:
    """Goes on, and checks that the run is the one that it would have been."""
    for status, line, err in launch(run, count):
        assert (status, line) == (0, "finished"), err[-3000:]
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [4, 8, 12, 16, 20]


def states(*runs) -> list[list[np.ndarray]]:
    files = [np.load(f"{run}.npz") for run in runs]
    return [[file[name] for name in file.files] for file in files]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes; its state stands for all."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run)
    return run


def check_same(run, undisturbed, exactly: bool = True) -> None:
    for a, b in zip(*states(run, undisturbed), strict=True):
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4)


def test_two_processes_are_one(undisturbed, tmp_path):
    expected = jax.tree.leaves(train_toy(tmp_path / "one", STEPS).state)
    (found,) = states(undisturbed)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4)
    there = {path.name for path in undisturbed.iterdir()}
    assert there == {"checkpoints", "config.json", "metrics.jsonl"}


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(undisturbed, tmp_path):
    """On as many processes bit for bit; on others up to the order of sums."""
    run = tmp_path / "run"
    for status, line, err in launch(run, mishap="term:1:7"):
        assert (status, line) == (0, "preempted"), err[-3000:]
    copies = {count: tmp_path / f"on_{count}" for count in (1, 4)}
    for copy in copies.values():
        shutil.copytree(run, copy)
    finish(run)
    check_same(run, undisturbed)
    for count, copy in copies.items():
        finish(copy, count)
        check_same(copy, undisturbed, exactly=False)


@pytest.mark.parametrize(
    "mishap", ["kill:1:13", "kill:0:13", "kill_in_data:1:12", "kill_in_save:0:15", "stop:1:13"]
)
def test_a_process_that_is_killed_or_stopped_ends_the_others(undisturbed, tmp_path, mishap):
    run = tmp_path / "run"
    start = time.monotonic()
    ended = launch(run, mishap=mishap)
    victim = int(mishap.split(":")[1])
    assert ended[victim][0] == -signal.SIGKILL
    status, line, err = ended[1 - victim]
    # by an error where both compute, by JAX's heartbeat where the survivor waits
    assert status in (multihost.LOST, -signal.SIGABRT, multihost.HUNG), (status, line, err[-2000:])
    if status == multihost.LOST:
        assert "another process has ended" in line
    else:
        assert "another task died" in err or "hangs" in err
    assert time.monotonic() - start < 240
    there = {path.name for path in (run / "checkpoints").iterdir()}
    assert there & {"5", "10"} and "15" not in there, "the save of 10 may have been under way"
    finish(run)
    check_same(run, undisturbed)


def test_a_process_that_hangs_ends_the_job(undisturbed, tmp_path):
    run = tmp_path / "run"
    ended = launch(run, mishap="hang:1:13")
    assert ended[1][0] == multihost.HUNG, ended[1]
    assert "process 1 of 2 on" in ended[1][2] and "in step" in ended[1][2], "the stack shows where"
    assert ended[0][0] in (multihost.HUNG, multihost.LOST, -signal.SIGABRT)
    finish(run)
    check_same(run, undisturbed)


def test_a_full_disk_of_one_host(undisturbed, tmp_path):
    run = tmp_path / "run"
    ended = launch(run, mishap="full:1:12")
    assert all(status != 0 for status, _, _ in ended), ended
    assert "a checkpoint could not be written" in ended[1][1], ended[1]
    finish(run)
    check_same(run, undisturbed)


def test_a_checkpoint_that_only_one_process_cannot_read(undisturbed, tmp_path):
    """All of them agree to use the one before."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for status, line, err in (ended := launch(run, mishap="unreadable:1:20")):
        assert (status, line) == (0, "finished"), err[-3000:]
    assert "the checkpoint of step 20 is damaged and was moved to" in ended[0][2]
    assert "going on from step 15. another process could not read its part" in ended[0][2]
    assert "damaged" not in ended[1][2], "only process 0 tells"
    assert (run / "damaged_checkpoints" / "20").is_dir()
    check_same(run, undisturbed)
