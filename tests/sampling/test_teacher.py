"""The teacher's sampler against a plain loop of separate forward passes, and its edges."""

import dataclasses
import functools
import json
import sys
import wave

import av
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from launch import sample_teacher
from omniforcing_jax.geometry import audio_frames_for, draw_noise
from omniforcing_jax.io import media_files
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Modality, Pathways, Transformer
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.guidance import (
    LTX20_GUIDANCE,
    LTX23_GUIDANCE,
    NO_GUIDANCE,
    AVGuidance,
    Guidance,
)
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig, sample
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.streaming import media
from omniforcing_jax.text.features import prompt_key, random_text_features, save_text_features
from omniforcing_jax.types import AVLatents
from tests.tiny_model import LTX23_CHANGES, random_contexts, random_params

STREAMS = ("video", "audio")
V20 = tiny()
V23 = tiny(**LTX23_CHANGES)
# The two streams need different passes and different blocks.
GUIDANCE = AVGuidance(
    video=Guidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,)),
    audio=Guidance(cfg=7.0, stg=0.5, modality=2.0, rescale=0.0, stg_blocks=(0, 1)),
)
STEPS = 3


def clip(guidance=GUIDANCE, num_steps=STEPS) -> SampleConfig:
    return SampleConfig.for_clip(
        frames=17, height=32, width=64, recipe=SamplingRecipe.of_steps(num_steps, guidance)
    )


@pytest.fixture(scope="module")
def v20():
    return Transformer(V20), random_params(V20)


@pytest.fixture(scope="module")
def v23():
    return Transformer(V23), random_params(V23)


def contexts(config, seed: int, length: int = 5) -> Prompt:
    return Prompt(*random_contexts(config, length=length, seed=seed), jnp.ones((1, length), bool))


@functools.partial(jax.jit, static_argnames="model")
def network(model, params, latents, tokens_sigma, sigma, tables, text, keep):
    """One forward pass of one sample; every stream is {name: array without batch axis}."""
    streams = (
        Modality(
            latents[s][None],
            tokens_sigma[s][None],
            *tables[s],
            context=context,
            context_mask=text.mask,
            global_sigma=sigma[s][None],
        )
        for s, context in zip(STREAMS, text[:2], strict=True)
    )
    (video, audio), _ = model.apply({"params": params}, *streams, keep=keep)
    return {"video": video[0], "audio": audio[0]}


def plain_sampler(model, params, prompt, negative, noise, config, clean=None, mask=None):
    """The sampler as its equations read: one sample, one pass at a time, one sigma per token."""
    layers = model.config.num_layers
    rope = config.clip.rope(model)
    frames, audio_frames = np.arange(config.clip.video_frames), np.arange(config.clip.audio_frames)
    tables = {
        "video": (rope.video_rope(frames), rope.video_cross_rope(frames)),
        "audio": (rope.audio_rope(audio_frames), rope.audio_cross_rope(audio_frames)),
    }
    if mask is None:
        mask = {s: np.ones(len(noise[s]), np.float32) for s in STREAMS}
        clean = {s: np.zeros_like(noise[s]) for s in STREAMS}

    def keep(skipped):  # {pathway: blocks}
        rows = {name: np.ones((layers, 1), np.float32) for name in ("video", "audio", "a2v", "v2a")}
        for name, blocks in skipped.items():
            rows[name][list(blocks)] = 0.0
        return Pathways(**rows)

    passes = {
        "cond": (prompt, {}),
        "uncond": (negative, {}),
        "perturbed": (
            prompt,
            {s: getattr(config.guidance, s).stg_blocks for s in STREAMS if mask[s].any()},
        ),
        "isolated": (prompt, {"a2v": range(layers), "v2a": range(layers)}),
    }
    weight = {s: mask[s][:, None] for s in STREAMS}
    x = {s: (1 - weight[s]) * clean[s] + weight[s] * noise[s] for s in STREAMS}
    for sigma, sigma_next in zip(config.sigmas[:-1], config.sigmas[1:], strict=False):
        tokens_sigma = {s: np.float32(sigma) * mask[s] for s in STREAMS}
        own_sigma = {s: np.float32(sigma if mask[s].any() else 0.0) for s in STREAMS}
        x0 = {s: {} for s in STREAMS}
        for name, (text, skipped) in passes.items():
            text = text or prompt
            velocity = network(
                model, params, x, tokens_sigma, own_sigma, tables, text, keep(skipped)
            )
            for s in STREAMS:
                x0[s][name] = x[s] - tokens_sigma[s][:, None] * np.asarray(velocity[s])
        for s in STREAMS:
            c, scales = x0[s]["cond"], getattr(config.guidance, s)
            guided = c + (scales.cfg - 1) * (c - x0[s]["uncond"])
            guided = guided + scales.stg * (c - x0[s]["perturbed"])
            guided = guided + (scales.modality - 1) * (c - x0[s]["isolated"])
            ratio = c.std(ddof=1) / guided.std(ddof=1)
            guided = guided * (scales.rescale * ratio + 1 - scales.rescale)
            guided = guided * weight[s] + clean[s] * (1 - weight[s])
            x[s] = x[s] + (sigma_next - sigma) * (x[s] - guided) / sigma
    return x


def as_dict(latents: AVLatents, index: int = 0) -> dict[str, np.ndarray]:
    return {s: np.asarray(getattr(latents, s)[index]) for s in STREAMS}


def assert_close(sampled: AVLatents, expected: dict, index: int = 0, atol: float = 1e-4):
    for stream, values in as_dict(sampled, index).items():
        scale = np.abs(expected[stream]).max()
        assert np.isfinite(values).all() and scale > 0.1
        np.testing.assert_allclose(values / scale, expected[stream] / scale, atol=atol)


@pytest.mark.parametrize("version", ["v20", "v23"])
def test_equals_a_plain_loop(version, request):
    """Two prompts in one batch, each against its own single-pass loop; 2.3 with masked text."""
    model, params = request.getfixturevalue(version)
    config = clip()
    prompts = [contexts(model.config, seed) for seed in (1, 2)]
    negative = contexts(model.config, 3)._replace(mask=None)
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *prompts)
    if version == "v20":
        batch = batch[:2]  # without a mask, a plain tuple
    else:  # the last two tokens of the first prompt are padding: whatever stands there
        prompts[0] = prompts[0]._replace(mask=jnp.arange(5)[None] < 3)
        video, audio = (x.at[0, 3:].set(9.0) for x in batch[:2])
        batch = Prompt(video, audio, jnp.concatenate([p.mask for p in prompts]))
    keys = jax.random.split(jax.random.key(3), 2)
    sampled = sample(model, params, batch, negative, keys, config)
    assert sampled.video.shape == (2, 6, 4) and sampled.audio.shape == (2, 18, 6)
    assert sampled.video.dtype == sampled.audio.dtype == jnp.float32
    noise = draw_noise(keys, config.clip, model)
    negative = contexts(model.config, 3)
    for i, prompt in enumerate(prompts):
        start = as_dict(noise, i)
        expected = plain_sampler(model, params, prompt, negative, start, config)
        assert_close(sampled, expected, i)


def test_conditioning(v23):
    """The first frame kept; it and the sound loosely kept; the sound kept as a whole."""
    model, params = v23
    config = clip()
    prompt, negative = (contexts(model.config, seed) for seed in (1, 3))
    rng = np.random.default_rng(2)
    image = jnp.asarray(rng.normal(size=(1, 1, 1, 2, 4)), jnp.float32)
    sound = jnp.asarray(rng.normal(size=(1, 18, 6)), jnp.float32)
    key = jax.random.key(5)
    noise = as_dict(draw_noise(jax.random.fold_in(key, 0)[None], config.clip, model))
    for case, strength in (("kept", 1.0), ("loose", 0.6), ("sound", 0.0)):
        given = Condition.given(config.clip, model, video=image, strength=strength)
        if case != "kept":
            audio = jnp.full((1, 18), 0.5 if case == "loose" else 0.0)
            given = Condition.of_clip(
                given.clean.replace(audio=sound), given.mask.replace(audio=audio)
            )
        sampled = sample(model, params, prompt, negative, key, config, condition=given)
        by_token = {
            "video": np.repeat(np.asarray(given.mask.video[0]), config.clip.patches),
            "audio": np.asarray(given.mask.audio[0]),
        }
        expected = plain_sampler(
            model, params, prompt, negative, noise, config, as_dict(given.clean), by_token
        )
        assert_close(sampled, expected)
        assert np.array_equal(sampled.video[:, :2], image[:, 0, 0]) == (case == "kept")
        assert np.array_equal(sampled.audio, sound) == (case == "sound")


def test_trajectory_without_guidance_runs_one_pass(v20):
    model, params = v20
    config = clip(NO_GUIDANCE)
    prompt = contexts(model.config, 1)
    rows = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, Transformer) and context.method_name == "__call__":
            rows.append(args[0].latents.shape[0])
        return next_function(*args, **kwargs)

    key = jax.random.key(3)
    with nn.intercept_methods(record):
        visited = sample(model, params, prompt, None, key, config, trajectory=True)
    assert rows == [1]
    noise = draw_noise(jax.random.fold_in(key, 0)[None], config.clip, model)
    np.testing.assert_array_equal(visited.video[0], noise.video)
    np.testing.assert_array_equal(visited.audio[0], noise.audio)
    assert visited.video.shape == (STEPS + 1, 1, 6, 4)
    expected = plain_sampler(model, params, prompt, None, as_dict(noise), config)
    assert_close(jax.tree.map(lambda x: x[-1], visited), expected)

    key = jax.random.key(3)
    again = sample(model, params, prompt, None, key, config, trajectory=True)
    np.testing.assert_array_equal(visited.video, again.video)
    np.testing.assert_array_equal(visited.audio, again.audio)
    key = jax.random.key(4)
    other = sample(model, params, prompt, None, key, config, trajectory=True)
    assert not np.allclose(visited.video[-1], other.video[-1], atol=1e-2)


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    model, config = Transformer(V20), clip()
    keys = jax.random.split(jax.random.key(0), 2)
    batch, single = (draw_noise(k, config.clip, model) for k in (keys, keys[1:2]))
    np.testing.assert_array_equal(batch.video[1:2], single.video)
    np.testing.assert_array_equal(batch.audio[1:2], single.audio)
    assert not np.allclose(batch.video[0], batch.video[1], atol=0.1)


def test_clip_sizes():
    recipe = SamplingRecipe.of_steps(40)
    config = SampleConfig.for_clip(frames=121, height=512, width=768, recipe=recipe)
    assert (config.clip.video_frames, config.clip.height, config.clip.width) == (16, 16, 24)
    assert (config.clip.audio_frames, config.clip.video_tokens) == (126, 6144)
    np.testing.assert_array_equal(config.sigmas, flow.ltx2_schedule(40, 4096))
    assert config.guidance == NO_GUIDANCE
    assert [audio_frames_for(121, fps) for fps in (24, 25, 30)] == [126, 121, 101]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": 120}, r"8k \+ 1 frames, not 120; nearest: 113 or 121"),
        ({"frames": 0}, "nearest: 1 or 9"),
        ({"height": 500}, "positive multiples of 32 pixels, not 500x64"),
        ({"width": 0}, "positive multiples of 32 pixels, not 64x0"),
        ({"frame_rate": 0.0}, "must be positive"),
        ({"frames": 1, "frame_rate": 120.0}, "too short for sound"),
    ],
)
def test_bad_clips(changes, message):
    with pytest.raises(ValueError, match=message):
        size = {"frames": 17, "height": 64, "width": 64}
        SampleConfig.for_clip(recipe=SamplingRecipe.of_steps(2), **(size | changes))


def test_sampling_starts_from_noise():
    with pytest.raises(ValueError, match=r"sigmas\[0\] must be 1, not 0.5; only an initial clip"):
        bad_input(config=dataclasses.replace(clip(), recipe=SamplingRecipe((0.5, 0.0), GUIDANCE)))()
    with pytest.raises(ValueError, match="audio_frames must be positive"):
        dataclasses.replace(clip().clip, audio_frames=0)


def bad_input(**changes):
    """Arguments of `sample` with no parameters: all checks come before they are touched."""
    model = Transformer(V20)
    arguments = {
        "prompt": contexts(V20, 2),
        "negative": contexts(V20, 3),
        "key": jax.random.key(0),
        "config": clip(),
    }
    return lambda: sample(model, None, **(arguments | changes))


def condition(clean=None, **mask):
    latents = AVLatents(jnp.zeros((1, 6, 4)), jnp.zeros((1, 18, 6)))
    weights = {"video": jnp.ones((1, 3)), "audio": jnp.ones((1, 1))} | mask
    return {"condition": Condition.of_clip(clean or latents, AVLatents(**weights))}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": clip(LTX20_GUIDANCE)}, r"video guidance: stg_blocks \(29,\) .* blocks 0 to 1"),
        ({"negative": None}, r"cfg 3 \(video\) and 7 \(audio\) need a negative prompt"),
        ({"config": clip(NO_GUIDANCE)}, "do not use the negative prompt"),
        ({"prompt": contexts(V23, 2)}, r"prompt's contexts are \[1, 5, 32\].*\[1, 5, 12\]"),
        ({"negative": contexts(V20, 4, 4)}, r"negative prompt's contexts .*take \[1, 5, 12\]"),
        (
            {"prompt": contexts(V20, 2)._replace(mask=jnp.ones((1, 4), bool))},
            r"prompt's mask is \[1, 4\]; expected \[1, 5\]",
        ),
        ({"key": jnp.zeros(2, jnp.uint32)}, "one key of `jax.random.key`"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "or 1, one per sample"),
        (condition(video=jnp.ones((1, 4))), r"mask video must be \[1 or 1, frames\], not \[1, 4\]"),
        (condition(audio=jnp.full((1, 1), 255)), r"mask audio must lie in \[0, 1\]"),
        (
            condition(clean=AVLatents(jnp.zeros((1, 5, 4)), jnp.zeros((1, 18, 6)))),
            r"clean video must be \[1, 6, 4\], not \[1, 5, 4\]",
        ),
        (
            {"initial": AVLatents(jnp.zeros((1, 5, 4)), jnp.zeros((1, 18, 6)))},
            r"the initial clip: video must be \[1, 6, 4\], not \[1, 5, 4\]",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        bad_input(**changes)()


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint):
    return random_checkpoint("2.0")


SMALL = ["--frames", "9", "--height", "64", "--width", "96", "--steps", "2"]


def run_script(checkpoint, output, *options):
    return sample_teacher.main(
        ["--checkpoint", str(checkpoint), "--output", str(output), *SMALL, *options]
    )


def test_script(checkpoint, random_gemma, tmp_path, capsys):
    """From converted weights and sentences to a clip, with all passes."""
    output = tmp_path / "clips" / "teacher.mp4"
    options = ["--text-encoder", str(random_gemma), "--prompt-cache", str(tmp_path / "cache")]
    options += ["--prompt", "a dog barks", "--negative-prompt", "noise", "--stg-block", "1"]
    assert run_script(checkpoint, output, *options) == 0
    assert "2 encoded, 0 from the cache" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 2
    frames, frame_rate, waveform, sample_rate = media.read_clip(output)
    assert frames.shape == (9, 64, 96, 3) and frame_rate == 24
    assert sample_rate == 24000 and abs(len(waveform) / sample_rate - 9 / 24) < 0.1
    assert frames.std() > 1 and waveform.std() > 1e-4


def test_script_that_is_interrupted(checkpoint, tmp_path, capsys, monkeypatch):
    """Ctrl-C ends it as it ends the streaming program: one line, status 130, no file."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_teacher, "sample", interrupted)
    options = ["--random-features", "--stg-block", "1"]
    assert run_script(checkpoint, tmp_path / "clip.mp4", *options) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def given_files(tmp_path_factory):
    """A picture, a sound of half a second, and a film of 17 frames with sound and one without."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / "face.png")
    Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).save(folder / "small.png")
    tone = np.sin(2 * np.pi * 440 * np.arange(12000) / 24000).astype(np.float32)[:, None] * 0.5
    tone = np.repeat(tone, 2, axis=1)
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setparams((2, 2, 24000, 0, "NONE", ""))
        file.writeframes((tone * 32767).astype(np.int16).tobytes())
    frames = rng.integers(0, 256, (17, 64, 96, 3), np.uint8)
    with media.ClipWriter(
        folder / "film.mp4", width=96, height=64, frame_rate=24.0, sample_rate=24000
    ) as writer:
        writer.write(frames, tone)
    with av.open(str(folder / "silent.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, width=96, height=64)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    return folder


UNGUIDED = [
    "--cfg-video",
    "1",
    "--cfg-audio",
    "1",
    "--stg",
    "0",
    "--modality",
    "1",
    "--rescale",
    "0",
]


@pytest.mark.parametrize(
    "options, mode",
    [
        (["--image", "face.png", "--audio", "tone.wav", "--keyframe", "face.png", "8"], "ia2v"),
        pytest.param(["--video", "silent.mp4", "--foley"], "v2a", marks=pytest.mark.slow),
        pytest.param(
            ["--video", "film.mp4", "--extend", "--reference", "tone.wav", "--frames", "25"],
            "extend", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_script_with_files(checkpoint, given_files, tmp_path, capsys, options, mode):
    """What is given comes out as it went in: the tone of the file, not what the vocoder makes."""
    options = [str(given_files / o) if o[-4:-3] == "." else o for o in options]
    output = tmp_path / "clip.mp4"
    more = ["--random-features", *UNGUIDED, *options]
    assert run_script(checkpoint, output, *more) == 0
    assert f"encoding what is given ({mode})" in capsys.readouterr().err
    frames, _, waveform, rate = media.read_clip(output)
    assert len(frames) == (25 if mode == "extend" else 9)
    if mode == "ia2v":
        spectrum = np.abs(np.fft.rfft(waveform[: rate // 4, 0]))
        assert np.argmax(spectrum) * 4 == 440
    if mode == "v2a":
        film = media_files.read_video(given_files / "silent.mp4", 24.0, 64, 96, 9)
        assert np.abs(frames / 127.5 - 1 - film).mean() < 0.1


def test_script_refuses_files(checkpoint, given_files, tmp_path, capsys, monkeypatch):
    """Before a weight is read, in words that say what would be right."""

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(sample_teacher, "load_pipeline", no_weights)
    monkeypatch.setattr(sample_teacher.given_files, "load_encoders", no_weights)
    cases = [
        (["--image", "none.png"], "none.png"),
        (["--image", "small.png"], "small.png is too small: it has 12x8 pixels"),
        (["--audio", "silent.mp4"], "has no sound: there is no audio track in it"),
        (["--video", "film.mp4"], "goes with either --extend (go on from it) or --foley"),
        (["--foley"], "--foley needs --video FILM"),
        (["--video", "silent.mp4", "--extend"], "make a sound for it first, with --foley"),
        (["--video", "film.mp4", "--extend"], "the clip includes the film and has to be longer"),
        (["--video", "film.mp4", "--foley", "--frames", "25"], "is too short: 0.71 s"),
        (["--video", "film.mp4", "--foley", "--image", "face.png"], "leave out --image"),
        (["--keyframe", "face.png", "9"], "a frame from 0 to 8, not 9"),
        (["--strength", "0.5"], "of which there is none"),
        (["--audio", "tone.wav", "--reference", "tone.wav"], "nothing to say in the --reference"),
    ]
    for options, message in cases:
        options = [
            str(given_files / o) if o.endswith(("png", "wav", "mp4")) else o for o in options
        ]
        output = tmp_path / "clip.mp4"
        more = ["--random-features", *UNGUIDED, *options]
        assert run_script(checkpoint, output, *more) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()


def stored(folder, name, config, prompts=1):
    """A file of text features."""
    path = folder / f"{name}.safetensors"
    features = random_text_features(prompt_key(name), prompts, 4, config)
    save_text_features(path, features.video_context, features.audio_context, name, "2.0.0")
    return str(path)


def test_script_refuses(checkpoint, random_gemma, tmp_path, capsys, monkeypatch):
    """Every mistake is reported before weights are read, and leaves no file."""

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(sample_teacher, "load_pipeline", no_weights)
    dims = json.loads((checkpoint / "config.json").read_text())["config"]["transformer"]
    dims = (dims["caption_channels"],) * 2
    prompt, negative = (stored(tmp_path, name, dims) for name in ("prompt", "negative"))
    (tmp_path / "empty").mkdir()
    several, narrow = stored(tmp_path, "two", dims, 2), stored(tmp_path, "narrow", (4, 4))
    output = tmp_path / "clip.mp4"
    random = ["--random-features", "--stg-block", "1"]
    gemma = ["--text-encoder", str(random_gemma), "--prompt", "x", "--prompt-cache", "none"]
    no_cfg = ["--cfg-video", "1", "--cfg-audio", "1", "--stg-block", "0"]
    cases = [
        (["--random-features"], "stg_blocks (29,) are for a larger model"),
        (["--stg-block", "1"], "give one source of text: --text-encoder FOLDER with --prompt"),
        ([*random, "--negative-prompt", "noise"], "--negative-prompt goes with --text-encoder"),
        (["--text-encoder", "gemma", "--stg-block", "1"], "needs --prompt TEXT"),
        ([*gemma, *no_cfg, "--negative-prompt", "noise"], "--negative-prompt has no effect"),
        ([*gemma, "--stg-block", "1", "--text-encoder", "nowhere"], "nowhere does not exist"),
        ([*random, "--frames", "10"], "8k + 1 frames, not 10"),
        ([*random, "--height", "100"], "multiples of 32"),
        ([*random, "--height", "32"], "at least 2x2 latents"),
        ([*random, "--fps", "241", "--frames", "17"], "frame_rate must be from 1 to 240"),
        ([*random, "--steps", "1"], "at least 2 steps"),
        ([*random, "--negative-features", negative], "goes with --features"),
        (["--features", prompt, "--stg-block", "0"], "needs --negative-features FILE"),
        (["--features", prompt, "--negative-features", negative, *no_cfg], "has no effect"),
        (["--features", several, *no_cfg], "holds 2 prompts; one clip takes one"),
        (["--features", narrow, *no_cfg], "expects 32 and 32"),
        (["--features", "nothing.safetensors", *no_cfg], "no such text feature file"),
        ([*random, "--checkpoint", str(tmp_path / "empty")], "holds no config.json"),
        ([*random, "--output", str(tmp_path / "clip.avi")], "must end in .mp4"),
    ]
    for options, message in cases:
        assert run_script(checkpoint, output, *options) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    output.write_bytes(b"x")
    assert run_script(checkpoint, output, *random) == 2
    assert "exists; choose another" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert run_script(checkpoint, tmp_path / "other.mp4", *random) == 2
    assert "needs PyAV (pip install av)" in capsys.readouterr().err


def test_script_defaults_follow_the_version(checkpoint):
    def plan(version, *options):
        config = PipelineConfig.from_checkpoint(checkpoint)
        deep = dataclasses.replace(config.transformer, num_layers=48)
        config = dataclasses.replace(config, transformer=deep, model_version=version)
        arguments = ["--checkpoint", "x", "--output", "x.mp4", "--random-features", *options]
        return sample_teacher.check_arguments(
            sample_teacher.parse_arguments(arguments), config
        ).sample

    older, newer = plan("2.0.0"), plan("2.3.0")
    assert (len(older.sigmas) - 1, older.guidance) == (40, LTX20_GUIDANCE)
    assert (len(newer.sigmas) - 1, newer.guidance) == (30, LTX23_GUIDANCE)
    assert (older.clip.video_frames, older.clip.audio_frames) == (
        16,
        126,
    )  # 121 frames for 5 seconds
    off = "--cfg-video 1 --cfg-audio 1 --stg 0 --modality 1 --rescale 0 --seconds 1 --steps 8"
    changed = plan("2.0.0", *off.split())
    assert changed.guidance.passes() == ("cond",) and changed.clip.video_frames == 4
    assert len(changed.sigmas) == 9


def test_script_samples_as_the_model_was_trained(checkpoint):
    """Size, rate, length and guidance, and the steps of a model that was distilled."""
    trained = TrainedSettings(
        stage="stage1",
        timesteps=(1000, 500),
        **{"height": 64, "width": 96, "frame_rate": 25, "frames": 17, "text_length": 128},
        guidance=NO_GUIDANCE,
    )

    def request(*options):
        config = PipelineConfig.from_checkpoint(checkpoint)
        config = dataclasses.replace(config, trained=trained)
        arguments = ["--checkpoint", "x", "--output", "x.mp4", "--random-features", *options]
        return sample_teacher.check_arguments(sample_teacher.parse_arguments(arguments), config)

    found = request()
    clip = found.sample.clip
    assert (clip.video_frames, clip.height, clip.width, clip.frame_rate) == (3, 2, 3, 25)
    assert (found.sample.guidance, found.notes) == (NO_GUIDANCE, [])
    assert found.sample.sigmas == tuple(flow.student_sigmas((1000, 500)).tolist())
    found = request("--seconds", "1", "--steps", "4", "--cfg-video", "2")
    assert (found.sample.clip.video_frames, len(found.sample.sigmas)) == (4, 5)
    assert found.notes == ["otherwise than the model was trained: guidance"]
    assert request("--seconds", "1.2").notes == [
        "clips have 8k + 1 frames: this one has 33, which are 1.32 s, not 1.2 s"
    ]
