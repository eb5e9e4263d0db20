"""Stored text features: what the text encoder makes of a list of prompts, for training.

Stored are the features in front of the connectors, of a prompt's own tokens only: 0.8 MB for 100
tokens of LTX-2.0 instead of the 16 MB of its two contexts. The training step applies the
connectors, two layers each.

A record of the tfds dataset (see `omniforcing_jax.data.shards`) is {"prompt", "prompt_hash",
"video_features" [tokens, Wv]} and, unless one array serves both streams, "audio_features"
[tokens, Wa].
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from omniforcing_jax.data import shards
from omniforcing_jax.ranges import Count, hold_fields
from omniforcing_jax.text.prompt_files import prompt_hash

if TYPE_CHECKING:
    import grain

TEXT_ARRAYS = ("video_features", "audio_features")
_EXPONENT = 0x7F80  # of a bfloat16; all ones for infinity and NaN
# grain counts in batches here, and a batch of padded features takes 16 MB per prompt.
_READ_THREADS = _PREFETCHED_BATCHES = 4

# Features of one prompt: ([tokens, Wv], [tokens, Wa]) bfloat16; the second is None if shared.
PromptFeatures = tuple[np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class TextManifest:
    """What a folder of text features holds.

    Attributes:
      encoder: fingerprint of the text encoder (`TextEncoder.fingerprint`).
      tokenizer: fingerprint of the tokenizer.
      model_version: of the model whose projection made the features, e.g. "2.0.0".
      compute_dtype: in which the encoder ran.
      text_length: S, tokens of a padded prompt, as the model was trained with.
      video_dim, audio_dim: Wv, Wa.
      shared_features: one array serves both streams (LTX-2.0).
      negative_prompt: its text.
      prompts_sha256: `PromptList.sha256`.
      prompts_per_shard: prompts in each shard but the last.
      num_read, num_blank, num_duplicates: see `PromptList`.
      num_prompts: how many are stored.
      num_truncated: how many of these were longer than `text_length` tokens.
    """

    encoder: str
    tokenizer: str
    model_version: str
    compute_dtype: str
    text_length: int
    video_dim: int
    audio_dim: int
    shared_features: bool
    negative_prompt: str
    prompts_sha256: str
    prompts_per_shard: int
    num_read: Count
    num_blank: Count
    num_duplicates: Count
    num_prompts: Count
    num_truncated: Count

    def __post_init__(self):
        hold_fields(self)
        if self.num_prompts < 1:
            raise ValueError("there are no prompts to store")
        if self.shared_features and self.video_dim != self.audio_dim:
            raise ValueError(
                "features shared by both streams need one width, not "
                f"{self.video_dim} (video) and {self.audio_dim} (audio)"
            )

    @property
    def num_shards(self) -> int:
        """Number of ArrayRecord files."""
        return -(-self.num_prompts // self.prompts_per_shard)

    def shard_range(self, shard: int) -> range:
        """Indices of the prompts in a shard."""
        start = shard * self.prompts_per_shard
        return range(start, min(start + self.prompts_per_shard, self.num_prompts))


def record_features(manifest: Any) -> dict[str, Any]:
    """tfds' description of a record's text.

    Args:
      manifest: a `TextManifest`, or one of another kind of data that holds text features as well.
    """
    import tensorflow_datasets as tfds

    def array(dim: int) -> tfds.features.Tensor:
        # as bytes: one number after the other takes 80 times as long to write, and a third more
        return tfds.features.Tensor(shape=(None, dim), dtype=np.uint16, encoding="bytes")

    features = {
        "prompt": tfds.features.Text(),
        "prompt_hash": tfds.features.Text(),
        "video_features": array(manifest.video_dim),
    }
    if not manifest.shared_features:
        features["audio_features"] = array(manifest.audio_dim)
    return features


def _features_dict(manifest: TextManifest) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(record_features(manifest))


TEXT_FEATURES = shards.Kind(
    name="text_features",
    format=1,
    title="text features",
    records="prompts",
    program="launch.encode_prompts",
    manifest=TextManifest,
    features=_features_dict,
)


class TextDatasetWriter(shards.ShardWriter):
    """Writes a folder of text features; see `ShardWriter`."""

    def __init__(self, folder: str | os.PathLike, manifest: TextManifest):
        """Checks the folder; nothing is written.

        Raises:
          ValueError: see `shards.check_folder`.
        """
        super().__init__(TEXT_FEATURES, folder, manifest)

    def write_shard(
        self, shard: int, prompts: Iterable[str], features: Iterable[PromptFeatures]
    ) -> None:
        """Writes a shard, completely or not at all.

        Args:
          shard: which one.
          prompts: those of `manifest.shard_range(shard)`.
          features: of each of them.

        Raises:
          ValueError: features of another shape or dtype or that are not finite, or another number
            of prompts than the shard has; names the prompt.
        """
        pairs = zip(prompts, features, strict=True)
        self.write_records(shard, (self._example(*pair) for pair in pairs))

    def write_negative(self, features: PromptFeatures) -> None:
        """Stores the features of the negative prompt.

        Raises:
          ValueError: as `write_shard`.
        """
        self.write_negative_arrays(self._checked(self.manifest.negative_prompt, features))

    def _example(self, prompt: str, features: PromptFeatures) -> dict[str, Any]:
        example: dict[str, Any] = {"prompt": prompt, "prompt_hash": prompt_hash(prompt)}
        for name, x in self._checked(prompt, features).items():
            example[name] = np.ascontiguousarray(x).view(np.uint16)
        return example

    def _checked(self, prompt: str, features: PromptFeatures) -> dict[str, np.ndarray]:
        """The arrays to store, by name."""
        m = self.manifest
        video, audio = features
        arrays = {"video_features": (video, m.video_dim)}
        if not m.shared_features:
            arrays["audio_features"] = (audio, m.audio_dim)
        for name, (x, dim) in arrays.items():
            fits = x is not None and x.ndim == 2 and 0 < len(x) <= m.text_length
            if not (fits and x.shape == (len(video), dim) and x.dtype == ml_dtypes.bfloat16):
                found = "missing" if x is None else f"{x.dtype} {list(x.shape)}"
                raise ValueError(
                    f"{name} of the prompt {prompt[:60]!r}: {found}; expected bfloat16 [tokens, "
                    f"{dim}] of 1 to {m.text_length} tokens, as many as for the other stream"
                )
            if (np.ascontiguousarray(x).view(np.uint16) & _EXPONENT == _EXPONENT).any():
                raise ValueError(
                    f"{name} of the prompt {prompt[:60]!r} are not finite; nothing was stored. "
                    "The text encoder overflows: check its weights, or run it in float32"
                )
        return {name: x for name, (x, _) in arrays.items()}


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Random access to stored text features, padded; a source for grain.

    Attributes:
      manifest: what they are.
      negative: those of the negative prompt, in the form of an element.
    """

    manifest: TextManifest
    negative: dict[str, Any]
    _source: Any

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"prompt", "video_features" [S, Wv], "audio_features" [S, Wa], "mask" [S]}.

        Features are bfloat16, on the right and behind zeros; the mask is True at them. With shared
        features both names stand for the same array.
        """
        record = self._source[index]
        return _element(record["prompt"].decode(), record, self.manifest)


def open_text_dataset(folder: str | os.PathLike) -> TextDataset:
    """Opens a folder written by `launch.encode_prompts`.

    Raises:
      FileNotFoundError: there are no text features.
      ValueError: they are not complete, damaged, or written by another version.
    """
    manifest, source, arrays = shards.open_shards(TEXT_FEATURES, folder)
    negative = {name: x.view(np.uint16) for name, x in arrays.items()}
    return TextDataset(manifest, _element(manifest.negative_prompt, negative, manifest), source)


def grain_batches(
    source: Any,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    rows: Sequence[int] | None = None,
) -> "grain.DatasetIterator":
    """Batches of a source; batch n holds the same elements however many processes share it.

    Args:
      source: a `TextDataset`, or any other random-access source of dicts of arrays and texts.
      batch_size: B, of all processes together.
      seed: of the order; every epoch has its own.
      shuffle: False keeps the order of the source.
      repeat: for ever, with batches across the ends of epochs; False is one epoch without the
        elements that do not fill a batch.
      rows: those of each batch that this process reads, such as the ones its devices hold; None
        reads all.

    Returns:
      grain iterator of elements stacked to [len(rows), ...]. Its `get_state` and `set_state`, or a
      checkpoint, restore the position exactly; it counts whole batches, so that of one process is
      that of all, and of any other number of processes.

    Raises:
      ValueError: there are no such rows, or there is no full batch.
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    rows = range(batch_size) if rows is None else rows
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"a batch of {batch_size} has rows 0 to {batch_size - 1}, not {[*rows]}")
    if not len(source) or (not repeat and len(source) < batch_size):
        raise ValueError(f"{len(source)} elements do not fill a batch of {batch_size}")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:  # [B] -> [len(rows), ...] each
        elements = [source[int(indices[row])] for row in rows]
        return {name: np.stack([e[name] for e in elements]) for name in elements[0]}

    dataset = grain.MapDataset.range(len(source))
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    if repeat:
        dataset = dataset.repeat()
    # numbers are put together before anything is read: each process knows whole batches
    dataset = dataset.batch(batch_size, drop_remainder=True).map(read)
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(dataset.to_iter_dataset(options))


def pad_features(arrays: Mapping[str, np.ndarray], manifest: Any) -> dict[str, np.ndarray]:
    """A prompt's stored uint16 arrays [tokens, W], padded on the left, as bfloat16 [S, W].

    Args:
      arrays: "video_features" and, unless shared, "audio_features".
      manifest: a `TextManifest`, or one of another kind of data that holds text features as well.

    Returns:
      The same arrays and their "mask" [S].
    """
    num_tokens = len(arrays["video_features"])
    padded = {"mask": np.arange(manifest.text_length) >= manifest.text_length - num_tokens}
    for name in TEXT_ARRAYS[:1] if manifest.shared_features else TEXT_ARRAYS:
        x = np.zeros((manifest.text_length, arrays[name].shape[-1]), np.uint16)
        x[manifest.text_length - num_tokens :] = arrays[name]
        padded[name] = x.view(ml_dtypes.bfloat16)
    return padded


def own_tokens(element: Mapping[str, Any], manifest: TextManifest) -> dict[str, np.ndarray]:
    """An element's features [tokens, W] without the padding, by the names they are stored under."""
    names = TEXT_ARRAYS[:1] if manifest.shared_features else TEXT_ARRAYS
    return {name: element[name][element["mask"]] for name in names}


def _element(
    prompt: str, arrays: Mapping[str, np.ndarray], manifest: TextManifest
) -> dict[str, Any]:
    padded = pad_features(arrays, manifest)
    return {"prompt": prompt, "audio_features": padded["video_features"], **padded}
