"""Folders of clips to one table, with clips that are written and read as users' are."""

import csv
import json
import re
import subprocess
import sys
import threading
import types
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console

from launch import clip_measures, evaluate, sample_teacher, sampled_clips, stream
from launch.shard_job import ShardProgress
from omniforcing_jax import Chunk, ClipWriter, read_clip
from omniforcing_jax.evaluation import distances
from omniforcing_jax.streaming.chunks import Timings
from omniforcing_jax.text import prompt_files
from omniforcing_jax.types import AVLatents
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
    (output / "measures" / "pixels" / "student" / "0001.json").write_text('{"about"')
    measured, measure = [], clip_measures.measure_clip
    monkeypatch.setattr(
        clip_measures,
        "measure_clip",
        lambda path, layout: measured.append(path) or measure(path, layout),
    )
    assert not run(folders, output, *options)
    assert [path.name for path in measured] == ["0001.mp4"]
    assert (output / "table.json").read_bytes() == before


PROMPTS = ("--prompts", "{0}/prompts.txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["teacher"], "is not NAME=VALUE"),
        (["a={0}/teacher", "a={0}/student"], "two of them have one name"),
        (["a={0}/nothing"], "there is no such folder"),
        (["a={0}"], "there is no clip in it"),
        (["a={0}/teacher", "--layout", "b=prefix"], "the folders are a"),
        (["a={0}/teacher", "--layout", "a=whole"], "layouts are prefix, merged"),
        (["a={0}/teacher", "--prompts", "{0}/prompts.txt"], "2 prompts for 3 clips"),
        (["a={0}/broken"], "is damaged|no clip|not a clip|cannot"),
        ([], "give clips as NAME=FOLDER, or samplers"),
        (["--sampler", "a=--seed 1"], "needs --prompts"),
        ([*PROMPTS, "--sampler", "a=--dtype float32"], "a: the sampler has no --checkpoint"),
        ([*PROMPTS, "--sampler", "a='"], 'a: "\'" is no command line'),
        ([*PROMPTS, "--sampler", "a=--checkpoint {0}"], "config.json"),
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


CAPTIONS = ["a bell", "a drum", "a bell"]  # a repeated one is a clip of its own
SIZE = "--random-features --height 64 --width 64 --seconds 0.5 --no-verify"


class Sampling:
    """In place of the networks: clips that tell by what they were made."""

    def __init__(self, monkeypatch):
        self.made, self.interrupt_at = [], None
        monkeypatch.setattr(sampled_clips, "_load", self.load)

    def load(self, sampler, prompts):
        return lambda about: self.make(sampler, about)

    def make(self, sampler, about):
        self.made.append((sampler.name, about["seed"]))
        if len(self.made) == self.interrupt_at:
            raise KeyboardInterrupt
        random = np.random.default_rng([len(about["prompt"]), about["seed"], len(sampler.name)])
        for block in range(3):
            frames = random.integers(0, 255, (1, 4, 64, 64, 3), np.uint8)
            sound = random.uniform(-0.5, 0.5, (1, 4000, 2)).astype(np.float32)
            chunk = Chunk(block, 4 * block, 4000 * block, frames, sound, Timings(0, 0, 0, 0, 0))
            spread = np.array([1.0 + block / 100, 1.005 + block / 100])
            yield chunk, sampled_clips.Spread(spread, np.ones(5))


@pytest.fixture
def sampling(monkeypatch):
    return Sampling(monkeypatch)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    """As JavisBench's."""
    file = tmp_path_factory.mktemp("prompts") / "bench.csv"
    rows = [["id", "text"], *([str(n), text] for n, text in enumerate(CAPTIONS))]
    with file.open("w", newline="") as stream_of:
        csv.writer(stream_of).writerows(rows)
    return file


def sampled(random_checkpoint, prompt_file, output, *more):
    checkpoint = random_checkpoint("2.0")
    options = ["--prompts", str(prompt_file), "--seed", "5", f"--common={SIZE}"]
    for name, own in (("teacher", "--stg-block 1"), ("student", "--bidirectional")):
        options += ["--sampler", f"{name}=--checkpoint {checkpoint} {own}"]
    return [*options, "--output", str(output), *more]


def test_samplers_are_sampled_and_a_killed_run_goes_on(
    sampling, random_checkpoint, prompt_file, tmp_path, capsys
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert not evaluate.main(sampled(random_checkpoint, prompt_file, whole))
    seeds = [5, 6, 7]
    # the first clip of each is made once more, so that nothing is compiled while others are timed
    assert sampling.made == [(n, s) for n in ("teacher", "student") for s in (5, *seeds)]
    sampling.made, sampling.interrupt_at = [], 4
    assert evaluate.main(sampled(random_checkpoint, prompt_file, resumed)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(list((resumed / "clips" / "teacher").glob("sample*.mp4"))) == 2
    sampling.made, sampling.interrupt_at = [], None
    assert not evaluate.main(sampled(random_checkpoint, prompt_file, resumed))
    assert [seed for name, seed in sampling.made if name == "teacher"] == [7, 7]

    def rows(folder):
        content = json.loads((folder / "table.json").read_text())
        return {row["measure"]: row for row in content["rows"]}

    found = rows(whole)
    timed = {name: found[name] for name in found if name in sampled_clips.TIMINGS}
    assert {"first_chunk", "chunk_gap", "longest_chunk_gap", "fps"} <= timed.keys()
    assert timed["fps"]["reached"]["student"]["count"] == 3
    same = {name: row for name, row in found.items() if name not in sampled_clips.TIMINGS}
    assert same == {n: r for n, r in rows(resumed).items() if n not in sampled_clips.TIMINGS}
    assert found["seams"]["reached"]["teacher"]["count"] == 0  # made as a whole
    drift = found["video_latent_drift"]["reached"]["student"]  # 6 frames in half a second
    assert drift["mean"] == pytest.approx(0.005 * 12 * 60 / 1.0125)
    assert found["audio_latent_drift"]["reached"]["student"]["mean"] == pytest.approx(0, abs=1e-9)

    # as public tools read them
    names = [path.name for path in sorted((whole / "clips" / "student").iterdir())]
    assert names == [f"sample_{n:04d}.{kind}" for n in range(3) for kind in ("mp4", "wav")]
    with wave.open(str(whole / "clips" / "student" / "sample_0001.wav")) as file:
        assert (file.getnchannels(), file.getnframes()) == (2, 12_000)
    vbench = json.loads((whole / "prompts" / "student.json").read_text())
    assert list(vbench.values()) == CAPTIONS
    assert all(read_clip(path)[0].shape == (12, 64, 64, 3) for path in vbench)
    assert "a drum" in (whole / "page.html").read_text()

    # what another command line made is made anew, and nothing else
    sampling.made = []
    more = sampled(random_checkpoint, prompt_file, whole)
    more = [word.replace("--stg-block 1", "--stg-block 1 --steps 3") for word in more]
    assert not evaluate.main(more)
    assert [name for name, _ in sampling.made] == ["teacher"] * 4
    more = [word.replace("--stg-block 1", "--stg-block 1 --seed 3") for word in more]
    assert evaluate.main(more) == 2
    assert "teacher: no --seed here" in capsys.readouterr().err


def test_spread_of_latents():
    """Of a frame's tokens, all channels together; of a moment's sound."""
    rng = np.random.default_rng(0)
    video, audio = rng.normal(size=(1, 3 * 4, 5)), rng.normal(size=(1, 7, 6))
    found = sampled_clips.spread_of(AVLatents(video, audio), 4)
    np.testing.assert_allclose(found.video, [video[0, 4 * i : 4 * i + 4].std() for i in range(3)])
    np.testing.assert_allclose(found.audio, [frame.std() for frame in audio[0]])
    nothing = sampled_clips.spread_of(None, 4)
    drifts = sampled_clips.latent_drifts([nothing], 1.0)
    assert drifts == {"video_latent_drift": None, "audio_latent_drift": None}


def test_hosts_share_the_clips(sampling, random_checkpoint, prompt_file, tmp_path, monkeypatch):
    """Two hosts in step: every clip is made by one of them, and both know all."""
    barrier, here = threading.Barrier(2, timeout=240), threading.local()
    monkeypatch.setattr(sampled_clips.multihost, "barrier", lambda name: barrier.wait())
    fake = types.SimpleNamespace(
        process_index=lambda: here.rank, process_count=lambda: 2,
        local_devices=sampled_clips.jax.local_devices,
    )  # fmt: skip
    args = evaluate.parse_arguments(sampled(random_checkpoint, prompt_file, tmp_path))
    prompts = evaluate.read_prompts(args, {})
    samplers = evaluate.make_samplers(args, CAPTIONS)
    monkeypatch.setattr(sampled_clips, "jax", fake)

    def host(rank):
        here.rank = rank
        progress = ShardProgress("sampling", "clips")
        progress.console = Console(quiet=True)
        return sampled_clips.sample_missing(samplers, prompts, args.seed, progress)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(host, range(2))
    assert first == second
    assert len(first["student"]) == 3
    assert len(sampling.made) == 2 * (3 + 2)  # the first one of a host twice
    assert len(set(sampling.made)) == 6


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(random_checkpoint, prompt_file, free_port, tmp_path):
    """Real ones, which share a folder and nothing else."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    quick = lambda output: [  # noqa: E731
        word.replace("--stg-block 1", "--stg-block 1 --steps 2")
        for word in sampled(random_checkpoint, prompt_file, output)
    ]
    assert not evaluate.main(quick(alone))
    address = f"127.0.0.1:{free_port}"
    program = (
        "import sys, jax; from launch import evaluate; "
        "from omniforcing_jax.distributed import multihost; "
        "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2])); "
        "multihost.end(evaluate.main(sys.argv[3:]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, address, str(i), *quick(shared)],
                         stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert ["first_chunk" in out for out, _ in texts] == [True, False]  # one has the table

    def rows(folder):
        found = json.loads((folder / "table.json").read_text())["rows"]
        return [row for row in found if row["measure"] not in sampled_clips.TIMINGS]

    assert rows(shared) == rows(alone)
    records = [json.loads(path.read_text())["timings"] for path in shared.rglob("records/*/*.json")]
    assert len(records) == 6 and all(record["fps"] > 0 for record in records)


@pytest.mark.slow
def test_clips_are_those_of_the_programs(random_checkpoint, prompt_file, tmp_path):
    """Of launch.stream and launch.sample_teacher, for the same prompt and seed, bit for bit."""
    more = sampled(random_checkpoint, prompt_file, tmp_path / "out")
    assert not evaluate.main(
        [word.replace("--stg-block 1", "--stg-block 1 --steps 2") for word in more]
    )
    checkpoint = ["--checkpoint", str(random_checkpoint("2.0")), *SIZE.split()]
    clip = ["--prompt", CAPTIONS[1], "--seed", "6", "--output"]
    one = [*clip, str(tmp_path / "stream.mp4"), "--bidirectional"]
    assert not stream.main([*checkpoint, *one])
    two = [*clip, str(tmp_path / "teacher.mp4"), "--stg-block", "1", "--steps", "2"]
    assert not sample_teacher.main([*checkpoint, *two])
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    reached = {row["measure"]: row["reached"] for row in rows}
    counts = {
        (name, sampler): reached[f"{name}_latent_drift"][sampler]["count"]
        for name in ("video", "audio")
        for sampler in ("teacher", "student")
    }
    assert counts.pop(("video", "teacher")) == 0  # a line through two latents says nothing
    assert set(counts.values()) == {3}
    for name, made in (("student", "stream"), ("teacher", "teacher")):
        ours = read_clip(tmp_path / "out" / "clips" / name / "sample_0001.mp4")
        theirs = read_clip(tmp_path / f"{made}.mp4")
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "one\ntwo\none\n", ["one", "two", "one"]),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n', ["one", "two"]),
        ("a.csv", "caption,text\nours,theirs\n", ["ours"]),
        ("a.json", '[{"prompt_en": "one", "dimension": []}, "two"]', ["one", "two"]),
        ("a.txt", "one\n\ntwo\n", "line 2: an empty prompt"),
        ("a.csv", "id,name\n1,x\n", "no column 'caption'"),
        ("a.json", '{"prompt_en": "one"}', "expected a list of prompts"),
        ("a.json", '[{"text": 3}]', "entry 1: no text, and none under caption"),
        ("a.txt", "", "no prompts"),
    ],
)
def test_prompts_of_benchmarks(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    if isinstance(found, list):
        assert prompt_files.read_benchmark(tmp_path / name) == found
    else:
        with pytest.raises(ValueError, match=found):
            prompt_files.read_benchmark(tmp_path / name)


FAKE_JAVISBENCH = """
import csv, json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
texts = [row["text"] for row in csv.DictReader(open(given["--input_file"]))]
clips = pathlib.Path(given["--infer_data_dir"])
names = [f"sample_{n:04d}{suffix}" for n in range(len(texts)) for suffix in (".mp4", ".wav")]
assert all((clips / name).exists() for name in names)
result = {"ib_tv": 0.25, "desync": {"overall": 0.5, "all": []}, "other": 1.0, "texts": texts}
pathlib.Path(given["--output_file"]).write_text(json.dumps(result))
"""


def test_features_and_public_tools(folders, tmp_path, capsys):
    """Distances from files of features, and the figures that JavisBench's program writes."""
    random = np.random.default_rng(0)
    for kind in ("fvd", "fad"):
        (tmp_path / "features" / kind).mkdir(parents=True)
        for name in ("real", "teacher"):
            np.save(tmp_path / "features" / kind / f"{name}.npy", random.normal(size=(9, 3)))
    checkout = tmp_path / "JavisDiT"
    (checkout / "eval" / "javisbench").mkdir(parents=True)
    (checkout / "eval" / "javisbench" / "main.py").write_text(FAKE_JAVISBENCH)
    for clip in folders.glob("*/*.mp4"):
        sampled_clips.write_wav(clip.with_suffix(".wav"), WAVEFORM, SAMPLE_RATE)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    options = ["--features", str(tmp_path / "features"), "--javisbench", str(checkout)]
    assert not run(folders, tmp_path / "out", *options, "--prompts", str(prompts))
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["measure"]: row for row in content["rows"]}
    real, teacher = (
        np.load(tmp_path / "features" / "fvd" / f"{name}.npy") for name in ("real", "teacher")
    )
    expected = distances.frechet_distance(real, teacher)
    assert rows["fvd"]["reached"]["teacher"]["mean"] == pytest.approx(expected)
    assert rows["kad"]["reached"]["student"]["mean"] is None  # no file of its features
    assert rows["ib_tv"]["differences"]["student"]["mean"] == 0
    assert rows["desync"]["reached"]["student"]["mean"] == 0.5
    assert "other" not in rows
    table = (tmp_path / "out" / "table.md").read_text()
    assert "stillness wins" in table

    (tmp_path / "features" / "fvd" / "real.npy").unlink()
    assert run(folders, tmp_path / "out", *options, "--prompts", str(prompts)) == 2
    assert "real.npy, the features of real clips, is missing" in capsys.readouterr().err
    assert run(folders, tmp_path / "out", *options[2:]) == 2
    assert "give --prompts" in capsys.readouterr().err
    options[-1] = str(tmp_path)
    assert run(folders, tmp_path / "out", *options[2:], "--prompts", str(prompts)) == 2
    assert "non-commercial use only" in capsys.readouterr().err
