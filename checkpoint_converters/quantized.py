"""Low-precision weights as they lie in files -> the weights they stand for.

| layout | tensors of a linear layer X |
|---|---|
| scaled fp8 | `X.weight` F8, `X.weight_scale` F32: w * scale, one or per row |
| scaled fp8 (older ComfyUI) | `X.weight` F8, `X.scale_weight`, one `scaled_fp8` in the file |
| fp8 cast | `X.weight` F8 and no scale anywhere: the values are the weights |
| NVFP4 | `X.weight` U8 [out, in/2], `X.weight_scale` F8 per 16 inputs, `X.weight_scale_2` F32 |
| ComfyUI's int8 | `X.weight` I8, `X.weight_scale` F32, `X.comfy_quant`; rotated if that says so |

`X.input_scale` is for activations, which are not quantised here. Any other layout is refused by
its name. All products are formed in float32, once rounded.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from checkpoint_converters.computed import ComputedTensor, Rows, rows_of, some_rows
from checkpoint_converters.orbax_io import Leaf
from checkpoint_converters.safetensors_io import (
    USE_INSTEAD,
    ConversionError,
    Problem,
    TensorInfo,
    read_tensor,
)

STORED_AS = "BF16"  # unless another dtype is asked for
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_PACKED = ("U8", "I8")
_EXPONENTS = ("F8_E8M0", "U8")  # dtypes of mxfp8's scales
_SCALES = ("weight_scale", "scale_weight")
# tensors beside a quantised `weight` that go with it
_BESIDE = (*_SCALES, "weight_scale_2", "input_scale", "scale_input", "comfy_quant")
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "nvfp4": "U8",
            "int8_tensorwise": "I8"}  # fmt: skip
# (what a key must match, whose layout that is)
_FOREIGN = (
    (r".*\.(pre_quant_scale|smooth_factor|wscales|wcscales)", "SVDQuant or AWQ"),
    (r".*\.(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r".*\.weight\.(absmax|quant_map|quant_state\..*)", "bitsandbytes"),
    (r".*\.weight\._(data|scale|shift)", "optimum-quanto"),
    (r".*\.weight[_:](qdata|scale_and_zero|zero_point|quantized_data)", "torchao"),
    (r".*\.weight_quantizer\..*", "ModelOpt with quantizers"),
    (r".*\.weight_scale_inv", "fp8 with a scale per block"),
)
_MAX_MARKER_BYTES = 1 << 16
_BLOCK = 16  # inputs that share a scale in NVFP4
# both E2M1 values of a byte, that of the even index in the high half
_E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_PAIRS = np.stack([_E2M1[np.arange(256) >> 4], _E2M1[np.arange(256) & 15]], axis=-1)

Tensors = dict[str, TensorInfo | ComputedTensor]


def dequantize(
    path: pathlib.Path, tensors: Mapping[str, TensorInfo], strings: Mapping[str, str]
) -> tuple[Tensors, list[str]]:
    """({key: tensor} with the weights in place of what stands for them, remarks).

    Args:
      path: named in messages.
      tensors: all of a checkpoint, under its own keys.
      strings: its files' metadata; `_quantization_metadata` says what `comfy_quant` tensors say.

    Raises:
      ConversionError: a layout that is not converted, or scales that do not fit.
    """
    foreign = [
        Problem(f"{path}: quantised as {name} does ({key}), which is not converted; {USE_INSTEAD}")
        for pattern, name in _FOREIGN
        if (key := next((key for key in tensors if re.fullmatch(pattern, key)), None))
    ]
    if foreign:
        raise ConversionError(foreign)
    low = [key for key, info in tensors.items() if _is_low(key, info)]
    modules = {key.removesuffix(".weight") for key in low}
    markers = _markers(tensors, modules, strings)
    # integers with nothing beside them are no layout; their dtype is found wrong later
    low = [
        key
        for key in low
        if tensors[key].dtype_code in FLOAT8
        or (module := key.removesuffix(".weight")) in markers
        or any(f"{module}.{name}" in tensors for name in _BESIDE)
    ]
    if not low:
        return dict(tensors), []
    modules = {key.removesuffix(".weight") for key in low}
    beside = {f"{module}.{name}" for module in modules for name in _BESIDE}
    result: Tensors = {
        key: info
        for key, info in tensors.items()
        if key not in beside and key.rpartition(".")[2] != "scaled_fp8"
    }
    scaled = any(key.rpartition(".")[2] in (*_SCALES, "scaled_fp8") for key in tensors)
    problems, counts = _Refusals(path), {}
    for key in low:
        module = key.removesuffix(".weight")
        name = _layout(tensors, module, tensors[key], markers.get(module, {}), scaled)
        if name not in _READERS:
            problems.layout(name, key)
            continue
        try:
            marker = markers.get(module, {})
            result[key] = _READERS[name](tensors, module, tensors[key], marker)
            counts[name] = counts.get(name, 0) + 1
        except ValueError as error:
            problems.tensor(key, str(error))
    problems.check()
    return result, [f"{count} weights were {name}" for name, count in counts.items()]


class _Refusals:
    """What is wrong: one line for each layout, one for each tensor with wrong scales."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._layouts: dict[str, list[str]] = {}
        self._tensors: list[Problem] = []

    def layout(self, name: str, key: str) -> None:
        self._layouts.setdefault(name, []).append(key)

    def tensor(self, key: str, text: str) -> None:
        self._tensors.append(Problem(f"{key}: {text}", "scales"))

    def check(self) -> None:
        lines = [
            f"{self._path}: holds {name} ({len(keys)} of its weights, such as {keys[0]}), which is "
            f"not converted; {USE_INSTEAD}"
            for name, keys in self._layouts.items()
        ]
        if lines or self._tensors:
            raise ConversionError(lines + self._tensors)


def _is_low(key: str, info: TensorInfo) -> bool:
    """Whether a tensor stands for weights in low precision; scales and markers do not."""
    if info.dtype_code in FLOAT8 and info.shape:
        return key.rpartition(".")[2] not in (*_BESIDE, "scaled_fp8")
    return info.dtype_code in _PACKED and key.endswith(".weight")


def _names(module: str, suffixes: tuple[str, ...]) -> list[str]:
    return [f"{module}.{suffix}" for suffix in suffixes]


def _markers(
    tensors: Mapping[str, TensorInfo], modules: set[str], strings: Mapping[str, str]
) -> dict[str, dict]:
    """{module: what ComfyUI says of it}, from the tensors beside the weights or the metadata."""
    found: dict[str, dict] = {}
    for name, settings in _stated_layers(strings).items():
        # the names may lack what stands before the transformer's
        for module in (m for m in modules if m == name or m.endswith("." + name)):
            found[module] = _settings(settings)
    for module in modules:
        info = tensors.get(f"{module}.comfy_quant")
        if info is not None and info.num_bytes <= _MAX_MARKER_BYTES:
            try:
                found[module] = _settings(json.loads(read_tensor(info).tobytes()))
            except ValueError:
                found[module] = {"format": "unreadable comfy_quant"}
    return found


def _stated_layers(strings: Mapping[str, str]) -> dict:
    try:
        layers = json.loads(strings.get("_quantization_metadata", "{}")).get("layers")
    except (ValueError, AttributeError):
        layers = None
    return layers if isinstance(layers, dict) else {}


def _settings(said: object) -> dict:
    """{"format": ..., ...} of what is said of a layer, be it the format alone."""
    if not isinstance(said, dict):
        return {"format": str(said)}
    nested = said.get("params")
    return said | (nested if isinstance(nested, dict) else {})


def _layout(
    tensors: Mapping[str, TensorInfo],
    module: str,
    info: TensorInfo,
    marker: Mapping,
    scaled: bool,
) -> str:
    """Name of a weight's layout; a key of `_READERS` if it is one that is converted."""
    stated, rotated = marker.get("format"), bool(marker.get("convrot"))
    if stated is not None and (
        _FORMATS.get(stated) != info.dtype_code or (rotated and info.dtype_code != "I8")
    ):
        return f"ComfyUI's {stated}{', rotated (convrot)' if rotated else ''}"
    scale = next((tensors[key] for key in _names(module, _SCALES) if key in tensors), None)
    has_scale = scale is not None
    if info.dtype_code in FLOAT8 and has_scale and scale.dtype_code in _EXPONENTS:
        return "mxfp8 (a power of two for 32 inputs each)"
    if info.dtype_code in FLOAT8:
        return "scaled fp8" if has_scale or scaled or stated else "fp8 without scales"
    if info.dtype_code == "U8":
        is_nvfp4 = has_scale and f"{module}.weight_scale_2" in tensors
        return "NVFP4" if is_nvfp4 else "packed bytes (uint8) of an unknown layout"
    if rotated:
        return "rotated int8"
    return "int8" if stated else "int8 without a comfy_quant that says whether it is rotated"


def float8_scales(leaves: Iterable[Leaf]) -> dict[str, list[float | None]]:
    """{path: the scale of each layer's weight} of stacked leaves with weights in float8 (e4m3).

    A layer has None if it was not float8, has a scale for each row, or has a LoRA in it.
    """
    scales = {
        leaf.path: [_float8_scale(source.info) for source in leaf.sources]
        for leaf in leaves
        if leaf.sources[0].layer is not None
    }
    return {path: found for path, found in scales.items() if any(found)}


def _float8_scale(info: TensorInfo | ComputedTensor) -> float | None:
    computed = isinstance(info, ComputedTensor) and info.recipe in (["cast"], ["scaled"])
    if not computed or info.parts[0].dtype_code != "F8_E4M3":
        return None
    scale = np.ones(1) if len(info.parts) == 1 else read_tensor(info.parts[1]).reshape(-1)
    return float(np.float32(scale[0])) if scale.size == 1 and scale[0] > 0 else None


# -- layouts: (all tensors, module, its weight, marker) -> the weight; ValueError if it does not fit


def _cast(
    tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo, marker: Mapping
) -> ComputedTensor:
    return ComputedTensor(weight.shape, STORED_AS, (weight,), ["cast"], lambda: rows_of(weight))


def _scaled(
    tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo, marker: Mapping
) -> ComputedTensor:
    info = next((tensors[key] for key in _names(module, _SCALES) if key in tensors), None)
    if info is None:
        raise ValueError(
            "has no scale in a file of scaled weights, so what it stands for is unknown; use the "
            "bfloat16 file"
        )
    scale = _scale_column(info, weight)

    def rows_with_scale() -> Rows:
        rows = rows_of(weight)
        if scale.size == 1:
            return lambda start, stop: rows(start, stop) * scale
        return lambda start, stop: rows(start, stop) * scale[start:stop]

    return ComputedTensor(weight.shape, STORED_AS, (weight, info), ["scaled"], rows_with_scale)


def _scale_column(info: TensorInfo, weight: TensorInfo) -> np.ndarray:
    """float32 [1, ...] or [out, 1, ...], with as many axes as the weight."""
    ones = (1,) * (len(weight.shape) - 1)
    count = weight.shape[0]
    per_row = info.shape == (count, *ones) or (
        info.shape == (count,) and len(weight.shape) == 2 and count != weight.shape[1]
    )
    if math.prod(info.shape) != 1 and not per_row:
        raise ValueError(
            f"has a scale of shape {info.shape} for a weight of shape {weight.shape}; one number, "
            f"or ({count}, 1), is understood"
        )
    if info.dtype_code not in ("F32", "F16", "BF16", "F64"):
        raise ValueError(f"has a scale of dtype {info.dtype_code}; float32 is understood")
    scale = read_tensor(info).astype(np.float32).reshape(-1, *ones)
    if not (np.isfinite(scale).all() and (scale != 0).all()):
        raise ValueError("has a scale that is zero or not finite; download the file again")
    return scale


def _nvfp4(
    tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo, marker: Mapping
) -> ComputedTensor:
    """w = E2M1 * (scale of its 16 inputs * weight_scale_2); the scales lie in tiles of 128 x 4."""
    blocks, total = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
    if len(weight.shape) != 2 or weight.shape[1] * 2 % _BLOCK:
        raise ValueError(f"is NVFP4 of shape {weight.shape}; in/2 must be a multiple of 8")
    out, inputs = weight.shape[0], 2 * weight.shape[1]
    tiles = -(-out // 128), -(-inputs // (4 * _BLOCK))
    padded = (128 * tiles[0], 4 * tiles[1])
    if blocks.dtype_code != "F8_E4M3" or blocks.shape != padded:
        raise ValueError(
            f"is NVFP4 with a weight_scale {blocks.dtype_code} of shape {blocks.shape}; F8_E4M3 "
            f"in tiles, shape {padded}, is understood"
        )
    scale = _scale_column(total, weight).item()

    def rows(start: int, stop: int) -> np.ndarray:
        packed = read_tensor(some_rows(weight, start, stop))
        values = _PAIRS[packed].reshape(stop - start, inputs // _BLOCK, _BLOCK)
        first, last = start // 128, -(-stop // 128)
        tiled = read_tensor(some_rows(blocks, 128 * first, 128 * last)).astype(np.float32)
        # flat: tile row, tile column, row % 32, row % 128 // 32, column % 4
        tiled = tiled.reshape(last - first, tiles[1], 32, 4, 4)
        plain = tiled.transpose(0, 3, 2, 1, 4).reshape(128 * (last - first), padded[1])
        plain = plain[start - 128 * first : stop - 128 * first, : inputs // _BLOCK]
        values *= (plain * np.float32(scale))[:, :, None]
        return values.reshape(stop - start, inputs)

    parts = (weight, blocks, total)
    return ComputedTensor((out, inputs), STORED_AS, parts, ["nvfp4"], lambda: rows)


def _rotated(
    tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo, marker: Mapping
) -> ComputedTensor:
    """w = (int8 * scale) H in groups of inputs; H is its own inverse."""
    size, scaled = marker.get("convrot_groupsize", 256), _scaled(tensors, module, weight, marker)
    if size not in (4, 16, 64, 256, 1024) or len(weight.shape) != 2 or weight.shape[1] % size:
        raise ValueError(
            f"of shape {weight.shape} is rotated in groups of {size}, which do not fit"
        )

    def open_rows() -> Rows:
        rows, hadamard = scaled.open(), _hadamard(size)

        def turned_back(start: int, stop: int) -> np.ndarray:
            groups = rows(start, stop).reshape(stop - start, -1, size)
            return (groups @ hadamard).reshape(stop - start, weight.shape[1])

        return turned_back

    recipe = ["rotated", size]
    return ComputedTensor(weight.shape, STORED_AS, scaled.parts, recipe, open_rows)


def _hadamard(size: int) -> np.ndarray:
    """float32 [size, size]: the symmetric Hadamard matrix of 4 x 4, whose rows all have the same
    sum, to a Kronecker power, normalised."""
    four = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    matrix = four
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return matrix / np.float32(math.sqrt(size))


_READERS = {
    "scaled fp8": _scaled,
    "fp8 without scales": _cast,
    "NVFP4": _nvfp4,
    "int8": _scaled,
    "rotated int8": _rotated,
}
