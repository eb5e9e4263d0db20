"""The thread that owns the device: it steps sessions block by block, each ahead of its playback.

    with Runtime(open_stream, frame_rate=24, limits=Limits(sessions=2)) as runtime:
        seat = runtime.join(request, on_event)  # from any thread; events come from the runtime's
        seat.set_prompt("a storm comes up")     # at the next block border, as all turns
        seat.leave()

Of the sessions whose lead over their playback is below `Limits.lead` the one with the smallest is
stepped next, so that device time is shared fairly and a new prompt is seen soon: a turn waits for
the block that is being made, and is seen when the lead has been played. Where more blocks are due,
the next one is begun before the pixels of this one are copied to the host. One that has just begun
comes behind those that would miss a deadline by its block, streams are opened in a thread of their
own, and none as long as a lead is short: whoever comes and goes takes what time is left. When
sessions need more than the device can give, `load` says what is left out. It knows neither the
model nor the network: a stream is anything that makes chunks.
"""

import collections
import contextlib
import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from omniforcing_jax.serving.seat import Keeper, Seat, Stream
from omniforcing_jax.streaming.chunks import PendingBlock
from omniforcing_jax.streaming.turns import Turn

_log = logging.getLogger(__name__)
POLL = 0.02  # seconds after which a stream that waits for its sound is asked again


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A block that the device makes."""

    seat: Seat
    pending: PendingBlock
    start: float
    steps: int


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
        keeper: Keeper | None = None,
        room: Callable[[], int] = lambda: sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          open_stream: makes the stream of a request, in a thread of its own. What it raises ends
            the session.
          frame_rate: frames per second of all streams.
          limits: see `Limits`.
          load: what blocks cost, and what may be left out; without it that is nothing.
          keeper: keeps sessions that are left, whose places are free again when that is done, and
            from time to time those that go on, one at a time.
          room: how many more sessions the device's memory holds now.
          clock: replaced in tests.
        """
        self.limits, self.load, self.clock = limits or Limits(), load or Load(), clock
        self.changed = threading.Condition()
        self._open, self._frame_rate, self._room = open_stream, frame_rate, room
        self._seats: list[Seat] = []
        self._queue: list[Seat] = []
        self._pending: collections.deque[_Begun] = collections.deque()
        self._done = 0.0  # when the last block was
        self._longest_chunk = 0
        self._keeper, self._being_saved, self._copying = keeper, 0, False
        self._opener, self._saver = (ThreadPoolExecutor(1, name) for name in ("opener", "saver"))
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
            seat = Seat(request, on_event, paced, self.changed, self.clock)
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
        if free > 0 and self._seats:  # one always has a place
            opening = sum(seat._stream is None for seat in self._seats)
            free = min(free, self._room() - opening)
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
        self._opener.shutdown()
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
                self._opener.shutdown()
                with self.changed:
                    for seat in [*self._seats, *self._queue]:
                        if seat._leaving is None:
                            seat._leaving, seat._keep = self._closing, seat._paced
                self._take_opened()
                self._drop_those_who_left()
                return
            wait = self.advance()
            if wait != 0:
                with self.changed:
                    # what has changed since is seen at once: a waiting time of 0 costs nothing
                    self.changed.wait(0.0 if self._something_to_do() else wait)

    def advance(self) -> float | None:
        """Does the next piece of work: begins a block and ends an earlier one, or lets sessions in.

        Returns:
          0 if there was something to do, otherwise seconds until there is, None if there is not.
        """
        self._take_opened()
        self._drop_those_who_left()
        with self.changed:
            now = self.clock()
            while self._lets_in(now):
                self._admit()
            seat = self._most_urgent(now)
            if seat is None and not self._pending:
                return self._until_something_is_due(now)
        if seat is not None:
            self._begin_block(seat)
        if self._pending and (seat is None or len(self._pending) > 1):
            self._end_block()
        return 0.0

    def _something_to_do(self) -> bool:
        now, places = self.clock(), [*self._seats, *self._queue]
        opening = [seat for seat in self._seats if seat._opening is not None]
        left = any(seat._leaving for seat in places if seat not in opening)
        opened = any(seat._opening.done() for seat in opening)
        ready = left or opened or self._lets_in(now) or self._most_urgent(now)
        return self._closing is not None or bool(ready)

    def _drop_those_who_left(self) -> None:
        with self.changed:
            now, limits = self.clock(), self.limits
            for seat in self._seats:
                if seat._leaving is not None or seat._opening is not None:
                    continue
                if now - seat._heard > limits.idle:
                    seat._leaving = f"nothing was heard of the client for {limits.idle:g} s"
                    seat._keep = seat._paced
                elif seat._begun >= limits.longest:
                    seat._leaving = f"streams end after {limits.longest:g} s here"
            places = [*self._seats, *self._queue]
            leaving = [seat for seat in places if seat._leaving and seat._opening is None]
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
        if self._keeper is not None and stream is not None and not seat._keep:
            self._saver.submit(self._keeper.forget, seat._request)
        if self._keeper is None or stream is None or not (seat._keep and stream.num_made):
            self._tell(seat, Over(seat._leaving))
            return
        self._being_saved += 1
        saving = self._keeper.saving(seat._request, stream, goes_on=False)
        self._saver.submit(self._saved, seat, saving)

    def _saved(self, seat: Seat, saving: Callable[[], bool]) -> None:
        saved = False
        try:
            saved = saving()
        except Exception as error:  # it is lost then; the others are not
            seat._leaving += f" (it could not be saved: {error})"
        del saving  # and with it the stream
        with self.changed:
            self._being_saved -= 1
            self._figures.saved += saved
            self.changed.notify()
        self._tell(seat, Over(seat._leaving, saved=saved))

    def _copy(self, seat: Seat) -> None:
        """Has a session kept that goes on, if it is time, and its blocks are done."""
        now = self.clock()
        done = all(begun.seat is not seat for begun in self._pending)
        if self._copying or now < seat._copy_due + (0.0 if done else self._keeper.every):
            return
        seat._copy_due, self._copying = now + self._keeper.every, True
        with self._copying_may_fail():
            saving = self._keeper.saving(seat._request, seat._stream, goes_on=True)
            self._saver.submit(self._copied, seat, saving)

    def _copied(self, seat: Seat, saving: Callable[[], bool]) -> None:
        with self._copying_may_fail():
            kept, self._copying = saving(), False
            seat._copied |= kept
            self._figures.copies += kept

    @contextlib.contextmanager
    def _copying_may_fail(self) -> Iterator[None]:
        """For want of memory or of room on the disk: the session goes on."""
        try:
            yield
        except Exception as error:
            self._copying = False
            _log.warning("a session that goes on could not be saved: %s", error)

    def _lets_in(self, now: float) -> bool:
        """Whether the next of the queue may have a place: if there is one, and no lead is short."""
        return bool(self._queue and self._admissible and self._has_time(now))

    def _has_time(self, now: float) -> bool:
        """Whether a block of a session that has had no lead yet would make no other late."""
        settled = [seat for seat in self._seats if seat._settled and self._due(seat, now)]
        margin = self._margin(len(self._pending))
        return all(seat._lead(now, seat._begun) >= margin for seat in settled)

    def _admit(self) -> None:
        """Has the stream of the next of the queue opened; those behind move up."""
        seat = self._queue.pop(0)
        self._seats.append(seat)
        for position, other in enumerate(self._queue[self._admissible :], 1):
            self._tell(other, Queued(position))
        seat._opening = self._opener.submit(self._open, seat._request)
        seat._opening.add_done_callback(self._notify)

    def _notify(self, *_: Any) -> None:
        with self.changed:
            self.changed.notify()

    def _margin(self, pending: int) -> float:
        """Lead with which a session is in time behind so many blocks, one more, and all others'."""
        block = self.load.slow(self.load.steps) * self._longest_chunk / self._frame_rate
        margin = (pending + 1 + sum(seat._settled for seat in self._seats)) * block
        # no session has more lead when it is not due: the device would stand still
        return margin if pending else min(margin, self.limits.lead)

    def _due(self, seat: Seat, now: float) -> bool:
        """Whether a block may be made now but for its lead."""
        if seat._stream is None:
            return False
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
        if not self._has_time(now):
            due = [seat for seat in due if seat._settled]
        return min(due, key=lambda seat: seat._lead(now, seat._begun), default=None)

    def _until_something_is_due(self, now: float) -> float | None:
        there = [seat for seat in self._seats if seat._opening is None]
        times = [self.limits.idle - (now - seat._heard) for seat in there]
        times += [seat._not_before - now for seat in self._seats if seat._not_before > now]
        due = [seat for seat in self._seats if self._due(seat, now)]
        times += [seat._lead(now, seat._begun) - self.limits.lead for seat in due]
        return max(min(times), 0.0) + 1e-3 if times else None

    def _take_opened(self) -> None:
        """Gives sessions their streams, as far as they are open."""
        with self.changed:
            opened = [seat for seat in self._seats if seat._opening and seat._opening.done()]
        for seat in opened:
            with self.changed:
                opening, seat._opening = seat._opening, None
            if (error := opening.exception()) is not None:
                self._end(seat, error)
                continue
            stream = opening.result()
            with self.changed:
                seat._stream, seat._steps, seat._heard = stream, stream.num_steps, self.clock()
                if self._keeper is not None and seat._paced:
                    seat._copy_due = self.clock() + self._keeper.every
            self._tell(seat, Opened())

    def _begin_block(self, seat: Seat) -> None:
        if seat._copy_due < math.inf:
            self._copy(seat)
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
        self._pending.append(_Begun(seat, pending, start, self.load.steps))

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
            lead = seat._lead(now, seat._made)
            made = Made(chunk, took, lead, self.load.steps, late)
            seat._settled = seat._settled or (seat._paced and lead >= self._margin(0))
            shed = self._measure(chunk.frames.shape[1], took, begun.steps, late > 0)
            seats = list(self._seats)
        self._tell(seat, made)
        for other in seats if shed else ():
            self._tell(other, Shed(self.load.steps, self._queue_places))

    def _measure(self, frames: int, took: float, steps: int, late: bool) -> bool:
        """Whether load is shed otherwise from now on."""
        self._longest_chunk = max(self._longest_chunk, frames)
        if frames > 0.7 * self._longest_chunk:  # a stream's first blocks show less than they cost
            self.load.measured(took * self._frame_rate / frames, steps)
        return self.load.adjust(sum(seat._paced for seat in self._seats), late)

    def _end(self, seat: Seat, error: BaseException) -> None:
        with self.changed:
            with contextlib.suppress(ValueError):
                self._seats.remove(seat)
            seat._stream = None
            others = [begun for begun in self._pending if begun.seat is not seat]
            self._pending = collections.deque(others)
        self._tell(seat, Over(str(error), error, saved=seat._copied))

    def _tell(self, seat: Seat, event: Event) -> None:
        try:
            seat._on_event(event)
        except Exception as error:  # one client's transport is not the others' end
            seat._leaving = seat._leaving or f"its transport failed: {error}"
