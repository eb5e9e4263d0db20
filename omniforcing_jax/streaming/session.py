"""The live session: push a prompt, pull chunks of video and sound, block after block, without end.

    session = pipeline.session(config, "a calm sea", prompts=PromptEncoder(...), seed=0)
    for chunk in session.stream(num_blocks=None):
        play(chunk.frames, chunk.waveform)          # session.set_prompt(...) any time in between

Each block is one call of the jitted `student.block_step` on a donated cache, followed by the two
streaming decoders. Everything random follows from (seed, block index), and everything else from the
explicit state, so a session replays bit for bit and continues from a snapshot.

Besides text a stream is given pictures, a clip to go on from, references of a face and a voice, and
all of its sound or of its picture as it arrives (`set_image`, `extend`, `set_reference`,
`push_audio`, `push_frames`); what has arrived is used at the next block border.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from omniforcing_jax.models.transformer.inputs import TextKV
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
    jitted_prompt_kv,
    write_block,
    written_anew,
)
from omniforcing_jax.streaming.chunks import Chunk, Timings
from omniforcing_jax.streaming.encoders import StreamingAudioEncoder, StreamingVideoEncoder
from omniforcing_jax.streaming.given import GivenMedia, is_whole
from omniforcing_jax.streaming.given_turns import GivenTurns
from omniforcing_jax.streaming.parallel import parallel
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import AVLatents

HOW_TO_GO_ON = "restore(snapshot) of an earlier snapshot() goes on from there, else make a new one"


class StreamingSession(GivenTurns):
    """One stream of blocks with its cache and decoders.

    Attributes:
      contexts: text contexts of the next block.
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

        Raises:
          ValueError: text widths or batch sizes that do not fit, an endless stream with
            absolute positions, or a sentence without `prompts`.
        """
        self.config, self.max_blocks = config, max_blocks
        self._failed = False
        self._model, self._params, self._text_length = model, params, text_length
        self._video_decoder, self._audio_decoder = video_decoder, audio_decoder
        self._rope = config.rope(model, max_blocks)
        self._key = jax.random.key(seed)
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        self._device = sharding if isinstance(sharding, SingleDeviceSharding) else None
        self._prompts, self._text_seconds = prompts, 0.0  # spent on sentences since the last block
        contexts = self._encoded(prompt)
        self._batch = contexts[0].shape[0]
        self._set_contexts(contexts)
        self.num_blocks = self.num_frames = self.num_samples = 0
        self._cache = student.new_cache(model, config, self._batch, params)
        pixels = video_decoder.config.spatial_compression
        self._video_state = video_decoder.init(
            self._batch, config.height * pixels, config.width * pixels
        )
        self._audio_state = audio_decoder.init(self._batch)
        self._wait = wait
        self._start_given(
            GivenMedia(
                config,
                self._batch,
                (model.config.video_channels, model.config.audio_channels),
                (config.height * pixels, config.width * pixels),
                audio_decoder.sample_rate,
                given,
                audio_encoder,
                video_encoder,
            )
        )
        self._held: dict[int, Condition] = {}  # blocks of the cache by index, for `recache`
        self._recache_due = False

    def set_prompt(self, prompt: str | tuple[jax.Array, jax.Array]) -> None:
        """Changes the prompt from the next block on; what was generated stays in the cache.

        With `RolloutConfig.recache` it is written anew there, under the new prompt.

        Args:
          prompt: as in the constructor. A sentence that is not in the cache of `prompts` holds the
            stream up while it is encoded.

        Raises:
          ValueError: a sentence without `prompts`, or contexts that do not fit.
          FloatingPointError: the text encoder made values that are not finite.
        """
        self._set_contexts(self._encoded(prompt))
        self._recache_due = self.config.recache and self.num_blocks > 0

    def _encoded(self, prompt: str | tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if not isinstance(prompt, str):
            return prompt
        if self._prompts is None:
            raise ValueError(
                f"the prompt {prompt[:60]!r} is a sentence, and this session has no text encoder: "
                "make it with prompts=PromptEncoder(...), or pass text contexts"
            )
        start = time.perf_counter()
        contexts = self._prompts.contexts(prompt)
        self._text_seconds += time.perf_counter() - start
        return contexts

    def _set_contexts(self, contexts: tuple[jax.Array, jax.Array]) -> None:
        for name, context, width in zip(
            ("video", "audio"), contexts, self._model.config.text_dims, strict=True
        ):
            if context.ndim != 3 or context.shape[0] != self._batch or context.shape[2] != width:
                raise ValueError(
                    f"the {name} text context has shape {tuple(context.shape)}; this session "
                    f"takes ({self._batch}, length, {width})"
                )
        length, longest = contexts[0].shape[1], self._text_length
        if longest is not None and length > longest:
            raise ValueError(f"the text has {length} tokens; this session takes up to {longest}")
        # committed to the model's device, as what is computed there: or each program is made twice
        self.contexts = jax.device_put(tuple(contexts), self._device)
        self._text = self._text_mask = None
        if longest is not None:
            mask = np.broadcast_to(np.arange(longest) < length, (self._batch, longest))
            self._text_mask = jax.device_put(mask, self._device)

    def _text_kv(self) -> TextKV:
        """Keys and values of the contexts, padded."""
        missing = 0 if self._text_length is None else self._text_length - self.contexts[0].shape[1]
        contexts = self.contexts
        if missing:
            contexts = [jnp.pad(context, ((0, 0), (0, missing), (0, 0))) for context in contexts]
        levels = self.config.text_levels(frozen=self._media.stream is not None)
        return jitted_prompt_kv(self._model, self._params, *contexts, levels=levels)

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
        """
        self._check_whole()
        if self.max_blocks is not None and self.num_blocks >= self.max_blocks:
            raise RuntimeError(
                f"this session was made for {self.max_blocks} blocks; give a larger max_blocks, "
                "or None with relative positions"
            )
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
        text = self._text, self._rope, self._key, self._text_mask
        options = {"config": self.config, "batch": self._batch, "first": first}
        if full and not is_whole(condition):
            options["full"] = True
        condition = jax.device_put(condition, self._device)
        return (self._model, self._params, cache, *text, condition), options

    def warm_up(self, on_done: Callable[[str], None] = lambda part: None) -> None:
        """Compiles in parallel all that the stream will need, before its first block.

        Nothing is compiled in a block then, unless `recache` meets given sound, a prompt is longer
        or shorter (see `text_length`), or sound has another rate than the stream and nothing of it
        has arrived yet. What other sessions have compiled is not compiled again.

        Args:
          on_done: called with the name of each part that is done.

        Raises:
          RuntimeError: the stream has begun.
        """
        if self.num_blocks:
            raise RuntimeError("a session is warmed up before its first block")
        self._text = self._text_kv()
        # as a block gives them back
        cache = jax.tree.map(self._on_device, self._cache)
        first, later = (self._latent_shapes(block) for block in (0, 1))
        stream = self._media.stream

        def compile_block(cache: RollingCache, shapes: AVLatents, **how: bool) -> None:
            for condition in self._media.programs(self._given, first=how["first"]):
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
                shapes = self._latent_shapes(block)
                yield jax.tree.map(
                    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes
                )

        parts = {"encoders": lambda: self._media.warm_up(self._given)}
        if self.config.recache:
            parts["recache"] = compile_recache
        if fills_cache(self._params, self.config, self.max_blocks):
            parts["full cache"] = lambda: compile_block(cache, later, first=False, full=True)
        parallel(
            parts
            | {
                "first block": lambda: compile_block(self._cache, first, first=True),
                "blocks": lambda: compile_block(cache, later, first=False),
                "pictures": lambda: (
                    stream == "video"
                    or self._video_decoder.warm_up(
                        self._video_state, (self._unpatchify(latents) for latents in blocks())
                    )
                ),
                "sound": lambda: (
                    stream == "audio"
                    or self._audio_decoder.warm_up(
                        self._audio_state, (latents.audio for latents in blocks())
                    )
                ),
            },
            on_done,
        )

    def _on_device(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._device)

    def _latent_shapes(self, block: int) -> AVLatents:
        """[B, T, C] of a block's latents, as `generate_block` gives them."""
        layout, config = self.config.cache.layout, self._model.config
        tokens = layout.video_frames_in(block) * self.config.patches
        sizes = (
            (tokens, config.video_channels),
            (layout.audio_frames_in(block), config.audio_channels),
        )
        shapes = (jax.ShapeDtypeStruct((self._batch, *size), jnp.float32) for size in sizes)
        return AVLatents(*map(self._on_device, shapes))

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(f"an earlier step of this session failed: {HOW_TO_GO_ON}")

    def _next_chunk(self) -> Chunk:
        marks = [time.perf_counter()]

        def mark(*values):
            jax.block_until_ready(values)
            marks.append(time.perf_counter())

        if self._wait and self._media.late(self._given, self.num_blocks):
            return self._waiting()
        if self._text is None:
            self._text = self._text_kv()
        if self._recache_due:
            self._recache()
        mark(self._text)
        condition, late = self._take_given(self.num_blocks)
        how = {"full": fills_cache(self._params, self.config, self.num_blocks + 1)}
        first = self.num_blocks == 0
        arguments, options = self._block_arguments(self._cache, condition, first=first, **how)
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
        timings = Timings(text + self._text_seconds, *others)
        self._text_seconds = 0.0
        self.num_blocks += 1
        block = max(self.num_blocks - 1 - self._unshown, -1)
        return self._chunk(block, frames, waveform, timings, late)

    def _pictures(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next frames, decoded or as they were given."""
        if self._media.stream == "video":
            return self._show_given(self.num_blocks, self.num_frames)
        video = self._unpatchify(latents)
        self._video_state, frames = self._video_decoder.push(self._video_state, video)
        return frames

    def _sound(self, latents: AVLatents) -> np.ndarray | jax.Array:
        """The next samples, decoded or as they were given."""
        if self._media.stream == "audio":
            return self._play_given(self.num_blocks, self.num_samples, flushed=False)
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
        self._recache_due = False

    def _check_finite(self, block: int, latents: bool, pictures: bool, waveform: np.ndarray):
        parts = {"latents": latents, "pictures": pictures, "sound": np.isfinite(waveform).all()}
        if bad := [name for name, finite in parts.items() if not finite]:
            layout, shown = self.config.cache.layout, block - self._unshown
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
            waveform = self._play_given(self.num_blocks - 1, self.num_samples, flushed=True)
        else:
            self._audio_state, waveform = self._audio_decoder.flush(self._audio_state)
        frames, waveform, finite = jax.device_get((frames, waveform, self._video_state.finite))
        self._check_finite(self.num_blocks - 1, True, finite, waveform)
        seconds = time.perf_counter() - start
        return self._chunk(-1, frames, waveform, Timings(0.0, 0.0, 0.0, 0.0, seconds))

    def _chunk(self, block, frames, waveform, timings, late=0.0) -> Chunk:
        skip = [min(n, x.shape[1]) for n, x in zip(self._skip, (frames, waveform), strict=True)]
        self._skip = self._skip[0] - skip[0], self._skip[1] - skip[1]
        frames, waveform = frames[:, skip[0] :], waveform[:, skip[1] :]
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
        state = {
            "cache": self._cache,
            "key": jax.random.key_data(self._key),
            "contexts": self.contexts,
            "video_state": self._video_state,
            "audio_state": self._audio_state,
            "given": self._given,
            "held": self._held,
        }
        counters = {
            "num_blocks": self.num_blocks,
            "num_frames": self.num_frames,
            "num_samples": self.num_samples,
            "unshown": self._unshown,
            "skip": self._skip,
            "recache_due": self._recache_due,
        }
        return jax.device_get(state) | counters

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
        self._set_contexts(snapshot["contexts"])
        self._key = jax.random.wrap_key_data(jnp.asarray(snapshot["key"]))
        self._video_state = snapshot["video_state"]
        self._audio_state = snapshot["audio_state"]
        with self._giving:
            self._given = snapshot["given"]
        self._held = dict(snapshot["held"])
        self._unshown, self._skip = snapshot["unshown"], snapshot["skip"]
        self._recache_due = snapshot["recache_due"]
        self.num_blocks = snapshot["num_blocks"]
        self.num_frames = snapshot["num_frames"]
        self.num_samples = snapshot["num_samples"]
