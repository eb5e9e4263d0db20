"""The rolling cache: against forward passes without one, and against a list of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import TransformerConfig, tiny
from omniforcing_jax.models.transformer.layers import KV, History
from omniforcing_jax.models.transformer.model import ClipMask, Pathways, Transformer
from omniforcing_jax.models.transformer.rope import clip_rope
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.types import AVLatents
from tests.tiny_model import (
    LTX25_CHANGES,
    QUICK_COMPILE,
    modalities,
    random_contexts,
    random_latents,
    random_params,
)

HEIGHT, WIDTH = 2, 2
PATCHES = HEIGHT * WIDTH
TOLERANCE = 2e-5
PATHWAYS = ("video", "audio", "a2v", "v2a")
NUM_BLOCKS = 4  # of a clip without eviction
MANY = 24  # blocks for which the tests' RoPE tables are long enough

jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
write = jit(kv_cache.write, static_argnames=("patches", "first"))


# -- an independent account of what a rolling cache holds, as Python lists ------------------------


def visible_blocks(config: CacheConfig, block: int) -> list[int]:
    """Blocks that `block` may attend to, oldest first."""
    anchors = range(min(block, 1 + config.anchors))
    window = range(max(1 + config.anchors, block - config.window), block)
    return [*anchors, *window]


def position_when_seen(config: CacheConfig, seen: int, block: int) -> int:
    """Block index that gives `seen` its position while `block` is generated."""
    if config.positions == "absolute" or seen <= config.anchors:
        return seen
    return [*visible_blocks(config, block), block].index(seen)


def frames_at(layout: BlockLayout, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the video and audio latents of the block at `position`."""
    return (
        layout.num_video_frames(position) + np.arange(layout.video_frames_in(position)),
        layout.num_audio_frames(position) + np.arange(layout.audio_frames_in(position)),
    )


# -- forward passes -------------------------------------------------------------------------------


def tables(config: TransformerConfig, layout: BlockLayout):
    return clip_rope(
        config,
        video_frames=layout.num_video_frames(MANY),
        audio_frames=layout.num_audio_frames(MANY),
        height=HEIGHT,
        width=WIDTH,
    )


def random_blocks(config: TransformerConfig, layout: BlockLayout, count: int) -> list[AVLatents]:
    return [
        random_latents(
            config, layout.video_frames_in(b) * PATCHES, layout.audio_frames_in(b), seed=b
        )
        for b in range(count)
    ]


def forward_block(model, params, cache, rope, x, sigma, frames, keep=None):
    """(velocities, new K/V) of the next block, with the history that the cache gives it."""
    cache = cache if cache.num_blocks else None
    return _forward_block(model, params, cache, rope, x, sigma, frames, keep)


@functools.partial(jit, static_argnames="model")
def _forward_block(model, params, cache, rope, x, sigma, frames, keep):
    config, first = model.config, cache is None
    history = None if first else kv_cache.history(cache, rope, config.rope_type, PATCHES)
    sigmas = (jnp.full((1, 1), sigma),) * 2
    streams = modalities(config, rope, x, sigmas, frames, random_contexts(config), sinks=first)
    return model.clone(return_kv=True).apply(
        {"params": params}, *streams, history=history, keep=keep
    )


@functools.partial(jit, static_argnames="model")
def forward_clip(model, params, rope, blocks, sigmas, frames, keep=None):
    """Velocities of all blocks in one pass without a cache; one sigma and position per block."""
    config = model.config
    x = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)
    levels = [
        jnp.concatenate(
            [jnp.full((1, f[stream].size), s) for s, f in zip(sigmas, frames, strict=True)], axis=1
        )
        for stream in (0, 1)
    ]
    if config.text_adaln:  # one for the whole sample
        levels = [level[:, :1] for level in levels]
    joined = tuple(jnp.concatenate([f[stream] for f in frames]) for stream in (0, 1))
    streams = modalities(config, rope, x, levels, joined, random_contexts(config), sinks=True)
    return model.apply({"params": params}, *streams, keep=keep)[0]


def split_blocks(clip, blocks):
    """Velocities of a clip as one (video, audio) pair per block."""
    video_ends = np.cumsum([x.video.shape[1] for x in blocks])[:-1]
    audio_ends = np.cumsum([x.audio.shape[1] for x in blocks])[:-1]
    video, audio = (np.asarray(x) for x in clip)
    return list(
        zip(np.split(video, video_ends, axis=1), np.split(audio, audio_ends, axis=1), strict=True)
    )


def assert_close(actual, expected, message=""):
    for a, b in zip(actual, expected, strict=True):
        assert np.std(b) > 0.1
        np.testing.assert_allclose(a, b, atol=TOLERANCE, err_msg=str(message))


# -- the cache against masked forward passes, before anything is evicted --------------------------

STABILISED = {"gated_attention": True, "extra_qk_norm": True, "tanh_gated_attention": True}
CASES = {
    "prefix": (BlockLayout.prefix(), {}),
    "prefix, sinks, interleaved": (
        BlockLayout.prefix(),
        {
            "rope_type": "interleaved",
            "num_audio_sinks": 3,
            "sink_rope": "incremental",
            **STABILISED,
        },
    ),
    "merged, sinks": (BlockLayout.merged(), {"num_audio_sinks": 2}),
}


class Clip:
    """Random blocks of a model, by one masked pass and with an empty cache to go through them."""

    def __init__(self, layout: BlockLayout, changes: dict):
        self.model = Transformer(tiny(**changes))
        config = self.model.config
        self.params, self.rope = random_params(config), tables(config, layout)
        self.blocks = random_blocks(config, layout, NUM_BLOCKS)
        self.frames = [frames_at(layout, b) for b in range(NUM_BLOCKS)]
        clip_frames = layout.num_video_frames(NUM_BLOCKS), layout.num_audio_frames(NUM_BLOCKS)
        self.masked = self.model.clone(causal=ClipMask(layout, *clip_frames, PATCHES))
        # The last block finds the cache exactly full: block 0, one anchor, a window of one.
        cache_config = CacheConfig(layout, window=1, anchors=1)
        self.empty = kv_cache.init_cache(cache_config, config, batch=1, patches=PATCHES)

    def whole(self, sigmas):
        """Velocities of all blocks from one pass, without a cache."""
        x = forward_clip(self.masked, self.params, self.rope, self.blocks, sigmas, self.frames)
        return split_blocks(x, self.blocks)

    def block(self, b, cache, sigma):
        """Velocities and K/V of one block, from what the cache holds."""
        x, frames = self.blocks[b], self.frames[b]
        return forward_block(self.model, self.params, cache, self.rope, x, sigma, frames)


@pytest.mark.parametrize(
    "layout, changes, sigmas",
    [
        pytest.param(*case, [0.9, 0.3, 0.7, 0.5], marks=[pytest.mark.slow] * (name == "prefix"))
        for name, case in CASES.items()
    ]
    # LTX-2.3's and 2.5's text takes one noise level a sample: blocks of several cannot share a pass
    + [(BlockLayout.merged(), LTX25_CHANGES, [0.6] * 4)],
    ids=[*CASES, "merged, LTX-2.5"],
)
def test_block_by_block_is_the_masked_forward(layout, changes, sigmas):
    """Every block writes the K/V of its own noise level: one pass gives all the answers."""
    clip = Clip(layout, changes)
    expected, cache = clip.whole(sigmas), clip.empty
    for b, sigma in enumerate(sigmas):
        velocity, kv = clip.block(b, cache, sigma)
        assert_close(velocity, expected[b], f"block {b}")
        cache = write(cache, kv, PATCHES, first=b == 0)


@pytest.mark.parametrize("layout, changes", CASES.values(), ids=CASES)
def test_over_a_clean_history_as_well(layout, changes):
    """As in sampling: the history is written by a refresh pass at sigma 0."""
    clip = Clip(layout, changes)
    cache = clip.empty
    for b, sigma in enumerate([0.9, 0.3, 0.7, 0.5]):
        velocity, _ = clip.block(b, cache, sigma)
        levels = [0.0] * b + [sigma] + [1.0] * (NUM_BLOCKS - 1 - b)
        assert_close(velocity, clip.whole(levels)[b], f"block {b}")
        _, kv = clip.block(b, cache, 0.0)
        cache = write(cache, kv, PATCHES, first=b == 0)


# -- eviction -------------------------------------------------------------------------------------

EVICTING = dict(window=2, anchors=1)
STREAM_LENGTH = 8  # blocks; the first eviction is before block 5


def by_hand(config, cache_config, rope, recorded, block) -> Pathways:
    """History of `block` from recorded keys and values, oldest first, without any spare slot."""
    layout = cache_config.layout
    parts = {name: [] for name in PATHWAYS}
    for b in visible_blocks(cache_config, block):
        frames = frames_at(layout, position_when_seen(cache_config, b, block))
        sinks = b == 0 and config.num_audio_sinks > 0
        ropes = {
            "video": rope.video_rope(frames[0]),
            "audio": rope.audio_rope(frames[1], sinks),
            "a2v": rope.audio_cross_rope(frames[1], sinks),
            "v2a": rope.video_cross_rope(frames[0]),
        }
        for name, table in ropes.items():
            kv = getattr(recorded[b], name)
            parts[name].append((table.rotate(kv.k, config.rope_type), kv.v))

    def join(name):
        k, v = (np.concatenate(x, axis=2) for x in zip(*parts[name], strict=True))
        return History(KV(k, v), np.full(config.num_layers, k.shape[2]))

    return Pathways(**{name: join(name) for name in PATHWAYS})


@functools.partial(jit, static_argnames="model")
def forward_with_history(model, params, history, rope, x, sigma, frames):
    sigmas = (jnp.full((1, 1), sigma),) * 2
    streams = modalities(model.config, rope, x, sigmas, frames, random_contexts(model.config))
    return model.apply({"params": params}, *streams, history=history)[0]


class Stream:
    """A stream of noisy forwards and clean refreshes, with every block's K/V kept."""

    def __init__(self, layout, positions, **changes):
        self.config = tiny(num_audio_sinks=2, **changes)
        self.cache_config = CacheConfig(layout, positions=positions, **EVICTING)
        self.params, self.rope = random_params(self.config), tables(self.config, layout)
        self.model = Transformer(self.config)
        self.blocks = random_blocks(self.config, layout, STREAM_LENGTH)
        self.recorded, self.velocities, self.frames = [], [], []
        cache = kv_cache.init_cache(self.cache_config, self.config, batch=1, patches=PATCHES)
        for b, x in enumerate(self.blocks):
            frames = frames_at(layout, position_when_seen(self.cache_config, b, b))
            run = functools.partial(forward_block, self.model, self.params, cache, self.rope, x)
            self.velocities.append(run(0.7, frames)[0])
            self.recorded.append(run(0.0, frames)[1])
            self.frames.append(frames)
            cache = write(cache, self.recorded[b], PATCHES, first=b == 0)
        self.cache = cache


@pytest.fixture(scope="module")
def relative():
    return Stream(BlockLayout.prefix(), "relative")


@pytest.fixture(scope="module")
def absolute():
    return Stream(BlockLayout.prefix(), "absolute")


@pytest.mark.parametrize("name", ["relative", "absolute"])
def test_ring_holds_what_the_block_may_see(name, request):
    """After evictions, the ring's order, lengths and rotations make no difference."""
    s = request.getfixturevalue(name)
    for b in range(5, STREAM_LENGTH):
        history = by_hand(s.config, s.cache_config, s.rope, s.recorded, b)
        expected = forward_with_history(
            s.model, s.params, history, s.rope, s.blocks[b], 0.7, s.frames[b]
        )
        assert_close(s.velocities[b], expected, f"block {b}")
    # The comparison would notice another block in the window.
    wrong = by_hand(s.config, s.cache_config, s.rope, [*s.recorded[:5], *s.recorded[4:]], b)
    other = forward_with_history(s.model, s.params, wrong, s.rope, s.blocks[b], 0.7, s.frames[b])
    assert np.abs(other[0] - s.velocities[b][0]).max() > 1e-3


def test_relative_is_absolute_until_a_block_is_evicted(relative, absolute):
    differences = [
        max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
        for a, b in zip(relative.velocities, absolute.velocities, strict=True)
    ]
    first = 2 + EVICTING["anchors"] + EVICTING["window"]
    assert max(differences[:first]) < TOLERANCE
    assert min(differences[first:]) > 1e-3


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize("pathways", [("video", "audio"), ("a2v", "v2a")], ids="-".join)
def test_eviction_is_a_clip_of_the_visible_blocks(pathways, positions):
    """In one layer, keys and values do not depend on the history if self-attention and cross-modal
    attention are not both on. So a plain, unmasked forward pass over [block 0, anchor, window,
    current block] at their positions must give the current block's velocity.
    """
    layout = BlockLayout.merged()
    config = tiny(num_layers=1, num_audio_sinks=2, rope_type="interleaved")
    cache_config = CacheConfig(layout, positions=positions, **EVICTING)
    model, params, rope = Transformer(config), random_params(config), tables(config, layout)
    keep = Pathways(**{n: jnp.full((1, 1), float(n in pathways)) for n in PATHWAYS})
    blocks = random_blocks(config, layout, STREAM_LENGTH)
    cache = kv_cache.init_cache(cache_config, config, batch=1, patches=PATCHES)
    for b, x in enumerate(blocks):
        frames = frames_at(layout, position_when_seen(cache_config, b, b))
        run = functools.partial(
            forward_block, model, params, cache, rope, x, frames=frames, keep=keep
        )
        if b >= 5:
            seen = [*visible_blocks(cache_config, b), b]
            places = [frames_at(layout, position_when_seen(cache_config, s, b)) for s in seen]
            sigmas = [0.0] * (len(seen) - 1) + [0.6]
            clip = [blocks[s] for s in seen]
            expected = forward_clip(model, params, rope, clip, sigmas, places, keep=keep)
            assert_close(run(sigma=0.6)[0], split_blocks(expected, clip)[-1], f"block {b}")
        cache = write(cache, run(sigma=0.0)[1], PATCHES, first=b == 0)


# -- slots, positions and sizes, without a model --------------------------------------------------


def test_many_writes():
    """12 blocks through a window of 3: contents, lengths and rotations of every slot."""
    config = tiny(num_layers=1, num_audio_sinks=2)
    layout = BlockLayout.prefix()
    cache_config = CacheConfig(layout, window=3, anchors=1)
    rope = tables(config, layout)
    rng = np.random.default_rng(0)
    cache = kv_cache.init_cache(cache_config, config, batch=2, patches=PATCHES)
    history = jit(kv_cache.history, static_argnames=("rope_type", "patches"))
    recorded = []

    def random_kv(tokens, head_dim):
        shape = (1, 2, tokens, config.video_heads, head_dim)
        return KV(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)))

    for b in range(12):
        if b:
            actual = history(cache, rope, rope_type="split", patches=PATCHES)
            expected = by_hand(config, cache_config, rope, recorded, b)
            for name in PATHWAYS:
                ours, theirs = getattr(actual, name), getattr(expected, name)
                length = int(theirs.length[0])
                assert ours.length.tolist() == [length], (b, name)
                for part in ("k", "v"):
                    x, y = (np.asarray(getattr(h.kv, part)) for h in (ours, theirs))
                    # The ring keeps them in another order: compare as sets of rows.
                    x, y = (np.moveaxis(z[:, :, :length], 2, 0).reshape(length, -1) for z in (x, y))
                    x, y = (z[np.argsort(z[:, 0])] for z in (x, y))
                    np.testing.assert_allclose(x, y, atol=1e-6, err_msg=f"{b} {name} {part}")
        video = layout.video_frames_in(b) * PATCHES
        audio = layout.audio_frames_in(b) + (2 if b == 0 else 0)
        recorded.append(
            Pathways(
                video=random_kv(video, config.video_head_dim),
                audio=random_kv(audio, config.audio_head_dim),
                a2v=random_kv(audio, config.audio_head_dim),
                v2a=random_kv(video, config.audio_head_dim),
            )
        )
        before = jax.tree.map(np.asarray, cache.kv)
        cache = write(cache, recorded[b], PATCHES, first=b == 0)
        assert int(cache.num_blocks) == b + 1
        for old, new, block in zip(
            *map(jax.tree.leaves, (before, cache.kv, recorded[b])), strict=True
        ):
            changed = np.any(old != np.asarray(new), axis=(0, 1, 3, 4))
            assert changed.sum() == block.shape[2], b
    # Block 0, its sinks and the anchor have never been overwritten.
    first_two = jnp.concatenate([recorded[0].audio.k, recorded[1].audio.k], axis=2)
    np.testing.assert_array_equal(cache.kv.audio.k[:, :, : first_two.shape[2]], first_two)


@pytest.mark.parametrize("window, holds", [(2, False), (3, True), (4, True), (7, True)])
def test_for_clip(window, holds):
    """All slots, if no block of the clip misses another; the blocks see the same either way."""
    config = CacheConfig(BlockLayout.prefix(), window, 1)
    short = config.for_clip(6)
    assert short.window == (4 if holds else window) and short.holds(6) == holds
    for block in range(6):
        assert int(short.evicted(block)) == int(config.evicted(block))
        assert int(short.position_of(block)) == int(config.position_of(block))


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("window, anchors", [(1, 0), (2, 1), (3, 0), (3, 1), (7, 2)])
def test_slot_positions(window, anchors, positions):
    config = CacheConfig(BlockLayout.prefix(), window, anchors, positions)
    ring: list[int | None] = [None] * window
    tables_for = config.blocks_in_positions(21)
    for block in range(1, 21):
        slots = config.slot_positions(block)
        assert slots.shape == (anchors + window,)
        assert slots[:anchors].tolist() == list(range(1, anchors + 1))
        for held, position in zip(ring, slots[anchors:].tolist(), strict=True):
            if held is None:
                assert 0 < position < tables_for
            else:
                assert position == position_when_seen(config, held, block), (block, held)
        assert int(config.position_of(block)) == position_when_seen(config, block, block)
        assert int(config.evicted(block)) == block - len(visible_blocks(config, block))
        assert max(*slots.tolist(), int(config.position_of(block))) < tables_for
        if block > anchors:
            ring[(block - 1 - anchors) % window] = block


def test_cache_bytes():
    config = tiny(num_layers=3, num_audio_sinks=4)
    layout = BlockLayout.prefix()
    cache_config = CacheConfig(layout, window=2, anchors=1)
    video_tokens = (1 + 3 * 3) * PATCHES
    audio_tokens = 4 + 1 + 3 * 25
    numbers = 2 * (video_tokens + audio_tokens) * config.audio_dim  # a2v and v2a
    numbers += 2 * (video_tokens * config.video_dim + audio_tokens * config.audio_dim)
    sizes = {"batch": 2, "patches": PATCHES}
    size = kv_cache.cache_bytes(cache_config, config, dtype=jnp.bfloat16, **sizes)
    assert size == 3 * 2 * numbers * 2
    assert kv_cache.cache_bytes(cache_config, config, dtype=jnp.float32, **sizes) == 2 * size
    cache = kv_cache.init_cache(cache_config, config, dtype=jnp.bfloat16, **sizes)
    assert sum(x.nbytes for x in jax.tree.leaves(cache.kv)) == size


def test_tables_a_stream_needs():
    layout = BlockLayout.prefix()
    assert CacheConfig(layout, 3, 1).blocks_in_positions(None) == 6
    assert CacheConfig(layout, 3, 1).blocks_in_positions(4) == 4
    assert CacheConfig(layout, 3, 1, "absolute").blocks_in_positions(40) == 40
    with pytest.raises(ValueError, match="relative"):
        CacheConfig(layout, 3, 1, "absolute").blocks_in_positions(None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 0}, "window must be at least 1"),
        ({"anchors": -1}, "anchors"),
        ({"positions": "rolling"}, "absolute.*relative"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(BlockLayout.prefix(), **changes)
