"""The thread that owns the device: it steps sessions block by block, each ahead of its playback.

    with Runtime(open_stream, frame_rate=24, limits=Limits(sessions=2)) as runtime:
        seat = runtime.join(request, on_event)  # from any thread; events come from the runtime's
        seat.turn(lambda stream: stream.set_prompt("a storm comes up"))  # at the next block border
        seat.leave()

Of the sessions whose lead over their playback is below `Limits.lead` the one with the smallest is
stepped next, so that device time is shared fairly and a new prompt is seen soon: a turn waits for
the block that is being made, and is seen when the lead has been played. It knows neither the model
nor the network: a stream is anything that makes chunks.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from omniforcing_jax.streaming.chunks import Chunk

POLL = 0.02  # seconds after which a stream that waits for its sound is asked again
MOST_TURNS = 8  # of one session that wait for a block border: each may hold megabytes


class Stream(Protocol):
    """What the runtime needs of a session (`StreamingSession`)."""

    def step(self) -> Chunk:
        """Makes the next block."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a runtime takes on; all times in seconds.

    Attributes:
      sessions: that are stepped side by side.
      waiting: that wait for one of those places; more are refused.
      lead: how far generation runs ahead of playback.
      longest: of one stream; it ends then.
      idle: a client that takes nothing for so long, or is paused for so long, loses its place.

    Raises:
      ValueError: a number below what makes sense.
    """

    sessions: int = 1
    waiting: int = 16
    lead: float = 1.5
    longest: float = 3600.0
    idle: float = 120.0

    def __post_init__(self):
        least = {"sessions": 1, "waiting": 0, "lead": 0.0, "longest": 1.0, "idle": 1.0}
        for name, value in least.items():
            if not value <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {value:g}, not {getattr(self, name)}")


class Full(RuntimeError):
    """No place, and none in the queue."""


@dataclasses.dataclass(frozen=True)
class Queued:
    """The session waits for a place, at this position of the queue, from 1."""

    position: int


@dataclasses.dataclass(frozen=True)
class Opened:
    """The session has its place, and its stream is open."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A block was made.

    Attributes:
      chunk: see `Chunk`.
      seconds: that making it took.
      lead: seconds of the stream that are made and not played yet.
      late: seconds that playback has stood still for, as the block came too late; 0 in time.
    """

    chunk: Chunk
    seconds: float
    lead: float
    late: float


@dataclasses.dataclass(frozen=True)
class Refused:
    """A turn could not be applied; the stream goes on without it."""

    problem: str


@dataclasses.dataclass(frozen=True)
class Over:
    """The session is over: why, and the error if that was one."""

    reason: str
    error: BaseException | None = None


Event = Queued | Opened | Made | Refused | Over
Turn = Callable[[Any], None]  # is given the stream, between two blocks


@dataclasses.dataclass
class Figures:
    """Counts since the start, and what is there now."""

    blocks: int = 0
    late_blocks: int = 0
    seconds: float = 0.0  # of making blocks
    sessions: int = 0
    waiting: int = 0
    refused: int = 0


class Seat:
    """A client's session. Its methods may be called from any thread, in any state."""

    def __init__(
        self, runtime: "Runtime", request: Any, on_event: Callable[[Event], None], paced: bool
    ):
        self._runtime, self._request, self._on_event = runtime, request, on_event
        self._paced = paced
        self._turns: collections.deque[Turn] = collections.deque()
        self._limited = 0  # of these turns, those that count
        self._stream: Stream | None = None
        self._made = self._taken = 0.0  # seconds of the stream
        self._started: float | None = None  # when its first block began to play
        self._paused_at: float | None = None
        self._heard = runtime.clock()  # of the client
        self._not_before = 0.0  # its sound has not arrived
        self._leaving: str | None = None

    def turn(self, turn: Turn, *, limited: bool = True) -> None:
        """Applies a change at the next block border, in the order of the calls.

        If it raises ValueError, the client hears `Refused`, and the stream goes on.

        Args:
          turn: is given the stream.
          limited: whether it counts among those that may wait; False if the caller has a limit of
            its own.

        Raises:
          ValueError: `MOST_TURNS` wait already.
        """
        with self._runtime.changed:
            if limited and self._limited >= MOST_TURNS:
                raise ValueError(
                    f"{MOST_TURNS} changes wait for the next block; send more when it is made"
                )
            self._limited += limited
            self._turns.append(turn)
            self._heard = self._runtime.clock()
            self._runtime.changed.notify()

    def taken(self, seconds: float) -> None:
        """The client has taken the stream up to here; no more than the lead is made beyond."""
        with self._runtime.changed:
            self._taken = max(self._taken, seconds)
            self._heard = self._runtime.clock()
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

    def leave(self, reason: str = "the client has left") -> None:
        """Gives the place back, after the block that is being made."""
        with self._runtime.changed:
            self._leaving = self._leaving or reason
            self._runtime.changed.notify()

    def _take_turns(self) -> list[Turn]:
        turns, self._limited = list(self._turns), 0
        self._turns.clear()
        return turns

    def _lead(self, now: float) -> float:
        played = 0.0 if self._started is None else now - self._started
        return self._made - played


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
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          open_stream: makes the stream of a request, in the runtime's thread. What it raises ends
            the session.
          frame_rate: frames per second of all streams.
          limits: see `Limits`.
          clock: replaced in tests.
        """
        self.limits, self.clock = limits, clock
        self.changed = threading.Condition()
        self._open, self._frame_rate = open_stream, frame_rate
        self._seats: list[Seat] = []
        self._queue: list[Seat] = []
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
          paced: False makes blocks as fast as they are taken, while no other's lead is short.

        Raises:
          Full: the queue is full, or the runtime is closing.
        """
        with self.changed:
            self.check_room()
            seat = Seat(self, request, on_event, paced)
            self._queue.append(seat)
            if len(self._queue) > self._free:
                on_event(Queued(len(self._queue) - self._free))
            self.changed.notify()
            return seat

    def check_room(self) -> None:
        """Raises Full where `join` would; before work is done for a client that is then refused."""
        with self.changed:
            if self._closing is not None:
                raise Full(self._closing)
            if len(self._queue) >= self.limits.waiting + self._free:
                self._figures.refused += 1
                raise Full(
                    f"all {self.limits.sessions} places are taken and {len(self._queue)} wait; "
                    "try again later"
                )

    @property
    def _free(self) -> int:
        return self.limits.sessions - len(self._seats)

    def figures(self) -> Figures:
        """Counts and what is there now."""
        with self.changed:
            return dataclasses.replace(
                self._figures, sessions=len(self._seats), waiting=len(self._queue)
            )

    def close(self, reason: str = "the server is being shut down") -> None:
        """Finishes the block that is being made, and ends all sessions."""
        with self.changed:
            self._closing = self._closing or reason
            self.changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                if self._closing is not None:
                    for seat in [*self._seats, *self._queue]:
                        seat._leaving = self._closing
                    self._drop_those_who_left()
                    return
            wait = self.advance()
            if wait != 0:
                with self.changed:
                    # what has changed since is seen at once: a waiting time of 0 costs nothing
                    self.changed.wait(0.0 if self._something_to_do() else wait)

    def advance(self) -> float | None:
        """Does the next piece of work: opens a stream, or makes a block.

        Returns:
          0 if there was something to do, otherwise seconds until there is, None if there is not.
        """
        with self.changed:
            self._drop_those_who_left()
            now = self.clock()
            opening = self._admit()
            seat = opening or self._most_urgent(now)
            if seat is None:
                return self._until_something_is_due(now)
            turns = [] if opening else seat._take_turns()
        if opening:
            self._begin(seat)
        else:
            self._step(seat, turns)
        return 0.0

    def _something_to_do(self) -> bool:
        now, places = self.clock(), [*self._seats, *self._queue]
        left = self._closing is not None or any(seat._leaving for seat in places)
        return bool(left or (self._queue and self._free) or self._most_urgent(now))

    def _drop_those_who_left(self) -> None:
        now, limits = self.clock(), self.limits
        for seat in self._seats:
            if now - seat._heard > limits.idle:
                silent = f"nothing was heard of the client for {limits.idle:g} s"
                seat._leaving = seat._leaving or silent
            elif seat._made >= limits.longest:
                seat._leaving = seat._leaving or f"streams end after {limits.longest:g} s here"
        for places in (self._seats, self._queue):
            for seat in [seat for seat in places if seat._leaving]:
                places.remove(seat)
                seat._stream = None
                self._tell(seat, Over(seat._leaving))

    def _admit(self) -> Seat | None:
        """The next of the queue, if there is a place; those behind move up."""
        if not self._queue or not self._free:
            return None
        seat = self._queue.pop(0)
        self._seats.append(seat)
        for position, other in enumerate(self._queue[max(self._free, 0) :], 1):
            self._tell(other, Queued(position))
        return seat

    def _due(self, seat: Seat, now: float) -> bool:
        """Whether a block may be made now but for its lead."""
        ahead = seat._made - seat._taken  # what the client has not taken: it may have stalled
        reach = max(2 * self.limits.lead, 3.0)
        return seat._paused_at is None and ahead <= reach and now >= seat._not_before

    def _most_urgent(self, now: float) -> Seat | None:
        lead = self.limits.lead
        due = [
            s for s in self._seats if self._due(s, now) and (s._lead(now) <= lead or not s._paced)
        ]
        return min(due, key=lambda seat: seat._lead(now), default=None)

    def _until_something_is_due(self, now: float) -> float | None:
        times = [self.limits.idle - (now - seat._heard) for seat in self._seats]
        times += [seat._not_before - now for seat in self._seats if seat._not_before > now]
        times += [s._lead(now) - self.limits.lead for s in self._seats if self._due(s, now)]
        return max(min(times), 0.0) + 1e-3 if times else None

    def _begin(self, seat: Seat) -> None:
        try:
            seat._stream = self._open(seat._request)
        except Exception as error:
            self._end(seat, error)
            return
        with self.changed:
            seat._heard = self.clock()
        self._tell(seat, Opened())

    def _step(self, seat: Seat, turns: list[Turn]) -> None:
        start = self.clock()
        try:
            for turn in turns:
                try:
                    turn(seat._stream)
                except ValueError as error:
                    self._tell(seat, Refused(str(error)))
            chunk = seat._stream.step()
        except Exception as error:
            self._end(seat, error)
            return
        with self.changed:
            now = self.clock()
            if chunk.waiting:
                seat._not_before = now + POLL
                return
            late = max(0.0, -seat._lead(now)) if seat._started is not None else 0.0
            seat._made += chunk.frames.shape[1] / self._frame_rate
            if seat._started is None and seat._made > 0:
                seat._started = now
            elif late:
                seat._started += late  # playback stood still
            self._figures.blocks += 1
            self._figures.late_blocks += late > 0
            self._figures.seconds += now - start
            made = Made(chunk, now - start, seat._lead(now), late)
        self._tell(seat, made)

    def _end(self, seat: Seat, error: Exception) -> None:
        with self.changed:
            with contextlib.suppress(ValueError):
                self._seats.remove(seat)
            seat._stream = None
        self._tell(seat, Over(str(error), error))

    def _tell(self, seat: Seat, event: Event) -> None:
        try:
            seat._on_event(event)
        except Exception as error:  # one client's transport is not the others' end
            seat._leaving = seat._leaving or f"its transport failed: {error}"
