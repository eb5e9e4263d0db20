"""Clips of the pocket world for training: made on the fly, or stored with the truth about them.

`BounceSource` is a random-access source for `text_dataset.grain_batches` that makes clip i when it
is asked for, in some 5 ms. A stored dataset (see `omniforcing_jax.data.shards`) holds the same
clips with their truth, for those who want files; a record is

    caption                      text
    seed                         number; `make_clip(seed, ...)` makes the clip again
    frames                       [F, H, W, 3] uint8
    waveform                     [N, 2] int16
    trajectories                 [balls, F, 2] float64, pixels
    radii                        [balls] float64, pixels
    colours, sizes               [balls] indices into `COLOURS` and `SIZES`
    impacts                      [impacts, 11] float64, the fields of `IMPACT` in their order
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from omniforcing_jax.data import shards
from pocket.world.captions import caption
from pocket.world.physics import (
    COLOURS,
    IMPACT,
    SIZES,
    Ball,
    Scene,
    Truth,
    WorldConfig,
    draw_scene,
    simulate,
)
from pocket.world.render import render, synthesize

# Seeds of the splits: training never meets what is measured.
SPLITS = {
    "train": range(0, 10**9),
    "validation": range(10**9, 10**9 + 10**6),
    "test": range(2 * 10**9, 2 * 10**9 + 10**6),
}
_PCM_SCALE = 32767.0


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of the pocket world.

    Attributes:
      seed: what it was made from.
      caption: what is seen and heard.
      frames: [F, H, W, 3] uint8 RGB.
      waveform: [N, 2] float32 in [-1, 1].
      truth: what really happens.
    """

    seed: int
    caption: str
    frames: np.ndarray
    waveform: np.ndarray
    truth: Truth


def make_clip(
    seed: int, num_frames: int, config: WorldConfig | None = None, scene: Scene | None = None
) -> Clip:
    """Makes a clip; the same arguments always make the same one.

    Args:
      seed: not negative; decides everything that is not given. A longer clip of the same seed
        begins with the shorter one.
      num_frames: its length.
      config: the world; None is `WorldConfig()`.
      scene: the balls; None draws them.
    """
    config = config or WorldConfig()
    scene = draw_scene(seed, config) if scene is None else scene
    truth = simulate(scene, seed, num_frames, config)
    return Clip(
        seed=seed,
        caption=clip_caption(seed, config, scene),
        frames=render(truth, config),
        waveform=synthesize(truth, config),
        truth=truth,
    )


def clip_caption(seed: int, config: WorldConfig, scene: Scene | None = None) -> str:
    """The caption of the clip that `make_clip` makes of the same arguments."""
    scene = draw_scene(seed, config) if scene is None else scene
    return caption(scene, np.random.default_rng((seed, 2)))


def split_seeds(split: str, num_clips: int | None = None) -> range:
    """Seeds of the first `num_clips` clips of a split, or of all.

    Raises:
      ValueError: no such split, or it has not as many clips.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose from {', '.join(SPLITS)}")
    seeds = SPLITS[split]
    if num_clips is not None and not 1 <= num_clips <= len(seeds):
        raise ValueError(f"split {split!r} has 1 to {len(seeds):,} clips, not {num_clips:,}")
    return seeds if num_clips is None else seeds[:num_clips]


@dataclasses.dataclass(frozen=True)
class BounceSource:
    """Clips that are made when they are read; a source for grain.

    Attributes:
      num_frames: of every clip.
      split: one of `SPLITS`.
      num_clips: the first so many of the split; None for all of them.
      config: the world.
    """

    num_frames: int
    split: str = "train"
    num_clips: int | None = None
    config: WorldConfig = dataclasses.field(default_factory=WorldConfig)

    def __post_init__(self):
        split_seeds(self.split, self.num_clips)
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, not {self.num_frames}")

    def __len__(self) -> int:
        return len(split_seeds(self.split, self.num_clips))

    def clip(self, index: int) -> Clip:
        """Clip `index` with its truth."""
        seeds = split_seeds(self.split, self.num_clips)
        return make_clip(seeds[int(index)], self.num_frames, self.config)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What training needs of clip `index`; arrays of one shape for all clips.

        Returns:
          {"caption", "seed", "frames" [F, H, W, 3] uint8, "waveform" [N, 2] float32}
        """
        return _element(self.clip(index))


def _element(clip: Clip) -> dict[str, Any]:
    return {
        "caption": clip.caption,
        "seed": clip.seed,
        "frames": clip.frames,
        "waveform": clip.waveform,
    }


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of clips holds.

    Attributes:
      world: fields of `WorldConfig`.
      split: whose seeds they are made from, from the first on.
      num_frames: of a clip.
      num_clips: how many are stored.
      clips_per_shard: clips in each shard but the last.
    """

    world: dict[str, Any]
    split: str
    num_frames: int
    num_clips: int
    clips_per_shard: int = 64

    def __post_init__(self):
        split_seeds(self.split, self.num_clips)
        for name in ("num_frames", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        WorldConfig(**self.world)

    @property
    def config(self) -> WorldConfig:
        """The world."""
        return WorldConfig(**self.world)

    @property
    def num_shards(self) -> int:
        """Number of ArrayRecord files."""
        return -(-self.num_clips // self.clips_per_shard)

    def shard_range(self, shard: int) -> range:
        """Indices of the clips in a shard."""
        start = shard * self.clips_per_shard
        return range(start, min(start + self.clips_per_shard, self.num_clips))


def _record(manifest: Manifest) -> Any:
    """tfds' description of a record."""
    import tensorflow_datasets as tfds

    def array(dtype: type, *shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    config, num_frames = manifest.config, manifest.num_frames
    return tfds.features.FeaturesDict(
        {
            "caption": tfds.features.Text(),
            "seed": tfds.features.Scalar(np.int64),
            "frames": array(np.uint8, num_frames, config.height, config.width, 3),
            "waveform": array(np.int16, config.num_samples(num_frames), 2),
            "trajectories": array(np.float64, None, num_frames, 2),
            "radii": array(np.float64, None),
            "colours": array(np.int64, None),
            "sizes": array(np.int64, None),
            "impacts": array(np.float64, None, len(IMPACT.names)),
        }
    )


BOUNCE_CLIPS = shards.Kind(
    name="bounce_clips",
    format=1,
    title="clips of the pocket world",
    records="clips",
    program="pocket.make_world",
    manifest=Manifest,
    features=_record,
)


class BounceWriter(shards.ShardWriter):
    """Writes a folder of clips; see `ShardWriter`."""

    def __init__(self, folder: str | os.PathLike, manifest: Manifest):
        """Checks the folder; nothing is written.

        Raises:
          ValueError: see `shards.check_folder`.
        """
        super().__init__(BOUNCE_CLIPS, folder, manifest)

    def begin(self) -> None:
        super().begin()
        self.write_negative_arrays({})  # clips have no negative prompt, but its file belongs here

    def write_shard(self, shard: int, clips: Iterable[Clip]) -> None:
        """Writes a shard, completely or not at all.

        Args:
          shard: which one.
          clips: those of `manifest.shard_range(shard)`; consumed one after the other.

        Raises:
          ValueError: another number of clips than the shard has.
        """
        self.write_records(shard, map(_example, clips))


def _example(clip: Clip) -> dict[str, Any]:
    truth = clip.truth
    columns = [truth.impacts[name].astype(np.float64) for name in IMPACT.names]
    return {
        "caption": clip.caption,
        "seed": clip.seed,
        "frames": clip.frames,
        "waveform": np.round(clip.waveform * _PCM_SCALE).astype(np.int16),
        "trajectories": np.ascontiguousarray(truth.trajectories.swapaxes(0, 1)),
        "radii": truth.radii,
        "colours": np.array([COLOURS.index(ball.colour) for ball in truth.scene]),
        "sizes": np.array([SIZES.index(ball.size) for ball in truth.scene]),
        "impacts": np.ascontiguousarray(np.stack(columns, -1)),
    }


def write_dataset(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Makes and stores all clips that are not in the folder yet.

    Raises:
      ValueError: see `shards.check_folder`.
    """
    writer = BounceWriter(folder, manifest)
    if writer.complete:
        return
    writer.begin()
    source = BounceSource(manifest.num_frames, manifest.split, manifest.num_clips, manifest.config)
    for shard in writer.missing():
        writer.write_shard(shard, map(source.clip, manifest.shard_range(shard)))
    writer.finish()


@dataclasses.dataclass(frozen=True)
class BounceDataset:
    """Random access to stored clips; has the interface of `BounceSource`.

    Attributes:
      manifest: what they are.
    """

    manifest: Manifest
    _source: Any

    def __len__(self) -> int:
        return len(self._source)

    def clip(self, index: int) -> Clip:
        """Clip `index` with its truth; the waveform in steps of 1 / 32767."""
        record = self._source[index]
        scene = tuple(
            Ball(COLOURS[colour], SIZES[size])
            for colour, size in zip(record["colours"], record["sizes"])
        )
        impacts = np.array([tuple(row) for row in record["impacts"]], IMPACT)
        return Clip(
            seed=int(record["seed"]),
            caption=record["caption"].decode(),
            frames=record["frames"],
            waveform=record["waveform"].astype(np.float32) / np.float32(_PCM_SCALE),
            truth=Truth(scene, record["trajectories"].swapaxes(0, 1), record["radii"], impacts),
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As `BounceSource.__getitem__`."""
        return _element(self.clip(index))


def open_bounce_dataset(folder: str | os.PathLike) -> BounceDataset:
    """Opens a folder written by `pocket.make_world`.

    Raises:
      FileNotFoundError: there are no clips.
      ValueError: they are not complete, damaged, or written by another version.
    """
    manifest, source, _ = shards.open_shards(BOUNCE_CLIPS, folder)
    return BounceDataset(manifest, source)
