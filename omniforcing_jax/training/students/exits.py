"""At which step a student of a few steps stops, while it is trained."""

import jax
import jax.numpy as jnp

from omniforcing_jax.sampling import flow


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


def check_starts_from_noise(sigmas: tuple[float, ...]) -> None:
    """Raises ValueError unless a sampler can use them and the first is 1."""
    first = float(flow.check_sigmas(sigmas)[0])
    if abs(first - 1.0) > 1e-6:
        raise ValueError(f"a student starts from noise: sigmas[0] must be 1, not {first}")
