"""What `launch.stage1`, `launch.stage2` and `launch.stage3` do: check, plan, assemble, train."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from configs import base
from omniforcing_jax import assembly, experiment, partitioning, planning
from omniforcing_jax.experiment import ConfigError, Experiment
from omniforcing_jax.train import TrainingDiverged, train
from omniforcing_jax.training_checkpoints import latest_step

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and variant, such as configs/stage3.py:19b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run in it is resumed.")
_PLAN = flags.DEFINE_bool("plan", False, "Print parameters, memory and arithmetic, and exit.")
_DEVICES = flags.DEFINE_integer("devices", None, "With --plan: plan for so many devices.")
_RESUME_CHANGED = flags.DEFINE_bool(
    "allow_config_change", False, "Resume although the config is not that of the run."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes (jax.distributed.initialize)."
)


class DeviceBatches:
    """Batches of this process's rows, as arrays over the mesh; the position can be stored."""

    def __init__(self, iterator: Any, mesh: jax.sharding.Mesh, manifest: Any):
        self._iterator, self._manifest = iterator, manifest
        self._sharding = partitioning.batch_sharding(mesh)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        rows = assembly.text_arrays(next(self._iterator), self._manifest)
        return {
            name: jax.make_array_from_process_local_data(self._sharding, x)
            for name, x in rows.items()
        }

    def get_state(self) -> Any:
        """Where the iterator stands."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        """Goes there."""
        self._iterator.set_state(state)


def open_batches(e: Experiment, mesh: jax.sharding.Mesh) -> DeviceBatches:
    """Shuffled batches without end, this process's share of them."""
    from omniforcing_jax.data.text_dataset import grain_batches

    iterator = grain_batches(
        e.data,
        e.config.batch_size,
        seed=e.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return DeviceBatches(iterator, mesh, e.data.manifest)


def run(stage: str) -> int:
    """Trains; returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells dozens of lines about every save
    console = Console(stderr=True, highlight=False)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    devices = _DEVICES.value if _PLAN.value and _DEVICES.value else jax.device_count()
    try:
        e = experiment.check(_CONFIG.value, base.training(stage), devices)
        plan = planning.make_plan(e)
        if _PLAN.value:
            print(planning.describe(e, plan))
            return 0
        if not _WORKDIR.value:
            raise ConfigError(["--workdir: name a folder for the run"])
    except ConfigError as error:
        console.print(f"error: the config cannot be run:\n{error}", markup=False)
        return 2
    workdir = pathlib.Path(_WORKDIR.value)
    if jax.process_index() == 0:
        console.print(planning.describe(e, plan), markup=False)
    mesh = partitioning.make_mesh(**e.mesh_shape)
    with jax.set_mesh(mesh), contextlib.suppress(KeyboardInterrupt):
        fresh = latest_step(workdir) is None
        what = e.config.generator or e.config.checkpoint
        console.print(f"loading {what if fresh else workdir} and {e.config.checkpoint}")
        try:
            return _train(e, mesh, plan, workdir, fresh)
        except (TrainingDiverged, ValueError, OSError) as error:
            console.print(f"error: {error}", markup=False)
            return 1
    return 130


def _train(e: Experiment, mesh, plan: planning.Plan, workdir: pathlib.Path, fresh: bool) -> int:
    from omniforcing_jax.previews import training_hooks

    stage, state, frozen = assembly.assemble(e, mesh, fresh=fresh)
    loop = e.loop
    if _RESUME_CHANGED.value:
        import dataclasses

        loop = dataclasses.replace(loop, allow_config_change=True)
    train(
        stage,
        state,
        frozen,
        open_batches(e, mesh),
        loop,
        workdir,
        run_config=json.loads(json.dumps(e.run_config())),
        hooks=training_hooks(e, stage, frozen, workdir),
        flops_per_step=plan.flops_per_step,
        tokens_per_step=plan.tokens_per_step,
    )
    return 0


def main(stage: str) -> None:
    """Entry point of the stages' launch scripts."""
    flags.mark_flag_as_required("config")
    app.run(lambda argv: sys.exit(run(stage)))
