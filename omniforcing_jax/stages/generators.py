"""The two students of distribution matching: how they make a clip, and how a gradient reaches them.

`sample` makes clips without gradient, for the critic. `sample_with_pullback` also returns the
function from a gradient with respect to the clip to a gradient with respect to the weights:
backward simulation (DMD2) means that the clip comes from the student's own steps, and that only the
last of them is differentiated.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from omniforcing_jax import flow, kv_cache, partitioning
from omniforcing_jax.clip import Clip, clip_x0, draw_noise
from omniforcing_jax.models.inputs import TextKV
from omniforcing_jax.models.transformer import Transformer
from omniforcing_jax.rollout import (
    AVLatents,
    BlockTrace,
    RolloutConfig,
    bind,
    block_noise,
    encode_prompt,
    join_blocks,
    new_cache,
    refresh,
    split_blocks,
    traced_block_step,
)
from omniforcing_jax.stages.blockwise import BlockInput, blockwise_gradient
from omniforcing_jax.stages.common import Contexts, fold

Pullback = Callable[[AVLatents], Any]

_EXIT, _NOISE = 1, 2  # uses of a sample's key


@dataclasses.dataclass(frozen=True)
class BidirectionalGenerator:
    """Stage I: a few steps over the whole clip at once.

    Attributes:
      model: bidirectional.
      clip: what is generated.
      sigmas: noise levels of the student, decreasing from 1, with the final 0.
      exit_weights: see `check_exit_weights`.
    """

    model: Transformer
    clip: Clip
    sigmas: tuple[float, ...]
    exit_weights: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_sigmas(self.sigmas)
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
        whole: Any | None = None,
    ) -> AVLatents:
        """Clips [B, T, C] float32 from [B] keys.

        Args:
          step_key: of the training step.
          whole: the weights whole on every device, if there is such a copy.
        """
        with _rollout_weights(weights, whole) as weights:
            x, sigma = self._simulate(weights, contexts, keys)
            return clip_x0(self.model, weights, x, sigma, contexts, self.clip)

    def sample_with_pullback(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        whole: Any | None = None,
    ) -> tuple[AVLatents, Pullback]:
        """As `sample`, and the map from dL/dclip to dL/dweights."""
        with _rollout_weights(weights, whole) as fixed:
            x, sigma = self._simulate(fixed, contexts, keys)

        def last_step(weights):
            return clip_x0(self.model, weights, x, sigma, contexts, self.clip)

        sample, pullback = jax.vjp(last_step, weights)
        return sample, lambda cotangent: pullback(cotangent)[0]

    def generate(self, weights: Any, contexts: Contexts, keys: jax.Array) -> AVLatents:
        """Clips [B, T, C] float32 after all steps, as in use."""
        exits = jnp.full(keys.shape, self.num_steps - 1)
        x, sigma = self._simulate(weights, contexts, keys, exits)
        return clip_x0(self.model, weights, x, sigma, contexts, self.clip)

    def _simulate(self, weights, contexts, keys, exits=None) -> tuple[AVLatents, jax.Array]:
        """The input and the sigma [B] of each sample's last step.

        Each sample exits at a step of its own, drawn among those at which the network is called: at
        sigma 0 the prediction is the input, and its gradient would be zero. The loop stops when the
        last sample of the batch has exited.
        """
        if exits is None:
            exits = exit_steps(fold(keys, _EXIT), self.num_steps, self.exit_weights)
        sigmas = jnp.asarray(self.sigmas, jnp.float32)
        noise_keys = fold(keys, _NOISE)

        def step(i, carry):
            x, exit_input = carry
            sigma = jnp.full(keys.shape, sigmas[i])
            x0 = clip_x0(self.model, weights, x, sigma, contexts, self.clip)
            fresh = draw_noise(fold(noise_keys, i + 1), self.clip, self.model)
            x = jax.tree.map(lambda x0, n: flow.add_noise(x0, n, sigmas[i + 1]), x0, fresh)
            here = (exits == i + 1)[:, None, None]
            return x, jax.tree.map(lambda x, e: jnp.where(here, x, e), x, exit_input)

        x = draw_noise(fold(noise_keys, 0), self.clip, self.model)
        _, exit_input = jax.lax.fori_loop(0, jnp.max(exits), step, (x, x))
        return jax.lax.stop_gradient(exit_input), sigmas[exits]


@dataclasses.dataclass(frozen=True)
class UnrolledGenerator:
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
        _check_sigmas(self.config.sigmas)
        check_exit_weights(self.exit_weights, self.num_steps)
        if not 1 <= self.scored_blocks <= self.num_blocks:
            raise ValueError(
                f"scored_blocks must be between 1 and num_blocks = {self.num_blocks}, not "
                f"{self.scored_blocks}"
            )
        self.config.check_model(self.model)

    @property
    def clip(self) -> Clip:
        """The scored part of the rollout."""
        c = self.config
        whole = self.scored_blocks == self.num_blocks
        layout = c.cache.layout
        return Clip.from_blocks(layout, self.scored_blocks, c.height, c.width, start=whole)

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
        whole: Any | None = None,
    ) -> AVLatents:
        """The scored part [B, T, C] float32 of rollouts from [B] keys.

        Every block exits at the same step, drawn from `step_key`: all hosts draw the same. `whole`
        are the weights whole on every device, if there is such a copy.
        """
        with _rollout_weights(weights, whole) as weights:
            text = self._text(weights, contexts)
            return self._window(*self._unroll(weights, text, keys, self._exit(step_key))[:2])

    def generate(self, weights: Any, contexts: Contexts, keys: jax.Array) -> AVLatents:
        """The scored part [B, T, C] float32 of rollouts with all steps, as in use."""
        text = self._text(weights, contexts)
        return self._window(*self._unroll(weights, text, keys, None)[:2])

    def sample_with_pullback(
        self,
        weights: Any,
        contexts: Contexts,
        keys: jax.Array,
        step_key: jax.Array,
        whole: Any | None = None,
    ) -> tuple[AVLatents, Pullback]:
        """As `sample`, and the map from dL/dclip to dL/dweights.

        The gradient goes through the last step of every scored block, into the weights and into the
        keys and values of the text; earlier steps are detached, and so is the history by default.
        """
        exit_step = self._exit(step_key)
        with _rollout_weights(weights, whole) as fixed:
            text = self._text(fixed, contexts)
            first, rest, cache = self._unroll(fixed, text, keys, exit_step)
        config = self.rollout
        sample = self._window(first, rest)
        sigma = jnp.full(keys.shape, jnp.asarray(self.config.sigmas, jnp.float32)[exit_step])

        def exit_text(weights):
            level = sigma if self.model.config.text_adaln else None
            return self.model.apply({"params": weights}, *contexts, level, method="text_kv")

        def pullback(cotangent: AVLatents):
            blocks = self._block_inputs(first, rest, sigma, cotangent)
            exit_kv, text_pullback = jax.vjp(exit_text, weights)
            gradients, text_gradients, _ = blockwise_gradient(
                self.model,
                weights,
                exit_kv,
                blocks,
                cache,
                self._rope(),
                config,
                _inner_product,
            )
            text_gradients = jax.tree.map(lambda g, t: g.astype(t.dtype), text_gradients, exit_kv)
            (through_text,) = text_pullback(text_gradients)
            return jax.tree.map(lambda g, t: g + t.astype(g.dtype), gradients, through_text)

        def pullback_through_history(cotangent: AVLatents):
            def again(weights):
                texts = exit_text(weights), self._text(weights, contexts)
                return self._replay(weights, texts, first, rest, cache, sigma, keys)

            return jax.vjp(again, weights)[1](cotangent)[0]

        return sample, pullback if self.detach_history else pullback_through_history

    def _replay(self, weights, texts, first, rest, cache, sigma, keys) -> AVLatents:
        """The scored blocks again from their exit inputs, with gradient along the whole rollout."""
        rope, config = self._rope(), self.rollout
        exit_text, text = texts

        @functools.partial(jax.checkpoint, static_argnums=2)
        def step(cache, exit_input: AVLatents, is_first: bool):
            forward = bind(self.model, weights, cache, rope, config, first=is_first)
            x0, _ = forward(exit_input, sigma, exit_text)
            block = cache.num_blocks
            noise = noise_of_block(keys, block, config, self.model, first=is_first)
            kv = refresh(forward, text, x0, noise, config)
            cache = kv_cache.write(cache, kv, config.patches, first=is_first, detach=False)
            return cache, x0

        x0 = None
        if first is not None:
            cache, x0 = step(cache, first.exit_input, True)
        if rest is None:
            return x0
        _, later = jax.lax.scan(lambda c, x: step(c, x, False), cache, rest.exit_input)
        if x0 is None:
            x0, later = jax.tree.map(lambda x: x[0], later), jax.tree.map(lambda x: x[1:], later)
        return join_blocks(x0, later)

    def _exit(self, step_key: jax.Array) -> jax.Array:
        return exit_step(step_key, self.num_steps, self.exit_weights)

    def _text(self, weights, contexts: Contexts) -> TextKV:
        return encode_prompt(self.model, weights, *contexts, levels=self.config.sigma_levels)

    def _rope(self):
        return self.rollout.rope(self.model, self.num_blocks)

    @property
    def rollout(self) -> RolloutConfig:
        """`config`, with a cache no larger than this rollout fills."""
        cache = self.config.cache.for_clip(self.num_blocks)
        return dataclasses.replace(self.config, cache=cache)

    def _unroll(self, weights, text, keys, exit_step):
        """Trace of block 0 (None when it is not scored), traces of the other scored blocks, stacked
        (None when there are none), and the cache in front of the first scored block (which holds
        what comes later as well, where nothing is evicted)."""
        rope, config = self._rope(), self.rollout
        holds = config.cache.holds(self.num_blocks)

        def step(cache, block, first):
            noise = noise_of_block(keys, block, config, self.model, first=first)
            trace, cache = traced_block_step(
                self.model,
                weights,
                cache,
                text,
                rope,
                noise,
                config,
                first=first,
                exit_step=exit_step,
            )
            return cache, trace.replace(kv=None) if holds else trace

        unscored = self.num_blocks - self.scored_blocks
        empty = new_cache(self.model, config, keys.shape[0])
        cache, first = step(empty, 0, True)
        before = empty
        if unscored:
            blocks = jnp.arange(1, unscored)
            cache = jax.lax.scan(lambda c, b: (step(c, b, False)[0], None), cache, blocks)[0]
            before, first = cache, None
        blocks = jnp.arange(max(unscored, 1), self.num_blocks)
        if not blocks.size:
            return first, None, before
        cache, rest = jax.lax.scan(lambda c, b: step(c, b, False), cache, blocks)
        if holds:
            before = cache.replace(num_blocks=before.num_blocks)
        return first, rest, before

    def _window(self, first: BlockTrace | None, rest: BlockTrace | None) -> AVLatents:
        if rest is None:
            return first.x0
        if first is None:
            first, rest = jax.tree.map(lambda x: x[0], rest), jax.tree.map(lambda x: x[1:], rest)
        return join_blocks(first.x0, rest.x0)

    def _block_inputs(self, first, rest, sigma, cotangent):
        layout, patches = self.config.cache.layout, self.config.patches
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
            first = BlockInput(first.exit_input, sigma, first.kv, first_cotangent)
        if rest is not None:
            count = jax.tree.leaves(rest)[0].shape[0]
            sigmas = jnp.broadcast_to(sigma, (count, *sigma.shape))
            rest = BlockInput(rest.exit_input, sigmas, rest.kv, later)
        return first, rest


@contextlib.contextmanager
def _rollout_weights(weights: Any, whole: Any | None) -> Iterator[Any]:
    """What to trace passes without gradient with: the whole weights where there are some."""
    with partitioning.whole_weights(whole is not None):
        yield weights if whole is None else whole


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

    return jax.tree.map(lambda n: jnp.moveaxis(n, 0, 1), jax.vmap(one)(fold(keys, _NOISE)))


def exit_step(
    key: jax.Array, num_steps: int, weights: tuple[float, ...] | None = None
) -> jax.Array:
    """[] int32 step in [0, num_steps): uniform, or in proportion to `weights`."""
    if weights is None:
        return jax.random.randint(key, (), 0, num_steps)
    return jax.random.categorical(key, jnp.log(jnp.asarray(weights))).astype(jnp.int32)


def exit_steps(
    keys: jax.Array, num_steps: int, weights: tuple[float, ...] | None = None
) -> jax.Array:
    """`exit_step` for [B] keys."""
    return jax.vmap(lambda key: exit_step(key, num_steps, weights))(keys)


def check_exit_weights(weights: tuple[float, ...] | None, num_steps: int) -> None:
    """Raises ValueError unless they are as many as the steps, not negative, and not all zero.

    One critic scores the samples of all exits, so what is matched to the data is their mixture:
    early exits that are too narrow are made up for by late ones that are too wide, and the clip
    after all steps is off. Weights (0, ..., 0, 1) match that clip itself; uniform is the paper's.
    """
    if weights is None:
        return
    if len(weights) != num_steps or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"exit_weights must be {num_steps} numbers of 0 or more, one per denoising step and "
            f"not all 0, not {tuple(weights)}"
        )


def _check_sigmas(sigmas: tuple[float, ...]) -> None:
    first = float(flow.check_sigmas(sigmas)[0])
    if abs(first - 1.0) > 1e-6:
        raise ValueError(f"a student starts from noise: sigmas[0] must be 1, not {first}")
