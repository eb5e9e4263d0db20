"""What a stream gives out, block after block."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall seconds of a block's parts.

    `text` is nonzero for the first block of a prompt: its keys and values, and what came before
    them if the session was given a sentence.
    """

    text: float
    generate: float
    decode_video: float
    decode_audio: float
    host: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.text + self.generate + self.decode_video + self.decode_audio + self.host


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a block adds to the stream.

    Attributes:
      block: index of the block, -1 for what `finish` still holds back.
      first_frame, first_sample: where frames and waveform belong in the stream.
      frames: [B, n, H, W, 3] uint8; n may be 0 while a decoder looks ahead.
      waveform: [B, m, 2] float32 in [-1, 1].
      timings: wall seconds of the block's parts.
      late: seconds of the given sound or picture that had not arrived: the block is made with
        silence, or with the last frame again, in their place.
      waiting: whether the block was not made, as it waits for them; `step` tries again.
    """

    block: int
    first_frame: int
    first_sample: int
    frames: np.ndarray
    waveform: np.ndarray
    timings: Timings
    late: float = 0.0
    waiting: bool = False

    @classmethod
    def that_waits(
        cls,
        block: int,
        first_frame: int,
        first_sample: int,
        batch: int,
        pixels: tuple[int, int],
    ) -> "Chunk":
        """Of a block that is not made yet: without frames and samples."""
        frames = np.zeros((batch, 0, *pixels, 3), np.uint8)
        waveform = np.zeros((batch, 0, 2), np.float32)
        none = Timings(0.0, 0.0, 0.0, 0.0, 0.0)
        return cls(block, first_frame, first_sample, frames, waveform, none, waiting=True)

    def until(self, num_frames: int, num_samples: int) -> "Chunk":
        """What of it lies in the stream's first frames and samples: [B, n, ...] of smaller n."""
        frames = self.frames[:, : max(num_frames - self.first_frame, 0)]
        waveform = self.waveform[:, : max(num_samples - self.first_sample, 0)]
        return dataclasses.replace(self, frames=frames, waveform=waveform)

    def behind(self, earlier: "Chunk") -> "Chunk":
        """With what an earlier chunk showed in front of it."""
        frames = np.concatenate([earlier.frames, self.frames], axis=1)
        waveform = np.concatenate([earlier.waveform, self.waveform], axis=1)
        place = {"first_frame": earlier.first_frame, "first_sample": earlier.first_sample}
        return dataclasses.replace(self, frames=frames, waveform=waveform, **place)
