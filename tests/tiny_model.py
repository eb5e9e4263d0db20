"""Tiny random models and their inputs, for the tests of the core."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Modality, Transformer, init_params
from omniforcing_jax.models.transformer.rope import ClipRope
from omniforcing_jax.types import AVLatents

# For `jax.jit(compiler_options=...)`: these programs run for milliseconds and compile for seconds.
QUICK_COMPILE = (
    {} if os.environ.get("TEST_XLA") == "default" else {"xla_backend_optimization_level": 0}
)

# LTX-2.3's departures from 2.0, at tiny size.
LTX23_CHANGES = {
    "text_adaln": True,
    "gated_attention": True,
    "cross_timestep": "other",
    "perturbation": "value",
    "caption_channels": None,
}

# LTX-2.5's departures from 2.3, besides.
LTX25_CHANGES = LTX23_CHANGES | {"keyframe_embedding": True, "video_ff_bias": False}


def modalities(
    config: TransformerConfig,
    rope: ClipRope,
    x: AVLatents,
    sigmas: tuple,
    frames: tuple,
    contexts: tuple | None,
    *,
    sinks: bool = False,
) -> tuple[Modality, Modality]:
    """Both streams; `sigmas` [B, G], `frames` [F] and `contexts` are (video, audio) pairs."""
    video_frames, audio_frames = (jnp.asarray(f) for f in frames)
    sinks = sinks and config.num_audio_sinks > 0
    patches = x.video.shape[1] // video_frames.shape[0]
    video_context, audio_context = contexts or (None, None)
    return (
        Modality(
            x.video,
            jnp.asarray(sigmas[0], jnp.float32),
            rope.video_rope(video_frames),
            rope.video_cross_rope(video_frames),
            video_context,
            keyframes=jnp.repeat(video_frames == 0, patches)[None],
        ),
        Modality(
            x.audio,
            jnp.asarray(sigmas[1], jnp.float32),
            rope.audio_rope(audio_frames, sinks),
            rope.audio_cross_rope(audio_frames, sinks),
            audio_context,
        ),
    )


def random_latents(
    config: TransformerConfig,
    video_tokens: int,
    audio_tokens: int,
    *,
    batch: int = 1,
    seed: int = 0,
) -> AVLatents:
    """Standard normal tokens of both streams, [B, T, C]."""
    rng = np.random.default_rng(seed)

    def draw(tokens, channels):
        return jnp.asarray(rng.standard_normal((batch, tokens, channels)), jnp.float32)

    return AVLatents(
        draw(video_tokens, config.video_channels), draw(audio_tokens, config.audio_channels)
    )


def random_contexts(config: TransformerConfig, *, batch: int = 1, length: int = 3, seed: int = 0):
    """(video, audio) text features [B, S, text_dim]."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, length, dim)), jnp.float32)
        for dim in config.text_dims
    )


def abstract_params(config: TransformerConfig) -> dict:
    """Shapes and dtypes of the model's parameters, allocating nothing."""

    return jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))


def random_params(config: TransformerConfig, seed: int = 0) -> dict:
    """Parameters of which none is zero, so that every mechanism shows in the outputs."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "kernel":
                x *= leaf.shape[-2] ** -0.5
            case "scale":
                x = 1 + 0.2 * x
            case "bias":
                x *= 0.1
            case "alpha":
                x = 0.5 + 0.1 * x
            case _:
                x *= 0.3
        return jnp.asarray(x, leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))
