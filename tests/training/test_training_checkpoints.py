"""Checkpoints: which are kept, what is refused, other meshes, weights for another stage."""

import errno
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checkpoints, checksums, damage
from omniforcing_jax.io.checksums import DamagedFile
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.training.training_checkpoints import (
    TrainingCheckpoints,
    latest_step,
    load_generator,
    verify_generator,
)
from tests.training.toy_stage import RUN_CONFIG, ToyBatches, ToyStage, toy_params, train_toy


@pytest.fixture(scope="module")
def stage():
    return ToyStage()


@pytest.fixture(scope="module")
def finished(stage, tmp_path_factory):
    """(folder, outcome) of a run of 15 steps with checkpoints 10 and 15."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train_toy(folder, 15, stage)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run's folder."""
    return shutil.copytree(finished[0], tmp_path / "run")


def restore(folder, template, config=RUN_CONFIG, **settings):
    with TrainingCheckpoints(folder) as saved:
        return saved.restore(template, ToyBatches(), config, **settings)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_last_and_every_mth_are_kept(stage, tmp_path):
    train_toy(tmp_path, 35, stage, keep_every=10, keep_last=2)
    with TrainingCheckpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [10, 20, 30, 35]
    assert latest_step(tmp_path) == 35
    assert latest_step(tmp_path / "elsewhere") is None


def test_restores_everything_and_frees_the_template(stage, finished, run):
    template = stage.init_state()
    with TrainingCheckpoints(run) as saved:
        batches = ToyBatches()
        restored = saved.restore(template, batches, RUN_CONFIG)
    assert restored.step == 15 and batches.index == 15
    assert set(restored.averages) >= {"loss", "grad_norm"}  # steps 13 to 15
    assert_trees_equal(restored.state, finished[1].state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(template))
    assert jax.tree.structure(restored.state) == jax.tree.structure(finished[1].state)
    assert_trees_equal(restore(run, abstract(finished[1].state)).state, finished[1].state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_skipped(stage, tmp_path, run):
    """A run goes on from the one before, and is the run it would have been."""
    data = run / "checkpoints" / "15" / "state" / "d"
    for file in data.iterdir():
        os.truncate(file, file.stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"step 15 is damaged and was moved.*going on from"):
        outcome = train_toy(run, 20, stage)
    assert (run / "damaged_checkpoints" / "15" / "state").is_dir()
    assert_trees_equal(outcome.state, train_toy(tmp_path / "other", 20, stage).state)

    for step in ("15", "20"):
        (run / "checkpoints" / step / "state" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: 20: .*15: "):
        restore(run, stage.init_state())
    assert latest_step(run) == 20, "nothing is moved when nothing can be read"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("file", [
    "state/ocdbt.process_0/d/*", "state/d/*", "state/manifest.ocdbt", "state/_METADATA",
    "data/iterator.json", "run/metadata",
])  # fmt: skip
def test_a_flipped_bit_is_named_and_not_used(stage, run, file):
    found = max((run / "checkpoints" / "15").glob(file), key=lambda path: path.stat().st_size)
    flip(found)
    with pytest.warns(UserWarning, match=rf"step 15 is damaged.*{found.name} is damaged \(another"):
        restored = restore(run, stage.init_state())
    assert restored.step == 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("sums", [True, False], ids=["", "of an earlier version"])
@pytest.mark.parametrize("harm", [lambda f: os.truncate(f, 100), lambda f: f.unlink()])
def test_a_weight_file_that_is_cut_or_gone(stage, run, sums, harm):
    """Orbax raises a bare Exception, and a traceback for every array."""
    step = run / "checkpoints" / "15"
    for file in [*step.glob("state/ocdbt.process_*/d/*"), *step.glob("state/d/*")]:
        harm(file)
    if not sums:
        for file in step.rglob("SHA256SUMS"):
            file.unlink()
    with pytest.warns(UserWarning, match="step 15 is damaged and was moved"):
        assert restore(run, stage.init_state()).step == 10


def test_without_verifying_a_flipped_bit_passes(stage, finished, run):
    for file in (run / "checkpoints" / "15" / "state").glob("SHA256SUMS"):
        flip(file)
    restored = restore(run, stage.init_state(), verify=False)
    assert_trees_equal(restored.state, finished[1].state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_the_system_cannot_read_is_not_damaged(stage, run, verify):
    """Whether Python or TensorStore says so; here there are links that lead to themselves."""
    step = run / "checkpoints" / "15"
    for file in [*step.glob("state/ocdbt.process_*/d/*"), *step.glob("state/d/*")]:
        file.unlink()
        file.symlink_to(file)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)) as caught:
        restore(run, stage.init_state(), verify=verify)
    assert caught.value.errno == errno.ELOOP
    assert step.is_dir() and latest_step(run) == 15


def test_a_read_that_fails_once_is_tried_again(stage, run, monkeypatch):
    errors, hash_file = [OSError(errno.EIO, "Input/output error")], checksums._hash_file

    def fails_once(file):
        if errors:
            raise errors.pop()
        return hash_file(file)

    monkeypatch.setattr(checksums, "_hash_file", fails_once)
    with warnings.catch_warnings(action="error"):
        assert restore(run, stage.init_state()).step == 15
    assert not errors


def test_the_others_learn_that_a_process_could_not_read(monkeypatch):
    told = []
    monkeypatch.setattr(multihost, "all_true", lambda value: told.append(value) or value)
    with pytest.raises(OSError, match="unreachable"):
        damage.attempt(lambda: (_ for _ in ()).throw(OSError(errno.ESTALE, "unreachable")))
    assert told == [False]
    monkeypatch.setattr(multihost, "all_true", lambda value: False)
    with pytest.raises(OSError, match="another process could not read"):
        damage.attempt(lambda: 1)


def test_load_generator_names_a_damaged_file(run, finished):
    files = [f for f in (run / "checkpoints" / "15" / "state").rglob("d/*") if f.is_file()]
    flip(max(files, key=lambda f: f.stat().st_size))
    with pytest.raises(DamagedFile, match=r"is damaged \(another checksum\)"):
        load_generator(run, abstract(finished[1].state.generator.params))
    with pytest.raises(DamagedFile, match=r"the checkpoint of step 15 in .* is damaged: "):
        verify_generator(run)


def test_another_configuration_is_refused(stage, run):
    changed = {"optimizer": {"learning_rate": 2e-2, "betas": [0.9, 0.999]}, "data": "clips"}
    with pytest.raises(ValueError) as error:
        restore(run, stage.init_state(), changed | {"num_steps": 99})
    text = str(error.value)
    assert "optimizer.learning_rate: 0.01 then, 0.02 now" in text
    assert "data: 'absent' then, 'clips' now" in text and "seed: 0 then, 'absent' now" in text
    assert "betas" not in text and "num_steps" not in text
    assert restore(run, stage.init_state(), changed, allow_config_change=True).step == 15


def test_another_model_or_optimizer_is_refused(stage, run):
    params = toy_params()
    params["audio_sinks"] = jnp.zeros((3, 6))
    params["video_in"] = {"kernel": params.pop("video_out")["kernel"]}
    with pytest.raises(ValueError) as error:
        restore(run, stage.init_state(params))
    text = str(error.value)
    assert "generator/params/video_in/kernel is missing" in text
    assert "generator/ema/video_out/kernel is not in the model" in text
    assert "generator/params/audio_sinks is (2, 6), must be (3, 6)" in text


def test_iterator_states_that_are_bytes(stage, tmp_path):
    class Bytes(ToyBatches):
        def get_state(self):
            return str(self.index).encode() + b"\xff"

        def set_state(self, state):
            self.index = int(state.removesuffix(b"\xff"))

    train_toy(tmp_path, 5, stage, batches=Bytes())
    batches = Bytes()
    with TrainingCheckpoints(tmp_path) as saved:
        saved.restore(stage.init_state(), batches, RUN_CONFIG)
    assert batches.index == 5


def test_load_generator_from_a_run(finished, run):
    expected = abstract(finished[1].state.generator.params)
    for which in ("params", "ema"):
        loaded = load_generator(run, expected, which=which)
        assert_trees_equal(loaded, getattr(finished[1].state.generator, which))
    older = load_generator(run, expected, step=10)
    assert not np.array_equal(older["audio_sinks"], loaded["audio_sinks"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), expected)
    half = load_generator(run, half)
    assert_trees_equal(
        half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), finished[1].state.generator.params)
    )
    with pytest.raises(FileNotFoundError, match="checkpoint of step 11; there are: 10, 15"):
        load_generator(run, expected, step=11)


def test_load_generator_accounts_for_every_parameter(finished, run):
    params = finished[1].state.generator.params
    expected = abstract(params)
    expected["video_out"] = {"kernel": jax.ShapeDtypeStruct((6, 7), jnp.float32)}
    expected["blocks"]["a2v_attn"] = {"alpha": jax.ShapeDtypeStruct((2, 1), jnp.float32)}
    del expected["audio_sinks"]
    with pytest.raises(ValueError) as error:
        load_generator(run, expected)
    for part in (
        "blocks/a2v_attn/alpha is missing",
        "audio_sinks is not in the model",
        "video_out/kernel is (6, 6), must be (6, 7)",
        "if they are new, name them in allow_new",
    ):
        assert part in str(error.value)

    expected = abstract(params)
    expected["blocks"]["a2v_attn"] = {"alpha": jax.ShapeDtypeStruct((2, 1), jnp.float32)}
    init = lambda: params | {"blocks": {"a2v_attn": {"alpha": jnp.full((2, 1), 0.5)}}}  # noqa: E731
    loaded = load_generator(run, expected, allow_new=("alpha",), init=init)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    np.testing.assert_array_equal(loaded["blocks"]["a2v_attn"].pop("alpha"), [[0.5], [0.5]])
    del loaded["blocks"]["a2v_attn"]
    assert_trees_equal(loaded, params)
    with pytest.raises(ValueError, match="blocks/a2v_attn/alpha: new, so `init` must say"):
        load_generator(run, expected, allow_new=("alpha",))
    # what is there is loaded, new or not
    assert_trees_equal(load_generator(run, abstract(params), allow_new=("audio_sinks",)), params)


def test_load_generator_from_a_converted_checkpoint(random_checkpoint):
    import dataclasses

    folder = random_checkpoint("2.0")
    config = PipelineConfig.from_checkpoint(folder).transformer
    model = Transformer(dataclasses.replace(config, num_audio_sinks=4))
    init = lambda: init_params(model, jax.random.key(3))  # noqa: E731
    expected = jax.eval_shape(init)
    with pytest.raises(ValueError, match="audio_sinks is missing; if they are new, name them"):
        load_generator(folder, expected)
    params = load_generator(folder, expected, allow_new=("audio_sinks",), init=init)
    sinks = params.pop("audio_sinks")
    assert sinks.shape == (4, config.audio_dim) and 0.01 < float(sinks.std()) < 0.03
    assert_trees_equal(params, checkpoints.load_params(folder, "transformer", dtype=jnp.float32))
    with pytest.raises(ValueError, match="has no moving average"):
        load_generator(folder, expected, which="ema")
    with pytest.raises(ValueError, match="must be 'params' or 'ema'"):
        load_generator(folder, expected, which="raw")


MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.training.state import state_shardings
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints, load_generator
from tests.training.toy_stage import *

run = sys.argv[1]

def place(mesh):
    def spec(leaf):
        width = P(*(None,) * (leaf.ndim - 2), "fsdp", "tensor")
        return NamedSharding(mesh, width if leaf.shape[-2] == WIDTH else P())
    return jax.tree.map(spec, toy_params())

def stage_on(mesh):
    stage = ToyStage()
    state = stage.init_state(jax.device_put(toy_params(), place(mesh)))
    step = stage.jitted.__wrapped__
    stage.jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(state), None))
    return stage, state

states = []
for axes, steps in ((dict(data=4, fsdp=2), 5), (dict(data=2, fsdp=2, tensor=2), 8)):
    mesh = partitioning.make_mesh(**axes)
    with jax.set_mesh(mesh):
        stage, state = stage_on(mesh)
        wanted = state_shardings(state)
        if steps == 8:
            with TrainingCheckpoints(run) as saved:
                restored = saved.restore(state, ToyBatches(), RUN_CONFIG)
            assert state_shardings(restored.state) == wanted
            for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[0])):
                np.testing.assert_array_equal(np.asarray(a), b)
            shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            state = jax.tree.map(shape, restored.state)
        outcome = train_toy(run, steps, stage, state=state, checkpoint_every=4, compile_steps=1)
        assert state_shardings(outcome.state) == wanted
        assert stage.jitted._cache_size() == 1
        states.append(jax.tree.map(np.asarray, outcome.state))
        assert outcome.step == steps
        kernel = outcome.state.generator.params["blocks"]["audio_ff"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 3, 6 // axes.get("tensor", 1))

expected = jax.tree.map(
    lambda s, x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), place(mesh), toy_params())
params = load_generator(run, expected, which="ema")
for a, b, s in zip(*map(jax.tree.leaves, (params, states[1].generator.ema, place(mesh)))):
    assert a.sharding == s
    np.testing.assert_array_equal(np.asarray(a), b.astype(jnp.bfloat16))
np.savez(sys.argv[2], *jax.tree.leaves(states[1]))
print("ok")
"""


def test_restores_onto_another_mesh(stage, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning:omniforcing_jax", "-c", MESH]
    command += [str(tmp_path / "run"), str(tmp_path / "state.npz")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")
    # the same training as on one device, up to the order of sums
    outcome = train_toy(tmp_path / "one", 8, stage)
    saved = np.load(tmp_path / "state.npz")
    for name, leaf in zip(saved.files, jax.tree.leaves(outcome.state), strict=True):
        np.testing.assert_allclose(saved[name], leaf, atol=2e-5, rtol=1e-4)
