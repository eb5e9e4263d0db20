"""Samples a pocket model for held-out captions of the world, and measures what it shows.

    python -m pocket.sample --checkpoint outputs/pocket/ltx2 \\
        --text-encoder outputs/pocket/gemma --sampler teacher --output outputs/pocket/teacher
    python -m pocket.sample --checkpoint outputs/pocket/student --sampler stream \\
        --text-encoder outputs/pocket/gemma --seconds 60 --every 5 --output outputs/pocket/long

`teacher` takes guided Euler steps over the whole clip, `few-step` the student's steps over the
whole clip (stage I), and `stream` generates and decodes block after block (stages II and III) as
launch.stream does, many prompts side by side. Two need no model: `world` takes true clips, which is
the best there is, and `chance` their pictures with the sound of another motion of the same balls,
which is what sound that has nothing to do with the picture gets; --other-sound is that of a model.

OUTPUT/measures.json holds the measures of pocket.measure for each clip, for all (with the Fréchet
distance to as many clips of the world), and with --every for every stretch of all; and the median
speed of single clips. The first clips are written as MP4s with contact sheets.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from omniforcing_jax import programs
from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout
from omniforcing_jax.io import outputs
from omniforcing_jax.models import quantization
from omniforcing_jax.pipeline import Pipeline, decode_clip, load_pipeline
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.teacher import SampleConfig, sample
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.streaming.contact_sheet import write_clip
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.types import Contexts
from pocket.measure import MeasuredClip, make_table, marks, measure_clip
from pocket.measures.frechet import frechet_distance
from pocket.measures.scalars import pool
from pocket.world.dataset import clip_caption, make_clip, split_seeds
from pocket.world.physics import WorldConfig, draw_scene

SAMPLERS = ("teacher", "few-step", "stream", "world", "chance")
MODEL_FREE = ("world", "chance")
WORLD = WorldConfig()
TIMED_CLIPS = 5
MOST_CLIPS = 10_000  # whose contexts and measures are in memory together


class SampledClips(NamedTuple):
    """What a sampler makes of a batch of prompts."""

    frames: np.ndarray  # [B, F, H, W, 3] uint8
    waveforms: np.ndarray  # [B, N, 2] float32
    first: float  # seconds until the first frames were there
    total: float  # and all


FramesAndSound = Iterator[tuple[np.ndarray, np.ndarray]]
Sampler = Callable[[Contexts, list[int]], SampledClips]  # contexts [B, S, W] and the clips' numbers


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("pocket.sample", __doc__)
    add = parser.add_argument
    add("--checkpoint", help="converted pocket model")
    add("--text-encoder", help="its converted Gemma")
    add("--text-length", type=int, help="tokens per prompt (default: as trained)")
    add("--sampler", choices=SAMPLERS, required=True)
    add("--clips", type=int, default=16, help="captions of the test split (default 16)")
    add("--balls", type=int, help="only captions with so many balls (default: any)")
    add("--seconds", type=float, default=5.0, help="of each clip (default 5)")
    add("--every", type=float, help="also measure every so many seconds, for drift")
    add("--steps", type=int, default=40, help="teacher: denoising steps (default 40)")
    add("--cfg", type=float, default=2.0, help="teacher: guidance, 1 is off (default 2)")
    add("--stg", type=float, default=0.0, help="teacher: spatio-temporal guidance (default 0)")
    add("--stg-block", type=int, nargs="+", default=[], help="teacher: blocks that it perturbs")
    add("--timesteps", type=float, nargs="+", help="of a student (default: the checkpoint's)")
    add("--layout", choices=LAYOUT_NAMES, help="stream: default: the checkpoint's")
    add("--window", type=int, help="stream: recent blocks in the cache (default: as trained)")
    add("--anchors", type=int, help="stream: first blocks never evicted (default: as trained)")
    add("--positions", choices=kv_cache.POSITIONS, help="stream (default: as trained)")
    add("--quantize", choices=("none", *quantization.PRECISIONS), default="none",
        help="stream: weights in 8 bits, see docs/streaming.md (default none)")  # fmt: skip
    add("--cache-dtype", choices=kv_cache.DTYPES, help="stream: keys and values in 8 bits")
    other = "of a model: pictures with the sound of another clip that it makes of the caption"
    add("--other-sound", action="store_true", help=other)
    add("--batch-size", type=int, default=8, help="clips side by side (default 8)")
    add("--seed", type=int, default=0)
    add("--show", type=int, default=8, help="clips written as MP4 and PNG (default 8)")
    add("--no-speed", action="store_true", help="do not time a single clip")
    add("--output", type=pathlib.Path, required=True, help="folder for clips and measures")
    args = parser.parse_args(argv)
    if args.sampler not in MODEL_FREE and not (args.checkpoint and args.text_encoder):
        parser.error(f"--sampler {args.sampler} needs --checkpoint and --text-encoder")
    if args.sampler in MODEL_FREE and args.other_sound:
        parser.error("--other-sound is for a model's clips; of true ones it is --sampler chance")
    if args.sampler != "stream" and in_8_bits(args):
        parser.error("--quantize and --cache-dtype are for --sampler stream")
    return args


def in_8_bits(args: argparse.Namespace) -> bool:
    """Whether weights or cache are, which must lie per layer then."""
    return args.quantize != "none" or args.cache_dtype is not None


def make_sampler(args: argparse.Namespace, pipeline: Pipeline) -> Sampler:
    """The sampler that the arguments ask for.

    Raises:
      ValueError: an option that does not fit the checkpoint.
    """
    config = pipeline.config
    size = config.check_size(WORLD.height, WORLD.width)
    if args.sampler == "stream":
        return _stream_sampler(args, pipeline)
    guidance = NO_GUIDANCE.changed(
        cfg_video=args.cfg, cfg_audio=args.cfg, stg=args.stg, stg_blocks=tuple(args.stg_block)
    )
    whole = SampleConfig.for_clip(
        frames=num_frames(args),
        height=WORLD.height,
        width=WORLD.width,
        recipe=SamplingRecipe.of_steps(args.steps, guidance),
        spatial_compression=config.video_vae.spatial_compression,
    )
    model, weights = pipeline.transformer(), pipeline.params["transformer"]
    whole.check_model(model)
    if args.sampler == "teacher":
        negative = None if args.cfg == 1 else _encoder(args).encode([""])[0]

        def generate(contexts, keys):
            return sample(model, weights, contexts, negative, keys, whole)
    else:
        sigmas = config.sigmas(args.timesteps)
        student = BidirectionalStudent(model, whole.clip, sigmas)
        generate = jax.jit(lambda contexts, keys: student.generate(weights, contexts, keys))

    def run(contexts: Contexts, numbers: list[int]) -> SampledClips:
        start = time.perf_counter()
        # clip n has the same noise in any batch
        key, numbers = jax.random.key(args.seed), jnp.asarray(numbers)
        latents = generate(contexts, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
        decoded = []
        for i in range(len(numbers)):  # one clip at a time, for memory
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], latents)
            latent_size = (whole.clip.video_frames, *size)
            decoded.append(decode_clip(config, pipeline.params, one, latent_size, pipeline.dtype))
        seconds = time.perf_counter() - start
        return SampledClips(
            *map(np.stack, zip(*decoded, strict=True)), first=seconds, total=seconds
        )

    return run


def with_other_sound(args: argparse.Namespace, pipeline: Pipeline) -> Sampler:
    """Pictures of one clip with the sound of another of the same caption: a model's chance."""
    seen = make_sampler(args, pipeline)
    heard = make_sampler(argparse.Namespace(**vars(args) | {"seed": args.seed + 1}), pipeline)

    def run(contexts: Contexts, numbers: list[int]) -> SampledClips:
        return seen(contexts, numbers)._replace(waveforms=heard(contexts, numbers).waveforms)

    return run


def num_frames(args: argparse.Namespace) -> int:
    """Of a clip that is made as a whole: 8 for every latent frame, and the first."""
    return round(args.seconds * WORLD.frame_rate / 8) * 8 + 1


def _stream_sampler(args: argparse.Namespace, pipeline: Pipeline) -> Sampler:
    layout = pipeline.config.layout(args.layout, WORLD.frame_rate)
    cache = pipeline.config.cache(layout, args.window, args.anchors, args.positions)
    cache = dataclasses.replace(cache, dtype=args.cache_dtype)
    sigmas = pipeline.config.sigmas(args.timesteps)
    rollout = pipeline.config.rollout(WORLD.height, WORLD.width, cache=cache, sigmas=sigmas)
    count = layout.blocks_for_seconds(args.seconds)
    rollout.cache.blocks_in_positions(count)

    def run(contexts: Contexts, numbers: list[int]) -> SampledClips:
        # a session draws its noise for the whole batch
        seed = int(np.random.SeedSequence((args.seed, *numbers)).generate_state(1)[0] >> 1)
        start, first, chunks = time.perf_counter(), None, []
        for chunk in pipeline.session(rollout, contexts, seed=seed, max_blocks=count).stream(count):
            chunks.append(chunk)
            if first is None and chunk.frames.shape[1]:
                first = time.perf_counter() - start
        return SampledClips(
            frames=np.concatenate([chunk.frames for chunk in chunks], axis=1),
            waveforms=np.concatenate([chunk.waveform for chunk in chunks], axis=1),
            first=first,
            total=time.perf_counter() - start,
        )

    return run


def _encoder(args: argparse.Namespace) -> PromptEncoder:
    settings = {"dtype": jnp.float32, "length": args.text_length, "keep": True}
    return PromptEncoder(args.text_encoder, args.checkpoint, cache=None, **settings)


def sample_all(
    args: argparse.Namespace, sampler: Sampler, captions: list[str], console: Console
) -> FramesAndSound:
    """Frames [F, H, W, 3] and waveform [N, 2] of one caption after the other."""
    contexts = _encoder(args).encode(captions)
    starts = range(0, len(captions), args.batch_size)
    for start in track(starts, "sampling", console=console, transient=True):
        numbers = list(range(start, min(start + args.batch_size, len(captions))))
        # a last batch that is not full is filled up, or it would be compiled for its size
        filled = (numbers + numbers[-1:] * args.batch_size)[: args.batch_size]
        batch = jax.tree.map(lambda *x: jnp.concatenate(x), *(contexts[n] for n in filled))
        clips = sampler(batch, filled)
        yield from list(zip(clips.frames, clips.waveforms, strict=True))[: len(numbers)]


def world_clips(args: argparse.Namespace, seeds: list[int]) -> FramesAndSound:
    """True clips, or their pictures with another motion's sound, as `sample_all` gives others."""

    def clip(seed: int, motion: int):
        # seeds behind those of the last split
        number = seed + motion * len(split_seeds("test"))
        return make_clip(number, num_frames(args), WORLD, draw_scene(seed, WORLD))

    for seed in seeds:
        sound = clip(seed, args.seed + (args.sampler == "chance"))
        yield clip(seed, args.seed).frames, sound.waveform


def choose_seeds(count: int, balls: int | None, split: str = "test") -> list[int]:
    """The first clips of a split, of those with so many balls.

    Raises:
      ValueError: no such number of clips, or of balls.
    """
    first = list(split_seeds(split, count))
    if balls is None:
        return first
    if not 1 <= balls <= WORLD.max_balls:
        raise ValueError(f"--balls must be 1 to {WORLD.max_balls}, not {balls}")
    fitting = (seed for seed in split_seeds(split) if len(draw_scene(seed, WORLD)) == balls)
    return list(itertools.islice(fitting, count))


def measure_speed(args: argparse.Namespace, sampler: Sampler, caption: str) -> dict[str, float]:
    """Of a single clip, after compilation: seconds to its first frames, frames per second.

    Medians of a few clips: a machine of few cores does other things as well.
    """
    (contexts,) = _encoder(args).encode([caption])
    clips = [sampler(contexts, [0]) for _ in range(1 + TIMED_CLIPS)][1:]
    return {
        "first_frames_after": statistics.median(c.first for c in clips),
        "fps": statistics.median(c.frames.shape[1] / c.total for c in clips),
    }


def real_features(count: int, balls: int | None, length: int) -> list[dict[str, float]]:
    """Of as many clips of the world with so many balls, for other captions."""
    clips = (make_clip(seed, length, WORLD) for seed in choose_seeds(count, balls, "validation"))
    rates = WORLD.frame_rate, WORLD.sample_rate
    return [measure_clip(c.frames, rates[0], c.waveform, rates[1]).features for c in clips]


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers that cannot be, and clips that are more than there is room."""
    if args.clips > MOST_CLIPS:
        raise ValueError(f"--clips must be at most {MOST_CLIPS}, not {args.clips}")
    if not args.seconds > 0 or (args.every is not None and not args.every > 0):
        raise ValueError("--seconds and --every must be more than 0")
    if args.batch_size < 1 or args.steps < 1:
        raise ValueError("--batch-size and --steps must be at least 1")
    side_by_side = 1 if args.sampler in MODEL_FREE else args.batch_size
    pixels = num_frames(args) * WORLD.height * WORLD.width
    check_memory("a batch of clips", 3 * pixels * (side_by_side + 4))  # one of them as numbers


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    console = Console(stderr=True)
    seeds = choose_seeds(args.clips, args.balls)
    check_arguments(args)
    outputs.claim_folder(args.output, "pocket.sample", [args.checkpoint, args.text_encoder])
    captions = [clip_caption(seed, WORLD) for seed in seeds]
    if args.sampler in MODEL_FREE:
        sampler, rate, clips = None, WORLD.sample_rate, world_clips(args, seeds)
        layout = BlockLayout.from_name(args.layout or "prefix", frame_rate=WORLD.frame_rate)
    else:
        how = {"per_layer": in_8_bits(args), "quantize": args.quantize}
        pipeline = load_pipeline(args.checkpoint, dtype=jnp.float32, **how)
        sampler = (with_other_sound if args.other_sound else make_sampler)(args, pipeline)
        rate = pipeline.config.vocoder.sample_rate
        layout = pipeline.config.layout(args.layout, WORLD.frame_rate)
        clips = sample_all(args, sampler, captions, console)
    (args.output / "captions.txt").write_text("".join(f"{text}\n" for text in captions))
    results: list[MeasuredClip] = []
    for number, (frames, waveform) in enumerate(clips):
        options = {"scene": draw_scene(seeds[number], WORLD), "layout": layout}
        results.append(
            measure_clip(frames, WORLD.frame_rate, waveform, rate, seconds=args.every, **options)
        )
        if number < args.show:
            path, shown = args.output / f"{number:02d}.mp4", marks(results[-1].observation)
            write_clip(path, frames, waveform, WORLD.frame_rate, rate, shown)
    content = {
        "arguments": {k: v for k, v in vars(args).items() if k != "output"},
        "all": pool([result.total for result in results]).scalars(),
        "stretches": [
            pool(same).scalars() for same in zip(*(r.windows for r in results), strict=True)
        ],
        "clips": [result.total.scalars() for result in results],
    }
    if len(results) > 1:
        real = real_features(len(results), args.balls, frames.shape[0])
        distance = frechet_distance(real, [result.features for result in results])
        content["all"]["frechet_distance"] = distance
    if sampler and not args.no_speed:
        content["speed"] = measure_speed(args, sampler, captions[0])
    (args.output / "measures.json").write_text(json.dumps(content, indent=1) + "\n")
    columns = {f"{i * args.every:g} s": row for i, row in enumerate(content["stretches"])}
    columns["all"] = content["all"] | content.get("speed", {})
    Console(width=40 + 10 * len(columns)).print(make_table(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
