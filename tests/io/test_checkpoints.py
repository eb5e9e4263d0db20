"""Saving a component: on any storage, and whenever it is interrupted."""

import os
import shutil

import numpy as np
import pytest
from etils import epath

from omniforcing_jax.io import checkpoints

CONTENT = {"family": "ltx2", "model_version": "2.0.0", "config": {}, "source": []}


class Crash(BaseException):
    """The process is gone: whatever it would clean up stays."""


@pytest.fixture
def checkpoint(tmp_path):
    """A folder whose vocoder is one zero."""
    checkpoints.save_params(tmp_path / "ltx2", "vocoder", {"a": np.zeros(1)}, CONTENT)
    return tmp_path / "ltx2"


def crashing_at(monkeypatch, step):
    """The given rename, replacement or removal does not happen, nor does any after it."""
    count = 0

    def patched(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count > step:
                raise Crash
            return function(*args, **options)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, patched(getattr(module, name)))


def test_a_crash_leaves_the_old_or_the_new_component(checkpoint, tmp_path, monkeypatch):
    before = checkpoints.load_config(checkpoint)["fingerprints"]["vocoder"]
    found = []
    for step in range(20):
        folder = shutil.copytree(checkpoint, tmp_path / str(step))
        with monkeypatch.context() as patch:
            crashing_at(patch, step)
            try:
                checkpoints.save_params(folder, "vocoder", {"a": np.ones(1)})
                complete = True
            except Crash:
                complete = False
        content = checkpoints.load_config(folder)
        assert not checkpoints.missing_components(folder, ["vocoder"])
        (value,) = checkpoints.load_params(folder, "vocoder")["a"]
        assert (value == 0) == (content["fingerprints"]["vocoder"] == before)
        found.append(float(value))
        checkpoints.save_params(folder, "vocoder", {"a": np.full(1, 2.0)})  # as if nothing was
        assert checkpoints.load_params(folder, "vocoder")["a"] == 2
        if complete:
            break
    assert complete and found == sorted(found) and {0, 1} == set(found)


def test_one_component_after_another(checkpoint):
    for value in (1, 2, 3):
        checkpoints.save_params(checkpoint, "vocoder", {"a": np.full(1, float(value))})
        assert checkpoints.load_params(checkpoint, "vocoder")["a"] == value
        assert len(list(checkpoint.iterdir())) == 2  # it, and config.json
    checkpoints.save_params(checkpoint, "audio_vae", {"b": np.zeros(1)})
    content = checkpoints.load_config(checkpoint)
    assert content["components"] == ["audio_vae", "vocoder"]
    assert content["family"] == "ltx2"


def test_object_storage(tmp_path, monkeypatch):
    """Every path is the one that `locate` gives, here a folder in place of a bucket."""
    real = checkpoints.locate

    def locate(path):
        path = os.fspath(path)
        return real(path.replace("gs://bucket", str(tmp_path / "bucket")))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "locate", locate)
    for value in (1.0, 2.0):
        checkpoints.save_params("gs://bucket/a", "vocoder", {"a": np.full(1, value)}, CONTENT)
        assert checkpoints.load_params("gs://bucket/a", "vocoder")["a"] == value
    assert [path.name for path in epath.Path(tmp_path).iterdir()] == ["bucket"]


def test_folders_of_another_kind(checkpoint, tmp_path):
    good = checkpoints.load_config(checkpoint)
    run = {"format": 1, "config": {"stage": "stage1"}}
    for content, text in (
        (run, "describes a training run, not a converted LTX-2"),
        (good | {"family": "gemma3"}, "describes a text encoder, for --text-encoder, not a"),
        ({"format": 1}, "describes something else, not a converted LTX-2"),
        ({"format": 1, "config": 7}, "describes something else, not a converted LTX-2"),
        (good | {"components": "vocoder"}, "components must be a list, not 'vocoder'"),
        (good | {"config": None, "model_version": 2.0}, "model_version must be a str, not 2.0; c"),
        (good | {"folders": []}, r"folders must be a dict, not \[\]"),
    ):
        checkpoints.write_json(checkpoint / "config.json", content)
        with pytest.raises(ValueError, match=f"^{checkpoint / 'config.json'}:? .*{text}") as error:
            checkpoints.load_params(checkpoint, "vocoder")
        assert "\n" not in str(error.value)


def test_a_changed_config_is_named(checkpoint):
    file = checkpoint / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"2.0.0"', '"2.3.0"'))
    with pytest.raises(checkpoints.DamagedFile, match=r"remove its 'checksum'"):
        checkpoints.load_config(checkpoint)
    content = checkpoints.json.loads(file.read_text())
    del content["checksum"]
    file.write_text(checkpoints.json.dumps(content))
    assert checkpoints.load_config(checkpoint)["model_version"] == "2.3.0"
