"""Stage II: levels per block, what is gathered from trajectories, the two histories, objectives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.whole_clip import clip_velocity, sigmas_per_frame
from omniforcing_jax.training.config.settings import RegressionConfig, StageII
from omniforcing_jax.training.objectives.common import Frozen, TextInput
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.objectives.ode_regression import ODERegression, RegressionTask
from omniforcing_jax.training.state import create_network, create_state
from tests.tiny_model import LTX23_CHANGES, QUICK_COMPILE, random_contexts, random_params

BATCH, BLOCKS, STATES, PATCHES = 2, 3, 4, 2
LAYOUT = BlockLayout(1, 2, 1, 3)
OPTIMIZER = optax.adamw(1e-3)
SIGMAS = np.array([1.0, 0.7, 0.3, 0.0], np.float32)
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def make(changes=None, loss=LossWeights(), seed=0, **settings) -> ODERegression:
    changes = {"num_audio_sinks": 2} if changes is None else changes
    model = Transformer(tiny(**changes))
    rollout = RolloutConfig(CacheConfig(LAYOUT, window=3), (1.0, 0.5, 0.0), height=1, width=PATCHES)
    config = StageII(loss=loss, seed=seed, ema=None, regression=RegressionConfig(**settings))
    return ODERegression(model, rollout, BLOCKS, TextInput(), OPTIMIZER, config)


def make_batch(stage: ODERegression) -> dict[str, jax.Array]:
    """Trajectories in which state i of frame f holds the number 100 i + f."""
    clip = stage.clip

    def states(frames, patches, channels):
        numbers = 100 * np.arange(STATES)[:, None] + np.arange(frames)
        x = np.repeat(numbers, patches, axis=1)[None, :, :, None].astype(np.float32)
        return jnp.asarray(np.broadcast_to(x, (BATCH, STATES, frames * patches, channels)))

    video = states(clip.video_frames, PATCHES, stage.model.config.video_channels)
    audio = states(clip.audio_frames, 1, stage.model.config.audio_channels)
    contexts = random_contexts(stage.model.config, batch=BATCH)
    return {
        "video": video,
        "audio": audio,
        "video_velocity": -video[:, :-1],
        "audio_velocity": -audio[:, :-1],
        "sigmas": jnp.tile(SIGMAS, (BATCH, 1)),
        "video_context": contexts[0],
        "audio_context": contexts[1],
    }


@functools.partial(jit, static_argnums=0)
def task_of(stage, batch, keys):
    return stage.task(batch, keys)


def draw(stage: ODERegression, seed: int = 0) -> RegressionTask:
    return task_of(stage, make_batch(stage), jax.random.split(jax.random.key(seed), BATCH))


def drawn_states(stage: ODERegression, task: RegressionTask) -> np.ndarray:
    """[B, K] state of every block, read off the numbers in its frames."""
    first = [stage.layout.num_video_frames(k) * PATCHES for k in range(BLOCKS)]
    return np.asarray(task.noisy.video[:, np.array(first), 0]).astype(int) // 100


def test_blocks_have_levels_of_their_own_and_audio_follows_its_block():
    """Also where frame counts do not map by a ratio: the defect of the public code."""
    stage = make()
    seen = set()
    for seed in range(8):
        task = draw(stage, seed)
        states = drawn_states(stage, task)
        np.testing.assert_allclose(task.sigma, SIGMAS[states])
        frames = sigmas_per_frame(jnp.asarray(states), stage.layout, stage.clip)
        video = np.asarray(task.noisy.video[..., 0]).astype(int)
        np.testing.assert_array_equal(video // 100, np.repeat(frames.video, PATCHES, axis=1))
        audio = np.asarray(task.noisy.audio[..., 0]).astype(int)
        np.testing.assert_array_equal(audio // 100, frames.audio)
        np.testing.assert_array_equal(
            audio % 100, np.tile(np.arange(stage.clip.audio_frames), (2, 1))
        )
        # targets are the velocities at the same states; the clean state has no loss
        noisy = np.asarray(task.weight) > 0
        np.testing.assert_array_equal(noisy, states < STATES - 1)
        where = np.repeat(
            sigmas_per_frame(jnp.asarray(noisy), stage.layout, stage.clip).audio[..., None], 6, 2
        )
        np.testing.assert_array_equal(
            np.asarray(task.target.audio)[where], -np.asarray(task.noisy.audio)[where]
        )
        seen |= set(states.ravel().tolist())
    assert seen == set(range(STATES))
    assert len({tuple(row) for row in states.tolist()}) > 1


def test_one_level_for_the_clip_and_no_clean_state():
    stage = make(LTX23_CHANGES, level_per_block=False, include_clean=False)
    drawn = [drawn_states(stage, draw(stage, seed)) for seed in range(12)]
    assert all((states == states[:, :1]).all() for states in drawn)
    assert {int(i) for states in drawn for i in states.ravel()} == set(range(STATES - 1))


def test_levels_of_flow_matching():
    """All levels that a sampler visits: pure noise, and the clean history, which has no loss."""
    sigma, weight = [], []
    for include_clean in (True, False):
        stage = make(objective="flow", include_clean=include_clean)
        keys = jax.random.split(jax.random.key(0), 4000)
        batch = {name: jnp.zeros((4000, 1, tokens, channels)) for name, tokens, channels in (
            ("video", stage.clip.video_tokens, stage.model.config.video_channels),
            ("audio", stage.clip.audio_frames, stage.model.config.audio_channels),
        )}  # fmt: skip
        task = jax.jit(stage.task)(batch, keys)
        sigma.append(np.asarray(task.sigma))
        weight.append(np.asarray(task.weight))
    clean = sigma[0] == 0.0
    assert np.mean(clean) == pytest.approx(1 / 3, abs=0.02)  # of two steps and the clean state
    np.testing.assert_allclose(weight[0], np.where(clean, 0.0, 1.5))
    assert weight[0].mean() == pytest.approx(1.0, abs=0.03)
    assert (weight[1] == 1.0).all() and sigma[1].min() == pytest.approx(0.1, abs=1e-3)
    assert sigma[0].max() == sigma[1].max() == 1.0


def test_masked_loss_by_hand():
    """Weighted mean over frames, and its split over blocks, from the network's own outputs."""
    stage = make(loss=LossWeights(0.5, 2.0))
    task = draw(stage, 3)
    task = dataclasses.replace(
        task, noisy=jax.tree.map(lambda x: x / 100, task.noisy),
        target=jax.tree.map(lambda x: x / 100, task.target),
    )  # fmt: skip
    params, contexts = (
        random_params(stage.model.config),
        random_contexts(stage.model.config, batch=2),
    )
    sigma = sigmas_per_frame(task.sigma, stage.layout, stage.clip)
    weight = sigmas_per_frame(task.weight, stage.layout, stage.clip)
    model = stage.model.clone(causal=stage.clip.mask(stage.layout))

    def written(params):
        v = clip_velocity(model, params, task.noisy, sigma, contexts, stage.clip)

        def mean(v, target, weight):
            weight = jnp.repeat(weight, v.shape[1] // weight.shape[1], axis=1)[..., None]
            return jnp.mean(weight * jnp.square(v - target))

        parts = jax.tree.map(mean, v, task.target, weight)
        return 0.5 * parts.video + 2.0 * parts.audio, parts

    expected_grads, expected = jit(jax.grad(written, has_aux=True))(params)
    grads, per_block = jit(lambda p: stage._masked_gradient(p, contexts, task))(params)
    total = jax.tree.map(lambda x: jnp.mean(jnp.sum(x, axis=1)), per_block)
    np.testing.assert_allclose(total.video, expected.video, rtol=1e-5)
    np.testing.assert_allclose(total.audio, expected.audio, rtol=1e-5)
    assert np.all((np.asarray(per_block.video) > 0) == (np.asarray(task.weight) > 0))
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4 * float(np.abs(e).max() + 1e-9))


def test_clean_history_equals_one_masked_pass_per_block():
    """Teacher forcing: a block's loss is that of a clip in which only this block is noisy."""
    stage = make(objective="flow")
    contexts = random_contexts(stage.model.config, batch=BATCH)
    params = random_params(stage.model.config)
    rng = np.random.default_rng(0)

    def normal(x):
        return jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    keys = jax.random.split(jax.random.key(2), BATCH)
    clean = jax.tree.map(normal, draw_noise(keys, stage.clip, stage.model))
    task = stage._flow_task(clean, keys)
    noise = jax.tree.map(jnp.add, task.target, clean)
    sigma = sigmas_per_frame(task.sigma, stage.layout, stage.clip)
    jax.tree.map(
        lambda x, c, n, s: np.testing.assert_allclose(x, flow.add_noise(c, n, s), atol=1e-5),
        task.noisy, clean, noise, sigma,
    )  # fmt: skip
    grads, per_block = jit(lambda p: stage._forced_gradient(p, contexts, task))(params)
    masked = jit(lambda p, task: stage._masked_gradient(p, contexts, task)[1])
    for block in range(BLOCKS):
        only = jnp.arange(BLOCKS) == block
        level = jnp.where(only, task.sigma, 0.0)
        shown = jax.tree.map(
            lambda s, n, c: jnp.where(
                jnp.repeat(s, n.shape[1] // s.shape[1], axis=1)[..., None] > 0, n, c
            ),
            sigmas_per_frame(level, stage.layout, stage.clip), task.noisy, clean,
        )  # fmt: skip
        expected = masked(params, dataclasses.replace(task, noisy=shown, sigma=level))
        np.testing.assert_allclose(per_block.video[:, block], expected.video[:, block], rtol=2e-4)
        np.testing.assert_allclose(per_block.audio[:, block], expected.audio[:, block], rtol=2e-4)
    assert float(np.abs(grads["audio_sinks"]).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["velocity", "x0", "flow"])
def test_training_lowers_the_loss(objective):
    stage = make(objective=objective, clean_history=0.0)
    scale = lambda x: x / 100 if x.ndim == 4 else x  # noqa: E731
    batch = {name: scale(x) for name, x in make_batch(stage).items()}
    params = jax.device_put(random_params(stage.model.config), jax.devices()[0])
    state = create_state(create_network(params, OPTIMIZER, ema=False))
    losses = []
    for step in range(30):
        state, metrics = stage.train_step(state, Frozen(), batch, step)
        losses.append(float(metrics["generator/loss"]))
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    assert stage.noisy_step._cache_size() == 1
    assert any(np.isfinite(v) for k, v in metrics.items() if k.startswith("band/"))


@pytest.mark.slow
def test_seeds_share_a_program():
    """What is compiled for one seed serves all, and what they draw differs."""
    params = random_params(make().model.config)
    programs, losses = [], []
    for seed in (0, 1):
        stage = make(seed=seed)
        batch = make_batch(stage)
        state = create_state(create_network(params, OPTIMIZER, ema=False))
        programs.append(stage.noisy_step.lower(state, Frozen(), batch, np.uint32(seed)).as_text())
        state = jax.tree.map(jnp.array, state)  # a step takes the arrays it is given
        losses.append(float(stage.train_step(state, Frozen(), batch, 0)[1]["generator/loss"]))
    assert programs[0] == programs[1]
    assert losses[0] != losses[1]


def test_history_is_chosen_by_step():
    """The share of steps with clean history; the same steps after a restart."""
    stage = make(clean_history=0.3)
    chosen = []
    object.__setattr__(stage, "noisy_step", lambda *_: chosen.append(0))
    object.__setattr__(stage, "clean_history_step", lambda *_: chosen.append(1))
    for step in [*range(400), *range(400)]:
        stage.train_step(None, None, None, step)
    assert chosen[:400] == chosen[400:]
    assert abs(np.mean(chosen) - 0.3) < 0.06


def test_bad_settings_are_refused():
    (problem,) = StageII(seed=-1).problems(1)
    assert problem.startswith("seed: seed must be 0 to")
    with pytest.raises(ValueError, match="level_per_block"):
        make(LTX23_CHANGES)
    with pytest.raises(ValueError, match="one of"):
        RegressionConfig(objective="v")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        RegressionConfig(clean_history=2.0)
