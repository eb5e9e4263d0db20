"""One WebSocket: what comes in becomes turns, what the runtime makes goes out."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from omniforcing_jax.serving import events, protocol, uploads
from omniforcing_jax.serving.events import Full
from omniforcing_jax.serving.protocol import ProtocolError
from omniforcing_jax.serving.seat import Seat
from omniforcing_jax.serving.service import LARGEST_UPLOAD, Service, SessionRequest, Workers

START_SECONDS = 30  # for the first message
SAVE_SECONDS = 60  # for a session that is taken up elsewhere
MESSAGES_PER_SECOND = 100
SOUND_AHEAD = 30.0  # seconds of pushed sound beyond what is made
_log = logging.getLogger(__name__)


class Connection:
    """One WebSocket: what comes in becomes turns, what the runtime makes goes out."""

    def __init__(self, service: Service, workers: Workers, socket: WebSocket):
        self._service, self._workers, self._socket = service, workers, socket
        self._events: asyncio.Queue[events.Event] = asyncio.Queue()
        self._seat: Seat | None = None
        self._over = asyncio.Event()  # the place is free again, and the session saved
        self._name = secrets.token_hex(4)  # in logs
        self._made = self._pushed = 0.0  # seconds
        self._window, self._count = 0.0, 0  # messages in this second

    async def run(self) -> None:
        """Until the last message; raises WebSocketDisconnect when the client is gone."""
        await self._send(self._service.hello())
        try:
            request = await self._request()
            self._join(request)
        except TimeoutError:
            await self._end(f"no 'start' came within {START_SECONDS} s", failed=True)
            return
        except (ValueError, Full) as error:
            await self._end(str(error), failed=True)
            return
        receiving = asyncio.create_task(self._receive())
        sending = asyncio.create_task(self._give(request))
        try:
            await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
            for task in (receiving, sending):
                if task.done():
                    task.result()
        finally:
            for task in (receiving, sending):
                task.cancel()
            await asyncio.gather(receiving, sending, return_exceptions=True)

    async def _request(self) -> SessionRequest:
        """What the first message asks for."""
        async with asyncio.timeout(START_SECONDS):
            first = protocol.read(await self._text(), (protocol.Start, protocol.TakeUp))
        if isinstance(first, protocol.TakeUp):
            return await self._workers.saved(first.session)
        self._service.runtime.check_room()
        await self._workers.check(first.prompt)
        if self._service.log_prompts:
            self._log("start", prompt=first.prompt)
        return SessionRequest.of(first.prompt, first.seed, first.sound)

    def _join(self, request: SessionRequest) -> None:
        loop, workers, name = asyncio.get_running_loop(), self._workers, request.log.name

        async def end() -> None:
            self._seat.leave("the session was taken up elsewhere", keep=True)
            async with asyncio.timeout(SAVE_SECONDS):
                await self._over.wait()

        def on_event(event: events.Event) -> None:
            self._events.put_nowait(event)
            if isinstance(event, events.Over):
                self._over.set()
                if workers.seated.get(name) is end:
                    del workers.seated[name]
                    workers.logs.end(name)

        def told(event: events.Event) -> None:  # in the runtime's thread
            with contextlib.suppress(RuntimeError):  # the server is over, and its loop closed
                loop.call_soon_threadsafe(on_event, event)

        self._seat = self._service.runtime.join(request, told)
        workers.seated[name] = end
        workers.logs.add(request.log)

    def leave(self) -> None:
        """The client is gone without a word: gives the place back, and has the session saved."""
        if self._seat is not None:
            self._seat.leave(keep=True)
            self._log("left")

    async def _text(self) -> str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        now = time.monotonic()
        if now - self._window >= 1:
            self._window, self._count = now, 0
        self._count += 1
        if self._count > MESSAGES_PER_SECOND:
            raise ProtocolError(f"more than {MESSAGES_PER_SECOND} messages in a second")
        if message.get("text") is None:
            raise ProtocolError("a binary message must be announced by 'image' or 'audio'")
        return message["text"]

    async def _binary(self) -> bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        if message.get("bytes") is None:
            raise ProtocolError("a binary message was announced, and text came")
        if len(message["bytes"]) > LARGEST_UPLOAD:
            raise ProtocolError(f"an upload has at most {LARGEST_UPLOAD} bytes")
        return message["bytes"]

    async def _receive(self) -> None:
        """Ends when the client breaks the protocol; raises WebSocketDisconnect when it is gone."""
        while True:
            data = None
            try:
                message = protocol.read(await self._text())
                if isinstance(message, protocol.Image | protocol.Audio):
                    data = await self._binary()
                await self._apply(message, data)
            except ProtocolError as error:
                self._seat.leave(str(error))
                await self._end(str(error), failed=True)
                return
            except ValueError as error:
                await self._send(protocol.ProblemFound(str(error)))

    async def _apply(self, message: protocol.WireMessage, data: bytes | None) -> None:
        seat = self._seat
        match message:
            case protocol.NewPrompt(text, blend, recache):
                # encoded there, beside the stream
                await self._workers.with_text(
                    text, lambda text: seat.set_prompt(text, blend=blend, recache=recache)
                )
                said = {"text": text} if self._service.log_prompts else {}
                self._log("prompt", characters=len(text), **said)
            case protocol.NewSeed(seed):
                seat.set_seed(seed)
            case protocol.GoBack(block):
                seat.rewind(block)
                self._log("rewind", block=block)
            case protocol.Image(strength):
                async with self._workers.decoding:
                    decoded = await uploads.decode_image(data)
                pixels = await self._workers.beside(self._service.fitted, decoded)
                seat.set_image(pixels, strength)
                self._log("image", bytes=len(data))
            case protocol.Audio(rate):
                self._push(_samples(data), rate)
            case protocol.Progress(seconds):
                # no more than was sent: what a client claims beyond would pile up here
                seat.taken(min(seconds, self._made))
            case protocol.Pause():
                seat.pause()
            case protocol.Resume():
                seat.resume()
            case protocol.Stop():
                seat.leave("stopped")
            case protocol.Start() | protocol.TakeUp():
                raise ProtocolError("the session has begun already")

    def _push(self, waveform: np.ndarray, rate: int) -> None:
        seconds = len(waveform) / rate
        if self._pushed + seconds > self._made + SOUND_AHEAD:
            raise ValueError(f"at most {SOUND_AHEAD:g} s of sound are kept ahead")
        self._seat.push_audio(waveform[None], rate)
        self._pushed += seconds

    async def _give(self, request: SessionRequest) -> None:
        """Sends what the runtime makes, until it ends."""
        fragments, beside, announced = None, self._workers.beside, False

        async def give(data: bytes) -> None:
            nonlocal announced
            if not announced and fragments.codecs:
                announced = True
                await self._send(protocol.Media(f'video/mp4; codecs="{fragments.codecs}"'))
            if data:
                await self._socket.send_bytes(data)

        while True:
            match await self._events.get():
                case events.Queued(position):
                    await self._send(protocol.Waiting(position))
                case events.Opened():
                    seed, name = request.log.seed, request.log.name
                    self._log("begun", seed=seed, again=request.snapshot is not None)
                    fragments = await beside(self._service.fragments)
                    await self._send(protocol.Begun(seed, name))
                case events.Refused(problem):
                    await self._send(protocol.ProblemFound(problem))
                case events.Shed(steps, waiting):
                    self._log("load", steps=steps, waiting=waiting)
                    await self._send(protocol.LoadShed(steps, waiting))
                case events.Made() as made:
                    chunk = made.chunk
                    data = await beside(fragments.push, chunk.frames[0], chunk.waveform[0])
                    self._made += chunk.frames.shape[1] / self._service.frame_rate
                    figures = self._made, made.seconds, made.lead, made.late, chunk.late
                    figures = (round(x, 4) for x in figures)
                    await self._send(protocol.BlockMade(chunk.block, *figures, made.steps))
                    await give(data)
                case events.Over(reason, error, saved):
                    if fragments is not None:
                        await give(await beside(fragments.close))
                    failed = error is not None
                    self._log("ended", reason=reason, failed=failed, saved=saved)
                    await self._end(reason, failed=failed, saved=saved)
                    return

    async def _send(self, message: protocol.WireMessage) -> None:
        await self._socket.send_text(message.to_json())

    async def _end(self, reason: str, *, failed: bool, saved: bool = False) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            await self._send(protocol.Ended(reason, failed, saved))
            await self._socket.close()

    def _log(self, event: str, **fields: Any) -> None:
        _log.info(json.dumps({"session": self._name, "event": event} | fields))


def _samples(data: bytes) -> np.ndarray:
    """int16 of one channel -> [N, 2] float32."""
    if len(data) % 2 or not data:
        raise ProtocolError("sound is int16 samples of one channel, at least one")
    mono = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    return np.repeat(mono[:, None], 2, axis=1)
