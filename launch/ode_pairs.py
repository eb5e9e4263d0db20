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
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from launch.shard_job import (
    Report,
    barrier,
    end,
    join,
    local_mesh,
    share,
    termination_interrupts,
)
from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout
from omniforcing_jax.data import shards
from omniforcing_jax.data.ode_pairs import ODE_PAIRS, Manifest, ODEPairsWriter, Pair
from omniforcing_jax.data.text_dataset import TEXT_ARRAYS, TextDataset, open_text_dataset
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.ops.attention import IMPLEMENTATIONS
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import NO_GUIDANCE, AVGuidance, default_guidance
from omniforcing_jax.sampling.kv_cache import POSITIONS
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import SampleConfig
from omniforcing_jax.sampling.trajectories import check_autoregressive, schedule_indices
from omniforcing_jax.scaling import flops
from omniforcing_jax.training.ode_pair_sampler import Generator, Previews, Recipe, TrajectorySampler

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
NOT_KNOWN_YET = ("generator",)  # field of the manifest that needs the weights


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.ode_pairs", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--text", required=True, help="folder written by launch.encode_prompts")
    add("--checkpoint", required=True, help="converted LTX-2: teacher, connectors and decoders")
    add("--output", required=True, help="folder for the trajectories, new or to be continued")
    add("--generator", metavar="FOLDER", help="sample this run or checkpoint instead")
    add("--weights", choices=("params", "ema"), help="of a run (default ema)")
    add("--autoregressive", action="store_true", help="the generator is block-causal")
    add("--layout", choices=LAYOUT_NAMES, help="blocks of the student; default: the generator's")
    add("--window", type=int, help="recent blocks in the cache (default: as trained, else 7)")
    add("--anchors", type=int, help="first blocks that are never evicted (default: as trained)")
    add("--positions", choices=POSITIONS, help="of cached blocks (default: as trained)")
    add("--frames", type=int, default=121, help="of a clip, 8k + 1 (default 121)")
    add("--height", type=int, default=512, help="pixels, a multiple of 32 (default 512)")
    add("--width", type=int, default=768, help="pixels, a multiple of 32 (default 768)")
    add("--fps", type=float, default=24.0, help="frames per second (default 24)")
    add("--steps", type=int, default=40, help="Euler steps (default 40)")
    add(
        "--timesteps", type=float, nargs="+", default=flow.STUDENT_TIMESTEPS,
        help="of the stored states, besides the clean one, snapped to the schedule: those of the "
        "student (default 1000 909 725 421)",
    )  # fmt: skip
    add("--cfg-video", type=float, help="guidance by the negative prompt, 1 is off (default 3)")
    add("--cfg-audio", type=float, help="the same for the sound (default 7)")
    add("--stg", type=float, help="spatio-temporal guidance, 0 is off (default 1)")
    add("--stg-block", type=int, nargs="+", help="blocks it perturbs (2.0: 29, 2.3: 28)")
    add("--modality", type=float, help="modality guidance, 1 is off (default 3)")
    add("--rescale", type=float, help="pull-back of the contrast, 0 to 1 (default 0.7)")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=1, help="trajectories per prompt (default 1)")
    add("--batch-size", type=int, help="clips per step of one process (default: one per device)")
    add("--clips-per-shard", type=int, default=8, help="of a file; see above (default 8)")
    add("--previews", type=int, default=4, metavar="N", help="decode the first N clips (default 4)")
    add("--plan", action="store_true", help="say what it would take, and stop")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on accelerators, else float32")
    add("--attention", choices=IMPLEMENTATIONS, default="auto", help="backend (default auto)")
    add("--distributed", action="store_true", help="one of several processes (TPU pod, Slurm, …)")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked command line: everything that can be wrong has been looked at.

    Attributes:
      generator: the model that is sampled.
      pipeline: the checkpoint's description, for its decoders.
      recipe: how it is sampled.
      batch_size: of this process.
      manifest: of the dataset, but for the generator's fingerprint, which needs the weights.
    """

    generator: Generator
    pipeline: PipelineConfig
    recipe: Recipe
    batch_size: int
    manifest: Manifest


def make_plan(args: argparse.Namespace, text: TextDataset) -> Plan:
    """Checks all options against checkpoint, generator and text before any weight is read.

    Raises:
      ValueError: what is wrong, and what would be right.
      OSError: a file that cannot be read.
    """
    pipeline = PipelineConfig.from_checkpoint(args.checkpoint)
    generator = Generator.find(args.checkpoint, args.generator, args.weights)
    generator.check_text(text.manifest, args.text)
    clip = SampleConfig.for_clip(
        frames=args.frames,
        height=args.height,
        width=args.width,
        frame_rate=args.fps,
        num_steps=args.steps,
        guidance=choose_guidance(args, generator.model_version),
        spatial_compression=pipeline.video_vae.spatial_compression,
    )
    generator.check_latents(pipeline, clip)
    rollout, num_blocks = plan_blocks(args, generator, clip)
    if rollout is None:
        clip.check_model(Transformer(generator.transformer))
    else:
        check_autoregressive(rollout, clip.guidance)
    sigmas = flow.student_sigmas(args.timesteps, args.steps)
    devices = len(jax.local_devices())
    batch_size = devices if args.batch_size is None else args.batch_size
    if batch_size < 1 or batch_size % devices:
        raise ValueError(
            f"--batch-size must be a positive multiple of the {devices} devices, not {batch_size}"
        )
    if args.previews < 0:
        raise ValueError(f"--previews must be 0 or more, not {args.previews}")
    if args.previews:
        pipeline.check_complete()
    return Plan(
        generator=generator,
        pipeline=pipeline,
        recipe=Recipe(clip, schedule_indices(clip.sigmas, sigmas), args.seed, rollout, num_blocks),
        batch_size=batch_size,
        manifest=make_manifest(args, text, generator, clip, rollout, sigmas.tolist()),
    )


def choose_guidance(args: argparse.Namespace, model_version: str) -> AVGuidance:
    """The scales of the command line over the defaults: LTX-2's for the teacher, else none."""
    teacher = args.generator is None
    defaults = default_guidance(model_version) if teacher else NO_GUIDANCE
    return defaults.changed(
        cfg_video=args.cfg_video,
        cfg_audio=args.cfg_audio,
        stg=args.stg,
        modality=args.modality,
        rescale=args.rescale,
        stg_blocks=args.stg_block and tuple(args.stg_block),
    )


def plan_blocks(
    args: argparse.Namespace, generator: Generator, clip: SampleConfig
) -> tuple[RolloutConfig | None, int | None]:
    """How an autoregressive generator is rolled out; a layout that is given must fit the clip."""
    if args.autoregressive and args.generator is None:
        raise ValueError(
            "--autoregressive needs --generator: LTX-2 itself attends to the whole clip at once"
        )
    if generator.layout_name is not None and not args.autoregressive:
        raise ValueError(
            f"{generator.folder} is block-causal (layout {generator.layout_name!r}): add "
            "--autoregressive"
        )
    name = args.layout or generator.layout_name
    if name is None:
        if args.autoregressive:
            raise ValueError(
                f"{generator.folder} does not say how it cuts a clip into blocks: give --layout "
                f"{' or '.join(LAYOUT_NAMES)}"
            )
        return None, None
    layout = BlockLayout.from_name(name, frame_rate=args.fps)
    num_blocks = blocks_in_clip(layout, clip.clip, args.frames)
    if not args.autoregressive:
        return None, None
    rollout = RolloutConfig(
        cache=generator.trained_cache.config(layout, args.window, args.anchors, args.positions),
        sigmas=clip.sigmas,
        height=clip.clip.height,
        width=clip.clip.width,
        context_noise=generator.context_noise,
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
    generator: Generator,
    clip: SampleConfig,
    rollout: RolloutConfig | None,
    sigmas: list[float],
) -> Manifest:
    """What the dataset will be, but for the generator's fingerprint: no weights are read."""
    content = json.dumps(dataclasses.asdict(text.manifest), sort_keys=True)
    autoregression = None
    if rollout is not None:
        cache = rollout.cache
        autoregression = {
            "layout": cache.layout.name,
            "window": cache.window,
            "anchor_blocks": cache.anchor_blocks,
            "positions": cache.positions,
        }
    config = generator.transformer
    return Manifest(
        generator="",
        text=hashlib.sha256(content.encode()).hexdigest()[:16],
        model_version=generator.model_version,
        compute_dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        guidance={k: dataclasses.asdict(g) for k, g in clip.guidance._asdict().items()},
        autoregression=autoregression,
        schedule=clip.sigmas,
        sigmas=tuple(sigmas),
        frames=args.frames,
        resolution=(args.height, args.width),
        frame_rate=args.fps,
        video_frames=clip.clip.video_frames,
        audio_frames=clip.clip.audio_frames,
        height=clip.clip.height,
        width=clip.clip.width,
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
    )


def clip_cost(plan: Plan) -> tuple[int, int]:
    """Forward passes and FLOPs of one clip."""
    config, length = plan.generator.transformer, plan.manifest.text_length
    recipe, clip = plan.recipe, plan.recipe.clip
    passes, steps = clip.guidance.passes(), len(clip.sigmas) - 1
    if recipe.rollout is not None:
        calls = recipe.num_blocks * (steps + 1)  # the last one writes the history
        blocks = range(recipe.num_blocks)
        work = sum(flops.block_flops(config, recipe.rollout, block, length) for block in blocks)
    else:
        calls = steps
        audio = clip.clip.audio_frames + config.num_audio_sinks
        work = steps * flops.forward_flops(
            config,
            video_tokens=clip.clip.video_tokens,
            audio_tokens=audio,
            video_keys=clip.clip.video_tokens,
            audio_keys=audio,
            text_tokens=length,
        )
    texts = len(passes) * calls if config.text_adaln else 1 + ("uncond" in passes)
    return len(passes) * calls, len(passes) * work + texts * flops.text_flops(config, length)


def describe(plan: Plan, text: TextDataset, folder: str, console: Console) -> None:
    """Prints what the run makes and what it takes."""
    m, clip, blocks = plan.manifest, plan.recipe.clip, plan.recipe.num_blocks
    forwards, work = clip_cost(plan)
    files = pathlib.Path(folder).glob("*.array_record-*")
    text_bytes = sum(path.stat().st_size for path in files) / len(text)
    size = m.clip_bytes + text_bytes
    how = "at once" if blocks is None else f"in {blocks} blocks"
    for line in (
        f"{m.num_clips} clips ({m.num_prompts} prompts x {m.repeats}), {m.num_shards} shards",
        f"each {m.frames} frames of {m.resolution[1]}x{m.resolution[0]} with sound, "
        f"sampled {how} in {len(clip.sigmas) - 1} steps of {', '.join(clip.guidance.passes())}",
        f"stored at sigma {', '.join(f'{s:.4g}' for s in m.sigmas)}",
        f"{size / 1e6:.3g} MB per clip, {size * m.num_clips / 1e9:.3g} GB before compression",
        f"{forwards} forward passes and {work / 1e12:.3g} TFLOP per clip, "
        f"{work * m.num_clips / 1e15:.4g} PFLOP in all",
    ):
        console.print(line)


def sample_pairs(
    sampler: TrajectorySampler,
    clips: range,
    batch_size: int,
    previews: Previews,
    on_done: Callable[[int], None],
) -> Iterator[Pair]:
    """Trajectories of some clips, in batches; the last one is filled up with its last clip.

    Raises:
      FloatingPointError: the model produced values that are not finite.
    """
    for start in range(clips.start, clips.stop, batch_size):
        numbers = range(start, min(start + batch_size, clips.stop))
        filler = [numbers[-1]] * (batch_size - len(numbers))
        for clip, arrays in zip(numbers, sampler([*numbers, *filler])):
            previews.write(clip, arrays.states)
            prompt = sampler.text[clip % len(sampler.text)]
            features = own_tokens(prompt, sampler.text)
            yield Pair(prompt["prompt"], features, arrays.states, arrays.velocities)
        on_done(len(numbers))


def own_tokens(element: dict[str, Any], text: TextDataset) -> dict[str, np.ndarray]:
    """An element's features without the padding, by the names they are stored under."""
    names = ["video_features"] if text.manifest.shared_features else [*TEXT_ARRAYS]
    return {name: element[name][element["mask"]] for name in names}


def write(
    writer: ODEPairsWriter,
    sampler: TrajectorySampler,
    batch_size: int,
    previews: Previews,
    report: Report,
) -> None:
    """Samples and writes what is missing, this process's share of it."""
    main = jax.process_index() == 0
    if main:
        writer.begin()
    barrier("begin")
    if main and not writer.has_negative:
        writer.write_negative_arrays(own_tokens(sampler.text.negative, sampler.text))
    missing = {shard: writer.manifest.shard_range(shard) for shard in share(writer.missing())}
    start = time.perf_counter()
    with report.running(sum(map(len, missing.values()))) as on_done:
        for shard, clips in missing.items():
            pairs = sample_pairs(sampler, clips, batch_size, previews, on_done)
            writer.write_shard(shard, pairs)
            report.shard_done(start)
    barrier("shards")
    if main:
        writer.finish()
    barrier("finish")


def run(args: argparse.Namespace, report: Report) -> int:
    """Checks, samples and writes; returns the exit status."""
    text = open_text_dataset(args.text)
    plan = make_plan(args, text)
    console = report.console
    describe(plan, text, args.text, console)
    if args.plan:
        return 0
    shards.check_folder(ODE_PAIRS, args.output, plan.manifest, ignore=NOT_KNOWN_YET)
    dtype, devices = DTYPES[plan.manifest.compute_dtype], jax.local_devices()
    console.print(
        f"loading {plan.generator.folder} as {dtype.__name__} on {len(devices)} x "
        f"{devices[0].device_kind}"
    )
    sampler = TrajectorySampler(
        plan.generator,
        plan.recipe,
        text,
        dtype=dtype,
        implementation=args.attention,
        mesh=local_mesh(),
    )
    manifest = dataclasses.replace(plan.manifest, generator=sampler.fingerprint)
    writer = ODEPairsWriter(args.output, manifest)
    if writer.complete:
        console.print(f"{args.output} is complete already")
        return 0
    previews = Previews(
        writer.folder / "previews",
        args.previews,
        args.checkpoint,
        plan.pipeline,
        plan.recipe.clip,
        dtype,
    )
    start = time.perf_counter()
    write(writer, sampler, plan.batch_size, previews, report)
    size = sum(path.stat().st_size for path in writer.folder.iterdir() if path.is_file())
    console.print(
        f"{args.output}: {manifest.num_clips} clips in {manifest.num_shards} shards, "
        f"{size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    try:
        join(args.distributed)
        report = Report("sampling", "clips", quiet=jax.process_index() > 0)
        with termination_interrupts():
            return run(args, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"interrupted; what is complete is in {args.output}, and the same command continues",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    end(main())
