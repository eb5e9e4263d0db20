"""What a stream's next block is made from besides its own past: prompt, noise, and what is given.

Turns change it at block borders and nowhere else.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from omniforcing_jax.models.transformer.inputs import TextKV
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.streaming.block_programs import jitted_prompt_kv, on_mesh
from omniforcing_jax.streaming.given import GivenMedia, check_same_rate, unshown_blocks
from omniforcing_jax.streaming.turns import MEDIA_TURNS, Turn, TurnQueue, WaitingTurn
from omniforcing_jax.text.prompts import PromptEncoder


@dataclasses.dataclass(frozen=True)
class Blend:
    """A change of prompt over some blocks.

    Attributes:
      old, new: text contexts of video and audio [B, S, text_dim]; on the host if they are mixed.
      begun: blocks made before the first of it.
      blocks: between the prompts.
      recache: whether the cache is written anew when the new prompt stands alone.
      done: blocks that it has gone.
    """

    old: tuple[np.ndarray, np.ndarray]
    new: tuple[np.ndarray, np.ndarray]
    begun: int
    blocks: int
    recache: bool
    done: int = 0

    def contexts(self, done: int) -> tuple[np.ndarray, ...]:
        """Those of the `done`-th block, from 1: the shorter ones are as if zeros followed."""
        weight = np.float32(done / (self.blocks + 1))

        def mixed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            length = max(old.shape[1], new.shape[1])
            both = (
                np.pad(x.astype(np.float32), ((0, 0), (0, length - x.shape[1]), (0, 0)))
                for x in (old, new)
            )
            before, after = both
            return ((1 - weight) * before + weight * after).astype(new.dtype)

        return tuple(mixed(*pair) for pair in zip(self.old, self.new, strict=True))


class Steering:
    """The turns of a session, and what they have made of its prompt, noise and conditions.

    Any thread may `add` turns; all else is called by the one that makes blocks.

    Attributes:
      media: makes conditions of what is given; `given`: what waits for its block there.
      contexts: text contexts [B, S, text_dim] of video and audio, on the model's device.
      text_mask: [B, S] boolean, True = attend; None where all contexts have one length.
      text_seconds: spent on sentences since the last block.
      key: of the noise.
      steps: of denoising.
      recache_due: whether the next block finds what the cache holds written anew.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        media: GivenMedia,
        prompts: PromptEncoder | None,
        contexts: tuple[jax.Array, jax.Array],
        *,
        text_seconds: float,
        seed: int,
        text_length: int | None,
        max_blocks: int | None,
        steerable: bool,
        device: Sharding | None,
        log: Callable[[Turn], None] | None,
    ):
        """
        Args:
          contexts: of the first prompt; `text_seconds`: that it took.
          device: where the contexts are put. Others: see `StreamingSession`.

        Raises:
          ValueError: contexts that do not fit.
        """
        self.media, self.given = media, media.init()
        self._model, self._params, self._prompts = model, params, prompts
        self._text_length, self._max_blocks = text_length, max_blocks
        self._steerable, self._device, self._log = steerable, device, log
        self._queue, self._blend = TurnQueue(), None
        self._check_contexts(contexts)
        self._set_contexts(contexts)
        self.text_seconds, self.recache_due = text_seconds, False
        self.key, self.steps = jax.random.key(seed), media.rollout.num_steps

    # Turns

    @property
    def waiting_turns(self) -> tuple[Turn, ...]:
        """Those that are not applied yet."""
        return tuple(waiting.turn for waiting in self._queue.waiting)

    def add(self, turn: Turn, num_made: int) -> None:
        """Queues a turn for a stream that has made `num_made` blocks.

        Raises:
          ValueError, RuntimeError: see `StreamingSession.add`.
        """
        contexts, seconds = None, 0.0
        if turn.kind == "prompt":
            contexts, seconds = encoded(turn.payload["prompt"], self._prompts)
            self._check_contexts(contexts)
        if turn.block is not None and turn.block < num_made:
            raise ValueError(
                f"the turn is for block {turn.block}, and {num_made} blocks are made already"
            )
        self._queue.add(WaitingTurn(turn, contexts, seconds), self._check)

    def _check(self, turn: Turn, before: tuple[WaitingTurn, ...]) -> None:
        """Raises unless a turn can follow those that were applied and those that wait."""
        if turn.kind not in MEDIA_TURNS:
            self._check_numbers(turn)
            return
        self.media.check(turn)
        waiting = [w.turn for w in before if w.turn.kind in MEDIA_TURNS]
        if turn.kind == "audio":
            began = self.given.audio_encoder
            rates = [] if began is None else [began.sample_rate]
            rates += [t.payload["rate"] for t in waiting if t.kind == "audio"]
            for rate in rates[:1]:
                check_same_rate(rate, turn.payload["rate"])
        does = {"clip": "goes on from a clip", "reference": "is given references"}.get(turn.kind)
        if does and (waiting or turn.block or not self.given.is_untouched):
            raise RuntimeError(f"a session {does} before its first block and before all else")
        if turn.kind == "reference" and self._max_blocks is not None:
            cache = self.media.rollout.cache
            unshown = unshown_blocks(cache.layout, 1 + cache.anchors)
            if self._max_blocks <= unshown:
                raise ValueError(
                    f"the references are {unshown} blocks before the first that is shown, and this "
                    f"session was made for {self._max_blocks}: give a larger max_blocks"
                )

    def _check_numbers(self, turn: Turn) -> None:
        """Raises ValueError for numbers that cannot be, or of a session that is not steerable."""
        payload, most = turn.payload, self.media.rollout.num_steps
        steered = turn.kind in ("rewind", "steps") or payload.get("recache")
        if steered and not (self._steerable or (turn.kind == "prompt" and self._recaches)):
            what = "recache" if turn.kind == "prompt" else turn.kind
            raise ValueError(f"{what!r} is for sessions that are steerable, and this one is not")
        if turn.kind == "rewind" and self.media.stream is not None:
            raise ValueError(f"the {self.media.stream} is given as it comes, and never again")
        for name, least in (("blend", 0), ("block", 0), ("steps", 1)):
            if payload.get(name, least) < least:
                raise ValueError(f"{name} must be at least {least}, not {payload[name]}")
        if payload.get("steps", 1) > most:
            raise ValueError(f"a block has at most {most} steps, not {payload['steps']}")

    @property
    def _recaches(self) -> bool:
        return self.media.rollout.recache

    def apply_turns(self, num_made: int, rewind: Callable[[int], None]) -> None:
        """Applies, in order, the turns that are due behind `num_made` blocks.

        Args:
          rewind: takes the stream to a block.

        Raises:
          ValueError: a turn that no longer fits, as sound of another rate came in the moment in
            which silence took its place. It is left out.
        """
        while waiting := self._queue.next(num_made):
            turn = waiting.turn
            if turn.kind == "prompt":
                self._set_prompt(waiting, num_made)
            elif turn.kind == "seed":
                self.key = jax.random.key(turn.payload["seed"])
            elif turn.kind == "steps":
                self.steps = turn.payload["steps"]
            elif turn.kind == "rewind":
                rewind(turn.payload["block"])
                self._blend_until(None)
            else:
                self.given = self.media.apply(self.given, turn)
            if self._log is not None:
                self._log(dataclasses.replace(turn, block=num_made))
        self._blend_until(num_made)

    def skip(self, frames: int, samples: int) -> None:
        """Leaves so much of what the decoders give next out of the stream."""
        self.given = self.given.replace(skip=(frames, samples))

    # Text

    def _check_contexts(self, contexts: tuple[jax.Array, jax.Array]) -> None:
        batch, text_dims = self.media.batch, self._model.config.text_dims
        for name, context, width in zip(("video", "audio"), contexts, text_dims, strict=True):
            if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
                raise ValueError(
                    f"the {name} text context has shape {tuple(context.shape)}; this session "
                    f"takes ({batch}, length, {width})"
                )
        length, longest = contexts[0].shape[1], self._text_length
        if longest is not None and length > longest:
            raise ValueError(f"the text has {length} tokens; this session takes up to {longest}")

    def _set_prompt(self, waiting: WaitingTurn, num_made: int) -> None:
        payload = waiting.turn.payload
        recache = self._recaches if payload["recache"] is None else payload["recache"]
        contexts = self.contexts, waiting.contexts
        if payload["blend"]:
            contexts = jax.device_get(contexts)
        self._blend = Blend(*contexts, num_made, payload["blend"], recache)
        self.text_seconds += waiting.seconds

    def _blend_until(self, num_made: int | None) -> None:
        """Takes the contexts to those of the next block; None ends the blending."""
        if (blend := self._blend) is None:
            return
        done = blend.blocks + 1 if num_made is None else num_made - blend.begun + 1
        if done > blend.blocks:
            self._set_contexts(blend.new)
            self.recache_due, self._blend = self.recache_due or blend.recache, None
        elif done != blend.done:  # a block that waits for its sound was blended before
            self._set_contexts(blend.contexts(done))
            self._blend = dataclasses.replace(blend, done=done)

    def _set_contexts(self, contexts: tuple[jax.Array, jax.Array]) -> None:
        # committed to the model's device, as what is computed there: or each program is made twice
        self.contexts = jax.device_put(tuple(contexts), self._device)
        self._text = self.text_mask = None
        if (longest := self._text_length) is not None:
            length = contexts[0].shape[1]
            mask = np.broadcast_to(np.arange(longest) < length, (self.media.batch, longest))
            self.text_mask = jax.device_put(mask, self._device)

    @property
    def text(self) -> TextKV:
        """Keys and values of the contexts, padded; made once per prompt."""
        if self._text is None:
            contexts, longest = self.contexts, self._text_length
            missing = 0 if longest is None else longest - contexts[0].shape[1]
            if missing:
                contexts = [jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in contexts]
            rollout = self.media.rollout
            levels = rollout.text_levels(frozen=self.media.stream is not None)
            how = {"levels": levels, "dtype": rollout.cache.dtype}
            with on_mesh(self._device):
                self._text = jitted_prompt_kv(self._model, self._params, *contexts, **how)
        return self._text

    # What is given

    @property
    def unshown(self) -> int:
        """Blocks before the first that is shown."""
        return unshown_blocks(self.media.rollout.cache.layout, self.given.hidden)

    def late(self, block: int) -> int:
        """Samples or frames that a block still waits for."""
        return self.media.late(self.given, block)

    def take(self, block: int) -> tuple[Condition | None, float]:
        """What is given of a block, and seconds of it that had not arrived and were filled."""
        given, late = self.media.fill(self.given, block)
        self.given, condition = self.media.take(given, block)
        return condition, late

    def shown(self, block: int, num_frames: int) -> np.ndarray:
        """The given frames [B, n, H, W, 3] up to a block's end, behind the first `num_frames`."""
        self.given, frames = self.media.shown(self.given, block, num_frames)
        return frames

    def played(self, block: int, num_samples: int, *, flushed: bool) -> np.ndarray:
        """The given samples [B, n, 2] up to a block's end, behind the first `num_samples`."""
        played = self.given, block, num_samples
        self.given, waveform = self.media.played(*played, flushed=flushed)
        return waveform

    def skipped(self, num_frames: int, num_samples: int) -> tuple[int, int]:
        """How many of the next frames and samples are not shown, of references for instance."""
        left = self.given.skip
        frames, samples = min(left[0], num_frames), min(left[1], num_samples)
        self.skip(left[0] - frames, left[1] - samples)
        return frames, samples

    # State

    def snapshot(self) -> dict[str, Any]:
        """All that `restore` needs, as it is; nothing of it is changed or reused later."""
        return {
            "key": jax.random.key_data(self.key),
            "contexts": self.contexts,
            "given": self.given,
            "turns": tuple(self._queue.waiting),
            "blend": self._blend,
            "steps": self.steps,
            "recache_due": self.recache_due,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continues from a `snapshot`; what was said since is forgotten."""
        self.key = jax.random.wrap_key_data(jax.device_put(snapshot["key"]))
        self._set_contexts(snapshot["contexts"])
        self.given = snapshot["given"]
        self._queue.restore(snapshot["turns"])
        self._blend, self.steps = snapshot["blend"], snapshot["steps"]
        self.recache_due = snapshot["recache_due"]


def encoded(
    prompt: str | tuple[jax.Array, jax.Array], prompts: PromptEncoder | None
) -> tuple[tuple[jax.Array, jax.Array], float]:
    """Contexts of a prompt, and the seconds that a sentence took.

    Raises:
      ValueError: a sentence without an encoder.
    """
    if not isinstance(prompt, str):
        return prompt, 0.0
    if prompts is None:
        raise ValueError(
            f"the prompt {prompt[:60]!r} is a sentence, and this session has no text encoder: "
            "make it with prompts=PromptEncoder(...), or pass text contexts"
        )
    start = time.perf_counter()
    contexts = prompts.contexts(prompt)
    return contexts, time.perf_counter() - start
