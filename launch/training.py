"""What `launch.stage1`, `launch.stage2` and `launch.stage3` do: check, plan, assemble, train.

Exit statuses: 0 finished; 1 failed; 2 the config is refused; 3 the processes did not come together;
4 another process was lost; 5 this one hung; 130 interrupted; 143 stopped by SIGTERM or preempted,
after a checkpoint. After 3, 4, 5, 143, and 134 (JAX ends the processes that are left when one has
died) the same command goes on from the last checkpoint.
"""

import dataclasses
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags
from rich.console import Console

from configs import base
from omniforcing_jax.distributed import multihost, partitioning
from omniforcing_jax.distributed.multihost import Watchdog
from omniforcing_jax.io.paths import locate
from omniforcing_jax.scaling import planning
from omniforcing_jax.training import assembly
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import ConfigError, Experiment
from omniforcing_jax.training.loop import FIRST_STEPS_PATIENCE, Outcome, TrainingDiverged, train
from omniforcing_jax.training.training_checkpoints import latest_step

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and variant, such as configs/stage3.py:19b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run in it is resumed.")
_PLAN = flags.DEFINE_bool("plan", False, "Print parameters, memory and arithmetic, and exit.")
_DEVICES = flags.DEFINE_integer("devices", None, "With --plan: plan for so many devices.")
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Resume, or start from a causal student, although the config is not that of the run.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Join the other processes; by default where srun, GKE or the next three flags say so.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "A process silent for so long is dead, and all end.", lower_bound=10
)
_WATCHDOG_SECONDS = flags.DEFINE_float(
    "watchdog_seconds",
    1800,
    f"End if no step, save or sample is done for so long, {FIRST_STEPS_PATIENCE} times as long "
    "while loading and compiling; 0: never.",
    lower_bound=0,
)


class DeviceBatches:
    """Batches as arrays over the mesh, of which this process reads the rows its devices hold.

    Where an axis of the mesh repeats rows on several processes (`tensor`, `sequence`), each of them
    reads them.
    """

    def __init__(self, source: Any, batch_size: int, seed: int, mesh: jax.sharding.Mesh):
        from omniforcing_jax.data.text_dataset import grain_batches

        self._manifest, self._size = source.manifest, batch_size
        self._sharding = partitioning.batch_sharding(mesh)
        held = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        everyone = np.arange(batch_size)
        self._rows = np.unique(np.concatenate([everyone[index] for index in held]))
        self._iterator = grain_batches(source, batch_size, seed=seed, rows=self._rows.tolist())

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        rows = assembly.text_arrays(next(self._iterator), self._manifest)
        return {name: self._place(x) for name, x in rows.items()}

    def _place(self, x: np.ndarray) -> jax.Array:
        """[rows of this process, ...] -> [B, ...] over the mesh."""

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._size)
            first = np.searchsorted(self._rows, start)
            return x[first : first + stop - start]

        shape = (self._size, *x.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)

    def get_state(self) -> Any:
        """Where the iterator stands, in batches: the same for all processes."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        """Goes there."""
        self._iterator.set_state(state)


def run(stage: str) -> int:
    """Joins, checks, trains; returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells dozens of lines about every save
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        job = multihost.find_job(
            _DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
    except ValueError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    try:
        multihost.join(job, timeout=_JOIN_SECONDS.value, heartbeat=_HEARTBEAT_SECONDS.value)
    except multihost.NotJoined as error:
        console.print(f"error: {job}: {error}", markup=False)
        return multihost.NOT_JOINED
    try:
        e, plan = _checked(stage)
    except ConfigError as error:
        console.print(f"error: the config cannot be run:\n{error}", markup=False)
        return 2
    if _PLAN.value:
        print(planning.describe(e, plan))
        return 0
    with Watchdog(_WATCHDOG_SECONDS.value, name=_name()) as watchdog:
        return _guarded(e, plan, console, watchdog)


def _checked(stage: str) -> tuple[Experiment, planning.Plan]:
    devices = _DEVICES.value if _PLAN.value and _DEVICES.value else jax.device_count()
    e = experiment.check(
        _CONFIG.value,
        base.training(stage),
        devices,
        allow_config_change=_ALLOW_CHANGE.value,
    )
    plan = planning.make_plan(e)
    if not _PLAN.value and not _WORKDIR.value:
        raise ConfigError(["--workdir: name a folder for the run"])
    return e, plan


def _guarded(e: Experiment, plan: planning.Plan, console: Console, watchdog: Watchdog) -> int:
    """Trains; whatever goes wrong is said, and does not keep the other processes waiting."""
    try:
        outcome = _train(e, plan, locate(_WORKDIR.value), console, watchdog)
        by_signal = outcome.reason in ("preempted", "stopped by SIGTERM")
        interrupted = outcome.reason == "stopped by SIGINT"
        return multihost.STOPPED if by_signal else 130 if interrupted else 0
    except KeyboardInterrupt:
        status, text = 130, "interrupted"
    except Exception as error:
        expected = isinstance(error, (TrainingDiverged, ValueError, OSError))
        if jax.process_count() == 1:
            if not expected:
                raise
            status, text = 1, str(error)
        else:
            status, text = multihost.explain(error)
            if not expected and status != multihost.LOST:
                traceback.print_exc()
            text = f"{_name()}: {text}"
    console.print(f"error: {text}", markup=False)
    if jax.process_count() > 1:
        multihost.leave(status)
    return status


def _train(
    e: Experiment, plan: planning.Plan, workdir: epath.Path, console: Console, watchdog: Watchdog
) -> Outcome:
    from omniforcing_jax.training.previews import training_hooks

    multihost.check_shared(workdir)  # or some would find a checkpoint, and others none
    manifest = json.dumps(dataclasses.asdict(e.data.manifest), sort_keys=True)
    multihost.check_same(f"what is in {e.config.data}", manifest)
    fresh = latest_step(workdir) is None
    if jax.process_index() == 0:
        what = e.config.generator or e.config.checkpoint
        console.print(planning.describe(e, plan), markup=False)
        console.print(f"loading {what if fresh else workdir} and {e.config.checkpoint}")
    mesh, scores = assembly.make_meshes(e)
    with jax.set_mesh(mesh):
        stage, state, frozen = assembly.assemble(e, mesh, scores, fresh=fresh)
        watchdog.alive("the weights were loaded", patience=FIRST_STEPS_PATIENCE)
        return train(
            stage,
            state,
            frozen,
            DeviceBatches(e.data, e.config.batch_size, e.config.seed, mesh),
            dataclasses.replace(e.loop, allow_config_change=_ALLOW_CHANGE.value),
            workdir,
            run_config=json.loads(json.dumps(e.run_config())),
            hooks=training_hooks(e, stage, frozen if scores is None else frozen.student, workdir),
            flops_per_step=plan.flops_per_step,
            tokens_per_step=plan.tokens_per_step,
            watchdog=watchdog,
        )


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def main(stage: str) -> None:
    """Entry point of the stages' launch scripts."""
    flags.mark_flag_as_required("config")
    app.run(lambda argv: sys.exit(run(stage)))
