"""Streams a clip with sound, second by second, into an MP4 that plays while it is being written.

    python -m launch.stream --checkpoint checkpoints/omniforcing \\
        --text-encoder checkpoints/gemma3 --prompt "A street musician in the rain" \\
        --seconds 30 --output outputs/clip.mp4

    python -m launch.stream --checkpoint checkpoints/omniforcing \\
        --text-encoder checkpoints/gemma3 --prompt "A calm sea" --at 9 "A storm comes up" \\
        --endless --output - | ffplay -

The second prompt takes over after 9 s; Ctrl-C ends the stream after the current block, and so does
closing the player. Prompts are encoded and the encoder is unloaded before the sampler is loaded,
unless --keep-encoder is given: then prompts but the first are encoded when they are due. Encoded
prompts are kept on disk.

`--features FILE` are text contexts made beforehand (see `omniforcing_jax.text.features`).
A picture, a film, a sound, or a face and a voice may be given as well: `--image cat.png`,
`--video clip.mp4 --extend`, `--video silent.mp4 --foley`, `--audio speech.wav`,
`--reference face.png voice.wav`.

For a checkpoint with random weights, `--random-features` derives them from the prompt's text.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint_converters import lora
from launch import compilation, fit, given_stream, options
from launch.given_stream import GivenToStream
from launch.interrupt import Interrupt
from launch.prompt_times import prompts_by_block, turns
from launch.stream_report import StreamReport
from omniforcing_jax import (
    BlockLayout,
    Chunk,
    Pipeline,
    PipelineConfig,
    PromptEncoder,
    RolloutConfig,
    StreamingSession,
    Transformer,
    load_pipeline,
    programs,
)
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.lora import KernelUpdate
from omniforcing_jax.ops.attention import attention
from omniforcing_jax.pipeline import transformer_shapes
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.ahead import BlocksAhead
from omniforcing_jax.streaming.background import BackgroundWriter
from omniforcing_jax.streaming.video import StreamingVideoDecoder
from omniforcing_jax.types import Contexts

PROGRAM = "launch.stream"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.stream", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint", required=True, metavar="FOLDER",
        help="converted model, from checkpoint_converters.ltx2 or .omniforcing",
    )  # fmt: skip
    add(
        "--bidirectional", action="store_true",
        help="stream a model that was not trained to be streamed: without a history it has seen",
    )  # fmt: skip
    lora.add_option(
        parser, "LoRA to add to the transformer's weights in memory (strength 1); may be repeated"
    )
    add("--prompt", nargs="+", metavar="TEXT", help="what to show; later ones as TEXT@SECOND")
    add(
        "--at", nargs=2, action="append", metavar=("SECOND", "TEXT"),
        help="another prompt (or file of --features) from this second on; can be repeated",
    )  # fmt: skip
    options.add_text_source(parser)
    add("--keep-encoder", action="store_true", help="keep it in memory, and encode when due")
    add("--features", nargs="+", metavar="FILE", help="text contexts; later ones as FILE@SECOND")
    options.add_clip_file(parser)
    given_stream.add_options(parser)
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
        help="student timesteps, snapped to the schedule it was trained with "
        "(default: those of the checkpoint, else 1000 909 725 421)",
    )  # fmt: skip
    steps.add_argument("--sigmas", type=float, nargs="+", help="noise levels, ending with 0")
    add("--layout", choices=("prefix", "merged"), help="default: the one of the checkpoint")
    options.add_cache(parser)
    options.add_cache_dtype(parser)
    add("--recache", action="store_true", help="write the cache anew when the prompt changes")
    options.add_decoder(parser)
    options.add_dtype(parser)
    options.add_quantize(parser)
    options.add_mesh(parser)
    fit.add_fit(parser)
    options.add_attention(parser)
    options.add_verify(parser)
    compilation.add_option(parser)
    add("--timings", action="store_true", help="tell what each part of a block takes; waits for it")
    return parser.parse_args(argv)


class ClipLength(NamedTuple):
    """Blocks to generate, and how many of their frames and samples the clip has."""

    blocks: int
    frames: int
    samples: int


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """A checked command line: everything that can be wrong has been looked at.

    Attributes:
      rollout: how blocks are generated.
      length: of the clip; None is without end.
      prompts: sentences or contexts, by the block they start at.
      encoder: of the sentences.
      notes: what is otherwise than one might think, a line each.
      given: pictures, film and sound.
      loras: what is added to the transformer's weights.
      mesh: devices that the transformer is split over; None is one.
    """

    rollout: RolloutConfig
    length: ClipLength | None
    prompts: dict[int, str | Contexts]
    encoder: PromptEncoder | None
    notes: list[str]
    given: GivenToStream
    loras: list[KernelUpdate] = dataclasses.field(default_factory=list)
    mesh: Mesh | None = None


def check_arguments(args: argparse.Namespace, config: PipelineConfig) -> StreamRequest:
    """Checks all options against the checkpoint before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
    """
    config.check_complete()
    if not config.trained.causal and not args.bidirectional:
        raise ValueError(
            f"{args.checkpoint} is bidirectional and was not trained to be streamed: sample it by "
            "launch.sample_teacher, give a student, or add --bidirectional to stream it all the "
            "same, whatever comes of it"
        )
    notes = options.list_deviations(deviations(args, config))
    _check_decoder(args, config)
    _check_attention(args, config)
    notes += options.check_precision(args)
    mesh = options.find_mesh(args, config)
    layout = config.layout(args.layout, args.fps)
    cache = config.cache(layout, args.window, args.anchors, args.positions)
    cache = dataclasses.replace(cache, dtype=args.cache_dtype)
    sigmas = args.sigmas or config.sigmas(args.timesteps)
    rollout = config.rollout(args.height, args.width, cache=cache, sigmas=sigmas)
    rollout = dataclasses.replace(rollout, recache=args.recache)
    length = clip_length(args, config, layout, notes)
    num_blocks = None if length is None else length.blocks
    rollout.cache.blocks_in_positions(num_blocks)
    given = given_stream.read(args, rollout, length and length[:2], config)
    notes += given.notes
    ways = mesh.size if mesh else 1
    rollout, lines = fit.fit(args, config, rollout, encoders=given.encoders, ways=ways)
    notes += lines
    check_memory("the cache", _cache_bytes(args, config, rollout))
    options.check_source(args)
    prompts = prompts_by_block(turns(args), layout, num_blocks, notes)
    encoder = None
    if args.text_encoder:
        encoder = options.make_encoder(args, keep=args.keep_encoder)
        encoder.check(list(prompts.values()))
    else:
        dims = config.transformer.text_dims
        prompts = {block: _contexts(args, text, dims) for block, text in prompts.items()}
    return StreamRequest(rollout, length, prompts, encoder, notes, given, mesh=mesh)


def _cache_bytes(args: argparse.Namespace, config: PipelineConfig, rollout: RolloutConfig) -> int:
    dtype, patches = options.compute_dtype(args), rollout.patches
    model = config.transformer
    how = {"batch": 1, "patches": patches, "dtype": dtype, "per_layer": True}
    return cache_bytes(rollout.cache, model, **how)


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
    how = options.decoder_settings(args) | {"mode": mode, "tiny": config.tiny_decoder}
    StreamingVideoDecoder(config.video_vae, params, **how)


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


def clip_length(
    args: argparse.Namespace, config: PipelineConfig, layout: BlockLayout, notes: list[str]
) -> ClipLength | None:
    """What --seconds asks for, None with --endless; notes it where frames do not last so long.

    Raises:
      ValueError: not a positive length.
    """
    if args.endless:
        return None
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds must be positive and finite, not {args.seconds:g}")
    frames = max(round(args.seconds * args.fps), 1)
    if abs(frames / args.fps - args.seconds) > 5e-4:
        notes.append(f"{frames} frames are {frames / args.fps:.3f} s, not {args.seconds:g} s")
    samples = round(frames / args.fps * config.vocoder.sample_rate)
    blocks = layout.blocks_for_seconds(frames / args.fps)
    mel_frames = config.audio_vae.num_mel_frames(layout.num_audio_frames(blocks))
    if mel_frames * config.vocoder.hop < samples:  # the sound of a block ends before its picture
        blocks += 1
    return ClipLength(blocks, frames, samples)


def _contexts(args: argparse.Namespace, text: str, dims: tuple[int, int]) -> Contexts:
    """Those in a file without its padding, or random ones derived from a prompt."""
    if not args.features:
        features = options.random_features(text, dims)
        return features.video_context, features.audio_context
    features = options.load_features(text, dims)
    video, audio, mask = features.video_context, features.audio_context, features.mask
    if mask is None:
        return video, audio
    # The text's keys have no positions: without the padding is the same as not attending to it.
    attended = np.asarray(mask[0])
    if not attended.any():
        raise ValueError(f"{text}: its mask leaves no token to attend to; encode the prompt again")
    return video[:, attended], audio[:, attended]


def padded_length(prompts: Iterable[str | Contexts], attention: str) -> int | None:
    """To which contexts are padded so that all share a program: None where they have one length.

    Only the plain backend attends to some of the text.
    """
    lengths = {contexts[0].shape[1] for contexts in prompts if not isinstance(contexts, str)}
    return max(lengths) if len(lengths) > 1 and attention in ("auto", "xla") else None


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


def compile_ahead(
    args: argparse.Namespace, config: PipelineConfig, request: StreamRequest
) -> BlocksAhead | None:
    """Begins to compile blocks where sentences are encoded before, only text is given, and the
    weights will be as they are in the checkpoint."""
    if request.encoder is None or request.given.encoders:
        return None
    if args.quantize != "none" or request.mesh is not None:
        return None
    dtype = options.compute_dtype(args)
    return BlocksAhead(
        Transformer(config.transformer, dtype, args.attention),
        transformer_shapes(args.checkpoint, dtype),
        request.rollout,
        text_length=request.encoder.length,
        max_blocks=request.length and request.length.blocks,
    )


def open_session(
    args: argparse.Namespace, request: StreamRequest, report: StreamReport
) -> tuple[StreamingSession, StreamRequest]:
    """Encodes the text and reads the weights: a session, and the request with its contexts."""
    request = encode_sentences(request, report)
    report.console.print(options.loading(args))
    given, pipeline = request.given, load(args, request)
    session = pipeline.session(
        request.rollout,
        request.prompts[0],
        prompts=request.encoder,
        seed=args.seed,
        max_blocks=request.length and request.length.blocks + given.unshown,
        given=given.stream,
        text_length=padded_length(request.prompts.values(), args.attention),
        timings=args.timings,
        **session_options(args),
    )
    given.start(session)
    report.start = time.perf_counter()
    return session, request


def run(
    session: StreamingSession,
    request: StreamRequest,
    writer: BackgroundWriter,
    report: StreamReport,
    interrupt: Interrupt,
    *,
    ahead: bool,
) -> None:
    """Generates, reports and writes blocks until the clip is complete or interrupted.

    Args:
      ahead: begin a block before the pixels of the one before it are copied to the host.
    """

    def write(chunk: Chunk) -> None:
        if request.length is not None:
            chunk = chunk.until(request.length.frames, request.length.samples)
        if chunk.block >= 0 or chunk.frames.shape[1] or chunk.waveform.shape[1]:
            report.chunk(chunk)
            writer.put(chunk)

    interrupt.ends_after_block = True
    unshown, pending = request.given.unshown, collections.deque()
    with options.plain_warnings(report.console):
        while not interrupt.requested and session.num_blocks != session.max_blocks:
            if session.num_blocks and session.num_blocks - unshown in request.prompts:
                session.set_prompt(request.prompts[session.num_blocks - unshown])
            pending.append(session.begin())
            if len(pending) > ahead:
                write(pending.popleft().chunk())
        for block in pending:
            write(block.chunk())
        write(session.finish())


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
    options.check_clip_output(args, PROGRAM)
    return check_request(args)


def check_request(args: argparse.Namespace) -> tuple[PipelineConfig, StreamRequest]:
    """The same without the output, for who writes clips of its own."""
    if args.enlarge < 1:
        raise ValueError(f"--enlarge must be 1 or more, not {args.enlarge}")
    config = PipelineConfig.from_checkpoint(args.checkpoint)
    request = check_arguments(args, config)
    if args.loras:
        metadata = checkpoints.load_config(args.checkpoint)["config"]
        updates, lines = lora.updates(args.loras, metadata)
        request = dataclasses.replace(request, loras=updates, notes=[*request.notes, *lines])
    for note in request.notes:
        programs.say(note)
    media.ClipWriter(io.BytesIO(), **clip_settings(args, config)).close()  # it checks its settings
    return config, request


def load(args: argparse.Namespace, request: StreamRequest) -> Pipeline:
    """Reads the weights."""
    how = {"verify": args.verify, "encoders": request.given.encoders, "loras": request.loras}
    how |= {"tiny": args.decode == "tiny", "quantize": args.quantize, "mesh": request.mesh}
    return load_pipeline(args.checkpoint, dtype=options.compute_dtype(args), **how)


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """How a session attends and decodes."""
    how = {"implementation": args.attention, "decode_mode": args.decode}
    return how | options.decoder_settings(args)


def stream(
    args: argparse.Namespace, config: PipelineConfig, request: StreamRequest
) -> StreamReport:
    """Streams the clip; what it cost. A closed pipe ends it as Ctrl-C does.

    Raises:
      FloatingPointError: the text encoder made values that are not finite.
      OSError: the clip could not be written; a note says where what there is of it lies.
    """
    compilation.use_cache(not args.no_compilation_cache)
    report = StreamReport(args.fps, args.timings)
    settings = clip_settings(args, config)
    with (
        Interrupt() as interrupt,
        contextlib.suppress(BrokenPipeError),
        # before the weights are read: nobody else can have the file from now on
        media.ClipWriter(
            args.output, overwrite=args.overwrite, program=PROGRAM, **settings
        ) as clip,
    ):
        interrupt.before_exit = clip.release
        ahead = compile_ahead(args, config, request)
        try:
            session, request = open_session(args, request, report)
        except BaseException as error:
            if ahead is not None:
                if isinstance(error, KeyboardInterrupt):
                    interrupt.leave()
                ahead.wait()
            raise
        try:
            report.compiling(session, ahead)
        except KeyboardInterrupt:  # its threads cannot be stopped, nor Python end under them
            interrupt.leave()
        with BackgroundWriter(clip, args.enlarge) as writer:
            run(session, request, writer, report, interrupt, ahead=not args.timings)
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
