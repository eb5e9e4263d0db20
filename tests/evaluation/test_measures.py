"""Measures without weights, on a clip with impacts that ring, and on the same clip broken."""

import numpy as np
import pytest

from omniforcing_jax.evaluation import distances
from omniforcing_jax.evaluation.picture import measure_picture, picture_statistics
from omniforcing_jax.evaluation.sound import measure_sound
from omniforcing_jax.evaluation.synchrony import measure_synchrony

FRAME_RATE, SAMPLE_RATE, SECONDS = 24, 16_000, 10
HITS = np.array([0.7, 1.5, 2.6, 3.1, 4.4, 5.2, 6.3, 6.9, 8.2, 9.1])  # at no regular distance
FRAME_BORDERS = [FRAME_RATE * s for s in range(1, SECONDS)]
BORDERS = list(range(1, SECONDS))


def picture() -> np.ndarray:
    """A bright stripe before a grey wall that turns around at every hit. [T, 48, 64, 3] uint8."""
    count = FRAME_RATE * SECONDS
    times = np.arange(count) / FRAME_RATE
    direction = np.where(np.searchsorted(HITS, times, side="right") % 2, 1.0, -1.0)
    path = np.cumsum(direction * np.random.default_rng(0).uniform(0.95, 1.05, count))
    frames = np.full((count, 48, 64, 3), 60, np.float32)
    x = np.arange(64)
    for frame, place in zip(frames, 36 + path / 2, strict=True):
        inside = np.exp(-((x - place) ** 2) / 32)[:, None]
        frame[8:40] += inside * np.float32([150, 90, 30])
    return frames.astype(np.uint8)


def sound() -> np.ndarray:
    """A tone that dies away after every hit, over a faint noise. [N, 2] float32."""
    noise = np.random.default_rng(1).normal(0, 5e-3, (SAMPLE_RATE * SECONDS, 2))
    times = np.arange(SAMPLE_RATE * SECONDS) / SAMPLE_RATE
    for number, hit in enumerate(HITS):
        after = np.maximum(times - hit, 0)
        tone = np.sin(2 * np.pi * (400 + 130 * number) * after) * np.exp(-after / 0.1)
        noise += 0.3 * np.where(times >= hit, tone, 0)[:, None]
    return noise.astype(np.float32)


FRAMES, WAVEFORM = picture(), sound()


def seen(frames: np.ndarray) -> dict:
    return measure_picture(picture_statistics(frames, FRAME_RATE), FRAME_BORDERS)


def heard(waveform: np.ndarray) -> dict:
    return measure_sound(waveform, SAMPLE_RATE, BORDERS)


def together(frames: np.ndarray, waveform: np.ndarray) -> dict:
    return measure_synchrony(picture_statistics(frames, FRAME_RATE), waveform, SAMPLE_RATE)


def brighter(levels: np.ndarray) -> np.ndarray:
    """The clip with so many levels [T] added."""
    return np.clip(FRAMES + levels[:, None, None, None], 0, 255).astype(np.uint8)


def test_a_sound_picture():
    found = seen(FRAMES)
    assert found["motion"] > 5
    assert found["still"] == 0
    # VBench's formula, as it is written there
    steps = np.abs(np.diff(FRAMES.astype(np.float32), axis=0)).mean((1, 2, 3))
    assert found["temporal_flickering"] == pytest.approx((255 - steps.mean()) / 255)
    assert found["seams"] == pytest.approx(1, abs=0.2)
    assert abs(found["brightness_drift"]) < 10
    assert found["repetition"] < 0.6
    with pytest.raises(ValueError, match="no motion"):
        picture_statistics(FRAMES[:1], FRAME_RATE)


def test_broken_pictures():
    good = seen(FRAMES)
    still = seen(np.repeat(FRAMES[:1], len(FRAMES), 0))
    assert (still["motion"], still["still"], still["temporal_flickering"]) == (0, 1, 1)
    assert still["seams"] is None
    assert still["repetition"] is None
    flickering = seen(brighter(4.0 * (np.arange(len(FRAMES)) % 2)))
    assert flickering["temporal_flickering"] < good["temporal_flickering"] - 0.01
    jumping = seen(brighter(3.0 * (np.arange(len(FRAMES)) // FRAME_RATE % 2)))
    assert jumping["seams"] > 2 * good["seams"]
    fading = seen(brighter(-np.arange(len(FRAMES)) / FRAME_RATE))
    assert fading["brightness_drift"] == pytest.approx(good["brightness_drift"] - 60, abs=3)
    looped = seen(np.concatenate([FRAMES[: 2 * FRAME_RATE]] * 5))
    assert looped["repetition"] == pytest.approx(1)
    grey = seen(np.repeat(FRAMES.mean(-1, keepdims=True), 3, -1).astype(np.uint8))
    assert grey["saturation_drift"] == 0


def test_sounds():
    good = heard(WAVEFORM)
    assert good["silence"] == 0
    assert good["clipping"] == 0
    assert good["clicks"] == pytest.approx(1, abs=0.3)
    quiet = WAVEFORM.copy()
    quiet[: 4 * SAMPLE_RATE] = 0
    assert heard(quiet)["silence"] == pytest.approx(0.4)
    assert heard(np.zeros_like(WAVEFORM))["loudness"] is None
    assert heard(np.clip(20 * WAVEFORM, -1, 1))["clipping"] > 0.05
    assert heard(WAVEFORM + 0.05)["offset"] == pytest.approx(0.05, abs=1e-3)
    assert heard(2 * WAVEFORM)["loudness"] == pytest.approx(good["loudness"] + 6.02, abs=0.01)
    falling = 10 ** (-np.arange(len(WAVEFORM)) / len(WAVEFORM) / 2)  # 10 dB in ten seconds
    drift = heard((WAVEFORM * falling[:, None]).astype(np.float32))["loudness_drift"]
    assert drift == pytest.approx(good["loudness_drift"] - 60, abs=0.1)
    stepped = WAVEFORM + np.float32(0.1) * (np.arange(len(WAVEFORM)) // SAMPLE_RATE % 2)[:, None]
    assert heard(stepped)["clicks"] > 2.5 * good["clicks"]
    assert heard(np.concatenate([WAVEFORM[: 2 * SAMPLE_RATE]] * 5))["sound_repetition"] == 1
    assert good["sound_repetition"] < 0.6
    with pytest.raises(ValueError, match="finite"):
        heard(WAVEFORM * np.float32(np.nan))
    with pytest.raises(ValueError, match="shorter"):
        heard(WAVEFORM[:100])


def test_synchrony():
    good = together(FRAMES, WAVEFORM)
    assert good["clock_error"] == 0
    assert abs(good["sync_offset"]) <= 1 / FRAME_RATE
    assert good["sync"] > 1.5 * good["sync_chance"]
    assert good["av_align"] > 0.8
    shift = SAMPLE_RATE // 5
    late = np.concatenate([np.zeros((shift, 2), np.float32), WAVEFORM])
    assert together(FRAMES, late)["clock_error"] == shift
    late = together(FRAMES, late[: len(WAVEFORM)])
    assert late["sync_offset"] == pytest.approx(good["sync_offset"] + 0.2, abs=0.011)
    assert late["av_align"] < good["av_align"] / 2
    for clip in ((FRAMES, 0 * WAVEFORM), (np.repeat(FRAMES[:1], len(FRAMES), 0), WAVEFORM)):
        assert together(*clip)["sync"] is None


def test_distances_of_gaussians():
    """Against the closed form, and against torchmetrics on the same features."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    a = rng.normal(size=(4000, 3)) * [1, 2, 3]
    b = rng.normal(size=(4000, 3)) * [2, 2, 1] + [1, 0, 0]
    assert distances.frechet_distance(a, b) == pytest.approx(1 + 1 + 4, rel=0.1)
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    few, other = a[:50], b[:40]
    moments = [torch.tensor(m) for x in (few, other) for m in (x.mean(0), np.cov(x.T))]
    expected = float(_compute_fid(*moments))
    assert distances.frechet_distance(few, other) == pytest.approx(expected, rel=1e-6)
    expected = float(poly_mmd(torch.tensor(few), torch.tensor(a[50:100]), degree=3, coef=1.0))
    assert distances.kernel_distance(few, a[50:100]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="2 or more"):
        distances.frechet_distance(a, b[:1])
    with pytest.raises(ValueError, match="one kind"):
        distances.kernel_distance(a, b[:, :2])
