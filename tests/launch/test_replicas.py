"""Two replicas of the live server on Ray Serve, of which one is killed."""

import asyncio
import os
import signal
import socket

import pytest
from websockets.exceptions import WebSocketException

from omniforcing_jax.serving import client, protocol
from omniforcing_jax.serving.events import Limits
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.service import Service
from omniforcing_jax.serving.web import make_app
from tests.serving.test_web import FRAME_RATE, HEIGHT, SAMPLE_RATE, WIDTH, ColourStream, check

pytest.importorskip("ray")

from launch import replicas

PATIENCE = 180  # seconds; it takes no longer than it takes


def colour_app():
    """Of streams that need no model, one in each replica."""
    runtime = Runtime(ColourStream, FRAME_RATE, Limits(sessions=1, waiting=0, lead=1.0))
    runtime.__enter__()
    return make_app(Service(runtime, check, WIDTH, HEIGHT, FRAME_RATE, SAMPLE_RATE))


@pytest.mark.slow
def test_two_replicas_of_which_one_is_killed():
    """Two sessions live in two processes; when one dies the other's goes on, and it comes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = replicas.Replicas(2, 2, sessions=1, waiting=0, port=port)

    async def run():
        address = f"ws://127.0.0.1:{port}"

        async def live(name, until):
            """Streams until told otherwise, once there is a place: why it ended."""
            asked = False
            while True:
                try:
                    async with client.open_session(address) as session:
                        await session.send(protocol.Start(name))
                        async for message in session:
                            if hasattr(message, "end"):
                                ends[name] = message.end
                            if until.is_set() and not asked:
                                asked = True
                                await session.send(protocol.Stop())
                        if name in ends:
                            return message.reason
                except (RuntimeError, OSError, WebSocketException):
                    if name in ends:
                        return "cut"
                await asyncio.sleep(0.5)

        ends, stop = {}, asyncio.Event()
        tasks = []
        for name in ("red", "blue"):
            tasks.append(asyncio.create_task(live(name, stop)))
            async with asyncio.timeout(PATIENCE):
                while ends.get(name, 0) < 2:
                    await asyncio.sleep(0.1)
        pids = replica_processes()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            (cut,), (lives,) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert cut.result() == "cut"
        before = max(ends.values())
        async with asyncio.timeout(PATIENCE):
            while max(ends.values()) < before + 2:
                await asyncio.sleep(0.1)
        stop.set()
        assert await lives == "stopped"
        # the dead one is started again, and both places can be taken
        ends.clear()
        stop.clear()
        tasks = []
        for name in ("red", "green"):
            tasks.append(asyncio.create_task(live(name, stop)))
            async with asyncio.timeout(PATIENCE):
                while name not in ends:
                    await asyncio.sleep(0.1)
        stop.set()
        assert await asyncio.gather(*tasks) == ["stopped"] * 2

    with replicas.running(colour_app, wanted):
        asyncio.run(run())


def replica_processes() -> list[int]:
    """Processes of the replicas that live."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return [a.pid for a in actors if "ServeReplica" in a.class_name]


def test_numbers_of_replicas():
    assert replicas.scale(replicas.Replicas(2, 2, 1, 0)) == {"num_replicas": 2}
    scaled = replicas.scale(replicas.Replicas(1, 8, 2, 4))["autoscaling_config"]
    assert scaled["target_ongoing_requests"] == 2
