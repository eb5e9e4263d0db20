"""What is heard: tones of the world's pitches, and when they begin.

The sound is demodulated at each pitch. A band's amplitude A(t) falls like exp(-t / τ) while nothing
happens, so A(t) - exp(-δ / τ) A(t - δ) leaves a pulse at each onset and nothing of the tail before
it. A matched filter for the pulse that the world's own tone leaves finds the onsets, between the
hops of the transform, and how loud they are.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from pocket.world.physics import COLOURS, PITCHES
from pocket.world.render import DECAYS_PER_TONE, DURATIONS, tone

WINDOW = 0.032  # seconds (Hann): separates pitches 125 Hz and more apart
HOP = 0.002  # seconds
DELAY = 0.024  # seconds, δ
PULSE = 0.03  # seconds before and after its middle that a pulse lasts
APART = 0.05  # seconds between two onsets of a pitch
TAIL = np.exp(-DELAY * DECAYS_PER_TONE / max(DURATIONS))  # of the tone that decays slowest
SILENCE = 0.004  # amplitude below which nothing is heard
RELATIVE = 0.1  # of the loud tones' amplitude: softer onsets do not count
LEAK = 0.2  # of a simultaneous onset's: an abrupt tone is faintly heard at other pitches
SAME_TIME = 0.02  # seconds
ALIKE = 0.7  # correlation with the pulse of a clean tone
BLOCK = 4096  # transforms at a time, to bound memory


@dataclasses.dataclass(frozen=True)
class Tone:
    """A tone that begins."""

    time: float  # of its onset, in seconds from the first sample
    colour: str  # whose pitch it has
    pan: float  # stereo position, 0 is left and 1 is right
    level: float  # amplitude as the world counts it (`physics.IMPACT`)


def find_tones(waveform: np.ndarray, sample_rate: int) -> list[Tone]:
    """Tones of a clip in order of time.

    Args:
      waveform: [N, 2] float32 in [-1, 1].
      sample_rate: Hz; at least twice the highest pitch.

    Raises:
      ValueError: another shape, or a sample rate that cannot hold the pitches.
    """
    if waveform.ndim != 2 or waveform.shape[1] != 2:
        raise ValueError(f"the waveform must be [samples, 2], not {list(waveform.shape)}")
    if sample_rate <= 2 * PITCHES[-1]:
        raise ValueError(
            f"tones reach {PITCHES[-1]:g} Hz, so the sample rate must be above "
            f"{2 * PITCHES[-1]:g} Hz, not {sample_rate}"
        )
    bands = _band_amplitudes(waveform, sample_rate)  # [hops, colours, 2]
    total = np.sqrt((bands**2).sum(-1, keepdims=True))
    pulses = _innovation(np.concatenate([bands, total], -1))  # [hops, colours, left right both]
    biases, matched, alike = [], np.zeros_like(pulses), np.zeros_like(pulses)
    for index, colour in enumerate(COLOURS):
        bias, shape = _reference(colour, sample_rate)
        biases.append(bias)
        energy = shape @ shape
        matched[:, index] = ndimage.correlate1d(pulses[:, index], shape, 0, mode="constant")
        matched[:, index] /= energy
        power = ndimage.correlate1d(pulses[:, index] ** 2, np.ones_like(shape), 0, mode="constant")
        alike[:, index] = matched[:, index] * np.sqrt(energy / np.maximum(power, 1e-20))
    left, right, both = np.moveaxis(matched, -1, 0)  # [hops, colours]
    peaks = both == ndimage.maximum_filter1d(both, 2 * round(APART / HOP) + 1, axis=0)
    peaks &= (both > SILENCE) & (alike[..., 2] > ALIKE)
    if not peaks.any():
        return []
    # loud onsets set the scale, so that a clip may be softer as a whole
    peaks &= both > RELATIVE * np.quantile(both[peaks], 0.9)
    around = ndimage.maximum_filter1d(both.max(1), 2 * round(SAME_TIME / HOP) + 1)
    peaks &= both > LEAK * around[:, None]
    tones = []
    for hop, index in np.argwhere(peaks):
        time = float((hop + _vertex(both[:, index], hop)) * HOP - biases[index])
        sides = np.maximum([right[hop, index], left[hop, index]], 0)
        pan = float(np.arctan2(*sides) / (np.pi / 2))
        tones.append(Tone(time, COLOURS[index], pan, float(both[hop, index])))
    return sorted(tones, key=lambda tone: tone.time)


def _vertex(values: np.ndarray, peak: int) -> float:
    """Where between its neighbours a peak is highest, by a parabola; in [-0.5, 0.5]."""
    if not 0 < peak < len(values) - 1:
        return 0.0
    before, at, after = values[peak - 1 : peak + 2]
    bend = before - 2 * at + after
    return 0.0 if bend >= 0 else float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5))


def _band_amplitudes(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Amplitude at each pitch, [hops, colours, 2] float64; hop i is centred on i * HOP seconds."""
    size = round(WINDOW * sample_rate)
    window = np.hanning(size + 1)[:-1]
    time = np.arange(size) / sample_rate
    basis = window[:, None] * np.exp(-2j * np.pi * time[:, None] * np.asarray(PITCHES))
    basis *= 2 / window.sum()  # a sine of amplitude 1 has amplitude 1
    count = int(len(waveform) / (HOP * sample_rate)) + 1
    centres = np.round(np.arange(count) * HOP * sample_rate).astype(int)
    padded = np.pad(waveform, ((size // 2, size), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, size, axis=0)  # [N, 2, size]
    starts = range(0, count, BLOCK)
    parts = [np.abs(views[centres[start : start + BLOCK]] @ basis) for start in starts]
    return np.concatenate(parts).swapaxes(1, 2)


def _innovation(amplitude: np.ndarray) -> np.ndarray:
    """What is new in an amplitude [hops, ...], given what it was a moment ago."""
    delay = round(DELAY / HOP)
    earlier = np.concatenate([np.zeros_like(amplitude[:delay]), amplitude[:-delay]])
    return amplitude - TAIL * earlier[: len(amplitude)]


@functools.lru_cache
def _reference(colour: str, sample_rate: int) -> tuple[float, np.ndarray]:
    """Of a clean tone of level 1: seconds from its onset to its pulse's middle, and the pulse.

    Of medium size; those of other sizes look much the same.
    """
    index, start = COLOURS.index(colour), sample_rate // 5
    samples = tone(PITCHES[index], "medium", sample_rate, start)
    waveform = np.pad(samples, (start, start))[:, None] * np.array([1.0, 0.0])
    pulse = _innovation(_band_amplitudes(waveform, sample_rate)[:, index, 0])
    half = round(PULSE / HOP)
    middle = int(pulse.argmax())
    shape = pulse[middle - half : middle + half + 1]
    matched = np.correlate(pulse, shape, "same")
    peak = int(matched.argmax())
    return (peak + _vertex(matched, peak)) * HOP - start / sample_rate, shape
