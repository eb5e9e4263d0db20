"""Files and components of different LTX-2 versions do not come together: their latents differ."""

import json
import shutil

import pytest

from checkpoint_converters import ltx2, synthetic
from checkpoint_converters.safetensors_io import ConversionError, read_header
from omniforcing_jax.pipeline import PipelineConfig
from tests.checkpoint_converters.files import read_file, write_file
from tests.checkpoint_converters.test_diffusers_layout import ADDED_LATER, models, without

# -- shards --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Random LTX-2.0 file with connectors and audio VAE."""
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    synthetic.write(path, "tiny", "2.0", components=("connectors", "audio_vae"))
    return path


def split(source, folder, *metadata):
    """Two shards with an index: the audio VAE's tensors, all others; what each says of itself."""
    whole, _ = read_file(source)
    weight_map = {}
    for number, strings in enumerate(metadata):
        name = f"model-{number}.safetensors"
        arrays = {key: array for key, array in whole.items()
                  if key.startswith("audio_vae.") == (number == 0)}  # fmt: skip
        write_file(folder / name, arrays, strings)
        weight_map |= dict.fromkeys(arrays, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_of_different_versions_are_refused(source, tmp_path):
    _, strings = read_header(source)
    index = split(source, tmp_path, strings, strings | {"model_version": "2.3.0"})
    with pytest.raises(ConversionError, match="mixed model versions") as error:
        ltx2.convert(index, tmp_path / "out")
    for name, version in (("model-0", "2.0.0"), ("model-1", "2.3.0")):
        assert f"{tmp_path / name}.safetensors is {version}" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_shards_that_describe_one_component_differently_are_refused(source, tmp_path):
    _, strings = read_header(source)
    config = json.loads(strings["config"])
    config["audio_vae"]["model"]["params"]["sampling_rate"] = 44100
    index = split(source, tmp_path, strings, strings | {"config": json.dumps(config)})
    with pytest.raises(ConversionError, match=r"model-1\.safetensors: .* 'audio_vae' differs"):
        ltx2.convert(index, tmp_path / "out")


def test_shards_may_share_the_description(source, tmp_path):
    """Each of what it holds, the version in one of them; what nobody reads may differ."""
    _, strings = read_header(source)
    config = json.loads(strings["config"])
    sections = {"audio_vae": config.pop("audio_vae")}
    index = split(
        source, tmp_path,
        {"config": json.dumps(sections), "model_version": "2.0.0", "format": "pt"},
        {"config": json.dumps(config), "format": "np", "license": "none"},
    )  # fmt: skip
    whole = ltx2.convert(source, tmp_path / "whole")
    shared = ltx2.convert(index, tmp_path / "shared")
    names = ("config", "model_version", "components", "fingerprints")
    assert {name: shared[name] for name in names} == {name: whole[name] for name in names}


# -- diffusers folders ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{version: diffusers folder}."""
    paths = {}
    for version in ("2.0", "2.3"):
        paths[version] = tmp_path_factory.mktemp(f"ltx{version}")
        for name, model in models(version).items():
            model.save_pretrained(paths[version] / name)
    return paths


@pytest.mark.parametrize("settings", ["of today", "of January 2026"])
@pytest.mark.parametrize(
    ("other", "stated"),
    [
        ("transformer", "2.3 (has gated_attn)"),
        ("connectors", "2.3 or 2.5 (has per_modality_projections)"),
        ("vae", "2.3 or 2.5 (decoder_spatial_padding_mode is 'zeros')"),
        ("vocoder", "2.3 or 2.5 (has bwe_hidden_channels)"),
    ],
)
def test_a_component_of_another_version_is_refused(folders, tmp_path, other, stated, settings):
    removed = ADDED_LATER if settings == "of January 2026" else {}
    mixed = without(folders["2.0"], tmp_path / "mixed", removed)
    shutil.rmtree(mixed / other)
    shutil.copytree(folders["2.3"] / other, mixed / other)
    with pytest.raises(ConversionError, match="components of different LTX-2 versions") as error:
        ltx2.convert(mixed, tmp_path / "out")
    text = str(error.value)
    assert f"{other} is of {stated}" in text and "from one version" in text
    assert text.count("is of 2.0 (") == 3 and "audio_vae" not in text
    assert not (tmp_path / "out").exists()


def test_a_component_that_says_nothing_of_its_version_is_accepted(folders, tmp_path):
    """The audio VAE: its settings are the same in all versions."""
    folder = without(folders["2.3"], tmp_path / "model", {})
    shutil.copytree(folders["2.0"] / "audio_vae", folder / "audio_vae")
    components = ("connectors", "audio_vae")
    content = ltx2.convert(folder, tmp_path / "out", components=components)
    assert content["model_version"] == "2.3.0"
    assert content["components"] == list(components)


# -- converted checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("transformer", "is of LTX-2.3.0, but the transformer is of LTX-2.0"),
        ("vae", "is of LTX-2.3.0, but the video VAE is of LTX-2.0"),
    ],
)
def test_a_checkpoint_of_mixed_components_is_refused(other, message):
    """As the converter once made them from diffusers folders; all channels are alike."""
    older, newer = (synthetic.metadata("full", version) for version in ("2.0", "2.3"))
    assert PipelineConfig.from_metadata(newer, "2.3.0").model_version == "2.3.0"
    with pytest.raises(ValueError, match=message):
        PipelineConfig.from_metadata(newer | {other: older[other]}, "2.3.0")
    with pytest.raises(ValueError, match=r"is of LTX-2\.0\.0, but the transformer is of LTX-2\.3"):
        PipelineConfig.from_metadata(newer, "2.0.0")


def test_a_small_model_may_pad_as_later_decoders_do():
    """The pocket model is an LTX-2.0, but its decoder pads with zeros."""
    config = PipelineConfig.from_metadata(synthetic.metadata("pocket", "2.0"), "2.0.0")
    assert config.video_vae.decoder_padding_mode == "zeros"
