"""Which impact seen belongs to which tone heard."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pocket.measures.onsets import Tone
from pocket.measures.tracking import AIR, Impact

TOLERANCE = 0.12  # seconds: farther apart, an impact and a tone have nothing to do with each other
WRONG_PITCH = 0.5  # tolerances: of two tones, an impact gets its own, unless it is so much farther
UNMATCHED = 3.0  # tolerances: more than any pair costs, so that as many pairs are made as can be
RESOLUTION = 0.1  # seconds: nearer to an event of the same ball that has a partner, none is needed
EDGE = 0.1  # seconds at both ends of a clip in which an event may be cut off, and lacks no partner


@dataclasses.dataclass(frozen=True)
class Matching:
    """A one-to-one assignment.

    Changes of course in mid-air may be heard but need not be, and are no misses: they are faults of
    the motion, and counted there.
    """

    pairs: tuple[tuple[Impact, Tone], ...]  # in order of the impacts
    misses: tuple[Impact, ...]  # that are seen and not heard
    phantoms: tuple[Tone, ...]  # that are heard while nothing is hit


def match(
    impacts: Sequence[Impact], tones: Sequence[Tone], seconds: float, tolerance: float = TOLERANCE
) -> Matching:
    """Pairs impacts with tones, as many as possible and as near in time as possible.

    Pitch decides between tones only; a tone of another ball's pitch still makes a pair, which
    `scalars` counts as wrong.

    Args:
      impacts: seen, in order of time; or other tones. Changes of course in mid-air need no tone.
      tones: heard.
      seconds: length of the clip.
      tolerance: largest distance in seconds.
    """
    seen = np.array([impact.time for impact in impacts])
    heard = np.array([tone.time for tone in tones])
    distance = np.abs(seen[:, None] - heard[None, :]) / tolerance
    wrong = np.array([[i.colour != t.colour for t in tones] for i in impacts], bool)
    wrong = wrong.reshape(distance.shape)
    cost = np.where(distance <= 1, distance + WRONG_PITCH * wrong, UNMATCHED)
    rows, columns = linear_sum_assignment(cost)
    chosen = [(i, j) for i, j in zip(rows, columns, strict=True) if distance[i, j] <= 1]
    pairs = [(impacts[i], tones[j]) for i, j in chosen]

    def lacking(events: Sequence, number: int, taken: set[int]) -> list:
        """Events without a partner, but for those at the ends and those masked by others."""
        partners = [pair[number] for pair in pairs]
        return [
            event
            for index, event in enumerate(events)
            if index not in taken
            and EDGE <= event.time <= seconds - EDGE
            and not any(
                event.colour == other.colour and abs(event.time - other.time) < RESOLUTION
                for other in partners
            )
        ]

    misses = lacking(impacts, 0, {i for i, _ in chosen})
    return Matching(
        pairs=tuple(pairs),
        misses=tuple(event for event in misses if getattr(event, "surface", None) != AIR),
        phantoms=tuple(lacking(tones, 1, {j for _, j in chosen})),
    )
