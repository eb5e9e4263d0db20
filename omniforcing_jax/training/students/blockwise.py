"""Gradients through blocks that were generated, or given, one after the other.

A block's forward pass depends on the weights through its own tokens and through the text; the
history it attends to is detached (Self-Forcing; paper section 3.4). Therefore the backward pass can
visit the blocks one by one, in order, over the same rolling cache: each block's pass is run again
with gradient, its gradient is added up, and its keys and values join the history: they are in the
cache still, or, where the window is shorter than the clip, were stored and are written again. The
memory is that of one block's backward pass and one cache, whatever the number of blocks;
differentiating a scan over the cache would keep one cache per block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import split_blocks
from omniforcing_jax.models.transformer.inputs import Pathways, TextKV
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import ClipRope
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.conditions import Condition, split_condition
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.student import RolloutConfig, bind, new_cache, text_kv
from omniforcing_jax.types import AVLatents


@flax.struct.dataclass
class BlockInput:
    """One block's forward pass, or those of K - 1 blocks stacked on a leading axis.

    Attributes:
      x: [B, T, C] noisy tokens.
      sigma: [B] their noise level.
      kv: keys and values [L, B, S, N, H] that the finished block contributes to the history; None
        when the cache holds those of all blocks already.
      extra: what the loss reads.
      condition: what of the block is given.
    """

    x: AVLatents
    sigma: jax.Array
    kv: Pathways | None
    extra: Any
    condition: Condition | None = None


# (clean prediction [B, T, C], extra) -> (scalar whose gradient is taken, values to be returned)
BlockLoss = Callable[[AVLatents, Any], tuple[jax.Array, Any]]


def blockwise_gradient(
    model: Transformer,
    weights: Any,
    text_of: Callable[[Any], TextKV],
    blocks: tuple[BlockInput | None, BlockInput | None],
    cache: RollingCache,
    rope: ClipRope,
    config: RolloutConfig,
    loss: BlockLoss,
) -> tuple[Any, Any]:
    """Gradient of the sum of `loss` over blocks, with respect to the weights.

    Args:
      weights: parameters in the compute dtype.
      text_of: weights -> text K/V for the noise level of the blocks.
      blocks: block 0 (None when the cache already holds it), and later blocks stacked (or None).
      cache: the cache in front of the first of them. If nothing is evicted, it may be the one after
        the last of them with its counter set back: what lies behind the counter is not read.

    Returns:
      Gradients of the weights, float32, and the loss's values per block, stacked in their order.
    """
    text, text_pullback = jax.vjp(text_of, weights)

    def visit(carry, block: BlockInput, first: bool):
        cache, gradients, text_gradients = carry
        forward = bind(model, weights, cache, rope, config, first=first)

        def objective(weights, text):
            differentiated = dataclasses.replace(forward, params=weights)
            x0, _ = differentiated(block.x, block.sigma, text, block.condition)
            return loss(x0, block.extra)

        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (new, new_text), values = gradient(weights, text)
        gradients = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), gradients, new)
        text_gradients = jax.tree.map(
            lambda t, g: t + g.astype(jnp.float32), text_gradients, new_text
        )
        if block.kv is None:
            cache = cache.replace(num_blocks=cache.num_blocks + 1)
        else:
            cache = kv_cache.write(cache, block.kv, config.patches, first=first)
        return (cache, gradients, text_gradients), values

    def zeros(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

    carry = (cache, zeros(weights), zeros(text))
    all_values = []
    first, rest = blocks
    if first is not None:
        carry, values = visit(carry, first, True)
        all_values.append(jax.tree.map(lambda v: v[None], values))
    if rest is not None:
        carry, values = jax.lax.scan(lambda c, b: visit(c, b, False), carry, rest)
        all_values.append(values)
    values = jax.tree.map(lambda *v: jnp.concatenate(v), *all_values)
    _, gradients, text_gradients = carry
    text_gradients = jax.tree.map(lambda g, t: g.astype(t.dtype), text_gradients, text)
    (through_text,) = text_pullback(text_gradients)
    return jax.tree.map(lambda g, t: g + t.astype(g.dtype), gradients, through_text), values


@flax.struct.dataclass
class NoisyBlock:
    """What the loss of `teacher_forced_gradient` reads of a block; arrays as in `BlockInput`."""

    x: AVLatents
    sigma: jax.Array
    targets: tuple[AVLatents, ...]


def teacher_forced_gradient(
    model: Transformer,
    weights: Any,
    contexts: tuple[jax.Array, jax.Array],
    clean: AVLatents,
    noisy: AVLatents,
    sigma: jax.Array,
    targets: tuple[AVLatents, ...],
    config: RolloutConfig,
    loss: BlockLoss,
    condition: Condition | None = None,
) -> tuple[Any, Any]:
    """Gradient of a loss on noisy blocks, each of which sees the clean blocks before it.

    This is what the network is asked while sampling, at once for all blocks of a given clip.

    Args:
      contexts: (video, audio) text contexts [B, S, text_dim].
      clean, noisy: whole clips [B, T, C].
      sigma: [B, K] noise level of every block. Where text attention is modulated (LTX-2.3), the
        levels of a sample must be equal.
      targets: clips [B, T, C] that the loss needs.
      loss: (clean prediction of a block, NoisyBlock) -> (scalar, values).
      condition: what of the clip is given.

    Returns:
      Gradients of the weights of the sum over blocks, float32, and the values per block.
    """
    num_blocks = sigma.shape[1]
    config = dataclasses.replace(config, cache=config.cache.for_clip(num_blocks))
    layout, patches = config.cache.layout, config.patches
    rope = config.rope(model, num_blocks)
    given = (None, None)
    if condition is not None:
        given = split_condition(condition, layout, patches)

    def text_of(weights):
        return text_kv(model, weights, contexts, sigma[:, 0], condition)

    clean_level = jnp.full(sigma.shape[:1], config.context_noise)
    clean_text = text_kv(model, weights, contexts, clean_level)
    holds = config.cache.holds(num_blocks)

    def write_clean(cache, block: AVLatents, given: Condition | None, first: bool):
        forward = bind(model, weights, cache, rope, config, first=first)
        level = jnp.float32(config.context_noise)
        _, kv = forward(block, level, clean_text, given, return_kv=True)
        cache = kv_cache.write(cache, kv, patches, first=first)
        return cache, None if holds else kv

    cache = empty = new_cache(model, config, sigma.shape[0])
    first_clean, later_clean = split_blocks(jax.lax.stop_gradient(clean), layout, patches)
    cache, first_kv = write_clean(cache, first_clean, given[0], True)
    later = later_clean, given[1]
    cache, later_kv = jax.lax.scan(lambda c, b: write_clean(c, *b, False), cache, later)
    start = cache.replace(num_blocks=empty.num_blocks) if holds else empty
    parts = [split_blocks(clip, layout, patches) for clip in (noisy, *targets)]

    def block_input(which: int, sigma, kv) -> BlockInput:
        x, *block_targets = (part[which] for part in parts)
        extra = NoisyBlock(x, sigma, tuple(block_targets))
        return BlockInput(x, sigma, kv, extra, given[which])

    first = block_input(0, sigma[:, 0], first_kv)
    rest = block_input(1, sigma[:, 1:].T, later_kv) if num_blocks > 1 else None
    return blockwise_gradient(model, weights, text_of, (first, rest), start, rope, config, loss)
