"""Adapters that a stage trains as a LoRA file in the layout of LTX-2's trainer, and back."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from checkpoint_converters import lora
from checkpoint_converters.key_map import DIT, find_place, official_key
from checkpoint_converters.safetensors_io import ConversionError, Problem
from checkpoint_converters.shapes import expected_shapes
from omniforcing_jax.io import checkpoints
from omniforcing_jax.sampling.trained import ENTRY, TrainedSettings
from omniforcing_jax.training.adapters import DOWN, UP, AdapterConfig, StoredAdapters

BASE = "base"  # metadata: fingerprint of the transformer that the adapters were trained over
_NOT_TRAINED = "which no stage trains; merge it by checkpoint_converters.ltx2 --lora"


def tensors(
    trained: Mapping[str, Any], config: AdapterConfig
) -> dict[str, Callable[[], np.ndarray]]:
    """Adapters as the tensors of a file in the layout of LTX-2's trainer, float32.

    alpha / rank is a factor of `lora_B` there: LTX-2's own loader knows no alpha.

    Args:
      trained: tree of `training.adapters`.

    Returns:
      {key: the tensor, [rank, in] of `lora_A` and [out, rank] of `lora_B`}.

    Raises:
      ValueError: parameters that a LoRA cannot hold.
    """
    leaves = flatten_dict(trained)
    others = ["/".join(path) for path in leaves if path[-1] not in (DOWN, UP)]
    if others:
        raise ValueError(
            f"a LoRA cannot hold what the run trains besides adapters: {', '.join(others)}; export "
            "the weights with the adapters in them (--output, --safetensors), or train without "
            "sink tokens (student.num_sinks=0) and stabilisers"
        )
    found = {}
    for path, leaf in leaves.items():
        scale = config.scale(path[1]) if path[-1] == UP else 1.0
        for layer in range(leaf.shape[0]):
            key, _ = official_key("transformer", "/".join((*path[:-1], "kernel")), layer)
            key = f"{key.removeprefix('model.').removesuffix('.weight')}.{path[-1]}.weight"
            found[key] = lambda leaf=leaf, layer=layer, scale=scale: (
                np.asarray(leaf[layer]).T * np.float32(scale)
            )
    return found


def stored(file: pathlib.Path, content: Mapping[str, Any], config: AdapterConfig) -> StoredAdapters:
    """A LoRA as adapters that a stage goes on from; only its header is read now.

    Args:
      content: config.json of the checkpoint that the stage trains over.
      config: what the stage trains: the file must have all of that, and nothing else.

    Raises:
      ConversionError: everything that does not fit.
      ValueError: its metadata cannot be read.
    """
    opened = lora.open_lora(file)
    problems = _origin_problems(file, opened.strings, content)
    shapes = {key: shape for part in ("transformer", "connectors")
              for key, shape in expected_shapes(content["config"], part).items()}  # fmt: skip
    targets, wrong = lora.targets_of(opened, shapes, ("transformer",), _NOT_TRAINED)
    places, readers, ranks = _places(shapes, config), {}, set()
    for layer, key in targets.items():
        try:
            down, up, factor = lora.pair_of(opened, layer, shapes[key])
        except ValueError as error:
            wrong.append(Problem(f"{file}: {layer} {error}", "LoRA matrices"))
            continue
        if key not in places:
            text = f"{file}: {layer} is none of adapters.products ({', '.join(config.products)})"
            wrong.append(Problem(text, "not trained"))
            continue
        (_, product, *_), _ = places[key]
        if down.shape[0] != config.rank(product):
            ranks.add((product, down.shape[0]))
        problem = lora.broken(opened, layer)
        readers[key] = (down, up, factor / config.scale(product), problem)
    wrong += [
        f"{file}: {product} has rank {found}, the config {config.rank(product)}; set "
        "--config.adapters.ranks as the file has them"
        for product, found in sorted(ranks)
    ]
    if not wrong:  # else the reason is known
        wrong += [
            Problem(f"{file}: has no {key.removeprefix(DIT)}, which the stage trains; "
                    "take it out of --config.adapters.products", "lacking")
            for key in places if key not in readers
        ]  # fmt: skip
    if problems or wrong:
        raise ConversionError(problems + wrong)
    with checkpoints.parsing(f"{file}'s metadata"):
        settings = TrainedSettings.from_json(json.loads(opened.strings.get(ENTRY, "{}")))
    return StoredAdapters(settings, lambda: _read(places, readers))


def _origin_problems(
    file: pathlib.Path, strings: Mapping[str, str], content: Mapping[str, Any]
) -> list[str]:
    """What the file says of the model that it was trained over, if it says so."""
    problems = []
    ours, theirs = content["model_version"], strings.get("model_version")
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        problems.append(f"{file}: was made for version {theirs}, the checkpoint is {ours}")
    ours, theirs = content.get("fingerprints", {}).get("transformer"), strings.get(BASE)
    if theirs and theirs != ours:
        problems.append(
            f"{file}: was trained over another transformer than that of the checkpoint "
            f"(fingerprints {theirs} and {ours}); give the checkpoint that it was trained with"
        )
    return problems


def _places(
    shapes: Mapping[str, Any], config: AdapterConfig
) -> dict[str, tuple[tuple[str, ...], int]]:
    """{official key: (path of the kernel, layer)} of what the stage trains."""
    found = {}
    for key in shapes:
        place = find_place(key)
        path = tuple(place.path.split("/")) if place else ()
        if place and place.component == "transformer" and config.adapts(path):
            found[key] = path, place.layer
    return found


def _read(places: Mapping[str, tuple], readers: Mapping[str, tuple]) -> dict[str, np.ndarray]:
    """{path of a leaf of `training.adapters`: [L, in, rank] or [L, rank, out] float32}."""
    layers = 1 + max(layer for _, layer in places.values())
    leaves: dict[str, np.ndarray] = {}
    for key, (path, layer) in places.items():
        down, up, scale, problem = readers[key]
        for name, matrix in zip((DOWN, UP), lora.read_pair(down, up, problem), strict=True):
            matrix = matrix.T * np.float32(scale) if name == UP else matrix.T
            leaf = "/".join((*path[:-1], name))
            if leaf not in leaves:
                leaves[leaf] = np.empty((layers, *matrix.shape), np.float32)
            leaves[leaf][layer] = matrix
    return leaves
