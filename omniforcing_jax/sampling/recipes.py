"""Recipes of LTX-2's own pipelines: the noise levels and the guidance a checkpoint is sampled with.

A distilled checkpoint looks like the one it was distilled from, but it is only good at its own few
noise levels and without guidance. So the recipe is one value, which converted checkpoints name.
"""

import dataclasses
import re

from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import (
    LTX23_GUIDANCE,
    NO_GUIDANCE,
    AVGuidance,
    default_guidance,
)

FULL, DISTILLED = "full", "distilled"
RECIPE_NAMES = (FULL, DISTILLED)


@dataclasses.dataclass(frozen=True)
class SamplingRecipe:
    """Noise levels, guidance and steps.

    Attributes:
      sigmas: decreasing to 0, one Euler step between two of them.
      guidance: scales of both modalities.
      ancestral: the steps add fresh noise (`flow.ancestral_step`).

    Raises:
      ValueError: see `flow.check_sigmas`.
    """

    sigmas: tuple[float, ...]
    guidance: AVGuidance = NO_GUIDANCE
    ancestral: bool = False

    def __post_init__(self):
        flow.check_sigmas(self.sigmas)

    @classmethod
    def of_steps(cls, num_steps: int, guidance: AVGuidance = NO_GUIDANCE) -> "SamplingRecipe":
        """The LTX-2 schedule of so many steps.

        Raises:
          ValueError: see `flow.ltx2_schedule`.
        """
        return cls(tuple(flow.ltx2_schedule(num_steps).tolist()), guidance)


def default_steps(model_version: str) -> int:
    """Steps of LTX-2's own pipelines for a model that was not distilled.

    Raises:
      ValueError: see `default_guidance`.
    """
    return 30 if default_guidance(model_version) == LTX23_GUIDANCE else 40


def is_ancestral(stage: str | None, model_version: str) -> bool:
    """Whether LTX-2's own pipelines sample it by ancestral steps: the distilled 2.5 and later."""
    version = tuple(int(number) for number in model_version.split(".")[:2])
    return stage == DISTILLED and version >= (2, 5)


def recipe_in_text(text: str) -> str | None:
    """The recipe told by a file's name, such as ltx-2-19b-distilled.safetensors, or its metadata.

    Avatar-Forever's students of the distilled LTX-2.3 are sampled as it is. None: it tells nothing.
    """
    found = any(word in text.lower() for word in (DISTILLED, "avatarforever"))
    return DISTILLED if found else None


def recipe_in_lora_name(name: str) -> str | None:
    """That of a model with a LoRA: LTX-2's own, ltx-2-19b-distilled-lora-384, makes it distilled.

    A LoRA that was only made for the distilled model does not.
    """
    return DISTILLED if re.search(r"distilled[-_]lora", name.lower()) else None
