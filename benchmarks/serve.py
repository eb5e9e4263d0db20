"""How the live server keeps its deadlines, with clients on the same machine.

    python -m benchmarks.serve --checkpoint outputs/demo/checkpoint \\
        --text-encoder outputs/demo/gemma --clients 2 --seconds 60 --switches 5

Starts launch.serve in a process of its own, lets the clients in, and changes their prompts. Prints
the time to the first block, the gaps between blocks as they arrive, blocks that came after their
deadline, what was compiled after the start (must be 0), host time beside the device's, and the
server's memory at the beginning and at the end.
"""

import argparse
import asyncio
import itertools
import json
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

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
    add("--json", type=pathlib.Path, help="write the figures there, too")
    return parser.parse_args(argv)


def figures(port: int) -> dict[str, float]:
    """The server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    pairs = (line.split() for line in lines if line.startswith("omniforcing_"))
    return {name.removeprefix("omniforcing_"): float(value) for name, value in pairs}


def memory(process: subprocess.Popen) -> float:
    """Resident memory in MB."""
    text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, int]:
    """A server that is ready, and its port.

    Raises:
      ValueError: it ends at the start; says why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.serve", "--checkpoint", args.checkpoint,
               "--text-encoder", args.text_encoder, "--port", str(port),
               "--sessions", str(args.clients), "--enlarge", "4"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = ""
    for line in process.stderr:
        if line.startswith("ready"):
            return process, port
    raise ValueError(f"launch.serve ended with status {process.wait()}: {line.strip()}")


async def watch(args: argparse.Namespace, port: int, folder: str) -> list:
    """All clients at the same time; the blocks of each with the times at which they came."""
    times = [args.seconds * (n + 1) / (args.switches + 1) for n in range(args.switches)]
    turns = {when: protocol.Prompt(PROMPTS[(n + 1) % 4]) for n, when in enumerate(times)}
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
    late = after["late_blocks_total"] - before["late_blocks_total"]
    busy = after["seconds_total"] - before["seconds_total"]
    return {
        "first block after, s (worst)": max(stream[0][0] for stream in streams),
        "gap between blocks, s (median)": statistics.median(gaps),
        "gap between blocks, s (worst)": max(gaps),
        "deadlines met, %": 100 * (1 - late / len(blocks)),
        "block, s (median)": statistics.median(block.took for block in blocks),
        "device thread busy, %": 100 * busy / seconds,
        "compiled after the start": after["compilations_total"] - before["compilations_total"],
    }


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    if args.seconds < 10:
        raise ValueError(f"--seconds must be at least 10, not {args.seconds:g}: the lead is 2 s")
    process, port = start(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            before, small, begin = figures(port), memory(process), time.monotonic()
            streams = asyncio.run(watch(args, port, folder))
            seconds = time.monotonic() - begin
        result = summarise(streams, before, figures(port), seconds)
        result |= {"memory, MB (start)": small, "memory, MB (end)": memory(process)}
    finally:
        process.terminate()
        process.wait()
    for name, value in result.items():
        print(f"{name:<34}{value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"figures": result}, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
