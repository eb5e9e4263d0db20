"""DMD with the score networks on devices of their own.

    devices of the student                      devices of the scores
    generator, its optimizer, its average       teacher, critic, critic's optimizer

    x <- the student's sample           --x-->
                                                g <- (critic - teacher) / |x - teacher|
    update the generator along g        <--g--
    x <- the student's sample           --x-->
                                                fit the critic to x

What moves is a clip of latents per update, 3.2 MB a sample at 512 x 768 x 121. A device makes half
of the passes over twice the rows, so it gathers half as many weights; docs/scaling.md says when
that pays. Programs are dispatched without waiting: the student draws its next sample while the
critic is fitted to the last one.

Both halves are meshes of the same shape, over the first and the second half of every process's
devices: a shard's partner is a device of the same process, and no process has to wait for another
to hand anything over.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.training.objectives.common import (
    Frozen,
    checked_seed,
    fold,
    numbered,
    on_devices,
    sample_keys,
)
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.state import Network, TrainState
from omniforcing_jax.types import AVLatents, RandomUse


@flax.struct.dataclass
class SplitFrozen:
    """What is read on either side; the student's has no teacher."""

    student: Frozen
    scores: Frozen


def split_devices(devices: list[jax.Device] | None = None) -> tuple[list, list]:
    """The first and the second half of every process's devices.

    Raises:
      ValueError: a process has an odd number of devices, or messages between processes cannot pass
        the devices of the other half (TPU v5e and v6e).
    """
    halves: tuple[list, list] = ([], [])
    by_process: dict[int, list] = {}
    devices = jax.devices() if devices is None else devices
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if len(by_process) > 1 and any("lite" in device.device_kind for device in devices):
        raise ValueError(
            f"score networks of their own: on {len(devices)} x {devices[0].device_kind} of "
            f"{len(by_process)} hosts messages cannot pass the chips of the other half; set "
            "compute.separate_scores to False, or take v5p, v7x or GPUs"
        )
    for process, own in sorted(by_process.items()):
        if len(own) % 2:
            raise ValueError(
                f"process {process} has {len(own)} devices, which cannot be halved: score networks "
                "of their own need an even number on every process"
            )
        halves[0].extend(own[: len(own) // 2])
        halves[1].extend(own[len(own) // 2 :])
    return halves


def split_meshes(
    mesh_shape: Mapping[str, int], devices: list[jax.Device] | None = None
) -> tuple[Mesh, Mesh]:
    """Meshes of the same shape over the halves of `split_devices`, for the student and the scores.

    Raises:
      ValueError: as `split_devices` and `partitioning.make_mesh`.
    """
    student, scores = (
        partitioning.make_mesh(**mesh_shape, devices=half, in_order=True)
        for half in split_devices(devices)
    )
    return student, scores


def move(tree: Any, target: Mesh) -> Any:
    """Arrays onto a mesh of the same shape: a shard goes to the device at the same place.

    Raises:
      ValueError: the meshes have different shapes.
    """

    def one(x: jax.Array) -> jax.Array:
        source = x.sharding.mesh
        if source.shape != target.shape:
            raise ValueError(f"meshes {dict(source.shape)} and {dict(target.shape)} differ")
        partner = dict(zip(source.devices.flat, target.devices.flat, strict=True))
        shards = [jax.device_put(s.data, partner[s.device]) for s in x.addressable_shards]
        sharding = NamedSharding(target, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(one, tree)


def _placed(tree: Any, sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True)
class SplitDMD:
    """A DMD stage on two meshes; see the module's docstring.

    Attributes:
      dmd: the stage; its shardings have the generator and the counter on `student`, the critic on
        `scores`. One microbatch.
      student, scores: meshes of the same shape.
    """

    dmd: DMD
    student: Mesh
    scores: Mesh

    def __post_init__(self):
        if self.dmd.config.microbatches != 1:
            raise ValueError(
                "score networks on devices of their own take a batch in one piece: microbatches "
                f"must be 1, not {self.dmd.config.microbatches}"
            )
        if dict(self.student.shape) != dict(self.scores.shape):
            raise ValueError(
                f"the student's mesh {dict(self.student.shape)} and that of the scores "
                f"{dict(self.scores.shape)} must have the same shape"
            )

    @property
    def generator(self):
        """The student."""
        return self.dmd.generator

    @property
    def text(self):
        """Contexts from batches."""
        return self.dmd.text

    def train_step(
        self, state: TrainState, frozen: SplitFrozen, batch: dict[str, jax.Array], step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """As `DMD.train_step`; `batch` lies on the student's mesh."""
        metrics = {}
        there = move(batch, self.scores)
        numbers = np.int32(step), checked_seed(self.dmd.config.seed)
        at, at_scores = (
            [on_devices(number, NamedSharding(mesh, P())) for number in numbers]
            for mesh in (self.student, self.scores)
        )
        if step % self.dmd.config.critic_updates == 0:
            with jax.set_mesh(self.student):
                trace, x = self._simulate(state.generator, frozen.student, batch, *at)
            with jax.set_mesh(self.scores):
                scored = self._score(
                    state.critic, frozen.scores, there, move(x, self.scores), *at_scores
                )
            with jax.set_mesh(self.student):
                scored = move(scored, self.student)
                network, metrics = self._update_generator(
                    state.generator, frozen.student, batch, trace, scored, *at
                )
            state = state.replace(generator=network)
        with jax.set_mesh(self.student):
            x = self._sample(state.generator, frozen.student, batch, *at)
        with jax.set_mesh(self.scores):
            x = move(x, self.scores)
            critic, more = self._update_critic(state.critic, frozen.scores, there, x, *at_scores)
        with jax.set_mesh(self.student):
            counter = self._next(state.step)
        return state.replace(critic=critic, step=counter), metrics | more

    def lowered(
        self, state: TrainState, frozen: SplitFrozen, batch, there
    ) -> dict[str, Callable[[Mapping[str, Any]], jax.stages.Lowered]]:
        """The programs of a step for shapes instead of arrays, in their order.

        Args:
          state, frozen, batch: as `train_step` takes them, as ShapeDtypeStructs with shardings.
          there: the batch as it is on the mesh of the scores.

        Returns:
          {name: lowers it, given those in front of it compiled}.
        """
        at = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
        start = state.generator, frozen.student, batch
        with jax.set_mesh(self.student):
            trace, x = jax.eval_shape(self._simulate, *start, *at)
        judged = state.critic, frozen.scores, there, _placed(x, self._rows(self.scores))
        with jax.set_mesh(self.scores):
            scored = jax.eval_shape(self._score, *judged, *at)
        scored = _placed(scored, self._rows(self.student))

        def lower(name: str, mesh: Mesh, program, arguments, compiled: Mapping[str, Any]):
            if name == "update_generator":
                places = compiled["simulate"].output_shardings[0]
                arguments = (*arguments, jax.tree.map(_placed, trace, places), scored)
            with jax.set_mesh(mesh):
                return program.lower(*arguments, *at)

        programs = {
            "simulate": (self.student, self._simulate, start),
            "score": (self.scores, self._score, judged),
            "update_generator": (self.student, self._update_generator, start),
            "sample": (self.student, self._sample, start),
            "update_critic": (self.scores, self._update_critic, judged),
        }
        return {name: functools.partial(lower, name, *p) for name, p in programs.items()}

    def _draws(
        self, name: str, batch, step: jax.Array, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys of the samples [B] and of the step, as one program for all would draw them."""
        of_samples, of_step = jax.random.split(self.dmd.update_key(name, seed, step))
        return sample_keys(of_samples, numbered(batch)["row"]), of_step

    def _inputs(self, name: str, network: Network, frozen: Frozen, batch):
        """Weights of a network in the dtype it computes in, and contexts."""
        weights = self.dmd.cast(name, network.params)
        return weights, self.text.contexts(frozen.connectors, batch)

    def _places(self, name: str) -> Network:
        return getattr(self.dmd.shardings, name)

    def _rows(self, mesh: Mesh) -> NamedSharding:
        return partitioning.batch_sharding(mesh)

    @functools.cached_property
    def _simulate(self):
        """(generator, frozen, batch, step, seed) -> (trace, x)."""

        def simulate(network: Network, frozen: Frozen, batch, step, seed):
            weights, contexts = self._inputs("generator", network, frozen, batch)
            keys, of_step = self._draws("generator", batch, step, seed)
            student, fixed = self.dmd.fixed(network.params, weights)
            given = self.dmd.condition(batch, keys)
            trace = student.simulate(fixed, contexts, fold(keys, RandomUse.SAMPLE), of_step, given)
            return trace, self.generator.sample_of(weights, contexts, trace)

        return jax.jit(simulate, out_shardings=(None, self._rows(self.student)))

    @functools.cached_property
    def _score(self):
        """(critic, frozen, batch, x, step, seed) -> (dL/dx, (losses, sigmas))."""

        def score(network: Network, frozen: Frozen, batch, x: AVLatents, step, seed):
            critic, contexts = self._inputs("critic", network, frozen, batch)
            keys, _ = self._draws("generator", batch, step, seed)
            given = self.dmd.condition(batch, keys)
            return self.dmd.score(critic, frozen, x, contexts, keys, given)

        return jax.jit(score, out_shardings=self._rows(self.scores))

    @functools.cached_property
    def _update_generator(self):
        """(generator, frozen, batch, trace, scored, step, seed) -> (generator, metrics)."""

        def update(network: Network, frozen: Frozen, batch, trace, scored, step, seed):
            cotangent, (loss, sigma) = scored
            weights, contexts = self._inputs("generator", network, frozen, batch)
            keys, _ = self._draws("generator", batch, step, seed)
            keys = fold(keys, RandomUse.SAMPLE)
            _, pullback = self.generator.sample_with_pullback(weights, contexts, keys, trace)
            return self._updated("generator", network, pullback(cotangent), loss, sigma, step)

        places = (self._places("generator"), None)
        return jax.jit(update, donate_argnums=(0, 3), out_shardings=places)

    @functools.cached_property
    def _sample(self):
        """(generator, frozen, batch, step, seed) -> x, for the critic."""

        def sample(network: Network, frozen: Frozen, batch, step, seed):
            weights, contexts = self._inputs("generator", network, frozen, batch)
            keys, of_step = self._draws("critic", batch, step, seed)
            student, fixed = self.dmd.fixed(network.params, weights)
            given = self.dmd.condition(batch, keys)
            return student.sample(fixed, contexts, fold(keys, RandomUse.SAMPLE), of_step, given)

        return jax.jit(sample, out_shardings=self._rows(self.student))

    @functools.cached_property
    def _update_critic(self):
        """(critic, frozen, batch, x, step, seed) -> (critic, metrics)."""

        def update(network: Network, frozen: Frozen, batch, x: AVLatents, step, seed):
            critic, contexts = self._inputs("critic", network, frozen, batch)
            keys, _ = self._draws("critic", batch, step, seed)
            given = self.dmd.condition(batch, keys)
            gradients, (loss, sigma) = self.dmd.fit_critic(critic, x, contexts, keys, given)
            return self._updated("critic", network, gradients, loss, sigma, step)

        places = (self._places("critic"), None)
        return jax.jit(update, donate_argnums=0, out_shardings=places)

    def _updated(self, name: str, network: Network, gradients, loss, sigma, step):
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, network.params)
        gradients = jax.lax.with_sharding_constraint(gradients, self._places(name).params)
        return self.dmd.updated(name, network, gradients, loss, sigma, step)

    @functools.cached_property
    def _next(self):
        return jax.jit(lambda step: step + 1, out_shardings=NamedSharding(self.student, P()))
