"""Ranges of numbers: what options and settings may be, in one form of words."""

import dataclasses
import math
from typing import Any


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


_LOW = -(2**31)
_COUNTS, _MOST = Range(1, 2**20), Range(_LOW, 2**20)
_SCALE = Range(-1e4, 1e4)
# Of options by their names, which mean the same in all programs; `Range(-2**31, 2**31)` for others.
# What is too low for a program the program itself says, as it knows why.
OPTIONS = {
    "seed": Range(0, 2**32 - 1),
    **dict.fromkeys(("height", "width"), Range(_LOW, 2**14)),
    "fps": Range(-1e3, 1e3),
    "frame_rate": Range(0.01, 1000),
    **dict.fromkeys(("seconds", "every"), Range(-1e6, 1e6)),
    **dict.fromkeys(("frames", "clips", "repeats", "blocks", "steps", "batch", "points"), _MOST),
    **dict.fromkeys(("batch_size", "samples", "window", "anchors", "previews", "show"), _MOST),
    **dict.fromkeys(("clips_per_shard", "prompts_per_shard", "look_ahead", "blend"), _MOST),
    **dict.fromkeys(("prompts", "microbatches"), _COUNTS),
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
