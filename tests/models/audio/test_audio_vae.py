"""Audio VAE: parity with the LTX-2 reference and diffusers, causality, chunked decoding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio

from checkpoint_converters.reading import load_component
from omniforcing_jax.models.audio.mel import MelConfig, waveform_to_log_mel
from omniforcing_jax.models.audio.vae import (
    AudioDecoder,
    AudioEncoder,
    AudioVAEConfig,
    decode_audio,
    decode_audio_chunk,
    encode_audio,
    init_decoder_history,
)

ATOL = 2e-5


def to_log_mel(array):
    """[B, S, T, M] of the reference -> [B, T, M, S]."""
    return np.transpose(array, (0, 2, 3, 1))


def to_tokens(array):
    """[B, c, T, f] of the reference -> [B, T, (c f)]."""
    return np.transpose(array, (0, 2, 1, 3)).reshape(array.shape[0], array.shape[2], -1)


@pytest.fixture(scope="module", params=["ltx2", "ltx23"])
def model(request, golden_dir):
    """(config, parameters, expected arrays) of one reference version."""
    expected = np.load(golden_dir / f"{request.param}_tiny_expected.npz")
    config = AudioVAEConfig.from_metadata(json.loads(str(expected["config_json"]))["audio_vae"])
    path = golden_dir / f"{request.param}_tiny.safetensors"
    return config, load_component(path, "audio_vae", np.float32), expected


def random_latents(config, length, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, length, config.latent_width)).astype(np.float32)


@pytest.mark.default_xla
def test_encode_matches_reference(model):
    config, params, expected = model
    latents = encode_audio(params, config, to_log_mel(expected["h_enc_mel"]))
    wanted = to_tokens(expected["h_enc_latent_normalised"])
    assert latents.shape == wanted.shape
    np.testing.assert_allclose(latents, wanted, atol=ATOL, rtol=0)


@pytest.mark.default_xla
def test_decode_matches_reference(model):
    config, params, expected = model
    log_mel = decode_audio(params, config, to_tokens(expected["h_dec_latent"]))
    wanted = to_log_mel(expected["h_dec_mel"])
    assert log_mel.shape == wanted.shape
    assert config.num_mel_frames(expected["h_dec_latent"].shape[2]) == wanted.shape[1]
    np.testing.assert_allclose(log_mel, wanted, atol=ATOL, rtol=0)


def test_waveform_to_latents_matches_reference(model):
    config, params, expected = model
    waveform = np.transpose(expected["i_waveform_16k"], (0, 2, 1))
    latents = encode_audio(params, config, waveform_to_log_mel(waveform, 16000, config.mel))
    wanted = to_tokens(expected["i_latent_from_waveform_16k"])
    np.testing.assert_allclose(latents, wanted, atol=ATOL, rtol=0)


def from_diffusers(state_dict):
    """Our tree from the state dict of AutoencoderKLLTX2Audio."""
    tree = {}
    for key, tensor in state_dict.items():
        array = tensor.numpy()
        if key.startswith("latents_"):
            tree.setdefault("per_channel_statistics", {})[key.removeprefix("latents_")] = array
            continue
        names = []
        for part in key.split(".")[:-1]:
            if part.isdigit():
                names[-1] += f"_{part}"
            else:
                names.append(part)
        if names[-1] == "conv":
            names.pop()
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        if key.endswith("weight"):
            node["kernel"] = array.transpose(2, 3, 1, 0)
        else:
            node["bias"] = array
    return tree


def test_matches_diffusers():
    torch.manual_seed(0)
    config = AudioVAEConfig(
        base_channels=16,
        channel_multipliers=(1, 2, 4),
        num_res_blocks=2,
        latent_channels=4,
        mel=MelConfig(mel_bins=16),
    )
    reference = AutoencoderKLLTX2Audio(
        base_channels=16, ch_mult=(1, 2, 4), num_res_blocks=2, latent_channels=4, mel_bins=16
    )
    reference.latents_mean.normal_()
    reference.latents_std.uniform_(0.5, 2.0)
    params = from_diffusers(reference.state_dict())
    mean, std = reference.latents_mean.numpy(), reference.latents_std.numpy()

    mel = torch.randn(2, 2, 22, 16)
    with torch.no_grad():
        latents = reference.encode(mel).latent_dist.mode()
        decoded = reference.decode(latents).sample
    normalised = (to_tokens(latents.numpy()) - mean) / std
    ours = encode_audio(params, config, to_log_mel(mel.numpy()))
    np.testing.assert_allclose(ours, normalised, atol=ATOL, rtol=0)
    log_mel = decode_audio(params, config, normalised)
    np.testing.assert_allclose(log_mel, to_log_mel(decoded.numpy()), atol=ATOL, rtol=0)


def test_module_parameters_are_the_checkpoint_tree(model):
    """`init` and the converter agree on every path and shape."""
    config, params, _ = model
    inputs = {
        "encoder": (AudioEncoder(config), jnp.zeros((1, 4, config.mel.mel_bins, 2))),
        "decoder": (
            AudioDecoder(config),
            jnp.zeros((1, 1, config.latent_bins, config.latent_channels)),
        ),
    }
    for name, (module, example) in inputs.items():
        fresh = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
        shapes = jax.tree.map(lambda leaf: leaf.shape, fresh)
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, params[name])


decode_step = jax.jit(decode_audio_chunk, static_argnames=("config", "start", "dtype"))


@pytest.mark.parametrize("model", ["ltx2"], indirect=True)
@pytest.mark.parametrize("chunks", [(1, 5, 5, 3), (6, 5, 1, 1, 1)])
def test_chunked_decode_equals_whole(model, chunks):
    config, params, _ = model
    latents = random_latents(config, sum(chunks), batch=2)
    history = init_decoder_history(params, config, batch=2)
    pieces, position = [], 0
    for length in chunks:
        chunk = latents[:, position : position + length]
        log_mel, history = decode_step(params, config, chunk, history, start=position == 0)
        assert log_mel.shape[1] == 4 * length - (3 if position == 0 else 0)
        pieces.append(log_mel)
        position += length
    whole = decode_audio(params, config, latents)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["ltx23"], indirect=True)
def test_decoder_is_causal_by_gradient(model):
    config, params, _ = model
    latents = jnp.asarray(random_latents(config, 6))
    gradient = jax.jit(jax.grad(lambda x, frame: decode_audio(params, config, x)[:, frame].sum()))
    for latent in (0, 3):
        last_frame = config.num_mel_frames(latent + 1) - 1
        per_latent = jnp.abs(gradient(latents, last_frame)).sum(axis=(0, 2))
        assert per_latent[latent] > 0
        np.testing.assert_array_equal(per_latent[latent + 1 :], 0.0)


@pytest.mark.parametrize("model", ["ltx23"], indirect=True)
def test_bfloat16_decode_is_close(model):
    config, params, expected = model
    latents = to_tokens(expected["h_dec_latent"])
    exact = decode_audio(params, config, latents)
    rounded = decode_audio(params, config, latents, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(np.square(exact)))
    assert 0 < error < 0.03


def test_wrong_shapes_are_named(model):
    config, params, _ = model
    with pytest.raises(ValueError, match=r"\[B, T, 32\]"):
        decode_audio(params, config, np.zeros((1, 4, 31), np.float32))
    with pytest.raises(ValueError, match="T is 0"):
        decode_audio(params, config, np.zeros((1, 0, 32), np.float32))
    with pytest.raises(ValueError, match=r"\[B, T, 64, 2\]"):
        encode_audio(params, config, np.zeros((1, 4, 64, 1), np.float32))
    with pytest.raises(ValueError, match="0 frames"):
        encode_audio(params, config, np.zeros((1, 0, 64, 2), np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "group"),
        ("causality_axis", None),
        ("attn_resolutions", [32]),
        ("mid_block_add_attention", True),
        ("double_z", False),
        ("in_channels", 1),
        ("ch_mult", [1, 2]),
        ("mel_bins", 80),
        ("kernel_size", 5),
    ],
)
def test_unsupported_settings_are_named(ltx20, field, value):
    metadata = json.loads(str(ltx20["config_json"]))["audio_vae"]
    metadata["model"]["params"]["ddconfig"][field] = value
    with pytest.raises(ValueError, match=field):
        AudioVAEConfig.from_metadata(metadata)


def test_missing_setting_is_named(ltx20):
    metadata = json.loads(str(ltx20["config_json"]))["audio_vae"]
    del metadata["model"]["params"]["ddconfig"]["z_channels"]
    with pytest.raises(ValueError, match="z_channels is missing"):
        AudioVAEConfig.from_metadata(metadata)


def test_published_clip_lengths():
    """121 frames at 24 fps are 126 latents and 501 mel frames."""
    config = AudioVAEConfig()
    assert config.latent_width == 128
    assert config.num_mel_frames(126) == 501
    with pytest.raises(ValueError, match="mel_bins"):
        dataclasses.replace(config, mel=MelConfig(mel_bins=66))
