"""LTX-2's latent upsamplers -> Orbax.

    python -m checkpoint_converters.upsampler \\
        --input ltx-2-spatial-upscaler-x2-1.0.safetensors --output checkpoints/upsampler

Reads the official file of a spatial (x2, x1.5) or temporal (x2) upsampler, or diffusers' folder
`latent_upsampler`, and writes OUTPUT/config.json and one Orbax checkpoint. An upsampler belongs to
the latents of one LTX-2 version.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from checkpoint_converters import checks, contents, converting
from checkpoint_converters.reading import Checkpoint, open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo
from checkpoint_converters.shapes import model_shapes
from omniforcing_jax import programs
from omniforcing_jax.io.checkpoints import UPSAMPLER, parsing, read_json
from omniforcing_jax.models.upsampler import UpsamplerConfig

_DIFFUSERS_NAMES = {
    "rational_spatial_scale": "spatial_scale",
    "use_rational_resampler": "rational_resampler",
}


def convert(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    model_version: str | None = None,
    **options: Any,
) -> dict:
    """Converts an upsampler.

    Args:
      source: file or folder, see `reading.open_checkpoint`.
      output: folder to create.
      model_version: of the LTX-2 whose latents it takes, for files whose metadata does not say.
      options: dtype, mesh, overwrite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source = pathlib.Path(source)
    checkpoint = open_checkpoint(source)
    if wrong := contents.misplaced(source, checkpoint.tensors, contents.UPSAMPLER):
        raise ConversionError(wrong)
    version = checkpoint.model_version or model_version
    checkpoint = dataclasses.replace(checkpoint, model_version=version)
    problems = checks.version_problems(checkpoint)
    metadata = checkpoint.config or _diffusers_metadata(source)
    try:
        with parsing(source):
            config = UpsamplerConfig.from_metadata(metadata)
    except ValueError as error:
        raise ConversionError([str(error), *problems]) from error
    tensors, wrong = select(checkpoint, config)
    component = config.component
    content = converting.config_content(
        "checkpoint_converters.upsampler",
        UPSAMPLER,
        {component: metadata},
        checkpoint.files,
        model_version=version,
        components=[component],
    )
    plan = converting.ConversionPlan(
        content, tensors, (component,), inputs=(source,), weights=checkpoint.files
    )
    return converting.run(plan, problems + wrong, output, **options)


def _diffusers_metadata(source: pathlib.Path) -> Mapping[str, Any]:
    """The settings in diffusers' config.json, under their official names."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    found = read_json(file) if file.is_file() else {}
    if found.get("_class_name") != "LTX2LatentUpsamplerModel":
        raise ConversionError(
            [
                f"{source}: no `config` in the file's metadata, so its architecture is unknown; "
                "use the original file of an upsampler, or diffusers' folder latent_upsampler"
            ]
        )
    return {_DIFFUSERS_NAMES.get(k, k): v for k, v in found.items() if not k.startswith("_")}


def select(
    checkpoint: Checkpoint, config: UpsamplerConfig
) -> tuple[dict[str, TensorInfo], list[str]]:
    """({key of the table: tensor}, everything that is wrong with them)."""
    prefix = config.component + "."
    shapes = model_shapes(config.component, config)
    expected = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    problems = checks.compare(checkpoint.tensors, expected)
    problems += [
        (key, "is not part of the upsampler that the metadata describes")
        for key in checkpoint.tensors
        if key not in expected
    ]
    tensors = {prefix + key: info for key, info in checkpoint.tensors.items() if key in expected}
    return tensors, checks.grouped(problems)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.upsampler", __doc__)
    converting.add_input(parser, ".safetensors file, or diffusers' folder latent_upsampler")
    parser.add_argument(
        "--model-version", metavar="X.Y.Z", help="for files whose metadata does not say, e.g. 2.0.0"
    )
    return converting.main(parser, argv, convert, _describe)


def _describe(content: dict) -> str:
    (component,) = content["components"]
    config = UpsamplerConfig.from_metadata(content["config"][component])
    what = "twice the frames" if config.temporal else f"{config.scale:g} times the size"
    return f"upsampler of LTX-2 {content['model_version']}'s latents to {what}"


if __name__ == "__main__":
    sys.exit(main())
