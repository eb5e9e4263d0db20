"""What `launch.stream` says while it streams, and at the end."""

import statistics
import time

from rich.console import Console
from rich.table import Table

from launch import options
from omniforcing_jax import Chunk, StreamingSession
from omniforcing_jax.streaming.ahead import BlocksAhead
from omniforcing_jax.text.prompts import TextTimes

# Parts of a block's time as the report names them: all that the device does is one, or in three.
PARTS = {"text": "text", "generate": "device", "host": "host"}
TIMED_PARTS = {
    "text": "text",
    "generate": "generate",
    "decode_video": "video",
    "decode_audio": "sound",
}


class StreamReport:
    """Progress on standard error: one line per block, totals at the end."""

    def __init__(self, frame_rate: float, timings: bool):
        """`timings`: whether the session tells the parts of a block's time apart."""
        self._parts = TIMED_PARTS if timings else PARTS
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.frame_rate = frame_rate
        self.start = time.perf_counter()
        self.first_chunk: float | None = None  # when it came
        self.first_parts = dict.fromkeys(self._parts, 0.0)  # until then
        self.encoding = self.compilation = 0.0  # before the stream began
        self.frames = 0
        self.seconds = 0.0
        self.speeds: list[float] = []  # of blocks, frames per second

    def text(self, times: TextTimes) -> None:
        """Prints what encoding the prompts has cost."""
        self.encoding = times.total
        self.console.print(f"text        {options.describe_times(times)}")

    def compiling(self, session: StreamingSession, ahead: BlocksAhead | None) -> None:
        """Compiles what the stream needs, or waits for it; shows what is done, and how long it
        took."""
        start, done = time.perf_counter(), []

        def show(part: str) -> None:
            done.append(part)
            status.update(f"compiling: {', '.join(done)} done")

        with self.console.status("compiling ...") as status:
            session.warm_up(show, ahead)
        self.compilation = time.perf_counter() - start
        self.console.print(f"compiling  {self.compilation:6.2f} s")

    def chunk(self, chunk: Chunk) -> None:
        """Adds one chunk and prints its line."""
        count, times = chunk.frames.shape[1], chunk.timings
        parts = {part: getattr(times, part) for part in self._parts}
        now = time.perf_counter()
        if self.first_chunk is None:
            self.first_parts = {p: x + parts[p] for p, x in self.first_parts.items()}
            if count:
                self.first_chunk = now
        self.frames += count
        self.seconds += times.total
        played = now - self.first_chunk if self.first_chunk else 0.0
        lead = self.frames / self.frame_rate - played
        speed = count / times.total
        name = "tail      "
        if chunk.block >= 0:
            name = f"block {chunk.block:4d}"
            self.speeds.append(speed)
        if times.text < 0.005:  # as it is but for the first block of a prompt
            del parts["text"]
        self.console.print(
            f"{name}  {times.total:6.2f} s  ({self._list(parts)})  {count:3d} frames  "
            f"{speed:6.1f} FPS  x{speed / self.frame_rate:.2f} real time  lead {lead:+.2f} s"
            + (f"  {chunk.late:.2f} s of what is given were late" if chunk.late else "")
        )

    @property
    def seconds_to_first_chunk(self) -> float:
        """From the prompts to the first frames, compilation included; loading weights is not."""
        return self.encoding + self.first_chunk - self.start

    @property
    def median_fps(self) -> float:
        """Of the blocks: what a stream settles at, since few of them wait for the compiler."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    def summary(self, output: str) -> None:
        """Prints the totals."""
        if not self.frames:
            self.console.print("nothing was generated")
            return
        length = self.frames / self.frame_rate
        parts = self.first_parts | {"text": self.encoding + self.first_parts["text"]}
        parts = f"compilation {self.compilation:.2f}, {self._list(parts)}"
        first = f"{self.seconds_to_first_chunk:.2f} s ({parts})"
        average = f"{self.frames / self.seconds:.1f} FPS on average"
        table = Table(show_header=False)
        table.add_row("clip", f"{output}: {self.frames} frames, {length:.2f} s")
        table.add_row("first chunk after", first)
        table.add_row("speed", f"{self.median_fps:.1f} FPS (median block), {average}")
        self.console.print(table)

    def _list(self, seconds: dict[str, float]) -> str:
        return ", ".join(f"{self._parts[part]} {x:.2f}" for part, x in seconds.items())
