"""What a run tells about itself: console, JSONL and TensorBoard, speed and memory.

A training loop adds every step's scalars to `Averages`, and hands their means to a `MetricWriter`
every so many steps. The stages name them: `generator/loss_video`, `generator/grad_norm/audio_ff`,
`band/...` for the losses per band of sigma, and so on. `speed/...` and `memory/...` depend on the
machine and the hour, all others on the run's configuration only.
"""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.monitoring
import rich.console
from etils import epath

from omniforcing_jax.io.paths import is_remote, locate
from omniforcing_jax.scaling.devices import peak_flops

JSONL = "metrics.jsonl"
_UPLOAD_SECONDS = 30  # between two versions of it on object storage


def is_band(name: str) -> bool:
    """Whether a scalar belongs to a band of sigma, which is NaN when no sample fell into it."""
    return "band" in name.split("/")


def may_be_missing(name: str) -> bool:
    """Whether a scalar is a mean over samples of which a step may have none, NaN then: a band, or
    the loss of a stream that is given as a whole in all of them."""
    return is_band(name) or name.endswith(("/loss_video", "/loss_audio"))


class Averages:
    """Means over the steps in which a scalar was given; its state is JSON, and exact."""

    def __init__(self):
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, scalars: Mapping[str, float]) -> None:
        """Adds one step's scalars, leaving out those that are NaN (an empty band of sigma)."""
        for name, value in scalars.items():
            if not math.isnan(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + float(value), count + 1)

    def take(self) -> dict[str, float]:
        """The means, in order of name; starts anew."""
        means = {name: total / count for name, (total, count) in sorted(self._sums.items())}
        self._sums = {}
        return means

    def get_state(self) -> dict[str, list]:
        return {name: list(value) for name, value in self._sums.items()}

    def set_state(self, state: Mapping[str, list]) -> None:
        self._sums = {name: (total, count) for name, (total, count) in state.items()}


class MetricWriter:
    """Writes records; only process 0 does, the others' writers are silent.

    Args:
      folder: for `metrics.jsonl` and the TensorBoard files; created.
      start_step: steps done before this start. Records behind it are from a run that was cut off
        after its last checkpoint; they are dropped and will be written again.
      tensorboard: also write TensorBoard summaries.
      console: where lines go; None prints to stderr.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        console: rich.console.Console | None = None,
    ):
        self._active = jax.process_index() == 0
        self._file = self._summaries = None
        if not self._active:
            return
        self._console = console or rich.console.Console(stderr=True)
        folder = locate(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _RecordFile(folder / JSONL, start_step)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._summaries = SummaryWriter(
                str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One record: a line of JSON {"step", name: value, ...} and the summaries."""
        if not self._active:
            return
        self._file.append(json.dumps({"step": step, **scalars}) + "\n")
        if self._summaries is not None:
            for name, value in scalars.items():
                self._summaries.add_scalar(name, value, step)
            self._summaries.flush()

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._active:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def flush(self) -> None:
        """Returns when all records are where they belong."""
        if self._active:
            self._file.flush()

    def close(self) -> None:
        for file in (self._file, self._summaries):
            if file is not None:
                file.close()


class _RecordFile:
    """`metrics.jsonl`, which grows by lines.

    Objects in object storage cannot grow: there the file is written anew, now and then.
    """

    def __init__(self, path: epath.Path, start_step: int):
        self._path, self._remote = path, is_remote(path)
        kept = [r for r in read_records(path) if r["step"] <= start_step] if path.exists() else []
        self._text = "".join(json.dumps(record) + "\n" for record in kept)
        self._written = -math.inf
        if self._remote:
            self.flush()
            return
        with self._naming_the_file():
            new = path.with_name(f"{path.name}.new")
            new.write_text(self._text)
            new.replace(path)
            self._file = path.open("a")

    def append(self, line: str) -> None:
        if not self._remote:
            with self._naming_the_file():
                self._file.write(line)
                self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._remote:
            self._path.write_text(self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if not self._remote:
            with contextlib.suppress(OSError):  # of a full disk `append` has told
                self._file.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error}") from error


def read_records(file: str | os.PathLike) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
      ValueError: another line is not JSON.
    """
    records, lines = [], locate(file).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{file}: line {number} is no JSON object: {line[:80]!r}")
    return records


def console_line(step: int, num_steps: int, scalars: Mapping[str, float]) -> str:
    """The record as a line to read: losses, gradient norms, speed and the time that is left."""
    parts = [f"step {step:,}/{num_steps:,}"]
    for name, value in scalars.items():
        last = name.split("/")[-1]
        if not name.startswith("band/") and (last.startswith("loss") or last == "grad_norm"):
            parts.append(f"{name} {value:.4g}")
    rate = scalars.get("speed/steps_per_second")
    if rate:
        left = int((num_steps - step) / rate)
        parts.append(f"{rate:.3g} it/s" if rate >= 1 else f"{1 / rate:.3g} s/it")
        if "speed/mfu" in scalars:
            parts.append(f"MFU {scalars['speed/mfu']:.1%}")
        parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
    return "  ".join(parts)


class Stopwatch:
    """Where the host's time goes between two records.

    Args:
      flops_per_step, tokens_per_step: of all devices together; None leaves out what needs them.
    """

    def __init__(self, flops_per_step: float | None = None, tokens_per_step: int | None = None):
        self._flops, self._tokens = flops_per_step, tokens_per_step
        self._start, self._spent = time.perf_counter(), {}

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Counts the block's time as "data", "step" (dispatch), "wait" (device) or "other"."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - start

    def read(self, steps: int) -> dict[str, float]:
        """Speed since the last reading, in which `steps` steps were made; starts anew.

        Returns:
          speed/steps_per_second, tokens_per_second, tflops_per_second (all devices together), mfu
          (where the device's peak is known), and shares of the time:
            data_share: waiting for the next batch;
            host_share: the host's own work, data included; near 1 the devices are idle;
            other_share: hooks and checkpoints, not part of the host's share.
        """
        now = time.perf_counter()
        seconds, spent = max(now - self._start, 1e-9), self._spent
        self._start, self._spent = now, {}
        device = spent.get("step", 0.0) + spent.get("wait", 0.0)
        other = spent.get("other", 0.0)
        rate = steps / seconds
        speed = {
            "steps_per_second": rate,
            "data_share": spent.get("data", 0.0) / seconds,
            "host_share": max(0.0, seconds - device - other) / seconds,
            "other_share": other / seconds,
        }
        if self._tokens is not None:
            speed["tokens_per_second"] = self._tokens * rate
        if self._flops is not None:
            speed["tflops_per_second"] = self._flops * rate / 1e12
            peak = peak_flops(jax.devices()[0].device_kind)
            if peak is not None:
                speed["mfu"] = self._flops * rate / (peak * jax.device_count())
        return {f"speed/{name}": value for name, value in speed.items()}


def memory_use() -> dict[str, float]:
    """GiB in use and at the peak on this process' first device; empty where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}


def num_compilations() -> int:
    """Programs that JAX has compiled in this process since the first call of this function."""
    return _compilations()[0]


@functools.cache
def _compilations() -> list[int]:
    count = [0]

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        del duration, kwargs
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count
