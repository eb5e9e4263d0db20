"""Waveform to log-mel: parity with the LTX-2 reference, resampling, errors."""

import json

import numpy as np
import pytest
import torch

from omniforcing_jax.models.audio.mel import (
    MelConfig,
    log_mel_spectrogram,
    mel_filterbank,
    resample,
    waveform_to_log_mel,
)

ATOL = 5e-4


@pytest.fixture(params=["ltx20", "ltx23"])
def expected(request):
    return request.getfixturevalue(request.param)


def to_waveform(array):
    """[B, S, N] -> [B, N, S]."""
    return np.transpose(array, (0, 2, 1))


def to_log_mel(array):
    """[B, S, T, M] -> [B, T, M, S]."""
    return np.transpose(array, (0, 2, 3, 1))


def test_filterbank_matches_reference(expected):
    filters = mel_filterbank(1024, 16000, 64, 0.0, 8000.0)
    np.testing.assert_allclose(filters, expected["i_mel_filterbank"], atol=1e-7, rtol=0)


def test_log_mel_matches_reference(expected):
    log_mel = waveform_to_log_mel(to_waveform(expected["i_waveform_16k"]), 16000, MelConfig())
    wanted = to_log_mel(expected["i_logmel_16k"])
    assert log_mel.shape == wanted.shape
    np.testing.assert_allclose(log_mel, wanted, atol=ATOL, rtol=0)


def test_resampling_matches_reference(expected):
    rate = int(expected["i_waveform_other_sample_rate"])
    waveform = to_waveform(expected["i_waveform_other"])
    resampled = resample(waveform, rate, 16000)
    wanted = to_waveform(expected["i_waveform_other_resampled_16k"])
    assert resampled.shape == wanted.shape
    np.testing.assert_allclose(resampled, wanted, atol=1e-5, rtol=0)
    log_mel = waveform_to_log_mel(waveform, rate, MelConfig())
    np.testing.assert_allclose(log_mel, to_log_mel(expected["i_logmel_other"]), atol=ATOL, rtol=0)


def test_settings_of_the_checkpoints(expected):
    preprocessing = json.loads(str(expected["config_json"]))["audio_vae"]["preprocessing"]
    assert MelConfig.from_metadata(preprocessing) == MelConfig()


def test_spectrogram_matches_torch_at_other_settings():
    config = MelConfig(sample_rate=8000, n_fft=256, hop=100, mel_bins=20, f_min=50.0, f_max=3800.0)
    waveform = np.random.default_rng(0).standard_normal((2, 1234, 2)).astype(np.float32)
    spectrum = torch.stft(
        torch.from_numpy(to_waveform(waveform).reshape(4, -1).copy()),
        256,
        100,
        window=torch.hann_window(256),
        return_complex=True,
    )
    filters = torch.from_numpy(mel_filterbank(256, 8000, 20, 50.0, 3800.0).copy())
    mel = torch.log(torch.clamp(spectrum.abs().transpose(1, 2) @ filters, min=1e-5))
    wanted = to_log_mel(mel.numpy().reshape(2, 2, -1, 20))
    np.testing.assert_allclose(log_mel_spectrogram(waveform, config), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("source", [44100, 48000, 22050, 8000])
def test_resampled_tone_stays_a_tone(source):
    """A 440 Hz tone, sampled at another rate, is the same tone (away from the ends)."""
    seconds = 0.1
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * source)) / source)
    resampled = resample(np.stack([tone, -tone], axis=-1)[None], source, 16000)
    assert resampled.shape == (1, int(np.ceil(len(tone) * 16000 / source)), 2)
    wanted = np.sin(2 * np.pi * 440 * np.arange(resampled.shape[1]) / 16000)
    np.testing.assert_allclose(resampled[0, 50:-50, 0], wanted[50:-50], atol=5e-3)
    np.testing.assert_allclose(resampled[0, :, 1], -resampled[0, :, 0], atol=1e-6)


def test_aliases_are_removed():
    """A 12 kHz tone cannot be represented at 16 kHz and must vanish, not fold to 4 kHz."""
    tone = np.sin(2 * np.pi * 12000 * np.arange(4800) / 48000)
    resampled = resample(np.stack([tone, tone], axis=-1)[None], 48000, 16000)
    assert np.abs(resampled[0, 50:-50]).max() < 1e-2


def test_bad_waveforms_are_named():
    config = MelConfig()
    with pytest.raises(ValueError, match=r"stereo \[B, N, 2\]"):
        waveform_to_log_mel(np.zeros((1, 2000, 1)), 16000, config)
    with pytest.raises(ValueError, match="channels last"):
        waveform_to_log_mel(np.zeros((1, 2, 2000)), 16000, config)
    with pytest.raises(ValueError, match="0 samples"):
        waveform_to_log_mel(np.zeros((1, 0, 2)), 16000, config)
    with pytest.raises(ValueError, match="at least 513"):
        waveform_to_log_mel(np.zeros((1, 512, 2)), 16000, config)
    # 1000 samples at 48 kHz are 334 at 16 kHz
    with pytest.raises(ValueError, match="334 samples at 16000 Hz"):
        waveform_to_log_mel(np.zeros((1, 1000, 2)), 48000, config)
    with pytest.raises(ValueError, match="source_rate"):
        resample(np.zeros((1, 1000, 2)), 0, 16000)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [("audio", "stereo", False), ("stft", "causal", False), ("stft", "win_length", 512)],
)
def test_unsupported_settings_are_named(ltx20, group, field, value):
    preprocessing = json.loads(str(ltx20["config_json"]))["audio_vae"]["preprocessing"]
    preprocessing[group][field] = value
    with pytest.raises(ValueError, match=f"{group}.{field}"):
        MelConfig.from_metadata(preprocessing)
