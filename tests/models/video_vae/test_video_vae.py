"""Video VAE: against the official implementation (golden files) and against diffusers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video

from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.scaling import flops

# Suggested tolerance of the golden files for the video VAE in float32.
ATOL = 1e-4

encode = jax.jit(video_vae.encode, static_argnames=("config", "dtype"))
decode = jax.jit(video_vae.decode, static_argnames=("config", "causal", "dtype"))


def channels_last(array) -> np.ndarray:
    """[B, C, F, H, W] -> [B, F, H, W, C]."""
    return np.moveaxis(np.asarray(array), 1, -1)


@pytest.fixture(scope="module", params=["ltx2_tiny", "ltx23_tiny"])
def golden(request, golden_dir):
    """(config, params, expected arrays) of one reference model."""
    path = golden_dir / f"{request.param}.safetensors"
    config = VideoVAEConfig.from_metadata(read_metadata(path)["config"]["vae"])
    params = load_component(path, "video_vae", dtype=np.float32)
    return config, params, np.load(golden_dir / f"{request.param}_expected.npz")


def published_metadata(version: str) -> dict:
    """`config.vae` of the published checkpoints."""

    def stages(*entries):
        return [
            [name, {"num_layers" if name == "res_x" else "multiplier": number}]
            for name, number in entries
        ]

    vae = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "normalize_latent_channels": False,
    }
    down = ("compress_space_res", 2), ("compress_time_res", 2), ("compress_all_res", 2)
    if version == "2.0":
        res = [("res_x", n) for n in (4, 6, 6, 2, 2)]
        up = ["compress_all", {"multiplier": 2, "residual": True}]
        five = ["res_x", {"num_layers": 5, "inject_noise": False}]
        vae["decoder_blocks"] = [five, up, five, up, five, up, five]
        last = ("compress_all_res", 2)
    else:
        res = [("res_x", n) for n in (4, 6, 4, 2, 2)]
        last = ("compress_all_res", 1)
        vae["decoder_blocks"] = stages(
            ("res_x", 4),
            ("compress_space", 2),
            ("res_x", 6),
            ("compress_time", 2),
            ("res_x", 4),
            ("compress_all", 1),
            ("res_x", 2),
            ("compress_all", 2),
            ("res_x", 2),
        )
        vae |= {"encoder_base_channels": 128, "decoder_base_channels": 128}
        vae |= {"spatial_padding_mode": "zeros"}
    vae["encoder_blocks"] = stages(
        res[0], down[0], res[1], down[1], res[2], down[2], res[3], last, res[4]
    )
    return vae


@pytest.mark.default_xla
def test_encoder_equals_reference(golden):
    config, params, expected = golden
    video = channels_last(expected["g_enc_video"])
    latents = encode(config, params, video)
    assert latents.dtype == jnp.float32
    reference = channels_last(expected["g_enc_latent_normalised"])
    np.testing.assert_allclose(latents, reference, atol=ATOL)


def test_encoder_intermediates_equal_reference(golden):
    config, params, expected = golden
    encoder = video_vae.VideoEncoder(config)
    apply = jax.jit(lambda p, x: encoder.apply({"params": p}, x, capture_intermediates=True)[1])
    found = apply(params["encoder"], channels_last(expected["g_enc_video"]))["intermediates"]
    names = [f"down_blocks_{i}" for i in range(len(config.encoder_blocks))] + ["conv_out"]
    compared = 0
    for name in names:
        key = "g_enc_" + name.replace("down_blocks_", "down")
        if key in expected:
            value = found[name]["__call__"][0]
            value = value[0] if isinstance(value, tuple) else value
            reference = channels_last(expected[key])
            np.testing.assert_allclose(value, reference, atol=ATOL, err_msg=name)
            compared += 1
    assert compared >= 9


@pytest.mark.default_xla
def test_decoder_equals_reference(golden):
    config, params, expected = golden
    video = decode(config, params, channels_last(expected["g_dec_latent"]), causal=False)
    np.testing.assert_allclose(video, channels_last(expected["g_dec_video"]), atol=ATOL)


def test_decoder_intermediates_equal_reference(golden):
    config, params, expected = golden
    statistics = params["per_channel_statistics"]
    latents = channels_last(expected["g_dec_latent"]) * statistics["std"] + statistics["mean"]
    decoder = video_vae.VideoDecoder(config)
    apply = jax.jit(
        lambda p, x: decoder.apply({"params": p}, x, False, capture_intermediates=True)[1]
    )
    found = apply(params["decoder"], latents)["intermediates"]
    compared = 0
    for name in ["conv_in"] + [f"up_blocks_{i}" for i in range(len(config.decoder_blocks))]:
        key = "g_dec_" + name.replace("up_blocks_", "up")
        if key in expected:
            value, _ = found[name]["__call__"][0]
            reference = channels_last(expected[key])
            np.testing.assert_allclose(value, reference, atol=ATOL, err_msg=name)
            compared += 1
    assert compared >= 8


@pytest.mark.default_xla
def test_causal_decode_equals_reference(golden):
    config, params, expected = golden
    video = decode(config, params, channels_last(expected["g_deccausal_latent"]), causal=True)
    reference = channels_last(expected["g_deccausal_video"])
    np.testing.assert_allclose(video, reference, atol=ATOL)


def test_round_trip_equals_reference(golden):
    config, params, expected = golden
    video = channels_last(expected["g_enc_video"])
    restored = np.asarray(decode(config, params, encode(config, params, video), causal=False))
    assert restored.shape == video.shape
    for name, index in (("first", 0), ("last", -1)):
        reference = channels_last(expected[f"g_roundtrip_{name}_frame"])
        np.testing.assert_allclose(restored[:, index], reference, atol=ATOL, err_msg=name)


@pytest.mark.parametrize("golden", ["ltx2_tiny"], indirect=True)
def test_encoder_is_causal(golden):
    config, params, expected = golden
    video = channels_last(expected["g_enc_video"])
    whole = encode(config, params, video)
    first = encode(config, params, video[:, :1])
    np.testing.assert_allclose(whole[:, :1], first, atol=ATOL)


@pytest.mark.parametrize("golden", ["ltx23_tiny"], indirect=True)
@pytest.mark.default_xla
def test_bfloat16_stays_close(golden):
    config, params, expected = golden
    latents = channels_last(expected["g_dec_latent"])
    video = decode(config, params, latents, dtype=jnp.bfloat16)
    assert video.dtype == jnp.bfloat16
    reference = channels_last(expected["g_dec_video"])
    error = np.abs(np.asarray(video, np.float32) - reference)
    assert error.mean() < 0.02 * np.abs(reference).mean()
    first_frame = channels_last(expected["g_enc_video"])[:, :1]
    encoded = encode(config, params, first_frame, dtype=jnp.bfloat16)
    assert encoded.dtype == jnp.float32
    reference = channels_last(expected["g_enc_latent_normalised"])[:, :1]
    assert np.abs(encoded - reference).mean() < 0.02 * np.abs(reference).mean()


def test_modules_declare_the_parameters_of_the_checkpoint(golden):
    config, params, _ = golden
    declared = jax.eval_shape(lambda key: video_vae.init_params(config, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, declared) == jax.tree.map(jnp.shape, params)


# diffusers. Keys are renamed to the official ones and on to our paths in one step.

_DIFFUSERS_RULES = (
    (r"decoder\.mid_block\.resnets\.(\d+)", lambda m: f"decoder/up_blocks_0/res_blocks_{m[1]}"),
    (
        r"decoder\.up_blocks\.(\d+)\.upsamplers\.0",
        lambda m: f"decoder/up_blocks_{2 * int(m[1]) + 1}",
    ),
    (
        r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)",
        lambda m: f"decoder/up_blocks_{2 * int(m[1]) + 2}/res_blocks_{m[2]}",
    ),
    (r"encoder\.mid_block\.resnets\.(\d+)", lambda m: f"encoder/down_blocks_8/res_blocks_{m[1]}"),
    (
        r"encoder\.down_blocks\.(\d+)\.downsamplers\.0",
        lambda m: f"encoder/down_blocks_{2 * int(m[1]) + 1}",
    ),
    (
        r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)",
        lambda m: f"encoder/down_blocks_{2 * int(m[1])}/res_blocks_{m[2]}",
    ),
)


def params_from_diffusers(model: AutoencoderKLLTX2Video) -> dict:
    """Parameter tree of `video_vae` with the weights of a diffusers model."""
    tree = {}
    for key, tensor in model.state_dict().items():
        value = tensor.numpy()
        if key in ("latents_mean", "latents_std"):
            path = ["per_channel_statistics", key.removeprefix("latents_")]
        else:
            for pattern, target in _DIFFUSERS_RULES:
                key = re.sub(pattern, target, key)
            # The inner ".conv" wraps the torch convolution.
            head, _, leaf = key.replace(".", "/").rpartition("/conv/")
            path = [*head.split("/"), {"weight": "kernel", "bias": "bias"}[leaf]]
            if leaf == "weight":
                value = value.transpose(2, 3, 4, 1, 0)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


# Arguments that make the diffusers class the models of the golden files.
_DIFFUSERS_ARGUMENTS = {
    "2.0": {
        "block_out_channels": (12, 24, 48, 96),
        "layers_per_block": (1, 1, 2, 1, 1),
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 2, 1),
    },
    "2.3": {
        "block_out_channels": (12, 24, 48, 48),
        "layers_per_block": (1, 1, 1, 2, 1),
        "decoder_block_out_channels": (8, 16, 16, 32),
        "decoder_layers_per_block": (1, 2, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_factor": (2, 2, 1, 2),
        "upsample_residual": (False,) * 4,
        "decoder_spatial_padding_mode": "zeros",
    },
}


def test_equals_diffusers(golden):
    config, _, _ = golden
    arguments = _DIFFUSERS_ARGUMENTS["2.0" if config.decoder_padding_mode == "reflect" else "2.3"]
    torch.manual_seed(0)
    model = AutoencoderKLLTX2Video(latent_channels=6, decoder_causal=False, **arguments).eval()
    model.latents_mean.normal_()
    model.latents_std.uniform_(0.5, 2.0)
    params = params_from_diffusers(model)
    mean, std = (params["per_channel_statistics"][name] for name in ("mean", "std"))

    # Shapes of the golden files, already compiled by the tests above.
    rng = np.random.default_rng(1)
    video = rng.uniform(-1, 1, (1, 9, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(np.moveaxis(video, -1, 1))).latent_dist.mode()
    reference = (channels_last(encoded) - mean) / std
    np.testing.assert_allclose(encode(config, params, video), reference, atol=ATOL)
    for shape, causal in (((1, 2, 2, 3, 6), False), ((1, 3, 2, 2, 6), True)):
        latents = rng.standard_normal(shape).astype(np.float32)
        raw = torch.from_numpy(np.moveaxis(latents * std + mean, -1, 1))
        with torch.no_grad():
            reference = channels_last(model.decode(raw, causal=causal).sample)
        found = decode(config, params, latents, causal=causal)
        np.testing.assert_allclose(found, reference, atol=ATOL)


# Configuration.


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_published_configurations(version):
    config = VideoVAEConfig.from_metadata(published_metadata(version))
    assert (config.temporal_compression, config.spatial_compression) == (8, 32)
    assert config.bottleneck_channels == 1024
    assert (config.decoder_base_channels, config.causal_decoder) == (128, False)
    modes = config.encoder_padding_mode, config.decoder_padding_mode
    assert modes == ("zeros", "reflect" if version == "2.0" else "zeros")
    shapes = jax.eval_shape(lambda key: video_vae.init_params(config, key), jax.random.key(0))
    assert shapes["decoder"]["up_blocks_1"]["conv"]["kernel"].shape == (3, 3, 3, 1024, 4096)
    assert shapes["decoder"]["conv_out"]["kernel"].shape == (3, 3, 3, 128, 48)
    width = 2048 if version == "2.0" else 1024
    assert shapes["encoder"]["conv_out"]["kernel"].shape == (3, 3, 3, width, 129)
    if version == "2.3":
        sizes = {
            part: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[part]))
            for part in ("encoder", "decoder")
        }
        assert sizes == {"encoder": 318_936_897, "decoder": 407_169_072}
    # a stream of blocks, at the size of the README's
    step = functools.partial(video_vae.encode_chunk, config)
    frame, block = (jax.ShapeDtypeStruct((1, n, 512, 768, 3), jnp.float32) for n in (1, 24))
    first, cache = jax.eval_shape(step, shapes, frame)
    latents, same = jax.eval_shape(step, shapes, block, cache)
    assert (first.shape, latents.shape) == ((1, 1, 16, 24, 128), (1, 3, 16, 24, 128))
    assert jax.tree.map(lambda x: x.shape, cache) == jax.tree.map(lambda x: x.shape, same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "OtherVAE"}, "_class_name"),
        (
            {"_class_name": "CausalDiffusionVAE", "decoder": {"dims": 2}},
            r"^vae: is LTX-2\.5's diffusion decoder, .* use ltx-2\.5-video-vae-conv-bf16",
        ),
        ({"timestep_conditioning": True}, "timestep_conditioning"),
        ({"norm_layer": "group_norm"}, "norm_layer"),
        ({"latent_log_var": "per_channel"}, "latent_log_var"),
        ({"spatial_padding_mode": "circular"}, "padding_mode"),
        ({"encoder_base_channels": 64}, "encoder_base_channels"),
        ({"use_blur": True}, "use_blur"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"encoder_blocks": []}, "encoder_blocks"),
        ({"decoder_blocks": [["attn_res_x", {"num_layers": 1}]]}, "attn_res_x"),
        ({"decoder_blocks": [["res_x", {"num_layers": 0}]]}, "num_layers"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "heads": 2}]]}, "heads"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "inject_noise"),
        ({"decoder_blocks": [["compress_time", {"residual": True}]]}, "residual"),
        ({"decoder_blocks": [["res_x", 1]]}, r"compress \(time, space\)"),
        ({"decoder_blocks": ["res_x"]}, "decoder_blocks"),
    ],
)
def test_unsupported_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VideoVAEConfig.from_metadata(published_metadata("2.0") | changes)


def test_absent_timestep_conditioning_means_true():
    vae = published_metadata("2.0")
    del vae["timestep_conditioning"]
    with pytest.raises(ValueError, match="timestep_conditioning"):
        VideoVAEConfig.from_metadata(vae)


# Bad input.


def test_encode_names_the_nearest_frame_counts(golden):
    config, params, _ = golden
    with pytest.raises(ValueError, match="nearest valid: 9 or 17"):
        video_vae.encode(config, params, np.zeros((1, 12, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="nearest valid: 1 or 9"):
        video_vae.encode(config, params, np.zeros((1, 0, 64, 64, 3), np.float32))


@pytest.mark.parametrize("shape", [(1, 9, 64, 80, 3), (1, 9, 64, 64, 4), (9, 64, 64, 3)])
def test_encode_rejects_shapes(golden, shape):
    config, params, _ = golden
    with pytest.raises(ValueError, match=r"multiples of 32|must be"):
        video_vae.encode(config, params, np.zeros(shape, np.float32))


def test_decode_rejects_shapes(golden):
    config, params, _ = golden
    with pytest.raises(ValueError, match="h, w, 6"):
        video_vae.decode(config, params, np.zeros((1, 2, 2, 2, 5), np.float32))
    narrow = np.zeros((1, 1, 1, 2, 6), np.float32)
    if config.decoder_padding_mode == "reflect":
        with pytest.raises(ValueError, match="2x2 latents, got 1x2"):
            video_vae.decode(config, params, narrow)
    else:
        video = jax.eval_shape(lambda p, z: video_vae.decode(config, p, z), params, narrow)
        assert video.shape == (1, 1, 32, 64, 3)


# Arithmetic.


def test_decoder_flops_agree_with_xla(golden):
    config, params, _ = golden
    latents = jax.ShapeDtypeStruct((1, 3, 6, 8, 6), jnp.float32)
    analysis = decode.lower(config, params, latents).cost_analysis()
    counted = flops.video_decoder_flops(config, 3, height=192, width=256)
    assert counted == pytest.approx(analysis["flops"], rel=0.1)
    parts = [(1, False), (2, True)]
    assert counted == sum(
        flops.video_decoder_flops(config, n, height=192, width=256, continued=continued)
        for n, continued in parts
    )
    with pytest.raises(ValueError, match="multiples of 32"):
        flops.video_decoder_flops(config, 4, height=60, width=64)
