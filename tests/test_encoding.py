"""Pictures, clips and sound to latents: against the golden files, and what is loaded for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax import (
    MediaEncoder,
    PipelineConfig,
    Sound,
    fit_pixels,
    load_encoders,
    load_pipeline,
)
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.audio.mel import waveform_to_log_mel
from omniforcing_jax.models.audio.vae import encode_audio


@pytest.fixture(scope="module", params=["ltx2", "ltx23"])
def golden(request, golden_dir):
    """Encoders with the reference's weights; its version."""
    path = golden_dir / f"{request.param}_tiny.safetensors"
    metadata = read_metadata(path)
    config = PipelineConfig.from_metadata(metadata["config"], metadata["model_version"])
    params = {x: load_component(path, x, np.float32) for x in ("video_vae", "audio_vae")}
    return MediaEncoder(config, params, jnp.float32), request.param


def test_pictures_equal_the_reference(golden, golden_dir):
    encoder, version = golden
    expected = np.load(golden_dir / "conditions" / "image_preprocess.npz")
    for name, size in (("up", (64, 96)), ("portrait", (96, 64))):
        latents = encoder.encode_image(fit_pixels(expected["image_rgb_uint8"], *size))
        reference = np.moveaxis(expected[f"image_{name}_latent_{version}"], 1, -1)
        reference = reference.reshape(1, -1, reference.shape[-1])  # [1, C, 1, h, w] -> tokens
        np.testing.assert_allclose(latents, reference, atol=2e-5, rtol=0)


def test_pictures_are_compressed_as_the_model_was_trained(golden):
    config = golden[0].config
    assert config.image_crf == 33
    for version, crf in (("2.4.0", 18), ("2.5", 18), ("2.3.1", 33), ("3.0.0", 18)):
        assert PipelineConfig.image_crf.fget(type("C", (), {"model_version": version})) == crf


@pytest.mark.parametrize("golden", ["ltx2"], indirect=True)
def test_sound_of_a_clip(golden):
    """The rest of a longer sound changes nothing; a shorter one is followed by silence."""
    encoder, _ = golden
    rate, rng = 24000, np.random.default_rng(0)
    waveform = rng.uniform(-0.5, 0.5, (2 * rate, 2)).astype(np.float32)
    mel = encoder.config.audio_vae.mel

    def whole(samples):
        log_mel = waveform_to_log_mel(samples[None], rate, mel)
        return encode_audio(encoder.params["audio_vae"], encoder.config.audio_vae, log_mel)

    found = encoder.encode_sound(Sound(waveform, rate), num_latents=26)
    np.testing.assert_allclose(found, whole(waveform)[:, :26], atol=2e-5, rtol=0)
    # as long as the clip of 25 frames at 24 per second: mirrored at its end, as the reference does
    exact = Sound(waveform[: 25 * rate // 24], rate)
    found = encoder.encode_sound(exact, num_latents=26)
    np.testing.assert_allclose(found, whole(exact.waveform)[:, :26], atol=2e-5, rtol=0)
    np.testing.assert_array_equal(encoder.encode_sound(exact)[:, :26], found)
    short = Sound(waveform[: rate // 2], rate)
    found = encoder.encode_sound(short, num_latents=26)
    silence = short.lasting(25 / 24).waveform
    np.testing.assert_allclose(found, whole(silence)[:, :26], atol=2e-5, rtol=0)
    # one latent at 16 kHz is made of no more than half a window, and of silence if it is shorter
    slow = Sound(waveform[:16000], 16000)
    found = encoder.encode_sound(slow, num_latents=1)
    np.testing.assert_allclose(found, encoder.encode_sound(slow, num_latents=26)[:, :1], atol=1e-6)
    brief = Sound(waveform[:100], 16000)
    found = encoder.encode_sound(brief, num_latents=1)
    expected = encoder.encode_sound(brief.lasting(1.0), num_latents=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_only_the_encoders_are_loaded(random_checkpoint, monkeypatch):
    folder, read = random_checkpoint("2.0"), []
    real = checkpoints.load_params
    monkeypatch.setattr(
        checkpoints, "load_params", lambda f, name, **k: read.append(name) or real(f, name, **k)
    )
    encoder = load_encoders(folder, dtype=jnp.float32, streams=("audio",))
    assert read == ["audio_vae"]
    assert sorted(encoder.params["audio_vae"]) == ["encoder", "per_channel_statistics"]
    with pytest.raises(ValueError, match="the video encoder was not loaded"):
        encoder.video()
    latents = encoder.encode_sound(Sound(np.zeros((16000, 2), np.float32), 16000))
    whole = MediaEncoder.from_pipeline(load_pipeline(folder, dtype=jnp.float32, encoders=True))
    again = whole.encode_sound(Sound(np.zeros((16000, 2), np.float32), 16000))
    np.testing.assert_array_equal(latents, again)
    with pytest.raises(FileNotFoundError):
        load_encoders(folder / "nowhere", dtype=jnp.float32)
