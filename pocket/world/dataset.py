"""Clips of the pocket world for training: made on the fly, or stored with the truth about them.

`BounceSource` is a random-access source for `text_dataset.grain_batches` that makes clip i when it
is asked for, in some 5 ms. A stored dataset (see `omniforcing_jax.data.shards`; `open_shards` or
`tfds.builder_from_directory` reads it) holds the same clips with their truth; a record is

    caption                      text
    seed                         number; `make_clip(seed, ...)` makes the clip again
    frames                       [F, H, W, 3] uint8
    waveform                     [N, 2] int16, in steps of 1 / 32767
    trajectories                 [balls, F, 2] float64, pixels
    radii                        [balls] float64, pixels
    colours, sizes               [balls] indices into `COLOURS` and `SIZES`
    impacts                      [impacts, 11] float64, the fields of `IMPACT` in their order
"""

import dataclasses
import os
from typing import Any

import numpy as np

from omniforcing_jax.data import shards
from pocket.world.captions import caption
from pocket.world.physics import (
    COLOURS,
    IMPACT,
    SIZES,
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
class RenderedClip:
    """A clip of the pocket world."""

    seed: int  # what it was made from
    caption: str  # what is seen and heard
    frames: np.ndarray  # [F, H, W, 3] uint8 RGB
    waveform: np.ndarray  # [N, 2] float32 in [-1, 1]
    truth: Truth  # what really happens


def make_clip(
    seed: int, num_frames: int, config: WorldConfig | None = None, scene: Scene | None = None
) -> RenderedClip:
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
    words = clip_caption(seed, config, scene)
    return RenderedClip(seed, words, render(truth, config), synthesize(truth, config), truth)


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
    """Clips that are made when they are read; also the manifest of a folder that stores them."""

    num_frames: int  # of every clip
    split: str = "train"  # one of `SPLITS`, from whose first seed on they are made
    num_clips: int | None = None  # the first so many of the split; None for all of them
    # its settings, or the fields of `WorldConfig`
    world: WorldConfig | dict[str, Any] = dataclasses.field(default_factory=WorldConfig)
    clips_per_shard: int = 64  # clips in each shard but the last, where they are stored

    def __post_init__(self):
        split_seeds(self.split, self.num_clips)
        for name in ("num_frames", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if isinstance(self.world, dict):
            object.__setattr__(self, "world", WorldConfig(**self.world))

    def __len__(self) -> int:
        return len(split_seeds(self.split, self.num_clips))

    def clip(self, index: int) -> RenderedClip:
        """Clip `index` with its truth."""
        seeds = split_seeds(self.split, self.num_clips)
        return make_clip(seeds[int(index)], self.num_frames, self.world)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Caption, seed, frames and waveform of clip `index`: what training needs."""
        clip = self.clip(index)
        return {name: getattr(clip, name) for name in ("caption", "seed", "frames", "waveform")}

    @property
    def num_shards(self) -> int:
        """Number of ArrayRecord files."""
        return -(-len(self) // self.clips_per_shard)

    def shard_range(self, shard: int) -> range:
        """Indices of the clips in a shard."""
        return range(len(self))[shard * self.clips_per_shard :][: self.clips_per_shard]


def _record(source: BounceSource) -> Any:
    """tfds' description of a record."""
    import tensorflow_datasets as tfds

    def array(dtype: type, *shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    world, num_frames = source.world, source.num_frames
    return tfds.features.FeaturesDict(
        {
            "caption": tfds.features.Text(),
            "seed": tfds.features.Scalar(np.int64),
            "frames": array(np.uint8, num_frames, world.height, world.width, 3),
            "waveform": array(np.int16, world.num_samples(num_frames), 2),
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
    manifest=BounceSource,
    features=_record,
)


def _example(clip: RenderedClip) -> dict[str, Any]:
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


def write_dataset(folder: str | os.PathLike, source: BounceSource) -> None:
    """Makes and stores all clips that are not in the folder yet; every shard whole or not at all.

    Raises:
      ValueError: see `shards.check_folder`.
    """
    writer = shards.ShardWriter(BOUNCE_CLIPS, folder, source)
    if writer.complete:
        return
    writer.begin()
    writer.write_negative_arrays({})  # clips have no negative prompt, but its file belongs here
    for shard in writer.missing():
        writer.write_records(shard, (_example(source.clip(i)) for i in source.shard_range(shard)))
    writer.finish()
