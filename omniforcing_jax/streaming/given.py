"""What is given to a stream while it runs: sound, frames and pictures, on their way to its blocks.

A turn is checked when it comes (`GivenMedia.check`) and encoded at the next block border
(`GivenMedia.apply`). The latents then wait here for the block that they belong to, and so do the
samples and frames themselves, which the stream shows as they came instead of decoding their
latents. All of it is a value, a part of the session's snapshot.
"""

import dataclasses

import numpy as np
from flax import struct

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.io.media_files import check_sample_rate
from omniforcing_jax.sampling.conditions import Condition, check_strength, first_given
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.streaming.encoders import (
    AudioEncoderState,
    StreamingAudioEncoder,
    StreamingResampler,
    StreamingVideoEncoder,
    VideoEncoderState,
)
from omniforcing_jax.streaming.turns import Turn
from omniforcing_jax.types import AVLatents

STREAMS = (None, "audio", "video")
_FRAMES_AT_A_TIME = 96


@struct.dataclass
class GivenState:
    """What was given and is not used yet; arrays are the host's.

    Attributes:
      video: [B, f, P, C] float32 latents of the next blocks; `audio`: [B, t, C].
      last_frame: [B, 1, H, W, 3] uint8 that was given last, black before the first.
      image: [B, P, C] first latent of the next block, or None; `strength`: how far it is kept.
      audio_encoder, video_encoder: of the sound and the frames that arrive; None before the first.
      resampled: state of the resampling to the stream's rate.
      waveform: pieces [B, n, 2] float32 of the samples to be played.
      frames: pieces [B, n, H, W, 3] uint8 of the frames to be shown.
      hidden: blocks at the stream's beginning that are references and not shown, but for the very
        last frame.
      skip: frames and samples of them that are not made yet; they are made, and not shown.
      begun: whether a block was taken.
    """

    video: np.ndarray
    audio: np.ndarray
    last_frame: np.ndarray
    waveform: tuple[np.ndarray, ...] = ()
    frames: tuple[np.ndarray, ...] = ()
    image: np.ndarray | None = None
    strength: float = 1.0
    audio_encoder: AudioEncoderState | None = None
    video_encoder: VideoEncoderState | None = None
    resampled: np.ndarray | None = None
    hidden: int = 0
    skip: tuple[int, int] = (0, 0)
    begun: bool = False

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was given and no block taken."""
        given = self.video.size or self.audio.size or self.audio_encoder
        return not (given or self.begun or self.image is not None)


@dataclasses.dataclass(frozen=True)
class GivenMedia:
    """Turns what is given into the blocks' conditions.

    Attributes:
      rollout: how blocks are generated.
      batch: B, streams.
      channels: of the video and of the audio latents.
      pixels: height and width of the frames.
      sample_rate: of the stream, Hz.
      stream: "audio" or "video" where all of it is given as it arrives, else None.
      audio_encoder, video_encoder: None where they were not loaded.

    Raises:
      ValueError: another stream, or one whose encoder was not loaded.
    """

    rollout: RolloutConfig
    batch: int
    channels: tuple[int, int]
    pixels: tuple[int, int]
    sample_rate: int
    stream: str | None
    audio_encoder: StreamingAudioEncoder | None
    video_encoder: StreamingVideoEncoder | None

    def __post_init__(self):
        if self.stream not in STREAMS:
            raise ValueError(f"given must be one of {STREAMS}, not {self.stream!r}")
        if self.stream is not None:
            self._encoder(self.stream)

    def _encoder(self, stream: str):
        encoder = self.audio_encoder if stream == "audio" else self.video_encoder
        if encoder is None:
            raise ValueError(
                f"the {stream} encoder was not loaded: use load_pipeline(..., encoders=True)"
            )
        return encoder

    def init(self) -> GivenState:
        """Nothing is given yet."""
        batch, (height, width) = self.batch, self.pixels
        return GivenState(
            np.zeros((batch, 0, self.rollout.patches, self.channels[0]), np.float32),
            np.zeros((batch, 0, self.channels[1]), np.float32),
            np.zeros((batch, 1, height, width, 3), np.uint8),
        )

    # What a user gives

    def check(self, turn: Turn) -> None:
        """Raises ValueError for a turn that these streams cannot be given."""
        given, payload = self.stream, turn.payload
        if turn.kind == "audio" and given != "audio":
            raise ValueError("the sound of this session is generated: make it with given='audio'")
        if turn.kind == "frames" and given != "video":
            raise ValueError("the picture of this session is generated: make it with given='video'")
        if turn.kind == "image" and given == "video":
            raise ValueError("the picture of this session is given as a whole by push_frames")
        if turn.kind == "clip" and given is not None:
            raise ValueError(f"a clip goes on in picture and sound, but the {given} is given")
        if turn.kind == "reference" and given == "video":
            raise ValueError("a reference is for a picture that is generated, and it is given")
        if "frames" in payload:
            self._encoder("video")
            self._check_frames(payload["frames"])
        if "pixels" in payload:
            self._encoder("video")
            self._check_pixels(payload["pixels"])
        if "waveform" in payload:
            self._encoder("audio")
            shape = np.shape(payload["waveform"])
            if len(shape) != 3 or shape[::2] != (self.batch, 2):
                raise ValueError(f"a waveform is [{self.batch}, n, 2], not {list(shape)}")
            check_sample_rate(payload["rate"])
        check_strength(payload.get("strength", 1.0))

    def apply(self, state: GivenState, turn: Turn) -> GivenState:
        """The state behind a turn that was checked."""
        functions = {
            "audio": self.push_audio,
            "frames": self.push_frames,
            "image": self.set_image,
            "clip": self.extend,
            "reference": self.set_reference,
        }
        return functions[turn.kind](state, **turn.payload)

    def push_audio(self, state: GivenState, waveform: np.ndarray, rate: int) -> GivenState:
        """The next samples [B, n, 2] float32 in [-1, 1] at `rate` Hz; ValueError at another."""
        resampler, encoder = StreamingResampler(rate, self.sample_rate), self.audio_encoder
        if state.audio_encoder is None:
            began = {
                "audio_encoder": encoder.init(self.batch, rate),
                "resampled": resampler.init(self.batch),
            }
            state = state.replace(**began)
        check_same_rate(state.audio_encoder.sample_rate, rate)
        encoded, latents = encoder.push(state.audio_encoder, waveform)
        if state.hidden and state.audio_encoder.num_latents == 0:
            latents = latents[:, 1:]  # it stands for the very beginning, where the references end
        resampled, played = resampler.push(state.resampled, waveform)
        return state.replace(
            audio_encoder=encoded,
            resampled=resampled,
            audio=np.concatenate([state.audio, latents], axis=1),
            waveform=(*state.waveform, played),
        )

    def push_frames(self, state: GivenState, frames: np.ndarray) -> GivenState:
        """The next frames [B, n, H, W, 3] uint8."""
        encoded = state.video_encoder
        if encoded is None:
            encoded = self.video_encoder.init(self.batch, *self.pixels)
        encoded, tokens = self._encode(encoded, frames)
        return state.replace(
            video_encoder=encoded,
            video=np.concatenate([state.video, tokens], axis=1),
            frames=(*state.frames, frames),
            last_frame=frames[:, -1:].copy(),
        )

    def set_image(self, state: GivenState, pixels: np.ndarray, strength: float) -> GivenState:
        """The next block begins with this picture [H, W, 3] float32 in [-1, 1] (`fit_pixels`).

        A stream that has begun shows it for as long as a latent lasts.
        """
        still = self._still(pixels, 2 if state.begun or state.hidden else 1)
        return state.replace(image=still[:, -1], strength=float(strength))

    def extend(
        self, state: GivenState, frames: np.ndarray, waveform: np.ndarray, rate: int
    ) -> GivenState:
        """The stream begins with this clip and goes on from it.

        Args:
          frames: [B, n, H, W, 3] uint8; of n = 8 k + 1 + r frames the last r are left out.
          waveform: [B, m, 2] float32 at `rate` Hz, of which what lies behind them is left out.
        """
        step, rates = self.rollout.cache.layout, self.rollout.cache.layout.frame_rate
        whole = (frames.shape[1] - 1) // step.temporal_compression * step.temporal_compression + 1
        video = self._encoded_frames(frames[:, :whole])
        seconds = whole / rates
        latents = 1 + int(seconds * step.audio_latents_per_second - 0.25)  # they end by then
        return state.replace(video=video, audio=self._encoded_sound(waveform, rate, latents))

    def set_reference(
        self, state: GivenState, pixels: np.ndarray, waveform: np.ndarray, rate: int
    ) -> GivenState:
        """Block 0 and the anchors show this face and speak with this voice, before the stream.

        Args:
          pixels: [H, W, 3] float32 in [-1, 1].
          waveform: [B, m, 2] float32 at `rate` Hz; what is missing is silence.
        """
        layout, hidden = self.rollout.cache.layout, 1 + self.rollout.cache.anchors
        video = self._still(pixels, layout.num_video_frames(hidden))
        audio = self._encoded_sound(waveform, rate, layout.num_audio_frames(hidden))
        latents = layout.num_audio_frames(hidden) - 1  # the last frame is shown
        samples = (
            0 if self.stream else latents * self.sample_rate // layout.audio_latents_per_second
        )
        skip = layout.pixel_frames(hidden) - 1, samples
        return state.replace(video=video, audio=audio, hidden=hidden, skip=skip)

    # What a block needs

    def late(self, state: GivenState, block: int) -> int:
        """Samples or frames that have not arrived and that a block of the given stream needs."""
        layout = self.rollout.cache.layout
        if self.stream == "audio" and state.audio.shape[1] < layout.audio_frames_in(block):
            encoded = state.audio_encoder
            if encoded is None:
                return 1  # not even its rate is known
            num_latents = layout.num_audio_frames(block + 1)
            if state.hidden:
                num_latents += 1 - layout.num_audio_frames(state.hidden)
            have = encoded.first_sample + encoded.samples.shape[1]
            return self.audio_encoder.samples_for(num_latents, encoded.sample_rate) - have
        if self.stream == "video" and state.video.shape[1] < layout.video_frames_in(block):
            have = 0 if state.video_encoder is None else state.video_encoder.num_latents
            waiting = 0 if state.video_encoder is None else state.video_encoder.frames.shape[1]
            have = 0 if not have else 1 + (have - 1) * layout.temporal_compression
            return layout.pixel_frames(block + 1) - have - waiting
        return 0

    def fill(self, state: GivenState, block: int) -> tuple[GivenState, float]:
        """Silence, or the last frame again (black, if there is none), for what is late; seconds."""
        count = self.late(state, block)
        if not count:
            return state, 0.0
        if self.stream == "audio":
            rate = self.sample_rate
            if state.audio_encoder is None:  # from now on at the stream's own rate
                nothing = np.zeros((self.batch, 0, 2), np.float32)
                state = self.push_audio(state, nothing, rate)
                count = self.late(state, block)
            rate = state.audio_encoder.sample_rate
            silence = np.zeros((self.batch, count, 2), np.float32)
            return self.push_audio(state, silence, rate), count / rate
        shape = (self.batch, count, *self.pixels, 3)
        state = self.push_frames(state, np.broadcast_to(state.last_frame, shape))
        return state, count / self.rollout.cache.layout.frame_rate

    def take(self, state: GivenState, block: int) -> tuple[GivenState, Condition | None]:
        """What is given of a block, and what then still waits; None is nothing."""
        layout, patches = self.rollout.cache.layout, self.rollout.patches
        state = state.replace(begun=True)
        sizes = layout.video_frames_in(block), layout.audio_frames_in(block)
        given = state.video[:, : sizes[0]], state.audio[:, : sizes[1]]
        counts = given[0].shape[1], given[1].shape[1]
        if self.stream is None and state.image is None and counts == (0, 0):
            return state, None
        video, audio = (
            np.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            for x, size in zip(given, sizes, strict=True)
        )
        masks = [first_given(*pair) for pair in zip(sizes, counts, strict=True)]
        is_hidden = block < state.hidden
        if state.image is not None and not is_hidden:
            video[:, 0] = state.image
            masks[0][0] = np.float32(1.0) - np.float32(state.strength)
        clean = AVLatents(video.reshape(self.batch, sizes[0] * patches, -1), audio)
        frozen = AVLatents(*(np.array([self.stream == name]) for name in ("video", "audio")))
        condition = Condition(clean, AVLatents(*(mask[None] for mask in masks)), frozen)
        state = state.replace(
            video=state.video[:, counts[0] :],
            audio=state.audio[:, counts[1] :],
            image=state.image if is_hidden else None,
        )
        return state, condition

    def kinds(self, state: GivenState, *, first: bool) -> list[Condition | None]:
        """Conditions of the first block, or of all others, one for each program that they need."""
        found, block, waits = {}, 0, True
        while waits or block < 2:
            waits = bool(state.video.size or state.audio.size or state.image is not None)
            state, condition = self.take(state, block)
            if first == (block == 0):
                found.setdefault((condition is None, is_whole(condition)), condition)
            block += 1
        return list(found.values())

    def programs(self, state: GivenState, *, first: bool) -> list[Condition | None]:
        """`kinds`, and what a picture would need that is given later."""
        kinds = self.kinds(state, first=first)
        begins_given = first and state.video.size
        if self.video_encoder is not None and self.stream != "video" and not begins_given:
            image = np.zeros((self.batch, self.rollout.patches, self.channels[0]), np.float32)
            block = 0 if first else 1
            pictured = self.init().replace(image=image)
            if self.stream == "audio":  # with it a block may be given as a whole
                pictured = pictured.replace(audio=self.generated(block).clean.audio)
            kinds.append(self.take(pictured, block)[1])
        return list({(kind is None, is_whole(kind)): kind for kind in kinds}.values())

    def warm_up(self, state: GivenState) -> None:
        """Compiles the encoders of what may arrive while the stream runs.

        Sound of which nothing has arrived is expected at the stream's own rate.
        """
        layout = self.rollout.cache.layout
        if self.stream == "audio":
            began = state.audio_encoder
            rate = self.sample_rate if began is None else began.sample_rate
            count = self.audio_encoder.samples_for(1 + layout.audio_frames, rate)
            self.push_audio(self.init(), np.zeros((self.batch, count, 2), np.float32), rate)
        if self.stream == "video":
            shape = (self.batch, 1 + layout.video_frames * layout.temporal_compression)
            self.push_frames(self.init(), np.zeros((*shape, *self.pixels, 3), np.uint8))
        elif self.video_encoder is not None:
            self._still(np.zeros((*self.pixels, 3), np.float32), 2)

    def generated(self, block: int) -> Condition:
        """A block of which nothing is given."""
        layout = self.rollout.cache.layout
        frames = layout.video_frames_in(block), layout.audio_frames_in(block)
        tokens = frames[0] * self.rollout.patches, frames[1]
        clean = (
            np.zeros((self.batch, *size), np.float32)
            for size in zip(tokens, self.channels, strict=True)
        )
        masks = (np.ones((1, count), np.float32) for count in frames)
        frozen = AVLatents(np.zeros(1, bool), np.zeros(1, bool))
        return Condition(AVLatents(*clean), AVLatents(*masks), frozen)

    # What the stream shows of it

    def played(
        self, state: GivenState, block: int, played: int, *, flushed: bool
    ) -> tuple[GivenState, np.ndarray]:
        """The next samples [B, n, 2], up to the end of a block; `played` came before."""
        layout, rate = self.rollout.cache.layout, self.sample_rate
        latents = layout.num_audio_frames(block + 1) - 1
        if state.hidden:
            latents += 1 - layout.num_audio_frames(state.hidden)
        count = latents * rate // layout.audio_latents_per_second - played
        if flushed:  # what the first latent lasts, a mel frame
            count += rate // (4 * layout.audio_latents_per_second)
        count, pieces = max(count, 0), state.waveform
        if flushed and state.resampled is not None:
            resampler = StreamingResampler(state.audio_encoder.sample_rate, rate)
            pieces = (*pieces, resampler.flush(state.resampled))
        taken, pieces = _first(pieces, count)
        waveform = np.zeros((self.batch, count, 2), np.float32)
        if taken:  # silence behind them
            np.concatenate(taken, axis=1, out=waveform[:, : sum(x.shape[1] for x in taken)])
        return state.replace(waveform=pieces), waveform

    def shown(self, state: GivenState, block: int, shown: int) -> tuple[GivenState, np.ndarray]:
        """The next frames [B, n, H, W, 3], up to the end of a block; `shown` came before."""
        count = self.rollout.cache.layout.pixel_frames(block + 1) - shown
        taken, pieces = _first(state.frames, count)
        frames = np.concatenate([state.last_frame[:, :0], *taken], axis=1)
        return state.replace(frames=pieces), frames

    # Encoding

    def _check_frames(self, frames: np.ndarray) -> None:
        size = (self.batch, *self.pixels, 3)
        right = frames.ndim == 5 and (frames.shape[0], *frames.shape[2:]) == size
        if not right or frames.dtype != np.uint8 or not frames.shape[1]:
            raise ValueError(
                f"this session takes uint8 frames [{self.batch}, n, {self.pixels[0]}, "
                f"{self.pixels[1]}, 3], not {frames.dtype} {list(frames.shape)}"
            )

    def _tokens(self, latents) -> np.ndarray:
        return np.asarray(latents).reshape(
            latents.shape[0], -1, self.rollout.patches, self.channels[0]
        )

    def _encoded_frames(self, frames: np.ndarray) -> np.ndarray:
        state = self.video_encoder.init(frames.shape[0], *self.pixels)
        state, tokens = self._encode(state, frames)
        return np.concatenate([tokens, self._tokens(self.video_encoder.flush(state)[1])], axis=1)

    def _encode(
        self, state: VideoEncoderState, frames: np.ndarray
    ) -> tuple[VideoEncoderState, np.ndarray]:
        """The next frames' latents [B, f, P, C]; only a few frames at a time become float32."""
        tokens = []
        for start in range(0, frames.shape[1], _FRAMES_AT_A_TIME):
            some = frames[:, start : start + _FRAMES_AT_A_TIME]
            state, latents = self.video_encoder.push(state, _signed(some))
            tokens.append(self._tokens(latents))
        return state, np.concatenate(tokens, axis=1)

    def _check_pixels(self, pixels: np.ndarray) -> None:
        if pixels.shape != (*self.pixels, 3):
            raise ValueError(
                f"this session takes pictures {[*self.pixels, 3]}, not {list(pixels.shape)}: see "
                "fit_pixels"
            )

    def _still(self, pixels: np.ndarray, latents: int) -> np.ndarray:
        """[B, f, P, C] latents of a picture that stands still."""
        compression = self.rollout.cache.layout.temporal_compression
        count = 1 + (latents - 1) * compression
        encoded = self._encoded_frames(np.broadcast_to(pixels, (1, count, *pixels.shape)))
        return np.repeat(encoded, self.batch, axis=0)

    def _encoded_sound(self, waveform: np.ndarray, rate: int, latents: int) -> np.ndarray:
        """[B, t, C], with silence behind a shorter sound."""
        return np.asarray(self.audio_encoder.encode(waveform, rate, latents))


def unshown_blocks(layout: BlockLayout, hidden: int) -> int:
    """Blocks before the first one that is shown, of which `hidden` are references.

    The references' last frame is shown. It is a block of its own, or belongs to the next one, as
    the first frame of any stream in this layout.
    """
    return hidden - (layout.first_video_frames == 1) if hidden else 0


def is_whole(condition: Condition | None) -> bool:
    """Whether all of a block is given."""
    return condition is not None and not any(
        np.any(mask) for mask in (condition.mask.video, condition.mask.audio)
    )


def check_same_rate(began: int, rate: int) -> None:
    """Raises ValueError unless sound goes on at the rate at which it began."""
    if began != rate:
        raise ValueError(f"this sound began at {began} Hz; the rest must be so, not {rate} Hz")


def _first(
    pieces: tuple[np.ndarray, ...], count: int
) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """The first `count` of pieces [B, n, ...], and what is behind them; nothing is copied."""
    taken = []
    while count and pieces:
        piece, *rest = pieces
        taken.append(piece[:, :count])
        behind = piece[:, count:]
        pieces = (behind, *rest) if behind.shape[1] else tuple(rest)
        count -= taken[-1].shape[1]
    return taken, pieces


def _signed(frames: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]; what is float32 stays."""
    if frames.dtype == np.float32:
        return frames
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
