"""What the programs that write stored data share: progress, several processes, interruption."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from omniforcing_jax import programs
from omniforcing_jax.data.shards import ShardWriter
from omniforcing_jax.distributed import multihost, partitioning


class RateColumn(ProgressColumn):
    """Records per second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate of the last minutes, which the remaining time is estimated by, too."""
        return Text(rate_text(task.speed, self.unit) if task.speed else f"- {self.unit}/s")


def rate_text(rate: float, unit: str) -> str:
    """A rate per second, or per hour where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 0.1 else f"{3600 * rate:.1f} {unit}/h"


class ShardProgress:
    """Progress on standard error; on a terminal a bar, otherwise a line per shard."""

    def __init__(self, doing: str, unit: str):
        """`doing` names the work ("encoding"), `unit` what is counted ("prompts")."""
        self.doing, self.unit = doing, unit
        quiet = jax.process_index() > 0
        self.console = Console(
            stderr=True, soft_wrap=True, quiet=quiet, highlight=False, markup=False
        )
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), RateColumn(unit))
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=120,
        )

    @contextlib.contextmanager
    def running(self, total: int) -> Iterator[None]:
        """Shows the progress of `total` records."""
        self._start = time.perf_counter()
        self._task = self._bar.add_task(self.doing, total=total)
        with self._bar if self.console.is_terminal else contextlib.nullcontext():
            yield

    def records_done(self, count: int) -> None:
        """Counts records."""
        self._bar.advance(self._task, count)

    def shard_done(self) -> None:
        """Prints a line about the records so far."""
        (task,) = self._bar.tasks
        if self.console.is_terminal or not task.completed:
            return
        rate = task.completed / (time.perf_counter() - self._start)
        left = (task.total - task.completed) / rate
        self.console.print(
            f"{task.completed:.0f} of {task.total:.0f} {self.unit}, {rate_text(rate, self.unit)}, "
            f"{left / 60:.1f} minutes left"
        )


@contextlib.contextmanager
def missing_shards(
    writer: ShardWriter, write_negative: Callable[[], None], progress: ShardProgress
) -> Iterator[dict[int, range]]:
    """Begins a dataset, yields what this process is to write of it, and completes it.

    Args:
      writer: of the dataset.
      write_negative: called by one process if the negative prompt is not stored yet.
      progress: told of the number of records.

    Yields:
      {shard: numbers of its records} that are missing, this process's share.
    """
    start, main = time.perf_counter(), jax.process_index() == 0
    if main:
        writer.begin()
    multihost.barrier("begin")
    share = writer.missing()[jax.process_index() :: jax.process_count()]
    multihost.barrier("share")  # nobody writes before all have seen the same shards missing
    if main and not writer.has_negative:
        write_negative()
    ranges = {shard: writer.manifest.shard_range(shard) for shard in share}
    with progress.running(sum(map(len, ranges.values()))):
        yield ranges
    multihost.barrier("shards")
    records = writer.finish() if main else 0
    multihost.barrier("finish")
    size = sum(path.stat().st_size for path in writer.folder.iterdir() if path.is_file())
    progress.console.print(
        f"{writer.folder}: {records} {progress.unit} in {writer.manifest.num_shards} shards, "
        f"{size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"
    )


def local_mesh() -> Mesh | None:
    """This process's devices, which share weights and batch; None if it is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return partitioning.make_mesh(fsdp=len(devices), devices=devices)


def main(
    run: Callable[[argparse.Namespace, ShardProgress], None],
    args: argparse.Namespace,
    doing: str,
    unit: str,
) -> int:
    """Joins the other processes and runs; returns the exit status.

    Args:
      run: does the work; SIGTERM, which schedulers send before they kill, interrupts it.
      args: with `output` and `distributed`.
      doing, unit: see `ShardProgress`.
    """
    multihost.join(multihost.find_job(args.distributed or None))
    left = f"what is complete is in {args.output}, and the same command continues"
    # SIGTERM once more: JAX answers it otherwise as soon as there are several processes
    with programs.sigterm_interrupts(), programs.when_interrupted(left):
        try:
            run(args, ShardProgress(doing, unit))
        except Exception as error:
            if jax.process_count() == 1:
                raise
            raise multihost.explained(error, f"process {jax.process_index()}") from error
    return 0
