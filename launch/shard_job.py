"""What the programs that write stored data share: progress, several processes, interruption."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

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


class Report:
    """Progress on standard error; on a terminal a bar, otherwise a line per shard."""

    def __init__(self, doing: str, unit: str, quiet: bool):
        """`doing` names the work ("encoding"), `unit` what is counted ("prompts")."""
        self.doing, self.unit = doing, unit
        self.console = Console(
            stderr=True, soft_wrap=True, quiet=quiet, highlight=False, markup=False
        )
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), RateColumn(unit))
        self.progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=120,
        )

    @contextlib.contextmanager
    def running(self, total: int) -> Iterator[Callable[[int], None]]:
        """Shows the progress of `total` records; yields what to call with the number done."""
        task = self.progress.add_task(self.doing, total=total)
        with self.progress if self.console.is_terminal else contextlib.nullcontext():
            yield lambda count: self.progress.advance(task, count)

    def shard_done(self, start: float) -> None:
        """After a shard; `start` is when the work began."""
        (task,) = self.progress.tasks
        if self.console.is_terminal or not task.completed:
            return
        rate = task.completed / (time.perf_counter() - start)
        left = (task.total - task.completed) / rate
        self.console.print(
            f"{task.completed:.0f} of {task.total:.0f} {self.unit}, {rate_text(rate, self.unit)}, "
            f"{left / 60:.1f} minutes left"
        )


def local_mesh() -> Mesh | None:
    """This process's devices, which share weights and batch; None if it is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return partitioning.make_mesh(fsdp=len(devices), devices=devices)


def join(distributed: bool) -> None:
    """Joins the other processes, if there are any (`multihost.find_job`).

    Raises:
      ValueError: flags and environment do not say which process this is.
    """
    try:
        multihost.join(multihost.find_job(distributed or None))
    except multihost.NotJoined as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(multihost.NOT_JOINED)


def end(status: int) -> NoReturn:
    """Exits; after a failure without waiting for the others, who would wait for this process."""
    if status and jax.process_count() > 1:
        multihost.leave(status)
    sys.exit(status)


def barrier(name: str) -> None:
    """Waits for the other processes."""
    multihost.barrier(name)


def share(items: list[int]) -> list[int]:
    """This process's part of the shards."""
    return [i for i in items if i % jax.process_count() == jax.process_index()]


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, acts like Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
