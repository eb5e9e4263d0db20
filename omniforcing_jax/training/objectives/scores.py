"""Score networks of distribution matching distillation: where teacher and critic look at a sample.

A generated clip is noised to a random level; the frozen teacher (real score, with classifier-free
and spatio-temporal guidance) and the critic (fake score) each predict the clean clip from it. They
see it either

  * bidirectionally, one pass over the whole clip (the paper), or
  * block-causally: every noisy block with the clean blocks before it as history, which is what the
    student sees while it generates (the autoregressive scores of SALT++).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.geometry import ClipGeometry, join_blocks, split_blocks
from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.ranges import NOT_NEGATIVE
from omniforcing_jax.sampling import flow, kv_cache
from omniforcing_jax.sampling.conditions import Condition, split_condition, velocity_to_x0
from omniforcing_jax.sampling.guidance import Guidance
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.student import (
    RolloutConfig,
    bind,
    new_cache,
    text_kv,
)
from omniforcing_jax.sampling.whole_clip import clip_x0
from omniforcing_jax.types import AVLatents, Contexts

_TABLE_STEPS = 1000
CONTEXTS = ("bidirectional", "block_causal")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How generated samples are scored.

    Attributes:
      video_cfg, audio_cfg: the teacher's guidance scales w: a number, or a range (low, high) from
        which every sample draws its own.
      stg, stg_blocks: its spatio-temporal guidance, of both streams, as in `guidance.Guidance`.
      min_timestep, max_timestep: timesteps are drawn from 0..999 and clipped to these.
      context: "bidirectional" or "block_causal".
    """

    video_cfg: float | tuple[float, float] = 3.0
    audio_cfg: float | tuple[float, float] = 5.0
    min_timestep: int = 20
    max_timestep: int = 980
    context: str = "bidirectional"
    stg: float = 0.0
    stg_blocks: tuple[int, ...] = ()

    def __post_init__(self):
        _ = self.perturbation  # is checked
        if not 0 < self.min_timestep <= self.max_timestep <= _TABLE_STEPS:
            raise ValueError(
                f"timesteps must satisfy 0 < min <= max <= {_TABLE_STEPS}, not "
                f"{self.min_timestep} and {self.max_timestep}"
            )
        if self.context not in CONTEXTS:
            raise ValueError(f"score context must be one of {CONTEXTS}, not {self.context!r}")
        for name in ("video_cfg", "audio_cfg"):
            scale = getattr(self, name)
            pair = scale if isinstance(scale, (tuple, list)) else (scale, scale)
            if len(pair) != 2 or not all(x in NOT_NEGATIVE for x in pair) or pair[0] > pair[1]:
                raise ValueError(f"{name} must be a scale >= 0 or a range (low, high), not {scale}")

    @property
    def perturbation(self) -> Guidance:
        """The spatio-temporal guidance alone."""
        return Guidance(stg=self.stg, stg_blocks=self.stg_blocks)

    def passes(self) -> tuple[str, ...]:
        """Names of the teacher's passes, in the order of `guidance.PASSES`."""
        cfg = any(_range(cfg) != (1.0, 1.0) for cfg in (self.video_cfg, self.audio_cfg))
        needed = {"cond": True, "uncond": cfg, "perturbed": self.stg != 0.0}
        return tuple(name for name, need in needed.items() if need)


def _range(scale: float | tuple[float, float]) -> tuple[float, float]:
    low, high = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    return float(low), float(high)


@functools.cache
def sigma_table() -> np.ndarray:
    """[1001] float32: sigma of the timesteps 0..1000, the LTX-2 schedule of 1000 steps reversed."""
    return flow.ltx2_schedule(_TABLE_STEPS)[::-1].copy()


def draw_sigmas(keys: jax.Array, config: ScoreConfig) -> jax.Array:
    """One noise level per sample, [B] from [B] keys; the same for both modalities."""
    timesteps = jax.vmap(lambda key: jax.random.randint(key, (), 0, _TABLE_STEPS))(keys)
    return sigma_of(timesteps, config)


def sigma_of(timesteps: jax.Array, config: ScoreConfig) -> jax.Array:
    """Sigma of integer timesteps after clipping."""
    clipped = jnp.clip(timesteps, config.min_timestep, config.max_timestep)
    return jnp.asarray(sigma_table())[clipped]


def draw_guidance(keys: jax.Array, config: ScoreConfig) -> AVLatents:
    """Guidance scales of both modalities, each [B] from [B] keys."""

    def draw(stream: int, scale) -> jax.Array:
        low, high = _range(scale)
        if low == high:
            return jnp.full(keys.shape, low, jnp.float32)
        subkeys = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
        return jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(subkeys)

    return AVLatents(draw(0, config.video_cfg), draw(1, config.audio_cfg))


def guide_each(
    predictions: Mapping[str, jax.Array], cfg: jax.Array, config: ScoreConfig
) -> jax.Array:
    """The teacher's guided prediction of one stream: `guidance.guide` with a scale per sample.

    Args:
      predictions: {pass: clean prediction [B, T, C]} of `config.passes()`.
      cfg: [B] classifier-free guidance scales.
    """
    cond = predictions["cond"]
    scales = {"uncond": cfg[:, None, None] - 1.0, "perturbed": config.stg}
    return cond + sum(
        w * (cond - predictions[name]) for name, w in scales.items() if name in predictions
    )


@dataclasses.dataclass(frozen=True)
class BlockContext:
    """What the block-causal context needs: the student's rollout, with a score network's model.

    Attributes:
      config: the layout must have the score network's sinks (none for LTX-2 itself).
      num_blocks: of the clip.
    """

    config: RolloutConfig
    num_blocks: int


def predict_x0(
    model: Transformer,
    params,
    x0: AVLatents,
    noisy: AVLatents,
    sigma: jax.Array,
    contexts: Contexts,
    clip: ClipGeometry,
    blocks: BlockContext | None = None,
    keep: Pathways | None = None,
    condition: Condition | None = None,
) -> AVLatents:
    """Clean prediction of a noisy clip.

    Args:
      x0: [B, T, C] the clean clip, read only as history of a block-causal context.
      noisy: [B, T, C], x0 with noise at level `sigma` [B].
      contexts: (video, audio) [B, S, text_dim].
      blocks: None is the bidirectional context.
      keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).
      condition: what of the clip is given.
    """
    if blocks is None:
        return clip_x0(model, params, noisy, sigma, contexts, clip, keep, condition)
    velocity = block_causal_velocity(
        model, params, x0, noisy, sigma, contexts, blocks, keep, condition
    )
    return velocity_to_x0(noisy, velocity, sigma, condition)


def block_causal_velocity(
    model: Transformer,
    params,
    x0: AVLatents,
    noisy: AVLatents,
    sigma: jax.Array,
    contexts: Contexts,
    blocks: BlockContext,
    keep: Pathways | None = None,
    condition: Condition | None = None,
) -> AVLatents:
    """Velocities of the noisy blocks [B, T, C], each with the clean blocks before it as history.

    The same passes as in a rollout: one over the noisy block, one over the clean block that writes
    its keys and values (which carry no gradient).
    """
    config = blocks.config
    layout, patches = config.cache.layout, config.patches
    rope = config.rope(model, blocks.num_blocks)
    text = text_kv(model, params, contexts, sigma, condition)
    level = jnp.full_like(sigma, config.context_noise)
    clean_text = text_kv(model, params, contexts, level)
    given = (None, None) if condition is None else split_condition(condition, layout, patches)

    def step(cache: RollingCache, clean, noisy, given: Condition | None, first: bool):
        """A noisy block's velocity; then its clean version joins the history."""
        forward = bind(model, params, cache, rope, config, first=first, keep=keep)
        x0, _ = forward(noisy, sigma, text, given)
        sigmas = AVLatents(sigma, sigma) if given is None else given.sigma(sigma)
        velocity = jax.tree.map(flow.x0_to_velocity, noisy, x0, sigmas)
        _, kv = forward(jax.lax.stop_gradient(clean), level, clean_text, given, return_kv=True)
        return kv_cache.write(cache, kv, config.patches, first=first), velocity

    first_clean, clean = split_blocks(x0, layout, patches)
    first_noisy, later_noisy = split_blocks(noisy, layout, patches)
    cache = new_cache(model, config, noisy.video.shape[0])
    cache, first = step(cache, first_clean, first_noisy, given[0], True)
    if blocks.num_blocks == 1:
        return first
    later = clean, later_noisy, given[1]
    _, rest = jax.lax.scan(lambda c, b: step(c, *b, False), cache, later)
    return join_blocks(first, rest)
