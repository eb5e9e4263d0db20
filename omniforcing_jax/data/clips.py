"""Stored clips: latents of films with sound, and their captions' text features, for training.

A record of the tfds dataset (see `omniforcing_jax.data.shards`) is one clip:

    prompt, prompt_hash              its caption
    file                             name in the list of clips
    video, audio                     [T, C] normalised latents, bfloat16 as uint16
    video_features, audio_features   [tokens, W], as in `omniforcing_jax.data.text_dataset`

A clip of 121 frames at 512x768 takes 1.6 MB and its text.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from omniforcing_jax.data import shards
from omniforcing_jax.data.text_dataset import pad_features, record_features
from omniforcing_jax.ranges import COUNT, Count, hold_fields
from omniforcing_jax.text.prompt_files import prompt_hash


@dataclasses.dataclass(frozen=True)
class ClipsManifest(shards.InShardsOfClips):
    """What a folder of clips holds, and everything that decides it.

    Attributes:
      encoders: fingerprints of the VAEs' weights, by component.
      text: fingerprint of the text features.
      model_version: of both, e.g. "2.0.0".
      compute_dtype: in which the encoders ran.
      frames, resolution: of the clips, in pixels: (height, width).
      frame_rate: pixel frames per second.
      video_frames, audio_frames, height, width: of the clips, in latents.
      video_channels, audio_channels: of the latents.
      text_length: S, tokens of a padded prompt.
      video_dim, audio_dim: widths of the text features.
      shared_features: one array of them serves both streams (LTX-2.0).
      negative_prompt: its text.
      clips_sha256, num_read, num_duplicates: see `ClipList`.
      num_unusable: clips that were left out before encoding began.
      num_clips: how many were to be stored; those that turn out to be damaged are not.
      clips_per_shard: clips in each shard but the last.
    """

    encoders: dict[str, str]
    text: str
    model_version: str
    compute_dtype: str
    frames: int
    resolution: tuple[int, int]
    frame_rate: float
    video_frames: int
    audio_frames: int
    height: int
    width: int
    video_channels: int
    audio_channels: int
    text_length: int
    video_dim: int
    audio_dim: int
    shared_features: bool
    negative_prompt: str
    clips_sha256: str
    num_read: Count
    num_duplicates: Count
    num_unusable: Count
    num_clips: Annotated[int, COUNT]
    clips_per_shard: int

    def __post_init__(self):
        hold_fields(self)

    @property
    def array_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes [T, C] of the latents."""
        video = self.video_frames * self.height * self.width
        return {
            "video": (video, self.video_channels),
            "audio": (self.audio_frames, self.audio_channels),
        }


def _record(manifest: ClipsManifest) -> Any:
    """tfds' description of a record."""
    import tensorflow_datasets as tfds

    features = record_features(manifest) | {"file": tfds.features.Text()}
    for name, shape in manifest.array_shapes.items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.uint16, encoding="bytes")
    return tfds.features.FeaturesDict(features)


CLIPS = shards.Kind(
    name="clips",
    format=1,
    title="encoded clips",
    records="clips",
    program="launch.encode_clips",
    manifest=ClipsManifest,
    features=_record,
    may_skip=True,
)


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """One clip to be stored.

    Attributes:
      file: its name in the list of clips.
      prompt: its caption.
      text: "video_features" [tokens, Wv] and, unless shared, "audio_features", bfloat16.
      latents: "video" and "audio" [T, C], bfloat16.
    """

    file: str
    prompt: str
    text: dict[str, np.ndarray]
    latents: dict[str, np.ndarray]


class ClipsWriter(shards.ShardWriter):
    """Writes a folder of encoded clips; see `ShardWriter`."""

    def __init__(self, folder: str | os.PathLike, manifest: ClipsManifest):
        """Checks the folder; nothing is written.

        Raises:
          ValueError: see `shards.check_folder`.
        """
        super().__init__(CLIPS, folder, manifest)

    def write_shard(self, shard: int, clips: Iterable[EncodedClip]) -> None:
        """Writes a shard, completely or not at all.

        Args:
          shard: which one.
          clips: those of `manifest.shard_range(shard)` that could be encoded.

        Raises:
          ValueError: latents of another shape or dtype or that are not finite; names the clip.
        """
        self.write_records(shard, map(self._example, clips))

    def _example(self, clip: EncodedClip) -> dict[str, Any]:
        for name, shape in self.manifest.array_shapes.items():
            x = clip.latents[name]
            if x.shape != shape or x.dtype != ml_dtypes.bfloat16:
                raise ValueError(
                    f"{name} latents of {clip.file} are {x.dtype} {list(x.shape)}; expected "
                    f"bfloat16 {list(shape)}"
                )
            if not np.isfinite(x.astype(np.float32)).all():
                raise ValueError(f"{name} latents of {clip.file} are not finite (NaN or infinity)")
        arrays = clip.latents | clip.text
        return {
            "prompt": clip.prompt,
            "prompt_hash": prompt_hash(clip.prompt),
            "file": clip.file,
            **{name: np.ascontiguousarray(x).view(np.uint16) for name, x in arrays.items()},
        }


@dataclasses.dataclass(frozen=True)
class Clips:
    """Random access to encoded clips; a source for `text_dataset.grain_batches`.

    Attributes:
      manifest: what they are.
      negative: text features of the negative prompt, in the form of an element's.
    """

    manifest: ClipsManifest
    negative: dict[str, np.ndarray]
    _source: Any

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One sample of a training batch.

        Returns:
          {"video" [T_v, C], "audio" [T_a, C], "video_features" [S, Wv] and, unless one array serves
          both streams, "audio_features" [S, Wa], all bfloat16, and the features' "mask" [S]}.
        """
        record = self._source[index]
        latents = {name: record[name].view(ml_dtypes.bfloat16) for name in ("video", "audio")}
        return latents | pad_features(record, self.manifest)

    def caption(self, index: int) -> str:
        """The text of a record."""
        return self._source[index]["prompt"].decode()

    def file(self, index: int) -> str:
        """The name of the clip it was made from."""
        return self._source[index]["file"].decode()


def open_clips(folder: str | os.PathLike) -> Clips:
    """Opens a folder written by `launch.encode_clips`.

    Raises:
      FileNotFoundError: there are no clips.
      ValueError: they are not complete, damaged, or written by another version.
    """
    manifest, source, arrays = shards.open_shards(CLIPS, folder)
    negative = pad_features({k: x.view(np.uint16) for k, x in arrays.items()}, manifest)
    return Clips(manifest, negative, source)
