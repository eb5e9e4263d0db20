"""What the benchmarks of the sampler measure, and what they compare it with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import stream, text
from omniforcing_jax import rollout
from omniforcing_jax.streaming import Chunk, StreamingSession, Timings


@pytest.fixture
def args():
    options = "--height 64 --width 64 --text-tokens 128 --timesteps 1000 500 --dtype float32"
    return stream.parse_arguments([*options.split(), "--window", "1", "--decode", "causal"])


@pytest.fixture
def pipeline(random_pipeline):
    return random_pipeline("2.0")


def test_one_cache_at_a_time(args, pipeline, monkeypatch):
    """Peak memory is that of one stream, and without the connectors."""
    new_cache, found = rollout.new_cache, []

    def count_caches(*args):
        cache = jax.eval_shape(functools.partial(new_cache, *args))
        shapes = {leaf.shape for leaf in jax.tree.leaves(cache.kv)}
        found.append(sum(array.shape in shapes for array in jax.live_arrays()))

    def counted_cache(*args):
        count_caches(*args)
        return new_cache(*args)

    def connector_seconds(args):
        count_caches(pipeline.transformer(), stream.rollout_config(args, pipeline.config), 1)
        return 0.25

    def step(session):  # what a session holds is not changed by its steps
        session.num_blocks += 1
        frames, waveform = np.zeros((1, 24, 8, 8, 3), np.uint8), np.zeros((1, 100, 2), np.float32)
        return Chunk(session.num_blocks - 1, 0, 0, frames, waveform, Timings(0.5, 1, 1, 1, 1))

    monkeypatch.setattr(rollout, "new_cache", counted_cache)
    monkeypatch.setattr(stream, "connector_seconds", connector_seconds)
    monkeypatch.setattr(stream, "random_pipeline", lambda args: pipeline)
    monkeypatch.setattr(StreamingSession, "step", step)
    args.seam_blocks = 0
    result = stream.run(args)
    # warm-up, first chunk, steady state, connectors, refresh
    assert found == [0] * 5
    assert result["ttfc_seconds"]["text"] == 0.75 and result["part_seconds"]["refresh"] > 0


def test_seams_are_those_of_decoding_alone(args, pipeline, monkeypatch):
    """Both decodes get the same latents, whatever another program would make of their noise."""
    generate = rollout.rollout

    def other_rollout(*args, **options):
        return jax.tree.map(lambda x: x + 1, generate(*args, **options))

    monkeypatch.setattr(rollout, "rollout", other_rollout)
    monkeypatch.setattr(stream, "make_session", lambda *args: pytest.fail("another cache"))
    config = stream.rollout_config(args, pipeline.config)
    args.seam_blocks = 2
    assert stream.measure_seams(pipeline, args, config)["seam"] < 0.01


def test_the_float32_reference_multiplies_float32(monkeypatch):
    """GPUs and TPUs round what they multiply, unless they are told not to."""
    programs = {}

    def encoded(args, dtype, quantize):
        ones = jnp.ones((2, 2))
        programs[dtype, quantize] = jax.jit(jnp.matmul).lower(ones, ones).as_text()
        return text.Encoded(np.ones(2), np.ones(2))

    monkeypatch.setattr(text.Encoded, "of", encoded)
    assert len(text.accuracy(text.parse_arguments([]))) == 3
    highest = [encoder for encoder, program in programs.items() if "HIGHEST" in program]
    assert highest == [("float32", "none")] and len(programs) == 3
