"""Prints the losses of two training steps on meshes; run as a program, with eight CPU devices.

python -m tests.distributed.mesh_losses stage3 data=1 data=2,fsdp=2,tensor=2

"-given" behind a stage: under conditions of all modes; "-adapters": adapters over a frozen base.
On a mesh the batch is cut into two microbatches, on one device it is not.
"""

import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from omniforcing_jax.blocks import BlockLayout  # noqa: E402
from omniforcing_jax.distributed import partitioning  # noqa: E402
from omniforcing_jax.geometry import ClipGeometry  # noqa: E402
from omniforcing_jax.models.transformer.config import tiny  # noqa: E402
from omniforcing_jax.models.transformer.model import Transformer  # noqa: E402
from omniforcing_jax.sampling.conditions import MODES  # noqa: E402
from omniforcing_jax.sampling.kv_cache import CacheConfig  # noqa: E402
from omniforcing_jax.sampling.student import RolloutConfig  # noqa: E402
from omniforcing_jax.training import adapters  # noqa: E402
from omniforcing_jax.training.adapters import AdapterConfig  # noqa: E402
from omniforcing_jax.training.assembly import abstract_params, abstract_trained  # noqa: E402
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
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer  # noqa: E402
from omniforcing_jax.training.state import create_network, create_state, state_shardings  # noqa: E402
from omniforcing_jax.training.students.unrolled import UnrolledStudent  # noqa: E402
from tests.tiny_model import random_contexts, random_params  # noqa: E402

BATCH, BLOCKS = 8, 2
LAYOUT = BlockLayout(1, 2, 1, 3)
ROLLOUT = RolloutConfig(CacheConfig(LAYOUT, window=2), (1.0, 0.5, 0.0), height=1, width=4)
CLIP = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 4)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2))
ADAPTERS = AdapterConfig(ranks=(3,), alphas=(6.0,))
EVERY_MODE = ConditionMixture(**{mode: 1 / len(MODES) for mode in MODES})


def trained_parameters(mesh: jax.sharding.Mesh, model: Transformer, config: AdapterConfig) -> list:
    """Of generator and critic: all of them, or adapters, of which neither matrix is zero."""
    places = abstract_trained(model, config, mesh, jnp.float32)
    found = []
    for seed in range(2):
        params = random_params(model.config, seed)
        if config.used:
            params = adapters.init_trained(params, config, jax.random.key(seed))
            draw = np.random.default_rng(seed).standard_normal
            params = jax.tree.map(lambda x, d=draw: 0.05 * d(x.shape, np.float32), params)
        found.append(jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), params, places))
    return found


def main(stage: str, axes: dict[str, int]) -> list[dict[str, float]]:
    """The losses and gradient norms of two steps, and the norm of the average after each."""
    count = int(np.prod(list(axes.values())))
    parts = 1 if count == 1 else 2
    mesh = partitioning.make_mesh(**axes, devices=jax.devices()[:count])
    model = Transformer(tiny())
    config = ADAPTERS if "adapters" in stage else AdapterConfig()
    with jax.set_mesh(mesh):
        base = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh, jnp.float32))
        params = trained_parameters(mesh, model, config)
        places = jax.tree.map(lambda x: x.sharding, params[0])
        split = [s for s in jax.tree.leaves(places) if any(s.spec)]
        if axes.get("fsdp", 1) * axes.get("tensor", 1) > 1:
            assert len(split) > 20, "parameters should be split"
        generator = create_network(params[0], OPTIMIZER, ema=True)
        rows = partitioning.batch_sharding(mesh)
        contexts = random_contexts(model.config, batch=BATCH)
        names = ("video_context", "audio_context")
        batch = dict(zip(names, contexts, strict=True))
        negative = dict(zip(names, random_contexts(model.config, batch=1, seed=5), strict=True))
        frozen = Frozen(
            jax.device_put(random_params(model.config, 2), base),
            None,
            jax.device_put(negative, NamedSharding(mesh, PartitionSpec())),
        )
        shapes = {
            "video": (CLIP.video_tokens, model.config.video_channels),
            "audio": (CLIP.audio_frames, model.config.audio_channels),
        }
        rng = np.random.default_rng(0)
        clips = {name: rng.standard_normal((BATCH, *shape)) for name, shape in shapes.items()}
        given = GivenInput(EVERY_MODE, CLIP, LAYOUT) if "given" in stage else None
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
                StageIII(
                    microbatches=parts,
                    compute=ComputeConfig(gather_weights=not config.used),
                    adapters=config,
                    ema=EMAConfig(0.5),
                ),
                given=given,
                shardings=state_shardings(state),
            )
        else:
            state = create_state(generator)
            frozen = Frozen(frozen.teacher if config.used else None)
            trained = ODERegression(
                model, ROLLOUT, BLOCKS, TextInput(), OPTIMIZER,
                StageII(
                    microbatches=parts, regression=RegressionConfig("flow"), adapters=config,
                    ema=EMAConfig(0.5),
                ), given,
                shardings=state_shardings(state),
            )  # fmt: skip
            batch |= {name: x[:, None] for name, x in clips.items()}
        batch = {name: jax.device_put(np.asarray(x, np.float32), rows) for name, x in batch.items()}
        found = []
        for step in range(2):
            state, metrics = trained.train_step(state, frozen, batch, step)
            kept = {k: float(v) for k, v in metrics.items() if "loss" in k or "grad_norm" in k}
            # on the host: small programs over many devices, begun one after the other without
            # waiting, can wait for each other on a CPU
            average = jax.device_get(state.generator.ema)
            found.append(kept | {"ema": float(optax.global_norm(average))})
        # what is split stays split
        after = jax.tree.map(lambda x: x.sharding, state.generator.params)
        assert jax.tree.leaves(after) == jax.tree.leaves(places)
    return found


if __name__ == "__main__":
    meshes = [dict(pair.split("=") for pair in mesh.split(",")) for mesh in sys.argv[2:]]
    sizes = [{name: int(size) for name, size in mesh.items()} for mesh in meshes]
    print(json.dumps([main(sys.argv[1], axes) for axes in sizes]))
