"""Sampling in two stages, as LTX-2's own pipelines do: a small clip, made large and refined.

    x  <- sample at a fraction of the size
    x0 <- upsampled video, and the sound as it is
    x  <- 0.909 noise + 0.091 x0, then three steps of a distilled model without guidance

The second stage makes sound as well, for the video to look at; the clip keeps that of the first, as
in LTX-2's pipeline for the full model. Its distilled pipeline decodes the sound of the second.
"""

import dataclasses
import fractions
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.upsampler import RATIONAL_SCALES, UpsamplerConfig, upsample
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig, sample
from omniforcing_jax.types import AVLatents

REFINING = SamplingRecipe(flow.DISTILLED_STAGE2_SIGMAS)
SECOND_STAGE_KEY = 2**31 - 1  # folded into the key; the samples of a batch have numbers from 0


@dataclasses.dataclass(frozen=True)
class Upsampler:
    """A converted spatial upsampler that fits a model's latents; its weights are not read yet.

    Attributes:
      folder: from `checkpoint_converters.upsampler`.
      config: of the network.
    """

    folder: str
    config: UpsamplerConfig

    @classmethod
    def find(cls, folder: str | os.PathLike, model_version: str, channels: int) -> "Upsampler":
        """Reads config.json.

        Args:
          model_version, channels: of the model whose video latents are upsampled.

        Raises:
          FileNotFoundError: no such folder, or nothing was converted into it.
          ValueError: it is no spatial upsampler, or one of other latents.
        """
        content = checkpoints.load_config(folder)
        if "temporal_upsampler" in content["components"]:
            raise ValueError(
                f"{folder} is a temporal upsampler, which doubles the frames; two-stage sampling "
                "needs a spatial one"
            )
        if "spatial_upsampler" not in content["components"]:
            raise ValueError(
                f"{folder} is no upsampler (it has {', '.join(content['components'])}); python -m "
                "checkpoint_converters.upsampler creates one from LTX-2's upscaler file"
            )
        with checkpoints.parsing(pathlib.Path(folder) / "config.json"):
            metadata = checkpoints.component_metadata(content, "spatial_upsampler")
            config = UpsamplerConfig.from_metadata(metadata)
        own = content["model_version"]
        if own.split(".")[:2] != model_version.split(".")[:2] or config.channels != channels:
            raise ValueError(
                f"{folder} is for LTX-2 {own}'s latents of {config.channels} channels, the model "
                f"is {model_version} and has {channels}; use the upsampler of the same release"
            )
        return cls(os.fspath(folder), config)

    def first_clip(self, clip: ClipGeometry) -> ClipGeometry:
        """The clip of the first stage, from that of the second.

        Raises:
          ValueError: the size is no multiple of the scale.
        """
        scale = fractions.Fraction(*RATIONAL_SCALES[self.config.scale])
        height, width = clip.height / scale, clip.width / scale
        if height.denominator != 1 or width.denominator != 1:
            raise ValueError(
                f"an upsampler by {self.config.scale:g} needs a height and width of multiples of "
                f"{scale.numerator} latents ({32 * scale.numerator} pixels), not {clip.height}x"
                f"{clip.width} latents"
            )
        return dataclasses.replace(clip, height=int(height), width=int(width))

    def load(self, dtype: jnp.dtype, verify: bool = True) -> dict[str, Any]:
        """The weights.

        Raises:
          FileNotFoundError, ValueError: see `checkpoints.load_params`.
        """
        component = self.config.component
        return checkpoints.load_params(self.folder, component, dtype=dtype, verify=verify)

    def __call__(
        self,
        params: dict[str, Any],
        vae_params: dict[str, Any],
        video: jax.Array,
        first: ClipGeometry,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Video tokens [B, T, C] of the first clip -> [B, T', C] of the second, float32.

        Args:
          params: from `load`.
          vae_params: of the model's video VAE, whose statistics are read.
          dtype: of the computation.
        """
        size = (first.video_frames, first.height, first.width)
        grid = video.reshape(video.shape[0], *size, video.shape[-1])
        grid = upsample(self.config, params, vae_params, grid, dtype=dtype)
        return grid.reshape(video.shape[0], -1, video.shape[-1])


def refine(
    model: Transformer,
    params: Any,
    prompt: Prompt | tuple[jax.Array, jax.Array],
    key: jax.Array,
    first: AVLatents,
    clip: ClipGeometry,
    *,
    condition: Condition | None = None,
) -> AVLatents:
    """The second stage.

    Args:
      model, params: of a distilled model.
      prompt: text contexts [B, S, text_dim] of video and audio.
      key: of the first stage; the noise differs from that of the first.
      first: [B, T, C] video of the first stage, upsampled, and its sound.
      clip: sizes of the second stage.
      condition: what is given, at this size.

    Returns:
      AVLatents [B, T, C]: the refined video, and the sound of the first stage.

    Raises:
      ValueError: see `sample`.
    """
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
    refined = sample(
        model,
        params,
        prompt,
        None,
        fold(key, SECOND_STAGE_KEY),
        SampleConfig(REFINING, clip),
        condition=condition,
        initial=first,
    )
    return AVLatents(refined.video, first.audio)
