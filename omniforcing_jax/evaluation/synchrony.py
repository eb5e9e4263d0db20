"""Whether what is heard happens when something moves, without weights, and whether clocks agree.

A rough measure: it knows neither what moves nor what sounds. It tells a clip from the same clip
with its sound shifted or exchanged (compare with `chance`), which is what a distillation may break.
A still picture or silence has no synchrony, good or bad: the result is None.
"""

import numpy as np
from scipy.signal import find_peaks

from omniforcing_jax.evaluation.picture import PictureStatistics
from omniforcing_jax.evaluation.sound import spectrogram

RATE = 100.0  # onset strengths per second
LONGEST = 1.0  # seconds: offsets that are looked for, to both sides
TOLERANCE = 3  # frames between a peak of the motion and one of the sound (AV-Align)
_FLOOR = 1e-4


def measure_synchrony(
    statistics: PictureStatistics, waveform: np.ndarray, sample_rate: int
) -> dict[str, float | None]:
    """All measures of one clip.

    Args:
      statistics: of its picture.
      waveform: [N, channels] float32 in [-1, 1].
      sample_rate: samples per second.

    Returns:
      clock_error: length of the sound minus that of the picture, in samples.
      sync_offset: seconds by which the sound comes late, where onsets and changes of motion
        correlate best, within a second.
      sync: that correlation (Pearson's), 1 at most.
      sync_chance: 95th percentile of the correlations at all other offsets: a `sync` below it means
        nothing.
      av_align: share of peaks, of both, with a peak of the other within three frames (AV-Align,
        arXiv 2309.16429, with frame differences instead of optical flow).
    """
    length = len(statistics.thumbnails) / statistics.frame_rate
    result: dict[str, float | None] = {
        "clock_error": float(round(len(waveform) - length * sample_rate)),
        **dict.fromkeys(("sync_offset", "sync", "sync_chance", "av_align")),
    }
    heard, seen = onset_strength(waveform, sample_rate), motion_onsets(statistics)
    size = min(len(heard), len(seen))
    heard, seen = heard[:size], seen[:size]
    reach = round(LONGEST * RATE)
    if size <= 2 * reach or not heard.std() > 0 or not seen.std() > 0:
        return result
    correlation = np.array([_correlation(heard, seen, lag) for lag in range(-reach, reach + 1)])
    best = int(np.argmax(correlation))
    near = np.abs(np.arange(len(correlation)) - best) <= TOLERANCE / statistics.frame_rate * RATE
    tolerance = TOLERANCE / statistics.frame_rate * RATE
    return result | {
        "sync_offset": (best - reach) / RATE,
        "sync": float(correlation[best]),
        "sync_chance": float(np.percentile(correlation[~near], 95)),
        "av_align": _align(_peaks(heard), _peaks(seen), tolerance),
    }


def onset_strength(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Increase of the logarithmic spectrum from one window to the next, [T] at `RATE`."""
    size = round(sample_rate / RATE)
    if len(waveform) < 2 * size:
        return np.zeros(0)
    spectrum, _ = spectrogram(waveform, sample_rate, size)
    rise = np.diff(np.log(spectrum + _FLOOR), axis=0, prepend=np.log(spectrum[:1] + _FLOOR))
    return np.maximum(rise, 0).mean(1)


def motion_onsets(statistics: PictureStatistics) -> np.ndarray:
    """Change of the motion from one frame to the next, [T] at `RATE`; a bounce is a sudden one."""
    x = statistics.thumbnails
    bend = np.abs(np.diff(x, 2, axis=0)).mean((1, 2, 3))  # [T - 2], around frame t + 1
    times = (np.arange(len(bend)) + 1) / statistics.frame_rate
    count = int(len(x) / statistics.frame_rate * RATE)
    return np.interp(np.arange(count) / RATE, times, bend) if len(bend) else np.zeros(0)


def _correlation(heard: np.ndarray, seen: np.ndarray, lag: int) -> float:
    """Of seen[t] and heard[t + lag]."""
    a, b = (heard[lag:], seen[: len(seen) - lag]) if lag >= 0 else (heard[:lag], seen[-lag:])
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-12))


def _peaks(values: np.ndarray) -> np.ndarray:
    """Places of the peaks that stand out by a third of the largest value, 0.1 s apart at least."""
    return find_peaks(values, prominence=values.max() / 3, distance=round(0.1 * RATE))[0]


def _align(a: np.ndarray, b: np.ndarray, tolerance: float) -> float | None:
    if not len(a) or not len(b):
        return None
    near = np.abs(a[:, None] - b[None, :]) <= tolerance
    return float((near.any(1).sum() + near.any(0).sum()) / (len(a) + len(b)))
