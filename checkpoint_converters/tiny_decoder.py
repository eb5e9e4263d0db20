"""Adds a tiny video decoder to a converted checkpoint, for `launch.stream --decode tiny`.

    python -m checkpoint_converters.tiny_decoder --input taeltx2_3.safetensors \\
        --checkpoint checkpoints/ltx2.3

Reads the files `taeltx_2` (for LTX-2.0) and `taeltx2_3` (for 2.3 and 2.5) of TAEHV, which has them
as .pth and, in its folder `safetensors`, as .safetensors. A .pth is read where PyTorch is
installed, which then loads tensors only and runs nothing of what else may be in the file.
"""

import dataclasses
import math
import pathlib
import pickle
import sys
import tempfile

from checkpoint_converters import checks, contents
from checkpoint_converters.converting import stay_on_host
from checkpoint_converters.file_kinds import is_pytorch
from checkpoint_converters.reading import Checkpoint, assemble, open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, write_safetensors
from checkpoint_converters.shapes import model_shapes
from omniforcing_jax import programs
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import TINY_DECODER
from omniforcing_jax.models.tiny_decoder import NUM_STAGES, TinyDecoderConfig
from omniforcing_jax.models.video_vae.model import VideoVAEConfig

_PREFIX = TINY_DECODER + "."
# what a file's name begins with: the LTX-2 whose latents it decodes
_VERSIONS = {"taeltx_2": ("2.0",), "taeltx2_3": ("2.3", "2.5")}
_NOT_ONE = (
    "is no tiny decoder in the layout for LTX-2; use taeltx_2 (for LTX-2.0) or taeltx2_3 (for 2.3 "
    "and 2.5) of TAEHV; taeltx2_3_wide is built otherwise"
)


def add(
    source: pathlib.Path,
    checkpoint: pathlib.Path,
    *,
    any_version: bool = False,
    overwrite: bool = False,
) -> TinyDecoderConfig:
    """Adds the decoder of a file to a converted checkpoint, as its component `tiny_decoder`.

    Args:
      source: .safetensors or .pth.
      checkpoint: folder of a converted LTX-2 or student; complete or as it was at every moment.
      any_version: take the file whatever its name says of the LTX-2 that it is for.
      overwrite: replace a tiny decoder that was added before.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
      FileNotFoundError, ValueError: see `checkpoints.load_config`.
    """
    content = checkpoints.load_config(checkpoint)
    problems = [] if any_version else _version_problems(source, content["model_version"])
    if TINY_DECODER in content["components"] and not overwrite:
        problems.append(f"{checkpoint}: has a tiny decoder; --overwrite replaces it")
    with tempfile.TemporaryDirectory() as folder:
        if is_pytorch(source):
            source = _as_safetensors(source, pathlib.Path(folder) / f"{source.stem}.safetensors")
        opened = open_checkpoint(source)
        if wrong := contents.misplaced(source, opened.tensors, contents.TINY_DECODER):
            raise ConversionError(wrong)
        tensors = {
            _PREFIX + key: info
            for key, info in opened.tensors.items()
            if not key.startswith("encoder.")
        }
        config, found = _read_config(dataclasses.replace(opened, tensors=tensors))
        problems += found
        vae = content["config"].get("vae", {})
        channels = VideoVAEConfig.from_metadata(vae).latent_channels if vae else None
        if config is not None and channels not in (None, config.latent_channels):
            problems.append(
                f"{source}: is for latents of {config.latent_channels} channels, those of "
                f"{checkpoint} have {channels}"
            )
        if problems:
            raise ConversionError(problems)
        params = assemble(dataclasses.replace(opened, tensors=tensors), TINY_DECODER)
    content["config"] = content["config"] | {TINY_DECODER: dataclasses.asdict(config)}
    checkpoints.save_params(checkpoint, TINY_DECODER, params, content)
    return config


def _version_problems(source: pathlib.Path, version: str) -> list[str]:
    """By the file's name, as nothing inside says which LTX-2 it is for."""
    takes = next((v for name, v in _VERSIONS.items() if source.name.startswith(name)), None)
    if takes is None:
        return [
            f"{source}: its name does not say which LTX-2 it is for (taeltx_2… or taeltx2_3…), nor "
            "does anything in it; --any-version takes it all the same"
        ]
    if version.startswith(takes):
        return []
    return [
        f"{source}: is for LTX-2 {' and '.join(takes)}, whose latents are not those of this "
        f"checkpoint, an LTX-2 {version}; --any-version takes it all the same"
    ]


def _as_safetensors(source: pathlib.Path, file: pathlib.Path) -> pathlib.Path:
    """Writes the tensors of a PyTorch file to `file`."""
    try:
        import torch
    except ImportError:
        raise ConversionError(
            [
                f"{source}: is a PyTorch file, and there is no PyTorch to read it; use "
                f"safetensors/{file.name} of the same repository, or `pip install torch`"
            ]
        ) from None
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        exact = (torch.float16, torch.float32)
        arrays = {
            key: (tensor if tensor.dtype in exact else tensor.float()).numpy()
            for key, tensor in state.items()
        }
    except (pickle.UnpicklingError, RuntimeError, AttributeError, TypeError) as error:
        line = str(error).partition("\n")[0]
        raise ConversionError(
            [f"{source}: PyTorch finds no plain weights in it ({line}); download it again"]
        ) from error
    table = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    write_safetensors(file, table, {}, arrays.__getitem__)
    return file


def _read_config(checkpoint: Checkpoint) -> tuple[TinyDecoderConfig | None, list[str]]:
    """The architecture that the shapes tell, and everything that is wrong with the tensors."""

    def shape(layer: str) -> tuple[int, ...]:
        info = checkpoint.tensors.get(f"{_PREFIX}decoder.{layer}.weight")
        return (0, 0, 0, 0) if info is None or len(info.shape) != 4 else tuple(info.shape)

    first, last = shape("1"), shape("22")
    widths = (first[0], *(shape(str(8 + 6 * stage))[0] for stage in range(NUM_STAGES)))
    try:
        config = TinyDecoderConfig(first[1], widths, math.isqrt(last[0] // 3))
    except ValueError:
        return None, [f"{checkpoint.path}: {_NOT_ONE}"]
    expected = model_shapes(TINY_DECODER, config)
    problems = checks.compare(checkpoint.tensors, expected)
    problems += [(key, "is unknown") for key in sorted(checkpoint.tensors.keys() - expected.keys())]
    if problems:
        return None, [f"{checkpoint.path}: {_NOT_ONE}", *checks.grouped(problems)]
    return config, []


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.tiny_decoder", __doc__)
    argument = parser.add_argument
    argument(
        "--input", required=True, type=pathlib.Path, dest="source", metavar="INPUT",
        help="taeltx_2 or taeltx2_3, .safetensors or .pth",
    )  # fmt: skip
    argument("--checkpoint", required=True, type=pathlib.Path, help="converted LTX-2 or student")
    argument("--any-version", action="store_true", help="whatever the file's name says")
    argument("--overwrite", action="store_true", help="replace one that was added before")
    args = parser.parse_args(argv)
    stay_on_host()
    with programs.when_interrupted("the checkpoint is as it was"):
        config = add(**vars(args))
    widths = "-".join(map(str, config.widths))
    print(f"{args.checkpoint}: a tiny decoder of {widths} channels was added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
