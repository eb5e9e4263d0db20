"""All that is seen and heard in a clip, which is what measures are computed from."""

import dataclasses

import numpy as np

from pocket.measures import synchrony, tracking
from pocket.measures.onsets import Tone, find_tones
from pocket.measures.tracking import Flight, Impact, Track
from pocket.world.physics import WorldConfig

EDGE_BLUR = 0.06  # heights around a ball that are not background


@dataclasses.dataclass(frozen=True)
class Observation:
    """All that is seen and heard in a clip."""

    config: WorldConfig  # the world it was taken for
    frame_rate: float  # frames per second
    num_frames: int  # F
    size: tuple[int, int]  # (height, width) in pixels
    tracks: list[Track]  # of the balls
    impacts: list[Impact]  # that should be heard
    flights: dict[str, list[Flight]]  # between impacts, by colour
    tones: list[Tone]  # that are heard
    matching: synchrony.Matching  # of impacts and tones
    motion: np.ndarray  # [F] mean absolute change since the frame before; NaN for the first
    jerk: np.ndarray  # [F] mean absolute second difference; NaN for the first two
    flicker: np.ndarray  # [F] as `motion`, away from balls
    power: np.ndarray  # [F] mean square of the sound during a frame

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.num_frames / self.frame_rate


def observe(
    frames: np.ndarray,
    frame_rate: float,
    waveform: np.ndarray,
    sample_rate: int,
    config: WorldConfig | None = None,
) -> Observation:
    """Looks at a clip and listens to it.

    Args:
      frames: [F, H, W, 3] uint8 RGB, of the shape of the world's picture in any resolution.
      frame_rate: frames per second.
      waveform: [N, 2] float32 in [-1, 1]; may be empty.
      sample_rate: Hz; of no meaning for an empty waveform.
      config: the world, for its gravity and what is audible; None is `WorldConfig()`.

    Raises:
      ValueError: another shape or dtype, or rates that cannot be.
    """
    config = config or WorldConfig()
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 3:
        raise ValueError(
            f"frames must be uint8 [F, H, W, 3], F >= 3, not {frames.dtype} {list(frames.shape)}"
        )
    if not frame_rate > 0:
        raise ValueError(f"frame_rate must be positive, not {frame_rate}")
    height, width = frames.shape[1:3]
    tracks = tracking.track_balls(frames)
    changes, flights = tracking.find_impacts(tracks, frame_rate, width / height, config)
    impacts = tracking.audible(changes, config)
    tones = find_tones(waveform, sample_rate) if len(waveform) else []
    matching = synchrony.match(impacts, tones, len(frames) / frame_rate)
    return Observation(
        *(config, frame_rate, len(frames), (height, width)),
        *(tracks, impacts, flights, tones, matching),
        *_changes(frames, tracks),
        power=_power(waveform, sample_rate, len(frames), frame_rate),
    )


def _changes(frames: np.ndarray, tracks: list[Track]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Motion, jerk and flicker of `Observation`."""
    motion, jerk, flicker = np.full((3, len(frames)), np.nan)
    empty = _empty(frames.shape[:3], tracks)
    for start in range(0, len(frames), tracking.SEARCH_CHUNK):
        first, end = max(start - 2, 0), min(start + tracking.SEARCH_CHUNK, len(frames))
        step = np.diff(frames[first:end].astype(np.float32), axis=0)
        size = np.abs(step).mean(-1)  # [frames - 1, H, W]
        away = empty[first + 1 : end] & empty[first : end - 1]
        motion[first + 1 : end] = size.mean((1, 2))
        jerk[first + 2 : end] = np.abs(np.diff(step, axis=0)).mean((1, 2, 3))
        flicker[first + 1 : end] = (size * away).sum((1, 2)) / np.maximum(away.sum((1, 2)), 1)
    return motion, jerk, flicker


def _empty(shape: tuple[int, int, int], tracks: list[Track]) -> np.ndarray:
    """Pixels [F, H, W] in which no ball is seen, nor the blur of its edge."""
    _, height, width = shape
    empty = np.ones(shape, bool)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for track in tracks:
        seen = np.flatnonzero(track.blobs)
        across = x[None, None, :] - track.positions[seen, 0, None, None] * height
        down = y[None, :, None] - track.positions[seen, 1, None, None] * height
        reach = (track.radii[seen, None, None] + EDGE_BLUR) * height
        empty[seen] &= across**2 + down**2 > reach**2
    return empty


def _power(
    waveform: np.ndarray, sample_rate: int, num_frames: int, frame_rate: float
) -> np.ndarray:
    if not len(waveform):
        return np.zeros(num_frames)
    edges = np.round(np.arange(num_frames + 1) * sample_rate / frame_rate).astype(int)
    squares = np.concatenate([[0.0], np.cumsum((waveform.astype(np.float64) ** 2).mean(1))])
    return np.diff(squares[np.minimum(edges, len(waveform))]) / np.diff(edges)
