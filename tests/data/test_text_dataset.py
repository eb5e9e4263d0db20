"""Stored text features: what is written is what is read, whole or not at all, in grain's order."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from omniforcing_jax.data import shards
from omniforcing_jax.data.text_dataset import (
    TEXT_FEATURES,
    TextDatasetWriter,
    TextManifest,
    grain_batches,
    open_text_dataset,
)
from omniforcing_jax.text.prompt_files import prompt_hash

LENGTH = 16
PROMPTS = ["a calm sea", "a storm 😀", "two\nlines", "fog", "rain", "snow", "night"]
SHARED = TextManifest(
    encoder="fingerprint",
    tokenizer="vocabulary",
    model_version="2.0.0",
    compute_dtype="float32",
    text_length=LENGTH,
    video_dim=6,
    audio_dim=6,
    shared_features=True,
    negative_prompt="blurry",
    prompts_sha256="hash of the prompts",
    prompts_per_shard=3,
    num_read=9,
    num_blank=1,
    num_duplicates=1,
    num_prompts=len(PROMPTS),
    num_truncated=0,
)
SEPARATE = dataclasses.replace(SHARED, shared_features=False, audio_dim=4, model_version="2.3.0")


def features(prompt, manifest):
    """Random features, as many tokens as the prompt has characters, and at most all."""
    rng = np.random.default_rng(len(prompt) * 1000 + ord(prompt[0]))
    count = min(len(prompt), LENGTH)
    video, audio = (
        rng.standard_normal((count, dim)).astype(ml_dtypes.bfloat16)
        for dim in (manifest.video_dim, manifest.audio_dim)
    )
    return video, None if manifest.shared_features else audio


def write_shard(writer, shard):
    prompts = [PROMPTS[i] for i in writer.manifest.shard_range(shard)]
    writer.write_shard(shard, prompts, [features(p, writer.manifest) for p in prompts])


def write(folder, manifest, order=(0, 1, 2)):
    writer = TextDatasetWriter(folder, manifest)
    writer.begin()
    for shard in order:
        write_shard(writer, shard)
    writer.write_negative(features(manifest.negative_prompt, manifest))
    writer.finish()
    return folder


@pytest.fixture(scope="module", params=[SHARED, SEPARATE], ids=["shared", "separate"])
def stored(request, tmp_path_factory):
    """(folder, its manifest)."""
    return write(tmp_path_factory.mktemp("stored") / "features", request.param), request.param


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_text_dataset(write(tmp_path_factory.mktemp("stored") / "features", SEPARATE))


def check_element(element, prompt, manifest):
    video, audio = features(prompt, manifest)
    assert element["prompt"] == prompt
    np.testing.assert_array_equal(element["mask"], np.arange(LENGTH) >= LENGTH - len(video))
    audio = video if audio is None else audio
    for name, x in (("video_features", video), ("audio_features", audio)):
        assert element[name].dtype == ml_dtypes.bfloat16
        assert element[name].shape == (LENGTH, x.shape[1])
        np.testing.assert_array_equal(element[name][LENGTH - len(x) :], x)
        assert not element[name][: LENGTH - len(x)].any()


def test_round_trip(stored):
    folder, manifest = stored
    dataset = open_text_dataset(folder)
    assert dataset.manifest == manifest and len(dataset) == len(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        check_element(dataset[index], prompt, manifest)
    check_element(dataset.negative, "blurry", manifest)


def test_tfds_reads_it(stored):
    folder, manifest = stored
    source = tfds.builder_from_directory(folder).as_data_source("train")
    assert [record["prompt"].decode() for record in source] == PROMPTS
    assert source[1]["prompt_hash"].decode() == prompt_hash(PROMPTS[1])
    video = source[1]["video_features"].view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(video, features(PROMPTS[1], manifest)[0])
    assert ("audio_features" in source[1]) is not manifest.shared_features


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_files_in_any_order_and_after_an_interruption(stored, tmp_path):
    folder, manifest = stored
    other = tmp_path / "features"
    writer = TextDatasetWriter(other, manifest)
    assert not writer.complete and not other.exists()
    writer.begin()
    write_shard(writer, 1)
    for name in (".text_features-train.array_record-00000-of-00003.new", ".manifest.json.new"):
        (other / name).write_bytes(b"half a file")
    writer = TextDatasetWriter(other, manifest)
    writer.begin()
    assert writer.missing() == [0, 2] and not writer.complete and not writer.has_negative
    with pytest.raises(ValueError, match=r"shards are missing: \[0, 2\]"):
        writer.finish()
    with pytest.raises(ValueError, match=r"not complete; run launch\.encode_prompts .* again"):
        open_text_dataset(other)
    for shard in (2, 0):
        write_shard(writer, shard)
    with pytest.raises(ValueError, match="negative prompt is missing"):
        writer.finish()
    writer.write_negative(features("blurry", manifest))
    writer.finish()
    assert writer.complete and not writer.missing()
    assert contents(other) == contents(folder)


def test_a_failed_shard_leaves_nothing(tmp_path):
    writer = TextDatasetWriter(tmp_path / "features", SEPARATE)
    writer.begin()
    before = contents(tmp_path / "features")
    good = [features(prompt, SEPARATE) for prompt in PROMPTS[:3]]
    video, audio = good[1]
    nan = video.copy()
    nan[-1, -1] = np.nan
    bad = {
        "not finite": (nan, audio),
        r"float32 \[9, 6\]": (video.astype(np.float32), audio),
        "audio_features .*missing": (video, None),
        r"bfloat16 \[8, 4\]": (video, audio[1:]),
        r"bfloat16 \[0, 6\]": (video[:0], audio[:0]),
        r"bfloat16 \[18, 6\]": (np.tile(video, (2, 1)), np.tile(audio, (2, 1))),
    }
    for message, pair in bad.items():
        with pytest.raises(ValueError, match=message) as error:
            writer.write_shard(0, PROMPTS[:3], [good[0], pair, good[2]])
        assert "a storm" in str(error.value)
    with pytest.raises(ValueError, match="argument"):
        writer.write_shard(0, PROMPTS[:3], good[:2])
    with pytest.raises(ValueError, match="shard 2 holds 1 prompts, not 3"):
        writer.write_shard(2, PROMPTS[:3], good)
    assert contents(tmp_path / "features") == before and writer.missing() == [0, 1, 2]


def test_another_dataset_is_not_continued(stored, tmp_path):
    folder, manifest = stored
    before = contents(folder)
    changes = {"encoder": "another", "prompts_sha256": "others", "prompts_per_shard": 4}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"{name} '?[a-z3 ]+'? instead of .*new folder"):
            TextDatasetWriter(folder, dataclasses.replace(manifest, **{name: value}))
    unknown = dataclasses.replace(manifest, encoder="")
    shards.check_folder(TEXT_FEATURES, folder, unknown, ignore=("encoder",))
    assert contents(folder) == before
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        TextDatasetWriter(tmp_path, manifest)
    with pytest.raises(ValueError, match="is a file"):
        TextDatasetWriter(tmp_path / "thesis.tex", manifest)


def test_another_process_may_begin_at_any_moment(stored, monkeypatch):
    """The manifest appears just after this process has found none: it is no foreign file."""
    folder, manifest = stored
    exists = pathlib.Path.exists
    monkeypatch.setattr(
        pathlib.Path, "exists", lambda path: path.name != shards._MANIFEST and exists(path)
    )
    shards.check_folder(TEXT_FEATURES, folder, manifest)


def test_damage_is_found(stored, tmp_path):
    folder, _ = stored
    with pytest.raises(FileNotFoundError, match=r"does not exist; .*encode_prompts creates it"):
        open_text_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        open_text_dataset(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "text_features-train.array_record-00001-of-00003"
    shard.unlink()
    with pytest.raises(ValueError, match=r"missing: text_features-train\.array_record-00001"):
        open_text_dataset(copy)
    shard.write_bytes((folder / shard.name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged: its shards have \d+ bytes"):
        open_text_dataset(copy)
    for text in ("", "[]", json.dumps({"format": 99, "kind": "text_features", "complete": True})):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="not the manifest of text features"):
            open_text_dataset(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts_per_shard": 0}, "prompts_per_shard must be a whole number, at least 1"),
        ({"num_prompts": 0}, "no prompts"),
        ({"audio_dim": 4}, "one width, not 6 .* and 4"),
    ],
)
def test_impossible_manifests(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHARED, **change)


def take(iterator, count):
    return [batch["prompt"].tolist() for batch in itertools.islice(iterator, count)]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_batches_are_stacked_elements(dataset):
    (batch,) = itertools.islice(grain_batches(dataset, 2, shuffle=False), 1)
    assert {name: x.shape for name, x in batch.items()} == {
        "prompt": (2,),
        "video_features": (2, LENGTH, 6),
        "audio_features": (2, LENGTH, 4),
        "mask": (2, LENGTH),
    }
    for row, prompt in enumerate(PROMPTS[:2]):
        check_element({name: x[row] for name, x in batch.items()}, prompt, SEPARATE)


def test_epochs(dataset):
    assert take(grain_batches(dataset, 2, shuffle=False, repeat=False), 9) == [
        PROMPTS[0:2],
        PROMPTS[2:4],
        PROMPTS[4:6],
    ]
    order = flat(take(grain_batches(dataset, 7, seed=3), 3))
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != PROMPTS
    # batches run across the ends of epochs, and depend on the seed only
    assert flat(take(grain_batches(dataset, 3, seed=3), 7)) == order
    assert flat(take(grain_batches(dataset, 3, seed=4), 7)) != order


@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_the_global_batch(dataset, repeat):
    """Rows of batch n are the same for 1, 2 and 4 processes, and for ones that share rows."""
    options = {"seed": 1, "repeat": repeat}
    whole = take(grain_batches(dataset, 4, **options), 5)
    assert len(whole) == (5 if repeat else 1)  # 7 prompts: one process must not get a batch more
    for shares in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1], [0, 1, 3]]):
        for rows in shares:
            part = take(grain_batches(dataset, 4, rows=rows, **options), 5)
            assert part == [[batch[row] for row in rows] for batch in whole]


def test_position_is_that_of_any_number_of_processes(dataset):
    one = grain_batches(dataset, 4, seed=5, rows=[0, 1])
    take(one, 3)
    state = one.get_state()
    other = grain_batches(dataset, 4, seed=5, rows=[3])
    take(other, 3)
    assert other.get_state() == state
    whole = grain_batches(dataset, 4, seed=5)
    whole.set_state(state)
    assert [batch[:2] for batch in take(whole, 4)] == take(one, 4)


def test_position_is_restored(dataset):
    iterator = grain_batches(dataset, 2, seed=5)
    take(iterator, 4)
    state = iterator.get_state()
    expected = take(iterator, 6)
    again = grain_batches(dataset, 2, seed=5)
    again.set_state(json.loads(json.dumps(state)))  # as a checkpoint keeps it
    assert take(again, 6) == expected


def test_impossible_batches(dataset):
    with pytest.raises(ValueError, match=r"a batch of 3 has rows 0 to 2, not \[1, 3\]"):
        grain_batches(dataset, 3, rows=[1, 3])
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        grain_batches(dataset, 0)
    with pytest.raises(ValueError, match="7 elements do not fill a batch of 8"):
        grain_batches(dataset, 8, repeat=False)
    assert take(grain_batches(dataset, 8, shuffle=False), 1) == [[*PROMPTS, PROMPTS[0]]]


def test_a_thread_that_writes_imports_nothing(tmp_path):
    """An import of tfds in a thread would break those of all others."""
    program = """
import json, sys
import ml_dtypes, numpy as np
from omniforcing_jax.data.text_dataset import TextDatasetWriter, TextManifest
manifest = TextManifest(**json.loads(sys.argv[2]))
writer = TextDatasetWriter(sys.argv[1], manifest)
writer.begin()
assert "tensorflow_datasets" not in sys.modules
writer.load_libraries()
before = set(sys.modules)
features = np.ones((3, manifest.video_dim), ml_dtypes.bfloat16)
writer.write_shard(0, ["a prompt"] * 3, [(features, None)] * 3)
print(sorted(set(sys.modules) - before))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path, json.dumps(dataclasses.asdict(SHARED))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.stdout.strip() == "[]", run.stderr
