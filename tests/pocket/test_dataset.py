"""Clips of the pocket world on the fly and on disk, and the program that makes them."""

import dataclasses
import json

import numpy as np
import pytest

from omniforcing_jax.data.shards import open_shards
from omniforcing_jax.data.text_dataset import grain_batches
from omniforcing_jax.streaming import media
from pocket import make_world
from pocket.world.captions import scene_from_caption
from pocket.world.dataset import (
    BOUNCE_CLIPS,
    SPLITS,
    BounceSource,
    make_clip,
    write_dataset,
)
from pocket.world.physics import COLOURS, IMPACT, SIZES, Ball, Truth, WorldConfig

FRAMES = 25
SOURCE = BounceSource(FRAMES, "test", 5, WorldConfig(max_balls=3), clips_per_shard=2)


def test_splits_share_no_seed():
    ranges = list(SPLITS.values())
    for i, a in enumerate(ranges):
        for b in ranges[:i]:
            assert a.stop <= b.start or b.stop <= a.start
    test = BounceSource(FRAMES, "test", 2)
    assert test.clip(1).seed == SPLITS["test"][1] and len(test) == 2
    assert len(BounceSource(FRAMES)) == 10**9
    with pytest.raises(ValueError, match="no split 'dev'"):
        BounceSource(FRAMES, "dev")
    with pytest.raises(IndexError):
        test[2]


def test_batches_do_not_depend_on_their_size():
    source = BounceSource(FRAMES, num_clips=6)
    two = [next(it) for it in [grain_batches(source, 2, seed=1)] for _ in range(3)]
    three = [next(it) for it in [grain_batches(source, 3, seed=1)] for _ in range(2)]
    for name, dtype in (("frames", np.uint8), ("waveform", np.float32)):
        clips = np.concatenate([batch[name] for batch in two])
        assert clips.dtype == dtype
        np.testing.assert_array_equal(clips, np.concatenate([batch[name] for batch in three]))
    seeds = [int(seed) for batch in two for seed in batch["seed"]]
    assert sorted(seeds) == list(range(6)) and seeds != sorted(seeds)
    again = make_clip(seeds[0], FRAMES)
    np.testing.assert_array_equal(two[0]["frames"][0], again.frames)
    assert two[0]["caption"][0] == again.caption


class Stopped(BounceSource):
    """Is interrupted in its second shard."""

    def clip(self, index: int):
        if index == 3:
            raise KeyboardInterrupt
        return super().clip(index)


def test_stored_clips_are_the_ones_made_on_the_fly(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "world", Stopped(**vars(SOURCE)))
    with pytest.raises(ValueError, match=r"not complete; run pocket\.make_world"):
        open_shards(BOUNCE_CLIPS, tmp_path / "world")
    write_dataset(tmp_path / "world", SOURCE)
    write_dataset(tmp_path / "world", SOURCE)  # complete: nothing to do

    manifest, records, _ = open_shards(BOUNCE_CLIPS, tmp_path / "world")
    assert len(records) == 5 and manifest == SOURCE
    for index in range(5):
        record, made = records[index], SOURCE.clip(index)
        truth = made.truth
        assert (record["seed"], record["caption"].decode()) == (made.seed, made.caption)
        np.testing.assert_array_equal(record["frames"], made.frames)
        np.testing.assert_allclose(record["waveform"] / 32767, made.waveform, atol=2e-5)
        np.testing.assert_array_equal(record["trajectories"].swapaxes(0, 1), truth.trajectories)
        impacts = np.array([tuple(row) for row in record["impacts"]], IMPACT)
        np.testing.assert_array_equal(impacts, truth.impacts)
        np.testing.assert_array_equal(record["radii"], truth.radii)
        balls = zip(record["colours"], record["sizes"], strict=True)
        assert tuple(Ball(COLOURS[c], SIZES[s]) for c, s in balls) == truth.scene

    with pytest.raises(ValueError, match="num_frames 25 instead of 26"):
        write_dataset(tmp_path / "world", dataclasses.replace(SOURCE, num_frames=26))


def test_make_world_writes_clips_to_look_at(tmp_path):
    assert not make_world.main(["--output", str(tmp_path), "--clips", "1", "--frames", "30"])
    clip = make_clip(0, 30)
    frames, rate, _, sample_rate = media.read_clip(tmp_path / "0000000000.mp4")
    assert (len(frames), rate, sample_rate) == (30, 24, 16_000)
    assert np.abs(frames.astype(int) - clip.frames).mean() < 3
    content = json.loads((tmp_path / "0000000000.json").read_text())
    assert content["caption"] == clip.caption
    np.testing.assert_array_equal(Truth.from_json(content).impacts, clip.truth.impacts)
    assert (tmp_path / "0000000000.png").stat().st_size > 10_000


def test_make_world_writes_captions_and_datasets(tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    options = ["--format", "captions", "--output", str(captions), "--clips", "20"]
    assert not make_world.main([*options, "--split", "validation"])
    lines = captions.read_text().splitlines()
    assert len(lines) == 20 and all(map(scene_from_caption, lines))
    assert lines[3] == make_clip(SPLITS["validation"][3], 1).caption

    options = ["--format", "array_record", "--output", str(tmp_path / "world"), "--clips", "3"]
    assert not make_world.main([*options, "--frames", "9", "--max-balls", "1"])
    manifest, records, _ = open_shards(BOUNCE_CLIPS, tmp_path / "world")
    assert len(records) == 3 and manifest.world.max_balls == 1

    assert make_world.main([*options, "--frames", "10", "--max-balls", "4"]) == 2
    assert "from 1 to 3" in capsys.readouterr().err
