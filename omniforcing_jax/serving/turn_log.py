"""What a session's stream follows from, besides the weights: prompt, seed, and what was said to it.

log = TurnLog.from_json(text)
session = pipeline.session(rollout, log.prompt, prompts=encoder, seed=log.seed, steerable=True,
                           text_length=encoder.length, given="audio" if log.sound else None)
session.add(*log.turns)  # and it makes the same blocks, bit for bit
"""

import dataclasses
import json
import threading
from typing import Any

import jax
import numpy as np

from omniforcing_jax.streaming.turns import Turn, turns_from_json, turns_to_json

LARGEST_LOG = 64 << 20  # bytes of pictures and sound; what comes behind them is not kept


@dataclasses.dataclass
class TurnLog:
    """A session's beginning, and the turns that were applied.

    Attributes:
      name: of the session, which only its client knows.
      prompt, seed, sound: see `protocol.Start`.
      turns: as they were applied.
      complete: whether none is missing, as pictures and sound became too large.
      taken_up: how many blocks were made when it was taken up from a snapshot, each time; if its
        server had died, blocks that had been made behind them, and turns, are no part of it.
    """

    name: str
    prompt: str
    seed: int
    sound: bool
    turns: list[Turn] = dataclasses.field(default_factory=list)
    complete: bool = True
    taken_up: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self._size, self._lock = sum(map(_size, self.turns)), threading.Lock()

    def append(self, turn: Turn) -> None:
        """Adds a turn that was applied."""
        with self._lock:
            self._size += _size(turn)
            self.complete = self.complete and self._size <= LARGEST_LOG
            if self.complete:
                self.turns.append(turn)

    def copy(self) -> "TurnLog":
        """The log as it is now."""
        with self._lock:
            lists = {"turns": list(self.turns), "taken_up": list(self.taken_up)}
            return dataclasses.replace(self, **lists)

    def to_json(self) -> str:
        """The log as text."""
        now = self.copy()
        fields = {"prompt": now.prompt, "seed": now.seed, "sound": now.sound}
        fields |= {"complete": now.complete, "taken_up": now.taken_up}
        return json.dumps(fields | {"turns": json.loads(turns_to_json(now.turns))})

    @classmethod
    def from_json(cls, text: str, name: str = "") -> "TurnLog":
        """The log of such a text.

        Raises:
          ValueError: it is none.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            turns = turns_from_json(json.dumps(fields.pop("turns")))
            return cls(name, turns=turns, **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no log of turns: {error}") from error


def _size(turn: Turn) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(turn.payload))


class TurnLogs:
    """Those of the sessions that run, and of the last ones that ran."""

    def __init__(self, most_ended: int = 32):
        self._logs: dict[str, TurnLog] = {}
        self._ended: list[str] = []
        self._most_ended = most_ended

    def add(self, log: TurnLog) -> None:
        """A session begins, or goes on."""
        self._logs[log.name] = log
        self._ended = [name for name in self._ended if name != log.name]

    def end(self, name: str) -> None:
        """The session is over."""
        if name in self._logs and name not in self._ended:
            self._ended.append(name)
        while len(self._ended) > self._most_ended:
            del self._logs[self._ended.pop(0)]

    def get(self, name: str) -> TurnLog | None:
        """The log of a session, or None if there is none of that name."""
        return self._logs.get(name)
