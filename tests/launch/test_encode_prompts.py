"""`launch/encode_prompts.py` as a person runs it: kills, hosts, odd captions, refused input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from launch import encode_prompts
from omniforcing_jax.data.text_dataset import open_text_dataset
from omniforcing_jax.distributed import multihost
from omniforcing_jax.text.encoder_files import check_encoder
from omniforcing_jax.text.text_encoder import TextEncoder
from tests.launch.fake_text_encoder import FakeTextEncoder

ROOT = pathlib.Path(__file__).parents[2]
CAPTIONS = [f"{'very ' * (i % 7)}quiet scene {i}" for i in range(23)]
LONG = " ".join(f"word{i}" for i in range(10_000))
SHARD = "text_features-train.array_record-{:05d}-of-00006"


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def folders(request, random_gemma, random_checkpoint):
    return random_gemma, random_checkpoint(request.param)


@pytest.fixture
def fake(monkeypatch):
    """The encoders that were loaded."""
    loaded = []

    class Recorded(FakeTextEncoder):
        def __init__(self, *args):
            super().__init__(*args)
            loaded.append(self)

    monkeypatch.setattr(encode_prompts, "TextEncoder", Recorded)
    return loaded


def options(folders, prompts, output, *more):
    gemma, checkpoint = folders
    return [
        *("--gemma", str(gemma), "--checkpoint", str(checkpoint)),
        *("--prompts", str(prompts), "--output", str(output), "--negative", " blurry "),
        *("--length", "256", "--batch-size", "3", "--prompts-per-shard", "4", *more),
    ]


def write_captions(folder, captions=CAPTIONS, name="captions.txt"):
    path = folder / name
    path.write_text("\n".join(captions), encoding="utf-8")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(encoder, prompt):
    """Features of a prompt that is encoded alone, at full length."""
    ids, mask = encoder.tokenizer.pad(encoder.tokenizer.encode([prompt]), encoder.length)
    video, audio = encoder.features(ids, mask)
    return [np.asarray(x.astype(ml_dtypes.bfloat16)[0][mask[0]]) for x in (video, audio)]


def test_captions_of_all_kinds(folders, tmp_path, fake, capsys):
    rows = ["a calm sea", "", "emoji 😀🎻", LONG, " a calm sea", "two\nlines", "a calm sea", "\t"]
    path = write_captions(tmp_path, [json.dumps({"text": row}) for row in rows], "captions.jsonl")
    output = tmp_path / "features"
    assert encode_prompts.main(options(folders, path, output, "--column", "text")) == 0
    dataset = open_text_dataset(output)
    kept = ["a calm sea", "emoji 😀🎻", LONG, "two\nlines"]
    assert [dataset[i]["prompt"] for i in range(len(dataset))] == kept
    (encoder,) = fake
    # 10,000 words are cut to the length, the others padded to the shortest length
    assert encoder.shapes == [(3, 128), (3, 128), (3, 256)]
    for element in [*(dataset[i] for i in range(4)), dataset.negative]:
        video, audio = expected(encoder, element["prompt"])
        np.testing.assert_array_equal(element["video_features"][element["mask"]], video)
        np.testing.assert_array_equal(element["audio_features"][element["mask"]], audio)
    manifest = dataset.manifest
    assert (manifest.num_read, manifest.num_blank, manifest.num_duplicates) == (8, 2, 2)
    assert (manifest.num_prompts, manifest.num_truncated, manifest.text_length) == (4, 1, 256)
    assert manifest.encoder == check_encoder(*folders).fingerprint(jnp.float32, "none")
    assert manifest.negative_prompt == "blurry"
    errors = capsys.readouterr().err
    assert "4 prompts (8 read, 2 blank, 2 repeated)" in errors
    assert "otherwise than the model was trained: --length 256, not 1024" in errors
    assert "line 4: " in errors and "tokens were cut, from '" in errors
    assert "4 of 4 prompts" in errors and "prompts/s" in errors

    before = contents(output)
    fake.clear()
    assert encode_prompts.main(options(folders, path, output, "--column", "text")) == 0
    assert "complete already" in capsys.readouterr().err and contents(output) == before
    assert not fake  # no weights were read


def run_fake(arguments, *process, steps=float("inf"), **kwargs):
    command = [sys.executable, "-m", "tests.launch.fake_text_encoder", str(steps), *process, "--"]
    return subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT, **kwargs
    )


def wait_for(path, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_continued(random_gemma, random_checkpoint, tmp_path, fake, kill):
    folders = random_gemma, random_checkpoint("2.3")
    path = write_captions(tmp_path)
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "features"
    assert encode_prompts.main(options(folders, path, undisturbed)) == 0
    assert len(contents(undisturbed)) == 6 + 4

    arguments = options(folders, path, output)
    process = run_fake(arguments, steps=7)  # of 12, two for a shard
    wait_for(output / SHARD.format(1), process)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=120)
    there = contents(output)
    assert SHARD.format(1) in there and SHARD.format(5) not in there
    assert not json.loads(there["manifest.json"])["complete"]
    if kill == signal.SIGTERM:
        assert process.returncode == 143, errors
        assert "the same command continues" in errors and "Traceback" not in errors
        assert not [name for name in there if name.endswith(".new")]
    else:
        assert process.returncode == -kill
        # as if it had been killed while a shard was being written
        (output / f".{SHARD.format(4)}.new").write_bytes(b"half a shard")

    fake.clear()
    assert encode_prompts.main(arguments) == 0
    assert contents(output) == contents(undisturbed)
    done = sum(name.startswith("text_features-train") for name in there)
    assert len(fake[0].shapes) < 12 - done  # complete shards were not encoded again


def test_several_hosts(random_gemma, random_checkpoint, free_port, tmp_path, fake):
    """Two processes share the shards, and write the files that one writes."""
    folders = random_gemma, random_checkpoint("2.0")
    path = write_captions(tmp_path)
    alone, output = tmp_path / "alone", tmp_path / "features"
    assert encode_prompts.main(options(folders, path, alone)) == 0
    address, arguments = f"127.0.0.1:{free_port}", options(folders, path, output)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [run_fake(arguments, address, str(i), "2", env=environment) for i in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert contents(output) == contents(alone)
    assert "12 of 12 prompts" in errors[0]  # shards 0, 2 and 4
    assert "prompts/s" not in errors[1]  # one process reports


def test_shares_do_not_depend_on_what_others_have_written(
    random_gemma, random_checkpoint, tmp_path, fake, monkeypatch, capsys
):
    """Another process writes its first shard while this one is at the negative prompt."""
    folders = random_gemma, random_checkpoint("2.0")
    path, output = write_captions(tmp_path), tmp_path / "features"
    write_negative = encode_prompts.TextDatasetWriter.write_negative

    def write_negative_late(writer, features):
        writer.shard_path(1).write_bytes(b"written by process 1")
        write_negative(writer, features)

    monkeypatch.setattr(encode_prompts.TextDatasetWriter, "write_negative", write_negative_late)
    monkeypatch.setattr(multihost, "barrier", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert encode_prompts.main(options(folders, path, output)) == 2
    assert "shards are missing: [3, 5]" in capsys.readouterr().err  # those of process 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--prompts-per-shard", "0"], "prompts_per_shard must be a whole number, at least 1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--prompts", "latin1.txt"], "latin1.txt, line 2: byte 1 (0xe4) is not UTF-8"),
        (["--column", "text"], "no columns"),
        (["--gemma", "."], "holds no config.json; python -m checkpoint_converters.gemma3"),
        (["--length", "100"], "a multiple of the 128 registers"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--output", "latin1.txt"], "is a file"),
        (["--output", "."], "holds the input"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    folders, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("weights were read"))
    (tmp_path / "latin1.txt").write_bytes(b"fine\n\xe4rger\n")
    path = write_captions(tmp_path)
    assert encode_prompts.main(options(folders, path, tmp_path / "features", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_other_captions_or_settings_do_not_mix(folders, tmp_path, fake, capsys):
    output = tmp_path / "features"
    path = write_captions(tmp_path)
    assert encode_prompts.main(options(folders, path, output)) == 0
    before = contents(output)
    fake.clear()
    other = write_captions(tmp_path, CAPTIONS[::-1], "other.txt")
    for arguments, message in [
        (options(folders, other, output), "prompts_sha256"),
        (options(folders, path, output, "--negative", "ugly"), "negative_prompt 'blurry'"),
        (options(folders, path, output, "--length", "128"), "text_length 256 instead of 128"),
        (options(folders, path, output, "--dtype", "bfloat16"), "compute_dtype"),
        (options(folders, path, output, "--quantize", "int8"), "other settings: encoder '"),
    ]:
        assert encode_prompts.main(arguments) == 2
        assert message in capsys.readouterr().err and not fake
    assert contents(output) == before


def test_features_do_not_depend_on_neighbours(folders):
    encoder = FakeTextEncoder.load(
        *folders, dtype=jnp.float32, quantize="none", length=512, mesh=None
    )
    long = ["many words " * count for count in (1, 25, 2, 90, 3)]
    together = encode_prompts.encode(encoder, long, 2)
    assert {length for _, length in encoder.shapes} == {128, 256, 512}
    assert {batch for batch, _ in encoder.shapes} == {2}
    for prompt, found in zip(long, together, strict=True):
        (alone,) = encode_prompts.encode(encoder, [prompt], 2)
        assert (found[1] is None) == (alone[1] is None) == encoder.shared_features
        for a, b in zip(found, alone, strict=True):
            if a is not None:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "tokens, longest, padded",
    [(1, 1024, 128), (128, 1024, 128), (129, 1024, 256), (1025, 1024, 1024), (60, 32, 32)],
)
def test_padded_length(tokens, longest, padded):
    assert encode_prompts.padded_length(tokens, longest) == padded


@pytest.mark.parametrize("version, length", [("2.0", 128), ("2.3", 256)])
def test_with_the_real_encoder(
    random_gemma, random_checkpoint, tmp_path, monkeypatch, version, length
):
    """Tiny random weights, from the file of captions to contexts."""
    load, loaded = TextEncoder.load, []

    def recorded(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[0]

    monkeypatch.setattr(TextEncoder, "load", recorded)
    captions = ["a calm sea", "emoji 😀", " ".join(["a tram rings its bell"] * 12)]
    path, output = write_captions(tmp_path, captions), tmp_path / "features"
    arguments = options((random_gemma, random_checkpoint(version)), path, output)
    arguments += ["--length", str(length), "--batch-size", "4"]
    assert encode_prompts.main(arguments) == 0
    (encoder,) = loaded
    dataset = open_text_dataset(output)
    assert dataset.manifest.encoder == encoder.fingerprint
    elements = [*(dataset[i] for i in range(3)), dataset.negative]
    prompts = [element["prompt"] for element in elements]
    assert prompts == [*captions, "blurry"]
    names = ("video_features", "audio_features", "mask")
    stored = [np.stack([element[name] for element in elements]) for name in names]
    token_ids, mask = encoder.tokenizer.encode_batch(prompts, length)
    np.testing.assert_array_equal(stored[2], mask)
    for found, features in zip(stored[:2], encoder.features(token_ids, mask), strict=True):
        # bfloat16 has 8 bits; padded to another length, the encoder rounds differently
        features = np.where(mask[..., None], features, 0)
        np.testing.assert_allclose(found.astype(np.float32), features, rtol=2**-8, atol=1e-5)
    contexts = encoder.encode(prompts)
    for found, context in zip(
        encoder.contexts(*stored), (contexts.video_context, contexts.audio_context), strict=True
    ):
        np.testing.assert_allclose(found, context, atol=0.02)  # of a standard deviation of 0.6
