"""Training under conditions: what is drawn, what is kept, and what no gradient or loss may see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.conditions import MODES, Condition, mode_mask
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.training.config.settings import DMDStage, RegressionConfig, StageII
from omniforcing_jax.training.mixture import ConditionMixture, GivenInput
from omniforcing_jax.training.objectives.common import Frozen, TextInput, numbered, sample_keys
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.ode_regression import ODERegression
from omniforcing_jax.training.objectives.scores import BlockContext, ScoreConfig
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import AVLatents
from tests.tiny_model import QUICK_COMPILE, random_contexts, random_latents, random_params

STREAMS = ("video", "audio")
BATCH, BLOCKS = 6, 3
LAYOUT = BlockLayout(1, 1, 1, 2)
SIGMAS = (1.0, 0.5, 0.0)
MODEL = Transformer(dataclasses.replace(tiny(), num_layers=1))
ROLLOUT = RolloutConfig(CacheConfig(LAYOUT, window=2), SIGMAS, height=1, width=2)
CLIP = ClipGeometry.from_blocks(LAYOUT, BLOCKS, 1, 2)
EVERY_MODE = ConditionMixture(**{mode: 1 / len(MODES) for mode in MODES})
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def test_the_mixture_names_the_modes():
    assert {field.name for field in dataclasses.fields(ConditionMixture)} == set(MODES)
    assert not ConditionMixture().gives and EVERY_MODE.gives
    for wrong in ({"t2av": 0.5}, {"t2av": 1.5, "i2av": -0.5}):
        with pytest.raises(ValueError, match="must be 0 or more and sum to 1"):
            ConditionMixture(**wrong)


def test_modes_are_drawn_as_often_as_they_should():
    """One for every sample; `extend` with each number of blocks as often."""
    mixture = ConditionMixture(t2av=0.5, extend=0.2, a2v=0.3)
    given = GivenInput(mixture, CLIP, LAYOUT)
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = jit(given.masks)(keys)
    rows = np.concatenate([masks.video, masks.audio], axis=1)  # [B, F + T_a]
    found, counts = np.unique(rows, axis=0, return_counts=True)
    shares = {tuple(row): count / 4000 for row, count in zip(found, counts, strict=True)}
    expected = {
        (1, 1, 1, 1, 1, 1, 1, 1): 0.5,
        (0, 1, 1, 0, 1, 1, 1, 1): 0.1,
        (0, 0, 1, 0, 0, 0, 1, 1): 0.1,
        (1, 1, 1, 0, 0, 0, 0, 0): 0.3,
    }
    assert shares.keys() == expected.keys()
    for row, share in expected.items():
        assert shares[row] == pytest.approx(share, abs=0.03)
    np.testing.assert_array_equal(masks.video[:5], given.masks(keys[:5]).video)
    assert GivenInput(ConditionMixture(), CLIP, LAYOUT).condition({}, keys) is None


def every_mode(clean: AVLatents) -> Condition:
    """A sample in each mode."""
    masks = [mode_mask(mode, CLIP, AVLatents(2, 3)) for mode in MODES]
    return Condition.of_clip(clean, jax.tree.map(lambda *m: jnp.stack(m), *masks))


def given_tokens(condition: Condition) -> AVLatents:
    """[B, T] boolean."""
    return jax.tree.map(
        lambda m, c: np.repeat(np.asarray(m) == 0, c.shape[1] // m.shape[1], axis=1),
        condition.mask, condition.clean,
    )  # fmt: skip


class Inputs:
    """A batch of clips with text, random weights for all networks, and a condition of each mode."""

    def __init__(self):
        contexts = random_contexts(MODEL.config, batch=BATCH)
        negative = random_contexts(MODEL.config, batch=1, seed=7)
        names = ("video_context", "audio_context")
        self.contexts = contexts
        self.clean = random_latents(
            MODEL.config, CLIP.video_tokens, CLIP.audio_frames, batch=BATCH, seed=4
        )
        self.text = dict(zip(names, contexts, strict=True))
        self.frozen = Frozen(
            random_params(MODEL.config, 3), None, dict(zip(names, negative, strict=True))
        )
        self.weights, self.critic = random_params(MODEL.config, 1), random_params(MODEL.config, 2)
        self.keys = jax.random.split(jax.random.key(3), BATCH)
        self.condition = every_mode(self.clean)


@pytest.fixture(scope="module")
def inputs():
    return Inputs()


def students():
    return {
        "I": BidirectionalStudent(MODEL, CLIP, SIGMAS),
        "III": UnrolledStudent(MODEL, ROLLOUT, BLOCKS, BLOCKS),
        "III, whole gradient": UnrolledStudent(
            MODEL, ROLLOUT, BLOCKS, BLOCKS, detach_history=False
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("I", marks=pytest.mark.slow),
        "III",
        pytest.param("III, whole gradient", marks=pytest.mark.slow),
    ],
)
def test_students_keep_what_is_given(inputs, name):
    """In all modes at once. No gradient enters by a given token, and one enters by the others."""
    student = students()[name]
    tokens = given_tokens(inputs.condition)

    @jit
    def pull(condition, cotangent):
        step = jax.random.key(5)
        trace = student.simulate(inputs.weights, inputs.contexts, inputs.keys, step, condition)
        x, pullback = student.sample_with_pullback(
            inputs.weights, inputs.contexts, inputs.keys, trace
        )
        return x, pullback(cotangent)

    def norms(gradient):
        return max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))

    ones = jax.tree.map(jnp.ones_like, inputs.clean)
    of_given = jax.tree.map(lambda x, t: x * t[..., None], ones, tokens)
    x, gradient = pull(inputs.condition, of_given)
    assert norms(gradient) == 0.0
    for stream in STREAMS:
        kept = getattr(tokens, stream)
        sample, clean = np.asarray(getattr(x, stream)), np.asarray(getattr(inputs.clean, stream))
        np.testing.assert_array_equal(sample[kept], clean[kept])
        assert np.isfinite(sample).all() and (sample != clean)[~kept].all(axis=-1).any()
    others = jax.tree.map(lambda x, t: x * ~t[..., None], ones, tokens)
    assert norms(pull(inputs.condition, others)[1]) > 1e-4
    # what is not given of a clip is nowhere to be seen
    hidden = jax.tree.map(lambda c, t: jnp.where(t[..., None], c, 7.0), inputs.clean, tokens)
    again, _ = pull(inputs.condition.replace(clean=hidden), others)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(x), strict=True):
        np.testing.assert_array_equal(a, b)


def make(stage: str, context: str = "bidirectional", given=None) -> DMD:
    config = DMDStage(
        score=ScoreConfig(context=context, stg=0.5, stg_blocks=(0,)), conditions=EVERY_MODE
    )
    blocks = BlockContext(ROLLOUT, BLOCKS) if context == "block_causal" else None
    optimizer = optax.sgd(1e-3)
    generator = students()[stage]
    return DMD(
        generator, MODEL, MODEL, TextInput(), optimizer, optimizer, config, blocks, given=given
    )


@pytest.mark.parametrize(
    "context", ["bidirectional", pytest.param("block_causal", marks=pytest.mark.slow)]
)
def test_losses_count_what_is_generated(inputs, context):
    """The gradient of the samples is zero at given tokens; a stream that is given has no loss, and
    a sample of which nothing is given has the loss that it has without conditions."""
    dmd = make("III", context)
    tokens = given_tokens(inputs.condition)
    x = jax.tree.map(lambda c, t: jnp.where(t[..., None], c, 0.5 * c), inputs.clean, tokens)

    @jit
    def score(condition):
        arguments = inputs.critic, inputs.frozen, x, inputs.contexts, inputs.keys, condition
        cotangent, (loss, _) = dmd.score(*arguments)
        return cotangent, loss

    @jit
    def fit(condition):
        return dmd.fit_critic(inputs.critic, x, inputs.contexts, inputs.keys, condition)

    cotangent, loss = score(inputs.condition)
    grads, (critic_loss, _) = fit(inputs.condition)
    usual_cotangent, usual = score(None)
    plain = list(MODES).index("t2av")
    for stream in STREAMS:
        kept = getattr(tokens, stream)
        g = np.asarray(getattr(cotangent, stream))
        assert not g[kept].any() and g[~kept].any() and np.isfinite(g).all()
        whole = kept.all(axis=1)
        assert whole.any()
        for values in (loss, critic_loss):
            np.testing.assert_array_equal(np.asarray(getattr(values, stream)) == 0, whole)
        found, expected = (np.asarray(getattr(x, stream))[plain] for x in (loss, usual))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        expected = np.asarray(getattr(usual_cotangent, stream))[plain]
        np.testing.assert_allclose(g[plain], expected, atol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_generator_step_reads_the_batch_of_clips(inputs):
    """Conditions are drawn from the samples' keys, whatever microbatch they are in."""
    dmd = make("I", given=GivenInput(EVERY_MODE, CLIP, LAYOUT))
    batch = numbered(inputs.text | {"video": inputs.clean.video, "audio": inputs.clean.audio})

    @jit
    def gradient(batch):
        return dmd.generator_gradient(
            inputs.weights, inputs.critic, inputs.frozen, batch, jax.random.key(0)
        )

    _, (loss, _) = gradient(batch)
    of_samples = jax.random.split(jax.random.key(0))[0]
    masks = dmd.given.masks(sample_keys(of_samples, batch["row"]))
    for stream in STREAMS:
        frozen = np.asarray(getattr(masks, stream)).max(axis=1) == 0
        np.testing.assert_array_equal(np.asarray(getattr(loss, stream)) == 0, frozen)
    assert len(np.unique(np.asarray(masks.video), axis=0)) > 1


def test_regression_reads_what_was_given(inputs):
    """Trajectories say it themselves."""
    config = StageII(regression=RegressionConfig(objective="x0"))
    stage = ODERegression(MODEL, ROLLOUT, BLOCKS, TextInput(), optax.sgd(1e-3), config)
    states = {name: getattr(inputs.clean, name)[:, None].repeat(3, 1) for name in STREAMS}
    masks = {f"{name}_mask": getattr(inputs.condition.mask, name) for name in STREAMS}
    sigmas = {"sigmas": jnp.tile(jnp.array(SIGMAS), (BATCH, 1))}
    task = stage.task(states | sigmas | masks, inputs.keys)
    for found, expected in zip(
        jax.tree.leaves(task.condition), jax.tree.leaves(inputs.condition), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert stage.task(states | sigmas, inputs.keys).condition is None


@pytest.mark.parametrize("history", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_regression_counts_what_is_generated(inputs, history):
    """Flow matching draws what is given; it is shown clean, and has no loss."""
    config = StageII(
        regression=RegressionConfig(objective="flow", include_clean=False, clean_history=history),
        conditions=EVERY_MODE,
    )
    given = GivenInput(EVERY_MODE, CLIP, LAYOUT)
    stage = ODERegression(MODEL, ROLLOUT, BLOCKS, TextInput(), optax.sgd(1e-3), config, given)
    batch = {"video": inputs.clean.video[:, None], "audio": inputs.clean.audio[:, None]}
    task = stage.task(batch, inputs.keys)
    tokens = given_tokens(task.condition)
    for stream in STREAMS:
        kept = getattr(tokens, stream)
        noisy, clean = (np.asarray(getattr(x, stream)) for x in (task.noisy, task.clean))
        np.testing.assert_array_equal(noisy[kept], clean[kept])
        assert (noisy != clean)[~kept].all()
    gradient = stage._forced_gradient if history else stage._masked_gradient

    @jit
    def losses(task):
        return gradient(inputs.weights, inputs.contexts, task)

    grads, per_block = losses(task)
    spoiled = jax.tree.map(lambda x, t: jnp.where(t[..., None], 99.0, x), task.target, tokens)
    again, _ = losses(task.replace(target=spoiled))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    frozen = jax.tree.map(lambda t: t.all(axis=1), tokens)
    for stream in STREAMS:
        whole = np.asarray(getattr(per_block, stream)).sum(axis=1)
        np.testing.assert_array_equal(whole == 0, getattr(frozen, stream))
