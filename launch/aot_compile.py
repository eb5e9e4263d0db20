"""Compiles the streaming step for hardware that is not here, and says what memory it needs.

    python -m launch.aot_compile --size full --target cpu
    python -m launch.aot_compile --size full --target v5p:2x2x1 --tensor 4      # needs libtpu

Nothing is allocated: weights, cache and text keys are shapes. For a TPU topology the compiler knows
the chips' memory and refuses what does not fit. `pip install libtpu` (the `tpu` extra) is enough.
"""

import argparse
import functools
import os
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from checkpoint_converters import synthetic
from omniforcing_jax import flow, kv_cache, partitioning, rollout
from omniforcing_jax.kv_cache import CacheConfig
from omniforcing_jax.models.transformer import Transformer, init_boxed_params
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.rollout import RolloutConfig


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m launch.aot_compile")
    add = parser.add_argument
    add("--size", choices=tuple(synthetic.SIZES), default="full")
    add("--version", choices=tuple(synthetic.VERSIONS), default="2.0")
    add("--target", default="cpu", help="cpu, or a TPU topology such as v5p:2x2x1 or v6e:2x2")
    add("--fsdp", type=int, default=1)
    add("--tensor", type=int, default=1)
    add("--height", type=int, default=512)
    add("--width", type=int, default=768)
    add("--layout", choices=("prefix", "merged"), default="prefix")
    add("--window", type=int, default=7)
    add("--text-tokens", type=int, default=1024)
    return parser.parse_args(argv)


def devices_of(target: str) -> list:
    """Devices to compile for: this machine's CPU, or those of a TPU topology.

    Raises:
      ValueError: the topology is unknown, or libtpu is not installed.
    """
    if target == "cpu":
        return jax.devices("cpu")[:1]
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(target, "tpu").devices
    except Exception as error:
        raise ValueError(
            f"no TPU topology {target!r} ({error}); install libtpu, and name one like v5p:2x2x1"
        ) from error


def compile_block_step(args: argparse.Namespace):
    """The compiled steady-state block step, and the seconds it took."""
    config = PipelineConfig.from_metadata(
        synthetic.metadata(args.size, args.version), synthetic.VERSIONS[args.version]
    )
    height, width = config.check_size(args.height, args.width)
    rollout_config = RolloutConfig(
        cache=CacheConfig(config.layout(args.layout), args.window),
        sigmas=tuple(float(s) for s in flow.student_sigmas()),
        height=height,
        width=width,
    )
    model = Transformer(config.transformer, jnp.bfloat16)
    devices = devices_of(args.target)
    mesh = partitioning.make_mesh(
        data=len(devices) // (args.fsdp * args.tensor),
        fsdp=args.fsdp,
        tensor=args.tensor,
        devices=devices,
    )
    boxed = jax.eval_shape(lambda k: init_boxed_params(model, k), jax.random.key(0))
    params = _abstract(nn.unbox(boxed), partitioning.shardings(boxed, mesh), jnp.bfloat16)
    cache = jax.eval_shape(lambda: rollout.new_cache(model, rollout_config, 1))
    cache = _abstract(cache, kv_cache.cache_sharding(cache, mesh))
    dims = config.transformer.text_dims
    contexts = [jax.ShapeDtypeStruct((1, args.text_tokens, d), jnp.bfloat16) for d in dims]
    encode = functools.partial(rollout.encode_prompt, model, levels=rollout_config.sigma_levels)
    text = jax.eval_shape(encode, params, *contexts)
    noise = jax.eval_shape(
        lambda k: rollout.block_noise(k, 1, rollout_config, model, 1, first=False),
        jax.random.key(0),
    )
    rope = rollout_config.rope(model)

    def step(params, cache, text, noise):
        return rollout.block_step(
            model, params, cache, text, rope, noise, rollout_config, first=False
        )

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=1).lower(params, cache, text, noise).compile()
    return compiled, time.perf_counter() - start


def _abstract(tree, sharding, dtype=None):
    def leaf(x, s):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s)

    return jax.tree.map(leaf, tree, sharding)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    try:
        compiled, seconds = compile_block_step(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memory = compiled.memory_analysis()
    gib = 2**30
    print(
        f"block step, {args.size} {args.version}, {args.width}x{args.height}, window "
        f"{args.window}, for {args.target} (fsdp {args.fsdp}, tensor {args.tensor}): "
        f"compiled in {seconds:.1f} s; per device "
        f"arguments {memory.argument_size_in_bytes / gib:.2f} GiB, "
        f"temporaries {memory.temp_size_in_bytes / gib:.2f} GiB, "
        f"peak {memory.peak_memory_in_bytes / gib:.2f} GiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
