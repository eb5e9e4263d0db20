"""Pictures, clips and sound on disk, as arrays.

Pictures are read by Pillow, or by FFmpeg (PyAV) where Pillow does not know the format; clips and
sound by FFmpeg. Whatever the file's format, pixels are 8-bit sRGB and sound is stereo float32.
Both libraries are imported where they are used.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# A picture that is enlarged more than this has nothing to show.
MAX_ENLARGEMENT = 4
# One audio latent lasts 1/25 s; a whole number of samples of it keeps sound and latents aligned.
SOUND_RATE_STEP = 25
_LONGEST_PACKET = 2048  # samples, of AAC with spectral band replication
_OTHER_RATES_BECOME = 48_000
_EARLY = 0.3  # frames; see `read_frames`


@dataclasses.dataclass(frozen=True)
class Sound:
    """Sound as it was given.

    Attributes:
      waveform: [N, 2] float32 in [-1, 1], left and right.
      sample_rate: samples per second, a multiple of 25.

    Raises:
      ValueError: another shape, no samples, samples that are not finite, or another rate.
    """

    waveform: np.ndarray
    sample_rate: int

    def __post_init__(self):
        check_sample_rate(self.sample_rate)
        waveform = self.waveform
        if waveform.ndim != 2 or waveform.shape[1] != 2 or not len(waveform):
            raise ValueError(f"a waveform is [N, 2] with N > 0, not {list(waveform.shape)}")
        if not np.isfinite(waveform).all():
            raise ValueError("the waveform has samples that are not finite (NaN or infinity)")

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.waveform) / self.sample_rate

    def lasting(self, seconds: float) -> "Sound":
        """Its first seconds, followed by silence if it is shorter."""
        count = round(seconds * self.sample_rate)
        silence = np.zeros((max(0, count - len(self.waveform)), 2), np.float32)
        return Sound(np.concatenate([self.waveform[:count], silence]), self.sample_rate)


def check_sample_rate(sample_rate: int) -> None:
    """Raises ValueError unless an audio latent, 1/25 s, is a whole number of samples."""
    if sample_rate < SOUND_RATE_STEP or sample_rate % SOUND_RATE_STEP:
        raise ValueError(
            f"sound needs a sample rate that is a multiple of {SOUND_RATE_STEP} Hz, as all usual "
            f"ones are (44100, 48000, …), not {sample_rate}; resample it first"
        )


# Pictures


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture.

    All eight EXIF orientations are applied, an ICC profile is converted to sRGB, 16 bits become 8,
    grey and palettes become RGB, and an alpha channel is dropped, as LTX-2 does. Of an animation or
    a clip it is the first frame.

    Args:
      path: a file that Pillow or FFmpeg reads.

    Returns:
      [H, W, 3] uint8.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no picture, or damaged.
    """
    from PIL import Image, ImageOps

    path = _existing(path)
    try:
        with Image.open(path) as image:
            return _srgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture: {error}") from error
    except Image.UnidentifiedImageError:
        pass  # FFmpeg may know the format
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{path} is a damaged picture: {error}") from error
    with _opened(path, "picture") as container:
        return _upright(next(_decoded(container, "video", path))[0])


def _srgb(image: Any) -> np.ndarray:
    """A Pillow image [H, W, 3] as 8-bit sRGB, without alpha."""
    from PIL import Image, ImageCms

    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits a pixel, some of them in 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values of more than 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray((values.astype(np.float32) / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels of no known range; save it with 8 or 16 bits")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    if profile:
        srgb = ImageCms.createProfile("sRGB")
        # a profile that is broken, or of other channels than the picture, says nothing
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    return np.asarray(image.convert("RGB"))


def check_enlargement(
    size: tuple[int, int], height: int, width: int, path: str | os.PathLike
) -> None:
    """Raises ValueError for a picture of this (height, width) that is too small for a clip."""
    scale = max(height / size[0], width / size[1])
    if scale > MAX_ENLARGEMENT:
        least = math.ceil(width / MAX_ENLARGEMENT), math.ceil(height / MAX_ENLARGEMENT)
        raise ValueError(
            f"{path} is too small: it has {size[1]}x{size[0]} pixels, which would be enlarged "
            f"{scale:.1f} times to fill {width}x{height}; use one of at least "
            f"{least[0]}x{least[1]} pixels, or a smaller clip"
        )


def compress_image(pixels: np.ndarray, crf: int) -> np.ndarray:
    """Encodes a picture as one H.264 frame and decodes it.

    LTX-2 has seen compressed video only, and takes a sharp picture for one that shall not move.

    Args:
      pixels: [H, W, 3] uint8, at least 2x2; an odd last row or column is cut off.
      crf: x264's quality, 1 (best) to 51; 0 leaves the picture as it is. `PipelineConfig.image_crf`
        is what the model was trained with.

    Returns:
      [H, W, 3] uint8, H and W even unless `crf` is 0.

    Raises:
      ValueError: `crf` is not from 0 to 51, or the picture is smaller than 2x2.
    """
    import av

    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be from 0 (no compression) to 51 (worst), not {crf}")
    if crf == 0:
        return pixels
    height, width = (size // 2 * 2 for size in pixels.shape[:2])
    if not height or not width:
        raise ValueError(f"a picture of {pixels.shape[1]}x{pixels.shape[0]} pixels has no H.264")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.options = 1, {"crf": str(crf), "preset": "veryfast"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]))
    frame = frame.reformat(format="yuv420p")
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoder = av.CodecContext.create("h264", "r")
    decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return decoded[0].to_ndarray(format="rgb24")


def fit_pixels(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales pictures until they cover a size, and cuts what is beyond it, evenly.

    Bilinear between pixel centres, without a filter against aliasing also where it shrinks, as the
    official pipelines do (`resize_and_center_crop`).

    Args:
      pixels: [..., H, W, 3] uint8.
      height, width: of the result.

    Returns:
      [..., height, width, 3] float32 in [-1, 1].
    """
    rows, columns = pixels.shape[-3:-1]
    scale = max(height / rows, width / columns)
    low, high, weight = _taps(rows, math.ceil(rows * scale), height)
    x = pixels.astype(np.float32)
    x = x[..., low, :, :] * (1 - weight)[:, None, None] + x[..., high, :, :] * weight[:, None, None]
    low, high, weight = _taps(columns, math.ceil(columns * scale), width)
    x = x[..., low, :] * (1 - weight)[:, None] + x[..., high, :] * weight[:, None]
    return x / np.float32(127.5) - 1


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Frames as they are shown: uint8, of float32 in [-1, 1] (`fit_pixels`)."""
    return np.clip((frames + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _taps(old: int, new: int, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both neighbours among `old` pixels of the middle `kept` of `new`, and the second's weight."""
    index = (new - kept) // 2 + np.arange(kept, dtype=np.float32)
    ratio = np.float32(old / new)
    position = np.maximum((index + np.float32(0.5)) * ratio - np.float32(0.5), 0)
    low = np.minimum(position.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), position - low.astype(np.float32)


# Clips


@dataclasses.dataclass(frozen=True)
class ClipDescription:
    """What a file says of itself: see `describe_clip`."""

    height: int
    width: int
    frame_rate: float
    seconds: float | None  # None where it does not say
    has_sound: bool


def describe_clip(path: str | os.PathLike) -> ClipDescription:
    """Looks at the beginning of a clip; nothing is decoded, so that the rest may be damaged.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no clip, or has no video.
    """
    path = _existing(path)
    with _opened(path, "clip") as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video")
        stream = container.streams.video[0]
        seconds = None if container.duration is None else container.duration / 1e6
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        size = stream.height, stream.width
        return ClipDescription(*size, _own_rate(stream), seconds, bool(container.streams.audio))


def read_frames(path: str | os.PathLike, frame_rate: float) -> Iterator[np.ndarray]:
    """The frames of a clip, at another rate.

    Frame n is the one that is shown at n / frame_rate seconds after the file's first frame; as the
    times in files are rounded, one that begins up to 0.3 frames later counts. A rotation that the
    file asks for is applied. A truncated end is dropped.

    Args:
      path: a file that FFmpeg reads.
      frame_rate: frames per second of the result.

    Yields:
      [H, W, 3] uint8, as long as the clip lasts.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no video that can be read.
    """
    path = _existing(path)
    with _opened(path, "clip") as container:
        shown, start, due, end = None, 0.0, 0, 0.0
        for frame, seconds in _decoded(container, "video", path):
            if shown is None:
                start = seconds
            begins = (seconds - start) * frame_rate  # in frames of the result
            while due < begins - _EARLY:
                yield shown
                due += 1
            shown = _upright(frame)
            end = begins + frame_rate / _own_rate(container.streams.video[0])
        for _ in range(due, max(1, math.floor(end + 0.5))):
            yield shown


def read_video(
    path: str | os.PathLike,
    frame_rate: float,
    height: int,
    width: int,
    num_frames: int | None = None,
    *,
    as_bytes: bool = False,
) -> np.ndarray:
    """The first frames of a clip, scaled and cut to a size; see `read_frames` and `fit_pixels`.

    Args:
      path: a file that FFmpeg reads.
      frame_rate: frames per second of the result.
      height, width: of the result, in pixels.
      num_frames: how many; None reads all of them.
      as_bytes: as `to_bytes` makes them, each when it is read: a quarter of the memory.

    Returns:
      [F, height, width, 3] float32 in [-1, 1], or uint8.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no video that can be read, fewer frames than asked for, or too small ones
        (see `check_enlargement`).
    """
    frames = []
    for pixels in itertools.islice(read_frames(path, frame_rate), num_frames):
        if not frames:
            check_enlargement(pixels.shape[:2], height, width, path)
        fitted = fit_pixels(pixels, height, width)
        frames.append(to_bytes(fitted) if as_bytes else fitted)
    if num_frames is not None and len(frames) < num_frames:
        raise ValueError(
            f"{path} is too short: {len(frames) / frame_rate:.2f} s, or {len(frames)} frames at "
            f"{frame_rate:g} per second; {num_frames} are needed"
        )
    return np.stack(frames)


# Sound


def read_sound(path: str | os.PathLike, seconds: float | None = None) -> Sound:
    """Reads the sound of a file, or the sound track of a clip.

    Mono plays on both sides, and more than two channels are mixed down to two. The sample rate is
    the file's own, or 48 kHz where that is no multiple of 25 Hz. It ends where the track says that
    it ends, and not with the codec's last packet. In a clip it begins with the first
    frame: silence comes before a track that begins later, and what is earlier is cut.

    Args:
      path: a file that FFmpeg reads.
      seconds: reads so much, or less if there is not more; None reads all of it.

    Returns:
      The sound.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no sound, or none that can be read.
    """
    path = _existing(path)
    with _opened(path, "sound") as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound: there is no audio track in it")
        begin = _first_frame_time(container, path)
        track = container.streams.audio[0]
        length = None if track.duration is None else float(track.duration * track.time_base)
    pieces, count, cut, shift, sample_rate, resampler = [], 0, 0, 0, 0, None
    with _opened(path, "sound") as container:
        for frame, time in _decoded(container, "audio", path):
            if resampler is None:
                resampler, sample_rate = _stereo_resampler(frame)
                shift = 0 if begin is None else round((time - begin) * sample_rate)
                count, cut = max(0, shift), max(0, -shift)
                pieces.append(np.zeros((count, 2), np.float32))
            new = [_stereo(piece) for piece in resampler.resample(frame)]
            pieces += new
            count += sum(map(len, new))
            if seconds is not None and count - cut >= seconds * sample_rate:
                break
        if resampler is not None:
            pieces += [_stereo(piece) for piece in resampler.resample(None)]
    waveform = np.concatenate(pieces) if pieces else np.zeros((0, 2), np.float32)
    if length is not None:  # the last packet is filled up with what is no sound
        excess = len(waveform) - max(0, shift) - round(length * sample_rate)
        if 0 < excess <= _LONGEST_PACKET:
            waveform = waveform[:-excess]
    waveform = waveform[cut:]
    if seconds is not None:
        waveform = waveform[: round(seconds * sample_rate)]
    if not len(waveform):
        raise ValueError(f"{path} has an audio track without sound in it")
    try:
        return Sound(waveform, sample_rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_sound_length(sound: Sound, seconds: float, path: str | os.PathLike) -> str | None:
    """What to tell a user about a sound that is shorter than the clip; None if it is not."""
    missing = seconds - sound.seconds
    if missing <= 0.5 / SOUND_RATE_STEP:
        return None
    return (
        f"{path} lasts {sound.seconds:.2f} s, the clip {seconds:.2f} s: its last {missing:.2f} s "
        "are silent"
    )


def _stereo_resampler(frame: Any) -> tuple[Any, int]:
    """Converts frames like this one to float, and to the rate that is returned."""
    import av

    rate = frame.sample_rate
    if rate % SOUND_RATE_STEP:
        rate = _OTHER_RATES_BECOME
    # mono is doubled by `_stereo`: FFmpeg would play it at less volume
    layout = "stereo" if frame.layout.nb_channels > 2 else None
    return av.AudioResampler(format="fltp", layout=layout, rate=rate), rate


def _stereo(frame: Any) -> np.ndarray:
    """[N, 2] float32."""
    samples = frame.to_ndarray().T  # [N, 1 or 2]
    return np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples


def _first_frame_time(container: Any, path: pathlib.Path) -> float | None:
    """When the picture begins, in seconds of the file; None if there is no (moving) picture."""
    from av.stream import Disposition

    video = container.streams.video
    if not video or video[0].disposition & Disposition.attached_pic:  # the cover of a record
        return None
    for _, seconds in _decoded(container, "video", path):
        return seconds
    return None


# Files


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    return path


@contextlib.contextmanager
def _opened(path: pathlib.Path, what: str) -> Iterator[Any]:
    """The file as a PyAV container; what FFmpeg raises meanwhile becomes a ValueError."""
    import av

    try:
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is no {what} that FFmpeg can read: {error}") from error


def _decoded(container: Any, kind: str, path: pathlib.Path) -> Iterator[tuple[Any, float]]:
    """Frames of the first stream of a kind, and their times in seconds; a truncated end is dropped.

    Raises:
      ValueError: there are none.
    """
    import av

    streams = getattr(container.streams, kind)
    if not streams:
        raise ValueError(f"{path} has no {kind}")
    found = 0
    try:
        for frame in container.decode(streams[0]):
            time = frame.time  # None in bare streams
            if time is None:
                time = found / _own_rate(streams[0]) if kind == "video" else 0.0
            found += 1
            yield frame, time
    except (av.error.InvalidDataError, av.error.EOFError) as error:  # cut off in mid-packet
        if not found:
            raise ValueError(f"{path} holds no {kind} that can be decoded: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no {kind} that can be decoded")


def _own_rate(stream: Any) -> float:
    """Frames per second of a video."""
    return float(stream.average_rate or stream.guessed_rate or 24)


def _upright(frame: Any) -> np.ndarray:
    """A PyAV frame [H, W, 3] as the file asks for it to be shown."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
