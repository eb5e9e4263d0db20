"""Checks of the settings that a checkpoint's metadata gives for a network."""

from collections.abc import Collection, Mapping
from typing import Any


def find_problems(
    settings: Mapping[str, Any],
    *,
    required: Collection[str] = (),
    fixed: Mapping[str, Any] | None = None,
    known: Collection[str] | None = None,
) -> list[str]:
    """What is wrong with the settings, one sentence for each.

    Args:
      settings: {name: value}.
      required: names that must be there.
      fixed: {name: the only value that is supported}, for names that are there.
      known: all names that may be there; None allows any.
    """
    problems = [f"{name} is missing" for name in required if name not in settings]
    problems += [
        f"{name} is {settings[name]!r}; only {value!r} is supported"
        for name, value in (fixed or {}).items()
        if name in settings and settings[name] != value
    ]
    if known is not None and (unknown := sorted(set(settings) - set(known))):
        problems.append(f"unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    return problems


def raise_problems(where: str, problems: Collection[str]) -> None:
    """Raises ValueError with all `problems`, if there are any."""
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
