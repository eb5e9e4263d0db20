"""How the live server keeps its deadlines, with clients on the same machine.

    python -m benchmarks.serve --checkpoint outputs/demo/checkpoint \\
        --text-encoder outputs/demo/gemma --clients 2 --seconds 60 --switches 5

Starts launch.serve in a process of its own, lets the clients in, and changes their prompts. Prints
the time to the first block, the gaps between blocks as they arrive, blocks that came after their
deadline, what was compiled after the start (must be 0), host time beside the device's, and the
server's memory: after a tenth of the time, and at the end.

With --chaos N so many others connect meanwhile, and flood, send garbage, stall, or vanish; in the
end nothing of them may be left.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from omniforcing_jax import programs
from omniforcing_jax.serving import client, protocol

PROMPTS = (
    "a small red ball bounces",
    "a large blue ball and a small yellow ball bounce in a dark room, ringing high and low",
    "a medium green ball hops",
    "two balls",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.serve", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="of a student")
    add("--text-encoder", required=True, help="its converted Gemma")
    add("--clients", type=int, default=1, help="side by side (default 1)")
    add("--seconds", type=float, default=60.0, help="of each stream (default 60)")
    add("--switches", type=int, default=5, help="changes of prompt in each (default 5)")
    add("--chaos", type=int, default=0, metavar="N", help="clients that do harm (default none)")
    add("--sessions", type=int, help="places (default: as many as clients, with --chaos one more)")
    add("--json", type=pathlib.Path, help="write the figures there, too")
    return parser.parse_args(argv)


def figures(port: int) -> dict[str, float]:
    """The server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    pairs = (line.split() for line in lines if re.match("omniforcing_|process_resident", line))
    return {name.removeprefix("omniforcing_"): float(value) for name, value in pairs}


def start(args: argparse.Namespace, log: pathlib.Path) -> tuple[subprocess.Popen, int]:
    """A server that is ready, and its port; it writes into `log`.

    Raises:
      ValueError: it ends at the start; says why.
    """
    sessions = args.sessions or args.clients + (args.chaos > 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.serve", "--checkpoint", args.checkpoint,
               "--text-encoder", args.text_encoder, "--port", str(port),
               "--sessions", str(sessions), "--enlarge", "4",
               "--snapshots", str(log.parent / "sessions")]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    while process.poll() is None:
        if re.search("^ready", log.read_text(), re.MULTILINE):
            return process, port
        time.sleep(0.2)
    lines = log.read_text().strip().splitlines()
    raise ValueError(f"launch.serve ended with status {process.returncode}: {lines[-1:]}")


async def do_harm(address: str, rng: random.Random, counts: dict[str, int]) -> None:
    """Does one of what clients should not do; the server may cut the connection any time."""
    kind = rng.choice(("leave", "flood", "garbage", "stall", "vanish"))
    counts[kind] = counts.get(kind, 0) + 1
    with contextlib.suppress(WebSocketException, OSError):
        async with connect(f"{address}/session", max_size=None, max_queue=2) as socket:
            if kind == "leave":
                return
            await socket.send(protocol.Start(rng.choice(PROMPTS)).to_json())
            if kind == "flood":
                for _ in range(500):
                    await socket.send(protocol.Progress(1e9).to_json())
            elif kind == "garbage":
                await socket.send(rng.choice((rng.randbytes(5000), "[" * 5000, "x", "{}")))
                async for _ in socket:
                    pass
            elif kind == "stall":
                await asyncio.sleep(rng.uniform(2, 20))
            else:
                for _ in range(rng.randint(1, 12)):
                    await socket.recv()
            socket.transport.abort()


async def harm(args: argparse.Namespace, port: int) -> dict[str, int]:
    """What the harmful clients have done, how often, until the time is up."""
    counts: dict[str, int] = {}

    async def one(number: int) -> None:
        rng = random.Random(number)
        while True:
            await asyncio.sleep(rng.uniform(1, 5))
            await do_harm(f"ws://127.0.0.1:{port}", rng, counts)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(args.seconds):
            await asyncio.gather(*map(one, range(args.chaos)))
    return counts


async def watch(args: argparse.Namespace, port: int, folder: str) -> list:
    """All clients at the same time; the blocks of each with the times at which they came."""
    times = [args.seconds * (n + 1) / (args.switches + 1) for n in range(args.switches)]
    turns = [(when, protocol.NewPrompt(PROMPTS[(n + 1) % 4])) for n, when in enumerate(times)]
    return await asyncio.gather(
        *(
            client.record(
                f"ws://127.0.0.1:{port}", PROMPTS[0], f"{folder}/{number}.mp4", args.seconds,
                turns=turns, seed=number,
            )
            for number in range(args.clients)
        )
    )  # fmt: skip


def summarise(streams: list, before: dict, after: dict, seconds: float) -> dict[str, float]:
    """The figures that are printed."""
    gaps, blocks = [], [block for stream in streams for _, block in stream]
    for stream in streams:
        steady = [when for when, block in stream if block.end > 5]  # the lead is built up
        gaps += [b - a for a, b in itertools.pairwise(steady)]
    late = sum(block.late > 0 for block in blocks)  # of these clients, not of those that do harm
    busy, host = (after[name] - before[name] for name in ("seconds_total", "host_seconds_total"))
    return {
        "first block after, s (worst)": max(stream[0][0] for stream in streams),
        "gap between blocks, s (median)": statistics.median(gaps),
        "gap between blocks, s (worst)": max(gaps),
        "deadlines met, %": 100 * (1 - late / len(blocks)),
        "block, s (median)": statistics.median(block.took for block in blocks),
        "device thread busy, %": 100 * busy / seconds,
        "host beside the device, % of a block": 100 * host / busy,
        "steps in a block (fewest)": min(block.steps for block in blocks),
        "compiled after the start": after["compilations_total"] - before["compilations_total"],
    }


async def measure(args: argparse.Namespace, port: int, folder: str) -> dict[str, float]:
    """The figures of a server that is ready."""

    async def early() -> dict[str, float]:
        await asyncio.sleep(args.seconds / 10)
        return await asyncio.to_thread(figures, port)

    before, begin = figures(port), time.monotonic()
    watching = asyncio.create_task(watch(args, port, folder))
    await asyncio.sleep(1)  # who comes first has a place
    (streams, counts, soon) = await asyncio.gather(watching, harm(args, port), early())
    seconds, after = time.monotonic() - begin, await asyncio.to_thread(figures, port)
    result = summarise(streams, before, after, seconds)
    for name, there in (("after a tenth", soon), ("end", after)):
        result[f"memory, MB ({name})"] = there["process_resident_memory_bytes"] / 1e6
    if args.chaos:
        result |= {f"clients that {kind}": count for kind, count in sorted(counts.items())}
        await asyncio.sleep(40)  # whoever is gone without a word is found out by pings
        left = await asyncio.to_thread(figures, port)
        result |= {f"{name} left at the end": left[name] for name in ("sessions", "waiting")}
    return result


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    if args.seconds < 10:
        raise ValueError(f"--seconds must be at least 10, not {args.seconds:g}: the lead is 2 s")
    if args.clients < 1 or args.chaos < 0:
        raise ValueError("--clients must be 1 or more, and --chaos 0 or more")
    with tempfile.TemporaryDirectory() as folder:
        process, port = start(args, pathlib.Path(folder) / "log")
        try:
            result = asyncio.run(measure(args, port, folder))
        finally:
            process.terminate()
            process.wait()
    for name, value in result.items():
        print(f"{name:<38}{value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"figures": result}, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
