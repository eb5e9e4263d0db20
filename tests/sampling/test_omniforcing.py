"""The student against the public OmniForcing code: masked forward passes and the cached rollout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters.reading import load_component
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import ClipMask, Modality, Transformer
from omniforcing_jax.models.transformer.rope import AxisTable, ClipRope, Rope, clip_rope
from omniforcing_jax.sampling import kv_cache, student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig, block_step, prompt_kv
from omniforcing_jax.types import AVLatents

V2 = TransformerConfig(
    num_layers=2,
    video_heads=4,
    video_head_dim=16,
    audio_heads=4,
    audio_head_dim=8,
    video_channels=12,
    audio_channels=12,
    caption_channels=24,
    video_context_dim=64,
    audio_context_dim=32,
    rope_type="interleaved",
    rope_frequency_dtype="float32",
    cross_gate_timestep_scale=1.0,
)
V1 = TransformerConfig(
    num_layers=2,
    video_heads=4,
    video_head_dim=14,
    audio_heads=4,
    audio_head_dim=10,
    video_channels=8,
    audio_channels=8,
    caption_channels=20,
    video_context_dim=56,
    audio_context_dim=40,
    rope_type="interleaved",
    rope_frequency_dtype="float32",
    cross_gate_timestep_scale=1.0,
    num_audio_sinks=16,
)


def tokens(latents):
    """[B, F, C, h, w] -> [B, F*h*w, C]."""
    b, f, c, h, w = latents.shape
    return jnp.asarray(np.moveaxis(latents, 2, -1).reshape(b, f * h * w, c))


def stored_tables(arrays, config) -> ClipRope:
    """The reference's own tables (flat, every entry twice) as a `ClipRope`."""

    def half(name):
        cos, sin = (arrays[f"rope_{name}_{part}"][0, :, ::2] for part in ("cos", "sin"))
        return cos, sin

    def axis(cos, sin):
        return AxisTable(jnp.asarray(cos), jnp.asarray(sin))

    n, height, width = config.video_dim // 6, 2, 3
    cos, sin = (x[:, -3 * n :].reshape(-1, height, width, n, 3) for x in half("video"))
    return ClipRope(
        video_time=axis(cos[:, 0, 0, :, 0], sin[:, 0, 0, :, 0]),
        video_rows=axis(cos[0, :, 0, :, 1], sin[0, :, 0, :, 1]),
        video_columns=axis(cos[0, 0, :, :, 2], sin[0, 0, :, :, 2]),
        video_cross=axis(*half("video_cross")),
        audio=axis(*half("audio")),
        audio_cross=axis(*half("audio_cross")),
        sinks=None,
        sinks_cross=None,
        heads=config.video_heads,
        video_dim=config.video_dim,
    )


def modalities(arrays, rope: ClipRope, sigma_video, sigma_audio, context_mask=None):
    sinks = rope.sinks is not None
    frames = jnp.arange(arrays["m_video_latent"].shape[1])
    audio_frames = jnp.arange(arrays["m_audio_latent"].shape[1])
    video = Modality(
        tokens(arrays["m_video_latent"]),
        jnp.asarray(sigma_video),
        rope.video_rope(frames),
        rope.video_cross_rope(frames),
        jnp.asarray(arrays["m_video_context"]),
        context_mask,
    )
    audio = Modality(
        jnp.asarray(arrays["m_audio_latent"]),
        jnp.asarray(sigma_audio),
        rope.audio_rope(audio_frames, sinks),
        rope.audio_cross_rope(audio_frames, sinks),
        jnp.asarray(arrays["m_audio_context"]),
        context_mask,
    )
    return video, audio


@pytest.fixture(scope="module")
def v2(golden_dir):
    folder = golden_dir / "omniforcing_v2"
    params = load_component(
        folder / "omniforcing_tiny_causal.safetensors.index.json", "transformer"
    )
    return np.load(folder / "expected.npz"), params


@pytest.fixture(scope="module")
def v1(golden_dir):
    folder = golden_dir / "omniforcing_v1"
    params = load_component(folder / "omniforcing_v1_tiny.safetensors", "transformer")
    return np.load(folder / "expected.npz"), params


def check(outputs, arrays, case, atol):
    video, audio = outputs
    np.testing.assert_allclose(video, tokens(arrays[f"{case}_video_velocity"]), atol=atol)
    np.testing.assert_allclose(audio, arrays[f"{case}_audio_velocity"], atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def velocities(model, params, video, audio):
    return model.apply({"params": params}, video, audio)[0]


def run(config, params, video, audio, causal=None):
    return velocities(Transformer(config, causal=causal), params, video, audio)


@pytest.mark.parametrize("tables, atol", [("stored", 1e-4), ("own", 3e-3)])
def test_v2_block_causal_forward(v2, tables, atol):
    arrays, params = v2
    if tables == "stored":
        rope = stored_tables(arrays, V2)
    else:
        rope = clip_rope(V2, video_frames=10, audio_frames=76, height=2, width=3)
    causal = ClipMask(BlockLayout.merged(), 10, 76, 6)
    sigmas = arrays["m_sigma_video_per_frame"], arrays["m_sigma_audio_per_frame"]
    video, audio = modalities(arrays, rope, *sigmas)
    check(run(V2, params, video, audio, causal), arrays, "m", atol)

    sigma = arrays["m_uniform_sigma"][:, None]
    video, audio = modalities(arrays, rope, sigma, sigma)
    check(run(V2, params, video, audio, causal), arrays, "m_uniform", atol)
    check(run(V2, params, video, audio), arrays, "m_bidirectional", atol)
    mask = jnp.asarray(arrays["m_textmask"]) > 0
    masked = modalities(arrays, rope, sigma, sigma, context_mask=mask)
    check(run(V2, params, *masked, causal), arrays, "m_textmask", atol)


@pytest.mark.default_xla
def test_v1_with_sinks(v1):
    arrays, params = v1
    causal = ClipMask(BlockLayout.prefix(), 7, 51, 4)

    def forward(params, case, *sigmas, config=V1):
        rope = clip_rope(config, video_frames=7, audio_frames=51, height=2, width=2)
        return run(config, params, *modalities(arrays, rope, *sigmas), causal), arrays, case, 3e-3

    by_frame = arrays["m_sigma_video_per_frame"], arrays["m_sigma_audio_per_frame"]
    check(*forward(params, "m", *by_frame))
    sigma = arrays["m_uniform_sigma"][:, None]
    check(*forward(params, "m_uniform", sigma, sigma))
    # the tolerance is not so wide that sinks, or where they stand, would not show
    incremental = dataclasses.replace(V1, sink_rope="incremental")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(*forward(params, "m", *by_frame, config=incremental))
    silent = {**params, "audio_sinks": 0 * params["audio_sinks"]}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(*forward(silent, "m", *by_frame))


@pytest.mark.default_xla
def test_v2_recorded_rollout(v2):
    """Three blocks with the reference's noise: every block's result and the cache at the end."""
    arrays, params = v2
    model = Transformer(V2)
    config = RolloutConfig(
        cache=CacheConfig(BlockLayout.merged(), window=2, positions="absolute"),
        sigmas=tuple(float(s) for s in arrays["r_sigmas"]),
        height=2,
        width=3,
    )
    rope = stored_tables(arrays, V2)
    contexts = (jnp.asarray(arrays[f"r_{s}_context"]) for s in ("video", "audio"))
    text = prompt_kv(model, params, *contexts, config.sigma_levels)
    cache = student.new_cache(model, config, batch=1)
    step = jax.jit(block_step, static_argnames=("model", "config", "first"))
    results = []
    for block in range(3):
        names = ["init", "renoise1", "renoise2", "renoise3"]
        noise = AVLatents(
            jnp.stack([tokens(arrays[f"r_noise_block{block}_{n}_video"]) for n in names]),
            jnp.stack([jnp.asarray(arrays[f"r_noise_block{block}_{n}_audio"]) for n in names]),
        )
        trace, cache = step(
            model, params, cache, text, rope, noise, config=config, first=block == 0
        )
        x0 = trace.x0
        expected = arrays[f"r_block{block}_step3_video_x0"]
        np.testing.assert_allclose(x0.video, tokens(expected), atol=1e-4)
        np.testing.assert_allclose(x0.audio, arrays[f"r_block{block}_step3_audio_x0"], atol=1e-4)
        results.append(x0)
    final = np.concatenate([x.video for x in results], axis=1)
    np.testing.assert_allclose(final, tokens(arrays["r_final_video"]), atol=1e-4)

    # The reference caches rotated keys, we rotate when the cache is read.
    history = kv_cache.history(cache, rope, "interleaved", config.patches)
    for name, ours in [
        ("video_self", history.video),
        ("audio_self", history.audio),
        ("a2v", history.a2v),
        ("v2a", history.v2a),
    ]:
        for part in ("k", "v"):
            expected = arrays[f"r_cache_layer0_{name}_{part}"]
            actual = getattr(ours.kv, part)[0][:, : expected.shape[1]]
            np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=f"{name} {part}")


def test_interleaved_is_a_permutation_of_split():
    """Channel 2j of the interleaved convention is channel j of the split one, 2j + 1 is j + H/2."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (1, 5, 2, 8))
    angles = jax.random.normal(jax.random.fold_in(key, 1), (1, 5, 2, 4))
    rope = Rope(jnp.cos(angles), jnp.sin(angles))
    split = x.reshape(1, 5, 2, 4, 2).swapaxes(-1, -2).reshape(x.shape)
    rotated = rope.rotate(split, "split").reshape(1, 5, 2, 2, 4).swapaxes(-1, -2).reshape(x.shape)
    np.testing.assert_allclose(rope.rotate(x, "interleaved"), rotated, atol=1e-6)
