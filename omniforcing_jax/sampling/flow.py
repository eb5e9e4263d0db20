"""Rectified flow: sigma schedules, noising, and the maps between velocity and clean prediction.

Conventions: sigma lies in [0, 1] and 1 is pure noise; x = (1 - sigma) x0 + sigma noise; the network
predicts the velocity v = noise - x0. Everything here computes and returns float32, whatever the
inputs are: sigmas and the few operations on them decide the sampled trajectory.

Arrays are [B, T, ...]: tokens [B, T, C], or latents [B, F, h, w, C] with one sigma per frame.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Sigmas of the distilled LTX-2 checkpoint: first stage, and the second (upsampled) stage.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_STAGE2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

# The schedule's log-shift mu is a line through these two (tokens, mu) points, and its last non-zero
# sigma is stretched to the terminal value.
_MU_POINTS = ((1024, 0.95), (4096, 2.05))
_TERMINAL_SIGMA = 0.1
MOST_STEPS = 1000  # of a schedule, as of the noise levels that models are trained on
SCHEDULE_STEPS = 40  # of the schedule that the student's levels are picked from
STUDENT_TIMESTEPS = (1000, 909, 725, 421)  # of OmniForcing's four-step students
SCHEDULES = ("ltx2", "distilled")


def ltx2_schedule(num_steps: int, num_tokens: int = 4096) -> np.ndarray:
    """Sigmas of the LTX-2 sampler.

    sigma = e^mu / (e^mu + 1/s - 1) with s linear from 1 to 0 and mu linear in the token count, then
    1 - sigma is stretched so that the last non-zero sigma is 0.1. The reference pipelines use
    4096 tokens whatever the size of the video, hence the default.

    Args:
      num_steps: number of denoising steps N, 2 to `MOST_STEPS`.
      num_tokens: video token count that sets the shift mu.

    Returns:
      [N + 1] float32, strictly decreasing from 1 to 0.

    Raises:
      ValueError: fewer than 2 steps (the first and the terminal sigma would coincide), or more than
        anybody takes, or no tokens.
    """
    if not 2 <= num_steps <= MOST_STEPS:
        raise ValueError(
            f"num_steps is {num_steps}; the schedule needs at least 2 steps, and has at most "
            f"{MOST_STEPS}"
        )
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; it must be positive")
    (tokens_0, mu_0), (tokens_1, mu_1) = _MU_POINTS
    mu = mu_0 + (mu_1 - mu_0) * (num_tokens - tokens_0) / (tokens_1 - tokens_0)
    s = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    sigmas = np.exp(mu) / (np.exp(mu) + 1.0 / s - 1.0)
    sigmas = 1.0 - (1.0 - sigmas) * (1.0 - _TERMINAL_SIGMA) / (1.0 - sigmas[-1])
    return np.append(sigmas, 0.0).astype(np.float32)


def schedule(name: str) -> np.ndarray:
    """The schedule that a student's levels are picked from, [N + 1] float32.

    Args:
      name: "ltx2", the teacher's 40 steps, or "distilled", the levels of LTX-2's own distillation.

    Raises:
      ValueError: another name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"the schedule is {name!r}, must be one of {', '.join(SCHEDULES)}")
    return ltx2_schedule(SCHEDULE_STEPS) if name == "ltx2" else np.float32(DISTILLED_SIGMAS)


def student_sigmas(
    timesteps: Sequence[float] = STUDENT_TIMESTEPS, sigmas: Sequence[float] | None = None
) -> np.ndarray:
    """Sigmas of the few-step student: the entries of the teacher's schedule nearest to t / 1000.

    Args:
      timesteps: decreasing, in (0, 1000]; one per denoising step, without the final 0.
      sigmas: the schedule to pick from; None is the teacher's 40 steps.

    Returns:
      [len(timesteps) + 1] float32 with the final 0.

    Raises:
      ValueError: timesteps out of range, not decreasing, or so close that two of them pick the same
        entry of the schedule.
    """
    targets = np.asarray(timesteps, np.float64)
    if targets.ndim != 1 or not targets.size:
        raise ValueError(f"timesteps must be a non-empty list of numbers, got {timesteps}")
    if not np.all((targets > 0) & (targets <= 1000)):
        raise ValueError(
            f"timesteps must lie in (0, 1000] (the final 0 is implied), got {timesteps}"
        )
    levels = schedule("ltx2") if sigmas is None else np.asarray(sigmas, np.float32)
    nearest = np.abs(levels[None, :-1] - targets[:, None] / 1000.0).argmin(axis=1)
    if np.any(np.diff(nearest) <= 0):
        raise ValueError(
            f"timesteps {tuple(timesteps)} pick the entries {nearest.tolist()} of the "
            f"{len(levels) - 1}-step schedule; they must decrease and pick different entries"
        )
    return np.append(levels[nearest], np.float32(0.0))


def check_sigmas(sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns `sigmas` as [N + 1] float32 after checking that a sampler can use them.

    Raises:
      ValueError: not a list of at least two numbers, a value outside [0, 1] or not finite, not
        strictly decreasing, or not ending with 0.
    """
    values = np.asarray(sigmas, np.float32)
    shown = np.array2string(values, precision=6, separator=", ", threshold=16)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(
            f"sigmas must be a list of at least two numbers (one step and the final 0), got {shown}"
        )
    if not np.all((values >= 0.0) & (values <= 1.0)):  # also false for NaN
        raise ValueError(f"sigmas must lie between 0 (clean) and 1 (noise), got {shown}")
    if values[-1] != 0.0:
        raise ValueError(f"sigmas must end with 0 (a clean sample), got {shown}")
    if not np.all(np.diff(values) < 0.0):
        raise ValueError(f"sigmas must strictly decrease, from noise to clean, got {shown}")
    return values


def per_token(sigma: jax.typing.ArrayLike, num_tokens: int) -> jax.Array:
    """One sigma per token from one per sample, per frame (any contiguous group), or per token.

    Args:
      sigma: [], [B] or [B, S]; S divides `num_tokens` and each entry serves num_tokens / S
        consecutive tokens.
      num_tokens: T.

    Returns:
      [B, T] float32; [1, T] for a scalar, which broadcasts over the batch.

    Raises:
      ValueError: more than two axes, or S does not divide T.
    """
    sigma = jnp.asarray(sigma, jnp.float32)
    if sigma.ndim > 2:
        raise ValueError(f"sigma must have shape [], [B] or [B, S], got {list(sigma.shape)}")
    sigma = sigma.reshape(sigma.shape[0] if sigma.ndim else 1, -1)  # [B, S]
    groups = sigma.shape[1]
    if groups == 0 or num_tokens % groups:
        raise ValueError(
            f"{groups} sigmas per sample cannot be spread over {num_tokens} tokens; give one per "
            "sample or a number that divides the token count"
        )
    return jnp.repeat(sigma, num_tokens // groups, axis=1)  # [B, T]


def velocity_to_x0(
    x: jax.typing.ArrayLike, velocity: jax.typing.ArrayLike, sigma: jax.typing.ArrayLike
) -> jax.Array:
    """Clean prediction x0 = x - sigma v, float32, from `x` and `velocity` [B, T, ...]."""
    x, velocity = _float32(x, velocity)
    return x - _sigma_like(sigma, x) * velocity


def x0_to_velocity(
    x: jax.typing.ArrayLike, x0: jax.typing.ArrayLike, sigma: jax.typing.ArrayLike
) -> jax.Array:
    """Velocity v = (x - x0) / sigma, float32; 0 where sigma is 0, for a clean token stays put."""
    x, x0 = _float32(x, x0)
    sigma = _sigma_like(sigma, x)
    noisy = sigma > 0.0
    # The inner `where` keeps 0 / 0 out of the backward pass as well.
    return jnp.where(noisy, (x - x0) / jnp.where(noisy, sigma, 1.0), 0.0)


def add_noise(
    x0: jax.typing.ArrayLike, noise: jax.typing.ArrayLike, sigma: jax.typing.ArrayLike
) -> jax.Array:
    """Noisy sample x = (1 - sigma) x0 + sigma noise, float32, from `x0` and `noise` [B, T, ...]."""
    x0, noise = _float32(x0, noise)
    sigma = _sigma_like(sigma, x0)
    return (1.0 - sigma) * x0 + sigma * noise


def euler_step(
    x: jax.typing.ArrayLike,
    x0: jax.typing.ArrayLike,
    sigma: jax.typing.ArrayLike,
    sigma_next: jax.typing.ArrayLike,
) -> jax.Array:
    """One Euler step of dx/dsigma = v: x + (sigma_next - sigma) (x - x0) / sigma, float32."""
    x, x0 = _float32(x, x0)
    step = _sigma_like(sigma_next, x) - _sigma_like(sigma, x)
    return x + step * x0_to_velocity(x, x0, sigma)


def ancestral_step(
    x: jax.typing.ArrayLike,
    x0: jax.typing.ArrayLike,
    noise: jax.typing.ArrayLike,
    sigma: jax.typing.ArrayLike,
    sigma_next: jax.typing.ArrayLike,
) -> jax.Array:
    """One ancestral Euler step: down to sigma_next^2 / sigma, and up again by fresh noise.

    The signal is scaled to 1 - sigma_next, and the variance is that of a clip at this level:
    LTX-2.5's distilled sampler (eta 1). x0 itself where sigma_next is 0.

    Args:
      x, x0, noise: [B, T, ...].
      sigma, sigma_next: noise levels, see `per_token`.

    Returns:
      float32.
    """
    x, x0 = _float32(x, x0)
    noise = jnp.asarray(noise, jnp.float32)
    sigma, sigma_next = _sigma_like(sigma, x), _sigma_like(sigma_next, x)
    down = sigma_next * sigma_next / sigma
    lower = (down / sigma) * x + (1.0 - down / sigma) * x0
    signal = (1.0 - sigma_next) / (1.0 - down)
    added = jnp.sqrt(jnp.maximum(sigma_next**2 - (down * signal) ** 2, 0.0))
    return jnp.where(sigma_next > 0.0, signal * lower + added * noise, x0)


def _float32(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both arrays in float32; they must have one shape, or a broadcast would go unnoticed."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    if x.shape != y.shape:
        raise ValueError(f"shapes {list(x.shape)} and {list(y.shape)} differ; they must be equal")
    return x, y


def _sigma_like(sigma: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """Sigma per token with trailing axes of length 1, to broadcast against x [B, T, ...]."""
    sigma = per_token(sigma, x.shape[1])  # [B, T]
    if sigma.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"sigma is for {sigma.shape[0]} samples, the array holds {x.shape[0]}")
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 2))
