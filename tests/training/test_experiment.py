"""Configs: every problem reported at once, before anything is allocated; plans by arithmetic."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import synthetic
from configs import stage1, stage2, stage3
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.trained import LTX2_DISTILLED, TrainedSettings
from omniforcing_jax.scaling import planning
from omniforcing_jax.training import adapters, assembly
from omniforcing_jax.training.config import experiment, parsing, run_config, settings
from omniforcing_jax.training.config.problems import ConfigError, Problems

GIB = 2**30
MODULES = {"stage1": stage1, "stage2": stage2, "stage3": stage3}


class Data:
    """A dataset of which only the manifest is read."""

    def __init__(self, **changes):
        shape = {"video_frames": 16, "audio_frames": 126, "height": 16, "width": 24}
        text = {"model_version": "2.0.0", "video_dim": 3840, "audio_dim": 3840}
        more = {"text_length": 1024, "shared_features": True}
        more |= {"sigmas": flow.student_sigmas(), "schedule": [0.0] * 41, "autoregression": None}
        more |= {"conditions": None}
        self.manifest = types.SimpleNamespace(**(shape | text | more | changes))


@pytest.fixture
def full_size(tmp_path, monkeypatch):
    """A folder that says it holds the 19B model, and a dataset that fits; no weights anywhere."""
    names = ["transformer", "connectors", "video_vae", "audio_vae", "vocoder"]
    content = {"format": 1, "family": "ltx2", "model_version": "2.0.0"}
    content |= {"config": synthetic.metadata("full", "2.0"), "components": names, "source": ""}
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(experiment, "_open_data", lambda config: Data())
    return tmp_path


def config_of(stage: str, folder, variant: str = "19b", **changes):
    c = MODULES[stage].get_config(variant)
    c.checkpoint = str(folder)
    c.update_from_flattened_dict(changes)
    return c


def checked(stage: str, folder, devices: int = 32, variant: str = "19b", **changes):
    config = config_of(stage, folder, variant, **changes)
    return experiment.check(config, devices)


def problems_of(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as error:
        checked(*args, **kwargs)
    return error.value.problems


@pytest.mark.parametrize("stage", MODULES)
def test_every_variant_fits_the_full_model(stage, full_size):
    variants = {"stage1": [], "stage2": ["19b-flow"], "stage3": ["19b-ar"]}[stage]
    for variant in ["19b", "19b-v2", *variants]:
        e = checked(stage, full_size, variant=variant)
        assert e.clip.video_frames == 16
        assert e.clip.audio_frames == 126
        assert e.mesh_shape["fsdp"] == 32
    with pytest.raises(ValueError, match="there are 19b"):
        MODULES[stage].get_config("20b")


def test_the_papers_settings(full_size):
    for stage, steps in (("stage1", 2000), ("stage2", 3000), ("stage3", 2000)):
        e = checked(stage, full_size)
        c = e.config
        assert (c.batch_size, c.num_steps, c.optimizers["generator"].learning_rate) == (
            32, steps, 2e-5,
        )  # fmt: skip
        assert e.student.num_audio_sinks == (0 if stage == "stage1" else 16)
        assert e.layout.name == "prefix"
        if stage != "stage2":
            assert c.score.video_cfg == (3.0, 3.0)
            assert c.score.audio_cfg == (5.0, 5.0)
            assert c.critic_updates == 5
    v2 = checked("stage1", full_size, variant="19b-v2")
    np.testing.assert_allclose(v2.sigmas, [1.0, 0.750697, 0.544771, 0.0], atol=1e-6)
    assert checked("stage2", full_size).config.regression.objective == "velocity"


def test_plan_of_the_full_model(full_size):
    """Counts against the published model, and bytes against twelve per trained parameter."""
    e = checked("stage3", full_size, devices=64, **{"mesh.tensor": 2})
    plan = planning.plan_step(e)
    assert plan.parameters["teacher"] == 18_876_174_592
    assert plan.parameters["generator"] == plan.parameters["teacher"] + 16 * 2048
    memory = plan.bytes_per_device
    assert memory["generator: masters"] == pytest.approx(4 * 18.88e9 / 64, rel=0.05)
    assert memory["generator: optimizer"] == pytest.approx(8 * 18.88e9 / 64, rel=0.05)
    assert memory["teacher"] == pytest.approx(2 * 18.88e9 / 64, rel=0.05)
    assert plan.tokens_per_step == 32 * (16 * 384 + 126)
    # Per sample a pass over six blocks costs about 36 TFLOP a block (of which the first is a
    # third); a step costs some 20 such passes.
    assert 5e15 < plan.flops_per_step < 1e17
    text = planning.describe(e, plan)
    assert "18,876,174,592" in text
    assert "GiB" in text
    one = planning.plan_step(checked("stage3", full_size, devices=1))
    assert one.bytes_per_device["generator: masters"] == 4 * one.parameters["generator"]


def test_conditions(full_size, monkeypatch):
    """A mixture needs clips of the config's size, and a batch brings them; without one the batch is
    as it was."""
    mixture = {"conditions.t2av": 0.5, "conditions.a2v": 0.5}
    e = checked("stage3", full_size, **mixture)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    batch = assembly.abstract_batch(e, mesh)
    assert batch["video"].shape == (32, 16 * 384, 128) and batch["audio"].shape == (32, 126, 128)
    assert experiment.make_stage(e).given.mixture.a2v == 0.5
    assert "tokens" in planning.describe(e, planning.plan_step(e))  # --plan
    plain = checked("stage3", full_size)
    assert "video" not in assembly.abstract_batch(plain, mesh)
    assert experiment.make_stage(plain).given is None
    problems = "\n".join(problems_of("stage3", full_size, **{"conditions.i2av": 0.5}))
    assert "conditions: probabilities of modes must be 0 or more and sum to 1" in problems
    problems = "\n".join(problems_of("stage3", full_size, rollout_blocks=8, **mixture))
    assert "rollout_blocks must be as many, not 8" in problems
    problems = "\n".join(problems_of("stage2", full_size, **mixture))
    assert "record what was given when they were made (launch.ode_pairs --conditions)" in problems
    pairs = Data(conditions={"t2av": 0.5, "a2v": 0.5})
    monkeypatch.setattr(experiment, "_open_data", lambda config: pairs)
    run = checked("stage2", full_size).run_config()
    assert TrainedSettings.of_run(run).modes == ("t2av", "a2v")
    run = checked("stage2", full_size, **{"regression.objective": "flow"}).run_config()
    assert TrainedSettings.of_run(run).modes is None  # which draws it anew
    monkeypatch.setattr(experiment, "_open_data", lambda config: Data(video_frames=13))
    problems = "\n".join(problems_of("stage1", full_size, **mixture))
    assert "clips are stored with {'video_frames': 13" in problems


def test_a_distilled_ltx2_is_a_student_and_no_teacher(full_size, tmp_path, monkeypatch):
    content = json.loads((full_size / "config.json").read_text()) | {
        "trained": LTX2_DISTILLED.to_json()
    }
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    (distilled / "config.json").write_text(json.dumps(content | {"model_version": "2.0.1"}))
    levels = flow.student_sigmas(sigmas=flow.schedule("distilled"))
    data = Data(sigmas=levels, schedule=flow.schedule("distilled"))
    monkeypatch.setattr(experiment, "_open_data", lambda config: data)
    start = {"generator": str(distilled)}
    (problem,) = problems_of("stage2", full_size, **start)
    assert "of 8 steps" in problem and "student.schedule" in problem
    e = checked("stage2", full_size, **start, **{"student.schedule": "distilled"})
    assert e.sigmas == tuple(levels.tolist())
    problems = "\n".join(problems_of("stage1", distilled))
    assert "is a distilled LTX-2, which is no teacher" in problems


def test_gathered_weights_are_whole_on_every_device(full_size):
    plan = planning.plan_step(checked("stage1", full_size, **{"compute.gather_weights": True}))
    memory = plan.bytes_per_device
    whole = memory["generator: whole weights for rollouts"]
    assert whole > 35 * GIB
    # biases and tables are whole in any case
    assert whole == pytest.approx(32 * memory["generator: compute weights"], rel=0.05)
    usual = planning.plan_step(checked("stage1", full_size)).bytes_per_device
    assert "generator: whole weights for rollouts" not in usual


def test_all_problems_are_reported_together(full_size):
    problems = problems_of(
        "stage3",
        full_size,
        **{
            "student.timesteps": (725.0, 1000.0),
            "generator_optimizer.learning_rate": -1.0,
            "clip.layout": "suffix",
            "batch_size": 33,
            "score.context": "causal",
            "compute.dtype": "float16",
            "generator": "nowhere",
        },
    )
    text = "\n".join(problems)
    for part in (
        "student.timesteps: ",
        "learning_rate must be finite and positive",
        "unknown block layout 'suffix'",
        "batch_size: 33 is not a multiple of 1 microbatches x 32 devices",
        "the next one is 64",
        "score context must be one of",
        "compute: dtype must be one of",
        "nowhere is neither a run nor a converted checkpoint",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "does not multiply to the 32 devices"),
        ({"mesh.fsdp": 0}, "axes must be positive"),
        ({"mesh.data": -1}, "one of them may be -1"),
        ({"clip.height": 500}, "500"),
        ({"clip.frame_rate": 23.0}, "whole number of audio latents"),
        ({"clip.blocks": 0}, "clip.blocks must be at least 1"),
        ({"rollout_blocks": 2}, "scored_blocks must be between 1 and num_blocks = 2"),
        ({"student.context_noise": 1.5}, "context_noise"),
        ({"generator_weights": "best"}, "must be 'params' or 'ema'"),
        ({"compute.remat": "some"}, "remat"),
        ({"keep_every": 7}, "keep_every must be a multiple"),
        ({"score.stg": 1.0}, "stg_blocks is empty"),
        ({"score.stg": 1.0, "score.stg_blocks": (48,)}, "has the blocks 0 to 47"),
        ({"score.context": "block_causal", "rollout_blocks": 7}, "scored from its first block"),
        ({"sample_clips": 0}, "sample_clips: must be at least 1"),
        ({"sample_every": -1}, "sample_every: must be 0"),
        ({"score.context": "block_causal", "student.context_noise": 0.1}, "scores see a history"),
    ],
)
def test_single_problems(full_size, changes, message):
    assert any(message in problem for problem in problems_of("stage3", full_size, **changes))


def test_unknown_and_missing_settings(full_size):
    c = config_of("stage1", full_size)
    with c.unlocked():
        c.student.num_sink = 4
        del c.batch_size
    with pytest.raises(ConfigError) as error:
        experiment.check(c, 1)
    text = str(error.value)
    assert "student.num_sink: there is no such setting" in text
    assert "batch_size: is missing" in text
    with pytest.raises(ConfigError, match="this config is for 'stage1'"):
        experiment.check(config_of("stage1", full_size), 1, stage="stage2")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage1", {"model_version": "2.3.0"}, "made for version 2.3.0, the checkpoint is 2.0.0"),
        ("stage1", {"video_dim": 4096}, "features are 4096 and 3840 wide"),
        ("stage1", {"text_length": 1000}, "not a multiple of the connectors' 128 registers"),
        ("stage2", {"video_frames": 13}, "trajectories are of clips with"),
        ("stage2", {"sigmas": (1.0, 0.75, 0.0)}, "--timesteps 1000 909 725 421 --steps 40"),
        ("stage2", {"autoregression": {"layout": "merged"}}, "in blocks of layout 'merged'"),
    ],
)
def test_data_that_does_not_fit(full_size, monkeypatch, stage, changes, message):
    monkeypatch.setattr(experiment, "_open_data", lambda config: Data(**changes))
    assert any(message in problem for problem in problems_of(stage, full_size))


def test_flow_matching_reads_clean_clips_of_any_sampler(full_size, monkeypatch):
    data = Data(sigmas=(1.0, 0.0), autoregression={"layout": "merged"})
    monkeypatch.setattr(experiment, "_open_data", lambda config: data)
    checked("stage2", full_size, variant="19b-flow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute.gather_weights": True}, "compute.gather_weights: stage II has no rollouts"),
        ({"regression.clean_history": 0.1, "student.context_noise": 0.1}, "whose history has no"),
        ({"student.window": 5}, "reaches block position 6, clip.blocks=6 trains positions up to 5"),
    ],
)
def test_problems_of_stage_two(full_size, changes, message):
    assert any(message in problem for problem in problems_of("stage2", full_size, **changes))


def test_exported_windows_stay_within_what_is_trained(full_size):
    for stage, variant in (("stage2", "19b"), ("stage2", "19b-v2"), ("stage3", "19b"),
                           ("stage3", "19b-v2"), ("stage3", "19b-ar")):  # fmt: skip
        e = checked(stage, full_size, variant=variant)
        cache, blocks = e.rollout.cache, e.config.clip.blocks
        assert int(cache.position_of(1000)) == blocks - 1
        assert cache.for_clip(blocks).holds(blocks), "training keeps all blocks in one cache"
    for module in (stage2, stage3):
        for variant in ("tiny", "pocket"):
            c = module.get_config(variant)
            assert (c.clip.blocks, c.student.window, c.student.anchors) == (3, 1, 0)


@pytest.mark.parametrize(
    ("changes", "right"),
    [({"window": 7}, 4), ({"window": 4, "anchors": 1}, 3)],
)
def test_a_window_beyond_what_is_trained_is_refused(full_size, changes, right):
    changes = {f"student.{name}": value for name, value in changes.items()}
    (problem,) = problems_of("stage3", full_size, **changes)
    assert "student.window: a stream with" in problem
    assert f"set it to {right}, or train on more blocks" in problem
    checked("stage3", full_size, **changes, **{"student.positions": "absolute"})
    checked("stage3", full_size, **changes, rollout_blocks=9)


def test_clips_too_short_for_any_window_warn(full_size, monkeypatch):
    data = Data(video_frames=4, audio_frames=26)
    monkeypatch.setattr(experiment, "_open_data", lambda config: data)
    with pytest.warns(UserWarning, match="Train on 3 blocks or more"):
        checked("stage2", full_size, **{"clip.blocks": 2})


def test_sample_clips_need_decoders(full_size):
    content = json.loads((full_size / "config.json").read_text())
    content["components"] = ["transformer", "connectors", "video_vae"]
    (full_size / "config.json").write_text(json.dumps(content))
    (problem,) = problems_of("stage3", full_size)
    assert "has no audio_vae, vocoder to decode sample clips with" in problem
    checked("stage3", full_size, sample_every=0, sample_clips=0)


def test_rows_may_be_fewer_than_processes(full_size, monkeypatch):
    """Where tensor and sequence axes span processes, several of them hold the same rows."""
    monkeypatch.setattr(jax, "process_count", lambda: 32)
    checked("stage3", full_size, batch_size=8, **{"mesh.tensor": 2, "mesh.sequence": 2})
    (problem,) = problems_of("stage3", full_size, **{"compute.separate_scores": True})
    assert "1 devices of a process cannot be halved" in problem
    assert "one process per node" in problem and "JAX_LOCAL_DEVICE_IDS" in problem


def test_missing_checkpoint_and_data(tmp_path, full_size, monkeypatch):
    monkeypatch.undo()
    text = "\n".join(problems_of("stage1", full_size, **{"data": str(tmp_path / "none")}))
    assert "launch.encode_prompts creates it" in text
    text = "\n".join(problems_of("stage1", tmp_path / "missing"))
    assert "checkpoint_converters.ltx2" in text


def test_ltx23_needs_one_level_per_clip(full_size, monkeypatch):
    content = json.loads((full_size / "config.json").read_text())
    content |= {"config": synthetic.metadata("full", "2.3"), "model_version": "2.3.0"}
    (full_size / "config.json").write_text(json.dumps(content))
    data = Data(model_version="2.3.0", video_dim=4096, audio_dim=2048, shared_features=False)
    monkeypatch.setattr(experiment, "_open_data", lambda config: data)
    assert any("level_per_block" in problem for problem in problems_of("stage2", full_size))
    e = checked("stage2", full_size, **{"regression.level_per_block": False})
    assert e.student.text_adaln


def test_student_is_built_like_its_source(full_size, tmp_path):
    """A run of another stage, or a student that rotates otherwise than its teacher."""
    run = tmp_path / "run"
    run.mkdir()
    e = checked("stage2", full_size)
    source = dataclasses.replace(e.teacher, rope_type="interleaved", cross_gate_timestep_scale=1.0)
    config = checked("stage1", full_size).run_config()
    config |= {"student_config": dataclasses.asdict(source)}
    (run / "config.json").write_text(json.dumps({"format": 1, "config": config}))
    e = checked("stage2", full_size, generator=str(run))
    assert (e.student.rope_type, e.teacher.rope_type) == ("interleaved", "split")
    assert isinstance(e.student, TransformerConfig)
    config["model_version"] = "2.3.0"
    (run / "config.json").write_text(json.dumps({"format": 1, "config": config}))
    problems = problems_of("stage2", full_size, generator=str(run))
    assert any("student and teacher must be of the same model" in p for p in problems)


def test_a_student_goes_on_as_it_was_trained(full_size, tmp_path):
    """From a causal student, whose new parameters would start anew; not from one of stage I."""
    run = tmp_path / "run"
    run.mkdir()

    def write(stage, **changes):
        e = checked(stage, full_size, **changes)
        config = json.loads(json.dumps(e.run_config()))
        (run / "config.json").write_text(json.dumps({"format": 1, "config": config}))

    other = {"student.num_sinks": 4, "student.sink_rope": "incremental"}
    write("stage2")
    e = checked("stage3", full_size, generator=str(run))
    assert e.student.num_audio_sinks == 16
    write("stage2", **other)
    (problem,) = problems_of("stage3", full_size, generator=str(run))
    assert "student.num_sinks (4 there, 16 here)" in problem
    assert "student.sink_rope (incremental there, identity here)" in problem
    assert "timesteps" not in problem and "layout" not in problem
    changed = config_of("stage3", full_size, generator=str(run))
    experiment.check(changed, 32, allow_config_change=True)
    write("stage1")
    checked("stage2", full_size, generator=str(run), **other)

    # A run, its export and its LoRA say alike what they were trained with.
    write("stage2")
    content = json.loads((run / "config.json").read_text())
    content["config"]["student"]["timesteps"] = [1000.0, 500.0]
    content["config"]["clip"]["layout"] = "merged"
    (run / "config.json").write_text(json.dumps(content))
    trained = run_config.RunConfig.read(run).trained
    content = json.loads((full_size / "config.json").read_text()) | {"trained": trained.to_json()}
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text(json.dumps(content))
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    stored = adapters.StoredAdapters(trained, dict)
    for start, variant in ((run, "19b"), (export, "19b"), (lora, "19b-lora")):
        c = config_of("stage3", full_size, variant, generator=str(start))
        with pytest.raises(ConfigError) as error:
            experiment.check(c, 32, read_lora=lambda *over: stored)
        problems = [text for text in error.value.problems if "was trained with another" in text]
        assert len(problems) == 1, error.value.problems
        assert "clip.layout (merged there, prefix here)" in problems[0]
        assert "student.timesteps ((1000.0, 500.0) there" in problems[0]


def test_a_damaged_source_is_a_problem_among_others(full_size, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for text, message in (
        ('{"format": 1, "config": {"mod', "is not JSON"),
        ('{"format": 1}', "describes something else"),
        (
            '{"format": 1, "config": {"student_config": {}}}',
            "the configuration lacks stage, checkpoint, model_version",
        ),
    ):
        (run / "config.json").write_text(text)
        problems = problems_of("stage2", full_size, generator=str(run), batch_size=33)
        assert any(p.startswith("generator: ") and message in p for p in problems)
        assert any(p.startswith("batch_size: 33") for p in problems)


def test_a_source_from_before_a_setting_existed_had_its_default(full_size, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads(json.dumps(checked("stage2", full_size).run_config()))
    del config["student"]["tanh_gated_attention"], config["compute"]
    (run / "config.json").write_text(json.dumps({"format": 1, "config": config}))
    checked("stage3", full_size, generator=str(run))
    changes = {"student.tanh_gated_attention": True}
    (problem,) = problems_of("stage3", full_size, generator=str(run), **changes)
    assert "student.tanh_gated_attention (False there, True here)" in problem


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_a_run_from_before_a_setting_existed_goes_on(full_size, stage):
    """As f79e63f wrote its config; another value than what it did is a difference."""
    now = checked(stage, full_size).run_config()
    before = run_config.plain(now)
    del before["student"]["schedule"], before["conditions"], before["text_length"]
    run_config.check_config("run/8", before, now)
    now["student"]["schedule"] = "distilled"
    now["conditions"] |= {"t2av": 0.5, "i2av": 0.5}
    with pytest.raises(ValueError) as error:
        run_config.check_config("run/8", before, now)
    message = str(error.value)
    assert "conditions.i2av: 0.0 then, 0.5 now; conditions.t2av: 1.0 then, 0.5 now; " in message
    assert "student.schedule: 'ltx2' then, 'distilled' now; use another" in message
    with pytest.raises(ValueError, match="seed: 'absent' then, 0 now"):
        run_config.check_config("run/8", {n: x for n, x in before.items() if n != "seed"}, before)


def test_what_is_otherwise_than_in_training_is_noted(full_size):
    assert checked("stage1", full_size).notes == ()
    file = full_size / "config.json"
    trained = {"text_length": 48, "height": 256, "width": 768, "frame_rate": 24.0, "frames": 97}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained": trained}))
    e = checked("stage1", full_size)
    assert e.notes == (
        f"otherwise than {full_size} was trained: clip.height 512, not 256; frames of a clip 121, "
        "not 97; text tokens 1024, not 48",
    )
    assert e.run_config()["text_length"] == 1024


def test_settings_of_another_type(full_size):
    c = config_of("stage1", full_size)
    c.batch_size = None
    c.clip = None
    c.keep_every = None
    c.student.timesteps = [1000, 725]
    with pytest.raises(ConfigError) as error:
        experiment.check(c, 1)
    assert sorted(error.value.problems) == [
        "batch_size: must be a whole number below 2**32, not None",
        "clip: must be a group of settings, not None",
    ]


def test_gradients_are_added_up_in_float32_unless_the_config_says_otherwise(full_size):
    e = checked("stage1", full_size)
    assert e.dtype == jnp.bfloat16 and e.model(e.student).rules.reduce_dtype == jnp.float32
    e = checked("stage1", full_size, **{"compute.reduce_dtype": "bfloat16"})
    assert e.model(e.student).rules.reduce_dtype == jnp.bfloat16
    (problem,) = problems_of("stage1", full_size, **{"compute.reduce_dtype": "float16"})
    assert problem.startswith("compute: reduce_dtype must be one of")


def test_settings_go_to_a_tree_and_back():
    for stage, usual in settings.STAGES.items():
        problems = Problems()
        tree = json.loads(json.dumps(parsing.to_dict(usual())))
        assert parsing.parse(tree, problems) == usual()
        assert not problems and tree["stage"] == stage
    with pytest.raises(ConfigError, match="must be one of stage1, stage2, stage3, not 'stage4'"):
        parsing.parse({"stage": "stage4"}, problems)


def test_state_is_described_without_memory(full_size):
    """The 19B train state, with a place for every array."""
    e = checked("stage3", full_size, devices=1)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    state = assembly.abstract_state(e, mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding for x in jax.tree.leaves(state))
    frozen = assembly.abstract_frozen(e, mesh)
    # the negative prompt has gone through the connectors, once for all steps
    shapes = {name: x.shape for name, x in frozen.negative.items()}
    assert shapes == {"video_context": (1, 1024, 3840), "audio_context": (1, 1024, 3840)}
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
