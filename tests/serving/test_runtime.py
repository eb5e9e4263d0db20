"""Who is stepped when, with streams that take a fixed time and a clock that is set by hand."""

import dataclasses
import types
from concurrent import futures

import numpy as np
import pytest

from omniforcing_jax.serving.events import (
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
from omniforcing_jax.serving.room import Room
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.seat import MOST_TURNS
from omniforcing_jax.streaming.chunks import Chunk, PendingBlock, Timings
from omniforcing_jax.streaming.turns import Turn

FRAME_RATE = 24


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeStream:
    """Makes a second of video in `cost` seconds of the clock, and logs who was stepped."""

    def __init__(self, request, clock, log):
        self.name, self.cost = request
        self.clock, self.log = clock, log
        self.prompt, self.block, self.waiting, self.num_steps = "first", 0, False, 4
        self.num_made = 0  # or asked for
        self.waiting_turns, self.order = (), []

    def add(self, turn: Turn) -> None:
        self.waiting_turns += (turn,)

    def begin(self) -> PendingBlock:
        while self.waiting_turns:
            turn, *others = self.waiting_turns
            self.waiting_turns = tuple(others)
            if turn.kind == "rewind":
                raise ValueError("block 9 cannot be gone back to")
            if turn.kind == "prompt":
                self.prompt = turn.payload["prompt"]
            self.num_steps = turn.payload.get("steps", self.num_steps)
        self.order.append("begin")
        self.waiting = self.prompt == "wait"
        self.num_made += not self.waiting
        return PendingBlock(0 if self.waiting else FRAME_RATE, self.waiting, self.chunk)

    def chunk(self) -> Chunk:
        if self.prompt == "break":
            raise FloatingPointError("block 3 has latents that are not finite")
        self.order.append("chunk")
        self.clock.now += self.cost * (self.num_steps + 1) / 5
        self.log.append((self.name, self.block, self.prompt))
        frames = np.zeros((1, 0 if self.waiting else FRAME_RATE, 2, 2, 3), np.uint8)
        waveform = np.zeros((1, 0, 2), np.float32)
        self.block += not self.waiting
        timings = Timings(0, 0, 0, 0, 0)
        return Chunk(self.block, 0, 0, frames, waveform, timings, waiting=self.waiting)


class FakeKeeper:
    """Notes what is saved: of whom, at which block, and whether it goes on."""

    every = 10.0

    def __init__(self):
        self.saved, self.forgotten, self.breaks = [], [], False

    def saving(self, request, stream, *, goes_on):
        found = (request[0], stream.num_made, goes_on)
        if self.breaks:
            raise MemoryError("no room for a copy")
        return lambda: not self.saved.append(found)

    def forget(self, request):
        self.forgotten.append(request[0])


@dataclasses.dataclass
class World:
    runtime: Runtime
    clock: Clock
    log: list
    keeper: FakeKeeper

    def client(self, name, cost=0.1):
        events = []
        return self.runtime.join((name, cost), events.append), events

    def wait_for_saver(self) -> None:
        self.runtime._saver.submit(int).result(120)  # it has one thread

    def run(self, seconds: float, *seats) -> None:
        """Lets the time pass; the clients take what is made."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            wait = self.runtime.advance()
            if opening := [s._opening for s in self.runtime._seats if s._opening]:
                futures.wait(opening, 120)  # which takes no time of the clock
                continue
            if self.runtime._copying:
                self.wait_for_saver()
            for seat in seats:
                seat.taken(seat._made)
            if wait != 0:
                self.clock.now = min(end, self.clock.now + (wait or 1.0))


@pytest.fixture
def world():
    def make(load=None, **limits):
        clock, log, keeper = Clock(), [], FakeKeeper()
        runtime = Runtime(
            lambda request: FakeStream(request, clock, log),
            FRAME_RATE,
            Limits(**limits),
            load,
            keeper,
            clock=clock,
        )
        return World(runtime, clock, log, keeper)

    return make


def made(events):
    return [event for event in events if isinstance(event, Made)]


def test_generation_keeps_its_lead(world):
    w = world(lead=1.5)
    seat, events = w.client("a")
    w.run(20, seat)
    assert isinstance(events[0], Opened)
    blocks = made(events)
    assert 20 <= len(blocks) <= 23  # a second each, the lead ahead
    assert all(event.late == 0 for event in blocks)
    assert all(event.lead <= 1.5 + 1 for event in blocks)
    assert min(event.lead for event in blocks[3:]) > 1


def test_the_next_block_is_begun_before_this_one_is_copied(world):
    """As long as one is due; ahead of that nothing is, so that a turn is seen soon."""
    w = world(lead=5)
    seat, _ = w.client("a")
    w.run(1, seat)
    assert seat._stream.order[:5] == ["begin", "begin", "chunk", "begin", "chunk"]
    w.run(20, seat)
    assert seat._stream.order[-4:] == ["begin", "chunk", "begin", "chunk"]


def test_a_turn_is_applied_at_the_next_border_and_in_order(world):
    w = world()
    seat, events = w.client("a")
    w.run(5, seat)
    seat.set_prompt("second")
    seat.set_prompt("third")
    seat.rewind(9)  # is refused
    for _ in range(MOST_TURNS - 3):
        seat.set_seed(1)
    with pytest.raises(ValueError, match="wait for the next block"):
        seat.set_prompt("one too many")
    seat.push_audio(np.zeros((1, 8, 2)), 16_000)  # of which there is another limit
    before = len(w.log)
    w.run(3, seat)
    seat.set_prompt("fourth")  # there is room again
    assert {prompt for _, _, prompt in w.log[before:]} == {"third"}
    assert [event.problem for event in events if isinstance(event, Refused)] == [
        "block 9 cannot be gone back to"
    ]
    late, _ = w.client("late")
    with pytest.raises(ValueError, match="has not begun"):
        late.set_seed(1)


def test_sessions_share_the_device_by_their_leads(world):
    """A slow one does not slow the other down as long as both can be served."""
    w = world(sessions=2)
    (a, heard_a), (b, heard_b) = w.client("a", 0.1), w.client("b", 0.7)
    w.run(30, a, b)
    for events in (heard_a, heard_b):
        assert len(made(events)) >= 29
        assert sum(event.late for event in made(events)) == 0


def test_who_comes_and_goes_makes_nobody_late(world):
    """One after the other wants its first picture at once: each would have the smallest lead."""
    w = world(sessions=2)
    honest, heard = w.client("honest", 0.42)
    w.run(3, honest)
    for _ in range(40):
        other, told = w.client("other", 0.42)
        while not made(told):
            w.run(0.05, honest)
        other.leave()
        w.run(0.01, honest)
    assert all(event.late == 0 for event in made(heard))
    assert w.clock.now < 60, "the time that is left is theirs"


def test_what_is_left_out_under_load_and_comes_back(world):
    """Steps of all first, then the queue; nobody is let in who would make others late."""
    w = world(Load(4, 2, {4: 0.36, 2: 0.216}), sessions=9, waiting=4)
    clients = [w.client(name, 0.36) for name in "abcd"]
    w.run(60, *(seat for seat, _ in clients))
    assert w.runtime.load.steps == 2
    assert [event.steps for event in clients[0][1] if isinstance(event, Shed)][:2] == [3, 2]
    assert sum(event.late > 0 for event in made(clients[0][1])) <= 4
    assert [event.steps for event in made(clients[0][1])][-1] == 2
    fifth, heard = w.client("e", 0.36)
    w.run(5, *(seat for seat, _ in clients))
    assert heard == [Queued(1)], "four need 86 % of the time at two steps, five more than there is"
    for seat, _ in clients[2:]:
        seat.leave()
    w.run(3, *(seat for seat, _ in clients[:2]), fifth)
    assert isinstance(heard[1], Opened)
    fifth.leave()
    w.run(60, *(seat for seat, _ in clients[:2]))
    assert w.runtime.load.steps == 3, "two at four steps need 72 %"
    load = Load(2, 1, {2: 1.2, 1: 0.95})
    changes = [(load.steps, load.queue_open) for _ in range(9) if load.adjust(1, True)]
    assert changes == [(1, True), (1, False)]
    with pytest.raises(ValueError, match="at most all, not 5"):
        Load(4, 5)


def test_too_slow_is_said(world):
    w = world()
    seat, events = w.client("a", cost=1.5)
    w.run(30, seat)
    late = [event.late for event in made(events)]
    assert late[3:] == pytest.approx([0.5] * len(late[3:]))
    assert w.runtime.figures().late_blocks == len([x for x in late if x])


def test_places_and_the_queue(world):
    w = world(sessions=1, waiting=2)
    seats = [w.client(name) for name in "abc"]
    w.run(1, seats[0][0])
    with pytest.raises(Full, match="2 wait"):
        w.client("d")
    assert [events[0].position for _, events in seats[1:]] == [1, 2]
    seats[0][0].leave(keep=True)
    w.run(0.1)
    w.wait_for_saver()  # in a thread of its own, and the place is free behind it
    w.run(1, seats[1][0])
    assert seats[0][1][-1] == Over("the client has left", saved=True)
    assert w.keeper.saved == [("a", 3, False)]
    assert any(isinstance(event, Opened) for event in seats[1][1])
    assert seats[2][1][-1] == Queued(1)
    figures = w.runtime.figures()
    assert (figures.sessions, figures.waiting, figures.refused) == (1, 1, 1)


def test_places_by_the_memory_of_the_device(world):
    """What a session holds is measured with one; who is being let in has not taken it yet."""
    stats = {"bytes_limit": 100, "bytes_in_use": 40, "peak_bytes_in_use": 60}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    room = Room(device)
    stats["bytes_in_use"] = 52
    room.measure()  # a session holds 12, and a block takes 8 beside
    stats["bytes_in_use"] = 40
    assert room() == (100 - 40 - 8) // 12
    assert Room(types.SimpleNamespace(memory_stats=lambda: None))() > 1000
    w = world(sessions=9)
    w.runtime._room = room
    for name in "abcdef":
        w.client(name, 0.01)
        w.run(0.1)
        stats["bytes_in_use"] = 40 + 12 * w.runtime.figures().sessions
    figures = w.runtime.figures()
    assert (figures.sessions, figures.waiting) == (4, 2)
    assert w.runtime._room() == 0


def test_copies_of_sessions_that_go_on(world):
    """Every ten seconds, one at a time; they are forgotten when a session is stopped."""
    w = world(sessions=2)
    (a, heard), (b, _) = w.client("a"), w.client("b")
    w.run(35, a, b)
    w.wait_for_saver()
    for name in "ab":
        blocks = [made for of, made, goes_on in w.keeper.saved if of == name and goes_on]
        assert len(blocks) == 3
        assert np.diff(blocks) == pytest.approx(10, abs=1)
    w.keeper.breaks = True
    w.run(12, a, b)
    assert len(w.keeper.saved) == 6
    a.set_prompt("break")
    b.leave("stopped")
    w.run(5, a)
    w.wait_for_saver()
    assert heard[-1].saved, "a failure loses what was made since the last copy only"
    assert w.keeper.forgotten == ["b"]


def test_clients_that_stall_pause_or_vanish(world):
    w = world(sessions=3, idle=10, lead=1.5)
    (_, s), (paused, p), (honest, h) = (w.client(name) for name in ("s", "p", "h"))
    w.run(0.5, honest)
    paused.pause()
    w.run(5, honest)
    assert len(made(s)) <= 4  # no more than the buffers hold
    before = len(made(p))
    paused.resume()
    w.run(3, honest, paused)
    assert len(made(p)) >= before + 3
    assert all(event.late == 0 for event in made(p))
    w.run(10, honest, paused)
    w.wait_for_saver()
    assert isinstance(s[-1], Over)
    assert "nothing was heard" in s[-1].reason
    paused.pause()
    w.run(11, honest, paused)  # its player goes on telling where it stands
    w.wait_for_saver()
    assert "nothing was heard" in p[-1].reason
    assert len(made(h)) >= 17
    assert all(event.late == 0 for event in made(h))


def test_sound_that_has_not_arrived_holds_nobody_else_up(world):
    w = world(sessions=2)
    (a, _), (b, heard_b) = w.client("a", 0.01), w.client("b", 0.1)
    w.run(0.5, a, b)
    a.set_prompt("wait")
    w.run(10, a, b)
    assert len(made(heard_b)) >= 10
    assert all(event.late == 0 for event in made(heard_b))


def test_one_that_fails_ends_alone(world):
    w = world(sessions=2)
    (a, heard_a), (b, heard_b) = w.client("a"), w.client("b")
    w.run(3, a, b)
    a.set_prompt("break")
    w.run(5, a, b)
    assert isinstance(heard_a[-1].error, FloatingPointError)
    assert len(made(heard_b)) >= 8

    def broken(event):
        raise OSError("the socket is gone")

    w.runtime.join(("c", 0.1), broken)
    w.run(2, b)
    assert w.runtime.figures().sessions == 1


def test_a_stream_ends_at_its_limit_and_all_at_the_end(world):
    w = world(longest=4)
    seat, events = w.client("a")
    w.run(10, seat)
    assert "4 s" in events[-1].reason
    with pytest.raises(ValueError, match="lead must be"):
        Limits(lead=-1)


def test_the_thread():
    """The same on real time: a block at once, a turn, and an orderly end."""
    import threading
    import time

    class Stream(FakeStream):
        def chunk(self):
            time.sleep(0.005)
            return super().chunk()

    begun, ended, events = threading.Event(), threading.Event(), []

    def on_event(event):
        events.append(event)
        begun.set() if isinstance(event, Made) else None
        ended.set() if isinstance(event, Over) else None

    log = []
    with Runtime(lambda request: Stream(request, Clock(), log), FRAME_RATE) as runtime:
        seat = runtime.join(("a", 0), on_event)
        assert begun.wait(120)
        seat.set_prompt("second")
        seat.taken(100)
    assert ended.is_set()
    assert "shut down" in events[-1].reason
    with pytest.raises(Full, match="shut down"):
        runtime.join(("b", 0), on_event)
