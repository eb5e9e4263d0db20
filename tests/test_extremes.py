"""Extremes in every option of every program, and in every setting of every config.

Options are found by asking the parsers, settings by walking the configs: new ones are held to the
same. Whatever is given, a program ends with a status of 0, 1 or 2 and lines that are meant to be
read, writes nothing but its output, and does not get to what costs much with a number that is none.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint_converters import gemma3, ltx2, reading, shapes
from launch import plot_run
from omniforcing_jax import PipelineConfig, programs
from omniforcing_jax.data import shards
from omniforcing_jax.data.ode_pairs import ODE_PAIRS
from omniforcing_jax.data.text_dataset import open_text_dataset
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import write_json
from omniforcing_jax.io.checksums import SEAL
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.streaming import media
from omniforcing_jax.text.tokenizer import load_tokenizer
from omniforcing_jax.training.config import experiment, parsing
from omniforcing_jax.training.config.problems import ConfigError, Problems
from omniforcing_jax.training.config.run_config import RunConfig
from pocket import pretrain_config
from tests.test_programs import ROOT, program_files
from tests.training.test_ode_pairs import MANIFEST as ODE_PAIRS_MANIFEST
from tests.training.test_ode_pairs import write_text

# What is no number, and what no computer can hold as one: never taken by an option of numbers.
NO_NUMBERS = ("inf", "-inf", "nan", "1e400", "-1e400", str(2**70), str(-(2**70)), "", "x", "0x1f")
OTHERS = ("-1", "0", "1e-320", str(2**31 - 1), str(2**31), "-0.0", "1", "3", "1e15", "0.5")
TEXTS = ("", "-", "x" * 5000, "a/" * 3000, "/dev/null", "/", "..", "\N{SNOWMAN}", "*", "@", "=")
# By absl's flags rather than by a parser.
WITH_FLAGS = ("launch.stage1", "launch.stage2", "launch.stage3", "pocket.pretrain")


class Reached(BaseException):
    """A program got to what costs much."""


class Seen(BaseException):
    """A program's parser was asked."""


def modules() -> dict[str, str]:
    """{name of a program: name of its module}."""
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in program_files())
    return {name: name for name in names if name not in WITH_FLAGS}


PROGRAMS = tuple(modules())
# What a program calls when it has checked its arguments, and what it needs to come so far.
EXPENSIVE = {
    "omniforcing_jax.streaming.contact_sheet": "contact_sheet",
    "checkpoint_converters.synthetic": "write write_upsampler",
    "checkpoint_converters.synthetic_gemma": "write",
    "checkpoint_converters.export": "export",
    "checkpoint_converters.gemma3": "convert",
    "checkpoint_converters.gemma4": "convert",
    "checkpoint_converters.upsampler": "convert",
    "checkpoint_converters.ltx2": "convert",
    "checkpoint_converters.omniforcing": "convert",
    "launch.aot": "measure run_all write_table",
    "launch.plan": "smallest propose compare",
    "launch.plot_masks": "draw",
    "launch.plot_run": "draw",
    "launch.plot_scaling": "points",
    "launch.export_run": "latest_step load_generator export",
    "launch.encode_prompts": "TextEncoder describe_prompts",
    "launch.encode_clips": "load_encoders",
    "launch.ode_pairs": "TrajectorySampler make_manifest",
    "launch.sample_teacher": "load_pipeline",
    "launch.stream": "load_pipeline",
    "launch.serve": "load_pipeline run_replicas",
    "benchmarks.serve": "start",
    "examples.talker": "converse",
    "benchmarks.kernels": "stream.random_pipeline",
    "benchmarks.stream": "run",
    "benchmarks.given": "load_pipeline",
    "benchmarks.precision": "tables",
    "benchmarks.page": "figures",
    "benchmarks.peers": "measure _in_process",
    "benchmarks.text": "make_encoder",
    "benchmarks.text_dataset": "write",
    "benchmarks.convert": "convert_here subprocess.run",
    "benchmarks.train": "run",
    "pocket.demo": "stream.stream measure_file",
    "pocket.experiments": "pretrain.run compare",
    "pocket.given": "make_clip",
    "pocket.measure": "measure_file",
    "pocket.make_world": "make",
    "pocket.reconstruct": "make_clip",
    "pocket.report": "report_runs report_samples",
    "pocket.sample": "world_clips load_pipeline",
    "pocket.assemble": "assemble",
    "pocket.known_answer.plot": "draw",
    "pocket.known_answer.solve": "run",
}


def reached(*args, **options):
    raise Reached


@contextlib.contextmanager
def cheap(name: str) -> Iterator:
    """The program's module, without what costs much."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        for target in EXPENSIVE.get(name, "").split():
            patch.setattr(f"{name}.{target}", reached)
        yield module


def parser_of(name: str) -> argparse.ArgumentParser:
    """What the program reads its command line with."""

    def seen(parser, *args, **options):
        found.append(parser)
        raise Seen

    found = []
    with cheap(name) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Parser, "parse_args", seen)
        with pytest.raises(Seen):
            module.main([])
    return found[0]


@pytest.fixture(scope="module")
def parsers():
    return {name: parser_of(name) for name in PROGRAMS}


# So that an option is looked at, and not only that something else is missing. Of an option that is
# given twice the last counts.
SMALL = "--height 64 --width 64"
MORE = {
    "launch.stream": f"--random-features --bidirectional {SMALL} --output clip.mp4",
    "launch.sample_teacher": f"--random-features --stg-block 1 {SMALL} --output clip.mp4",
    "launch.ode_pairs": f"--stg-block 1 {SMALL} --frames 25",
    "launch.export_run": "--output exported",
    "pocket.sample": "--sampler world",
    "launch.plan": "--target v6e:8x8",
}
# What these read before they get to it takes longer to make than all else here.
NOT_REACHED = {"launch.encode_clips", "pocket.reconstruct", "pocket.known_answer.plot"}


@pytest.fixture(scope="module")
def there(random_checkpoint, random_gemma, tmp_path_factory) -> dict[str, str]:
    """{option, or program and option: what there is for it}."""
    folder, checkpoint = tmp_path_factory.mktemp("there"), random_checkpoint("2.0")
    (folder / "prompts.txt").write_text("a dog barks\n")
    config = write_run(folder / "run", checkpoint)
    student = link_files(checkpoint, folder / "student")
    content = json.loads((checkpoint / "config.json").read_text())
    content |= {"trained": TrainedSettings.of_run(config).to_json()}
    write_json(student / "config.json", {k: v for k, v in content.items() if k != SEAL})
    clip = folder / "clip.mp4"
    with media.ClipWriter(clip, width=64, height=64, frame_rate=24, sample_rate=24000) as writer:
        writer.write(np.zeros((9, 64, 64, 3), np.uint8), np.zeros((9000, 2), np.float32))
    return {
        "checkpoint": str(checkpoint),
        "gemma": str(random_gemma),
        "text_encoder": str(random_gemma),
        "prompts": str(folder / "prompts.txt"),
        "text": str(write_text(folder / "text", checkpoint)),
        "run": str(folder / "run"),
        "runs": str(folder / "run"),
        "clip": str(clip),
        "pocket.demo checkpoint": str(student),
        "launch.serve checkpoint": str(student),
    }


def write_run(folder: pathlib.Path, checkpoint: pathlib.Path) -> dict:
    """Makes what a run of stage II leaves, but for its weights; its settings."""
    clip = {"layout": "prefix", "height": 64, "width": 64, "frame_rate": 24.0, "blocks": 2}
    cache = {"window": 1, "anchors": 0, "positions": "relative", "context_noise": 0.0}
    config = {
        "stage": "stage2",
        "checkpoint": str(checkpoint),
        "model_version": "2.0.0",
        "clip": clip,
        "student": {"timesteps": [1000, 725], **cache},
        "student_config": {},
    }
    network = PipelineConfig.from_checkpoint(checkpoint).transformer
    config["student_config"] = dataclasses.asdict(network)
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / "config.json", {"format": 1, "config": config})
    (folder / "metrics.jsonl").write_text('{"step": 1, "generator/loss": 0.5}\n')
    return config


def link_files(
    source: pathlib.Path, folder: pathlib.Path, without: str = "config.json"
) -> pathlib.Path:
    """A new folder with all that is in another, but for one file."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != without:
            (folder / file.name).symlink_to(file)
    return folder


def usual(
    name: str, action: argparse.Action, folder: pathlib.Path, there: dict[str, str]
) -> list[str]:
    """Words that are fine for an option that has to be given."""
    found = there.get(action.dest, str(folder / "nothing"))
    found = there.get(f"{name} {action.dest}", found)
    word = next(iter(action.choices)) if action.choices else found
    words = [word] * (action.nargs if isinstance(action.nargs, int) else 1)
    return [*action.option_strings[-1:], *words]


def outcome(name: str, arguments: list[str], capsys) -> tuple[int | None, str]:
    """(status, or None if it got to what costs much; standard error)."""
    with cheap(name) as module:
        try:
            status = module.main(arguments)
        except SystemExit as end:
            status = end.code
        except Reached:
            status = None
    return status, capsys.readouterr().err


def check_end(status: int | None, text: str, case: object) -> None:
    """Whether a program has ended as it should."""
    assert status in (None, 0, 1, 2), (case, status, text)
    assert "Traceback" not in text and "not expected" not in text, (case, text)
    assert len(text) < 8000, (case, len(text))
    if status:
        assert text.startswith("error: ") or "\nerror: " in text, (case, text)


def cases(parsers) -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in parsers.items():
        for action in parser._actions:
            if action.nargs != 0 and action.dest != "help":
                yield name, action


def try_option(parsers, there, folder, capsys, name, action, value) -> tuple[int | None, str]:
    """Gives the option a value, and what has to be given besides."""
    others = [a for a in parsers[name]._actions if a.required and a is not action]
    words = [word for other in others for word in usual(name, other, folder, there)]
    words += MORE.get(name, "").split()
    count = action.nargs if isinstance(action.nargs, int) else 1
    words += [*action.option_strings[-1:], *[value] * count]
    if value.startswith("-") and action.option_strings and count == 1:  # or it would be an option
        words[-2:] = [f"{action.option_strings[-1]}={value}"]
    before = sorted(folder.iterdir())
    found = outcome(name, words, capsys)
    check_end(*found, (name, words))
    new = {path.name for path in folder.iterdir()} - {path.name for path in before}
    assert found[0] is None or new <= {value}, (name, words)  # a file that it was to write
    for path in set(folder.iterdir()) - set(before):  # an output that was claimed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


@pytest.mark.parametrize("name", sorted({*EXPENSIVE} - NOT_REACHED))
def test_programs_get_to_what_costs_much(name, parsers, there, tmp_path, capsys, monkeypatch):
    """With nothing wrong: so what they refuse below is for what is wrong."""
    monkeypatch.chdir(tmp_path)
    required = [action for action in parsers[name]._actions if action.required]
    words = [word for action in required for word in usual(name, action, tmp_path, there)]
    status, text = outcome(name, [*words, *MORE.get(name, "").split()], capsys)
    assert status is None, text


def test_no_option_takes_what_is_no_number(parsers, there, tmp_path, capsys, monkeypatch):
    """All options of numbers there are, each with one value; all values come up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    tried = 0
    for name, action in cases(parsers):
        reads = action.type
        if reads in (int, float) or getattr(reads, "__qualname__", "").startswith("number."):
            value = NO_NUMBERS[tried % len(NO_NUMBERS)]
            status, text = try_option(parsers, there, tmp_path, capsys, name, action, value)
            assert status == 2 and text.count("\n") == 1, (name, action.dest, value, text)
            tried += 1
    assert tried > 80


def test_every_option_ends_well(parsers, there, tmp_path, capsys, monkeypatch):
    """Of every program, whatever an option is given."""
    check_options(parsers, there, tmp_path, capsys, monkeypatch, 150)


@pytest.mark.slow
def test_every_option_ends_well_many_times(parsers, there, tmp_path, capsys, monkeypatch):
    check_options(parsers, there, tmp_path, capsys, monkeypatch, 15_000)


def check_options(parsers, there, folder, capsys, monkeypatch, examples: int) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(programs.tempfile, "tempdir", str(folder))
    values = st.one_of(st.sampled_from(NO_NUMBERS + OTHERS + TEXTS), st.integers().map(str),
                       st.floats().map(repr))  # fmt: skip

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(list(cases(parsers))), values)
    def check(case, value):
        try_option(parsers, there, folder, capsys, *case, value)

    check()


SHAPES = (None, -1, 1e300, "x", [], [[]], {}, {"a": None}, True, 2**70, [None], 0)


def places(content, prefix: tuple = ()) -> Iterator[tuple]:
    """Where something stands in JSON, three levels deep."""
    items = content.items() if isinstance(content, dict) else ()
    for name, value in items:
        yield (*prefix, name)
        if len(prefix) < 2:
            yield from places(value, (*prefix, name))


class JsonFile(NamedTuple):
    """A file of JSON in a folder, and what reads it: a program, or a function of the folder."""

    folder: pathlib.Path
    name: str
    reader: str | Callable[[pathlib.Path], object]


def read_pairs(folder: pathlib.Path) -> None:
    shards.check_folder(ODE_PAIRS, folder, ODE_PAIRS_MANIFEST)


def read_text(folder: pathlib.Path) -> object:
    return open_text_dataset(folder)[0]


def read_curves(folder: pathlib.Path) -> object:
    return plot_run.read_run(folder)


def read_ltx2(folder: pathlib.Path) -> None:
    """What ltx2's converter makes of the settings in a safetensors file's metadata."""
    with checkpoints.parsing(folder / "settings.json"):
        config = json.loads((folder / "settings.json").read_text())
        ltx2.pop_trained(config, folder)
        for component in checkpoints.COMPONENTS:
            shapes.expected_shapes(config, component)


@pytest.fixture(scope="module")
def json_files(there, random_gemma, tmp_path_factory) -> dict[str, JsonFile]:
    made = tmp_path_factory.mktemp("json")
    for name in ("pairs", "index", "settings"):
        (made / name).mkdir()
    pairs = {"format": ODE_PAIRS.format, "kind": ODE_PAIRS.name, "complete": False}
    pairs |= dataclasses.asdict(ODE_PAIRS_MANIFEST)
    (made / "pairs" / "manifest.json").write_text(json.dumps(pairs))
    hf = next((random_gemma.parent / "hf").glob("*.safetensors"))
    (made / "index" / hf.name).symlink_to(hf)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a.weight": hf.name, "b": hf.name}}
    (made / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((pathlib.Path(there["checkpoint"]) / "config.json").read_text())
    (made / "settings" / "settings.json").write_text(json.dumps(settings["config"]))
    return {
        "checkpoint": JsonFile(pathlib.Path(there["checkpoint"]), "config.json", "launch.stream"),
        "gemma": JsonFile(random_gemma, "config.json", "launch.encode_prompts"),
        "tokenizer": JsonFile(
            random_gemma, "tokenizer.json", lambda f: load_tokenizer(f).encode(["a dog barks"])
        ),
        "gemma_hf": JsonFile(random_gemma.parent / "hf", "config.json", gemma3.read_text_config),
        "settings": JsonFile(made / "settings", "settings.json", read_ltx2),
        "index": JsonFile(made / "index", "model.safetensors.index.json", reading.weight_files),
        "text": JsonFile(pathlib.Path(there["text"]), "manifest.json", read_text),
        "pairs": JsonFile(made / "pairs", "manifest.json", read_pairs),
        "run": JsonFile(pathlib.Path(there["run"]), "config.json", RunConfig.read),
        "metrics": JsonFile(pathlib.Path(there["run"]), "metrics.jsonl", read_curves),
    }


JSON_KINDS = ("checkpoint", "gemma", "tokenizer", "gemma_hf", "settings", "index", "text",
              "pairs", "run", "metrics")  # fmt: skip


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_json_of_the_wrong_shape(
    kind, json_files, parsers, there, tmp_path, capsys, monkeypatch, shapes_each=1
):
    """Something else at the places of a file; all other files are as they were."""
    source, file, reader = json_files[kind]
    content = json.loads((source / file).read_text())
    content.pop(SEAL, None)
    folder = link_files(source, tmp_path / "changed", without=file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))

    def run() -> tuple[int | None, str]:
        if not isinstance(reader, str):
            status = programs.entry(lambda: reader(folder) and None)()
            return status or None, capsys.readouterr().err
        required = [action for action in parsers[reader]._actions if action.required]
        words = [word for action in required for word in usual(reader, action, tmp_path, there)]
        words = [str(folder) if word == str(source) else word for word in words]
        return outcome(reader, words + MORE.get(reader, "").split(), capsys)

    (folder / file).write_text(json.dumps(content))
    assert run()[0] is None
    found = list(places(content))
    found = [(), *found[:: max(1, len(found) // (30 * shapes_each))]]
    refused = 0
    for number, place in enumerate(found):
        for shape in range(number, number + shapes_each):
            changed = {"all": copy.deepcopy(content)}
            group = changed
            for key in ("all", *place)[:-1]:
                group = group[key]
            group[("all", *place)[-1]] = SHAPES[shape % len(SHAPES)]
            (folder / file).write_text(json.dumps(changed["all"]))
            status, text = run()
            check_end(status, text, (place, SHAPES[shape % len(SHAPES)]))
            refused += status is not None
    assert refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_json_of_every_wrong_shape(kind, json_files, parsers, there, tmp_path, capsys, monkeypatch):
    arguments = (kind, json_files, parsers, there, tmp_path, capsys, monkeypatch)
    test_json_of_the_wrong_shape(*arguments, shapes_each=len(SHAPES))


# -- configs ---------------------------------------------------------------------------------------

VARIANTS = [(stage, variant) for stage in ("stage1", "stage2", "stage3")
            for variant in ("19b", "tiny", "pocket")]  # fmt: skip
VALUES = (
    float("inf"), float("-inf"), float("nan"), 2**70, -(2**70), 10**400, -1, 0, -1.0, 0.0, 1e300,
    1e-320, "", "x", "x" * 5000, None, (), (1,), [1.0, float("nan")], True, {}, {"a": 1}, 2**31, 1,
)  # fmt: skip


def leaves(config, prefix: str = "") -> Iterator[str]:
    """Names of all settings, and of their groups."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")


def with_value(config: dict, name: str, value):
    """A copy with another value."""
    config = copy.deepcopy(config)
    group = config
    *groups, last = name.split(".")
    for each in groups:
        group = group[each]
    group[last] = value
    return config


def setting(config, name: str):
    """The value of a setting."""
    for each in name.split("."):
        config = config[each]
    return config


def other_kind(value, usual) -> bool:
    """Whether a value is of another kind than the usual one; None may stand for any."""
    if value is None or usual is None:
        return isinstance(value, dict)
    if isinstance(usual, ml_collections.ConfigDict):
        return value != {"a": 1} and not isinstance(value, dict)
    kinds = {str: str, bool: bool, int: int, float: int | float, tuple: tuple | list | int | float}
    return not isinstance(value, kinds[type(usual)]) or isinstance(value, bool) != isinstance(
        usual, bool
    )


def stage_tree(stage: str, variant: str) -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{stage}").get_config(variant)


def problems_of(tree: dict) -> list[str]:
    problems = Problems()
    try:
        config = parsing.parse(tree, problems)
        problems += config.problems(1)
    except ConfigError as error:
        problems += error.problems
    return problems


@pytest.mark.parametrize(("stage", "variant"), VARIANTS)
def test_every_setting_is_held(stage, variant):
    """Each value in each setting; what is no number, and another kind of thing, is never taken, and
    no negative number but where one means something."""
    config = stage_tree(stage, variant)
    tree, wrong = config.to_dict(), []
    assert problems_of(tree) == [] or variant == "19b"  # of 32 clips on one device
    usual = set(problems_of(tree))
    for name in leaves(config):
        for value in VALUES:
            found = set(problems_of(with_value(tree, name, value))) - usual
            numbers = value if isinstance(value, list) else [value]
            nonsense = any(
                isinstance(x, int | float) and (x != x or abs(x) > 1e301) for x in numbers
            )
            nonsense |= other_kind(value, setting(config, name))
            negative = value == -1 and not name.startswith("mesh.")
            if (nonsense or negative) and not found:
                wrong.append((name, value))
    assert wrong == []


@pytest.mark.parametrize("part", pretrain_config.PARTS)
def test_every_setting_of_pretraining_is_held(part):
    config = pretrain_config.get_config(part)
    pretrain_config.check(config)
    tree, wrong = config.to_dict(), []
    for name in leaves(config):
        usual = tree
        for each in name.split("."):
            usual = usual[each]
        for value in VALUES:
            changed = ml_collections.ConfigDict(with_value(tree, name, value))
            try:
                pretrain_config.check(changed)
            except ValueError:
                continue
            number = isinstance(value, int | float) and 0 <= value < 1e9
            if not number and type(value) is not type(usual):
                wrong.append((name, value))
    assert wrong == []


def test_a_negative_weight_is_refused():
    """It trained uphill."""
    tree = with_value(stage_tree("stage1", "tiny").to_dict(), "loss.video", -1.0)
    assert problems_of(tree) == ["loss: loss.video must be at least 0, not -1.0"]


def test_configs_are_checked_whole(tmp_path):
    """What `check` refuses it refuses as a list, whatever files are not there."""
    tree = with_value(stage_tree("stage3", "tiny").to_dict(), "checkpoint", str(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.json"):
        experiment.check(tree, 1)
    assert "launch.stage1" not in sys.modules


def test_flags_of_the_stages(tmp_path):
    """Every flag there is, in a process of its own."""
    command = [sys.executable, "-m", "tests.launch.stage_extremes", str(tmp_path), "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 100
    for arguments, status, text in results:
        check_end(status, text, arguments)
        assert status, arguments  # there is no checkpoint
    assert list(tmp_path.iterdir()) == []
