"""All three stages, one after the other, through the launch scripts: from captions to a student."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from checkpoint_converters import adapter_files, export, gemma3, ltx2, synthetic_gemma
from launch import dry_run, encode_prompts, export_run, ode_pairs, plot_run
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints
from omniforcing_jax.training import assembly
from omniforcing_jax.training.batches import DeviceBatches
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.run_config import plain
from omniforcing_jax.training.loop import train
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = [f"a clip of {n} small bells that ring" for n in ("one", "two", "three", "four")]
SETTINGS = {
    "clip.blocks": 2,
    "batch_size": 2,
    "num_steps": 3,
    "checkpoint_every": 2,
    "keep_every": 2,
    "sample_every": 0,
    "critic_updates": 2,
    "ema.start_step": 1,
    "student.timesteps": "(1000.0,725.0)",
}


def test_targets_of_make_that_configs_name_exist():
    makefiles = [ROOT / "Makefile", *(ROOT / "configs").glob("*.mk")]
    rules = "\n".join(file.read_text() for file in makefiles)
    targets = set(re.findall(r"^([a-z-]+):", rules, re.MULTILINE))
    named = {
        file.name: re.findall(r"(?:^ +|`)make ([\w-]+)", file.read_text(), re.MULTILINE)
        for file in (ROOT / "configs").glob("*.py")
    }
    assert named["stage1.py"] == ["tiny"]
    for name, found in named.items():
        assert set(found) <= targets, name


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_checkpoint):
    """A tiny converted LTX-2, and encoded captions."""
    folder = tmp_path_factory.mktemp("stages")
    source, gemma = folder / "gemma_hf", folder / "gemma"
    assert not synthetic_gemma.main(["--size", "tiny", "--output", str(source)])
    assert not gemma3.main(["--input", str(source), "--output", str(gemma)])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    checkpoint = random_checkpoint("2.0")
    assert not encode_prompts.main(
        ["--gemma", str(gemma), "--checkpoint", str(checkpoint),
         "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "prompts"),
         "--length", "128"]
    )  # fmt: skip
    return folder, checkpoint


def launch(
    stage: int, *arguments: str, devices: int = 1, variant: str = "tiny", **settings
) -> subprocess.CompletedProcess:
    """Runs `launch.stageN` on a tiny config."""
    values = SETTINGS | settings
    if stage == 2:
        values = {name: value for name, value in values.items() if name != "critic_updates"}
    options = [f"--config.{name}={value}" for name, value in values.items()]
    module = f"launch.stage{stage}"
    command = [
        sys.executable,
        "-m",
        module,
        f"--config=configs/stage{stage}.py:{variant}",
        *options,
    ]
    # besides those of conftest.py: without them, several devices can wait for each other
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def three_stages(folder, checkpoint, variant: str = "tiny", **second_settings):
    """Each starts from the one before, trains, saves; the last one samples a clip.

    Args:
      folder: with the encoded `prompts`; the runs go into a folder of the variant there.
      checkpoint: the teacher.
      second_settings: of stage II.

    Returns:
      Folder of the last run.
    """
    common = {"checkpoint": checkpoint, "data": folder / "prompts", "variant": variant}

    def trained(stage: int, **settings):
        workdir = folder / variant / f"stage{stage}"
        done = launch(stage, f"--workdir={workdir}", **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        steps = [r for r in records(workdir) if "generator/loss" in r or "critic/loss" in r]
        assert [r["step"] for r in steps] == [1, 2, 3]
        bad = {k for r in steps for k, v in r.items() if not np.isfinite(v)}
        assert not bad
        return workdir, steps

    first, steps = trained(1, **common)
    assert ["generator/loss" in r for r in steps] == [True, False, True]

    assert not ode_pairs.main(
        ["--text", str(folder / "prompts"), "--checkpoint", str(checkpoint),
         "--generator", str(first), "--layout", "prefix",
         "--output", str(folder / variant / "pairs")]
    )  # fmt: skip
    pairs = {"data": folder / variant / "pairs", "generator": first}
    second, _ = trained(2, **common | pairs | second_settings)

    third, _ = trained(
        3, **common, generator=second, rollout_blocks=2, sample_every=3, sample_clips=1
    )
    (sample,) = [r for r in records(third) if "sample/audio_entropy" in r]
    assert 0 < sample["sample/audio_entropy_lowest"] <= sample["sample/audio_entropy"] <= 1
    assert (third / "samples" / "000003_0.mp4").stat().st_size > 1000
    assert (third / "samples" / "000003_0.png").stat().st_size > 1000
    return third


@pytest.mark.parametrize("variant", ["tiny", pytest.param("tiny-lora", marks=pytest.mark.slow)])
def test_three_stages(world, tmp_path, variant):
    third = three_stages(*world, variant)
    # what comes of it: an official file, and a plot
    output = tmp_path / "student"
    assert not export_run.main(["--run", str(third), "--output", str(output)])
    content = json.loads((output / "config.json").read_text())
    assert content["trained"]["layout"] == "prefix"
    assert content["trained"]["text_length"] == 128
    assert not plot_run.main([str(third), "--output", str(tmp_path / "curves.png")])


@pytest.mark.slow
def test_score_networks_on_devices_of_their_own(world):
    """From the command line, four devices in two halves: the losses of one device, and a resume."""
    folder, checkpoint = world
    common = {"checkpoint": checkpoint, "data": folder / "prompts", "num_steps": 2}
    alone = launch(1, f"--workdir={folder / 'alone'}", **common)
    assert alone.returncode == 0, alone.stderr[-3000:]
    split = folder / "split"
    halves = {"devices": 4, "compute.separate_scores": True}
    done = launch(1, f"--workdir={split}", **common, **halves)
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch(1, f"--workdir={split}", **common | {"num_steps": 3}, **halves)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["step"] for r in records(split) if "critic/loss" in r] == [1, 2, 3]
    for one, other in zip(records(folder / "alone"), records(split), strict=True):
        names = [name for name in ("generator/loss", "critic/loss") if name in one]
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-4)


def test_plan_and_errors(world):
    """--plan prints and exits; problems are listed together, and nothing is left behind."""
    folder, checkpoint = world
    common = {"checkpoint": checkpoint, "data": folder / "prompts"}
    done = launch(1, "--plan", **common)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory per device" in done.stdout
    done = launch(1, f"--workdir={folder / 'bad'}", **common, batch_size=3, num_steps=0,
                  microbatches=2)  # fmt: skip
    assert done.returncode == 2
    assert "batch_size: 3 is not a multiple of 2 microbatches" in done.stderr
    assert "num_steps must be at least 1" in done.stderr
    assert not (folder / "bad").exists()


def whole_and_resumed(name: str, changes: dict, folder: pathlib.Path):
    """Two runs of a stage with adapters, three steps, and two and then one, which must be equal to
    the bit: weights, moments and averages.

    Both by the same programs, as one compiled anew may round otherwise.

    Returns:
      Folder of the first, and its state.
    """
    c = dry_run.stage_config(name, "tiny-lora", changes | {"tensorboard": False})
    e = experiment.check(c, 1)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    runs = [folder / f"{name}_{kind}" for kind in ("whole", "resumed")]
    with jax.set_mesh(mesh):
        stage, state, frozen = assembly.assemble(e, mesh, fresh=True)

        def trained(run: pathlib.Path, num_steps: int):
            loop = dataclasses.replace(e.config.loop, num_steps=num_steps)
            batches = DeviceBatches(e.data, c.batch_size, c.seed, mesh)
            start, config = jax.tree.map(jnp.copy, state), plain(e.run_config())
            return train(stage, start, frozen, batches, loop, run, run_config=config).state

        whole = trained(runs[0], 3)
        trained(runs[1], 2)
        jax.tree.map(np.testing.assert_array_equal, whole, trained(runs[1], 3))
    assert stage.generator_step._cache_size() == stage.critic_step._cache_size() == 1
    return runs[0], whole


def generator_at_start(changes: dict) -> dict:
    """What stage I trains, before its first update."""
    c = dry_run.stage_config("stage1", "tiny-lora", changes | {"tensorboard": False})
    read = lambda file, *over: adapter_files.stored(pathlib.Path(file), *over)  # noqa: E731
    e = experiment.check(c, 1, read_lora=read)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return assembly.assemble(e, mesh, fresh=True)[1].generator.params


@pytest.mark.slow
def test_adapters_over_one_base(world, tmp_path, capsys):
    """Stage I and III: resumes to the bit, under conditions as well, checkpoints of adapters alone,
    exports, refusals."""
    folder, checkpoint = world
    common = {"checkpoint": checkpoint, "data": folder / "prompts"}
    clips = tmp_path / "clips"
    assert not ode_pairs.main(
        ["--text", str(common["data"]), "--checkpoint", str(checkpoint), "--output", str(clips),
         "--layout", "prefix", "--frames", "25", "--height", "64", "--width", "64", "--steps", "4",
         "--timesteps", "1000", "900", "400", "--stg-block", "1", "--previews", "0"]
    )  # fmt: skip
    changes = SETTINGS | {"checkpoint": str(checkpoint), "data": str(clips), "tensorboard": False}
    changes["student.timesteps"] = (1000.0, 725.0)
    mixture = {"t2av": 0.2, "i2av": 0.2, "extend": 0.2, "a2v": 0.2, "v2a": 0.2}
    changes |= {f"conditions.{mode}": share for mode, share in mixture.items()}
    whole, state = whole_and_resumed("stage1", changes, tmp_path)
    average, trained = flatten_dict(state.generator.ema), flatten_dict(state.generator.params)
    assert all(np.any(x) and np.any(x != trained[path]) for path, x in average.items())
    with TrainingCheckpoints(whole, read_only=True) as saved:
        assert not [path for path in saved.saved_arrays(3) if "kernel" in path]

    file, student = tmp_path / "lora.safetensors", tmp_path / "student"
    arguments = ["--run", str(whole), "--dtype", "float32"]
    assert not export_run.main([*arguments, "--lora", str(file), "--output", str(student)])
    exported, merged = tmp_path / "tiny.safetensors", tmp_path / "merged"
    assert not export.main(["--input", str(checkpoint), "--output", str(exported)])
    command = ["--input", str(exported), "--lora", str(file), "--output", str(merged)]
    assert not ltx2.main(command)
    ours, theirs = (
        checkpoints.load_params(path, "transformer", dtype=np.float32) for path in (student, merged)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2), ours, theirs)

    # the file is where a stage starts from as the run itself does
    starts = [generator_at_start(changes | {"generator": str(path)}) for path in (whole, file)]
    jax.tree.map(np.testing.assert_array_equal, *starts)
    settings = common | {"generator": file}
    refused = launch(1, f"--workdir={tmp_path / 'no'}", **settings, **{"adapters.ranks": (8,)},
                     variant="tiny-lora")  # fmt: skip
    assert refused.returncode == 2
    assert "video_attn has rank 4, the config 8" in refused.stderr
    refused = launch(1, f"--workdir={tmp_path / 'no'}", **settings)
    assert "which only a stage with adapters starts from" in refused.stderr

    small = {"rollout_blocks": 2, "generator": str(whole), "student.num_sinks": 2}
    settings = changes | {"variant": "tiny-lora", "compute.base_precision": "int8"}
    done = launch(1, f"--workdir={tmp_path / 'int8'}", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(records(whole), records(tmp_path / "int8"), strict=True):
        if "critic/loss" in one:
            assert other["critic/loss"] == pytest.approx(one["critic/loss"], rel=0.1)
            assert other["critic/loss"] != one["critic/loss"]
    third, _ = whole_and_resumed("stage3", changes | small, tmp_path)
    assert export_run.main(["--run", str(third), "--lora", str(tmp_path / "no.safetensors")])
    assert "a LoRA cannot hold what the run trains besides" in capsys.readouterr().err
    settings = common | {"variant": "tiny-lora", "generator": checkpoint, "rollout_blocks": 2}
    refused = launch(3, f"--workdir={tmp_path / 'no'}", **settings)
    assert refused.returncode == 2
    assert "has weights of its own instead of adapters" in refused.stderr
