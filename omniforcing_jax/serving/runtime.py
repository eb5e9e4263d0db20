"""The thread that owns the device: it steps sessions block by block, each ahead of its playback.

    with Runtime(open_stream, frame_rate=24, limits=Limits(sessions=2)) as runtime:
        seat = runtime.join(request, on_event)  # from any thread; events come from the runtime's
        seat.set_prompt("a storm comes up")     # at the next block border, as all turns
        seat.leave()

Of the sessions whose lead over their playback is below `Limits.lead` the one with the smallest is
stepped next, so that device time is shared fairly and a new prompt is seen soon: a turn waits for
the block that is being made, and is seen when the lead has been played. Where more blocks are due,
the next one is begun before the pixels of this one are copied to the host. When sessions need more
than the device can give, `load` says what is left out. It knows neither the model nor the network:
a stream is anything that makes chunks.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from omniforcing_jax.serving.events import (
    Event,
    Figures,
    Full,
    Limits,
    Made,
    Opened,
    Over,
    Queued,
    Refused,
    Shed,
)
from omniforcing_jax.serving.load import Load
from omniforcing_jax.streaming.chunks import PendingBlock
from omniforcing_jax.streaming.turns import TakesTurns, Turn

POLL = 0.02  # seconds after which a stream that waits for its sound is asked again
MOST_TURNS = 8  # of one session that wait for a block border, sound aside: some hold megabytes


class Stream(Protocol):
    """What the runtime needs of a session (`StreamingSession`)."""

    waiting_turns: tuple[Turn, ...]
    num_steps: int

    def add(self, *turns: Turn) -> None:
        """Queues turns for the next block border."""

    def begin(self) -> PendingBlock:
        """Asks the device for the next block."""

    def snapshot(self) -> dict[str, Any]:
        """All that it goes on from."""


class Seat(TakesTurns):
    """A client's session. Its methods may be called from any thread, in any state."""

    def __init__(
        self, runtime: "Runtime", request: Any, on_event: Callable[[Event], None], paced: bool
    ):
        self._runtime, self._request, self._on_event = runtime, request, on_event
        self._paced = paced
        self._stream: Stream | None = None
        self._steps: int | None = None  # of its stream
        self._begun = self._made = self._taken = 0.0  # seconds of the stream
        self._started: float | None = None  # when its first block began to play
        self._paused_at: float | None = None
        self._heard = runtime.clock()  # of the client
        self._not_before = 0.0  # its sound has not arrived
        self._leaving: str | None = None
        self._keep = False  # a snapshot, when it leaves

    def add(self, *turns: Turn) -> None:
        """Queues turns for the next block border, in the order of the calls.

        One that does not fit then any more gives `Refused`, and the stream goes on.

        Raises:
          ValueError: the stream is not open, `MOST_TURNS` wait already, or the turn does not fit.
        """
        with self._runtime.changed:
            self._heard, stream = self._runtime.clock(), self._stream
        if stream is None:
            raise ValueError("the stream has not begun, or is over: there is nothing to steer")
        for turn in turns:
            waiting = [other for other in stream.waiting_turns if other.kind != "audio"]
            if turn.kind != "audio" and len(waiting) >= MOST_TURNS:
                raise ValueError(
                    f"{MOST_TURNS} changes wait for the next block; send more when it is made"
                )
            stream.add(turn)
        with self._runtime.changed:
            self._runtime.changed.notify()

    def taken(self, seconds: float) -> None:
        """The client has taken the stream up to here; no more than the lead is made beyond."""
        with self._runtime.changed:
            if seconds > self._taken:  # a client that is paused, or stalls, may say the same again
                self._taken, self._heard = seconds, self._runtime.clock()
                self._runtime.changed.notify()

    def pause(self) -> None:
        """Makes no more blocks until `resume`; playback stands still as well."""
        with self._runtime.changed:
            if self._paused_at is None:
                self._paused_at = self._heard = self._runtime.clock()

    def resume(self) -> None:
        """Goes on."""
        with self._runtime.changed:
            if self._paused_at is not None:
                now = self._runtime.clock()
                if self._started is not None:
                    self._started += now - self._paused_at
                self._paused_at, self._heard = None, now
                self._runtime.changed.notify()

    def leave(self, reason: str = "the client has left", *, keep: bool = False) -> None:
        """Gives the place back, after the block that is being made.

        Args:
          reason: that the client is told.
          keep: save the session, so that it can be taken up again.
        """
        with self._runtime.changed:
            if self._leaving is None:
                self._leaving, self._keep = reason, keep
            self._runtime.changed.notify()

    def _lead(self, now: float, seconds: float) -> float:
        """Of so much of the stream over its playback."""
        return seconds - (0.0 if self._started is None else now - self._started)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A block that the device makes."""

    seat: Seat
    pending: PendingBlock
    start: float


class Runtime:
    """See the module.

    Attributes:
      changed: held by whoever reads or changes a seat; notified of changes.
      clock: seconds that never go back.
    """

    def __init__(
        self,
        open_stream: Callable[[Any], Stream],
        frame_rate: float,
        limits: Limits | None = None,
        load: Load | None = None,
        save: Callable[[Any, dict[str, Any]], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          open_stream: makes the stream of a request, in the runtime's thread. What it raises ends
            the session.
          frame_rate: frames per second of all streams.
          limits: see `Limits`.
          load: what blocks cost, and what may be left out; without it that is nothing.
          save: keeps the snapshot of a request's stream, in a thread of its own; says whether it
            did. The place is free again when it returns.
          clock: replaced in tests.
        """
        self.limits, self.load, self.clock = limits or Limits(), load or Load(), clock
        self.changed = threading.Condition()
        self._open, self._frame_rate = open_stream, frame_rate
        self._seats: list[Seat] = []
        self._queue: list[Seat] = []
        self._pending: collections.deque[_Begun] = collections.deque()
        self._done = 0.0  # when the last block was
        self._longest_chunk = 0
        self._save, self._being_saved = save, 0
        self._saver = ThreadPoolExecutor(1, "saver")
        self._closing: str | None = None
        self._figures = Figures()
        self._thread = threading.Thread(target=self._run, name="runtime", daemon=True)

    def __enter__(self) -> "Runtime":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def join(self, request: Any, on_event: Callable[[Event], None], *, paced: bool = True) -> Seat:
        """Takes a place, or one in the queue.

        Args:
          request: what `open_stream` is called with.
          on_event: called from the runtime's thread (the first `Queued` from this one); it must
            return at once.
          paced: False makes blocks as fast as they are taken, while no other's lead is short; such
            a session is not saved.

        Raises:
          Full: the queue is full, or the runtime is closing.
        """
        with self.changed:
            self.check_room()
            seat = Seat(self, request, on_event, paced)
            self._queue.append(seat)
            if (position := len(self._queue) - self._admissible) > 0:
                on_event(Queued(position))
            self.changed.notify()
            return seat

    def check_room(self) -> None:
        """Raises Full where `join` would; before work is done for a client that is then refused."""
        with self.changed:
            if self._closing is not None:
                raise Full(self._closing)
            if len(self._queue) >= self._queue_places + self._admissible:
                self._figures.refused += 1
                busy = f"{len(self._seats)} of {self.limits.sessions} places are taken"
                needed = self.load.needed(len(self._seats))
                raise Full(
                    f"{busy}, which need {needed:.0%} of the device's time, and "
                    f"{len(self._queue)} wait; try again later"
                )

    @property
    def _queue_places(self) -> int:
        return self.limits.waiting if self.load.queue_open else 0

    @property
    def _admissible(self) -> int:
        """How many may have a place now: by memory, and by the time that blocks take."""
        free = self.limits.sessions - len(self._seats) - self._being_saved
        while free > 0 and not self.load.fits(len(self._seats) + free):
            free -= 1
        return max(free, 0)

    def figures(self) -> Figures:
        """Counts and what is there now."""
        with self.changed:
            sessions = len(self._seats)
            return dataclasses.replace(
                self._figures,
                sessions=sessions,
                waiting=len(self._queue),
                steps=self.load.steps,
                load=self.load.needed(sessions),
                queue_places=self._queue_places,
            )

    @property
    def is_open(self) -> bool:
        """Whether it runs and takes sessions."""
        return self._closing is None and self._thread.is_alive()

    def close(self, reason: str = "the server is being shut down") -> None:
        """Finishes the blocks that are being made, and saves and ends all sessions."""
        with self.changed:
            self._closing = self._closing or reason
            self.changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._saver.shutdown()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # nobody may wait for what never comes
            self._closing = f"the server has failed: {error}"
            for seat in [*self._seats, *self._queue]:
                self._tell(seat, Over(self._closing, error))
            raise

    def _serve(self) -> None:
        while True:
            if self._closing is not None:
                with self.changed:
                    for seat in [*self._seats, *self._queue]:
                        if seat._leaving is None:
                            seat._leaving, seat._keep = self._closing, seat._paced
                self._drop_those_who_left()
                return
            wait = self.advance()
            if wait != 0:
                with self.changed:
                    # what has changed since is seen at once: a waiting time of 0 costs nothing
                    self.changed.wait(0.0 if self._something_to_do() else wait)

    def advance(self) -> float | None:
        """Does the next piece of work: opens a stream, or begins a block and ends an earlier one.

        Returns:
          0 if there was something to do, otherwise seconds until there is, None if there is not.
        """
        self._drop_those_who_left()
        with self.changed:
            now = self.clock()
            opening = self._admit()
            seat = opening or self._most_urgent(now)
            if seat is None and not self._pending:
                return self._until_something_is_due(now)
        if opening:
            self._open_seat(seat)
            return 0.0
        if seat is not None:
            self._begin_block(seat)
        if self._pending and (seat is None or len(self._pending) > 1):
            self._end_block()
        return 0.0

    def _something_to_do(self) -> bool:
        now, places = self.clock(), [*self._seats, *self._queue]
        left = self._closing is not None or any(seat._leaving for seat in places)
        return bool(left or (self._queue and self._admissible) or self._most_urgent(now))

    def _drop_those_who_left(self) -> None:
        with self.changed:
            now, limits = self.clock(), self.limits
            for seat in self._seats:
                if seat._leaving is not None:
                    continue
                if now - seat._heard > limits.idle:
                    seat._leaving = f"nothing was heard of the client for {limits.idle:g} s"
                    seat._keep = seat._paced
                elif seat._begun >= limits.longest:
                    seat._leaving = f"streams end after {limits.longest:g} s here"
            leaving = [seat for seat in [*self._seats, *self._queue] if seat._leaving]
        while self._pending and any(begun.seat in leaving for begun in self._pending):
            self._end_block()
        with self.changed:
            for seat in leaving:
                self._drop(seat)

    def _drop(self, seat: Seat) -> None:
        """Out of its place, which is free at once unless the session is saved."""
        places = self._queue if seat in self._queue else self._seats
        if seat not in places:  # its last block has failed
            return
        places.remove(seat)
        stream, seat._stream = seat._stream, None
        if self._save is None or not seat._keep or stream is None:
            self._tell(seat, Over(seat._leaving))
            return
        self._being_saved += 1
        self._saver.submit(self._saved, seat, stream)

    def _saved(self, seat: Seat, stream: Stream) -> None:
        saved = False
        try:
            saved = self._save(seat._request, stream.snapshot())
        except Exception as error:  # it is lost then; the others are not
            seat._leaving += f" (it could not be saved: {error})"
        del stream
        with self.changed:
            self._being_saved -= 1
            self._figures.saved += saved
            self.changed.notify()
        self._tell(seat, Over(seat._leaving, saved=saved))

    def _admit(self) -> Seat | None:
        """The next of the queue, if there is a place; those behind move up."""
        if not self._queue or not self._admissible:
            return None
        seat = self._queue.pop(0)
        self._seats.append(seat)
        for position, other in enumerate(self._queue[self._admissible :], 1):
            self._tell(other, Queued(position))
        return seat

    def _due(self, seat: Seat, now: float) -> bool:
        """Whether a block may be made now but for its lead."""
        ahead = seat._begun - seat._taken  # what the client has not taken: it may have stalled
        reach = max(2 * self.limits.lead, 3.0)
        return seat._paused_at is None and ahead <= reach and now >= seat._not_before

    def _most_urgent(self, now: float) -> Seat | None:
        lead = self.limits.lead
        due = [
            seat
            for seat in self._seats
            if self._due(seat, now) and (seat._lead(now, seat._begun) <= lead or not seat._paced)
        ]
        return min(due, key=lambda seat: seat._lead(now, seat._begun), default=None)

    def _until_something_is_due(self, now: float) -> float | None:
        times = [self.limits.idle - (now - seat._heard) for seat in self._seats]
        times += [seat._not_before - now for seat in self._seats if seat._not_before > now]
        due = [seat for seat in self._seats if self._due(seat, now)]
        times += [seat._lead(now, seat._begun) - self.limits.lead for seat in due]
        return max(min(times), 0.0) + 1e-3 if times else None

    def _open_seat(self, seat: Seat) -> None:
        try:
            stream = self._open(seat._request)
        except Exception as error:
            self._end(seat, error)
            return
        with self.changed:
            seat._stream, seat._steps, seat._heard = stream, stream.num_steps, self.clock()
        self._tell(seat, Opened())

    def _begin_block(self, seat: Seat) -> None:
        start = self.clock()
        try:
            if self.load.sheds and seat._steps != self.load.steps:
                seat._stream.add(Turn("steps", {"steps": self.load.steps}))
                seat._steps = self.load.steps
            pending = seat._stream.begin()
        except ValueError as error:  # of a turn; those behind it are applied the next time
            self._tell(seat, Refused(str(error)))
            return
        except Exception as error:
            self._end(seat, error)
            return
        with self.changed:
            if pending.waiting:
                seat._not_before = self.clock() + POLL
                return
            seat._begun += pending.num_frames / self._frame_rate
        self._pending.append(_Begun(seat, pending, start))

    def _end_block(self) -> None:
        """Waits for the oldest of the blocks that were begun."""
        begun = self._pending.popleft()
        seat = begun.seat
        try:
            chunk = begun.pending.chunk()
        except Exception as error:
            self._end(seat, error)
            return
        with self.changed:
            now = self.clock()
            took, self._done = now - max(begun.start, self._done), now
            lead = seat._lead(now, seat._made)
            late = max(0.0, -lead) if seat._started is not None else 0.0
            seat._made += chunk.frames.shape[1] / self._frame_rate
            if seat._started is None and seat._made > 0:
                seat._started = now
            elif late:
                seat._started += late  # playback stood still
            self._figures.blocks += 1
            self._figures.late_blocks += late > 0
            self._figures.seconds += took
            self._figures.host_seconds += chunk.timings.host
            made = Made(chunk, took, seat._lead(now, seat._made), self.load.steps, late)
            shed = self._measure(chunk.frames.shape[1], took, late > 0)
            seats = list(self._seats)
        self._tell(seat, made)
        for other in seats if shed else ():
            self._tell(other, Shed(self.load.steps, self._queue_places))

    def _measure(self, frames: int, took: float, late: bool) -> bool:
        """Whether load is shed otherwise from now on."""
        self._longest_chunk = max(self._longest_chunk, frames)
        if frames > 0.7 * self._longest_chunk:  # a stream's first blocks show less than they cost
            self.load.measured(took * self._frame_rate / frames)
        return self.load.adjust(sum(seat._paced for seat in self._seats), late)

    def _end(self, seat: Seat, error: Exception) -> None:
        with self.changed:
            with contextlib.suppress(ValueError):
                self._seats.remove(seat)
            seat._stream = None
            others = [begun for begun in self._pending if begun.seat is not seat]
            self._pending = collections.deque(others)
        self._tell(seat, Over(str(error), error))

    def _tell(self, seat: Seat, event: Event) -> None:
        try:
            seat._on_event(event)
        except Exception as error:  # one client's transport is not the others' end
            seat._leaving = seat._leaving or f"its transport failed: {error}"
