"""A client's session, as the runtime steps it."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition
from typing import Any, Protocol

from omniforcing_jax.serving.events import Event
from omniforcing_jax.streaming.chunks import PendingBlock
from omniforcing_jax.streaming.turns import TakesTurns, Turn

MOST_TURNS = 8  # of one session that wait for a block border, sound aside: some hold megabytes


class Stream(Protocol):
    """What the runtime needs of a session (`StreamingSession`)."""

    waiting_turns: tuple[Turn, ...]
    num_steps: int
    num_made: int

    def add(self, *turns: Turn) -> None:
        """Queues turns for the next block border."""

    def begin(self) -> PendingBlock:
        """Asks the device for the next block."""


class Keeper(Protocol):
    """Keeps sessions so that they can be taken up again.

    Attributes:
      every: seconds after which a session that goes on is kept again.
    """

    every: float

    def saving(self, request: Any, stream: Stream, *, goes_on: bool) -> Callable[[], bool]:
        """Called at a block border, by the thread that steps: what saves the stream of a request.

        Args:
          goes_on: whether the stream makes more blocks meanwhile.

        Returns:
          Called in a thread beside it; says whether the session can be taken up again.
        """

    def forget(self, request: Any) -> None:
        """The session is over, and nobody will take it up; called in that thread."""


class Seat(TakesTurns):
    """A client's session. Its methods may be called from any thread, in any state."""

    def __init__(
        self,
        request: Any,
        on_event: Callable[[Event], None],
        paced: bool,
        changed: Condition,
        clock: Callable[[], float],
    ):
        """Of a `Runtime`, whose `join` says what the first three are; see there for the others."""
        self._request, self._on_event, self._paced = request, on_event, paced
        self._changed, self._clock = changed, clock
        self._stream: Stream | None = None
        self._opening: Future[Stream] | None = None  # until it has its stream
        self._settled = False  # it has had a lead, which others may not take from it
        self._steps: int | None = None  # of its stream
        self._begun = self._made = self._taken = 0.0  # seconds of the stream
        self._started: float | None = None  # when its first block began to play
        self._paused_at: float | None = None
        self._heard = clock()  # of the client
        self._not_before = 0.0  # its sound has not arrived
        self._leaving: str | None = None
        self._keep = False  # a snapshot, when it leaves
        self._copied = False  # there is one of it already
        self._copy_due = math.inf

    def add(self, *turns: Turn) -> None:
        """Queues turns for the next block border, in the order of the calls.

        One that does not fit then any more gives `Refused`, and the stream goes on.

        Raises:
          ValueError: the stream is not open, `MOST_TURNS` wait already, or the turn does not fit.
        """
        with self._changed:
            self._heard, stream = self._clock(), self._stream
        if stream is None:
            raise ValueError("the stream has not begun, or is over: there is nothing to steer")
        for turn in turns:
            waiting = [other for other in stream.waiting_turns if other.kind != "audio"]
            if turn.kind != "audio" and len(waiting) >= MOST_TURNS:
                raise ValueError(
                    f"{MOST_TURNS} changes wait for the next block; send more when it is made"
                )
            stream.add(turn)
        with self._changed:
            self._changed.notify()

    def taken(self, seconds: float) -> None:
        """The client has taken the stream up to here; no more than the lead is made beyond."""
        with self._changed:
            if seconds > self._taken:  # a client that is paused, or stalls, may say the same again
                self._taken, self._heard = seconds, self._clock()
                self._changed.notify()

    def pause(self) -> None:
        """Makes no more blocks until `resume`; playback stands still as well."""
        with self._changed:
            if self._paused_at is None:
                self._paused_at = self._heard = self._clock()

    def resume(self) -> None:
        """Goes on."""
        with self._changed:
            if self._paused_at is not None:
                now = self._clock()
                if self._started is not None:
                    self._started += now - self._paused_at
                self._paused_at, self._heard = None, now
                self._changed.notify()

    def leave(self, reason: str = "the client has left", *, keep: bool = False) -> None:
        """Gives the place back, after the block that is being made.

        Args:
          reason: that the client is told.
          keep: save the session, so that it can be taken up again.
        """
        with self._changed:
            if self._leaving is None:
                self._leaving, self._keep = reason, keep
            self._changed.notify()

    def _lead(self, now: float, seconds: float) -> float:
        """Of so much of the stream over its playback."""
        return seconds - (0.0 if self._started is None else now - self._started)
