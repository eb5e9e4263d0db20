"""What `launch.stage1`, `launch.stage2` and `launch.stage3` do: check, plan, assemble, train.

Exit statuses: 0 finished; 1 failed; 2 the config is refused; 3 the processes did not come together;
4 another process was lost; 5 this one hung; 130 interrupted; 143 stopped by SIGTERM or preempted,
after a checkpoint. After 3, 4, 5, 143, and 134 (JAX ends the processes that are left when one has
died) the same command goes on from the last checkpoint.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags
from rich.console import Console

from checkpoint_converters import adapter_files
from checkpoint_converters.safetensors_io import ConversionError
from launch import compilation, options
from omniforcing_jax import programs
from omniforcing_jax.distributed import multihost
from omniforcing_jax.distributed.multihost import Watchdog
from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import locate
from omniforcing_jax.scaling import planning
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.training import assembly
from omniforcing_jax.training.adapters import AdapterConfig, StoredAdapters
from omniforcing_jax.training.batches import DeviceBatches
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.config.problems import ConfigError
from omniforcing_jax.training.config.run_config import plain
from omniforcing_jax.training.loop import FIRST_STEPS_PATIENCE, RUN_FILES, Outcome, train
from omniforcing_jax.training.training_checkpoints import latest_step

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file and variant, such as configs/stage3.py:19b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run in it is resumed.")
_PLAN = flags.DEFINE_bool("plan", False, "Print parameters, memory and arithmetic, and exit.")
_DEVICES = flags.DEFINE_integer(
    "devices", None, "With --plan: plan for so many devices.", lower_bound=1, upper_bound=2**20
)
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Resume, or start from a causal student, although the config is not that of the run.",
)
_NO_VERIFY = flags.DEFINE_bool(
    "no_verify", False, "Load weights without comparing the files with their checksums."
)
_COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache", True, "Keep compiled programs in the user's cache folder."
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


def run(stage: str) -> int:
    """Joins, checks, trains; returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells dozens of lines about every save
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    compilation.use_cache(_COMPILATION_CACHE.value)
    job = multihost.find_job(
        _DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    multihost.join(job, timeout=_JOIN_SECONDS.value, heartbeat=_HEARTBEAT_SECONDS.value)
    devices = _DEVICES.value if _PLAN.value and _DEVICES.value else jax.device_count()
    allow = _ALLOW_CHANGE.value
    e = experiment.check(
        _CONFIG.value, devices, stage=stage, allow_config_change=allow, read_lora=_read_lora
    )
    if not _PLAN.value and not _WORKDIR.value:
        raise ConfigError(["--workdir: name a folder for the run"])
    if not _PLAN.value:
        inputs = [e.config.checkpoint, e.config.data, e.config.generator or None]
        outputs.check_run(_WORKDIR.value, ("stage", stage), RUN_FILES, inputs)
    plan = planning.plan_step(e)
    if _PLAN.value:
        print(planning.describe(e, plan))
        return 0
    check_memory("a step", sum(plan.bytes_per_device.values()))
    with Watchdog(_WATCHDOG_SECONDS.value, name=_name()) as watchdog, programs.at_work():
        try:
            return _status(_train(e, plan, locate(_WORKDIR.value), console, watchdog))
        except Exception as error:
            if jax.process_count() == 1:
                raise
            raise multihost.explained(error, _name()) from error


def _read_lora(file: str, content: Mapping[str, Any], config: AdapterConfig) -> StoredAdapters:
    try:
        return adapter_files.stored(pathlib.Path(file), content, config)
    except ConversionError as error:
        raise ValueError("\n    ".join(str(error).splitlines()[1:])) from error


def _train(
    e: Experiment,
    plan: planning.StepPlan,
    workdir: epath.Path,
    console: Console,
    watchdog: Watchdog,
) -> Outcome:
    from omniforcing_jax.training.previews import training_hooks

    c = e.config
    multihost.check_shared(workdir)  # or some would find a checkpoint, and others none
    manifest = json.dumps(dataclasses.asdict(e.data.manifest), sort_keys=True)
    multihost.check_same(f"what is in {c.data}", manifest)
    fresh = latest_step(workdir) is None
    if jax.process_index() == 0:
        console.print(planning.describe(e, plan), markup=False)
        for note in e.notes:
            console.print(note, markup=False)
        start = (c.generator or c.checkpoint) if fresh else workdir
        console.print(f"loading {start} and {c.checkpoint}")
    mesh, scores = assembly.make_meshes(e)
    with jax.set_mesh(mesh):
        verify = not _NO_VERIFY.value
        stage, state, frozen = assembly.assemble(e, mesh, scores, fresh=fresh, verify=verify)
        watchdog.alive("the weights were loaded", patience=FIRST_STEPS_PATIENCE)
        return train(
            stage,
            state,
            frozen,
            DeviceBatches(e.data, c.batch_size, c.seed, mesh),
            dataclasses.replace(c.loop, allow_config_change=_ALLOW_CHANGE.value, verify=verify),
            workdir,
            run_config=plain(e.run_config()),
            hooks=training_hooks(e, stage, frozen if scores is None else frozen.student, workdir),
            flops_per_step=plan.flops_per_step,
            tokens_per_step=plan.tokens_per_step,
            watchdog=watchdog,
        )


def _status(outcome: Outcome) -> int:
    if outcome.reason in ("preempted", "stopped by SIGTERM"):
        return multihost.STOPPED
    return programs.INTERRUPTED if outcome.reason == "stopped by SIGINT" else 0


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


@programs.entry
def main(stage: str, argv: list[str] | None = None) -> int:
    """Entry point of the stages' launch scripts; returns the exit status."""
    options.parse_flags(argv)
    return run(stage)
