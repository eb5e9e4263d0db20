"""Streams a clip with sound, second by second, into an MP4 that plays while it is being written.

    python -m launch.stream --checkpoint checkpoints/omniforcing \\
        --text-encoder checkpoints/gemma3 --prompt "A street musician in the rain" \\
        --seconds 30 --output outputs/clip.mp4

    python -m launch.stream --checkpoint checkpoints/omniforcing \\
        --text-encoder checkpoints/gemma3 --prompt "A calm sea" "A storm comes up@9" \\
        --endless --output - | ffplay -

The second prompt takes over after 9 s; Ctrl-C ends the stream after the current block, and so does
closing the player. Prompts are encoded and the encoder is unloaded before the sampler is loaded,
unless --keep-encoder is given: then prompts but the first are encoded when they are due. Encoded
prompts are kept on disk.

`--features FILE[@SECOND]` are text contexts made beforehand (see `omniforcing_jax.text.features`).
For a checkpoint with random weights, `--random-features` derives them from the prompt's text.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import signal
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from launch import options
from omniforcing_jax import (
    BlockLayout,
    Chunk,
    PipelineConfig,
    PromptEncoder,
    RolloutConfig,
    StreamingSession,
    load_pipeline,
    programs,
)
from omniforcing_jax.ops.attention import attention
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.background import BackgroundWriter
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.text.prompts import TextTimes
from omniforcing_jax.types import Contexts

# Parts of a block's time as the report names them.
PARTS = {
    "text": "text",
    "generate": "generate",
    "decode_video": "video",
    "decode_audio": "sound",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.stream", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by checkpoint_converters")
    add(
        "--bidirectional", action="store_true",
        help="stream a model that was not trained to be streamed: without a history it has seen",
    )  # fmt: skip
    add("--prompt", nargs="+", metavar="TEXT[@SECOND]", help="what to show, and from when on")
    options.add_text_source(parser)
    add("--keep-encoder", action="store_true", help="keep it in memory, and encode when due")
    add("--features", nargs="+", metavar="FILE[@SECOND]", help="text contexts, one per prompt")
    options.add_clip_file(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, help="length of the clip (default 5)")
    length.add_argument("--endless", action="store_true", help="stream until Ctrl-C")
    options.add_size(parser)
    add(
        "--enlarge", type=int, default=1, metavar="N", help="write every pixel as N x N (default 1)"
    )
    add("--seed", type=int, default=0)
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--timesteps", type=float, nargs="+",
        help="student timesteps, snapped to the teacher's 40-step schedule "
        "(default: those of the checkpoint, else 1000 909 725 421)",
    )  # fmt: skip
    steps.add_argument("--sigmas", type=float, nargs="+", help="noise levels, ending with 0")
    add("--layout", choices=("prefix", "merged"), help="default: the one of the checkpoint")
    options.add_cache(parser)
    options.add_decoder(parser)
    options.add_dtype(parser)
    options.add_attention(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """A checked command line: everything that can be wrong has been looked at.

    Attributes:
      rollout: how blocks are generated.
      num_blocks: length of the clip; None is without end.
      prompts: sentences or contexts, by the block they start at.
      encoder: of the sentences.
      notes: what is otherwise than one might think, a line each.
    """

    rollout: RolloutConfig
    num_blocks: int | None
    prompts: dict[int, str | Contexts]
    encoder: PromptEncoder | None
    notes: list[str]


def check_arguments(args: argparse.Namespace, config: PipelineConfig) -> StreamRequest:
    """Checks all options against the checkpoint before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
    """
    if not config.trained.causal and not args.bidirectional:
        raise ValueError(
            f"{args.checkpoint} is bidirectional and was not trained to be streamed: sample it by "
            "launch.sample_teacher, give a student, or add --bidirectional to stream it all the "
            "same, whatever comes of it"
        )
    notes = options.list_deviations(deviations(args, config))
    _check_decoder(args, config)
    _check_attention(args, config)
    layout = config.layout(args.layout, args.fps)
    cache = config.cache(layout, args.window, args.anchors, args.positions)
    sigmas = args.sigmas or config.sigmas(args.timesteps)
    rollout = config.rollout(args.height, args.width, cache=cache, sigmas=sigmas)
    num_blocks = None if args.endless else layout.blocks_for_seconds(args.seconds)
    rollout.cache.blocks_in_positions(num_blocks)
    options.check_source(args)
    prompts = _by_block(args.features or args.prompt or [""], layout, num_blocks)
    encoder = None
    if args.text_encoder:
        encoder = options.make_encoder(args, keep=args.keep_encoder)
        encoder.check(list(prompts.values()))
    else:
        dims = config.transformer.text_dims
        prompts = {block: _contexts(args, text, dims) for block, text in prompts.items()}
    return StreamRequest(rollout, num_blocks, prompts, encoder, notes)


def deviations(args: argparse.Namespace, config: PipelineConfig) -> list[str]:
    """Options that are otherwise than in training; fills in those that are not given."""
    changed = options.use_trained(args, config.trained)
    usual = config.sigmas()
    if args.sigmas and config.trained.timesteps and tuple(args.sigmas) != usual:
        changed.append(options.deviation("sigmas", tuple(args.sigmas), usual))
    mode = "causal" if config.video_vae.causal_decoder else "window"
    if args.decode not in (None, mode):
        changed.append(options.deviation("decode", args.decode, mode))
    return changed


def _check_decoder(args: argparse.Namespace, config: PipelineConfig) -> None:
    """Raises what making the session's decoder would raise."""
    mode = args.decode or "causal"  # the mode that every decoder can run in
    params = {"decoder": {}, "per_channel_statistics": {}}
    StreamingVideoDecoder(config.video_vae, params, mode=mode, **options.decoder_settings(args))


def _check_attention(args: argparse.Namespace, config: PipelineConfig) -> None:
    """Raises ValueError where the backend cannot run the model's heads on this platform."""
    model, dtype = config.transformer, options.compute_dtype(args)
    attend = functools.partial(attention, implementation=args.attention)
    for heads in (
        (model.video_heads, model.video_head_dim),
        (model.audio_heads, model.audio_head_dim),
    ):
        tokens = jax.ShapeDtypeStruct((1, 1, *heads), dtype)
        jax.eval_shape(attend, tokens, tokens, tokens)


def _by_block(specs: list[str], layout: BlockLayout, num_blocks: int | None) -> dict[int, str]:
    """{block it starts at: text or file} of TEXT[@SECOND]."""
    result: dict[int, str] = {}
    for spec in specs:
        text, start = _split_start(spec)
        if not 0 <= start < math.inf:
            raise ValueError(f"{spec!r} must start at a second from 0 on, not {start:g}")
        block = layout.blocks_for_seconds(start) if start > 0 else 0
        if block in result:
            raise ValueError(f"{spec!r} starts in the same second as {result[block]!r}")
        if num_blocks is not None and block >= num_blocks:
            raise ValueError(f"{spec!r} starts after the end of the clip")
        result[block] = text
    if 0 not in result:
        raise ValueError("no prompt for the start: one of them must have no @SECOND")
    return result


def _split_start(spec: str) -> tuple[str, float]:
    text, _, start = spec.rpartition("@")
    try:
        return (text, float(start)) if text else (spec, 0.0)
    except ValueError:
        return spec, 0.0


def _contexts(args: argparse.Namespace, text: str, dims: tuple[int, int]) -> Contexts:
    """Those in a file without its padding, or random ones derived from a prompt."""
    if not args.features:
        features = options.random_features(text, dims)
        return features.video_context, features.audio_context
    features = options.load_features(text, dims)
    video, audio, mask = features.video_context, features.audio_context, features.mask
    if mask is None:
        return video, audio
    # The text's keys have no positions: without the padding is the same as not attending to it. A
    # prompt of another length than the one before has the block compiled again.
    attended = np.asarray(mask[0])
    if not attended.any():
        raise ValueError(f"{text}: its mask leaves no token to attend to; encode the prompt again")
    return video[:, attended], audio[:, attended]


class StreamReport:
    """Progress on standard error: one line per block, totals at the end."""

    def __init__(self, frame_rate: float):
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.frame_rate = frame_rate
        self.start = time.perf_counter()
        self.first_chunk: float | None = None  # when it came
        self.first_parts = dict.fromkeys(PARTS, 0.0)  # until then
        self.encoding = 0.0  # before the stream began
        self.frames = 0
        self.seconds = 0.0
        self.speeds: list[float] = []  # of blocks, frames per second

    def text(self, times: TextTimes) -> None:
        """Prints what encoding the prompts has cost."""
        self.encoding = times.total
        self.console.print(f"text        {options.describe_times(times)}")

    def chunk(self, chunk: Chunk) -> None:
        """Adds one chunk and prints its line."""
        count, times = chunk.frames.shape[1], chunk.timings
        parts = {part: getattr(times, part) for part in PARTS}
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
            f"{name}  {times.total:6.2f} s  ({_list_parts(parts)})  {count:3d} frames  "
            f"{speed:6.1f} FPS  x{speed / self.frame_rate:.2f} real time  lead {lead:+.2f} s"
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
        first = f"{self.seconds_to_first_chunk:.2f} s with compilation ({_list_parts(parts)})"
        average = f"{self.frames / self.seconds:.1f} FPS with compilation"
        table = Table(show_header=False)
        table.add_row("clip", f"{output}: {self.frames} frames, {length:.2f} s")
        table.add_row("first chunk after", first)
        table.add_row("speed", f"{self.median_fps:.1f} FPS (median block), {average}")
        self.console.print(table)


def _list_parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{PARTS[part]} {x:.2f}" for part, x in seconds.items())


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


def encode_sentences(request: StreamRequest, report: StreamReport) -> StreamRequest:
    """Turns sentences into contexts: all, or the first one if the encoder is kept for the others.

    Raises:
      FloatingPointError: the text encoder made values that are not finite.
    """
    if request.encoder is None:
        return request
    due = {0: request.prompts[0]} if request.encoder.keep else request.prompts
    with options.plain_warnings(report.console):
        contexts = request.encoder.encode(list(due.values()))
    report.text(request.encoder.times)
    encoded = dict(zip(due, contexts, strict=True))
    return dataclasses.replace(request, prompts=request.prompts | encoded)


def run(
    session: StreamingSession,
    request: StreamRequest,
    writer: BackgroundWriter,
    report: StreamReport,
) -> None:
    """Generates, reports and writes blocks until the clip is complete or interrupted."""
    with Interrupt() as interrupt, options.plain_warnings(report.console):
        while request.num_blocks is None or session.num_blocks < request.num_blocks:
            if session.num_blocks and session.num_blocks in request.prompts:
                session.set_prompt(request.prompts[session.num_blocks])
            chunk = session.step()
            report.chunk(chunk)
            writer.put(chunk)
            if interrupt.requested:
                break
        tail = session.finish()
        if tail.frames.shape[1] or tail.waveform.shape[1]:
            report.chunk(tail)
            writer.put(tail)


def clip_settings(args: argparse.Namespace, config: PipelineConfig) -> dict[str, Any]:
    """Of the clip's writer."""
    return {
        "width": args.width * args.enlarge,
        "height": args.height * args.enlarge,
        "frame_rate": args.fps,
        "sample_rate": config.vocoder.sample_rate,
    }


def prepare(args: argparse.Namespace) -> tuple[PipelineConfig, StreamRequest]:
    """Checks everything that can be checked before weights are read.

    Raises:
      ValueError, OSError: something is wrong with the arguments, a checkpoint or the output.
    """
    media.check_output_path(args.output, args.overwrite)
    if args.enlarge < 1:
        raise ValueError(f"--enlarge must be 1 or more, not {args.enlarge}")
    config = PipelineConfig.from_checkpoint(args.checkpoint)
    request = check_arguments(args, config)
    for note in request.notes:
        print(note, file=sys.stderr)
    media.ClipWriter(io.BytesIO(), **clip_settings(args, config)).close()  # it checks its settings
    return config, request


def stream(
    args: argparse.Namespace, config: PipelineConfig, request: StreamRequest
) -> StreamReport:
    """Streams the clip; what it cost. A closed pipe ends it as Ctrl-C does.

    Raises:
      FloatingPointError: the text encoder made values that are not finite.
      OSError: the clip could not be written; a note says where what there is of it lies.
    """
    dtype = options.compute_dtype(args)
    report = StreamReport(args.fps)
    request = encode_sentences(request, report)
    report.console.print(f"loading {args.checkpoint} as {dtype.__name__} on {jax.devices()[0]}")
    pipeline = load_pipeline(args.checkpoint, dtype=dtype)
    session = pipeline.session(
        request.rollout,
        request.prompts[0],
        prompts=request.encoder,
        seed=args.seed,
        max_blocks=request.num_blocks,
        implementation=args.attention,
        decode_mode=args.decode,
        **options.decoder_settings(args),
    )
    settings = clip_settings(args, config)
    with (
        contextlib.suppress(BrokenPipeError),
        media.ClipWriter(args.output, overwrite=args.overwrite, **settings) as clip,
    ):
        report.start = time.perf_counter()
        with BackgroundWriter(clip, args.enlarge) as writer:
            run(session, request, writer, report)
        clip.close()  # not left to the end of the block, where an error would get no note
    report.summary(args.output)
    return report


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    config, request = prepare(args)
    stream(args, config, request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
