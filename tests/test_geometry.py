"""Whole clips: sizes and positions of windows, levels per frame, and the attention's entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.ops.attention import attention_entropy
from omniforcing_jax.sampling.whole_clip import audio_attention_entropy, sigmas_per_frame
from tests.tiny_model import random_contexts, random_params

LAYOUT = BlockLayout.prefix()


def test_first_blocks_and_windows():
    """A window from the middle is positioned behind block 0."""
    assert ClipGeometry.from_blocks(LAYOUT, 6, 16, 24) == ClipGeometry(16, 126, 16, 24, 24.0)
    window = ClipGeometry.from_blocks(LAYOUT, 5, 16, 24, start=False)
    assert window == ClipGeometry(15, 125, 16, 24, 24.0, video_start=1, audio_start=1)
    assert window.video_tokens == 15 * 384


def test_a_window_is_the_tail_of_a_clip():
    """Its tokens rotate like the same frames of a clip that starts at 0."""
    model = Transformer(tiny())
    window = ClipGeometry.from_blocks(LAYOUT, 1, 1, 2, start=False)
    whole = ClipGeometry.from_blocks(LAYOUT, 2, 1, 2)
    frames = np.arange(window.video_frames)
    ours = window.rope(model).video_rope(window.video_start + frames)
    expected = whole.rope(model).video_rope(1 + frames)
    np.testing.assert_array_equal(ours.cos, expected.cos)


def test_noise_belongs_to_the_key():
    model, clip = Transformer(tiny()), ClipGeometry(2, 3, 1, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    whole, second = draw_noise(keys, clip, model), draw_noise(keys[1:2], clip, model)
    np.testing.assert_array_equal(whole.video[1:2], second.video)
    np.testing.assert_array_equal(whole.audio[1:2], second.audio)


def test_audio_takes_the_level_of_its_own_block():
    """Borders of the merged layout lie at 26, 51, 76, 101, where ratios would give 32, 55, ..."""
    layout = BlockLayout.merged()
    clip = ClipGeometry.from_blocks(layout, 5, 16, 24)
    levels = sigmas_per_frame(jnp.arange(5.0)[None], layout, clip)
    borders = 1 + np.flatnonzero(np.diff(levels.audio[0]))
    assert borders.tolist() == [26, 51, 76, 101]
    assert (1 + np.flatnonzero(np.diff(levels.video[0]))).tolist() == [4, 7, 10, 13]


def test_entropy_of_uniform_and_one_hot_attention():
    q = jnp.zeros((1, 3, 2, 4))
    np.testing.assert_allclose(attention_entropy(q, q), 1.0, rtol=1e-6)
    k = jnp.zeros((1, 3, 2, 4)).at[:, 1].set(1000.0)
    np.testing.assert_allclose(attention_entropy(q + 1.0, k), 0.0, atol=1e-6)
    # a row that sees two keys, of which one dominates, and a row that sees one
    ends = np.array([1, 2, 3])
    np.testing.assert_allclose(attention_entropy(q + 1.0, k, ends), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(attention_entropy(q, q, ends), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_entropy_of_a_model_in_training():
    """Per layer and token, sinks included, without a change of what the model computes."""
    layout = BlockLayout(1, 1, 1, 2)
    clip = ClipGeometry.from_blocks(layout, 2, 1, 1)
    model = Transformer(tiny(num_audio_sinks=2), causal=clip.mask(layout))
    params, contexts = random_params(model.config), random_contexts(model.config)
    x = draw_noise(jax.random.split(jax.random.key(0), 1), clip, model)
    sigma = jnp.full((1,), 0.5)
    entropy = jax.jit(lambda p: audio_attention_entropy(model, p, x, sigma, contexts, clip))(params)
    assert entropy.shape == (model.config.num_layers, 2 + clip.audio_frames)
    assert np.all((entropy > 0) & (entropy <= 1.0001))
    sharp = jax.tree.map(lambda p: p, params)
    sharp["blocks"]["audio_attn"]["q_norm"]["scale"] *= 1000
    collapsed = jax.jit(lambda p: audio_attention_entropy(model, p, x, sigma, contexts, clip))(
        sharp
    )
    assert float(collapsed.mean()) < 0.2 < float(entropy.mean())
