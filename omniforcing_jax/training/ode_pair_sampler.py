"""Batches of ODE trajectories for stored prompts."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.data.ode_pairs import STREAMS, Pair
from omniforcing_jax.data.text_dataset import TextDataset, own_tokens
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.text.connectors import TextConnectors
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig
from omniforcing_jax.sampling.trajectories import (
    Trajectory,
    autoregressive_trajectory,
    sample_trajectory,
)
from omniforcing_jax.training.assembly import abstract_params
from omniforcing_jax.training.mixture import GivenInput
from omniforcing_jax.training.objectives.common import fold
from omniforcing_jax.training.source_model import SourceModel
from omniforcing_jax.training.training_checkpoints import load_generator
from omniforcing_jax.types import RandomUse

_SAMPLES_PER_AXIS = 16  # of each weight that goes into the fingerprint


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clips are sampled.

    Attributes:
      sampling: clip, schedule and guidance.
      indices: of the stored states in the schedule.
      seed: clip i has the key fold_in(key(seed), i).
      rollout, num_blocks: of an autoregressive model; None for whole clips at once.
      given: draws what is given of each clip: parts of another sample of the same prompt. None is
        nothing.
    """

    sampling: SampleConfig
    indices: tuple[int, ...]
    seed: int
    rollout: RolloutConfig | None = None
    num_blocks: int | None = None
    given: GivenInput | None = None


class TrajectorySampler:
    """Samples batches of trajectories for stored prompts, on one device or a mesh.

    Attributes:
      fingerprint: tells models apart: configurations and a sample of every weight.
    """

    def __init__(
        self,
        source: SourceModel,
        recipe: Recipe,
        text: TextDataset,
        *,
        dtype: jnp.dtype,
        implementation: str = "auto",
        mesh: Mesh | None = None,
        verify: bool = True,
    ):
        """Loads the weights.

        Args:
          dtype: in which the model computes, and its weights are kept.
          implementation: of attention.
          mesh: over which weights and batches are split; None is the first local device.
          verify: compare the files with their checksums first.

        Raises:
          FileNotFoundError, ValueError, DamagedFile: see `load_generator`.
        """
        self.recipe, self.text = recipe, text
        self._mesh = mesh or partitioning.make_mesh(devices=jax.local_devices()[:1])
        self.model = Transformer(source.config.transformer, dtype, implementation)
        expected = abstract_params(self.model, self._mesh, dtype)
        self._params = load_generator(source.folder, expected, which=source.weights, verify=verify)
        whole = NamedSharding(self._mesh, P())
        connectors = checkpoints.load_params(
            source.connectors_folder, "connectors", dtype=dtype, sharding=whole, verify=verify
        )
        connectors = {name: connectors[name] for name in ("video_connector", "audio_connector")}
        module = TextConnectors(source.connectors, dtype)
        self._contexts = jax.jit(
            lambda *features: module.apply({"params": connectors}, *features, method="contexts")
        )
        description = [
            dataclasses.asdict(source.config.transformer),
            dataclasses.asdict(source.connectors),
            jnp.dtype(dtype).name,
        ]
        self.fingerprint = _fingerprint(
            description, {"transformer": self._params, "connectors": connectors}
        )
        self._negative = None
        if "uncond" in recipe.sampling.guidance.passes():
            self._negative = self._prompt([text.negative])

    def _prompt(self, elements: Sequence[Mapping[str, Any]]) -> Prompt:
        """Contexts [B, S, text_dim] of B stored elements."""
        names = ("video_features", "audio_features", "mask")
        arrays = (np.stack([element[name] for element in elements]) for name in names)
        return Prompt(*self._contexts(*(self._place(x) for x in arrays)))

    def _place(self, x: np.ndarray | jax.Array) -> jax.Array:
        """On the mesh, rows split over it where that divides them."""
        return jax.device_put(x, partitioning.row_sharding(self._mesh, x.shape[0]))

    def __call__(self, clips: Sequence[int]) -> list[Pair]:
        """Trajectories of the clips with these numbers; a clip does not depend on the others.

        Raises:
          FloatingPointError: the model produced values that are not finite; names the clip.
        """
        recipe, elements = self.recipe, [self.text[clip % len(self.text)] for clip in clips]
        with jax.set_mesh(self._mesh):
            key = jax.random.key(recipe.seed)
            numbers = jnp.asarray(clips, jnp.uint32)
            keys = self._place(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
            prompt, condition, masks = self._prompt(elements), None, {}
            if recipe.given is not None:
                other = self._trajectory(prompt, fold(keys, RandomUse.SAMPLE))
                clean = jax.tree.map(lambda x: x[:, -1], other.states)
                condition = Condition.of_clip(clean, recipe.given.masks(keys))
            trajectory = self._trajectory(prompt, keys, condition)
            trajectory, finite = jax.device_get(_rounded(trajectory))
            if condition is not None:
                mask = jax.device_get(condition.mask)
                masks = {f"{name}_mask": getattr(mask, name) for name in STREAMS}
        for clip, element, is_finite in zip(clips, elements, finite, strict=True):
            if not is_finite:
                raise FloatingPointError(
                    f"clip {clip} ({element['prompt'][:60]!r}) is not finite; try --dtype "
                    "float32, and check the checkpoint"
                )

        def of_row(latents, row):
            return {name: getattr(latents, name)[row] for name in STREAMS}

        return [
            Pair(
                element["prompt"],
                own_tokens(element, self.text.manifest),
                of_row(trajectory.states, row),
                of_row(trajectory.velocities, row),
                {name: x[row] for name, x in masks.items()},
            )
            for row, element in enumerate(elements)
        ]

    def _trajectory(
        self, prompt: Prompt, keys: jax.Array, condition: Condition | None = None
    ) -> Trajectory:
        recipe = self.recipe
        inputs = (self.model, self._params, prompt, self._negative, keys)
        if recipe.rollout is None:
            return sample_trajectory(*inputs, recipe.sampling, recipe.indices, condition)
        blocks = recipe.rollout, recipe.num_blocks, recipe.sampling.guidance
        return autoregressive_trajectory(*inputs, *blocks, recipe.indices, condition)


@jax.jit
def _rounded(trajectory: Trajectory) -> tuple[Trajectory, jax.Array]:
    """As bfloat16, and whether each clip is finite, [B]."""
    finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in jax.tree.leaves(trajectory)]
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), trajectory), jnp.stack(finite).all(axis=0)


def _fingerprint(description: Any, params: Any) -> str:
    """Hash of a description and of some values of every weight, evenly spread."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(_thinned(params))):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _thinned(params: Any) -> Any:
    def thin(x):
        return x[tuple(slice(None, None, max(1, n // _SAMPLES_PER_AXIS)) for n in x.shape)]

    return jax.tree.map(thin, params)
