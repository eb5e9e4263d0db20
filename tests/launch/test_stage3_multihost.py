"""Stage III on 1, 2 and 4 processes: the same losses, also across a kill and a restart.

Slow: every start compiles the stage. JAX's cache of compiled programs is left alone: on CPUs only
process 0 finds its program there, the others compile anew.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from checkpoint_converters import gemma3, synthetic_gemma
from launch import encode_prompts
from omniforcing_jax.distributed import multihost
from omniforcing_jax.training.metrics import read_records
from tests.ports import reserved_port

STEPS = 8
SETTINGS = {
    "generator": "",
    "clip.blocks": 2,
    "rollout_blocks": 2,
    "batch_size": 4,
    "num_steps": STEPS,
    "checkpoint_every": 2,
    "keep_every": 2,
    "critic_updates": 2,
    "ema.start_step": 1,
    "student.timesteps": "(1000.0,725.0)",
    "tensorboard": False,
}


class Job:
    """Processes of one run of `launch.stage3`."""

    def __init__(self, world, run, count: int, **settings):
        checkpoint, data, port = world
        values = SETTINGS | {"checkpoint": checkpoint, "data": data, "sample_every": 0} | settings
        command = [sys.executable, "-m", "launch.stage3", "--config=configs/stage3.py:tiny"]
        command += [f"--workdir={run}", "--heartbeat_seconds=20", "--join_seconds=120"]
        command += [f"--config.{name}={value}" for name, value in values.items()]
        if count > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        self.processes = [
            subprocess.Popen(
                [*command, *([f"--process_id={i}"] if count > 1 else [])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                # with conftest.py's XLA_FLAGS: with XLA's default scheduler (jaxlib 0.10.2, on
                # CPUs) gloo now and then meets another collective than it expects, or hangs
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            for i in range(count)
        ]

    def wait(self) -> list[tuple[int, str]]:
        """(exit status, standard error) of each."""
        try:
            errors = [process.communicate(timeout=1200)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, e) for p, e in zip(self.processes, errors, strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_checkpoint):
    """(tiny LTX-2, encoded captions, a port for one job after the other)."""
    folder = tmp_path_factory.mktemp("world")
    synthetic_gemma.write(folder / "hf", "tiny")
    gemma3.convert(folder / "hf", folder / "gemma")
    prompts = [f"a clip of {n} small bells that ring" for n in ("one", "two", "three", "four", "5")]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    checkpoint = random_checkpoint("2.0")
    assert not encode_prompts.main(
        ["--gemma", str(folder / "gemma"), "--checkpoint", str(checkpoint),
         "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "prompts"),
         "--length", "128"]
    )  # fmt: skip
    with reserved_port() as port:
        yield checkpoint, folder / "prompts", port


def finish(world, run, count: int, **settings) -> None:
    for status, error in Job(world, run, count, **settings).wait():
        assert status == 0, error[-3000:]


def losses(run) -> list[dict]:
    """Records without what depends on the machine."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}
        for record in read_records(run / "metrics.jsonl")
        if "critic/loss" in record
    ]


def check_same(found: list[dict], expected: list[dict]) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-7)


@pytest.mark.slow
def test_a_clip_that_two_processes_share(world, tmp_path):
    """Fewer rows than processes: both read the row, and each computes half of the heads."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    few = {"batch_size": 2, "microbatches": 2, "num_steps": 2}
    finish(world, alone, 1, **few)
    finish(world, shared, 2, **few, **{"mesh.fsdp": 1, "mesh.tensor": 2})
    check_same(losses(shared), losses(alone))


@pytest.mark.slow
def test_losses_of_two_processes_of_which_one_is_killed_and_of_four_that_go_on(world, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    finish(world, one, 1)
    expected = losses(one)
    assert len(expected) == STEPS
    job = Job(world, several, 2)
    records = several / "metrics.jsonl"
    while not records.exists() or len(read_records(records)) < 5:
        assert all(process.poll() is None for process in job.processes), job.wait()
        time.sleep(0.05)
    job.processes[1].kill()  # in a rollout, or in an update
    (status, error), (killed, _) = job.wait()
    assert killed == -signal.SIGKILL
    assert status in (multihost.LOST, -signal.SIGABRT), error[-3000:]
    assert "another process has ended" in error or "another task died" in error
    on_two = losses(several)
    check_same(on_two, expected[: len(on_two)])

    finish(world, several, 4, sample_every=STEPS, sample_clips=1)
    check_same(losses(several), expected)
    there = {path.name for path in several.iterdir()}
    assert there == {"checkpoints", "config.json", "metrics.jsonl", "samples"}
    names = {path.name for path in (several / "samples").iterdir()}
    assert names == {f"{STEPS:06d}_0.mp4", f"{STEPS:06d}_0.png"}, "process 0 writes them, once"
