"""Stored ODE trajectories: sampled, killed, continued, read, and handed to stage II."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoint_converters import ltx2
from launch import ode_pairs
from omniforcing_jax import pipeline
from omniforcing_jax.data.given_clips import open_given_clips
from omniforcing_jax.data.ode_pairs import ODEPairsManifest, ODEPairsWriter, Pair, open_ode_pairs
from omniforcing_jax.data.text_dataset import (
    TextDatasetWriter,
    TextManifest,
    grain_batches,
    open_text_dataset,
)
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import LTX20_GUIDANCE, AVGuidance
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import SampleConfig, sample
from omniforcing_jax.streaming import media
from omniforcing_jax.training import ode_pair_sampler
from omniforcing_jax.training.config.settings import RegressionConfig, StageII
from omniforcing_jax.training.objectives.common import TextInput
from omniforcing_jax.training.objectives.ode_regression import ODERegression
from omniforcing_jax.training.ode_pair_sampler import TrajectorySampler
from omniforcing_jax.training.optimizers import OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import create_network, create_state
from omniforcing_jax.training.training_checkpoints import TrainingCheckpoints, load_generator
from tests.training.toy_stage import ToyBatches

LENGTH = 128
PROMPTS = ["a calm sea", "a storm 😀", "fog"]
SHARD = "ode_pairs-train.array_record-{:05d}-of-00002"
# 25 frames are 4 video and 26 audio latents: two prefix blocks, one merged block. Three clips in
# batches of two: the last batch of a shard is filled up.
SMALL = (
    *("--frames", "25", "--height", "64", "--width", "64", "--steps", "4"),
    *("--timesteps", "1000", "900", "400", "--stg-block", "1"),
    *("--batch-size", "2", "--clips-per-shard", "3", "--previews", "1"),
)
REPEATS = ("--repeats", "2")


def write_text(folder, checkpoint, **changes):
    """Random text features for a checkpoint."""
    content = checkpoints.load_config(checkpoint)
    config = ConnectorConfig.from_metadata(checkpoints.component_metadata(content, "connectors"))
    manifest = TextManifest(
        encoder="random",
        tokenizer="none",
        model_version=content["model_version"],
        compute_dtype="float32",
        text_length=LENGTH,
        video_dim=config.video_dim,
        audio_dim=config.audio_dim,
        shared_features=not config.separate_projections,
        negative_prompt="blurry",
        prompts_sha256="none",
        prompts_per_shard=2,
        num_read=len(PROMPTS),
        num_blank=0,
        num_duplicates=0,
        num_prompts=len(PROMPTS),
        num_truncated=0,
    )
    manifest = dataclasses.replace(manifest, **changes)

    def features(prompt):
        rng = np.random.default_rng(len(prompt))
        dims = (manifest.video_dim, manifest.audio_dim)
        arrays = [rng.standard_normal((len(prompt), dim)).astype("bfloat16") for dim in dims]
        return arrays[0], None if manifest.shared_features else arrays[1]

    writer = TextDatasetWriter(folder, manifest)
    writer.begin()
    for shard in range(manifest.num_shards):
        prompts = [PROMPTS[i] for i in manifest.shard_range(shard)]
        writer.write_shard(shard, prompts, map(features, prompts))
    writer.write_negative(features("blurry"))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def text(random_checkpoint, tmp_path_factory):
    """Text features for the tiny LTX-2.0."""
    return write_text(tmp_path_factory.mktemp("text") / "features", random_checkpoint("2.0"))


def options(checkpoint, text, output, *more):
    paths = ("--checkpoint", str(checkpoint), "--text", str(text), "--output", str(output))
    return [*paths, *SMALL, *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def stored(random_checkpoint, text, tmp_path_factory):
    """Six trajectories of the guided teacher, two per prompt, and a preview of the first."""
    output = tmp_path_factory.mktemp("stored") / "pairs"
    assert ode_pairs.main(options(random_checkpoint("2.0"), text, output, *REPEATS)) == 0
    return output


def contexts(checkpoint, batch):
    """Contexts of a batch of stored features."""
    content = checkpoints.load_config(checkpoint)
    config = ConnectorConfig.from_metadata(checkpoints.component_metadata(content, "connectors"))
    params = checkpoints.load_params(checkpoint, "connectors")
    batch = {name: jnp.asarray(batch[name]) for name in ("video_features", "mask")}
    return jax.jit(TextInput(TextConnectors(config)).contexts)(params, batch)


def test_stored_are_the_samplers_states(stored, text, random_checkpoint, random_pipeline):
    """Every clip has its own key and its prompt's text; one batch is sampled again."""
    pairs, prompts = open_ode_pairs(stored), open_text_dataset(text)
    assert len(pairs) == pairs.manifest.num_clips == 6
    assert [pairs.prompt(i) for i in range(6)] == PROMPTS * 2
    for i in range(6):
        element, expected = pairs[i], prompts[i % 3]
        for name in ("video_features", "mask"):
            np.testing.assert_array_equal(element[name], expected[name])
        np.testing.assert_array_equal(element["sigmas"], flow.ltx2_schedule(4)[[0, 1, 2, 4]])
    assert not np.array_equal(pairs[0]["video"][0], pairs[3]["video"][0])

    pipeline, clips = random_pipeline("2.0"), (1, 5)
    guidance = AVGuidance(*(dataclasses.replace(g, stg_blocks=(1,)) for g in LTX20_GUIDANCE))
    recipe = SamplingRecipe.of_steps(4, guidance)
    clip = SampleConfig.for_clip(frames=25, height=64, width=64, recipe=recipe)
    batch = jax.tree.map(lambda *x: np.stack(x), *(pairs[i] for i in clips))
    negative = jax.tree.map(lambda x: x[None], pairs.negative)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.asarray(clips))
    visited = sample(
        pipeline.transformer(),
        pipeline.params["transformer"],
        contexts(random_checkpoint("2.0"), batch),
        contexts(random_checkpoint("2.0"), negative),
        keys,
        clip,
        trajectory=True,
    )
    for name in ("video", "audio"):
        x = np.moveaxis(np.asarray(getattr(visited, name)), 0, 1)  # [B, N + 1, T, C]
        slopes = np.diff(x, axis=1) / np.diff(flow.ltx2_schedule(4))[:, None, None]
        for found, expected in (
            (batch[name], x[:, [0, 1, 2, 4]]),
            (batch[f"{name}_velocity"], slopes[:, [0, 1, 2]]),
        ):
            assert found.dtype == ml_dtypes.bfloat16
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                found.astype(np.float32) / scale, expected / scale, rtol=2**-8, atol=1e-4
            )


def test_preview(stored):
    assert sorted(path.name for path in (stored / "previews").iterdir()) == [
        "clip_00000.mp4",
        "clip_00000.png",
    ]
    frames, rate, waveform, _ = media.read_clip(stored / "previews" / "clip_00000.mp4")
    assert frames.shape == (25, 64, 64, 3) and rate == 24 and len(waveform)


def test_interrupted_and_continued(stored, random_checkpoint, text, tmp_path, monkeypatch, capsys):
    """The third batch never comes; then the rest, and the same files."""
    output = tmp_path / "pairs"
    arguments = options(random_checkpoint("2.0"), text, output, *REPEATS, "--previews", "0")
    sampled, real = [], TrajectorySampler.__call__

    def interrupted(self, clips):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.append(list(clips))
        return real(self, clips)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectorySampler, "__call__", interrupted)
        assert ode_pairs.main(arguments) == 130
    assert sampled == [[0, 1], [2, 2], [3, 4]]
    assert "the same command continues" in capsys.readouterr().err
    assert sorted(contents(output)) == ["manifest.json", "negative.safetensors", SHARD.format(0)]
    with pytest.raises(ValueError, match=r"not complete; run launch\.ode_pairs"):
        open_ode_pairs(output)
    (output / f".{SHARD.format(1)}.new").write_bytes(b"half a shard")

    monkeypatch.setattr(  # complete shards are not sampled again
        TrajectorySampler,
        "__call__",
        lambda self, clips: real(self, clips) if clips[0] > 2 else pytest.fail("sampled again"),
    )
    assert ode_pairs.main(arguments) == 0
    assert contents(output) == contents(stored)
    assert "3 of 3 clips" in capsys.readouterr().err
    assert ode_pairs.main(arguments) == 0
    assert "complete already" in capsys.readouterr().err


def test_other_settings_do_not_mix(stored, random_checkpoint, text, monkeypatch, capsys):
    before = contents(stored)
    arguments = options(random_checkpoint("2.0"), text, stored, *REPEATS)
    with monkeypatch.context() as patch:
        patch.setattr(ode_pairs, "TrajectorySampler", lambda *a, **k: pytest.fail("weights"))
        for more, message in [
            (["--seed", "1"], "seed 0 instead of 1"),
            (["--cfg-video", "2"], "guidance {'video': {'cfg': 3.0,"),
            (["--repeats", "1"], "repeats 2 instead of 1"),
            (["--timesteps", "1000", "400"], "sigmas [1.0,"),
        ]:
            assert ode_pairs.main([*arguments, *more]) == 2
            assert message in capsys.readouterr().err

    def other_weights(*args, **kwargs):
        return jax.tree.map(lambda x: x * 1.01, load_generator(*args, **kwargs))

    monkeypatch.setattr(ode_pair_sampler, "load_generator", other_weights)
    assert ode_pairs.main(arguments) == 2
    assert "generator '" in capsys.readouterr().err
    assert contents(stored) == before


def test_plan_reads_no_weights(random_checkpoint, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ode_pairs, "TrajectorySampler", lambda *a, **k: pytest.fail("weights"))
    arguments = options(random_checkpoint("2.0"), text, tmp_path / "pairs", *REPEATS, "--plan")
    assert ode_pairs.main(arguments) == 0
    report = capsys.readouterr().err
    assert "6 clips (3 prompts x 2), 2 shards" in report
    assert "4 steps of cond, uncond, perturbed, isolated" in report
    assert "16 forward passes" in report and "sigma 1, 0.8671, 0.6316, 0" in report
    assert ode_pairs.main([*arguments, *BLOCKWISE, "--generator", arguments[1]]) == 0
    # two blocks of four steps and the pass that writes the history, with and without the prompt
    assert "20 forward passes" in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()


def test_a_distilled_model_as_the_generator(random_checkpoint, text, tmp_path, capsys, monkeypatch):
    """Its own eight levels without guidance; states at those of a student that starts from it."""
    base, generator = random_checkpoint("2.0"), tmp_path / "distilled"
    some = ("transformer", "connectors")
    ltx2.convert(base.parent / "tiny.safetensors", generator, recipe="distilled", components=some)
    arguments = [
        "--text",
        str(text),
        "--checkpoint",
        str(base),
        "--output",
        str(tmp_path / "pairs"),
    ]
    arguments += ["--frames", "25", "--height", "64", "--width", "64", "--plan"]
    assert ode_pairs.main([*arguments, "--generator", str(generator)]) == 0
    report = capsys.readouterr().err
    assert "in 8 steps of cond\n" in report
    assert "sigma 1, 0.9094, 0.725, 0.4219, 0" in report
    assert "ancestral" not in report
    monkeypatch.setattr(pipeline, "is_ancestral", lambda *_: True)  # as the distilled 2.5
    assert ode_pairs.main([*arguments, "--generator", str(generator)]) == 0
    assert "without the fresh noise of its own ancestral steps" in capsys.readouterr().err


BLOCKWISE = ("--autoregressive", "--layout", "prefix", "--cfg-video", "2", "--cfg-audio", "3")


@pytest.fixture(scope="module")
def run(random_checkpoint, tmp_path_factory):
    """A run of stage II whose student has sinks; its average is half its weights."""
    base, folder = random_checkpoint("2.0"), tmp_path_factory.mktemp("run") / "stage2"
    params = checkpoints.load_params(base, "transformer", dtype=jnp.float32)
    params["audio_sinks"] = jnp.full((2, params["audio_in"]["bias"].shape[0]), 0.25)
    network = create_network(params, make_optimizer(OptimizerConfig(1e-4)), ema=True)
    network = network.replace(ema=jax.tree.map(lambda p: 0.9 * p, params))
    student = dataclasses.replace(
        PipelineConfig.from_checkpoint(base).transformer, num_audio_sinks=2
    )
    config = {
        "stage": "stage2",
        "checkpoint": str(base),
        "clip": {"layout": "prefix", "height": 64, "width": 64, "frame_rate": 24.0, "blocks": 2},
        "student": {
            "timesteps": [1000, 725],
            "window": 1,
            "anchors": 0,
            "positions": "relative",
            "context_noise": 0.0,
        },
        "model_version": "2.0.0",
        "student_config": dataclasses.asdict(student),
    }
    with TrainingCheckpoints(folder) as saved:
        saved.save(3, create_state(network), ToyBatches(), config, {})
    (folder / "config.json").write_text(json.dumps({"format": 1, "config": config}))
    return folder


def test_of_an_autoregressive_run(run, random_checkpoint, text, stored, tmp_path, capsys):
    """Block after block, guided by the negative prompt; layout and window are the run's."""
    output = tmp_path / "pairs"
    arguments = options(random_checkpoint("2.0"), text, output, "--generator", str(run))
    assert ode_pairs.main(arguments) == 2
    assert "is block-causal (layout 'prefix'): add --autoregressive" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.json").write_text(json.dumps({"config": {"stage": "stage2"}}))
    assert ode_pairs.main([*arguments, "--generator", str(copy)]) == 2
    assert (
        "lacks checkpoint, model_version, clip, student, student_config" in capsys.readouterr().err
    )
    noisy = json.loads((run / "config.json").read_text())
    noisy["config"]["student"]["context_noise"] = 0.1
    (copy / "config.json").write_text(json.dumps(noisy))
    assert ode_pairs.main([*arguments, "--autoregressive", "--generator", str(copy)]) == 2
    assert "context_noise must be 0, not 0.1" in capsys.readouterr().err
    arguments += ["--autoregressive", "--cfg-video", "2", "--clips-per-shard", "1"]
    assert ode_pairs.main([*arguments, "--batch-size", "1", "--previews", "0"]) == 0
    assert "sampled in 2 blocks in 4 steps of cond, uncond" in capsys.readouterr().err
    pairs, bidirectional = open_ode_pairs(output), open_ode_pairs(stored)
    assert pairs.manifest.autoregression == {
        "layout": "prefix",
        "window": 1,
        "anchor_blocks": 0,
        "positions": "relative",
    }
    assert len(pairs) == 3 and not (output / "previews").exists()
    for i in range(3):
        for name in ("video", "audio"):
            found, other = pairs[i][name], bidirectional[i][name]
            np.testing.assert_array_equal(found[0], other[0])  # the same noise
            assert not np.allclose(found[-1].astype(float), other[-1].astype(float), atol=0.1)


def stage_two(checkpoint, manifest, **changes):
    """Stage II for these trajectories."""
    pipeline = PipelineConfig.from_checkpoint(checkpoint)
    layout = pipeline.layout("prefix")
    rollout = RolloutConfig(
        CacheConfig(layout), manifest.sigmas, height=manifest.height, width=manifest.width
    )
    return ODERegression(
        model=Transformer(pipeline.transformer),
        rollout=rollout,
        num_blocks=2,
        text=TextInput(),
        optimizer=make_optimizer(OptimizerConfig(1e-4)),
        config=StageII(regression=RegressionConfig(**changes)),
    )


@pytest.mark.parametrize("objective", ["velocity", "x0"])
def test_batches_are_what_stage_two_takes(stored, random_checkpoint, objective):
    pairs = open_ode_pairs(stored)
    batch = next(iter(grain_batches(pairs, 2, seed=1)))
    assert {name: (x.shape[1:], x.dtype.name) for name, x in batch.items()} == {
        "video": ((4, 16, 8), "bfloat16"),
        "audio": ((4, 26, 32), "bfloat16"),
        "video_velocity": ((3, 16, 8), "bfloat16"),
        "audio_velocity": ((3, 26, 32), "bfloat16"),
        "sigmas": ((4,), "float32"),
        "video_features": ((LENGTH, 32), "bfloat16"),
        "mask": ((LENGTH,), "bool"),
    }
    video, audio = contexts(random_checkpoint("2.0"), batch)
    assert video.shape == audio.shape == (2, LENGTH, 32)
    assert set(pairs.negative) == {"video_features", "mask"} and pairs.negative["mask"].sum() == 6
    stage = stage_two(
        random_checkpoint("2.0"), pairs.manifest, objective=objective, level_per_block=False
    )
    keys = jax.random.split(jax.random.key(2), 2)
    task = jax.jit(stage.task)({name: jnp.asarray(x) for name, x in batch.items()}, keys)
    for row in range(2):
        (state,) = np.flatnonzero(batch["sigmas"][row] == np.asarray(task.sigma[row, 0]))
        np.testing.assert_array_equal(task.noisy.audio[row], batch["audio"][row, state])
        velocity = batch["video_velocity"][row, min(state, 2)]
        target = velocity if objective == "velocity" else batch["video"][row, -1]
        np.testing.assert_array_equal(task.target.video[row], target)


def test_records_of_separate_features(tmp_path):
    """LTX-2.3 stores text features for each stream; wrong arrays are refused."""
    manifest = dataclasses.replace(MANIFEST, shared_features=False, audio_dim=4)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    text = {"video_features": draw(5, 6), "audio_features": draw(5, 4)}
    states = {"video": draw(3, 8, 2), "audio": draw(3, 5, 7)}
    velocities = {"video": draw(2, 8, 2), "audio": draw(2, 5, 7)}
    pair = Pair("fog", text, states, velocities)
    writer = ODEPairsWriter(tmp_path / "pairs", manifest)
    writer.begin()
    for wrong, message in [
        ({"states": states | {"video": draw(3, 8, 3)}}, r"video of clip 0 \('fog'\) .*\[3, 8, 3\]"),
        ({"velocities": {k: x.astype(float) for k, x in velocities.items()}}, "is float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write_shard(0, [dataclasses.replace(pair, **wrong)])
    with pytest.raises(ValueError, match="holds 1 clips, not 2"):
        writer.write_shard(0, [pair, pair])
    assert writer.missing() == [0]
    writer.write_shard(0, [pair])
    writer.write_negative_arrays(text)
    writer.finish()
    pairs = open_ode_pairs(tmp_path / "pairs")
    assert pairs.manifest == manifest
    for name, x in (states | text).items():
        np.testing.assert_array_equal(pairs[0][name][-len(x) :], x)
    np.testing.assert_array_equal(pairs[0]["mask"], np.arange(16) >= 11)
    with pytest.raises(ValueError, match="not the manifest of text features"):
        open_text_dataset(tmp_path / "pairs")
    clip = open_given_clips(tmp_path / "pairs")[0]
    np.testing.assert_array_equal(clip["video"], states["video"][-1])
    assert clip.keys() == {"video", "audio", "video_features", "audio_features", "mask"}


@pytest.mark.slow
def test_what_was_given_is_recorded(random_checkpoint, text, tmp_path):
    """Given latents are the same in all states, and have no velocity; stage II reads the masks."""
    output = tmp_path / "pairs"
    more = ["--conditions", "a2v=0.5", "extend=0.5", "--layout", "prefix", *REPEATS]
    assert ode_pairs.main(options(random_checkpoint("2.0"), text, output, *more)) == 0
    pairs = open_ode_pairs(output)
    assert pairs.manifest.conditions["a2v"] == pairs.manifest.conditions["extend"] == 0.5
    shares = set()
    for pair in (pairs[i] for i in range(len(pairs))):
        shares.add(float(pair["audio_mask"].mean()))
        for name in ("video", "audio"):
            mask, states = pair[f"{name}_mask"], pair[name].astype(np.float32)
            given = np.repeat(mask == 0, states.shape[1] // len(mask))
            np.testing.assert_array_equal(states[:-1, given], states[1:, given])
            assert not pair[f"{name}_velocity"].astype(np.float32)[:, given].any()
            assert given.all() or (states[0] != states[-1])[~given].mean() > 0.9
    assert 0.0 in shares and len(shares) > 1
    clips = open_given_clips(output)
    np.testing.assert_array_equal(clips[1]["video"], pairs[1]["video"][-1])
    assert clips[1].keys() == {"video", "audio", "video_features", "mask"}


MANIFEST = ODEPairsManifest(
    generator="g",
    text="t",
    model_version="2.3.0",
    compute_dtype="float32",
    guidance={},
    autoregression=None,
    schedule=(1.0, 0.5, 0.25, 0.0),
    sigmas=(1.0, 0.25, 0.0),
    frames=9,
    resolution=(64, 64),
    frame_rate=24.0,
    video_frames=2,
    audio_frames=5,
    height=2,
    width=2,
    video_channels=2,
    audio_channels=7,
    text_length=16,
    video_dim=6,
    audio_dim=6,
    shared_features=True,
    negative_prompt="",
    seed=0,
    num_prompts=1,
    repeats=1,
    clips_per_shard=8,
)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--text", "nowhere"], "nowhere does not exist; python -m launch.encode_prompts"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--generator", "nowhere"], "nowhere does not exist"),
        (["--output", "."], "holds other files"),
        (["--frames", "24"], "8k + 1 frames, not 24; nearest: 17 or 25"),
        (["--frames", "33", "--layout", "prefix"], "layout 'prefix'; nearest: 25 or 49"),
        (["--frames", "9", "--layout", "merged"], "layout 'merged'; nearest: 25 or 49"),
        (["--fps", "120", "--layout", "prefix"], "have 6; use another --fps"),
        (["--height", "32"], "latents"),
        (["--timesteps", "900", "400"], "first stored state must be the noise"),
        (["--timesteps", "1000", "990"], "pick different entries"),
        (["--stg-block", "29"], "stg_blocks (29,) are for a larger model"),
        (["--batch-size", "0"], "--batch-size must be a positive multiple of the 1 devices"),
        (["--repeats", "0"], "repeats must be a whole number, at least 1"),
        (["--previews", "-1"], "--previews must be 0 or more"),
        (["--weights", "ema"], "is a converted checkpoint and has no moving average"),
        (["--autoregressive"], "--autoregressive needs --generator"),
        (["--autoregressive", "--generator", "ltx2"], "give --layout prefix or merged"),
        ([*BLOCKWISE, "--generator", "ltx2", "--stg", "1"], "set stg to 0 and modality to 1"),
        (["--conditions", "t2av=1"], "--conditions needs --layout prefix or merged"),
        (["--conditions", "talk=1", "--layout", "prefix"], "there is no mode 'talk'; there are"),
        (["--conditions", "i2av=x", "--layout", "prefix"], "'i2av=x' is not MODE=SHARE"),
        (["--conditions", "i2av=.5", "--layout", "prefix"], "must be 0 or more and sum to 1"),
        (["--text", "newer"], "model_version ['2', '3'] instead of ['2', '0']"),
        (["--text", "short"], "have 64 tokens, which must be a multiple of the connectors' 128"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    random_checkpoint, text, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ode_pairs, "TrajectorySampler", lambda *a, **k: pytest.fail("weights"))
    checkpoint = random_checkpoint("2.0")
    (tmp_path / "ltx2").symlink_to(checkpoint)
    if "newer" in more:
        write_text(tmp_path / "newer", checkpoint, model_version="2.3.0")
    if "short" in more:
        write_text(tmp_path / "short", checkpoint, text_length=64)
    assert ode_pairs.main(options(checkpoint, text, tmp_path / "pairs", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()
