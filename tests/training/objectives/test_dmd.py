"""The DMD stages as a whole: who is updated when, accumulation, and the two score contexts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import Guidance, guide
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.whole_clip import clip_x0, sigmas_per_frame
from omniforcing_jax.training.config.settings import DMDStage
from omniforcing_jax.training.objectives import losses, scores
from omniforcing_jax.training.objectives.common import Frozen, TextInput, accumulate, numbered
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.objectives.scores import BlockContext, ScoreConfig
from omniforcing_jax.training.optimizers import EMAConfig
from omniforcing_jax.training.state import TrainState, create_network, create_state
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import AVLatents
from tests.tiny_model import QUICK_COMPILE, random_contexts, random_params

BATCH, BLOCKS = 2, 2
LAYOUT = BlockLayout(1, 1, 1, 2)
SIGMAS = (1.0, 0.5, 0.0)
MODEL = Transformer(dataclasses.replace(tiny(), num_layers=1))
ROLLOUT = RolloutConfig(CacheConfig(LAYOUT, window=2), SIGMAS, height=1, width=1)
CLIP = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 1)
OPTIMIZER = optax.adamw(1e-3)
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def make(stage: str = "III", context: str = "bidirectional", **changes) -> DMD:
    """Either stage with one tiny model in all three roles."""
    generator = (
        UnrolledStudent(MODEL, ROLLOUT, BLOCKS, BLOCKS)
        if stage == "III"
        else BidirectionalStudent(MODEL, CLIP, SIGMAS)
    )
    config = DMDStage(
        score=ScoreConfig(context=context), critic_updates=2, ema=EMAConfig(0.5), **changes
    )
    blocks = BlockContext(ROLLOUT, BLOCKS) if context == "block_causal" else None
    return DMD(generator, MODEL, MODEL, TextInput(), OPTIMIZER, OPTIMIZER, config, blocks)


@pytest.fixture(scope="module")
def inputs():
    """Initial state, frozen parts, and a batch."""
    contexts = random_contexts(MODEL.config, batch=BATCH)
    negative = random_contexts(MODEL.config, batch=1, seed=7)
    names = ("video_context", "audio_context")
    frozen = Frozen(random_params(MODEL.config, 3), None, dict(zip(names, negative, strict=True)))
    return frozen, dict(zip(names, contexts, strict=True))


def new_state() -> TrainState:
    """Placed as a restored one: where arrays lie is part of what a program is compiled for."""

    def network(seed, ema):
        params = jax.device_put(random_params(MODEL.config, seed), jax.devices()[0])
        return create_network(params, OPTIMIZER, ema=ema)

    return create_state(network(1, True), network(2, False))


def changed(before, after) -> bool:
    return any(
        np.any(np.asarray(a) != b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


@pytest.mark.parametrize("stage", ["I", pytest.param("III", marks=pytest.mark.slow)])
def test_updates_alternate(stage, inputs):
    """The generator moves at every second step here, the critic always; the state is donated, and
    nothing is recompiled.
    """
    dmd = make(stage)
    state = new_state()
    history = []
    for step in range(4):
        before = jax.tree.map(np.array, state)
        given = jax.tree.leaves(state)
        state, metrics = dmd.train_step(state, *inputs, step)
        assert all(x.is_deleted() for x in given if x.size > 1)
        history.append(metrics)
        assert changed(before.generator.params, state.generator.params) == (step % 2 == 0)
        assert changed(before.generator.ema, state.generator.ema) == (step % 2 == 0)
        assert changed(before.critic.params, state.critic.params)
        assert int(state.step) == step + 1
        bad = [k for k, v in metrics.items() if not k.startswith("band/") and not np.isfinite(v)]
        assert not bad
    assert {"generator/loss_video", "generator/grad_norm/audio", "critic/loss"} <= history[0].keys()
    assert "generator/loss" not in history[1]
    assert (dmd.generator_step._cache_size(), dmd.critic_step._cache_size()) == (1, 1)


@pytest.mark.slow
def test_microbatches_give_the_gradient_of_the_batch(inputs):
    """Everything a sample draws comes from its own row, so cutting the batch changes nothing."""
    dmd = make()
    state, (frozen, batch) = new_state(), inputs

    @functools.partial(jit, static_argnums=0)
    def gradient(count):
        def part(batch):
            return dmd.generator_gradient(
                state.generator.params, state.critic.params, frozen, batch, jax.random.key(0)
            )

        return accumulate(part, numbered(batch), count)

    (whole, (loss, sigma)), (parts, (part_loss, part_sigma)) = gradient(1), gradient(2)
    np.testing.assert_array_equal(sigma, part_sigma)
    np.testing.assert_allclose(loss.video, part_loss.video, rtol=1e-4)
    for w, p in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(w, p, atol=1e-5 * float(np.abs(w).max() + 1e-6))
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        accumulate(lambda b: b, {"x": jnp.ones((4, 1))}, 3)


def test_generator_gradient_is_that_of_the_written_loss(inputs):
    """Autodiff of lambda_v L_v + lambda_a L_a with targets held fixed, in stage I."""
    weights = LossWeights(0.7, 2.0)
    dmd = make("I", loss=weights)
    frozen, batch = inputs
    generator, critic = random_params(MODEL.config, 1), random_params(MODEL.config, 2)
    contexts = (batch["video_context"], batch["audio_context"])
    keys = jax.random.split(jax.random.key(4), BATCH)

    @jit
    def compare(params):
        trace = dmd.generator.simulate(params, contexts, keys, None)
        sample, pullback = dmd.generator.sample_with_pullback(params, contexts, keys, trace)
        g, _ = dmd.score_gradient(critic, frozen, sample, contexts, keys)
        target = jax.tree.map(jnp.subtract, sample, g)

        def written(sample):
            video, audio = (
                0.5 * jnp.mean(jnp.square(s - t))
                for s, t in ((sample.video, target.video), (sample.audio, target.audio))
            )
            return weights.video * video + weights.audio * audio

        cotangent = AVLatents(
            *(w * x / x.size for w, x in zip((0.7, 2.0), (g.video, g.audio), strict=True))
        )
        return pullback(cotangent), pullback(jax.grad(written)(sample))

    ours, expected = compare(generator)
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4 * float(np.abs(e).max() + 1e-9))


@pytest.mark.parametrize("context", ["bidirectional", "block_causal"])
def test_teacher_guided_as_the_sampler_is(context, inputs):
    """Every pass by itself: the prompt, the negative one, and with self-attention skipped."""
    dmd = make("III", context)
    score = dataclasses.replace(dmd.config.score, stg=0.5, stg_blocks=(0,))
    dmd = dataclasses.replace(dmd, config=dataclasses.replace(dmd.config, score=score))
    frozen, batch = inputs
    contexts = tuple(batch.values())
    negative = jax.tree.map(
        lambda n, c: jnp.broadcast_to(n, c.shape), tuple(frozen.negative.values()), contexts
    )
    critic, keys = random_params(MODEL.config, 2), jax.random.split(jax.random.key(4), BATCH)
    x = draw_noise(jax.random.split(jax.random.key(5), BATCH), CLIP, MODEL)
    ours, sigma = jit(dmd.score_gradient)(critic, frozen, x, contexts, keys)
    noisy = dmd._noised(x, keys, None)[1]
    ones, zeros = jnp.ones((1, BATCH)), jnp.zeros((1, BATCH))

    @jit
    def predict(params, contexts, keep):
        return scores.predict_x0(
            MODEL, params, x, noisy, sigma, contexts, CLIP, dmd.blocks, Pathways(*keep)
        )

    everything = (ones, ones, ones, ones)
    cond = predict(frozen.teacher, contexts, everything)
    uncond = predict(frozen.teacher, negative, everything)
    perturbed = predict(frozen.teacher, contexts, (zeros, zeros, ones, ones))
    fake = predict(critic, contexts, everything)
    for stream, cfg in (("video", 3.0), ("audio", 5.0)):
        passes = [getattr(p, stream) for p in (cond, uncond, perturbed)]
        assert float(np.abs(passes[0] - passes[2]).max()) > 1e-3
        real = guide(*passes, None, Guidance(cfg=cfg, stg=0.5, stg_blocks=(0,)))
        expected = losses.dmd_gradient(getattr(x, stream), getattr(fake, stream), real)
        np.testing.assert_allclose(getattr(ours, stream), expected, atol=2e-5)


# -- block-causal scores -----------------------------------------------------------------------


def noised(sigma):
    keys = jax.random.split(jax.random.key(8), 2 * BATCH)
    x0, noise = draw_noise(keys[:BATCH], CLIP, MODEL), draw_noise(keys[BATCH:], CLIP, MODEL)
    return x0, noise, jax.tree.map(lambda x, n: flow.add_noise(x, n, sigma), x0, noise)


def test_block_causal_scores_see_what_the_student_sees(inputs):
    """Each noisy block with a clean past: as one masked pass per block with the others clean."""
    sigma = jnp.array([0.7, 0.3])
    x0, _, noisy = noised(sigma)
    params = random_params(MODEL.config, 3)
    contexts = tuple(inputs[1].values())
    blocks = BlockContext(ROLLOUT, BLOCKS)
    ours = jit(
        lambda x0, noisy: scores.predict_x0(MODEL, params, x0, noisy, sigma, contexts, CLIP, blocks)
    )(x0, noisy)
    model = MODEL.clone(causal=CLIP.mask(LAYOUT))

    @jit
    def masked(level):
        levels = sigmas_per_frame(level, LAYOUT, CLIP)
        mixed = jax.tree.map(lambda s, x, n: jnp.where(s[..., None] > 0, n, x), levels, x0, noisy)
        return clip_x0(model, params, mixed, levels, contexts, CLIP)

    for block in range(BLOCKS):
        expected = masked(jnp.zeros((BATCH, BLOCKS)).at[:, block].set(sigma))
        video = LAYOUT.block_of_video_frame(np.arange(CLIP.video_frames)) == block
        audio = LAYOUT.block_of_audio_frame(np.arange(CLIP.audio_frames)) == block
        np.testing.assert_allclose(ours.video[:, video], expected.video[:, video], atol=2e-5)
        np.testing.assert_allclose(ours.audio[:, audio], expected.audio[:, audio], atol=2e-5)


@pytest.mark.slow
def test_block_causal_critic_gradient(inputs):
    """Block by block over the cache equals autodiff through the scan (history detached in both)."""
    dmd = make(context="block_causal")
    critic = random_params(MODEL.config, 2)
    contexts = tuple(inputs[1].values())
    sigma = jnp.array([0.7, 0.3])
    x0, noise, noisy = noised(sigma)

    def written(params):
        velocity = scores.block_causal_velocity(
            MODEL, params, x0, noisy, sigma, contexts, dmd.blocks
        )
        per_sample = jax.tree.map(losses.flow_matching_loss, velocity, x0, noise)
        return losses.total(per_sample, dmd.config.loss), per_sample

    expected, per_sample = jit(jax.grad(written, has_aux=True))(critic)
    grads, (loss, _) = jit(dmd._block_causal_critic)(critic, contexts, x0, noisy, noise, sigma)
    np.testing.assert_allclose(loss.video, per_sample.video, rtol=1e-4)
    np.testing.assert_allclose(loss.audio, per_sample.audio, rtol=1e-4)
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-4 * float(np.abs(e).max() + 1e-9))


@pytest.mark.slow
def test_block_causal_stage_trains(inputs):
    """Both updates of stage III with the scores in the student's context."""
    dmd = make(context="block_causal")
    state, metrics = dmd.train_step(new_state(), *inputs, 0)
    assert np.isfinite(metrics["generator/loss"])
    assert np.isfinite(metrics["critic/loss"])
    assert int(state.step) == 1


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="needs `blocks`"):
        dataclasses.replace(make(), config=DMDStage(score=ScoreConfig(context="block_causal")))
    with pytest.raises(ValueError, match="scored from its first block"):
        dataclasses.replace(
            make("I"),
            config=DMDStage(score=ScoreConfig(context="block_causal")),
            blocks=BlockContext(ROLLOUT, BLOCKS),
        )
    (problem,) = DMDStage(critic_updates=0).problems(1)
    assert problem == "critic_updates: must be at least 1, not 0"
