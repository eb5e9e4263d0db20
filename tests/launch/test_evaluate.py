"""Folders of clips to one table, with clips that are written and read as users' are."""

import json
import re

import numpy as np
import pytest

from launch import evaluate
from omniforcing_jax import ClipWriter
from tests.evaluation.test_measures import FRAME_RATE, FRAMES, SAMPLE_RATE, WAVEFORM, brighter

SECONDS = 3
LATE = SAMPLE_RATE // 5


def write(path, frames, waveform):
    count, samples = FRAME_RATE * SECONDS, SAMPLE_RATE * SECONDS
    rates = {"frame_rate": FRAME_RATE, "sample_rate": SAMPLE_RATE}
    with ClipWriter(path, width=64, height=48, **rates) as writer:
        writer.write(frames[:count], waveform[:samples])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher's three clips, and a student's with seams and late sound, of which one is more."""
    folder = tmp_path_factory.mktemp("evaluate")
    jumps = (np.arange(len(FRAMES)) - 1) // FRAME_RATE % 2  # a merged layout's borders
    late = np.concatenate([np.zeros((LATE, 2), np.float32), WAVEFORM])
    for number in range(3):
        moved = np.roll(FRAMES, number, axis=1)
        for name, frames, waveform in (
            ("teacher", moved, WAVEFORM),
            ("student", np.roll(brighter(4.0 * jumps), number, axis=1), late),
        ):
            (folder / name).mkdir(exist_ok=True)
            write(folder / name / f"{number:04d}.mp4", frames, waveform)
    write(folder / "student" / "0003.mp4", FRAMES, WAVEFORM)
    return folder


def run(folders, output, *options):
    arguments = [f"{name}={folders / name}" for name in ("teacher", "student")]
    return evaluate.main([*arguments, "--output", str(output), *options])


def test_table_and_page(folders, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo <b>\nthree\n")
    options = "--layout", "student=prefix", "--prompts", str(prompts)
    output = tmp_path / "out"
    assert not run(folders, output, *options)
    content = json.loads((output / "table.json").read_text())
    assert content["clips"] == {"teacher": 3, "student": 4}
    rows = {row["measure"]: row for row in content["rows"]}
    assert rows["motion"]["reached"]["teacher"]["count"] == 3
    # sound is as long as the picture, to the sample, and its delay is that of what was written
    assert rows["clock_error"]["reached"]["teacher"]["mean"] == 0
    delay = rows["sync_offset"]["differences"]["student"]
    assert delay["count"] == 3
    assert delay["mean"] == pytest.approx(0.2, abs=0.02)
    assert rows["seams"]["reached"]["student"]["mean"] > 1.5
    assert rows["seams"]["reached"]["teacher"]["count"] == 0  # made as a whole
    low, high = (rows["motion"]["reached"]["student"][end] for end in ("low", "high"))
    assert low < rows["motion"]["reached"]["student"]["mean"] < high
    assert "OmniForcing (paper, Table 1)" in (output / "table.md").read_text()
    page = (output / "page.html").read_text()
    assert len(re.findall("<video", page)) == 6
    assert "two &lt;b&gt;" in page
    assert "http" not in page

    # killed and resumed, it measures only what is missing, and finds the same
    before = (output / "table.json").read_bytes()
    (output / "measures" / "student" / "0001.json").write_text('{"about"')
    measured, measure = [], evaluate.measure_clip
    monkeypatch.setattr(
        evaluate,
        "measure_clip",
        lambda path, layout: measured.append(path) or measure(path, layout),
    )
    assert not run(folders, output, *options)
    assert [path.name for path in measured] == ["0001.mp4"]
    assert (output / "table.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["teacher"], "is not NAME=VALUE"),
        (["a={0}/teacher", "a={0}/student"], "two folders have one name"),
        (["a={0}/nothing"], "there is no such folder"),
        (["a={0}"], "there is no clip in it"),
        (["a={0}/teacher", "--layout", "b=prefix"], "the folders are a"),
        (["a={0}/teacher", "--layout", "a=whole"], "layouts are prefix, merged"),
        (["a={0}/teacher", "--prompts", "{0}/prompts.txt"], "2 lines for 3 clips"),
        (["a={0}/broken"], "is damaged|no clip|not a clip|cannot"),
    ],
)
def test_bad_input(folders, tmp_path, capsys, arguments, message):
    (folders / "prompts.txt").write_text("one\ntwo\n")
    (folders / "broken").mkdir(exist_ok=True)
    (folders / "broken" / "a.mp4").write_bytes(b"no film" * 99)
    filled = [argument.format(folders) for argument in arguments]
    try:
        status = evaluate.main([*filled, "--output", str(tmp_path / "out")])
    except SystemExit as error:  # of the parser
        status = error.code
    assert status in (1, 2)
    assert re.search(message, capsys.readouterr().err)
