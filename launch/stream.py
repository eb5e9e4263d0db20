"""Streams a clip with sound, second by second, into an MP4 that plays while it is being written.

    python -m launch.stream --checkpoint checkpoints/ltx2 --features prompt.safetensors \\
        --seconds 30 --output outputs/clip.mp4

    python -m launch.stream --checkpoint checkpoints/ltx2 --endless --output - \\
        --features first.safetensors second.safetensors@9 | ffplay -

The second prompt takes over after 9 s; Ctrl-C ends the stream after the current block.
`--features` are text contexts made beforehand (see `omniforcing_jax.text_features`). For a
checkpoint with random weights, `--random-features` derives them from the prompt's text instead.
"""

import argparse
import dataclasses
import queue
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from omniforcing_jax import flow, media, text_features
from omniforcing_jax.kv_cache import POSITIONS, CacheConfig
from omniforcing_jax.pipeline import PipelineConfig, load_pipeline
from omniforcing_jax.rollout import RolloutConfig
from omniforcing_jax.streaming import Chunk, StreamingSession

DEFAULT_TIMESTEPS = (1000, 909, 725, 421)
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.stream", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by checkpoint_converters")
    add("--features", nargs="+", metavar="FILE[@SECOND]", help="text contexts, one per prompt")
    add("--random-features", action="store_true", help="stand-in contexts for random weights")
    add("--prompt", default="", help="text the random features are derived from")
    add("--output", required=True, help="MP4 file, or - for standard output")
    add("--overwrite", action="store_true", help="replace an existing file")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, help="length of the clip (default 5)")
    length.add_argument("--endless", action="store_true", help="stream until Ctrl-C")
    add("--height", type=int, default=512, help="pixels, a multiple of 32 (default 512)")
    add("--width", type=int, default=768, help="pixels, a multiple of 32 (default 768)")
    add("--fps", type=float, default=24.0, help="frames per second (default 24)")
    add("--seed", type=int, default=0)
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--timesteps", type=float, nargs="+",
        help="student timesteps, snapped to the teacher's 40-step schedule "
        "(default: those of the checkpoint, else 1000 909 725 421)",
    )  # fmt: skip
    steps.add_argument("--sigmas", type=float, nargs="+", help="noise levels, ending with 0")
    add("--layout", choices=("prefix", "merged"), help="default: the one of the checkpoint")
    add("--window", type=int, default=7, help="recent blocks in the cache (default 7)")
    add("--anchors", type=int, default=0, help="first blocks that are never evicted (default 0)")
    add("--positions", choices=POSITIONS, default="relative")
    add("--decode", choices=("window", "causal"), default="window", help="video decoding mode")
    add("--look-back", type=int, default=4, help="latent frames, window mode (default 4)")
    add("--look-ahead", type=int, default=1, help="latent frames, window mode (default 1)")
    add("--blend", type=int, default=1, help="latent frames, window mode (default 1)")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on accelerators, else float32")
    add("--attention", default="auto", help="attention backend (see omniforcing_jax.ops.attention)")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked command line: everything that can be wrong has been looked at."""

    rollout: RolloutConfig
    num_blocks: int | None
    prompts: dict[int, tuple[jax.Array, jax.Array]]  # by the block they start at


def make_plan(args: argparse.Namespace, config: PipelineConfig) -> Plan:
    """Checks all options against the checkpoint before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
    """
    height, width = config.check_size(args.height, args.width)
    layout = config.layout(args.layout, args.fps)
    timesteps = args.timesteps or config.timesteps or DEFAULT_TIMESTEPS
    sigmas = args.sigmas or flow.student_sigmas(timesteps)
    rollout = RolloutConfig(
        cache=CacheConfig(layout, args.window, args.anchors, args.positions),
        sigmas=tuple(float(s) for s in flow.check_sigmas(sigmas)),
        height=height,
        width=width,
    )
    num_blocks = None if args.endless else layout.blocks_for_seconds(args.seconds)
    rollout.cache.blocks_in_positions(num_blocks)
    if bool(args.features) == args.random_features:
        raise ValueError("give either --features FILE or --random-features (with --prompt TEXT)")
    prompts = {}
    for spec in args.features or [args.prompt]:
        path, start = _split_start(spec) if args.features else (spec, 0.0)
        block = layout.blocks_for_seconds(start) if start > 0 else 0
        if args.features:
            features = text_features.load_text_features(path, config.transformer.text_dims)
        else:
            key = text_features.prompt_key(path)
            features = text_features.random_text_features(key, 1, 128, config.transformer.text_dims)
        prompts[block] = (features.video_context, features.audio_context)
    if 0 not in prompts:
        raise ValueError("no prompt for the start: one of --features must have no @SECOND")
    return Plan(rollout, num_blocks, prompts)


def _split_start(spec: str) -> tuple[str, float]:
    path, _, start = spec.rpartition("@")
    try:
        return (path, float(start)) if path else (spec, 0.0)
    except ValueError:
        return spec, 0.0


class Report:
    """Progress on standard error: one line per block, totals at the end."""

    def __init__(self, frame_rate: float):
        self.console = Console(stderr=True, soft_wrap=True)
        self.frame_rate = frame_rate
        self.start = time.perf_counter()
        self.first_chunk: float | None = None
        self.frames = 0
        self.seconds = 0.0

    def chunk(self, chunk: Chunk) -> None:
        """Adds one chunk and prints its line."""
        count = chunk.frames.shape[1]
        self.frames += count
        now = time.perf_counter()
        if count and self.first_chunk is None:
            self.first_chunk = now
        t = chunk.timings
        self.seconds += t.total
        media_seconds = self.frames / self.frame_rate
        played = now - self.first_chunk if self.first_chunk else 0.0
        name = f"block {chunk.block:4d}" if chunk.block >= 0 else "tail      "
        speed = count / t.total
        self.console.print(
            f"{name}  {t.total:6.2f} s  (generate {t.generate:.2f}, video {t.decode_video:.2f}, "
            f"sound {t.decode_audio:.2f})  {count:3d} frames  {speed:6.1f} FPS  "
            f"x{speed / self.frame_rate:.2f} real time  lead {media_seconds - played:+.2f} s",
            highlight=False,
        )

    def summary(self, output: str) -> None:
        """Prints the totals."""
        if not self.frames:
            self.console.print("nothing was generated")
            return
        table = Table(show_header=False)
        table.add_row(
            "clip", f"{output}: {self.frames} frames, {self.frames / self.frame_rate:.2f} s"
        )
        table.add_row(
            "first chunk after", f"{self.first_chunk - self.start:.2f} s (with compilation)"
        )
        table.add_row("average", f"{self.frames / self.seconds:.1f} FPS")
        self.console.print(table)


class BackgroundWriter:
    """Encodes chunks in a thread, so that the encoder and the accelerator work at the same time."""

    def __init__(self, writer: media.ClipWriter):
        self._writer = writer
        self._queue: queue.Queue[Chunk | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clip-writer")
        self._thread.start()

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write(chunk.frames[0], chunk.waveform[0])
                except BaseException as error:  # re-raised in the main thread by put or close
                    self._error = error

    def put(self, chunk: Chunk) -> None:
        """Queues a chunk; waits while the encoder is far behind."""
        if self._error is not None:
            raise self._error
        self._queue.put(chunk)

    def close(self) -> None:
        """Waits until everything is written."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error


class Interrupt:
    """Ctrl-C ends the stream after the current block; a second one ends it at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nending after this block (Ctrl-C again: at once)", file=sys.stderr)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._previous)


def run(session: StreamingSession, plan: Plan, writer: BackgroundWriter, report: Report) -> None:
    """Generates, reports and writes blocks until the clip is complete or interrupted."""
    with Interrupt() as interrupt:
        while plan.num_blocks is None or session.num_blocks < plan.num_blocks:
            if session.num_blocks and session.num_blocks in plan.prompts:
                session.set_prompt(plan.prompts[session.num_blocks])
            chunk = session.step()
            report.chunk(chunk)
            writer.put(chunk)
            if interrupt.requested:
                break
        tail = session.finish()
        if tail.frames.shape[1] or tail.waveform.shape[1]:
            report.chunk(tail)
            writer.put(tail)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    try:
        media.check_output_path(args.output, args.overwrite)
        config = PipelineConfig.from_checkpoint(args.checkpoint)
        plan = make_plan(args, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    on_cpu = jax.default_backend() == "cpu"
    dtype = DTYPES[args.dtype or ("float32" if on_cpu else "bfloat16")]
    report = Report(args.fps)
    report.console.print(f"loading {args.checkpoint} as {dtype.__name__} on {jax.devices()[0]}")
    pipeline = load_pipeline(args.checkpoint, dtype=dtype)
    session = pipeline.session(
        plan.rollout,
        plan.prompts[0],
        seed=args.seed,
        max_blocks=plan.num_blocks,
        implementation=args.attention,
        decode_mode=args.decode,
        look_back=args.look_back,
        look_ahead=args.look_ahead,
        blend=args.blend,
    )
    with media.ClipWriter(
        args.output,
        width=args.width,
        height=args.height,
        frame_rate=args.fps,
        sample_rate=config.vocoder.sample_rate,
        overwrite=args.overwrite,
    ) as clip:
        writer = BackgroundWriter(clip)
        report.start = time.perf_counter()
        try:
            run(session, plan, writer, report)
        finally:
            writer.close()
    report.summary(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
