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
