"""LTX-2.5 from its files to clips: in parts, with a Gemma 4, sampled by ancestral steps."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import export, gemma3, gemma4, ltx2, synthetic, synthetic_gemma
from checkpoint_converters.safetensors_io import ConversionError, read_header
from launch import encode_prompts, export_run, sample_teacher, stream
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise, modalities
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow, student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.teacher import SampleConfig, sample, step_noise
from omniforcing_jax.streaming import media
from omniforcing_jax.text.encoder_files import check_encoder
from tests.checkpoint_converters.files import read_file, write_file
from tests.launch.test_stages import PROMPTS, three_stages
from tests.tiny_model import random_contexts, random_params

PARTS = {
    "ltx-2.5-transformer-distilled": ("transformer", "connectors"),
    "ltx-2.5-vae": ("video_vae",),
    "ltx-2.5-audio": ("audio_vae", "vocoder"),
}


@pytest.fixture(scope="module")
def ltx25(tmp_path_factory):
    """A converted distilled LTX-2.5, and its text encoder."""
    folder = tmp_path_factory.mktemp("ltx25")
    for name, components in PARTS.items():
        synthetic.write(folder / f"{name}.safetensors", "tiny", "2.5", components=components)
    encoder = folder / "ltx-2.5-text-encoder.safetensors"
    assert not synthetic_gemma.main(["--gemma4", "--output", str(encoder)])
    inputs = [str(folder / f"{name}.safetensors") for name in PARTS]
    output = folder / "checkpoint"
    assert not ltx2.main(["--input", *inputs, str(encoder), "--output", str(output)])
    assert not gemma4.main(["--input", str(encoder), "--output", str(folder / "gemma4")])
    return output, folder / "gemma4"


def test_what_was_converted(ltx25):
    config = PipelineConfig.from_checkpoint(ltx25[0])
    config.check_complete()
    assert config.transformer.keyframe_embedding and not config.transformer.video_ff_bias
    recipe = config.recipe()
    assert recipe.ancestral and len(recipe.sigmas) == len(flow.DISTILLED_SIGMAS)


def test_gemma_of_the_right_generation(ltx25, random_gemma, random_checkpoint):
    checkpoint, gemma = ltx25
    assert check_encoder(gemma, checkpoint, length=128).model_version == "2.5.0"
    with pytest.raises(ValueError, match=r"LTX-2\.5\.0 reads a Gemma 4, this is a Gemma 3"):
        check_encoder(random_gemma, checkpoint, length=128)
    with pytest.raises(ValueError, match=r"LTX-2\.3\.0 reads a Gemma 3, this is a Gemma 4"):
        check_encoder(gemma, random_checkpoint("2.3"), length=128)
    encoder = gemma.parent / "ltx-2.5-text-encoder.safetensors"
    with pytest.raises(ConversionError) as error:
        gemma3.convert(encoder, gemma.parent / "x")
    assert error.value.problems == [
        f"{encoder}: is a Gemma 4, the text encoder of LTX-2.5; python -m "
        f"checkpoint_converters.gemma4 --input {encoder} converts it"
    ]


def test_gemma_of_the_right_release(ltx25, tmp_path):
    """Any Gemma 4 12B has the same sizes; LTX-2.5 and its own fine-tune say that they belong."""
    checkpoint, encoder = ltx25[0], ltx25[0].parent / "ltx-2.5-text-encoder.safetensors"
    arrays, strings = read_file(encoder)
    gemmas = {}
    for version in ("ltx-a", "ltx-b"):
        settings = json.loads(strings["gemma_config"]) | {"gemma_version": version}
        file = write_file(
            tmp_path / "g.safetensors", arrays, {"gemma_config": json.dumps(settings)}
        )
        gemma4.convert(file, tmp_path / version)
        gemmas[version] = tmp_path / version
    source = checkpoint.parent / "ltx-2.5-transformer-distilled.safetensors"
    arrays, strings = read_file(source)
    strings["gemma_source_checkpoint"] = json.dumps({"gemma_version": "ltx-a"})
    file = write_file(tmp_path / "t.safetensors", arrays, strings)
    parts = [file, encoder]
    content = ltx2.convert(parts, tmp_path / "ltx", components=("transformer", "connectors"))
    assert content["gemma_version"] == "ltx-a"
    for gemma in (gemmas["ltx-a"], ltx25[1]):  # the same, and one that does not say
        check_encoder(gemma, tmp_path / "ltx", length=128)
    check_encoder(gemmas["ltx-b"], checkpoint, length=128)
    with pytest.raises(ValueError, match=r"it is Gemma ltx-b, the model was trained with ltx-a"):
        check_encoder(gemmas["ltx-b"], tmp_path / "ltx", length=128)
    export.export(tmp_path / "ltx", tmp_path / "back.safetensors", components=["transformer"])
    assert ltx2.gemma_version(read_header(tmp_path / "back.safetensors")[1]) == "ltx-a"


def test_from_a_sentence_to_a_clip(ltx25, tmp_path, capsys):
    checkpoint, gemma = ltx25
    output = tmp_path / "clip.mp4"
    arguments = ["--checkpoint", str(checkpoint), "--text-encoder", str(gemma)]
    arguments += ["--prompt", "a dog barks", "--prompt-cache", "none", "--text-length", "128"]
    arguments += ["--frames", "9", "--height", "64", "--width", "64", "--dtype", "float32"]
    assert not sample_teacher.main([*arguments, "--output", str(output)])
    assert "sampling 8 steps of cond:" in capsys.readouterr().err
    assert media.read_clip(output)[0].shape == (9, 64, 64, 3)


@pytest.mark.slow
def test_all_stages_and_a_stream(ltx25, tmp_path):
    """From the files of a full LTX-2.5 and captions to a student that streams."""
    folder, gemma = ltx25[0].parent, ltx25[1]
    inputs = [folder / f"{name}.safetensors" for name in (*PARTS, "ltx-2.5-text-encoder")]
    ltx2.convert(inputs, tmp_path / "full", recipe="full")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--gemma", str(gemma), "--checkpoint", str(tmp_path / "full")]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--length", "128"]
    assert not encode_prompts.main([*arguments, "--output", str(tmp_path / "prompts")])
    one_level = {"regression.level_per_block": False}
    run = three_stages(tmp_path, tmp_path / "full", **one_level)
    exported, output = tmp_path / "student", tmp_path / "clip.mp4"
    assert not export_run.main(["--run", str(run), "--output", str(exported)])
    arguments = ["--checkpoint", str(exported), "--text-encoder", str(gemma), "--seconds", "3"]
    arguments += ["--prompt", "a bell", "--prompt-cache", "none", "--dtype", "float32"]
    assert not stream.main([*arguments, "--output", str(output)])
    assert media.read_clip(output)[0].shape == (72, 64, 64, 3)


@pytest.fixture(scope="module")
def network():
    config = tiny(keyframe_embedding=True, video_ff_bias=False)
    return Transformer(config), random_params(config), random_contexts(config)


CLIP = ClipGeometry(video_frames=2, audio_frames=9, height=2, width=2)


def test_the_first_latent_is_marked(network):
    model, params, contexts = network
    x = draw_noise(jax.random.key(0)[None], CLIP, model)
    sigma = jax.tree.map(lambda _: jnp.full((1, 1), 0.5), x)
    video, audio = modalities(x, sigma, CLIP.stream_ropes(model), contexts)
    np.testing.assert_array_equal(video.keyframes, [[True] * 4 + [False] * 4])
    later = ClipGeometry(2, 9, 2, 2, video_start=1, audio_start=1)
    assert not modalities(x, sigma, later.stream_ropes(model), contexts)[0].keyframes.any()
    (marked, _), _ = model.apply({"params": params}, video, audio)
    (plain, _), _ = model.apply({"params": params}, video.replace(keyframes=None), audio)
    assert np.abs(marked - plain).max() > 1e-4


@pytest.mark.parametrize("layout", [BlockLayout.prefix(), BlockLayout.merged()])
def test_marks_of_a_stream(network, layout):
    """Only the first latent of block 0, also when blocks are evicted and positions move back."""
    model, params, _ = network
    config = student.RolloutConfig(CacheConfig(layout, window=2), (1.0, 0.0), 1, 1)
    cache, rope = student.new_cache(model, config, 1), config.rope(model)

    @functools.partial(jax.jit, static_argnames="first")
    def marks(num_blocks, first):
        forward = student.bind(
            model, params, cache.replace(num_blocks=num_blocks), rope, config, first=first
        )
        return forward.ropes.first_latent

    frames = layout.first_video_frames
    assert marks(jnp.int32(0), True).tolist() == [True] + [False] * (frames - 1)
    for block in range(1, 7):
        assert marks(jnp.int32(block), False).tolist() == [False] * layout.video_frames


def test_ancestral_steps(network):
    """Down to sigma^2 / sigma of the step before, and up again by noise of the sample's own key."""
    model, params, contexts = network
    sigmas, key = (1.0, 0.75, 0.0), jax.random.key(0)

    def visited(recipe):
        config = SampleConfig(recipe, CLIP)
        return sample(model, params, contexts, None, key, config, trajectory=True)

    ancestral, plain = (
        visited(SamplingRecipe(sigmas, ancestral=True)),
        visited(SamplingRecipe(sigmas)),
    )
    x, euler = ancestral.video[0], plain.video[1]
    x0 = (euler - 0.75 * x) / 0.25
    key = jax.random.fold_in(key, 0)[None]
    noise = step_noise(key, jnp.int32(0), jax.tree.map(lambda a: a[0], ancestral)).video
    down = 0.75 * 0.75
    signal = (1 - 0.75) / (1 - down)
    expected = (
        signal * (down * x + (1 - down) * x0) + np.sqrt(0.75**2 - (down * signal) ** 2) * noise
    )
    np.testing.assert_allclose(ancestral.video[1], expected, atol=1e-4)
    found = flow.ancestral_step(x, x0, noise, 0.5, 0.0)
    np.testing.assert_allclose(found, x0, atol=1e-6)
