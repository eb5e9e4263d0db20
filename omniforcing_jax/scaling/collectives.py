"""What a compiled program sends between devices, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing about communication. Here
the instructions of every computation are multiplied by how often it runs: a loop's count is what
XLA notes beside it, or the constant that its condition compares with; a loop that stops when the
data says so gets the count it is given.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1,
    "f8e5m2": 1,
}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_RESHAPED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\([^)]*\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Message(NamedTuple):
    """What one collective of a program sends.

    Attributes:
      kind: one of `KINDS`.
      shape: of its (largest) result, such as "bf16[4096,16384]".
      bytes: that a device takes in each time.
      group: devices that take part, by their number in the mesh.
      name: of the JAX operation behind it.
      count: how often it is sent when the program runs once.
    """

    kind: str
    shape: str
    bytes: float
    group: tuple[int, ...]
    name: str
    count: float


def read(text: str, *, open_loops: float = 1.0) -> list[Message]:
    """The messages of an optimized HLO module (`compiled.as_text()`).

    Branches of a conditional count as if all of them ran.

    Args:
      open_loops: iterations of loops whose condition compares with no constant.
    """
    found = collections.defaultdict(float)
    for name, lines, times in run_computations(text, open_loops=open_loops):
        scattered = name.startswith("all-reduce-scatter")  # what TPUs make of a reduce-scatter
        for line in lines:
            if (message := _message(line, scattered)) is not None:
                found[message] += times
    return [Message(*message, count) for message, count in found.items()]


def run_computations(text: str, *, open_loops: float = 1.0) -> list[tuple[str, list[str], float]]:
    """The computations of an optimized HLO module that run: name, lines, and how often it runs.

    Bodies of loops and fusions are computations of their own. The entry comes first. `open_loops`
    as for `read`.
    """
    computations: dict[str, list[str]] = {}
    current = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
        elif current is not None:
            current.append(line)
    times = collections.defaultdict(float, {name: 1.0 for name in list(computations)[-1:]})
    found = []
    # a computation stands in front of those that call it, the entry last
    for name, lines in reversed(computations.items()):
        if not times[name]:
            continue
        for line in lines:
            for callee, count in _calls(line, computations, open_loops):
                times[callee] += count * times[name]
        found.append((name, lines, times[name]))
    return found


def _calls(line: str, computations, open_loops: float) -> list[tuple[str, float]]:
    """Computations that an instruction runs, and how often."""
    if loop := _WHILE.search(line):
        known = _TRIPS.search(line)
        trips = int(known[1]) if known else _trips(computations.get(loop[1], []), open_loops)
        return [(loop[2], trips), (loop[1], trips)]
    branches = ",".join(_BRANCHES.findall(line)).split(",")
    return [(name.strip(" %"), 1.0) for name in [*_CALLS.findall(line), *branches] if name]


def _trips(condition: list[str], open_loops: float) -> float:
    """Iterations of a counting loop, from 0 up to the constant of its condition."""
    root = next((line for line in condition if "ROOT" in line), "")
    constants = dict(_CONSTANT.findall("\n".join(condition)))
    used = [int(n) for name, n in constants.items() if re.search(rf"%?{re.escape(name)}\b", root)]
    if not used and "fusion(" in root:
        used = [int(n) for n in constants.values()]
    return used[0] + ("direction=LE" in root) if len(used) == 1 else open_loops


def _message(line: str, scattered: bool) -> tuple[str, str, float, tuple[int, ...], str] | None:
    """A `Message` without its count; None for other instructions."""
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    result, kind, started = match.groups()
    if started and kind != "all-reduce":  # (operand, result, ...) or ((operands), (results), ...)
        plain = re.sub(r"\{[^}]*\}", "", result)  # without layouts, which have brackets too
        nested = plain.startswith("((")
        result = plain.partition(")")[2] if nested else _SHAPE.sub("", plain, count=1)
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(result) if dtype in BYTES]
    if started and kind == "collective-permute":
        shapes = shapes[:1]  # behind it stand counters
    if not shapes:
        return None
    sizes = [BYTES[d] * math.prod(int(n) for n in dims.split(",") if n) for d, dims in shapes]
    group = _group(line)
    n = max(len(group), 1)
    share = (n - 1) / n
    factor = {
        "all-reduce": share if scattered else 2 * share,
        "reduce-scatter": n - 1,  # the result is one n-th of what is reduced
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(kind, share)
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
    dtype, dims = shapes[int(np.argmax(sizes))]
    name = re.search(r'op_name="([^"]*)"', line)
    return kind, f"{dtype}[{dims}]", sum(sizes) * factor, group, name[1] if name else ""


def _group(line: str) -> tuple[int, ...]:
    """The group of the first device that sends anything, in one of the four ways it is written."""
    if match := _PAIRS.search(line):  # a permutation: what it connects with the first device
        target = {int(a): int(b) for a, b in re.findall(r"(\d+),(\d+)", match[1])}
        here, group = next(iter(target)), set()
        while here is not None and here not in group:
            group.add(here)
            here = target.get(here)
        return tuple(sorted(group))
    if match := _LISTED.search(line):
        return _numbers(match[1])
    if match := _RESHAPED.search(line):
        shape, dims = _numbers(match[1]), _numbers(match[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(_numbers(match[3])) if match[3] else ids
        return tuple(ids.reshape(shape)[0].tolist())
    if match := _OF_MESH.search(line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        used = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if name in used else 0 for name in axes)
        return tuple(np.ravel(ids[index]).tolist())
    return ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def total_bytes(messages: list[Message]) -> dict[str, float]:
    """Bytes that a device takes in, by kind."""
    totals = dict.fromkeys(KINDS, 0.0)
    for message in messages:
        totals[message.kind] += message.bytes * message.count
    return {kind: size for kind, size in totals.items() if size}
