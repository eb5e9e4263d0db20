"""The program that pre-trains: parts that are resumed, and files that become a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import ltx2, reading, synthetic
from checkpoint_converters.export import write_components
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.trained import LTX2_BASE
from omniforcing_jax.training.metrics import read_records
from pocket import assemble, pretrain, pretrain_config
from tests.pocket.test_pretrain import PIPELINE

CONVERTED = dataclasses.replace(PIPELINE, trained=LTX2_BASE)


def tiny_config(folder, part, **changes):
    c = pretrain_config.get_config(part)
    c.folder = str(folder)
    c.world.update({"width": 16, "height": 16})
    c.update({"batch_size": 2, "num_steps": 4, "log_every": 1, "checkpoint_every": 2} | changes)
    return c


@pytest.mark.slow
def test_a_part_is_trained_resumed_and_written(tmp_path, monkeypatch, capfd):
    """The launch program, at the smallest size that the pocket's audio VAE can be trained with."""
    monkeypatch.setattr(pretrain, "STATISTICS_BATCHES", 2)
    changes = {"samples": 1600}
    assert pretrain.run(tiny_config(tmp_path / "whole", "audio_vae", **changes)) == 0
    part = pretrain.make_part(tiny_config(tmp_path / "two", "audio_vae", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "LoopConfig", lambda num_steps, **kw: stop_early(num_steps, kw))
        pretrain.train_part(tiny_config(tmp_path / "two", "audio_vae", **changes), part)
    (tmp_path / "two" / "audio_vae.safetensors").unlink()  # it took 2 steps for all of them
    assert pretrain.run(tiny_config(tmp_path / "two", "audio_vae", **changes)) == 0
    files = [tmp_path / name / "audio_vae.safetensors" for name in ("whole", "two")]
    found = [reading.load_component(file, "audio_vae") for file in files]
    jax.tree.map(np.testing.assert_array_equal, *found)
    records = read_records(tmp_path / "two" / "audio_vae" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert found[0]["per_channel_statistics"]["std"].shape == (32,)
    assert (found[0]["per_channel_statistics"]["std"] > 0).all()
    files[1].unlink()
    assert pretrain.run(tiny_config(tmp_path / "two", "audio_vae", **changes), export=True) == 0
    jax.tree.map(
        np.testing.assert_array_equal, reading.load_component(files[1], "audio_vae"), found[1]
    )
    capfd.readouterr()
    assert pretrain.run(tiny_config(tmp_path / "two", "audio_vae")) == 0
    assert "is there already" in capfd.readouterr().err


def test_a_part_is_compiled_once(tmp_path, monkeypatch):
    def loss(params, frozen, batch, key):
        del frozen, key
        return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

    def draw(rng):
        return {"x": rng.standard_normal(3).astype(np.float32)}

    def components(params):
        return {"vocoder": params}

    part = pretrain.Part(loss, lambda: {"w": jnp.ones(3)}, draw, components, {})
    stages, train = [], pretrain.train
    monkeypatch.setattr(
        pretrain,
        "train",
        lambda stage, *rest, **kw: stages.append(stage) or train(stage, *rest, **kw),
    )
    monkeypatch.setattr(pretrain, "write_part", lambda *args: None)
    assert pretrain.train_part(tiny_config(tmp_path, "vocoder"), part).reason == "finished"
    assert stages[0]._step._cache_size() == 1


def stop_early(num_steps, settings):
    from omniforcing_jax.training.loop import LoopConfig

    return LoopConfig(num_steps=num_steps // 2, **settings)


def test_a_part_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"pocket/pretrain_config\.py:audio_vae"):
        pretrain.run(tiny_config(tmp_path, "vocoder", samples=1600))
    with pytest.raises(ValueError, match="nearest valid: 9 or 17"):
        pretrain.run(tiny_config(tmp_path, "video_vae", frames=10))
    with pytest.raises(ValueError, match="unknown part"):
        pretrain_config.get_config("critic")


@pytest.mark.slow
def test_parts_become_one_checkpoint(tmp_path, capsys):
    """Written from our trees, read and converted like a published file."""
    source = tmp_path / "random.safetensors"
    metadata = synthetic.write(source, "pocket", dtype="float32")
    parts = {part: [] for part in assemble.SOURCES.values()}
    for component, part in assemble.SOURCES.items():
        parts[part].append(component)
    for part, components in parts.items():
        trees = {name: reading.load_component(source, name) for name in components}
        write_components(tmp_path / f"{part}.safetensors", trees, metadata, "2.0.0")
    output = tmp_path / "all.safetensors"
    assert not assemble.main(["--folder", str(tmp_path), "--output", str(output)])
    for component in assemble.SOURCES:
        trees = [reading.load_component(file, component) for file in (source, output)]
        jax.tree.map(np.testing.assert_array_equal, *trees)
    assert not ltx2.main(["--input", str(output), "--output", str(tmp_path / "ltx2")])
    assert PipelineConfig.from_checkpoint(tmp_path / "ltx2") == CONVERTED
    (tmp_path / "teacher.safetensors").rename(tmp_path / "other.safetensors")
    named = ["--folder", str(tmp_path), "--output", str(tmp_path / "named.safetensors")]
    assert not assemble.main([*named, "--teacher", "other"])
    assert (tmp_path / "named.safetensors").read_bytes() == output.read_bytes()
    capsys.readouterr()
    named[-1] = str(tmp_path / "none.safetensors")
    assert assemble.main(named) == 2
    assert "teacher.safetensors is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_files_with_some_components_each_convert_together(tmp_path):
    """As the pocket model is shipped: one transformer can be replaced by another."""
    source = tmp_path / "random.safetensors"
    metadata = synthetic.write(source, "pocket", dtype="float32")
    for part in ("teacher", "video_vae", "audio_vae", "vocoder"):
        names = [name for name, of in assemble.SOURCES.items() if of == part]
        trees = {name: reading.load_component(source, name) for name in names}
        write_components(tmp_path / f"{part}.safetensors", trees, metadata, "2.0.0")
    files = {"teacher_only": ["transformer"],
             "shared": ["connectors", "video_vae", "audio_vae", "vocoder"]}  # fmt: skip
    inputs = [str(tmp_path / f"{name}.safetensors") for name in files]
    for file, names in zip(inputs, files.values(), strict=True):
        chosen = ["--components", *names, "--dtype", "bfloat16", "--output", file]
        assert not assemble.main(["--folder", str(tmp_path), *chosen])
    with pytest.raises(ConversionError, match="has no transformer"):
        reading.load_component(inputs[1], "transformer")
    assert not ltx2.main(["--input", *inputs, "--output", str(tmp_path / "ltx2")])
    assert PipelineConfig.from_checkpoint(tmp_path / "ltx2") == CONVERTED

    # a student with sinks, which the teacher's section does not describe
    student = {"transformer": metadata["transformer"] | {"num_audio_sink_tokens": 4}}
    trees = {"transformer": reading.load_component(source, "transformer")}
    trees["transformer"]["audio_sinks"] = np.zeros((4, 64), np.float32)
    write_components(tmp_path / "student.safetensors", trees, student, "2.0.0")
    inputs[0] = str(tmp_path / "student.safetensors")
    assert not ltx2.main(["--input", *inputs, "--output", str(tmp_path / "student")])
    assert PipelineConfig.from_checkpoint(tmp_path / "student").transformer.num_audio_sinks == 4


def test_trees_that_do_not_fit_are_refused(tmp_path):
    metadata = synthetic.metadata("pocket", "2.0")
    tree = {"conv_pre": {"kernel": np.zeros((7, 3, 2)), "bias": np.zeros(2)}}
    with pytest.raises(ConversionError) as error:
        write_components(tmp_path / "x.safetensors", {"vocoder": tree}, metadata, "2.0.0")
    text = str(error.value)
    assert "vocoder.conv_pre.weight has shape (2, 3, 7), must be (128, 128, 7)" in text
    assert "vocoder.conv_post.weight is missing" in text
    assert not list(tmp_path.iterdir())
