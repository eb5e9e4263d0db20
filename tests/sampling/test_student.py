"""Generating blocks: one step written out by hand, the scan, the host loop, and gradients."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.quantization import dequantize
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig, block_noise, prompt_kv
from omniforcing_jax.sampling.weights import is_by_heads, is_per_layer, per_layer
from omniforcing_jax.types import AVLatents
from tests.tiny_model import (
    LTX25_CHANGES,
    QUICK_COMPILE,
    modalities,
    random_contexts,
    random_params,
)

HEIGHT, WIDTH, BATCH = 1, 2, 2
NUM_BLOCKS = 7  # a window of two blocks has let go of four by then
KEY = jax.random.key(3)

jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
encode = jit(prompt_kv, static_argnames=("model", "levels", "dtype"))
block_step = jit(student.block_step, static_argnames=("model", "config", "first", "full"))


class Setup:
    """A tiny student with what it needs to generate blocks."""

    def __init__(self, layout, *, context_noise=0.0, window=2, sigmas=(1.0, 0.6, 0.0), **changes):
        config = tiny(**changes)
        self.model, self.params = Transformer(config), random_params(config)
        self.config = RolloutConfig(
            CacheConfig(layout, window=window), sigmas, HEIGHT, WIDTH, context_noise=context_noise
        )
        self.contexts = random_contexts(config, batch=BATCH)
        self.rope = self.config.rope(self.model, NUM_BLOCKS)
        self.text = self.encode(self.model)
        self._programs = {}

    def encode(self, model):
        return encode(model, self.params, *self.contexts, levels=self.config.sigma_levels)

    def noise(self, block, key=KEY):
        return block_noise(key, block, self.config, self.model, BATCH, first=block == 0)

    def host_loop(self, num_blocks, params=None):
        """The blocks one by one, as a streaming session makes them."""
        text = self.text
        if params is None:
            params = self.params
        else:
            how = {"levels": self.config.sigma_levels, "dtype": self.config.cache.dtype}
            text = encode(self.model, params, *self.contexts, **how)
        cache = student.new_cache(self.model, self.config, BATCH, params)
        for block in range(num_blocks):
            full = is_per_layer(params) and block >= self.config.cache.capacity
            trace, cache = block_step(
                self.model, params, cache, text, self.rope, self.noise(block),
                config=self.config, first=block == 0, full=full,
            )  # fmt: skip
            yield trace.x0, cache

    def scan(self, key=KEY, model=None):
        """The clip in one program."""
        model = model or self.model
        arguments = self.params, self.encode(model), self.rope, key
        if model not in self._programs:
            lowered = student.rollout.lower(
                model, *arguments, config=self.config, num_blocks=NUM_BLOCKS, batch=BATCH
            )
            self._programs[model] = lowered.compile(compiler_options=QUICK_COMPILE)
        return self._programs[model](*arguments)


@pytest.fixture(scope="module")
def sinks():
    return Setup(BlockLayout.prefix(), num_audio_sinks=2)


@pytest.fixture(scope="module")
def ltx25():
    """Modulated text attention, so text K/V per noise level, a noisy refresh pass, and LTX-2.5's
    mark on the first latent."""
    return Setup(BlockLayout.merged(), context_noise=0.1, **LTX25_CHANGES)


# -- one block ------------------------------------------------------------------------------------


@functools.partial(jit, static_argnames="model")
def velocity_from_contexts(model, params, rope, x, sigma, frames, contexts, history):
    """Velocities and K/V of a block, the prompt given as features rather than as K/V."""
    sigmas = (jnp.full((BATCH, 1), sigma),) * 2
    first = history is None
    streams = modalities(model.config, rope, x, sigmas, frames, contexts, sinks=first)
    return model.clone(return_kv=True).apply({"params": params}, *streams, history=history)


def block_by_hand(s: Setup, block, history=None):
    """Clean latents and K/V of a block before any eviction, in plain Python."""
    layout = s.config.cache.layout
    frames = (
        layout.num_video_frames(block) + np.arange(layout.video_frames_in(block)),
        layout.num_audio_frames(block) + np.arange(layout.audio_frames_in(block)),
    )
    noise = s.noise(block)

    def velocity(x, sigma):
        (video, audio), kv = velocity_from_contexts(
            s.model, s.params, s.rope, x, sigma, frames, s.contexts, history
        )
        return AVLatents(video, audio), kv

    def mix(x0, noise, sigma):
        return jax.tree.map(lambda x, n: (1 - sigma) * x + sigma * n, x0, noise)

    x = jax.tree.map(lambda n: n[0], noise)
    for i, (sigma, following) in enumerate(itertools.pairwise(s.config.sigmas)):
        v, _ = velocity(x, sigma)
        x0 = jax.tree.map(lambda x, v, sigma=sigma: x - sigma * v, x, v)
        if following > 0:
            x = mix(x0, jax.tree.map(lambda n, i=i: n[i + 1], noise), following)
    level = s.config.context_noise
    context = x0 if level == 0 else mix(x0, jax.tree.map(lambda n: n[-1], noise), level)
    return x0, velocity(context, level)[1]


@pytest.mark.parametrize("name", ["sinks", "ltx25"])
def test_block_step_by_hand(name, request):
    """Noise, sigmas, refresh, and text K/V (per noise level in LTX-2.3) instead of contexts."""
    s = request.getfixturevalue(name)
    layout, patches = s.config.cache.layout, s.config.patches
    blocks = s.host_loop(2)
    x0, cache = next(blocks)
    by_hand, kv = block_by_hand(s, 0)
    assert_close(x0, by_hand)
    video = layout.first_video_frames * patches
    audio = s.model.config.num_audio_sinks + layout.first_audio_frames
    for path, length in (("video", video), ("audio", audio), ("a2v", audio), ("v2a", video)):
        written = jax.tree.map(lambda x, n=length: x[:, :, :n], getattr(cache.kv, path))
        assert_close(written, getattr(kv, path))

    if name == "ltx25":  # the scan test below goes on from here
        return
    history = student.kv_cache.history(cache, s.rope, s.model.config.rope_type, patches)
    x1, later = next(blocks)
    by_hand, kv = block_by_hand(s, 1, history)
    assert_close(x1, by_hand)
    written = jax.tree.map(
        lambda x: x[:, :, video : video + layout.video_frames * patches], later.kv.video
    )
    assert_close(written, kv.video)


@pytest.mark.parametrize("name", ["sinks", "ltx25"])
def test_weights_per_layer_make_the_same_blocks(name, request):
    """Before the ring is full, when it is, and when blocks are evicted; anchors apart. Those of one
    model are joined, those of the other lie by heads."""
    s = request.getfixturevalue(name)
    stacked = jax.tree.map(jnp.array, s.params)
    params = per_layer(stacked, by_heads=s.model.config if name == "ltx25" else None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacked["blocks"]))
    names = [set(params["blocks"][1][attn]) for attn in ("video_attn", "audio_attn")]
    assert all({"qkv", "q"} & found == {"q" if is_by_heads(params) else "qkv"} for found in names)
    blocks = zip(s.host_loop(NUM_BLOCKS), s.host_loop(NUM_BLOCKS, params), strict=True)
    for block, ((expected, _), (found, cache)) in enumerate(blocks):
        close = functools.partial(np.testing.assert_allclose, atol=2e-4, err_msg=str(block))
        jax.tree.map(close, found, expected)
        assert cache.num_blocks == block + 1 and isinstance(cache.kv, tuple)
        kv = cache.kv[0].video
        assert (kv.order == "NHS") == is_by_heads(params) == (name == "ltx25")
        assert kv.k.shape[1 if is_by_heads(params) else 2] == s.model.config.video_heads


def test_a_cache_in_int8_makes_almost_the_same_blocks(sinks):
    """All of its writes and reads: block 0, a ring that fills, is full, and lets go."""
    params = per_layer(jax.tree.map(jnp.array, sinks.params), by_heads=sinks.model.config)
    changed, exact = copy.copy(sinks), list(sinks.host_loop(NUM_BLOCKS, params))
    cache = dataclasses.replace(sinks.config.cache, dtype="int8")
    changed.config = dataclasses.replace(sinks.config, cache=cache)
    blocks = list(changed.host_loop(NUM_BLOCKS, params))
    for (expected, _), (found, _) in zip(exact, blocks, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)
    cache = blocks[-1][1]
    assert cache.kv[0].v2a.k.values.dtype == jnp.int8
    assert cache.kv[0].v2a.k.scale.shape[-2] == 1, "the tokens of the scales are last, by heads"
    exact = exact[-1][1].kv[0].audio.v  # within half a step of one layer's values
    error = np.abs(dequantize(cache.kv[0].audio.v, jnp.float32) - exact)
    assert 0 < error.max() < 0.05 * np.abs(exact).max()
    with pytest.raises(ValueError, match="a cache in int8 needs weights per layer"):
        student.new_cache(changed.model, changed.config, BATCH)


def test_text_kv_depends_on_the_level_only_where_it_is_modulated(sinks, ltx25):
    c = sinks.model.config
    assert sinks.text.video.k.shape == (c.num_layers, BATCH, 3, c.video_heads, c.video_head_dim)
    levels = len(ltx25.config.sigma_levels)
    assert ltx25.config.sigma_levels == (1.0, 0.6, 0.1)
    assert ltx25.text.audio.v.shape[:2] == (levels, c.num_layers)
    k = np.asarray(ltx25.text.video.k)
    assert all(np.abs(k[i] - k[j]).max() > 1e-2 for i, j in ((0, 1), (1, 2)))
    with pytest.raises(ValueError, match="needs sigma"):
        ltx25.model.apply({"params": ltx25.params}, *ltx25.contexts, method="text_kv")


def assert_close(actual, expected, atol=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.std(b) > 0.05
        np.testing.assert_allclose(a, b, atol=atol)


# -- noise ----------------------------------------------------------------------------------------


def test_any_block_can_be_redrawn(sinks, ltx25):
    """Noise follows from key and block index, whether the index is static or traced."""
    traced = jit(
        lambda block: block_noise(KEY, block, sinks.config, sinks.model, BATCH, first=False)
    )
    draws = [sinks.noise(block) for block in (5, 1, 2)]
    for block, noise in zip((5, 1, 2), draws, strict=True):
        # Fusions may round the inverse error function's last bit differently.
        np.testing.assert_allclose(noise.video, traced(block).video, atol=1e-6)
        np.testing.assert_allclose(noise.audio, traced(block).audio, atol=1e-6)
    layout = sinks.config.cache.layout
    assert draws[0].video.shape == (2, BATCH, layout.video_frames * 2, 4)
    assert sinks.noise(0).audio.shape == (2, BATCH, layout.first_audio_frames, 6)
    assert ltx25.noise(1).audio.shape[0] == 3  # two steps and the noisy refresh
    # Independent over blocks, steps, samples, modalities and keys.
    rows = [x.reshape(-1)[:100] for n in draws for x in (n.video[0], n.video[1], n.audio[0])]
    rows += [draws[0].video[0, 1], sinks.noise(5, jax.random.key(4)).video]
    rows = np.stack([np.asarray(r).reshape(-1)[:24] for r in rows])
    assert len(np.unique(rows.round(4), axis=0)) == len(rows)
    assert 0.9 < np.std(rows) < 1.1


# -- scan and host loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("sinks", marks=pytest.mark.default_xla), "ltx25"])
def test_scan_is_the_host_loop(name, request):
    s = request.getfixturevalue(name)
    clip = s.scan()
    blocks = [x0 for x0, _ in s.host_loop(NUM_BLOCKS)]
    layout = s.config.cache.layout
    assert clip.video.shape == (BATCH, layout.num_video_frames(NUM_BLOCKS) * 2, 4)
    assert clip.audio.shape == (BATCH, layout.num_audio_frames(NUM_BLOCKS), 6)
    assert clip.video.dtype == clip.audio.dtype == jnp.float32
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)
    assert_close(clip, joined, atol=1e-5)


def test_a_clip_of_one_block(sinks):
    clip = jax.eval_shape(
        functools.partial(
            student.rollout, sinks.model, config=sinks.config, num_blocks=1, batch=BATCH
        ),
        sinks.params, sinks.text, sinks.rope, KEY,
    )  # fmt: skip
    assert clip.video.shape == (BATCH, 2, 4)
    assert clip.audio.shape == (BATCH, 1, 6)


def test_seeds(sinks):
    first, again, other = sinks.scan(), sinks.scan(), sinks.scan(jax.random.key(4))
    np.testing.assert_array_equal(first.video, again.video)
    np.testing.assert_array_equal(first.audio, again.audio)
    assert np.abs(first.video - other.video).max() > 0.1
    assert np.abs(first.audio - other.audio).max() > 0.1


def test_a_stream_compiles_two_programs(sinks):
    """One for block 0 and one for all others, whatever the cache holds."""
    programs = [block_step._cache_size() for _ in sinks.host_loop(NUM_BLOCKS)]
    assert programs[1:] == programs[1:2] * (NUM_BLOCKS - 1)


@pytest.mark.default_xla
def test_bfloat16(sinks):
    """bf16 compute and cache: finite, float32 latents, and close to the fp32 clip."""
    model = Transformer(sinks.model.config, dtype=jnp.bfloat16)
    assert student.new_cache(model, sinks.config, BATCH).kv.a2v.v.dtype == jnp.bfloat16
    half, full = sinks.scan(model=model), sinks.scan()
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert a.dtype == jnp.float32
        assert np.isfinite(a).all()
        difference = np.sqrt(np.mean((a - b) ** 2)) / np.std(b)
        assert 1e-5 < difference < 0.1


# -- gradients ------------------------------------------------------------------------------------


def test_gradients_stop_at_the_cache(sinks):
    """Self-forcing: a block's gradient reaches the network that generated it and the prompt, but
    not the blocks behind it.
    """
    s = sinks
    noise = s.noise(0), s.noise(1)

    def run(earlier_params, params, text, first_noise):
        cache = student.new_cache(s.model, s.config, BATCH)
        _, cache = student.block_step(
            s.model, earlier_params, cache, text, s.rope, first_noise, s.config, first=True
        )
        trace, _ = student.block_step(
            s.model, params, cache, text, s.rope, noise[1], s.config, first=False
        )
        x1 = trace.x0
        loss = jnp.mean(x1.video**2) + jnp.mean(x1.audio**2)
        return loss, x1

    arguments = s.params, s.params, s.text, noise[0]
    gradient = jit(jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True))
    (earlier, params, text, first_noise), x1 = gradient(*arguments)
    for stopped in (earlier, first_noise):
        assert all(not np.any(g) for g in jax.tree.leaves(stopped))
    # Sinks act through block 0 alone; the caption projections through the text K/V alone.
    indirect = ("audio_sinks", "video_caption", "audio_caption")
    for path, g in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        text_side = any(f"text_attn']['{part}" in name for part in ("k'", "v'", "k_norm"))
        assert np.isfinite(g).all()
        assert np.any(g) == (path[0].key not in indirect and not text_side), name
    assert all(np.any(g) for g in jax.tree.leaves(text))
    # Block 0 does matter to block 1: only the gradient is cut.
    other = s.noise(0, jax.random.key(9))
    assert np.abs(gradient(*arguments[:3], other)[1].video - x1.video).max() > 1e-3


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sigmas": (1.0, 0.5)}, "must end with 0"),
        ({"sigmas": (0.5, 0.7, 0.0)}, "strictly decrease"),
        ({"sigmas": (0.0,)}, "at least two"),
        ({"sigmas": (1.5, 0.0)}, "between 0"),
        ({"height": 0}, "height and width must be positive"),
        ({"width": -1}, "height and width must be positive"),
        ({"context_noise": 1.0}, "context_noise"),
        ({"context_noise": -0.1}, "context_noise"),
    ],
)
def test_bad_configs(ltx25, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ltx25.config, **changes)


def test_absolute_positions_need_a_length(ltx25):
    cache = dataclasses.replace(ltx25.config.cache, positions="absolute")
    config = dataclasses.replace(ltx25.config, cache=cache)
    with pytest.raises(ValueError, match="relative"):
        config.rope(ltx25.model)
    assert config.rope(ltx25.model, 9).video_time.cos.shape[0] == 4 + 8 * 3
    endless = ltx25.config.rope(ltx25.model)
    assert endless.audio.cos.shape[0] == 26 + (2 + 1) * 25
