"""Settings as a tree, such as an `ml_collections.ConfigDict`, and back as dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from omniforcing_jax.ranges import Range
from omniforcing_jax.training.config.problems import ConfigError, Problems
from omniforcing_jax.training.config.settings import STAGES, StageConfig

# seeds are the largest
_NUMBERS = Range(-(2.0**31), 2.0**32)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings of a dataclass as nested dicts, tuples as they are."""
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, value in vars(config).items()
    }


def parse(config: Mapping[str, Any], problems: Problems) -> StageConfig:
    """The dataclass of a tree of settings, such as an `ml_collections.ConfigDict`.

    What is wrong is noted; a setting that is missing or of another type, and a group that refuses
    itself, has its default in the result, so that the others can be looked at.

    Raises:
      ConfigError: there is no such stage.
    """
    stage = config.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise ConfigError([f"stage: must be one of {', '.join(STAGES)}, not {stage!r}"])
    return _parse(STAGES[stage](), config, "", problems)


def _parse(default: Any, values: Mapping[str, Any], prefix: str, problems: Problems) -> Any:
    fields = {field.name: field for field in dataclasses.fields(default)}
    for name in sorted({*values} - {*fields}):
        problems.append(f"{prefix}{name}: there is no such setting; there are {', '.join(fields)}")
    found = {}
    for name, field in fields.items():
        if name not in values:
            problems.append(f"{prefix}{name}: is missing")
            continue
        value, usual = values[name], getattr(default, name)
        if dataclasses.is_dataclass(usual) and hasattr(value, "items"):
            found[name] = _parse(usual, value, f"{prefix}{name}.", problems)
            continue
        value = tuple(value) if isinstance(value, list) else value
        if _fits(value, field.type):
            found[name] = value
        elif dataclasses.is_dataclass(usual):
            problems.append(f"{prefix}{name}: must be a group of settings, not {value!r}")
        else:
            problems.append(f"{prefix}{name}: must be {_named(field.type)}, not {value!r}")
    made = problems.attempt(
        prefix.rstrip(".") or "settings", lambda: dataclasses.replace(default, **found)
    )
    return default if made is None else made


def _kinds(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, and its numbers are finite and of a size to compute with."""
    for each in _kinds(kind):
        if typing.get_origin(each) is tuple:
            items, *more = typing.get_args(each)
            if isinstance(value, tuple) and all(_fits(item, items) for item in value):
                return more in ([], [...]) or len(value) == 1 + len(more)
        elif each in (int, float):
            number = isinstance(value, int if each is int else int | float)
            if number and not isinstance(value, bool) and value in _NUMBERS:
                return True
        elif isinstance(value, each):
            return True
    return False


def _named(kind: Any) -> str:
    names = {int: "a whole number below 2**32", float: "a finite number", types.NoneType: "None"}
    return " or ".join(names.get(each) or getattr(each, "__name__", str(each))
                       for each in _kinds(kind))  # fmt: skip
