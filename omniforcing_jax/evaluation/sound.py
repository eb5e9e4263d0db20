"""Measures of a clip's sound that need no weights. Silence would win most: see `silence` first."""

from collections.abc import Sequence

import numpy as np

from omniforcing_jax.evaluation.picture import ratio, repetition, slope

WINDOW = 0.05  # seconds
SILENT = 1e-3  # RMS of full scale, -60 dB
FULL_SCALE = 0.999
CLICK = 0.005  # seconds to both sides of a border in which its click lies
BANDS = 24  # of the spectrum, equally wide in the logarithm of the frequency
LOWEST = 50.0  # Hz
_FLOOR = 1e-5  # amplitude that counts as nothing in logarithms, -100 dB


def measure_sound(
    waveform: np.ndarray, sample_rate: int, borders: Sequence[float] = ()
) -> dict[str, float | None]:
    """All measures of one clip.

    Args:
      waveform: [N, channels] float32 in [-1, 1], at least one window long.
      sample_rate: samples per second.
      borders: seconds at which each block but the first begins.

    Returns:
      silence: share of windows of 50 ms below -60 dB.
      clipping: share of samples at full scale.
      offset: largest mean of a channel (DC), of full scale.
      loudness: RMS of the windows that are not silent, in dB of full scale; None if all are.
      loudness_drift: of those windows, in dB per minute.
      centroid_drift: of their spectral centroid, in octaves per minute.
      clicks: steepest bend of the waveform within 5 ms of a border by that of other places of the
        clip (`picture.ratio`); about 1 without clicks, None without borders.
      sound_repetition: of the spectrum, see `picture.repetition`.

    Raises:
      ValueError: shorter than a window, or not finite.
    """
    size = round(WINDOW * sample_rate)
    if len(waveform) < size:
        raise ValueError(f"sound of {len(waveform)} samples is shorter than {WINDOW:g} s")
    if not np.isfinite(waveform).all():
        raise ValueError("the sound holds values that are not finite")
    power = (windows(waveform**2, size).mean(1)).mean(-1)  # [windows]
    heard = power >= SILENT**2
    levels = 10 * np.log10(power[heard])
    spectrum, frequencies = spectrogram(waveform, sample_rate, size)
    centroid = (spectrum[heard] @ frequencies) / np.maximum(spectrum[heard].sum(1), _FLOOR)
    drifts = {"loudness_drift": levels, "centroid_drift": np.log2(np.maximum(centroid, 1.0))}
    return {
        "silence": float(1 - heard.mean()),
        "clipping": float((np.abs(waveform) >= FULL_SCALE).mean()),
        "offset": float(np.abs(waveform.mean(0)).max()),
        "loudness": float(10 * np.log10(power[heard].mean())) if heard.any() else None,
        **{n: slope(x, 1 / WINDOW) if len(x) > 1 else None for n, x in drifts.items()},
        "clicks": _clicks(waveform, sample_rate, borders),
        "sound_repetition": repetition(_bands(spectrum, frequencies), 1 / WINDOW),
    }


def windows(values: np.ndarray, size: int) -> np.ndarray:
    """[N, …] -> [N // size, size, …], without what is left over at the end."""
    count = len(values) // size
    return values[: count * size].reshape(count, size, *values.shape[1:])


def spectrogram(waveform: np.ndarray, sample_rate: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes [N // size, bins] of the mean of all channels, and the bins' frequencies in Hz."""
    pieces = windows(waveform.mean(1), size) * np.hanning(size).astype(np.float32)
    return np.abs(np.fft.rfft(pieces, axis=1)) / size, np.fft.rfftfreq(size, 1 / sample_rate)


def _bands(spectrum: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """[windows, bins] -> [windows, BANDS], logarithms of amplitude."""
    edges = np.geomspace(LOWEST, frequencies[-1], BANDS + 1)
    band = np.digitize(frequencies, edges) - 1
    sums = [(spectrum[:, band == b] ** 2).sum(1) for b in range(BANDS)]
    return 0.5 * np.log(np.stack(sums, -1) + _FLOOR**2)


def _clicks(waveform: np.ndarray, sample_rate: int, borders: Sequence[float]) -> float | None:
    """A click is a bend: the second difference of a step or a kink is large, of sound it is not."""
    bend = np.abs(np.diff(waveform, 2, axis=0)).max(-1)  # [N - 2], around sample n + 1
    size = 2 * round(CLICK * sample_rate)
    steepest = windows(bend, size).max(1)  # [windows]
    starts = [round((border - CLICK) * sample_rate) for border in borders]
    here = [bend[max(0, s) : s + size].max() for s in starts if 0 < s + size <= len(bend)]
    crossed = {w for s in starts for w in (s // size, s // size + 1) if 0 <= w < len(steepest)}
    return ratio(np.array(here), np.delete(steepest, sorted(crossed)))
