"""diffusers folders: names, layouts and configs against tiny diffusers models."""

import inspect
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

from checkpoint_converters import diffusers_layout, ltx2, reading, shapes
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import COMPONENTS
from omniforcing_jax.models.audio.vae import AudioVAEConfig
from omniforcing_jax.models.audio.vocoder import VocoderConfig
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from tests.checkpoint_converters.files import read_file, write_file

CONNECTOR = dict(
    caption_channels=16,
    text_proj_in_factor=3,
    video_connector_num_attention_heads=2,
    video_connector_attention_head_dim=8,
    video_connector_num_layers=2,
    video_connector_num_learnable_registers=4,
    audio_connector_num_attention_heads=2,
    audio_connector_attention_head_dim=8,
    audio_connector_num_layers=2,
    audio_connector_num_learnable_registers=4,
    connector_rope_base_seq_len=32,
    rope_type="split",
)
TRANSFORMER = dict(
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    audio_in_channels=16,
    audio_out_channels=16,
    audio_num_attention_heads=2,
    audio_attention_head_dim=4,
    audio_cross_attention_dim=8,
    num_layers=2,
    caption_channels=16,
    rope_type="split",
)
AUDIO_VAE = dict(
    base_channels=16,
    output_channels=2,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    in_channels=2,
    latent_channels=4,
    norm_type="pixel",
    causality_axis="height",
    mel_bins=16,
)
# What the folders of LTX-2.0 lack: diffusers had none of it in January 2026.
ADDED_LATER = {
    "transformer": (
        "gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod",
        "use_prompt_embeddings", "perturbed_attn", "ff_bias", "audio_ff_bias",
        "use_prompt_adaln_single", "use_keyframes_abs_pos_embedding",
    ),
    "connectors": (
        "video_gated_attn", "audio_gated_attn", "per_modality_projections", "video_hidden_dim",
        "audio_hidden_dim", "proj_bias",
    ),
    "vae": ("upsample_type",),
    "audio_vae": (),
    "vocoder": (
        "act_fn", "antialias", "antialias_ratio", "antialias_kernel_size", "final_act_fn",
        "final_bias",
    ),
}  # fmt: skip


def models(version):
    """{folder: model} of a tiny LTX-2 with all components."""
    torch.manual_seed(0)
    if version == "2.0":
        return {
            "transformer": LTX2VideoTransformer3DModel(**TRANSFORMER),
            "connectors": LTX2TextConnectors(**CONNECTOR),
            "vae": AutoencoderKLLTX2Video(
                latent_channels=8,
                block_out_channels=(16, 32, 64, 128),
                decoder_block_out_channels=(16, 32, 64),
                layers_per_block=(1, 2, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 2, 1),
                decoder_causal=False,
            ),
            "audio_vae": AutoencoderKLLTX2Audio(**AUDIO_VAE),
            "vocoder": LTX2Vocoder(hidden_channels=32),
        }
    return {
        "transformer": LTX2VideoTransformer3DModel(
            **TRANSFORMER, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True,
            audio_cross_attn_mod=True, use_prompt_embeddings=False, perturbed_attn=True,
        ),
        "connectors": LTX2TextConnectors(
            **(CONNECTOR | {"audio_connector_attention_head_dim": 4}), video_gated_attn=True,
            audio_gated_attn=True, per_modality_projections=True, video_hidden_dim=16,
            audio_hidden_dim=8, proj_bias=True,
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(16, 32, 64, 64),
            decoder_block_out_channels=(16, 32, 32, 64),
            layers_per_block=(1, 1, 2, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 2, 1),
            upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
            upsample_factor=(2, 2, 1, 2),
            upsample_residual=(False,) * 4,
            decoder_inject_noise=(False,) * 5,
            decoder_spatio_temporal_scaling=(True,) * 4,
            decoder_spatial_padding_mode="zeros",
            decoder_causal=False,
        ),
        "vocoder": LTX2VocoderWithBWE(hidden_channels=64, bwe_hidden_channels=32),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def folder(request, tmp_path_factory):
    """(version, path of the diffusers folder, {folder: {key: array}})."""
    path = tmp_path_factory.mktemp("diffusers")
    states = {}
    for name, model in models(request.param).items():
        state = model.state_dict()
        with torch.no_grad():
            for tensor in state.values():  # zero-initialised ones would compare equal anywhere
                tensor.copy_(torch.randn(tensor.shape))
        model.save_pretrained(path / name)
        states[name] = {key: tensor.numpy().copy() for key, tensor in state.items()}
    return request.param, path, states


def test_every_tensor_is_expected_by_the_derived_config(folder):
    version, path, states = folder
    checkpoint = reading.open_checkpoint(path)
    assert checkpoint.model_version == f"{version}.0"
    components = [c for c in COMPONENTS if c != "audio_vae" or "audio_vae" in states]
    expected = {}
    for component in components:
        expected |= shapes.expected_shapes(checkpoint.config, component)
    assert set(expected) == set(checkpoint.tensors)
    assert sum(len(state) for state in states.values()) == len(expected)


def test_the_models_understand_the_derived_config(folder):
    """Sizes as built; spellings of settings are the official ones, which the configs check."""
    version, path, _ = folder
    config = reading.open_checkpoint(path).config
    transformer = TransformerConfig.from_metadata(config["transformer"], f"{version}.0")
    assert (transformer.rope_type, transformer.gated_attention) == ("split", version == "2.3")
    assert transformer.cross_gate_timestep_scale == 1000
    assert ConnectorConfig.from_metadata(config["transformer"]).num_registers == 4
    vae = VideoVAEConfig.from_metadata(config["vae"])
    assert vae.decoder_padding_mode == ("reflect" if version == "2.0" else "zeros")
    assert vae.spatial_compression == 32
    assert VocoderConfig.from_metadata(config["vocoder"]).sample_rate == (
        24000 if version == "2.0" else 48000
    )
    if version == "2.0":
        assert AudioVAEConfig.from_metadata(config["audio_vae"]).latent_width == 16


def test_values(folder):
    """Against the state dict, by hand where the two layouts differ most."""
    version, path, states = folder
    t = states["transformer"]
    tree = reading.load_component(path, "transformer")
    np.testing.assert_array_equal(tree["video_in"]["kernel"], t["proj_in.weight"].T)
    np.testing.assert_array_equal(
        tree["audio_adaln"]["linear"]["bias"], t["audio_time_embed.linear.bias"]
    )
    np.testing.assert_array_equal(
        tree["blocks"]["a2v_attn"]["q"]["kernel"][1],
        t["transformer_blocks.1.audio_to_video_attn.to_q.weight"].T,
    )
    np.testing.assert_array_equal(
        tree["blocks"]["audio_cross_table"][1],
        t["transformer_blocks.1.audio_a2v_cross_attn_scale_shift_table"],
    )
    np.testing.assert_array_equal(
        tree["v2a_gate_adaln"]["linear_1"]["kernel"],
        t["av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_1.weight"].T,
    )
    v = states["vae"]
    tree = reading.load_component(path, "video_vae")
    last_encoder, last_decoder = 8, 6 if version == "2.0" else 8
    for ours, theirs in (
        (tree["encoder"]["down_blocks_3"]["conv"], "encoder.down_blocks.1.downsamplers.0.conv"),
        (
            tree["encoder"][f"down_blocks_{last_encoder}"]["res_blocks_0"]["conv2"],
            "encoder.mid_block.resnets.0.conv2",
        ),
        (
            tree["decoder"]["up_blocks_0"]["res_blocks_0"]["conv1"],
            "decoder.mid_block.resnets.0.conv1",
        ),
        (tree["decoder"]["up_blocks_1"]["conv"], "decoder.up_blocks.0.upsamplers.0.conv"),
        (
            tree["decoder"][f"up_blocks_{last_decoder}"]["res_blocks_0"]["conv2"],
            f"decoder.up_blocks.{last_decoder // 2 - 1}.resnets.0.conv2",
        ),
    ):
        weight = v[f"{theirs}.conv.weight"]
        np.testing.assert_array_equal(ours["kernel"], weight.transpose(2, 3, 4, 1, 0))
    np.testing.assert_array_equal(tree["per_channel_statistics"]["mean"], v["latents_mean"])
    w = states["vocoder"]
    tree = reading.load_component(path, "vocoder")
    tree, prefix = (tree, "") if version == "2.0" else (tree["vocoder"], "vocoder.")
    np.testing.assert_array_equal(
        tree["ups_1"]["kernel"], w[f"{prefix}upsamplers.1.weight"].transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(
        tree["resblocks_2"]["convs2_1"]["kernel"],
        w[f"{prefix}resnets.2.convs2.1.weight"].transpose(2, 1, 0),
    )


def test_conversion(folder, tmp_path):
    version, path, states = folder
    components = ("transformer", "connectors", "video_vae")
    content = ltx2.convert(path, tmp_path / "out", components=components)
    assert content["model_version"] == f"{version}.0"
    transformer = content["config"]["transformer"]
    assert transformer["rope_type"] == "split"
    assert transformer["frequencies_precision"] == "float64"
    assert transformer["av_ca_timestep_scale_multiplier"] == 1000
    assert transformer["apply_gated_attention"] == (version == "2.3")
    assert content["config"]["vae"]["causal_decoder"] is False
    tree = checkpoints.load_params(tmp_path / "out", "connectors")
    state = states["connectors"]
    np.testing.assert_array_equal(
        tree["audio_connector"]["blocks"]["attn"]["out"]["kernel"][1],
        state["audio_connector.transformer_blocks.1.attn1.to_out.0.weight"].T,
    )
    name = "audio_projection" if version == "2.3" else "projection"
    key = "audio_text_proj_in.weight" if version == "2.3" else "text_proj_in.weight"
    np.testing.assert_array_equal(tree[name]["kernel"], state[key].T)


def test_scaled_fp8_and_other_quantisation(folder, tmp_path):
    """A weight_scale beside a weight means the same here; diffusers' own quantisation is named."""
    _, path, _ = folder
    shutil.copytree(path, tmp_path / "fp8")
    [file] = (tmp_path / "fp8" / "transformer").glob("*.safetensors")
    key = "transformer_blocks.1.attn1.to_q"
    arrays, strings = read_file(file)
    arrays[key + ".weight"] = (arrays[key + ".weight"] * 64).astype(ml_dtypes.float8_e4m3fn)
    arrays[key + ".weight_scale"] = np.full((), 1 / 64, np.float32)
    write_file(file, arrays, strings)
    tree = reading.load_component(tmp_path / "fp8", "transformer", np.float32)
    wanted = arrays[key + ".weight"].astype(np.float32).T / 64
    np.testing.assert_array_equal(tree["blocks"]["video_attn"]["q"]["kernel"][1], wanted)
    config = tmp_path / "fp8" / "transformer" / "config.json"
    settings = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    config.write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="quantised by diffusers with 'torchao'"):
        ltx2.convert(tmp_path / "fp8", tmp_path / "out")


def without(path, target, removed):
    """Copies a diffusers folder; its configs lose the settings {folder: names}."""
    shutil.copytree(path, target)
    for folder, names in removed.items():
        file = target / folder / "config.json"
        config = json.loads(file.read_text())
        for name in names:
            del config[name]
        file.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("folder", ["2.0"], indirect=True)
def test_configs_of_january_2026(folder, tmp_path):
    """As LTX-2.0 is published: settings that diffusers got later are absent."""
    _, path, _ = folder
    old = without(path, tmp_path / "old", ADDED_LATER)
    content = ltx2.convert(path, tmp_path / "new_out")
    old_content = ltx2.convert(old, tmp_path / "old_out")
    assert content["components"] == list(COMPONENTS)
    assert old_content == content  # with fingerprints of every component


@pytest.mark.parametrize("folder", ["2.0"], indirect=True)
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "num_layers"),
        ("connectors", "rope_type"),
        ("vae", "upsample_factor"),
        ("audio_vae", "mel_bins"),
        ("vocoder", "upsample_factors"),
    ],
)
def test_settings_that_were_always_there_must_be(folder, tmp_path, component, name):
    _, path, _ = folder
    broken = without(path, tmp_path / "broken", {component: [name]})
    with pytest.raises(ConversionError, match=f"lacks '{name}'"):
        ltx2.convert(broken, tmp_path / "out")


@pytest.mark.parametrize("folder", ["2.3"], indirect=True)
@pytest.mark.parametrize(
    ("component", "name", "message"),
    [
        ("connectors", "proj_bias", "proj_bias is False, only True is supported"),
        ("vocoder", "act_fn", "lacks 'act_fn'"),  # a class of its own, whose default is another
    ],
)
def test_defaults_of_ltx20_are_not_taken_for_others(folder, tmp_path, component, name, message):
    _, path, _ = folder
    broken = without(path, tmp_path / "broken", {component: [name]})
    with pytest.raises(ConversionError, match=message):
        ltx2.convert(broken, tmp_path / "out")


def test_defaults_are_those_of_diffusers():
    classes = {
        "transformer": LTX2VideoTransformer3DModel,
        "connectors": LTX2TextConnectors,
        "vae": AutoencoderKLLTX2Video,
        "vocoder": LTX2Vocoder,
    }
    assert set(diffusers_layout._ADDED_LATER) == set(classes)
    for folder, settings in diffusers_layout._ADDED_LATER.items():
        parameters = inspect.signature(classes[folder].__init__).parameters
        for name, value in settings.items():
            default = parameters[name].default
            assert value == (list(default) if isinstance(default, tuple) else default), name
        assert set(settings) <= set(ADDED_LATER[folder])


def test_what_the_official_schema_cannot_say_is_refused(tmp_path):
    LTX2VideoTransformer3DModel(**TRANSFORMER, gated_attn=True).save_pretrained(
        tmp_path / "model" / "transformer"
    )
    with pytest.raises(ConversionError, match="gated_attn and audio_gated_attn differ"):
        ltx2.convert(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "model_index.json").touch()
    (tmp_path / "model" / "transformer" / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json: cannot be read"):
        ltx2.convert(tmp_path / "model", tmp_path / "out")
