"""Prints what three steps of DMD give, with score networks of their own and without; a program.

python -m tests.training.objectives.split_program III
"""

import dataclasses
import json
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from omniforcing_jax.distributed import partitioning  # noqa: E402
from omniforcing_jax.training.assembly import abstract_params  # noqa: E402
from omniforcing_jax.training.config.settings import DMDStage  # noqa: E402
from omniforcing_jax.training.objectives.common import Frozen, TextInput  # noqa: E402
from omniforcing_jax.training.objectives.dmd import DMD  # noqa: E402
from omniforcing_jax.training.objectives.split_dmd import SplitDMD, SplitFrozen, move, split_meshes  # noqa: E402
from omniforcing_jax.training.optimizers import EMAConfig  # noqa: E402
from omniforcing_jax.training.state import create_network, create_state, state_shardings  # noqa: E402
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent  # noqa: E402
from omniforcing_jax.training.students.unrolled import UnrolledStudent  # noqa: E402
from tests.tiny_model import random_contexts, random_params  # noqa: E402
from tests.training.objectives.test_dmd import BLOCKS, CLIP, MODEL, ROLLOUT, SIGMAS  # noqa: E402

BATCH, STEPS = 4, 3
# momentum alone: AdamW would make of a gradient's rounding a step of full size
OPTIMIZER = optax.sgd(0.1, momentum=0.5)
NAMES = ("video_context", "audio_context")
CONTEXTS = dict(zip(NAMES, random_contexts(MODEL.config, batch=BATCH), strict=True))
NEGATIVE = dict(zip(NAMES, random_contexts(MODEL.config, batch=1, seed=7), strict=True))


def make_dmd(stage: str) -> DMD:
    if stage == "III":
        generator = UnrolledStudent(MODEL, ROLLOUT, BLOCKS, BLOCKS)
    else:
        generator = BidirectionalStudent(MODEL, CLIP, SIGMAS)
    config = DMDStage(critic_updates=2, ema=EMAConfig(0.5))
    return DMD(generator, MODEL, MODEL, TextInput(), OPTIMIZER, OPTIMIZER, config)


def place(tree, mesh, sharding=None):
    sharding = sharding or jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, sharding)


def network(seed: int, mesh, ema: bool):
    places = jax.tree.map(lambda x: x.sharding, abstract_params(MODEL, mesh, jnp.float32))
    params = jax.device_put(random_params(MODEL.config, seed), places)
    return create_network(params, OPTIMIZER, ema=ema)


def run(stage: str, split: bool) -> list[dict[str, float]]:
    dmd = make_dmd(stage)
    if split:
        student, scores = split_meshes({"fsdp": 2})
    else:
        student = scores = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(student):
        generator = network(1, student, True)
    with jax.set_mesh(scores):
        critic = network(2, scores, False)
    state = create_state(generator, critic)
    dmd = dataclasses.replace(dmd, shardings=state_shardings(state))
    frozen = Frozen(place(random_params(MODEL.config, 3), scores), None, place(NEGATIVE, scores))
    if split:
        dmd = SplitDMD(dmd, student, scores)
        frozen = SplitFrozen(Frozen(), frozen)
    batch = place(CONTEXTS, student, partitioning.batch_sharding(student))
    if split:
        check_lowered(dmd, state, frozen, batch)
    history = []
    with jax.set_mesh(student):
        for step in range(STEPS):
            state, metrics = dmd.train_step(state, frozen, batch, step)
            history.append({k: float(v) for k, v in metrics.items() if not k.startswith("band/")})
    assert int(state.step) == STEPS
    if split:
        held = {d for x in jax.tree.leaves(state.critic) for d in x.devices()}
        assert held == set(scores.devices.flat), "the critic has left its devices"
        held = {d for x in jax.tree.leaves(state.generator) for d in x.devices()}
        assert held == set(student.devices.flat), "the generator has left its devices"
    return history


def check_lowered(dmd: SplitDMD, state, frozen: SplitFrozen, batch) -> None:
    """Every program can be made for shapes alone."""

    def shapes(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )

    there = shapes(move(batch, dmd.scores))
    programs = dmd.lowered(shapes(state), shapes(frozen), shapes(batch), there)
    assert len(programs) == 5
    compiled = {"simulate": programs.pop("simulate")({}).compile()}
    for lower in programs.values():
        assert lower(compiled).cost_analysis()["flops"] > 0


def check_move() -> None:
    student, scores = split_meshes({"fsdp": 2})
    x = place(np.arange(8.0).reshape(4, 2), student, partitioning.batch_sharding(student))
    moved = move(x, scores)
    np.testing.assert_array_equal(moved, x)
    assert moved.sharding == partitioning.batch_sharding(scores)


if __name__ == "__main__":
    check_move()
    print(json.dumps([run(sys.argv[1], split) for split in (False, True)]))
