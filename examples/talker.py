"""A partner to talk with: a chat model and a speech model give the stream its voice.

    python -m launch.serve --checkpoint checkpoints/omniforcing --text-encoder checkpoints/gemma3
    python examples/talker.py ws://localhost:8000 --chat http://localhost:8001/v1 \\
        --chat-model qwen3 --speech http://localhost:8002/v1 --speech-model kokoro \\
        --output - | mpv -

Type a line: the chat model answers, its sentences are spoken as they come, and the picture is made
to that voice. Another line interrupts what is being said, and so does /stop; /quit, or the end of
the input, ends the talk when all is said. Both models are behind OpenAI-compatible addresses (vLLM,
llama.cpp, Ollama, Kokoro-FastAPI, …): BASE/chat/completions with "stream", and BASE/audio/speech
with 16-bit WAV or PCM. OPENAI_API_KEY is sent to both if it is set.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import pathlib
import re
import sys
import threading
import wave
from collections.abc import AsyncIterator
from typing import BinaryIO

import httpx

from omniforcing_jax import programs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.serving import client, protocol

PIECE_SECONDS = 0.1  # of sound in a message
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")


def samples_of(data: bytes, rate: int) -> bytes | None:
    """The samples of raw PCM or of a WAV file, as far as it has come; None before the first."""
    if data[:4] != b"RIFF":
        return data if len(data) >= 4 else None
    try:
        with wave.open(file := io.BytesIO(data)) as header:
            found = header.getnchannels(), header.getsampwidth(), header.getframerate()
    except (EOFError, wave.Error):
        return None
    if found != (1, 2, rate):
        what = "{} channels of {} bytes, {} Hz".format(*found)
        raise ValueError(f"speech must be 16-bit and mono at --rate {rate}; it is {what}")
    return data[file.tell() :]


async def written(http: httpx.AsyncClient, args, history: list[dict]) -> AsyncIterator[str]:
    """Sentences of the chat model's answer, each as soon as it is whole."""
    order = {"model": args.chat_model, "messages": history, "stream": True}
    rest = ""
    async with post(http, f"{args.chat}/chat/completions", order) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                choices = json.loads(data).get("choices") or [{}]
                rest += choices[0].get("delta", {}).get("content") or ""
                *whole, rest = _SENTENCE_END.split(rest)
                for sentence in filter(str.strip, whole):
                    yield sentence
    if rest.strip():
        yield rest


async def spoken(http: httpx.AsyncClient, args, text: str) -> AsyncIterator[bytes]:
    """Samples of a sentence, int16, little endian, one channel, as they come."""
    order = {"model": args.speech_model, "voice": args.voice, "response_format": "wav"}
    data, begun = b"", False
    async with post(http, f"{args.speech}/audio/speech", order | {"input": text}) as response:
        async for piece in response.aiter_bytes():
            data += piece
            if not begun and (samples := samples_of(data, args.rate)) is not None:
                data, begun = samples, True
            if begun:
                whole = len(data) // 2 * 2
                yield data[:whole]
                data = data[whole:]


@contextlib.asynccontextmanager
async def post(http: httpx.AsyncClient, address: str, order: dict) -> AsyncIterator[httpx.Response]:
    """An answer that is read as it comes; ValueError or OSError says why there is none."""
    try:
        async with http.stream("POST", address, json=order) as response:
            if response.is_error:
                reason = (await response.aread()).decode(errors="replace")[:300]
                raise ValueError(f"{address} answers {response.status_code}: {reason}")
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{address}: {error or type(error).__name__}") from error


class Talk:
    """What is said in a session, by whom."""

    def __init__(self, http: httpx.AsyncClient, args: argparse.Namespace):
        self._http, self._args = http, args
        self._history = [{"role": "system", "content": args.system}]
        self._answering: asyncio.Task | None = None
        self.voice = bytearray()  # samples that are not pushed yet
        self.ends = False  # after what is being said

    async def hear(self, text: str) -> None:
        """The user's turn; what was being said ends."""
        await self.stop()
        self._history.append({"role": "user", "content": text})
        self._answering = asyncio.create_task(self._answer())

    async def stop(self) -> None:
        """Ends both models' answers, and what of them is not pushed yet."""
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait([self._answering])
        self.voice.clear()

    @property
    def is_over(self) -> bool:
        """Whether all is said."""
        return self.ends and not self.voice and (not self._answering or self._answering.done())

    async def _answer(self) -> None:
        """Speaks one sentence while the next ones are written."""
        said: list[str] = []
        sentences: asyncio.Queue[str | None] = asyncio.Queue()

        async def write() -> None:
            async for sentence in written(self._http, self._args, list(self._history)):
                sentences.put_nowait(sentence)
            sentences.put_nowait(None)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                while (sentence := await sentences.get()) is not None:
                    programs.say(sentence)
                    said.append(sentence)
                    async for samples in spoken(self._http, self._args, sentence):
                        self.voice += samples
        except* (OSError, ValueError) as errors:  # the stream goes on, and so can the talk
            programs.say(f"[{errors.exceptions[0]}]")
        finally:
            if said:
                self._history.append({"role": "assistant", "content": " ".join(said)})


async def stream(session: client.Session, talk: Talk, args: argparse.Namespace, file: BinaryIO):
    """Pushes the voice, or silence, as far ahead of the stream as it must; writes what comes."""
    count = round(PIECE_SECONDS * args.rate)
    pushed, end = 0.0, float("inf")
    await session.send(protocol.Start(args.prompt, sound=True))
    async for received in session:
        match received:
            case bytes():
                file.write(received)
                file.flush()
            case protocol.Begun() | protocol.BlockMade():
                made = getattr(received, "end", 0.0)
                if talk.is_over:
                    end = min(end, pushed)
                if made >= end:
                    await session.send(protocol.Stop())
                while pushed < made + args.ahead:
                    piece = bytes(talk.voice[: 2 * count])
                    del talk.voice[: 2 * count]
                    pushed += PIECE_SECONDS
                    await session.send(protocol.Audio(args.rate), piece.ljust(2 * count, b"\0"))
            case protocol.Ended(reason, True):
                raise RuntimeError(reason)


async def converse(args: argparse.Namespace, lines: AsyncIterator[str], file: BinaryIO) -> None:
    """One session, until the lines end and all is said."""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    async with (
        httpx.AsyncClient(headers=headers, timeout=60) as http,
        client.open_session(args.address, args.token) as session,
    ):
        talk = Talk(http, args)

        async def listen() -> None:
            async for line in lines:
                if (text := line.strip()) == "/quit":
                    break
                if text:
                    await (talk.stop() if text == "/stop" else talk.hear(text))
            talk.ends = True

        listening = asyncio.create_task(listen())
        try:
            await stream(session, talk, args, file)
        finally:
            listening.cancel()
            await asyncio.gather(listening, talk.stop(), return_exceptions=True)


async def typed() -> AsyncIterator[str]:
    """Lines of standard input, as they are typed; the end of the talk waits for none."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue()

    def read() -> None:
        while line := sys.stdin.readline():
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    while line := await lines.get():
        yield line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("examples.talker", __doc__)
    add = parser.add_argument
    add("address", help="of the live server: ws://HOST:PORT")
    add("--token", help="if the live server wants one")
    add("--chat", required=True, metavar="BASE", help="of the chat model: http://HOST:PORT/v1")
    add("--chat-model", required=True, metavar="NAME")
    add("--speech", required=True, metavar="BASE", help="of the speech model")
    add("--speech-model", required=True, metavar="NAME")
    add("--voice", default="alloy", metavar="NAME", help="of the speech model (default alloy)")
    add("--rate", type=int, default=24000, help="of its samples, Hz (default 24000)")
    ahead = "of sound that are kept ahead of the stream; more than a block (default 2)"
    add("--ahead", type=float, default=2.0, metavar="SECONDS", help=ahead)
    add("--system", default="You talk with a person. Answer in two or three short sentences.")
    add("--prompt", default="A person looks into the camera and talks.", help="for the stream")
    add("--output", required=True, help="MP4 file, or - for standard output, as a player takes it")
    return parser.parse_args(argv)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    with contextlib.ExitStack() as stack:
        file = sys.stdout.buffer
        if args.output != "-":
            temporary = stack.enter_context(new_file(pathlib.Path(args.output)))
            file = stack.enter_context(temporary.open("wb"))
        asyncio.run(converse(args, typed(), file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
