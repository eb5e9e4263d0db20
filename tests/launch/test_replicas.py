"""Two replicas of the live server on Ray Serve, of which one is killed."""

import asyncio
import functools
import os
import signal
import socket
import threading

import pytest
from websockets.exceptions import WebSocketException

from omniforcing_jax import programs
from omniforcing_jax.serving import client, protocol
from omniforcing_jax.serving.events import Limits
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.service import Service
from omniforcing_jax.serving.snapshots import SessionKeeper, SnapshotStore
from omniforcing_jax.serving.web import make_app
from tests.serving.test_web import FRAME_RATE, HEIGHT, SAMPLE_RATE, WIDTH, ColourStream, check

pytest.importorskip("ray")

from launch import replicas, serve

PATIENCE = 180  # seconds; it takes no longer than it takes


def colour_app(folder):
    """Of streams that need no model; sessions are copied to the folder while they run."""
    store = SnapshotStore(folder, 1 << 20, "this model")
    limits, keeper = Limits(sessions=2, waiting=0, lead=1.0), SessionKeeper(store, every=1.0)
    runtime = Runtime(ColourStream, FRAME_RATE, limits, keeper=keeper)
    runtime.__enter__()
    service = Service(runtime, check, WIDTH, HEIGHT, FRAME_RATE, SAMPLE_RATE, snapshots=store)
    return make_app(service)


@pytest.mark.slow
def test_two_replicas_of_which_one_is_killed(tmp_path):
    """Two sessions live in two processes; when one dies both go on, its own from the last copy.

    The process comes back, and in the end all are gone, sessions saved.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = replicas.Replicas(2, 2, sessions=2, waiting=0, port=port)

    async def run():
        address, blocks = f"ws://127.0.0.1:{port}", {}

        async def live(first):
            """Streams to the end, once there is a place: its reason, and whether it was saved."""
            name = None
            while name is None:
                try:
                    async with client.open_session(address) as session:
                        await session.send(first)
                        async for message in session:
                            if isinstance(message, protocol.Begun):
                                name = message.session
                                blocks[name] = []
                            if isinstance(message, protocol.BlockMade):
                                blocks[name].append(message.block)
                        if name is not None:
                            return message.reason, message.saved
                except (RuntimeError, OSError, WebSocketException):
                    if name is not None:
                        return "cut", name
                await asyncio.sleep(0.5)

        async def until(happened):
            async with asyncio.timeout(PATIENCE):
                while not happened():
                    await asyncio.sleep(0.1)

        tasks = []
        for colour in ("red", "blue"):
            tasks.append(asyncio.create_task(live(protocol.Start(colour))))
            await until(lambda: len(blocks) == len(tasks) and min(map(len, blocks.values())) > 4)
        pids = replica_processes()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            (cut,), (lives,) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        (reason, name), before = cut.result(), {name: [*made] for name, made in blocks.items()}
        assert reason == "cut"
        again = asyncio.create_task(live(protocol.TakeUp(name)))
        await until(lambda: again.done() or (blocks[name] != before[name] and blocks[name][2:]))
        assert not again.done(), again.result()
        assert -1 <= before[name][-1] - blocks[name][0] <= 4, "a second and what was made ahead"
        log, _ = SnapshotStore(tmp_path, 1 << 20, "this model").read(name)
        assert blocks[name][0] in log.taken_up
        (other,) = set(blocks) - {name}
        await until(lambda: lives.done() or len(blocks[other]) > len(before[other]) + 2)
        assert not lives.done(), "the other one"
        await until(lambda: len(replica_processes()) == 2)  # the dead one is started again
        return again, lives

    loop = asyncio.new_event_loop()
    clients = threading.Thread(target=loop.run_forever)
    clients.start()

    def result(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    async def ended(tasks):
        return await asyncio.gather(*tasks)

    try:
        with (
            pytest.raises(programs.Terminated),
            programs.sigterm_interrupts(),
            replicas.running(functools.partial(colour_app, tmp_path), wanted),
        ):
            tasks = result(run())
            pids = replica_processes()
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        ends = result(ended(tasks))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        clients.join()
    assert ends == [("the server is being shut down", True)] * 2
    assert not any(map(is_alive, pids))
    serve.bind("127.0.0.1", port).close()  # it is free


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def replica_processes() -> list[int]:
    """Processes of the replicas that live."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return [a.pid for a in actors if "ServeReplica" in a.class_name]


def test_numbers_of_replicas():
    assert replicas.scale(replicas.Replicas(2, 2, 1, 0)) == {"num_replicas": 2}
    scaled = replicas.scale(replicas.Replicas(1, 8, 2, 4))["autoscaling_config"]
    assert scaled["target_ongoing_requests"] == 2
