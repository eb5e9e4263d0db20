"""The stabilisers of the paper's Table 3: sinks and their RoPE, QK-norm, tanh gates, none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.models.transformer.config import TransformerConfig, tiny
from omniforcing_jax.models.transformer.inputs import Modality
from omniforcing_jax.models.transformer.layers import Attention
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.models.transformer.rope import clip_rope
from tests.tiny_model import QUICK_COMPILE, abstract_params, random_params

FRAMES, AUDIO_FRAMES = 4, 26


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def apply(model, params, video, audio):
    return model.apply({"params": params}, video, audio)[0]


def velocities(config: TransformerConfig, change=None):
    params = random_params(config, 0)
    if change:
        params = change(params)
    rope = clip_rope(config, video_frames=FRAMES, audio_frames=AUDIO_FRAMES, height=1, width=2)
    sinks = config.num_audio_sinks > 0
    frames, audio_frames = jnp.arange(FRAMES), jnp.arange(AUDIO_FRAMES)
    keys = jax.random.split(jax.random.key(1), 3)
    context = jax.random.normal(keys[2], (1, 3, 12))
    video = Modality(
        jax.random.normal(keys[0], (1, FRAMES * 2, 4)),
        jnp.full((1, 1), 0.5),
        rope.video_rope(frames),
        rope.video_cross_rope(frames),
        context,
    )
    audio = Modality(
        jax.random.normal(keys[1], (1, AUDIO_FRAMES, 6)),
        jnp.linspace(0.2, 0.9, AUDIO_FRAMES)[None],
        rope.audio_rope(audio_frames, sinks),
        rope.audio_cross_rope(audio_frames, sinks),
        context,
    )
    return apply(Transformer(config), params, video, audio)


def test_sinks_are_dropped_from_the_output_and_take_part():
    plain = velocities(tiny())
    with_sinks = velocities(tiny(num_audio_sinks=4))
    assert [x.shape for x in with_sinks] == [x.shape for x in plain]
    larger = velocities(
        tiny(num_audio_sinks=4), lambda p: {**p, "audio_sinks": 50 * p["audio_sinks"]}
    )
    for a, b in zip(
        with_sinks, larger, strict=True
    ):  # seen by the audio and, through A2V, by the video
        assert np.abs(np.asarray(a) - b).max() > 1e-4


def test_sink_rope():
    """Eq. 8: identity rotation; incremental sinks count back from t = 0 at 25 Hz."""
    config = tiny(num_audio_sinks=3)
    sizes = {"video_frames": 1, "audio_frames": 5, "height": 1, "width": 1}
    index = jnp.arange(5)
    identity = clip_rope(config, **sizes).audio_rope(index, sinks=True)
    np.testing.assert_array_equal(identity.cos[0, :3], 1.0)
    np.testing.assert_array_equal(identity.sin[0, :3], 0.0)
    incremental = dataclasses.replace(config, sink_rope="incremental")
    table = clip_rope(incremental, **sizes)
    for rope in (table.audio_rope(index, sinks=True), table.audio_cross_rope(index, sinks=True)):
        lowest = np.arctan2(rope.sin[0, :, 0, 0], rope.cos[0, :, 0, 0])  # f_0 = pi / 2
        seconds = (lowest / (np.pi / 2) + 1) / 2 * 20
        np.testing.assert_allclose(seconds[:3], [-0.13, -0.09, -0.05], atol=1e-4)
        np.testing.assert_allclose(seconds[3:6], [0.005, 0.03, 0.07], atol=1e-4)


def test_tanh_gate_starts_closed():
    """At alpha = 0 the four causal attentions contribute nothing; text attention still does."""
    config = tiny(tanh_gated_attention=True)

    def zeroed(params, what, names=("video_attn", "audio_attn", "a2v_attn", "v2a_attn")):
        blocks = dict(params["blocks"])
        for name in names:
            zeros = jax.tree.map(jnp.zeros_like, blocks[name][what])
            blocks[name] = {**blocks[name], what: zeros}
        return {**params, "blocks": blocks}

    def closed_gates(params):
        return zeroed(params, "alpha")

    def zero_outputs(params):
        return zeroed(params, "out")

    def open_audio(params):
        return zeroed(params, "alpha", ("video_attn", "a2v_attn", "v2a_attn"))

    @jax.jit
    def alpha(key):
        return init_params(Transformer(config), key)["blocks"]["a2v_attn"]["alpha"]

    np.testing.assert_array_equal(alpha(jax.random.key(0)), np.zeros((2, 1)))
    closed = velocities(config, closed_gates)
    for a, b in zip(closed, velocities(config, zero_outputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    assert np.abs(np.asarray(closed[1]) - velocities(config, open_audio)[1]).max() > 1e-4


def test_qk_norm_bounds_the_logits():
    """Per head, |q| = |k| = sqrt(H) whatever the projections are."""
    attention = Attention(2, 8, 16, 1e-6, jnp.float32, "split", head_norm=True)
    x = 100 * jax.random.normal(jax.random.key(0), (1, 5, 16))
    variables = attention.init(
        jax.random.key(1), x, method=lambda m, x: m(x, m.queries(x), m.keys_values(x))
    )
    kv = attention.apply(variables, x, method="keys_values")
    np.testing.assert_allclose(jnp.linalg.norm(kv.k, axis=-1), np.sqrt(8), rtol=1e-3)
    normed = tiny(extra_qk_norm=True)
    assert {
        name
        for name, weights in abstract_params(normed)["blocks"].items()
        if isinstance(weights, dict) and {"q_head_norm", "k_head_norm"} <= weights.keys()
    } == {"video_attn", "audio_attn", "a2v_attn", "v2a_attn"}
    for a, b in zip(velocities(normed), velocities(tiny()), strict=True):
        assert np.isfinite(a).all() and np.abs(np.asarray(a) - b).max() > 1e-3


def test_keyframes_of_ltx25():
    config = tiny(keyframe_embedding=True, video_ff_bias=False)
    params = jax.eval_shape(lambda k: init_params(Transformer(config), k), jax.random.key(0))
    assert "bias" not in params["blocks"]["video_ff"]["up"]
    assert "bias" in params["blocks"]["audio_ff"]["up"]
    assert params["keyframe_embedding"].shape == (1, config.video_dim)


@pytest.mark.parametrize(
    "field, value", [("rope_type", "spiral"), ("cross_timestep", "mine"), ("sink_rope", "none")]
)
def test_unknown_choice(field, value):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        tiny(**{field: value})
