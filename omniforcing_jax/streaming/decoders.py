"""The two decoders of a session: a block's latents go in, its pictures and its sound come out."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from omniforcing_jax.streaming.audio import StreamingAudioDecoder, StreamingAudioState
from omniforcing_jax.streaming.block_programs import placed
from omniforcing_jax.streaming.video import StreamingVideoDecoder, StreamState


class SessionDecoders:
    """The decoders and where they are in the stream.

    Attributes:
      video, audio: the decoders.
      video_state, audio_state: theirs; replaced by each call.
    """

    video_state: StreamState
    audio_state: StreamingAudioState

    def __init__(
        self,
        video: StreamingVideoDecoder,
        audio: StreamingAudioDecoder,
        batch: int,
        pixels: tuple[int, int],
        device: Sharding | None,
    ):
        """
        Args:
          batch: B, streams.
          pixels: height and width of the frames.
          device: where the states are put; None leaves that to JAX.
        """
        self.video, self.audio = video, audio
        self._batch, self._pixels, self._device = batch, pixels, device
        self.restart()

    def restart(self) -> None:
        """Before a first block."""
        self.video_state = placed(self.video.init(self._batch, *self._pixels), self._device)
        self.audio_state = placed(self.audio.init(self._batch), self._device)

    def pictures(self, latents: jax.Array) -> jax.Array:
        """Frames [B, n, H, W, 3] of the next latents [B, f, h, w, C]."""
        self.video_state, frames = self.video.push(self.video_state, latents)
        return frames

    def sound(self, latents: jax.Array) -> jax.Array:
        """Samples [B, m, 2] of the next latents [B, t, C]."""
        self.audio_state, waveform = self.audio.push(self.audio_state, latents)
        return waveform

    def flush_pictures(self) -> jax.Array:
        """The frames that are held back; the decoder begins anew."""
        self.video_state, frames = self.video.flush(self.video_state)
        return frames

    def flush_sound(self) -> jax.Array:
        """The samples that are held back; the decoder takes no more."""
        self.audio_state, waveform = self.audio.flush(self.audio_state)
        return waveform

    def rebuild(
        self, blocks: Sequence[tuple[jax.Array, jax.Array]], latents: tuple[int, int]
    ) -> tuple[int, int]:
        """Takes a place in the stream up behind some of its blocks, what they show is left out.

        Args:
          blocks: video latents [B, f, h, w, C] and audio latents [B, t, C] of block 0 and of the
            last ones before that place.
          latents: of video and of audio that lie before it.

        Returns:
          Frames and samples from there to the end of the last block, which come out next.
        """
        self.restart()
        for video, audio in blocks:
            self.pictures(video)
            self.sound(audio)
        self.video_state = self.video_state.replace(num_latents=latents[0])
        self.audio_state = self.audio_state.replace(num_latents=latents[1])
        if not blocks:
            return 0, 0
        frames = [self.video.frames_after(latents[0], flushed) for flushed in (True, False)]
        samples = [self.audio.samples_after(latents[1], flushed) for flushed in (True, False)]
        return frames[0] - frames[1], samples[0] - samples[1]

    def snapshot(self) -> dict[str, Any]:
        """The states by name, as they are."""
        return {"video_state": self.video_state, "audio_state": self.audio_state}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes on from a `snapshot`."""
        states = (snapshot["video_state"], snapshot["audio_state"])
        self.video_state, self.audio_state = (placed(state, self._device) for state in states)
