"""What the runtime takes on, and what it tells: of each session, and of all of them."""

import dataclasses

from omniforcing_jax.streaming.chunks import Chunk


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a runtime takes on; all times in seconds.

    Attributes:
      sessions: that are stepped side by side.
      waiting: that wait for one of those places; more are refused.
      lead: how far generation runs ahead of playback.
      longest: of one stream; it ends then.
      idle: a client that takes nothing for so long, or is paused for so long, loses its place.

    Raises:
      ValueError: a number below what makes sense.
    """

    sessions: int = 1
    waiting: int = 16
    lead: float = 1.5
    longest: float = 3600.0
    idle: float = 120.0

    def __post_init__(self):
        least = {"sessions": 1, "waiting": 0, "lead": 0.0, "longest": 1.0, "idle": 1.0}
        for name, value in least.items():
            if not value <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {value:g}, not {getattr(self, name)}")


class Full(RuntimeError):
    """No place, and none in the queue."""


@dataclasses.dataclass(frozen=True)
class Queued:
    """The session waits for a place, at this position of the queue, from 1."""

    position: int


@dataclasses.dataclass(frozen=True)
class Opened:
    """The session has its place, and its stream is open."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A block was made.

    Attributes:
      chunk: see `Chunk`.
      seconds: that making it took.
      lead: seconds of the stream that are made and not played yet.
      steps: of denoising that sessions have now.
      late: seconds that playback has stood still for, as the block came too late; 0 in time.
    """

    chunk: Chunk
    seconds: float
    lead: float
    steps: int
    late: float


@dataclasses.dataclass(frozen=True)
class Shed:
    """What is left out under load has changed, for all sessions.

    Attributes:
      steps: of denoising that each has from now on.
      waiting: places in the queue.
    """

    steps: int
    waiting: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A turn could not be applied; the stream goes on without it."""

    problem: str


@dataclasses.dataclass(frozen=True)
class Over:
    """The session is over.

    Attributes:
      reason: why.
      error: if that was one.
      saved: whether it can be taken up again.
    """

    reason: str
    error: BaseException | None = None
    saved: bool = False


Event = Queued | Opened | Made | Shed | Refused | Over


@dataclasses.dataclass
class Figures:
    """Counts since the start, and what is there now."""

    blocks: int = 0
    late_blocks: int = 0
    seconds: float = 0.0  # of making blocks
    host_seconds: float = 0.0  # of them, not spent on waiting for the device
    sessions: int = 0
    waiting: int = 0
    refused: int = 0
    saved: int = 0
    copies: int = 0
    steps: int = 0
    load: float = 0.0  # share of the device's time that the sessions need
    queue_places: int = 0
