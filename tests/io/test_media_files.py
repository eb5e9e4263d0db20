"""Pictures, clips and sound from files: against the golden files, and what was written."""

import io
import itertools
import types
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms, ImageDraw

from omniforcing_jax.io import media_files
from omniforcing_jax.io.media_files import Sound

# The picture each orientation shows, made of the stored one: what EXIF's table says of its rows.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "conditions" / "image_preprocess.npz")


def pixels(height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def tone(count, rate, channels, hertz=440.0):
    """[N, channels] float32, each channel louder than the one before."""
    wave = np.sin(2 * np.pi * hertz * np.arange(count) / rate).astype(np.float32)
    return wave[:, None] * np.linspace(0.2, 0.6, channels, dtype=np.float32)


def write_sound(path, waveform, rate, codec, layout, fmt, *, cover=False):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels(16, 16))))
        add_sound(container, stream, waveform, rate, layout, fmt)
    return path


def add_sound(container, stream, waveform, rate, layout, fmt):
    planar = fmt.endswith("p")
    for start in range(0, len(waveform), 1024):
        piece = waveform[start : start + 1024]
        if fmt.startswith("s16"):
            piece = np.round(piece * 32767).astype(np.int16)
        piece = piece.T if planar else piece.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format=fmt, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_video(path, levels, rate, *, rotation=0, sound_at=None):
    """Grey frames 32x48 of these levels, the upper half black; sound may begin at a time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound_at else None
        for level in levels:
            image = np.full((32, 48, 3), level, np.uint8)
            image[:16] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
        if sound is not None:
            piece = np.full((1, 8000), 16384, np.int16)
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = round(sound_at * 16000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def levels_of(frames):
    """What `write_video` was given, about."""
    return [round(float(frame[20:, 5:40].mean())) for frame in frames]


# Pictures


@pytest.mark.parametrize("name", ["up", "down", "portrait", "same"])
def test_fitting_equals_the_reference(golden, name):
    reference = np.moveaxis(golden[f"image_{name}"][0, :, 0], 0, -1)  # [1, 3, 1, h, w]
    fitted = media_files.fit_pixels(golden["image_rgb_uint8"], *reference.shape[:2])
    np.testing.assert_allclose(fitted, reference, atol=2e-5, rtol=0)
    both = media_files.fit_pixels(
        golden["image_rgb_uint8"][None].repeat(2, 0), *reference.shape[:2]
    )
    np.testing.assert_array_equal(both, np.stack([fitted, fitted]))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientations(tmp_path, orientation):
    stored, exif = pixels(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    found = media_files.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(found, UPRIGHT[orientation](stored))


def test_kinds_of_pixels(tmp_path):
    rgb = pixels()
    grey = rgb[..., 0]

    def read(image, suffix="png", **options):
        image.save(tmp_path / f"a.{suffix}", **options)
        return media_files.read_image(tmp_path / f"a.{suffix}")

    np.testing.assert_array_equal(read(Image.fromarray(rgb), "webp", lossless=True), rgb)
    three = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(read(Image.fromarray(grey)), three)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257)), three)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257), "tif"), three)
    alpha = np.concatenate([rgb, grey[..., None]], -1)
    np.testing.assert_array_equal(read(Image.fromarray(alpha)), rgb)
    grey_alpha = Image.fromarray(grey).convert("LA")
    np.testing.assert_array_equal(read(grey_alpha), three)
    palette = Image.fromarray(grey).quantize(16)
    palette.info["transparency"] = 3
    np.testing.assert_array_equal(read(palette), np.asarray(palette.convert("RGB")))
    black = np.asarray(Image.fromarray(grey).convert("1").convert("RGB"))
    np.testing.assert_array_equal(read(Image.fromarray(grey).convert("1")), black)
    cmyk = read(Image.fromarray(rgb).convert("CMYK"), "tif")
    np.testing.assert_allclose(cmyk.astype(int), rgb, atol=1)


def test_pictures_that_pillow_does_not_know(tmp_path):
    """FFmpeg reads what Pillow does not know, here a PAM file."""
    rgb = pixels()
    header = b"P7\nWIDTH 8\nHEIGHT 6\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n"
    (tmp_path / "a.pam").write_bytes(header + rgb.tobytes())
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(tmp_path / "a.pam")
    np.testing.assert_array_equal(media_files.read_image(tmp_path / "a.pam"), rgb)


def test_colour_profiles(tmp_path):
    rgb = pixels()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=profile)
    same = media_files.read_image(tmp_path / "a.png")
    np.testing.assert_allclose(same.astype(int), rgb, atol=1)
    Image.fromarray(rgb).save(tmp_path / "b.png", icc_profile=b"no profile")
    np.testing.assert_array_equal(media_files.read_image(tmp_path / "b.png"), rgb)
    # L* a* b* of the same colours, as a profile names them
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert lab  # a profile of other channels than the picture's says nothing about it
    Image.fromarray(rgb).save(tmp_path / "c.png", icc_profile=lab)
    np.testing.assert_array_equal(media_files.read_image(tmp_path / "c.png"), rgb)


def test_h264_round_trip():
    image = Image.new("RGB", (97, 65), (200, 60, 30))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 50), fill=(20, 80, 220))
    sharp = np.asarray(image)
    assert media_files.compress_image(sharp, 0) is sharp
    errors = []
    for crf in (18, 33):
        compressed = media_files.compress_image(sharp, crf)
        assert compressed.shape == (64, 96, 3)
        assert compressed.dtype == np.uint8
        errors.append(np.abs(compressed.astype(int) - sharp[:64, :96]).mean())
    assert 0.5 < errors[0] < errors[1] < 8
    with pytest.raises(ValueError, match="from 0"):
        media_files.compress_image(sharp, 52)


def test_bad_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cat\.png: there is no such file"):
        media_files.read_image(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="is a folder"):
        media_files.read_image(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        media_files.read_image(tmp_path / "text.png")
    data = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(data, "png")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png is a damaged picture"):
        media_files.read_image(tmp_path / "cut.png")
    media_files.check_enlargement((16, 24), 64, 96, "a.png")
    with pytest.raises(ValueError, match=r"at least 24x16 pixels"):
        media_files.check_enlargement((15, 24), 64, 96, "a.png")


# Clips

LEVELS = list(range(20, 240, 8))  # 28 frames


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        (24, 24, LEVELS),
        (Fraction(30000, 1001), 30, LEVELS),
        (48, 24, LEVELS[::2]),
        (12, 24, [level for level in LEVELS for _ in range(2)]),
        (24, 16, [LEVELS[i * 3 // 2] for i in range(19)]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frame_rates(tmp_path, suffix, written, read, expected):
    path = write_video(tmp_path / f"a.{suffix}", LEVELS, written)
    frames = list(media_files.read_frames(path, read))
    assert levels_of(frames) == pytest.approx(expected, abs=2)


def test_rotated_clips_stand_upright(tmp_path):
    """As a phone writes them: the sensor's rows, and how to turn them."""
    flat = next(media_files.read_frames(write_video(tmp_path / "a.mp4", [200], 24), 24))
    for turn in (90, 180, -90):
        path = write_video(tmp_path / f"{turn}.mp4", [200], 24, rotation=turn)
        turned = next(media_files.read_frames(path, 24))
        expected = np.rot90(flat, turn // 90)  # counterclockwise, as FFmpeg counts
        np.testing.assert_array_equal(turned, expected)


def test_read_video_fits_and_counts(tmp_path):
    path = write_video(tmp_path / "a.mp4", LEVELS, 24)
    frames = media_files.read_video(path, 24, 64, 64, num_frames=9)
    assert frames.shape == (9, 64, 64, 3)
    assert frames.dtype == np.float32
    assert frames[3, 50, 30, 0] == pytest.approx(LEVELS[3] / 127.5 - 1, abs=0.02)
    shown = media_files.read_video(path, 24, 64, 64, num_frames=9, as_bytes=True)
    np.testing.assert_array_equal(shown, media_files.to_bytes(frames))
    assert len(media_files.read_video(path, 24, 64, 64)) == len(LEVELS)
    with pytest.raises(
        ValueError, match=r"too short: 1\.17 s, or 28 frames at 24 .* 33 are needed"
    ):
        media_files.read_video(path, 24, 64, 64, num_frames=33)
    with pytest.raises(ValueError, match="too small"):
        media_files.read_video(path, 24, 256, 256)
    sound = write_sound(tmp_path / "a.wav", tone(800, 8000, 1), 8000, "pcm_s16le", "mono", "s16")
    with pytest.raises(ValueError, match="has no video"):
        media_files.read_video(sound, 24, 64, 64)
    (tmp_path / "bad.mp4").write_bytes(b"nothing like a clip")
    with pytest.raises(ValueError, match=r"bad\.mp4 is no clip that FFmpeg can read"):
        media_files.read_video(tmp_path / "bad.mp4", 24, 64, 64)


def test_a_truncated_clip_is_read_to_where_it_ends(tmp_path):
    path = write_video(tmp_path / "a.mkv", LEVELS, 24)
    (tmp_path / "cut.mkv").write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    frames = list(media_files.read_frames(tmp_path / "cut.mkv", 24))
    assert 3 < len(frames) < len(LEVELS)
    assert levels_of(frames) == pytest.approx(LEVELS[: len(frames)], abs=2)


# Sound


@pytest.mark.parametrize(
    ("suffix", "codec", "fmt", "rate"),
    [
        ("wav", "pcm_s16le", "s16", 44100),
        ("wav", "pcm_f32le", "flt", 16000),
        ("flac", "flac", "s16", 48000),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_lossless_sound_comes_as_it_is(tmp_path, suffix, codec, fmt, rate, layout):
    waveform = tone(rate // 10 + 7, rate, 1 if layout == "mono" else 2)
    path = write_sound(tmp_path / f"a.{suffix}", waveform, rate, codec, layout, fmt)
    sound = media_files.read_sound(path)
    assert sound.sample_rate == rate
    expected = np.broadcast_to(waveform, (len(waveform), 2))
    np.testing.assert_allclose(sound.waveform, expected, atol=5e-5)
    assert len(media_files.read_sound(path, seconds=0.05).waveform) == round(0.05 * rate)


def test_as_much_sound_as_was_asked_for(tmp_path, monkeypatch):
    """Also where the resampler holds a piece back; the silence before a later track counts."""
    path = write_sound(tmp_path / "a.wav", tone(16000, 16000, 1), 16000, "pcm_s16le", "mono", "s16")
    make, calls = media_files._stereo_resampler, itertools.count()

    def hesitant(frame):
        resampler, rate = make(frame)

        def resample(frame):
            pieces = resampler.resample(frame)
            return [] if next(calls) == 1 else pieces

        return types.SimpleNamespace(resample=resample), rate

    monkeypatch.setattr(media_files, "_stereo_resampler", hesitant)
    assert len(media_files.read_sound(path, seconds=0.5).waveform) == 8000
    assert next(calls) > 3
    monkeypatch.undo()
    late = write_video(tmp_path / "a.mkv", LEVELS, 24, sound_at=0.25)
    assert len(media_files.read_sound(late, seconds=0.3).waveform) == 4800


def test_lossy_surround_and_odd_rates(tmp_path):
    mp3 = write_sound(
        tmp_path / "a.mp3", tone(24000, 24000, 2), 24000, "libmp3lame", "stereo", "fltp"
    )
    sound = media_files.read_sound(mp3)
    assert abs(sound.seconds - 1) < 0.1
    assert np.abs(sound.waveform[8000:16000]).max(axis=0) == pytest.approx([0.2, 0.6], abs=0.05)
    covered = write_sound(
        tmp_path / "d.mp3", tone(24000, 24000, 2), 24000, "libmp3lame", "stereo", "fltp", cover=True
    )
    np.testing.assert_array_equal(media_files.read_sound(covered).waveform, sound.waveform)
    surround = write_sound(
        tmp_path / "b.wav", tone(4800, 48000, 6), 48000, "pcm_s16le", "5.1", "s16"
    )
    assert media_files.read_sound(surround).waveform.shape == (4800, 2)
    odd = write_sound(tmp_path / "c.wav", tone(44056, 44056, 1), 44056, "pcm_s16le", "mono", "s16")
    sound = media_files.read_sound(odd)
    assert sound.sample_rate == 48000
    assert len(sound.waveform) == pytest.approx(48000, abs=2)
    crossings = np.count_nonzero(np.diff(np.signbit(sound.waveform[:, 0])))
    assert crossings == pytest.approx(880, abs=2)


@pytest.mark.parametrize("begins", [0.25, 0.5])
def test_sound_of_a_clip_begins_with_its_picture(tmp_path, begins):
    path = write_video(tmp_path / "a.mkv", LEVELS, 24, sound_at=begins)
    sound = media_files.read_sound(path)
    first = np.flatnonzero(sound.waveform[:, 0])[0]
    assert first == pytest.approx(begins * 16000, abs=16)  # Matroska counts milliseconds
    np.testing.assert_allclose(sound.waveform[first:, 1], 0.5, atol=1e-3)


def test_bad_sound_is_named(tmp_path):
    silent = write_video(tmp_path / "silent.mp4", LEVELS, 24)
    with pytest.raises(ValueError, match=r"silent\.mp4 has no sound: there is no audio track"):
        media_files.read_sound(silent)
    with pytest.raises(FileNotFoundError, match="no such file"):
        media_files.read_sound(tmp_path / "missing.wav")
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.wav is no sound that FFmpeg can read"):
        media_files.read_sound(tmp_path / "bad.wav")
    with pytest.raises(ValueError, match="multiple of 25 Hz"):
        Sound(np.zeros((10, 2), np.float32), 44056)
    with pytest.raises(ValueError, match="not finite"):
        Sound(np.full((10, 2), np.nan, np.float32), 48000)


def test_short_sound_is_followed_by_silence():
    sound = Sound(tone(8000, 16000, 2), 16000)
    assert media_files.check_sound_length(sound, 0.5, "a.wav") is None
    message = media_files.check_sound_length(sound, 2.0, "a.wav")
    assert message == "a.wav lasts 0.50 s, the clip 2.00 s: its last 1.50 s are silent"
    longer = sound.lasting(2.0)
    np.testing.assert_array_equal(longer.waveform[:8000], sound.waveform)
    assert not longer.waveform[8000:].any()
    assert longer.seconds == 2
    assert sound.lasting(0.1).seconds == pytest.approx(0.1)
