"""Guidance on the clean prediction: classifier-free, spatio-temporal (STG) and modality guidance.

Up to four predictions of x0 are combined, each from its own pass of the network:

  cond       the prompt
  uncond     the negative prompt
  perturbed  the prompt, self-attention skipped in some blocks (STG)
  isolated   the prompt, cross-modal attention (A2V and V2A) skipped in all blocks
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.ranges import Range, check_fields
from omniforcing_jax.types import AVLatents

PASSES = ("cond", "uncond", "perturbed", "isolated")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance scales of one modality. The defaults mean none.

    Attributes:
      cfg: classifier-free guidance scale; 1 turns it off.
      stg: spatio-temporal guidance scale; 0 turns it off.
      modality: scale of the guidance away from the other modality being absent; 1 turns it off.
      rescale: in [0, 1]; how far the result's standard deviation is pulled back to that of the
        conditional prediction.
      stg_blocks: transformer blocks whose self-attention the perturbed pass skips.

    Raises:
      ValueError: a scale is not finite, `rescale` is out of range, or there is STG without blocks.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self, **dict.fromkeys(("cfg", "stg", "modality"), Range(-1e4, 1e4)))
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale is {self.rescale}; it must lie in [0, 1]")
        if self.stg != 0.0 and not self.stg_blocks:
            raise ValueError(
                f"stg is {self.stg} but stg_blocks is empty: name the blocks to perturb "
                "(29 for LTX-2.0, 28 for LTX-2.3) or set stg to 0"
            )

    @property
    def skipped(self) -> tuple[int, ...]:
        """Blocks whose self-attention a perturbed pass skips; none without STG."""
        return self.stg_blocks if self.stg != 0.0 else ()

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError for blocks that a model of so many layers does not have."""
        if any(not 0 <= block < num_layers for block in self.skipped):
            raise ValueError(
                f"stg_blocks {self.stg_blocks} are for a larger model, this one has the blocks 0 "
                f"to {num_layers - 1}; name blocks among these (--stg-block), or set stg to 0"
            )

    def passes(self) -> tuple[str, ...]:
        """Names of the network passes these scales need, in the order of `PASSES`."""
        needed = (True, self.cfg != 1.0, self.stg != 0.0, self.modality != 1.0)
        return tuple(name for name, need in zip(PASSES, needed, strict=True) if need)


class AVGuidance(NamedTuple):
    """Guidance of both modalities. One pass serves both, so it runs if either needs it.

    Attributes:
      video, audio: scales of each modality.
    """

    video: Guidance
    audio: Guidance

    def passes(self) -> tuple[str, ...]:
        """Names of the network passes to run, in the order of `PASSES`."""
        needed = self.video.passes() + self.audio.passes()
        return tuple(name for name in PASSES if name in needed)

    def changed(
        self, *, cfg_video: float | None = None, cfg_audio: float | None = None, **both
    ) -> "AVGuidance":
        """With other scales; None leaves one as it is.

        Args:
          cfg_video, cfg_audio: classifier-free guidance of one modality.
          both: fields of `Guidance`, for both modalities.
        """

        def change(guidance: Guidance, cfg: float | None) -> Guidance:
            given = {name: x for name, x in (both | {"cfg": cfg}).items() if x is not None}
            return dataclasses.replace(guidance, **given)

        return AVGuidance(change(self.video, cfg_video), change(self.audio, cfg_audio))


# Defaults of the LTX-2 pipelines; the distilled checkpoints use none.
NO_GUIDANCE = AVGuidance(video=Guidance(), audio=Guidance())
LTX20_GUIDANCE = AVGuidance(
    video=Guidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(29,)),
    audio=Guidance(cfg=7.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(29,)),
)
LTX23_GUIDANCE = AVGuidance(
    video=dataclasses.replace(LTX20_GUIDANCE.video, stg_blocks=(28,)),
    audio=dataclasses.replace(LTX20_GUIDANCE.audio, stg_blocks=(28,)),
)


def default_guidance(model_version: str) -> AVGuidance:
    """The guidance of LTX-2's own pipelines.

    Args:
      model_version: that of the checkpoint, such as "2.3.0".

    Returns:
      Scales for 2.3 and later, or for 2.0: they differ in the blocks that STG skips.

    Raises:
      ValueError: the version does not begin with numbers.
    """
    major_minor = tuple(int(x) for x in model_version.split(".")[:2])
    return LTX23_GUIDANCE if major_minor >= (2, 3) else LTX20_GUIDANCE


def guide(
    cond: jax.Array,
    uncond: jax.Array | None,
    perturbed: jax.Array | None,
    isolated: jax.Array | None,
    guidance: Guidance,
    *,
    per_sample_std: bool = False,
) -> jax.Array:
    """Combines the x0 predictions of the passes of one modality.

    pred = c + (cfg - 1) (c - u) + stg (c - p) + (modality - 1) (c - m), then, with r = rescale > 0,
    pred * (r std(c) / std(pred) + 1 - r).

    Args:
      cond: c, [B, T, C].
      uncond, perturbed, isolated: u, p, m, [B, T, C]. Those that `guidance.passes()` does not name
        are not read and may be None.
      guidance: the scales.
      per_sample_std: take the standard deviations per sample, so that a sample does not depend on
        the batch it is in. The reference takes them over the whole tensor.

    Returns:
      [B, T, C] float32.

    Raises:
      ValueError: a prediction that a scale needs is None or has another shape than `cond`.
    """
    cond = jnp.asarray(cond, jnp.float32)
    pred = cond
    terms = {
        "uncond": (guidance.cfg - 1.0, uncond),
        "perturbed": (guidance.stg, perturbed),
        "isolated": (guidance.modality - 1.0, isolated),
    }
    for name in guidance.passes()[1:]:
        scale, other = terms[name]
        if other is None:
            raise ValueError(f"{guidance} needs the {name!r} prediction, which is None")
        if other.shape != cond.shape:
            raise ValueError(
                f"the {name!r} prediction has shape {list(other.shape)}, cond {list(cond.shape)}"
            )
        pred = pred + scale * (cond - other.astype(jnp.float32))
    if guidance.rescale > 0.0:
        axes = tuple(range(1, cond.ndim)) if per_sample_std else None
        ratio = _std(cond, axes) / _std(pred, axes)
        pred = pred * (guidance.rescale * ratio + (1.0 - guidance.rescale))
    return pred


def _std(x: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """Unbiased standard deviation, axes kept."""
    return jnp.std(x, axis=axes, ddof=1, keepdims=True)


def interleave_rows(passes: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """The passes of each sample as neighbouring rows of one batch.

    A batch that is sharded over devices stays where it is.

    Args:
      passes: P arrays [..., B, ...].
      axis: that of the batch.

    Returns:
      [..., B * P, ...].
    """
    x = jnp.stack(passes, axis=axis + 1)  # [..., B, P, ...]
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def keep_pathways(
    passes: Sequence[str],
    skipped: tuple[Sequence[int], Sequence[int]],
    num_layers: int,
    batch: int,
) -> Pathways | None:
    """Zeros where a pass skips an attention: [L, B * P] per pathway, a sample's passes in a row.

    Args:
      passes: P names of `PASSES`.
      skipped: blocks of video and of audio that the perturbed pass skips.

    Returns:
      None where no pass skips anything.
    """
    if not {"perturbed", "isolated"} & set(passes):
        return None

    def rows(skipped_by: str, blocks: Sequence[int]) -> jax.Array:
        keep = np.ones((num_layers, len(passes)), np.float32)
        if skipped_by in passes:
            keep[list(blocks), passes.index(skipped_by)] = 0.0
        return jnp.tile(keep, (1, batch))

    video, audio = skipped
    cross = rows("isolated", range(num_layers))
    return Pathways(rows("perturbed", video), rows("perturbed", audio), cross, cross)


def keep_frozen_streams(keep: Pathways, frozen: AVLatents, batch: int) -> Pathways:
    """`keep` [L, B * P] with ones for the self-attention of streams that are frozen [B or 1]."""

    def row(keep: jax.Array, frozen: jax.Array) -> jax.Array:
        frozen = jnp.repeat(jnp.broadcast_to(frozen, (batch,)), keep.shape[1] // batch)
        return jnp.where(frozen[None], 1.0, keep)

    return keep.replace(video=row(keep.video, frozen.video), audio=row(keep.audio, frozen.audio))
