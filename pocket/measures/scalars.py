"""Measures of a clip, of a stretch of it, or of many clips together.

    observation = observe(frames, frame_rate, waveform, sample_rate)
    measures = measure(observation, scene=scene_from_caption(prompt))
    measures.scalars()                              # {"offset_ms": 0.3, "miss_rate": 0.0, ...}
    pool([measures, ...]).scalars()                 # of a set of clips
    [measure(observation, start=s, end=s + 5).scalars() for s in range(0, 60, 5)]     # drift

What each scalar means is in `MEANINGS`. One that has nothing to go by is None, but for the rates of
events: where nothing is seen and nothing is heard, nothing is in step.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from omniforcing_jax.blocks import BlockLayout
from pocket.measures import synchrony, tracking
from pocket.measures.observation import Observation
from pocket.measures.onsets import Tone
from pocket.measures.tracking import AIR, Flight, Impact, Track
from pocket.world.physics import Scene, Truth

MEANINGS = {
    "seconds": "length of what was measured",
    "offset_ms": "median of heard minus seen time; positive: the sound is late",
    "abs_offset_ms": "median of its absolute value",
    "miss_rate": "share of impacts seen that are not heard",
    "phantom_rate": "share of tones heard without an impact",
    "unmatched_rate": "misses and phantoms among all events; 1 if nothing happens",
    "seen_per_second": "impacts",
    "heard_per_second": "tones",
    "pitch_right": "share of pairs in which the tone is the ball's own",
    "pan_error": "median difference of pan and place, in widths of the picture",
    "colour_right": "share of the scene's balls that are seen, once each, over all frames",
    "size_right": "share of the scene's balls seen whose size is right",
    "count_right": "share of frames with as many balls as the scene has",
    "prompt_pitch_right": "share of tones heard that belong to balls of the scene",
    "parabola_error": "rms distance of balls in flight from a parabola, heights",
    "gravity": "median acceleration in flight over the world's",
    "energy_spread": "relative spread (interquartile) of a ball's energy between impacts",
    "air_kicks_per_second": "changes of course in mid-air, per ball",
    "vanishings_per_second": "balls, seen for 6 frames or more, that disappear or change colour",
    "colour_changes_per_second": "balls that change colour",
    "speed": "mean of the balls, heights/s",
    "motion": "mean change between frames, levels of 255",
    "flicker": "the same, away from balls",
    "seam_ratio": "second difference of frames at block borders over the median elsewhere",
    "seam_flicker_ratio": "change at block borders, away from balls, over the median elsewhere",
    "sound_level_db": "rms of the sound, full scale is 0",
}
GRAVITY_FRAMES = 7  # of flight over which acceleration is fitted
QUANTISATION = 0.25  # levels: added to background changes, which may be exactly 0
SAME_BALL = 0.2  # heights and
SAME_MOMENT = 6  # frames within which a vanished ball of one colour may come back in another


@dataclasses.dataclass(frozen=True)
class Measures:
    """What `scalars` are computed from: sums and lists that can be put together."""

    seconds: float
    ball_seconds: float  # length times the balls of the scene
    offsets: np.ndarray  # [pairs] seconds, heard minus seen
    pitch_right: np.ndarray  # [pairs]
    pan_errors: np.ndarray  # [pairs] heard minus seen, in widths
    misses: int  # events without a partner
    phantoms: int
    balls_right: np.ndarray  # [frames * balls] whether a ball of the scene is seen, once
    sizes_right: np.ndarray  # [balls seen]
    count_right: np.ndarray  # [frames]
    prompted: np.ndarray  # [tones] whether it belongs to a ball of the scene
    errors: np.ndarray  # [flights] mean square error
    flight_frames: np.ndarray  # [flights] length
    gravity: np.ndarray  # [places in flights] over the world's
    energy_spreads: np.ndarray  # [balls]
    air_kicks: int
    vanishings: int
    colour_changes: int
    speeds: np.ndarray  # heights/s
    motion: np.ndarray  # [frames], as the next two
    flicker: np.ndarray
    power: np.ndarray
    seams: np.ndarray  # jerk at borders of blocks, and elsewhere
    elsewhere: np.ndarray
    seam_flicker: np.ndarray  # flicker likewise
    flicker_elsewhere: np.ndarray

    def scalars(self) -> dict[str, float | None]:
        """By the names in `MEANINGS`."""
        pairs = len(self.offsets)
        power = float(_mean(self.power) or 0.0)
        total_frames = self.flight_frames.sum()
        error = (self.errors * self.flight_frames).sum() / total_frames if total_frames else None

        def unpaired(number: int) -> float:
            return number / (pairs + number) if pairs + number else 1.0

        values = {
            "seconds": self.seconds,
            "offset_ms": _median(self.offsets * 1e3),
            "abs_offset_ms": _median(np.abs(self.offsets) * 1e3),
            "miss_rate": unpaired(self.misses),
            "phantom_rate": unpaired(self.phantoms),
            "unmatched_rate": unpaired(self.misses + self.phantoms),
            "seen_per_second": (pairs + self.misses) / self.seconds,
            "heard_per_second": (pairs + self.phantoms) / self.seconds,
            "pitch_right": _mean(self.pitch_right),
            "pan_error": _median(np.abs(self.pan_errors)),
            "colour_right": _mean(self.balls_right),
            "size_right": _mean(self.sizes_right),
            "count_right": _mean(self.count_right),
            "prompt_pitch_right": _mean(self.prompted),
            "parabola_error": None if error is None else error**0.5,
            "gravity": _median(self.gravity),
            "energy_spread": _mean(self.energy_spreads),
            "air_kicks_per_second": self.air_kicks / max(self.ball_seconds, 1e-9),
            "vanishings_per_second": self.vanishings / self.seconds,
            "colour_changes_per_second": self.colour_changes / self.seconds,
            "speed": _mean(self.speeds),
            "motion": _mean(self.motion),
            "flicker": _mean(self.flicker),
            "seam_ratio": _ratio(self.seams, self.elsewhere, 0.0),
            "seam_flicker_ratio": _ratio(self.seam_flicker, self.flicker_elsewhere, QUANTISATION),
            "sound_level_db": 10 * np.log10(max(power, 1e-12)),
        }
        return {name: None if x is None else float(x) for name, x in values.items()}


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _ratio(at: np.ndarray, elsewhere: np.ndarray, floor: float) -> float | None:
    if not len(at) or not len(elsewhere) or not np.median(elsewhere) + floor:
        return None
    return float((np.mean(at) + floor) / (np.median(elsewhere) + floor))


def block_borders(layout: BlockLayout, num_frames: int) -> list[int]:
    """First pixel frame of every block but the first."""
    firsts = map(layout.pixel_frames, itertools.count(1))
    return list(itertools.takewhile(lambda frame: frame < num_frames, firsts))


def measure(
    observation: Observation,
    *,
    scene: Scene | None = None,
    start: float = 0.0,
    end: float | None = None,
    layout: BlockLayout | None = None,
) -> Measures:
    """Measures a clip, or a stretch of it.

    Args:
      observation: of the whole clip.
      scene: what should be seen and heard; None takes the balls that are there most of the time.
      start, end: seconds; None ends with the clip.
      layout: at whose block borders seams are looked for; None looks for none.

    Raises:
      ValueError: an empty stretch.
    """
    o = observation
    end = o.seconds if end is None else min(end, o.seconds)
    first, last = round(start * o.frame_rate), round(end * o.frame_rate)
    if last <= first or first < 0:
        raise ValueError(f"{start} to {end} s is no stretch of a clip of {o.seconds:.2f} s")
    part = slice(first, last)

    def inside(event: Impact | Tone) -> bool:
        return start <= event.time < end

    pairs = [pair for pair in o.matching.pairs if inside(pair[0])]
    balls = [t for t in o.tracks if (t.blobs > 0).mean() > 0.5] if scene is None else scene
    colours, sizes = [ball.colour for ball in balls], [ball.size for ball in balls]
    tracks = {t.colour: t for t in o.tracks if t.blobs[part].any()}
    none_seen = np.zeros(last - first, int)
    blobs = {c: tracks[c].blobs[part] if c in tracks else none_seen for c in colours}
    total = sum((t.blobs[part] for t in tracks.values()), none_seen)
    aspect = o.size[1] / o.size[0]
    flights = [(f, c) for c, fs in o.flights.items() for f in fs if first <= f.start < last]
    long = [f for f, _ in flights if f.end - f.start >= 4]
    vanishings, colour_changes = _vanishings(o, first, last)
    borders = np.array([b for b in block_borders(layout, o.num_frames) if first <= b < last]
                       if layout else [], int)  # fmt: skip
    others = np.setdiff1d(np.arange(max(first, 2), last), borders)
    return Measures(
        seconds=(last - first) / o.frame_rate,
        ball_seconds=(last - first) / o.frame_rate * len(colours),
        offsets=np.array([tone.time - impact.time for impact, tone in pairs]),
        pitch_right=np.array([tone.colour == impact.colour for impact, tone in pairs]),
        pan_errors=np.array([tone.pan - impact.x / aspect for impact, tone in pairs]),
        misses=sum(map(inside, o.matching.misses)),
        phantoms=sum(map(inside, o.matching.phantoms)),
        balls_right=np.concatenate([[], *(blobs[c] == 1 for c in colours)]),
        sizes_right=np.array([_size(tracks[c], part) == s
                              for c, s in zip(colours, sizes, strict=True) if c in tracks]),
        count_right=total == len(colours),
        prompted=np.array([tone.colour in colours for tone in o.tones if inside(tone)]),
        errors=np.array([f.residual**2 for f in long]),
        flight_frames=np.array([f.end - f.start for f in long]),
        gravity=_gravity(o, tracks, part),
        energy_spreads=_energy_spreads(flights),
        air_kicks=sum(i.surface == AIR for i in o.impacts if inside(i)),
        vanishings=vanishings,
        colour_changes=colour_changes,
        speeds=_speeds(tracks, part, o.frame_rate),
        motion=_finite(o.motion[part]),
        flicker=_finite(o.flicker[part]),
        power=o.power[part],
        seams=_finite(o.jerk[borders]),  # frame 1, where a prefix ends, has no second difference
        elsewhere=o.jerk[others] if len(borders) else np.array([]),
        seam_flicker=o.flicker[borders],
        flicker_elsewhere=o.flicker[others] if len(borders) else np.array([]),
    )  # fmt: skip


def pool(parts: Sequence[Measures]) -> Measures:
    """Measures of several clips or stretches as one.

    Raises:
      ValueError: there are none.
    """
    if not parts:
        raise ValueError("there are no measures to pool")

    def join(values: list):
        return np.concatenate(values) if isinstance(values[0], np.ndarray) else sum(values)

    names = [field.name for field in dataclasses.fields(Measures)]
    return Measures(**{name: join([getattr(part, name) for part in parts]) for name in names})


def windows(observation: Observation, seconds: float, **kwargs) -> list[Measures]:
    """Measures of one stretch of `seconds` after the other; a rest below half of one is left out.

    Args:
      observation: of a long clip.
      seconds: length of a stretch.
      **kwargs: of `measure`.
    """
    count = max(1, int(observation.seconds / seconds + 0.5))
    return [
        measure(observation, start=i * seconds, end=(i + 1) * seconds, **kwargs)
        for i in range(count)
    ]


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _size(track: Track, part: slice) -> str:
    return dataclasses.replace(track, radii=track.radii[part]).size


def _speeds(tracks: dict[str, Track], part: slice, frame_rate: float) -> np.ndarray:
    """Of all balls in all frames, heights/s."""
    steps = [np.hypot(*np.diff(t.positions[part], axis=0).T) * frame_rate for t in tracks.values()]
    return _finite(np.concatenate([[], *steps]))


def _gravity(o: Observation, tracks: dict[str, Track], part: slice) -> np.ndarray:
    """Acceleration downwards, over the world's, wherever a ball touches nothing for a while."""
    time = (np.arange(GRAVITY_FRAMES) - (GRAVITY_FRAMES - 1) / 2) / o.frame_rate
    bend = time**2 - (time**2).mean()
    found = [np.array([])]
    for colour, track in tracks.items():
        y = track.positions[part, 1]
        if len(y) < GRAVITY_FRAMES:
            continue
        frames = np.lib.stride_tricks.sliding_window_view(y, GRAVITY_FRAMES)  # [places, frames]
        values = 2 * (frames @ bend) / (bend @ bend) / o.config.gravity
        bounces = [i for i in o.impacts if i.colour == colour and i.surface != AIR]
        hits = np.array([impact.time * o.frame_rate for impact in bounces])
        starts = np.arange(len(frames)) + part.start
        hit = (hits > starts[:, None] - 1) & (hits < starts[:, None] + GRAVITY_FRAMES)
        found.append(_finite(values[~hit.any(1)]))
    return np.concatenate(found)


def _energy_spreads(flights: list[tuple[Flight, str]]) -> np.ndarray:
    """Interquartile range over median of the energies of each ball with four flights or more."""
    spreads = []
    for colour in dict.fromkeys(colour for _, colour in flights):
        energies = [f.energy for f, own in flights if own == colour and f.end - f.start >= 4]
        if len(energies) >= 4:
            low, middle, high = np.quantile(energies, (0.25, 0.5, 0.75))
            spreads.append((high - low) / max(middle, 1e-3))
    return np.array(spreads)


def _vanishings(o: Observation, first: int, last: int) -> tuple[int, int]:
    """How many balls disappear in frames [first, last), and how many of them change colour."""
    starts, ends = [], []  # (frame, colour, place)
    for track in o.tracks:
        for a, b in tracking.visible_runs(track.positions):
            if a > 0:
                starts.append((a, track.colour, track.positions[a]))
            if b < o.num_frames:
                ends.append((b, track.colour, track.positions[b - 1]))
    ends = [end for end in ends if first <= end[0] < last]

    def returns(end: int, colour: str, place: np.ndarray) -> bool:
        return any(
            colour != new
            and abs(begin - end) <= SAME_MOMENT
            and np.hypot(*(place - there)) < SAME_BALL
            for begin, new, there in starts
        )

    return len(ends), sum(itertools.starmap(returns, ends))


def compare_with_truth(observation: Observation, truth: Truth) -> dict[str, float | None]:
    """How far what is seen and heard is from what really happens, e.g. after a decoder.

    Args:
      observation: of a clip.
      truth: about it; at least as long.

    Returns:
      position_error_px: rms over balls and frames in which they are seen, in pixels of the truth;
      position_seen: share of these frames;
      seen_offset_ms, heard_offset_ms: median of measured minus true time;
      seen_unmatched_rate, heard_unmatched_rate: misses and phantoms among events.
    """
    height = observation.size[0]
    tracks = {track.colour: track for track in observation.tracks}
    errors, count = [], 0
    for ball, path in zip(truth.scene, truth.trajectories.swapaxes(0, 1), strict=True):
        count += observation.num_frames
        if ball.colour in tracks:
            seen = tracks[ball.colour].positions * height
            errors.append(_finite(((seen - path[: len(seen)]) ** 2).sum(1)))
    squares = np.concatenate([[], *errors])
    scene = truth.scene
    tones = [
        Tone(float(row["time"]), scene[row["ball"]].colour, float(row["pan"]), float(row["level"]))
        for row in truth.tones
        if row["time"] < observation.seconds
    ]
    result = {
        "position_error_px": float(squares.mean() ** 0.5) if len(squares) else None,
        "position_seen": len(squares) / count,
    }
    for name, events in (("seen", observation.impacts), ("heard", observation.tones)):
        found = synchrony.match(events, tones, observation.seconds)
        unmatched = len(found.misses) + len(found.phantoms)
        offsets = np.array([event.time - tone.time for event, tone in found.pairs])
        result[f"{name}_offset_ms"] = _median(offsets * 1e3)
        result[f"{name}_unmatched_rate"] = unmatched / max(unmatched + len(found.pairs), 1)
    return result
