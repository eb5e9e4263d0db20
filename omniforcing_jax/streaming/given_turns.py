"""The part of `StreamingSession` by which pictures, clips, sound and references are given to it."""

import threading

import numpy as np

from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.streaming.chunks import Chunk, Timings
from omniforcing_jax.streaming.given import GivenMedia, unshown_blocks


class GivenTurns:
    """What a session is given is used at the next block border, and is a part of its snapshot.

    It may be given by another thread while a block is made: `_giving` is held wherever what is
    given is read and replaced.
    """

    max_blocks: int | None
    num_blocks: int
    num_frames: int
    num_samples: int

    def _start_given(self, media: GivenMedia) -> None:
        self._giving = threading.Lock()
        self._media, self._given = media, media.init()
        # blocks, frames and samples of the references that are not shown
        self._unshown, self._skip = 0, (0, 0)

    def push_audio(self, waveform: np.ndarray, rate: int) -> None:
        """The next samples of the sound that is given; see `GivenMedia.push_audio`."""
        with self._giving:
            self._given = self._media.push_audio(self._given, waveform, rate)

    def push_frames(self, frames: np.ndarray) -> None:
        """The next frames of the picture that is given; see `GivenMedia.push_frames`."""
        with self._giving:
            self._given = self._media.push_frames(self._given, frames)

    def set_image(self, pixels: np.ndarray, strength: float = 1.0) -> None:
        """The next block begins with this picture; see `GivenMedia.set_image`."""
        with self._giving:
            self._given = self._media.set_image(self._given, pixels, strength)

    def extend(self, frames: np.ndarray, waveform: np.ndarray, rate: int) -> None:
        """The stream begins with this clip, as the VAEs keep it; see `GivenMedia.extend`.

        Raises:
          RuntimeError: the stream has begun.
        """
        with self._giving:
            self._check_not_begun("goes on from a clip")
            self._given = self._media.extend(self._given, frames, waveform, rate)

    def set_reference(self, pixels: np.ndarray, waveform: np.ndarray, rate: int) -> None:
        """A face and a voice, in front of what is shown; see `GivenMedia.set_reference`.

        They are the stream's first `1 + anchors` blocks, which `num_blocks` and `max_blocks` count.
        The last frame of the face is the first one shown, so that a stream in the `prefix` layout
        has the frames and samples of any other: its block 0 is the last block of the references.

        Raises:
          RuntimeError: the stream has begun, or something was given to it.
          ValueError: `max_blocks` leaves nothing to be shown; see also `GivenMedia.set_reference`.
        """
        with self._giving:
            self._check_not_begun("is given references")
            given = self._media.set_reference(self._given, pixels, waveform, rate)
            layout = self._media.rollout.cache.layout
            unshown = unshown_blocks(layout, given.hidden)
            if self.max_blocks is not None and self.max_blocks <= unshown:
                raise ValueError(
                    f"the references are {unshown} blocks before the first that is shown, and this "
                    f"session was made for {self.max_blocks}: give a larger max_blocks"
                )
            self._given, self._unshown = given, unshown
            latents, rate = layout.num_audio_frames(given.hidden) - 1, self._media.sample_rate
            samples = latents * rate // layout.audio_latents_per_second
            samples = 0 if self._media.stream == "audio" else samples
            self._skip = layout.pixel_frames(given.hidden) - 1, samples

    def _waiting(self) -> Chunk:
        frames = np.zeros((self._media.batch, 0, *self._media.pixels, 3), np.uint8)
        waveform = np.zeros((self._media.batch, 0, 2), np.float32)
        none, place = Timings(0.0, 0.0, 0.0, 0.0, 0.0), (self.num_frames, self.num_samples)
        return Chunk(self.num_blocks - self._unshown, *place, frames, waveform, none, waiting=True)

    def _take_given(self, block: int) -> tuple[Condition | None, float]:
        """What is given of a block, and seconds of it that had not arrived and were filled."""
        with self._giving:
            given, late = self._media.fill(self._given, block)
            self._given, condition = self._media.take(given, block)
        return condition, late

    def _show_given(self, block: int, shown: int) -> np.ndarray:
        """See `GivenMedia.shown`."""
        with self._giving:
            self._given, frames = self._media.shown(self._given, block, shown)
        return frames

    def _play_given(self, block: int, played: int, *, flushed: bool) -> np.ndarray:
        """See `GivenMedia.played`."""
        with self._giving:
            self._given, waveform = self._media.played(self._given, block, played, flushed=flushed)
        return waveform

    def _check_not_begun(self, does: str) -> None:
        given = self._given
        other = given.video.size or given.audio.size or given.audio_encoder
        if given.begun or other or given.image is not None:
            raise RuntimeError(f"a session {does} before its first block and before all else")
