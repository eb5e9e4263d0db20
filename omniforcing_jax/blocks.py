"""Macro-blocks: how video and audio latents are grouped in time, and the masks that follow.

One block holds the same stretch of time in both modalities (one second at 24 frames per second:
3 video latents, 25 audio latents). Two layouts exist:

* `prefix` (OmniForcing, Eq. 2-3): block 0 is the global prefix of 1 video and 1 audio latent, every
  later block holds 3 and 25: N_v = 1 + 3K, N_a = 1 + 25K.
* `merged` (the public weights): the prefix is merged with the first block: 4-3-3-… and 26-25-25-….

Sink tokens, where present, stand in front of the audio sequence and belong to block 0.

Everything here is host arithmetic on Python integers and numpy arrays: layouts are static under
`jax.jit` and the arrays become compile-time constants.
"""

import dataclasses
from typing import NamedTuple, Self

import numpy as np

VIDEO_FRAMES_PER_BLOCK = 3
LAYOUT_NAMES = ("prefix", "merged")


class Masks(NamedTuple):
    """The four attention masks of Eq. 4-5: bool [queries, keys], True where attention is allowed.

    `a2v` has video queries and audio keys (audio informs video), `v2a` the reverse.
    """

    video: np.ndarray
    audio: np.ndarray
    a2v: np.ndarray
    v2a: np.ndarray


class KvEnds(NamedTuple):
    """The same four masks as row ends: int32 [queries]; row q attends to keys [0, kv_end[q])."""

    video: np.ndarray
    audio: np.ndarray
    a2v: np.ndarray
    v2a: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Frames per block of both modalities.

    Frame counts are latents. Sink tokens, of which the model's config says how many there are,
    precede the audio frames; they are no frames, so only methods that speak of tokens count them.
    Block indices start at 0, and `num_blocks` always counts block 0.

    Attributes:
      first_video_frames: video latents in block 0.
      video_frames: video latents in every later block.
      first_audio_frames: audio latents in block 0.
      audio_frames: audio latents in every later block.
      name: `prefix` or `merged`; free for layouts built by hand.
      temporal_compression: pixel frames per video latent (the first latent holds one frame).
      audio_latents_per_second: rate of the audio latents.

    Raises:
      ValueError: a count is not a positive integer.
    """

    first_video_frames: int
    video_frames: int
    first_audio_frames: int
    audio_frames: int
    name: str = "custom"
    temporal_compression: int = 8
    audio_latents_per_second: int = 25

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be an integer >= 1, got {value!r}")

    # Constructors

    @classmethod
    def prefix(cls, *, frame_rate: float = 24.0) -> Self:
        """The paper's layout: 1-3-3-… video and 1-25-25-… audio latents."""
        return cls.from_name("prefix", frame_rate=frame_rate)

    @classmethod
    def merged(cls, *, frame_rate: float = 24.0) -> Self:
        """The layout of the public weights: 4-3-3-… video and 26-25-25-… audio latents."""
        return cls.from_name("merged", frame_rate=frame_rate)

    @classmethod
    def from_name(cls, name: str, *, frame_rate: float = 24.0) -> Self:
        """Builds a layout for a frame rate.

        A block holds 3 video latents whatever the rate; the audio latents of the same stretch of
        time (25 at 24 frames per second, 24 at 25, 20 at 30) must be a whole number.

        Args:
          name: `prefix` or `merged`.
          frame_rate: pixel frames per second.

        Raises:
          ValueError: unknown name, or a frame rate that splits an audio latent between blocks (the
            message lists the rates that do not).
        """
        if name not in LAYOUT_NAMES:
            raise ValueError(f"unknown block layout {name!r}; known layouts: {LAYOUT_NAMES}")
        # audio_frames = ticks / frame_rate
        ticks = VIDEO_FRAMES_PER_BLOCK * cls.temporal_compression * cls.audio_latents_per_second
        if (
            not 0.01 <= frame_rate <= 1000
            or round(frame_rate * round(ticks / frame_rate), 6) != ticks
        ):
            rates = [rate for rate in range(1, 121) if ticks % rate == 0]
            raise ValueError(
                f"at {frame_rate:g} frames per second a block of {VIDEO_FRAMES_PER_BLOCK} video "
                "latents does not hold a whole number of audio latents; whole-number frame rates "
                f"up to 120 that do: {', '.join(map(str, rates))}"
            )
        audio_frames = round(ticks / frame_rate)
        prefix = name == "prefix"
        return cls(
            first_video_frames=1 if prefix else 1 + VIDEO_FRAMES_PER_BLOCK,
            video_frames=VIDEO_FRAMES_PER_BLOCK,
            first_audio_frames=1 if prefix else 1 + audio_frames,
            audio_frames=audio_frames,
            name=name,
        )

    # Time

    @property
    def frame_rate(self) -> float:
        """Pixel frames per second: a block lasts equally long in both modalities."""
        return self.video_frames * self.temporal_compression / self.block_seconds

    @property
    def block_seconds(self) -> float:
        """Duration of every block but the first, in seconds."""
        return self.audio_frames / self.audio_latents_per_second

    def pixel_frames(self, num_blocks: int) -> int:
        """Pixel frames of `num_blocks` blocks; the first latent decodes to a single frame."""
        return 1 + self.temporal_compression * (self.num_video_frames(num_blocks) - 1)

    def blocks_for_seconds(self, seconds: float) -> int:
        """Smallest number of blocks whose video lasts at least `seconds`.

        Raises:
          ValueError: `seconds` is not positive.
        """
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        # Rounding keeps 0.1 s * 10 from asking for one block more.
        frames = int(np.ceil(round(seconds * self.frame_rate, 6)))
        latents = 1 + -(-(frames - 1) // self.temporal_compression)
        missing = max(latents - self.first_video_frames, 0)
        return 1 + -(-missing // self.video_frames)

    # Sizes and starts of blocks

    def video_frames_in(self, block: int) -> int:
        """Video latents in block `block`."""
        return self.first_video_frames if block == 0 else self.video_frames

    def audio_frames_in(self, block: int) -> int:
        """Audio latents in block `block`, sinks not counted."""
        return self.first_audio_frames if block == 0 else self.audio_frames

    def num_video_frames(self, num_blocks: int) -> int:
        """Video latents in the first `num_blocks` blocks (Eq. 2): where the next one begins."""
        return self.first_video_frames + (num_blocks - 1) * self.video_frames if num_blocks else 0

    def num_audio_frames(self, num_blocks: int) -> int:
        """Audio latents in the first `num_blocks` blocks, sinks not counted (Eq. 2)."""
        return self.first_audio_frames + (num_blocks - 1) * self.audio_frames if num_blocks else 0

    # Block indices, tau of Eq. 3

    def block_of_video_frame(self, frame) -> np.ndarray:
        """Block index of video latents: int array in, int array of the same shape out (Eq. 3)."""
        return _block_of(frame, self.first_video_frames, self.video_frames)

    def block_of_audio_frame(self, frame) -> np.ndarray:
        """Block index of audio latents, sinks not counted (Eq. 3)."""
        return _block_of(frame, self.first_audio_frames, self.audio_frames)

    def video_token_blocks(self, num_frames: int, patches: int) -> np.ndarray:
        """Block index of every video token, `patches` tokens per latent: int32 [F * P]."""
        return np.repeat(self.block_of_video_frame(np.arange(num_frames)), patches)

    def audio_token_blocks(self, num_frames: int, num_sinks: int = 0) -> np.ndarray:
        """Block index of every audio token, the sinks first as block 0: int32 [sinks + frames]."""
        sinks = np.zeros(num_sinks, np.int32)
        return np.concatenate([sinks, self.block_of_audio_frame(np.arange(num_frames))])

    # Masks

    def masks(
        self, num_video_frames: int, num_audio_frames: int, patches: int, num_sinks: int = 0
    ) -> Masks:
        """Dense masks tau(k) <= tau(q) (Eq. 4-5); memory grows with tokens squared.

        Args:
          num_video_frames: video latents; the last block may be partial.
          num_audio_frames: audio latents without sinks; the last block may be partial.
          patches: tokens per video latent.
          num_sinks: sink tokens in front of the audio.

        Returns:
          Four bool arrays [queries, keys]; sinks take the first audio rows and columns.
        """
        video = self.video_token_blocks(num_video_frames, patches)  # [T_v]
        audio = self.audio_token_blocks(num_audio_frames, num_sinks)  # [T_a]

        def mask(query: np.ndarray, key: np.ndarray) -> np.ndarray:
            return key[None, :] <= query[:, None]

        return Masks(
            video=mask(video, video),
            audio=mask(audio, audio),
            a2v=mask(video, audio),
            v2a=mask(audio, video),
        )

    def kv_ends(
        self, num_video_frames: int, num_audio_frames: int, patches: int, num_sinks: int = 0
    ) -> KvEnds:
        """The masks as row ends, which is all an attention kernel needs.

        Tokens are ordered by block, so the keys a row may see are always a prefix of the sequence.

        Args: as for `masks`.

        Returns:
          Four int32 arrays [queries] with `mask[q] == (arange(keys) < kv_end[q])`.
        """
        video = self.video_token_blocks(num_video_frames, patches)  # [T_v]
        audio = self.audio_token_blocks(num_audio_frames, num_sinks)  # [T_a]

        def ends(query: np.ndarray, key: np.ndarray) -> np.ndarray:
            return np.searchsorted(key, query, side="right").astype(np.int32)

        return KvEnds(
            video=ends(video, video),
            audio=ends(audio, audio),
            a2v=ends(video, audio),
            v2a=ends(audio, video),
        )


def _block_of(frame, first: int, later: int) -> np.ndarray:
    frame = np.asarray(frame)
    # Floor division makes every frame of block 0 zero or negative.
    return np.maximum(0, 1 + (frame - first) // later).astype(np.int32)
