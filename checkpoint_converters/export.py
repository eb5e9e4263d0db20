"""Orbax -> safetensors in the official key layout, with metadata.

    python -m checkpoint_converters.export --input ltx2 --output ltx2.safetensors

The result has the keys, shapes and metadata of the official file, for whatever reads that one.
Tensors are copied one at a time; exporting what was converted gives back the same bytes.

What was tried: the single-file converters of diffusers 0.42 take transformer and VAEs of LTX-2.0,
and the transformer computes the same there (`test_export_diffusers.py`). They do not rename 2.3's
`prompt_adaln_single`, be the file exported or official. ltx-core and ComfyUI were not tried.
A causal student needs a reader that knows its sink tokens and its masks.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import sys
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from checkpoint_converters import converting, key_map
from checkpoint_converters.checks import SPARE_BYTES
from checkpoint_converters.safetensors_io import ConversionError, SafetensorsWriter
from checkpoint_converters.shapes import expected_shapes


class ComponentStore:
    """Arrays of one Orbax checkpoint, read in pieces.

    Args:
      folder: the component's folder.
    """

    def __init__(self, folder: pathlib.Path):
        metadata = json.loads((folder / "_METADATA").read_text())
        self._folder = folder.absolute()
        self._ocdbt = metadata["use_ocdbt"]
        self._driver = "zarr3" if metadata.get("use_zarr3", False) else "zarr"
        self.paths = []
        for entry in metadata["tree_metadata"].values():
            self.paths.append("/".join(str(key["key"]) for key in entry["key_metadata"]))
        self._stores: dict[str, ts.TensorStore] = {}

    def __getitem__(self, path: str) -> ts.TensorStore:
        """The array at a "/"-separated path, unread."""
        if path not in self._stores:
            name = path.replace("/", ".")
            if self._ocdbt:
                base = f"file://{self._folder}/"
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                kvstore = {"driver": "file", "path": f"{self._folder}/{name}/"}
            spec = {"driver": self._driver, "kvstore": kvstore}
            self._stores[path] = ts.open(spec, read=True, open=True).result()
        return self._stores[path]


def export(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    components: tuple[str, ...] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> dict:
    """Writes a converted (or trained) checkpoint as one safetensors file.

    Args:
      source: folder with config.json and the components.
      output: `.safetensors` file to create.
      components: subset to write, None for all that are there.
      overwrite: replace an existing file.
      show_progress: draw a progress bar.

    Returns:
      The content of the folder's config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source, output = pathlib.Path(source), pathlib.Path(output).absolute()
    content, problems = _read_config(source)
    pieces: dict[str, _Piece] = {}
    for component in tuple(components or content.get("components", ())):
        found, wrong = _pieces(source, content, component)
        pieces |= found
        problems += wrong
    problems += _output_problems(output, overwrite, pieces)
    if problems:
        raise ConversionError(problems)
    config = dict(content["config"])
    if content.get("student"):
        config["student"] = content["student"]  # checkpoint_converters.ltx2 finds it there
    strings = {"config": json.dumps(config), "model_version": content["model_version"]}
    _write(output, pieces, strings, show_progress)
    return content


class _Piece(NamedTuple):
    """One official tensor: a leaf, or one layer of a stacked leaf."""

    store: ts.TensorStore
    layer: int | None
    transform: key_map.Transform

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Official shape."""
        shape = self.store.shape if self.layer is None else self.store.shape[1:]
        return self.transform.invert(np.broadcast_to(np.float32(0), shape)).shape

    def read(self) -> np.ndarray:
        store = self.store if self.layer is None else self.store[self.layer]
        return self.transform.invert(store.read().result())


def _read_config(source: pathlib.Path) -> tuple[dict, list[str]]:
    file = source / "config.json"
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return {}, [f"{file}: cannot be read ({error}); --input is a folder that "
                    "checkpoint_converters.ltx2 or .omniforcing wrote"]  # fmt: skip
    if content.get("format") != converting.FORMAT:
        return {}, [f"{file}: format {content.get('format')!r}, must be {converting.FORMAT}"]
    return content, []


def _pieces(
    source: pathlib.Path, content: dict, component: str
) -> tuple[dict[str, _Piece], list[str]]:
    """({official key: piece} in the order of the official model, problems)."""
    folder = source / component
    if not (folder / "_METADATA").is_file():
        return {}, [f"{folder}: not an Orbax checkpoint; is {component} among the components?"]
    expected = expected_shapes(content["config"], component)
    reader = ComponentStore(folder)
    found, problems = {}, []
    for path in reader.paths:
        store = reader[path]
        stacked = key_map.is_stacked(component, path)
        for layer in range(store.shape[0]) if stacked else (None,):
            try:
                key, transform = key_map.official_key(component, path, layer)
            except ValueError:
                problems.append(f"{component}: {path} does not exist in the official layout")
                break
            found[key] = _Piece(store, layer, transform)
    problems += [f"{component}: {key} is missing" for key in expected if key not in found]
    problems += [f"{component}: {key} is not in the model of config.json"
                 for key in found if key not in expected]  # fmt: skip
    return {key: found[key] for key in expected if key in found}, problems


def _output_problems(output: pathlib.Path, overwrite: bool, pieces: dict[str, _Piece]) -> list[str]:
    problems = []
    if output.is_dir():
        problems.append(f"{output}: is a folder, --output is a .safetensors file")
    elif output.exists() and not overwrite:
        problems.append(f"{output}: exists; choose another --output or pass --overwrite")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        return [*problems, f"{output.parent}: not a folder that can be written to"]
    needed = SPARE_BYTES
    needed += sum(math.prod(p.shape) * p.dtype.itemsize for p in pieces.values())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        problems.append(f"{output.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")
    return problems


def _write(
    output: pathlib.Path, pieces: dict[str, _Piece], strings: dict[str, str], show: bool
) -> None:
    partial = converting.partial_path(output)
    table = {key: (piece.dtype, piece.shape) for key, piece in pieces.items()}
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in table.values())
    with (
        converting.sigterm_as_exit(),
        converting.explaining_a_full_disk(output, partial, total),
    ):
        try:
            with (
                SafetensorsWriter(partial, table, strings) as writer,
                converting.progress_bar(show, "exporting", total) as advance,
            ):
                for key, piece in pieces.items():
                    array = piece.read()
                    writer.write(key, array)
                    advance(array.nbytes)
            partial.rename(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_converters.export",
        description="Writes a converted checkpoint as one official safetensors file.",
    )
    parser.add_argument("--input", required=True, type=pathlib.Path, help="converted folder")
    parser.add_argument("--output", required=True, type=pathlib.Path, help=".safetensors file")
    parser.add_argument("--components", nargs="+", choices=key_map.COMPONENTS)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    try:
        export(
            args.input,
            args.output,
            components=args.components and tuple(args.components),
            overwrite=args.overwrite,
            show_progress=True,
        )
    except (ConversionError, KeyboardInterrupt) as error:
        print(error or "interrupted, nothing was written", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
