"""Turns: what is said to a stream while it runs, and the queue in which that waits for its block.

    session.set_prompt("a storm")        Turn("prompt", {"prompt": "a storm"}) is checked, and waits
    session.step()                       applies what waits, in order, and makes the next block
    log(turn)                            the turn, with the block before which it was applied

A stream follows from weights, configuration, seed and turns: another session of the same weights,
configuration and seed, to which the logged turns are added (`session.add(*log)`), makes the same
blocks bit for bit, as each turn waits for the block that it was applied before.
"""

import abc
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from omniforcing_jax.io import plain

MEDIA_TURNS = {
    "image": ("pixels", "strength"),
    "audio": ("waveform", "rate"),
    "frames": ("frames",),
    "clip": ("frames", "waveform", "rate"),
    "reference": ("pixels", "waveform", "rate"),
}
TURNS = {
    "prompt": ("prompt", "blend", "recache"),
    "seed": ("seed",),
    "rewind": ("block",),
    "steps": ("steps",),
} | MEDIA_TURNS
_DEFAULTS = {"prompt": {"blend": 0, "recache": None}}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One thing that is said to a session.

    Attributes:
      kind: one of `TURNS`.
      payload: arguments of the session's method of that kind, by name: host arrays, sentences and
        numbers.
      block: before which it is applied, in blocks made (`StreamingSession.num_made`); None is
        the next one.

    Raises:
      ValueError: another kind, or other arguments.
    """

    kind: str
    payload: dict[str, Any]
    block: int | None = None

    def __post_init__(self):
        if self.kind not in TURNS:
            raise ValueError(f"there is no turn {self.kind!r}; there are {', '.join(TURNS)}")
        payload = _DEFAULTS.get(self.kind, {}) | self.payload
        if sorted(payload) != sorted(TURNS[self.kind]):
            needs = ", ".join(TURNS[self.kind])
            raise ValueError(f"a turn {self.kind!r} has {needs}, not {', '.join(self.payload)}")
        object.__setattr__(self, "payload", payload)


class TakesTurns(abc.ABC):
    """The turns as methods, of whatever takes them by `add`."""

    @abc.abstractmethod
    def add(self, *turns: Turn) -> None:
        """Takes turns; see `StreamingSession.add`."""

    def set_prompt(
        self,
        prompt: str | tuple[jax.Array, jax.Array],
        *,
        blend: int = 0,
        recache: bool | None = None,
    ) -> None:
        """Changes the prompt from the next block on.

        Args:
          prompt: as in the constructor. A sentence that is not in the cache of `prompts` holds the
            caller up while it is encoded.
          blend: blocks that are made from contexts between the old prompt's and the new one's,
            which stands alone behind them. A rewind ends that at once.
          recache: whether what was generated is written anew into the cache under the new prompt,
            once that stands alone; None as `RolloutConfig.recache` says.

        Raises:
          ValueError: a sentence without `prompts`, contexts that do not fit, fewer than no blocks,
            or `recache` of a session that keeps no latents for it.
          FloatingPointError: the text encoder made values that are not finite.
        """
        self.add(Turn("prompt", {"prompt": prompt, "blend": blend, "recache": recache}))

    def set_seed(self, seed: int) -> None:
        """Draws the noise from the next block on from another seed."""
        self.add(Turn("seed", {"seed": seed}))

    def rewind(self, block: int) -> None:
        """Goes back: the next block takes the place of this one, as `num_blocks` counts them.

        What was decoded of the old course is shown to its end, then what follows block `block` - 1.
        Prompt, seed and steps stay as they are; the blocks before it are written into the cache
        anew, under the prompt that is now. Raises ValueError where the session is not `steerable`,
        and the step does where the block lies too far back, or ahead.
        """
        self.add(Turn("rewind", {"block": block}))

    def set_steps(self, steps: int) -> None:
        """Leaves the last denoising steps of each block out; ValueError if not `steerable`."""
        self.add(Turn("steps", {"steps": steps}))

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


def turns_to_json(turns: Sequence[Turn]) -> str:
    """Turns as text, such as those of a log."""
    return plain.to_json(list(turns), {"Turn": Turn})


def turns_from_json(text: str) -> list[Turn]:
    """The turns of such a text; ValueError if it is none."""
    turns = plain.from_json(text, {"Turn": Turn})
    if not isinstance(turns, list) or not all(isinstance(turn, Turn) for turn in turns):
        raise ValueError("a log of turns is a list of them")
    return turns


@dataclasses.dataclass(frozen=True)
class WaitingTurn:
    """A turn in the queue.

    Attributes:
      turn: what was said.
      contexts: of a prompt: text contexts of video and audio [B, S, text_dim].
      seconds: that its sentence took to encode.
    """

    turn: Turn
    contexts: tuple[jax.Array, jax.Array] | None = None
    seconds: float = 0.0

    def on_host(self) -> "WaitingTurn":
        """With the host's arrays alone."""
        turn = dataclasses.replace(self.turn, payload=jax.device_get(self.turn.payload))
        return dataclasses.replace(self, turn=turn, contexts=jax.device_get(self.contexts))


class TurnQueue:
    """Turns in the order in which they came; any thread may add one while a block is made."""

    def __init__(self):
        self._lock = threading.Lock()
        self._waiting: tuple[WaitingTurn, ...] = ()

    @property
    def waiting(self) -> tuple[WaitingTurn, ...]:
        """All that waits."""
        with self._lock:
            return self._waiting

    def add(self, new: WaitingTurn, check: Callable[[Turn, tuple[WaitingTurn, ...]], None]) -> None:
        """Appends a turn.

        Args:
          check: called with the turn and those that wait before it; what it raises keeps it out.
        """
        with self._lock:
            check(new.turn, self._waiting)
            self._waiting += (new,)

    def next(self, block: int) -> WaitingTurn | None:
        """Takes out the first turn that is due before this block, if there is one."""
        with self._lock:
            for i, waiting in enumerate(self._waiting):
                if (waiting.turn.block or 0) <= block:
                    self._waiting = self._waiting[:i] + self._waiting[i + 1 :]
                    return waiting
        return None

    def restore(self, waiting: tuple[WaitingTurn, ...]) -> None:
        """Replaces all that waits."""
        with self._lock:
            self._waiting = waiting
