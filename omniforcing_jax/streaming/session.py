"""The live session: push a prompt, pull chunks of video and sound, block after block, without end.

    session = pipeline.session(config, "a calm sea", prompts=PromptEncoder(...), seed=0)
    for chunk in session.stream(num_blocks=None):
        play(chunk.frames, chunk.waveform)          # session.set_prompt(...) any time in between

Each block is one call of the jitted `student.block_step` on a donated cache, followed by the two
streaming decoders. Everything random follows from (seed, block index), and everything else from the
explicit state, so a session replays bit for bit and continues from a snapshot.

What is said to a stream is a `Turn`, which waits for the next block border: a prompt, a seed, a
picture, a clip to go on from, a face and a voice, and the sound or the picture where all of it is
given as it arrives (`set_prompt`, `set_seed`, `set_image`, `extend`, `set_reference`, `push_audio`,
`push_frames`). Turns may come from any thread; everything else is called by the one that steps.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.streaming.audio import StreamingAudioDecoder
from omniforcing_jax.streaming.block_programs import (
    all_finite,
    block_program,
    fills_cache,
    latent_shapes,
    on_device,
    write_block,
    written_anew,
)
from omniforcing_jax.streaming.chunks import Chunk, Timings
from omniforcing_jax.streaming.encoders import StreamingAudioEncoder, StreamingVideoEncoder
from omniforcing_jax.streaming.given import GivenMedia, is_whole
from omniforcing_jax.streaming.parallel import parallel
from omniforcing_jax.streaming.steering import Steering, encoded
from omniforcing_jax.streaming.turns import Turn
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import AVLatents

HOW_TO_GO_ON = "restore(snapshot) of an earlier snapshot() goes on from there, else make a new one"


class StreamingSession:
    """One stream of blocks with its cache and decoders.

    Attributes:
      num_blocks: blocks generated so far.
      num_frames, num_samples: pixel frames and audio samples emitted so far.
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
          video_encoder, audio_encoder: of what is given; their steps are the layout's blocks.
          log: called with each turn when it is applied, its block filled in.

        Raises:
          ValueError: text widths or batch sizes that do not fit, an endless stream with
            absolute positions, or a sentence without `prompts`.
        """
        self.config, self.max_blocks = config, max_blocks
        self._failed = False
        self._model, self._params = model, params
        self._video_decoder, self._audio_decoder = video_decoder, audio_decoder
        self._rope = config.rope(model, max_blocks)
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        self._device = sharding if isinstance(sharding, SingleDeviceSharding) else None
        contexts, text_seconds = encoded(prompt, prompts)
        self._batch = contexts[0].shape[0]
        size = video_decoder.config.spatial_compression
        pixels = config.height * size, config.width * size
        self._media = GivenMedia(
            config,
            self._batch,
            (model.config.video_channels, model.config.audio_channels),
            pixels,
            audio_decoder.sample_rate,
            given,
            audio_encoder,
            video_encoder,
        )
        self._steering = Steering(
            model,
            params,
            self._media,
            prompts,
            contexts,
            text_seconds=text_seconds,
            seed=seed,
            text_length=text_length,
            max_blocks=max_blocks,
            device=self._device,
            log=log,
        )
        self.num_blocks = self.num_frames = self.num_samples = 0
        self._cache = student.new_cache(model, config, self._batch, params)
        self._video_state = video_decoder.init(self._batch, *pixels)
        self._audio_state = audio_decoder.init(self._batch)
        self._wait = wait
        self._held: dict[int, Condition] = {}  # blocks of the cache by index, for `recache`

    @property
    def contexts(self) -> tuple[jax.Array, jax.Array]:
        """Text contexts [B, S, text_dim] of the blocks; a prompt that waits is not there yet."""
        return self._steering.contexts

    # Turns

    def set_prompt(self, prompt: str | tuple[jax.Array, jax.Array]) -> None:
        """Changes the prompt from the next block on; what was generated stays in the cache.

        With `RolloutConfig.recache` it is written anew there, under the new prompt.

        Args:
          prompt: as in the constructor. A sentence that is not in the cache of `prompts` holds the
            caller up while it is encoded.

        Raises:
          ValueError: a sentence without `prompts`, or contexts that do not fit.
          FloatingPointError: the text encoder made values that are not finite.
        """
        self.add(Turn("prompt", {"prompt": prompt}))

    def set_seed(self, seed: int) -> None:
        """Draws the noise from the next block on from another seed."""
        self.add(Turn("seed", {"seed": seed}))

    def set_image(self, pixels: np.ndarray, strength: float = 1.0) -> None:
        """The next block begins with this picture; see `GivenMedia.set_image`.

        Raises:
          ValueError: the picture is given as a whole, another size, or a strength outside [0, 1].
        """
        self.add(Turn("image", {"pixels": np.array(pixels, np.float32), "strength": strength}))

    def push_audio(self, waveform: np.ndarray, rate: int) -> None:
        """The next samples [B, n, 2] float32 in [-1, 1] of the sound that is given, at `rate` Hz.

        Raises ValueError where the sound is generated, or of another shape or rate than before.
        """
        self.add(Turn("audio", {"waveform": np.array(waveform, np.float32), "rate": rate}))

    def push_frames(self, frames: np.ndarray) -> None:
        """The next frames [B, n, H, W, 3] uint8 of the picture that is given.

        Raises ValueError where the picture is generated, or for frames of another kind or size.
        """
        self.add(Turn("frames", {"frames": np.array(frames)}))

    def extend(self, frames: np.ndarray, waveform: np.ndarray, rate: int) -> None:
        """The stream begins with this clip, as the VAEs keep it; see `GivenMedia.extend`.

        Raises:
          ValueError: a stream is given as a whole, or frames or a waveform of another shape.
          RuntimeError: the stream has begun.
        """
        clip = {"frames": np.array(frames), "waveform": np.array(waveform, np.float32)}
        self.add(Turn("clip", {**clip, "rate": rate}))

    def set_reference(self, pixels: np.ndarray, waveform: np.ndarray, rate: int) -> None:
        """A face and a voice, in front of what is shown; see `GivenMedia.set_reference`.

        They are the stream's first `1 + anchors` blocks, which `num_blocks` and `max_blocks` count.
        The last frame of the face is the first one shown, so that a stream in the `prefix` layout
        has the frames and samples of any other: its block 0 is the last block of the references.

        Raises:
          RuntimeError: the stream has begun, or something was given to it.
          ValueError: the picture is given, pixels or a waveform of another shape, or `max_blocks`
            leaves nothing to be shown.
        """
        reference = {"pixels": np.array(pixels, np.float32), "rate": rate}
        self.add(Turn("reference", {**reference, "waveform": np.array(waveform, np.float32)}))

    def add(self, *turns: Turn) -> None:
        """Queues turns, such as those of a log, which are replayed so.

        Raises:
          ValueError: a turn for a block that is made already; and see the method of its kind.
        """
        for turn in turns:
            self._steering.add(turn, self.num_blocks)

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

        A step that fails takes the cache and the decoders' state with it, as their buffers are
        reused: the session goes on only after `restore`.

        Raises:
          FloatingPointError: the block's latents, pictures or sound are not finite.
          RuntimeError: the stream is as long as `max_blocks` allows, or an earlier step failed.
          ValueError: sound of another rate came in the moment in which silence took its place.
        """
        self._check_whole()
        if self.max_blocks is not None and self.num_blocks >= self.max_blocks:
            raise RuntimeError(
                f"this session was made for {self.max_blocks} blocks; give a larger max_blocks, "
                "or None with relative positions"
            )
        self._steering.apply_turns(self.num_blocks)
        self._failed = True  # until this step is done
        try:
            chunk = self._next_chunk()
            while chunk.block < 0 and not chunk.waiting:  # a reference
                chunk = self._next_chunk().behind(chunk)
        except FloatingPointError:  # an earlier state would lead to the same
            raise
        except Exception as error:  # Ctrl-C needs no advice: it ends a program
            error.add_note(f"this streaming session lost its cache: {HOW_TO_GO_ON}")
            raise
        self._failed = False
        return chunk

    def _block_arguments(
        self, cache: RollingCache, condition: Condition | None, *, first: bool, full: bool = False
    ) -> tuple[tuple, dict]:
        """Of `generate_block`, and of `write_block`, which has no program for a full cache."""
        now = self._steering
        text = now.text, self._rope, now.key, now.text_mask
        options = {"config": self.config, "batch": self._batch, "first": first}
        if full and not is_whole(condition):
            options["full"] = True
        condition = jax.device_put(condition, self._device)
        return (self._model, self._params, cache, *text, condition), options

    def warm_up(self, on_done: Callable[[str], None] = lambda part: None) -> None:
        """Compiles in parallel all that the stream will need, before its first block.

        Nothing is compiled in a block then, unless a prompt is longer or shorter (`text_length`),
        or sound has another rate than the stream and nothing of it has arrived yet. What other
        sessions have compiled is not compiled again.

        Args:
          on_done: called with the name of each part that is done.

        Raises:
          RuntimeError: the stream has begun.
        """
        if self.num_blocks:
            raise RuntimeError("a session is warmed up before its first block")
        self._steering.apply_turns(0)
        jax.block_until_ready(self._steering.text)
        # as a block gives them back
        cache = jax.tree.map(lambda x: on_device(x.shape, x.dtype, self._device), self._cache)
        stream, like = self._media.stream, (self.config, self._model, self._batch, self._device)
        first, later = (latent_shapes(block, *like) for block in (0, 1))

        def compile_block(cache: RollingCache, shapes: AVLatents, **how: bool) -> None:
            for condition in self._media.programs(self._steering.given, first=how["first"]):
                arguments, options = self._block_arguments(cache, condition, **how)
                block_program(condition).lower(*arguments, **options).compile()
            all_finite.lower(shapes).compile()

        def compile_recache() -> None:
            for block in (0, 1):
                condition = self._media.generated(block)
                arguments, options = self._block_arguments(cache, condition, first=block == 0)
                write_block.lower(*arguments, **options).compile()
            written_anew.lower(cache, cache.num_blocks, self.config.patches).compile()

        def blocks() -> Iterator[AVLatents]:
            for block in itertools.count() if self.max_blocks is None else range(self.max_blocks):
                yield jax.tree.map(
                    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                    latent_shapes(block, *like),
                )

        parts = {
            "encoders": lambda: self._media.warm_up(self._steering.given),
            "first block": lambda: compile_block(self._cache, first, first=True),
            "blocks": lambda: compile_block(cache, later, first=False),
        }
        if self.config.recache:
            parts["recache"] = compile_recache
        if fills_cache(self._params, self.config, self.max_blocks):
            parts["full cache"] = lambda: compile_block(cache, later, first=False, full=True)
        if stream != "video":
            parts["pictures"] = lambda: self._video_decoder.warm_up(
                self._video_state, map(self._unpatchify, blocks())
            )
        if stream != "audio":
            parts["sound"] = lambda: self._audio_decoder.warm_up(
                self._audio_state, (latents.audio for latents in blocks())
            )
        parallel(parts, on_done)

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(f"an earlier step of this session failed: {HOW_TO_GO_ON}")

    def _next_chunk(self) -> Chunk:
        marks = [time.perf_counter()]

        def mark(*values):
            jax.block_until_ready(values)
            marks.append(time.perf_counter())

        steering = self._steering
        if self._wait and steering.late(self.num_blocks):
            place = self.num_blocks - steering.unshown, self.num_frames, self.num_samples
            return Chunk.that_waits(*place, self._batch, self._media.pixels)
        if steering.prompt_changed and self.config.recache and self.num_blocks:
            self._recache()
        steering.prompt_changed = False
        mark(steering.text)
        condition, late = steering.take(self.num_blocks)
        full = fills_cache(self._params, self.config, self.num_blocks + 1)
        how = {"first": self.num_blocks == 0, "full": full}
        arguments, options = self._block_arguments(self._cache, condition, **how)
        latents, self._cache = block_program(condition)(*arguments, **options)
        self._hold(latents, condition)
        mark(latents)
        frames = self._pictures(latents)
        mark(frames)
        waveform = self._sound(latents)
        mark(waveform)
        finite = all_finite(latents), self._video_state.finite
        frames, waveform, finite = jax.device_get((frames, waveform, finite))
        self._check_finite(self.num_blocks, *finite, waveform)
        marks.append(time.perf_counter())
        text, *others = np.diff(marks).tolist()
        timings = Timings(text + steering.text_seconds, *others)
        steering.text_seconds = 0.0
        self.num_blocks += 1
        block = max(self.num_blocks - 1 - steering.unshown, -1)
        return self._chunk(block, frames, waveform, timings, late)

    def _pictures(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next frames, decoded or as they were given."""
        if self._media.stream == "video":
            return self._steering.shown(self.num_blocks, self.num_frames)
        video = self._unpatchify(latents)
        self._video_state, frames = self._video_decoder.push(self._video_state, video)
        return frames

    def _sound(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next samples, decoded or as they were given."""
        if self._media.stream == "audio":
            return self._steering.played(self.num_blocks, self.num_samples, flushed=False)
        self._audio_state, waveform = self._audio_decoder.push(self._audio_state, latents.audio)
        return waveform

    def _hold(self, latents: AVLatents, condition: Condition | None) -> None:
        """Keeps what the cache holds, where that may be written anew."""
        if not self.config.recache:
            return
        block, cache = self.num_blocks, self.config.cache
        condition = condition or self._media.generated(block)
        self._held[block] = condition.replace(clean=latents)
        if block - cache.window > cache.anchors:
            self._held.pop(block - cache.window)

    def _recache(self) -> None:
        """Writes what the cache holds anew, under the prompt that is now."""
        start, count = (jax.device_put(np.int32(n), self._device) for n in (0, self.num_blocks))
        cache = self._cache.replace(num_blocks=start)
        for block, condition in sorted(self._held.items()):
            arguments, options = self._block_arguments(cache, condition, first=block == 0)
            _, cache = write_block(*arguments, **options)
        self._cache = written_anew(cache, count, self.config.patches)

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
        self._video_state, frames = self._video_decoder.flush(self._video_state)
        if self._media.stream == "audio":
            waveform = self._steering.played(self.num_blocks - 1, self.num_samples, flushed=True)
        else:
            self._audio_state, waveform = self._audio_decoder.flush(self._audio_state)
        frames, waveform, finite = jax.device_get((frames, waveform, self._video_state.finite))
        self._check_finite(self.num_blocks - 1, True, finite, waveform)
        seconds = time.perf_counter() - start
        return self._chunk(-1, frames, waveform, Timings(0.0, 0.0, 0.0, 0.0, seconds))

    def _chunk(self, block, frames, waveform, timings, late=0.0) -> Chunk:
        frames, waveform = self._steering.without_references(frames, waveform)
        chunk = Chunk(block, self.num_frames, self.num_samples, frames, waveform, timings, late)
        self.num_frames += frames.shape[1]
        self.num_samples += waveform.shape[1]
        return chunk

    def _unpatchify(self, latents: AVLatents) -> jax.Array:
        c = self.config
        return latents.video.reshape(self._batch, -1, c.height, c.width, latents.video.shape[-1])

    def snapshot(self) -> dict[str, Any]:
        """A host copy of everything the stream depends on besides weights and configuration.

        Raises:
          RuntimeError: a step of this session failed, so there is nothing to copy.
        """
        self._check_whole()
        decoders = {"video_state": self._video_state, "audio_state": self._audio_state}
        state = {"cache": self._cache, "held": self._held, **decoders}
        counters = {n: getattr(self, n) for n in ("num_blocks", "num_frames", "num_samples")}
        return jax.device_get(state) | counters | self._steering.snapshot()

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continues from a `snapshot` of a session with the same weights and configuration.

        Raises:
          ValueError: the snapshot was taken with another cache configuration or batch size.
        """
        cache = snapshot["cache"]
        if cache.config != self.config.cache:
            raise ValueError(
                f"the snapshot's cache is {cache.config}, this session's is {self.config.cache}"
            )
        if jax.tree.map(np.shape, cache) != jax.tree.map(np.shape, self._cache):
            raise ValueError("the snapshot was taken at another batch or video size")
        self._failed = False
        self._cache = jax.device_put(cache, self._device)
        self._steering.restore(snapshot)
        self._video_state = snapshot["video_state"]
        self._audio_state = snapshot["audio_state"]
        self._held = dict(snapshot["held"])
        self.num_blocks = snapshot["num_blocks"]
        self.num_frames = snapshot["num_frames"]
        self.num_samples = snapshot["num_samples"]
