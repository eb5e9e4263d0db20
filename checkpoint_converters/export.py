"""Orbax -> safetensors in the official key layout, with metadata.

    python -m checkpoint_converters.export --input ltx2 --output ltx2.safetensors

The result has the keys, shapes and metadata of the official file, for whatever reads that one.
Tensors are copied one at a time; exporting what was converted gives back the same bytes (of an
upsampler, too). What the model was trained with and which LoRAs were merged into it stand in the
metadata, and checkpoint_converters.ltx2 reads them back.

What was tried: the single-file converters of diffusers 0.42 take transformer and VAEs of LTX-2.0,
and the transformer computes the same there (`test_export_diffusers.py`). They do not rename 2.3's
`prompt_adaln_single`, be the file exported or official. ltx-core and ComfyUI were not tried.
A causal student needs a reader that knows its sink tokens and its masks.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from checkpoint_converters import key_map, lora
from checkpoint_converters.converting import stay_on_host
from checkpoint_converters.orbax_io import open_leaf
from checkpoint_converters.output import file_problems, write_file
from checkpoint_converters.safetensors_io import ConversionError, table_bytes
from checkpoint_converters.shapes import ANY, expected_shapes
from omniforcing_jax import programs
from omniforcing_jax.io import checkpoints, outputs
from omniforcing_jax.io.checkpoints import COMPONENTS, TINY_DECODER, UPSAMPLER, UPSAMPLERS
from omniforcing_jax.sampling.trained import ENTRY, LTX2_BASE, TrainedSettings
from omniforcing_jax.text.encoder_files import GEMMA_VERSION

PROGRAM = "checkpoint_converters.export"


def export(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    components: tuple[str, ...] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    verify: bool = True,
) -> dict:
    """Writes a converted (or trained) checkpoint as one safetensors file.

    Args:
      source: folder with config.json and the components.
      output: `.safetensors` file to create.
      components: subset to write, None for all that are there.
      overwrite: replace an existing file.
      show_progress: draw a progress bar.
      verify: compare the files with their checksums first.

    Returns:
      The content of the folder's config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source, output = pathlib.Path(source), pathlib.Path(output).absolute()
    try:
        content = checkpoints.load_config(source)
    except (OSError, ValueError) as error:
        raise ConversionError([f"{source}: cannot be read ({error})"]) from error
    pieces: dict[str, key_map.Piece] = {}
    problems: list[str] = []
    there = (name for name in content["components"] if name != TINY_DECODER)
    components = tuple(components or there)
    for component in components:
        try:
            if verify:
                checkpoints.verify_components(source, [component])
            tree = checkpoints.param_shapes(source, component)
        except FileNotFoundError:
            problems.append(f"{source / component}: not an Orbax checkpoint; is {component} among "
                            "the components?")  # fmt: skip
            continue
        except checkpoints.DamagedFile as error:
            problems.append(str(error))
            continue
        folder = checkpoints.component_folder(source, component, content)
        leaves = {path: open_leaf(folder, path) for path in flatten_dict(tree, sep="/")}
        found, wrong = _official_pieces(component, leaves, content["config"])
        if component in UPSAMPLERS:  # alone in their files, without a prefix
            found = {key.removeprefix(f"{component}."): piece for key, piece in found.items()}
        pieces |= found
        problems += wrong
    table = {key: (piece.leaf.dtype.numpy_dtype, piece.shape) for key, piece in pieces.items()}
    problems += file_problems(output, overwrite, table_bytes(table), PROGRAM, [source])
    if problems:
        raise ConversionError(problems)
    # checkpoint_converters.ltx2 finds there what the model was trained with
    config = {name: part for name, part in content["config"].items() if name != TINY_DECODER}
    if content["family"] == UPSAMPLER:
        (config,) = config.values()
    elif TrainedSettings.read(content) != LTX2_BASE:  # LTX-2's own files have no such entry
        config[ENTRY] = content[ENTRY]
    if lora.ENTRY in content:
        config[lora.ENTRY] = content[lora.ENTRY]
    strings = {"config": json.dumps(config), "model_version": content["model_version"]}
    strings[outputs.MARK] = PROGRAM
    if GEMMA_VERSION in content:
        strings[key_map.GEMMA_SOURCE] = json.dumps({GEMMA_VERSION: content[GEMMA_VERSION]})
    write_file(output, table, strings, lambda key: pieces[key].read(), show_progress=show_progress)
    return content


def write_components(
    path: str | os.PathLike,
    components: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    model_version: str,
    *,
    dtype: np.dtype | type = np.float32,
    program: str = "",
) -> None:
    """Writes parameters in memory; a file that is there is replaced when the new one is complete.

    Args:
      path: `.safetensors` file.
      components: {component: parameter tree in our layout}.
      config: the metadata's `config` object; it must describe these components.
      model_version: such as "2.0.0".
      dtype: of all tensors.
      program: that writes them, so that it knows the file again.

    Raises:
      ConversionError: tensors that the config does not have, lacks, or that have other shapes; or
        there is no room for the file.
    """
    path = pathlib.Path(path).absolute()
    pieces: dict[str, key_map.Piece] = {}
    problems: list[str] = []
    for component, tree in components.items():
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
        found, wrong = _official_pieces(component, leaves, config)
        pieces |= found
        problems += wrong
    if problems:
        raise ConversionError(problems)
    strings = {"config": json.dumps(config), "model_version": model_version, outputs.MARK: program}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {key: (np.dtype(dtype), piece.shape) for key, piece in pieces.items()}
    write_file(path, table, strings, lambda key: pieces[key].read().astype(dtype))


def _official_pieces(
    component: str, leaves: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, key_map.Piece], list[str]]:
    """({official key: piece} in the order of the official model, problems).

    Args:
      component: one of `checkpoints.COMPONENTS`.
      leaves: {"/"-separated path: array, in memory or on disk}.
      config: the metadata's `config` object.
    """
    expected = expected_shapes(config, component)
    found, problems = {}, []
    for path, leaf in leaves.items():
        try:
            found |= key_map.official_pieces(component, path, leaf)
        except ValueError:
            problems.append(f"{component}: {path} does not exist in the official layout")
    problems += [f"{component}: {key} is missing" for key in expected if key not in found]
    problems += [f"{component}: {key} is not in the model of config.json"
                 for key in found if key not in expected]  # fmt: skip
    for key, shape in expected.items():
        own = found[key].shape if key in found else shape
        if len(own) != len(shape) or any(
            m not in (n, ANY) for n, m in zip(own, shape, strict=True)
        ):
            problems.append(f"{component}: {key} has shape {own}, must be {shape}")
    return {key: found[key] for key in expected if key in found}, problems


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.export", __doc__)
    parser.add_argument("--input", required=True, type=pathlib.Path, help="converted folder")
    parser.add_argument("--output", required=True, type=pathlib.Path, help=".safetensors file")
    parser.add_argument("--components", nargs="+", choices=COMPONENTS)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    stay_on_host()
    with programs.when_interrupted("nothing was written"):
        export(
            args.input,
            args.output,
            components=args.components and tuple(args.components),
            overwrite=args.overwrite,
            show_progress=True,
        )
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
