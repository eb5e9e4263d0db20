"""The server over real sockets, with streams that need no model."""

import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import socket
import threading
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from PIL import Image as Picture
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from launch.serve import Server
from omniforcing_jax.serving import client, protocol, uploads, web
from omniforcing_jax.serving.connection import Connection
from omniforcing_jax.serving.events import Limits
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.service import Service
from omniforcing_jax.serving.snapshots import SessionKeeper, SnapshotStore
from omniforcing_jax.serving.turn_log import TurnLog
from omniforcing_jax.serving.web import make_app
from omniforcing_jax.streaming.chunks import Chunk, PendingBlock, Timings
from omniforcing_jax.streaming.media import read_clip

WIDTH, HEIGHT, FRAME_RATE, SAMPLE_RATE = 64, 48, 24, 16_000
COLOURS = {"red": (250, 20, 20), "blue": (20, 20, 250), "green": (20, 250, 20)}


class TurnsStream:
    """Applies the turns that came before it makes a block."""

    num_steps = 1

    @property
    def num_made(self):
        return self.block

    def __init__(self, turns=()):
        self.turns = collections.deque(turns)

    @property
    def waiting_turns(self):
        return tuple(self.turns.copy())

    def add(self, turn):
        self.turns.append(turn)

    def begin(self) -> PendingBlock:
        while self.turns:
            self.apply(self.turns.popleft())
        chunk = self.step()
        return PendingBlock(chunk.frames.shape[1], chunk.waiting, lambda: chunk)


class ColourStream(TurnsStream):
    """Shows the colour that the prompt names, or the picture that is given."""

    def __init__(self, request):
        self.log, self.sound = request.log, request.log.sound
        self.shown, self.block = COLOURS[request.log.prompt], 0
        self.heard = []
        super().__init__()
        if request.snapshot is not None:
            self.shown, self.block = request.snapshot["shown"], request.snapshot["block"]
            super().__init__(request.snapshot["turns"])

    def add(self, turn):
        if turn.kind == "prompt":
            check(turn.payload["prompt"])
        super().add(turn)

    def snapshot(self):
        turns = {"turns": self.waiting_turns}
        return {"shown": self.shown, "block": self.block, "num_made": self.block} | turns

    def begin_snapshot(self):
        snapshot = self.snapshot()
        return lambda: snapshot

    def apply(self, turn):
        payload = turn.payload
        match turn.kind:
            case "prompt":
                self.shown = COLOURS[payload["prompt"]]
            case "image":
                if payload["strength"] < 0.5:
                    raise ValueError("the strength is too low for this stream")
                self.shown = ((payload["pixels"].mean((0, 1)) + 1) * 127.5).tolist()
            case "audio":
                self.heard.append(payload["rate"])
            case "rewind":
                self.block = payload["block"]
        self.log.append(dataclasses.replace(turn, block=self.block))

    def step(self) -> Chunk:
        waiting = self.sound and len(self.heard) <= self.block
        count = 0 if waiting else 1
        frames = np.zeros((1, FRAME_RATE * count, HEIGHT, WIDTH, 3), np.uint8)
        frames[:] = self.shown
        waveform = np.zeros((1, SAMPLE_RATE * count, 2), np.float32)
        place = self.block * FRAME_RATE, self.block * SAMPLE_RATE
        self.block += count
        return Chunk(
            self.block - count,
            *place,
            frames,
            waveform,
            Timings(0, 0, 0, 0, 0),
            waiting=bool(waiting),
        )


def check(text: str) -> None:
    if text not in COLOURS:
        raise ValueError(f"{text!r} is no colour")


@contextlib.contextmanager
def serving(token=None, hosts=("localhost", "127.0.0.1"), stream=None, store=None, **limits):
    """Runs a server; yields its port."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    bound.listen()
    limits = Limits(**{"lead": 2.0} | limits)
    keeper = store and SessionKeeper(store)
    with Runtime(stream or ColourStream, FRAME_RATE, limits, keeper=keeper) as runtime:
        service = Service(runtime, check, WIDTH, HEIGHT, FRAME_RATE, SAMPLE_RATE,
                          token=token, hosts=hosts, snapshots=store)  # fmt: skip
        config = uvicorn.Config(make_app(service), log_level="error", ws_max_size=32 << 20)
        server = Server(config, runtime)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """With the process that decodes a picture, on a busy machine; it has its own limit of work."""
    monkeypatch.setattr(uploads, "SECONDS", 240)


@pytest.fixture(scope="module")
def port():
    with serving(sessions=2, waiting=1) as port:
        yield port


def colours(path) -> list[str]:
    """What a clip shows, once for every stretch."""
    frames = read_clip(path)[0].mean((1, 2))
    names = [min(COLOURS, key=lambda n: np.abs(frame - COLOURS[n]).sum()) for frame in frames]
    return [n for i, n in enumerate(names) if i == 0 or names[i - 1] != n]


def test_a_clip_is_recorded_and_steered(port, tmp_path):
    path, file = tmp_path / "clip.mp4", io.BytesIO()
    Picture.new("RGB", (200, 100), COLOURS["green"]).save(file, "PNG")

    async def run():
        async with client.open_session(f"ws://127.0.0.1:{port}") as session:
            assert (session.hello.width, session.hello.frame_rate) == (WIDTH, FRAME_RATE)
            await session.send(protocol.Start("red", seed=7))
            received, problems, later = [], [], 0
            async for message in session:
                if isinstance(message, protocol.BlockMade) and message.end == 2:
                    await session.send(protocol.NewPrompt("blue"))
                    await session.send(protocol.NewPrompt("purple"))
                    await session.send(protocol.Image(), file.getvalue())
                    await session.send(protocol.Image(0.1), file.getvalue())
                    await session.send(protocol.Image(), b"no picture")
                if isinstance(message, protocol.BlockMade) and len(problems) == 3:
                    later += 1
                    if later == 2:  # the first may have been begun before the pictures came
                        await session.send(protocol.Stop())
                problems += [message.message] if isinstance(message, protocol.ProblemFound) else []
                received.append(message)
        return received, problems

    received, problems = asyncio.run(run())
    texts = [message for message in received if not isinstance(message, bytes)]
    assert (texts[0].seed, len(texts[0].session) > 16) == (7, True)
    assert texts[-1] == protocol.Ended("stopped", False)
    (media,) = [message for message in texts if isinstance(message, protocol.Media)]
    assert media.mime.startswith('video/mp4; codecs="avc1.')
    path.write_bytes(b"".join(message for message in received if isinstance(message, bytes)))
    shown = colours(path)
    assert shown[0] == "red"
    assert shown[-1] == "green"
    assert any("no colour" in problem for problem in problems)
    assert any("strength is too low" in problem for problem in problems)
    assert any("refused" in problem for problem in problems)


def test_the_client_program(port, tmp_path, capsys):
    path = tmp_path / "clip.mp4"
    arguments = [f"ws://127.0.0.1:{port}", "--prompt", "red", "--at", "1", "blue"]
    steered = [
        "--rewind",
        "3",
        "1",
        "--new-seed",
        "3",
        "9",
        "--turns",
        str(tmp_path / "turns.json"),
    ]
    assert not client.main([*arguments, *steered, "--seconds", "6", "--output", str(path)])
    assert colours(path) == ["red", "blue"]
    assert re.search(r"first block after [\d.]+ s, \d+ late", capsys.readouterr().out)
    log = TurnLog.from_json((tmp_path / "turns.json").read_text())
    assert (log.prompt, log.complete) == ("red", True)
    assert [turn.kind for turn in log.turns] == ["prompt", "rewind", "seed"]
    assert [turn.payload for turn in log.turns[1:]] == [{"block": 1}, {"seed": 9}]
    assert client.main([*arguments[:2], "purple", "--output", str(path)]) == 1
    assert "'purple' is no colour" in capsys.readouterr().err
    assert client.main(["ws://127.0.0.1:1", *arguments[1:3], "--output", str(path)]) == 1


def post(port, body: bytes, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/clip", body, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_client_has_taken_no_more_than_was_sent():
    """One that claims more and reads nothing would have an hour of pictures pile up here."""
    taken = []
    session = Connection(None, None, None)
    session._seat, session._made = types.SimpleNamespace(taken=taken.append), 3.0
    for seconds in (2.0, 1e9):
        asyncio.run(session._apply(protocol.Progress(seconds), None))
    assert taken == [2.0, 3.0]


def test_a_whole_clip(port):
    status, data = post(port, json.dumps({"prompt": "blue", "seconds": 2.5}).encode())
    assert status == 200
    frames, _, waveform, _ = read_clip(io.BytesIO(data))
    assert len(frames) == 60
    assert len(waveform) == pytest.approx(2.5 * SAMPLE_RATE, abs=2048)
    for body, problem in (
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "red", "seconds": 1e9}', "at most"),
        (b'{"prompt": "red", "seconds": NaN}', "seconds"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": 3}', "'prompt'"),
        (b"x" * 100_000, "too long"),
    ):
        status, data = post(port, body)
        assert status in (400, 413)
        assert problem in json.loads(data)["problem"]


MALFORMED = [
    ["no JSON"],
    ['{"type": "fly"}'],
    ["[1]"],
    [b"\x00"],
    ['{"type": "start"}'],
    ['{"type": "start", "prompt": 3}'],
    ['{"type": "start", "prompt": "red", "seed": -1}'],
    ['{"type": "start", "prompt": "red", "seed": 1e99}'],
    ['{"type": "start", "prompt": "red", "more": 1}'],
    ['{"type": "start", "prompt": ""}'],
    [f'{{"type": "start", "prompt": "{"x" * 5000}"}}'],
    ["[" * 50_000],
    ["x" * 100_000],
    ['{"type": "start", "prompt": "red"}', b"\x00\x01"],
    ['{"type": "start", "prompt": "red"}', '{"type": "start", "prompt": "red"}'],
    ['{"type": "start", "prompt": "red"}', '{"type": "image", "strength": NaN}'],
    ['{"type": "start", "prompt": "red"}', '{"type": "image"}', '{"type": "stop"}'],
    ['{"type": "start", "prompt": "red"}', '{"type": "audio", "rate": 0}'],
    ['{"type": "start", "prompt": "red"}', '{"type": "audio", "rate": 16000}', b"\x00"],
    ['{"type": "start", "prompt": "red"}', *['{"type": "resume"}'] * 200],
]


@pytest.mark.parametrize("messages", MALFORMED, ids=range(len(MALFORMED)))
def test_garbage_ends_one_session(port, messages):
    """With a reason; what others have is not touched, and the place is free again."""

    async def run():
        async with connect(f"ws://127.0.0.1:{port}/session", max_size=None) as connection:
            await connection.recv()
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    await connection.send(message)
            texts = []
            with contextlib.suppress(ConnectionClosed):
                async with asyncio.timeout(120):
                    while True:
                        texts.append(await connection.recv())
            return [json.loads(text) for text in texts if isinstance(text, str)]

    last = asyncio.run(run())[-1]
    assert last["type"] == "ended"
    assert last["failed"]


def test_clients_are_told_of_the_end():
    begun = threading.Event()

    async def last(port):
        async with client.open_session(f"ws://127.0.0.1:{port}") as session:
            await session.send(protocol.Start("red"))
            async for message in session:
                if isinstance(message, protocol.BlockMade):
                    begun.set()
            await session._connection.wait_closed()
            await session.send(protocol.Stop())  # is no error: it was told why nobody hears it
            return message

    with ThreadPoolExecutor(1) as pool:
        with serving() as port:
            message = pool.submit(lambda: asyncio.run(last(port)))
            assert begun.wait(120)
        assert message.result(120) == protocol.Ended("the server is being shut down", False)


def test_sessions_are_taken_up_again(tmp_path):
    """After a client has vanished, after the server was shut down, and while it still runs."""
    store = SnapshotStore(tmp_path, 1 << 20, "this model")

    async def begin(port, first, count=2):
        """Goes away without a word; the name, and the blocks that came."""
        blocks = []
        async with client.open_session(f"ws://127.0.0.1:{port}") as session:
            await session.send(first)
            async for message in session:
                match message:
                    case protocol.Begun(session=name):
                        await session.send(protocol.NewPrompt("blue"))
                    case protocol.BlockMade(block=block):
                        blocks.append(block)
                        if len(blocks) == count:
                            return name, blocks
                    case protocol.Ended():
                        return message, blocks

    async def twice(port):
        async with client.open_session(f"ws://127.0.0.1:{port}") as first:
            await first.send(protocol.Start("red"))
            async for message in first:
                if isinstance(message, protocol.Begun):
                    name = message.session
                if isinstance(message, protocol.BlockMade):
                    break
            again, blocks = await begin(port, protocol.TakeUp(name), 1)
            async for message in first:
                if isinstance(message, protocol.Ended):
                    return again == name, blocks[0] > 0, message

    with serving(store=store) as port:
        name, blocks = asyncio.run(begin(port, protocol.Start("red")))
        again, later = asyncio.run(begin(port, protocol.TakeUp(name)))
        assert (again, later[0] > blocks[-1]) == (name, True)
        same, went_on, message = asyncio.run(twice(port))
        assert same and went_on
        assert (message.reason, message.saved) == ("the session was taken up elsewhere", True)
    with serving(store=store) as port:
        assert asyncio.run(begin(port, protocol.TakeUp(name)))[0] == name
        ended, _ = asyncio.run(begin(port, protocol.TakeUp("../../etc/passwd")))
        assert "is not kept any more" in ended.reason
    log, snapshot = store.read(name)
    assert [turn.payload["prompt"] for turn in log.turns][:2] == ["blue", "blue"]
    assert log.taken_up and store.save(log, snapshot)
    late = dataclasses.replace(log, taken_up=log.taken_up[:-1])
    assert not store.save(late, snapshot), "by who did not know that it was taken up elsewhere"
    with pytest.raises(ValueError, match="made with another model"):
        SnapshotStore(tmp_path, 1 << 20, "another").read(name)
    file = store._path(name)
    whole = file.read_bytes()
    for data in (whole[:-1], b"", b"something else", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            store.read(name)
    small = SnapshotStore(tmp_path / "small", 3 * len(whole), "this model")
    for number in range(5):
        assert small.save(dataclasses.replace(log, name=str(number)), snapshot)
        os.utime(small._path(str(number)), (number, number))  # clocks of files are coarse
    assert len(list((tmp_path / "small").iterdir())) <= 3
    with pytest.raises(ValueError, match="not kept"):
        small.read("0")
    assert not SnapshotStore(tmp_path, 10, "").save(log, snapshot)


def test_who_is_let_in(tmp_path):
    async def connects(port, path="/session", **headers):
        try:
            async with connect(
                f"ws://127.0.0.1:{port}{path}", additional_headers=headers
            ) as connection:
                await connection.recv()
            return True
        except InvalidStatus:
            return False

    with serving(token="secret") as port:
        assert not asyncio.run(connects(port))
        assert not asyncio.run(connects(port, "/session?token=wrong"))
        assert asyncio.run(connects(port, "/session?token=secret"))
        assert asyncio.run(connects(port, Authorization="Bearer secret"))
        foreign = {"Origin": "http://elsewhere.example"}
        assert not asyncio.run(connects(port, "/session?token=secret", **foreign))
        own = {"Origin": f"http://127.0.0.1:{port}"}
        assert asyncio.run(connects(port, "/session?token=secret", **own))
        assert post(port, b'{"prompt": "red"}')[0] == 403
        for path, status in (("metrics", 403), ("turns/x", 403), ("turns/x?token=secret", 404)):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")
        arguments = [
            f"ws://127.0.0.1:{port}",
            "--prompt",
            "red",
            "--output",
            str(tmp_path / "a.mp4"),
        ]
        assert client.main(arguments) == 2
        # a name that leads here but is not ours (DNS rebinding)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/healthz")
        request.add_header("Host", "evil.example")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)


def test_a_full_house_and_its_figures():
    async def run(port):
        async with contextlib.AsyncExitStack() as stack:
            for told in (protocol.Begun, protocol.Begun, protocol.Waiting):
                opening = client.open_session(f"ws://127.0.0.1:{port}")
                session = await stack.enter_async_context(opening)
                await session.send(protocol.Start("red"))
                async for message in session:
                    assert isinstance(message, told)
                    break
            assert message == protocol.Waiting(1)
            opening = client.open_session(f"ws://127.0.0.1:{port}")
            refused = await stack.enter_async_context(opening)
            await refused.send(protocol.Start("purple"))  # which is not even encoded
            async for message in refused:
                assert isinstance(message, protocol.Ended)
                assert "1 wait" in message.reason
            address = f"http://127.0.0.1:{port}/metrics"
            return await asyncio.to_thread(lambda: urllib.request.urlopen(address).read().decode())

    with serving(sessions=2, waiting=1) as port:
        figures = asyncio.run(run(port))
    assert "omniforcing_sessions 2.0" in figures
    assert "omniforcing_waiting 1.0" in figures
    assert "process_resident_memory_bytes" in figures


def test_sound_is_pushed_and_waited_for(port):
    async def run():
        async with client.open_session(f"ws://127.0.0.1:{port}") as session:
            await session.send(protocol.Start("red", sound=True))
            ends, problems = [], []
            second = np.zeros(16_000, "<i2").tobytes()
            async for message in session:
                if isinstance(message, protocol.Begun):
                    await asyncio.sleep(0.3)  # nothing is made meanwhile
                    assert not ends
                    for _ in range(40):
                        await session.send(protocol.Audio(16_000), second)
                if isinstance(message, protocol.BlockMade):
                    ends.append(message.end)
                problems += [message] if isinstance(message, protocol.ProblemFound) else []
                if len(ends) >= 3 and problems:
                    return ends, problems

    ends, problems = asyncio.run(run())
    assert ends[:3] == [1, 2, 3]
    assert "kept ahead" in problems[0].message


def test_the_page_asks_nobody_else(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
        text = response.read().decode()
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert "<textarea" in text
    for name in ("app.js", "style.css", "microphone.js"):
        content = (web.PAGE / name).read_text()
        assert "http://" not in content.replace("http://www.w3.org", "")
        assert "https://" not in content
    for path in ("../web.py", "%2e%2e/web.py", "..%2fweb.py", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")


def test_hostile_pictures():
    def decode(data):
        return asyncio.run(uploads.decode_image(data))

    file = io.BytesIO()
    Picture.new("L", (20, 10), 200).save(file, "PNG")
    assert decode(file.getvalue()).shape == (10, 20, 3)
    bomb, side = io.BytesIO(), math.isqrt(uploads.MOST_PIXELS) + 1
    Picture.new("1", (side, side)).save(bomb, "PNG")  # a few kB become hundreds of MB
    for data in (b"\x89PNG\r\n\x1a\n", bomb.getvalue()):
        with pytest.raises(ValueError, match="refused"):
            decode(data)
