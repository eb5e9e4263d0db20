"""LoRA files, merged into the weights of a model while it is converted.

The files of LTX-2's trainer (`diffusion_model.X.lora_A.weight`), of diffusers (`transformer.X`,
`connectors.X`), of PEFT (`base_model.model.X`) and of third parties (`lora_down`, `.alpha`,
`lora_unet_X` with underscores) are read. Where a file states an alpha, it counts, which LTX-2's own
loader does not do. Sums are formed in float32 and rounded once, after the last LoRA.
"""

import argparse
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from checkpoint_converters import checks, contents, reading
from checkpoint_converters.computed import ComputedTensor, Rows, rows_of
from checkpoint_converters.diffusers_layout import official_from_diffusers
from checkpoint_converters.key_map import DIT, find_place
from checkpoint_converters.safetensors_io import (
    ConversionError,
    Problem,
    TensorInfo,
    read_header,
    read_tensor,
)
from checkpoint_converters.shapes import expected_shapes
from omniforcing_jax.models import lora

Tensor = TensorInfo | ComputedTensor

# what may stand before the names of layers, outermost first; each once
_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "connectors.")
_ONLY_THE_TRANSFORMER = "which is done once and for all, by checkpoint_converters.ltx2 --lora"
_FLAT = "lora_unet_"  # then "_" in place of all "."
ENTRY = "loras"  # of config.json, and of an exported file's config: what was merged
# metadata of LoRAs that take a reference clip, kept for whoever samples with them
_REFERENCE = ("reference_downscale_factor", "reference_temporal_scale_factor")


class Lora(NamedTuple):
    """A LoRA file whose tensors were found to form pairs.

    Attributes:
      path: the file.
      strength: what it is multiplied with.
      tensors: all of the file.
      layers: {name of a layer in the file: keys}.
      alpha: of all layers that have no own; None: their rank.
      strings: metadata.
    """

    path: pathlib.Path
    strength: float
    tensors: dict[str, TensorInfo]
    layers: dict[str, lora.LayerKeys]
    alpha: float | None
    strings: dict[str, str]


def parse(text: str) -> tuple[pathlib.Path, float]:
    """'style.safetensors:0.6' -> (file, 0.6); without a number, the strength is 1.

    Raises:
      ValueError: the strength is zero or not finite.
    """
    file, colon, number = text.rpartition(":")
    if not colon or not file or pathlib.Path(text).exists():
        return pathlib.Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return pathlib.Path(text), 1.0
    if not math.isfinite(strength) or strength == 0:
        raise ValueError(f"--lora {text!r}: the strength must be a finite number other than zero")
    return pathlib.Path(file), strength


def add_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--lora`, whose value is `loras`, a list of (file, strength); `text` is its help."""

    def kind(text: str) -> tuple[pathlib.Path, float]:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser.add_argument(
        "--lora", nargs="+", action="extend", default=[], type=kind, dest="loras",
        metavar="FILE[:STRENGTH]", help=text,
    )  # fmt: skip


def open_lora(path: pathlib.Path, strength: float = 1.0) -> Lora:
    """Reads the header of a LoRA file, or of a folder that holds one.

    Raises:
      ConversionError: it is no LoRA, or one of a kind that is not merged.
    """
    files = reading.weight_files(path) if path.is_dir() else (path,)
    tensors, strings = read_header(files[0])
    if len(files) != 1:
        raise ConversionError(
            contents.misplaced(path, tensors, contents.LORA)
            or [f"{path}: holds several files; pass one as --lora FILE"]
        )
    layers, stray, others = lora.layers_of(tensors)
    if others:
        listing = ", ".join(f"{name} ({key})" for name, key in others.items())
        raise ConversionError(
            [f"{path}: is not a plain LoRA but {listing}, which is not merged; use a LoRA of "
             "lora_A and lora_B, or a model with it merged"]
        )  # fmt: skip
    if not layers:
        what = "has no pairs of lora_A and lora_B, or lora_down and lora_up; is it a LoRA?"
        raise ConversionError(
            contents.misplaced(path, tensors, contents.LORA) or [f"{path}: {what}"]
        )
    if stray:
        raise ConversionError(
            [Problem(f"{path}: {key} belongs to no pair of LoRA matrices", "no pair")
             for key in stray]
        )  # fmt: skip
    return Lora(files[0], strength, tensors, layers, _stated_alpha(files[0], strings), strings)


def _stated_alpha(path: pathlib.Path, strings: Mapping[str, str]) -> float | None:
    """The alpha that PEFT's settings state, in a file beside the weights or in their metadata."""
    beside = path.parent / "adapter_config.json"
    try:
        settings = json.loads(strings.get("lora_adapter_metadata", "{}"))
        if path.name == "adapter_model.safetensors" and beside.is_file():
            settings |= json.loads(beside.read_text())
        # diffusers puts the component's name before each
        found = {key.rpartition(".")[2]: value for key, value in settings.items()}
        alpha = found.get("lora_alpha")
        alpha = None if alpha is None else _check_alpha(float(alpha))
    except (ValueError, AttributeError, TypeError) as error:
        raise ConversionError([f"{path}: its LoRA settings cannot be read ({error})"]) from error
    unknown = [n for n in ("alpha_pattern", "use_rslora", "use_dora") if found.get(n)]
    if unknown:
        raise ConversionError(
            [f"{path}: its settings have {' and '.join(unknown)}, which is not supported"]
        )
    return alpha


def merge(
    tensors: Mapping[str, Tensor],
    loras: Sequence[tuple[pathlib.Path, float]],
    components: Sequence[str],
) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[str]]:
    """({official key: tensor} with the LoRAs in, what was merged, problems).

    Args:
      tensors: {official key: tensor} of the model.
      loras: (file, strength), merged in this order.
      components: those that are converted.
    """
    merged, records, problems = dict(tensors), [], []
    for path, strength in loras:
        try:
            opened = open_lora(path, strength)
        except ConversionError as error:
            problems += error.problems
            continue
        targets, wrong = targets_of(opened, tensors, components)
        for layer, key in targets.items():
            try:
                merged[key] = _merged(merged[key], opened, layer)
            except ValueError as error:
                wrong.append(Problem(f"{opened.path}: {layer} {error}", "LoRA matrices"))
        problems += wrong
        if not wrong:
            records.append(_record(opened))
    return merged, records, problems


def updates(
    loras: Sequence[tuple[pathlib.Path, float]], config: Mapping[str, Any]
) -> tuple[list[lora.KernelUpdate], list[str]]:
    """What LoRAs add to the transformer of a converted checkpoint; only their headers are read.

    Args:
      loras: (file, strength), merged in this order.
      config: the metadata's `config` object, of the checkpoint.

    Returns:
      For `load_pipeline`; and a line on each file.

    Raises:
      ConversionError: everything that is wrong.
    """
    shapes = {key: shape for part in ("transformer", "connectors")
              for key, shape in expected_shapes(config, part).items()}  # fmt: skip
    found, lines, problems = [], [], []
    for path, strength in loras:
        try:
            opened = open_lora(path, strength)
        except ConversionError as error:
            problems += error.problems
            continue
        targets, wrong = targets_of(opened, shapes, ("transformer",), _ONLY_THE_TRANSFORMER)
        for layer, key in targets.items():
            try:
                down, up, scale = pair_of(opened, layer, shapes[key])
            except ValueError as error:
                wrong.append(Problem(f"{opened.path}: {layer} {error}", "LoRA matrices"))
                continue
            place = find_place(key)
            read = functools.partial(read_pair, down, up, broken(opened, layer))
            found.append(lora.KernelUpdate(place.path, place.layer, scale, read))
        problems += wrong
        record = {"name": opened.path.name, "strength": strength, "layers": len(opened.layers)}
        lines.append(describe(record))
    if problems:
        raise ConversionError(problems)
    return found, lines


def read_pair(down: TensorInfo, up: TensorInfo, problem: str) -> tuple[np.ndarray, np.ndarray]:
    """Both matrices, float32.

    Raises:
      ConversionError: one is not finite, which is said as `problem`.
    """
    matrices = tuple(read_tensor(info).astype(np.float32) for info in (down, up))
    if not all(np.isfinite(matrix).all() for matrix in matrices):
        raise ConversionError([problem])
    return matrices


def broken(opened: Lora, layer: str) -> str:
    """What is said of a layer that is not finite."""
    return f"{opened.path}: {layer} is not finite; use another copy of the file"


def targets_of(
    opened: Lora,
    tensors: Iterable[str],
    components: Sequence[str],
    otherwise: str = "which is not converted; add it to --components",
) -> tuple[dict[str, str], list[str]]:
    """({layer of the file: official key of the weight}, layers that match nothing)."""
    flat = {}
    if any(layer.startswith(_FLAT) for layer in opened.layers):
        flat = {key.removeprefix(DIT).replace(".", "_"): key for key in tensors}
    targets: dict[str, str] = {}
    problems = []
    for layer in opened.layers:
        key = next((k for k in _candidates(layer, flat) if k in tensors), None)
        if key is None:
            text = f"{opened.path}: {layer} matches no layer of the model"
            problems.append(Problem(text, "matches no layer"))
        elif key in targets.values():
            problems.append(Problem(f"{opened.path}: has {key} twice", "layers twice"))
        elif contents.owner(key) not in components:
            text = f"{opened.path}: {layer} changes the {contents.owner(key)}, {otherwise}"
            problems.append(Problem(text, "not among the components"))
        else:
            targets[layer] = key
    return targets, problems


def _candidates(layer: str, flat: Mapping[str, str]) -> list[str]:
    """Official keys that a layer's name may stand for, most likely first."""
    if layer.startswith(_FLAT):
        return [flat.get(layer.removeprefix(_FLAT) + "_weight", "")]
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    name = f"{layer}.weight"
    renamed = [
        official_from_diffusers(part, [name])[name] for part in ("transformer", "connectors")
    ]
    return [DIT + name, name, *renamed]


def _merged(base: Tensor, opened: Lora, layer: str) -> ComputedTensor:
    """The weight with a LoRA's layer added.

    Raises:
      ValueError: shapes, dtypes or the alpha do not fit.
    """
    down, up, scale = pair_of(opened, layer, base.shape)
    not_finite = [broken(opened, layer)]

    def open_rows() -> Rows:
        rows, up_rows = rows_of(base), rows_of(up)
        matrix = read_tensor(down).astype(np.float32)

        def summed(start: int, stop: int) -> np.ndarray:
            added = lora.update(matrix, up_rows(start, stop), np.float32(scale))
            if not np.isfinite(added).all():
                raise ConversionError(not_finite)
            added += rows(start, stop)
            return added

        return summed

    computed = isinstance(base, ComputedTensor)
    parts = (*(base.parts if computed else (base,)), down, up)
    recipe = [*(base.recipe if computed else []), "lora", scale]
    return ComputedTensor(base.shape, base.dtype_code, parts, recipe, open_rows)


def pair_of(
    opened: Lora, layer: str, shape: tuple[int, ...]
) -> tuple[TensorInfo, TensorInfo, float]:
    """(down, up, factor) of a layer whose weight has this shape, [out, in].

    Raises:
      ValueError: shapes, dtypes or the alpha do not fit.
    """
    keys = opened.layers[layer]
    down, up = opened.tensors[keys.down], opened.tensors[keys.up]
    rank = down.shape[0] if down.shape else 0
    fits = rank > 0 and len(shape) == 2
    if not fits or (down.shape, up.shape) != ((rank, shape[1]), (shape[0], rank)):
        raise ValueError(
            f"has matrices of shape {down.shape} and {up.shape}, which do not fit a weight of "
            f"shape {shape}"
        )
    for info in (down, up):
        if info.dtype_code not in checks.WEIGHT_DTYPES:
            raise ValueError(f"has dtype {info.dtype_code}; use one in bfloat16 or float32")
    return down, up, lora.factor(opened.strength, rank, _alpha(opened, keys))


def _alpha(opened: Lora, keys: lora.LayerKeys) -> float | None:
    if keys.alpha is None:
        return opened.alpha
    info = opened.tensors[keys.alpha]
    if math.prod(info.shape) != 1:
        raise ValueError(f"has an alpha of shape {info.shape}; it must be one number")
    return _check_alpha(float(read_tensor(info).astype(np.float64).reshape(())))


def _check_alpha(alpha: float) -> float:
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"has alpha {alpha}; it must be a positive number")
    return alpha


def _record(opened: Lora) -> dict[str, Any]:
    """What config.json says of a merged LoRA."""
    ranks = {opened.tensors[keys.down].shape[0] for keys in opened.layers.values()}
    alphas = {_alpha(opened, keys) for keys in opened.layers.values()}
    record = {
        "name": opened.path.name,
        "bytes": opened.path.stat().st_size,
        "sha256": _sha256(opened.path),
        "strength": opened.strength,
        "layers": len(opened.layers),
        "rank": sorted(ranks),
        "alpha": sorted(alphas, key=lambda alpha: -1.0 if alpha is None else alpha),
    }
    return record | {name: opened.strings[name] for name in _REFERENCE if name in opened.strings}


def describe(record: Mapping[str, Any]) -> str:
    """One line of a record of config.json.

    Raises:
      KeyError, TypeError, ValueError: it is none.
    """
    name, strength, layers = record["name"], record["strength"], record["layers"]
    return f"merged: {name}, strength {strength:g}, {layers} layers"


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
