"""One WebSocket: what comes in becomes turns, what the runtime makes goes out."""

import asyncio
import json
import logging
import secrets
import time
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from omniforcing_jax.serving import protocol, runtime, uploads
from omniforcing_jax.serving.protocol import ProtocolError
from omniforcing_jax.serving.runtime import Full, Seat
from omniforcing_jax.serving.service import LARGEST_UPLOAD, Service, SessionRequest, Workers

START_SECONDS = 30  # for the first message
MESSAGES_PER_SECOND = 100
SOUND_AHEAD = 30.0  # seconds of pushed sound beyond what is made
_log = logging.getLogger(__name__)


class Connection:
    """One WebSocket: what comes in becomes turns, what the runtime makes goes out."""

    def __init__(self, service: Service, workers: Workers, socket: WebSocket):
        self._service, self._workers, self._socket = service, workers, socket
        self._events: asyncio.Queue[runtime.Event] = asyncio.Queue()
        self._seat: Seat | None = None
        self._name = secrets.token_hex(4)  # in logs
        self._made = self._pushed = 0.0  # seconds
        self._window, self._count = 0.0, 0  # messages in this second

    async def run(self) -> None:
        """Until the last message; raises WebSocketDisconnect when the client is gone."""
        await self._send(self._service.hello())
        try:
            async with asyncio.timeout(START_SECONDS):
                start = protocol.read(await self._text(), (protocol.Start,))
                self._service.runtime.check_room()  # before a text is encoded for nothing
                contexts = await self._workers.encode(start.prompt)
            request = SessionRequest.of(contexts, start.seed, start.sound)
            loop = asyncio.get_running_loop()
            self._seat = self._service.runtime.join(
                request, lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event)
            )
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

    def leave(self) -> None:
        """Gives the place back."""
        if self._seat is not None:
            self._seat.leave()
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
            try:
                message = protocol.read(await self._text())
            except ProtocolError as error:
                await self._end(str(error), failed=True)
                return
            data = None
            try:
                if isinstance(message, protocol.Image | protocol.Audio):
                    data = await self._binary()
                await self._apply(message, data)
            except ProtocolError as error:
                await self._end(str(error), failed=True)
                return
            except ValueError as error:
                await self._send(protocol.Problem(str(error)))

    async def _apply(self, message: protocol.Message, data: bytes | None) -> None:
        seat = self._seat
        match message:
            case protocol.Prompt(text):
                contexts = await self._workers.encode(text)
                seat.turn(lambda stream: stream.set_prompt(contexts))
                self._log("prompt", characters=len(text))
            case protocol.Image(strength):
                async with self._workers.decoding:
                    decoded = await uploads.decode_image(data)
                loop = asyncio.get_running_loop()
                pixels = await loop.run_in_executor(
                    self._workers.encoders, self._service.fitted, decoded
                )
                seat.turn(lambda stream: stream.set_image(pixels, strength))
                self._log("image", bytes=len(data))
            case protocol.Audio(rate):
                waveform = _samples(data)
                self._pushed += len(waveform) / rate
                if self._pushed > self._made + SOUND_AHEAD:
                    self._pushed -= len(waveform) / rate
                    raise ValueError(f"at most {SOUND_AHEAD:g} s of sound are kept ahead")
                seat.turn(
                    lambda stream: stream.push_audio(waveform[None], rate), limited=False
                )  # `SOUND_AHEAD` is its limit
            case protocol.Progress(seconds):
                # no more than was sent: what a client claims beyond would pile up here
                seat.taken(min(seconds, self._made))
            case protocol.Pause():
                seat.pause()
            case protocol.Resume():
                seat.resume()
            case protocol.Stop():
                seat.leave("stopped")
            case protocol.Start():
                raise ProtocolError("the session has begun already")

    async def _give(self, request: SessionRequest) -> None:
        """Sends what the runtime makes, until it ends."""
        loop, fragments = asyncio.get_running_loop(), self._service.fragments()
        announced = False

        async def give(data: bytes) -> None:
            nonlocal announced
            if not announced and fragments.codecs:
                announced = True
                await self._send(protocol.Media(f'video/mp4; codecs="{fragments.codecs}"'))
            if data:
                await self._socket.send_bytes(data)

        while True:
            match await self._events.get():
                case runtime.Queued(position):
                    await self._send(protocol.Waiting(position))
                case runtime.Opened():
                    self._log("begun", seed=request.seed)
                    await self._send(protocol.Begun(request.seed))
                case runtime.Refused(problem):
                    await self._send(protocol.Problem(problem))
                case runtime.Made(chunk, seconds, lead, late):
                    data = await loop.run_in_executor(
                        self._workers.encoders, fragments.push, chunk.frames[0], chunk.waveform[0]
                    )
                    shown = chunk.first_frame + chunk.frames.shape[1]
                    self._made = shown / self._service.frame_rate
                    figures = (round(x, 4) for x in (self._made, seconds, lead, late, chunk.late))
                    await self._send(protocol.Block(chunk.block, *figures))
                    await give(data)
                case runtime.Over(reason, error):
                    await give(await loop.run_in_executor(self._workers.encoders, fragments.close))
                    self._log("ended", reason=reason, failed=error is not None)
                    await self._end(reason, failed=error is not None)
                    return

    async def _send(self, message: protocol.Message) -> None:
        await self._socket.send_text(message.to_json())

    async def _end(self, reason: str, *, failed: bool) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            await self._send(protocol.Ended(reason, failed))
            await self._socket.close()

    def _log(self, event: str, **fields: Any) -> None:
        _log.info(json.dumps({"session": self._name, "event": event} | fields))


def _samples(data: bytes) -> np.ndarray:
    """int16 of one channel -> [N, 2] float32."""
    if len(data) % 2 or not data:
        raise ProtocolError("sound is int16 samples of one channel, at least one")
    mono = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    return np.repeat(mono[:, None], 2, axis=1)
