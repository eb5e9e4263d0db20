"""Types that all packages share."""

import enum

import flax
import jax
import jax.numpy as jnp

# Text contexts of the video and of the audio stream, each [B, S, text_dim].
Contexts = tuple[jax.Array, jax.Array]

# What networks compute in, by the names that configs and command lines use.
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


class RandomUse(enum.IntEnum):
    """What a training sample's random key is folded with: an independent draw for each use.

    What a run draws follows from these numbers, so they are never given anew.
    """

    EXIT = 1
    ROLLOUT_NOISE = 2
    SCORE_SIGMA = 11
    SCORE_NOISE = 12
    GUIDANCE = 13
    SAMPLE = 14
    REGRESSION_LEVEL = 21
    REGRESSION_NOISE = 22
    CLEAN_STATE = 23
    CONDITION = 31


@flax.struct.dataclass
class AVLatents:
    """One value for each stream: tokens as a rule, or whatever belongs to them.

    Attributes:
      video: [..., T_v, C] latents in the order f, h, w.
      audio: [..., T_a, C] latents, one a token.
    """

    video: jax.Array
    audio: jax.Array
