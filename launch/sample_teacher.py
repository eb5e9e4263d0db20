"""Samples one clip with sound from the bidirectional model (the teacher) into an MP4.

    python -m launch.sample_teacher --checkpoint checkpoints/ltx2 \\
        --text-encoder checkpoints/gemma3 --prompt "A dog barks" \\
        --negative-prompt "blurry, distorted, noisy sound" --output outputs/teacher.mp4

The prompts are encoded and the encoder is unloaded before the model is loaded; encoded prompts are
kept on disk. `--features` and `--negative-features` are text contexts made beforehand (see
`omniforcing_jax.text.features`). For a checkpoint with random weights, `--random-features` derives
them from the prompt's text instead:

    python -m launch.sample_teacher --checkpoint checkpoints/tiny --random-features \\
        --prompt "a dog barks" --stg-block 1 --frames 25 --height 128 --width 192 --steps 8 \\
        --output outputs/tiny.mp4

Something can be given instead of generated (`launch.given_files`): a first picture, others later on
(`--image cat.png`, `--keyframe end.png 120`), the sound (`--audio speech.wav`), a film to go on
from or to make the sound of (`--video clip.mp4 --extend`, `--video silent.mp4 --foley`), and a
voice to speak with (`--reference voice.wav`).

With --upsampler the clip is sampled at half its size (or 2/3), made large, and refined in three
steps of a distilled model: the checkpoint itself, or the one that --refiner names. The sound is
that of the first stage.

Size, rate, length, steps and guidance are by default what the checkpoint says that the model was
trained with, and those of the LTX-2 pipelines for its version where it does not say: a distilled
LTX-2, which config.json calls so, is sampled at eight given noise levels without guidance.
"""

import argparse
import contextlib
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
from rich.console import Console

from launch import compilation, given_files, options, refinement
from launch.given_files import GivenFiles
from launch.refinement import Refinement
from omniforcing_jax import (
    PipelineConfig,
    PromptEncoder,
    SampleConfig,
    Transformer,
    decode_clip,
    load_pipeline,
    programs,
    sample,
)
from omniforcing_jax.models.transformer.rope import VIDEO_TEMPORAL_COMPRESSION
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.sampling.conditions import mode_frozen
from omniforcing_jax.sampling.teacher import Prompt, check_prompts, without_guidance_of
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.streaming import media

PROGRAM = "launch.sample_teacher"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.sample_teacher", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint", required=True, metavar="FOLDER",
        help="converted model, from checkpoint_converters.ltx2 or .omniforcing",
    )  # fmt: skip
    add("--prompt", metavar="TEXT", help="what to show")
    add("--negative-prompt", metavar="TEXT", help="what not to show, for cfg (default: empty)")
    options.add_text_source(parser)
    add("--features", metavar="FILE", help="text contexts of the prompt")
    add("--negative-features", metavar="FILE", help="those of the negative prompt, for cfg")
    options.add_clip_file(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="about (default: as trained, else 5)")
    length.add_argument("--frames", type=int, help="exactly, 8k + 1")
    options.add_size(parser)
    add("--steps", type=int, help="denoising steps (default: as trained, else 40, or 30 for 2.3)")
    refinement.add_options(parser)
    add("--seed", type=int, default=0)
    options.add_guidance(parser)
    given_files.add_clip_options(parser)
    options.add_dtype(parser)
    options.add_attention(parser)
    options.add_verify(parser)
    compilation.add_option(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """A checked command line: everything that can be wrong has been looked at.

    Attributes:
      prompt, negative: contexts, or sentences for the encoder.
      second: the stage behind `sample`, if any.
      notes: what is otherwise than one might think, a line each.
      given: what the clip is given; None is nothing. `first_given`: the same at the size that is
        sampled, where there is a second stage.
    """

    sample: SampleConfig
    prompt: Prompt | str
    negative: Prompt | str | None
    encoder: PromptEncoder | None
    notes: list[str]
    given: GivenFiles | None = None
    first_given: GivenFiles | None = None
    second: Refinement | None = None


def check_arguments(args: argparse.Namespace, config: PipelineConfig) -> ClipRequest:
    """Checks all options against the checkpoint before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
      OSError: a file that cannot be read.
    """
    config.check_complete()
    trained = config.trained
    if trained.causal:
        raise ValueError(
            f"{args.checkpoint} is a block-causal student (layout {trained.layout!r}): sample "
            "it with launch.stream"
        )
    changed = options.use_trained(args, trained)
    usual = config.recipe(args.steps)
    guidance = options.change_guidance(args, usual.guidance)
    if trained.guidance is not None and guidance != usual.guidance:
        changed.append("guidance")
    recipe = dataclasses.replace(usual, guidance=guidance)
    notes = options.list_deviations(changed)
    frames = clip_frames(args, trained, notes)
    sampling = SampleConfig.for_clip(
        frames=frames,
        height=args.height,
        width=args.width,
        frame_rate=args.fps,
        recipe=recipe,
        spatial_compression=config.video_vae.spatial_compression,
    )
    height, width = config.check_size(args.height, args.width)
    channels = config.transformer.video_channels
    video_vae.check_latents(
        config.video_vae, (1, sampling.clip.video_frames, height, width, channels)
    )
    pixels = 8 * sampling.clip.video_frames * args.height * args.width
    check_memory("the decoded clip", pixels * 3 * 5)  # as numbers of 4 bytes and of one
    model = Transformer(config.transformer)
    sampling.check_model(model)
    second = refinement.plan(args, config, sampling.clip)
    given = first_given = given_files.read(args, sampling.clip, config)
    if second is not None:
        sampling = dataclasses.replace(sampling, clip=second.first_clip)
        small = refinement.at_size(args, sampling.clip, config.video_vae.spatial_compression)
        first_given = given_files.read(small, sampling.clip, config)
    if given is not None:
        sampling = without_guidance_of(sampling, mode_frozen(given.mode))
        notes += given.notes
        if note := trained.untrained_mode(given.mode):
            notes.append(note)
    needs_negative = "uncond" in sampling.guidance.passes()
    _check_sources(args, needs_negative)
    if args.text_encoder:
        encoder = options.make_encoder(args)
        negative = args.negative_prompt or ""
        encoder.check([args.prompt, negative])
        negative = negative if needs_negative else None
        return ClipRequest(
            sampling, args.prompt, negative, encoder, notes, given, first_given, second
        )
    prompt, negative = _contexts(args, config, needs_negative)
    check_prompts(model, prompt, negative, sampling.guidance)
    return ClipRequest(sampling, prompt, negative, None, notes, given, first_given, second)


def clip_frames(args: argparse.Namespace, trained: TrainedSettings, notes: list[str]) -> int:
    """Frames of the clip, 8k + 1; notes it where that is not as long as asked for."""
    seconds = 5.0 if args.seconds is None else args.seconds
    if not args.fps > 0 or not seconds > 0:
        raise ValueError(f"--fps and --seconds must be positive, not {args.fps:g} and {seconds:g}")
    if args.frames is not None:
        return args.frames
    if args.seconds is None and trained.frames is not None:
        return trained.frames
    step = VIDEO_TEMPORAL_COMPRESSION
    frames = 1 + step * max(round((seconds * args.fps - 1) / step), 0)
    if args.seconds is not None and frames != round(seconds * args.fps):
        notes.append(
            f"clips have {step}k + 1 frames: this one has {frames}, which are "
            f"{frames / args.fps:.2f} s, not {seconds:g} s"
        )
    return frames


def _check_sources(args: argparse.Namespace, needs_negative: bool) -> None:
    """Raises ValueError unless there is one source of text, and of the negative if needed."""
    options.check_source(args)
    if args.negative_features and not args.features:
        raise ValueError("--negative-features goes with --features only")
    if args.negative_prompt is not None and not args.text_encoder:
        raise ValueError("--negative-prompt goes with --text-encoder only")
    if args.features and needs_negative and not args.negative_features:
        raise ValueError(
            "classifier-free guidance needs --negative-features FILE; without one, set "
            "--cfg-video 1 --cfg-audio 1"
        )
    for option, given in (
        ("--negative-features", args.negative_features),
        ("--negative-prompt", args.negative_prompt),
    ):
        if given and not needs_negative:
            raise ValueError(f"{option} has no effect with --cfg-video 1 --cfg-audio 1")


def _contexts(args, config: PipelineConfig, needs_negative: bool) -> tuple[Prompt, Prompt | None]:
    """Stored or random contexts of the prompt and, if needed, of the negative prompt."""
    dims = config.transformer.text_dims
    if args.random_features:
        texts = (args.prompt or "", 0), ("", 1)
        found = [options.random_features(text, dims, seed) for text, seed in texts]
    else:
        paths = [path for path in (args.features, args.negative_features) if path]
        found = [options.load_features(path, dims) for path in paths]
    prompts = [Prompt(f.video_context, f.audio_context, f.mask) for f in found]
    return prompts[0], prompts[1] if needs_negative else None


@contextlib.contextmanager
def timed(console: Console, name: str):
    """Shows what is being done, then how long it took."""
    start = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    console.print(f"{name}: {time.perf_counter() - start:.1f} s", highlight=False)


def encode_sentences(request: ClipRequest, console: Console) -> ClipRequest:
    """Turns sentences into contexts.

    Raises:
      FloatingPointError: the text encoder made values that are not finite.
    """
    if request.encoder is None:
        return request
    texts = [request.prompt] if request.negative is None else [request.prompt, request.negative]
    with options.plain_warnings(console), console.status("encoding the prompt ..."):
        contexts = request.encoder.encode(texts)
    console.print(f"text: {options.describe_times(request.encoder.times).strip()}", highlight=False)
    prompt, *negative = [Prompt(*pair) for pair in contexts]
    return dataclasses.replace(request, prompt=prompt, negative=negative[0] if negative else None)


def run(
    args: argparse.Namespace, request: ClipRequest, writer: media.ClipWriter, console: Console
) -> None:
    """Loads the weights, samples, decodes and writes.

    Raises:
      FloatingPointError: a model produced values that are not finite.
    """
    request = encode_sentences(request, console)
    sampling = request.sample
    compilation.use_cache(not args.no_compilation_cache)
    dtype, given, condition, refined = options.compute_dtype(args), request.given, None, None
    if given is not None:
        with timed(console, f"encoding what is given ({given.mode})"):
            config = PipelineConfig.from_checkpoint(args.checkpoint)
            how = {"config": config, "dtype": dtype, "verify": args.verify}
            condition = request.first_given.condition(args.checkpoint, sampling.clip, **how)
            if request.second is not None:
                clip = request.second.clip
                refined = given.condition(args.checkpoint, clip, **how)
    with timed(console, f"loading {args.checkpoint} as {dtype.__name__} on {jax.devices()[0]}"):
        pipeline = load_pipeline(args.checkpoint, dtype=dtype, verify=args.verify, per_layer=False)
    passes = sampling.guidance.passes()
    with timed(console, f"sampling {len(sampling.sigmas) - 1} steps of {', '.join(passes)}"):
        weights = pipeline.params.pop("transformer")  # once sampled, the room is the decoder's
        latents = sample(
            pipeline.transformer(args.attention),
            weights,
            request.prompt,
            request.negative,
            jax.random.key(args.seed),
            sampling,
            condition=condition,
        )
        jax.block_until_ready(latents)
    clip = sampling.clip
    if request.second is not None:
        with timed(console, f"upsampling, and refining in {refinement.STEPS} steps"):
            if request.second.folder is not None:
                weights = None  # the refiner's take their room
            latents = request.second(
                request.prompt,
                jax.random.key(args.seed),
                latents,
                weights,
                pipeline.params["video_vae"],
                condition=refined,
                dtype=dtype,
                implementation=args.attention,
                verify=args.verify,
            )
            clip = request.second.clip
    del weights
    with timed(console, "checking the latents"):
        finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), latents)
    if not (finite.video and finite.audio):
        raise FloatingPointError(
            "the sampled latents are not finite; try --dtype float32, and check the checkpoint"
        )
    with timed(console, "decoding video and sound"):
        size = (clip.video_frames, clip.height, clip.width)
        frames, waveform = decode_clip(
            pipeline.config, pipeline.params, latents, size, pipeline.dtype
        )
    if given is not None:  # comes out as it went in
        frames = frames if given.shown is None else given.shown
        waveform = waveform if given.played is None else given.played.waveform
    with timed(console, f"writing {args.output}"):
        writer.write(frames, waveform)
        writer.close()
    console.print(
        f"{args.output}: {len(frames)} frames, {len(frames) / args.fps:.2f} s, "
        f"{args.width}x{args.height}, {len(waveform) / writer.sample_rate:.2f} s of sound"
    )


def check_request(args: argparse.Namespace) -> tuple[PipelineConfig, ClipRequest]:
    """Checks all but the output, and says what is otherwise than one might think.

    Raises:
      ValueError, OSError: see `check_arguments`.
    """
    config = PipelineConfig.from_checkpoint(args.checkpoint)
    request = check_arguments(args, config)
    for note in request.notes:
        programs.say(note)
    return config, request


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    console = Console(stderr=True, soft_wrap=True)
    options.check_clip_output(args, PROGRAM)
    config, request = check_request(args)
    played = request.given and request.given.played
    writer = media.ClipWriter(  # before the weights are read: it checks its settings, too
        args.output,
        width=args.width,
        height=args.height,
        frame_rate=args.fps,
        sample_rate=played.sample_rate if played else config.vocoder.sample_rate,
        overwrite=args.overwrite,
        program=PROGRAM,
    )
    with writer:
        run(args, request, writer, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
