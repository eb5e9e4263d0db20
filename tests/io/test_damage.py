"""Flips, cuts and losses in every kind of file that is read: named in one line, or without effect.

A fault may be without effect: in the white space of a JSON file, in a file that nobody reads. What
must not be is another result without a word, or an error that names no file.
"""

import collections
import dataclasses
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from checkpoint_converters import synthetic
from checkpoint_converters.safetensors_io import (
    ConversionError,
    read_header,
    read_tensor,
)
from omniforcing_jax.data.text_dataset import open_text_dataset
from omniforcing_jax.io import checkpoints
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.text import encoder_files
from omniforcing_jax.text.features import load_text_features, random_text_features
from omniforcing_jax.text.prompts import PromptCache
from omniforcing_jax.training.config import parsing
from omniforcing_jax.training.config.run_config import RunConfig
from omniforcing_jax.training.config.settings import StageI
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints, load_generator
from tests.data.test_text_dataset import SHARED, write
from tests.training.toy_stage import RUN_CONFIG, ToyBatches, ToyStage, toy_params, train_toy

FAULTS = ("flip", "flip", "cut", "empty", "delete", "zeros")


class Reader(NamedTuple):
    """A folder as it was written, and what is read from it.

    Attributes:
      read: folder -> what a program gets from it, arrays and texts; raises what it would raise.
      within: sub-folder in which files are damaged.
    """

    folder: pathlib.Path
    read: Callable[[pathlib.Path], Any]
    within: str = "."


def read_run(folder):
    """(step, state) of the checkpoint that is gone on from, and the run's configuration."""
    stage, batches = ToyStage(), ToyBatches()
    with TrainingCheckpoints(folder) as saved:
        restored = saved.restore(stage.init_state(), batches, RUN_CONFIG)
    return restored.step, batches.index, restored.averages, jax.device_get(restored.state)


def read_generator(folder):
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), toy_params())
    return jax.device_get(load_generator(folder, template))


def read_entry(folder):
    entry = PromptCache(folder, "an encoder", (8, 4)).path("a calm sea")
    features = load_text_features(entry, (8, 4))
    return features.prompt, features.video_context, features.audio_context


def read_dataset(folder):
    dataset = open_text_dataset(folder)
    return dataset.manifest, dataset.negative, [dataset[i] for i in range(len(dataset))]


def read_safetensors(folder):
    tensors, metadata = read_header(folder / "tiny.safetensors")
    arrays = {name: read_tensor(info).view(np.uint8) for name, info in tensors.items()}
    return [(name, *info[1:]) for name, info in tensors.items()], metadata, arrays


@pytest.fixture(scope="module")
def readers(tmp_path_factory, random_checkpoint, random_gemma) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("damage")
    ltx2, gemma = random_checkpoint("2.0"), random_gemma
    part = folder / "connectors"
    shutil.copytree(ltx2 / "connectors", part / "connectors")
    shutil.copy(ltx2 / "config.json", part)
    content = {"family": "ltx2", "model_version": "2.0.0", "config": {}, "student": None}
    params = {"a": {"b": np.arange(600.0)}, "c": np.float32([1, 2])}
    checkpoints.save_params(folder / "saved", "vocoder", params, content | {"source": []})
    train_toy(folder / "run", 10)
    cache = PromptCache(folder / "cache", "an encoder", (8, 4))
    cache.put("a calm sea", random_text_features(jax.random.key(0), 1, 16, (8, 4)))
    (folder / "file").mkdir()
    synthetic.write(folder / "file" / "tiny.safetensors", components=("connectors",))
    settings = json.loads(json.dumps(parsing.to_dict(StageI())))
    student = dataclasses.asdict(PipelineConfig.from_checkpoint(ltx2).transformer)
    settings |= {"model_version": "2.0.0", "student_config": student}
    run = {"format": 1, "config": settings}
    (folder / "described" / "checkpoints").mkdir(parents=True)
    checkpoints.write_json(folder / "described" / "config.json", run)

    def read_gemma(path):
        files = encoder_files.check_encoder(path, ltx2, length=128)
        encoder_files.verify_tower(path)
        return files.fingerprint(np.float32, "none")

    return {
        "converted": Reader(part, lambda path: checkpoints.load_params(path, "connectors")),
        "saved": Reader(
            folder / "saved", lambda path: checkpoints.load_params(path, "vocoder")
        ),
        "gemma": Reader(gemma, read_gemma),
        "prompt": Reader(folder / "cache", read_entry),
        "dataset": Reader(write(folder / "text", SHARED), read_dataset),
        "safetensors": Reader(folder / "file", read_safetensors),
        "run": Reader(folder / "run", read_run, "checkpoints/10"),
        "generator": Reader(folder / "run", read_generator, "checkpoints/10"),
        "description": Reader(folder / "described", RunConfig.read),
    }  # fmt: skip


def damage(file: pathlib.Path, fault: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    if fault == "delete":
        file.unlink()
        return
    if fault == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif fault == "zeros":  # a page of the disk that was never written
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    else:
        del data[0 if fault == "empty" else place :]
    file.write_bytes(data)


def same(a, b) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def outcome(reader: Reader, expected: Any, copy: pathlib.Path) -> str:
    """What reading a damaged copy comes to."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = reader.read(copy)
    except (ValueError, OSError, ConversionError) as error:
        text = "\n".join(getattr(error, "problems", [str(error)]))
        assert str(copy) in text, f"names no file: {error!r}"
        assert all(len(line) < 3000 for line in text.splitlines())
        assert "\n" not in text or isinstance(error, ConversionError), text
        return "named"
    if same(result, expected):
        return "no effect"
    assert any("is damaged and was moved" in str(w.message) for w in told), "used without a word"
    return "set aside"


def in_order(file: pathlib.Path) -> tuple[str, int]:
    """The same in every run: TensorStore's names are drawn."""
    return re.sub("[0-9a-f]{32}", "", str(file)), file.stat().st_size


def try_faults(reader: Reader, tmp_path: pathlib.Path, count: int, seed: int) -> dict[str, int]:
    rng, found = random.Random(seed), collections.Counter()
    expected = reader.read(shutil.copytree(reader.folder, tmp_path / "whole"))
    for number in range(count):
        copy = shutil.copytree(reader.folder, tmp_path / str(number))
        files = sorted((copy / reader.within).rglob("*"), key=in_order)
        file = rng.choice([f for f in files if f.is_file() and f.stat().st_size])
        fault = rng.choice(FAULTS)
        damage(file, fault, rng)
        try:
            found[outcome(reader, expected, copy)] += 1
        except Exception as error:
            raise AssertionError(f"{fault} in {file}") from error
        shutil.rmtree(copy)
    return found


KINDS = ("converted", "saved", "gemma", "prompt", "dataset", "safetensors", "run", "generator",
         "description")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_named_or_without_effect(readers, tmp_path, kind):
    found = try_faults(readers[kind], tmp_path, 8, seed=1)
    assert found["named"] + found["set aside"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_faults(readers, tmp_path, kind):
    found = try_faults(readers[kind], tmp_path, 200, seed=2)
    assert found["named"] + found["set aside"] >= 100


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_chunk_that_is_cut_or_gone_without_checksums_is_one_line(
    random_checkpoint, tmp_path, how
):
    """Orbax prints a traceback for each of the other arrays, at the latest when Python ends."""
    folder = shutil.copytree(random_checkpoint("2.0"), tmp_path / "old")
    for file in folder.rglob("SHA256SUMS"):
        file.unlink()
    content = checkpoints.read_json(folder / "config.json")
    del content["checksums"]
    checkpoints.write_json(folder / "config.json", content)
    kernel = sorted((folder / "transformer").glob("*kernel"))[0]
    chunk = next(file for file in kernel.iterdir() if file.name[0].isdigit())
    chunk.write_bytes(chunk.read_bytes()[:100]) if how == "cut" else chunk.unlink()
    size = "--height 64 --width 64 --seconds 1 --bidirectional --random-features"
    command = [sys.executable, "-m", "launch.stream", "--checkpoint", folder, *size.split()]
    command += ["--output", tmp_path / "clip.mp4"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr
    (line,) = (line for line in found.stderr.splitlines() if line.startswith("error: "))
    assert f"{folder / 'transformer'} cannot be read (" in line and len(line) < 700
