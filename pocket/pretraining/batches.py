"""Batches that are functions of their number, so that a run which is resumed sees the same."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pocket.world.dataset import split_seeds
from pocket.world.physics import WorldConfig, draw_scene, simulate
from pocket.world.render import render, synthesize

Draw = Callable[[np.random.Generator], dict[str, np.ndarray]]


class DrawnBatches:
    """Endless batches: row r of batch n is drawn with the generator of (seed, n, r).

    Args:
      draw: makes one row; all rows have the same shapes.
    """

    def __init__(self, draw: Draw, batch_size: int, seed: int):
        self._draw, self._size, self._seed, self._count = draw, batch_size, seed, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rngs = [np.random.default_rng((self._seed, self._count, r)) for r in range(self._size)]
        self._count += 1
        rows = [self._draw(rng) for rng in rngs]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """How many batches were made."""
        return {"batches": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after as many."""
        self._count = state["batches"]


@dataclasses.dataclass(frozen=True)
class WorldWindows:
    """Short stretches from anywhere in the clips of the world's training split."""

    world: WorldConfig  # what is drawn
    longest: int = 121  # pixel frames of the clips that they are taken from

    def video(self, num_frames: int) -> Draw:
        """Draws {"frames" [num_frames, H, W, 3] uint8}."""
        if not 1 <= num_frames <= self.longest:
            raise ValueError(f"num_frames must be from 1 to {self.longest}, not {num_frames}")

        def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
            start = int(rng.integers(self.longest - num_frames + 1))
            truth = self._truth(rng, start + num_frames)
            window = dataclasses.replace(truth, trajectories=truth.trajectories[start:])
            return {"frames": render(window, self.world)}

        return draw

    def sound(self, num_samples: int, grid: int) -> Draw:
        """Draws {"waveform" [num_samples, 2] float32}, from a sample that is a multiple of `grid`.

        A spectrogram then has the phase to the world's tones that it has for whole clips.
        """
        longest = self.world.num_samples(self.longest)
        if not 1 <= num_samples <= longest:
            raise ValueError(f"num_samples must be from 1 to {longest}, not {num_samples}")

        def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
            start = int(rng.integers((longest - num_samples) // grid + 1)) * grid
            waveform = synthesize(self._truth(rng, self.longest), self.world)
            return {"waveform": waveform[start : start + num_samples]}

        return draw

    def _truth(self, rng: np.random.Generator, num_frames: int):
        seeds = split_seeds("train")
        seed = seeds[int(rng.integers(len(seeds)))]
        return simulate(draw_scene(seed, self.world), seed, num_frames, self.world)
