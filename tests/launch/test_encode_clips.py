"""`launch/encode_clips.py` as a person runs it: lists, bad files, interruption, batches."""

import json
import shutil
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest

from launch import encode_clips, encode_prompts
from omniforcing_jax import load_encoders, read_sound, read_video
from omniforcing_jax.data.clips import open_clips
from omniforcing_jax.data.text_dataset import grain_batches, open_text_dataset
from tests.launch.fake_text_encoder import FakeTextEncoder

FRAMES, SIZE = 9, 64
SHARD = "clips-train.array_record-{:05d}-of-00002"


def write_clip(path, seed, *, seconds=0.5, size=(96, 64), sound=True):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="stereo") if sound else None
        image = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        image = image.repeat(8, 0).repeat(8, 1)
        for shift in range(round(seconds * 24)):
            frame = av.VideoFrame.from_ndarray(np.roll(image, shift, 1))
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = rng.integers(-9999, 9999, (1, 2 * round(seconds * 16000)), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A list of seven: three good ones, one of them twice, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(3):
        write_clip(folder / f"{number}.mkv", number)
    shutil.copy(folder / "1.mkv", folder / "copy.mkv")
    write_clip(folder / "silent.mkv", 7, sound=False)
    write_clip(folder / "short.mkv", 8, seconds=0.25)
    broken = (folder / "0.mkv").read_bytes()
    (folder / "broken.mkv").write_bytes(broken[:2000])
    rows = ["caption,video"]
    names = ("0", "silent", "1", "copy", "short", "broken", "2")
    rows += [f'"a film, number {i}",{name}.mkv' for i, name in enumerate(names)]
    (folder / "clips.csv").write_text("\n".join(rows))
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def text(films, random_gemma, random_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "text"
    arguments = [
        *("--gemma", str(random_gemma), "--checkpoint", str(random_checkpoint("2.0"))),
        *("--prompts", str(films), "--output", str(output), "--negative", "blurry"),
        *("--length", "128", "--batch-size", "8"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_prompts, "TextEncoder", FakeTextEncoder)
        assert encode_prompts.main(arguments) == 0
    return output


def options(films, text, checkpoint, output, *more):
    return [
        *("--clips", str(films), "--text", str(text), "--checkpoint", str(checkpoint)),
        *("--output", str(output), "--frames", str(FRAMES), "--height", str(SIZE)),
        *("--width", str(SIZE), "--clips-per-shard", "2", *more),
    ]


@pytest.fixture(scope="module")
def stored(films, text, random_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("stored") / "clips"
    assert encode_clips.main(options(films, text, random_checkpoint("2.0"), output)) == 0
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_clips_are_encoded_with_their_captions(stored, films, text, random_checkpoint):
    clips, captions = open_clips(stored), open_text_dataset(text)
    assert [clips.file(i) for i in range(len(clips))] == ["0.mkv", "1.mkv", "2.mkv"]
    assert [clips.caption(i) for i in range(3)] == [f"a film, number {i}" for i in (0, 2, 6)]
    manifest = clips.manifest
    assert (manifest.num_read, manifest.num_duplicates, manifest.num_unusable) == (7, 1, 2)
    encoder = load_encoders(random_checkpoint("2.0"), dtype=jnp.float32)
    for index, prompt in enumerate((0, 2, 6)):
        element = clips[index]
        path = films.parent / clips.file(index)
        expected = {
            "video": encoder.encode_frames(read_video(path, 24, SIZE, SIZE, FRAMES)[None]),
            "audio": encoder.encode_sound(read_sound(path), 9),
        }
        for name, latents in expected.items():
            found = element[name].astype(np.float32)
            np.testing.assert_allclose(found, latents[0], rtol=2**-8, atol=1e-5)
        for name in ("video_features", "mask"):
            np.testing.assert_array_equal(element[name], captions[prompt][name])
    np.testing.assert_array_equal(clips.negative["mask"], captions.negative["mask"])


def test_batches(stored):
    batch = next(grain_batches(open_clips(stored), 2))
    assert batch["video"].shape[:2] == (2, 2 * (SIZE // 32) ** 2)
    assert batch["audio"].shape[:2] == (2, 9)
    assert set(batch) == {"video", "audio", "video_features", "mask"}


def test_what_is_left_out_is_said(films, text, random_checkpoint, tmp_path, capsys):
    arguments = options(films, text, random_checkpoint("2.0"), tmp_path / "a")
    assert encode_clips.main([*arguments, "--plan"]) == 0
    report = capsys.readouterr().err
    assert "4 clips (7 read, 1 repeated, 2 left out), 2 shards" in report
    assert "silent.mkv has no sound: there is no audio track in it" in report
    assert "short.mkv is too short: 0.25 s of the 0.38 s" in report
    assert not (tmp_path / "a").exists()


def test_interrupted_and_continued(
    stored, films, text, random_checkpoint, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "clips"
    arguments = options(films, text, random_checkpoint("2.0"), output)
    real, calls = encode_clips.encode_clip, []

    def interrupted(encoder, clip, manifest):
        calls.append(clip.name)
        if clip.name == "broken.mkv":
            raise KeyboardInterrupt
        return real(encoder, clip, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(encode_clips, "encode_clip", interrupted)
        assert encode_clips.main(arguments) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert set(contents(output)) == {"manifest.json", "negative.safetensors", SHARD.format(0)}
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(encode_clips, "encode_clip", lambda *a: calls.append(a[1].name) or real(*a))
        assert encode_clips.main(arguments) == 0
    assert sorted(calls) == ["2.mkv", "broken.mkv"]  # the first shard is not made again
    report = capsys.readouterr().err
    assert "left out: " in report and "broken.mkv" in report and "3 clips in 2 shards" in report
    assert contents(output) == contents(stored)
    assert encode_clips.main(arguments) == 0
    assert "complete already" in capsys.readouterr().err


def test_a_folder_of_clips(films, tmp_path, capsys):
    """Each clip with its caption beside it."""
    from omniforcing_jax.data.clip_files import read_clip_list

    for name in ("0", "1", "copy"):
        shutil.copy(films.parent / f"{name}.mkv", tmp_path)
        (tmp_path / f"{name}.txt").write_text(f" film {name}\n")
    (tmp_path / "alone.txt").write_text("nothing beside it")
    clips = read_clip_list(tmp_path, height=SIZE, width=SIZE, seconds=0.4)
    assert [(clip.name, clip.caption) for clip in clips.clips] == [
        ("0.mkv", "film 0"),
        ("1.mkv", "film 1"),
    ]
    assert [clips.prompts.prompts[clip.prompt] for clip in clips.clips] == ["film 0", "film 1"]
    assert clips.num_duplicates == 1
    assert clips.unusable == (f"{tmp_path / 'alone.txt'}: 0 clips beside it",)
    with pytest.raises(ValueError, match="none of 4 clips can be used; the first reason"):
        read_clip_list(tmp_path, height=SIZE, width=SIZE, seconds=9)


def test_bad_input_is_refused_before_weights_are_read(
    stored, films, text, random_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(encode_clips, "load_encoders", lambda *a, **k: pytest.fail("weights"))
    checkpoint, output = random_checkpoint("2.0"), tmp_path / "new"
    arguments = options(films, text, checkpoint, output)
    other = tmp_path / "other.csv"
    other.write_text(f"caption,video\nanother film,{films.parent / '0.mkv'}\n")
    rows = [json.dumps({"caption": "x", "film": "0.mkv"})]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    for more, message in [
        (["--frames", "10"], "8k + 1 frames, not 10"),
        (["--height", "60"], "multiples of 32"),
        (["--height", "1024", "--width", "1024"], "too small"),
        (["--clips", str(other)], "are of other captions than those of"),
        (["--clips", str(tmp_path / "list.jsonl")], "no key 'video'"),
        (["--clips", str(tmp_path / "nothing.csv")], "no such file"),
        (["--checkpoint", str(random_checkpoint("2.3"))], "of another model"),
        (["--output", str(stored), "--frames", "1"], "frames 9 instead of 1"),
    ]:
        assert encode_clips.main([*arguments, *more]) == 2, message
        assert message in capsys.readouterr().err
    assert not output.exists()
