"""What a stream did, block after block, and the row of a table that says so."""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np

from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.scaling.memory import bytes_in_use
from omniforcing_jax.streaming.session import StreamingSession, Timings

PROGRAM = "benchmarks.stream"
RESULT, ROW = "result.json", "row.md"
PARTS = ("generate", "decode_video", "decode_audio", "host")


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was measured of consecutive blocks; it keeps no picture.

    Attributes:
      frames: of each chunk.
      timings: parts of each block's time.
      seconds: wall seconds of each block.
      memory: bytes in use after each block.
    """

    frames: list[int]
    timings: list[Timings]
    seconds: np.ndarray
    memory: np.ndarray

    def figures(self, frame_rate: float) -> dict:
        """Speed, regularity, and what changed from the first blocks to the last."""
        fps = sum(self.frames) / float(self.seconds.sum())
        return {
            "chunk_seconds": {str(p): float(np.percentile(self.seconds, p)) for p in (50, 95, 99)},
            "fps": fps,
            "real_time_factor": fps / frame_rate,
            "deadline_attainment": deadline_attainment(self.frames, self.seconds, frame_rate),
            "part_seconds": {
                part: float(np.median([getattr(t, part) for t in self.timings])) for part in PARTS
            },
            "memory_in_use_bytes": float(np.median(self.memory)),
            "late_over_early": {
                "seconds": late_over_early(self.seconds),
                "memory": late_over_early(self.memory),
            },
        }


def measure_stream(session: StreamingSession, num_blocks: int) -> Trace:
    """Runs blocks."""
    frames, timings, seconds, memory = [], [], [], []
    for _ in range(num_blocks):
        start = time.perf_counter()
        chunk = session.step()
        seconds.append(time.perf_counter() - start)
        memory.append(bytes_in_use(jax.devices()[0]))
        frames.append(chunk.frames.shape[1])
        timings.append(chunk.timings)
    return Trace(frames, timings, np.asarray(seconds), np.asarray(memory))


def block_seconds(session: StreamingSession, num_blocks: int, rounds: int = 4) -> dict[str, float]:
    """Wall seconds of a block whose parts are not told apart, as `launch.stream` makes them.

    Args:
      session: without `timings`, its cache full.
      num_blocks: of each way, in so many rounds in turn.

    Returns:
      Medians of the rounds. one_by_one: each is copied to the host before the next one is begun;
      ahead: each is begun before the one before it is copied.
    """
    count, seconds = -(-num_blocks // rounds), {"one_by_one": [], "ahead": []}
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            session.step()
        middle, pending = time.perf_counter(), session.begin()
        for _ in range(count - 1):
            copied, pending = pending, session.begin()
            copied.chunk()
        pending.chunk()
        seconds["one_by_one"].append((middle - start) / count)
        seconds["ahead"].append((time.perf_counter() - middle) / count)
    return {way: float(np.median(values)) for way, values in seconds.items()}


def deadline_attainment(counts: list[int], seconds: np.ndarray, frame_rate: float) -> float:
    """Share of chunks ready before a player that starts with the first chunk runs dry.

    Args:
      counts: frames of each chunk.
      seconds: wall seconds each took.
    """
    ready = np.cumsum(seconds) - seconds[0]
    due = np.cumsum([0, *counts[:-1]]) / frame_rate
    return float(np.mean(ready <= due + 1e-9))


def late_over_early(values: np.ndarray) -> dict:
    """Whether a stream's blocks change as it goes on: the last tenth of them over the first.

    Args:
      values: of consecutive blocks.

    Returns:
      tenths: medians of all tenths over that of the first; a trend shows here.
      ratio: that of the last tenth.
      least, most: those of the tenths in between, which say how much a stretch of the stream
        differs from another by chance. None where nothing is in between.
    """
    tenths = np.array_split(np.asarray(values, float), min(10, len(values)))
    medians = np.asarray([np.median(tenth) for tenth in tenths])
    ratios = (medians / medians[0]).tolist()
    between = ratios[1:-1]
    return {
        "tenths": ratios,
        "ratio": ratios[-1],
        "least": min(between, default=None),
        "most": max(between, default=None),
    }


def markdown(result: dict) -> str:
    """One table row with its header; what was not measured, or not yet, is a dash."""
    p, t = result["part_seconds"], result["ttfc_seconds"]
    chunk, drift = result["chunk_seconds"], result["late_over_early"]
    parts = ("denoise", "refresh", *PARTS[1:])
    ttfc = ("text", "setup", "generate", "decode_video", "decode_audio")
    memory = (result["memory_in_use_bytes"], result["peak_memory_bytes"])
    seams = "–"
    if result["seams"] is not None:
        seams = "{seam:.2g} / {median:.2g} = {ratio:.3g}".format(**result["seams"])
    cells = {
        "date": result["date"],
        "device": result["device"],
        "parameters": f"{result['parameters'] / 1e9:.3g} B",
        "FPS": f"{result['fps']:.1f}",
        "× real time": f"{result['real_time_factor']:.2f}",
        "TTFC without Gemma (text + setup + generate + video + sound) s": f"{t['total']:.2f} ("
        + " + ".join(f"{t[part]:.2f}" for part in ttfc)
        + ")",
        "chunk p50 / p95 / p99 s": " / ".join(f"{chunk[q]:.3f}" for q in ("50", "95", "99")),
        "denoise / refresh / video / sound / host s": " / ".join(
            _number(p.get(part), ".3f") for part in parts
        ),
        "block one by one / begun ahead s": " / ".join(
            _number((result["block_seconds"] or {}).get(way), ".3f")
            for way in ("one_by_one", "ahead")
        ),
        "deadlines met": f"{result['deadline_attainment']:.0%}",
        "memory in use / peak GiB": " / ".join(f"{x / 2**30:.1f}" for x in memory),
        "TFLOP per s of video": f"{result['flops_per_second_of_video'] / 1e12:.3g}",
        "MFU": _number(result["mfu"], ".0%"),
        "error at seams / median, grey levels": seams,
        "late / early time (tenths between)": _drift(drift["seconds"], 2),
        "late / early memory (tenths between)": _drift(drift["memory"], 3),
        "command": f"`{result['command']}`",
    }
    rows = [cells.keys(), ["---"] * len(cells), cells.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _drift(drift: dict[str, float | None], digits: int) -> str:
    ratio, least, most = (_number(drift[x], f".{digits}f") for x in ("ratio", "least", "most"))
    return f"{ratio} ({least} to {most})"


def check_folder(folder: pathlib.Path | None) -> None:
    """Raises ValueError for a folder whose files `publish` may not replace."""
    if folder is not None:
        outputs.check(folder / RESULT, folder / ROW, program=PROGRAM, overwrite=True)


def publish(result: dict, folder: pathlib.Path | None) -> None:
    """Prints a result and its row, and writes `result.json` and `row.md` into the folder."""
    text, row = json.dumps({outputs.MARK: PROGRAM} | result, indent=2) + "\n", markdown(result)
    print(text + row, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / RESULT) as temporary:
            temporary.write_text(text)
        outputs.save_markdown(row, folder / ROW, PROGRAM)
