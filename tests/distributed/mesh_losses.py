"""Prints the losses of two training steps on a mesh; run as a program, with eight CPU devices.

python -m tests.distributed.mesh_losses stage3 data=2 fsdp=2 tensor=2

"stage2-given" and "stage3-given" train under conditions of all modes.
"""

import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from omniforcing_jax.blocks import BlockLayout  # noqa: E402
from omniforcing_jax.distributed import partitioning  # noqa: E402
from omniforcing_jax.geometry import ClipGeometry  # noqa: E402
from omniforcing_jax.models.transformer.config import tiny  # noqa: E402
from omniforcing_jax.models.transformer.model import Transformer  # noqa: E402
from omniforcing_jax.sampling.conditions import MODES  # noqa: E402
from omniforcing_jax.sampling.kv_cache import CacheConfig  # noqa: E402
from omniforcing_jax.sampling.student import RolloutConfig  # noqa: E402
from omniforcing_jax.training.assembly import abstract_params  # noqa: E402
from omniforcing_jax.training.config.settings import (  # noqa: E402
    ComputeConfig,
    RegressionConfig,
    StageII,
    StageIII,
)
from omniforcing_jax.training.mixture import ConditionMixture, GivenInput  # noqa: E402
from omniforcing_jax.training.objectives.common import Frozen, TextInput  # noqa: E402
from omniforcing_jax.training.objectives.dmd import DMD  # noqa: E402
from omniforcing_jax.training.objectives.ode_regression import ODERegression  # noqa: E402
from omniforcing_jax.training.optimizers import OptimizerConfig, make_optimizer  # noqa: E402
from omniforcing_jax.training.state import create_network, create_state, state_shardings  # noqa: E402
from omniforcing_jax.training.students.unrolled import UnrolledStudent  # noqa: E402
from tests.tiny_model import random_contexts, random_params  # noqa: E402

BATCH, BLOCKS = 8, 2
LAYOUT = BlockLayout(1, 2, 1, 3)
ROLLOUT = RolloutConfig(CacheConfig(LAYOUT, window=2), (1.0, 0.5, 0.0), height=1, width=4)
CLIP = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 4)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2))
EVERY_MODE = ConditionMixture(**{mode: 1 / len(MODES) for mode in MODES})


def main(stage: str, axes: dict[str, int]) -> list[dict[str, float]]:
    """The losses and gradient norms of two steps."""
    count = int(np.prod(list(axes.values())))
    mesh = partitioning.make_mesh(**axes, devices=jax.devices()[:count])
    model = Transformer(tiny())
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh, jnp.float32))
        split = [s for s in jax.tree.leaves(places) if any(s.spec)]
        if axes.get("fsdp", 1) * axes.get("tensor", 1) > 1:
            assert len(split) > 20, "parameters should be split"
        params = [jax.device_put(random_params(model.config, seed), places) for seed in range(3)]
        generator = create_network(params[0], OPTIMIZER, ema=True)
        rows = partitioning.batch_sharding(mesh)
        contexts = random_contexts(model.config, batch=BATCH)
        names = ("video_context", "audio_context")
        batch = dict(zip(names, contexts, strict=True))
        negative = dict(zip(names, random_contexts(model.config, batch=1, seed=5), strict=True))
        frozen = Frozen(
            params[2], None, jax.device_put(negative, NamedSharding(mesh, PartitionSpec()))
        )
        shapes = {
            "video": (CLIP.video_tokens, model.config.video_channels),
            "audio": (CLIP.audio_frames, model.config.audio_channels),
        }
        rng = np.random.default_rng(0)
        clips = {name: rng.standard_normal((BATCH, *shape)) for name, shape in shapes.items()}
        given = GivenInput(EVERY_MODE, CLIP, LAYOUT) if stage.endswith("given") else None
        if stage.startswith("stage3"):
            batch |= clips if given else {}
            state = create_state(generator, create_network(params[1], OPTIMIZER, ema=False))
            trained = DMD(
                UnrolledStudent(model, ROLLOUT, BLOCKS, BLOCKS),
                model,
                model,
                TextInput(),
                OPTIMIZER,
                OPTIMIZER,
                StageIII(microbatches=2, compute=ComputeConfig(gather_weights=True)),
                given=given,
                shardings=state_shardings(state),
            )
        else:
            state, frozen = create_state(generator), Frozen()
            trained = ODERegression(
                model, ROLLOUT, BLOCKS, TextInput(), OPTIMIZER,
                StageII(regression=RegressionConfig("flow")), given,
                shardings=state_shardings(state),
            )  # fmt: skip
            batch |= {name: x[:, None] for name, x in clips.items()}
        batch = {name: jax.device_put(np.asarray(x, np.float32), rows) for name, x in batch.items()}
        found = []
        for step in range(2):
            state, metrics = trained.train_step(state, frozen, batch, step)
            kept = {k: float(v) for k, v in metrics.items() if "loss" in k or "grad_norm" in k}
            found.append(kept)
        # what is split stays split
        after = jax.tree.map(lambda x: x.sharding, state.generator.params)
        assert jax.tree.leaves(after) == jax.tree.leaves(places)
    return found


if __name__ == "__main__":
    axes = dict(pair.split("=") for pair in sys.argv[2:])
    print(json.dumps(main(sys.argv[1], {name: int(size) for name, size in axes.items()})))
