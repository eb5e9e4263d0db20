"""What a stream needs is compiled before it begins: counted, not timed."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax import load_pipeline
from omniforcing_jax.pipeline import transformer_shapes
from omniforcing_jax.sampling import weights
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.weights import is_by_heads
from omniforcing_jax.streaming import block_programs
from omniforcing_jax.streaming.ahead import BlocksAhead
from omniforcing_jax.streaming.parallel import parallel

PARTS = ["blocks", "encoders", "first block", "full cache", "pictures", "sound"]
COMPILED = "/jax/core/compile/backend_compile_duration"
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **info: compiled.append(str(info)) if event == COMPILED else None
)


@contextlib.contextmanager
def counting():
    """Yields the list of programs that the block compiles."""
    found: list[str] = []
    start = len(compiled)
    yield found
    found += compiled[start:]


def contexts(pipeline, length=16, seed=0):
    rng, dims = np.random.default_rng(seed), pipeline.config.transformer.text_dims
    return tuple(rng.standard_normal((1, length, dim), np.float32) for dim in dims)


def make_session(pipeline, layout="prefix", rate=24.0, **options):
    cache = CacheConfig(pipeline.config.layout(layout, rate), window=1)
    config = RolloutConfig(cache=cache, sigmas=(1.0, 0.7, 0.0), height=2, width=2)
    return pipeline.session(config, contexts(pipeline), **options)


@pytest.mark.parametrize(
    "layout, rate, decode_mode, platform",
    [("prefix", 30.0, "causal", "cpu"), ("merged", 24.0, "window", "gpu")],
)
def test_no_block_compiles_anything_and_clocks_are_exact(
    random_pipeline, monkeypatch, layout, rate, decode_mode, platform
):
    """Neither the first ones, whose shapes differ, nor a new prompt, nor the end, also with the
    program for a full cache, which CPUs do without; after every block the stream holds the frames
    and samples that the arithmetic says."""
    pipeline, parts = random_pipeline("2.0"), []
    monkeypatch.setattr(block_programs, "platform", lambda: platform)
    jax.clear_caches()  # of other tests
    options = {"rate": rate, "decode_mode": decode_mode, "text_length": 24}
    options["steerable"] = steerable = decode_mode == "window"
    session = make_session(pipeline, layout, **options)
    with counting() as before:
        session.warm_up(parts.append)
    expected = [part for part in PARTS if part != "full cache" or platform == "gpu"]
    assert len(before) >= 6 and sorted(parts) == sorted([*expected, *["recache"] * steerable])
    blocks = session.config.cache.layout
    held_back = 0 if decode_mode == "causal" else 2  # look-ahead, in latents
    with counting() as found:
        for block, length in enumerate((16, 16, 24, 24, 5, 5)):
            if length != session.contexts[0].shape[1]:
                session.set_prompt(contexts(pipeline, length), blend=block % 2)
            chunk = session.step()
            latents = blocks.num_video_frames(block + 1)
            frames = max(0, 8 * (latents - held_back - 1) + 1) if latents > held_back else 0
            mel = 4 * blocks.num_audio_frames(block + 1) - 3
            samples = max(0, mel - pipeline.config.vocoder.right_context) * 240
            assert (session.num_frames, session.num_samples) == (frames, samples)
            assert chunk.first_frame + chunk.frames.shape[1] == frames
            assert chunk.first_sample + chunk.waveform.shape[1] == samples
            assert chunk.frames.dtype == np.uint8 and chunk.waveform.dtype == np.float32
        session.finish()
    assert not [program for program in found if "pad" not in program]
    assert session.num_frames == blocks.pixel_frames(6)
    assert session.num_samples == mel * 240
    # pictures and sound end together, but for the first latents' lengths: 1 frame, 10 ms
    assert abs((session.num_frames - 1) / rate - (session.num_samples / 240 - 1) / 100) < 1e-9
    other = make_session(pipeline, layout, **options)
    with counting() as found:
        other.warm_up()
        for block in range(4):
            other.step()
            if block == 1:
                other.restore(other.snapshot())
            if block == 2 and steerable:
                other.rewind(1)
                other.set_steps(1)
        other.finish()
    assert not found
    with pytest.raises(RuntimeError, match="before its first block"):
        other.warm_up()


@pytest.mark.parametrize("given", [pytest.param(None, marks=pytest.mark.slow), "audio"])
def test_what_is_given_compiles_nothing(random_checkpoint, given):
    """Nor a change of prompt with `recache`, a picture at the start or one that comes later, given
    sound or not."""
    pipeline = load_pipeline(random_checkpoint("2.0"), dtype=jnp.float32, encoders=True)
    jax.clear_caches()
    cache = CacheConfig(pipeline.config.layout("prefix"), window=1)
    config = RolloutConfig(cache, (1.0, 0.7, 0.0), height=2, width=2, recache=True)
    session = pipeline.session(config, contexts(pipeline), decode_mode="causal", given=given)
    session.warm_up()
    waveform, rate = np.full((1, 6 * 24000, 2), 0.1, np.float32), 24000
    with counting() as found:
        if given:
            session.push_audio(waveform, rate)
        for seed in range(3):
            session.set_image(np.full((64, 64, 3), 0.1 * seed, np.float32))
            session.step()
            session.step()  # without a picture
            session.set_prompt(contexts(pipeline, seed=seed))
        session.finish()
    programs = ("_block", "written_anew", "_encode", "_resample")
    assert not [program for program in found if any(name in program for name in programs)]


def test_blocks_are_compiled_before_there_are_weights(random_checkpoint, random_pipeline):
    """And so that the session finds them: in its warm-up and its blocks none is compiled again."""
    pipeline, checkpoint = random_pipeline("2.0"), random_checkpoint("2.0")
    jax.clear_caches()
    cache = CacheConfig(pipeline.config.layout("prefix"), window=1)
    config = RolloutConfig(cache=cache, sigmas=(1.0, 0.7, 0.0), height=2, width=2)
    how = {"text_length": 16, "max_blocks": 4}
    shapes = transformer_shapes(checkpoint, pipeline.dtype)
    with counting() as before:
        ahead = BlocksAhead(pipeline.transformer(), shapes, config, **how)
        ahead.wait()
    assert len([program for program in before if "generate_block" in program]) == 2
    session = pipeline.session(config, contexts(pipeline), decode_mode="causal", max_blocks=4)
    with counting() as found:
        session.warm_up(ahead=ahead)
        list(session.stream(4))
    assert not [program for program in found if "generate_block" in program]


def test_shapes_are_those_of_the_weights_as_a_tpu_has_them(random_checkpoint, monkeypatch):
    monkeypatch.setattr(weights, "laid_out_for", lambda platform, config: config)
    checkpoint = random_checkpoint("2.0")
    expected = load_pipeline(checkpoint, dtype=jnp.bfloat16).params["transformer"]
    assert is_by_heads(expected)
    found = transformer_shapes(checkpoint, jnp.bfloat16)
    kind = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(kind, found) == jax.tree.map(kind, expected)


def test_it_changes_nothing_and_padding_is_not_attended_to(random_pipeline):
    pipeline = random_pipeline("2.0")
    plain, warm = (make_session(pipeline, decode_mode="causal") for _ in range(2))
    padded = make_session(pipeline, decode_mode="causal", text_length=24)
    warm.warm_up()
    for _ in range(3):
        expected, same, close = plain.step(), warm.step(), padded.step()
        np.testing.assert_array_equal(same.frames, expected.frames)
        np.testing.assert_array_equal(same.waveform, expected.waveform)
        assert np.abs(close.frames.astype(int) - expected.frames).max() <= 1
        np.testing.assert_allclose(close.waveform, expected.waveform, atol=1e-4)
    with pytest.raises(ValueError, match="has 25 tokens; this session takes up to 24"):
        padded.set_prompt(contexts(pipeline, 25))


def test_parts_that_fail_are_heard():
    done = []

    def fail():
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        parallel({"a": lambda: None, "b": fail, "c": lambda: None}, done.append)
    assert sorted(done) == ["a", "c"]
