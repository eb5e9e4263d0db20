"""The second stage of a clip: what --upsampler and --refiner of launch.sample_teacher ask for."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from omniforcing_jax import AVLatents, ClipGeometry, Condition, PipelineConfig, Transformer
from omniforcing_jax.io import checkpoints
from omniforcing_jax.sampling.teacher import Prompt
from omniforcing_jax.sampling.two_stage import REFINING, Upsampler, refine

STEPS = len(REFINING.sigmas) - 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add(
        "--upsampler", metavar="FOLDER",
        help="sample small, upsample with this (from checkpoint_converters.upsampler), and refine",
    )  # fmt: skip
    add("--refiner", metavar="FOLDER", help="distilled LTX-2 that refines (default: --checkpoint)")


@dataclasses.dataclass(frozen=True)
class Refinement:
    """A second stage that was found to be in order; no weights have been read.

    Attributes:
      upsampler: between the stages.
      clip: what comes out.
      config: of the distilled model.
      folder: of the distilled model, where it is not that of the first stage.
    """

    upsampler: Upsampler
    clip: ClipGeometry
    config: PipelineConfig
    folder: str | None

    @property
    def first_clip(self) -> ClipGeometry:
        """The clip of the first stage."""
        return self.upsampler.first_clip(self.clip)

    def __call__(
        self,
        prompt: Prompt,
        key: jax.Array,
        latents: AVLatents,
        weights: Any,
        vae_params: dict[str, Any],
        *,
        condition: Condition | None,
        dtype: jnp.dtype,
        implementation: str,
        verify: bool,
    ) -> AVLatents:
        """Upsamples and refines.

        Args:
          prompt: contexts of the text.
          key: of the first stage.
          latents: [B, T, C] of the first clip.
          weights: the distilled model's; read here if None.
          vae_params: of the video VAE.
          condition: what is given, at the size that comes out.
          dtype: in which the networks compute.
          implementation: of attention.
          verify: compare what is read with its checksums.
        """
        params = self.upsampler.load(dtype, verify)
        video = self.upsampler(params, vae_params, latents.video, self.first_clip, dtype)
        del params
        if weights is None:
            weights = checkpoints.load_params(
                self.folder, "transformer", dtype=dtype, verify=verify
            )
        model = Transformer(self.config.transformer, dtype, implementation)
        first = AVLatents(video, latents.audio)
        return refine(model, weights, prompt, key, first, self.clip, condition=condition)


def at_size(
    args: argparse.Namespace, clip: ClipGeometry, spatial_compression: int
) -> argparse.Namespace:
    """The command line for the first stage's clip: with its height and width."""
    size = {"height": clip.height, "width": clip.width}
    pixels = {name: latents * spatial_compression for name, latents in size.items()}
    return argparse.Namespace(**(vars(args) | pixels))


def plan(args: argparse.Namespace, config: PipelineConfig, clip: ClipGeometry) -> Refinement | None:
    """The second stage that the command line asks for; None without --upsampler.

    Args:
      config: of the first stage's model.
      clip: what comes out.

    Raises:
      ValueError, FileNotFoundError: what does not fit, before any weights are read.
    """
    if args.upsampler is None:
        if args.refiner is not None:
            raise ValueError("--refiner has no effect without --upsampler")
        return None
    if args.foley:
        raise ValueError("--foley keeps the film's picture, so there is nothing to upsample")
    upsampler = Upsampler.find(
        args.upsampler, config.model_version, config.transformer.video_channels
    )
    refiner, folder = config, args.checkpoint
    if args.refiner is not None:
        refiner, folder = PipelineConfig.from_checkpoint(args.refiner), args.refiner
    if refiner.trained.stage != "distilled":
        raise ValueError(
            f"{folder} is no distilled LTX-2, which the second stage needs: give one as --refiner "
            "(the distilled file, or the full one with its distilled LoRA, converted with --lora)"
        )
    if "transformer" in refiner.missing:
        raise ValueError(f"{folder} has no transformer; convert it again with it")
    if _latents_and_text(refiner) != _latents_and_text(config):
        raise ValueError(
            f"{folder} is of another LTX-2 than {args.checkpoint}; both stages need the same "
            "latents and text contexts"
        )
    found = Refinement(upsampler, clip, refiner, args.refiner)
    upsampler.first_clip(clip)
    return found


def _latents_and_text(config: PipelineConfig) -> tuple:
    t = config.transformer
    version = config.model_version.split(".")[:2]
    return version, t.text_dims, t.video_channels, t.audio_channels
