"""How far two sets of clips are apart: Fréchet distance on features that are computed, not learnt.

Every clip is described by colours, motion, impacts and the spectrum of its sound; the sets are
compared as Gaussians, as the Fréchet inception distance does with the features of a network. With
few clips it is biased upwards, so compare sets of equal size.
"""

from collections.abc import Sequence

import numpy as np

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
        track = tracks.get(colour)
        features[f"seen/{colour}"] = float((track.blobs > 0).mean()) if track else 0.0
        features[f"tones/{colour}"] = sum(t.colour == colour for t in o.tones) / o.seconds
    for surface in (*SURFACES, "air"):
        hits = sum(impact.surface == surface for impact in o.impacts)
        features[f"impacts/{surface}"] = hits / o.seconds
    steps = [np.diff(t.positions, axis=0) * o.frame_rate for t in o.tracks]
    velocity = np.concatenate([np.zeros((1, 2)), *steps])
    velocity = np.abs(velocity[np.isfinite(velocity[:, 0])])
    places = np.concatenate([np.zeros((1, 2)), *(t.positions for t in o.tracks)])
    places = places[np.isfinite(places[:, 0])]
    for axis, name in enumerate("xy"):
        features[f"speed_{name}/mean"] = float(velocity[:, axis].mean())
        features[f"speed_{name}/spread"] = float(velocity[:, axis].std())
        features[f"place_{name}/mean"] = float(places[:, axis].mean())
        features[f"place_{name}/spread"] = float(places[:, axis].std())
    features["radius"] = float(np.mean([t.radius for t in o.tracks])) if o.tracks else 0.0
    for name, change in (("motion", o.motion), ("jerk", o.jerk), ("flicker", o.flicker)):
        features[f"change/{name}"] = float(np.log(FAINT + np.nanmean(change)))
    offsets = np.array([tone.time - impact.time for impact, tone in o.matching.pairs])
    lone = len(o.matching.misses) + len(o.matching.phantoms)
    features["unmatched"] = lone / max(lone + len(offsets), 1)
    features["offset"] = float(offsets.mean()) if len(offsets) else 0.0
    pans = np.array([tone.pan for tone in o.tones] or [0.5])
    features["pan/mean"], features["pan/spread"] = float(pans.mean()), float(pans.std())
    features |= _spectrum(waveform, sample_rate)
    return {name: value / UNITS[name.split("/")[0]] for name, value in features.items()}


def _spectrum(waveform: np.ndarray, sample_rate: int) -> dict[str, float]:
    """Mean and spread over time of the logarithmic power in mel bands, in nepers of amplitude."""
    levels = np.full((1, BANDS), np.log(QUIETEST))
    if len(waveform):
        size = round(WINDOW * sample_rate)
        mono = np.pad(waveform.mean(1), (0, size))
        windows = np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2]
        power = np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) ** 2 / (size / 4) ** 2
        mel = 2595 * np.log10(1 + np.fft.rfftfreq(size, 1 / sample_rate) / 700)
        ends = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
        band = np.floor((mel - ends[0]) / (ends[1] - ends[0]) * BANDS).astype(int)
        sums = np.stack([power[:, band == b].sum(1) for b in range(BANDS)], -1)
        levels = 0.5 * np.log(sums + QUIETEST**2)  # [windows, bands]
    features = {f"mel/{b}/mean": float(levels[:, b].mean()) for b in range(BANDS)}
    return features | {f"mel/{b}/spread": float(levels[:, b].std()) for b in range(BANDS)}


def frechet_distance(
    reference: Sequence[dict[str, float]], other: Sequence[dict[str, float]]
) -> float:
    """|μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of features.

    Args:
      reference: features of real clips, by `clip_features`.
      other: of the clips that are judged.

    Raises:
      ValueError: fewer than two clips in a set.
    """
    if min(len(reference), len(other)) < 2:
        raise ValueError(
            f"sets of {len(reference)} and {len(other)} clips have no spread; take 2 or more each"
        )
    names = sorted(reference[0])
    sets = [np.array([[f[name] for name in names] for f in clips]) for clips in (reference, other)]
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in sets)
    # Σ₁ Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_2 @ root), 0)).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * overlap
    return float(max(distance, 0.0))
