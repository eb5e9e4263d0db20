"""What a stream gives out, block after block."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall seconds of a block's parts.

    `text` is nonzero for the first block of a prompt: its keys and values, and what came before
    them if the session was given a sentence. `host` is what was not spent on waiting for the
    device. Its parts are told apart only where a session has `timings`, as they cost a
    synchronisation each; elsewhere `generate` is all waiting.
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


@dataclasses.dataclass(frozen=True)
class PendingBlock:
    """A block that the device was asked for and may still be making.

    Attributes:
      num_frames: that its chunk has.
      waiting: whether it was not begun, as it waits for what is given.
      chunk: waits for it, and copies it to the host; to be called once, in the order of the blocks.
        Raises FloatingPointError if latents, pictures or sound are not finite.
    """

    num_frames: int
    waiting: bool
    chunk: Callable[[], Chunk]


@struct.dataclass
class ChunkPart:
    """What a block, or the end of a course that is rewound, adds to a chunk.

    Attributes:
      block: by which it was made.
      place: frames and samples of the stream before it.
      frames: [B, n, H, W, 3] uint8, and waveform: [B, m, 2] float32; on the device, as a rule.
      skip: frames and samples of their beginnings that are not shown.
      finite: [] boolean, whether its latents, and its pictures, are numbers.
    """

    block: int
    place: tuple[int, int]
    frames: jax.Array | np.ndarray
    waveform: jax.Array | np.ndarray
    skip: tuple[int, int]
    finite: tuple[jax.Array | bool, jax.Array | bool]

    @property
    def sizes(self) -> tuple[int, int]:
        """Frames and samples that are shown."""
        return self.frames.shape[1] - self.skip[0], self.waveform.shape[1] - self.skip[1]

    @staticmethod
    def join(parts: list["ChunkPart"]) -> tuple[np.ndarray, np.ndarray]:
        """Frames and waveform of parts on the host."""
        frames = [part.frames[:, part.skip[0] :] for part in parts]
        waveform = [part.waveform[:, part.skip[1] :] for part in parts]
        if len(parts) == 1:
            return frames[0], waveform[0]
        return np.concatenate(frames, axis=1), np.concatenate(waveform, axis=1)
