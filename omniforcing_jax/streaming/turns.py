"""Turns: what is said to a stream while it runs, and the queue in which that waits for its block.

    session.set_prompt("a storm")        Turn("prompt", {"prompt": "a storm"}) is checked, and waits
    session.step()                       applies what waits, in order, and makes the next block
    log(turn)                            the turn, with the block before which it was applied

A stream follows from weights, configuration, seed and turns: another session of the same weights,
configuration and seed, to which the logged turns are added (`session.add(*log)`), makes the same
blocks bit for bit, as each turn waits for the block that it was applied before.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax

MEDIA_TURNS = {
    "image": ("pixels", "strength"),
    "audio": ("waveform", "rate"),
    "frames": ("frames",),
    "clip": ("frames", "waveform", "rate"),
    "reference": ("pixels", "waveform", "rate"),
}
TURNS = {"prompt": ("prompt",), "seed": ("seed",)} | MEDIA_TURNS


@dataclasses.dataclass(frozen=True)
class Turn:
    """One thing that is said to a session.

    Attributes:
      kind: one of `TURNS`.
      payload: arguments of the session's method of that kind, by name: host arrays, sentences and
        numbers.
      block: before which it is applied, in blocks made (`StreamingSession.num_blocks`); None is
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
        if sorted(self.payload) != sorted(TURNS[self.kind]):
            needs = ", ".join(TURNS[self.kind])
            raise ValueError(f"a turn {self.kind!r} has {needs}, not {', '.join(self.payload)}")


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
