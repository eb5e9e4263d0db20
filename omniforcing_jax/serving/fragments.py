"""A stream as fragments of MP4 (H.264 + AAC) that a browser's MediaSource plays as they come."""

import warnings

import numpy as np

from omniforcing_jax.streaming.media import ClipWriter


class _Bytes:
    """What the muxer writes to."""

    def __init__(self):
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self.parts = b"".join(self.parts), []
        return taken


class Fragments:
    """Encodes chunks in memory. Not thread safe: one thread at a time.

    Attributes:
      codecs: as MediaSource asks for them, e.g. "avc1.64001f, mp4a.40.2"; empty until the first
        bytes are there.
    """

    def __init__(
        self,
        *,
        width: int,
        height: int,
        frame_rate: float,
        sample_rate: int,
        crf: int = 23,
        enlarge: int = 1,
    ):
        """
        Args:
          width, height: of the frames in pixels, both even.
          frame_rate, sample_rate: per second.
          crf: x264's quality, 0 to 51.
          enlarge: every pixel becomes so many by so many.

        Raises:
          ValueError: see `ClipWriter`.
        """
        self.codecs = ""
        self._target, self._enlarge = _Bytes(), enlarge
        self._writer = ClipWriter(
            self._target,
            width=width * enlarge,
            height=height * enlarge,
            frame_rate=frame_rate,
            sample_rate=sample_rate,
            crf=crf,
            preset="ultrafast",
            audio_bitrate=128_000,
            fragment_seconds=0.25,
        )

    def push(self, frames: np.ndarray, waveform: np.ndarray) -> bytes:
        """Encodes a chunk.

        Args:
          frames: [n, height, width, 3] uint8.
          waveform: [m, 2] float32 in [-1, 1].

        Returns:
          What there is to send: at first the header, then whole fragments, later ones with the rest
          of this chunk. May be empty.
        """
        frames = frames.repeat(self._enlarge, 1).repeat(self._enlarge, 2)
        self._writer.write(frames, waveform)
        return self._taken()

    def close(self) -> bytes:
        """What is left at the end of the stream; nothing may be pushed after it."""
        with warnings.catch_warnings():  # a stream that is stopped has more sound than picture
            warnings.simplefilter("ignore", UserWarning)
            self._writer.close()
        return self._taken()

    def _taken(self) -> bytes:
        data = self._target.take()
        if not self.codecs and (place := data.find(b"avcC")) >= 0:
            # version, then profile, compatibility and level (ISO/IEC 14496-15, 5.3.3.1)
            self.codecs = f"avc1.{data[place + 5 : place + 8].hex()}, mp4a.40.2"
        return data
