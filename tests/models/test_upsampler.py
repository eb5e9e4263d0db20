"""Latent upsamplers: from the official files through the converter, against the official code."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import export, ltx2, upsampler
from checkpoint_converters.reading import load_component
from checkpoint_converters.safetensors_io import ConversionError, read_header
from checkpoint_converters.shapes import model_shapes
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.upsampler import UpsamplerConfig, upsample
from tests.checkpoint_converters.files import read_file, rewrite_file

# kind: the golden file of the VAE whose latents it takes, size of the result for 3 x 3 x 4 latents
KINDS = {
    "spatial_x2_rational": ("ltx2", (3, 6, 8)),
    "spatial_x2": ("ltx23", (3, 6, 8)),
    "spatial_x1_5": ("ltx23", (3, 5, 6)),
    "temporal_x2": ("ltx23", (5, 3, 4)),
}


@pytest.fixture(scope="module")
def expected(golden_dir):
    return np.load(golden_dir / "upsamplers" / "expected.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, golden_dir, expected, tmp_path, capsys):
    source, folder = golden_dir / "upsamplers" / f"{kind}.safetensors", tmp_path / "converted"
    assert not upsampler.main(["--input", str(source), "--output", str(folder)])
    content = checkpoints.load_config(folder)
    (component,) = content["components"]
    assert component == kind.split("_")[0] + "_upsampler"
    assert content["model_version"] in capsys.readouterr().out
    export.export(folder, tmp_path / "back.safetensors")
    (arrays, strings), (wanted, said) = map(read_file, (tmp_path / "back.safetensors", source))
    assert json.loads(strings["config"]) == json.loads(said["config"])
    assert {key: a.tobytes() for key, a in arrays.items()} == {
        key: a.tobytes() for key, a in wanted.items()
    }
    config = UpsamplerConfig.from_metadata(checkpoints.component_metadata(content, component))
    params = checkpoints.load_params(folder, component, dtype=jnp.float32)
    golden, size = KINDS[kind]
    vae = load_component(golden_dir / f"{golden}_tiny.safetensors", "video_vae", np.float32)
    latents = np.moveaxis(expected[f"upsampler_{kind}_latent"], 1, -1)
    found = upsample(config, params, vae, latents)
    assert found.shape[1:4] == size == config.output_size(*latents.shape[1:4])
    reference = np.moveaxis(expected[f"upsampler_{kind}_out"], 1, -1)
    np.testing.assert_allclose(found, reference, atol=5e-5)
    in_bf16 = upsample(config, params, vae, latents, dtype=jnp.bfloat16)
    assert in_bf16.dtype == jnp.float32
    assert float(jnp.abs(in_bf16 - reference).mean()) < 0.03 * float(np.abs(reference).mean())


def test_shapes_of_the_published_file(golden_dir):
    with gzip.open(golden_dir / "upsampler2.0_keys.tsv.gz", "rt") as lines:
        rows = [line.split("\t") for line in lines]
    config = UpsamplerConfig(width=1024, rational=True)
    found = model_shapes(config.component, config)
    prefix = config.component + "."
    assert found == {prefix + key: tuple(json.loads(shape)) for _, key, shape, _ in rows}


def test_settings():
    base = {"in_channels": 8, "mid_channels": 32}
    assert UpsamplerConfig.from_metadata(base) == UpsamplerConfig(8, 32)
    for changes, message in (
        ({"spatial_upsample": False}, "just one of"),
        ({"temporal_upsample": True}, "just one of"),
        ({"dims": 2}, "only 3 is supported"),
        ({"mid_channels": 48}, "a multiple of 32"),
        ({"spatial_scale": 1.5}, "must be one of 2"),
        ({"spatial_scale": 3.0, "rational_resampler": True}, "must be one of 0.75, 1.5, 2, 4"),
        ({"transformer": {}}, "unknown settings transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            UpsamplerConfig.from_metadata(base | changes)


def test_what_is_wrong_with_a_file_is_listed(golden_dir, tmp_path):
    source = golden_dir / "upsamplers" / "spatial_x2.safetensors"
    _, metadata = read_header(source)

    def damage(arrays):
        del arrays["final_conv.bias"]
        arrays["extra.weight"] = np.zeros(2, np.float32)
        arrays["initial_norm.bias"] = np.zeros(3, np.float32)

    bad = tmp_path / "bad.safetensors"
    rewrite_file(source, bad, damage, {"config": metadata["config"]})
    with pytest.raises(ConversionError) as caught:
        upsampler.convert(bad, tmp_path / "out")
    text = "\n".join(caught.value.problems)
    for part in ("model_version", "final_conv.bias: missing", "extra.weight: is not part of the up",
                 "initial_norm.bias: has shape (3), must be (32)"):  # fmt: skip
        assert part in text
    assert not (tmp_path / "out").exists()
    rewrite_file(source, bad, metadata={})
    with pytest.raises(ConversionError, match="no `config` in the file's metadata"):
        upsampler.convert(bad, tmp_path / "out")


def test_diffusers_folder(golden_dir, tmp_path):
    """Other names of two settings, and no metadata in the file."""
    folder = tmp_path / "latent_upsampler"
    folder.mkdir()
    source = golden_dir / "upsamplers" / "spatial_x1_5.safetensors"
    rewrite_file(source, folder / "diffusion_pytorch_model.safetensors", metadata={})
    config = json.loads(read_header(source)[1]["config"])
    config["rational_spatial_scale"] = config.pop("spatial_scale")
    config["use_rational_resampler"] = config.pop("rational_resampler")
    config |= {"_class_name": "LTX2LatentUpsamplerModel", "_diffusers_version": "0.42.1"}
    (folder / "config.json").write_text(json.dumps(config))
    found = upsampler.convert(folder, tmp_path / "a", model_version="2.3.0")
    expected = upsampler.convert(source, tmp_path / "b")
    assert found["fingerprints"] == expected["fingerprints"]
    with pytest.raises(ConversionError, match=r"unknown model_version '9\.9' \(known: 2\.0"):
        upsampler.convert(folder, tmp_path / "x", model_version="9.9")
    with pytest.raises(ConversionError, match=r"no `model_version` in the file's metadata"):
        upsampler.convert(folder, tmp_path / "x")
    with pytest.raises(ConversionError) as error:
        ltx2.convert(source, tmp_path / "x")
    assert error.value.problems == [
        f"{source}: is a latent upsampler; python -m checkpoint_converters.upsampler --input "
        f"{source} converts it, for --upsampler of launch.sample_teacher"
    ]
    assert found["model_version"] == expected["model_version"]
    read = [
        UpsamplerConfig.from_metadata(checkpoints.component_metadata(content, "spatial_upsampler"))
        for content in (found, expected)
    ]
    assert read[0] == read[1]
