"""Prompts of a stream and the seconds at which they begin, as a command line gives them."""

import argparse
import math

from omniforcing_jax import BlockLayout


def turns(args: argparse.Namespace) -> list[tuple[float, str]]:
    """(second from which on, text or file) as the command line gives them.

    The first one is for the start and is read as it stands, whatever it ends with. One behind it
    needs a time, so that there an @SECOND cannot be anything else.

    Raises:
      ValueError: one has no time, or the time is not a number.
    """
    first, *later = args.features or args.prompt or [""]
    found = [(0.0, first)]
    for spec in later:
        text, _, start = spec.rpartition("@")
        if not text or _number(start) is None:
            raise ValueError(f"{spec!r} has no time to start at: give it as --at SECOND TEXT")
        found.append((_number(start), text))
    for start, text in args.at or []:
        if _number(start) is None:
            raise ValueError(f"--at {start} {text!r}: {start!r} is not a number of seconds")
        found.append((_number(start), text))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def prompts_by_block(
    turns: list[tuple[float, str]], layout: BlockLayout, num_blocks: int | None, notes: list[str]
) -> dict[int, str]:
    """{block it starts at: text or file}; notes it where that is later than asked for."""
    result: dict[int, str] = {}
    for start, text in turns:
        if not 0 <= start < math.inf:
            raise ValueError(f"{text!r} must start at a second from 0 on, not {start:g}")
        block = layout.blocks_for_seconds(start) if start > 0 else 0
        if block in result:
            raise ValueError(f"{text!r} starts in the same second as {result[block]!r}")
        if num_blocks is not None and block >= num_blocks:
            raise ValueError(f"{text!r} starts after the end of the clip")
        begin = layout.pixel_frames(block) / layout.frame_rate if block else 0.0
        if (begin - start) * layout.frame_rate > 1.5:  # a block starts one frame after the second
            notes.append(f"{text!r} starts with its block, at {begin:.2f} s, not {start:g} s")
        result[block] = text
    return result
