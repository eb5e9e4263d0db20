"""The configuration that a training run was started with: what it says, and how a run that is
resumed may differ from it."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import locate
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.sampling.conditions import MODES
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.training.adapters import PRODUCTS, AdapterConfig

NAME = "config.json"  # in the run's folder
# What is read of it, and as what; the settings of a run of an earlier version may lack others.
_NEEDED = {
    **dict.fromkeys(("stage", "checkpoint", "model_version"), str),
    **dict.fromkeys(("clip", "student", "student_config"), dict),
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run's config.json says; the one reader of it.

    Attributes:
      checkpoint: folder of the converted LTX-2 that it was trained with.
      model_version: of that.
      settings: of the run, as nested dicts: those that there were at the time.
      student: of the trained network.
      trained: what its weights were trained with.
    """

    checkpoint: str
    model_version: str
    settings: Mapping[str, Any]
    student: TransformerConfig
    trained: TrainedSettings

    @property
    def adapters(self) -> AdapterConfig:
        """What was trained of its networks."""
        lists = self.settings.get("adapters", {})
        return AdapterConfig(**{name: tuple(values) for name, values in lists.items()})

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "RunConfig":
        """Reads and checks it.

        Raises:
          ValueError: there is none, it is not that of a run, or what it says cannot be.
        """
        file = locate(folder) / NAME
        if not file.is_file():
            raise ValueError(f"{folder} is not a run: it has no {NAME}")
        settings = checkpoints.read_json(file).get("config")
        if not isinstance(settings, dict):
            raise ValueError(f"{file} is not that of a run: it has no settings as its `config`")
        if missing := [name for name in _NEEDED if name not in settings]:
            raise ValueError(f"{file}: the configuration lacks {', '.join(missing)}")
        wrong = [name for name, kind in _NEEDED.items() if not isinstance(settings[name], kind)]
        if wrong:
            raise ValueError(f"{file}: no run has such a {', '.join(wrong)}")
        try:
            student = TransformerConfig.from_dict(settings["student_config"])
            trained = TrainedSettings.of_run(settings)
            run = cls(settings["checkpoint"], settings["model_version"], settings, student, trained)
            _ = run.adapters  # is checked
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not that of a run: {error}") from error
        return run


def is_run(folder: str | os.PathLike) -> bool:
    """Whether the folder is a training run's, rather than a converted checkpoint's.

    Raises:
      ValueError: its config.json is damaged.
    """
    file = locate(folder) / NAME
    if not file.is_file():
        return False
    settings = checkpoints.read_json(file).get("config")
    return isinstance(settings, dict) and "student_config" in settings


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

# Settings that some runs are older than, and what these did.
BEFORE = {
    "student.schedule": "ltx2",
    "adapters.products": list(PRODUCTS),
    "adapters.ranks": [],
    "adapters.alphas": [],
    "compute.base_precision": "none",
    **{f"conditions.{mode}": float(mode == "t2av") for mode in MODES},
    "guidance": 1.5,  # of pre-training
}


def check_config(path: str | os.PathLike, saved: Mapping, now: Mapping) -> None:
    """Compares the configuration of the checkpoint `path` with the present one.

    A setting that the run is older than was as `BEFORE` says.

    Raises:
      ValueError: they differ in a setting that is not in `MAY_DIFFER`; lists all of these.
    """
    old, new = (flatten_dict(config, sep=".") for config in (dict(saved), plain(now)))
    before = BEFORE | {"text_length": new.get("text_length")}  # the data's, which nobody kept
    old = {name: before[name] for name in before.keys() & new.keys()} | old
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
