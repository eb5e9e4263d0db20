"""Types that all packages share."""

import jax.numpy as jnp

# What networks compute in, by the names that configs and command lines use.
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
