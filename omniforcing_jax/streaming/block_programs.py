"""The jitted programs that a session runs for each block."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.ops.attention import platform
from omniforcing_jax.sampling import kv_cache, student
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.sampling.weights import is_per_layer
from omniforcing_jax.streaming.given import is_whole
from omniforcing_jax.types import AVLatents


@functools.partial(
    jax.jit,
    static_argnames=("model", "config", "batch", "first", "full"),
    donate_argnames=("cache",),
)
def generate_block(
    model,
    params,
    cache,
    text,
    rope,
    key,
    text_mask=None,
    condition=None,
    *,
    config,
    batch,
    first,
    full=False,
    exit_step=None,
) -> tuple[AVLatents, RollingCache]:
    """`student.block_step` with its noise drawn from (key, block index): latents and cache."""
    noise = student.block_noise(key, cache.num_blocks, config, model, batch, first=first)
    how = {"first": first, "full": full, "text_mask": text_mask, "condition": condition}
    how["exit_step"] = exit_step
    trace, cache = student.block_step(model, params, cache, text, rope, noise, config, **how)
    return trace.x0, kv_cache.constrained(cache)


@functools.partial(
    jax.jit, static_argnames=("model", "config", "batch", "first"), donate_argnames=("cache",)
)
def write_block(
    model, params, cache, text, rope, key, text_mask, condition, *, config, batch, first
) -> tuple[AVLatents, RollingCache]:
    """The same for a block that is there already: `student.write_block`."""
    noise = student.block_noise(key, cache.num_blocks, config, model, batch, first=first)
    block = params, cache, text, rope, noise, config, condition
    cache = student.write_block(model, *block, first=first, text_mask=text_mask)
    return condition.clean, kv_cache.constrained(cache)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def written_anew(cache, num_blocks, patches) -> RollingCache:
    """`kv_cache.written_anew`."""
    return kv_cache.constrained(kv_cache.written_anew(cache, num_blocks, patches))


@jax.jit
def all_finite(latents: AVLatents) -> jax.Array:
    """Whether there are numbers only, [] boolean."""
    return jnp.isfinite(latents.video).all() & jnp.isfinite(latents.audio).all()


def block_program(condition: Condition | None):
    """What makes a block: of one that is given as a whole only keys and values are."""
    return write_block if is_whole(condition) else generate_block


def fills_cache(params, config: RolloutConfig, num_blocks: int | None) -> bool:
    """Whether so many blocks (None: without end) fill all slots of a cache per layer.

    Attention needs no mask then, and there is a program for it, but not on a CPU, where a mask
    costs little and a program seconds of the time to the first picture.
    """
    fills = num_blocks is None or num_blocks > config.cache.capacity
    return is_per_layer(params) and fills and platform() != "cpu"


jitted_prompt_kv = jax.jit(student.prompt_kv, static_argnames=("model", "levels", "dtype"))


def latent_shapes(
    block: int, config: RolloutConfig, model: Transformer, batch: int, device: Sharding | None
) -> AVLatents:
    """[B, T, C] of a block's latents, as `generate_block` gives them."""
    layout = config.cache.layout
    tokens = layout.video_frames_in(block) * config.patches, layout.audio_frames_in(block)
    channels = model.config.video_channels, model.config.audio_channels
    return AVLatents(
        *(
            on_device((batch, *size), jnp.float32, device)
            for size in zip(tokens, channels, strict=True)
        )
    )


def place_of(params: Any) -> Sharding | None:
    """Where all that is not split lies: the device of a tree of parameters, or each of their mesh.

    None where they are not committed to any.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding if isinstance(sharding, SingleDeviceSharding) else None


def first_device(place: Sharding | None) -> Sharding | None:
    """Of a mesh the first device, which decodes; another place is itself."""
    if isinstance(place, NamedSharding):
        return SingleDeviceSharding(place.mesh.devices.flat[0])
    return place


def on_mesh(place: Sharding | None) -> contextlib.AbstractContextManager:
    """In here programs are traced and called for the mesh of a place, if it has one."""
    if isinstance(place, NamedSharding):
        return jax.set_mesh(place.mesh)
    return contextlib.nullcontext()


def placed(state: Any, device: Sharding | None) -> Any:
    """A decoder's state where programs expect it; its counters, which are numbers, as they are."""
    arrays = jax.Array, np.ndarray
    return jax.tree.map(lambda x: jax.device_put(x, device) if isinstance(x, arrays) else x, state)


def on_device(shape: tuple, dtype: jnp.dtype, device: Sharding | None) -> jax.ShapeDtypeStruct:
    """What stands for an array there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device)
