"""What options and settings may be: ranges of numbers and types of fields, in one form of words."""

import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """From `low` (`above`: more than that) to `high`; infinities and NaN are in no range."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer that no float can hold
            return False
        return (
            finite
            and (self.low < value if self.above else self.low <= value)
            and (value <= self.high)
        )

    def __str__(self) -> str:
        text = f"more than {self.low}" if self.above else f"at least {self.low}"
        return text if self.high >= 1e9 else f"{text} and at most {self.high}"


POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1, 2**31 - 1)
SHARE = Range(0, 1)
Count = Annotated[int, Range(0, 2**53)]  # of what there may be none, or very many
MOST_LAYERS = 4096
Layers = Annotated[int, Range(1, MOST_LAYERS)]
# Of a network's description, where its annotation names no other.
_SIZE, _FACTOR = Range(1, 2**20), Range(0, 1e9, above=True)


_LOW = -(2**31)
_COUNTS, _MOST = Range(1, 2**20), Range(_LOW, 2**20)
_SCALE = Range(-1e4, 1e4)
# Of options by their names, which mean the same in all programs; `Range(-2**31, 2**31)` for others.
# What is too low for a program the program itself says, as it knows why.
OPTIONS = {
    "seed": Range(0, 2**32 - 1),
    **dict.fromkeys(("height", "width"), Range(_LOW, 2**14)),
    **dict.fromkeys(("fps", "frame_rate"), Range(0.01, 1000)),
    **dict.fromkeys(("seconds", "every"), Range(-1e6, 1e6)),
    **dict.fromkeys(("frames", "clips", "repeats", "blocks", "steps", "batch", "points"), _MOST),
    **dict.fromkeys(("batch_size", "samples", "window", "anchors", "previews", "show"), _MOST),
    **dict.fromkeys(("clips_per_shard", "prompts_per_shard", "look_ahead", "blend"), _MOST),
    **dict.fromkeys(("prompts", "microbatches"), _COUNTS),
    "clients": Range(1, 1024),
    "switches": Range(0, 2**20),
    "layers": Range(1, 4096),
    "num_heads": Range(_LOW, 4096),
    **dict.fromkeys(("text_length", "length"), Range(_LOW, 2**16)),
    **dict.fromkeys(("text_tokens", "tokens"), Range(1, 2**16)),
    **dict.fromkeys(("look_back", "enlarge"), Range(_LOW, 4096)),
    **dict.fromkeys(("sinks", "seam_blocks"), Range(0, 2**20)),
    **dict.fromkeys(("cfg", "cfg_video", "cfg_audio", "stg", "modality", "rescale"), _SCALE),
    **dict.fromkeys(("timesteps", "sigmas"), _SCALE),
    "peak_tflops": Range(0, 1e9, above=True),
}


def check_fields(config: Any, prefix: str = "", **ranges: Range) -> None:
    """Holds fields of a dataclass against their ranges; one that is None is not held.

    Raises:
      ValueError: lists all that are outside.
    """
    found = ((name, getattr(config, name), within) for name, within in ranges.items())
    problems = [
        f"{prefix}{name} must be {within}, not {value}"
        for name, value, within in found
        if value is not None and value not in within
    ]
    if problems:
        raise ValueError("; ".join(problems))


def hold_fields(config: Any) -> None:
    """Holds each field of a new frozen dataclass against its annotation.

    A whole number is at least 1 and a number more than 0, unless it is `Annotated` with another
    `Range`. As JSON knows neither tuples nor floats without a fraction, lists become tuples and
    whole numbers floats where the annotation says so.

    Raises:
      ValueError: lists all fields that are of another type, or outside.
    """
    problems = []
    for name, kind in _annotations(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _held(value, kind))
        except _Misfit:
            problems.append(f"{name} must be {_words(kind)}, not {_shown(value)}")
    if problems:
        raise ValueError("; ".join(problems))


class _Misfit(Exception):
    """A value does not fit its annotation."""


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _held(value: Any, kind: Any) -> Any:
    """The value in the form that the annotation names, or `_Misfit`."""
    kind, within = _number(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in parts:
            return None
        return _held(value, parts[0])
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _Misfit
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(kinds) != len(value):
            raise _Misfit
        return tuple(map(_held, value, kinds))
    if origin is dict and isinstance(value, dict):
        return {_held(k, parts[0]): _held(x, parts[1]) for k, x in value.items()}
    if kind is Any:
        return value
    if origin is typing.Literal:
        fits = isinstance(value, str) and value in parts
    elif within is not None:
        fits = type(value) in {int, kind} and value in within
    else:
        fits = isinstance(value, origin or kind)
    if not fits:
        raise _Misfit
    return kind(value) if within is not None else value


def _number(kind: Any) -> tuple[Any, Range | None]:
    """(the annotation without its range, the range of a number)."""
    if typing.get_origin(kind) is typing.Annotated:
        return typing.get_args(kind)
    return kind, {int: _SIZE, float: _FACTOR}.get(kind)


def _words(kind: Any) -> str:
    """What an annotation asks for."""
    kind, within = _number(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return f"{_words(parts[0])}, or null"
    if origin is tuple:
        count = "all" if parts[-1] is ... else len(parts)
        return f"a list, {count} of it {_words(parts[0])}"
    if origin is dict:
        return f"an object, all of it {_words(parts[1])}"
    if origin is typing.Literal:
        return f"one of {', '.join(parts)}"
    if within is not None:
        return f"a {'whole ' * (kind is int)}number, {within}"
    return {bool: "true or false", str: "a text", Any: "anything"}.get(kind, f"a {kind.__name__}")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
