"""Everything that can be known to be wrong before a byte is written, in plain words."""

import math
import re
from collections.abc import Iterable, Mapping

from checkpoint_converters import key_map
from checkpoint_converters.computed import SLICE_BYTES, ComputedTensor, rows_of
from checkpoint_converters.contents import owner
from checkpoint_converters.reading import Checkpoint, combine
from checkpoint_converters.safetensors_io import Problem, TensorInfo, read_middle, read_tensor
from checkpoint_converters.shapes import ANY, expected_shapes

Tensor = TensorInfo | ComputedTensor

KNOWN_VERSIONS = ("2.0", "2.3", "2.5")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_PEEK = 4096


def merge(checkpoints: list[Checkpoint]) -> tuple[Checkpoint, list[str]]:
    """One checkpoint out of several files that each hold some components, and what is wrong."""
    twice = "is in another input as well; drop one"
    merged, problems = combine(checkpoints[0].path, checkpoints, twice)
    if merged.config is None:
        names = ", ".join(str(checkpoint.path) for checkpoint in checkpoints)
        problems.append(
            f"{names}: no `config` in the metadata, so the architecture is unknown; add a file of "
            "the same release that has it to --input, such as the transformer's (for a file of a "
            "whole LTX-2, --model-version takes the published one's), or use the original file "
            "(re-saved ones often lose it); checkpoint_converters.omniforcing is for an "
            "OmniForcing student"
        )
    stated = [checkpoint for checkpoint in checkpoints if checkpoint.model_version is not None]
    for checkpoint in stated or [merged]:
        problems += version_problems(checkpoint)
    return merged, problems


def without_zeros(
    tensors: Mapping[str, Tensor], components: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """({key: tensor} without the unknown ones that are zero throughout, what was dropped).

    Students of others have tensors of their own among the transformer's. Where they are zero, they
    do nothing. Only unknown tensors of the given components, and of none, are read.
    """
    checked = (None, *components)
    dropped = [
        key
        for key, info in tensors.items()
        if owner(key) in checked
        and key_map.find_place(key) is None
        and not key_map.is_ignored(key)
        and _is_zero(info)
    ]
    kept = {key: info for key, info in tensors.items() if key not in dropped}
    return kept, [f"{key} is unknown and zero throughout, so it was left out" for key in dropped]


def _is_zero(info: Tensor) -> bool:
    if isinstance(info, TensorInfo) and any(read_middle(info, _PEEK)):
        return False  # nearly all end here, without being read
    if not info.shape:
        return not read_tensor(info).any()
    rows, step = rows_of(info), max(1, SLICE_BYTES // (4 * max(1, math.prod(info.shape[1:]))))
    starts = range(0, info.shape[0], step)
    return not any(rows(start, min(start + step, info.shape[0])).any() for start in starts)


def version_problems(checkpoint: Checkpoint) -> list[str]:
    """Whether `model_version` is there and known."""
    version = checkpoint.model_version
    known = ", ".join(f"{v}.x" for v in KNOWN_VERSIONS)
    if version is None:
        return [
            f"{checkpoint.path}: no `model_version` in the file's metadata; if you know it, pass "
            f"--model-version (known: {known})"
        ]
    if ".".join(str(version).split(".")[:2]) not in KNOWN_VERSIONS:
        return [f"{checkpoint.path}: unknown model_version {version!r} (known: {known})"]
    return []


def tensor_problems(
    tensors: Mapping[str, Tensor], config: dict, components: Iterable[str]
) -> list[str]:
    """Missing, unexpected and misshapen tensors and unusable dtypes of the given components."""
    components = tuple(components)
    problems: list[tuple[str, str]] = []  # (key, what is wrong)
    expected: dict[str, tuple[int, ...]] = {}
    unknown_config = []
    for component in components:
        try:
            expected |= expected_shapes(config, component)
        except ValueError as error:
            unknown_config.append(f"metadata of {component}: {error}")
            components = tuple(c for c in components if c != component)
    width = config.get("transformer", {}).get("caption_channels", 1)
    problems += compare(tensors, expected, width)
    checked = (None, *components)
    for key in tensors:
        if key not in expected and owner(key) in checked and not key_map.is_ignored(key):
            problems.append((key, "is not part of the model that the metadata describes"))
    return unknown_config + grouped(problems)


def compare(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], width: int = 1
) -> list[tuple[str, str]]:
    """(key, what is wrong): missing and misshapen tensors and unusable dtypes.

    Args:
      tensors: those that are there.
      expected: {key: shape}; where it says `ANY`, a multiple of `width` is right.
      width: see `expected`.
    """
    problems = []
    for key, shape in expected.items():
        if key not in tensors:
            problems.append((key, f"missing, shape {_text(shape)}"))
            continue
        info = tensors[key]
        if not _matches(info.shape, shape, width):
            problems.append((key, f"has shape {_text(info.shape)}, must be {_text(shape)}"))
        if info.dtype_code not in WEIGHT_DTYPES:
            problems.append(
                (key, f"has dtype {info.dtype_code}; use the bfloat16 or float32 file instead")
            )
    return problems


def _matches(shape: tuple[int, ...], expected: tuple[int, ...], width: int) -> bool:
    """Equal sizes; where any is allowed, a multiple of the text encoder's width."""
    return len(shape) == len(expected) and all(
        (size % width == 0 and size > 0) if want == ANY else size == want
        for size, want in zip(shape, expected, strict=True)
    )


def _text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join("any" if size == ANY else str(size) for size in shape) + ")"


def grouped(problems: list[tuple[str, str]]) -> list[Problem]:
    """One line per kind of tensor: the numbers of equal problems in different layers are joined."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, text in problems:
        match = re.search(r"(?:blocks|layers)\.(\d+)\.", key)
        number = match[1] if match else ""
        pattern = key if not match else key[: match.start(1)] + "*" + key[match.end(1) :]
        groups.setdefault((pattern, text), []).append((number, key))
    lines = []
    for (pattern, text), members in groups.items():
        name = members[0][1]
        if len(members) > 1:
            numbers = _ranges(sorted(int(number) for number, _ in members))
            name = pattern.replace("*", "{" + numbers + "}", 1)
        kind = " ".join(text.split()[:2]).rstrip(",;")  # "missing, shape", "has dtype", ...
        lines.append(Problem(f"{name}: {text}", kind))
    return lines


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
