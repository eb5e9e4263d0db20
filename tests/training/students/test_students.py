"""The students' samples and their gradients, against uncached masked passes and plain autodiff."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.models.transformer.layers import KV, History
from omniforcing_jax.models.transformer.model import Modality, Transformer
from omniforcing_jax.sampling import flow, kv_cache, student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.whole_clip import clip_x0, sigmas_per_frame
from omniforcing_jax.training.objectives.common import fold
from omniforcing_jax.training.students import exits
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent, noise_of_block
from omniforcing_jax.types import AVLatents, RandomUse
from tests.tiny_model import LTX23_CHANGES, QUICK_COMPILE, random_contexts, random_params

BATCH, BLOCKS = 2, 3
SIGMAS = (1.0, 0.8, 0.4, 0.0)
LAYOUT = BlockLayout(1, 2, 1, 3)
SINKS = 2
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def make(layout=LAYOUT, *, window=4, num_blocks=BLOCKS, scored=BLOCKS, sinks=SINKS, **changes):
    """A generator with its weights, contexts and keys."""
    model = Transformer(tiny(num_audio_sinks=sinks, **changes))
    config = RolloutConfig(CacheConfig(layout, window=window), SIGMAS, height=1, width=2)
    generator = UnrolledStudent(model, config, num_blocks, scored)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(BATCH))
    return generator, random_params(model.config), random_contexts(model.config, batch=BATCH), keys


def step_key_with_exit(step: int) -> jax.Array:
    """A key from which this exit step is drawn."""
    for seed in range(100):
        if jax.random.randint(jax.random.key(seed), (), 0, len(SIGMAS) - 1) == step:
            return jax.random.key(seed)
    raise AssertionError("no key found")


def cotangent_like(x: AVLatents, seed: int = 9) -> AVLatents:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), x)


def compiled(generator, contexts):
    """(params, keys, step key) -> sample and the gradient of its product with `cotangent_like`."""

    @jit
    def program(params, keys, step_key):
        trace = generator.simulate(params, contexts, keys, step_key)
        sample, pullback = generator.sample_with_pullback(params, contexts, keys, trace)
        return sample, pullback(cotangent_like(sample))

    return program


@pytest.fixture(scope="module")
def self_forcing():
    """A generator with sinks, what it is called with, and its program."""
    generator, params, contexts, keys = make()
    return generator, params, contexts, keys, compiled(generator, contexts)


def assert_trees_close(actual, expected, tolerance):
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = float(np.abs(e).max()) + 1e-6
        error = float(np.abs(np.asarray(a, np.float32) - e).max()) / scale
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


# -- stage III against a clip-wide, masked, uncached computation ------------------------------


class Uncached:
    """The same rollout by masked passes over whole clips: no cache, no block step."""

    def __init__(self, generator: UnrolledStudent, params, contexts):
        self.model, self.params, self.contexts = generator.model, params, contexts
        self.layout, self.config = generator.config.cache.layout, generator.config
        self.clip = ClipGeometry.from_blocks(self.layout, generator.num_blocks, 1, 2)
        self.rope = self.clip.rope(self.model)
        self.num_blocks = generator.num_blocks

    def bounds(self, block):
        """Token ranges of a block in both streams."""
        patches, layout = self.clip.patches, self.layout
        return (
            slice(
                layout.num_video_frames(block) * patches,
                layout.num_video_frames(block + 1) * patches,
            ),
            slice(layout.num_audio_frames(block), layout.num_audio_frames(block + 1)),
        )

    def masked_x0(self, x, block, sigma):
        """Prediction of one block at `sigma`, all others clean, in one masked pass."""
        levels = jnp.zeros((BATCH, self.num_blocks)).at[:, block].set(sigma)
        model = self.model.clone(causal=self.clip.mask(self.layout))
        sigmas = sigmas_per_frame(levels, self.layout, self.clip)
        return clip_x0(model, self.params, x, sigmas, self.contexts, self.clip)

    def generate(self, noise_of, exit_step):
        """The clip, and the noisy input of every block's last pass."""
        keys = jax.random.split(jax.random.key(0), BATCH)
        x = jax.tree.map(jnp.zeros_like, draw_noise(keys, self.clip, self.model))
        masked_x0 = jit(self.masked_x0)
        inputs = []
        for block in range(self.num_blocks):
            video, audio = self.bounds(block)
            noise = noise_of(block)
            noisy = jax.tree.map(lambda n: n[0], noise)
            for i in range(exit_step + 1):
                inputs = [*inputs[:block], noisy]
                x = AVLatents(
                    x.video.at[:, video].set(noisy.video), x.audio.at[:, audio].set(noisy.audio)
                )
                whole = masked_x0(x, block, SIGMAS[i])
                x0 = AVLatents(whole.video[:, video], whole.audio[:, audio])
                if i < exit_step:
                    noisy = jax.tree.map(
                        lambda a, n, i=i: flow.add_noise(a, n[i + 1], SIGMAS[i + 1]), x0, noise
                    )
            x = AVLatents(x.video.at[:, video].set(x0.video), x.audio.at[:, audio].set(x0.audio))
        return x, inputs

    def history_of_clean_clip(self, x):
        """Keys and values of the whole clean clip, from one masked pass."""
        model = self.model.clone(causal=self.clip.mask(self.layout), return_kv=True)
        zero = jnp.zeros((BATCH, 1))
        streams = self.streams(
            x, zero, range(self.clip.video_frames), range(self.clip.audio_frames)
        )
        return model.apply({"params": self.params}, *streams)[1]

    def streams(self, x, sigma, video_frames, audio_frames, sinks=True):
        video_frames, audio_frames = jnp.asarray(video_frames), jnp.asarray(audio_frames)
        sinks = sinks and self.model.config.num_audio_sinks > 0
        return (
            Modality(
                x.video,
                sigma,
                self.rope.video_rope(video_frames),
                self.rope.video_cross_rope(video_frames),
                self.contexts[0],
            ),
            Modality(
                x.audio,
                sigma,
                self.rope.audio_rope(audio_frames, sinks),
                self.rope.audio_cross_rope(audio_frames, sinks),
                self.contexts[1],
            ),
        )

    def block_objective(self, params, block, x_in, kv, sigma, cotangent):
        """<x0 of the block, cotangent>, its history detached and the text not."""
        layout, sinks = self.layout, self.model.config.num_audio_sinks
        video_frames = range(layout.num_video_frames(block), layout.num_video_frames(block + 1))
        audio_frames = range(layout.num_audio_frames(block), layout.num_audio_frames(block + 1))
        streams = self.streams(
            x_in, jnp.full((BATCH, 1), sigma), video_frames, audio_frames, sinks=block == 0
        )
        history = None
        if block:
            video, audio = self.bounds(block)
            v, a = video.start, sinks + audio.start
            before_video = jnp.arange(layout.num_video_frames(block))
            before_audio = jnp.arange(layout.num_audio_frames(block))
            tables = Pathways(
                self.rope.video_rope(before_video),
                self.rope.audio_rope(before_audio, sinks > 0),
                self.rope.audio_cross_rope(before_audio, sinks > 0),
                self.rope.video_cross_rope(before_video),
            )

            def part(kv, table, length):
                k = table.rotate(kv.k[:, :, :length], self.model.config.rope_type)
                layers = jnp.full((k.shape[0],), length)
                return History(KV(k, kv.v[:, :, :length]), layers)

            history = Pathways(
                part(kv.video, tables.video, v),
                part(kv.audio, tables.audio, a),
                part(kv.a2v, tables.a2v, a),
                part(kv.v2a, tables.v2a, v),
            )
        (video, audio), _ = self.model.apply({"params": params}, *streams, history=history)
        x0 = AVLatents(x_in.video - sigma * video, x_in.audio - sigma * audio)
        return jnp.sum(x0.video * cotangent.video) + jnp.sum(x0.audio * cotangent.audio)


@pytest.mark.parametrize("exit_step", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_self_forcing_step_equals_uncached_masked_computation(self_forcing, exit_step):
    """Sample and gradient; the gradient reaches text and own tokens and stops at the history."""
    generator, params, contexts, keys, program = self_forcing
    sample, grads = program(params, keys, step_key_with_exit(exit_step))

    reference = Uncached(generator, params, contexts)

    @functools.partial(jit, static_argnums=0)
    def noise(block):
        return noise_of_block(keys, block, generator.config, generator.model, first=block == 0)

    expected, inputs = reference.generate(noise, exit_step)
    assert_trees_close(sample, expected, 2e-5)

    kv = jax.lax.stop_gradient(jit(reference.history_of_clean_clip)(expected))
    cotangent = cotangent_like(expected)

    def objective(params):
        total = 0.0
        for block in range(BLOCKS):
            video, audio = reference.bounds(block)
            part = AVLatents(cotangent.video[:, video], cotangent.audio[:, audio])
            total += reference.block_objective(
                params, block, inputs[block], kv, SIGMAS[exit_step], part
            )
        return total

    expected_grads = jit(jax.grad(objective))(params)
    assert_trees_close(grads, expected_grads, 2e-4)
    assert float(np.abs(grads["audio_sinks"]).max()) > 0
    text = grads["blocks"]["video_text_attn"]
    assert float(np.abs(text["k"]["kernel"]).max()) > 0, "text keys must receive gradients"


# -- stage III against autodiff through the block step, where blocks leave the window ---------


@pytest.mark.slow
def test_window_of_a_long_rollout():
    """Four blocks over a window of one, the last two scored: cache, positions and text by level."""
    generator, params, contexts, keys = make(window=1, num_blocks=4, scored=2, **LTX23_CHANGES)
    sample, grads = compiled(generator, contexts)(params, keys, step_key_with_exit(1))
    config, model = generator.config, generator.model
    rope = config.rope(model, 4)
    cotangent = cotangent_like(sample)
    assert sample.video.shape[1] == 2 * LAYOUT.video_frames * 2
    assert sample.audio.shape[1] == 2 * LAYOUT.audio_frames

    def objective(params):
        fixed = jax.lax.stop_gradient(params)
        encode = functools.partial(student.prompt_kv, model, levels=config.sigma_levels)
        text, fixed_text = encode(params, *contexts), encode(fixed, *contexts)
        cache = student.new_cache(model, config, BATCH)
        outputs = []
        for block in range(4):
            noise = noise_of_block(keys, block, config, model, first=block == 0)
            trace, following = student.block_step(
                model,
                fixed,
                cache,
                fixed_text,
                rope,
                noise,
                config,
                first=block == 0,
                exit_step=jnp.int32(1),
            )
            forward = student.bind(model, params, cache, rope, config, first=block == 0)
            x = jax.lax.stop_gradient(trace.exit_input)
            level_text = student.text_at(model, text, 1)
            outputs.append(forward(x, jnp.float32(SIGMAS[1]), level_text)[0])
            cache = jax.lax.stop_gradient(following)
        x0 = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *outputs[2:])
        dot = jnp.sum(x0.video * cotangent.video) + jnp.sum(x0.audio * cotangent.audio)
        return dot, x0

    expected_grads, expected = jit(jax.grad(objective, has_aux=True))(params)
    assert_trees_close(sample, expected, 2e-5)
    assert_trees_close(grads, expected_grads, 2e-4)
    assert float(np.abs(grads["audio_sinks"]).max()) == 0, "block 0 was not scored"


@pytest.mark.slow
def test_gradient_through_the_history(self_forcing):
    """With an attached history: central differences of the whole clip along a random direction."""
    generator, params, contexts, keys, program = self_forcing
    attached = dataclasses.replace(generator, detach_history=False)
    step_key = step_key_with_exit(0)  # no earlier step, so nothing but the history differs
    sample, grads = compiled(attached, contexts)(params, keys, step_key)
    detached_sample, detached = program(params, keys, step_key)
    assert_trees_close(sample, detached_sample, 1e-6)
    cotangent = cotangent_like(sample)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)

    def along(tree):
        return sum(
            float(jnp.vdot(g, d))
            for g, d in zip(jax.tree.leaves(tree), jax.tree.leaves(direction), strict=True)
        )

    def value(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        x, _ = program(moved, keys, step_key)
        return float(jnp.vdot(x.video, cotangent.video) + jnp.vdot(x.audio, cotangent.audio))

    difference = (value(1e-3) - value(-1e-3)) / 2e-3
    assert along(grads) == pytest.approx(difference, rel=2e-2)
    assert along(detached) != pytest.approx(difference, rel=5e-2), "the history matters"


def test_sample_is_that_of_the_sampler(self_forcing):
    """Exiting at the last step, the generator is the sampler's rollout; early exits are not."""
    generator, params, contexts, keys, program = self_forcing
    sample, _ = program(params, keys, step_key_with_exit(len(SIGMAS) - 2))
    model, config = generator.model, generator.config
    text = student.prompt_kv(model, params, *contexts, levels=config.sigma_levels)
    # one sample, since the sampler draws a batch's noise from one key
    first, one = slice(0, 1), {"num_blocks": BLOCKS, "batch": 1}
    one_text = jax.tree.map(lambda t: t[:, first], text)
    rope, key = config.rope(model, BLOCKS), fold(keys, RandomUse.ROLLOUT_NOISE)[0]
    expected = student.rollout(model, params, one_text, rope, key, config=config, **one)
    assert_trees_close(jax.tree.map(lambda x: x[first], sample), expected, 2e-5)
    early, _ = program(params, keys, step_key_with_exit(0))
    assert float(np.abs(early.video - sample.video).max()) > 1e-2


# -- stage I ----------------------------------------------------------------------------------


def test_bidirectional_generator_by_hand():
    """Every sample exits at its own step, none at sigma 0; only its last pass has a gradient."""
    model = Transformer(tiny())
    clip = ClipGeometry.from_blocks(LAYOUT, 2, 1, 2)
    generator = BidirectionalStudent(model, clip, SIGMAS)
    params, contexts = random_params(model.config), random_contexts(model.config, batch=4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(4))
    steps = exits.exit_steps(fold(keys, RandomUse.EXIT), 3)
    assert len(set(steps.tolist())) > 1, "choose another key: the samples should exit apart"
    sample, grads = compiled(generator, contexts)(params, keys, jax.random.key(0))
    cotangent = cotangent_like(sample)
    noise_keys = fold(keys, RandomUse.ROLLOUT_NOISE)
    x0_of = jit(functools.partial(clip_x0, model, clip=clip))

    inputs = []
    for i, exit_step in enumerate(steps.tolist()):
        row = slice(i, i + 1)
        one = jax.tree.map(lambda c, row=row: c[row], contexts)
        x = draw_noise(fold(noise_keys[row], 0), clip, model)
        for step in range(exit_step):
            x0 = x0_of(params, x, jnp.full((1,), SIGMAS[step]), one)
            fresh = draw_noise(fold(noise_keys[row], step + 1), clip, model)
            x = jax.tree.map(
                lambda a, n, step=step: flow.add_noise(a, n, SIGMAS[step + 1]), x0, fresh
            )
        inputs.append(x)
    x = jax.tree.map(lambda *rows: jnp.concatenate(rows), *inputs)
    sigma = jnp.asarray(SIGMAS)[steps]

    def objective(params):
        x0 = clip_x0(model, params, x, sigma, contexts, clip)
        dot = jnp.sum(x0.video * cotangent.video) + jnp.sum(x0.audio * cotangent.audio)
        return dot, x0

    expected_grads, expected = jit(jax.grad(objective, has_aux=True))(params)
    assert_trees_close(sample, expected, 2e-5)
    assert_trees_close(grads, expected_grads, 2e-4)


def test_no_draw_is_wasted():
    """Exit steps are uniform over the steps at which the network is called."""
    keys = jax.random.split(jax.random.key(0), 3000)
    counts = np.bincount(np.asarray(exits.exit_steps(keys, 3)), minlength=4)
    assert counts[3] == 0
    assert np.all(np.abs(counts[:3] / 1000 - 1) < 0.1)


def test_exit_weights():
    """In proportion to the weights, and never a step of weight 0."""
    keys = jax.random.split(jax.random.key(0), 3000)
    counts = np.bincount(np.asarray(exits.exit_steps(keys, 3, (0.0, 1.0, 2.0))), minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] / 1000 - 1) < 0.1
    assert int(exits.exit_step(jax.random.key(0), 3, (0, 0, 1))) == 2
    for bad in ((1.0, 1.0), (0, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="exit_weights must be 3 numbers"):
            BidirectionalStudent(Transformer(tiny()), ClipGeometry(3, 4, 1, 1), SIGMAS, bad)


# -- what is refused --------------------------------------------------------------------------


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="scored_blocks must be between 1 and"):
        make(num_blocks=2, scored=3)
    with pytest.raises(ValueError, match="sigmas\\[0\\] must be 1"):
        BidirectionalStudent(Transformer(tiny()), ClipGeometry(3, 4, 1, 1), (0.9, 0.0))


def test_history_carries_no_gradient():
    """`kv_cache.write` detaches, whoever calls it."""
    generator, params, contexts, keys = make()
    config, model = generator.config, generator.model
    rope = config.rope(model, BLOCKS)

    def second_block(params):
        text = student.prompt_kv(model, params, *contexts, levels=config.sigma_levels)
        text = jax.lax.stop_gradient(text)
        cache = student.new_cache(model, config, BATCH)
        noise = noise_of_block(keys, 0, config, model, first=True)
        forward = student.bind(model, params, cache, rope, config, first=True)
        kv = student.refresh(forward, text, jax.tree.map(lambda n: n[0], noise), noise, config)
        cache = kv_cache.write(cache, kv, config.patches, first=True)
        forward = student.bind(
            model, jax.lax.stop_gradient(params), cache, rope, config, first=False
        )
        noise = noise_of_block(keys, 1, config, model, first=False)
        x0, _ = forward(jax.tree.map(lambda n: n[0], noise), jnp.float32(1.0), text)
        return jnp.sum(x0.video) + jnp.sum(x0.audio)

    grads = jit(jax.grad(second_block))(params)
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(grads)) == 0
