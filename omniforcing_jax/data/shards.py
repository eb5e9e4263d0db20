"""Folders of stored training data: ArrayRecord shards and a manifest.

    FOLDER/manifest.json               what is stored, and what it was made from
    FOLDER/negative.safetensors        text features of the negative prompt, once
    FOLDER/NAME-train.array_record-00000-of-00004
    FOLDER/dataset_info.json, features.json

The shards are a tfds dataset (`tfds.builder_from_directory(folder).as_data_source("train")`).
NumPy's protocol for examples has no bfloat16, so that is stored as uint16:
`.view(ml_dtypes.bfloat16)`. tfds and grain are imported where they are used, as sampling needs
neither.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file

from omniforcing_jax.io import checksums
from omniforcing_jax.io.checksums import DamagedFile
from omniforcing_jax.io.paths import TEMPORARY, new_file
from omniforcing_jax.ranges import hold_fields

SPLIT = "train"
_MANIFEST = "manifest.json"
_NEGATIVE = "negative.safetensors"
_SMALL_FILES = (_NEGATIVE, "dataset_info.json", "features.json")
# One record per chunk: training reads single records in random order. zstd saves a quarter.
_ARRAY_RECORD_OPTIONS = "group_size:1,zstd:1"


class Manifest(Protocol):
    """What a folder holds: a frozen dataclass of numbers, texts, and lists and dicts of them."""

    @property
    def num_shards(self) -> int: ...

    def shard_range(self, shard: int) -> range:
        """Indices of the records in a shard."""
        ...


class InShardsOfClips:
    """Of manifests with `num_clips` clips, `clips_per_shard` in each shard but the last."""

    num_clips: int
    clips_per_shard: int

    @property
    def num_shards(self) -> int:
        """Number of ArrayRecord files."""
        return -(-self.num_clips // self.clips_per_shard)

    def shard_range(self, shard: int) -> range:
        """Numbers of the clips in a shard."""
        start = shard * self.clips_per_shard
        return range(start, min(start + self.clips_per_shard, self.num_clips))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stored data.

    Attributes:
      name: of the tfds dataset and in the manifest.
      format: version of what is stored.
      title: what the data are called in messages, e.g. "text features".
      records: what one record is for, e.g. "prompts".
      program: that writes them.
      manifest: class of the manifest; takes the stored fields by name.
      features: manifest -> tfds.features.FeaturesDict of a record.
      may_skip: whether a shard may hold fewer records than planned.
    """

    name: str
    format: int
    title: str
    records: str
    program: str
    manifest: Callable[..., Any]
    features: Callable[[Any], Any]
    may_skip: bool = False


def check_folder(
    kind: Kind, folder: str | os.PathLike, manifest: Manifest, ignore: Sequence[str] = ()
) -> None:
    """Checks that a folder is new, or holds a part or all of this very dataset.

    Args:
      folder: where a dataset shall be written or continued.
      manifest: what it shall be.
      ignore: fields of the manifest that are not known yet.

    Raises:
      ValueError: it holds something else; says what differs.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder, or nothing yet")
    # One look at the folder: another process may begin the dataset at any moment.
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if _MANIFEST not in there:
        others = sorted(name for name in there if not name.endswith(TEMPORARY))
        if others:
            raise ValueError(f"{folder} holds other files ({others[0]}); choose a new folder")
        return
    ours, stored = _fields(manifest), _fields(_read_manifest(kind, folder).manifest)
    differences = [
        f"{name} {value!r} instead of {ours[name]!r}"
        for name, value in stored.items()
        if name not in ignore and value != ours[name]
    ]
    if differences:
        raise ValueError(
            f"{folder} holds {kind.title} of other prompts, another model or other settings: "
            f"{'; '.join(differences)}. Continue it with the same, or choose a new folder"
        )


class ShardWriter:
    """Writes a dataset, shard by shard, in any order and by several processes.

    A shard appears under its name when it is complete, so what an interrupted run leaves behind is
    a smaller set of the same files, and continuing means writing the `missing` ones. One process
    calls `begin` first and `finish` last.
    """

    def __init__(self, kind: Kind, folder: str | os.PathLike, manifest: Manifest):
        """Checks the folder; nothing is written.

        Raises:
          ValueError: see `check_folder`.
        """
        self.kind = kind
        self.folder = pathlib.Path(folder)
        self.manifest = manifest
        check_folder(kind, folder, manifest)

    @property
    def complete(self) -> bool:
        """Whether `finish` has been called, now or in an earlier run."""
        there = (self.folder / _MANIFEST).exists()
        return there and _read_manifest(self.kind, self.folder).complete

    def begin(self) -> None:
        """Creates the folder, or removes what an interrupted run left incomplete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f".*{TEMPORARY}"):
            path.unlink()
        if not (self.folder / _MANIFEST).exists():
            self._write_manifest(complete=False)

    def shard_path(self, shard: int) -> pathlib.Path:
        """File of a shard, with the name tfds gives it."""
        suffix = f"array_record-{shard:05d}-of-{self.manifest.num_shards:05d}"
        return self.folder / f"{self.kind.name}-{SPLIT}.{suffix}"

    def missing(self) -> list[int]:
        """Shards that are still to be written."""
        return [s for s in range(self.manifest.num_shards) if not self.shard_path(s).exists()]

    @property
    def has_negative(self) -> bool:
        """Whether the negative prompt is stored."""
        return (self.folder / _NEGATIVE).exists()

    def load_libraries(self) -> None:
        """Imports all that writing takes; to be called before shards are written in a thread.

        While tfds is imported, it has every import statement of the process replaced (by lazy ones
        of etils): what another thread imports meanwhile fails, or comes as another object.
        """
        from array_record.python import array_record_module  # noqa: F401
        from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

        self.kind.features(self.manifest)

    def write_records(self, shard: int, examples: Iterable[Mapping[str, Any]]) -> None:
        """Writes a shard, completely or not at all.

        Args:
          shard: which one.
          examples: those of `manifest.shard_range(shard)`, with the fields of `kind.features`.

        Raises:
          ValueError: more examples than the shard has, or fewer unless `kind.may_skip`.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        features = self.kind.features(self.manifest)
        count = 0
        with new_file(self.shard_path(shard)) as temporary:
            writer = ArrayRecordWriter(str(temporary), _ARRAY_RECORD_OPTIONS)
            try:
                for example in examples:
                    writer.write(_serialize(features, example))
                    count += 1
            finally:
                writer.close()
            expected = len(self.manifest.shard_range(shard))
            if count > expected or (count < expected and not self.kind.may_skip):
                raise ValueError(f"shard {shard} holds {expected} {self.kind.records}, not {count}")

    def write_negative_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores the features [tokens, W] of the negative prompt."""
        with new_file(self.folder / _NEGATIVE) as temporary:
            save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, temporary)

    def finish(self) -> int:
        """Writes tfds' description and marks the dataset complete; returns its number of records.

        Raises:
          ValueError: a shard or the negative prompt is missing, or there are no records.
        """
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordReader

        if missing := self.missing():
            raise ValueError(f"{self.folder}: shards are missing: {missing}")
        if not self.has_negative:
            raise ValueError(f"{self.folder}: the negative prompt is missing")
        paths = [self.shard_path(shard) for shard in range(self.manifest.num_shards)]
        lengths = [ArrayRecordReader(str(path)).num_records() for path in paths]
        if not sum(lengths):
            raise ValueError(f"{self.folder}: none of the {self.kind.records} could be stored")
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=lengths,
            num_bytes=sum(path.stat().st_size for path in paths),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=self.folder,
                dataset_name=self.kind.name,
                split=SPLIT,
                filetype_suffix="array_record",
            ),
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.folder,
            features=self.kind.features(self.manifest),
            split_infos=[split],
            check_data=False,  # that would need TensorFlow
            disable_shuffling=True,
            description=f"{self.kind.title} of LTX-2; bfloat16, stored as uint16.",
        )
        self._write_manifest(complete=True)
        return sum(lengths)

    def _write_manifest(self, complete: bool) -> None:
        content = {"format": self.kind.format, "kind": self.kind.name, "complete": complete}
        if complete:
            hashes = checksums.hash_files([self.folder / name for name in _SMALL_FILES])
            content["checksums"] = dict(zip(_SMALL_FILES, hashes, strict=True))
        content |= _fields(self.manifest)
        with new_file(self.folder / _MANIFEST) as temporary:
            text = json.dumps(checksums.seal(content), indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")


def open_shards(kind: Kind, folder: str | os.PathLike) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Opens a complete dataset.

    Returns:
      The manifest, tfds' random-access source of records, and the arrays of the negative prompt.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not complete, damaged, or written by another version.
      DamagedFile: a file is not what was written.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(folder)
    if not (folder / _MANIFEST).is_file():
        what = f"holds no {_MANIFEST}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; python -m {kind.program} creates it")
    stored = _read_manifest(kind, folder)
    manifest, complete, known = stored.manifest, stored.complete, stored.checksums
    if not complete:
        raise ValueError(
            f"{folder} is not complete; run {kind.program} with the same options again, it "
            "continues where it stopped"
        )
    writer = ShardWriter(kind, folder, manifest)
    paths = map(writer.shard_path, range(manifest.num_shards))  # there may be said to be billions
    needed = itertools.chain((folder / name for name in _SMALL_FILES), paths)
    if lost := list(itertools.islice((p.name for p in needed if not p.exists()), 5)):
        raise ValueError(f"{folder} is damaged, missing: {', '.join(lost)}; copy it again")
    paths = map(writer.shard_path, range(manifest.num_shards))
    for name, digest in known.items():  # the shards have checksums of their own, in every record
        if checksums.hash_files([folder / name]) != [digest]:
            raise DamagedFile(f"{folder / name} is damaged (another checksum); copy it again")
    builder = tfds.builder_from_directory(folder)
    num_bytes = sum(path.stat().st_size for path in paths)
    if num_bytes != builder.info.splits[SPLIT].num_bytes:
        raise ValueError(
            f"{folder} is damaged: its shards have {num_bytes} bytes, they were written with "
            f"{builder.info.splits[SPLIT].num_bytes}; copy it again"
        )
    records = _Records(folder, builder.as_data_source(SPLIT))
    return manifest, records, load_file(folder / _NEGATIVE)


@dataclasses.dataclass(frozen=True)
class _Records:
    """A data source whose errors name the folder; the libraries raise whatever they like."""

    folder: pathlib.Path
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} records, not one of number {index}")
        try:
            return self.source[index]
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise DamagedFile(
                f"{self.folder}: record {index} is damaged ({text}); copy the folder again"
            ) from error


def stored_kind(folder: str | os.PathLike) -> str | None:
    """The name of the kind of data in a folder; None if no manifest says."""
    try:
        content = json.loads((pathlib.Path(folder) / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def _serialize(features: Any, example: Mapping[str, Any]) -> bytes:
    """An example as tfds reads it."""
    from tensorflow_datasets.proto import tf_example_pb2

    serialized = features.serialize_example(dict(example))
    # tfds leaves the order of the fields to chance, but the same prompts shall give the same files
    message = tf_example_pb2.Example.FromString(serialized)
    return message.SerializeToString(deterministic=True)


def _fields(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(manifest)))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What manifest.json says; `checksums` of a complete dataset's small files."""

    manifest: Any
    complete: bool
    checksums: dict[str, str]

    def __post_init__(self):
        hold_fields(self)


def _read_manifest(kind: Kind, folder: pathlib.Path) -> _Stored:
    path = folder / _MANIFEST
    try:
        content = checksums.check_seal(path, json.loads(path.read_text(encoding="utf-8")))
        found = (content.pop("format"), content.pop("kind"))
        if found != (kind.format, kind.name):
            raise ValueError(f"format and kind are {found}; expected {(kind.format, kind.name)}")
        complete, known = content.pop("complete"), content.pop("checksums", {})
        return _Stored(kind.manifest(**content), complete, known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the manifest of {kind.title} that this version writes ({error!r}); "
            f"make them again with {kind.program}, in a new folder"
        ) from error
