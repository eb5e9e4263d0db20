"""With which configuration a run may be resumed: that which it had, but for some settings."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

# Settings, by any part of their name, in which a resumed run may differ: they change how long and
# where it runs and what it tells; what it computes changes by rounding at most.
MAY_DIFFER = frozenset(
    (
        "num_steps",
        "log_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "sample_every",
        "sample_clips",
        "tensorboard",
        "compile_steps",
        "allow_config_change",
        "workdir",
        "mesh",
        "remat",
        "attention",
        "gather_weights",
        "reduce_dtype",
        "separate_scores",
    )
)


def check_config(path: str | os.PathLike, saved: Mapping, now: Mapping) -> None:
    """Compares the configuration of the checkpoint `path` with the present one.

    Raises:
      ValueError: they differ in a setting that is not in `MAY_DIFFER`; lists all of these.
    """
    old, new = (flatten_dict(config, sep=".") for config in (dict(saved), plain(now)))
    fields = [
        f"{name}: {old.get(name, 'absent')!r} then, {new.get(name, 'absent')!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...) and not MAY_DIFFER & set(name.split("."))
    ]
    if fields:
        raise ValueError(
            f"{path} was made with another configuration: {listed(fields)}; use another workdir, "
            "or allow_config_change if this is meant"
        )


def plain(config: Mapping[str, Any]) -> dict:
    """As it comes back from JSON."""
    return json.loads(json.dumps(config))


def listed(problems: Sequence[str], limit: int = 40) -> str:
    """The first problems in one line, and how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
