"""The pocket model's tools, with the weights that are shipped: they do as they say."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from checkpoint_converters import gemma3, ltx2, reading
from launch import evaluate, sample_teacher, stream
from omniforcing_jax.io import checkpoints
from omniforcing_jax.streaming import media
from pocket import demo, experiments, given, pretrain, pretrain_config, report, sample
from pocket import evaluate as pocket_evaluate
from pocket.measure import shrink
from pocket.measures.scalars import MEANINGS
from pocket.world.dataset import make_clip, split_seeds
from pocket.world.physics import WorldConfig

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = ROOT / "pocket" / "weights"
PROMPT = "two balls bounce on the floor: a small red one and a big blue one"


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """[--checkpoint FOLDER --text-encoder FOLDER] of the student that is shipped."""
    folder = tmp_path_factory.mktemp("pocket")
    files = [str(WEIGHTS / f"{name}.safetensors") for name in ("student", "shared")]
    assert not ltx2.main(["--input", *files, "--output", str(folder / "ltx2")])
    source, gemma = str(WEIGHTS / "gemma"), str(folder / "gemma")
    assert not gemma3.main(["--input", source, "--output", gemma])
    return ["--checkpoint", str(folder / "ltx2"), "--text-encoder", gemma]


def test_the_shipped_weights_say_what_they_were_trained_with(pocket, tmp_path):
    """A plain launch.stream takes 48 tokens and the world's size, whatever the defaults are."""
    output = ["--output", str(tmp_path / "clip.mp4")]
    args = stream.parse_arguments([*pocket, "--prompt", PROMPT, "--prompt-cache", "none", *output])
    config, request = stream.prepare(args)
    world = WorldConfig()
    assert (args.height, args.width, args.fps) == (world.height, world.width, world.frame_rate)
    assert (request.encoder.length, request.notes) == (48, [])
    assert request.rollout.cache.window == 1 and config.trained.stage == "stage3"
    args.text_length = 1024
    notes = stream.check_arguments(args, config).notes
    assert notes == ["otherwise than the model was trained: --text-length 1024, not 48"]
    teacher = reading.read_metadata(WEIGHTS / "teacher.safetensors")["config"]["trained"]
    assert teacher["guidance"]["video"]["cfg"] == 1.5
    assert (teacher["stage"], teacher["text_length"], teacher["frames"]) == ("base", 48, 49)


def test_demo(pocket, tmp_path, capsys):
    """A clip of the promised length, a picture, and a line about both; twice over the same."""
    arguments = [*pocket, "--prompt", PROMPT, "--seconds", "2", "--output", str(tmp_path)]
    assert demo.main(arguments) == 0
    frames, rate, waveform, _ = media.read_clip(tmp_path / "clip.mp4")
    assert frames.shape == (48, 48 * demo.ENLARGE, 64 * demo.ENLARGE, 3) and rate == 24
    assert len(waveform) and (tmp_path / "clip.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    line = printed.out.splitlines()[-1]
    assert re.search(
        r"first chunk after [\d.]+ s .*, [\d.]+ FPS \(median block\); \d+ impacts seen", line
    )
    assert "block    1" in printed.err
    assert demo.main([*arguments[:-2], "--output", str(tmp_path / "none"), "--seconds", "0"]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["stream", pytest.param("few-step", marks=pytest.mark.slow),
                                     pytest.param("teacher", marks=pytest.mark.slow)])  # fmt: skip
def test_samples_are_measured(pocket, tmp_path, sampler):
    """Three clips in batches of two, whole and by the second."""
    options = ["--sampler", sampler, "--clips", "3", "--batch-size", "2", "--seconds", "2"]
    options += ["--every", "1", "--steps", "2", "--show", "1"]
    assert sample.main([*pocket, *options, "--output", str(tmp_path)]) == 0
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert len(measures["clips"]) == 3 and len(measures["stretches"]) == 2
    assert measures["all"]["seconds"] == pytest.approx(3 * 49 / 24)
    assert measures["speed"]["fps"] > 0
    if sampler == "stream":  # what it was trained for
        measured = measures["all"]
        assert measured["colour_right"] > 0.4 and 0.5 < measured["gravity"] < 1.3
        assert measured["heard_per_second"] > 1 and measured["prompt_pitch_right"] > 0.9
        assert measured["abs_offset_ms"] < 60
    assert len((tmp_path / "captions.txt").read_text().splitlines()) == 3
    assert sorted(p.name for p in tmp_path.glob("*.*4")) == ["00.mp4"]
    assert (tmp_path / "00.png").is_file()
    assert measures["all"]["frechet_distance"] > 0
    # a row of a table, and a curve
    assert report.main([str(tmp_path), "--output", str(tmp_path / "report")]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| {tmp_path.name} | ")]
    assert len(rows) == 3 and rows[2].startswith(f"| {tmp_path.name} | 1–2 | ")
    assert all(row.startswith(f"| {tmp_path.name} | 3 | ") for row in rows[:2])
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_is_given_is_kept(pocket, capsys):
    """By the student that is shipped; also where it goes on from a clip."""
    assert given.main([*pocket, "--clips", "4", "--seconds", "3"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"sound: {3 * WorldConfig().sample_rate:,} of {3 * WorldConfig().sample_rate:,}" in printed
    )
    assert float(re.search(r"first frame: ([\d.]+) dB", printed)[1]) > 28
    assert float(re.search(r"extend: \d+ balls at the seam, ([\d.]+) px", printed)[1]) < 3


def test_the_world_itself_and_chance_bound_the_measures(tmp_path):
    """True clips are all but perfect; sound of another motion of the same balls is not in step."""
    measures = {}
    for sampler in sample.MODEL_FREE:
        output = tmp_path / sampler
        options = ["--clips", "6", "--seconds", "2", "--show", "0", "--output", str(output)]
        assert sample.main(["--sampler", sampler, *options]) == 0
        measures[sampler] = json.loads((output / "measures.json").read_text())["all"]
    world, chance = measures["world"], measures["chance"]
    assert world["unmatched_rate"] < 0.1 and world["abs_offset_ms"] < 5
    assert chance["unmatched_rate"] > 0.3 and chance["abs_offset_ms"] > 20
    assert chance["colour_right"] == world["colour_right"] > 0.95
    assert chance["prompt_pitch_right"] == pytest.approx(1.0)  # of the same balls


def test_a_sampler_needs_a_model(capsys):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["--sampler", "stream", "--output", "nowhere"])
    assert "--sampler stream needs --checkpoint and --text-encoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.parse_arguments(["--sampler", "world", "--other-sound", "--output", "nowhere"])
    assert "it is --sampler chance" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.parse_arguments(["--sampler", "world", "--cache-dtype", "int8", "--output", "no"])
    assert "--cache-dtype are for --sampler stream" in capsys.readouterr().err


def test_the_sound_of_another_clip_of_the_caption(monkeypatch):
    """The picture is the clip's own, the sound that of the clip with the next seed."""

    def make_sampler(args, pipeline):
        return lambda contexts, numbers: sample.SampledClips(
            np.full((len(numbers), 1), args.seed), np.full((len(numbers), 1), args.seed), 0.1, 0.2
        )

    monkeypatch.setattr(sample, "make_sampler", make_sampler)
    args = ["--sampler", "stream", "--checkpoint", "a", "--text-encoder", "b", "--output", "c"]
    args = sample.parse_arguments([*args, "--other-sound", "--seed", "3"])
    clips = sample.with_other_sound(args, None)(None, [0, 1])
    assert clips.frames.tolist() == [[3], [3]] and clips.waveforms.tolist() == [[4], [4]]


def test_captions_are_chosen_by_their_balls():
    one, two = (sample.choose_seeds(5, balls) for balls in (1, 2))
    both = sample.choose_seeds(5, None)
    assert len(one) == len(two) == 5 and not set(one) & set(two)
    assert set(both) <= {*one, *two} and sorted(both) == both
    with pytest.raises(ValueError, match="--balls must be 1 to 2, not 3"):
        sample.choose_seeds(5, 3)


def test_a_clip_written_enlarged_is_measured_in_the_worlds_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    np.testing.assert_array_equal(shrink(frames.repeat(4, 1).repeat(4, 2)), frames)
    assert shrink(frames) is frames
    odd = frames.repeat(2, 1)[:, :95].repeat(2, 2)
    assert shrink(odd) is odd


def test_the_report_has_every_measure():
    shown = {*report.COLUMNS, *report.OTHERS}
    assert set(MEANINGS) - shown == {"seconds"}
    assert shown - set(MEANINGS) == {"frechet_distance", "fps", "first_frames_after"}


def test_cells_show_mean_and_spread_over_seeds():
    assert report.cell([0.1, 0.3, None], "{:.0%}") == "20% ±10%"
    assert report.cell([3.0], "{:.1f}") == "3.0" and report.cell([None], "{}") == "–"


def test_drift_is_shown_at_the_same_moments():
    """A stretch is that which ends there; a mean over the seeds that know it."""
    names = [name for name in report.CURVES if name in report.COLUMNS]
    stretches = [[dict.fromkeys(names, offset + i) for i in range(6)] for offset in (10, 20)]
    stretches[1][5] = dict.fromkeys(names, None)
    rows = {"a": [{"arguments": {"every": 5.0}, "stretches": parts} for parts in stretches]}
    rows["b"] = [{"arguments": {"every": None}, "stretches": []}]
    assert [*report.with_stretches(rows)] == ["a"]
    line = report.drift_table(report.with_stretches(rows)).splitlines()[2]
    assert line.startswith("| a | 0–5, 25–30 | 15, 15 | 1500%, 1500% |")


def test_runs_are_put_side_by_side(tmp_path, capsys):
    """The last tenth of a run, its largest gradient, and runs of other seeds in one row."""
    for seed in ("0", "1"):
        folder = tmp_path / "seeds" / seed
        folder.mkdir(parents=True)
        lines = [
            {
                "step": step,
                "generator/loss_audio": (1.0 + int(seed)) / step,
                "generator/grad_norm": 7.0 if step == 30 else 1.0,
                "generator/update_skipped": float(step == 40) / 2,
            }
            for step in range(10, 201, 10)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--runs", "--output", str(tmp_path / "table"), str(tmp_path / "seeds")]
    assert report.main([*arguments, str(tmp_path / "seeds" / "1")]) == 0
    heading, _, both, one, *end = (tmp_path / "table.md").read_text().splitlines()
    assert "pocket.report" in end[-1]  # whose it is
    assert heading == (
        "| | runs | audio loss | half way | largest gradient norm | updates skipped |"
    )
    last, middle = np.mean([2 / s for s in (180, 190, 200)]), np.mean([2 / 90, 2 / 100, 2 / 110])
    assert one == f"| 1 | 1 | {last:.3f} | {middle:.3f} | 7.000 | 0.025 |"
    assert both.startswith(f"| seeds | 2 | {0.75 * last:.3f} ±{0.25 * last:.3f} |")
    assert report.main([*arguments, str(tmp_path)]) == 2
    assert "there is no metrics.jsonl in" in capsys.readouterr().err


def test_experiments_cost_the_same_and_are_put_side_by_side(tmp_path, monkeypatch, capsys):
    """Trained one after the other; the table has the best first, and those under way."""
    ran = []

    def run(c):
        pretrain_config.check(c)
        ran.append(c)
        better = 0.5 * len(ran)
        names = {f"heldout/{column}": 3.0 - better for column in experiments._COLUMNS}
        lines = [{"step": c.heldout.every * n, "heldout/x": 0.0} | names for n in range(1, 11)]
        if c.name.endswith("batch_16"):
            lines = lines[:4]
        folder = tmp_path / c.name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return 143 if c.name.endswith("batch_16") else 0

    monkeypatch.setattr(pretrain, "run", run)
    arguments = ["--folder", str(tmp_path), "--budget", "40", "--settings"]
    assert experiments.main([*arguments, "base", "wide", "batch_16", "deep"]) == 143
    base, wide, batch = ran  # `deep` comes when it is started again
    assert base.batch_size * base.num_steps == pytest.approx(40e12 / 4.77e9, rel=0.01)
    assert wide.num_steps < 0.6 * base.num_steps and 4 * batch.num_steps == base.num_steps // 4 * 4
    assert wide.conditions == base.conditions and 0 < base.conditions.t2av < 1
    capsys.readouterr()
    begun = tmp_path / experiments.config_of("deep", tmp_path, 40.0).name
    begun.mkdir(parents=True)
    (begun / "metrics.jsonl").touch()  # stopped before its first record
    assert experiments.main([*arguments, "base", "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["batch_16", "wide", "base"]
    assert "| 40% |" in lines[2] and lines[3].count("| 2.000") == len(experiments._COLUMNS)
    assert (tmp_path / "experiments" / "40.png").is_file()


def dry_run(*arguments: str) -> str:
    """What make says that it would do."""
    command = ["make", "-n", "POCKET=nowhere", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_changed_config_is_read(tmp_path):
    """That of `mismatched`: the checksum of the one that it was is not kept."""
    file = tmp_path / "stage1_student" / "config.json"
    file.parent.mkdir()
    checkpoints.write_json(file, {"config": {"transformer": {"rope_type": "split", "n": 1}}})
    wanted = tmp_path / "mismatched" / "config.json"
    command = ["make", f"POCKET={tmp_path}", f"BIN={pathlib.Path(sys.executable).parent}"]
    subprocess.run([*command, "-o", str(file), str(wanted)], cwd=ROOT, check=True)
    transformer = checkpoints.read_json(wanted)["config"]["transformer"]
    assert transformer["rope_type"] == "interleaved" and transformer["n"] == 1


def commands(printed: str) -> list[list[str]]:
    """[MODULE, ARGUMENT, ...] of the programs that make would run."""
    lines = printed.replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("-m ", 1)[1]) for line in lines if "/python -m " in line]


def read_config(arguments: list[str]):
    """The config that a command's flags make; as absl does, whatever is wrong with them raises."""
    argv = ["program", *(word for word in arguments if word.startswith("--config"))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def test_make_pocket_runs_programs_that_exist_in_order():
    """From text tower to student; what a stage reads was made before."""
    printed = dry_run("pocket")
    modules = [module for module, *_ in commands(printed)]
    assert all(importlib.util.find_spec(module) for module in modules)
    later = ("launch.ode_pairs", "launch.export_run")
    stages = [m for m in modules if m.startswith("launch.stage") or m in later]
    assert stages == ["launch.stage1", "launch.ode_pairs", "launch.stage2", "launch.stage3",
                      "launch.export_run"]  # fmt: skip
    shipped = dry_run("pocket", "TEACHER=pocket/weights")
    assert "launch.stage1" in shipped and "pocket.pretrain" not in shipped
    assert "teacher.safetensors pocket/weights/shared.safetensors" in shipped
    parts = re.findall(r"pretrain_config.py:(\w+)", printed)
    assert set(parts) == {"video_vae", "audio_vae", "vocoder", "causal_decoder", "teacher"}
    assert parts.index("teacher") > parts.index("video_vae") < parts.index("causal_decoder")


@pytest.mark.parametrize(
    "target, stages", [("pocket", 3), ("pocket-report", 7), ("pocket-ablations", 1 + 3 * 24)]
)
def test_make_passes_settings_that_programs_have(target, stages):
    """Each in an order that absl takes; the parts go to the folder, the stages start from it."""
    configured = [c for c in commands(dry_run(target)) if any("--config=" in word for word in c)]
    configs = [read_config(command) for command in configured]
    assert sum("part" in config for config in configs) == (5 if target == "pocket" else 4)
    assert len([config for config in configs if "stage" in config]) == stages
    for config in configs:
        made = config.folder if "part" in config else config.checkpoint
        assert made == ("nowhere" if "part" in config else "nowhere/ltx2")


@pytest.mark.parametrize(
    "target, program, rows",
    [
        ("pocket-report", "pocket.sample", 2 * 26),
        ("pocket-ablations", "launch.stage2", 2 * 2 * 12),
    ],
)
def test_make_evaluates_all_rows(target, program, rows):
    """Every row once per seed, with options that the program has."""
    printed = dry_run(target, "SEEDS=3 4")
    assert not re.search(r"^rm nowhere", printed, re.M)  # as files in between
    runs = [command for command in commands(printed) if command[0] == program]
    assert len(runs) == rows == len({tuple(command) for command in runs})
    for command in runs:
        if program == "pocket.sample":
            args = sample.parse_arguments(command[1:])
            assert str(args.output).endswith(f"/{args.seed}") and args.seed in (3, 4)
        elif "ablations" in command[-1]:
            assert command[-1].rsplit("/", 1)[1] in ("3", "4")
            assert any(word.startswith("--config.student.num_sinks=") for word in command)
            assert read_config(command).seed in (3, 4)


def test_make_compares_teacher_and_student_with_true_clips():
    """One run of launch.evaluate, whose samplers are command lines of the programs."""
    (run,) = (c[1:] for c in commands(dry_run("pocket-evaluate")) if c[0] == "pocket.evaluate")
    args = evaluate.parse_arguments(run)
    assert (list(args.clips), list(args.sampler)) == (["world"], ["teacher", "student"])
    common, clip = shlex.split(args.common), ["--prompt", PROMPT, "--output", "clip.mp4"]
    for name, program in (("teacher", sample_teacher), ("student", stream)):
        program.parse_arguments([*common, *shlex.split(args.sampler[name]), *clip])


def test_the_worlds_measures_in_the_table(tmp_path):
    """Of a true clip they are perfect; those of the scene need a prompt of this world."""
    world, path = WorldConfig(), tmp_path / "clip.mp4"
    clip = make_clip(next(iter(split_seeds("test", 1))), 49, world)
    rates = {"frame_rate": world.frame_rate, "sample_rate": world.sample_rate}
    with media.ClipWriter(path, width=world.width, height=world.height, **rates) as writer:
        writer.write(clip.frames, clip.waveform)
    values = pocket_evaluate.measure_world(path, None, clip.caption)
    assert values.keys() == pocket_evaluate.WORLD.meanings.keys()
    assert values["world pitch_right"] == values["world count_right"] == 1
    assert values["world miss_rate"] == values["world phantom_rate"] == 0
    other = pocket_evaluate.measure_world(path, None, "a street musician in the rain")
    assert other["world colour_right"] is None and other["world pitch_right"] == 1
    signs = {name: sign for name, (sign, _) in pocket_evaluate.WORLD.meanings.items()}
    assert (signs["world miss_rate"], signs["world pitch_right"], signs["world speed"]) == (
        -1,
        1,
        0,
    )
