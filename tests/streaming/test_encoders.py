"""Streaming encoders: equal to the whole clip for any pushes, bit for bit among themselves."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_converters.reading import load_component
from omniforcing_jax.models.audio.mel import resample, waveform_to_log_mel
from omniforcing_jax.models.audio.vae import AudioVAEConfig, encode_audio
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.streaming.encoders import (
    StreamingAudioEncoder,
    StreamingResampler,
    StreamingVideoEncoder,
)

STEP = 4  # latents
ATOL = 2e-5


def load(golden_dir, name, config_class, section):
    expected = np.load(golden_dir / "ltx2_tiny_expected.npz")
    config = config_class.from_metadata(json.loads(str(expected["config_json"]))[section])
    return config, load_component(golden_dir / "ltx2_tiny.safetensors", name, np.float32), expected


@pytest.fixture(scope="module")
def audio(golden_dir):
    """Encoder with the weights of the LTX-2.0 reference, and that reference's outputs."""
    config, params, expected = load(golden_dir, "audio_vae", AudioVAEConfig, "audio_vae")
    return StreamingAudioEncoder(config, params, step=STEP), params, expected


@pytest.fixture(scope="module")
def video(golden_dir):
    config, params, expected = load(golden_dir, "video_vae", VideoVAEConfig, "vae")
    return StreamingVideoEncoder(config, params, step=2), params, expected


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def stream(encoder, state, x, sizes):
    """All latents of `x` [B, n, ...], pushed in pieces of these sizes and a rest."""
    pieces, start = [], 0
    for size in [*sizes, x.shape[1]]:
        state, latents = encoder.push(state, x[:, start : start + size])
        pieces.append(latents)
        start += size
    pieces.append(encoder.flush(state)[1])
    return np.concatenate(pieces, axis=1)


# Sound


def test_sound_equals_the_reference(audio):
    """Mirrored at both ends, as the whole spectrogram is."""
    encoder, _, expected = audio
    waveform = np.transpose(expected["i_waveform_16k"], (0, 2, 1))
    latents = stream(encoder, encoder.init(1, 16000), waveform, [])
    reference = expected["i_latent_from_waveform_16k"]  # [B, c, T, f]
    reference = np.transpose(reference, (0, 2, 1, 3)).reshape(*latents.shape)
    np.testing.assert_allclose(latents, reference, atol=ATOL, rtol=0)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_sound_equals_the_whole(audio, rate):
    encoder, params, _ = audio
    waveform = noise(2, rate // 25 * 11 + 77, 2)
    log_mel = waveform_to_log_mel(waveform, rate, encoder.config.mel)
    whole = encode_audio(params, encoder.config, log_mel)
    latents = stream(encoder, encoder.init(2, rate), waveform, [5, rate // 3])
    np.testing.assert_allclose(latents, whole, atol=ATOL, rtol=0)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5000), max_size=6), st.integers(513, 9000))
def test_how_sound_is_cut_changes_no_bit(audio, sizes, length):
    encoder, _, _ = audio
    waveform = noise(1, length, 2, seed=length)
    at_once = stream(encoder, encoder.init(1, 16000), waveform, [])
    in_pieces = stream(encoder, encoder.init(1, 16000), waveform, sizes)
    np.testing.assert_array_equal(in_pieces, at_once)
    assert at_once.shape[1] == encoder.latents_after(length, 16000, flushed=True)


def test_a_latent_waits_for_its_look_ahead_and_nothing_more(audio):
    encoder, _, _ = audio
    rate = 48000
    assert encoder.look_ahead(rate) == 3 * 512 + 19
    needed = encoder.samples_for(1 + STEP, rate)
    assert needed == STEP * 1920 + encoder.look_ahead(rate)
    assert encoder.latents_after(needed - 1, rate) == 1
    assert encoder.latents_after(needed, rate) == 1 + STEP
    state = encoder.init(1, rate)
    waveform = noise(1, needed, 2)
    state, first = encoder.push(state, waveform[:, :-1])
    state, second = encoder.push(state, waveform[:, -1:])
    assert (first.shape[1], second.shape[1]) == (1, STEP)
    # the samples that are kept do not grow with the sound
    longer = noise(1, 10 * rate // 25 * STEP, 2)
    later, _ = encoder.push(state, longer)
    assert later.samples.shape[1] <= (STEP + 3) * rate // 25 + 3 * encoder.look_ahead(rate)


def test_sound_goes_on_from_a_copy_of_its_state(audio):
    encoder, _, _ = audio
    waveform = noise(1, 9000, 2)
    state, _ = encoder.push(encoder.init(1, 16000), waveform[:, :4000])
    copy = jax.device_get(state)
    expected = encoder.push(state, waveform[:, 4000:])[1]
    assert expected.shape[1]
    for again in (copy, state):  # a push leaves the state what it was
        np.testing.assert_array_equal(encoder.push(again, waveform[:, 4000:])[1], expected)


def test_bad_sound_is_named(audio):
    encoder, params, _ = audio
    with pytest.raises(ValueError, match="multiple of 25 Hz"):
        encoder.init(1, 44056)
    with pytest.raises(ValueError, match=r"takes a waveform \[1, n, 2\]"):
        encoder.push(encoder.init(1, 16000), noise(1, 100, 1))
    state, _ = encoder.push(encoder.init(1, 16000), noise(1, 512, 2))
    with pytest.raises(ValueError, match=r"needs more than 0\.032 s"):
        encoder.flush(state)
    ended, latents = encoder.flush(encoder.init(1, 16000))
    assert latents.shape[1] == 0
    with pytest.raises(ValueError, match="begin a new one"):
        encoder.push(ended, noise(1, 100, 2))
    with pytest.raises(ValueError, match="without its encoder"):
        StreamingAudioEncoder(encoder.config, {"decoder": params["decoder"]})


@pytest.mark.parametrize("rates", [(44100, 24000), (16000, 48000)])
def test_resampling_equals_the_whole_however_it_is_cut(rates):
    resampler, waveform = StreamingResampler(*rates), noise(2, rates[0] // 5 + 123, 2)

    def pushed(sizes):
        state, pieces, start = resampler.init(2), [], 0
        for size in [*sizes, waveform.shape[1]]:
            state, piece = resampler.push(state, waveform[:, start : start + size])
            pieces.append(piece)
            start += size
        return np.concatenate([*pieces, resampler.flush(state)], axis=1)

    at_once = pushed([])
    np.testing.assert_allclose(at_once, resample(waveform, *rates), atol=1e-6)
    np.testing.assert_array_equal(pushed([10, 0, 3000, 77]), at_once)


def test_equal_rates_change_nothing():
    resampler, waveform = StreamingResampler(48000, 48000), noise(1, 777, 2)
    state, same = resampler.push(resampler.init(1), waveform)
    np.testing.assert_array_equal(same, waveform)
    assert resampler.flush(state).shape == (1, 0, 2)
    with pytest.raises(ValueError, match="multiple of 25 Hz"):
        StreamingResampler(44100, 44056)


# Pictures


def test_video_equals_the_reference(video):
    encoder, _, expected = video
    frames = np.moveaxis(expected["g_enc_video"], 1, -1)  # [B, F, H, W, 3]
    state = encoder.init(len(frames), *frames.shape[2:4])
    latents = stream(encoder, state, frames, [3])
    reference = np.moveaxis(expected["g_enc_latent_normalised"], 1, -1)
    np.testing.assert_allclose(latents, reference, atol=1e-4, rtol=0)


def test_video_equals_the_whole_however_it_is_cut(video):
    encoder, params, _ = video
    frames = noise(1, 33, 64, 64, 3)
    whole = jax.jit(video_vae.encode, static_argnums=0)(encoder.config, params, frames)
    init = encoder.init(1, 64, 64)
    at_once = stream(encoder, init, np.concatenate([frames, frames[:, :7]], axis=1), [])
    np.testing.assert_allclose(at_once, whole, atol=ATOL, rtol=0)  # 7 frames more make no latent
    np.testing.assert_array_equal(stream(encoder, init, frames, [1, 6, 0, 20]), at_once)
    state, _ = encoder.push(init, frames[:, :20])
    copy = jax.device_get(state)
    expected = encoder.push(state, frames[:, 20:])[1]
    assert expected.shape[1] == 2
    np.testing.assert_array_equal(encoder.push(copy, frames[:, 20:])[1], expected)


def test_bad_frames_are_named(video):
    encoder, params, _ = video
    with pytest.raises(ValueError, match="multiples of 32"):
        encoder.init(1, 60, 64)
    with pytest.raises(ValueError, match=r"frames \[B, n, H, W, 3\]"):
        encoder.push(encoder.init(1, 64, 64), noise(1, 2, 64, 32, 3))
    with pytest.raises(ValueError, match="without its encoder"):
        StreamingVideoEncoder(encoder.config, {"decoder": params["decoder"]})
