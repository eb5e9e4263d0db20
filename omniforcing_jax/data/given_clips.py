"""Clips of which a training run gives parts: encoded films, or what the teacher sampled."""

import dataclasses
import os
from typing import Any

import numpy as np

from omniforcing_jax.data import shards
from omniforcing_jax.data.clips import CLIPS, Clips, open_clips
from omniforcing_jax.data.ode_pairs import ODE_PAIRS, ODEPairs, open_ode_pairs


@dataclasses.dataclass(frozen=True)
class FinalStates:
    """The last, clean states of stored trajectories; a source for `text_dataset.grain_batches`.

    Attributes:
      pairs: the trajectories.
    """

    pairs: ODEPairs

    @property
    def manifest(self) -> Any:
        """That of the trajectories."""
        return self.pairs.manifest

    @property
    def negative(self) -> dict[str, np.ndarray]:
        """Text features of the negative prompt."""
        return self.pairs.negative

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """As of `Clips`: "video" and "audio" [T, C], and the text."""
        element = self.pairs[index]
        text = ("video_features", "audio_features", "mask")
        found = {name: element[name] for name in text if name in element}
        return found | {name: element[name][-1] for name in ("video", "audio")}


def open_given_clips(folder: str | os.PathLike) -> Clips | FinalStates:
    """Opens a folder of `launch.encode_clips` or of `launch.ode_pairs`.

    Raises:
      FileNotFoundError: there are no clips.
      ValueError: other data, or see `open_clips` and `open_ode_pairs`.
    """
    kind = shards.stored_kind(folder)
    if kind == ODE_PAIRS.name:
        return FinalStates(open_ode_pairs(folder))
    if kind in (CLIPS.name, None):  # None: says what is missing
        return open_clips(folder)
    raise ValueError(
        f"{folder} holds {kind}, but conditions need clips: those of {CLIPS.program}, or of "
        f"{ODE_PAIRS.program}"
    )
