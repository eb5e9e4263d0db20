"""Clips: what is on disk while writing, after closing, and after things go wrong."""

import io
import os
import pathlib
import signal
import subprocess
import sys

import av
import numpy as np
import pytest

from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.contact_sheet import contact_sheet

HEIGHT, WIDTH, RATE = 64, 96, 24
ROOT = pathlib.Path(__file__).parents[2]


def moving_gradient(count: int, start: int = 0) -> np.ndarray:
    """[count, 64, 96, 3] uint8; a smooth pattern whose phase tells the frame number."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    phase = 0.2 * (start + np.arange(count))[:, None, None]
    channels = [np.sin(x / 20 + phase), np.sin(y / 15 - phase), np.cos((x + y) / 30 + phase)]
    return (127.5 + 120 * np.stack(channels, -1)).astype(np.uint8)


def tone(count: int, sample_rate: int, start: int = 0, hertz: float = 440.0) -> np.ndarray:
    """[count, 2] float32: `hertz` on the left, its octave on the right."""
    seconds = (start + np.arange(count)) / sample_rate
    angle = 2 * np.pi * hertz * seconds
    return np.stack([0.5 * np.sin(angle), 0.25 * np.sin(2 * angle)], -1).astype(np.float32)


def writer(target, sample_rate=24_000, **kwargs) -> media.ClipWriter:
    settings = dict(width=WIDTH, height=HEIGHT, frame_rate=RATE, sample_rate=sample_rate)
    return media.ClipWriter(target, **(settings | kwargs))


def write_seconds(clip: media.ClipWriter, seconds: int, start: int = 0) -> None:
    for second in range(start, start + seconds):
        samples = tone(clip.sample_rate, clip.sample_rate, second * clip.sample_rate)
        clip.write(moving_gradient(RATE, second * RATE), samples)


def silence(count: int) -> np.ndarray:
    return np.zeros((count, 2), np.float32)


@pytest.mark.parametrize("sample_rate", [16_000, 24_000, 48_000])
def test_closed_file_has_every_frame_and_sample_in_place(tmp_path, sample_rate):
    path = tmp_path / "new" / "folder" / "clip.mp4"
    with writer(path, sample_rate) as clip:
        write_seconds(clip, 3)
    frames, frame_rate, waveform, rate = media.read_clip(path)

    assert (len(frames), frame_rate, rate) == (3 * RATE, RATE, sample_rate)
    assert np.abs(frames.astype(int) - moving_gradient(3 * RATE)).mean() < 4  # one frame off: 15
    assert 0 <= len(waveform) - 3 * sample_rate <= media.AAC_FRAME_SAMPLES
    # The encoder's priming samples are cut off: one sample of shift would cost a mean of 0.018.
    expected = tone(3 * sample_rate, sample_rate)
    assert np.abs(waveform[: len(expected)] - expected).mean() < 0.01
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == RATE
        assert container.streams.video[0].frames == 3 * RATE
        assert container.duration == pytest.approx(3_000_000, rel=0.01)
        assert container.start_time == 0
        container.seek(2_000_000)
        assert 1.0 <= next(container.decode(video=0)).time <= 2.0


def test_a_growing_file_decodes_to_nearly_all_that_was_written(tmp_path):
    path, copy = tmp_path / "clip.mp4", tmp_path / "copy.mp4"
    clip = writer(path)
    clip.write(moving_gradient(1), tone(1000, 24_000))  # the prefix of a stream is one frame
    for second in range(3):
        written, samples = clip.frame_count, clip.sample_count
        clip.write(moving_gradient(RATE, written), tone(24_000, 24_000, samples))
        copy.write_bytes(path.read_bytes())
        frames, frame_rate, waveform, _ = media.read_clip(copy)
        assert len(frames) >= clip.frame_count - 3, second
        assert len(waveform) >= clip.sample_count - 5 * media.AAC_FRAME_SAMPLES, second
        assert frame_rate == pytest.approx(RATE, rel=0.01)
        assert (
            np.abs(frames.astype(int) - moving_gradient(len(frames))).mean() < 4
        )  # one frame off: 15
    clip.close()


def test_splitting_the_stream_over_calls_does_not_change_the_file(tmp_path):
    """Time stamps come from counters: any split into calls gives the same clip."""
    frames, samples = moving_gradient(48), tone(48_000, 24_000)
    cuts = {
        "whole": ([48], [48_000]),
        "uneven": ([1, 0, 17, 30], [0, 5000, 13_000, 30_000]),
    }
    decoded = {}
    for name, (frame_counts, sample_counts) in cuts.items():
        path = tmp_path / f"{name}.mp4"
        with writer(path) as clip:
            frame, sample = 0, 0
            for more_frames, more_samples in zip(frame_counts, sample_counts, strict=True):
                clip.write(
                    frames[frame : frame + more_frames], samples[sample : sample + more_samples]
                )
                frame, sample = frame + more_frames, sample + more_samples
        decoded[name] = media.read_clip(path)
    for one, other in zip(decoded["whole"], decoded["uneven"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pipe_is_written_front_to_back_and_decodes_at_any_time(tmp_path):
    read_end, write_end = os.pipe()
    code = f"import os, sys; sys.stdout.buffer.write(os.fdopen({read_end}, 'rb').read())"
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=[read_end]
    )
    os.close(read_end)
    with os.fdopen(write_end, "wb") as target, writer(target) as clip:
        write_seconds(clip, 2)
    received = reader.communicate(timeout=240)[0]
    frames, _, waveform, _ = media.read_clip(io.BytesIO(received))
    assert len(frames) == 2 * RATE and len(waveform) >= 48_000

    memory = io.BytesIO()
    clip = writer(memory)
    write_seconds(clip, 1)
    assert len(media.read_clip(io.BytesIO(memory.getvalue()))[0]) >= RATE - 3
    clip.close()
    assert not memory.closed


def test_standard_output(tmp_path):
    code = (
        "import numpy as np; from omniforcing_jax.streaming.media import ClipWriter\n"
        "with ClipWriter('-', width=96, height=64, frame_rate=24, sample_rate=24000) as clip:\n"
        "    clip.write(np.zeros((24, 64, 96, 3), np.uint8), np.zeros((24000, 2), np.float32))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=240
    )
    assert result.returncode == 0, result.stderr.decode()
    assert len(media.read_clip(io.BytesIO(result.stdout))[0]) == 24


def test_a_killed_process_leaves_a_clip_that_plays(tmp_path):
    path = tmp_path / "clip.mp4"
    code = (
        "import sys; sys.path.insert(0, 'tests/streaming'); from test_media import *\n"
        f"clip, second = writer({str(path)!r}), 0\n"
        "while True:\n"
        "    write_seconds(clip, 1, second); second += 1; print(second, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    for expected in range(1, 4):
        assert int(process.stdout.readline()) == expected
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=240)
    frames, _, waveform, _ = media.read_clip(path)
    assert len(frames) >= 3 * RATE - 3
    assert len(waveform) >= 3 * 24_000 - 5 * media.AAC_FRAME_SAMPLES


def test_an_existing_clip_is_only_replaced_by_a_finished_one(tmp_path):
    path, part = tmp_path / "clip.mp4", tmp_path / "clip.part.mp4"
    with writer(path) as clip:
        write_seconds(clip, 1)
    good = path.read_bytes()
    with pytest.raises(FileExistsError):
        writer(path)

    with pytest.raises(RuntimeError) as caught, writer(path, overwrite=True) as clip:
        write_seconds(clip, 2)
        raise RuntimeError("generation failed")
    assert path.read_bytes() == good
    assert len(media.read_clip(part)[0]) == 2 * RATE  # what there was is kept, and plays
    assert str(part) in caught.value.__notes__[0]

    with writer(path, overwrite=True):
        pass  # no data: nothing to replace it with
    assert path.read_bytes() == good

    with writer(path, overwrite=True) as clip:
        write_seconds(clip, 3)
        assert path.read_bytes() == good
    assert len(media.read_clip(path)[0]) == 3 * RATE
    assert len(media.read_clip(part)[0]) == 2 * RATE  # a later one took another name
    assert set(tmp_path.iterdir()) == {path, part}


@pytest.mark.parametrize("existing", [False, True])
def test_a_second_writer_of_a_clip_is_refused(tmp_path, existing):
    """From the moment at which the first one opens it, until that is closed."""
    path = tmp_path / "clip.mp4"
    if existing:
        path.write_bytes(b"old")
    first = writer(path, overwrite=existing)
    for _ in range(2):
        with pytest.raises(FileExistsError, match="is being written by another program"):
            writer(path, overwrite=True)
        write_seconds(first, 1)
    first.close()
    assert list(tmp_path.iterdir()) == [path]
    assert len(media.read_clip(path)[0]) == 2 * RATE
    writer(path, overwrite=True).close()  # nobody holds it any more
    assert len(media.read_clip(path)[0]) == 2 * RATE


def test_a_writer_that_ends_while_another_locks_is_noticed(tmp_path, monkeypatch):
    """The lock is of a file that is gone; and the clip is there now."""
    path, lock = tmp_path / "clip.mp4", tmp_path / ".clip.mp4.lock"
    flock = media.fcntl.flock

    def late(descriptor, how):
        lock.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(media.fcntl, "flock", late)
    with pytest.raises(FileExistsError, match="is being written by another program"):
        writer(path)
    monkeypatch.setattr(media.fcntl, "flock", lambda *how: path.write_bytes(b"") or flock(*how))
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        writer(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_got_no_data_leaves_no_file(tmp_path):
    writer(tmp_path / "clip.mp4").close()
    with pytest.raises(KeyboardInterrupt) as caught, writer(tmp_path / "clip.mp4"):
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "__notes__") and not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_and_leaves_the_old_clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"precious")
    code = (
        "import resource, signal, sys; sys.path.insert(0, 'tests/streaming')\n"
        "from test_media import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"clip = writer({str(path)!r}, overwrite=True)\n"
        "try:\n"
        "    write_seconds(clip, 30)\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
        "clip.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=240
    )
    assert result.returncode == 0, result.stderr.decode()
    assert b"Error" in result.stdout
    assert path.read_bytes() == b"precious"


def test_a_reader_that_leaves_ends_the_stream_with_one_error(tmp_path):
    class Gone:
        def write(self, data):
            raise BrokenPipeError("reader left")

    clip = writer(Gone())
    with pytest.raises(BrokenPipeError):
        write_seconds(clip, 2)
    with pytest.raises(ValueError, match="closed after an error"):
        write_seconds(clip, 1)
    clip.close()


def test_colours_are_bt709_limited_range_and_tagged_so(tmp_path):
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [30, 200, 120]],
        np.uint8,
    )
    frames = np.broadcast_to(colours[:, None, None], (len(colours), HEIGHT, WIDTH, 3))
    path = tmp_path / "clip.mp4"
    with writer(path) as clip:
        clip.write(frames, silence(6000))
    luma = 16 + 219 * (colours / 255) @ [0.2126, 0.7152, 0.0722]  # ITU-R BT.709-6, items 3.2, 4.6
    with av.open(str(path)) as container:
        for frame, expected in zip(container.decode(video=0), luma, strict=True):
            assert frame.to_ndarray()[HEIGHT // 2, WIDTH // 2] == pytest.approx(expected, abs=1.5)
            tags = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
            assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    centre = media.read_clip(path)[0][:, HEIGHT // 2, WIDTH // 2].astype(int)
    assert np.abs(centre - colours).max() <= 4


def test_fractional_rates_keep_exact_time(tmp_path):
    path = tmp_path / "clip.mp4"
    with writer(path, 48_000, frame_rate=30_000 / 1001) as clip:
        clip.write(moving_gradient(60), silence(96_096))
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(60) * 1001 / 30_000, atol=1e-4)


def test_video_or_sound_alone(tmp_path):
    clip = writer(tmp_path / "video.mp4")
    clip.write(moving_gradient(24), silence(0))
    with pytest.warns(UserWarning, match="1.00 s of video but 0.00 s of sound"):
        clip.close()
    assert len(media.read_clip(tmp_path / "video.mp4")[0]) == 24
    clip = writer(tmp_path / "sound.mp4")
    clip.write(moving_gradient(0), silence(24_000))
    with pytest.warns(UserWarning, match="frames/s and 24000 Hz right"):
        clip.close()
    with pytest.raises(ValueError, match="no video frames"):
        media.read_clip(tmp_path / "sound.mp4")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 97}, "width must be even"),
        ({"height": 0}, "height must be even"),
        ({"frame_rate": 0}, "frame_rate"),
        ({"sample_rate": 23_000}, "sample_rate 23000"),
        ({"crf": 60}, "crf"),
        ({"preset": "quick"}, "preset 'quick'"),
        ({"fragment_seconds": 0}, "fragment_seconds"),
    ],
)
def test_bad_settings_leave_no_file(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        writer(tmp_path / "clip.mp4", **change)
    assert not list(tmp_path.iterdir())


def test_bad_chunks_are_refused_and_the_clip_goes_on(tmp_path):
    good, sound = moving_gradient(24), tone(24_000, 24_000)
    broken = sound.copy()
    broken[7, 1] = np.nan
    bad = [
        (good.astype(np.float32), sound, r"frames must be uint8 \[n, 64, 96, 3\], got float32"),
        (good[0], sound, r"frames must be uint8"),
        (good[:, :, :95], sound, r"got uint8 \[24, 64, 95, 3\]"),
        (good, sound.astype(np.float64), r"waveform must be float32 \[m, 2\], got float64"),
        (good, sound.T, r"got float32 \[2, 24000\]"),
        (good, broken, "1 non-finite samples in the chunk that starts at 1.00 s"),
    ]
    with writer(tmp_path / "clip.mp4") as clip:
        clip.write(good, sound)
        for frames, waveform, message in bad:
            with pytest.raises(ValueError, match=message):
                clip.write(frames, waveform)
        clip.write(good, sound)
    with pytest.raises(ValueError, match="closed"):
        clip.write(good, sound)
    clip.close()  # twice is fine
    assert len(media.read_clip(tmp_path / "clip.mp4")[0]) == 48


def test_output_path_is_checked_up_front(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "old.mp4").write_text("")
    media.check_output_path(tmp_path / "a" / "b" / "clip.mp4")
    media.check_output_path(tmp_path / "old.mp4")
    for name, message in [
        ("clip.avi", "must end in .mp4"),
        ("clip", "must end in .mp4"),
        ("folder.mp4", "is a folder"),
        ("file/clip.mp4", "is not a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            media.check_output_path(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="no permission"):
        media.check_output_path(tmp_path / "clip.mp4")


def test_terminal_is_not_an_output(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    media.check_output_path("-")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(ValueError, match="terminal"):
        media.check_output_path("-")


def test_reading_garbage(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a clip" * 100)
    with pytest.raises(ValueError, match="holds no video"):
        media.read_clip(path)
    with pytest.raises(FileNotFoundError):
        media.read_clip(tmp_path / "missing.mp4")


def test_contact_sheet_shows_frames_and_sound(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "folder" / "sheet.png"
    frames = np.full((24, HEIGHT, WIDTH, 3), (200, 30, 90), np.uint8)
    contact_sheet(frames, path, frame_rate=RATE, waveform=tone(24_000, 24_000), sample_rate=24_000)
    picture = imread(path)[..., :3]
    shown = np.abs(picture - np.array([200, 30, 90]) / 255).max(-1) < 0.02
    height = len(shown)
    assert shown[: height // 2].mean() > 0.3  # the frames fill the upper half
    assert not shown[2 * height // 3 :].any()
    plain, events = path.read_bytes(), [(0.5, "#ff0000")]
    sound = {"waveform": tone(24_000, 24_000), "sample_rate": 24_000}
    for marks, same in (({"seen": [], "heard": []}, True), ({"seen": events, "heard": []}, False)):
        contact_sheet(frames, path, frame_rate=RATE, marks=marks, **sound)
        assert (path.read_bytes() == plain) == same
    contact_sheet(frames, tmp_path / "frames.png", frame_rate=RATE, every=6)
    with pytest.raises(ValueError, match="sample_rate"):
        contact_sheet(frames, path, frame_rate=RATE, waveform=tone(10, 24_000))
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet(frames.astype(np.float32), path, frame_rate=RATE)


def test_contact_sheet_of_a_file(tmp_path):
    clip_path, picture = tmp_path / "clip.mp4", tmp_path / "clip.png"
    with writer(clip_path) as clip:
        write_seconds(clip, 1)
    command = [
        sys.executable,
        "-m",
        "omniforcing_jax.streaming.contact_sheet",
        str(clip_path),
        str(picture),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_importing_media_needs_no_codec_library():
    code = (
        "import sys; sys.modules['av'] = sys.modules['matplotlib'] = None\n"
        "import omniforcing_jax.streaming.media\n"
        "from omniforcing_jax.streaming.contact_sheet import new_figure\n"
        "try: new_figure()\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, check=True, timeout=240, capture_output=True)
    assert b"drawing needs matplotlib" in result.stdout
