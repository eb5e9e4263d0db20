"""Generating blocks one after the other: the one `block_step` that everything streaming calls.

    for each block:   x <- noise
                      for sigma, next in the few sigmas:         (denoising)
                          x0 <- x - sigma * velocity(x, sigma | history, prompt)
                          x  <- (1 - next) * x0 + next * fresh noise
                      velocity(x0, 0 | history, prompt) writes the block's keys and values (refresh)

All passes are turns of one loop, so that the network is compiled once.

`rollout` scans it over the blocks of a clip in one jitted program; `StreamingSession` calls
the same step from the host, one block at a time. What of a block is given (a `Condition` of its
latents) stays as it is in every step and enters the history like what was generated.
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import (
    StreamRopes,
    join_blocks,
    modalities,
    normal_latents,
    stream_ropes,
)
from omniforcing_jax.models import quantization
from omniforcing_jax.models.transformer.inputs import Pathways, TextKV
from omniforcing_jax.models.transformer.layers import KV, Slots
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import ClipRope
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.conditions import (
    Condition,
    add_noise,
    split_condition,
    velocity_to_x0,
)
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.sampling.weights import is_by_heads, is_per_layer
from omniforcing_jax.types import AVLatents, Contexts


def prompt_kv(
    model: Transformer,
    params,
    video_context: jax.Array,
    audio_context: jax.Array,
    levels: tuple[float, ...],
    dtype: str | None = None,
) -> TextKV:
    """Text keys and values for the noise levels `RolloutConfig.text_levels`, once per prompt.

    Args:
      model, params: the transformer and its parameter tree.
      video_context, audio_context: [B, S, text_dim].
      levels: noise levels in [0, 1].
      dtype: that of the cache, see `CacheConfig`.

    Returns:
      [L, B, S, N, H] arrays; where the text attention is modulated (LTX-2.3) they depend on the
      noise level and have a leading axis of len(levels). By heads, if the weights are.
    """

    def encode(sigma):
        contexts = video_context, audio_context
        text = model.apply({"params": params}, *contexts, sigma, method="text_kv")
        if dtype is not None:
            precision = quantization.PRECISIONS[dtype]
            text = jax.tree.map(lambda x: quantization.quantize(x, -1, precision), text)
        if is_by_heads(params):
            is_kv = lambda x: isinstance(x, KV)  # noqa: E731
            text = jax.tree.map(KV.order_on_tpu, text, is_leaf=is_kv)
        return text

    if not model.config.text_adaln:
        return encode(None)
    batch = video_context.shape[0]
    sigmas = jnp.repeat(jnp.asarray(levels, jnp.float32)[:, None], batch, axis=1)
    return jax.lax.map(encode, sigmas)


def text_kv(
    model: Transformer,
    params,
    contexts: Contexts,
    sigma: jax.Array,
    condition: Condition | None = None,
) -> TextKV:
    """Text keys and values [L, B, S, N, H] at the samples' noise levels `sigma` [B].

    Args:
      contexts: (video, audio) text contexts [B, S, text_dim].
      condition: the level of a stream that is frozen is 0.
    """
    level = sigma if model.config.text_adaln else None
    if level is not None and condition is not None:
        levels = condition.stream_sigma(sigma)
        level = tuple(jnp.broadcast_to(s, sigma.shape) for s in (levels.video, levels.audio))
    return model.apply({"params": params}, *contexts, level, method="text_kv")


def block_noise(
    key: jax.Array,
    block: jax.Array | int,
    config: RolloutConfig,
    model: Transformer,
    batch: int,
    *,
    first: bool,
) -> AVLatents:
    """All noise of a block, from the rollout's key and the block's index alone.

    Args:
      key: of the rollout.
      block: index of the block, from 0.
      config: layout, sizes and steps.
      model: the transformer, for the latents' channels.
      batch: B, samples.
      first: whether this is block 0, whose shape differs.

    Returns:
      AVLatents [steps, B, T, C] float32: the initial noise and that of each later step (and of the
      refresh, when it is noisy). Any block can be redrawn without its predecessors.
    """
    layout = config.cache.layout
    frames = layout.first_video_frames if first else layout.video_frames
    audio_frames = layout.first_audio_frames if first else layout.audio_frames
    draws = config.num_steps + (config.context_noise > 0)
    video_shape = (draws, batch, frames * config.patches, model.config.video_channels)
    audio_shape = (draws, batch, audio_frames, model.config.audio_channels)
    return normal_latents(jax.random.fold_in(key, block), video_shape, audio_shape)


@dataclasses.dataclass(frozen=True)
class BlockForward:
    """The next block's network with everything but latents, sigma and text bound; see `bind`."""

    model: Transformer
    params: dict
    history: Pathways | tuple[Pathways, ...] | None
    ropes: StreamRopes
    keep: Pathways | None = None
    text_mask: jax.Array | None = None

    def __call__(
        self,
        x: AVLatents,
        sigma: jax.Array,
        text: TextKV,
        condition: Condition | None = None,
        *,
        return_kv: bool = False,
    ):
        """Clean prediction of x [B, T, C] at noise level sigma [] or [B], and the block's K/V.

        What `condition` gives has noise level 0, and its own values in the prediction.
        """
        batch = x.video.shape[0]
        sigmas = jnp.broadcast_to(sigma.reshape(-1, 1), (batch, 1)).astype(jnp.float32)
        sigmas, stream_sigma = AVLatents(sigmas, sigmas), None
        if condition is not None:
            sigmas = condition.sigma(sigmas.video)
            stream_sigma = condition.stream_sigma(sigma.astype(jnp.float32))
            stream_sigma = jax.tree.map(lambda s: jnp.broadcast_to(s, (batch,)), stream_sigma)
        how = {"context_mask": self.text_mask, "global_sigma": stream_sigma}
        video, audio = modalities(x, sigmas, self.ropes, **how)
        (video, audio), kv = self.model.clone(return_kv=return_kv).apply(
            {"params": self.params}, video, audio, history=self.history, text=text, keep=self.keep
        )
        return velocity_to_x0(x, AVLatents(video, audio), sigma, condition), kv

    def over(self, buffers: tuple[Pathways, ...]) -> "BlockForward":
        """The same with other contents of the `Slots`."""
        history = jax.tree.map(
            lambda slots, kv: slots.replace(kv=kv),
            self.history,
            buffers,
            is_leaf=lambda x: isinstance(x, Slots),
        )
        return dataclasses.replace(self, history=history)


@flax.struct.dataclass
class BlockTrace:
    """How a block came about; training needs more of it than the latents.

    Attributes:
      x0: the block's clean latents [B, T, C] float32.
      exit_input: [B, T, C] the noisy input of the forward pass that predicted `x0`.
      kv: keys and values [L, B, S, N, H] that the refresh wrote, keys not rotated; None where the
        cache will hold them as long as they are needed, and with weights per layer.
    """

    x0: AVLatents
    exit_input: AVLatents
    kv: Pathways | None


def block_step(
    model: Transformer,
    params,
    cache: RollingCache,
    text: TextKV,
    rope: ClipRope,
    noise: AVLatents,
    config: RolloutConfig,
    *,
    first: bool,
    full: bool = False,
    exit_step: jax.Array | None = None,
    condition: Condition | None = None,
    text_mask: jax.Array | None = None,
) -> tuple[BlockTrace, RollingCache]:
    """Generates the next block and writes its keys and values.

    Args:
      model, params: the student and its parameter tree.
      cache: of all blocks so far, from `new_cache`; its counter says which block this is.
      text: keys and values from `prompt_kv` for `config.text_levels`.
      rope: from `config.rope`.
      noise: [steps, B, T, C] float32, from `block_noise`.
      config: how blocks are generated; that of `cache`, `text` and `rope`.
      first: whether this is block 0 (another shape, no history, the sinks).
      full: whether this block is behind `cache.config.capacity` others; with weights per layer
        its attention needs no mask then.
      exit_step: [] int32 the denoising step whose prediction is the block; None is the last one.
      condition: what of the block is given; None is nothing.
      text_mask: [B, S] boolean, True = attend; None attends to all of the text.

    Returns:
      The block (`x0` [B, T, C] float32) and how it came about, and the cache with the block in it.
    """
    how = {"first": first, "full": full, "text_mask": text_mask}
    forward = bind(model, params, cache, rope, config, **how)
    kv = cache.buffers
    if first or not is_per_layer(params):
        kv = kv_cache.empty_block(cache, config.patches, model.dtype, first=first)
    x0, exit_input, kv = passes(forward, text, noise, kv, config, exit_step, condition)
    with jax.named_scope("write_cache"):
        cache = kv_cache.write(cache, kv, config.patches, first=first)
    return BlockTrace(x0, exit_input, None if is_per_layer(params) else kv), cache


def write_block(
    model: Transformer,
    params,
    cache: RollingCache,
    text: TextKV,
    rope: ClipRope,
    noise: AVLatents,
    config: RolloutConfig,
    condition: Condition,
    *,
    first: bool,
    text_mask: jax.Array | None = None,
) -> RollingCache:
    """Writes the keys and values of a block that is there already, by its refresh pass alone.

    Args:
      condition: the block's latents as `clean`; those that were generated (mask 1) get the context
        noise, like in `block_step`, whose other arguments these are.
    """
    forward = bind(model, params, cache, rope, config, first=first, text_mask=text_mask)
    with jax.named_scope("refresh"):
        kv = refresh(forward, text, condition.clean, noise, config, condition)
    with jax.named_scope("write_cache"):
        return kv_cache.write(cache, kv, config.patches, first=first)


def passes(
    forward: BlockForward,
    text: TextKV,
    noise: AVLatents,
    kv: Any,
    config: RolloutConfig,
    exit_step: jax.Array | None = None,
    condition: Condition | None = None,
) -> tuple[AVLatents, AVLatents, Any]:
    """Denoising (predict x0, add fresh noise of the next level, repeat), then the refresh.

    Args:
      kv: what a pass writes: the buffers of a cache per layer, or zeros of the shapes of the
        block's keys and values.

    Returns:
      The last prediction of x0 [B, T, C], the input [B, T, C] it was made from, and keys and values
      of the refresh, as `kv`.
    """
    levels, steps = jnp.asarray(config.sigma_levels, jnp.float32), config.num_steps
    last = steps - 1 if exit_step is None else exit_step
    draws = noise.video.shape[0]
    in_slots = forward.history is not None and is_per_layer(forward.params)

    def one_pass(i, carry):
        x, x0, exit_input, kv = carry
        refreshing = i > last
        level = jnp.where(refreshing, steps, i)
        text_i = text_at(forward.model, text, text_level(level, config, condition))
        here = forward.over(kv) if in_slots else forward
        prediction, kv = here(x, levels[level], text_i, condition, return_kv=True)
        keep = functools.partial(jax.tree.map, lambda old, new: jnp.where(refreshing, old, new))
        x0, exit_input = keep(x0, prediction), keep(exit_input, x)
        # Where the next level is 0, whatever noise stands there is multiplied by zero.
        following = jnp.where(i >= last, steps, i + 1)
        fresh = jax.tree.map(lambda n: n[jnp.minimum(following, draws - 1)], noise)
        return add_noise(x0, fresh, levels[following], condition), x0, exit_input, kv

    x = jax.tree.map(lambda n: n[0], noise)
    if condition is not None:
        x = condition.start(x)
    with jax.named_scope("passes"):
        _, x0, exit_input, kv = jax.lax.fori_loop(0, last + 2, one_pass, (x, x, x, kv))
    return x0, exit_input, kv


def text_level(
    step: jax.Array | int, config: RolloutConfig, condition: Condition | None
) -> AVLatents | jax.Array | int:
    """At which noise level each stream reads the text: one that is frozen is clean.

    Args:
      step: of denoising; their number stands for the refresh.

    Returns:
      Index of `config.text_levels`, [] or for each stream [B or 1].
    """
    if condition is None:
        return step
    clean = len(config.text_levels(frozen=True)) - 1
    return jax.tree.map(lambda f: jnp.where(f, clean, step), condition.frozen)


def text_at(model: Transformer, text: TextKV, level: AVLatents | jax.Array | int) -> TextKV:
    """Text K/V at one of the noise levels for which `prompt_kv` made them.

    Args:
      level: index of the level, [], or for each stream [B or 1].
    """
    if not model.config.text_adaln:
        return text
    if not isinstance(level, AVLatents):
        return jax.tree.map(lambda t: t[level], text)

    def of_samples(level: jax.Array):
        if level.shape[0] == 1:
            return lambda t: t[level[0]]
        # the batch is the fourth axis from behind, with or without one of layers
        return lambda t: jax.vmap(lambda t, i: t[i], in_axes=(-4, 0), out_axes=-4)(t, level)

    def at_level(text: TextKV) -> TextKV:
        return TextKV(
            jax.tree.map(of_samples(level.video), text.video),
            jax.tree.map(of_samples(level.audio), text.audio),
        )

    return jax.tree.map(at_level, text, is_leaf=lambda t: isinstance(t, TextKV))


def refresh(
    forward: BlockForward,
    text: TextKV,
    x0: AVLatents,
    noise: AVLatents,
    config: RolloutConfig,
    condition: Condition | None = None,
) -> Pathways:
    """One more pass over the finished block at `context_noise`: its keys and values."""
    if config.context_noise > 0:
        last = jax.tree.map(lambda n: n[-1], noise)
        x0 = add_noise(x0, last, config.context_noise, condition)
    text = text_at(forward.model, text, text_level(config.num_steps, config, condition))
    _, kv = forward(x0, jnp.float32(config.context_noise), text, condition, return_kv=True)
    return kv


def bind(
    model: Transformer,
    params,
    cache: RollingCache,
    rope: ClipRope,
    config: RolloutConfig,
    *,
    first: bool,
    full: bool = False,
    keep: Pathways | None = None,
    text_mask: jax.Array | None = None,
) -> BlockForward:
    """Reads the cache and places the next block: all its forward passes share the result.

    Args:
      full: see `block_step`.
      keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).
      text_mask: [B, S] boolean, True = attend; None attends to all of the text.
    """
    layout, patches = config.cache.layout, config.patches
    if first:
        video_frames = jnp.arange(layout.first_video_frames)
        audio_frames = jnp.arange(layout.first_audio_frames)
        history = None
    else:
        position = config.cache.position_of(cache.num_blocks) - 1
        video_frames = layout.first_video_frames + position * layout.video_frames
        video_frames = video_frames + jnp.arange(layout.video_frames)
        audio_frames = layout.first_audio_frames + position * layout.audio_frames
        audio_frames = audio_frames + jnp.arange(layout.audio_frames)
        if is_per_layer(params):
            history = kv_cache.slots(cache, rope, patches, full=full)
        else:
            with jax.named_scope("rotate_history"):
                history = kv_cache.history(cache, rope, model.config.rope_type, patches)
    sinks = first and model.config.num_audio_sinks > 0
    ropes = stream_ropes(rope, video_frames, audio_frames, sinks=sinks)
    return BlockForward(model, params, history, ropes, keep, text_mask)


def new_cache(
    model: Transformer, config: RolloutConfig, batch: int, params: Any = None
) -> RollingCache:
    """An empty cache for a rollout.

    Args:
      model: the transformer; keys and values have its dtype.
      config: cache and sizes.
      batch: B, samples.
      params: the weights that it is used with; needed where they lie per layer.

    Returns:
      Keys and values [L, B, S, N, H] for each attention, or of each layer, of zeros, and no blocks.
      Where the weights lie by heads, so do they.
    """
    how = {"batch": batch, "patches": config.patches, "dtype": model.dtype}
    how["per_layer"] = params is not None and is_per_layer(params)
    how["by_heads"] = params is not None and is_by_heads(params)
    return kv_cache.init_cache(config.cache, model.config, **how)


@functools.partial(jax.jit, static_argnames=("model", "config", "num_blocks", "batch"))
def rollout(
    model: Transformer,
    params,
    text: TextKV,
    rope: ClipRope,
    key: jax.Array,
    *,
    config: RolloutConfig,
    num_blocks: int,
    batch: int,
    condition: Condition | None = None,
) -> AVLatents:
    """Generates a whole clip: block 0, then a scan over the uniform blocks, in one program.

    Args:
      model, params: the student and its parameter tree.
      text: keys and values from `prompt_kv` for `config.text_levels`.
      rope: from `config.rope`, for `num_blocks` or more.
      key: a key, from which each block's noise follows.
      config: how blocks are generated.
      num_blocks: K, block 0 included.
      batch: B, samples.
      condition: what of the clip is given; None is nothing.

    Returns:
      AVLatents of the clip, [B, T, C] float32 (T over all frames).

    Raises:
      ValueError: no blocks, or tables made for fewer blocks.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
    config.check_rope(rope, num_blocks)
    given, later = None, None
    if condition is not None:
        given, later = split_condition(condition, config.cache.layout, config.patches)

    def step(cache, block, given, first):
        noise = block_noise(key, block, config, model, batch, first=first)
        trace, cache = block_step(
            model, params, cache, text, rope, noise, config, first=first, condition=given
        )
        return cache, trace.x0

    cache, x0 = step(new_cache(model, config, batch, params), 0, given, True)
    if num_blocks == 1:
        return x0
    blocks = jnp.arange(1, num_blocks)
    _, rest = jax.lax.scan(lambda c, b: step(c, *b, False), cache, (blocks, later))
    return join_blocks(x0, rest)  # of [K - 1, B, T, C] later blocks
