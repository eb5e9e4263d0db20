"""ODE trajectories: chosen states of a sampled clip, and the velocity that led away from each.

Stage II regresses a student to them (Eq. 6). Two models make them:

  * a bidirectional one, guided or not: the states of `teacher.sample`;
  * an autoregressive one: block after block over a rolling cache of clean blocks, each block by the
    same many Euler steps. The states of all blocks at one noise level together are that state of
    the clip. A student can reach such a target, as it depends on no future (Causal Forcing).

The velocity stored with a state is the slope of the Euler step taken there, and hence the guided
model's own prediction at that state.
"""

import functools
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.geometry import ClipGeometry, draw_noise, join_blocks, split_blocks
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow, kv_cache
from omniforcing_jax.sampling.conditions import Condition, split_condition
from omniforcing_jax.sampling.guidance import AVGuidance, guide, interleave_rows
from omniforcing_jax.sampling.student import (
    RolloutConfig,
    bind,
    new_cache,
    text_kv,
)
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig, check_prompts, sample
from omniforcing_jax.types import AVLatents

AUTOREGRESSIVE_PASSES = ("cond", "uncond")


@flax.struct.dataclass
class Trajectory:
    """Chosen states of a batch of clips, float32.

    Attributes:
      states: AVLatents [B, S, T, C], from noise (sigma 1) to clean (sigma 0).
      velocities: AVLatents [B, S - 1, T, C] at all states but the last.
    """

    states: AVLatents
    velocities: AVLatents


def schedule_indices(schedule: Sequence[float], chosen: Sequence[float]) -> tuple[int, ...]:
    """Where the chosen noise levels stand in a schedule.

    Args:
      schedule: sigmas of the sampler, decreasing from 1 to 0.
      chosen: some of them, from the first to the last (`flow.student_sigmas` picks such).

    Raises:
      ValueError: a level that the schedule does not have, or the noise or the clean clip left out.
    """
    schedule, chosen = flow.check_sigmas(schedule), flow.check_sigmas(chosen)
    found = [np.flatnonzero(schedule == sigma) for sigma in chosen]
    foreign = [f"{sigma:.6g}" for sigma, at in zip(chosen, found, strict=True) if not at.size]
    if foreign:
        raise ValueError(
            f"the {len(schedule) - 1}-step schedule has no noise level {', '.join(foreign)}; pick "
            "the stored ones with flow.student_sigmas for the same number of steps"
        )
    if chosen[0] != schedule[0]:
        raise ValueError(
            f"the first stored state must be the noise (sigma {schedule[0]:g}, timestep 1000), not "
            f"sigma {chosen[0]:.6g}: that is where a student starts"
        )
    return tuple(int(at[0]) for at in found)


def sample_trajectory(
    model: Transformer,
    params,
    prompt: Prompt | tuple[jax.Array, jax.Array],
    negative: Prompt | tuple[jax.Array, jax.Array] | None,
    keys: jax.Array,
    config: SampleConfig,
    indices: tuple[int, ...],
    condition: Condition | None = None,
) -> Trajectory:
    """Trajectories of a bidirectional model.

    Args:
      prompt, negative: as for `teacher.sample`.
      keys: [B] keys, one per clip.
      config: clip, schedule and guidance.
      indices: of the stored states, from `schedule_indices`.
      condition: what is given: the same in all states.

    Raises:
      ValueError: see `teacher.sample`.
    """
    visited = sample(
        model, params, prompt, negative, keys, config, condition=condition, trajectory=True
    )
    return _choose(visited, config.sigmas, indices)


def autoregressive_trajectory(
    model: Transformer,
    params,
    prompt: Prompt | tuple[jax.Array, jax.Array],
    negative: Prompt | tuple[jax.Array, jax.Array] | None,
    keys: jax.Array,
    config: RolloutConfig,
    num_blocks: int,
    guidance: AVGuidance,
    indices: tuple[int, ...],
    condition: Condition | None = None,
) -> Trajectory:
    """Trajectories of a block-causal model, every block with the finished ones as clean history.

    The passes that guidance needs are rows of one batch, each with its own history: that of the
    negative prompt has read the same blocks under the negative prompt.

    Args:
      prompt: text contexts [B, S, text_dim] of video and audio.
      negative: [B or 1, S, text_dim]; None exactly when cfg is 1 for both modalities.
      keys: [B] keys, one per clip. A clip's noise is that of `sample_trajectory` with this key.
      config: cache and sizes; `sigmas` is the whole schedule.
      num_blocks: of the clip.
      guidance: cfg and rescale of both modalities.
      indices: of the stored states, from `schedule_indices`.
      condition: what of the clip is given: the same in all states.

    Raises:
      ValueError: contexts that do not fit, guidance that an autoregressive model does not have, or
        a schedule that does not start from noise.
    """
    prompt = Prompt(*prompt)
    negative = None if negative is None else Prompt(*negative)
    check_autoregressive(config, guidance)
    check_prompts(model, prompt, negative, guidance)
    if any(p is not None and p.mask is not None for p in (prompt, negative)):
        raise ValueError("an autoregressive model attends to whole contexts; leave out the masks")
    contexts = [prompt[:2]]
    if negative is not None:
        contexts.append(
            tuple(
                jnp.broadcast_to(n, p.shape) for n, p in zip(negative[:2], prompt[:2], strict=True)
            )
        )
    layout = config.cache.layout
    clip = ClipGeometry.from_blocks(layout, num_blocks, config.height, config.width)
    noise = draw_noise(keys, clip, model)
    if condition is not None:
        condition.check(noise)
        condition = condition.of_batch(keys.shape[0])
    return _roll_out(
        model,
        params,
        tuple(interleave_rows(passes) for passes in zip(*contexts, strict=True)),
        noise,
        config.rope(model, num_blocks),
        condition,
        config=config,
        guidance=guidance,
        indices=indices,
    )


def check_autoregressive(config: RolloutConfig, guidance: AVGuidance) -> None:
    """Raises ValueError for settings that `autoregressive_trajectory` does not take."""
    unknown = [name for name in guidance.passes() if name not in AUTOREGRESSIVE_PASSES]
    if unknown:
        raise ValueError(
            f"the guidance runs the passes {', '.join(unknown)}, but an autoregressive model is "
            "guided by the negative prompt alone: set stg to 0 and modality to 1"
        )
    if config.sigmas[0] != 1.0:
        raise ValueError(f"blocks start from noise: sigmas[0] must be 1, not {config.sigmas[0]}")
    if config.context_noise:
        raise ValueError(
            f"the history of an ODE trajectory is clean; context_noise must be 0, not "
            f"{config.context_noise}"
        )


@functools.partial(jax.jit, static_argnames=("model", "config", "guidance", "indices"))
def _roll_out(model, params, contexts, noise, rope, condition, *, config, guidance, indices):
    """`contexts` [B * P, S, text_dim] of P passes, `noise` [B, T, C] of the whole clip."""
    batch, passes = noise.video.shape[0], guidance.passes()
    clean = jnp.float32(0.0)
    cache = new_cache(model, config, batch * len(passes), params)

    def rows(tree):  # [B, ...] -> [B * P, ...]
        return jax.tree.map(lambda x: interleave_rows([x] * len(passes)), tree)

    def level_text(sigma):
        levels = jnp.broadcast_to(sigma, (batch * len(passes),))
        return text_kv(model, params, contexts, levels, rows(condition))

    fixed = None if model.config.text_adaln else level_text(clean)

    def text_at(sigma):  # one level at a time: those of all steps would not fit into memory
        return level_text(sigma) if fixed is None else fixed

    def guided_x0(forward, x, sigma, given):
        x0, _ = forward(rows(x), sigma, text_at(sigma), rows(given))

        def combine(x0, guidance):
            x0 = x0.reshape(batch, len(passes), *x0.shape[1:])  # [B, P, T, C]
            uncond = x0[:, 1] if "uncond" in passes else None
            return guide(x0[:, 0], uncond, None, None, guidance, per_sample_std=True)

        x0 = jax.tree.map(combine, x0, AVLatents(*guidance))
        return x0 if given is None else given.keep(x0)

    def block(cache, noise, given, first):
        forward = bind(model, params, cache, rope, config, first=first)

        def step(x, levels):
            sigma, sigma_next = levels
            x0 = guided_x0(forward, x, sigma, given)
            x = jax.tree.map(lambda x, x0: flow.euler_step(x, x0, sigma, sigma_next), x, x0)
            return x, x

        sigmas = jnp.asarray(config.sigmas, jnp.float32)
        noise = noise if given is None else given.start(noise)
        x0, visited = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
        _, kv = forward(rows(x0), clean, text_at(clean), rows(given), return_kv=True)
        cache = kv_cache.write(cache, kv, config.patches, first=first)
        visited = jax.tree.map(lambda n, xs: jnp.concatenate([n[None], xs]), noise, visited)
        return cache, _choose(visited, config.sigmas, indices)

    first_noise, later_noise = split_blocks(noise, config.cache.layout, config.patches)
    given, later_given = None, None
    if condition is not None:
        given, later_given = split_condition(condition, config.cache.layout, config.patches)
    cache, first = block(cache, first_noise, given, True)
    if not later_noise.video.shape[0]:
        return first
    later = later_noise, later_given
    _, rest = jax.lax.scan(lambda c, b: block(c, *b, False), cache, later)

    # [B, S, T, C] and [K - 1, B, S, T, C] -> [B, S, T_clip, C]
    join = jax.vmap(join_blocks, in_axes=(1, 2), out_axes=1)
    return Trajectory(join(first.states, rest.states), join(first.velocities, rest.velocities))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _choose(visited: AVLatents, sigmas: tuple[float, ...], indices: tuple[int, ...]) -> Trajectory:
    """States at every sigma [N + 1, B, T, C] -> the chosen ones, batch first."""
    here = np.asarray(indices)
    levels = np.asarray(sigmas, np.float32)
    steps = (levels[1:] - levels[:-1])[here[:-1], None, None, None]

    def states(x):
        return jnp.moveaxis(x[here], 0, 1)

    def velocities(x):
        return jnp.moveaxis((x[here[:-1] + 1] - x[here[:-1]]) / steps, 0, 1)

    return Trajectory(jax.tree.map(states, visited), jax.tree.map(velocities, visited))
