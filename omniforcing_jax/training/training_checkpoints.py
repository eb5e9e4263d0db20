"""Checkpoints of a run: train state, data iterator and configuration, written while it goes on.

    RUN/checkpoints/2000/state/   TrainState, Orbax
    RUN/checkpoints/2000/data/    the data iterator's state, the same for all processes
    RUN/checkpoints/2000/run/     configuration, and the averages of the record under way

Each of the three folders lists the checksums of its files, which all processes hash and compare
together: every one what it has written, and its share of what is read.

Orbax's CheckpointManager of API v0, not v1: v1 still comes from `orbax.checkpoint.experimental`,
its `Checkpointer` skips a save while one is running unless told not to, and converted checkpoints
are written by v0 already. A checkpoint is built in a folder of another name and renamed when it is
complete (on object storage, marked), so what was cut off is never taken for a checkpoint. All
processes write and read their parts, and any number of them on any mesh can go on. Reading goes
past the manager, whose barriers would hold the others when one process finds a damaged file.

The step's random numbers are `fold_in(seed, step)`, so state, step and iterator are everything: a
run that was resumed equals one that was not, bit for bit.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checkpoints, checksums
from omniforcing_jax.io.checksums import DamagedFile
from omniforcing_jax.io.damage import attempt, reading
from omniforcing_jax.io.paths import locate
from omniforcing_jax.training import adapters
from omniforcing_jax.training.checkpoint_handlers import (
    JsonHandler,
    SaveJson,
    SaveState,
    StateHandler,
    from_json,
    to_json,
)
from omniforcing_jax.training.config.run_config import RunConfig, check_config, listed, plain
from omniforcing_jax.training.parameter_trees import (
    by_path,
    differences,
    match,
    sharding_of,
    with_new,
)
from omniforcing_jax.training.state import TrainState

FOLDER = "checkpoints"
_ITEMS = ("state", "data", "run")
_SAVE_SECONDS = 600  # as long as Orbax waits for a save
_ITERATOR_FILE = "iterator.json"


class DataIterator(Protocol):
    """An iterator over batches whose place can be stored, such as grain's.

    Its state counts global batches, and is the same on all processes.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> dict | bytes: ...

    def set_state(self, state: dict | bytes) -> None: ...


class Restored(NamedTuple):
    """What a checkpoint holds besides the data iterator, which was set.

    Attributes:
      averages: state of `metrics.Averages`.
    """

    step: int
    state: TrainState
    averages: dict


class CheckpointNotSaved(OSError):
    """A save failed, a full disk for instance; the checkpoints before it are as they were."""


class TrainingCheckpoints:
    """The checkpoints of one run; a context manager, which waits for the last save when it ends.

    Args:
      run: the run's folder.
      keep_last: how many of the latest are kept.
      keep_every: checkpoints whose step is a multiple of it are kept for good; None: none are.
      read_only: nothing is written or cleaned up.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        self.folder = locate(run) / FOLDER
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._failure: Exception | None = None
        handlers = {
            "state": StateHandler(),
            "data": JsonHandler(_ITERATOR_FILE),
            "run": JsonHandler(),
        }
        for handler in handlers.values():
            handler.note = self._note
        self._own_part = threading.Event()  # of the last save: written, or failed
        self._own_part.set()
        handlers["state"].done = self._own_part.set
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep_last,
                keep_period=None if read_only else keep_every,
                create=False,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self._manager.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # what is on its way already says more
                self._manager.close()
        # else: closing waits for the other processes, which may be where this one never comes

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        batches: DataIterator,
        config: Mapping[str, Any],
        averages: Mapping[str, Any],
    ) -> None:
        """Starts a save; returns when the arrays are copied, so that they may be donated.

        Raises:
          CheckpointNotSaved: this save, or the one before.
        """
        self.check(wait=True)
        items = {
            "state": SaveState(state),
            "data": SaveJson(to_json(batches.get_state())),
            "run": SaveJson({"config": plain(config), "averages": dict(averages)}),
        }
        self._own_part.clear()
        started = False
        try:
            with self._reporting():
                started = self._manager.save(step, args=ocp.args.Composite(**items))
        finally:
            if not started:
                self._own_part.set()

    def check(self, *, wait: bool = False) -> None:
        """Waits for this process's part of the last save at most: the others may never come.

        Raises:
          CheckpointNotSaved: the last save has failed in the background.
        """
        if wait:
            self._own_part.wait(_SAVE_SECONDS)
        with self._reporting():
            if self._failure is not None:
                raise self._failure

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          CheckpointNotSaved: it failed.
        """
        self.check(wait=True)
        with self._reporting():
            self._manager.wait_until_finished()

    def _note(self, error: Exception) -> None:
        self._failure = error
        self._own_part.set()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:  # TensorStore's and Python's
            there = ocp.utils.checkpoint_steps(self.folder)
            last = f"the last one there is is of step {max(there)}" if there else "there is none"
            raise CheckpointNotSaved(
                f"a checkpoint could not be written to {self.folder}: {str(error)[:1000]}. It was "
                f"left out, {last}; make room there and start the same command again"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster takes the machines back; the same answer on all processes."""
        return self._manager.reached_preemption(step)

    def restore(
        self,
        template: TrainState,
        batches: DataIterator,
        config: Mapping[str, Any],
        *,
        allow_config_change: bool = False,
        verify: bool = True,
    ) -> Restored | None:
        """Restores the latest checkpoint that can be read and sets the data iterator.

        Args:
          template: arrays or jax.ShapeDtypeStructs with the wanted shardings, which need not be
            those of the run that saved. Arrays are deleted, so that both never exist together.
          config: this run's configuration, JSON.
          allow_config_change: resume although the configuration differs.
          verify: pass over checkpoints whose files do not have the checksums they had.

        Returns:
          None if there is no checkpoint.

        Raises:
          ValueError: the configuration or the state's structure differs (lists in what), or no
            checkpoint can be read.
          OSError: a file could not be read, twice; it may be good, and nothing is set aside.
        """
        steps = multihost.from_main(self.steps())
        if not steps:
            return None
        damaged: dict[int, str] = {}
        template = _abstract(template)
        for step in reversed(steps):
            if verify:
                _, damaged[step] = attempt(lambda step=step: self.verify(step, together=True))
                if damaged[step]:
                    continue
            small, damaged[step] = attempt(lambda step=step: self._read_small(step))
            if small is None:
                continue
            run, data, saved = small
            if not allow_config_change:
                check_config(self.folder / str(step), run["config"], config)
            _check_state(self.folder / str(step), saved, template)
            state, damaged[step] = attempt(lambda step=step: self._read_state(step, template))
            if state is None:
                continue
            del damaged[step]
            batches.set_state(data)
            self._set_aside(damaged, step)
            return Restored(step, state, run["averages"])
        reasons = "; ".join(f"{step}: {error}" for step, error in damaged.items())
        raise ValueError(f"no checkpoint in {self.folder} can be read: {reasons[:2000]}")

    def verify(self, step: int, *, together: bool = False) -> None:
        """Compares a checkpoint's files with their checksums, if it has any.

        Args:
          step: of the checkpoint.
          together: all processes call this, and each hashes a share; they do not tell each other.

        Raises:
          DamagedFile: a file is not what was written, or is missing.
        """
        share = {"index": jax.process_index(), "count": jax.process_count()} if together else {}
        for item in _ITEMS:
            checksums.verify(self.folder / str(step) / item, **share)

    def _read_small(self, step: int) -> tuple[dict, dict | bytes, dict]:
        folder = self.folder / str(step)
        run = ocp.JsonCheckpointHandler().restore(folder / "run")
        data = ocp.JsonCheckpointHandler(_ITERATOR_FILE).restore(folder / "data")
        return run, from_json(data), self.saved_arrays(step)

    def saved_arrays(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: shape and dtype} of a checkpoint's state, without reading it."""
        with reading(self.folder / str(step)):
            metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise ValueError(f"{self.folder / str(step)} has no metadata of its arrays")
        return by_path(metadata.tree)

    def _read_state(self, step: int, template: Any, partial: bool = False) -> Any:
        args = ocp.args.PyTreeRestore(
            item=template,
            restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            partial_restore=partial,
        )
        folder = self.folder / str(step) / "state"
        with reading(folder):
            return StateHandler().restore(folder, args=args)

    def read_part(self, step: int, template: Any) -> Any:
        """The part of a checkpoint's state that `template` (nested dicts) names."""
        return self._read_state(step, template, partial=True)

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        if damaged and jax.process_index() == 0:
            for step, error in damaged.items():
                aside = self.folder.parent / "damaged_checkpoints" / str(step)
                text = f"the checkpoint of step {step} is damaged and was moved to {aside}"
                warnings.warn(f"{text}; going on from step {used}. {error}", stacklevel=3)
                if aside.exists():
                    aside.rmtree()
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)
        if damaged:
            multihost.barrier("set damaged checkpoints aside")
            self._manager.reload()


def latest_step(run: str | os.PathLike) -> int | None:
    """Step of the run's latest complete checkpoint; None if it has none."""
    if not (locate(run) / FOLDER).is_dir():
        return None
    with TrainingCheckpoints(run, read_only=True) as saved:
        return max(saved.steps(), default=None)


def verify_generator(path: str | os.PathLike) -> None:
    """Checks what `load_generator` reads; to be called by all processes, each hashes a share.

    Raises:
      DamagedFile: on all of them.
    """
    path = locate(path)
    if not (path / FOLDER).is_dir():
        checkpoints.verify_components(path, ("transformer",))
        return
    with TrainingCheckpoints(path, read_only=True) as run:
        if not (steps := run.steps()):
            return
        _, found = attempt(lambda: run.verify(steps[-1], together=True))
        if found:
            raise DamagedFile(f"the checkpoint of step {steps[-1]} in {path} is damaged: {found}")


def load_generator(
    path: str | os.PathLike,
    expected: Any,
    *,
    which: str = "params",
    step: int | None = None,
    allow_new: tuple[str, ...] = (),
    init: Callable[[], Any] | None = None,
    verify: bool = True,
) -> Any:
    """The generator of another run, or the transformer of a converted checkpoint.

    Args:
      path: a run's folder, or a converted checkpoint.
      expected: the parameters wanted: jax.ShapeDtypeStructs; arrays are cast to their dtype and
        placed by their shardings.
      which: "params" or "ema"; a converted checkpoint has one set of weights only.
      step: of a run; None takes the latest complete checkpoint.
      allow_new: names of parameters that the source may lack, such as "audio_sinks".
      init: () -> parameters as they are initialised; asked for nothing but the new ones.
      verify: compare the files with their checksums first.

    Returns:
      Parameters in the structure of `expected`. Of a run with adapters these are the weights with
      the adapters in them, unless `expected` are adapters themselves.

    Raises:
      FileNotFoundError: there is neither a run with checkpoints nor a converted checkpoint.
      ValueError: the source lacks parameters, has others or others' shapes: lists all of them.
      DamagedFile: a file is not what was written, or is missing.
    """
    path = locate(path)
    if which not in ("params", "ema"):
        raise ValueError(f"which is {which!r}, must be 'params' or 'ema'")
    if not (path / FOLDER).is_dir():
        if (path / "config.json").is_file() and which == "ema":
            raise ValueError(f"{path} is a converted checkpoint and has no moving average")
        saved = by_path(checkpoints.param_shapes(path, "transformer"))
        new, template = match(path, saved, expected, allow_new)
        params = checkpoints.load_params(
            path,
            "transformer",
            dtype=jax.tree.leaves(template)[0].dtype,
            sharding=jax.tree.map(sharding_of, template),
            verify=verify,
        )
        return with_new(params, new, init)
    with TrainingCheckpoints(path, read_only=True) as run:
        steps = run.steps()
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"{path} has no complete checkpoint{'' if step is None else f' of step {step}'}; "
                f"there are: {', '.join(map(str, steps)) or 'none'}"
            )
        step = steps[-1] if step is None else step
        if verify:
            run.verify(step)
        prefix, arrays = f"generator/{which}/", run.saved_arrays(step)
        saved = {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
        if not saved:
            raise ValueError(f"{path}: step {step} has no generator/{which}; the run kept none")
        if _has_adapters(saved) and not _has_adapters(by_path(expected)):
            trained = _saved_trained(run, step, which, saved)
            return _merged(path, expected, trained, verify=verify)
        new, template = match(path, saved, expected, allow_new)
        part = run.read_part(step, {"generator": {which: template}})
        return with_new(part["generator"][which], new, init)


def _has_adapters(paths: Mapping) -> bool:
    return any(path.endswith(adapters.DOWN) for path in paths)


def _saved_trained(run: TrainingCheckpoints, step: int, which: str, saved: Mapping) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for path, x in saved.items()
    }
    part = run.read_part(step, {"generator": {which: unflatten_dict(template, sep="/")}})
    return part["generator"][which]


def _merged(path, expected: Any, trained: Any, *, verify: bool) -> Any:
    """The base that the run was trained with, its adapters in it, in `expected`'s structure."""
    run = RunConfig.read(path)
    base = {
        name: leaf
        for name, leaf in by_path(expected).items()
        if not set(name.split("/")) & set(adapters.NEW_PARAMETERS)
    }
    base = load_generator(run.checkpoint, unflatten_dict(base, sep="/"), verify=verify)
    params = adapters.merged(base, trained, run.adapters)
    if problems := differences(by_path(params), by_path(expected)):
        raise ValueError(f"{path} does not hold this model's parameters: {listed(problems)}")
    return jax.device_put(params, jax.tree.map(sharding_of, expected))


def _abstract(state: TrainState) -> TrainState:
    """Shapes and shardings; arrays are deleted."""

    def describe(leaf):
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        if isinstance(leaf, jax.Array):
            leaf.delete()
        return shape

    return jax.tree.map(describe, state)


def _check_state(path: epath.Path, saved: Mapping, template: TrainState) -> None:
    problems = differences(saved, by_path(template))
    if problems:
        raise ValueError(f"{path} is of another model or optimizer: {listed(problems)}")
