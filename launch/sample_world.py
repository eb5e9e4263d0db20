"""Samples the pocket teacher for held-out captions of the world, and measures what it shows.

    python -m launch.sample_world --checkpoint outputs/pocket/ltx2 \\
        --text-encoder outputs/pocket/gemma --clips 16 --output outputs/pocket/teacher_samples

One prompt a time takes launch.sample_teacher; this is a set of them in one go, with the measures of
launch.measure for each and for all, and clips and contact sheets to look at.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from launch.measure import make_table
from omniforcing_jax.data.bounce import WorldConfig, draw_scene
from omniforcing_jax.data.bounce_dataset import clip_caption, split_seeds
from omniforcing_jax.guidance import NO_GUIDANCE
from omniforcing_jax.measures.observation import observe
from omniforcing_jax.measures.report import measure, pool
from omniforcing_jax.pipeline import decode_clip, load_pipeline
from omniforcing_jax.previews import write_clip
from omniforcing_jax.prompts import PromptEncoder
from omniforcing_jax.rollout import AVLatents
from omniforcing_jax.sampler import SampleConfig, sample


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.sample_world", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="converted pocket model")
    add("--text-encoder", required=True, help="its converted Gemma")
    add("--text-length", type=int, default=48, help="tokens per prompt (default 48)")
    add("--clips", type=int, default=16, help="captions of the test split (default 16)")
    add("--frames", type=int, default=49, help="of a clip, 8k + 1 (default 49)")
    add("--steps", type=int, default=40, help="denoising steps (default 40)")
    add("--cfg", type=float, default=2.0, help="guidance of both streams, 1 is off (default 2)")
    add("--batch-size", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, required=True, help="folder for clips and measures")
    return parser.parse_args(argv)


def sample_all(args, pipeline, config: SampleConfig, captions: list[str]) -> AVLatents:
    """Latents [clips, T, C] of all captions."""
    encoder = PromptEncoder(
        args.text_encoder,
        args.checkpoint,
        cache=None,
        dtype=jnp.float32,
        length=args.text_length,
        keep=True,
    )
    *contexts, empty = encoder.encode([*captions, ""])
    negative = None if args.cfg == 1 else empty
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(args.seed), jnp.arange(len(captions))
    )
    parts = []
    for start in track(range(0, len(captions), args.batch_size), "sampling", transient=True):
        stop = min(start + args.batch_size, len(captions))
        prompt = jax.tree.map(lambda *x: jnp.concatenate(x), *contexts[start:stop])
        model, params = pipeline.transformer(), pipeline.params["transformer"]
        parts.append(sample(model, params, prompt, negative, keys[start:stop], config))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    world = WorldConfig()
    try:
        seeds = list(split_seeds("test", args.clips))
        pipeline = load_pipeline(args.checkpoint, dtype=jnp.float32)
        config = SampleConfig.for_clip(
            frames=args.frames,
            height=world.height,
            width=world.width,
            num_steps=args.steps,
            guidance=NO_GUIDANCE.changed(cfg_video=args.cfg, cfg_audio=args.cfg),
            spatial_compression=pipeline.config.video_vae.spatial_compression,
        )
        captions = [clip_caption(seed, world) for seed in seeds]
        latents = sample_all(args, pipeline, config, captions)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    size = (config.video_frames, config.height, config.width)
    columns, parts = {}, []
    for i, seed in enumerate(seeds):
        one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), latents)
        frames, waveform = decode_clip(pipeline.config, pipeline.params, one, size, jnp.float32)
        rate = pipeline.config.vocoder.sample_rate
        write_clip(args.output / f"{i:02d}.mp4", frames, waveform, world.frame_rate, rate)
        seen = observe(frames, world.frame_rate, waveform, rate)
        parts.append(measure(seen, scene=draw_scene(seed, world)))
        columns[f"{i:02d}"] = parts[-1].scalars()
    columns["all"] = pool(parts).scalars()
    (args.output / "captions.txt").write_text("".join(f"{text}\n" for text in captions))
    (args.output / "measures.json").write_text(json.dumps(columns, indent=1) + "\n")
    Console(width=100).print(make_table({"all": columns["all"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
