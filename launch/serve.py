"""Serves live streams: open the page, type, and see and hear.

    python -m launch.serve --checkpoint checkpoints/omniforcing --text-encoder checkpoints/gemma3

Then open http://localhost:8000. Programs talk to the same address, see docs/protocol.md. Everything
is compiled before the first client is let in. It answers this machine only, unless --host names
another address; then clients need a token, which is printed, or given with --token.

With --replicas there are several processes behind that address, each with an accelerator, by Ray
Serve: on this machine, or in the cluster of RAY_ADDRESS.

SIGTERM and Ctrl-C finish the blocks that are being made, save the sessions, and tell the clients.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import pathlib
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import jax
from rich.console import Console

from checkpoint_converters import lora
from launch import compilation, options
from omniforcing_jax import (
    Pipeline,
    PipelineConfig,
    PromptEncoder,
    RolloutConfig,
    StreamingSession,
    load_pipeline,
    programs,
)
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import user_cache
from omniforcing_jax.models.lora import KernelUpdate
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.serving.events import Limits
from omniforcing_jax.serving.load import Load
from omniforcing_jax.serving.room import Room
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.training.metrics import num_compilations

try:
    import uvicorn
    from starlette.applications import Starlette

    from omniforcing_jax.serving.service import Service, SessionRequest
    from omniforcing_jax.serving.snapshots import SessionKeeper, SnapshotStore
    from omniforcing_jax.serving.turn_log import TurnLog
    from omniforcing_jax.serving.web import make_app
except ImportError as error:
    raise SystemExit(f"{error}; serving needs it: pip install -e '.[serve]'") from None

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SHUTDOWN_SECONDS = 10


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.serve", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by checkpoint_converters")
    options.add_text_encoder(parser, required=True)
    options.add_size(parser)
    add("--enlarge", type=int, default=1, metavar="N", help="send every pixel as N x N (default 1)")
    add("--timesteps", type=float, nargs="+", help="of the student (default: as trained)")
    add("--layout", choices=("prefix", "merged"), help="default: the one of the checkpoint")
    options.add_cache(parser)
    options.add_cache_dtype(parser)
    add("--recache", action="store_true", help="write the cache anew when a prompt changes")
    lora.add_option(
        parser, "LoRA to add to the transformer's weights in memory (strength 1); may be repeated"
    )
    options.add_decoder(parser)
    options.add_dtype(parser)
    options.add_quantize(parser)
    options.add_mesh(parser)
    options.add_attention(parser)
    options.add_verify(parser)
    compilation.add_option(parser)
    server = parser.add_argument_group("the server")
    limits = Limits()
    server.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    server.add_argument("--port", type=int, default=8000, help="default 8000")
    server.add_argument("--hosts", nargs="+", default=[], metavar="NAME",
                        help="names by which browsers reach it, besides --host")  # fmt: skip
    server.add_argument("--token", help="that clients need (default: none on this machine only)")
    server.add_argument("--replicas", type=int, nargs="+", metavar="N",
                        help="processes with an accelerator each, by Ray Serve; of two numbers "
                        "Ray chooses between, by the load")  # fmt: skip
    server.add_argument("--least-steps", type=int, metavar="N",
                        help="denoising steps left under load (default: half)")  # fmt: skip
    server.add_argument("--snapshots", type=pathlib.Path, metavar="FOLDER",
                        help="of sessions without client (default: user's cache)")  # fmt: skip
    server.add_argument("--snapshot-limit", type=float, default=10.0, metavar="GIB",
                        help="of all, the oldest go first (default 10; 0: none)")  # fmt: skip
    server.add_argument("--snapshot-every", type=float, metavar="SECONDS",
                        help="of running sessions, too, so that they outlive this server "
                        "(default: 10 with --snapshots, else never)")  # fmt: skip
    server.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    for name, text in (
        ("sessions", "streams side by side"),
        ("waiting", "clients in the queue"),
        ("lead", "seconds that are made ahead of playback"),
        ("longest", "seconds of a stream"),
        ("idle", "seconds after which a silent client loses its place"),
    ):
        usual = getattr(limits, name)
        server.add_argument(
            f"--{name}", type=type(usual), default=usual, help=f"{text} (default {usual:g})"
        )
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class ServeRequest:
    """A checked command line.

    Attributes:
      config: of the checkpoint.
      rollout: how blocks are generated.
      encoder: of the prompts.
      limits: of the runtime.
      least_steps: of denoising that are left under load.
      loras: what is added to the transformer's weights.
      fingerprint: of all that a saved session depends on.
    """

    config: PipelineConfig
    rollout: RolloutConfig
    encoder: PromptEncoder
    limits: Limits
    least_steps: int
    loras: list[KernelUpdate]
    fingerprint: str


def check_arguments(args: argparse.Namespace) -> ServeRequest:
    """Checks everything before any weight is read.

    Raises:
      ValueError, OSError: what is wrong, and what would be right.
    """
    limits = Limits(**{field.name: vars(args)[field.name] for field in dataclasses.fields(Limits)})
    if args.replicas and (len(args.replicas) > 2 or not 1 <= args.replicas[0] <= args.replicas[-1]):
        found = " ".join(map(str, args.replicas))
        raise ValueError(
            f"--replicas takes one number from 1 on, or the least and the most: {found}"
        )
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, not {args.port}")
    if args.enlarge < 1:
        raise ValueError(f"--enlarge must be 1 or more, not {args.enlarge}")
    if not 0 <= args.snapshot_limit < float("inf"):
        raise ValueError(f"--snapshot-limit must be 0 or more, not {args.snapshot_limit}")
    if args.snapshot_every is None:
        args.snapshot_every = 10.0 if args.snapshots else float("inf")
    if not args.snapshot_every >= 1:
        raise ValueError(f"--snapshot-every must be 1 or more, not {args.snapshot_every:g}")
    config = PipelineConfig.from_checkpoint(args.checkpoint)
    config.check_complete()
    if not config.trained.causal:
        raise ValueError(
            f"{args.checkpoint} is bidirectional and was not trained to be streamed: give a student"
        )
    notes = options.list_deviations(options.use_trained(args, config.trained))
    for note in (*notes, *options.check_precision(args)):
        programs.say(note)
    options.find_mesh(args, config)
    layout = config.layout(args.layout, args.fps)
    cache = config.cache(layout, args.window, args.anchors, args.positions)
    cache = dataclasses.replace(cache, dtype=args.cache_dtype)
    sigmas = config.sigmas(args.timesteps)
    rollout = config.rollout(args.height, args.width, cache=cache, sigmas=sigmas)
    rollout = dataclasses.replace(rollout, recache=args.recache)
    rollout.cache.blocks_in_positions(None)  # streams have no end that is known
    least = (rollout.num_steps + 1) // 2 if args.least_steps is None else args.least_steps
    Load(rollout.num_steps, least)
    size = cache_bytes(cache, config.transformer, batch=1, patches=rollout.patches,
                       dtype=options.compute_dtype(args), per_layer=True)  # fmt: skip
    caches, what = limits.sessions, f"the caches of {limits.sessions} sessions"
    if _copies(args):
        caches, what = caches + 1, f"{what}, and a copy of one,"
    check_memory(what, caches * size)
    loras, metadata = [], checkpoints.load_config(args.checkpoint)
    if args.loras:
        loras, lines = lora.updates(args.loras, metadata["config"])
        for line in lines:
            programs.say(line)
    encoder = options.make_encoder(args, keep=True)
    names = ("loras", "dtype", "quantize", "decode", "attention")
    known = metadata, rollout, encoder.length, [vars(args)[name] for name in names]
    fingerprint = hashlib.sha256(repr(known).encode()).hexdigest()
    return ServeRequest(config, rollout, encoder, limits, least, loras, fingerprint)


def _copies(args: argparse.Namespace) -> bool:
    """Whether running sessions are saved."""
    return bool(args.snapshot_limit) and args.snapshot_every < float("inf")


def bind(host: str, port: int) -> socket.socket:
    """The address, before anything else is done.

    Raises:
      OSError: it is in use, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        reason = f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port"
        raise OSError(error.errno, reason) from error
    return bound


def streams(
    args: argparse.Namespace,
    pipeline: Pipeline,
    rollout: RolloutConfig,
    encoder: PromptEncoder,
):
    """What opens a stream for a request; prompts up to `encoder.length` share their programs."""

    def open_stream(request: SessionRequest):
        log, snapshot = request.log, request.snapshot
        stream = pipeline.session(
            rollout,
            log.prompt if snapshot is None else snapshot["contexts"],
            prompts=encoder,
            seed=log.seed,
            text_length=encoder.length,
            implementation=args.attention,
            decode_mode=args.decode,
            given="audio" if log.sound else None,
            wait=log.sound,
            steerable=True,
            log=log.append,
            **options.decoder_settings(args),
        )
        if snapshot is not None:
            stream.restore(snapshot)
        return stream

    return open_stream


class Server(uvicorn.Server):
    """Ends the sessions, with what is made and a reason, before connections are cut."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime):
        super().__init__(config)
        self._runtime = runtime

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the clients to have their last message, but not for those who do not read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await asyncio.to_thread(self._runtime.close)
                while self.server_state.tasks and not self.force_exit:
                    await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def warm_up(
    open_stream, request: ServeRequest, console: Console, copies: bool
) -> tuple[Load, Room]:
    """Compiles all that streams with and without pushed sound will need, and makes some blocks.

    A program is slow when it runs for the first time; the first client shall not notice.

    Args:
      copies: whether running sessions are saved.

    Returns:
      What blocks cost, with all steps and with the least; and how many sessions the device holds.
    """
    room = Room(jax.devices()[0])
    start, frame_rate = time.perf_counter(), request.rollout.cache.layout.frame_rate
    with console.status("compiling ...") as status:
        for sound in (True, False):
            done = []

            def show(part: str, done: list[str] = done) -> None:
                done.append(part)
                status.update(f"compiling: {', '.join(done)} done")

            stream = open_stream(SessionRequest(TurnLog("", "a calm sea", 0, sound)))
            stream.warm_up(show)
        for _ in range(request.rollout.cache.capacity + 3):  # a stream has run all programs then
            stream.step()
        if copies:
            stream.begin_snapshot()()
        room.measure()
        stream.rewind(stream.num_blocks - 1)
        stream.step()
        costs = {}
        for steps in (request.rollout.num_steps, request.least_steps):
            stream.set_steps(steps)
            costs[steps] = min(_cost(stream, frame_rate) for _ in range(4))
        stream.finish()
    console.print(f"compiling  {time.perf_counter() - start:6.2f} s")
    told = ", ".join(f"{cost:.2f} s with {steps} steps" for steps, cost in costs.items())
    console.print(f"a second   takes {told}")
    if str(room):
        console.print(f"memory     {room}")
    return Load(request.rollout.num_steps, request.least_steps, costs), room


def _cost(stream: StreamingSession, frame_rate: float) -> float:
    """Seconds that a second of the next block takes."""
    start = time.perf_counter()
    frames = stream.step().frames.shape[1]
    return (time.perf_counter() - start) * frame_rate / frames


def snapshot_store(args: argparse.Namespace, request: ServeRequest) -> SnapshotStore | None:
    """Where sessions wait for their clients; None if none are kept."""
    if not args.snapshot_limit:
        return None
    folder = args.snapshots or user_cache("sessions")
    return SnapshotStore(folder, int(args.snapshot_limit * 2**30), request.fingerprint)


def device_memory() -> int | None:
    """Bytes that are in use on the device, or None where it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")


def load_service(
    args: argparse.Namespace, request: ServeRequest, token: str | None, console: Console
) -> Service:
    """Loads the weights and compiles everything; the runtime is not started."""
    store = snapshot_store(args, request)
    compilation.use_cache(not args.no_compilation_cache)
    console.print(options.loading(args))
    how = {"verify": args.verify, "encoders": True, "tiny": args.decode == "tiny"}
    how |= {"quantize": args.quantize, "loras": request.loras}
    how["mesh"] = options.find_mesh(args, request.config)
    pipeline = load_pipeline(args.checkpoint, dtype=options.compute_dtype(args), **how)
    num_compilations()  # counts from here on
    open_stream = streams(args, pipeline, request.rollout, request.encoder)
    with options.plain_warnings(console):
        load, room = warm_up(open_stream, request, console, _copies(args))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("omniforcing_jax.serving").setLevel(logging.INFO)
    keeper = store and SessionKeeper(store, args.snapshot_every)
    return Service(
        Runtime(open_stream, args.fps, request.limits, load, keeper, room),
        lambda text: request.encoder.check([text]),
        args.width,
        args.height,
        args.fps,
        request.config.vocoder.sample_rate,
        enlarge=args.enlarge,
        image_crf=request.config.image_crf,
        hosts=(*LOOPBACK[:2], "[::1]", args.host, *args.hosts),
        token=token,
        compilations=num_compilations,
        device_memory=device_memory,
        snapshots=store,
        log_prompts=args.log_prompts,
    )


def make_replica(args: argparse.Namespace, token: str | None) -> Starlette:
    """The application of one of several replicas, in its own process, until it ends."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    service = load_service(args, check_arguments(args), token, console)
    service.runtime.__enter__()  # the application's end is its end
    return make_app(service)


def run_replicas(
    args: argparse.Namespace, limits: Limits, token: str | None, on_ready: Callable[[], None]
) -> NoReturn:
    """Serves with several replicas until Ctrl-C or SIGTERM.

    Raises:
      ImportError: Ray is not installed.
      ValueError, RuntimeError: see `replicas.running`.
    """
    from launch import replicas

    wanted = replicas.Replicas(
        least=args.replicas[0],
        most=args.replicas[-1],
        sessions=limits.sessions,
        waiting=limits.waiting,
        host=args.host,
        port=args.port,
    )
    with replicas.running(functools.partial(replicas.live_app, args, token), wanted):
        on_ready()
        while True:
            signal.pause()


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    if args.replicas:
        jax.config.update("jax_platforms", "cpu")  # this process only checks
    request = check_arguments(args)
    bound = bind(args.host, args.port)
    open_to_all = args.host not in LOOPBACK
    token = args.token or (secrets.token_urlsafe(16) if open_to_all else None)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    port, suffix = bound.getsockname()[1], f"/?token={token}" if token else ""
    name = "localhost" if args.host in LOOPBACK else args.host
    ready = f"ready      http://{name}:{port}{suffix}"
    if args.replicas:
        bound.close()
        args.port = port  # 0 is any that is free
        run_replicas(args, request.limits, token, lambda: console.print(ready))
    service = load_service(args, request, token, console)
    with service.runtime as runtime:
        settings = uvicorn.Config(
            make_app(service),
            log_level="warning",
            ws_max_size=16 << 20,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        server = Server(settings, runtime)
        console.print(ready)
        server.run(sockets=[bound])
    return 0


if __name__ == "__main__":
    sys.exit(main())
