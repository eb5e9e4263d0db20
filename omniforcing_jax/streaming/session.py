"""The live session: push a prompt, pull chunks of video and sound, block after block, without end.

    session = pipeline.session(config, "a calm sea", prompts=PromptEncoder(...), seed=0)
    for chunk in session.stream(num_blocks=None):
        play(chunk.frames, chunk.waveform)          # session.set_prompt(...) any time in between

Each block is one call of the jitted `student.block_step` on a donated cache, followed by the two
streaming decoders. Everything random follows from (seed, block index), and everything else from the
explicit state, so a session replays bit for bit and continues from a snapshot.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.streaming.audio import StreamingAudioDecoder
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import AVLatents


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
    """

    block: int
    first_frame: int
    first_sample: int
    frames: np.ndarray
    waveform: np.ndarray
    timings: Timings


@functools.partial(
    jax.jit, static_argnames=("model", "config", "batch", "first"), donate_argnames=("cache",)
)
def generate_block(model, params, cache, text, rope, key, *, config, batch, first):
    """`student.block_step` with its noise drawn from (key, block index): latents and cache."""
    noise = student.block_noise(key, cache.num_blocks, config, model, batch, first=first)
    trace, cache = student.block_step(model, params, cache, text, rope, noise, config, first=first)
    return trace.x0, cache


HOW_TO_GO_ON = "restore(snapshot) of an earlier snapshot() goes on from there, else make a new one"

jitted_prompt_kv = jax.jit(student.prompt_kv, static_argnames=("model", "levels"))


class StreamingSession:
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

        Raises:
          ValueError: text widths or batch sizes that do not fit, an endless stream with
            absolute positions, or a sentence without `prompts`.
        """
        self.config = config
        self._failed = False
        self.max_blocks = max_blocks
        self._model, self._params = model, params
        self._video_decoder, self._audio_decoder = video_decoder, audio_decoder
        self._rope = config.rope(model, max_blocks)
        self._key = jax.random.key(seed)
        self._prompts = prompts
        self._text_seconds = 0.0  # spent on sentences since the last block
        contexts = self._encoded(prompt)
        self._batch = contexts[0].shape[0]
        self._set_contexts(contexts)
        self.num_blocks = self.num_frames = self.num_samples = 0
        self._cache = student.new_cache(model, config, self._batch)
        pixels = video_decoder.config.spatial_compression
        self._video_state = video_decoder.init(
            self._batch, config.height * pixels, config.width * pixels
        )
        self._audio_state = audio_decoder.init(self._batch)

    def set_prompt(self, prompt: str | tuple[jax.Array, jax.Array]) -> None:
        """Changes the prompt from the next block on; what was generated stays in the cache.

        Args:
          prompt: as in the constructor. A sentence that is not in the cache of `prompts` holds the
            stream up while it is encoded.

        Raises:
          ValueError: a sentence without `prompts`, or contexts that do not fit.
          FloatingPointError: the text encoder made values that are not finite.
        """
        self._set_contexts(self._encoded(prompt))

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
        self.contexts = tuple(jnp.asarray(c) for c in contexts)
        self._text = None

    def stream(self, num_blocks: int | None = None) -> Iterator[Chunk]:
        """Yields the next `num_blocks` chunks, or chunks without end.

        With a number, the last chunk is that of `finish`, if the decoders held anything back.
        """
        for _ in itertools.count() if num_blocks is None else range(num_blocks):
            yield self.step()
        tail = self.finish()
        if tail.frames.shape[1] or tail.waveform.shape[1]:
            yield tail

    def step(self) -> Chunk:
        """Generates and decodes the next block.

        A step that fails takes the cache and the decoders' state with it, as their buffers are
        reused: the session goes on only after `restore`.

        Raises:
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
        except Exception as error:  # Ctrl-C needs no advice: it ends a program
            error.add_note(f"this streaming session lost its cache: {HOW_TO_GO_ON}")
            raise
        self._failed = False
        return chunk

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(f"an earlier step of this session failed: {HOW_TO_GO_ON}")

    def _next_chunk(self) -> Chunk:
        marks = [time.perf_counter()]

        def mark(*values):
            jax.block_until_ready(values)
            marks.append(time.perf_counter())

        if self._text is None:
            self._text = jitted_prompt_kv(
                self._model, self._params, *self.contexts, levels=self.config.sigma_levels
            )
        mark(self._text)
        latents, self._cache = generate_block(
            self._model,
            self._params,
            self._cache,
            self._text,
            self._rope,
            self._key,
            config=self.config,
            batch=self._batch,
            first=self.num_blocks == 0,
        )
        mark(latents)
        video = self._unpatchify(latents)
        self._video_state, frames = self._video_decoder.push(self._video_state, video)
        mark(frames)
        self._audio_state, waveform = self._audio_decoder.push(self._audio_state, latents.audio)
        mark(waveform)
        frames, waveform = jax.device_get((frames, waveform))
        marks.append(time.perf_counter())
        text, *others = np.diff(marks).tolist()
        timings = Timings(text + self._text_seconds, *others)
        self._text_seconds = 0.0
        self.num_blocks += 1
        return self._chunk(self.num_blocks - 1, frames, waveform, timings)

    def finish(self) -> Chunk:
        """Ends the stream: emits what the decoders held back. `step` must not be called after.

        Raises:
          RuntimeError: a step of this session failed, and the decoders' state went with it.
        """
        self._check_whole()
        start = time.perf_counter()
        self._video_state, frames = self._video_decoder.flush(self._video_state)
        self._audio_state, waveform = self._audio_decoder.flush(self._audio_state)
        frames, waveform = jax.device_get((frames, waveform))
        seconds = time.perf_counter() - start
        return self._chunk(-1, frames, waveform, Timings(0.0, 0.0, 0.0, 0.0, seconds))

    def _chunk(self, block, frames, waveform, timings) -> Chunk:
        chunk = Chunk(block, self.num_frames, self.num_samples, frames, waveform, timings)
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
        }
        counters = {
            "num_blocks": self.num_blocks,
            "num_frames": self.num_frames,
            "num_samples": self.num_samples,
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
        state = jax.tree.map(jnp.asarray, {k: snapshot[k] for k in ("cache", "key", "contexts")})
        self._cache, self.contexts = state["cache"], state["contexts"]
        self._key = jax.random.wrap_key_data(state["key"])
        self._text = None
        self._video_state = snapshot["video_state"]
        self._audio_state = snapshot["audio_state"]
        self.num_blocks = snapshot["num_blocks"]
        self.num_frames = snapshot["num_frames"]
        self.num_samples = snapshot["num_samples"]
