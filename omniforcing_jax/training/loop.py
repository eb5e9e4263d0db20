"""The training loop, which all stages share.

    outcome = train(stage, state, frozen, batches, LoopConfig(num_steps=2000), "outputs/stage1")

The host never waits for the step that it has just dispatched: while the devices compute step n + 1,
it fetches the scalars of step n, looks for NaN, and writes records. A step may move nothing between
host and devices that it does not move by name (`jax.device_put`): such a transfer is an error. A
run that was stopped, or killed, goes on from its latest complete checkpoint when the same call is
made again.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath

from omniforcing_jax.distributed import multihost
from omniforcing_jax.distributed.multihost import Watchdog
from omniforcing_jax.io.checkpoints import write_json
from omniforcing_jax.io.paths import locate
from omniforcing_jax.training.metrics import (
    Averages,
    MetricWriter,
    Stopwatch,
    console_line,
    may_be_missing,
    memory_use,
    num_compilations,
)
from omniforcing_jax.training.parameter_groups import GROUPS
from omniforcing_jax.training.state import TrainState
from omniforcing_jax.training.training_checkpoints import (
    DataIterator,
    Restored,
    TrainingCheckpoints,
)

# What a run leaves in its folder besides config.json.
RUN_FILES = ("checkpoints", "damaged_checkpoints", "metrics.jsonl", "tensorboard", "samples")
Scalars = dict[str, float]
# How many times as long as later ones the first steps may take before the watchdog barks: they
# compile.
FIRST_STEPS_PATIENCE = 4


class Stage(Protocol):
    """What the loop asks of a stage."""

    def train_step(
        self, state: TrainState, frozen: Any, batch: dict[str, jax.Array], step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatches one step, without waiting for it, and without implicit transfers.

        Args:
          state: donated; its counter is `step`.
          frozen: what is not trained.
          step: steps done before.

        Returns:
          (state whose counter is `step` + 1, scalars float32 []). A scalar that is not finite stops
          the run, but for those that a step may lack (`metrics.may_be_missing`), which are NaN.
        """


class Hook(NamedTuple):
    """Something that is done now and then, such as sampling a clip.

    Attributes:
      every: steps between calls.
      call: (steps done, state) -> scalars for a record of its own, or None. Must not donate.
    """

    every: int
    call: Callable[[int, TrainState], Scalars | None]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train, and what to leave behind on the way.

    Attributes:
      num_steps: training steps in all.
      log_every: steps between records, which hold the means over these steps.
      checkpoint_every: steps between checkpoints; the last step has one in any case.
      keep_last: how many of the latest checkpoints are kept.
      keep_every: checkpoints at multiples of it are kept for good; a multiple of checkpoint_every.
      compile_steps: steps after a start in which programs may be compiled without a warning.
      tensorboard: write TensorBoard summaries besides metrics.jsonl.
      allow_config_change: resume although the run's configuration differs from the checkpoint's.
      verify: resume from no checkpoint whose files do not have the checksums they had.
    """

    num_steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 3
    keep_every: int | None = None
    compile_steps: int = 10
    tensorboard: bool = True
    allow_config_change: bool = False
    verify: bool = True

    def __post_init__(self):
        problems = []
        for name in ("num_steps", "log_every", "checkpoint_every", "keep_last", "compile_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.keep_every is not None and (
            self.keep_every < 1 or self.keep_every % max(self.checkpoint_every, 1)
        ):
            problems.append(
                f"keep_every must be a multiple of checkpoint_every = {self.checkpoint_every}, not "
                f"{self.keep_every}"
            )
        if problems:
            raise ValueError("training loop: " + "; ".join(problems))


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: after the last step.
      step: steps done.
      reason: "finished", "stopped by SIGTERM" (or SIGINT), "preempted", "out of data".
    """

    state: TrainState
    step: int
    reason: str


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite. The state before that step is in the last checkpoint.

    Attributes:
      step: the step, counted from 1.
      name: the scalar.
    """

    def __init__(self, message: str, step: int, name: str):
        super().__init__(message)
        self.step, self.name = step, name


def train(
    stage: Stage,
    state: TrainState,
    frozen: Any,
    batches: DataIterator,
    config: LoopConfig,
    workdir: str | os.PathLike,
    *,
    run_config: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
    flops_per_step: float | None = None,
    tokens_per_step: int | None = None,
    watchdog: Watchdog | None = None,
) -> Outcome:
    """Trains, from the latest checkpoint in `workdir` if there is one.

    Args:
      stage: makes the steps.
      state: the state at the start. Where a checkpoint exists it is only a template: its arrays are
        deleted before the checkpoint's are read, and jax.ShapeDtypeStructs with shardings will do.
      frozen: passed through to the stage.
      batches: device-ready batches.
      workdir: the run's folder: checkpoints/, metrics.jsonl, tensorboard/, config.json. All
        processes must see the same one; all but the checkpoints is written by process 0.
      run_config: everything that determines the run, as JSON. A resumed run must have the same (but
        for `run_config.MAY_DIFFER`).
      hooks: called after the steps that are multiples of their `every`, when a checkpoint that is
        due has been saved.
      flops_per_step, tokens_per_step: of all devices together, on average, for the records.
      watchdog: told of every step that is done; None: nobody watches.

    Raises:
      CheckpointNotSaved: a checkpoint could not be written; those before it are as they were.
      TrainingDiverged: a scalar was not finite.
      ValueError: the checkpoint does not fit the state or the configuration, or the processes do
        not have the same configuration or folder.
    """
    run_config, watchdog = dict(run_config or {}), watchdog or Watchdog(0)
    watch = Stopwatch(flops_per_step, tokens_per_step)
    with (
        _opened(locate(workdir), state, batches, config, run_config, watch, watchdog) as run,
        _interrupts() as interrupt,
    ):
        reason = "finished"
        while run.done < config.num_steps:
            if interrupt.reason is not None:
                reason = interrupt.reason
                break
            if run.checkpoints.reached_preemption(run.done):
                reason = "preempted"
                break
            try:
                with watch.measure("data"):
                    batch = next(batches)
            except StopIteration:
                reason = "out of data"
                break
            run.step(stage, frozen, batch)
            # before the hooks: one that fails loses nothing, and is not met again after a restart
            if run.done % config.checkpoint_every == 0 or run.done == config.num_steps:
                run.save()
            run.call(hooks)
        run.save()
        if reason == "finished":
            run.record()  # the checkpoint has these averages, should the run be extended
        run.finish(reason)
        return Outcome(run.state, run.done, reason)


@contextlib.contextmanager
def _opened(
    workdir: epath.Path,
    state: TrainState,
    batches: DataIterator,
    config: LoopConfig,
    run_config: dict,
    watch: Stopwatch,
    watchdog: Watchdog,
) -> Iterator["_Run"]:
    """The run as its latest checkpoint left it, or at its start."""
    multihost.check_same("the configuration", json.dumps(run_config, sort_keys=True))
    multihost.check_shared(workdir)
    with TrainingCheckpoints(
        workdir, keep_last=config.keep_last, keep_every=config.keep_every
    ) as checkpoints:
        restored = checkpoints.restore(
            state,
            batches,
            run_config,
            allow_config_change=config.allow_config_change,
            verify=config.verify,
        ) or Restored(0, state, {})
        watchdog.alive(f"step {restored.step} was restored", patience=FIRST_STEPS_PATIENCE)
        if jax.process_index() == 0:
            write_json(workdir / "config.json", {"format": 1, "config": run_config})
        writer = MetricWriter(workdir, start_step=restored.step, tensorboard=config.tensorboard)
        with contextlib.closing(writer):
            if restored.step:
                writer.say(f"resumed from step {restored.step:,} in {checkpoints.folder}")
            yield _Run(config, run_config, batches, checkpoints, writer, watch, watchdog, restored)


class _Run:
    """A run under way: its state, the step whose scalars are not fetched yet, and its records."""

    def __init__(
        self,
        config: LoopConfig,
        run_config: dict,
        batches: DataIterator,
        checkpoints: TrainingCheckpoints,
        writer: MetricWriter,
        watch: Stopwatch,
        watchdog: Watchdog,
        restored: Restored,
    ):
        self.config, self.run_config, self.batches = config, run_config, batches
        self.checkpoints, self.writer = checkpoints, writer
        self.watch, self.watchdog = watch, watchdog
        self.state = restored.state
        self.start = self.done = self.logged = self.saved = restored.step
        self.averages = Averages()
        self.averages.set_state(restored.averages)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.last: Scalars = {}

    def step(self, stage: Stage, frozen: Any, batch: Any) -> None:
        """Dispatches a step, and looks at the one before."""
        compiled = num_compilations()
        with self.watch.measure("step"), jax.transfer_guard("disallow"):
            self.state, scalars = stage.train_step(self.state, frozen, batch, self.done)
        compiled = num_compilations() - compiled
        if compiled and self.done - self.start >= self.config.compile_steps:
            warnings.warn(
                f"step {self.done + 1} compiled {compiled} programs anew: a shape, dtype or "
                "sharding of its arguments changed, which costs minutes with a large model",
                stacklevel=2,
            )
        self._collect()  # the step before, which the devices have done or are about to
        self.done += 1
        self.pending = (self.done, scalars)

    def call(self, hooks: Sequence[Hook]) -> None:
        """Calls the hooks that are due."""
        hooks = [hook for hook in hooks if self.done % hook.every == 0]
        if hooks:
            self._collect()
        with self.watch.measure("other"):
            for hook in hooks:
                scalars = hook.call(self.done, self.state)
                if scalars:
                    self.writer.write(self.done, scalars)
                self._alive(f"a hook after step {self.done}")

    def _collect(self) -> None:
        """Fetches the scalars of the last step that was dispatched, and writes what is due."""
        if self.pending is None:
            return
        (step, arrays), self.pending = self.pending, None
        with self.watch.measure("wait"):
            scalars = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self._alive(f"step {step}")
        self.checkpoints.check()
        bad = [n for n, v in scalars.items() if not (math.isfinite(v) or may_be_missing(n))]
        if bad:
            raise self._diverged(step, bad, scalars)
        self.last = scalars
        self.averages.add(scalars)
        if step % self.config.log_every == 0:
            self._record(step)

    def _alive(self, what: str) -> None:
        compiling = self.done - self.start < self.config.compile_steps
        self.watchdog.alive(what, patience=FIRST_STEPS_PATIENCE if compiling else 1)

    def record(self) -> None:
        """Writes what was not recorded yet."""
        if self.logged < self.done:
            self._record(self.done)

    def _record(self, step: int) -> None:
        record = self.averages.take()
        record |= self.watch.read(step - self.logged) | memory_use()
        self.logged = step
        self.writer.write(step, record)
        self.writer.say(console_line(step, self.config.num_steps, record))

    def save(self) -> None:
        """Starts to save the state, unless it is saved."""
        self._collect()  # so that no state is saved whose step was not checked
        if self.saved == self.done:
            return
        counter = int(self.state.step)
        if counter != self.done:
            raise ValueError(f"the stage's state says step {counter} after {self.done} steps")
        with self.watch.measure("other"):
            self.writer.flush()  # a resumed run keeps the records up to its checkpoint
            self.checkpoints.save(
                self.done, self.state, self.batches, self.run_config, self.averages.get_state()
            )
        self.saved = self.done
        self._alive(f"the save of step {self.done}")

    def finish(self, reason: str) -> None:
        """Returns when the last save is complete."""
        self.checkpoints.wait()
        self.watchdog.alive("the last save")
        where = f"state in {self.checkpoints.folder}"
        self.writer.say(f"{reason} after {self.done:,} steps; {where}")

    def _diverged(self, step: int, bad: list[str], scalars: Scalars) -> TrainingDiverged:
        name = min(bad, key=lambda n: ("loss" not in n, "grad_norm" not in n))
        self.checkpoints.wait()
        last = self.checkpoints.steps()
        where = f"step {last[-1]} in {self.checkpoints.folder}" if last else "none yet"
        others = f" (also not finite: {', '.join(n for n in bad if n != name)})" if bad[1:] else ""
        before = ""
        if self.last:
            value = f"{name} was {self.last[name]:.4g}. " if name in self.last else ""
            before = f"One step earlier: {value}{_largest_gradient(self.last)}"
        message = (
            f"step {step}: {name} is {scalars[name]}{others}. {_largest_gradient(scalars)}{before}"
            f"The update was left out; last good checkpoint: {where}. A lower learning_rate, a "
            "longer warm-up or a smaller clip_norm may help; a broken sample is in the batch of "
            "this step."
        )
        return TrainingDiverged(message, step, name)


def _largest_gradient(scalars: Scalars) -> str:
    """Says which parameter group has the largest gradient, of each network that has any."""
    networks: dict[str, dict[str, float]] = {}
    for name, value in scalars.items():
        network, _, group = name.rpartition("grad_norm/")
        if group in GROUPS and name.endswith(f"grad_norm/{group}"):
            networks.setdefault(network.rstrip("/"), {})[group] = value
    text = ""
    for network, norms in networks.items():
        of = f" of the {network}" if network else ""
        broken = [group for group, value in norms.items() if not math.isfinite(value)]
        if broken:
            all_of = len(broken) == len(norms)
            groups = "all parameter groups" if all_of else ", ".join(broken)
            text += f"Gradients{of} that are not finite: {groups}. "
        else:
            group = max(norms, key=norms.get)
            text += f"The largest gradient{of} was in {group} ({norms[group]:.3g}). "
    return text


@dataclasses.dataclass
class _Interrupt:
    """Whether somebody asked the run to stop."""

    reason: str | None = None


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one is not caught.

    With several processes, JAX's preemption service agrees on a step for SIGTERM instead: processes
    that stopped at different steps would wait for each other forever.
    """
    interrupt = _Interrupt()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous: dict[int, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        del frame
        interrupt.reason = f"stopped by {signal.Signals(number).name}"
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
