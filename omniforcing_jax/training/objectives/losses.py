"""Losses of the three stages, per sample: DMD, flow matching, and regression.

Every loss is the mean over the samples of a number that depends on one sample alone. That is what
makes gradient accumulation exact: the mean over microbatches is the mean over the batch.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from omniforcing_jax.ranges import NOT_NEGATIVE, check_fields
from omniforcing_jax.types import AVLatents

_EPS = 1e-8
SIGMA_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """lambda_v and lambda_a.

    Raises:
      ValueError: one is negative or not finite, or both are 0.
    """

    video: float = 1.0
    audio: float = 1.0

    def __post_init__(self):
        check_fields(self, "loss.", video=NOT_NEGATIVE, audio=NOT_NEGATIVE)
        if self.video == self.audio == 0:
            raise ValueError("loss: video and audio are both 0: nothing is left to train on")


def dmd_gradient(
    x: jax.Array, fake: jax.Array, real: jax.Array, weight: jax.Array | float = 1.0
) -> jax.Array:
    """Normalised DMD gradient g = (fake - real) / (mean |x - real| + 1e-8), the mean per sample.

    The normaliser makes the gradient of all noise levels comparable: where sigma is large, both
    predictions are far from x. Unlike the reference, NaN is not replaced by 0: it shall stop a run.

    Args:
      x: [B, T, C] generated.
      fake, real: [B, T, C] clean predictions of critic and (guided) teacher for a noisy x.
      weight: [B, T, 1] of the tokens in all means, see `Condition.token_weights`.

    Returns:
      [B, T, C] float32, the direction in which x is to be decreased.
    """
    x, fake, real = (jnp.asarray(a, jnp.float32) for a in (x, fake, real))
    normaliser = jnp.mean(weight * jnp.abs(x - real), axis=(1, 2), keepdims=True)
    return (fake - real) / (normaliser + _EPS)


def dmd_loss(gradient: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
    """[B]: 0.5 mean((x - stopgrad(x - g))^2) = 0.5 mean(g^2), whose gradient is g / (T C)."""
    return 0.5 * jnp.mean(weight * jnp.square(gradient), axis=(1, 2))


def flow_matching_loss(
    velocity: jax.Array, x0: jax.Array, noise: jax.Array, weight: jax.Array | float = 1.0
) -> jax.Array:
    """[B]: mean((v - (noise - x0))^2), in float32, of arrays [B, T, C]."""
    error = jnp.square(velocity.astype(jnp.float32) - (noise - x0).astype(jnp.float32))
    return jnp.mean(weight * error, axis=(1, 2))


def total(per_sample: AVLatents, weights: LossWeights) -> jax.Array:
    """The scalar loss lambda_v L_v + lambda_a L_a from per-sample losses [B]."""
    return weights.video * jnp.mean(per_sample.video) + weights.audio * jnp.mean(per_sample.audio)


def report(
    name: str,
    per_sample: AVLatents,
    weights: LossWeights,
    sigma: AVLatents | jax.Array | None = None,
    generated: AVLatents | None = None,
) -> dict[str, jax.Array]:
    """Scalars for the log: the losses, and their means over bands of sigma.

    Args:
      name: prefix: `generator` or `critic`.
      per_sample: [B] losses.
      sigma: see `bands`; None: no bands.
      generated: [B] boolean, samples whose stream was not given as a whole. None: all.

    Returns:
      {"name/loss", "name/loss_video", "name/loss_audio", "band/name_video_0.25-0.5", ...}. The loss
      is what is minimised, the mean over all samples; the others are means over those in which the
      stream is generated, NaN where there is none.
    """
    means = jax.tree.map(jnp.mean, per_sample)
    if generated is not None:
        means = jax.tree.map(_mean, per_sample, generated)
    metrics = {
        f"{name}/loss": total(per_sample, weights),
        f"{name}/loss_video": means.video,
        f"{name}/loss_audio": means.audio,
    }
    if sigma is not None:
        metrics |= bands(name, per_sample, sigma)
    return metrics


def bands(name: str, values: AVLatents, sigma: AVLatents | jax.Array) -> dict[str, jax.Array]:
    """Mean loss per modality and band of sigma; a band without a value is NaN.

    Args:
      values: [N] losses.
      sigma: [N] noise levels they were taken at, of both streams or of each; those at 0 do not
        count.
    """
    sigma = sigma if isinstance(sigma, AVLatents) else AVLatents(sigma, sigma)
    metrics = {}
    for low, high in itertools.pairwise(SIGMA_BANDS):
        for stream in ("video", "audio"):
            level = getattr(sigma, stream)
            mean = _mean(getattr(values, stream), (level > low) & (level <= high))
            metrics[f"band/{name}_{stream}_{low:g}-{high:g}"] = mean
    return metrics


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.sum(where)
