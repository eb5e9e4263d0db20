"""The talking partner over real sockets: models that are played here, and a live server."""

import asyncio
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import wave

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from examples import talker
from omniforcing_jax.io.checkpoints import write_json
from omniforcing_jax.io.checksums import SEAL
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.streaming.chunks import Chunk, Timings
from omniforcing_jax.streaming.encoders import StreamingResampler
from omniforcing_jax.streaming.media import read_clip
from tests.serving.test_web import FRAME_RATE, HEIGHT, SAMPLE_RATE, WIDTH, TurnsStream, serving

RATE = 22_050  # espeak-ng's
BLOCK = 12  # frames


class EchoStream(TurnsStream):
    """Its sound is what is pushed; a block waits for half a second of it."""

    def __init__(self, request):
        assert request.log.sound
        super().__init__()
        self.resampler = StreamingResampler(RATE, SAMPLE_RATE)
        self.state, self.block = self.resampler.init(1), 0
        self.sound = np.zeros((1, 0, 2), np.float32)

    def apply(self, turn):
        assert turn.payload["rate"] == RATE
        self.state, played = self.resampler.push(self.state, turn.payload["waveform"])
        self.sound = np.concatenate([self.sound, played], axis=1)

    def step(self) -> Chunk:
        count = SAMPLE_RATE * BLOCK // FRAME_RATE
        waiting = self.sound.shape[1] < count
        count *= not waiting
        waveform, self.sound = self.sound[:, :count], self.sound[:, count:]
        frames = np.zeros((1, 0 if waiting else BLOCK, HEIGHT, WIDTH, 3), np.uint8)
        place = self.block * BLOCK, self.block * SAMPLE_RATE * BLOCK // FRAME_RATE
        self.block += not waiting
        return Chunk(self.block, *place, frames, waveform, Timings(0, 0, 0, 0, 0), waiting=waiting)


def speech(text: str) -> bytes:
    """A WAV file of a sentence: espeak-ng where it is installed, else a tone."""
    if espeak := shutil.which("espeak-ng"):
        return subprocess.run([espeak, "--stdout", text], stdout=-1, check=True).stdout
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        samples = 8000 * np.sin(np.arange(RATE) / RATE * 2 * np.pi * 440)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


class Models:
    """Both models. To "endless" the chat model answers until nobody listens."""

    def __init__(self):
        self.histories, self.spoken, self.left = [], [], threading.Event()

    async def chat(self, request):
        order = await request.json()
        self.histories.append(order["messages"])
        endless = order["messages"][-1]["content"] == "endless"

        async def answer():
            words = ["Good", " day.", " It is", " late.", None]
            try:
                while words:
                    word = words.pop(0)
                    if word is None and endless:
                        words = [" And", " on.", None]
                        await asyncio.sleep(0.05)
                    elif word is not None:
                        content = {"choices": [{"delta": {"content": word}}]}
                        yield f"data: {json.dumps(content)}\n\n"
                yield "data: [DONE]\n\n"
            finally:
                if endless:
                    self.left.set()

        return StreamingResponse(answer(), media_type="text/event-stream")

    async def speech(self, request):
        order = await request.json()
        if order["voice"] == "nobody":
            return PlainTextResponse("there is no such voice", 404)
        self.spoken.append(order["input"])
        data = await asyncio.to_thread(speech, order["input"])

        async def pieces():
            for start in range(0, len(data), 999):  # odd, and the header in two
                yield data[start : start + 999] if start else data[:30]
                if not start:
                    yield data[30:999]

        return StreamingResponse(pieces(), media_type="audio/wav")


@contextlib.contextmanager
def answering():
    """Runs both models; yields their address and what they have heard."""
    models, bound = Models(), socket.socket()
    bound.bind(("127.0.0.1", 0))
    routes = [
        Route("/v1/chat/completions", models.chat, methods=["POST"]),
        Route("/v1/audio/speech", models.speech, methods=["POST"]),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1", models
    finally:
        server.should_exit = True
        thread.join()


def arguments(port, base, *more):
    models = ("--chat", base, "--chat-model", "any", "--speech", base, "--speech-model", "any")
    return talker.parse_arguments(
        [f"ws://127.0.0.1:{port}", *models, "--rate", str(RATE), "--ahead", "0.7",
         "--prompt", "red", "--output", "-", *more]
    )  # fmt: skip


@pytest.fixture
def said(monkeypatch):
    """What it says on standard error."""
    lines = []
    monkeypatch.setattr(talker.programs, "say", lines.append)
    return lines


def talk(args, lines, file) -> None:
    """A session from its first line to its last."""
    asyncio.run(asyncio.wait_for(talker.converse(args, lines, file), 300))


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_talk_and_its_interruptions(said):
    """The voice is in the stream; an interruption ends both models and silences what they said."""
    file, quiet = io.BytesIO(), []
    with serving(stream=EchoStream, lead=0.5) as port, answering() as (base, models):

        async def lines():
            yield "endless\n"
            await until(lambda: len(models.spoken) >= 12 and file.getvalue().count(b"moof") >= 2)
            yield "/stop\n"
            await until(models.left.is_set)
            quiet.append((len(models.spoken), len(file.getvalue())))
            yield "\n"
            yield "hello\n"

        talk(arguments(port, base), lines(), file)
    assert models.spoken[:3] == ["Good day.", "It is late.", "And on."]
    assert models.spoken[quiet[0][0] :][-2:] == ["Good day.", "It is late."]
    first, second = models.histories
    assert [said["role"] for said in first] == ["system", "user"]
    assert [said["role"] for said in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"].startswith("Good day. It is late.")
    assert said[:2] == ["Good day.", "It is late."]
    file.seek(0)
    frames, _, waveform, rate = read_clip(file)
    assert rate == SAMPLE_RATE
    assert abs(len(frames) / FRAME_RATE - len(waveform) / rate) < 0.2
    # the last sentence was pushed to its end, and is the stream's
    voice = speech("Good day."), speech("It is late.")
    seconds = sum(len(data) - 44 for data in voice) / 2 / RATE
    loud = np.abs(waveform).max(-1) > 0.02
    assert np.flatnonzero(loud)[-1] / rate - np.flatnonzero(loud)[0] / rate > 0.7 * seconds
    # of what was interrupted nothing was pushed any more
    heard = read_clip(io.BytesIO(file.getvalue()[: quiet[0][1]]))[2]
    assert loud[len(heard) :].sum() / rate < seconds + 2


def test_what_goes_wrong_is_said_and_the_stream_goes_on(said):
    with serving(stream=EchoStream, lead=0.5) as port, answering() as (base, _):
        for more, problem in (
            (["--voice", "nobody"], "404: there is no such voice"),
            (["--chat", "http://127.0.0.1:1/v1"], "127.0.0.1:1/v1/chat/completions"),
        ):
            file = io.BytesIO()

            async def lines(file=file, problem=problem):
                yield "hello\n"
                await until(lambda: said and problem in said[-1] and file.getvalue())

            talk(arguments(port, base, *more), lines(), file)
            assert problem in said[-1]
    assert talker.samples_of(speech("a")[:30], RATE) is None
    with pytest.raises(ValueError, match=f"{RATE} Hz"):
        talker.samples_of(speech("a"), 16_000)
    assert talker.samples_of(b"\x01\x00\x02\x00", RATE) == b"\x01\x00\x02\x00"


@pytest.mark.slow
def test_a_talk_with_a_model(random_checkpoint, random_gemma, free_port, tmp_path, said):
    """The whole way, with launch.serve and a tiny model of random weights."""
    from tests.test_extremes import link_files, write_run

    checkpoint = random_checkpoint("2.0")
    config = write_run(tmp_path / "run", checkpoint)
    content = json.loads((checkpoint / "config.json").read_text())
    content |= {"trained": TrainedSettings.of_run(config).to_json()}
    student = link_files(checkpoint, tmp_path / "student")
    write_json(student / "config.json", {k: v for k, v in content.items() if k != SEAL})
    command = [sys.executable, "-m", "launch.serve", "--checkpoint", student, "--port", free_port]
    command += ["--text-encoder", random_gemma, "--prompt-cache", "none"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    file = io.BytesIO()
    try:
        assert any(line.startswith("ready") for line in process.stderr)
        with answering() as (base, models):

            async def lines():
                yield "hello\n"

            more = ("--prompt", "a person talks", "--ahead", "2")
            talk(arguments(free_port, base, *more), lines(), file)
    finally:
        process.terminate()
        process.wait()
    assert said == models.spoken == ["Good day.", "It is late."]
    file.seek(0)
    frames, _, waveform, _ = read_clip(file)
    assert frames.shape[1:] == (64, 64, 3)
    assert len(frames) > 24
    assert np.abs(waveform).max() > 0.1
