"""What the benchmarks of the sampler measure, and what they compare it with."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decoders, stream, stream_report, text
from omniforcing_jax.sampling import student
from omniforcing_jax.streaming import block_programs
from omniforcing_jax.streaming.chunks import Chunk, PendingBlock, Timings
from omniforcing_jax.streaming.session import StreamingSession

OPTIONS = (
    "--height 64 --width 64 --text-tokens 128 --timesteps 1000 500 --dtype float32 "
    "--window 1 --decode causal"
)


@pytest.fixture
def args():
    return stream.parse_arguments(OPTIONS.split())


@pytest.fixture
def pipeline(random_pipeline):
    return random_pipeline("2.0")


@pytest.fixture
def quick_steps(pipeline, monkeypatch):
    """Blocks of 24 frames in no time, by a model that is there; the process grows by one each."""
    in_use = iter(range(100, 1000))

    def begin(session):  # what a session holds is not changed by its steps
        session.num_blocks += 1
        frames, waveform = np.zeros((1, 24, 8, 8, 3), np.uint8), np.zeros((1, 100, 2), np.float32)
        chunk = Chunk(session.num_blocks - 1, 0, 0, frames, waveform, Timings(0.5, 1, 1, 1, 1))
        return PendingBlock(24, False, lambda: chunk)

    monkeypatch.setattr(stream, "random_pipeline", lambda args: pipeline)
    monkeypatch.setattr(stream_report, "bytes_in_use", lambda device: next(in_use))
    monkeypatch.setattr(StreamingSession, "begin", begin)


def test_one_cache_at_a_time(args, pipeline, quick_steps, monkeypatch):
    """Memory is that of one stream, and without the connectors."""
    new_cache, found, reports = student.new_cache, [], []

    def count_caches(*args):
        cache = jax.eval_shape(functools.partial(new_cache, *args))
        shapes = {leaf.shape for leaf in jax.tree.leaves(cache.kv)}
        found.append(sum(array.shape in shapes for array in jax.live_arrays()))

    def counted_cache(*args):
        count_caches(*args)
        return new_cache(*args)

    def connector_seconds(args):
        config = stream.rollout_config(args, pipeline.config)
        count_caches(pipeline.transformer(), config, 1, pipeline.params["transformer"])
        return 0.25

    monkeypatch.setattr(student, "new_cache", counted_cache)
    monkeypatch.setattr(stream, "connector_seconds", connector_seconds)
    monkeypatch.setattr(
        stream, "measure_seams", lambda *args: pytest.fail("a clip decoded at once")
    )
    args.size, args.blocks = "full", 20
    result = stream.run(args, reports.append)
    # warm-up, first chunk, steady state, connectors, parts of a block, blocks begun ahead
    assert found == [0] * 6
    first, parts = result["ttfc_seconds"], result["part_seconds"]
    assert first["text"] == 0.75
    assert reports[0]["ttfc_seconds"]["total"] == pytest.approx(first["total"] - 0.25)
    assert parts["refresh"] > 0
    assert parts["denoise"] + parts["refresh"] == pytest.approx(1)
    # 4 blocks to warm up and 3 to fill the cache: 107 and 108 are the first tenth of 20
    drift = result["late_over_early"]["memory"]
    assert drift["tenths"] == pytest.approx([x / 107.5 for x in np.arange(107.5, 127.5, 2)])
    assert result["memory_in_use_bytes"] == 116.5
    assert len(reports) == 3 and reports[-1] == result


def test_the_main_row_survives_what_follows(quick_steps, monkeypatch, tmp_path, capsys):
    def out_of_memory(args):
        raise MemoryError

    monkeypatch.setattr(stream, "connector_seconds", out_of_memory)
    assert stream.main([*OPTIONS.split(), "--output", str(tmp_path / "bench")]) == 1
    result = json.loads((tmp_path / "bench" / "result.json").read_text())
    row = (tmp_path / "bench" / "row.md").read_text().rpartition("\n<!--")[0]  # who wrote it
    assert result["fps"] > 0 and result["connector_seconds"] is None
    assert cells(row)["FPS"] == f"{result['fps']:.1f}"
    assert row in capsys.readouterr().out


def cells(row: str) -> dict[str, str]:
    """A table of one row."""
    header, line, values = ([c.strip() for c in x.split("|")[1:-1]] for x in row.splitlines())
    assert len(header) == len(values) and set(line) == {"---"}
    return dict(zip(header, values, strict=True))


def test_row():
    """Numbers in their columns, dashes for what was not measured."""
    ttfc = dict(total=2.5, text=0.25, setup=0.5, generate=1, decode_video=0.5, decode_audio=0.125)
    result = {
        "date": "2026-11-29",
        "device": "cpu",
        "command": "python -m benchmarks.stream",
        "parameters": 19_000_000_000,
        "fps": 30.0,
        "real_time_factor": 1.25,
        "ttfc_seconds": ttfc | {"host": 0.125, "blocks": 2},
        "chunk_seconds": {"50": 0.5, "95": 0.75, "99": 1.0},
        "part_seconds": dict(generate=0.5, decode_video=0.25, decode_audio=0.125, host=0.0625),
        "deadline_attainment": 0.995,
        "memory_in_use_bytes": 3 * 2**29,
        "peak_memory_bytes": 2**31,
        "flops_per_second_of_video": 231e12,
        "mfu": None,
        "block_seconds": None,
        "late_over_early": {
            "seconds": {"ratio": 1.25, "least": 0.875, "most": 1.5},
            "memory": {"ratio": 1.0, "least": None, "most": None},
        },
        "seams": None,
    }
    early = cells(stream_report.markdown(result))
    expected = {
        "parameters": "19 B",
        "FPS": "30.0",
        "× real time": "1.25",
        "TTFC without Gemma (text + setup + generate + video + sound) s": "2.50 (0.25 + 0.50 + "
        "1.00 + 0.50 + 0.12)",
        "chunk p50 / p95 / p99 s": "0.500 / 0.750 / 1.000",
        "denoise / refresh / video / sound / host s": "– / – / 0.250 / 0.125 / 0.062",
        "block one by one / begun ahead s": "– / –",
        "deadlines met": "100%",
        "memory in use / peak GiB": "1.5 / 2.0",
        "TFLOP per s of video": "231",
        "MFU": "–",
        "error at seams / median, grey levels": "–",
        "late / early time (tenths between)": "1.25 (0.88 to 1.50)",
        "late / early memory (tenths between)": "1.000 (– to –)",
    }
    assert {name: early[name] for name in expected} == expected
    result["part_seconds"] |= {"denoise": 0.41, "refresh": 0.09}
    result |= {"block_seconds": {"one_by_one": 0.5, "ahead": 0.25}}
    result |= {"mfu": 0.41, "seams": {"seam": 3.0, "median": 2.0, "ratio": 1.5}}
    late = cells(stream_report.markdown(result))
    assert {name: late[name] for name in late if late[name] != early[name]} == {
        "denoise / refresh / video / sound / host s": "0.410 / 0.090 / 0.250 / 0.125 / 0.062",
        "block one by one / begun ahead s": "0.500 / 0.250",
        "MFU": "41%",
        "error at seams / median, grey levels": "3 / 2 = 1.5",
    }


def test_deadline_attainment():
    """The player starts with the first chunk, however late it is."""
    attainment = stream_report.deadline_attainment
    assert attainment([24, 24, 24], np.array([9.0, 1.0, 1.0]), 24.0) == 1
    # ready after 0, 1.5, 2 and 4 seconds; due after 0, 1, 2 and 3
    assert attainment([24, 24, 24, 24], np.array([3, 1.5, 0.5, 2]), 24.0) == 0.5
    # a first chunk of one frame buys no time: the second one is due after 1/24 s
    assert attainment([1, 24], np.array([1.0, 0.05]), 24.0) == 0.5
    assert attainment([1, 24], np.array([1.0, 0.04]), 24.0) == 1


def test_late_over_early():
    """Medians of tenths: an outlier changes nothing, a slow growth shows."""
    even = np.full(200, 2.0)
    even[[3, 190]] = 50
    even[60:80], even[120:140] = 1.8, 2.2
    assert stream_report.late_over_early(even) == {
        "tenths": [1, 1, 1, 0.9, 1, 1, 1.1, 1, 1, 1],
        "ratio": 1,
        "least": 0.9,
        "most": 1.1,
    }
    growing = stream_report.late_over_early(np.arange(1.0, 101.0))
    # medians of 1..10, of 11..20 and 81..90, and of 91..100
    assert growing.pop("tenths") == [x / 5.5 for x in np.arange(5.5, 100, 10)]
    assert growing == {"ratio": 95.5 / 5.5, "least": 15.5 / 5.5, "most": 85.5 / 5.5}
    short = stream_report.late_over_early(np.array([2, 3]))
    assert short == {"tenths": [1, 1.5], "ratio": 1.5, "least": None, "most": None}
    assert stream_report.late_over_early(np.array([2]))["ratio"] == 1


def test_time_to_first_chunk(args, monkeypatch):
    """From contexts to the first chunk with more than one frame and with sound, the session too."""
    clock = [0.0]
    sizes = iter([(1, 0), (24, 0), (1, 50), (24, 50), (24, 50)])  # frames, samples

    def taking(seconds, value):
        clock[0] += seconds
        return value

    class Session:
        num_blocks = 0

        def step(self):
            frames, samples = next(sizes)
            timings = Timings(0.5 if self.num_blocks == 0 else 0.0, 1.0, 2.0, 3.0, 4.0)
            self.num_blocks += 1
            images, waveform = np.zeros((1, frames, 8, 8, 3)), np.zeros((1, samples, 2))
            return taking(timings.total, Chunk(0, 0, 0, images, waveform, timings))

    monkeypatch.setattr(stream, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(stream, "contexts", lambda *args: taking(1000.0, ()))  # as Gemma does
    monkeypatch.setattr(stream, "make_session", lambda *args: taking(100.0, Session()))
    assert stream.time_to_first_chunk(None, args, None) == {
        "total": 140.5,
        "setup": 100,
        "text": 0.5,
        "generate": 4,
        "decode_video": 8,
        "decode_audio": 12,
        "host": 16,
        "blocks": 4,
    }


def test_parts_of_a_block_are_what_a_block_does(args, pipeline):
    """The programs that are timed end a block with the same cache."""
    config, params = stream.rollout_config(args, pipeline.config), pipeline.params["transformer"]
    model, rope, rng = pipeline.transformer(), config.rope(pipeline.transformer()), iter(range(99))

    def random(shapes):
        return jax.tree.map(lambda x: jax.random.normal(jax.random.key(next(rng)), x.shape), shapes)

    text = random(jax.eval_shape(lambda: stream.text_kv(pipeline, args, config, "a prompt")))
    cache = jax.eval_shape(functools.partial(student.new_cache, model, config, 1, params))
    cache = cache.replace(kv=random(cache.kv), num_blocks=jnp.int32(3))  # the next one evicts
    same = jax.tree.map(jnp.copy, cache)
    key = jax.random.key(3)
    latents, whole = block_programs.generate_block(
        model, params, cache, text, rope, key, config=config, batch=1, first=False
    )
    parts = stream.refresh_block(model, params, same, text, rope, latents, None, config=config)
    assert whole.num_blocks == parts.num_blocks == 4
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, parts.kv, whole.kv)


def test_random_weights_stand_where_converted_ones_do(args, pipeline, monkeypatch):
    monkeypatch.setattr(stream, "_cut", lambda pool, offset, scale, *spec: np.zeros(*spec))

    def spec(params):
        return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), params)

    args.dtype = "bfloat16"
    half = pipeline.params | {
        name: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), pipeline.params[name]
        )
        for name in ("transformer", "video_vae", "audio_vae")
    }
    assert spec(stream.random_pipeline(args).params) == spec(half)


def test_random_weights_are_scaled_by_their_fan_in():
    shapes = {
        "blocks": {"q": {"kernel": (3, 400, 64), "bias": (3, 64)}, "norm": {"scale": (3, 64)}},
        "conv_in": {"kernel": (3, 3, 128, 1024), "bias": (64,)},
        "act": {"alpha": (8,), "filter": (1, 1, 12)},
    }
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = jax.device_get(stream.random_params(shapes, jax.random.key(0), jnp.float32))
    kernels = params["blocks"]["q"]["kernel"], params["conv_in"]["kernel"]
    for kernel, fan_in in zip(kernels, (400, 9 * 128), strict=True):
        assert kernel.std() == pytest.approx(fan_in**-0.5, rel=0.02)
        rows = kernel.reshape(-1, kernel.shape[-1])  # the second kernel is larger than the pool
        assert len(np.unique(rows, axis=0)) == len(rows)
    assert not params["conv_in"]["bias"].any() and not params["act"]["alpha"].any()
    assert (params["blocks"]["norm"]["scale"] == 1).all()
    assert params["act"]["filter"].sum() == pytest.approx(1)


def test_seams_are_those_of_decoding_alone(args, pipeline, monkeypatch):
    """Both decodes get the same latents, whatever another program would make of their noise."""
    generate = student.rollout

    def other_rollout(*args, **options):
        return jax.tree.map(lambda x: x + 1, generate(*args, **options))

    monkeypatch.setattr(student, "rollout", other_rollout)
    monkeypatch.setattr(stream, "make_session", lambda *args: pytest.fail("another cache"))
    config = stream.rollout_config(args, pipeline.config)
    assert stream.measure_seams(pipeline, args, config, 2)["seam"] < 0.01


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


def test_measures_of_sound():
    """Noise 40 dB below a signal, one 6 dB louder, and what is too quiet to count."""
    rng = np.random.default_rng(0)
    exact = 0.1 * rng.standard_normal((1, 24000, 2), np.float32)
    exact[:, 12000:] = 0
    rough = exact + 1e-3 * rng.standard_normal(exact.shape, np.float32)
    assert decoders.segmental_snr(exact, rough, 24000) == pytest.approx(40, abs=0.2)
    distance = decoders.spectral_distance(exact, 2 * exact, 24000)
    assert np.median(distance[:40]) == pytest.approx(20 * np.log10(2), abs=0.01)
    assert np.all(distance[60:] == 0)
    assert np.all(decoders.spectral_distance(0 * exact, 1e-6 * rough, 24000) == 0)


@pytest.mark.slow
def test_a_day_on_a_bare_machine(tmp_path):
    """At tiny size, without what only training data and clips need: two minutes of one core."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("grain", "av", "tensorflow_datasets", "array_record", "tensorboardX"):
        (absent / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    parts = ["machine", "kernels_3", "stream_3", "kernels_int8", "stage2"]
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(absent), "PARTS": " ".join(parts)}
    script = pathlib.Path(stream.__file__).parent / "device_day.sh"
    command = ["bash", str(script), str(tmp_path / "day"), "tiny"]
    subprocess.run(command, env=os.environ | environment, check=True)
    summary = (tmp_path / "day" / "summary.md").read_text()
    assert summary.count("status 0") == summary.count("## ") == len(parts), summary
    tables = ("| v2a | ", "most is moved by", "| kernel | ms per block | share |", "| FPS |")
    assert all(text in summary for text in tables), summary
