"""No program replaces what it did not write, whatever it is told, nor touches its inputs."""

import json
import shutil

import numpy as np
import pytest

import benchmarks.stream
from benchmarks import text
from checkpoint_converters import export, gemma3, ltx2, omniforcing, synthetic, synthetic_gemma
from launch import encode_prompts, ode_pairs, plot_masks, plot_run, sample_teacher, stream
from omniforcing_jax.io import checksums
from omniforcing_jax.streaming import contact_sheet, media
from pocket import assemble, demo, make_world, measure, report


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_checkpoint, random_gemma):
    """A folder with one of everything: inputs of the programs, and what others wrote."""
    folder = tmp_path_factory.mktemp("world")
    ltx20 = random_checkpoint("2.0")
    shutil.copytree(ltx20, folder / "ltx2")
    shutil.copy(ltx20.parent / "tiny.safetensors", folder)
    shutil.copytree(random_gemma, folder / "gemma")
    shutil.copytree(random_gemma.parent / "hf", folder / "hf")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": {"stage": "stage1"}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for name in ("holiday.mp4", "holiday.png", "clip.png", "notes.json", "row.md", "diary.md",
                 "diary.txt", "model.safetensors"):  # fmt: skip
        (folder / name).write_text("precious")
    (folder / "captions.txt").write_text("a dog\n")
    return folder


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return dict(zip(files, checksums.hash_files(files), strict=True))


LTX2 = (ltx2, "--input {w}/tiny.safetensors --overwrite --output")
GEMMA = (gemma3, "--input {w}/hf --overwrite --output")
STREAM = (stream, "--checkpoint {w}/ltx2 --random-features --overwrite --output")
TEACHER = (sample_teacher, "--checkpoint {w}/ltx2 --random-features --overwrite --output")
PAIRS = (ode_pairs, "--text {w}/run --checkpoint {w}/ltx2 --output")
ENCODE = (encode_prompts, "--gemma {w}/gemma --checkpoint {w}/ltx2 --prompts {w}/captions.txt"
          " --output")  # fmt: skip
EXPORT = (export, "--input {w}/ltx2 --overwrite --output")
WORLD = (make_world, "--clips 1 --frames 9 --overwrite --output")
STUDENT = (omniforcing, "--input {w}/tiny.safetensors --base {w}/ltx2 --num-heads 4 --overwrite"
           " --output")  # fmt: skip
CASES = {
    "converter: a run": (*LTX2, "run"),
    "converter: another converter's checkpoint": (*LTX2, "gemma"),
    "converter: a folder of Hugging Face": (*LTX2, "hf"),
    "converter: the folder of its input": (*LTX2, "."),
    "converter: a file": (*LTX2, "diary.txt"),
    "gemma: its input": (*GEMMA, "hf"),
    "gemma: in its input": (*GEMMA, "hf/converted"),
    "gemma: a checkpoint": (*GEMMA, "ltx2"),
    "student: its base": (*STUDENT, "ltx2"),
    "export: the original": (*EXPORT, "tiny.safetensors"),
    "export: another file": (*EXPORT, "model.safetensors"),
    "export: in its input": (*EXPORT, "ltx2/out.safetensors"),
    "synthetic": (synthetic, "--overwrite --output", "model.safetensors"),
    "synthetic, not asked": (synthetic, "--output", "tiny.safetensors"),
    "synthetic_gemma": (synthetic_gemma, "--overwrite --output", "gemma"),
    "synthetic_gemma, not asked": (synthetic_gemma, "--output", "hf"),
    "stream: another film": (*STREAM, "holiday.mp4"),
    "stream: in the checkpoint": (*STREAM, "ltx2/clip.mp4"),
    "teacher: another film": (*TEACHER, "holiday.mp4"),
    "pairs: a run": (*PAIRS, "run/pairs"),
    "pairs: the checkpoint": (*PAIRS, "ltx2"),
    "prompts: the encoder": (*ENCODE, "gemma/prompts"),
    "prompts: everything": (*ENCODE, "."),
    "prompts: a run": (*ENCODE, "run"),
    "captions: not asked": (make_world, "--format captions --output", "captions.txt"),
    "captions: others": (make_world, "--format captions --overwrite --output", "diary.txt"),
    "words: others": (make_world, "--format words --overwrite --output", "captions.txt"),
    "dataset: a run": (*WORLD[:1], f"--format array_record {WORLD[1]}", "run"),
    "measure: notes": (measure, "{w}/holiday.mp4 --overwrite --json", "notes.json"),
    "measure: its clip's neighbour": (measure, "{w}/holiday.mp4 --sheet", "holiday.png"),
    "measure: its clip": (measure, "{w}/holiday.mp4 --overwrite --sheet", "holiday.mp4"),
    "masks": (plot_masks, "--output", "holiday.png"),
    "curves": (plot_run, "{w}/run --output", "holiday.png"),
    "curves: the records": (plot_run, "{w}/run --output", "run/metrics.jsonl"),
    "sheet": (contact_sheet, "{w}/holiday.mp4", "holiday.png"),
    "sheet: its clip": (contact_sheet, "--overwrite {w}/holiday.mp4", "holiday.mp4"),
    "report: notes": (report, "--runs {w}/run --output", "diary"),
    "report: a picture": (report, "{w}/run --output", "holiday"),
    "demo: another picture": (demo, "--checkpoint {w}/ltx2 --text-encoder {w}/gemma --prompt x"
                              " --output", "."),
    "benchmark of text: notes": (text, "--output", "notes.json"),
    "benchmark of streams: notes": (benchmarks.stream, "--output", "."),
    "assemble": (assemble, "--folder {w} --overwrite --output", "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_line_and_nothing_touched(world, capsys, case):
    program, words, victim = CASES[case]
    before = contents(world)
    target = str(world if victim == "." else world / victim)
    status = program.main([*words.format(w=world).split(), target])
    said = capsys.readouterr().err
    assert status in (1, 2) and target in said, said
    assert "Traceback" not in said and len(said.strip().splitlines()) <= 2, said
    assert contents(world) == before and not list(world.glob(".*"))


INPUTS = ("--image X", "--audio X", "--video X --extend", "--features X")
OF_STREAMS = ("--reference X voice.wav", "--reference face.png X", "--features a.npz X@3",
              "--features a.npz --at 3 X")  # fmt: skip
OF_CLIPS = ("--reference X", "--keyframe X 8", "--features a.npz --negative-features X")
GIVEN = [(stream, words) for words in (*INPUTS, *OF_STREAMS)]
GIVEN += [(sample_teacher, words) for words in (*INPUTS, *OF_CLIPS)]


def write_clip(clip, program):
    """As if the program had."""
    frames, sound = np.zeros((5, 32, 32, 3), np.uint8), np.zeros((5000, 2), np.float32)
    settings = {"width": 32, "height": 32, "frame_rate": 24, "sample_rate": 24000}
    with media.ClipWriter(clip, **settings, program=program) as writer:
        writer.write(frames, sound)
    return clip


@pytest.mark.parametrize(("program", "words"), GIVEN)
def test_no_clip_replaces_what_it_is_made_of(world, tmp_path, capsys, program, words):
    """Although the same program wrote it."""
    clip = write_clip(tmp_path / "X.mp4", program.PROGRAM)
    before = clip.read_bytes()
    words = f"{words} --overwrite --output X".replace("X", str(clip)).split()
    status = program.main(["--checkpoint", str(world / "ltx2"), *words])
    assert (status, clip.read_bytes()) == (2, before)
    said = f"error: {clip}: is the input {clip}; choose another --output\n"
    assert capsys.readouterr().err == said


def test_what_a_program_wrote_it_replaces(world, tmp_path, capsys):
    for program, words, name in (
        (synthetic, "--size tiny", "a.safetensors"),
        (make_world, "--format captions --clips 3", "captions.txt"),
        (make_world, "--format words", "words.txt"),
        (plot_masks, "--seconds 2", "masks.png"),
    ):
        arguments = [*words.split(), "--output", str(tmp_path / name)]
        assert program.main(arguments) == 0
        asked = [] if program is plot_masks else ["--overwrite"]
        assert program.main([*arguments, *asked]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors", "captions.txt", "masks.png", "words.txt",
    ]  # fmt: skip


def test_a_new_clip_is_complete_before_the_old_one_goes(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "clip.mp4"
    size = "--height 64 --width 64 --decode causal --sigmas 1 0 --seconds 1"
    source = ["--checkpoint", str(world / "ltx2"), "--random-features", "--bidirectional"]
    arguments = [*source, *size.split(), "--output", str(out)]
    before = write_clip(out, stream.PROGRAM).read_bytes()

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "run", fail)
        assert stream.main([*arguments, "--overwrite"]) == 1
    assert out.read_bytes() == before
    assert stream.main([*arguments, "--overwrite"]) == 0
    assert media.read_clip(out)[0].shape == (24, 64, 64, 3)
