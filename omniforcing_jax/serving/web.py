"""The server: one WebSocket a session, an endpoint for whole clips, metrics, and the page.

It is safe to be left running: it answers only hosts and origins that it knows, and clients that
have the token if there is one; sizes, numbers and times of all that a client sends are limited; and
no path of a client reaches the file system. Logs hold no prompts.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import pathlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from omniforcing_jax.io.media_files import check_enlargement, compress_image, fit_pixels
from omniforcing_jax.serving import protocol, runtime, uploads
from omniforcing_jax.serving.fragments import Fragments
from omniforcing_jax.serving.protocol import ProtocolError
from omniforcing_jax.serving.runtime import Full, Runtime, Seat

PAGE = pathlib.Path(__file__).parent / "page"
LARGEST_UPLOAD = 16 << 20  # bytes
LONGEST_PROMPT = 4000  # characters
START_SECONDS = 30  # for the first message
MESSAGES_PER_SECOND = 100
SOUND_AHEAD = 30.0  # seconds of pushed sound beyond what is made
REFUSED = 1008  # WebSocket's status for a breach of policy
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """What the runtime opens a stream for.

    Attributes:
      contexts: of the first prompt, as the text encoder gives them.
      seed: of all noise.
      sound: whether the sound is pushed.
    """

    contexts: Any
    seed: int
    sound: bool = False


@dataclasses.dataclass(frozen=True)
class Service:
    """What a server serves.

    Attributes:
      runtime: steps the sessions.
      encode: text to contexts; called beside the runtime's thread, by one thread at a time. Raises
        ValueError for a text that it cannot take.
      width, height, frame_rate, sample_rate: of the streams.
      enlarge: every pixel is sent as so many by so many.
      image_crf: H.264 quality that pictures are given, see `media_files.compress_image`.
      hosts: names by which the server may be called, without port; "*" for any.
      token: that clients must have; None lets all in.
      compilations: how many programs the process has compiled, a figure that must stand still.
    """

    runtime: Runtime
    encode: Callable[[str], Any]
    width: int
    height: int
    frame_rate: float
    sample_rate: int
    enlarge: int = 1
    image_crf: int = 0
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    token: str | None = None
    compilations: Callable[[], int] = lambda: 0

    def fragments(self) -> Fragments:
        """An encoder of one stream."""
        return Fragments(
            width=self.width,
            height=self.height,
            frame_rate=self.frame_rate,
            sample_rate=self.sample_rate,
            enlarge=self.enlarge,
        )

    def fitted(self, pixels: np.ndarray) -> np.ndarray:
        """A client's picture [H, W, 3] uint8 as a stream takes it, float32 in [-1, 1].

        Raises:
          ValueError: it is too small.
        """
        check_enlargement(pixels.shape[:2], self.height, self.width, "the picture")
        pixels = compress_image(pixels, self.image_crf)
        return fit_pixels(pixels, self.height, self.width)

    def hello(self) -> protocol.Hello:
        """What a client is told first."""
        return protocol.Hello(
            protocol=protocol.VERSION,
            width=self.width * self.enlarge,
            height=self.height * self.enlarge,
            frame_rate=self.frame_rate,
            sample_rate=self.sample_rate,
            lead=self.runtime.limits.lead,
            longest_prompt=LONGEST_PROMPT,
            largest_upload=LARGEST_UPLOAD,
        )


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service; see docs/protocol.md for its addresses."""
    text_thread = ThreadPoolExecutor(1, "text")
    encoders = ThreadPoolExecutor(max(2, service.runtime.limits.sessions), "encoder")
    server = _Server(service, text_thread, encoders)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.runtime.close)
        for pool in (text_thread, encoders):
            pool.shutdown(wait=False, cancel_futures=True)

    return Starlette(
        routes=[
            WebSocketRoute("/session", server.session),
            Route("/clip", server.clip, methods=["POST"]),
            Route("/healthz", server.health),
            Route("/metrics", server.metrics),
            Mount("/", _Page(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(service.hosts))],
        lifespan=lifespan,
    )


class _Page(StaticFiles):
    """The page's files, with headers that keep it from asking anybody else."""

    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


class _Server:
    """The handlers of all addresses."""

    def __init__(self, service: Service, text_thread, encoders):
        self.service, self._text_thread, self.encoders = service, text_thread, encoders
        registry = CollectorRegistry()
        registry.register(_Figures(service))
        self._registry = registry
        self.decoding = asyncio.Semaphore(1)  # a picture at a time: each may use gigabytes

    async def encode(self, text: str) -> Any:
        """Contexts of a prompt; ValueError for one that is empty or too long."""
        if not text.strip():
            raise ValueError("the prompt is empty")
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"a prompt has at most {LONGEST_PROMPT} characters")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, self.service.encode, text)

    def is_allowed(self, connection: Request | WebSocket) -> bool:
        """Whether it comes from here, or from a program, and has the token."""
        origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
        if origin is not None and origin.partition("://")[2] != host:
            return False
        if self.service.token is None:
            return True
        bearer = connection.headers.get("authorization", "").removeprefix("Bearer ")
        given = connection.query_params.get("token") or bearer
        return hmac.compare_digest(given.encode(), self.service.token.encode())

    async def health(self, request: Request) -> Response:
        """200 as long as streams are taken."""
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def session(self, socket: WebSocket) -> None:
        """One session, from the first message to the last."""
        if not self.is_allowed(socket):
            await socket.close(REFUSED)
            return
        await socket.accept()
        session = _Session(self, socket)
        try:
            await session.run()
        except (WebSocketDisconnect, RuntimeError):  # gone, also in the middle of a message
            pass
        finally:
            session.leave()

    async def clip(self, request: Request) -> Response:
        """One whole clip: {"prompt": …, "seconds": …, "seed": …} -> an MP4."""
        if not self.is_allowed(request):
            return JSONResponse({"problem": "the token is missing or wrong"}, 403)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > protocol.LONGEST_TEXT_MESSAGE:
                return JSONResponse({"problem": "the request is too long"}, 413)
        try:
            wanted = _ClipRequest.from_fields(_json_object(body))
            longest = self.service.runtime.limits.longest
            if not 0 < wanted.seconds <= longest:
                raise ValueError(f"'seconds' must be above 0 and at most {longest:g}")
            self.service.runtime.check_room()  # before a text is encoded for nothing
            contexts = await self.encode(wanted.prompt)
            order = StreamRequest(contexts, _seed(wanted.seed))
            events: asyncio.Queue = asyncio.Queue()
            loop = asyncio.get_running_loop()
            seat = self.service.runtime.join(
                order, lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
                paced=False,
            )  # fmt: skip
        except ValueError as error:
            return JSONResponse({"problem": str(error)}, 400)
        except Full as error:
            return JSONResponse({"problem": str(error)}, 503)
        pieces = self._clip_pieces(seat, events, wanted.seconds)
        return StreamingResponse(pieces, media_type="video/mp4")

    async def _clip_pieces(self, seat: Seat, events: asyncio.Queue, seconds: float):
        loop, fragments = asyncio.get_running_loop(), self.service.fragments()
        frames = round(seconds * self.service.frame_rate)
        samples = round(seconds * self.service.sample_rate)
        try:
            while True:
                event = await events.get()
                if isinstance(event, runtime.Ended):
                    raise RuntimeError(event.reason)  # the connection is cut, as headers are out
                if not isinstance(event, runtime.Made):
                    continue
                chunk = event.chunk.until(frames, samples)
                yield await loop.run_in_executor(
                    self.encoders, fragments.push, chunk.frames[0], chunk.waveform[0]
                )
                shown = event.chunk.first_frame + event.chunk.frames.shape[1]
                heard = event.chunk.first_sample + event.chunk.waveform.shape[1]
                seat.taken(shown / self.service.frame_rate)
                if shown >= frames and heard >= samples:
                    break
            yield await loop.run_in_executor(self.encoders, fragments.close)
        finally:
            seat.leave()


@dataclasses.dataclass(frozen=True)
class _ClipRequest(protocol.Message):
    prompt: str
    seconds: float = 5.0
    seed: int | None = None


def _json_object(body: bytes) -> dict:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ProtocolError("the request must be a JSON object")
    return fields


def _seed(given: int | None) -> int:
    if given is not None and not 0 <= given < 2**32:
        raise ProtocolError(f"'seed' must be from 0 to {2**32 - 1}")
    return secrets.randbits(32) if given is None else given


class _Session:
    """One WebSocket: what comes in becomes turns, what the runtime makes goes out."""

    def __init__(self, server: _Server, socket: WebSocket):
        self._server, self._service, self._socket = server, server.service, socket
        self._events: asyncio.Queue[runtime.Event] = asyncio.Queue()
        self._seat: Seat | None = None
        self._name = secrets.token_hex(4)  # in logs
        self._made = self._pushed = 0.0  # seconds
        self._window, self._count = 0.0, 0  # messages in this second

    async def run(self) -> None:
        await self._send(self._service.hello())
        try:
            async with asyncio.timeout(START_SECONDS):
                start = protocol.read(await self._text(), (protocol.Start,))
                self._service.runtime.check_room()  # before a text is encoded for nothing
                contexts = await self._server.encode(start.prompt)
            request = StreamRequest(contexts, _seed(start.seed), start.sound)
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
                contexts = await self._server.encode(text)
                seat.turn(lambda stream: stream.set_prompt(contexts))
                self._log("prompt", characters=len(text))
            case protocol.Image(strength):
                async with self._server.decoding:
                    decoded = await uploads.decode_image(data)
                loop = asyncio.get_running_loop()
                pixels = await loop.run_in_executor(
                    self._server.encoders, self._service.fitted, decoded
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

    async def _give(self, request: StreamRequest) -> None:
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
                case runtime.Waiting(position):
                    await self._send(protocol.Waiting(position))
                case runtime.Begun():
                    self._log("begun", seed=request.seed)
                    await self._send(protocol.Begun(request.seed))
                case runtime.Refused(problem):
                    await self._send(protocol.Problem(problem))
                case runtime.Made(chunk, seconds, lead, late):
                    data = await loop.run_in_executor(
                        self._server.encoders, fragments.push, chunk.frames[0], chunk.waveform[0]
                    )
                    shown = chunk.first_frame + chunk.frames.shape[1]
                    self._made = shown / self._service.frame_rate
                    figures = (round(x, 4) for x in (self._made, seconds, lead, late, chunk.late))
                    await self._send(protocol.Block(chunk.block, *figures))
                    await give(data)
                case runtime.Ended(reason, error):
                    await give(await loop.run_in_executor(self._server.encoders, fragments.close))
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


class _Figures:
    """What Prometheus is told."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self):
        figures = dataclasses.asdict(self._service.runtime.figures())
        figures["compilations"] = self._service.compilations()
        for kind, name, text in (
            (GaugeMetricFamily, "sessions", "that are stepped"),
            (GaugeMetricFamily, "waiting", "sessions that wait"),
            (CounterMetricFamily, "blocks", "blocks made"),
            (CounterMetricFamily, "late_blocks", "of them after their deadline"),
            (CounterMetricFamily, "seconds", "spent on making blocks"),
            (CounterMetricFamily, "refused", "sessions refused"),
            (CounterMetricFamily, "compilations", "programs compiled"),
        ):
            metric = kind(f"omniforcing_{name}", text)
            metric.add_metric([], figures[name])
            yield metric
