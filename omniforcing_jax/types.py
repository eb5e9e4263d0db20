"""Types that all packages share."""

import flax
import jax
import jax.numpy as jnp

# Text contexts of the video and of the audio stream, each [B, S, text_dim].
Contexts = tuple[jax.Array, jax.Array]

# What networks compute in, by the names that configs and command lines use.
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@flax.struct.dataclass
class AVLatents:
    """One value for each stream: tokens as a rule, or whatever belongs to them.

    Attributes:
      video: [..., T_v, C] latents in the order f, h, w.
      audio: [..., T_a, C] latents, one a token.
    """

    video: jax.Array
    audio: jax.Array
