"""The FLOP count against XLA's own, on a model small enough for XLA to unroll nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from omniforcing_jax import flops
from omniforcing_jax.models.config import TransformerConfig, tiny
from omniforcing_jax.models.inputs import Modality
from omniforcing_jax.models.rope import clip_rope
from omniforcing_jax.models.transformer import Transformer, init_params


def test_forward_flops_match_xla():
    config = tiny(num_layers=1, video_head_dim=64, audio_head_dim=32, video_context_dim=128,
                  audio_context_dim=64)  # fmt: skip
    model = Transformer(config, implementation="xla")
    params = jax.eval_shape(lambda k: init_params(model, k), jax.random.key(0))
    frames, audio_frames, text = 4, 26, 8
    rope = clip_rope(config, video_frames=frames, audio_frames=audio_frames, height=4, width=4)

    def forward(params, video, audio, contexts):
        sigma = jnp.ones((1, 1))
        index, audio_index = jnp.arange(frames), jnp.arange(audio_frames)
        text = model.apply({"params": params}, *contexts, method="text_kv")
        v = Modality(video, sigma, rope.video_rope(index), rope.video_cross_rope(index))
        a = Modality(audio, sigma, rope.audio_rope(audio_index), rope.audio_cross_rope(audio_index))
        return model.apply({"params": params}, v, a, text=text)[0]

    shape = jax.ShapeDtypeStruct
    contexts = (shape((1, text, 12), jnp.float32),) * 2
    inputs = shape((1, frames * 16, 4), jnp.float32), shape((1, audio_frames, 6), jnp.float32)
    compiled = jax.jit(forward).lower(params, *inputs, contexts).compile()
    ours = flops.text_flops(config, text) + flops.forward_flops(
        config,
        video_tokens=frames * 16,
        audio_tokens=audio_frames,
        video_keys=frames * 16,
        audio_keys=audio_frames,
        text_tokens=text,
    )
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


def test_published_size():
    """A standard block forward of the 19B model at 5 s of context costs about 36 TFLOP."""
    config = dataclasses.replace(TransformerConfig())
    one = flops.forward_flops(
        config,
        video_tokens=1152,
        audio_tokens=25,
        video_keys=6144,
        audio_keys=126,
        text_tokens=1024,
    )
    assert 3.2e13 < one < 4.0e13
