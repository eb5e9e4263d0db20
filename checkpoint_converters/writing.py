"""Parameter trees in memory -> one safetensors file in the official layout; for small models."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoint_converters import key_map
from checkpoint_converters.converting import explaining_a_full_disk, partial_path
from checkpoint_converters.safetensors_io import ConversionError, SafetensorsWriter
from checkpoint_converters.shapes import ANY, expected_shapes


def write_components(
    path: str | os.PathLike,
    components: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    model_version: str,
    *,
    dtype: np.dtype | type = np.float32,
) -> None:
    """Writes components; a file that is there is replaced when the new one is complete.

    Args:
      path: `.safetensors` file.
      components: {component: parameter tree in our layout}.
      config: the metadata's `config` object; it must describe these components.
      model_version: such as "2.0.0".
      dtype: of all tensors.

    Raises:
      ConversionError: tensors that the config does not have, lacks, or that have other shapes; or
        there is no room for the file.
    """
    path = pathlib.Path(path).absolute()
    tensors: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for component, tree in components.items():
        found = dict(_official(component, tree))
        expected = expected_shapes(dict(config), component)
        problems += [f"{key} is missing" for key in expected if key not in found]
        problems += [f"{key} is not in the config" for key in found if key not in expected]
        problems += [
            f"{key} has shape {found[key].shape}, must be {shape}"
            for key, shape in expected.items()
            if key in found and not _fits(found[key].shape, shape)
        ]
        tensors |= {key: found[key] for key in expected if key in found}
    if problems:
        raise ConversionError(problems)
    strings = {"config": json.dumps(config), "model_version": model_version}
    dtype = np.dtype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    table = {key: (dtype, array.shape) for key, array in tensors.items()}
    num_bytes = sum(array.size for array in tensors.values()) * dtype.itemsize
    with explaining_a_full_disk(path, partial, num_bytes):
        try:
            with SafetensorsWriter(partial, table, strings) as writer:
                for key, array in tensors.items():
                    writer.write(key, array.astype(dtype))
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _official(
    component: str, tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _official(component, value, f"{path}/")
            continue
        array = np.asarray(value)
        stacked = key_map.is_stacked(component, path)
        for layer in range(len(array)) if stacked else (None,):
            key, transform = key_map.official_key(component, path, layer)
            yield key, transform.invert(array if layer is None else array[layer])


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    same = (n == m or m == ANY for n, m in zip(shape, expected))
    return len(shape) == len(expected) and all(same)
