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
import pathlib
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from omniforcing_jax.serving import events, protocol
from omniforcing_jax.serving.connection import Connection
from omniforcing_jax.serving.events import Full
from omniforcing_jax.serving.protocol import ProtocolError
from omniforcing_jax.serving.seat import Seat
from omniforcing_jax.serving.service import Service, SessionRequest, Workers

PAGE = pathlib.Path(__file__).parent / "page"
_NO_TOKEN = "the token is missing or wrong"
REFUSED = 1008  # WebSocket's status for a breach of policy
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service; see docs/protocol.md for its addresses.

    Its `state.close` ends the sessions, as its own end does.
    """
    workers = Workers(service)
    server = _Server(service, workers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.runtime.close)
        workers.close()

    app = Starlette(
        routes=[
            WebSocketRoute("/session", server.session),
            Route("/clip", server.clip, methods=["POST"]),
            Route("/turns/{name}", server.turns),
            Route("/healthz", server.health),
            Route("/metrics", server.metrics),
            Mount("/", _Page(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(service.hosts))],
        lifespan=lifespan,
    )
    app.state.close = service.runtime.close
    return app


class _Page(StaticFiles):
    """The page's files, with headers that keep it from asking anybody else."""

    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


class _Server:
    """The handlers of all addresses."""

    def __init__(self, service: Service, workers: Workers):
        self.service, self.workers = service, workers
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(service))
        ProcessCollector(registry=self._registry)  # memory and time of the process

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
        if self.service.runtime.is_open:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("no sessions are taken any more\n", 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        if not self.is_allowed(request):
            return JSONResponse({"problem": _NO_TOKEN}, 403)
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def turns(self, request: Request) -> Response:
        """The log of a session's turns, for whoever knows its name."""
        if not self.is_allowed(request):
            return JSONResponse({"problem": _NO_TOKEN}, 403)
        log = self.workers.logs.get(request.path_params["name"])
        if log is None:
            return JSONResponse({"problem": "no such session is known here"}, 404)
        headers = {"Content-Disposition": 'attachment; filename="turns.json"'}
        text = await self.workers.beside(log.to_json)
        return Response(text, media_type="application/json", headers=headers)

    async def session(self, socket: WebSocket) -> None:
        """One session, from the first message to the last."""
        if not self.is_allowed(socket):
            await socket.close(REFUSED)
            return
        await socket.accept()
        session = Connection(self.service, self.workers, socket)
        try:
            await session.run()
        except (WebSocketDisconnect, RuntimeError):  # gone, also in the middle of a message
            pass
        finally:
            session.leave()

    async def clip(self, request: Request) -> Response:
        """One whole clip: {"prompt": …, "seconds": …, "seed": …} -> an MP4."""
        if not self.is_allowed(request):
            return JSONResponse({"problem": _NO_TOKEN}, 403)
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
            self.service.runtime.check_room()
            await self.workers.check(wanted.prompt)
            order = SessionRequest.of(wanted.prompt, wanted.seed)
            told: asyncio.Queue = asyncio.Queue()
            loop = asyncio.get_running_loop()
            seat = self.service.runtime.join(
                order, lambda event: loop.call_soon_threadsafe(told.put_nowait, event),
                paced=False,
            )  # fmt: skip
        except ValueError as error:
            return JSONResponse({"problem": str(error)}, 400)
        except Full as error:
            return JSONResponse({"problem": str(error)}, 503)
        pieces = self._clip_pieces(seat, told, wanted.seconds)
        return StreamingResponse(pieces, media_type="video/mp4")

    async def _clip_pieces(self, seat: Seat, told: asyncio.Queue, seconds: float):
        loop, fragments = asyncio.get_running_loop(), self.service.fragments()
        frames = round(seconds * self.service.frame_rate)
        samples = round(seconds * self.service.sample_rate)
        try:
            while True:
                event = await told.get()
                if isinstance(event, events.Over):
                    raise RuntimeError(event.reason)  # the connection is cut, as headers are out
                if not isinstance(event, events.Made):
                    continue
                chunk = event.chunk.until(frames, samples)
                yield await loop.run_in_executor(
                    self.workers.encoders, fragments.push, chunk.frames[0], chunk.waveform[0]
                )
                shown = event.chunk.first_frame + event.chunk.frames.shape[1]
                heard = event.chunk.first_sample + event.chunk.waveform.shape[1]
                seat.taken(shown / self.service.frame_rate)
                if shown >= frames and heard >= samples:
                    break
            yield await loop.run_in_executor(self.workers.encoders, fragments.close)
        finally:
            seat.leave()


@dataclasses.dataclass(frozen=True)
class _ClipRequest(protocol.WireMessage, wire_type="clip"):
    prompt: str
    seconds: float = 5.0
    seed: int | None = None

    def __post_init__(self):
        protocol.check_seed(self.seed)


def _json_object(body: bytes) -> dict:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ProtocolError("the request must be a JSON object")
    return fields


class _Figures:
    """What Prometheus is told."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self):
        figures = dataclasses.asdict(self._service.runtime.figures())
        figures["compilations"] = self._service.compilations()
        figures["device_memory_bytes"] = self._service.device_memory()
        for kind, name, text in (
            (GaugeMetricFamily, "sessions", "that are stepped"),
            (GaugeMetricFamily, "waiting", "sessions that wait"),
            (CounterMetricFamily, "blocks", "blocks made"),
            (CounterMetricFamily, "late_blocks", "of them after their deadline"),
            (CounterMetricFamily, "seconds", "spent on making blocks"),
            (CounterMetricFamily, "host_seconds", "of them, not spent on waiting for the device"),
            (CounterMetricFamily, "refused", "sessions refused"),
            (CounterMetricFamily, "saved", "sessions saved to be taken up again"),
            (CounterMetricFamily, "copies", "of running sessions, saved in case the server dies"),
            (GaugeMetricFamily, "steps", "of denoising; fewer under load"),
            (GaugeMetricFamily, "load", "share of the device's time that the sessions need"),
            (GaugeMetricFamily, "queue_places", "places in the queue; none under load"),
            (GaugeMetricFamily, "device_memory_bytes", "in use on the device"),
            (CounterMetricFamily, "compilations", "programs compiled"),
        ):
            if figures[name] is None:
                continue
            metric = kind(f"omniforcing_{name}", text)
            metric.add_metric([], figures[name])
            yield metric
