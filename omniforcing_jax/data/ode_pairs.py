"""Stored ODE trajectories: what stage II regresses a student to.

A record of the tfds dataset (see `omniforcing_jax.data.shards`) is one trajectory, S states of one
clip from noise to clean, and its prompt's text features, so that training reads one dataset:

    prompt, prompt_hash          text
    clip, seed                   number and the run's seed; the noise's key is fold_in(seed, clip)
    sigmas                       [S] float32
    video, audio                 [S, T, C] states, bfloat16 as uint16
    video_velocity, audio_velocity   [S - 1, T, C] the model's at all states but the last, likewise
    video_features, audio_features   [tokens, W], as in `omniforcing_jax.data.text_dataset`
    video_mask, audio_mask       [F], [T_a] float32, 0 where latents were given; with conditions

A clip of 121 frames at 512x768 takes 14 MB with five states. With several trajectories per prompt,
clip r * prompts + i is the r-th of prompt i.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from omniforcing_jax.data import shards
from omniforcing_jax.data.text_dataset import pad_features, record_features
from omniforcing_jax.ranges import COUNT, SHARE, Count, hold_fields
from omniforcing_jax.text.prompt_files import prompt_hash

STREAMS = ("video", "audio")


@dataclasses.dataclass(frozen=True)
class ODEPairsManifest(shards.InShardsOfClips):
    """What a folder of ODE trajectories holds, and everything that decides it.

    Attributes:
      generator: fingerprint of the sampled model.
      text: fingerprint of the text features.
      model_version: of both, e.g. "2.0.0".
      compute_dtype: in which the model ran.
      guidance: scales by modality.
      autoregression: layout, window, anchors and positions of a model that generates block after
        block; None for whole clips at once.
      schedule: sigmas of all steps.
      sigmas: those whose states are stored.
      frames, resolution: of the clips, in pixels: (height, width).
      frame_rate: pixel frames per second.
      video_frames, audio_frames, height, width: of the clips, in latents.
      video_channels, audio_channels: of the latents.
      text_length: S, tokens of a padded prompt.
      video_dim, audio_dim: widths of the text features.
      shared_features: one array of them serves both streams (LTX-2.0).
      negative_prompt: its text.
      seed: of the noise.
      num_prompts: of the text features.
      repeats: clips per prompt.
      clips_per_shard: clips in each shard but the last.
      conditions: with which probability a clip was sampled in each mode; None is text alone.
    """

    generator: str
    text: str
    model_version: str
    compute_dtype: str
    guidance: dict[str, Any]
    autoregression: dict[str, Any] | None
    schedule: tuple[Annotated[float, SHARE], ...]
    sigmas: tuple[Annotated[float, SHARE], ...]
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
    seed: Count
    num_prompts: Annotated[int, COUNT]
    repeats: int
    clips_per_shard: int
    conditions: dict[str, Annotated[float, SHARE]] | None = None

    def __post_init__(self):
        hold_fields(self)

    @property
    def num_clips(self) -> int:
        """How many trajectories are stored."""
        return self.num_prompts * self.repeats

    @property
    def array_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes [S, T, C] of the stored states and velocities."""
        states = len(self.sigmas)
        video = (self.video_frames * self.height * self.width, self.video_channels)
        audio = (self.audio_frames, self.audio_channels)
        return {
            "video": (states, *video),
            "video_velocity": (states - 1, *video),
            "audio": (states, *audio),
            "audio_velocity": (states - 1, *audio),
        }

    @property
    def mask_shapes(self) -> dict[str, tuple[int]]:
        """Shapes of the stored masks of what was given."""
        if self.conditions is None:
            return {}
        return {"video_mask": (self.video_frames,), "audio_mask": (self.audio_frames,)}

    @property
    def clip_bytes(self) -> int:
        """Size of a trajectory without its text, before compression."""
        return sum(2 * int(np.prod(shape)) for shape in self.array_shapes.values())


def _record(manifest: ODEPairsManifest) -> Any:
    """tfds' description of a record."""
    import tensorflow_datasets as tfds

    features = record_features(manifest)
    for name, shape in manifest.array_shapes.items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.uint16, encoding="bytes")
    for name, shape in manifest.mask_shapes.items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.float32)
    features["sigmas"] = tfds.features.Tensor(shape=(len(manifest.sigmas),), dtype=np.float32)
    features["clip"] = features["seed"] = tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict(features)


ODE_PAIRS = shards.Kind(
    name="ode_pairs",
    format=1,
    title="ODE trajectories",
    records="clips",
    program="launch.ode_pairs",
    manifest=ODEPairsManifest,
    features=_record,
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One trajectory to be stored.

    Attributes:
      prompt: its text.
      text: "video_features" [tokens, Wv] and, unless shared, "audio_features", bfloat16.
      states, velocities: [S, T, C] and [S - 1, T, C] bfloat16 by stream.
      masks: "video_mask" [F] and "audio_mask" [T_a] float32 with conditions, else nothing.
    """

    prompt: str
    text: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    velocities: dict[str, np.ndarray]
    masks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class ODEPairsWriter(shards.ShardWriter):
    """Writes a folder of ODE trajectories; see `ShardWriter`."""

    def __init__(self, folder: str | os.PathLike, manifest: ODEPairsManifest):
        """Checks the folder; nothing is written.

        Raises:
          ValueError: see `shards.check_folder`.
        """
        super().__init__(ODE_PAIRS, folder, manifest)

    def write_shard(self, shard: int, pairs: Iterable[Pair]) -> None:
        """Writes a shard, completely or not at all.

        Args:
          shard: which one.
          pairs: those of `manifest.shard_range(shard)`; consumed one after the other.

        Raises:
          ValueError: arrays of another shape or dtype, or another number of pairs than the shard
            has; names the clip.
        """
        start = self.manifest.shard_range(shard).start
        self.write_records(shard, (self._example(i, pair) for i, pair in enumerate(pairs, start)))

    def _example(self, clip: int, pair: Pair) -> dict[str, Any]:
        example: dict[str, Any] = {
            "prompt": pair.prompt,
            "prompt_hash": prompt_hash(pair.prompt),
            "clip": clip,
            "seed": self.manifest.seed,
            "sigmas": np.asarray(self.manifest.sigmas, np.float32),
            **pair.masks,
        }
        arrays = pair.states | {f"{name}_velocity": x for name, x in pair.velocities.items()}
        for name, shape in self.manifest.array_shapes.items():
            x = arrays[name]
            if x.shape != shape or x.dtype != ml_dtypes.bfloat16:
                raise ValueError(
                    f"{name} of clip {clip} ({pair.prompt[:60]!r}) is {x.dtype} {list(x.shape)}; "
                    f"expected bfloat16 {list(shape)}"
                )
        arrays |= pair.text
        return example | {k: np.ascontiguousarray(x).view(np.uint16) for k, x in arrays.items()}


@dataclasses.dataclass(frozen=True)
class ODEPairs:
    """Random access to stored trajectories; a source for `text_dataset.grain_batches`.

    Attributes:
      manifest: what they are.
      negative: text features of the negative prompt, in the form of an element's.
    """

    manifest: ODEPairsManifest
    negative: dict[str, np.ndarray]
    _source: Any

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One sample of the batches that stage II takes (`ODERegression.train_step`).

        Returns:
          {"video" [S, T_v, C], "audio" [S, T_a, C], "video_velocity" and "audio_velocity" [S - 1,
          T, C], all bfloat16, "sigmas" [S] and, with conditions, "video_mask" [F] and
          "audio_mask" [T_a] float32, "video_features" [S_text, Wv] and, unless one
          array serves both streams, "audio_features" [S_text, Wa] bfloat16, and their "mask"}.
        """
        record = self._source[index]
        arrays = {
            name: record[name].view(ml_dtypes.bfloat16) for name in self.manifest.array_shapes
        }
        numbers = {name: record[name] for name in ("sigmas", *self.manifest.mask_shapes)}
        return arrays | numbers | pad_features(record, self.manifest)

    def prompt(self, index: int) -> str:
        """The text of a record."""
        return self._source[index]["prompt"].decode()


def open_ode_pairs(folder: str | os.PathLike) -> ODEPairs:
    """Opens a folder written by `launch.ode_pairs`.

    Raises:
      FileNotFoundError: there are no trajectories.
      ValueError: they are not complete, damaged, or written by another version.
    """
    manifest, source, arrays = shards.open_shards(ODE_PAIRS, folder)
    negative = pad_features({k: x.view(np.uint16) for k, x in arrays.items()}, manifest)
    return ODEPairs(manifest, negative, source)
