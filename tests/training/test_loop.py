"""The loop: records, stopping, resuming, diverging."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.training.loop import Hook, LoopConfig, TrainingDiverged
from omniforcing_jax.training.metrics import read_records
from omniforcing_jax.training.objectives.common import on_devices
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints
from tests.training.toy_stage import RUN_CONFIG, ToyBatches, ToyStage, train_toy


@pytest.fixture(scope="module")
def stage():
    """One stage for all runs: its step is compiled once."""
    return ToyStage()


@pytest.fixture(scope="module")
def reference(stage, tmp_path_factory):
    """(folder, outcome) of a run of 20 steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, train_toy(folder, stage=stage)


def curve(folder: pathlib.Path) -> list[dict]:
    """Records without what depends on the machine."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}
        for record in read_records(folder / "metrics.jsonl")
    ]


def assert_same_run(folder, outcome, reference, rounding: float = 0.0):
    """`rounding`: relative; 0 asks for the same bits."""

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding)

    jax.tree.map(same, outcome.state, reference[1].state)
    for found, expected in zip(curve(folder), curve(reference[0]), strict=True):
        assert found.keys() == expected.keys()
        same([found[k] for k in sorted(found)], [expected[k] for k in sorted(expected)])


def test_records(reference):
    folder, outcome = reference
    assert (outcome.step, outcome.reason) == (20, "finished")
    assert int(outcome.state.step) == 20
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20]
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert {"band/high", "grad_norm", "grad_norm/audio", "relative_update"} <= set(records[0])
    for record in records:
        assert all(np.isfinite(value) for value in record.values())
        assert record["speed/tokens_per_second"] == pytest.approx(
            80 * record["speed/steps_per_second"]
        )
        shares = [record[f"speed/{name}_share"] for name in ("data", "host", "other")]
        assert all(0 <= share <= 1 for share in shares) and shares[0] <= shares[1]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["15", "20"]
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == 0


def test_records_are_means_over_the_steps(stage, tmp_path, reference):
    train_toy(tmp_path, 4, stage, log_every=1)
    steps = curve(tmp_path)
    first = curve(reference[0])[0]
    np.testing.assert_allclose(first["loss"], np.mean([r["loss"] for r in steps]), rtol=1e-12)
    bands = [r["band/high"] for r in steps if "band/high" in r]
    assert 0 < len(bands) < 4, "some batches must have an empty band"
    np.testing.assert_allclose(first["band/high"], np.mean(bands), rtol=1e-12)


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(
    stage, tmp_path, reference, capfd
):
    def terminate(step, state):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train_toy(tmp_path, stage=stage, hooks=[Hook(7, terminate)])
    assert (outcome.step, outcome.reason) == (7, "stopped by SIGTERM")
    assert "stopped by SIGTERM after 7 steps; state in" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "7"]
    outcome = train_toy(tmp_path, stage=stage)
    assert "resumed from step 7" in capfd.readouterr().err
    assert_same_run(tmp_path, outcome, reference)


def test_killed_in_a_step_and_in_a_save(stage, tmp_path, reference):
    """kill -9 after the record of step 12 was written, then amid the checkpoint of step 15."""
    for where, at in (("step", 14), ("save", 15)):
        command = [sys.executable, "-m", "tests.training.toy_stage", tmp_path, "20", where, str(at)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
        if where == "step":
            assert [r["step"] for r in curve(tmp_path)] == [4, 8, 12]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[:2] == ["10", "15.orbax-checkpoint-tmp"], "the kill came too early or too late"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # a line cut off
    outcome = train_toy(tmp_path, stage=stage)
    # Parts of this run were compiled in other processes, and XLA's CPU compiler does not always
    # make the same code of the same program. Within one program the bits agree: see above.
    assert_same_run(tmp_path, outcome, reference, rounding=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_stopped_at_random(tmp_path, seed):
    """SIGKILL and SIGTERM at random moments, mostly amid saves: no bit and no step is lost."""
    steps, rng, kills = 300, random.Random(seed), 0
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),  # all run the same program
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(folder):
        program = [sys.executable, "-m", "tests.training.toy_stage"]
        command = [*program, folder, str(steps), "step", "-1"]
        return subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.DEVNULL)

    def last() -> int:
        names = (path.name for path in (run / "checkpoints").glob("*"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    assert start(tmp_path / "undisturbed").wait() == 0
    run = tmp_path / "run"
    while last() < steps:  # one that is stopped by SIGTERM ends with status 0, too
        before = last()
        process = start(run)
        while process.poll() is None and last() <= before:
            time.sleep(0.01)  # imports
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM)))
            kills += 1
        process.wait()
        assert last() > before, "no progress, or a step was lost"
    assert kills >= 1
    assert not (run / "damaged_checkpoints").exists()
    assert curve(run) == curve(tmp_path / "undisturbed")
    states = []
    for folder in (run, tmp_path / "undisturbed"):
        with TrainingCheckpoints(folder) as saved:
            restored = saved.restore(ToyStage().init_state(), ToyBatches(), RUN_CONFIG)
        assert restored.step == steps
        states.append(restored.state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_divergence_names_step_loss_and_gradient(stage, tmp_path):
    with pytest.raises(TrainingDiverged) as error:
        train_toy(tmp_path, stage=stage, batches=ToyBatches(nan_at=12))
    assert (error.value.step, error.value.name) == (13, "loss")
    text = str(error.value)
    assert "step 13: loss is nan" in text and "all parameter groups" in text
    assert "One step earlier: loss was" in text and "The largest gradient was in" in text
    assert f"last good checkpoint: step 10 in {tmp_path}" in text
    outcome = train_toy(tmp_path, 12, stage=stage)
    assert (outcome.step, outcome.reason) == (12, "finished")


def test_divergence_names_the_parameter_group(stage, tmp_path):
    class OneBadGroup:
        def train_step(self, state, frozen, batch, step):
            state, scalars = stage.train_step(state, frozen, batch, step)
            scalars = {f"generator/{name}": value for name, value in scalars.items()}
            if step == 2:
                infinite, nothing = jax.device_put((np.float32(np.inf), np.float32(np.nan)))
                scalars["generator/grad_norm"] = infinite
                scalars["generator/grad_norm/v2a_attn"] = infinite
                scalars["generator/band/high"] = nothing
            return state, scalars

    with pytest.raises(TrainingDiverged) as error:
        train_toy(tmp_path, stage=OneBadGroup(), state=stage.init_state())
    text = str(error.value)
    assert (
        "step 3: generator/grad_norm is inf (also not finite: generator/grad_norm/v2a_attn)" in text
    )
    assert "Gradients of the generator that are not finite: v2a_attn." in text
    assert "last good checkpoint: none yet" in text


def test_recompiling_warns_and_not_recompiling_does_not(stage, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_toy(tmp_path / "steady", 4, stage, compile_steps=1)

    class Growing(ToyBatches):
        def __next__(self):
            self.batch = 8 if self.index < 2 else 12
            return super().__next__()

    with pytest.warns(UserWarning, match="step 3 compiled 1 programs anew"):
        train_toy(tmp_path / "growing", 4, stage, batches=Growing(), compile_steps=1)


def test_hooks_and_the_end_of_the_data(stage, tmp_path):
    class Three(ToyBatches):
        def __next__(self):
            if self.index == 3:
                raise StopIteration
            return super().__next__()

    seen = []

    def hook(step, state):
        seen.append((step, int(state.step)))
        return {"sample/mean": 0.5}

    outcome = train_toy(tmp_path, stage=stage, batches=Three(), hooks=[Hook(2, hook)])
    assert (outcome.step, outcome.reason) == (3, "out of data")
    assert seen == [(2, 2)]
    assert curve(tmp_path) == [{"step": 2, "sample/mean": 0.5}]


@pytest.mark.parametrize("at", [5, 7])
def test_a_hook_that_fails_loses_nothing_and_is_not_met_again(stage, tmp_path, reference, at):
    """After a regular checkpoint, and after the last step."""

    def fail(step, state):
        raise RuntimeError(f"no picture of step {step}")

    with pytest.raises(RuntimeError, match=f"no picture of step {at}"):
        train_toy(tmp_path, 7, stage, hooks=[Hook(at, fail)])
    assert str(at) in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    outcome = train_toy(tmp_path, stage=stage, hooks=[Hook(at, lambda step, state: None)])
    assert_same_run(tmp_path, outcome, reference)


def test_a_stage_whose_counter_is_wrong_is_not_saved(stage, tmp_path):
    class Forgetful:
        def train_step(self, state, frozen, batch, step):
            state, scalars = stage.train_step(state, frozen, batch, step)
            return state.replace(step=state.step - jax.device_put(np.int32(1))), scalars

    with pytest.raises(ValueError, match="state says step 0 after 5 steps"):
        train_toy(tmp_path, stage=Forgetful(), state=stage.init_state())


def test_a_step_that_moves_arrays_without_saying_so_is_an_error(stage, tmp_path):
    class Careless:
        def train_step(self, state, frozen, batch, step):
            return stage.jitted(state, frozen, batch)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_toy(tmp_path, stage=Careless(), state=stage.init_state())


def test_numbers_are_moved_by_name():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.transfer_guard("disallow"):
        moved = [
            on_devices(np.uint32(2**32 - 1), place)
            for place in (None, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        ]
    assert [(x.dtype, int(x)) for x in moved] == [(np.uint32, 2**32 - 1)] * 2


def test_loop_config_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"num_steps must be at least 1.*keep_every must be"):
        LoopConfig(num_steps=0, checkpoint_every=10, keep_every=15)
