"""The student of stage III: block after block over the rolling cache, by the sampler's own step.

Methods as those of the student of stage I, see `bidirectional`.
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import ClipGeometry, join_blocks, split_blocks
from omniforcing_jax.models.transformer.inputs import TextKV
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.conditions import Condition, split_condition
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.student import (
    BlockTrace,
    RolloutConfig,
    bind,
    block_noise,
    block_step,
    new_cache,
    prompt_kv,
    refresh,
    text_kv,
)
from omniforcing_jax.training.objectives.common import fold
from omniforcing_jax.training.students.bidirectional import Pullback
from omniforcing_jax.training.students.blockwise import BlockInput, blockwise_gradient
from omniforcing_jax.training.students.exits import (
    check_exit_weights,
    check_starts_from_noise,
    exit_step,
)
from omniforcing_jax.types import AVLatents, Contexts, RandomUse


@flax.struct.dataclass
class UnrolledTrace:
    """A rollout up to the last step of each block.

    Attributes:
      first, rest: of block 0 (None when it is not scored), and of the other scored blocks, stacked
        (None when there are none).
      cache: in front of the first scored block; where nothing is evicted it holds what comes later
        as well.
      sigma: [B] noise level of the last step.
      condition: what of the clip is given.
    """

    first: BlockTrace | None
    rest: BlockTrace | None
    cache: RollingCache
    sigma: jax.Array
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class UnrolledStudent:
    """Stage III: block after block over the rolling cache, by the sampler's own block step.

    Attributes:
      model: block-causal student (the masks are in the rollout, not in the model).
      config: cache, sigmas and sizes, as in sampling.
      num_blocks: blocks that are generated.
      scored_blocks: the last of them, which are scored and trained; all of them when equal.
      detach_history: as in the paper. Otherwise the gradient also runs through the keys and values
        of earlier scored blocks, and memory holds one cache per block.
      exit_weights: see `check_exit_weights`.
    """

    model: Transformer
    config: RolloutConfig
    num_blocks: int
    scored_blocks: int
    detach_history: bool = True
    exit_weights: tuple[float, ...] | None = None

    def __post_init__(self):
        check_starts_from_noise(self.config.sigmas)
        check_exit_weights(self.exit_weights, self.num_steps)
        if not 1 <= self.scored_blocks <= self.num_blocks:
            raise ValueError(
                f"scored_blocks must be between 1 and num_blocks = {self.num_blocks}, not "
                f"{self.scored_blocks}"
            )

    @property
    def clip(self) -> ClipGeometry:
        """The scored part of the rollout."""
        c = self.config
        whole = self.scored_blocks == self.num_blocks
        layout = c.cache.layout
        return ClipGeometry.from_blocks(layout, self.scored_blocks, c.height, c.width, start=whole)

    @property
    def num_steps(self) -> int:
        """Forward passes of a block, without the refresh."""
        return self.config.num_steps

    def sample(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        condition: Condition | None = None,
    ) -> AVLatents:
        """The scored part [B, T, C] float32 of rollouts from [B] keys.

        Every block exits at the same step, drawn from `step_key`: all hosts draw the same. A
        condition is one of the whole rollout, all of which has to be scored then.
        """
        trace = self.simulate(weights, contexts, keys, step_key, condition)
        return self.sample_of(weights, contexts, trace)

    def generate(self, weights: Any, contexts: Contexts, keys: jax.Array) -> AVLatents:
        """The scored part [B, T, C] float32 of rollouts with all steps, as in use."""
        text = self._text(weights, contexts)
        return _joined(*self._unroll(weights, text, keys, None)[:2])

    def simulate(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        condition: Condition | None = None,
    ) -> UnrolledTrace:
        """A rollout without gradient; arguments as `sample`."""
        step = exit_step(step_key, self.num_steps, self.exit_weights)
        text = self._text(weights, contexts, condition)
        first, rest, cache = self._unroll(weights, text, keys, step, condition)
        sigma = jnp.full(keys.shape, jnp.asarray(self.config.sigmas, jnp.float32)[step])
        return UnrolledTrace(first, rest, cache, sigma, condition)

    def sample_of(self, weights: Any, contexts: Contexts, trace: UnrolledTrace) -> AVLatents:
        """The scored part [B, T, C] float32 of a trace."""
        del weights, contexts
        return _joined(trace.first, trace.rest)

    def sample_with_pullback(
        self, weights: Any, contexts: Contexts, keys: jax.Array, trace: UnrolledTrace
    ) -> tuple[AVLatents, Pullback]:
        """The scored part of a trace, and the map from dL/dclip to dL/dweights.

        The gradient goes through the last step of every scored block, into the weights and into the
        keys and values of the text; earlier steps are detached, and so is the history by default.
        """

        def pullback(cotangent: AVLatents) -> Any:
            return self._pull_back(weights, contexts, keys, trace, cotangent)

        return self.sample_of(weights, contexts, trace), pullback

    def _pull_back(self, weights, contexts, keys, trace: UnrolledTrace, cotangent: AVLatents):
        def exit_text(weights):
            return text_kv(self.model, weights, contexts, trace.sigma, trace.condition)

        if not self.detach_history:

            def again(weights):
                texts = exit_text(weights), self._text(weights, contexts, trace.condition)
                return self._replay(weights, texts, trace, keys)

            return jax.vjp(again, weights)[1](cotangent)[0]
        blocks = self._block_inputs(trace, cotangent)
        where = trace.cache, self._rope(), self.rollout
        gradients, _ = blockwise_gradient(
            self.model, weights, exit_text, blocks, *where, _inner_product
        )
        return gradients

    def _replay(self, weights, texts, trace: UnrolledTrace, keys) -> AVLatents:
        """The scored blocks again from their exit inputs, with gradient along the whole rollout."""
        rope, config = self._rope(), self.rollout
        exit_text, text = texts
        first, rest, cache = trace.first, trace.rest, trace.cache

        @functools.partial(jax.checkpoint, static_argnums=3)
        def step(cache, exit_input: AVLatents, given: Condition | None, is_first: bool):
            forward = bind(self.model, weights, cache, rope, config, first=is_first)
            x0, _ = forward(exit_input, trace.sigma, exit_text, given)
            block = cache.num_blocks
            noise = noise_of_block(keys, block, config, self.model, first=is_first)
            kv = refresh(forward, text, x0, noise, config, given)
            cache = kv_cache.write(cache, kv, config.patches, first=is_first, detach=False)
            return cache, x0

        given, later = self._by_block(trace.condition)
        if first is not None:
            cache, x0 = step(cache, first.exit_input, given, True)
            first = first.replace(x0=x0)
        if rest is not None:
            blocks = rest.exit_input, later
            _, x0 = jax.lax.scan(lambda c, b: step(c, *b, False), cache, blocks)
            rest = rest.replace(x0=x0)
        return _joined(first, rest)

    def _text(self, weights, contexts: Contexts, condition: Condition | None = None) -> TextKV:
        levels = self.config.text_levels(frozen=condition is not None)
        return prompt_kv(self.model, weights, *contexts, levels=levels)

    def _rope(self):
        return self.rollout.rope(self.model, self.num_blocks)

    @property
    def rollout(self) -> RolloutConfig:
        """`config`, with a cache no larger than this rollout fills."""
        cache = self.config.cache.for_clip(self.num_blocks)
        return dataclasses.replace(self.config, cache=cache)

    def _by_block(self, condition: Condition | None) -> tuple[Condition | None, Condition | None]:
        """What is given of block 0, and of the later ones, stacked."""
        if condition is None:
            return None, None
        if self.scored_blocks != self.num_blocks:
            raise ValueError(
                f"a condition is one of all {self.num_blocks} blocks of a rollout, of which only "
                f"{self.scored_blocks} are scored"
            )
        return split_condition(condition, self.config.cache.layout, self.config.patches)

    def _unroll(self, weights, text, keys, exit_step, condition=None):
        """Trace of block 0 (None when it is not scored), traces of the other scored blocks, stacked
        (None when there are none), and the cache in front of the first scored block (which holds
        what comes later as well, where nothing is evicted)."""
        rope, config = self._rope(), self.rollout
        holds = config.cache.holds(self.num_blocks)

        def step(cache, block, given, first):
            noise = noise_of_block(keys, block, config, self.model, first=first)
            trace, cache = block_step(
                self.model,
                weights,
                cache,
                text,
                rope,
                noise,
                config,
                first=first,
                exit_step=exit_step,
                condition=given,
            )
            return cache, trace.replace(kv=None) if holds else trace

        unscored = self.num_blocks - self.scored_blocks
        empty = new_cache(self.model, config, keys.shape[0])
        given, later = self._by_block(condition)
        cache, first = step(empty, 0, given, True)
        before = empty
        if unscored:
            blocks = jnp.arange(1, unscored)
            cache = jax.lax.scan(lambda c, b: (step(c, b, None, False)[0], None), cache, blocks)[0]
            before, first = cache, None
        blocks = jnp.arange(max(unscored, 1), self.num_blocks)
        if not blocks.size:
            return first, None, before
        cache, rest = jax.lax.scan(lambda c, b: step(c, *b, False), cache, (blocks, later))
        if holds:
            before = cache.replace(num_blocks=before.num_blocks)
        return first, rest, before

    def _block_inputs(self, trace: UnrolledTrace, cotangent: AVLatents):
        first, rest, sigma = trace.first, trace.rest, trace.sigma
        layout, patches = self.config.cache.layout, self.config.patches
        given, later_given = self._by_block(trace.condition)
        if first is None:  # every block is uniform
            layout = dataclasses.replace(
                layout,
                first_video_frames=layout.video_frames,
                first_audio_frames=layout.audio_frames,
            )
        first_cotangent, later = split_blocks(cotangent, layout, patches)
        if first is None:
            later = jax.tree.map(
                lambda x, xs: jnp.concatenate([x[None], xs]), first_cotangent, later
            )
        else:
            first = BlockInput(first.exit_input, sigma, first.kv, first_cotangent, given)
        if rest is not None:
            count = jax.tree.leaves(rest)[0].shape[0]
            sigmas = jnp.broadcast_to(sigma, (count, *sigma.shape))
            rest = BlockInput(rest.exit_input, sigmas, rest.kv, later, later_given)
        return first, rest


def _joined(first: BlockTrace | None, rest: BlockTrace | None) -> AVLatents:
    """The clip [B, T, C] of the scored blocks."""
    if rest is None:
        return first.x0
    if first is not None:
        return join_blocks(first.x0, rest.x0)
    later = jax.tree.map(lambda x: x[1:], rest.x0)
    return join_blocks(jax.tree.map(lambda x: x[0], rest.x0), later)


def _inner_product(x0: AVLatents, cotangent: AVLatents) -> tuple[jax.Array, None]:
    """Its gradient pulls `cotangent` back."""
    return jnp.sum(x0.video * cotangent.video) + jnp.sum(x0.audio * cotangent.audio), None


def noise_of_block(
    keys: jax.Array,
    block: jax.Array | int,
    config: RolloutConfig,
    model: Transformer,
    *,
    first: bool,
) -> AVLatents:
    """`block_noise` with a key per sample: [steps, B, T, C] from [B] keys."""

    def one(key: jax.Array) -> AVLatents:
        noise = block_noise(key, block, config, model, 1, first=first)
        return jax.tree.map(lambda n: n[:, 0], noise)

    noise = jax.vmap(one)(fold(keys, RandomUse.ROLLOUT_NOISE))
    return jax.tree.map(lambda n: jnp.moveaxis(n, 0, 1), noise)
