"""What a loaded pipeline holds, and that it decodes as the whole checkpoint does."""

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.pipeline import decode_clip, load_pipeline
from omniforcing_jax.types import AVLatents


def test_a_sampler_holds_no_encoders(random_checkpoint, random_pipeline):
    """Unless it is asked to; decoding is the same with and without them."""
    sampler = random_pipeline("2.0")
    whole = load_pipeline(random_checkpoint("2.0"), dtype=jnp.float32, encoders=True)
    without = dict(whole.params)
    for name in ("video_vae", "audio_vae"):
        without[name] = {k: tree for k, tree in whole.params[name].items() if k != "encoder"}
        assert jax.tree.leaves(whole.params[name]["encoder"])
    assert "encoder" not in sampler.params["video_vae"] | sampler.params["audio_vae"]
    jax.tree.map(np.testing.assert_array_equal, sampler.params, without)

    config = sampler.config
    channels = config.transformer.video_channels, config.transformer.audio_channels
    video, audio = (jax.random.normal(jax.random.key(1), (1, 8, c)) for c in channels)
    clips = [
        decode_clip(config, params, AVLatents(video, audio), (2, 2, 2), jnp.float32)
        for params in (sampler.params, whole.params)
    ]
    jax.tree.map(np.testing.assert_array_equal, *clips)
