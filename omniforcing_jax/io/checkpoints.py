"""Converted checkpoints: a folder with config.json and one Orbax checkpoint per component.

    ltx2/config.json            what the weights are (`load_config`)
    ltx2/transformer/           Orbax, and the checksums of its files
    ltx2/video_vae/ ...

`checkpoint_converters` writes such folders; `save_params` adds or replaces a component. Folders may
be on object storage, where only single files change at once: config.json is what says where each
component lies.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from omniforcing_jax import programs
from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checksums, damage
from omniforcing_jax.io.checksums import DamagedFile
from omniforcing_jax.io.paths import locate

FORMAT = 1
UPSAMPLER = "upsampler"
FAMILIES = ("ltx2", "omniforcing", UPSAMPLER)
# entries of config.json that code relies on; the last four may be missing
_ENTRIES = {
    "model_version": str,
    "config": dict,
    "components": list,
    "fingerprints": dict,
    "checksums": dict,
    "folders": dict,
    "float8": dict,
}
COMPONENTS = ("transformer", "connectors", "video_vae", "audio_vae", "vocoder")
TINY_DECODER = "tiny_decoder"  # may be added to the others
UPSAMPLERS = ("spatial_upsampler", "temporal_upsampler")  # each in a folder of its own
# The metadata's sections that may describe a component; the last is LTX-2's own.
_SECTIONS = {
    "transformer": ("transformer",),
    "connectors": ("connectors", "transformer"),
    "video_vae": ("vae",),
    "audio_vae": ("audio_vae",),
    "vocoder": ("vocoder",),
} | {name: (name,) for name in (TINY_DECODER, *UPSAMPLERS)}
_FOREIGN = {"model_type", "architectures", "_class_name"}  # entries of others' config.json
_HOW_TO_CREATE = (
    "python -m checkpoint_converters.ltx2 --input LTX2.safetensors --output {folder} creates it "
    "(checkpoint_converters.omniforcing for a released OmniForcing student)"
)

T = TypeVar("T")
Sharding = jax.sharding.Sharding
# (path of a leaf, shape of a leaf) -> sharding
ShardingRule = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


def load_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads config.json of a converted checkpoint.

    Returns:
      {"format", "family": one of `FAMILIES`, "model_version", "config": the checkpoint's
      metadata by section, "trained": see `TrainedSettings`, "components", "fingerprints": what
      tells a component's weights from others, "checksums": {component: `checksums.write`},
      "folders": see `component_folder`, "source", and, if there are any, "loras": those merged into
      the weights, "float8": see `float8_scales`, "notes"}.

    Raises:
      FileNotFoundError: no such folder, or it holds no converted checkpoint.
      DamagedFile: config.json is not what was written.
      ValueError: written by another version of the converter.
    """
    folder = locate(folder)
    file = folder / "config.json"
    if not file.is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        how = _HOW_TO_CREATE.format(folder=folder)
        if folder.is_file() or any(folder.glob("*.safetensors")):
            what = "is not converted yet: programs read the folder that a converter writes"
            how = f"python -m checkpoint_converters.ltx2 --input {folder} --output FOLDER"
        raise FileNotFoundError(f"{folder} {what}; {how}")
    content = read_json(file)
    if not content.keys() & {"format", "family"} and content.keys() & _FOREIGN:
        raise ValueError(
            f"{folder} is a folder of Hugging Face or diffusers, not a converted one; python -m "
            f"checkpoint_converters.ltx2 --input {folder} --output FOLDER converts an LTX-2 "
            "(.gemma3 or .gemma4 a text encoder, .upsampler an upsampler)"
        )
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format {content.get('format')!r}, this version reads {FORMAT}; convert the "
            f"weights again: {_HOW_TO_CREATE.format(folder=folder)}"
        )
    _check_content(file, content)
    return content


def _check_content(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError for a config.json of something else, or with entries of a wrong kind."""
    if content.get("family") not in FAMILIES:
        kind = f"a {content['family']!r} model" if "family" in content else "something else"
        if str(content.get("family")).startswith("gemma"):
            kind = "a text encoder, for --text-encoder"
        config = content.get("config")
        if isinstance(config, dict) and "stage" in config:
            kind = "a training run"
        raise ValueError(
            f"{file} describes {kind}, not a converted LTX-2 or student of it; "
            f"{_HOW_TO_CREATE.format(folder='FOLDER')}"
        )
    wrong = [
        f"{name} must be a {kind.__name__}, not {content.get(name)!r:.60}"
        for name, kind in _ENTRIES.items()
        if not isinstance(content.get(name, {}), kind)
    ]
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong)}; copy it again, or convert again")


def read_json(file: epath.Path) -> dict[str, Any]:
    """The object in a JSON file, without the checksum that `write_json` has added.

    Raises:
      ValueError: it is not JSON, or not an object; names the file.
      DamagedFile: it is not what was written.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return checksums.check_seal(file, content)


def parse_json(file: pathlib.Path, what: str, read: Callable[[Any], T]) -> T:
    """What `read` makes of a JSON file's content.

    Args:
      what: it is, for messages, such as "the truth of pocket.make_world".

    Raises:
      OSError: the file cannot be read, or is damaged.
      ValueError: it is not JSON, or `read` does not find in it what it looks for.
    """
    text = file.read_bytes()
    with parsing(file, what):
        content = json.loads(text)
        if isinstance(content, dict):
            content = checksums.check_seal(file, content)
        return read(content)


@contextlib.contextmanager
def parsing(file: str | os.PathLike, what: str = "as it should be") -> Iterator[None]:
    """What nobody expected inside, such as a KeyError, is the fault of this file's content.

    Raises:
      ValueError: names the file.
    """
    try:
        yield
    except Exception as error:
        if programs.explain(error)[0] is not None:  # it is meant to be read
            if type(error) is not ValueError or str(file) in str(error):
                raise
            raise ValueError(f"{file}: {error}") from error
        raise ValueError(f"{file} is not {what}: {type(error).__name__}: {error}") from error


def write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes an object with its checksum; an older file stays until the new one is complete."""
    temporary = file.with_name(f".{file.name}.new")
    try:
        temporary.write_text(json.dumps(checksums.seal(content), indent=1))
        temporary.replace(file)
    except OSError:  # no room
        temporary.unlink(missing_ok=True)
        raise


def component_metadata(content: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The metadata section from which a component's config is built.

    Args:
      content: from `load_config`.
      component: one of `COMPONENTS`. LTX-2 describes its connectors in the transformer's section;
        those of an OmniForcing student have their own, as its transformer rotates differently.

    Raises:
      ValueError: the checkpoint does not describe this component.
    """
    return content["config"][metadata_section(content["config"], component)]


def metadata_section(config: Mapping[str, Any], component: str) -> str:
    """Name of the metadata's section that describes a component; `component_metadata` returns it.

    Raises:
      ValueError: unknown component, or there is no such section.
    """
    _check_component(component)
    for section in _SECTIONS[component]:
        if isinstance(config.get(section), Mapping):
            return section
    raise ValueError(f"config has no section {_SECTIONS[component][-1]!r}")


def missing_components(folder: str | os.PathLike, components: Iterable[str]) -> tuple[str, ...]:
    """Those of `components` that a converted checkpoint lacks; no weights are read.

    Raises:
      FileNotFoundError, ValueError: as `load_config`.
    """
    content = load_config(folder)
    return tuple(
        component
        for component in components
        if component not in content["components"]
        or not component_folder(folder, component, content).is_dir()
    )


def weights_fingerprint(folder: str | os.PathLike, component: str, converter: str) -> str:
    """What tells a component's weights from others.

    Args:
      folder: converted checkpoint.
      component: one of its components.
      converter: the program that writes such checkpoints, for the error's message.

    Raises:
      ValueError: the checkpoint was converted before there were fingerprints.
    """
    found = read_json(locate(folder) / "config.json").get("fingerprints", {}).get(component)
    if not isinstance(found, str):
        raise ValueError(
            f"{folder} has no fingerprint of its {component}, by which what it encoded is known; "
            f"it was converted by an earlier version: convert again with python -m {converter}"
        )
    return found


def float8_scales(folder: str | os.PathLike) -> dict[str, list[float | None]]:
    """Scales of the transformer's weights that were float8 (e4m3) in the file they came in.

    Returns:
      {"/"-separated path of a stacked leaf: [the scale of each layer's weight, or None where that
      was not float8 with one scale]}; empty where there are none, or other weights since.

    Raises:
      FileNotFoundError, ValueError: as `load_config`.
    """
    content = load_config(folder)
    found = content.get("float8", {})
    converted = found.get("fingerprint") == content.get("fingerprints", {}).get("transformer")
    if not converted:
        return {}
    with parsing(locate(folder) / "config.json"):
        return {
            path: [None if scale is None else float(scale) for scale in scales]
            for path, scales in found.get("scales", {}).items()
        }


def component_folder(
    folder: str | os.PathLike, component: str, content: Mapping[str, Any]
) -> epath.Path:
    """Where a component lies: under its name, or where `save_params` put it to replace another.

    Args:
      folder: converted checkpoint.
      component: one of `COMPONENTS`.
      content: from `load_config`.
    """
    return locate(folder) / content.get("folders", {}).get(component, component)


def load_params(
    folder: str | os.PathLike,
    component: str,
    *,
    dtype: Any = None,
    sharding: Sharding | ShardingRule | Mapping[str, Any] | None = None,
    without: str | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Restores the parameters of one component.

    Each process reads only the chunks that its shards need; to verify, it reads all files.

    Args:
      folder: converted checkpoint.
      component: one of `COMPONENTS`.
      dtype: dtype of the result, cast while loading; None keeps that on disk.
      sharding: one sharding for all leaves, a function (path, shape) -> sharding, or a tree of
        shardings with the structure of the parameters; None puts everything on the first device.
      without: a top-level name of the parameters, such as "encoder", that is not read.
      verify: compare the files with their checksums first; False where `verify` has done so.

    Returns:
      Nested dict of jax.Arrays.

    Raises:
      FileNotFoundError: the folder or the component is not there.
      ValueError: unknown component, other format, or a tree of shardings of other structure.
      DamagedFile: a file is not what was written, or is missing.
    """
    path = _component_path(folder, component)
    if verify:
        _verify(path, component, load_config(folder))
    arrays = {name: tree for name, tree in _arrays(path).items() if name != without}
    shardings = _shardings(arrays, sharding)
    restore_args = jax.tree.map(
        lambda _, s: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=s),
        arrays,
        shardings,
    )
    args = ocp.args.PyTreeRestore(item=arrays, restore_args=restore_args, partial_restore=True)
    # without a Checkpointer, which waits for all processes: one may read by itself
    with damage.reading(path):
        return ocp.PyTreeCheckpointHandler().restore(path, args=args)


def verify_components(folder: str | os.PathLike, components: Iterable[str]) -> None:
    """Compares the files of components with their checksums, if they have any.

    To be called by all processes: each hashes a part, and all learn of what any has found.

    Raises:
      FileNotFoundError, ValueError: as `load_params`.
      DamagedFile: a file is not what was written, or is missing.
    """
    content, error = load_config(folder), None
    try:
        for component in components:
            share = {"index": jax.process_index(), "count": jax.process_count()}
            _verify(_component_path(folder, component), component, content, **share)
    except OSError as problem:
        error = problem
    if not multihost.all_true(error is None):
        text = f"{folder}: another process could not read it, or found it damaged"
        raise error or DamagedFile(text)


def _verify(path: epath.Path, component: str, content: Mapping[str, Any], **share: int) -> None:
    checksums.verify(path, expected=content.get("checksums", {}).get(component), **share)


def _arrays(path: epath.Path) -> dict[str, Any]:
    """Tree of jax.ShapeDtypeStruct of what is on disk."""
    with damage.reading(path):
        metadata = ocp.PyTreeCheckpointHandler().metadata(path)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def _shardings(arrays: dict[str, Any], sharding: Any) -> Any:
    """One sharding per leaf."""
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, Sharding):
        return jax.tree.map(lambda _: sharding, arrays)
    if callable(sharding):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: sharding(tuple(key.key for key in path), leaf.shape), arrays
        )
    is_sharding = lambda leaf: isinstance(leaf, Sharding)  # noqa: E731
    given = jax.tree.structure(sharding, is_leaf=is_sharding)
    if given != jax.tree.structure(arrays):
        raise ValueError(
            f"the tree of shardings has another structure ({given.num_leaves} leaves) than the "
            f"parameters ({len(jax.tree.leaves(arrays))} leaves)"
        )
    return sharding


def param_shapes(folder: str | os.PathLike, component: str) -> dict[str, Any]:
    """Tree of jax.ShapeDtypeStruct of a component, without reading the weights.

    Raises:
      FileNotFoundError, ValueError: as `load_params`.
    """
    return _arrays(_component_path(folder, component))


def save_params(
    folder: str | os.PathLike,
    component: str,
    params: Mapping[str, Any],
    content: Mapping[str, Any] | None = None,
) -> None:
    """Writes one component, replacing an earlier one only when the new one is complete.

    An interrupted call leaves the earlier one valid.

    Args:
      folder: converted checkpoint, or a new folder if `content` is given; may be on object storage.
      component: one of `COMPONENTS`.
      params: nested dict of arrays, sharded or not.
      content: what config.json shall say (`components`, `folders` and the component's fingerprint,
        which is a new one every time, are filled in); None keeps the folder's.

    Raises:
      FileNotFoundError: the folder has no config.json and `content` is None.
      ValueError: unknown component, or a leaf that is not finite.
    """
    _check_component(component)
    folder = locate(folder)
    before = load_config(folder) if content is None or (folder / "config.json").exists() else {}
    content = dict(before if content is None else content)
    bad = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not bool(jnp.isfinite(leaf).all())
    ]
    if bad:
        raise ValueError(f"{component}: not finite, nothing was saved: {', '.join(bad[:5])}")
    old = component_folder(folder, component, before)
    new = folder / (f"{component}.new" if old.name == component and old.exists() else component)
    folder.mkdir(parents=True, exist_ok=True)
    # uncompressed: weights hardly shrink, and zstd would be the bottleneck
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(new, args=ocp.args.PyTreeSave(dict(params)), force=True)
    checksums.write_part(new, jax.process_index(), jax.process_count())
    multihost.barrier(f"hashed {component}")
    if jax.process_index() == 0:
        content["folders"] = before.get("folders", {}) | {component: new.name}
        content["components"] = [
            name
            for name in (*COMPONENTS, TINY_DECODER)
            if component_folder(folder, name, content).is_dir()
        ]
        # other weights than what was converted, even if they are the same again
        fingerprint = {component: secrets.token_hex(16)}
        content["fingerprints"] = content.get("fingerprints", {}) | fingerprint
        content["format"] = FORMAT
        content["checksums"] = content.get("checksums", {}) | {component: checksums.write(new)}
        write_json(folder / "config.json", content)  # from here on the new ones are valid
        if old != new and old.exists():
            old.rmtree()
    multihost.barrier(f"saved {component}")


def _check_component(component: str) -> None:
    known = (*COMPONENTS, TINY_DECODER, *UPSAMPLERS)
    if component not in known:
        raise ValueError(f"component is {component!r}, must be one of {', '.join(known)}")


def _component_path(folder: str | os.PathLike, component: str) -> epath.Path:
    _check_component(component)
    folder = locate(folder)
    content = load_config(folder)
    path = component_folder(folder, component, content)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} has no {component} (it has {', '.join(content['components'])}); "
            f"{_HOW_TO_CREATE.format(folder=folder)}"
        )
    return path
