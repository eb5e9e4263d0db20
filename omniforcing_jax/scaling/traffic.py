"""What a compiled program reads and writes in memory, read from its text.

An optimized program is a list of kernels: products, attention, fusions that compute something, and
fusions (or plain instructions) that only move data: copies, slices, concatenations, transposes,
pads, conversions. The last kind is what a better program has less of. Each kernel is counted as
often as the loops around it run (`collectives.run_computations`).

A fusion that computes one part of its result and moves the other, such as a concatenation of keys
that are rotated on the way with keys that are not, counts as movement with the second part only. An
update in place writes what is put in, not the whole buffer. On TPUs what lies in the chip's vector
memory (`S(1)`) costs no traffic; what is copied into it ahead of its use, weights mostly, is
counted with the products that read it there.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from omniforcing_jax.scaling.collectives import BYTES, run_computations

# Where a fusion does several of these, it is named by the first in this order.
MOVES = ("concatenate", "update", "transpose", "pad", "slice", "convert", "copy")
GROUPS = ("products", "attention", "arithmetic", "moves")

_KINDS = {
    "copy": "copy",
    "copy-start": "copy",
    "reshape": "copy",
    "transpose": "transpose",
    "slice": "slice",
    "slice-start": "slice",
    "dynamic-slice": "slice",
    "gather": "slice",
    "dynamic-update-slice": "update",
    "concatenate": "concatenate",
    "pad": "pad",
    "convert": "convert",
}
# These cost nothing: names for what is there already, or work of the kernels that they call.
_FREE = {
    "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "conditional",
    "call", "after-all", "copy-done", "async-start", "async-update", "async-done", "iota",
    "optimization-barrier", "partition-id", "replica-id", "add-dependency",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_APPLIED = re.compile(r"to_apply=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|[Cc]onv)')
_ATTENTION = re.compile(r'custom_call_target="[^"]*(?:fmha|flash)|op_name="[^"]*/attention/')
# Parts of an op_name that do not say where in the model it is.
_GENERIC = re.compile(
    r"jit\(.*|while|body|closed_call|cond|checkpoint|blocks.*|layers?_\d+|.*\._.*"
)


class Kernel(NamedTuple):
    """One instruction that touches memory.

    Attributes:
      group: one of `GROUPS`.
      kind: of movement, one of `MOVES`; otherwise the instruction's opcode.
      read, written: bytes each time.
      place: scopes of the model that it belongs to.
      count: how often it runs when the program runs once.
    """

    group: str
    kind: str
    read: float
    written: float
    place: str
    count: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    type: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @functools.cached_property
    def elements(self) -> int:
        return sum(math.prod(_dims(dims)) for _, dims, _ in _ARRAY.findall(self.type))

    @functools.cached_property
    def bytes(self) -> float:
        """Of the result, as far as it lies in the device's main memory."""
        return sum(size for size, near in self._arrays if not near)

    @functools.cached_property
    def ahead(self) -> float:
        """Bytes that are copied into vector memory while other instructions run."""
        starts = self.opcode in ("copy-start", "slice-start")
        return sum(size for size, near in self._arrays if near and starts)

    @functools.cached_property
    def _arrays(self) -> list[tuple[float, bool]]:
        """Bytes of each array of the result, and whether it lies in vector memory."""
        arrays = _ARRAY.findall(self.type)
        if self.opcode.endswith("-start"):  # (result, operand, counter), or ((operand), result, …)
            operand_first = self.opcode == "slice-start"
            arrays = arrays[1:2] if operand_first else arrays[:1]
        return [
            (BYTES[kind] * math.prod(_dims(dims)), "S(1)" in layout)
            for kind, dims, layout in arrays
            if kind in BYTES
        ]


def _dims(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _parse(lines: list[str]) -> dict[str, _Instruction]:
    found = {}
    for line in lines:
        if (head := _INSTRUCTION.match(line)) is None:
            continue
        start = head.end()
        end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
        if (opcode := _OPCODE.match(line, end)) is None:
            continue
        close = _closing(line, opcode.end() - 1)
        operands = tuple(_NAME.findall(line[opcode.end() : close]))
        found[head[2]] = _Instruction(
            opcode[1], line[start:end], operands, line[close:], bool(head[1])
        )
    return found


class _Fusion:
    """What a fused computation does with its parameters."""

    def __init__(self, body: Mapping[str, _Instruction]):
        self.body = body
        root = next((i for i in body.values() if i.root), list(body.values())[-1])
        self.roots = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        self.has_product = any(i.opcode in ("dot", "convolution") for i in body.values())

    def moved(self) -> tuple[str, float, float]:
        """Kind, bytes that are moved (read as well), and all bytes written."""
        kinds, moved, written = set(), 0.0, 0.0
        for root in self.roots:
            share, found, size = self._share(root)
            # an update in place may be followed by names for its result only
            moved, written = moved + share * size, written + size
            kinds |= found if share else set()
        return next((k for k in MOVES if k in kinds), "copy"), moved, written

    def _share(self, i: _Instruction) -> tuple[float, set[str], float]:
        """Of what an instruction writes: which part comes from memory unchanged, by what kinds of
        movement, and its bytes."""
        if i.opcode in ("parameter", "get-tuple-element"):
            return 1.0, set(), i.bytes
        kind = _KINDS.get(i.opcode)
        if i.opcode == "bitcast" or (kind and i.opcode not in ("concatenate", "pad")):
            which = 1 if kind == "update" else 0
            share, kinds, size = self._share(self.body[i.operands[which]])
            if i.opcode == "bitcast" or kind == "update":
                return share, kinds | ({kind} if kind else set()), size
            return share, kinds | {kind}, i.bytes
        if i.opcode == "pad":
            share, kinds, _ = self._share(self.body[i.operands[0]])
            return share, kinds | {kind}, i.bytes
        parts = [(self.body[o], *self._share(self.body[o])) for o in i.operands]
        if i.opcode == "concatenate":
            share = sum(s * part.elements for part, s, _, _ in parts) / max(i.elements, 1)
            return share, set().union(*(k for _, _, k, _ in parts)) | {kind}, i.bytes
        if i.opcode == "maximum" and all("pad" in k and s == 1 for _, s, k, _ in parts):
            return 1.0, {"concatenate"}, i.bytes  # how TPUs concatenate
        return 0.0, set(), i.bytes

    @functools.cached_property
    def read(self) -> float:
        """Bytes of the parameters that are read: of those that are only sliced, the slices."""
        users = collections.defaultdict(list)
        for name, instruction in self.body.items():
            for operand in instruction.operands:
                users[operand].append((name, instruction))

        def bytes_read(name: str, i: _Instruction) -> float:
            total = 0.0
            for user_name, user in users[name]:
                if user.opcode in ("slice", "dynamic-slice", "gather"):
                    total += user.bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue  # in place
                elif user.opcode == "bitcast":
                    total += bytes_read(user_name, user)
                else:
                    return i.bytes
            return min(total, i.bytes)

        return sum(bytes_read(n, i) for n, i in self.body.items() if i.opcode == "parameter")


def read(text: str, *, open_loops: float = 1.0) -> list[Kernel]:
    """The kernels of an optimized HLO module (`compiled.as_text()`) that touch memory.

    Args:
      open_loops: iterations of loops whose condition compares with no constant.
    """
    computations = run_computations(text, open_loops=open_loops)
    bodies = {name: _parse(lines) for name, lines, _ in computations}
    inside = set()  # computations that are part of a kernel
    for body in bodies.values():
        for i in body.values():
            if i.opcode == "fusion":
                inside.update(_CALLED.findall(i.text))
            elif i.opcode != "call":
                inside.update(_APPLIED.findall(i.text))
    fusions: dict[str, _Fusion] = {}
    kernels = []
    for name, _, count in computations:
        if name in inside:
            continue
        for i in bodies[name].values():
            fused = None
            if i.opcode == "fusion":
                (callee,) = _CALLED.findall(i.text)
                fused = fusions.get(callee) or fusions.setdefault(callee, _Fusion(bodies[callee]))
            kernels += _kernels(i, fused, bodies[name], count)
    return kernels


def _kernels(i: _Instruction, fused: _Fusion | None, body, count: float) -> list[Kernel]:
    """What one instruction does; a fusion that moves and computes is two kernels."""
    if i.opcode in _FREE or i.opcode.endswith("-done") or i.elements == 1:  # or a loop's counter
        return []
    place = _place(i.text)
    if i.ahead:
        return [Kernel("products", i.opcode, i.ahead, 0.0, place, count)]
    read = fused.read if fused else sum(body[o].bytes for o in i.operands if o in body)
    attention = _ATTENTION.search(i.text)
    product = i.opcode in ("dot", "convolution") or _PRODUCT.search(i.text)
    if attention or product or (fused and fused.has_product):
        group = "attention" if attention else "products"
        written = fused.moved()[2] if fused else i.bytes
        return [Kernel(group, i.opcode, read, written, place, count)]
    if fused is None:
        kind = _KINDS.get(i.opcode)
        if kind is None:
            return [Kernel("arithmetic", i.opcode, read, i.bytes, place, count)]
        written = body[i.operands[1]].bytes if kind == "update" else i.bytes
        return [Kernel("moves", kind, min(read, written), written, place, count)]
    kind, moved, written = fused.moved()
    found = []
    if moved:
        found.append(Kernel("moves", kind, min(moved, read), moved, place, count))
    if written > moved:
        rest = max(read - moved, 0.0)
        found.append(Kernel("arithmetic", "fusion", rest, written - moved, place, count))
    return found


def _place(text: str) -> str:
    """The scopes of an op_name, without those of loops and calls."""
    name = _OP_NAME.search(text)
    parts = name[1].split("/") if name else []
    return "/".join(p for p in parts[:-1] if not _GENERIC.fullmatch(p)) or "elsewhere"


def totals(kernels: list[Kernel]) -> dict[str, tuple[float, float]]:
    """(bytes read, bytes written) of a run: of each group, and of each kind of movement."""
    found = {name: [0.0, 0.0] for name in (*GROUPS, *MOVES)}
    for kernel in kernels:
        for name in {kernel.group, kernel.kind} & found.keys():
            found[name][0] += kernel.read * kernel.count
            found[name][1] += kernel.written * kernel.count
    return {name: (read, written) for name, (read, written) in found.items()}


def largest(kernels: list[Kernel], number: int = 12) -> list[tuple[str, str, float]]:
    """The most that is moved: (kind, place, bytes written in a run), largest first."""
    places: dict[tuple[str, str], float] = collections.defaultdict(float)
    for kernel in kernels:
        if kernel.group == "moves":
            places[kernel.kind, kernel.place] += kernel.written * kernel.count
    ranked = sorted(places.items(), key=lambda item: -item[1])[:number]
    return [(kind, place, size) for (kind, place), size in ranked]


def describe(report: Mapping[str, Any]) -> str:
    """A report of `aot.traffic_report` as lines of text."""
    lines = ["  in a run, GB:       read  written"]
    for name, (read, written) in report["bytes"].items():
        indent = "" if name in GROUPS else "  "
        lines.append(f"    {indent + name:14s} {read / 1e9:8.1f} {written / 1e9:8.1f}")
    lines.append("  most is moved by:")
    lines += [
        f"    {size / 1e9:8.2f}  {kind:12s} {place}" for kind, place, size in report["largest"]
    ]
    if seconds := report["seconds"]:
        total = sum(seconds.values())
        shares = ", ".join(f"{k} {v:.4f} s ({v / total:.0%})" for k, v in seconds.items())
        lines.append(f"  roofline: {shares}; {total:.3f} s in all")
    return "\n".join(lines)
