"""What a compiled program sends between devices, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing about communication. Here
the instructions of every computation are multiplied by how often it runs: a loop's count is the
constant that its condition compares with; a loop that stops when the data says so gets the count it
is given.
"""

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1,
    "f8e5m2": 1,
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\([^)]*\))?\s*\{([^}]*)\}"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of message that a program sends.

    Attributes:
      kind: one of `KINDS`.
      shape: of its (largest) result, such as "bf16[4096,16384]".
      bytes: that a device takes in each time.
      group: devices that take part, by their number in the mesh.
      count: how often it is sent when the program runs once.
      name: of the JAX operation behind it.
    """

    kind: str
    shape: str
    bytes: float
    group: tuple[int, ...]
    count: float
    name: str


def read(text: str, *, open_loops: float = 1.0) -> list[Collective]:
    """The collectives of an optimized HLO module (`compiled.as_text()`).

    Args:
      open_loops: iterations of loops whose condition compares with no constant.
    """
    computations, entry = _computations(text)
    times = _times_run(computations, entry, open_loops)
    found = collections.defaultdict(float)
    for name, lines in computations.items():
        if not times[name]:
            continue
        scattered = name.startswith("all-reduce-scatter")  # what TPUs make of a reduce-scatter
        for line in lines:
            if (message := _message(line, scattered)) is not None:
                found[message] += times[name]
    return [Collective(*m[:4], count, m[4]) for m, count in found.items()]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _times_run(computations, entry: str, open_loops: float) -> dict[str, float]:
    """How often each computation runs; branches of a conditional count as if all of them did."""
    times = collections.defaultdict(float)
    edges = {name: _calls(lines, computations, open_loops) for name, lines in computations.items()}
    order, seen = [], set()

    def visit(name):  # callees before callers
        stack = [(name, iter(edges[name]))]
        seen.add(name)
        while stack:
            current, callees = stack[-1]
            for callee, _ in callees:
                if callee not in seen and callee in edges:
                    seen.add(callee)
                    stack.append((callee, iter(edges[callee])))
                    break
            else:
                order.append(current)
                stack.pop()

    visit(entry)
    times[entry] = 1.0
    for name in reversed(order):
        for callee, count in edges[name]:
            times[callee] += count * times[name]
    return times


def _calls(lines: list[str], computations, open_loops: float) -> list[tuple[str, float]]:
    calls = []
    for line in lines:
        if loop := _WHILE.search(line):
            known = _TRIPS.search(line)
            trips = int(known[1]) if known else _trips(computations.get(loop[1], []), open_loops)
            calls += [(loop[2], trips), (loop[1], trips)]
            continue
        calls += [(name, 1.0) for name in _CALLS.findall(line)]
        for branches in _BRANCHES.findall(line):
            calls += [(name.strip().lstrip("%"), 1.0) for name in branches.split(",")]
    return calls


def _trips(condition: list[str], open_loops: float) -> float:
    """Iterations of a counting loop, from 0 up to the constant of its condition."""
    root = next((line for line in condition if "ROOT" in line), "")
    constants = dict(_CONSTANT.findall("\n".join(condition)))
    used = [int(n) for name, n in constants.items() if re.search(rf"%?{re.escape(name)}\b", root)]
    if not used and "fusion(" in root:
        used = [int(n) for n in constants.values()]
    if len(used) != 1:
        return open_loops
    return used[0] + ("direction=LE" in root)


def _message(line: str, scattered: bool) -> tuple[str, str, float, tuple[int, ...], str] | None:
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    kind = match[2]
    result = match[1]
    if match[3] and kind != "all-reduce":  # (operand, result, ...) or ((operands), (results), ...)
        plain = re.sub(r"\{[^}]*\}", "", result)  # without layouts, which have brackets too
        result = plain.partition(")")[2] if plain.startswith("((") else _after_first(plain)
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(result) if dtype in _BYTES]
    sizes = [_BYTES[d] * math.prod(int(n) for n in dims.split(",") if n) for d, dims in shapes]
    if not sizes:
        return None
    if match[3] and kind == "collective-permute":
        sizes, shapes = sizes[:1], shapes[:1]  # behind it stand counters
    size = sum(sizes)
    group = _group(line, kind)
    n = max(len(group), 1)
    share = (n - 1) / n
    factor = {
        "all-gather": share,
        "all-reduce": 2 * share,
        "reduce-scatter": n - 1,  # the result is one n-th of what is reduced
        "all-to-all": share,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }[kind]
    if scattered and kind == "all-reduce":
        kind, factor = "reduce-scatter", share
    dtype, dims = shapes[int(np.argmax(sizes))]
    name = re.search(r'op_name="([^"]*)"', line)
    return kind, f"{dtype}[{dims}]", size * factor, group, name[1] if name else ""


def _after_first(shapes: str) -> str:
    """What stands behind the first shape of a tuple."""
    first = _SHAPE.search(shapes)
    return shapes[first.end() :] if first else shapes


def _group(line: str, kind: str) -> tuple[int, ...]:
    """The group of the first device that sends anything."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
        ring = re.search(r"source_target_pairs=(\{\{.*?\}\})", line)
        return _ring(ring[1]) if ring else tuple(int(p) for p in pairs.groups()) if pairs else ()
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(int(i) for i in match[1].split(","))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = (tuple(int(i) for i in match[j].split(",")) for j in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose([int(i) for i in match[3].split(",")])
        return tuple(int(i) for i in ids.reshape(shape)[0])
    if match := _MESH_GROUPS.search(line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        used = re.findall(r"'(\w+)'", match[2])
        index = tuple(slice(None) if name in used else 0 for name in axes)
        return tuple(int(i) for i in np.asarray(ids[index]).reshape(-1))
    return ()


def _ring(pairs: str) -> tuple[int, ...]:
    """Devices that a permutation connects with the first one."""
    target = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)}
    start = next(iter(target), None)
    if start is None:
        return ()
    ring, here = [start], target[start]
    while here != start and here in target and len(ring) <= len(target):
        ring.append(here)
        here = target[here]
    return tuple(sorted({*ring, here}))


def total_bytes(messages: list[Collective]) -> dict[str, float]:
    """Bytes that a device takes in, by kind."""
    totals = dict.fromkeys(KINDS, 0.0)
    for message in messages:
        totals[message.kind] += message.bytes * message.count
    return {kind: size for kind, size in totals.items() if size}
