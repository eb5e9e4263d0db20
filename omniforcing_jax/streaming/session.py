"""The live session: push a prompt, pull chunks of video and sound, block after block, without end.

    session = pipeline.session(config, "a calm sea", prompts=PromptEncoder(...), seed=0)
    for chunk in session.stream(num_blocks=None):
        play(chunk.frames, chunk.waveform)          # session.set_prompt(...) any time in between

Each block is one call of the jitted `student.block_step` on a donated cache, followed by the two
streaming decoders. Everything random follows from (seed, block index), and everything else from the
explicit state, so a session replays bit for bit and continues from a snapshot.

What is said to a stream is a `Turn`, which waits for the next block border: a prompt, a seed, a
block to go back to, a picture, a clip to go on from, a face and a voice, and the sound or the
picture where all of it is given as it arrives (see `TakesTurns`). Turns may come from any thread;
everything else is called by the one that steps.

`step` waits for its block. `begin` asks the device for it only, so that the next block can be begun
before the chunk of this one is waited for.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.streaming.ahead import BlocksAhead
from omniforcing_jax.streaming.audio import StreamingAudioDecoder
from omniforcing_jax.streaming.block_maker import BlockMaker
from omniforcing_jax.streaming.block_programs import all_finite, first_device, place_of
from omniforcing_jax.streaming.chunks import Chunk, ChunkPart, PendingBlock, Timings
from omniforcing_jax.streaming.decoders import SessionDecoders
from omniforcing_jax.streaming.encoders import StreamingAudioEncoder, StreamingVideoEncoder
from omniforcing_jax.streaming.given import GivenMedia
from omniforcing_jax.streaming.parallel import parallel
from omniforcing_jax.streaming.steering import Steering, encoded
from omniforcing_jax.streaming.turns import TakesTurns, Turn, WaitingTurn
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import AVLatents

COUNTERS = ("num_blocks", "num_made", "num_frames", "num_samples")
HOW_TO_GO_ON = "restore(snapshot) of an earlier snapshot() goes on from there, else make a new one"


class StreamingSession(TakesTurns):
    """One stream of blocks with its cache and decoders.

    Attributes:
      num_blocks: blocks generated so far, without those that a rewind took back.
      num_made: with them.
      num_frames, num_samples: pixel frames and audio samples emitted so far.
      latents: [B, T, C] of the block that was begun last, on the device; None before the first.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        config: RolloutConfig,
        video_decoder: StreamingVideoDecoder,
        audio_decoder: StreamingAudioDecoder,
        prompt: str | tuple[jax.Array, jax.Array],
        *,
        prompts: PromptEncoder | None = None,
        seed: int = 0,
        max_blocks: int | None = None,
        text_length: int | None = None,
        given: str | None = None,
        wait: bool = False,
        steerable: bool = False,
        timings: bool = False,
        video_encoder: StreamingVideoEncoder | None = None,
        audio_encoder: StreamingAudioEncoder | None = None,
        log: Callable[[Turn], None] | None = None,
    ):
        """
        Args:
          model, params: the student and its parameter tree.
          config: see `RolloutConfig`.
          video_decoder, audio_decoder: decode each block; their state is the session's.
          prompt: a sentence, which needs `prompts`, or text contexts of video and audio, each
            [B, S, text_dim].
          prompts: encodes sentences; it must be for the connectors of this model.
          seed: of all noise; a block's follows from it and the block's index.
          max_blocks: longest stream; None means without end, which needs relative positions.
          text_length: tokens to which contexts are padded, which are not attended to then: prompts
            of any length up to this one share a program. None takes contexts as they are, and
            compiles the block again for one of another length.
          given: "audio" or "video" where all of it is given by `push_audio` or `push_frames`; it
            comes out as it went in.
          wait: what a block does whose sound or frames have not arrived: it waits for them, or is
            made with silence, or the last frame. Which of both it was its `Chunk` says.
          steerable: whether it can be rewound, be told to recache, and be given fewer steps; it has
            programs of its own for that, and keeps the latents of the last blocks.
          timings: tell the parts of a block's time apart, for which each is waited for.
          video_encoder, audio_encoder: of what is given; their steps are the layout's blocks.
          log: called with each turn when it is applied, its block filled in.

        Raises:
          ValueError: text widths or batch sizes that do not fit, an endless stream with
            absolute positions, or a sentence without `prompts`.
        """
        self.config, self.max_blocks = config, max_blocks
        self.latents: AVLatents | None = None
        self._failed = False
        self._device = place_of(params)
        self._decoding = first_device(self._device)
        contexts, text_seconds = encoded(prompt, prompts)
        self._batch = contexts[0].shape[0]
        size = video_decoder.config.spatial_compression
        pixels = config.height * size, config.width * size
        self._decoders = SessionDecoders(
            video_decoder, audio_decoder, self._batch, pixels, self._decoding
        )
        how = {"batch": self._batch, "max_blocks": max_blocks, "steerable": steerable}
        self._blocks = BlockMaker(model, params, config, device=self._device, **how)
        channels = model.config.video_channels, model.config.audio_channels
        sizes = config, self._batch, channels, pixels, audio_decoder.sample_rate
        self._media = GivenMedia(*sizes, given, audio_encoder, video_encoder)
        how = {"text_seconds": text_seconds, "seed": seed, "text_length": text_length, "log": log}
        how |= {"max_blocks": max_blocks, "steerable": steerable, "device": self._device}
        self._steering = Steering(model, params, self._media, prompts, contexts, **how)
        self.num_blocks = self.num_made = self.num_frames = self.num_samples = 0
        self._wait, self._timings = wait, timings
        self._parts: list[ChunkPart] = []  # of the next chunk

    @property
    def contexts(self) -> tuple[jax.Array, jax.Array]:
        """Text contexts [B, S, text_dim] of the blocks; a prompt that waits is not there yet."""
        return self._steering.contexts

    # Turns

    def add(self, *turns: Turn) -> None:
        """Queues turns, such as those of a log, which are replayed so.

        Raises:
          ValueError: a turn for a block that is made already; and see the method of its kind.
        """
        for turn in turns:
            self._steering.add(turn, self.num_made)

    @property
    def waiting_turns(self) -> tuple[Turn, ...]:
        """What was said and is not applied yet."""
        return self._steering.waiting_turns

    @property
    def num_steps(self) -> int:
        """Denoising steps of the next block, as far as turns that are applied say."""
        return self._steering.steps

    def _apply_turns(self) -> None:
        self._steering.apply_turns(self.num_made, self._rewind)

    def _rewind(self, block: int) -> None:
        """Goes back to where block `block` is made; see `TakesTurns.rewind`."""
        layout, given = self.config.cache.layout, self._steering.given
        if given.hidden and block <= self.config.cache.anchors:
            raise ValueError(f"block {block} is one of the references")
        if given.video.size or given.audio.size:
            raise ValueError("the clip that the stream goes on from is not over yet")
        self._blocks.check_kept(block, self.num_blocks)
        with self._failing():
            if self.num_blocks:
                self._parts.append(self._flushed())
            seen = map(self._to_decoders, self._blocks.go_back(block))
            behind = [(self._unpatchify(x), x.audio) for x in seen]
            latents = layout.num_video_frames(block), layout.num_audio_frames(block)
            self._steering.skip(*self._decoders.rebuild(behind, latents))
        self.num_blocks, self._steering.recache_due = block, True

    # Blocks

    def stream(self, num_blocks: int | None = None) -> Iterator[Chunk]:
        """Yields the next `num_blocks` chunks, or chunks without end.

        With a number, the last chunk is that of `finish`, if the decoders held anything back.
        """
        made = 0
        while num_blocks is None or made < num_blocks:
            chunk = self.step()
            made += not chunk.waiting
            yield chunk
        tail = self.finish()
        if tail.frames.shape[1] or tail.waveform.shape[1]:
            yield tail

    def step(self) -> Chunk:
        """Generates and decodes the next block.

        Raises:
          FloatingPointError: the block's latents, pictures or sound are not finite.
          RuntimeError, ValueError: see `begin`.
        """
        return self.begin().chunk()

    def begin(self) -> PendingBlock:
        """Asks the device for the next block.

        A block that fails takes the cache and the decoders' state with it, as their buffers are
        reused: the session goes on only after `restore`.

        Raises:
          RuntimeError: the stream is as long as `max_blocks` allows, or an earlier step failed.
          ValueError: a turn that no longer fits, as a rewind to a block that is not kept, or sound
            of another rate in the moment in which silence took its place. It is left out, and
            the block is not begun.
        """
        self._check_whole()
        if self.max_blocks is not None and self.num_blocks >= self.max_blocks:
            raise RuntimeError(
                f"this session was made for {self.max_blocks} blocks; give a larger max_blocks, "
                "or None with relative positions"
            )
        self._apply_turns()
        with self._failing():
            return self._pending_block()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails in here ends the session."""
        try:
            yield
        except BaseException as error:
            self._failed = True
            # an earlier state would lead to numbers that are not finite again, and Ctrl-C needs no
            # advice, as it ends a program
            if isinstance(error, Exception) and not isinstance(error, FloatingPointError):
                error.add_note(f"this streaming session lost its cache: {HOW_TO_GO_ON}")
            raise

    def warm_up(
        self, on_done: Callable[[str], None] = lambda part: None, ahead: BlocksAhead | None = None
    ) -> None:
        """Compiles in parallel all that the stream will need, before its first block.

        Nothing is compiled in a block then, unless a prompt is longer or shorter (`text_length`),
        or sound has another rate than the stream and nothing of it has arrived yet. What other
        sessions have compiled is not compiled again.

        Args:
          on_done: called with the name of each part that is done.
          ahead: compiles blocks already.

        Raises:
          RuntimeError: the stream has begun.
        """
        if self.num_blocks:
            raise RuntimeError("a session is warmed up before its first block")
        self._apply_turns()
        jax.block_until_ready(self._steering.text)
        parts = {"encoders": lambda: self._media.warm_up(self._steering.given)}
        wait = ahead.wait if ahead is not None else lambda: None
        parts |= self._blocks.parts(self._steering, self._media, wait)
        decoders = self._decoders

        def blocks() -> Iterator[AVLatents]:
            return map(self._to_decoders, self._blocks.zeros())

        if self._media.stream != "video":
            parts["pictures"] = lambda: decoders.video.warm_up(
                decoders.video_state, map(self._unpatchify, blocks())
            )
        if self._media.stream != "audio":
            parts["sound"] = lambda: decoders.audio.warm_up(
                decoders.audio_state, (latents.audio for latents in blocks())
            )
        parallel(parts, on_done)

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(f"an earlier step of this session failed: {HOW_TO_GO_ON}")

    def _pending_block(self) -> PendingBlock:
        steering = self._steering
        while True:
            if self._wait and steering.late(self.num_blocks):
                return PendingBlock(0, True, self._chunk_that_waits)
            block = self.num_blocks - steering.unshown
            part, late, marks = self._next_part()
            self._parts.append(part)
            if block >= 0:  # it is no reference
                break
        parts, self._parts = self._parts, []
        text, steering.text_seconds = steering.text_seconds, 0.0

        def chunk() -> Chunk:
            with self._failing():
                return self._chunk(block, parts, late, text, marks)

        return PendingBlock(sum(part.sizes[0] for part in parts), False, chunk)

    def _chunk_that_waits(self) -> Chunk:
        place = self.num_blocks - self._steering.unshown, self.num_frames, self.num_samples
        return Chunk.that_waits(*place, self._batch, self._media.pixels)

    def _next_part(self) -> tuple[ChunkPart, float, list[float]]:
        """Asks for the next block; what is late of it, and when its parts were done."""
        marks = [time.perf_counter()]

        def mark(*values):
            if self._timings:
                jax.block_until_ready(values)
            marks.append(time.perf_counter())

        steering = self._steering
        if steering.recache_due and self.num_blocks:
            self._blocks.recache(steering, self.num_blocks)
        steering.recache_due = False
        mark(steering.text)
        condition, late = steering.take(self.num_blocks)
        latents = self._blocks.make(steering, self.num_blocks, condition, self._media)
        self.latents = latents
        mark(latents)
        decoded = self._to_decoders(latents)
        frames = self._pictures(decoded)
        mark(frames)
        waveform = self._sound(decoded)
        mark(waveform)
        finite = all_finite(latents), self._decoders.video_state.finite
        part = self._part(self.num_blocks, frames, waveform, finite)
        self.num_blocks += 1
        self.num_made += 1
        return part, late, marks

    def _part(self, block: int, frames, waveform, finite) -> ChunkPart:
        sizes = frames.shape[1], waveform.shape[1]
        place = self.num_frames, self.num_samples
        part = ChunkPart(block, place, frames, waveform, self._steering.skipped(*sizes), finite)
        self.num_frames += part.sizes[0]
        self.num_samples += part.sizes[1]
        return part

    def _chunk(
        self, block: int, parts: list[ChunkPart], late: float, text: float, marks: list[float]
    ) -> Chunk:
        """Waits for parts that the device was asked for; see `_next_part`."""
        start = time.perf_counter()
        frames, waveform, ready = self._on_host(parts)
        host = time.perf_counter() - ready
        if self._timings:
            own, *others = np.diff(marks).tolist()
            timings = Timings(text + own, *others, ready - start + host)
        else:
            timings = Timings(text, ready - start, 0.0, 0.0, marks[-1] - marks[0] + host)
        return Chunk(block, *parts[0].place, frames, waveform, timings, late)

    def _on_host(self, parts: list[ChunkPart]) -> tuple[np.ndarray, np.ndarray, float]:
        """Frames and waveform, and when the device was done with them."""
        arrays = [(part.frames, part.waveform, part.finite) for part in parts]
        jax.block_until_ready(arrays)
        ready, done = time.perf_counter(), []
        for part, (frames, waveform, finite) in zip(parts, jax.device_get(arrays), strict=True):
            self._check_finite(part.block, *finite, waveform)
            done.append(part.replace(frames=frames, waveform=waveform))
        return *ChunkPart.join(done), ready

    def _pictures(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next frames, decoded or as they were given."""
        if self._media.stream == "video":
            return self._steering.shown(self.num_blocks, self.num_frames)
        return self._decoders.pictures(self._unpatchify(latents))

    def _sound(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next samples, decoded or as they were given."""
        if self._media.stream == "audio":
            return self._steering.played(self.num_blocks, self.num_samples, flushed=False)
        return self._decoders.sound(latents.audio)

    def _check_finite(self, block: int, latents: bool, pictures: bool, waveform: np.ndarray):
        parts = {"latents": latents, "pictures": pictures, "sound": np.isfinite(waveform).all()}
        if bad := [name for name, finite in parts.items() if not finite]:
            layout, shown = self.config.cache.layout, block - self._steering.unshown
            start = layout.pixel_frames(shown) / layout.frame_rate if shown > 0 else 0.0
            place = f"block {shown} (from {start:.2f} s on)" if shown >= 0 else "the reference"
            raise FloatingPointError(
                f"{place} has {bad[0]} that are not finite: check the weights, or use float32"
            )

    def finish(self) -> Chunk:
        """Ends the stream: emits what the decoders held back. `step` must not be called after.

        Raises:
          FloatingPointError: what was held back is not finite.
          RuntimeError: a step of this session failed, and the decoders' state went with it.
        """
        self._check_whole()
        start = time.perf_counter()
        parts = [*self._parts, self._flushed()]
        frames, waveform, _ = self._on_host(parts)
        timings = Timings(0.0, 0.0, 0.0, 0.0, time.perf_counter() - start)
        return Chunk(-1, *parts[0].place, frames, waveform, timings)

    def _flushed(self) -> ChunkPart:
        """What the decoders hold back."""
        frames = self._decoders.flush_pictures()
        if self._media.stream == "audio":
            waveform = self._steering.played(self.num_blocks - 1, self.num_samples, flushed=True)
        else:
            waveform = self._decoders.flush_sound()
        finite = True, self._decoders.video_state.finite
        return self._part(self.num_blocks - 1, frames, waveform, finite)

    def _to_decoders(self, latents: AVLatents) -> AVLatents:
        """From the mesh, if there is one, to the device that decodes."""
        if self._device is self._decoding:
            return latents
        return jax.device_put(latents, self._decoding)

    def _unpatchify(self, latents: AVLatents) -> jax.Array:
        c = self.config
        return latents.video.reshape(self._batch, -1, c.height, c.width, latents.video.shape[-1])

    def snapshot(self) -> dict[str, Any]:
        """A host copy of everything the stream depends on besides weights and configuration.

        Raises:
          RuntimeError: a step of this session failed, so there is nothing to copy.
        """
        return _on_host(self._state())

    def begin_snapshot(self) -> Callable[[], dict[str, Any]]:
        """The same beside the blocks that follow: only what they overwrite is copied at once.

        Those copies are made on the device, and need its memory: about that of the cache.

        Returns:
          What waits for the state and gives the snapshot, in any thread.

        Raises:
          RuntimeError: as `snapshot`.
        """
        state = self._state()
        for name in ("cache", "video_state"):
            state[name] = jax.tree.map(_copied, state[name])
        return functools.partial(_on_host, state)

    def _state(self) -> dict[str, Any]:
        self._check_whole()
        state = self._blocks.snapshot() | self._decoders.snapshot()
        state |= {name: getattr(self, name) for name in COUNTERS}
        return state | {"parts": list(self._parts)} | self._steering.snapshot()

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continues from a `snapshot` of a session with the same weights and configuration.

        Raises:
          ValueError: the snapshot was taken with another cache configuration or batch size.
        """
        self._blocks.check_snapshot(snapshot)
        self._failed = False
        self._blocks.restore(snapshot)
        self._steering.restore(snapshot)
        self._decoders.restore(snapshot)
        self._parts = list(snapshot["parts"])
        for name in COUNTERS:
            setattr(self, name, snapshot[name])


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, jax.Array) else value


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    """A session's state as its `snapshot`."""
    return jax.device_get(state) | {"turns": tuple(map(WaitingTurn.on_host, state["turns"]))}
