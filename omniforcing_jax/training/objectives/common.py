"""What the three stages share: frozen parts, text contexts, random keys, accumulated gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.distributed.partitioning import constrain
from omniforcing_jax.models.text.connectors import TextConnectors
from omniforcing_jax.types import Contexts, RandomUse

Gradient = Callable[[Any, dict[str, jax.Array]], tuple[Any, Any]]


@flax.struct.dataclass
class Frozen:
    """Parameters that a stage reads and never trains; they stand outside the train state.

    Attributes:
      teacher: of the bidirectional transformer, which is the base of all networks where adapters
        are trained; None where a stage has neither.
      connectors: of `TextConnectors`; None when batches hold contexts instead of features.
      negative: contexts of the negative prompt, a batch of one; None without guidance.
    """

    teacher: Any = None
    connectors: Any = None
    negative: dict[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class TextInput:
    """Turns the text of a batch into contexts.

    Stored prompts are features in front of the connectors, since only their valid tokens have to be
    kept: a caption takes a twentieth of the room that its context takes.

    Attributes:
      connectors: None when batches hold contexts.
    """

    connectors: TextConnectors | None = None

    def contexts(self, params: Any, batch: dict[str, jax.Array]) -> Contexts:
        """(video, audio) contexts [B, S, text_dim].

        Args:
          params: of the connectors.
          batch: {"video_context", "audio_context"}, or {"video_features", "audio_features",
            "mask"} (with `audio_features` absent where both streams share them).
        """
        if "video_context" in batch:
            return batch["video_context"], batch["audio_context"]
        video = batch["video_features"]
        audio = batch.get("audio_features", video)
        return self.connectors.apply(
            {"params": params}, video, audio, batch["mask"], method="contexts"
        )


def jit_step(step: Callable, shardings: Any | None) -> Callable:
    """Jits (state, frozen, batch, seed) -> (state, metrics), which takes and gives back the state.

    The state is donated and stays in place. The seed is an argument, so that runs which differ by
    it share what is compiled.
    """
    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def checked_seed(seed: int) -> np.uint32:
    """The seed as programs take it.

    Raises:
      ValueError: it does not fit.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to 2**32 - 1, not {seed}")
    return np.uint32(seed)


def on_devices(value: np.generic, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """A number as programs take it, moved to the devices by name; the same on all processes."""
    if sharding is None:
        return jax.device_put(value)
    shards = [jax.device_put(value, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays((), sharding, shards)


def step_key(seed: jax.Array, step: jax.Array) -> jax.Array:
    """Of everything that is random in a step of training."""
    return jax.random.fold_in(jax.random.key(seed), step)


def numbered(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with its rows' numbers, which survive being cut into microbatches."""
    size = jax.tree.leaves(batch)[0].shape[0]
    return batch | {"row": jnp.arange(size, dtype=jnp.int32)}


def sample_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """A key per sample, from the step's key and the row [B] in the global batch.

    With them nothing that a sample draws depends on how a batch is cut into microbatches, or on the
    mesh it is spread over.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def fold(keys: jax.Array, use: RandomUse | int | jax.Array) -> jax.Array:
    """`fold_in` for [B] keys: independent draws for different uses, or steps."""
    use = int(use) if isinstance(use, RandomUse) else use
    return jax.vmap(jax.random.fold_in, (0, None))(keys, use)


def accumulate(
    gradient: Gradient,
    batch: dict[str, jax.Array],
    num_microbatches: int,
    shardings: Any | None = None,
) -> tuple[Any, Any]:
    """Mean gradient over microbatches, in float32.

    Args:
      gradient: microbatch -> (gradients of a mean over its samples, per-sample values [b]).
      batch: arrays [B, ...]. Microbatch i takes the rows i, i + M, ...: each has its share of the
        rows of every device, so that nothing moves; the first B / M rows would all lie on the first
        devices.
      num_microbatches: M, a divisor of B.
      shardings: NamedShardings that the gradients get (those of the parameters).

    Returns:
      Gradients of the mean over the whole batch, and per-sample values [B] in the batch's order.

    Raises:
      ValueError: B is not a multiple of M.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % num_microbatches:
        raise ValueError(f"a batch of {size} cannot be cut into {num_microbatches} microbatches")

    def place(gradients):
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        if shardings is None:
            return gradients
        return jax.lax.with_sharding_constraint(gradients, shardings)

    if num_microbatches == 1:
        gradients, values = gradient(batch)
        return place(gradients), values

    def cut(x: jax.Array) -> jax.Array:  # [B, ...] -> [M, B / M, ...]
        x = jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch")

    def step(total, microbatch):
        gradients, values = gradient(microbatch)
        return place(jax.tree.map(jnp.add, total, place(gradients))), values

    microbatches = jax.tree.map(cut, batch)
    shapes, _ = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], microbatches))
    zeros = place(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes))
    total, values = jax.lax.scan(step, zeros, microbatches)
    mean = jax.tree.map(lambda x: x / num_microbatches, total)
    return mean, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[2:]), values)
