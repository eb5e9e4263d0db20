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
from omniforcing_jax.training.state import Network, TrainState

Scalars = dict[str, jax.Array]
# (parameters, frozen parameters, batch, random key) -> (loss [], scalars for the record)
Loss = Callable[[Any, Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, Scalars]]


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A `train.Stage` that minimises a loss.

    Attributes:
      loss: see `Loss`; any tree of parameters.
      optimizer: from `optimizers.make_optimizer`.
      ema: of the parameters; the average is what is kept in the end.
      seed: of the random keys: see `step_key`.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    ema: EMAConfig
    seed: int = 0

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
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        network = self._apply(state.generator, grads, jnp.isfinite(loss + norm), state.step)
        scalars = {"loss": loss, "grad_norm": norm} | scalars
        return state.replace(generator=network, step=state.step + 1), scalars

    def _apply(self, network: Network, grads, finite: jax.Array, step: jax.Array) -> Network:
        """The network after an update, or unchanged if something was not finite."""
        updates, opt_state = self.optimizer.update(grads, network.opt_state, network.params)
        params = optax.apply_updates(network.params, updates)
        decay = jnp.where(step < self.ema.start_step, 0.0, self.ema.decay)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, network.ema, params)
        new = Network(params=params, opt_state=opt_state, ema=ema)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, network)
