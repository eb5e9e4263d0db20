"""The pocket world: its physics, picture, sound and captions against what they should be."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from pocket.world import physics
from pocket.world.captions import VOCABULARY, caption, scene_from_caption, with_sound, words_of
from pocket.world.dataset import make_clip
from pocket.world.physics import (
    COLOURS,
    FLOOR,
    PITCHES,
    RGB,
    SURFACES,
    Ball,
    Truth,
    WorldConfig,
    draw_scene,
    simulate,
)
from pocket.world.render import background, render, synthesize, tone

MINUTE = 60 * 24 + 1
CROWDED = WorldConfig(min_balls=3, max_balls=3)


@pytest.fixture(scope="module")
def minutes():
    """Three balls for a minute, by seed."""
    return [simulate(draw_scene(seed, CROWDED), seed, MINUTE, CROWDED) for seed in range(12)]


def still(scene, x, y, frames=1, config=None):
    """The truth about one ball that does not move."""
    config = config or WorldConfig()
    place = np.tile([[[x, y]]], (frames, 1, 1)).astype(float)
    radii = np.array([ball.radius for ball in scene]) * config.height
    return Truth(scene, place, radii, np.zeros(0, physics.IMPACT))


def test_a_seed_decides_everything():
    clip, again, other = make_clip(7, 60), make_clip(7, 60), make_clip(8, 60)
    assert clip.caption == again.caption
    np.testing.assert_array_equal(clip.frames, again.frames)
    np.testing.assert_array_equal(clip.waveform, again.waveform)
    np.testing.assert_array_equal(clip.truth.impacts, again.truth.impacts)
    assert (clip.frames != other.frames).any()

    longer = make_clip(7, 90)
    np.testing.assert_array_equal(longer.frames[:60], clip.frames)
    np.testing.assert_array_equal(longer.waveform[: len(clip.waveform)], clip.waveform)
    assert clip.frames.shape == (60, 48, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.waveform.shape == (40_000, 2) and clip.waveform.dtype == np.float32


def test_balls_stay_in_the_room_and_apart(minutes):
    for truth in minutes:
        x, y = np.moveaxis(truth.trajectories, -1, 0)
        assert (x > truth.radii - 1e-6).all() and (x < 64 - truth.radii + 1e-6).all()
        assert (y > truth.radii - 1e-6).all() and (y < FLOOR * 48 - truth.radii + 1e-6).all()
        for i, j in ((0, 1), (0, 2), (1, 2)):
            apart = np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j])
            assert (apart > truth.radii[i] + truth.radii[j] - 1e-6).all()


def test_between_impacts_balls_fall_freely_and_impacts_are_where_they_are_said_to_be(minutes):
    step = 1 / CROWDED.frame_rate
    checked = dict.fromkeys(SURFACES, 0)
    for truth in minutes:
        for ball, path in enumerate(truth.trajectories.swapaxes(0, 1) / 48):
            hits = truth.impacts[truth.impacts["ball"] == ball]
            frame = np.arange(1, MINUTE - 1)
            near = np.abs(hits["time"][:, None] / step - frame) < 1
            free = ~near.any(0)
            bend = (path[2:] - 2 * path[1:-1] + path[:-2])[free] / step**2
            np.testing.assert_allclose(bend, [[0, CROWDED.gravity]] * len(bend), atol=1e-6)
            for hit in hits:
                last = int(hit["time"] / step)  # frames before the impact
                if last < 2 or not free[last - 2]:
                    continue
                # extrapolate from two frames in free flight to the time in the table
                since = hit["time"] - last * step
                fall = np.array([0, CROWDED.gravity])
                velocity = (path[last] - path[last - 1]) / step + fall * step / 2
                place = path[last] + velocity * since + fall * since**2 / 2
                if ((hits["time"] > (last - 1) * step) & (hits["time"] < hit["time"])).any():
                    continue
                np.testing.assert_allclose(place * 48, (hit["x"], hit["y"]), atol=1e-5)
                radius = truth.scene[ball].radius
                surface = SURFACES[hit["surface"]]
                gaps = {
                    "floor": FLOOR - radius - place[1],
                    "left": place[0] - radius,
                    "right": 64 / 48 - radius - place[0],
                    "ceiling": place[1] - radius,
                }
                if surface in gaps:
                    assert abs(gaps[surface]) < 1e-6
                checked[surface] += 1
    assert all(checked.values()), checked


def test_collisions_keep_momentum_and_energy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (
            physics._Body(*rng.uniform(0, 1, 2), *rng.normal(size=2), rng.uniform(0.05, 0.2), 0, 0)
            for _ in range(2)
        )
        masses = np.array([a.radius, b.radius]) ** 2
        before = np.array([[a.vx, a.vy], [b.vx, b.vy]])
        changes = physics._collide(a, b)
        after = np.array([[a.vx, a.vy], [b.vx, b.vy]])
        np.testing.assert_allclose(masses @ after, masses @ before)
        np.testing.assert_allclose(masses @ (after**2).sum(1), masses @ (before**2).sum(1))
        np.testing.assert_allclose(np.hypot(*(after - before).T) / 2, np.abs(changes))


def test_a_minute_is_as_lively_at_its_end_as_at_its_start(minutes):
    for truth in minutes:
        counts = np.histogram(truth.impacts["time"], bins=6, range=(0, 60))[0]
        assert counts.min() >= 10 * 3 * 1.0, counts  # one per ball and second
        assert 0.6 < counts[3:].sum() / counts[:3].sum() < 1.6


def test_impacts_are_frequent_and_audible():
    config = WorldConfig()
    truths = [simulate(draw_scene(s, config), s, 121, config) for s in range(100)]
    rates = [len(t.tones) / len(t.scene) / (121 / 24) for t in truths]
    assert 1.0 < np.mean(rates) < 2.5 and min(rates) > 0.7
    tones = np.concatenate([truth.tones for truth in truths])
    assert tones["level"].min() >= config.quietest and tones["level"].max() <= config.loudest
    assert np.quantile(tones["level"], 0.9) > 2 * np.quantile(tones["level"], 0.1)
    silent = np.concatenate([t.impacts[~t.impacts["rings"]] for t in truths])
    assert len(silent) < 0.15 * len(tones)  # nearly all by the dead time
    assert (silent["speed"] < config.audible_speed).sum() < 0.02 * len(tones)


def test_edges_follow_a_ball_below_a_pixel():
    config = WorldConfig()
    empty = background(64, 48).astype(float)
    for size in physics.SIZES:
        scene = (Ball("red", size),)
        places = 30 + np.arange(0, 1, 0.1)
        images = np.stack([render(still(scene, x, 20.3), config)[0] for x in places])
        share = (images - empty)[..., 0] / (RGB[0][0] - empty[..., 0])  # of the ball, by pixel
        np.testing.assert_allclose(
            share.sum((1, 2)), np.pi * (scene[0].radius * 48) ** 2, rtol=0.02
        )
        x = (share * (np.arange(64) + 0.5)).sum((1, 2)) / share.sum((1, 2))
        np.testing.assert_allclose(x, places, atol=0.03)
        assert (images[0, 20, 30] == RGB[0]).all()


def test_a_tone_starts_with_its_impact_has_its_pitch_and_its_place():
    clip = make_clip(11, 121)
    rate = 16_000
    first = clip.truth.tones[0]
    start = round(first["time"] * rate)
    assert not clip.waveform[:start].any()
    assert np.abs(clip.waveform[start : start + 32]).max() > 0.2 * first["level"]  # 2 ms
    left, right = np.sqrt((clip.waveform[start : start + 400].astype(float) ** 2).mean(0))
    assert np.arctan2(right, left) / (np.pi / 2) == pytest.approx(first["pan"], abs=1e-3)
    assert first["pan"] == pytest.approx(first["x"] / 64)

    for size in physics.SIZES:
        for pitch in PITCHES:
            samples = tone(pitch, size, rate, start=123)
            spectrum = np.abs(np.fft.rfft(samples, rate))  # 1 Hz apart
            assert abs(spectrum.argmax() - pitch) <= 2
            assert 0.8 < np.abs(samples).max() <= 1
            assert np.abs(samples[-32:]).max() < 0.01  # no click at the end


def test_the_sound_never_clips(minutes):
    peaks = [np.abs(synthesize(truth, CROWDED)).max() for truth in minutes]
    assert 0.2 < max(peaks) < 1


def test_captions_are_varied_and_can_be_read_back():
    words = set()
    for count in (1, 2, 3):
        config = WorldConfig(min_balls=count, max_balls=count)
        for seed in range(300):
            scene = draw_scene(seed, config)
            text = caption(scene, np.random.default_rng(seed))
            words |= set(words_of(text))
            assert set(scene_from_caption(text)) == set(scene), text
    assert words <= set(VOCABULARY)
    assert 60 < len(VOCABULARY) < 120

    scene = (Ball("blue", "large"), Ball("red", "small"))
    phrasings = {caption(scene, np.random.default_rng(seed)) for seed in range(200)}
    assert len(phrasings) > 150


def test_prompts_in_free_words_can_be_read():
    assert scene_from_caption("Red ball!") == (Ball("red", "medium"),)
    prompt = "Two balls: one huge and PINK, one tiny, cyan; the pink one rings high."
    assert scene_from_caption(prompt) == (Ball("pink", "large"), Ball("cyan", "small"))
    for text in ("a ball", "two balls, one is red", "red green blue cyan balls"):
        with pytest.raises(ValueError, match="cannot tell the balls"):
            scene_from_caption(text)


def test_prompts_get_the_sound_that_they_do_not_mention():
    assert with_sound("A red ball and a green one hop.") == (
        "A red ball and a green one hop, you hear low and middle tones"
    )
    assert with_sound("a red and a yellow ball") == "a red and a yellow ball, you hear low tones"
    for seed in range(100):
        text = caption(draw_scene(seed, WorldConfig()), np.random.default_rng(seed))
        assert with_sound(text) == text
    with pytest.raises(ValueError, match="cannot tell the balls"):
        with_sound("a ball")


def test_what_the_world_cannot_show_is_refused():
    refused = {
        "from 1 to 3": {"max_balls": 4},
        "in order": {"min_balls": 3},
        "as wide": {"width": 40},
        "sample_rate must be above": {"sample_rate": 4000},
        "restore must be": {"restore": 0.0},
        "0 < quietest": {"quietest": 0.0},
        "gravity must be positive": {"gravity": 0.0},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            WorldConfig(**changes)
    with pytest.raises(ValueError, match="a ball is one of"):
        Ball("black")
    with pytest.raises(ValueError, match="different colours"):
        make_clip(0, 5, scene=(Ball("red"), Ball("red")))
    with pytest.raises(ValueError, match="num_frames"):
        make_clip(0, 0)


def test_the_truth_survives_json():
    truth = make_clip(3, 48).truth
    copy = Truth.from_json(truth.to_json())
    assert copy.scene == truth.scene
    np.testing.assert_array_equal(copy.impacts, truth.impacts)
    np.testing.assert_array_equal(copy.trajectories, truth.trajectories)
    with pytest.raises(ValueError, match="not the truth"):
        Truth.from_json({"impacts": [{}]})


def test_the_scene_and_the_size_of_the_picture_are_settings():
    scene = (Ball("cyan", "large"), Ball("yellow", "small"))
    config = dataclasses.replace(WorldConfig(), width=128, height=96, sample_rate=24_000)
    clip = make_clip(5, 10, config, scene)
    assert clip.truth.scene == scene and clip.frames.shape == (10, 96, 128, 3)
    small = make_clip(5, 10, scene=scene)
    np.testing.assert_allclose(clip.truth.trajectories, 2 * small.truth.trajectories)
    assert len(COLOURS) == len(RGB) == len(PITCHES)


def test_clips_are_made_and_measured_without_jax():
    code = (
        "import sys, pocket.world.dataset, pocket.measures.scalars\n"
        "assert 'jax' not in sys.modules and 'grain' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
