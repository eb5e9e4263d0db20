"""Clips on disk and on the wire: written while they are generated, and read back.

`ClipWriter` takes chunks of frames and samples as a stream produces them and appends them to a
fragmented MP4 (H.264 + AAC), so that the file (or the pipe) plays while it grows. PyAV is imported
where it is used: importing this module does not need it.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import select
import sys
import warnings
from fractions import Fraction
from typing import BinaryIO

import numpy as np

STDOUT = "-"
CLIP_SUFFIX = ".mp4"
AUDIO_CHANNELS = 2
# AAC codes 1024 samples at a time, at one of these rates (ISO/IEC 14496-3, table 1.18).
AAC_FRAME_SAMPLES = 1024
AAC_SAMPLE_RATES = (
    *(96_000, 88_200, 64_000, 48_000, 44_100, 32_000),
    *(24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350),
)
X264_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow"),
)
# Sound and picture this far apart at the end mean that one of the two rates was wrong.
MAX_DRIFT_SECONDS = 0.5


def check_output_path(path: str | os.PathLike) -> None:
    """Raises now what opening `path` for a clip would raise later. Creates nothing.

    Meant for the start of a program, before a model is loaded. Missing parent folders are fine:
    `ClipWriter` creates them. Whether a file that is there may be replaced `io.outputs` says.

    Args:
      path: `*.mp4`, or "-" for standard output.

    Raises:
      ValueError: not an .mp4 name, a folder, a place that cannot be written to, or "-" while
        standard output is a terminal.
    """
    if str(path) == STDOUT:
        if sys.stdout.isatty():
            raise ValueError(
                'output "-" writes an MP4 to standard output, which is a terminal: '
                "pipe it into a player (`... --output - | ffplay -`) or name a file"
            )
        return
    path = pathlib.Path(path)
    if path.suffix.lower() != CLIP_SUFFIX:
        raise ValueError(f"output {path} must end in {CLIP_SUFFIX}: clips are H.264 + AAC in MP4")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: name an {CLIP_SUFFIX} file in it")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise ValueError(f"output {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {path}: no permission to write in {folder}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"output {path} exists and is read-only")


def _check_settings(width, height, frame_rate, sample_rate, crf, preset, fragment_seconds) -> None:
    """Raises ValueError for settings that H.264 4:2:0 or AAC cannot represent."""
    for name, size in (("width", width), ("height", height)):
        if size != int(size) or size < 2 or size % 2:
            raise ValueError(f"{name} must be even (4:2:0 halves colour resolution), got {size}")
    if not 1 <= frame_rate <= 240:
        raise ValueError(f"frame_rate must be from 1 to 240 frames per second, got {frame_rate}")
    if sample_rate not in AAC_SAMPLE_RATES:
        raise ValueError(f"sample_rate {sample_rate} Hz is not one AAC has: {AAC_SAMPLE_RATES}")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be from 0 (lossless) to 51 (worst), got {crf}")
    if preset not in X264_PRESETS:
        raise ValueError(f"preset {preset!r} is not one x264 has: {X264_PRESETS}")
    if not fragment_seconds > 0:
        raise ValueError(f"fragment_seconds must be positive, got {fragment_seconds}")


class _Pipe:
    """The write side of a file object and nothing else, so that the muxer never seeks."""

    def __init__(self, target: BinaryIO):
        self._target = target

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while len(view):  # a raw file may take only part of it
            written = self._target.write(view)
            view = view[len(view) if written is None else written :]
        if hasattr(self._target, "flush"):
            self._target.flush()
        return len(data)


class _Output:
    """Standard output, piece by piece: a write that waits for its reader can be ended."""

    def __init__(self):
        sys.stdout.flush()
        self._descriptor = sys.stdout.fileno()
        self.stopped = False

    def write(self, data: memoryview) -> int:
        """Writes as much as can be written without waiting, once there is room for anything.

        Raises:
          BrokenPipeError: the reader is gone, or `stopped` was set while it took nothing.
        """
        while not select.select([], [self._descriptor], [], 0.1)[1]:
            if self.stopped:
                raise BrokenPipeError(errno.EPIPE, "its reader takes nothing")
        return os.write(self._descriptor, data[: select.PIPE_BUF])


def _is_open_file(descriptor: int, path: pathlib.Path) -> bool:
    """Whether a path still leads to the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class ClipWriter:
    """Appends video and sound to an MP4 that plays while it is being written.

    Both streams start at time zero and are clocked by counting: frame i is at `i / frame_rate`,
    sample j at `j / sample_rate`, whatever the wall clock and the split into `write` calls.
    A fragment leaves about every `fragment_seconds`, so after each `write` all but the last
    three frames and four AAC frames or so can be decoded from what is on disk (nothing before
    there is that much). A killed process costs no more than that. A clean `close` adds the index
    that makes a file a regular, seekable MP4 with exact duration; a pipe stays fragmented.

    Where the bytes go:
      * a new path: straight into it. After an exception the clip so far is left there, closed.
      * an existing path with `overwrite=True`: into `<name>.part.mp4` beside it (`.part2.mp4`, ...
        if there is one), which takes the name on a clean close. After an exception the old file is
        untouched, the part file stays.
      * "-" (standard output; print nothing else there) or any object with `write(bytes)`: written
        front to back without seeking. The object is flushed, not closed.

    Not thread safe but for `stop_waiting`. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        path: str | os.PathLike | BinaryIO,
        *,
        width: int,
        height: int,
        frame_rate: float | Fraction,
        sample_rate: int,
        crf: int = 18,
        preset: str = "veryfast",
        audio_bitrate: int = 192_000,
        fragment_seconds: float = 0.05,
        overwrite: bool = False,
        program: str = "",
    ):
        """Opens the writer, which locks the path; the file appears with the first data.

        Args:
          path: `*.mp4`, "-", or a binary file object.
          width, height: frame size in pixels, both even.
          frame_rate: frames per second (24, 23.976, `Fraction(30000, 1001)`, ...).
          sample_rate: samples per second of the waveform, a rate AAC has.
          crf: x264 quality, 0 lossless to 51.
          preset: x264 speed preset, one of `X264_PRESETS`.
          audio_bitrate: bits per second for both channels.
          fragment_seconds: longest stretch that waits in memory for its fragment to end.
          overwrite: whether an existing file may be replaced (see the class).
          program: that writes the clip, kept in it as a comment; see `io.outputs`.

        Raises:
          ValueError: a setting or path that cannot work (see `check_output_path`), or no PyAV.
          FileExistsError: the file exists and `overwrite` is False, or somebody is writing it.
        """
        try:
            import av
        except ImportError as error:
            raise ValueError(f"writing clips needs PyAV (pip install av): {error}") from error

        _check_settings(width, height, frame_rate, sample_rate, crf, preset, fragment_seconds)
        self.width, self.height = int(width), int(height)
        self.frame_rate = Fraction(frame_rate).limit_denominator(1001)
        self.sample_rate = int(sample_rate)
        self.frame_count = 0
        self._encoded_samples = 0
        self._remainder = np.zeros((0, AUDIO_CHANNELS), np.float32)  # less than one AAC frame
        self._failed = False
        self._final_path: pathlib.Path | None = None
        self._open_path: pathlib.Path | None = None
        self._lock: tuple[int, pathlib.Path] | None = None  # descriptor and file
        self._stdout: _Output | None = None

        target = self._open_target(path, overwrite)
        options = _muxer_options(fragment_seconds, seekable=isinstance(target, str))
        self._container = av.open(target, "w", format="mp4", container_options=options)
        self._container.metadata["comment"] = program
        self._add_video_stream(crf, preset)
        self._audio = self._container.add_stream("aac", rate=self.sample_rate, layout="stereo")
        self._audio.bit_rate = audio_bitrate

    def _open_target(self, path, overwrite: bool) -> str | _Pipe:
        """Checks where the clip goes and returns what the muxer opens."""
        if hasattr(path, "write"):
            return _Pipe(path)
        check_output_path(path)
        if str(path) == STDOUT:
            self._stdout = _Output()
            return _Pipe(self._stdout)
        self._final_path = self._open_path = pathlib.Path(path)
        self._final_path.parent.mkdir(parents=True, exist_ok=True)
        self._reserve()
        if self._final_path.exists():  # nobody else makes or replaces it now
            if not overwrite:
                self.release()
                raise FileExistsError(
                    errno.EEXIST, "exists; choose another name or allow overwriting", str(path)
                )
            numbers = itertools.chain([""], itertools.count(2))
            parts = (self._final_path.with_suffix(f".part{n}{CLIP_SUFFIX}") for n in numbers)
            self._open_path = next(part for part in parts if not os.path.lexists(part))
        return str(self._open_path)

    def _reserve(self) -> None:
        """Locks the place against a second writer, by a file beside it that goes on closing."""
        lock = self._final_path.with_name(f".{self._final_path.name}.lock")
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        # another writer may have removed the file before it was locked here
        if not free or not _is_open_file(descriptor, lock):
            os.close(descriptor)
            raise FileExistsError(
                errno.EEXIST, "is being written by another program", str(self._final_path)
            )
        self._lock = descriptor, lock

    def release(self) -> None:
        """Lets others write the clip; nothing may be written after it."""
        if self._lock is not None:
            descriptor, lock = self._lock
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            self._lock = None

    def stop_waiting(self) -> None:
        """From another thread: a write to standard output does not wait for its reader any more."""
        if self._stdout is not None:
            self._stdout.stopped = True

    def _add_video_stream(self, crf: int, preset: str) -> None:
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        # zerolatency: no lookahead and no B-frames, a frame leaves the encoder as it enters.
        # Key frames once a second, regardless of content, bound seeking and joining.
        options = {"preset": preset, "tune": "zerolatency", "crf": str(crf), "sc_threshold": "0"}
        self._video = self._container.add_stream("libx264", rate=self.frame_rate, options=options)
        self._video.width, self._video.height = self.width, self.height
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / self.frame_rate
        context.gop_size = max(1, round(self.frame_rate))
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709

    @property
    def sample_count(self) -> int:
        """Samples taken so far, per channel."""
        return self._encoded_samples + len(self._remainder)

    def write(self, frames: np.ndarray, waveform: np.ndarray) -> None:
        """Appends a chunk; either part may be empty, and the two need not be equally long.

        Args:
          frames: [n, height, width, 3] uint8 RGB.
          waveform: [m, 2] float32 in [-1, 1] (left, right); values beyond are clipped.

        Raises:
          ValueError: wrong shape or dtype, non-finite samples, or a closed writer.
          OSError: the bytes could not be written (disk full, reader of the pipe gone). The writer
            takes nothing more; `close` then only releases it.
        """
        if self._container is None or self._failed:
            raise ValueError("the clip writer is closed" + " after an error" * self._failed)
        frames, waveform = np.asarray(frames), np.asarray(waveform)
        self._check_chunk(frames, waveform)
        try:
            self._encode_chunk(frames, np.clip(waveform, -1.0, 1.0))
        except Exception:
            self._failed = True
            raise

    def _check_chunk(self, frames: np.ndarray, waveform: np.ndarray) -> None:
        size = (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != size:
            raise ValueError(
                f"frames must be uint8 [n, {self.height}, {self.width}, 3], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if waveform.dtype != np.float32 or waveform.shape[1:] != (AUDIO_CHANNELS,):
            raise ValueError(
                f"waveform must be float32 [m, {AUDIO_CHANNELS}], "
                f"got {waveform.dtype} {list(waveform.shape)}"
            )
        if not np.isfinite(waveform).all():
            raise ValueError(
                f"waveform has {np.count_nonzero(~np.isfinite(waveform))} non-finite samples in "
                f"the chunk that starts at {self.sample_count / self.sample_rate:.2f} s"
            )

    def _encode_chunk(self, frames: np.ndarray, waveform: np.ndarray) -> None:
        """Encodes both streams merged by time, which is the order a player wants to read."""
        samples = np.concatenate([self._remainder, waveform])
        whole = len(samples) // AAC_FRAME_SAMPLES * AAC_FRAME_SAMPLES
        self._remainder = samples[whole:]
        audio_frames = samples[:whole].reshape(-1, AAC_FRAME_SAMPLES, AUDIO_CHANNELS)
        next_audio = 0
        for frame in frames:
            while (
                next_audio < len(audio_frames)
                and self._encoded_samples * self.frame_rate <= self.frame_count * self.sample_rate
            ):
                self._container.mux(self._encode_audio(audio_frames[next_audio]))
                next_audio += 1
            self._container.mux(self._encode_video(frame))
        for audio_frame in audio_frames[next_audio:]:
            self._container.mux(self._encode_audio(audio_frame))

    def _encode_video(self, pixels: np.ndarray) -> list:
        import av

        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        ranges = {"src_color_range": "JPEG", "dst_color_range": "MPEG"}
        frame = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", **ranges)
        frame.pts = self.frame_count
        frame.time_base = 1 / self.frame_rate
        self.frame_count += 1
        return self._video.encode(frame)

    def _encode_audio(self, samples: np.ndarray) -> list:
        import av

        planes = np.ascontiguousarray(samples.T)  # [2, m]
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo")
        frame.sample_rate = self.sample_rate
        frame.pts = self._encoded_samples
        frame.time_base = Fraction(1, self.sample_rate)
        self._encoded_samples += len(samples)
        return self._audio.encode(frame)

    def close(self) -> None:
        """Writes what is left and the index, and gives the file its name. Safe to call twice.

        A writer that got no data leaves no file. Warns if sound and picture end more than
        `MAX_DRIFT_SECONDS` apart, which is what a wrong `sample_rate` or `frame_rate` looks like.

        Raises:
          OSError: the rest could not be written; an existing file is then left as it was.
        """
        self._finish(replace=True)

    def _finish(self, replace: bool) -> None:
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            self._close(container, replace)
        finally:
            self.release()

    def _close(self, container, replace: bool) -> None:
        if self._failed:
            with contextlib.suppress(Exception):  # the cause was raised by `write`
                container.close()
            return
        has_data = bool(self.frame_count or self.sample_count)
        try:
            if has_data:
                if len(self._remainder):
                    container.mux(self._encode_audio(self._remainder))
                    self._remainder = self._remainder[:0]
                container.mux(self._video.encode(None))
                container.mux(self._audio.encode(None))
        finally:
            container.close()
        if replace:
            if has_data and self._open_path != self._final_path:
                os.replace(self._open_path, self._final_path)
            self._warn_of_drift()

    def _warn_of_drift(self) -> None:
        video_seconds = float(self.frame_count / self.frame_rate)
        audio_seconds = self.sample_count / self.sample_rate
        if abs(video_seconds - audio_seconds) > MAX_DRIFT_SECONDS:
            warnings.warn(
                f"the clip has {video_seconds:.2f} s of video but {audio_seconds:.2f} s of sound; "
                f"were {float(self.frame_rate):g} frames/s and {self.sample_rate} Hz right?",
                stacklevel=4,
            )

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # the first exception is the one to report
            self._finish(replace=False)
        if self._open_path is not None and self._open_path.exists():
            exc.add_note(f"the unfinished clip is in {self._open_path}")


def _muxer_options(fragment_seconds: float, seekable: bool) -> dict[str, str]:
    """Settings of the MP4 muxer for fragments that leave at once.

    delay_moov waits for the first packets, so that an edit list can drop the AAC priming samples
    and sound starts at zero. hybrid_fragmented rewrites the header on close to make the finished
    file a regular MP4. Without a small max_interleave_delta, packets of one stream wait for the
    other.
    """
    kind = "hybrid_fragmented" if seekable else "empty_moov"
    return {
        "movflags": f"+{kind}+frag_keyframe+delay_moov+default_base_moof",
        "frag_duration": str(round(fragment_seconds * 1e6)),
        "max_interleave_delta": "1000",
        "flush_packets": "1",
    }


def read_clip(path: str | os.PathLike | BinaryIO) -> tuple[np.ndarray, float, np.ndarray, int]:
    """Decodes a whole clip into memory, including one that is still being written.

    A truncated end is dropped. The waveform may end up to one AAC frame (1024 samples) after the
    sound that was written, which the encoder filled with silence.

    Args:
      path: a file, or an object that it can be read from.

    Returns:
      frames [n, H, W, 3] uint8 RGB, frames per second, waveform [m, channels] float32 and its
      sample rate in Hz ([0, 2] and 0 without sound).

    Raises:
      ValueError: the file has no video that can be decoded.
    """
    import av

    frames, pieces, frame_rate, sample_rate = [], [], 0.0, 0
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            video = container.streams.video[0]
            frame_rate = float(video.average_rate or video.guessed_rate or 0)
            audio = container.streams.audio[0] if container.streams.audio else None
            sample_rate = audio.sample_rate if audio else 0
            to_float = av.AudioResampler(format="fltp")
            for frame in container.decode([video, audio] if audio else [video]):
                if isinstance(frame, av.VideoFrame):
                    frames.append(frame.to_ndarray(format="rgb24"))
                else:
                    pieces += [piece.to_ndarray() for piece in to_float.resample(frame)]
    except (av.error.InvalidDataError, av.error.EOFError) as error:  # cut off in mid-packet
        if not frames:
            raise ValueError(f"{path} holds no video that can be decoded: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no video frames")
    waveform = np.concatenate(pieces, axis=1).T if pieces else np.zeros((0, AUDIO_CHANNELS))
    return np.stack(frames), frame_rate, waveform.astype(np.float32), sample_rate
