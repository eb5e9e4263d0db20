"""Trajectories: the states are the sampler's, the velocities the guided network's at each state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition, mode_mask
from omniforcing_jax.sampling.guidance import AVGuidance, Guidance
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig, guided_x0, prepare_passes, sample
from omniforcing_jax.sampling.trajectories import (
    autoregressive_trajectory,
    sample_trajectory,
    schedule_indices,
)
from omniforcing_jax.sampling.whole_clip import clip_x0, sigmas_per_frame
from omniforcing_jax.training.objectives import scores
from omniforcing_jax.types import AVLatents
from tests.tiny_model import (
    LTX23_CHANGES,
    QUICK_COMPILE,
    random_contexts,
    random_latents,
    random_params,
)

BATCH, BLOCKS = 2, 3
FULL = AVGuidance(
    video=Guidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,)),
    audio=Guidance(cfg=7.0, stg=0.5, modality=2.0, rescale=0.0, stg_blocks=(0,)),
)
CFG = AVGuidance(video=Guidance(cfg=3.0, rescale=0.7), audio=Guidance(cfg=5.0))
SIGMAS = (1.0, 0.8, 0.4, 0.0)
LAYOUT = BlockLayout(1, 2, 1, 3)
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def keys(count=BATCH):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(count))


def texts(config):
    """Contexts of the prompts, and of one negative prompt."""
    prompt = Prompt(*random_contexts(config, batch=BATCH))
    return prompt, Prompt(*random_contexts(config, seed=7))


def assert_close(actual, expected, atol=1e-4):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(e).max()
        assert np.isfinite(a).all() and scale > 0.1
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(e) / scale, atol=atol)


def test_schedule_indices():
    schedule = flow.ltx2_schedule(40)
    assert schedule_indices(schedule, flow.student_sigmas()) == (0, 17, 29, 36, 40)
    assert schedule_indices(SIGMAS, SIGMAS) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"40-step schedule has no noise level 0\.5; pick"):
        schedule_indices(schedule, (1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"must be the noise \(sigma 1, timestep 1000\), not"):
        schedule_indices(schedule, flow.student_sigmas((909, 421)))


def test_of_the_guided_teacher():
    model = Transformer(tiny())
    params, (prompt, negative) = random_params(model.config), texts(model.config)
    config = SampleConfig.for_clip(
        frames=17, height=32, width=64, recipe=SamplingRecipe.of_steps(4, FULL)
    )
    indices = (0, 2, 3, 4)
    found = sample_trajectory(model, params, prompt, negative, keys(), config, indices)
    assert found.states.video.shape == (BATCH, 4, 6, 4)
    assert found.velocities.audio.shape == (BATCH, 3, 18, 6)

    visited = sample(model, params, prompt, negative, keys(), config, trajectory=True)
    states = jax.tree.map(lambda x: np.moveaxis(np.asarray(x)[list(indices)], 0, 1), visited)
    for a, e in zip(jax.tree.leaves(found.states), jax.tree.leaves(states), strict=True):
        np.testing.assert_array_equal(a, e)

    negatives = jax.tree.map(lambda n: jnp.repeat(n, BATCH, axis=0), negative)
    inputs = jit(lambda p, n: prepare_passes(model, params, p, n, FULL))(prompt, negatives)
    rope = config.clip.rope(model)

    @jit
    def velocity(x, sigma):
        level = jnp.full((1, 1), sigma)
        x0 = guided_x0(model, params, x, AVLatents(level, level), inputs, rope, config)
        return jax.tree.map(lambda x, x0: flow.x0_to_velocity(x, x0, sigma), x, x0)

    for i, index in enumerate(indices[:-1]):
        state = jax.tree.map(lambda x, i=i: x[:, i], found.states)
        expected = velocity(state, config.sigmas[index])
        assert_close(jax.tree.map(lambda v, i=i: v[:, i], found.velocities), expected)


def autoregressive(model, guidance, sigmas=SIGMAS, indices=(0, 1, 2, 3), **changes):
    """A trajectory with everything that went into it."""
    params, (prompt, negative) = random_params(model.config), texts(model.config)
    negative = negative if "uncond" in guidance.passes() else None
    cache = CacheConfig(LAYOUT, 4)
    config = RolloutConfig(cache, sigmas, height=1, width=2, **changes)
    found = autoregressive_trajectory(
        model, params, prompt, negative, keys(), config, BLOCKS, guidance, indices
    )
    return found, params, prompt, negative, config


def test_autoregressive_under_conditions():
    """What is given is the same in all states, and has no velocity; nothing later looks back."""
    model = Transformer(tiny(num_audio_sinks=1))
    params, (prompt, negative) = random_params(model.config), texts(model.config)
    config = RolloutConfig(CacheConfig(LAYOUT, 4), SIGMAS, height=1, width=2)
    clip = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 2)
    clean = random_latents(model.config, clip.video_tokens, clip.audio_frames, batch=BATCH)
    masks = [mode_mask(mode, clip, AVLatents(1, 1)) for mode in ("a2v", "i2av")]
    condition = Condition.of_clip(clean, jax.tree.map(lambda *m: jnp.stack(m), *masks))
    found = autoregressive_trajectory(
        model, params, prompt, negative, keys(), config, BLOCKS, CFG, (0, 1, 2, 3), condition
    )
    for name in ("video", "audio"):
        states, velocities = (
            np.asarray(getattr(x, name)) for x in (found.states, found.velocities)
        )
        mask, values = (np.asarray(getattr(x, name)) for x in (condition.mask, clean))
        given = np.repeat(mask == 0, values.shape[1] // mask.shape[1], axis=1)
        for row in range(BATCH):
            expected = np.broadcast_to(values[row, given[row]], states[row][:, given[row]].shape)
            np.testing.assert_array_equal(states[row][:, given[row]], expected)
            assert not velocities[row][:, given[row]].any()
            assert velocities[row][:, ~given[row]].all() or given[row].all()


def test_autoregressive_equals_a_plain_loop():
    """Block after block by masked passes over whole clips: no cache, all other blocks clean."""
    model = Transformer(tiny(num_audio_sinks=2))
    found, params, prompt, negative, _ = autoregressive(model, CFG)
    clip = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 2)
    masked = model.clone(causal=clip.mask(LAYOUT))
    contexts = [prompt[:2], tuple(jnp.repeat(n, BATCH, axis=0) for n in negative[:2])]

    @jit
    def predict(x, block, sigma):
        levels = jnp.zeros((BATCH, BLOCKS)).at[:, block].set(sigma)
        levels = sigmas_per_frame(levels, LAYOUT, clip)
        return [clip_x0(masked, params, x, levels, text, clip) for text in contexts]

    def guide(cond, uncond, guidance):
        x0 = cond + (guidance.cfg - 1) * (cond - uncond)
        ratio = cond.std(axis=(1, 2), ddof=1) / x0.std(axis=(1, 2), ddof=1)
        return x0 * (guidance.rescale * ratio + 1 - guidance.rescale)[:, None, None]

    noise = as_arrays(draw_noise(keys(), clip, model))
    x = {name: np.zeros_like(n) for name, n in noise.items()}  # what is finished
    states = {name: np.stack([n] * len(SIGMAS), axis=1) for name, n in noise.items()}
    for block in range(BLOCKS):
        at = {
            "video": slice(
                LAYOUT.num_video_frames(block) * 2, LAYOUT.num_video_frames(block + 1) * 2
            ),
            "audio": slice(LAYOUT.num_audio_frames(block), LAYOUT.num_audio_frames(block + 1)),
        }
        for name in x:
            x[name][:, at[name]] = noise[name][:, at[name]]
        for i, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
            cond, uncond = map(as_arrays, predict(AVLatents(**x), block, sigma))
            for name in x:
                here, guidance = at[name], getattr(CFG, name)
                noisy = x[name][:, here]
                x0 = guide(cond[name][:, here], uncond[name][:, here], guidance)
                noisy = noisy + (following - sigma) * (noisy - x0) / sigma
                x[name][:, here] = states[name][:, i + 1, here] = noisy
    assert_close(found.states, AVLatents(**states))


def as_arrays(latents):
    return {name: np.array(getattr(latents, name)) for name in ("video", "audio")}


def test_autoregressive_velocities_are_those_over_clean_history():
    """LTX-2.3, where text keys depend on the level; states chosen from a longer schedule."""
    model = Transformer(tiny(**LTX23_CHANGES))
    guidance = AVGuidance(video=Guidance(), audio=Guidance(cfg=5.0))
    sigmas, indices = (1.0, 0.9, 0.8, 0.4, 0.0), (0, 2, 4)
    found, params, prompt, negative, config = autoregressive(model, guidance, sigmas, indices)
    assert found.states.video.shape == (BATCH, 3, 10, 4)
    blocks = scores.BlockContext(config, BLOCKS)
    negative = tuple(jnp.repeat(n, BATCH, axis=0) for n in negative[:2])

    @jit
    def velocity(clean, x, sigma, contexts):
        levels = jnp.full((BATCH,), sigma)
        return scores.block_causal_velocity(model, params, clean, x, levels, contexts, blocks)

    clean = jax.tree.map(lambda x: x[:, -1], found.states)
    for i, index in enumerate(indices[:-1]):
        state = jax.tree.map(lambda x, i=i: x[:, i], found.states)
        cond, uncond = (
            velocity(clean, state, sigmas[index], text) for text in (prompt[:2], negative)
        )
        expected = cond.replace(audio=cond.audio + 4.0 * (cond.audio - uncond.audio))
        assert_close(jax.tree.map(lambda v, i=i: v[:, i], found.velocities), expected)


@pytest.mark.parametrize(
    "guidance, changes, message",
    [
        (FULL, {}, "passes perturbed, isolated, but .* set stg to 0 and modality to 1"),
        (CFG, {"sigmas": (0.5, 0.0), "indices": (0, 1)}, r"sigmas\[0\] must be 1, not 0.5"),
        (CFG, {"context_noise": 0.1}, "context_noise must be 0, not 0.1"),
    ],
)
def test_impossible_autoregression(guidance, changes, message):
    with pytest.raises(ValueError, match=message):
        autoregressive(Transformer(tiny()), guidance, **changes)
