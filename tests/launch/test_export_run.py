"""From a run to a checkpoint that streams and to official safetensors; curves of runs."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import ltx2
from checkpoint_converters.safetensors_io import ConversionError
from launch import export_run, plot_run
from omniforcing_jax.io import checkpoints
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.flow import student_sigmas
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.trained import LTX2_BASE, TrainedSettings
from omniforcing_jax.training.optimizers import OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import create_network, create_state
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints
from tests.training.toy_stage import ToyBatches


@pytest.fixture(scope="module")
def run(random_checkpoint, tmp_path_factory):
    """(folder, parameters, configuration) of a run whose student has sinks, at step 7."""
    base, folder = random_checkpoint("2.0"), tmp_path_factory.mktemp("run") / "stage3"
    params = checkpoints.load_params(base, "transformer", dtype=jnp.float32)
    params["audio_sinks"] = jnp.full((4, params["audio_in"]["bias"].shape[0]), 0.25)
    network = create_network(params, make_optimizer(OptimizerConfig(1e-4)), ema=True)
    network = network.replace(ema=jax.tree.map(lambda p: 0.5 * p, params))
    student = dataclasses.replace(
        PipelineConfig.from_checkpoint(base).transformer,
        num_audio_sinks=4,
        sink_rope="incremental",
        rope_type="interleaved",
        cross_gate_timestep_scale=1.0,
    )
    config = {
        "stage": "stage3",
        "checkpoint": str(base),
        "model_version": "2.0.0",
        "clip": {"layout": "prefix", "height": 64, "width": 96, "frame_rate": 24.0, "blocks": 3},
        "score": {"video_cfg": [1.0, 3.5], "audio_cfg": 5.0},
        "text_length": 48,
        "student": {
            "timesteps": (1000.0, 757.0, 522.0),
            "window": 2,
            "anchors": 1,
            "positions": "absolute",
            "context_noise": 0.125,
        },
        "student_config": dataclasses.asdict(student),
    }
    with TrainingCheckpoints(folder) as saved:
        saved.save(7, create_state(network), ToyBatches(), config, {})
    write_config(folder, config)
    return folder, params, config


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps({"format": 1, "config": config}))


def export(run, tmp_path, *extra):
    return export_run.main(["--run", str(run), "--output", str(tmp_path / "student"), *extra])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_export_of_the_average(run, random_checkpoint, tmp_path):
    base, file = random_checkpoint("2.0"), tmp_path / "student.safetensors"
    assert not export(run[0], tmp_path, "--safetensors", str(file))
    student = tmp_path / "student"
    parsed = PipelineConfig.from_checkpoint(student)
    assert dataclasses.asdict(parsed.transformer) == run[2]["student_config"]
    assert parsed.trained == TrainedSettings(
        stage="stage3",
        layout="prefix",
        timesteps=(1000, 757, 522),
        **{"window": 2, "anchors": 1, "positions": "absolute", "context_noise": 0.125},
        **{"text_length": 48, "frame_rate": 24, "height": 64, "width": 96, "frames": 49},
        guidance=NO_GUIDANCE,
        distilled_cfg=((1.0, 3.5), (5.0, 5.0)),
    )
    cache = parsed.cache(parsed.layout())
    assert (cache.window, cache.anchors, cache.positions) == (2, 1, "absolute")
    sigmas = tuple(student_sigmas((1000, 757, 522)).tolist())
    assert (
        parsed.rollout()
        == parsed.rollout(64, 96)
        == RolloutConfig(cache, sigmas, 2, 3, context_noise=0.125)
    )
    other = parsed.cache(parsed.layout(), window=3, anchors=0, positions="relative")
    assert (other.window, other.anchors, other.positions) == (3, 0, "relative")
    plain = PipelineConfig.from_checkpoint(base)
    assert plain.trained == LTX2_BASE
    assert plain.cache(parsed.layout()) == CacheConfig(parsed.layout(), window=7)
    assert plain.sigmas() == tuple(student_sigmas().tolist())
    content, before = checkpoints.load_config(student), checkpoints.load_config(base)
    assert content["family"] == "omniforcing" and content["components"] == before["components"]
    assert content["source"][-1]["name"] == "stage3, step 7, ema"
    assert checkpoints.component_metadata(content, "connectors")["rope_type"] == "split"
    expected = jax.tree.map(lambda p: (0.5 * p).astype(jnp.bfloat16), run[1])
    assert_equal(checkpoints.load_params(student, "transformer"), expected)
    assert_equal(*(checkpoints.load_params(folder, "video_vae") for folder in (base, student)))

    # the official file converts back to the same weights, and to a student that streams as before
    again = tmp_path / "again"
    assert not ltx2.main(["--input", str(file), "--output", str(again)])
    assert_equal(checkpoints.load_params(again, "transformer"), expected)
    converted = checkpoints.load_config(again)
    for name in ("family", "trained", "config"):
        assert converted[name] == content[name]


def test_export_of_raw_weights_and_refusals(run, random_checkpoint, tmp_path, capsys):
    def error(*arguments):
        assert export(*arguments) == 2
        return capsys.readouterr().err

    folder, params, config = run
    assert not export(folder, tmp_path, "--weights", "params", "--dtype", "float32")
    assert_equal(checkpoints.load_params(tmp_path / "student", "transformer"), params)
    assert "not empty; choose another --output" in error(folder, tmp_path)
    other = tmp_path / "b"
    assert "of step 8; there are: 7" in error(folder, other, "--step", "8")
    assert "is not a run: it has no config.json" in error(random_checkpoint("2.0"), other)
    text = error(folder, other, "--base", str(random_checkpoint("2.3")))
    assert "no variant of --base" in text and "gated_attention is False, not True" in text
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_config(copy, {name: config[name] for name in ("stage", "checkpoint", "clip")})
    assert "the configuration lacks model_version, student, student_config" in error(copy, other)
    without_sinks = config["student_config"] | {"num_audio_sinks": 0}
    write_config(copy, config | {"student_config": without_sinks})
    assert "audio_sinks is not in the model" in error(copy, other)
    assert not other.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConversionError(["a key is missing"])])
def test_a_file_that_fails_says_what_was_written(tmp_path, monkeypatch, capsys, error):
    """The checkpoint was complete before, and stays."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(export_run, "export_run", lambda *args, **options: 7)
    monkeypatch.setattr(export_run, "export", fail)
    file = tmp_path / "student.safetensors"
    interrupted = isinstance(error, KeyboardInterrupt)
    status = export(tmp_path / "run", tmp_path, "--safetensors", str(file))
    assert status == (130 if interrupted else 2)
    text = capsys.readouterr().err
    assert "nothing was written" not in text
    start = "interrupted; " if interrupted else "error: "
    text = text.removeprefix(start)
    assert text.startswith(f"{file} was not written; {tmp_path / 'student'} was, and is complete")
    assert interrupted or "a key is missing" in text


def test_an_interruption_says_that_nothing_was_written(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_run, "export_run", interrupt)
    assert export(tmp_path, tmp_path) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_a_file_that_cannot_be_written_stops_everything(run, tmp_path, capsys):
    (tmp_path / "precious.safetensors").touch()
    assert export(run[0], tmp_path, "--safetensors", str(tmp_path / "precious.safetensors")) == 2
    text = capsys.readouterr().err
    assert "nothing was written" in text and "precious.safetensors: exists" in text
    assert not (tmp_path / "student").exists()


def records(folder, networks, steps=4):
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        record = {"step": 10 * step, "speed/steps_per_second": 2.0, "speed/host_share": 0.1}
        for network in networks:
            for name in ("loss", "loss_audio", "grad_norm", "grad_norm/audio", "grad_norm/sinks"):
                record[f"{network}/{name}"] = 1 / step
            record[f"{network}/relative_update"] = 0.0
            record[f"band/{network}_video_0.75-1"] = 1 / step
        record |= {"sample/audio_entropy": 2.0, "sample/video_std": 1.0}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_plot_run(tmp_path, capsys):
    one = records(tmp_path / "one", ("generator", "critic"))
    two = records(tmp_path / "two", ("generator",), steps=1)
    panels = {panel.title: panel.curves for panel in plot_run.choose_panels(
        list(plot_run.read_run(one)))}  # fmt: skip
    assert set(panels) == {
        "generator losses",
        "critic losses",
        "generator video loss by noise level",
        "critic video loss by noise level",
        "gradient norm",
        "relative update size",
        "audio attention entropy",
        "latents of sample clips",
        "steps per second",
        "shares of time, and MFU",
    }
    assert panels["critic losses"] == {"loss": "critic/loss", "loss_audio": "critic/loss_audio"}
    assert panels["critic video loss by noise level"] == {"σ 0.75–1": "band/critic_video_0.75-1"}
    norms = panels["gradient norm"]
    assert norms["critic audio"] == "critic/grad_norm/audio" and len(norms) == 4
    plot_run.main([str(one), str(two), "--smooth", "3", "--output", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(plot_run.smooth(np.array([1.0, 2, 6, 1]), 2), [1, 1.5, 4, 3.5])
    assert plot_run.main([str(tmp_path / "three")]) == 2
    assert "three does not exist; the runs' folders hold" in capsys.readouterr().err
