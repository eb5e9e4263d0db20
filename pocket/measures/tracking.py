"""What is seen: balls by the colours of the palette, and their impacts.

The world is grey but for its balls, so a ball is a blob of chroma of one hue. Between impacts
x and y - g t² / 2 are straight lines of time; a track is cut into such lines by dynamic programming
(optimal partitioning with a price per piece), and two adjacent lines meet at an impact, which
gives its time between the frames.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from pocket.world.physics import COLOURS, FLOOR, RADII, RGB, SIZES, WorldConfig

AIR = "air"  # where a ball changed its course without touching anything
VISIBLE = 0.35  # share of the palette's chroma that makes a pixel part of a blob
MIN_AREA = 0.35  # of a small ball, for a blob to count as a ball
REACH = 0.06  # heights between a ball and what it is taken to have hit
MAX_GAP = 3  # frames a ball may be lost without its track being cut
MAX_FLIGHT = 2.0  # seconds; longer flights are cut, and joined again as nothing happens there
MIN_RUN = 6  # frames a track must last to be searched for impacts
PIECE_PRICE = 14.0  # of a piece, in variances of the positions' noise
MIN_NOISE = 0.002  # heights: of the positions; codecs and edges give about that
QUARTILE = 0.3186  # of the absolute value of a normal variable
STILL = 0.02  # heights a ball must move around an impact
SEARCH_CHUNK = 256  # frames segmented at a time, to bound memory


@dataclasses.dataclass(frozen=True)
class Track:
    """Where the ball of one colour is."""

    colour: str  # one of `COLOURS`
    positions: np.ndarray  # [F, 2] heights, centre (x, y); NaN where it is not seen
    radii: np.ndarray  # [F] heights, NaN likewise
    blobs: np.ndarray  # [F] int, how many balls of this colour are seen

    @property
    def radius(self) -> float:
        """The usual one, in heights."""
        return float(np.nanmedian(self.radii))

    @property
    def size(self) -> str:
        """The size it comes nearest to."""
        return SIZES[int(np.argmin(np.abs(np.log(np.asarray(RADII) / self.radius))))]


@dataclasses.dataclass(frozen=True)
class Impact:
    """An impact seen in a track."""

    time: float  # seconds from the first frame
    colour: str  # of the ball
    x: float  # its centre, heights
    y: float
    speed: float  # half the change of its velocity, heights/s
    surface: str  # one of `physics.SURFACES`, or `AIR`


@dataclasses.dataclass(frozen=True)
class Flight:
    """A piece of a track between impacts."""

    start: int  # frame
    end: int  # frame, exclusive
    residual: float  # rms distance in heights from the best parabola under the world's gravity
    energy: float  # kinetic and potential, per mass, in heights²/s², above rest on the floor


def hue_shares(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of a palette colour is in each pixel of frames [F, H, W, 3] uint8.

    Returns:
      Index of the colour that is nearest in hue, [F, H, W] int8, and the pixel's chroma along it
      as a share of the colour's own, [F, H, W] float32.
    """
    palette = np.asarray(RGB, np.float32)
    palette = palette - palette.mean(1, keepdims=True)
    strength = np.linalg.norm(palette, axis=1)  # [colours]
    pixels = frames.astype(np.float32)
    pixels -= pixels.mean(-1, keepdims=True)
    along = pixels @ (palette / strength[:, None]).T  # [F, H, W, colours]
    nearest = along.argmax(-1)
    share = np.take_along_axis(along, nearest[..., None], -1)[..., 0] / strength[nearest]
    return nearest.astype(np.int8), share


def track_balls(frames: np.ndarray) -> list[Track]:
    """Follows the balls of a clip, one track per colour that is seen.

    Args:
      frames: [F, H, W, 3] uint8 RGB.

    Returns:
      Tracks in the order of `COLOURS`; of several blobs of a colour the largest is followed.
    """
    pieces = []
    for start in range(0, len(frames), SEARCH_CHUNK):
        nearest, share = hue_shares(frames[start : start + SEARCH_CHUNK])
        own = (np.where(nearest == index, share, 0.0) for index in range(len(COLOURS)))
        pieces.append([_locate(shares) for shares in own])
    tracks = [
        Track(colour, *map(np.concatenate, zip(*parts, strict=True)))
        for colour, parts in zip(COLOURS, zip(*pieces, strict=True), strict=True)
    ]
    return [track for track in tracks if track.blobs.any()]


def _locate(share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest blob of one colour in each frame; its share [F, H, W] is 0 in pixels of other hues.

    Returns:
      Positions [F, 2] and radii [F] in heights, NaN where there is none, and numbers of blobs [F].
    """
    num_frames, height, _ = share.shape
    positions, radii = np.full((num_frames, 2), np.nan), np.full(num_frames, np.nan)
    blobs = np.zeros(num_frames, int)
    min_area = MIN_AREA * np.pi * (RADII[0] * height) ** 2  # pixels
    visible = share > VISIBLE
    if visible.sum((1, 2)).max() < min_area:
        return positions, radii, blobs
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = True
    labels, count = ndimage.label(visible, in_plane)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    f, y, x = np.nonzero(visible)
    owner = labels[f, y, x] - 1
    mass = np.bincount(owner, minlength=count)
    frame_of = np.bincount(owner, f, count) / mass
    centre = np.stack([np.bincount(owner, axis, count) / mass for axis in (x, y)], -1)
    large = np.flatnonzero(areas >= min_area)
    for blob in large[np.argsort(areas[large], kind="stable")]:  # the largest comes last, and stays
        frame = int(frame_of[blob])
        blobs[frame] += 1
        positions[frame] = centre[blob]
        radii[frame] = np.sqrt(areas[blob] / np.pi)
    seen = np.flatnonzero(blobs)
    if len(seen):
        positions[seen], radii[seen] = _refine(share[seen], positions[seen], radii[seen])
    return positions / height, radii / height, blobs


def _refine(
    share: np.ndarray, centres: np.ndarray, radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighs soft edges in: centres and radii in pixels; blur and codecs spread a ball's chroma."""
    reach = int(np.ceil(radii.max())) + 3
    padded = np.pad(share, ((0, 0), (reach, reach + 1), (reach, reach + 1)))
    offsets = np.arange(-reach, reach + 1)
    corner = np.round(centres).astype(int)[:, :, None] + offsets  # [F, 2, patch]
    frame = np.arange(len(share))[:, None, None]
    patch = padded[frame, corner[:, 1, :, None] + reach, corner[:, 0, None, :] + reach]
    away = corner - centres[:, :, None]
    near = away[:, 0, None, :] ** 2 + away[:, 1, :, None] ** 2 < (radii + 2.5)[:, None, None] ** 2
    weight = np.where(near & (patch > 0.08), np.minimum(patch, 1.2), 0.0)
    total = weight.sum((1, 2))
    x = (weight.sum(1) * corner[:, 0]).sum(1) / total
    y = (weight.sum(2) * corner[:, 1]).sum(1) / total
    # a ball of paler colour is not a smaller one
    peak = np.clip(np.quantile(patch.reshape(len(patch), -1), 0.95, axis=1), 0.5, 1.0)
    return np.stack([x, y], -1) + 0.5, np.sqrt(total / peak / np.pi)


def find_impacts(
    tracks: list[Track], frame_rate: float, aspect: float, config: WorldConfig
) -> tuple[list[Impact], dict[str, list[Flight]]]:
    """Cuts tracks into flights.

    Args:
      tracks: of `track_balls`.
      frame_rate: frames per second.
      aspect: width of the picture in heights.
      config: the world.

    Returns:
      All changes of course in order of time, soft ones and those in close succession included (see
      `audible`), and the flights of every colour.
    """
    impacts, flights = [], {}
    for track in tracks:
        flights[track.colour] = []
        for start, end in visible_runs(track.positions):
            run = track.positions[start:end]
            pieces = _partition(run, frame_rate, config.gravity)
            fits = [_fit(run[a:b], frame_rate, config.gravity) for a, b in pieces]
            for (a, b), fit in zip(pieces, fits, strict=True):
                if fit is not None:
                    height = FLOOR - track.radius - fit.place[1]
                    energy = float(0.5 * (fit.velocity**2).sum() + config.gravity * height)
                    flights[track.colour].append(Flight(start + a, start + b, fit.rms, energy))
            for (piece, before), (_, after) in itertools.pairwise(zip(pieces, fits, strict=True)):
                impact = _meet(run, piece, before, after, frame_rate, config.gravity)
                if impact is None:
                    continue
                time, place, change = impact
                time += start / frame_rate
                surface = _surface(track, tracks, place, change, time * frame_rate, aspect)
                speed = float(np.hypot(*change)) / 2
                impacts.append(Impact(time, track.colour, *map(float, place), speed, surface))
    return sorted(impacts, key=lambda impact: impact.time), flights


def audible(impacts: list[Impact], config: WorldConfig) -> list[Impact]:
    """Those that strike a tone by the rules of the world: hard enough, and after a pause."""
    last, kept = {}, []
    for impact in impacts:
        pause = impact.time - last.get(impact.colour, -np.inf)
        if impact.speed >= config.audible_speed and pause >= config.dead_time:
            last[impact.colour] = impact.time
            kept.append(impact)
    return kept


def visible_runs(positions: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of frames in which a ball is seen with short gaps at most."""
    seen = np.flatnonzero(np.isfinite(positions[:, 0]))
    if not len(seen):
        return []
    cuts = np.flatnonzero(np.diff(seen) > MAX_GAP + 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(seen, cuts)]
    return [(start, end) for start, end in runs if end - start >= MIN_RUN]


def _straighten(x: np.ndarray, frame_rate: float, gravity: float) -> np.ndarray:
    """Takes the fall out of windows of positions [..., L, 2], time counted from their starts."""
    time = np.arange(x.shape[-2]) / frame_rate
    return x - np.stack([0 * time, 0.5 * gravity * time**2], -1)


def _partition(run: np.ndarray, frame_rate: float, gravity: float) -> list[tuple[int, int]]:
    """Cuts a run [L, 2] into flights [a, b) such that squared errors and prices are least."""
    length = len(run)
    seen = np.isfinite(run[:, 0])
    filled = np.stack(
        [np.interp(np.arange(length), np.flatnonzero(seen), axis[seen]) for axis in run.T], -1
    )
    price = PIECE_PRICE * max(_noise(filled, frame_rate, gravity), MIN_NOISE) ** 2
    longest = min(length, round(MAX_FLIGHT * frame_rate))
    cost = np.full((longest + 1, length + 1), np.inf)  # [pieces' length, their end]
    cost[1, 1:] = cost[2, 2:] = 0.0
    for size in range(3, longest + 1):
        windows = np.lib.stride_tricks.sliding_window_view(filled, size, axis=0)
        windows = _straighten(windows.swapaxes(1, 2), frame_rate, gravity)  # [starts, size, 2]
        windows = windows - windows.mean(1, keepdims=True)
        time = np.arange(size) - (size - 1) / 2
        slope = np.einsum("t,stc->sc", time, windows) / (time**2).sum()
        squares = (windows**2).sum((1, 2)) - (slope**2).sum(1) * (time**2).sum()
        cost[size, size:] = np.maximum(squares, 0)
    best, sizes = np.zeros(length + 1), np.zeros(length + 1, int)
    for end in range(1, length + 1):
        options = np.arange(1, min(end, longest) + 1)
        totals = best[end - options] + cost[options, end] + price
        choice = int(totals.argmin())
        best[end], sizes[end] = totals[choice], options[choice]
    pieces, end = [], length
    while end:
        pieces.append((end - int(sizes[end]), end))
        end -= int(sizes[end])
    return pieces[::-1]


def _noise(run: np.ndarray, frame_rate: float, gravity: float) -> float:
    """Standard deviation of the positions' errors, from what is not a parabola of a few frames.

    The lower quartile, since impacts lie in many of them; and at two distances, since errors of
    neighbouring frames may be alike.
    """
    levels = [0.0]
    for step in (1, 2):
        if len(run) > 2 * step:
            bend = run[2 * step :] - 2 * run[step:-step] + run[: -2 * step]
            bend = bend - np.array([0, gravity * (step / frame_rate) ** 2])
            levels.append(float(np.quantile(np.abs(bend), 0.25)) / (QUARTILE * np.sqrt(6)))
    return max(levels)


class _Fit(NamedTuple):
    """A parabola: place and velocity at its first frame, and the rms error."""

    place: np.ndarray
    velocity: np.ndarray
    rms: float


def _fit(piece: np.ndarray, frame_rate: float, gravity: float) -> _Fit | None:
    """The parabola that fits a piece [L, 2] best; None if it was seen less than twice."""
    seen = np.isfinite(piece[:, 0])
    if seen.sum() < 2:
        return None
    time = np.arange(len(piece))[seen] / frame_rate
    straight = _straighten(piece, frame_rate, gravity)[seen]
    design = np.stack([np.ones_like(time), time], -1)
    line, *_ = np.linalg.lstsq(design, straight, rcond=None)
    rms = float(np.sqrt(((straight - design @ line) ** 2).sum(1).mean()))
    return _Fit(line[0], line[1], rms)


def _meet(
    run: np.ndarray,
    piece: tuple[int, int],
    before: _Fit | None,
    after: _Fit | None,
    frame_rate: float,
    gravity: float,
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """Where a piece [a, b) and the next one meet: time since the run's start, place, change of
    velocity. None where a ball that does not move was cut, or a piece is a single frame.
    """
    a, b = piece
    around = run[max(b - 4, 0) : b + 4]
    still = np.nanmax(np.ptp(around[np.isfinite(around[:, 0])], axis=0)) < STILL
    if still or before is None or after is None:
        return None
    # both at the first frame of the later flight; gravity drops out of the difference
    lead = (b - a) / frame_rate
    fall = np.array([0, gravity])
    place = before.place + before.velocity * lead + 0.5 * fall * lead**2
    velocity = before.velocity + fall * lead
    change = after.velocity - velocity
    if not (change**2).sum():
        return None
    since = -float((after.place - place) @ change / (change @ change))
    since = float(np.clip(since, -1.5 / frame_rate, 0.5 / frame_rate))
    where = place + velocity * since + 0.5 * fall * since**2
    return b / frame_rate + since, where, change


def _surface(track: Track, tracks: list[Track], place, change, frame: float, aspect: float) -> str:
    """What a ball touched that can have changed its velocity so."""
    x, y = place
    r = track.radius
    # distance to a surface, and the direction into which it pushes
    options = {
        "floor": (FLOOR - r - y, (0, -1)),
        "ceiling": (y - r, (0, 1)),
        "left": (x - r, (1, 0)),
        "right": (aspect - r - x, (-1, 0)),
    }
    for other in tracks:
        if other is track:
            continue
        near = other.positions[max(int(frame), 0) : int(frame) + 2]
        apart = place - near[np.isfinite(near[:, 0])]
        if len(apart):
            apart = apart[np.argmin((apart**2).sum(1))]
            distance = float(np.hypot(*apart))
            push = tuple(apart / max(distance, 1e-9))
            options[f"ball {other.colour}"] = (distance - r - other.radius, push)
    pushed = change / np.hypot(*change)
    fits = {
        name: float(pushed @ push) - max(distance, 0) / REACH
        for name, (distance, push) in options.items()
        if distance < REACH and pushed @ push > 0.3
    }
    return max(fits, key=fits.get).split()[0] if fits else AIR
