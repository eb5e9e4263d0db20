"""Under which conditions a run trains: a mixture of modes, drawn anew for every sample.

A mode is a row of a table of masks, so that nothing is compiled anew when another is drawn, and
what is given are the latents that a batch brings.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.sampling.conditions import Condition, mode_mask
from omniforcing_jax.training.objectives.common import fold
from omniforcing_jax.types import AVLatents, RandomUse


@dataclasses.dataclass(frozen=True)
class ConditionMixture:
    """With which probability a sample is trained in each mode of `sampling.conditions.MODES`.

    `extend` gives the first block, or up to all but the last, each number as often.

    Raises:
      ValueError: a negative probability, or a sum that is not 1.
    """

    t2av: float = 1.0
    i2av: float = 0.0
    extend: float = 0.0
    a2v: float = 0.0
    ia2v: float = 0.0
    v2a: float = 0.0

    def __post_init__(self):
        given = {name: x for name, x in dataclasses.asdict(self).items() if x}
        if min(given.values(), default=0.0) < 0 or not math.isclose(sum(given.values()), 1.0):
            raise ValueError(f"probabilities of modes must be 0 or more and sum to 1, not {given}")

    @property
    def gives(self) -> bool:
        """Whether anything is ever given."""
        return self.t2av < 1.0


@dataclasses.dataclass(frozen=True)
class GivenInput:
    """Draws what is given of the clips that a batch brings.

    Attributes:
      mixture: of modes.
      clip: what is trained on, of whole blocks.
      layout: of the blocks.
    """

    mixture: ConditionMixture
    clip: ClipGeometry
    layout: BlockLayout

    def table(self) -> tuple[AVLatents, np.ndarray]:
        """Masks [M, F] and [M, T_a] float32, and their probabilities [M]."""
        blocks = 1 + int(self.layout.block_of_video_frame(self.clip.video_frames - 1))
        masks, probabilities = [], []
        for mode, probability in dataclasses.asdict(self.mixture).items():
            counts = range(1, max(blocks, 2)) if mode == "extend" else (1,)
            for count in counts:
                start = AVLatents(
                    self.layout.num_video_frames(count), self.layout.num_audio_frames(count)
                )
                masks.append(mode_mask(mode, self.clip, start))
                probabilities.append(probability / len(counts))
        return jax.tree.map(lambda *m: np.stack(m), *masks), np.asarray(probabilities, np.float32)

    def masks(self, keys: jax.Array) -> AVLatents:
        """A mask per sample, [B, F] and [B, T_a] from [B] keys."""
        table, probabilities = self.table()
        with np.errstate(divide="ignore"):  # what is never drawn
            logits = jnp.asarray(np.log(probabilities))
        draws = fold(keys, RandomUse.CONDITION)
        rows = jax.vmap(lambda key: jax.random.categorical(key, logits))(draws)
        return jax.tree.map(lambda m: jnp.asarray(m)[rows], table)

    def condition(self, batch: dict[str, jax.Array], keys: jax.Array) -> Condition | None:
        """What is given of a batch's clips.

        Args:
          batch: with "video" and "audio" [B, T, C], unless nothing is ever given.
          keys: [B] of the samples.

        Returns:
          None where the mixture never gives anything.
        """
        if not self.mixture.gives:
            return None
        clean = AVLatents(batch["video"], batch["audio"])
        clean = jax.tree.map(lambda x: x.astype(jnp.float32), clean)
        return Condition.of_clip(clean, self.masks(keys))
