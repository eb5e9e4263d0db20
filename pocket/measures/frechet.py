"""How far two sets of clips are apart: Fréchet distance on features that are computed, not learnt.

Every clip is described by colours, motion, impacts and the spectrum of its sound; the sets are
compared as Gaussians, as the Fréchet inception distance does with the features of a network. With
few clips it is biased upwards, so compare sets of equal size.
"""

from collections.abc import Sequence

import numpy as np

from omniforcing_jax.evaluation import distances
from pocket.measures.observation import Observation
from pocket.world.physics import COLOURS, SURFACES

BANDS = 12  # of the spectrum, equally wide in mel
LOWEST, HIGHEST = 100.0, 6500.0  # Hz
WINDOW = 512 / 16_000  # seconds
QUIETEST = 1e-4  # amplitude below which sound is silence
# Units of the features, about as much as real clips differ, by the part of the name before "/".
# Fixed ones: what hardly varies in real clips would weigh without bound in units of its spread.
UNITS = {
    **{"seen": 0.5, "tones": 1.0, "impacts": 0.5, "speed_x": 0.2, "speed_y": 0.2},
    **{"place_x": 0.1, "place_y": 0.1, "radius": 0.02, "change": 0.3, "unmatched": 0.1},
    **{"offset": 0.03, "pan": 0.1, "mel": 1.0},
}
FAINT = 0.3  # levels of 255: changes of frames below do not count


def clip_features(
    observation: Observation, waveform: np.ndarray, sample_rate: int
) -> dict[str, float]:
    """What one clip is like.

    Args:
      observation: of the clip.
      waveform: [N, 2] float32; may be empty.
      sample_rate: Hz.

    Returns:
      Features by name, always the same names, in units of `UNITS`.
    """
    o = observation
    tracks = {track.colour: track for track in o.tracks}
    features = {}
    for colour in COLOURS:
        seen = tracks[colour].blobs > 0 if colour in tracks else np.zeros(1)
        features[f"seen/{colour}"] = float(seen.mean())
        features[f"tones/{colour}"] = sum(t.colour == colour for t in o.tones) / o.seconds
    for surface in (*SURFACES, "air"):
        hits = sum(impact.surface == surface for impact in o.impacts)
        features[f"impacts/{surface}"] = hits / o.seconds
    steps = [np.abs(np.diff(t.positions, axis=0)) * o.frame_rate for t in o.tracks]
    for name, pieces in (("speed", steps), ("place", [t.positions for t in o.tracks])):
        values = np.concatenate([np.zeros((1, 2)), *pieces])
        values = values[np.isfinite(values[:, 0])]
        for axis, column in zip("xy", values.T, strict=True):
            features |= _spread(f"{name}_{axis}", column)
    features["radius"] = float(np.mean([t.radius for t in o.tracks])) if o.tracks else 0.0
    for name, change in (("motion", o.motion), ("jerk", o.jerk), ("flicker", o.flicker)):
        features[f"change/{name}"] = float(np.log(FAINT + np.nanmean(change)))
    offsets = np.array([tone.time - impact.time for impact, tone in o.matching.pairs])
    lone = len(o.matching.misses) + len(o.matching.phantoms)
    features["unmatched"] = lone / max(lone + len(offsets), 1)
    features["offset"] = float(offsets.mean()) if len(offsets) else 0.0
    features |= _spread("pan", np.array([tone.pan for tone in o.tones] or [0.5]))
    for band, levels in enumerate(_spectrum(waveform, sample_rate).T):
        features |= _spread(f"mel/{band}", levels)
    return {name: value / UNITS[name.split("/")[0]] for name, value in features.items()}


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}/mean": float(values.mean()), f"{name}/spread": float(values.std())}


def _spectrum(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Logarithmic power in mel bands over time, [windows, bands] in nepers of amplitude."""
    if not len(waveform):
        return np.full((1, BANDS), np.log(QUIETEST))
    size = round(WINDOW * sample_rate)
    mono = np.pad(waveform.mean(1), (0, size))
    windows = np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) ** 2 / (size / 4) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(size, 1 / sample_rate) / 700)
    ends = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    band = np.floor((mel - ends[0]) / (ends[1] - ends[0]) * BANDS).astype(int)
    sums = np.stack([power[:, band == b].sum(1) for b in range(BANDS)], -1)
    return 0.5 * np.log(sums + QUIETEST**2)


def frechet_distance(
    reference: Sequence[dict[str, float]], other: Sequence[dict[str, float]]
) -> float:
    """Fréchet distance of features, see `evaluation.distances`.

    Args:
      reference: features of real clips, by `clip_features`.
      other: of the clips that are judged.

    Raises:
      ValueError: fewer than two clips in a set.
    """
    names = sorted(reference[0])
    sets = [np.array([[f[name] for name in names] for f in clips]) for clips in (reference, other)]
    return distances.frechet_distance(*sets)
