"""Streams over meshes of CPU devices, held against one on one device; run as a program.

python -m tests.streaming.mesh_sessions CHECKPOINT steered none 2 4

The last arguments are the precision and the numbers of devices; "steered": a change of the prompt
writes the cache anew, and a snapshot is taken and restored; "by_heads": that, with weights and
cache as they lie on a TPU. Prints for each number the largest differences of pictures and sound,
what was compiled in its blocks, and the messages of a block.
"""

import collections
import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from omniforcing_jax.distributed.partitioning import make_mesh  # noqa: E402
from omniforcing_jax.pipeline import load_pipeline  # noqa: E402
from omniforcing_jax.sampling import weights  # noqa: E402
from omniforcing_jax.sampling.kv_cache import CacheConfig  # noqa: E402
from omniforcing_jax.sampling.student import RolloutConfig  # noqa: E402
from omniforcing_jax.scaling import collectives  # noqa: E402
from omniforcing_jax.streaming.block_programs import generate_block, on_mesh  # noqa: E402
from omniforcing_jax.training.metrics import num_compilations  # noqa: E402

BLOCKS = 5  # two more than the window holds


def contexts(dims, seed: int):
    keys = jax.random.split(jax.random.key(seed))
    return tuple(jax.random.normal(k, (1, 16, d)) for k, d in zip(keys, dims, strict=True))


def messages(session) -> dict[str, int]:
    """How many of each kind the program of a later block has, its loop of passes counted once."""
    now, maker = session._steering, session._blocks
    arguments, options = maker.arguments(now, maker.cache, None, first=False)
    with on_mesh(session._device):
        text = generate_block.lower(*arguments, **options).compile().as_text()
    found = collections.Counter()
    for message in collectives.read(text, open_loops=1):
        found[message.kind] += round(message.count)
    return found


def held(x: jax.Array) -> jax.Array:
    """What the last device has of an array."""
    return x.addressable_shards[-1].data


def main(checkpoint: str, how: str, quantize: str, *numbers: str) -> None:
    frames, sound, report, steered = {}, {}, {}, how != "plain"
    if how == "by_heads":
        weights.laid_out_for = lambda platform, config: config
    for ways in map(int, ("1", *numbers)):
        mesh = make_mesh(tensor=ways, devices=jax.devices()[:ways]) if ways > 1 else None
        pipeline = load_pipeline(checkpoint, dtype=jnp.float32, quantize=quantize, mesh=mesh)
        layout, dims = pipeline.config.layout("prefix", 24.0), pipeline.config.transformer.text_dims
        config = RolloutConfig(
            CacheConfig(layout, window=2), (1.0, 0.7, 0.0), 2, 2, recache=steered
        )
        session = pipeline.session(
            config, contexts(dims, 0), seed=3, decode_mode="causal", steerable=steered
        )
        session.warm_up()
        before, chunks = num_compilations(), []
        for block in range(BLOCKS):
            if steered and block == 4:  # after the ring has turned
                session.set_prompt(contexts(dims, 1))
            chunks.append(session.step())
            if steered and block == 3:
                session.restore(session.snapshot())
        compiled = num_compilations() - before
        chunks.append(session.finish())
        frames[ways] = np.concatenate([c.frames for c in chunks], axis=1).astype(int)
        sound[ways] = np.concatenate([c.waveform for c in chunks], axis=1)
        if ways == 1:
            continue
        layers = jax.tree.leaves(pipeline.params["transformer"]["blocks"])
        report[ways] = {
            "pictures": int(np.abs(frames[ways] - frames[1]).max()),
            "sound": float(np.abs(sound[ways] - sound[1]).max()),
            "range": int(np.ptp(frames[1])),
            "compiled": compiled,
            "heads": held(session._blocks.cache.buffers[0].video.k).shape[-2],
            "weights": sum(held(x).nbytes for x in layers) / sum(x.nbytes for x in layers),
            "messages": messages(session),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
