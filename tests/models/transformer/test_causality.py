"""No gradient flows from a later block into an earlier one, through any of the four pathways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import ClipMask, Pathways, Transformer
from omniforcing_jax.models.transformer.rope import clip_rope
from omniforcing_jax.types import AVLatents
from tests.tiny_model import (
    QUICK_COMPILE,
    modalities,
    random_contexts,
    random_latents,
    random_params,
)

NUM_BLOCKS, HEIGHT, WIDTH, SINKS = 3, 1, 2, 3
PATCHES = HEIGHT * WIDTH
LAYOUTS = {  # and sinks
    "prefix": (BlockLayout.prefix(), 0),
    "prefix with sinks": (BlockLayout.prefix(), SINKS),
    "merged": (BlockLayout.merged(), 0),
}
PATHWAYS = ("video", "audio", "a2v", "v2a")
# (from, to) stream that a pathway carries information between.
EDGES = {
    "video": ("video", "video"),
    "audio": ("audio", "audio"),
    "a2v": ("audio", "video"),
    "v2a": ("video", "audio"),
}
STREAMS = ("video", "audio")


@pytest.fixture(scope="module")
def params():
    return {sinks: random_params(tiny(num_audio_sinks=sinks)) for sinks in (0, SINKS)}


def forward(model, params, layout, x, keep=None):
    """Velocities (video, audio) of a clip; its blocks have different noise levels if they can."""
    frames = layout.num_video_frames(NUM_BLOCKS), layout.num_audio_frames(NUM_BLOCKS)
    config = model.config
    rope = clip_rope(
        config, video_frames=frames[0], audio_frames=frames[1], height=HEIGHT, width=WIDTH
    )
    levels = np.array([0.3, 0.9, 0.6])
    video_blocks, audio_blocks = token_blocks(layout)
    sigmas = levels[video_blocks][None], levels[audio_blocks][None]
    if config.text_adaln:  # its text takes one noise level a sample
        sigmas = (np.full((1, 1), levels[0]),) * 2
    streams = modalities(
        config, rope, x, sigmas, tuple(map(np.arange, frames)), random_contexts(config), sinks=True
    )
    return model.apply({"params": params}, *streams, keep=keep)[0]


def token_blocks(layout) -> tuple[np.ndarray, np.ndarray]:
    """Block index of the video tokens and of the audio latents."""
    video = layout.block_of_video_frame(np.arange(layout.num_video_frames(NUM_BLOCKS)))
    audio = layout.block_of_audio_frame(np.arange(layout.num_audio_frames(NUM_BLOCKS)))
    return np.repeat(video, PATCHES), audio


jit = functools.partial(
    jax.jit, static_argnames=("model", "layout"), compiler_options=QUICK_COMPILE
)
compiled_forward = jit(forward)


@jit
def gradients(model, params, layout, x, keep):
    """{stream: AVLatents [K, 1, T, C]}: gradient of each block's summed velocities of a stream."""
    _, backward = jax.vjp(lambda x: forward(model, params, layout, x, keep), x)
    result = {}
    for stream, blocks in zip(STREAMS, token_blocks(layout), strict=True):
        of_block = jnp.asarray(blocks == np.arange(NUM_BLOCKS)[:, None], jnp.float32)  # [K, T]
        cotangents = {s: jnp.zeros((NUM_BLOCKS, *getattr(x, s).shape)) for s in STREAMS}
        cotangents[stream] += of_block[:, None, :, None]
        result[stream] = jax.vmap(backward)(tuple(cotangents.values()))[0]
    return result


def influence(model, params, layout, pathways) -> dict[tuple[str, str], np.ndarray]:
    """{(input stream, output stream): [K output blocks, K input blocks] largest |gradient|}."""
    config = model.config
    ones = jnp.ones((config.num_layers, 1))
    keep = Pathways(**{name: ones * (name in pathways) for name in PATHWAYS})
    tokens = token_blocks(layout)
    x = random_latents(config, *map(len, tokens))
    result = {}
    for to, gradient in gradients(model, params, layout, x, keep).items():
        for source, blocks in zip(STREAMS, tokens, strict=True):
            size = np.abs(getattr(gradient, source)).max(axis=(1, 3))  # [K, T]
            columns = [size[:, blocks == block].max(axis=1) for block in range(NUM_BLOCKS)]
            result[source, to] = np.stack(columns, axis=1)
    return result


def expected_influence(pathways, allowed):
    """Which entries of `influence` must be nonzero; all others must be exactly zero."""
    connected = {EDGES[name] for name in pathways}
    expected = {}
    for source in STREAMS:
        for to in STREAMS:
            # A token always reaches its own velocity; with one pathway alone, none but its own
            # block's, unless the pathway leads from this stream to that.
            alone = np.eye(NUM_BLOCKS, dtype=bool) if source == to else np.zeros_like(allowed)
            expected[source, to] = allowed if (source, to) in connected else alone
    return expected


SETS = [*((name,) for name in PATHWAYS), PATHWAYS]
PAST = np.tril(np.ones((NUM_BLOCKS, NUM_BLOCKS), bool))


@pytest.mark.parametrize(
    "name, implementation",
    [
        pytest.param("prefix", "prefix", marks=pytest.mark.slow),
        pytest.param("prefix with sinks", "xla", marks=pytest.mark.slow),
        ("prefix with sinks", "prefix"),
        ("merged", "xla"),
    ],
)
def test_no_gradient_from_the_future(params, name, implementation):
    layout, sinks = LAYOUTS[name]
    frames = layout.num_video_frames(NUM_BLOCKS), layout.num_audio_frames(NUM_BLOCKS)
    model = Transformer(
        tiny(num_audio_sinks=sinks),
        implementation=implementation,
        causal=ClipMask(layout, *frames, PATCHES),
    )
    for pathways in SETS:
        sizes = influence(model, params[sinks], layout, pathways)
        for pair, expected in expected_influence(pathways, PAST).items():
            np.testing.assert_array_equal(sizes[pair] > 0, expected, f"{pathways} {pair}")


def test_without_the_mask_there_is_one(params):
    """The same measurement sees the future through every pathway of the teacher."""
    layout, _ = LAYOUTS["prefix with sinks"]
    model = Transformer(tiny(num_audio_sinks=SINKS))
    for pathways in SETS:
        sizes = influence(model, params[SINKS], layout, pathways)
        for pair, expected in expected_influence(pathways, np.ones_like(PAST)).items():
            np.testing.assert_array_equal(sizes[pair] > 0, expected, f"{pathways} {pair}")


def test_later_latents_do_not_change_earlier_velocities(params):
    """Replacing the last block's latents leaves every other block's velocities bit by bit."""
    layout, _ = LAYOUTS["merged"]
    frames = layout.num_video_frames(NUM_BLOCKS), layout.num_audio_frames(NUM_BLOCKS)
    model = Transformer(tiny(), causal=ClipMask(layout, *frames, PATCHES))
    video_blocks, audio_blocks = token_blocks(layout)
    x = random_latents(model.config, len(video_blocks), len(audio_blocks))
    other = random_latents(model.config, len(video_blocks), len(audio_blocks), seed=1)
    last = NUM_BLOCKS - 1
    changed = AVLatents(
        jnp.where((video_blocks == last)[:, None], other.video, x.video),
        jnp.where((audio_blocks == last)[:, None], other.audio, x.audio),
    )
    found = (compiled_forward(model, params[0], layout, clip) for clip in (x, changed))
    for before, after, blocks in zip(*found, (video_blocks, audio_blocks), strict=True):
        np.testing.assert_array_equal(before[:, blocks < last], after[:, blocks < last])
        assert not np.allclose(before[:, blocks == last], after[:, blocks == last], atol=1e-3)


def assert_student_is_teacher(config, params):
    """One block that covers the clip: the causal model must compute what the teacher computes."""
    clip = BlockLayout.prefix()
    frames = clip.num_video_frames(NUM_BLOCKS), clip.num_audio_frames(NUM_BLOCKS)
    one_block = BlockLayout(frames[0], 3, frames[1], 25)
    mask = ClipMask(one_block, *frames, PATCHES)
    x = random_latents(config, frames[0] * PATCHES, frames[1])
    models = [Transformer(config, implementation="xla")] + [
        Transformer(config, implementation=implementation, causal=mask)
        for implementation in ("xla", "prefix")
    ]
    teacher, *students = (compiled_forward(model, params, clip, x) for model in models)
    for student in students:
        for actual, expected in zip(student, teacher, strict=True):
            assert np.std(expected) > 0.1
            np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_student_under_a_full_mask_is_the_teacher(params):
    assert_student_is_teacher(tiny(num_audio_sinks=SINKS), params[SINKS])


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_so_it_is_right_after_conversion(random_pipeline, version):
    """With the conventions and the weights that are in the checkpoint."""
    pipeline = random_pipeline(version)
    assert_student_is_teacher(pipeline.config.transformer, pipeline.params["transformer"])
