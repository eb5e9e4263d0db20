"""Many clips' measures as one table: means, their uncertainty, differences to a reference."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import bootstrap

Values = Mapping[str, float | None]  # of one measure, by clip
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over clips with its confidence interval, by bootstrap over the clips.

    Attributes:
      mean: of the clips that have a value; None if none has.
      low, high: ends of the 95 % interval; None with fewer than three values.
      count: of those clips.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimates from one value per clip."""
        x = np.asarray(values, float)
        if not len(x):
            return cls(None, None, None, 0)
        if len(x) < 3 or np.ptp(x) == 0:
            ends = (float(x[0]),) * 2 if len(x) >= 3 else (None, None)
            return cls(float(x.mean()), *ends, len(x))
        result = bootstrap(
            (x,),
            np.mean,
            confidence_level=CONFIDENCE,
            method="percentile",
            n_resamples=4000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        return cls(float(x.mean()), float(result.low), float(result.high), len(x))


def estimate(values: Values) -> Estimate:
    """Of one measure of one sampler; the same whatever the order of the clips."""
    return Estimate.of([values[n] for n in sorted(values) if values[n] is not None])


def difference(values: Values, reference: Values) -> Estimate:
    """Mean of the differences between clips of one name, which share prompt and seed."""
    names = sorted(n for n in values.keys() & reference.keys())
    pairs = [(values[n], reference[n]) for n in names]
    return Estimate.of([a - b for a, b in pairs if a is not None and b is not None])
