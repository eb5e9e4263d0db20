"""Samples ODE trajectories for stage II, from the guided teacher or from a generator of your own.

    python -m launch.ode_pairs --text features/captions --checkpoint checkpoints/ltx2 \\
        --output pairs/captions

    python -m launch.ode_pairs --text features/captions --checkpoint checkpoints/ltx2 \\
        --generator outputs/teacher --autoregressive --layout prefix --cfg-video 3 --cfg-audio 5 \\
        --output pairs/autoregressive

`--text` is what launch.encode_prompts wrote. `--generator` is the folder of a training run or a
converted checkpoint; it is not guided unless told to. Ctrl-C, a kill or a crash loses at most the
shards being written: the same command continues, and the files are then the same, byte by byte, as
those of a run without interruption (on the same hardware, with the same batch size). With
--distributed every process takes its share of the shards and writes to the same folder.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from launch import options, shard_job
from launch.shard_job import ShardProgress
from omniforcing_jax import (
    AVLatents,
    BlockLayout,
    ClipGeometry,
    RolloutConfig,
    SampleConfig,
    SamplingRecipe,
    Transformer,
    programs,
)
from omniforcing_jax.blocks import LAYOUT_NAMES
from omniforcing_jax.data import shards
from omniforcing_jax.data.ode_pairs import ODE_PAIRS, ODEPairsManifest, ODEPairsWriter, Pair
from omniforcing_jax.data.text_dataset import TextDataset, open_text_dataset, own_tokens
from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import outputs
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import find_mode
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.sampling.trajectories import check_autoregressive, schedule_indices
from omniforcing_jax.scaling import flops
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.training.mixture import ConditionMixture, GivenInput
from omniforcing_jax.training.ode_pair_sampler import Recipe, TrajectorySampler
from omniforcing_jax.training.previews import ClipDecoder
from omniforcing_jax.training.source_model import SourceModel
from omniforcing_jax.types import DTYPES

NOT_KNOWN_YET = ("generator",)  # field of the manifest that needs the weights


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.ode_pairs", __doc__)
    add = parser.add_argument
    add("--text", required=True, help="folder written by launch.encode_prompts")
    add("--checkpoint", required=True, help="converted LTX-2: teacher, connectors and decoders")
    add("--output", required=True, help="folder for the trajectories, new or to be continued")
    add("--generator", metavar="FOLDER", help="sample this run or checkpoint instead")
    add("--weights", choices=("params", "ema"), help="of a run (default ema)")
    add("--autoregressive", action="store_true", help="the generator is block-causal")
    add("--layout", choices=LAYOUT_NAMES, help="blocks of the student; default: the generator's")
    options.add_cache(parser)
    add("--frames", type=int, help="of a clip, 8k + 1 (default: as trained, else 121)")
    options.add_size(parser)
    add("--steps", type=int, help="of the schedule (default 40; of a distilled LTX-2 its own 8)")
    add(
        "--timesteps", type=float, nargs="+",
        help="of the stored states, besides the clean one, snapped to the schedule: those of the "
        "student (default: those of the generator, else 1000 909 725 421)",
    )  # fmt: skip
    options.add_guidance(parser)
    add(
        "--conditions", nargs="+", metavar="MODE=SHARE",
        help="of clips of which parts are given, such as t2av=0.5 i2av=0.5: those of another "
        "sample of the same prompt; needs a layout",
    )  # fmt: skip
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=1, help="trajectories per prompt (default 1)")
    add("--batch-size", type=int, help="clips per step of one process (default: one per device)")
    add("--clips-per-shard", type=int, default=8, help="of a file; see above (default 8)")
    add("--previews", type=int, default=4, metavar="N", help="decode the first N clips (default 4)")
    add("--plan", action="store_true", help="say what it would take, and stop")
    options.add_dtype(parser)
    options.add_attention(parser)
    options.add_verify(parser)
    options.add_distributed(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class PairsJob:
    """A checked command line: everything that can be wrong has been looked at.

    Attributes:
      source: the model that is sampled.
      recipe: how it is sampled.
      batch_size: of this process.
      manifest: of the dataset, but for the generator's fingerprint, which needs the weights.
      notes: what is otherwise than one might think, a line each.
    """

    source: SourceModel
    recipe: Recipe
    batch_size: int
    manifest: ODEPairsManifest
    notes: list[str]


def check_arguments(args: argparse.Namespace, text: TextDataset) -> PairsJob:
    """Checks all options against checkpoint, generator and text before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
      OSError: a file that cannot be read.
    """
    source = SourceModel.find(args.checkpoint, args.generator, args.weights)
    source.check_text(text.manifest, args.text)
    trained = source.config.trained
    changed = options.use_trained(args, trained)
    if trained.text_length not in (None, text.manifest.text_length):
        changed.append(f"prompts of {text.manifest.text_length} tokens, not {trained.text_length}")
    notes = options.list_deviations(changed)
    args.frames = trained.filled().frames if args.frames is None else args.frames
    # LTX-2's own guidance for the teacher, and a distilled LTX-2 as it was made to be sampled; a
    # generator of ours has been distilled from a guided teacher
    distilled = trained.stage == "distilled"
    recipe = source.config.recipe(args.steps)
    if not distilled:
        guidance = recipe.guidance if args.generator is None else NO_GUIDANCE
        recipe = SamplingRecipe.of_steps(args.steps or flow.SCHEDULE_STEPS, guidance)
        args.timesteps = args.timesteps or trained.timesteps
    args.timesteps = args.timesteps or flow.STUDENT_TIMESTEPS
    if recipe.ancestral:
        notes.append(
            "sampled without the fresh noise of its own ancestral steps: pairs are of ODEs"
        )
    guidance = options.change_guidance(args, recipe.guidance)
    recipe = dataclasses.replace(recipe, guidance=guidance, ancestral=False)
    sampling = SampleConfig.for_clip(
        frames=args.frames,
        height=args.height,
        width=args.width,
        frame_rate=args.fps,
        recipe=recipe,
        spatial_compression=source.config.video_vae.spatial_compression,
    )
    source.check_latents(sampling.clip)
    rollout, num_blocks = plan_blocks(args, source, sampling)
    if rollout is None:
        sampling.check_model(Transformer(source.config.transformer))
    else:
        check_autoregressive(rollout, sampling.guidance)
    given = plan_conditions(args, source, sampling)
    sigmas = flow.student_sigmas(args.timesteps, recipe.sigmas)
    devices = len(jax.local_devices())
    batch_size = devices if args.batch_size is None else args.batch_size
    if batch_size < 1 or batch_size % devices:
        raise ValueError(
            f"--batch-size must be a positive multiple of the {devices} devices, not {batch_size}"
        )
    dtype = DTYPES[options.dtype_name(args)]
    model, clip, share = source.config.transformer, sampling.clip, batch_size // devices
    tokens = clip.video_tokens * model.video_dim + clip.audio_frames * model.audio_dim
    if rollout is not None:
        tokens = 0
        sizes = {"batch": share, "patches": rollout.patches, "dtype": dtype}
        check_memory("the cache", cache_bytes(rollout.cache, model, **sizes))
    pixels = clip.video_tokens * model.video_channels + clip.audio_frames * model.audio_channels
    # the stored states and velocities, in float32, and what goes through the layers
    numbers = 2 * len(args.timesteps) * 4 * pixels + jnp.dtype(dtype).itemsize * tokens
    check_memory("a batch of clips", share * numbers)
    if args.previews < 0:
        raise ValueError(f"--previews must be 0 or more, not {args.previews}")
    if args.previews:
        source.config.check_complete()
    return PairsJob(
        source=source,
        recipe=Recipe(
            sampling,
            schedule_indices(sampling.sigmas, sigmas),
            args.seed,
            rollout,
            num_blocks,
            given,
        ),
        batch_size=batch_size,
        manifest=make_manifest(args, text, source, sampling, rollout, sigmas.tolist(), given),
        notes=notes,
    )


def plan_conditions(
    args: argparse.Namespace, source: SourceModel, sampling: SampleConfig
) -> GivenInput | None:
    """The mixture of --conditions; None without it."""
    if not args.conditions:
        return None
    name = args.layout or source.config.trained.layout
    if name is None:
        raise ValueError(f"--conditions needs --layout {' or '.join(LAYOUT_NAMES)}")
    shares = {"t2av": 0.0}
    for item in args.conditions:
        mode, _, share = item.partition("=")
        find_mode(mode)
        try:
            shares[mode] = float(share)
        except ValueError:
            raise ValueError(f"--conditions: {item!r} is not MODE=SHARE") from None
    layout = source.config.layout(name, args.fps)
    return GivenInput(ConditionMixture(**shares), sampling.clip, layout)


def plan_blocks(
    args: argparse.Namespace, source: SourceModel, sampling: SampleConfig
) -> tuple[RolloutConfig | None, int | None]:
    """How an autoregressive generator is rolled out; a layout that is given must fit the clip."""
    if args.autoregressive and args.generator is None:
        raise ValueError(
            "--autoregressive needs --generator: LTX-2 itself attends to the whole clip at once"
        )
    config = source.config
    trained = config.trained
    if trained.causal and not args.autoregressive:
        raise ValueError(
            f"{source.folder} is block-causal (layout {trained.layout!r}): add --autoregressive"
        )
    name = args.layout or trained.layout
    if name is None and args.autoregressive:
        raise ValueError(
            f"{source.folder} does not say how it cuts a clip into blocks: give --layout "
            f"{' or '.join(LAYOUT_NAMES)}"
        )
    if name is None:
        return None, None
    layout = config.layout(name, args.fps)
    num_blocks = blocks_in_clip(layout, sampling.clip, args.frames)
    if not args.autoregressive:
        return None, None
    rollout = RolloutConfig(
        cache=config.cache(layout, args.window, args.anchors, args.positions),
        sigmas=sampling.sigmas,
        height=sampling.clip.height,
        width=sampling.clip.width,
        context_noise=trained.context_noise,
    )
    return rollout, num_blocks


def blocks_in_clip(layout: BlockLayout, clip: ClipGeometry, frames: int) -> int:
    """Blocks of a clip of `frames` pixel frames.

    Raises:
      ValueError: it is not a whole number of blocks; names the nearest lengths that are.
    """
    more = max(clip.video_frames - layout.first_video_frames, 0)
    num_blocks = 1 + more // layout.video_frames
    if layout.num_video_frames(num_blocks) != clip.video_frames:
        nearest = [layout.pixel_frames(num_blocks), layout.pixel_frames(num_blocks + 1)]
        raise ValueError(
            f"--frames {frames} is not a whole number of blocks of layout {layout.name!r}; "
            f"nearest: {nearest[0]} or {nearest[1]}"
        )
    if layout.num_audio_frames(num_blocks) != clip.audio_frames:
        raise ValueError(
            f"{frames} frames at {clip.frame_rate:g} per second last for {clip.audio_frames} audio "
            f"latents, but {num_blocks} blocks of layout {layout.name!r} have "
            f"{layout.num_audio_frames(num_blocks)}; use another --fps, 24 for instance"
        )
    return num_blocks


def make_manifest(
    args: argparse.Namespace,
    text: TextDataset,
    source: SourceModel,
    sampling: SampleConfig,
    rollout: RolloutConfig | None,
    sigmas: list[float],
    given: GivenInput | None,
) -> ODEPairsManifest:
    """What the dataset will be, but for the generator's fingerprint: no weights are read."""
    content = json.dumps(dataclasses.asdict(text.manifest), sort_keys=True)
    autoregression = None
    if rollout is not None:
        cache = rollout.cache
        autoregression = {
            "layout": cache.layout.name,
            "window": cache.window,
            "anchor_blocks": cache.anchors,
            "positions": cache.positions,
        }
    config = source.config.transformer
    return ODEPairsManifest(
        generator="",
        text=hashlib.sha256(content.encode()).hexdigest()[:16],
        model_version=source.config.model_version,
        compute_dtype=options.dtype_name(args),
        guidance={k: dataclasses.asdict(g) for k, g in sampling.guidance._asdict().items()},
        autoregression=autoregression,
        schedule=sampling.sigmas,
        sigmas=tuple(sigmas),
        frames=args.frames,
        resolution=(args.height, args.width),
        frame_rate=args.fps,
        video_frames=sampling.clip.video_frames,
        audio_frames=sampling.clip.audio_frames,
        height=sampling.clip.height,
        width=sampling.clip.width,
        video_channels=config.video_channels,
        audio_channels=config.audio_channels,
        text_length=text.manifest.text_length,
        video_dim=text.manifest.video_dim,
        audio_dim=text.manifest.audio_dim,
        shared_features=text.manifest.shared_features,
        negative_prompt=text.manifest.negative_prompt,
        seed=args.seed,
        num_prompts=len(text),
        repeats=args.repeats,
        clips_per_shard=args.clips_per_shard,
        conditions=None if given is None else dataclasses.asdict(given.mixture),
    )


def clip_cost(job: PairsJob) -> tuple[int, int]:
    """Forward passes and FLOPs of one clip."""
    config, length = job.source.config.transformer, job.manifest.text_length
    recipe, sampling = job.recipe, job.recipe.sampling
    passes, steps = sampling.guidance.passes(), len(sampling.sigmas) - 1
    if recipe.rollout is not None:
        calls = recipe.num_blocks * (steps + 1)  # the last one writes the history
        blocks = range(recipe.num_blocks)
        work = sum(flops.block_flops(config, recipe.rollout, block, length) for block in blocks)
    else:
        calls = steps
        audio = sampling.clip.audio_frames + config.num_audio_sinks
        work = steps * flops.forward_flops(
            config,
            video_tokens=sampling.clip.video_tokens,
            audio_tokens=audio,
            video_keys=sampling.clip.video_tokens,
            audio_keys=audio,
            text_tokens=length,
        )
    if recipe.given is not None:  # what is given is sampled, too
        calls, work = 2 * calls, 2 * work
    texts = len(passes) * calls if config.text_adaln else 1 + ("uncond" in passes)
    return len(passes) * calls, len(passes) * work + texts * flops.text_flops(config, length)


def describe(
    job: PairsJob, text: TextDataset, folder: str, print_line: Callable[[str], None]
) -> None:
    """Prints what the run makes and what it takes."""
    m, sampling, blocks = job.manifest, job.recipe.sampling, job.recipe.num_blocks
    forwards, work = clip_cost(job)
    files = pathlib.Path(folder).glob("*.array_record-*")
    text_bytes = sum(path.stat().st_size for path in files) / len(text)
    size = m.clip_bytes + text_bytes
    passes = ", ".join(sampling.guidance.passes())
    how = "at once" if blocks is None else f"in {blocks} blocks"
    for line in (
        *job.notes,
        f"{m.num_clips} clips ({m.num_prompts} prompts x {m.repeats}), {m.num_shards} shards",
        f"each {m.frames} frames of {m.resolution[1]}x{m.resolution[0]} with sound, "
        f"sampled {how} in {len(sampling.sigmas) - 1} steps of {passes}",
        f"stored at sigma {', '.join(f'{s:.4g}' for s in m.sigmas)}",
        f"{size / 1e6:.3g} MB per clip, {size * m.num_clips / 1e9:.3g} GB before compression",
        f"{forwards} forward passes and {work / 1e12:.3g} TFLOP per clip, "
        f"{work * m.num_clips / 1e15:.4g} PFLOP in all",
    ):
        print_line(line)


def write_preview(
    folder: pathlib.Path, decoder: ClipDecoder, clip: int, states: dict[str, np.ndarray]
) -> None:
    """Decodes the last of the states [S, T, C] of a clip, unless that was done already."""
    path = folder / f"clip_{clip:05d}.mp4"
    if not path.with_suffix(".png").exists():  # which is written last
        folder.mkdir(parents=True, exist_ok=True)
        clean = {name: jnp.asarray(x[-1:], jnp.float32) for name, x in states.items()}
        decoder.write(path, AVLatents(**clean))


def sample_pairs(
    sampler: TrajectorySampler,
    clips: range,
    batch_size: int,
    preview: Callable[[int, dict[str, np.ndarray]], None],
    on_done: Callable[[int], None],
) -> Iterator[Pair]:
    """Trajectories of some clips, in batches; the last one is filled up with its last clip.

    Args:
      preview: called with number and states of each clip.
      on_done: called with the number of clips of each batch.

    Raises:
      FloatingPointError: the model produced values that are not finite.
    """
    for start in range(clips.start, clips.stop, batch_size):
        numbers = range(start, min(start + batch_size, clips.stop))
        filler = [numbers[-1]] * (batch_size - len(numbers))
        pairs = sampler([*numbers, *filler])[: len(numbers)]
        for clip, pair in zip(numbers, pairs, strict=True):
            preview(clip, pair.states)
            yield pair
        on_done(len(numbers))


def run(args: argparse.Namespace, progress: ShardProgress) -> None:
    """Checks, samples and writes."""
    outputs.check_apart(args.output, [args.text, args.checkpoint, args.generator])
    text = open_text_dataset(args.text)
    job = check_arguments(args, text)
    print_line = progress.console.print
    describe(job, text, args.text, print_line)
    if args.plan:
        return
    shards.check_folder(ODE_PAIRS, args.output, job.manifest, ignore=NOT_KNOWN_YET)
    dtype, devices = DTYPES[job.manifest.compute_dtype], jax.local_devices()
    print_line(
        f"loading {job.source.folder} as {dtype.__name__} on {len(devices)} x "
        f"{devices[0].device_kind}"
    )
    sampler = TrajectorySampler(
        job.source,
        job.recipe,
        text,
        dtype=dtype,
        implementation=args.attention,
        mesh=shard_job.local_mesh(),
        verify=args.verify,
    )
    manifest = dataclasses.replace(job.manifest, generator=sampler.fingerprint)
    writer = ODEPairsWriter(args.output, manifest)
    if writer.complete:
        print_line(f"{args.output} is complete already")
        return
    decoder = ClipDecoder(args.checkpoint, job.source.config, job.recipe.sampling.clip, dtype)

    def preview(clip: int, states: dict[str, np.ndarray]) -> None:
        if clip < args.previews:
            write_preview(writer.folder / "previews", decoder, clip, states)

    write_negative = functools.partial(
        writer.write_negative_arrays, own_tokens(text.negative, text.manifest)
    )
    with shard_job.missing_shards(writer, write_negative, progress) as missing:
        for shard, clips in missing.items():
            pairs = sample_pairs(sampler, clips, job.batch_size, preview, progress.records_done)
            writer.write_shard(shard, pairs)
            progress.shard_done()


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return shard_job.main(run, parse_arguments(argv), "sampling", "clips")


if __name__ == "__main__":
    multihost.end(main())
