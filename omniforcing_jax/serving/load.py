"""How much of the device's time sessions need, and what is left out when that is too much.

The order is: denoising steps, one at a time and of all sessions, down to a stated minimum; then the
queue, in which nobody waits any more. What was left out comes back in the opposite order.
"""

MOST = 0.9  # share of the device's time that sessions may need: the rest is for what is not even
EASY = 0.7  # what they may need with one more step, before it comes back
_NEW = 0.2  # weight of a new measurement


class Load:
    """What blocks cost, as measured, and what is left out because of it.

    Attributes:
      steps: of denoising that each session has now.
      queue_open: whether clients may wait for a place.
    """

    def __init__(self, steps: int = 1, least_steps: int | None = None, costs=None):
        """
        Args:
          steps: of denoising with nothing left out.
          least_steps: that are left at least; None leaves all.
          costs: seconds that a second of a stream takes, by its steps, as far as they are known.

        Raises:
          ValueError: more steps left than there are, or none.
        """
        self.steps = self.most_steps = steps
        self.least_steps = steps if least_steps is None else least_steps
        if not 1 <= self.least_steps <= steps:
            raise ValueError(
                f"at least 1 of {steps} steps must be left, and at most all, not {least_steps}"
            )
        self.queue_open = True
        self._costs: dict[int, float] = dict(costs or {})
        self._spread = 0.0  # mean distance of a block from them, as a share
        self._wait = 0  # blocks before the next change

    @property
    def sheds(self) -> bool:
        """Whether steps may be left out at all."""
        return self.least_steps < self.most_steps

    def measured(self, cost: float, steps: int) -> None:
        """A block of so many steps has taken so many seconds for each of the stream's."""
        before = self._costs[steps] = self._costs.get(steps) or cost
        if before:  # what makes it slower or faster now does so at all numbers of steps
            share = cost / before - 1
            self._costs = {n: known * (1 + _NEW * share) for n, known in self._costs.items()}
            self._spread += _NEW * (abs(share) - self._spread)

    def cost(self, steps: int) -> float:
        """Seconds that a second of a stream takes; 0 as long as nothing was measured.

        What was not measured follows from the nearest number of steps that was: each is a pass, and
        there is one more, the refresh.
        """
        if not self._costs:
            return 0.0
        nearest = min(self._costs, key=lambda known: abs(known - steps))
        return self._costs[nearest] * (steps + 1) / (nearest + 1)

    def slow(self, steps: int) -> float:
        """What few blocks exceed, where `cost` is the mean."""
        return self.cost(steps) * (1 + 2 * self._spread)

    def needed(self, sessions: int, steps: int | None = None) -> float:
        """Share of the device's time that so many sessions need."""
        return sessions * self.cost(self.steps if steps is None else steps)

    def fits(self, sessions: int) -> bool:
        """Whether so many keep their deadlines, with steps left out if need be."""
        return sessions <= 1 or sessions * self.slow(self.least_steps) <= MOST

    def adjust(self, sessions: int, late: bool) -> bool:
        """After each block: leaves something out, or brings it back.

        Args:
          sessions: that have deadlines.
          late: whether the block came after its own.

        Returns:
          Whether `steps` or `queue_open` have changed.
        """
        self._wait -= 1
        if self._wait > 0 or not sessions:
            return False
        needed = self.needed(sessions)
        if needed > MOST or (late and needed > EASY):
            if self.steps > self.least_steps:
                self.steps -= 1
            elif self.queue_open:
                self.queue_open = False
            else:
                return False
        elif not self.queue_open:
            self.queue_open = True
        elif self.steps < self.most_steps and self.needed(sessions, self.steps + 1) < EASY:
            self.steps += 1
        else:
            return False
        self._wait = 3 * sessions
        return True
