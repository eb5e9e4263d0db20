"""Joining, agreeing, watching: what one process can show of several, and small groups of them."""

import io
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from omniforcing_jax.data.text_dataset import grain_batches
from omniforcing_jax.distributed import multihost
from omniforcing_jax.distributed.multihost import Job, NotJoined, Watchdog, find_job, roll_call
from omniforcing_jax.training import metrics
from omniforcing_jax.training.loop import Hook
from omniforcing_jax.training.training_checkpoints import CheckpointNotSaved, TrainingCheckpoints
from tests.training.toy_stage import ToyStage, train_toy

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_which_job_a_process_belongs_to():
    assert find_job(None, environment={}) is None
    assert find_job(False, environment=SLURM | JAX) is None
    assert find_job(True, environment={}) == Job(), "a TPU pod: JAX finds out"
    assert find_job(None, environment=SLURM) == Job()
    assert find_job(None, environment=SLURM | {"SLURM_NTASKS": "1"}) is None
    no_step = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find_job(None, environment=no_step) is None, "in the batch script, outside of srun"
    assert find_job(None, environment={"TPU_WORKER_HOSTNAMES": "w0,w1"}) == Job()
    assert find_job(None, environment={"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find_job(None, environment=JAX) == Job("a:1", 2, 1)
    partly = {"JAX_COORDINATOR_ADDRESS": "a:1"}
    assert find_job(True, environment=partly) == Job(), "JAX may find the rest"
    assert find_job(None, "b:2", 3, 0, JAX) == Job("b:2", 3, 0), "flags win"
    assert find_job(None, "b:2", environment=SLURM) == Job("b:2", 4, 3)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ((True, "a:1", None, None), {}, "--coordinator without --num_processes and --process_id"),
        ((None, None, None, None), {"JAX_PROCESS_ID": "1"}, "--process_id without --coordinator"),
        ((None, None, 2, 0), {}, "--num_processes and --process_id without --coordinator: on TPU"),
        ((None, "a:1", 2, 2), {}, "--process_id must be 0 to 1"),
        ((None, "a:1", 0, 0), {}, "--num_processes must be at least 1, not 0"),
        ((None, "a", 2, 0), {}, "--coordinator must be HOST:PORT, not 'a'"),
        ((None, "a:99999", 2, 0), {}, "--coordinator must be HOST:PORT"),
        ((False, "a:1", 2, 0), {}, "--nodistributed contradicts --coordinator"),
        ((None, None, None, None), JAX | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID must be a numb"),
    ],
)
def test_wrong_or_partial_flags(flags, environment, message):
    with pytest.raises(ValueError, match=message):
        find_job(*flags, environment=environment)


PATIENCE = 240.0  # seconds; nothing takes so long


def call_the_roll(
    port: int, jobs: list[tuple[int, int]], timeout: float = PATIENCE
) -> list[str | None]:
    """What (process_id, num_processes) are told, all at one port; None: they may go on."""
    address = f"127.0.0.1:{port}"
    told: list[str | None] = ["did not end"] * len(jobs)

    def join(i: int) -> None:
        try:
            roll_call(Job(address, jobs[i][1], jobs[i][0]), timeout)
            told[i] = None
        except NotJoined as error:
            told[i] = str(error).replace(address, "ADDRESS")

    threads = [threading.Thread(target=join, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_roll_call(free_port):
    assert call_the_roll(free_port, [(i, 4) for i in (2, 0, 3, 1)]) == [None] * 4
    assert call_the_roll(free_port, [(0, 1)]) == [None]
    (told,) = call_the_roll(free_port, [(1, 2)], timeout=0.5)
    assert "process 0 did not answer at ADDRESS within 0.5 s" in told and "refused" in told
    told = call_the_roll(free_port, [(0, 3), (1, 2)])
    assert told[0] == told[1] and "process 1 (" in told[0]
    assert "was started with --num_processes 2, process 0 with 3" in told[0]
    told = call_the_roll(free_port, [(0, 3), (1, 3), (1, 3)])
    assert len(set(told)) == 1 and "process 1 came twice, from " in told[0]


def test_who_did_not_come_is_named(free_port, monkeypatch):
    """The time is over as soon as process 2 was heard."""
    now, read = [0.0], multihost._read

    def heard(*arguments):
        said = read(*arguments)
        now[0] += PATIENCE * ("process_id" in said)
        return said

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(multihost, "time", clock)
    monkeypatch.setattr(multihost, "_read", heard)
    told = call_the_roll(free_port, [(0, 5), (2, 5)])
    missing = "processes 1, 3, 4"
    assert set(told) == {
        f"{missing} of 5 did not come to ADDRESS within 240 s: look at what {missing} printed"
    }


def test_roll_call_ignores_strangers_and_names_a_taken_port(free_port):
    job = Job(f"127.0.0.1:{free_port}", 2, 0)
    taken = pytest.raises(NotJoined, match=r"cannot listen at port \d+ .*choose another port")
    with socket.create_server(("127.0.0.1", free_port)), taken:
        roll_call(job, 1)
    errors = []

    def call():
        try:
            roll_call(job, PATIENCE)
        except NotJoined as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    for what in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b""):
        for _ in range(round(PATIENCE / 0.05)):
            try:
                stranger = socket.create_connection(("127.0.0.1", free_port))
                break
            except OSError:
                time.sleep(0.05)
        stranger.sendall(what)
        stranger.close()
    roll_call(Job(job.coordinator, 2, 1), PATIENCE)
    thread.join()
    assert not errors


AGREEING = """
import pathlib, sys, time
import jax, numpy as np
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from etils import epath
from jax.experimental import multihost_utils
from omniforcing_jax.training.batches import DeviceBatches
from omniforcing_jax.distributed import multihost, partitioning

multihost.join(multihost.find_job(None, f"127.0.0.1:{port}", 2, index), timeout=120)
assert multihost.all_true(True) and not multihost.all_true(index == 0)
assert multihost.from_main([5, 10] if index == 0 else [5]) == [5, 10]
assert multihost.from_main([] if index == 0 else [5]) == []
multihost.check_same("the config", "same")
for check in (
    lambda: multihost.check_same("the config", f"config {index}"),
    lambda: multihost.check_shared(epath.Path(folder / f"disk of {index}"), patience=1),
):
    try:
        check()
    except ValueError as error:
        print("told:", error)
multihost.check_shared(epath.Path(folder / "shared"))

class Source:  # element i holds its number
    class manifest:
        shared_features = False
    def __len__(self):
        return 21
    def __getitem__(self, i):
        return {"x": np.full((2,), i, np.float32), "prompt": str(i)}

batches = []
for axes in (dict(data=2, fsdp=2), dict(fsdp=4), dict(data=2, tensor=2), dict(tensor=4)):
    mesh = partitioning.make_mesh(**axes)
    iterator = DeviceBatches(Source(), 8, 3, mesh)
    found = []
    for _ in range(3):
        batch = next(iterator)
        assert set(batch) == {"x"} and batch["x"].shape == (8, 2)
        found.append(multihost_utils.process_allgather(batch["x"], tiled=True)[:, 0])
    batches.append(np.stack(found))
    assert iterator.get_state() == {"next_index": 3}
alone = np.asarray(next(DeviceBatches(Source(), 1, 3, mesh))["x"])  # one row, which both read
assert alone.shape == (1, 2) and len(np.unique(multihost_utils.process_allgather(alone))) == 1
for other in batches[1:]:
    np.testing.assert_array_equal(batches[0], other)
print("told:", batches[0].astype(int).tolist())
"""


def test_two_processes_agree_and_make_the_same_batches_on_any_mesh(free_port, tmp_path):
    command = [sys.executable, "-c", AGREEING]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(free_port), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        lines = re.findall("told: (.*)", out)  # Gloo's threads write between and before them
        assert lines[0].startswith("process 1 of 2: the config differs from that of process 0")
        assert "is not the same folder on all hosts" in lines[1]
        assert not list((tmp_path / "shared").iterdir()), "the check leaves nothing behind"

    class Numbers:
        def __len__(self):
            return 21

        def __getitem__(self, i):
            return {"x": np.int64(i)}

    alone = grain_batches(Numbers(), 8, seed=3)
    assert json.loads(lines[2]) == [next(alone)["x"].tolist() for _ in range(3)]


def test_watchdog_barks_when_nothing_moves():
    statuses, text = [], io.StringIO()
    text.fileno = sys.__stderr__.fileno  # where faulthandler writes the stacks
    with Watchdog(5000, name="process 1 of 2", end=statuses.append, file=text) as dog:
        dog.alive("step 12", patience=1e-5)
        dog._timer.join(timeout=PATIENCE)
    assert statuses == [multihost.HUNG]
    assert "error: process 1 of 2 on " in text.getvalue()
    assert "nothing was done for 0.05 s since step 12. It ends with status 5" in text.getvalue()
    with pytest.raises(ValueError, match=r"seconds must be 0 .off. or more, not -1"):
        Watchdog(-1)


def test_nothing_goes_by_the_clock_that_can_be_set(monkeypatch):
    """The date jumps by a year and back: the watchdog sleeps, and speeds stay what they are."""
    monkeypatch.setattr(time, "time", itertools.cycle([0.0, 3e7]).__next__)
    statuses = []
    with Watchdog(3600, end=statuses.append) as dog:
        watch = metrics.Stopwatch()
        for step in range(3):
            dog.alive(f"step {step}")
            with watch.measure("step"):
                time.sleep(0.01)
        speed = watch.read(3)["speed/steps_per_second"]
        assert dog._timer.interval == 3600 and dog._timer.is_alive()
    assert not statuses and 0.01 < speed < 300


HANGING = """
import pathlib, sys, threading, time
from omniforcing_jax.data.text_dataset import grain_batches
from omniforcing_jax.distributed.multihost import Watchdog
from tests.training.toy_stage import *
class Stage(ToyStage):
    def train_step(self, state, frozen, batch, step):
        if step == 3:
            while not pathlib.Path(sys.argv[1], "checkpoints", "2").is_dir():
                time.sleep(0.05)  # a checkpoint is written beside the steps
            dog.alive("saved", patience=0.005)
            threading.Event().wait()  # as in a collective operation that no one else enters
        return super().train_step(state, frozen, batch, step)
with Watchdog(200, name="process 0 of 1") as dog:
    stage = Stage()
    state = stage.init_state()
    train(stage, state, jnp.float32(0), ToyBatches(), LoopConfig(9, tensorboard=False,
          checkpoint_every=2, compile_steps=2), sys.argv[1], watchdog=dog)
"""


def test_a_run_that_hangs_ends_with_its_stacks(tmp_path):
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == multihost.HUNG, done.stderr[-2000:]
    assert "process 0 of 1 on" in done.stderr and "hangs: nothing was done for" in done.stderr
    assert "in train_step" in done.stderr, "the stack shows where"
    assert (tmp_path / "checkpoints" / "2").is_dir()


FULL = """
import resource, sys
from tests.training.toy_stage import *
from omniforcing_jax.training.loop import Hook
from omniforcing_jax.training.training_checkpoints import CheckpointNotSaved
stage = ToyStage()
train_toy(sys.argv[1], 5, stage, keep_last=1, log_every=100)
# files cannot grow beyond this, as on a disk without room
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    train_toy(sys.argv[1], 20, stage, keep_last=1, log_every=100)
except CheckpointNotSaved as error:
    print(error)
"""


def test_a_full_disk_is_reported_and_costs_no_checkpoint(tmp_path):
    """The save of step 10 fails; that of step 5 stays although only the last one is kept."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"a checkpoint could not be written to {tmp_path}" in done.stdout, done.stderr[-2000:]
    assert "the last one there is is of step 5" in done.stdout
    assert "File too large" in done.stdout
    stage = ToyStage()
    outcome = train_toy(tmp_path / "run", stage=stage)
    expected = train_toy(tmp_path / "other", stage=stage)
    for a, b in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["15", "20"]


def test_a_save_that_failed_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """Not at the next save, which may be hours away."""
    stage, done = ToyStage(), []
    train_toy(tmp_path, 5, stage)
    failed = threading.Event()

    class Full:
        def result(self, timeout=None):
            raise OSError(28, "No space left on device")

    async def async_save(self, directory, args=None):
        return [Full()]

    def noted(self, error):
        note(self, error)
        failed.set()

    def wait(step, state):
        done.append(step)
        assert step < 11 or failed.wait(PATIENCE)

    note = TrainingCheckpoints._note
    monkeypatch.setattr(TrainingCheckpoints, "_note", noted)

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.async_save", async_save)
    with pytest.raises(CheckpointNotSaved, match=r"No space left on device.*is of step 5; make ro"):
        train_toy(tmp_path, 100, stage, checkpoint_every=10, hooks=[Hook(1, wait)])
    assert done[-1] <= 12, "the next save is that of step 20"


def test_records_on_object_storage(tmp_path):
    """A stand-in for gs://: records are there after `flush`, and survive a restart."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(DirFileSystem):
        protocol = ("gs", "gcs")

        def __init__(self, **settings):
            del settings
            super().__init__(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path):
            if isinstance(path, str):
                path = path.removeprefix("gs://")
            return super()._join(path)

        def open(self, path, mode="rb", **settings):
            assert "a" not in mode, "object storage cannot append"
            return super().open(path, mode, **settings)

    fsspec.register_implementation("gcs", Bucket, clobber=True)
    run = "gs://bucket/run"
    writer = metrics.MetricWriter(run, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 3})
    writer.flush()
    file = tmp_path / "bucket" / "run" / metrics.JSONL
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    writer.close()
    writer = metrics.MetricWriter(run, start_step=2, tensorboard=False)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert [r["loss"] for r in metrics.read_records(f"{run}/{metrics.JSONL}")] == [1 / 3, 2 / 3, 9]
    from omniforcing_jax.training.training_checkpoints import latest_step

    assert latest_step(run) is None
    assert TrainingCheckpoints(run, read_only=True).steps() == []
