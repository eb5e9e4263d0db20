"""Prints what the gradient of a clip's loss sends between eight devices; run as a program.

python -m tests.scaling.sharded_program fsdp=2 sequence=2 tensor=2
"""

import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402

from omniforcing_jax.distributed import partitioning  # noqa: E402
from omniforcing_jax.geometry import ClipGeometry  # noqa: E402
from omniforcing_jax.models.transformer.config import tiny  # noqa: E402
from omniforcing_jax.models.transformer.model import Transformer  # noqa: E402
from omniforcing_jax.sampling.whole_clip import clip_velocity  # noqa: E402
from omniforcing_jax.scaling import collectives  # noqa: E402
from omniforcing_jax.training.assembly import abstract_params  # noqa: E402
from omniforcing_jax.types import AVLatents  # noqa: E402

LAYERS, BATCH, TEXT = 6, 8, 16
CLIP = ClipGeometry(4, 14, 4, 6)  # 96 video tokens, 14 of the audio
CONFIG = tiny(num_layers=LAYERS, video_heads=4, audio_heads=4, video_context_dim=64,
              audio_context_dim=32)  # fmt: skip


def main(axes: dict[str, int]) -> dict:
    """Sizes of weights, and all messages with their counts."""
    mesh = partitioning.make_mesh(**axes)
    model = Transformer(CONFIG, implementation="xla", remat="full")
    with jax.set_mesh(mesh):
        params = abstract_params(model, mesh, jnp.float32)
        rows = partitioning.batch_sharding(mesh)

        def shape(*sizes):
            return jax.ShapeDtypeStruct((BATCH, *sizes), jnp.float32, sharding=rows)

        x = AVLatents(shape(CLIP.video_tokens, 4), shape(CLIP.audio_frames, 6))
        contexts = (shape(TEXT, 12), shape(TEXT, 12))

        def loss(params, x, sigma, contexts):
            velocity = clip_velocity(model, params, x, sigma, contexts, CLIP)
            return jnp.mean(velocity.video**2) + jnp.mean(velocity.audio**2)

        places = jax.tree.map(lambda p: p.sharding, params)
        step = jax.jit(jax.grad(loss), out_shardings=places)
        text = step.lower(params, x, shape(), contexts).compile().as_text()
    messages = collectives.read(text)
    whole = {"/".join(k.key for k in path): p.shape for path, p in
             jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    split = [p for p in jax.tree.leaves(params) if any(p.sharding.spec)]
    return {
        "layers": LAYERS,
        "weights": whole,
        "split": sum(p.size * 4 for p in split if p.ndim > 1),
        "messages": [[m.kind, m.shape, m.bytes, len(m.group), m.count, m.name] for m in messages],
    }


if __name__ == "__main__":
    pairs = (pair.split("=") for pair in sys.argv[1:])
    print(json.dumps(main({name: int(size) for name, size in pairs})))
