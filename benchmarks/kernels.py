"""Where the time of a block goes on the device: its attention, its kernels, and what they move.

    python -m benchmarks.kernels --size full            # options as of benchmarks.stream
    python -m benchmarks.kernels --height 64 --width 64 --text-tokens 32

Random weights, a full cache. Prints three tables, each as soon as it is known:

* attention, as the block step calls it: backend, error relative to float32, and time;
* what the block step reads and writes by the compiler's text (`launch.aot --traffic` of the program
  that runs here), with the largest movements by their place in the model;
* a profile of three blocks: the thirty kernels that take most of the device's time, with shares.
"""

import collections
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import stream
from omniforcing_jax import programs
from omniforcing_jax.ops import attention as ops
from omniforcing_jax.sampling import student
from omniforcing_jax.scaling import traffic
from omniforcing_jax.scaling.memory import peak_bytes
from omniforcing_jax.streaming.block_programs import generate_block

BLOCKS, KERNELS = 3, 30


def seconds_of(run: Callable[[], jax.Array], repeats: int = 10) -> float:
    """Median wall seconds of a call, which has been compiled."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def attention_table(pipeline, args, config) -> list[str]:
    """Rows of the attentions of a block behind a full cache, in the pipeline's dtype."""
    c, layout = pipeline.config.transformer, config.cache.layout
    slots = config.cache.capacity + 1
    video, audio = layout.video_frames * config.patches, layout.audio_frames
    held = layout.num_video_frames(slots) * config.patches, layout.num_audio_frames(slots)
    wide, narrow = (c.video_heads, c.video_head_dim), (c.audio_heads, c.audio_head_dim)
    calls = {
        "video": (video, held[0], *wide),
        "audio": (audio, held[1] + c.num_audio_sinks, *narrow),
        "a2v": (video, held[1] + c.num_audio_sinks, *narrow),
        "v2a": (audio, held[0], *narrow),
        "video text": (video, args.text_tokens, *wide),
        "audio text": (audio, args.text_tokens, *narrow),
    }
    rows = ["| attention | queries x keys, heads x dim | backend | relative error | ms |"]
    rows.append("|---|---|---|---|---|")
    for name, (q_len, kv_len, heads, dim) in calls.items():
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((1, length, heads, dim) for length in (q_len, kv_len, kv_len))
        exact = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
        inputs = [x.astype(pipeline.dtype) for x in exact]
        run = jax.jit(functools.partial(ops.attention, implementation=args.attention))
        reference = jax.jit(functools.partial(ops.attention, implementation="chunked"))
        expected = reference(*(x.astype(jnp.float32) for x in inputs))
        error = jnp.linalg.norm(run(*inputs) - expected) / jnp.linalg.norm(expected)
        backend = args.attention
        if backend == "auto":
            backend = ops.choose(*inputs[:2])
        took = 1e3 * seconds_of(functools.partial(run, *inputs))
        size = f"{q_len} x {kv_len}, {heads} x {dim}"
        rows.append(f"| {name} | {size} | {backend} | {float(error):.1e} | {took:.3f} |")
    return rows


def kernel_seconds(profile: jax.profiler.ProfileData) -> dict[str, float]:
    """Seconds of each kernel in a profile, the longest first; on a CPU of each HLO instruction."""
    planes = list(profile.planes)
    devices = [p for p in planes if p.name.startswith(("/device:GPU", "/device:TPU"))]
    found: dict[str, float] = collections.defaultdict(float)
    for plane in devices or planes:
        lines = list(plane.lines)
        # TPUs list steps and modules beside instructions, GPUs have a line for each stream
        ops_only = [line for line in lines if line.name == "XLA Ops"]
        for line in ops_only or lines:
            for event in line.events:
                if devices or "hlo_op" in {name for name, _ in event.stats}:
                    found[event.name] += event.duration_ns / 1e9
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def profile_table(run: Callable[[], object]) -> list[str]:
    """Rows of the kernels that take the most time of a block; `run` makes one."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(BLOCKS):
                jax.block_until_ready(run())
            wall = (time.perf_counter() - start) / BLOCKS
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        kernels = kernel_seconds(jax.profiler.ProfileData.from_file(str(file)))
    total = sum(kernels.values())
    rows = [
        f"A block: {wall:.4f} s of wall time, {total / BLOCKS:.4f} s in {len(kernels)} kernels",
        "",
        "| kernel | ms per block | share |",
        "|---|---|---|",
    ]
    for name, seconds in list(kernels.items())[:KERNELS]:
        rows.append(f"| `{name[:90]}` | {1e3 * seconds / BLOCKS:.3f} | {seconds / total:.1%} |")
    return rows


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = stream.parse_arguments(argv)
    pipeline = stream.random_pipeline(args)
    config = stream.rollout_config(args, pipeline.config)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}\n", flush=True)
    print("\n".join(attention_table(pipeline, args, config)), "\n", flush=True)
    model, params = pipeline.transformer(args.attention), pipeline.params["transformer"]
    held = config.cache.capacity + 1
    cache = student.new_cache(model, config, 1, params).replace(num_blocks=jnp.int32(held))
    text = stream.text_kv(pipeline, args, config, "kernels")
    rope = config.rope(model, None if args.positions == "relative" else held + 2 * BLOCKS)
    how = {"config": config, "batch": 1, "first": False, "full": True}
    start = time.perf_counter()
    step = generate_block.lower(model, params, cache, text, rope, jax.random.key(0), **how)
    step = step.compile()
    print(f"The block step: {time.perf_counter() - start:.1f} s to compile\n")
    kernels = traffic.read(step.as_text(), open_loops=config.num_steps)
    report = {"bytes": traffic.totals(kernels), "largest": traffic.largest(kernels), "seconds": {}}
    print(traffic.describe(report), "\n", flush=True)

    def run():
        nonlocal cache
        latents, cache = step(params, cache, text, rope, jax.random.key(0))
        return latents

    print("\n".join(profile_table(run)), flush=True)
    peak, what = peak_bytes(jax.devices()[0])
    print(f"\nPeak memory of the {what}: {peak / 2**30:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
