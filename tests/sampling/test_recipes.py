"""Recipes of LTX-2's pipelines, and distilled checkpoints from the file to the clip."""

import dataclasses
import shutil

import numpy as np
import pytest

from checkpoint_converters import export, ltx2, synthetic
from checkpoint_converters.safetensors_io import ConversionError
from launch import sample_teacher
from omniforcing_jax.io import checkpoints
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow, recipes
from omniforcing_jax.sampling.guidance import LTX20_GUIDANCE, NO_GUIDANCE
from omniforcing_jax.sampling.recipes import SamplingRecipe, default_steps
from omniforcing_jax.sampling.trained import LTX2_BASE, LTX2_DISTILLED, TrainedSettings
from omniforcing_jax.streaming import media
from tests.checkpoint_converters.files import read_file, write_file


def test_steps_and_levels():
    assert (default_steps("2.0.0"), default_steps("2.3.0")) == (40, 30)
    with pytest.raises(ValueError, match="must end with 0"):
        SamplingRecipe((1.0, 0.5))
    with pytest.raises(ValueError, match="at least 2 steps"):
        SamplingRecipe.of_steps(1)


def test_names_of_files():
    assert recipes.recipe_in_text("LTX-2-19B-Distilled-fp8.safetensors") == "distilled"
    assert recipes.recipe_in_text("ltx-2-19b-dev.safetensors") is None
    for name in ("ltx-2.5-22b-distilled-lora-450-bf16", "LTX2_Distilled_LoRA_rank175"):
        assert recipes.recipe_in_lora_name(name) == "distilled"
    assert recipes.recipe_in_lora_name("noir-for-distilled") is None


def test_what_a_converter_finds(tmp_path, capsys):
    """Metadata, a LoRA's name; and it says what it chose."""
    source, lora = tmp_path / "x.safetensors", tmp_path / "noir-for-distilled.safetensors"
    synthetic.write(source, "tiny", "2.3", components=("transformer",))
    synthetic.write_lora(lora, "tiny", "2.3")
    renamed = lora.with_name("x_distilled_lora.safetensors")
    shutil.copy(lora, renamed)
    arrays, strings = read_file(source)
    strings |= {"avatarforever_complete_weights": "true"}
    write_file(tmp_path / "y.safetensors", arrays, strings)
    for options, words in (
        (["x.safetensors"], "full: sampled in many steps with guidance; --recipe distilled"),
        (["x.safetensors", "--lora", str(lora)], "full: "),
        (["x.safetensors", "--lora", str(renamed)], "distilled: sampled in eight steps"),
        (["y.safetensors"], "distilled: sampled in eight steps"),
    ):
        file, *rest = options
        output = str(tmp_path / "out")
        arguments = ["--input", str(tmp_path / file), "--output", output, "--overwrite"]
        assert ltx2.main([*arguments, *rest]) == 0
        assert f"\n{words}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A converted checkpoint whose file was called distilled."""
    folder = tmp_path_factory.mktemp("distilled")
    source = folder / "ltx-2-distilled.safetensors"
    synthetic.write(source)
    assert not ltx2.main(["--input", str(source), "--output", str(folder / "checkpoint")])
    return folder / "checkpoint"


def test_conversion_and_export(distilled, tmp_path):
    trained = TrainedSettings.read(checkpoints.load_config(distilled))
    assert trained == LTX2_DISTILLED and not trained.causal
    source = distilled.parent / "ltx-2-distilled.safetensors"
    some = {"components": ("connectors", "transformer")}
    told = ltx2.convert(source, tmp_path / "full", recipe="full", **some)
    assert TrainedSettings.read(told) == LTX2_BASE
    # under another name, the metadata of an exported file tells
    exported = tmp_path / "plain.safetensors"
    export.export(distilled, exported, **some)
    again = ltx2.convert(exported, tmp_path / "again", **some)
    assert TrainedSettings.read(again) == LTX2_DISTILLED
    with pytest.raises(ConversionError, match="leave out --recipe"):
        ltx2.convert(exported, tmp_path / "other", recipe="full", **some)


def test_recipe_of_a_checkpoint(distilled):
    config = PipelineConfig.from_checkpoint(distilled)
    levels = tuple(np.float32(flow.DISTILLED_SIGMAS).tolist())
    assert config.recipe() == SamplingRecipe(levels, NO_GUIDANCE)
    assert config.recipe(4) == SamplingRecipe.of_steps(4)
    full = dataclasses.replace(config, trained=LTX2_BASE)
    assert full.recipe(4) == SamplingRecipe.of_steps(4, LTX20_GUIDANCE)
    assert full.recipe() == SamplingRecipe.of_steps(40, LTX20_GUIDANCE)
    # a student of stage I that started from the distilled model
    student = dataclasses.replace(LTX2_DISTILLED, stage="stage1", timesteps=(1000.0, 725.0))
    student = dataclasses.replace(config, trained=student)
    assert student.recipe().sigmas == (1.0, pytest.approx(0.725), 0.0)


def test_script(distilled, tmp_path, capsys):
    """Eight steps of one pass, without a word about it on the command line."""
    output = tmp_path / "clip.mp4"
    size = ["--frames", "9", "--height", "64", "--width", "64", "--dtype", "float32"]
    arguments = ["--checkpoint", str(distilled), "--random-features", "--prompt", "a dog barks"]
    assert not sample_teacher.main([*arguments, *size, "--output", str(output)])
    assert "sampling 8 steps of cond:" in capsys.readouterr().err
    frames, _, waveform, _ = media.read_clip(output)
    assert frames.shape == (9, 64, 64, 3) and len(waveform)
