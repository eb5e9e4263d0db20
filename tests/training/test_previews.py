"""Sample clips during training: what they hold, and what may fail without ending the run."""

import types

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from configs import stage1
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.streaming import media
from omniforcing_jax.training import assembly, previews
from omniforcing_jax.training.config import experiment


class TextFeatures:
    """Two prompts for the tiny LTX-2.0, and the negative one."""

    manifest = types.SimpleNamespace(
        model_version="2.0.0", video_dim=32, audio_dim=32, text_length=128, shared_features=True
    )

    def __len__(self):
        return 2

    def __getitem__(self, index):
        features = np.random.default_rng(index).standard_normal((128, 32))
        features = features.astype(ml_dtypes.bfloat16)
        mask = np.arange(128) >= 100
        return {"prompt": "", "video_features": features, "audio_features": features, "mask": mask}

    @property
    def negative(self):
        return self[2]


@pytest.fixture(scope="module")
def run(random_checkpoint, tmp_path_factory):
    """(state, hook, folder) of a tiny stage I that samples one clip of a second."""
    folder = tmp_path_factory.mktemp("run")
    c = stage1.get_config("tiny")
    c.checkpoint = str(random_checkpoint("2.0"))
    c.clip.update({"height": 64, "width": 64, "blocks": 2})
    c.student.timesteps = (1000.0, 725.0)
    c.sample_every, c.sample_clips = 100, 1
    e = experiment.check(c, 1, TextFeatures())
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage, state, frozen = assembly.assemble(e, mesh, fresh=True)
        (hook,) = previews.training_hooks(e, stage, frozen, epath.Path(folder))
        yield state, hook.call, folder / "samples"


def test_the_same_clip_with_its_measures_every_time(run):
    state, hook, folder = run
    scalars = hook(100, state)
    assert set(scalars) == {
        "sample/video_mean",
        "sample/video_std",
        "sample/audio_mean",
        "sample/audio_std",
    }
    assert 0 < scalars["sample/video_std"] < 10 and np.isfinite([*scalars.values()]).all()
    assert hook(200, state) == scalars
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{step}_0.{kind}" for step in ("000100", "000200") for kind in ("mp4", "png")}
    frames, rate, waveform, _ = media.read_clip(folder / "000100_0.mp4")
    assert frames.shape == (25, 64, 64, 3) and rate == 24 and len(waveform)
    assert (folder / "000100_0.mp4").read_bytes() == (folder / "000200_0.mp4").read_bytes()
    changed = state.replace(
        generator=state.generator.replace(ema=jax.tree.map(lambda p: 0.5 * p, state.generator.ema))
    )
    assert hook(300, changed) != scalars, "the average of the weights is what is sampled"


def test_a_clip_that_cannot_be_written_does_not_end_the_run(run, tmp_path, monkeypatch):
    state, hook, _ = run
    (tmp_path / "samples").write_text("in the folder's place")
    monkeypatch.setattr(hook, "folder", epath.Path(tmp_path / "samples"))
    with pytest.warns(UserWarning, match="no sample clips of step 100") as caught:
        scalars = hook(100, state)
    assert "sample/video_mean" in scalars
    (text,) = (said for w in caught if "no sample clips" in (said := str(w.message)))
    assert "FileExistsError" in text and "in _write" in text, "what happened, and where"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(run, monkeypatch, error):
    def interrupted(*args):
        raise error

    state, hook, _ = run
    monkeypatch.setattr(previews, "write_clip", interrupted)
    with pytest.raises(error):
        hook(100, state)
