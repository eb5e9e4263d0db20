"""The student of stage I: a few steps over the whole clip at once, and how a gradient reaches it.

Both students of distribution matching (the other one is in `unrolled`) have the same methods.
`sample` makes clips without gradient, for the critic. `simulate` makes a trace of what leads to the
last step; from it `sample_with_pullback` makes the clips, and the function from a gradient with
respect to them to a gradient with respect to the weights: backward simulation (DMD2) means that the
clip comes from the student's own steps, and that only the last of them is differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.conditions import Condition, add_noise
from omniforcing_jax.sampling.whole_clip import clip_x0
from omniforcing_jax.training.objectives.common import fold
from omniforcing_jax.training.students.exits import (
    check_exit_weights,
    check_starts_from_noise,
    exit_steps,
)
from omniforcing_jax.types import AVLatents, Contexts, RandomUse

Pullback = Callable[[AVLatents], Any]


@flax.struct.dataclass
class BidirectionalTrace:
    """The last step of each sample: its input [B, T, C], noise level [B], and what is given."""

    exit_input: AVLatents
    sigma: jax.Array
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class BidirectionalStudent:
    """Stage I: a few steps over the whole clip at once.

    Attributes:
      model: bidirectional.
      clip: what is generated.
      sigmas: noise levels of the student, decreasing from 1, with the final 0.
      exit_weights: see `check_exit_weights`.
    """

    model: Transformer
    clip: ClipGeometry
    sigmas: tuple[float, ...]
    exit_weights: tuple[float, ...] | None = None

    def __post_init__(self):
        check_starts_from_noise(self.sigmas)
        check_exit_weights(self.exit_weights, self.num_steps)

    @property
    def num_steps(self) -> int:
        """Forward passes of a full sample."""
        return len(self.sigmas) - 1

    def sample(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        condition: Condition | None = None,
    ) -> AVLatents:
        """Clips [B, T, C] float32 from [B] keys and the key of the training step."""
        trace = self.simulate(weights, contexts, keys, step_key, condition)
        return self.sample_of(weights, contexts, trace)

    def simulate(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        condition: Condition | None = None,
    ) -> BidirectionalTrace:
        """All steps but the last, without gradient; arguments as `sample`."""
        del step_key
        return self._simulate(weights, contexts, keys, condition)

    def sample_of(self, weights: Any, contexts: Contexts, trace: BidirectionalTrace) -> AVLatents:
        """The clips [B, T, C] float32 of a trace."""
        return clip_x0(
            self.model,
            weights,
            trace.exit_input,
            trace.sigma,
            contexts,
            self.clip,
            condition=trace.condition,
        )

    def sample_with_pullback(
        self, weights: Any, contexts: Contexts, keys: jax.Array, trace: BidirectionalTrace
    ) -> tuple[AVLatents, Pullback]:
        """The clips of a trace, and the map from dL/dclip to dL/dweights."""
        del keys
        sample, pullback = jax.vjp(lambda w: self.sample_of(w, contexts, trace), weights)
        return sample, lambda cotangent: pullback(cotangent)[0]

    def generate(self, weights: Any, contexts: Contexts, keys: jax.Array) -> AVLatents:
        """Clips [B, T, C] float32 after all steps, as in use."""
        exits = jnp.full(keys.shape, self.num_steps - 1)
        return self.sample_of(
            weights, contexts, self._simulate(weights, contexts, keys, exits=exits)
        )

    def _simulate(self, weights, contexts, keys, condition=None, exits=None) -> BidirectionalTrace:
        """Up to each sample's last step.

        Each sample exits at a step of its own, drawn among those at which the network is called: at
        sigma 0 the prediction is the input, and its gradient would be zero. The loop stops when the
        last sample of the batch has exited.
        """
        if exits is None:
            exits = exit_steps(fold(keys, RandomUse.EXIT), self.num_steps, self.exit_weights)
        sigmas = jnp.asarray(self.sigmas, jnp.float32)
        noise_keys = fold(keys, RandomUse.ROLLOUT_NOISE)

        def step(i, carry):
            x, exit_input = carry
            sigma = jnp.full(keys.shape, sigmas[i])
            x0 = clip_x0(self.model, weights, x, sigma, contexts, self.clip, condition=condition)
            fresh = draw_noise(fold(noise_keys, i + 1), self.clip, self.model)
            x = add_noise(x0, fresh, sigmas[i + 1], condition)
            here = (exits == i + 1)[:, None, None]
            return x, jax.tree.map(lambda x, e: jnp.where(here, x, e), x, exit_input)

        x = draw_noise(fold(noise_keys, 0), self.clip, self.model)
        if condition is not None:
            x = condition.start(x)
        _, exit_input = jax.lax.fori_loop(0, jnp.max(exits), step, (x, x))
        return BidirectionalTrace(jax.lax.stop_gradient(exit_input), sigmas[exits], condition)
