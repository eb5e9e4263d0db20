"""What a program may replace: what it wrote itself, and nothing that it reads."""

import json
import os
import pathlib

import numpy as np
import pytest

from checkpoint_converters.safetensors_io import write_safetensors
from omniforcing_jax.io import outputs
from omniforcing_jax.streaming.contact_sheet import write_clip

PROGRAM = "launch.example"


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def save_markdown(path):
    outputs.save_markdown("| a |\n|---|\n", path, PROGRAM)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{kind: what a program of that name wrote}."""
    folder = tmp_path_factory.mktemp("written")
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    write_clip(
        folder / "a.mp4", frames, np.zeros((5000, 2), np.float32), 24, 24000, program=PROGRAM
    )
    write_safetensors(folder / "a.safetensors", {}, {outputs.MARK: PROGRAM}, None)
    return {
        "clip": folder / "a.mp4",
        "picture": folder / "a.png",
        "weights": folder / "a.safetensors",
        "json": write_json(folder / "a.json", {outputs.MARK: PROGRAM, "x": 1}),
        "checkpoint": write_json(folder / "c" / "config.json", {outputs.MARK: PROGRAM}).parent,
        "table": save_markdown(folder / "a.md"),
        "dataset": write_json(folder / "d" / "manifest.json", {outputs.MARK: PROGRAM}).parent,
    }


def test_a_program_knows_what_it_wrote(written):
    for path in written.values():
        assert outputs.written_by(path) == PROGRAM
        assert outputs.problems(path, PROGRAM, overwrite=True) == []
        (refused,) = outputs.problems(path, PROGRAM)
        assert refused.startswith(str(path)) and refused.endswith("or pass --overwrite")
        (refused,) = outputs.problems(path, "launch.other", overwrite=True)
        assert "was written by launch.example, and so is not replaced" in refused


def test_make_finds_the_name_in_a_clip(written):
    """`make demo` looks for it with grep."""
    assert PROGRAM.encode() in written["clip"].read_bytes()


@pytest.mark.parametrize(("family", "authors"), [
    ("gemma3", ["gemma3"]), ("ltx2", ["ltx2"]), ("omniforcing", ["ltx2", "omniforcing"]),
])  # fmt: skip
def test_a_checkpoint_from_before_marks_is_its_converters(tmp_path, family, authors):
    """As f79e63f wrote them; what a run was exported to has a source of no bytes."""
    source = [{"name": "a.safetensors", "bytes": 12}]
    content = {"format": 1, "family": family, "config": {}, "source": source, "fingerprints": {}}
    file = write_json(tmp_path / "old" / "config.json", content)

    def accepted(content):
        write_json(file, content)
        programs = ("gemma3", "ltx2", "omniforcing", "upsampler")
        names = [f"checkpoint_converters.{name}" for name in programs] + ["launch.export_run"]
        return [n for n in names if not outputs.problems(file.parent, n, overwrite=True)]

    assert accepted(content) == [f"checkpoint_converters.{author}" for author in authors]
    assert outputs.problems(file.parent, f"checkpoint_converters.{authors[0]}")  # not asked to
    exported = content | {"source": [*source, {"name": "stage3, step 4", "bytes": 0}]}
    assert accepted(exported) == ["launch.export_run"]
    assert accepted(content | {outputs.MARK: "launch.other"}) == []
    assert accepted(content | {"format": 2}) == accepted(content | {"source": 3}) == []


def test_everything_else_is_not_its_own(tmp_path):
    foreign = [
        write_json(tmp_path / "model" / "config.json", {"model_type": "gemma3"}).parent,
        write_json(tmp_path / "list.json", ["a"]),
        write_json(tmp_path / "object.json", {}),
        write_json(tmp_path / "marked.txt", {outputs.MARK: PROGRAM}),
    ]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("today")
    foreign.append(tmp_path / "notes")
    for name in ("a.mp4", "a.png", "a.md", "a.safetensors", "b.json", "b"):
        for content in (b"", b"\x89PNG\r\n\x1a\n", b"\xff" * 100):
            path = tmp_path / f"{len(content)}{name}"
            path.write_bytes(content)
            foreign.append(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    foreign.append(tmp_path / "dangling")
    for path in foreign:
        (refused,) = outputs.problems(path, PROGRAM, overwrite=True)
        assert f"does not say that {PROGRAM} wrote it, and so is not replaced" in refused


def test_what_is_not_there_is_free(tmp_path):
    for path in (tmp_path / "new.mp4", tmp_path / "new", tmp_path):
        assert outputs.problems(path, PROGRAM) == []


@pytest.mark.parametrize("output, relation", [
    ("in", "is"), ("link", "is"), (".", "holds"), ("in/new", "lies in"), ("link/a/b", "lies in"),
    ("in/../in", "is"),
])  # fmt: skip
def test_inputs_are_not_touched(tmp_path, output, relation):
    given = write_json(tmp_path / "in" / "config.json", {outputs.MARK: PROGRAM}).parent
    (tmp_path / "link").symlink_to(given, target_is_directory=True)
    (refused,) = outputs.problems(
        tmp_path / output, PROGRAM, overwrite=True, inputs=[None, "gs://bucket/in", given]
    )
    assert f"{relation} the input {given}" in refused
    os.symlink(given, tmp_path / "other")
    assert outputs.overlap(tmp_path / output, [tmp_path / "other"])


def test_neighbours_of_inputs_are_free(tmp_path):
    (tmp_path / "in").mkdir()
    for output in ("in2", "out/in", "in.mp4"):
        assert outputs.overlap(tmp_path / output, [tmp_path / "in"]) is None
    assert outputs.overlap("gs://bucket/in/new", ["gs://bucket/in"]) is None


def test_runs(tmp_path):
    def check(folder, **options):
        outputs.check_run(folder, ("stage", "stage2"), ("checkpoints", "metrics.jsonl"), **options)

    run = write_json(tmp_path / "run" / "config.json", {"config": {"stage": "stage2"}}).parent
    (run / "my notes").touch()
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "killed" / ".shared.1").touch()
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cut" / "config.json").write_text('{"config": {"sta')
    for folder in (run, tmp_path / "killed", tmp_path / "cut", tmp_path / "new"):
        check(folder)
    other = write_json(tmp_path / "other" / "config.json", {"config": {"stage": "stage1"}}).parent
    ltx2 = write_json(tmp_path / "ltx2" / "config.json", {"config": {"transformer": {}}}).parent
    for folder, text in (
        (other, "holds a run of stage1"),
        (ltx2, "holds no run, but another config.json"),
        (write_json(tmp_path / "list" / "config.json", []).parent, "no run, but another"),
        (write_json(tmp_path / "data" / "manifest.json", {}).parent, "other files .manifest.json"),
        (pathlib.Path(__file__), "is a file"),
    ):
        with pytest.raises(ValueError, match=f"^{folder}: .*{text}.*; choose another --workdir$"):
            check(folder)
    with pytest.raises(ValueError, match="holds the input"):
        check(tmp_path, inputs=[ltx2])
