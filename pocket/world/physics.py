"""The pocket world: coloured balls that bounce, every impact strikes a tone, and nothing is hidden.

A clip is made from its seed alone, in NumPy: motion (here), picture and sound (`render`), caption
(`captions`), and the truth about all of them.

Between impacts a ball flies on a parabola, so times of impact are roots of polynomials and exact:
balls that fall side by side move relative to each other on straight lines, whatever the gravity.
Floor, walls and ceiling reflect, balls collide elastically with masses that grow with their area.
The floor pulls a ball's speed towards the ball's own (`WorldConfig.restore`): what a collision took
is given back within some bounces, and a clip of any length keeps going.

The unit of length is the height of the picture; x points right, y down, from the top left corner.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# A colour decides a ball's pitch: tones a fifth or more apart, of which no second or third harmonic
# falls on another's fundamental. They are multiples of 100 Hz, the rate of LTX-2's spectrograms:
# each frame then begins in the same phase of a tone, and a vocoder, which cannot see phases, can
# make the tone.
COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
RGB = ((235, 50, 40), (240, 205, 40), (60, 200, 60), (40, 205, 220), (70, 90, 250), (235, 80, 205))
PITCHES = (300.0, 500.0, 800.0, 1300.0, 2100.0, 3400.0)  # Hz
SIZES = ("small", "medium", "large")
RADII = (0.07, 0.1, 0.135)  # heights
SURFACES = ("floor", "left", "right", "ceiling", "ball")
MAX_BALLS = 3
FLOOR = 11 / 12  # y at which the floor begins
LOUDEST_SPEED = 2.8  # heights per second; faster impacts are not louder

# One impact of one ball; a collision of two balls is two impacts.
IMPACT = np.dtype(
    [
        ("time", np.float64),  # seconds from the first frame
        ("ball", np.int64),  # index into the scene
        ("surface", np.int64),  # index into SURFACES
        ("other", np.int64),  # the ball that was hit, or -1
        ("speed", np.float64),  # into the surface, or half the change of velocity; heights/s
        ("x", np.float64),  # centre of the ball, pixels
        ("y", np.float64),
        ("pitch", np.float64),  # Hz
        ("pan", np.float64),  # 0 is left, 1 is right
        ("level", np.float64),  # peak amplitude of the tone, both channels together
        ("rings", np.bool_),  # False: too soft, or too soon after the ball's last tone
    ]
)


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Settings of the world."""

    width: int = 64  # of the picture in pixels; walls are its sides
    height: int = 48
    frame_rate: float = 24.0  # frames per second
    sample_rate: int = 16_000  # of the sound in Hz
    min_balls: int = 1  # of a drawn scene
    max_balls: int = 2
    gravity: float = 5.0  # heights/s²
    restore: float = 0.5  # share of what it lacks of its own speed that a ball gets at the floor
    audible_speed: float = 0.12  # softer impacts are silent, and hardly seen; heights/s
    # seconds after a tone in which the same ball strikes none: in a corner, it hits two surfaces
    dead_time: float = 0.06
    quietest: float = 0.09  # peak amplitudes of tones
    loudest: float = 0.4

    def __post_init__(self):
        if not 1 <= self.min_balls <= self.max_balls <= MAX_BALLS:
            raise ValueError(
                f"min_balls and max_balls must be from 1 to {MAX_BALLS} and in order, not "
                f"{self.min_balls} and {self.max_balls}"
            )
        if self.height < 16 or not 1 <= self.width / self.height <= 4:
            raise ValueError(
                "a picture must be 16 pixels high or more and 1 to 4 times as wide, not "
                f"{self.width} x {self.height}"
            )
        if self.sample_rate < 2 * PITCHES[-1]:
            raise ValueError(f"sample_rate must be above {2 * PITCHES[-1]:g}: {self.sample_rate}")
        if not 0 < self.restore <= 1:
            raise ValueError(f"restore must be above 0 and at most 1, not {self.restore}")
        if not 0 < self.quietest <= self.loudest:
            raise ValueError(f"0 < quietest <= loudest, not {self.quietest} and {self.loudest}")
        for name in ("frame_rate", "gravity"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def num_samples(self, num_frames: int) -> int:
        """Samples of the sound that go with a number of frames."""
        return round(num_frames * self.sample_rate / self.frame_rate)


@dataclasses.dataclass(frozen=True)
class Ball:
    """What a caption says of a ball."""

    colour: str
    size: str = "medium"

    def __post_init__(self):
        if self.colour not in COLOURS or self.size not in SIZES:
            raise ValueError(
                f"a ball is one of {', '.join(SIZES)} and of {', '.join(COLOURS)}, not "
                f"{self.size!r} and {self.colour!r}"
            )

    @property
    def radius(self) -> float:
        """In heights."""
        return RADII[SIZES.index(self.size)]

    @property
    def pitch(self) -> float:
        """Of its tone, in Hz."""
        return PITCHES[COLOURS.index(self.colour)]


# The balls of a clip; no two have the same colour.
Scene = tuple[Ball, ...]


def check_scene(scene: Sequence[Ball]) -> Scene:
    """The scene, if the world can show it.

    Raises:
      ValueError: no balls, too many, or two of a colour.
    """
    colours = [ball.colour for ball in scene]
    if not 1 <= len(colours) <= MAX_BALLS or len(set(colours)) < len(colours):
        raise ValueError(
            f"a scene has 1 to {MAX_BALLS} balls of different colours, not {', '.join(colours)!r}"
        )
    return tuple(scene)


def draw_scene(seed: int, config: WorldConfig) -> Scene:
    """The scene of a seed."""
    rng = np.random.default_rng((seed, 0))
    count = int(rng.integers(config.min_balls, config.max_balls + 1))
    colours = rng.permutation(len(COLOURS))[:count]
    return tuple(Ball(COLOURS[c], SIZES[rng.integers(len(SIZES))]) for c in colours)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What really happens in a clip. The centre of the top left pixel is (0.5, 0.5)."""

    scene: Scene
    trajectories: np.ndarray  # [frames, balls, 2] float64, centres (x, y) in pixels
    radii: np.ndarray  # [balls] float64, pixels
    impacts: np.ndarray  # [impacts] of dtype `IMPACT`, in order of time

    @property
    def tones(self) -> np.ndarray:
        """The impacts that are heard."""
        return self.impacts[self.impacts["rings"]]

    def to_json(self) -> dict[str, Any]:
        """As lists and dicts, for `from_json`."""
        return {
            "scene": [dataclasses.asdict(ball) for ball in self.scene],
            "radii": self.radii.tolist(),
            "trajectories": self.trajectories.tolist(),
            "impacts": [dict(zip(IMPACT.names, row.tolist(), strict=True)) for row in self.impacts],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Truth":
        """Raises ValueError if the content is not what `to_json` returns."""
        try:
            rows = [tuple(row[name] for name in IMPACT.names) for row in content["impacts"]]
            scene = check_scene([Ball(**ball) for ball in content["scene"]])
            trajectories = np.asarray(content["trajectories"], np.float64)
            radii = np.asarray(content["radii"], np.float64)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the truth about a clip: {error!r}") from error
        return cls(scene, trajectories, radii, np.array(rows, IMPACT))


@dataclasses.dataclass
class _Body:
    """A ball in flight: position and velocity at `time`."""

    x: float
    y: float
    vx: float
    vy: float
    radius: float
    own_vx: float  # speeds that the floor restores
    own_vy: float
    time: float = 0.0

    def advance(self, time: float, gravity: float) -> None:
        dt = time - self.time
        self.x += self.vx * dt
        self.y += self.vy * dt + 0.5 * gravity * dt * dt
        self.vy += gravity * dt
        self.time = time


def _draw_bodies(scene: Scene, seed: int, config: WorldConfig) -> list[_Body]:
    """Balls side by side in the upper part of the picture, thrown gently."""
    rng = np.random.default_rng((seed, 1))
    aspect = config.width / config.height
    room = aspect - 2 * sum(ball.radius for ball in scene)
    cuts = np.sort(rng.uniform(0, room, len(scene)))  # gaps between balls, which thus never overlap
    left, bodies = 0.0, {}
    for index, gap in zip(rng.permutation(len(scene)), np.diff(cuts, prepend=0), strict=True):
        radius = scene[index].radius
        drop = FLOOR - 2 * radius  # from the ceiling to the floor
        own_vy = math.sqrt(2 * config.gravity * drop * rng.uniform(0.45, 0.85))
        own_vx = rng.uniform(0.25, 0.6)
        bodies[index] = _Body(
            x=left + gap + radius,
            y=radius + drop * rng.uniform(0.1, 0.6),
            vx=own_vx * rng.choice((-1, 1)),
            vy=rng.uniform(-0.5, 0.5),
            radius=radius,
            own_vx=own_vx,
            own_vy=own_vy,
        )
        left += gap + 2 * radius
    return [bodies[index] for index in range(len(scene))]


def _fall_time(distance: float, speed: float, gravity: float) -> float:
    """When a body at `speed` downwards has fallen `distance`; now if it is there, and sinking."""
    if distance <= 0 and speed >= 0:
        return 0.0
    root = math.sqrt(max(speed * speed + 2 * gravity * distance, 0.0))
    return (root - speed) / gravity


def _next_surface(body: _Body, aspect: float, gravity: float) -> tuple[float, str]:
    """Seconds until the first of floor, walls and ceiling, and which it is."""
    hits = [(_fall_time(FLOOR - body.radius - body.y, body.vy, gravity), "floor")]
    if body.vx < 0:
        hits.append((max(body.radius - body.x, -math.inf) / body.vx, "left"))
    elif body.vx > 0:
        hits.append(((aspect - body.radius - body.x) / body.vx, "right"))
    rise = body.y - body.radius
    if body.vy < 0 and body.vy * body.vy > 2 * gravity * rise:
        root = math.sqrt(body.vy * body.vy - 2 * gravity * rise)
        hits.append(((-body.vy - root) / gravity, "ceiling"))
    time, surface = min(hits)
    return max(time, 0.0), surface


def _meeting_time(a: _Body, b: _Body) -> float:
    """Seconds until two balls touch; infinite if they do not. Gravity cancels out."""
    px, py, vx, vy = b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy
    closing = px * vx + py * vy
    speed2 = vx * vx + vy * vy
    if closing >= 0 or speed2 == 0:
        return math.inf
    gap = px * px + py * py - (a.radius + b.radius) ** 2
    discriminant = closing * closing - speed2 * gap
    if discriminant < 0:
        return math.inf
    return max((-closing - math.sqrt(discriminant)) / speed2, 0.0)


def _bounce(body: _Body, surface: str, aspect: float, restore: float) -> float:
    """Reflects a ball from a surface; returns the speed of the impact."""
    if surface == "floor":
        speed, body.y = body.vy, FLOOR - body.radius
        body.vy = -(body.vy + restore * (body.own_vy - body.vy))
        body.vx += restore * (math.copysign(body.own_vx, body.vx) - body.vx)
    elif surface == "ceiling":
        speed, body.y, body.vy = -body.vy, body.radius, -body.vy
    else:
        speed = abs(body.vx)
        body.x = body.radius if surface == "left" else aspect - body.radius
        body.vx = -body.vx
    return speed


def _collide(a: _Body, b: _Body) -> tuple[float, float]:
    """Elastic collision; returns half the change of each ball's velocity."""
    px, py = b.x - a.x, b.y - a.y
    distance = math.hypot(px, py)
    nx, ny = px / distance, py / distance
    closing = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
    mass_a, mass_b = a.radius**2, b.radius**2
    change_a = 2 * mass_b / (mass_a + mass_b) * closing
    change_b = 2 * mass_a / (mass_a + mass_b) * closing
    a.vx, a.vy = a.vx - change_a * nx, a.vy - change_a * ny
    b.vx, b.vy = b.vx + change_b * nx, b.vy + change_b * ny
    return change_a / 2, change_b / 2


def simulate(scene: Scene, seed: int, num_frames: int, config: WorldConfig) -> Truth:
    """Lets the balls of a scene fly.

    Args:
      scene: see `check_scene`.
      seed: decides where they start and how fast they like to be.
      num_frames: length; impacts happen in [0, num_frames / frame_rate).
      config: the world.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    scene = check_scene(scene)
    aspect, gravity = config.width / config.height, config.gravity
    bodies = _draw_bodies(scene, seed, config)
    end = num_frames / config.frame_rate
    rows, last_tone = [], [-math.inf] * len(bodies)
    # pieces of flight, one per ball and stretch between any two impacts: (start, x, y, vx, vy)
    starts, states = [0.0], [[(b.x, b.y, b.vx, b.vy) for b in bodies]]
    now = 0.0
    while True:
        events = [(*_next_surface(b, aspect, gravity), i, -1) for i, b in enumerate(bodies)]
        for j in range(1, len(bodies)):
            events += [(_meeting_time(bodies[i], bodies[j]), "ball", i, j) for i in range(j)]
        wait, surface, first, second = min(events)
        now += wait
        if now >= end:
            break
        for body in bodies:
            body.advance(now, gravity)
        if surface == "ball":
            speeds = _collide(bodies[first], bodies[second])
            hits = ((first, second, speeds[0]), (second, first, speeds[1]))
        else:
            hits = ((first, -1, _bounce(bodies[first], surface, aspect, config.restore)),)
        for ball, other, speed in hits:
            rings = speed >= config.audible_speed and now - last_tone[ball] >= config.dead_time
            if rings:
                last_tone[ball] = now
            place = (bodies[ball].x * config.height, bodies[ball].y * config.height)
            loudness = min(speed / LOUDEST_SPEED, 1.0)
            level = config.quietest + (config.loudest - config.quietest) * loudness
            sound = (scene[ball].pitch, bodies[ball].x / aspect, level, rings)
            rows.append((now, ball, SURFACES.index(surface), other, speed, *place, *sound))
        starts.append(now)
        states.append([(b.x, b.y, b.vx, b.vy) for b in bodies])

    times = np.arange(num_frames) / config.frame_rate
    piece = np.searchsorted(starts, times, side="right") - 1
    state = np.asarray(states)[piece]  # [frames, balls, 4]
    since = (times - np.asarray(starts)[piece])[:, None]
    x = state[..., 0] + state[..., 2] * since
    y = state[..., 1] + state[..., 3] * since + 0.5 * gravity * since**2
    return Truth(
        scene=scene,
        trajectories=np.stack([x, y], -1) * config.height,
        radii=np.array([ball.radius for ball in scene]) * config.height,
        impacts=np.array(rows, IMPACT),
    )
