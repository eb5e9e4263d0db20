"""What the parts share: one network, one loss, one optimizer, in the form of the training loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omniforcing_jax.training.objectives.common import checked_seed, jit_step, step_key
from omniforcing_jax.training.optimizers import EMAConfig
from omniforcing_jax.training.state import TrainState, apply_gradients

Scalars = dict[str, jax.Array]
# (parameters, frozen parameters, batch, random key) -> (loss [], scalars for the record)
Loss = Callable[[Any, Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, Scalars]]


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A `loop.Stage` that minimises a loss."""

    loss: Loss  # of any tree of parameters
    optimizer: optax.GradientTransformation  # from `optimizers.make_optimizer`
    ema: EMAConfig  # of the parameters; the average is what is kept in the end
    seed: int = 0  # of the random keys: see `step_key`

    def train_step(
        self, state: TrainState, frozen: Any, batch: dict[str, jax.Array], step: int
    ) -> tuple[TrainState, Scalars]:
        """One update; `state` is donated."""
        del step
        return self._step(state, frozen, *jax.device_put((batch, checked_seed(self.seed))))

    @functools.cached_property
    def _step(self):
        return jit_step(self._update, None)

    def _update(
        self, state: TrainState, frozen: Any, batch, seed: jax.Array
    ) -> tuple[TrainState, Scalars]:
        key = step_key(seed, state.step)
        gradient = jax.value_and_grad(self.loss, has_aux=True)
        (loss, scalars), grads = gradient(state.generator.params, frozen, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss + norm)
        network = apply_gradients(
            state.generator, grads, self.optimizer, self.ema, state.step, finite
        )
        scalars = {"loss": loss, "grad_norm": norm} | scalars
        return state.replace(generator=network, step=state.step + 1), scalars
