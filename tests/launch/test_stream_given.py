"""`launch/stream.py` with files: a clip to a sound and a picture, and what is refused."""

import wave

import numpy as np
import pytest
from PIL import Image

from launch import given_stream, stream
from omniforcing_jax.io import media_files
from omniforcing_jax.scaling import devices
from omniforcing_jax.streaming import media

SIZE = ["--height", "64", "--width", "64", "--decode", "causal", "--sigmas", "1", "0.7", "0"]
RATE = 24000


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint):
    return str(random_checkpoint("2.0"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """face.png, speech.wav, notes.txt."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    Image.fromarray(pixels).save(folder / "face.png")
    tone = np.sin(np.arange(2 * RATE) * 2 * np.pi * 440 / RATE) * 20000
    with wave.open(str(folder / "speech.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(tone.astype("<i2").tobytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


def arguments(checkpoint, files, output, *more):
    more = [str(files / word) if word[-4:-3] == "." else word for word in more]
    head = ["--checkpoint", checkpoint, "--output", str(output), *SIZE, "--bidirectional"]
    return [*head, "--random-features", "--prompt", "a face", "--seconds", "1.5", *more]


def test_a_talking_portrait(checkpoint, files, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    more = ["--image", "face.png", "--audio", "speech.wav", "--crf", "0"]
    assert stream.main(arguments(checkpoint, files, clip, *more)) == 0
    frames, _, waveform, rate = media.read_clip(clip)
    assert frames.shape == (36, 64, 64, 3) and rate == RATE
    spectrum = np.abs(np.fft.rfft(waveform[: int(1.4 * RATE), 0] * np.hanning(int(1.4 * RATE))))
    assert abs(np.argmax(spectrum) / 1.4 - 440) < 2
    assert "silent" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_face_and_a_voice(checkpoint, files, tmp_path, monkeypatch):
    """They lengthen no clip, and prompts begin when they would without them."""
    changes, change = [], stream.StreamingSession.set_prompt

    def set_prompt(session, prompt):
        changes.append((session.num_frames, session.num_blocks))
        change(session, prompt)

    monkeypatch.setattr(stream.StreamingSession, "set_prompt", set_prompt)
    clip = tmp_path / "clip.mp4"
    more = ["--reference", "face.png", "speech.wav", "--anchors", "2", "--at", "1", "a smile"]
    assert stream.main(arguments(checkpoint, files, clip, *more)) == 0
    frames, _, waveform, _ = media.read_clip(clip)
    assert frames.shape == (36, 64, 64, 3) and len(waveform) >= 1.5 * RATE
    assert changes == [(25, 4)]  # behind the frame at second 1, and two blocks not shown


@pytest.mark.slow
@pytest.mark.parametrize("flag, shown", [("--extend", 25), ("--foley", 36)])
def test_a_film_goes_on_or_gets_its_sound(checkpoint, files, tmp_path, flag, shown):
    """From the file to the file: all of a film that is to be heard, the beginning of another."""
    film, clip = tmp_path / "film.mp4", tmp_path / "clip.mp4"
    grey = np.linspace(40, 200, shown, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(grey, (shown, 64, 64, 3))
    with media.ClipWriter(film, width=64, height=64, frame_rate=24, sample_rate=RATE) as writer:
        writer.write(pixels, np.full((shown * RATE // 24, 2), 0.1, np.float32))
    assert stream.main(arguments(checkpoint, files, clip, "--video", str(film), flag)) == 0
    frames, _, waveform, _ = media.read_clip(clip)
    assert frames.shape == (36, 64, 64, 3) and len(waveform) >= 1.5 * RATE
    if flag == "--foley":  # it is shown as it came
        assert np.abs(frames.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "none.png"], "none.png"),
        (["--image", "notes.txt"], "notes.txt"),
        (["--extend"], "--extend needs --video FILM"),
        (["--audio", "face.png"], "face.png"),
        (["--video", "speech.wav", "--foley"], "speech.wav"),
        (["--reference", "face.png", "notes.txt"], "notes.txt"),
    ],
)
def test_files_are_refused_before_weights_are_read(
    checkpoint, files, tmp_path, capsys, monkeypatch, options, message
):
    def no_weights(*args, **how):
        raise AssertionError("weights were read")

    monkeypatch.setattr(stream, "load_pipeline", no_weights)
    assert stream.main(arguments(checkpoint, files, tmp_path / "clip.mp4", *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, what",
    [(["--audio", "speech.wav"], "sound"), (["--video", "speech.wav", "--foley"], "film")],
)
def test_what_memory_cannot_hold_is_not_read(
    checkpoint, files, tmp_path, capsys, monkeypatch, options, what
):
    def read(*args, **how):
        raise AssertionError("it was read")

    monkeypatch.setattr(media_files, "read_sound", read)
    monkeypatch.setattr(media_files, "read_video", read)
    monkeypatch.setattr(devices, "memory_bytes", lambda: 2**26)
    options = [*options, "--seconds", "600"]
    assert stream.main(arguments(checkpoint, files, tmp_path / "clip.mp4", *options)) == 2
    assert f"the {what} takes 0." in capsys.readouterr().err


def test_options_that_do_not_go_together(checkpoint, files, capsys):
    for words, message in (
        (["--endless", "--audio", "speech.wav"], "give --seconds"),
        (["--reference", "face.png", "speech.wav", "--video", "x.mp4"], "leave out --reference"),
    ):
        words = ["--seconds", "1.5", *words] if "--endless" not in words else words
        args = stream.parse_arguments(
            ["--checkpoint", checkpoint, "--output", "-", "--random-features", *words]
        )
        layout = stream.PipelineConfig.from_checkpoint(checkpoint)
        rollout = layout.rollout(64, 64)
        length = None if args.endless else (3, 36)
        with pytest.raises(ValueError, match=message):
            given_stream.read(args, rollout, length, layout)
