"""Replicas of the live server behind one address, on Ray Serve: `launch.serve --replicas`.

Each replica is a process with an accelerator and a runtime of its own. A WebSocket is one request,
so a session stays with the replica that has taken it; Ray gives it to one that has less to do. A
replica that has died is started again, and with two numbers Ray starts and ends them by the load.

Ray ends a replica when its requests are over, and kills it when they are not after a while. So that
sessions are saved when the server ends, replicas are told before, by an actor that all wait for.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError(f"{error}; --replicas needs it: pip install -e '.[replicas]'") from None

APPLICATION = "omniforcing"
_STORE = 1 << 27  # bytes; nothing goes through it
OTHER_REQUESTS = 16  # beside the sessions: the page, health, metrics, clips
END_SECONDS = 20  # for a replica to save its sessions, and tell their clients


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many, and where they are reached.

    Attributes:
      least, most: number of replicas; Ray's autoscaler chooses between them.
      sessions: that a replica steps side by side; waiting: that wait for one of those places.
      host, port: of the address that all share.
    """

    least: int
    most: int
    sessions: int
    waiting: int
    host: str = "127.0.0.1"
    port: int = 8000


def accelerator() -> dict[str, Any]:
    """What a replica takes: a GPU or a TPU chip, or a CPU where Ray has neither (yet)."""
    resources = ray.cluster_resources()
    if resources.get("GPU"):
        return {"num_gpus": 1}
    if resources.get("TPU"):
        return {"resources": {"TPU": 1}}
    return {"num_cpus": 1}


class Ending:
    """The server's end, as an actor."""

    def __init__(self):
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Until it has come."""
        await self._event.wait()

    async def come(self) -> None:
        """It has."""
        self._event.set()


def _close_at(ending: Any, close: Callable[[], None]) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # it is gone, and its program with it
        ray.get(ending.wait.remote())
    close()


def _connect() -> None:
    handler = signal.getsignal(signal.SIGTERM)  # Ray's own aborts the program after three seconds
    if cluster := os.environ.get("RAY_ADDRESS"):
        ray.init(address=cluster)
    else:
        ray.init(address="local", object_store_memory=_STORE)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # None: not set from Python


def _start(make_app: Callable[[], Any], replicas: Replicas, ending: Any) -> None:
    takes = accelerator()
    kind = {"num_gpus": "GPU", "resources": "TPU", "num_cpus": "CPU"}[next(iter(takes))]
    there = int(ray.cluster_resources().get(kind, 0))
    if not os.environ.get("RAY_ADDRESS") and there < replicas.least:  # a cluster may grow
        raise ValueError(f"{replicas.least} replicas need one {kind} each, and Ray has {there}")

    def build():  # Ray takes functions only
        app = make_app()
        threading.Thread(target=_close_at, args=(ending, app.state.close), daemon=True).start()
        return app

    deployment = serve.deployment(
        serve.ingress(build)(),
        name=APPLICATION,
        ray_actor_options=takes,
        max_ongoing_requests=replicas.sessions + replicas.waiting + OTHER_REQUESTS,
        graceful_shutdown_timeout_s=END_SECONDS,
        **scale(replicas),
    )
    serve.start(http_options={"host": replicas.host, "port": replicas.port})
    serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")


def scale(replicas: Replicas) -> dict[str, Any]:
    """Settings of the number of replicas: as many as there are full houses."""
    if replicas.least == replicas.most:
        return {"num_replicas": replicas.least}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.sessions,
        }
    }


@contextlib.contextmanager
def running(make_app: Callable[[], Any], replicas: Replicas) -> Iterator[None]:
    """All replicas, in the Ray cluster that there is or a new one; they end with the block.

    In the end each saves its sessions and tells their clients, and the processes are gone.

    Args:
      make_app: called in every replica; loads, compiles, and returns the ASGI application, whose
        `state.close` ends its sessions.
      replicas: see `Replicas`.

    Raises:
      ValueError: this machine has fewer accelerators than replicas.
      RuntimeError: a replica could not be started; says why.
    """
    try:
        _connect()
        ending = ray.remote(num_cpus=0)(Ending).remote()
        _start(make_app, replicas, ending)
        try:
            yield
        finally:
            ray.get(ending.come.remote())
            serve.delete(APPLICATION)
    finally:
        serve.shutdown()
        ray.shutdown()


def live_app(args: argparse.Namespace, token: str | None) -> Any:
    """The application of launch.serve, in a replica."""
    from launch import serve as program

    return program.make_replica(args, token)
