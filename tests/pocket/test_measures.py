"""The measures: right on clips whose truth is known, and each fault is caught by its measure."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.streaming import media
from pocket import make_world
from pocket import measure as measure_program
from pocket.measures.frechet import clip_features, frechet_distance
from pocket.measures.observation import observe
from pocket.measures.onsets import Tone, find_tones
from pocket.measures.scalars import (
    MEANINGS,
    block_borders,
    compare_with_truth,
    measure,
    pool,
    windows,
)
from pocket.measures.synchrony import match
from pocket.measures.tracking import AIR, Impact, track_balls
from pocket.world.dataset import SPLITS, make_clip
from pocket.world.physics import COLOURS, PITCHES, SURFACES, WorldConfig
from pocket.world.render import tone

RATE = 16_000
NUM_CLIPS = 10
LAYOUT = BlockLayout.merged()


@pytest.fixture(scope="module")
def clips():
    """Clips that no threshold was chosen on."""
    return [make_clip(seed, 121) for seed in SPLITS["test"][:NUM_CLIPS]]


@pytest.fixture(scope="module")
def observations(clips):
    return [observe(clip.frames, 24, clip.waveform, RATE) for clip in clips]


def score(clips, change):
    """Scalars of all clips after `change(frames, waveform) -> frames, waveform`."""
    parts = []
    for clip in clips:
        observation = observe(*_with_rates(*change(clip.frames, clip.waveform)))
        parts.append(measure(observation, scene=clip.truth.scene, layout=LAYOUT))
    return pool(parts).scalars()


def _with_rates(frames, waveform):
    return frames, 24, waveform, RATE


def write(path, clip, frames=None):
    with media.ClipWriter(path, width=64, height=48, frame_rate=24, sample_rate=RATE) as writer:
        writer.write(clip.frames if frames is None else frames, clip.waveform)
    return path


def late(waveform, seconds):
    return np.pad(waveform, ((round(seconds * RATE), 0), (0, 0)))[: len(waveform)]


def test_truth_scores_as_truth(clips, observations):
    parts = [
        measure(observation, scene=clip.truth.scene, layout=LAYOUT)
        for clip, observation in zip(clips, observations, strict=True)
    ]
    result = pool(parts).scalars()
    assert set(result) == set(MEANINGS)
    assert abs(result["offset_ms"]) < 1 and result["abs_offset_ms"] < 2
    assert result["unmatched_rate"] < 0.02
    for name in ("pitch_right", "prompt_pitch_right", "colour_right", "size_right", "count_right"):
        assert result[name] > 0.99, name
    assert result["pan_error"] < 0.005
    assert result["gravity"] == pytest.approx(1, abs=0.01)
    assert result["parabola_error"] < 0.002
    assert result["air_kicks_per_second"] < 0.05
    assert result["vanishings_per_second"] == result["colour_changes_per_second"] == 0
    assert result["motion"] > 1 and result["flicker"] == 0
    assert 0.8 < result["seam_ratio"] < 1.25 and result["seam_flicker_ratio"] == 1
    assert 2 < result["seen_per_second"] < 6


def test_what_is_seen_and_heard_is_what_happened(clips, observations):
    surfaces = []
    for clip, observation in zip(clips, observations, strict=True):
        errors = compare_with_truth(observation, clip.truth)
        assert errors["position_error_px"] < 0.05 and errors["position_seen"] == 1
        assert abs(errors["seen_offset_ms"]) < 1 and abs(errors["heard_offset_ms"]) < 1
        assert errors["seen_unmatched_rate"] < 0.1 and errors["heard_unmatched_rate"] < 0.05
        for impact in observation.impacts:
            true = clip.truth.impacts[np.abs(clip.truth.impacts["time"] - impact.time).argmin()]
            if impact.speed > 0.3:
                surfaces.append(impact.surface == SURFACES[true["surface"]])
    assert np.mean(surfaces) > 0.95


def test_codecs_change_little(clips, tmp_path):
    parts = []
    for index, clip in enumerate(clips):
        observation = observe(*media.read_clip(write(tmp_path / f"{index}.mp4", clip)))
        parts.append(measure(observation, scene=clip.truth.scene, layout=LAYOUT))
    result = pool(parts).scalars()
    assert result["abs_offset_ms"] < 3
    assert result["miss_rate"] + result["phantom_rate"] < 0.03
    for name in ("pitch_right", "prompt_pitch_right", "colour_right", "size_right", "count_right"):
        assert result[name] > 0.98, name
    assert result["parabola_error"] < 0.003 and result["flicker"] < 0.5
    assert 0.7 < result["seam_flicker_ratio"] < 1.4


def test_late_and_early_sound_are_measured(clips):
    for seconds in (0.1, -0.06):
        result = score(
            clips,
            lambda frames, x, s=seconds: (frames, late(x, s) if s > 0 else late(x[::-1], -s)[::-1]),
        )
        assert result["offset_ms"] == pytest.approx(seconds * 1e3, abs=5)
        assert result["unmatched_rate"] < 0.08


def test_the_sound_of_another_clip_does_not_fit(clips):
    others = iter([*clips[1:], clips[0]])
    result = score(clips, lambda frames, _: (frames, next(others).waveform))
    assert result["unmatched_rate"] > 0.5 and result["abs_offset_ms"] > 25
    assert result["pitch_right"] < 0.5 and result["prompt_pitch_right"] < 0.5
    assert result["pan_error"] > 0.1


def test_shuffled_sound_does_not_fit(clips):
    def shuffle(frames, waveform):
        pieces = np.split(waveform[: 10 * RATE // 2], 10)
        order = np.random.default_rng(1).permutation(10)
        return frames, np.concatenate([pieces[i] for i in order])

    result = score(clips, shuffle)
    assert result["unmatched_rate"] > 0.4 and result["abs_offset_ms"] > 20


def test_a_still_picture_shows(clips):
    result = score(clips, lambda frames, x: (np.repeat(frames[:1], len(frames), 0), x))
    assert result["motion"] == result["speed"] == result["seen_per_second"] == 0
    assert result["phantom_rate"] == result["unmatched_rate"] == 1
    assert abs(result["gravity"]) < 0.05
    assert result["colour_right"] == 1  # which alone says little


def test_silence_shows(clips):
    result = score(clips, lambda frames, x: (frames, np.zeros_like(x)))
    assert result["miss_rate"] == result["unmatched_rate"] == 1
    assert result["heard_per_second"] == 0 and result["sound_level_db"] == -120
    assert result["offset_ms"] is None and result["pitch_right"] is None
    nothing = score(clips[:1], lambda frames, x: (np.zeros_like(frames), x[:0]))
    assert nothing["unmatched_rate"] == 1 and nothing["colour_right"] == 0


def test_wrong_colours_show(clips):
    result = score(clips, lambda frames, x: (frames[..., [1, 2, 0]].copy(), x))
    assert result["colour_right"] < 0.3 and result["pitch_right"] < 0.3
    assert result["abs_offset_ms"] < 2  # still in step


def test_noise_shows(clips):
    rng = np.random.default_rng(0)
    result = score(
        clips[:3], lambda frames, x: (rng.integers(0, 256, frames.shape, dtype=np.uint8), x)
    )
    assert result["unmatched_rate"] > 0.4 and result["colour_right"] < 0.5
    assert result["flicker"] > 50 and result["parabola_error"] > 0.05
    hiss = score(
        clips[:3], lambda frames, x: (frames, 0.1 * rng.standard_normal(x.shape, np.float32))
    )
    assert hiss["phantom_rate"] > 0.7


def test_measures_bear_blur_grain_and_pale_colours(clips):
    rng = np.random.default_rng(0)

    def spoil(frames, waveform):
        grey = frames.mean(-1, keepdims=True)
        pale = ndimage.gaussian_filter(grey + 0.8 * (frames - grey), (0, 0.8, 0.8, 0))
        noisy = np.clip(pale + rng.normal(0, 5, frames.shape), 0, 255)
        return noisy.astype(np.uint8), waveform + rng.normal(0, 0.003, waveform.shape)

    result = score(clips, spoil)
    assert result["abs_offset_ms"] < 3 and result["unmatched_rate"] < 0.03
    assert result["colour_right"] > 0.99 and result["size_right"] > 0.9
    assert result["pitch_right"] > 0.98


def test_seams_flicker_and_faults_of_motion_show(clips, observations):
    borders = block_borders(LAYOUT, 121)
    assert borders == [25, 49, 73, 97]
    assert block_borders(BlockLayout.prefix(), 49) == [1, 25]
    scene = clips[0].truth.scene
    prefix = measure(observations[0], scene=scene, layout=BlockLayout.prefix()).scalars()
    assert 0.5 < prefix["seam_ratio"] < 2

    def flash(frames, waveform):
        brighter = frames.astype(int)
        brighter[borders] += 12
        return np.clip(brighter, 0, 255).astype(np.uint8), waveform

    result = score(clips, flash)
    assert result["seam_ratio"] > 3 and result["seam_flicker_ratio"] > 10
    assert result["flicker"] > 0.5 and result["unmatched_rate"] < 0.05

    def teleport(frames, waveform):  # the second half runs backwards, so balls jump at 2.5 s
        return np.concatenate([frames[:60], frames[:59:-1]]), waveform

    result = score(clips, teleport)
    assert result["unmatched_rate"] > 0.1

    slow = score(clips, lambda frames, x: (frames[np.arange(121) // 2], x))
    assert slow["gravity"] < 0.5 and slow["speed"] < 0.8
    floating = score(clips, lambda frames, x: (frames[:, ::-1].copy(), x))
    assert floating["gravity"] == pytest.approx(-1, abs=0.05)


def test_balls_that_vanish_or_change_colour_show(clips):
    def recolour(frames, waveform):
        changed = frames.copy()
        changed[60:] = changed[60:, ..., [1, 0, 2]]
        return changed, waveform

    red = [clip for clip in clips if any(b.colour in ("red", "green") for b in clip.truth.scene)]
    result = score(red, recolour)
    assert result["colour_changes_per_second"] > 0.15
    gone = score(clips, lambda f, x: (np.where(np.arange(121)[:, None, None, None] < 60, f, 18)
                                      .astype(np.uint8), x))  # fmt: skip
    assert gone["colour_right"] == pytest.approx(0.5, abs=0.02)
    assert gone["vanishings_per_second"] > 0.15 and gone["colour_changes_per_second"] == 0
    assert gone["count_right"] == pytest.approx(0.5, abs=0.02)


def test_turns_in_mid_air_uneven_pace_and_wrong_sizes_show(clips):
    few = clips[:4]
    there_and_back = 30 + np.abs((np.arange(121) + 30) % 60 - 30)  # time turns round every 1.25 s
    kicked = score(few, lambda frames, x: (frames[there_and_back], x))
    assert kicked["air_kicks_per_second"] > 0.3
    assert kicked["gravity"] == pytest.approx(1, abs=0.05)  # parabolas look alike both ways

    pace = np.concatenate([np.arange(0, 80, 2), 80 + np.arange(81) // 2])[:121]
    uneven = score(few, lambda frames, x: (frames[pace], x))
    true = score(few, lambda frames, x: (frames, x))
    assert uneven["energy_spread"] > 3 * true["energy_spread"]

    middle = np.s_[:, 12:36, 16:48]
    near = score(few, lambda frames, x: (frames[middle].repeat(2, 1).repeat(2, 2), x))
    assert near["size_right"] < 0.5

    def far(frames, waveform):
        picture = np.full_like(frames, 18)
        picture[middle] = frames[:, ::2, ::2]
        return picture, waveform

    assert score(few, far)["size_right"] < 0.1


def test_a_long_clip_is_measured_by_stretches():
    clip = make_clip(SPLITS["test"][77], 20 * 24)
    frames = clip.frames.copy()
    frames[10 * 24 :] = frames[10 * 24]  # it freezes
    observation = observe(frames, 24, clip.waveform, RATE)
    parts = windows(observation, 5, scene=clip.truth.scene)
    rates = [part.scalars()["unmatched_rate"] for part in parts]
    assert len(parts) == 4 and max(rates[:2]) < 0.05 and rates[2] > 0.8 and rates[3] == 1
    whole = measure(observation, scene=clip.truth.scene)
    together = pool(parts)
    assert together.phantoms == whole.phantoms and len(together.offsets) == len(whole.offsets)
    assert together.scalars()["motion"] == pytest.approx(whole.scalars()["motion"])
    with pytest.raises(ValueError, match="no stretch"):
        measure(observation, start=30)


def impact(time, colour="red", surface="floor"):
    return Impact(time, colour, 0.5, 0.8, 1.0, surface)


def test_matching_is_one_to_one():
    def heard(time, colour="red"):
        return Tone(time, colour, 0.5, 0.3)

    # the nearer tone belongs to the other ball
    found = match([impact(1.0), impact(1.03, "blue")], [heard(1.02), heard(1.04, "blue")], 5)
    assert [(i.colour, t.colour) for i, t in found.pairs] == [("red", "red"), ("blue", "blue")]
    # a tone of the wrong pitch is a pair all the same
    found = match([impact(1.0)], [heard(1.05, "pink")], 5)
    assert len(found.pairs) == 1 and not found.misses and not found.phantoms
    # too far
    found = match([impact(1.0)], [heard(1.2)], 5)
    assert not found.pairs and len(found.misses) == len(found.phantoms) == 1
    # masked by its neighbour; at the ends; in mid-air: nothing is missed
    seen = [impact(1.0), impact(1.08), impact(0.05), impact(4.95), impact(3.0, surface=AIR)]
    found = match(seen, [heard(1.01)], 5)
    assert len(found.pairs) == 1 and not found.misses
    assert match([], [], 5).pairs == ()


def test_tones_are_told_apart_at_any_sample_rate():
    for rate in (16_000, 48_000):
        waveform = np.zeros((2 * rate, 2))
        for index, pitch in enumerate(PITCHES):
            start = round((0.2 + 0.25 * index) * rate)
            samples = tone(pitch, "large", rate, start)[:, None] * 0.2
            gains = np.array([np.cos(index * 0.2), np.sin(index * 0.2)])
            waveform[start : start + len(samples)] += (samples * gains)[: len(waveform) - start]
        tones = find_tones(waveform.astype(np.float32), rate)
        assert [t.colour for t in tones] == list(COLOURS)
        np.testing.assert_allclose([t.time for t in tones], 0.2 + 0.25 * np.arange(6), atol=0.002)
        pans = np.arange(6) * 0.2 / (np.pi / 2)
        np.testing.assert_allclose([t.pan for t in tones], pans, atol=0.02)
        np.testing.assert_allclose([t.level for t in tones], 0.2, rtol=0.25)


def test_distance_between_sets_of_clips(clips, observations):
    def features(change):
        return [
            clip_features(observe(*_with_rates(*change(c.frames, c.waveform))), c.waveform, RATE)
            for c in clips
        ]

    real = [clip_features(o, c.waveform, RATE) for c, o in zip(clips, observations, strict=True)]
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-3)
    assert all(np.isfinite(list(f.values())).all() for f in real)
    others = [make_clip(seed, 121) for seed in SPLITS["test"][100 : 100 + NUM_CLIPS]]
    fresh = [clip_features(observe(*_with_rates(c.frames, c.waveform)), c.waveform, RATE)
             for c in others]  # fmt: skip
    near = frechet_distance(real, fresh)
    still = frechet_distance(real, features(lambda f, x: (np.repeat(f[:1], len(f), 0), x)))
    shifted = frechet_distance(real, features(lambda f, x: (f, late(x, 0.1))))
    assert near < 0.5 * still and shifted > 5
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(real, real[:1])


def test_a_picture_of_another_size_is_the_same_world(clips):
    config = dataclasses.replace(WorldConfig(), width=128, height=96)
    clip = make_clip(SPLITS["test"][3], 61, config)
    result = measure(observe(clip.frames, 24, clip.waveform, RATE), scene=clip.truth.scene)
    assert result.scalars()["unmatched_rate"] < 0.1 and result.scalars()["size_right"] == 1
    small = track_balls(make_clip(SPLITS["test"][3], 61).frames)
    for a, b in zip(track_balls(clip.frames), small, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, atol=0.003)


def test_what_cannot_be_measured_is_refused(clips):
    clip = clips[0]
    with pytest.raises(ValueError, match="frames must be uint8"):
        observe(clip.frames / 255, 24, clip.waveform, RATE)
    with pytest.raises(ValueError, match="waveform must be"):
        observe(clip.frames, 24, clip.waveform[:, :1], RATE)
    with pytest.raises(ValueError, match="sample rate must be above"):
        observe(clip.frames, 24, clip.waveform, 4000)
    with pytest.raises(ValueError, match="no measures"):
        pool([])


def test_the_program_measures_files(tmp_path, capsys):
    world = tmp_path / "world"
    assert not make_world.main(["--output", str(world), "--clips", "2", "--frames", "73"])
    files = sorted(map(str, world.glob("*.mp4")))
    output, sheet = tmp_path / "out" / "measures.json", tmp_path / "sheet.png"
    options = ["--truth", "--layout", "prefix", "--json", str(output), "--sheet", str(sheet)]
    assert not measure_program.main([*files, *options, "--reference", str(world)])
    content = json.loads(output.read_text())
    assert content["all"]["unmatched_rate"] < 0.1
    assert content["frechet_distance"] == pytest.approx(0, abs=1e-3)
    first = content["clips"][files[0]]
    assert abs(first["truth"]["seen_offset_ms"]) < 5 and first["pairs"][0]["heard"]["pan"] >= 0
    assert sheet.stat().st_size > 10_000
    assert "offset_ms" in capsys.readouterr().out

    caption = json.loads((world / "0000000000.json").read_text())["caption"]
    assert not measure_program.main([files[0], "--prompt", caption, "--seconds", "1.5"])
    assert "0-2 s" in capsys.readouterr().out
    for wrong, message in (
        (["--prompt", "a ball"], "cannot tell the balls"),
        (["--prompt", caption, "--truth"], "not both"),
        (["--truth", files[0]], "codec"),
        (["--reference", str(world)], "2 or more"),
    ):
        assert measure_program.main([files[0], *wrong]) == 2
        assert message in capsys.readouterr().err
