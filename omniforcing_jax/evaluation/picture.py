"""Measures of a clip's picture that need no weights.

Every one is shown beside `motion`: a still picture has no flicker, no seams and no drift, and would
win each of them.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

THUMBNAIL = 32  # cells of the longer side of a thumbnail
STILL = 0.05  # levels of 255: a thumbnail that changes less from one frame to the next stands still
SHORTEST_LOOP = 0.5  # seconds


@dataclasses.dataclass(frozen=True)
class PictureStatistics:
    """What the measures need of a clip, so that it is read once and never held as a whole.

    Attributes:
      changes: [T - 1] mean absolute difference of one frame to the next, in levels of 255.
      thumbnails: [T, h, w, 3] float32, means of the frames' cells, in levels of 255.
      frame_rate: frames per second.
    """

    changes: np.ndarray
    thumbnails: np.ndarray
    frame_rate: float


def picture_statistics(frames: Iterable[np.ndarray], frame_rate: float) -> PictureStatistics:
    """Goes once through the frames, [H, W, 3] uint8, all of one size.

    Raises:
      ValueError: fewer than two frames.
    """
    changes, thumbnails, previous = [], [], None
    for frame in frames:
        if previous is not None:
            changes.append(np.abs(frame.astype(np.int16) - previous).mean())
        previous = frame
        thumbnails.append(_thumbnail(frame))
    if len(thumbnails) < 2:
        raise ValueError(f"a clip of {len(thumbnails)} frames has no motion; take two or more")
    return PictureStatistics(np.array(changes), np.stack(thumbnails), frame_rate)


def measure_picture(
    statistics: PictureStatistics, borders: Sequence[int] = ()
) -> dict[str, float | None]:
    """All measures of one clip.

    Args:
      statistics: of its frames.
      borders: indices of the first frame of each block but the first, for the seams.

    Returns:
      motion: mean absolute change of the thumbnails per second, in levels of 255.
      still: share of the steps from frame to frame that are still.
      temporal_flickering: VBench's, (255 - mean absolute change of a frame) / 255.
      seams: mean change over a block border by the median change elsewhere; 1 is no seam. None
        without borders, or where nothing else changes.
      brightness_drift, contrast_drift, saturation_drift: straight line through the clip, in levels
        of 255 per minute.
      repetition: see `repetition`.
    """
    frame_rate, changes = statistics.frame_rate, statistics.changes
    thumbnails = statistics.thumbnails
    steps = np.abs(np.diff(thumbnails, axis=0)).mean((1, 2, 3))  # [T - 1]
    grey = thumbnails.mean(-1)  # [T, h, w]
    colours = thumbnails.max(-1) - thumbnails.min(-1)
    return {
        "motion": float(steps.mean() * frame_rate),
        "still": float((steps < STILL).mean()),
        "temporal_flickering": float((255 - changes.mean()) / 255),
        "seams": ratio_at(changes, [border - 1 for border in borders]),
        "brightness_drift": slope(grey.mean((1, 2)), frame_rate),
        "contrast_drift": slope(grey.std((1, 2)), frame_rate),
        "saturation_drift": slope(colours.mean((1, 2)), frame_rate),
        "repetition": repetition(thumbnails.reshape(len(thumbnails), -1), frame_rate),
    }


def ratio_at(values: np.ndarray, places: Sequence[int]) -> float | None:
    """`ratio` of the values [T] at some places to the others."""
    at = np.zeros(len(values), bool)
    at[[place for place in places if 0 <= place < len(values)]] = True
    return ratio(values[at], values[~at])


def ratio(values: np.ndarray, others: np.ndarray) -> float | None:
    """Mean of the values by the median of the others; None if there are none, or all are 0."""
    if not len(values) or not len(others) or (median := np.median(others)) <= 0:
        return None
    return float(np.mean(values) / median)


def slope(values: np.ndarray, rate: float) -> float:
    """Change per minute of the least-squares line through values [T] taken `rate` times a second.

    A block or two of a moving picture has a slope too: compare clips of one length.
    """
    minutes = np.arange(len(values)) / (60 * rate)
    return float(np.polyfit(minutes, values, 1)[0])


def repetition(features: np.ndarray, rate: float) -> float | None:
    """How exactly a clip returns to what it was: 1 for a loop, near 0 for one that goes on.

    d(l) is the mean absolute difference of the features [T, D] to those l steps later; the result
    is 1 - min d / median d over lags of half a second to half of the clip. A clip that stands
    still, or has fewer than eight such lags, gives None.
    """
    lags = range(math.ceil(SHORTEST_LOOP * rate), len(features) // 2 + 1)
    if len(lags) < 8:
        return None
    distance = [np.abs(features[lag:] - features[:-lag]).mean() for lag in lags]
    median = np.median(distance)
    return float(1 - np.min(distance) / median) if median > 1e-6 else None


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [h, w, 3] float32, of cells that are equally large but for one pixel."""
    height, width, _ = frame.shape
    scale = min(1.0, THUMBNAIL / max(height, width))
    rows, columns = (
        np.linspace(0, n, max(1, round(n * scale)) + 1).astype(int) for n in (height, width)
    )
    sums = np.add.reduceat(frame.astype(np.float32), rows[:-1], axis=0)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    return sums / (np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None])
