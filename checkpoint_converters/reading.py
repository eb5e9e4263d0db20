"""Checkpoints as they come: a single file, shards with an index, or a diffusers folder.

`open_checkpoint` reads the headers and returns a `Checkpoint`: every tensor under its official
key, plus the metadata. `load_component` reads one component fully into memory (small files,
tests); the converters stream instead.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from checkpoint_converters import contents, diffusers_layout
from checkpoint_converters.computed import ComputedTensor
from checkpoint_converters.orbax_io import plan_leaves
from checkpoint_converters.quantized import dequantize
from checkpoint_converters.safetensors_io import (
    ConversionError,
    Problem,
    TensorInfo,
    read_header,
)
from omniforcing_jax.io import checksums
from omniforcing_jax.io.checkpoints import COMPONENTS

INDEX_SUFFIX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Headers of a checkpoint.

    Attributes:
      path: what was opened.
      tensors: {official key: tensor}; quantised weights are computed when they are read.
      config: parsed JSON of the metadata's `config`, None if there is none.
      model_version: e.g. "2.0.0", None if the files do not say.
      files: the files it consists of.
      notes: what a user should know of it.
      strings: the files' metadata.
    """

    path: pathlib.Path
    tensors: dict[str, TensorInfo | ComputedTensor]
    config: dict | None
    model_version: str | None
    files: tuple[pathlib.Path, ...]
    notes: tuple[str, ...] = ()
    strings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_checkpoint(path: str | PathLike) -> Checkpoint:
    """Reads the headers of a checkpoint.

    Args:
      path: a `.safetensors` file, a `.safetensors.index.json`, a folder with one of these or with
        all shards of one checkpoint, or a diffusers folder (sub-folders transformer, connectors,
        vae, audio_vae, vocoder).

    Raises:
      ConversionError: all problems found in the headers, a LoRA, or weights that are quantised in
        a way that is not read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ConversionError([f"{path}: no such file or folder"])
    if _is_diffusers(path):
        return _open_diffusers(path)
    whole = _read_headers(path, weight_files(path))
    return dataclasses.replace(whole, tensors=contents.canonical_keys(whole.tensors))


def weight_files(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The safetensors files behind a file, an index, or a folder that holds one set of weights."""
    if path.is_dir():
        indices = sorted(path.glob("*" + INDEX_SUFFIX))
        singles = sorted(path.glob("*.safetensors"))
        if not indices and (shards := _shards_without_index(singles)):
            return shards
        candidates = indices or singles
        candidates = indices or singles or sorted(path.glob("*/*.safetensors"))
        if not candidates:
            listing = _some(sorted(path.iterdir()), path) or "nothing"
            if any(path.glob(f"*/{checksums.FILE}")):
                raise ConversionError(
                    [f"{path}: is converted already; programs take it as it is, and "
                     "checkpoint_converters.export makes a file of an LTX-2 or an upsampler"]
                )  # fmt: skip
            raise ConversionError(
                [f"{path}: holds no .safetensors file and is not a diffusers folder; it holds "
                 f"{listing}"]
            )  # fmt: skip
        if len(candidates) != 1 or candidates[0].parent != path:
            listing = _some(candidates, path)
            raise ConversionError(
                [f"{path}: holds {listing}; pass the one, or all parts of one LTX-2.5, as --input "
                 "FILE …", *map(_what_it_is, candidates)]
            )  # fmt: skip
        path = candidates[0]
    if not path.name.endswith(INDEX_SUFFIX):
        return (path,)
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = sorted({os.fspath(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError([f"{path}: not an index of shards ({error})"]) from error
    problems = [
        Problem(f"{path.parent / name}: shard named in {path.name} is missing", "missing shards")
        for name in names
        if not (path.parent / name).is_file()
    ]
    if problems:
        raise ConversionError(problems)
    return tuple(path.parent / name for name in names)


def _what_it_is(path: pathlib.Path) -> Problem:
    """A line that says what a file holds, for whoever chooses among several."""
    if path.name.endswith(INDEX_SUFFIX):
        return Problem(f"{path}: is an index of shards", "files")
    try:
        found = contents.identify(read_header(path)[0])
    except ConversionError as error:
        return Problem(error.problems[0], "files")
    text = f"{path}: holds nothing known" if found is None else found.problem(path)
    return Problem(text, "files")


def _some(paths: list[pathlib.Path], folder: pathlib.Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ", ".join(names[:5] + ["…"] * (len(names) > 5))


def _shards_without_index(files: list[pathlib.Path]) -> tuple[pathlib.Path, ...]:
    """The files if their names number them as parts of one checkpoint, else none.

    Raises:
      ConversionError: some of the numbers are missing.
    """
    matches = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    if not all(matches) or len({(match[1], match[3]) for match in matches}) != 1:
        return ()
    there, count = {int(match[2]) for match in matches}, int(matches[0][3])
    if missing := sorted(set(range(1, count + 1)) - there):
        listing = ", ".join(map(str, missing))
        raise ConversionError([f"{files[0].parent}: of {count} shards, {listing} is missing"])
    return tuple(files)


def _read_headers(path: pathlib.Path, files: tuple[pathlib.Path, ...]) -> Checkpoint:
    """The files that are one checkpoint, with their own keys."""
    parts, problems = [], []
    for file in files:
        try:
            found, strings = read_header(file)
            config, version = _parse_config(file, strings), strings.get("model_version")
            parts.append(Checkpoint(file, found, config, version, (file,), strings=strings))
        except ConversionError as error:
            problems += error.problems
    whole, found = combine(path, parts, "is also in another shard")
    if problems + found:
        raise ConversionError(problems + found)
    found = contents.identify(whole.tensors)
    if found is not None and found.kind == contents.LORA:
        raise ConversionError([found.problem(path)])
    tensors, notes = dequantize(path, whole.tensors, whole.strings)
    return dataclasses.replace(whole, tensors=tensors, notes=tuple(notes))


def combine(
    path: pathlib.Path, parts: list[Checkpoint], twice: str
) -> tuple[Checkpoint, list[str]]:
    """(one checkpoint out of several, problems).

    A part may say nothing, or describe only the components it holds; what several say must agree.
    Other metadata (a format, a licence, a hash) may differ, as nobody reads it. Parts of different
    model versions do not fit together: LTX-2.0 and 2.3 have different latents.

    Args:
      path: of the result.
      parts: what to combine.
      twice: the problem of a tensor that is in two of them.
    """
    tensors: dict[str, TensorInfo | ComputedTensor] = {}
    config: dict[str, Any] = {}
    problems = []
    for part in parts:
        if again := [key for key in part.tensors if key in tensors]:
            more = f" (and {len(again) - 1} more)" if len(again) > 1 else ""
            problems.append(f"{part.path}: {again[0]}{more} {twice}")
        tensors |= part.tensors
        problems += [
            f"{part.path}: config section {name!r} differs from the other files'; convert files of "
            "one release together"
            for name, section in (part.config or {}).items()
            if config.setdefault(name, section) != section
        ]
    stated = {part.path: part.model_version for part in parts if part.model_version is not None}
    if len(set(stated.values())) > 1:
        listing = ", ".join(f"{path} is {version}" for path, version in stated.items())
        problems.append(
            f"mixed model versions ({listing}), whose latents are different spaces; use files of "
            "one version"
        )
    silent = all(part.config is None for part in parts)
    version = next(iter(stated.values()), None)
    files = tuple(file for part in parts for file in part.files)
    notes = tuple(note for part in parts for note in part.notes)
    strings = {name: text for part in parts for name, text in part.strings.items()}
    config = None if silent else config
    return Checkpoint(path, tensors, config, version, files, notes, strings), problems


def _parse_config(path: pathlib.Path, metadata: dict[str, str]) -> dict | None:
    if "config" not in metadata:
        return None
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise ConversionError([f"{path}: metadata `config` is not JSON ({error})"]) from error
    if not isinstance(config, dict):
        raise ConversionError([f"{path}: metadata `config` is not a JSON object"])
    return config


def _is_diffusers(path: pathlib.Path) -> bool:
    """Published parts and ComfyUI's models lie in folders of the same names, without a config."""
    folders = [
        path / name
        for name in diffusers_layout.DIFFUSERS_FOLDERS
        if _folder_has_weights(path / name)
    ]
    stated = (path / "model_index.json").is_file()
    return bool(folders) and (stated or any((f / "config.json").is_file() for f in folders))


def _folder_has_weights(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def _open_diffusers(path: pathlib.Path) -> Checkpoint:
    tensors: dict[str, TensorInfo | ComputedTensor] = {}
    files: tuple[pathlib.Path, ...] = ()
    notes: tuple[str, ...] = ()
    problems = []
    for folder, component in diffusers_layout.DIFFUSERS_FOLDERS.items():
        if not _folder_has_weights(path / folder):
            continue
        try:
            found = _read_headers(path / folder, weight_files(path / folder))
        except ConversionError as error:
            problems += error.problems
            continue
        names = diffusers_layout.official_from_diffusers(component, list(found.tensors))
        tensors |= {names[key]: info for key, info in found.tensors.items()}
        files += found.files
        notes += found.notes
    if problems:
        raise ConversionError(problems)
    config, version = diffusers_layout.metadata_of_folder(path)
    return Checkpoint(path, tensors, config, version, files, notes)


def read_metadata(path: str | PathLike) -> dict:
    """{"config": parsed metadata JSON, "model_version": str} of a checkpoint.

    Raises:
      ConversionError: the checkpoint has no such metadata.
    """
    checkpoint = open_checkpoint(path)
    problems = [
        f"{path}: the file's metadata has no `{name}`; use the original LTX-2 file, which has it"
        for name in ("config", "model_version")
        if getattr(checkpoint, name) is None
    ]
    if problems:
        raise ConversionError(problems)
    return {"config": checkpoint.config, "model_version": checkpoint.model_version}


def load_component(path: str | PathLike, component: str, dtype=None) -> dict:
    """Reads one component fully into memory; for small files.

    Args:
      path: see `open_checkpoint`.
      component: one of `checkpoints.COMPONENTS`.
      dtype: dtype of the result; None keeps the file's.

    Returns:
      Nested dict of numpy arrays in our layout, stacked over layers where the tree is.

    Raises:
      ConversionError: the checkpoint lacks the component or some of a stack's layers.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component is {component!r}, must be one of {COMPONENTS}")
    return assemble(open_checkpoint(path), component, dtype)


def assemble(checkpoint: Checkpoint, component: str, dtype=None) -> dict:
    """As `load_component`, of an opened checkpoint and of any component of the key table."""
    path, tree = checkpoint.path, {}
    for leaf in plan_leaves(checkpoint.tensors, component, dtype and np.dtype(dtype)):
        layers = [source.layer for source in leaf.sources]
        if layers not in ([None], list(range(len(layers)))):
            raise ConversionError([f"{path}: {component} {leaf.path} has only layers {layers}"])
        arrays = [source.read(leaf.dtype) for source in leaf.sources]
        array = arrays[0] if layers == [None] else np.stack(arrays)
        tree[leaf.path] = np.ascontiguousarray(array, leaf.dtype)
    if not tree:
        raise ConversionError([f"{path}: has no {component}"])
    return unflatten_dict(tree, sep="/")
