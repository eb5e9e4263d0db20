"""Picture and sound of the pocket world, made from the truth about a clip."""

import functools

import numpy as np

from pocket.world.physics import COLOURS, FLOOR, RGB, SIZES, Truth, WorldConfig

# Levels of grey: without colour, so that only balls have a hue.
AIR, FLOOR_LINE, GROUND = 18, 120, 52
# Of a tone, by size: a large ball rings longer and darker.
DURATIONS = (0.25, 0.32, 0.4)  # seconds
HARMONICS = ((1.0, 0.5, 0.25), (1.0, 0.35, 0.12), (1.0, 0.2, 0.05))
DECAYS_PER_TONE = 4.0  # duration in time constants: it ends 35 dB below its start
ATTACK, FADE = 0.002, 0.02  # seconds


@functools.lru_cache
def background(width: int, height: int) -> np.ndarray:
    """The empty world, [height, width, 3] uint8; do not write to it."""
    edges = np.arange(height + 1.0)

    def share(top: float, bottom: float) -> np.ndarray:
        """How much of each row of pixels lies between two heights."""
        return np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, 1)

    line = FLOOR * height, (FLOOR + 1 / 48) * height
    rows = AIR + share(*line) * (FLOOR_LINE - AIR) + share(line[1], height) * (GROUND - AIR)
    image = np.broadcast_to(np.round(rows)[:, None, None], (height, width, 3)).astype(np.uint8)
    image.setflags(write=False)
    return image


def render(truth: Truth, config: WorldConfig) -> np.ndarray:
    """Draws the balls, with edges that follow their motion below a pixel.

    A pixel's share of a ball is taken as that of a half-plane at the same distance, which is right
    within 2 % for the radii of this world.

    Returns:
      [frames, height, width, 3] uint8.
    """
    num_frames = len(truth.trajectories)
    margin = int(np.ceil(truth.radii.max())) + 2
    canvas = np.empty(
        (num_frames, config.height + 2 * margin, config.width + 2 * margin, 3), np.uint8
    )
    inside = np.s_[:, margin : margin + config.height, margin : margin + config.width]
    canvas[inside] = background(config.width, config.height)
    frame = np.arange(num_frames)[:, None, None]
    for ball, centres, radius in zip(
        truth.scene, truth.trajectories.swapaxes(0, 1), truth.radii, strict=True
    ):
        reach = int(np.ceil(radius)) + 1
        offsets = np.arange(-reach, reach + 1)
        # Patch of pixels around the centre: [frames, 2 * reach + 1] by axis.
        pixels = np.floor(centres).astype(int)[:, :, None] + offsets
        away = (pixels + 0.5 - centres[:, :, None]).astype(np.float32)
        distance = np.sqrt(away[:, 0, None, :] ** 2 + away[:, 1, :, None] ** 2)  # [frames, y, x]
        share = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
        index = frame, pixels[:, 1, :, None] + margin, pixels[:, 0, None, :] + margin
        below = canvas[index].astype(np.float32)
        colour = np.asarray(RGB[COLOURS.index(ball.colour)], np.float32)
        canvas[index] = (below + share * (colour - below) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(canvas[inside])


@functools.lru_cache
def _oscillation(pitch: float, size: str, sample_rate: int) -> np.ndarray:
    """Sum of harmonics with peak near 1, float32, long enough for a tone from anywhere in a second.

    It is a function of the time of the clip, not of the tone: tones of one pitch overlap in phase,
    and a ball that is struck again is never cancelled by its last tone.
    """
    time = np.arange(sample_rate + int(max(DURATIONS) * sample_rate) + 1) / sample_rate
    weights = HARMONICS[SIZES.index(size)]
    waves = [w * np.sin(2 * np.pi * pitch * (k + 1) * time) for k, w in enumerate(weights)]
    wave = np.sum([w for k, w in enumerate(waves) if (k + 1) * pitch < sample_rate / 2], 0)
    return (wave / np.abs(wave).max()).astype(np.float32)


@functools.lru_cache
def _envelope(size: str, sample_rate: int) -> np.ndarray:
    """Loudness of a tone over time, float32, peak 1."""
    duration = DURATIONS[SIZES.index(size)]
    time = np.arange(int(duration * sample_rate)) / sample_rate
    rise = np.minimum(time / ATTACK, 1.0)
    fall = np.minimum((duration - time) / FADE, 1.0)
    return (rise * fall * np.exp(-time * DECAYS_PER_TONE / duration)).astype(np.float32)


def tone(pitch: float, size: str, sample_rate: int, start: int = 0) -> np.ndarray:
    """A tone of level 1 that begins with sample `start` of a clip, [samples] float32."""
    envelope = _envelope(size, sample_rate)
    phase = start % sample_rate
    return envelope * _oscillation(pitch, size, sample_rate)[phase : phase + len(envelope)]


def synthesize(truth: Truth, config: WorldConfig) -> np.ndarray:
    """The sound: a tone at every impact that rings, from the sample next to it.

    The stereo position is panned with constant power: left cos(pan π/2), right sin(pan π/2).

    Returns:
      [samples, 2] float32 in [-1, 1].
    """
    num_samples = config.num_samples(len(truth.trajectories))
    waveform = np.zeros((num_samples, 2), np.float32)
    for impact in truth.tones:
        start = round(float(impact["time"]) * config.sample_rate)
        size = truth.scene[impact["ball"]].size
        samples = tone(float(impact["pitch"]), size, config.sample_rate, start)
        angle = impact["pan"] * np.pi / 2
        gains = impact["level"] * np.array([np.cos(angle), np.sin(angle)])
        samples = samples[: max(num_samples - start, 0), None] * gains.astype(np.float32)
        waveform[start : start + len(samples)] += samples
    return waveform
