"""Conditions: states and samples against LTX-2's own code, and what no sampler may do."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_converters.reading import load_component
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, modalities
from omniforcing_jax.models.transformer.config import TransformerConfig, tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import audio_time_bounds
from omniforcing_jax.sampling import student, teacher
from omniforcing_jax.sampling.conditions import (
    MODES,
    Condition,
    add_noise,
    find_mode,
    mode_frozen,
    mode_mask,
    split_condition,
)
from omniforcing_jax.sampling.guidance import NO_GUIDANCE, AVGuidance, Guidance
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig, sample
from omniforcing_jax.types import AVLatents
from tests.tiny_model import (
    LTX23_CHANGES,
    QUICK_COMPILE,
    random_contexts,
    random_latents,
    random_params,
)

STREAMS = ("video", "audio")
STATE_ATOL, X0_ATOL, TRAJECTORY_ATOL = 2e-6, 2e-4, 5e-4


def video_tokens(latents: np.ndarray) -> np.ndarray:
    """B,C,F,H,W -> B,F,H,W,C."""
    return jnp.asarray(rearrange(latents, "B C F h w -> B F h w C"))


def audio_tokens(latents: np.ndarray) -> np.ndarray:
    """B,2,T,16 -> B,T,C."""
    return jnp.asarray(rearrange(latents, "B c T f -> B T (c f)"))


class Golden:
    """LTX-2's own conditions, run with the weights of one of the tiny models."""

    def __init__(self, name: str, version: str, golden_dir):
        self.arrays = np.load(golden_dir / f"{name}_conditions.npz")
        with np.load(golden_dir / f"{name}_tiny_expected.npz") as expected:
            metadata = json.loads(str(expected["config_json"]))
        self.config = TransformerConfig.from_metadata(metadata["transformer"], version)
        weights = load_component(golden_dir / f"{name}_tiny.safetensors", "transformer")
        self.params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
        self.model = Transformer(self.config)
        # of the AdaLN: LTX-2.0's, or the release of 2.3's; "C" is the newest code's
        self.variant = {"own": "A", "other": "B"}[self.config.cross_timestep]
        a = self.arrays
        self.initial_video = video_tokens(a["in_video_initial"])
        _, frames, height, width, _ = self.initial_video.shape
        self.clip = ClipGeometry(
            frames, a["in_audio_initial"].shape[2], height, width, float(a["in_fps"])
        )
        self.initial = AVLatents(
            self.initial_video.reshape(2, -1, self.config.video_channels),
            audio_tokens(a["in_audio_initial"]),
        )
        self.image, self.keyframe = (
            video_tokens(a[f"in_{name}_latent"]) for name in ("image", "keyframe")
        )

    def condition(self, case: str) -> Condition:
        make = functools.partial(Condition.for_mode, clip=self.clip, model=self.model)
        audio, voice = self.initial.audio, audio_tokens(self.arrays["in_voice_latent"])
        frame = int(self.arrays["keyframe_frame_idx"])
        match case.rsplit("_", 1)[0]:
            case "image_s100":
                return make("i2av", video=self.image)
            case "image_s070" | "stage2":
                return make("i2av", video=self.image, strength=0.7)
            case "keyframe":
                return make("t2av").with_keyframe(self.clip, self.keyframe, frame)
            case "keyframe_s070":
                return make("t2av").with_keyframe(self.clip, self.keyframe, frame, 0.7)
            case "keyframe_att050":
                return make("t2av").with_keyframe(self.clip, self.keyframe, frame, 1.0, 0.5)
            case "firstlast":
                condition = make("i2av", video=self.image)
                return condition.with_keyframe(self.clip, self.keyframe, frame)
            case "a2v":
                return make("a2v", audio=audio)
            case "ia2v":
                return make("ia2v", video=self.image, audio=audio)
            case "v2a":
                return make("v2a", video=self.initial_video)
            case "extend":
                start = float(self.arrays["extend_start_time"])
                ends = audio_time_bounds(self.clip.audio_frames)[:, 1]
                heard = int(np.sum(ends <= np.float32(start)))
                shown = self.initial_video[:, : int(self.arrays["extend_n"])]
                return make("extend", video=shown, audio=audio[:, :heard])
            case "retake":
                masks = (self.arrays[f"{case}_{stream}_mask"][0, :, 0] for stream in STREAMS)
                video, sound = masks
                mask = AVLatents(video[:: self.clip.patches][None], sound[None])
                return Condition.of_clip(self.initial, jax.tree.map(jnp.asarray, mask))
            case "voice":
                return make("t2av").with_voice(voice)
        raise AssertionError(case)

    def noise(self, condition: Condition) -> AVLatents:
        """The given noise, that of appended tokens behind it."""
        noise = AVLatents(*(jnp.asarray(self.arrays[f"in_{s}_noise"]) for s in STREAMS))
        for stream, name in (("video", "keyframe"), ("audio", "voice")):
            if getattr(condition.appended, stream) is not None:
                more = jnp.asarray(self.arrays[f"in_{name}_noise"])
                joined = jnp.concatenate([getattr(noise, stream), more], axis=1)
                noise = noise.replace(**{stream: joined})
        return noise

    def visited(self, case: str, sigmas: np.ndarray, variant: str, initial=None):
        """The sampler's states, without noise of its own."""
        condition = self.condition(case)
        model = self.model
        if variant == "C":
            model = Transformer(dataclasses.replace(self.config, cross_timestep="own_other_gate"))
        config = SampleConfig(SamplingRecipe(tuple(sigmas.tolist())), self.clip)
        prompt = Prompt(*(jnp.asarray(self.arrays[f"in_{s}_context"]) for s in STREAMS))
        noise = self.noise(condition)
        if initial is not None:
            initial = jax.tree.map(
                lambda i, n: jnp.pad(i, ((0, 0), (0, n.shape[1] - i.shape[1]), (0, 0))),
                initial,
                noise,
            )
        rope = self.clip.rope(model, condition.appended_times())
        return teacher._sample(
            model, self.params, prompt, None, jax.random.split(jax.random.key(0), 2), noise, rope,
            condition.joined().of_batch(2), initial, config=config, trajectory=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def ltx2_conditions(golden_dir):
    return Golden("ltx2", "2.0.0", golden_dir)


@pytest.fixture(scope="module")
def ltx23_conditions(golden_dir):
    return Golden("ltx23", "2.3.0", golden_dir)


@pytest.fixture(params=["ltx2", "ltx23"])
def golden(request):
    return request.getfixturevalue(f"{request.param}_conditions")


def close(actual, expected, atol, message):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol, err_msg=message)


FORWARD = (
    "image_s100", "image_s070", "keyframe", "keyframe_s070", "keyframe_att050", "a2v", "v2a",
    "extend", "retake", "voice",
)  # fmt: skip
TRAJECTORIES = ("image_s100", "image_s070", "a2v", "ia2v", "v2a", "extend", "keyframe",
                "firstlast", "voice", "stage2")  # fmt: skip


def slow(case):
    """Of which a faster test shows the essence."""
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", FORWARD)
def test_states_equal_reference(golden, case):
    """Masks, noised tokens, noise levels of tokens and streams, and the places of what is appended;
    the noised clip is that of noise_scale 0.725 on a given one."""
    a, case = golden.arrays, f"{case}_fwd"
    condition = golden.condition(case)
    sigma = jnp.float32(a["in_sigma_fwd"])
    joined, noise = condition.joined(), golden.noise(condition)
    initial = jax.tree.map(
        lambda i, n: jnp.pad(i, ((0, 0), (0, n.shape[1] - i.shape[1]), (0, 0))),
        golden.initial, noise,
    )  # fmt: skip
    noised = joined.start(noise, initial, sigma)
    levels, stream = joined.sigma(sigma), joined.stream_sigma(sigma)
    for name in STREAMS:
        tokens, mask = getattr(noised, name), getattr(joined.mask, name)
        groups = tokens.shape[1] // mask.shape[1]
        expected_mask = a[f"{case}_{name}_mask"][:, :, 0]
        close(tokens, a[f"{case}_{name}_noised"], STATE_ATOL, name)
        close(np.repeat(mask, groups, axis=1), expected_mask, STATE_ATOL, name)
        level = np.repeat(getattr(levels, name), groups, axis=1)
        close(level, expected_mask * np.float32(sigma), STATE_ATOL, name)
        expected = np.broadcast_to(getattr(stream, name), a[f"{case}_{name}_sigma"].shape)
        close(expected, a[f"{case}_{name}_sigma"], STATE_ATOL, name)
    if joined.video_bias is not None:
        weights = np.exp(joined.video_bias)
        for axis in (1, 2):
            weights = np.repeat(weights, golden.clip.patches, axis=axis)
        close(weights, a[f"{case}_video_attention_mask"], STATE_ATOL, "attention")


@pytest.mark.parametrize("case, stream", [("keyframe", "video"), ("voice", "audio")])
def test_places_of_appended_latents_equal_reference(golden, case, stream):
    condition = golden.condition(f"{case}_fwd")
    positions = golden.arrays[f"{case}_fwd_{stream}_positions"][0, 0]  # [N, 2] seconds
    times = getattr(condition.appended_times(), stream)
    patches = golden.clip.patches if stream == "video" else 1
    appended = positions[-len(times) * patches :]
    close(np.repeat(times, patches, axis=0), appended, STATE_ATOL, case)


@pytest.mark.parametrize(
    "case", [c if c in ("keyframe_att050", "retake") else slow(c) for c in FORWARD]
)
def test_one_step_equals_reference(golden, case):
    """A step from the noised state down to zero ends in the network's own x0."""
    for variant in (golden.variant, "C"):
        key = f"{case}_fwd_variant{variant}"
        if f"{key}_video_x0" not in golden.arrays:
            continue
        sigmas = np.array([golden.arrays["in_sigma_fwd"], 0.0], np.float32)
        visited = golden.visited(f"{case}_fwd", sigmas, variant, golden.initial)
        for name in STREAMS:
            tokens = getattr(visited, name)[-1]
            expected = golden.arrays[f"{key}_{name}_x0"][:, : tokens.shape[1]]
            close(tokens, expected, X0_ATOL, f"{key} {name}")


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_trajectories_equal_reference(golden, case):
    check_trajectory(golden, case, golden.variant)


@pytest.mark.parametrize(
    "case", ["image_s070", *(slow(c) for c in ("a2v", "v2a", "keyframe", "voice"))]
)
def test_trajectories_with_the_newest_adaln(ltx23_conditions, case):
    check_trajectory(ltx23_conditions, case, "C")


def check_trajectory(golden, case, variant):
    sigmas = golden.arrays["in_sigmas_stage2" if case == "stage2" else "in_sigmas4"]
    initial = golden.initial if case == "stage2" else None
    visited = golden.visited(f"{case}_traj", sigmas, variant, initial)
    for name in STREAMS:
        tokens = getattr(visited, name)
        expected = golden.arrays[f"{case}_traj_variant{variant}_{name}_latents"]
        close(tokens, expected[:, :, : tokens.shape[2]], TRAJECTORY_ATOL, f"{case} {name}")


# -- what no sampler may do -----------------------------------------------------------------------

CLIP = ClipGeometry(3, 18, 1, 2)
GUIDED = AVGuidance(
    video=Guidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,)),
    audio=Guidance(cfg=1.0, stg=0.5, stg_blocks=(0, 1)),
)
masks = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=3, max_size=3)


class Tiny:
    """A tiny 2.3 model with a clip to take what is given from."""

    def __init__(self):
        self.model = Transformer(tiny(**LTX23_CHANGES))
        self.params = random_params(self.model.config)
        self.prompt, self.negative = (
            Prompt(*random_contexts(self.model.config, batch=2, seed=seed)) for seed in (1, 2)
        )
        self.clip = random_latents(self.model.config, 6, 18, batch=2, seed=3)
        self.video = self.clip.video.reshape(2, 3, 1, 2, -1)

    def sample(
        self, condition=None, guidance=NO_GUIDANCE, rows=slice(None), initial=None, **kwargs
    ):
        config = SampleConfig(SamplingRecipe((1.0, 0.7, 0.0), guidance), CLIP)
        if initial is not None:
            config = SampleConfig(SamplingRecipe((0.7, 0.3, 0.0), guidance), CLIP)
        prompt, negative = (Prompt(*(x[rows] for x in p[:2])) for p in (self.prompt, self.negative))
        negative = negative if "uncond" in guidance.passes() else None
        keys = jax.random.split(jax.random.key(0), 2)[rows]
        return sample(
            self.model, self.params, prompt, negative, keys, config,
            condition=condition, initial=initial, **kwargs,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model():
    return Tiny()


@settings(max_examples=12)
@given(frames=masks, sound=st.integers(0, 18))
def test_the_sampler_keeps_what_is_given(tiny_model, frames, sound):
    """Bit for bit, whatever frames they are, in one compiled program."""
    audio = np.ones(18, np.float32)
    audio[:sound] = 0.0
    mask = AVLatents(jnp.asarray([frames], jnp.float32), jnp.asarray(audio)[None])
    visited = tiny_model.sample(Condition.of_clip(tiny_model.clip, mask), trajectory=True)
    plain = tiny_model.sample(trajectory=True)
    for name, patches in (("video", 2), ("audio", 1)):
        states, clean = (
            np.asarray(getattr(visited, name)),
            np.asarray(getattr(tiny_model.clip, name)),
        )
        tokens = np.repeat(np.asarray(getattr(mask, name))[0], patches)
        assert np.isfinite(states).all()
        for x in states:
            np.testing.assert_array_equal(x[:, tokens == 0], clean[:, tokens == 0])
        noise = np.asarray(getattr(plain, name))[0]
        np.testing.assert_array_equal(states[0][:, tokens == 1], noise[:, tokens == 1])
        assert (states[-1] != clean)[:, tokens > 0].any() or not tokens.any()


@settings(max_examples=20)
@given(frames=masks)
def test_no_gradient_reaches_what_is_given(frames):
    """Nor does what the network made of it, NaN included; what is generated keeps its bits."""
    x0 = AVLatents(jnp.full((1, 6, 4), -0.0), jnp.full((1, 18, 6), 2.0))
    clean = jax.tree.map(lambda x: jnp.full_like(x, 3.0), x0)
    mask = AVLatents(jnp.asarray([frames], jnp.float32), jnp.zeros((1, 1)))
    condition = Condition.of_clip(clean, mask)
    kept = condition.keep(x0.replace(audio=jnp.full_like(x0.audio, jnp.nan)))
    np.testing.assert_array_equal(kept.audio, clean.audio)
    tokens = np.repeat(frames, 2)
    assert np.signbit(np.asarray(kept.video)[:, tokens == 1]).all()
    gradient = jax.grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(condition.keep(x)))))(x0)
    np.testing.assert_allclose(gradient.video[0, :, 0], tokens)
    assert not np.asarray(gradient.audio).any()


def test_a_given_stream_is_not_guided(tiny_model):
    """Its scales run no pass of their own and perturb nothing, and a sample with given sound does
    not depend on one without in the same batch."""
    a2v = Condition.for_mode("a2v", CLIP, tiny_model.model, audio=tiny_model.clip.audio)
    found = tiny_model.sample(a2v, GUIDED)
    unguided = tiny_model.sample(a2v, GUIDED._replace(audio=Guidance()))
    np.testing.assert_array_equal(found.video, unguided.video)
    np.testing.assert_array_equal(found.audio, tiny_model.clip.audio)
    only_audio = AVGuidance(Guidance(), Guidance(cfg=7.0))
    config = SampleConfig(SamplingRecipe((1.0, 0.0), only_audio), CLIP)
    unguided = teacher.without_guidance_of(config, mode_frozen("a2v"))
    assert unguided.guidance.passes() == ("cond",)

    mixed = Condition.of_clip(a2v.clean, a2v.mask.replace(audio=jnp.array([[0.0], [1.0]])))
    together = tiny_model.sample(mixed, GUIDED)
    np.testing.assert_allclose(together.video[:1], found.video[:1], atol=1e-4)
    alone = tiny_model.sample(None, GUIDED, rows=slice(1, 2))
    for name in STREAMS:
        np.testing.assert_allclose(
            getattr(together, name)[1:], getattr(alone, name), atol=2e-4, err_msg=name
        )


def test_appended_latents_are_cut_off(tiny_model):
    """They change the clip, but neither its size nor its noise."""
    nothing = Condition.for_mode("t2av", CLIP, tiny_model.model)
    with_both = (
        nothing.with_keyframe(CLIP, tiny_model.video[:, :1], 16)
        .with_keyframe(CLIP, tiny_model.video[:, 1:2], 8, 0.5)
        .with_voice(tiny_model.clip.audio[:, :5])
    )
    plain = tiny_model.sample(trajectory=True)
    found = tiny_model.sample(with_both, trajectory=True)
    for name in STREAMS:
        a, b = getattr(found, name), getattr(plain, name)
        np.testing.assert_array_equal(a[0], b[0])
        assert a.shape == b.shape and np.abs(a[-1] - b[-1]).max() > 1e-3
    keyframes, voice = with_both.appended.video, with_both.appended.audio
    np.testing.assert_allclose(keyframes.times, np.array([[16, 17], [8, 9]]) / 24, rtol=1e-6)
    assert voice.times.max() == np.float32(-0.04)


def test_a_clip_is_taken_up_again(tiny_model):
    """At the first noise level of the schedule; what is given in it is not noised."""
    i2av = Condition.for_mode("i2av", CLIP, tiny_model.model, video=tiny_model.video[:, :1])
    first = tiny_model.sample(i2av, initial=tiny_model.clip, trajectory=True).video[0]
    noise = tiny_model.sample(trajectory=True).video[0]
    np.testing.assert_array_equal(first[:, :2], tiny_model.clip.video[:, :2])
    expected = 0.3 * tiny_model.clip.video + 0.7 * noise
    np.testing.assert_allclose(first[:, 2:], expected[:, 2:], atol=1e-6)


def test_modes_have_one_mask_each():
    start = AVLatents(2, 10)
    counts = {
        mode: tuple(int(np.sum(m == 0)) for m in jax.tree.leaves(mode_mask(mode, CLIP, start)))
        for mode in MODES
    }
    assert counts == {
        "t2av": (0, 0),
        "i2av": (1, 0),
        "extend": (2, 10),
        "a2v": (0, 18),
        "ia2v": (1, 18),
        "v2a": (3, 0),
    }
    with pytest.raises(ValueError, match="no mode 'talk'; there are t2av, i2av, extend"):
        find_mode("talk")


def test_a_condition_is_cut_into_blocks():
    """As the clip is: block by block they are the conditions of the blocks' own latents."""
    layout = BlockLayout.prefix()
    clip = ClipGeometry.from_blocks(layout, 3, 1, 2)
    values = random_latents(tiny(), clip.video_tokens, clip.audio_frames)
    mask = jax.tree.map(jnp.asarray, mode_mask("extend", clip, AVLatents(4, 26)))
    condition = Condition.of_clip(values, jax.tree.map(lambda m: m[None], mask))
    first, later = split_condition(condition, layout, clip.patches)
    assert first.mask.video.tolist() == [[0.0]] and first.mask.audio.tolist() == [[0.0]]
    for block, level in ((0, 0.0), (1, 1.0)):
        one = jax.tree.map(lambda x, block=block: x[block], later)
        assert one.mask.video.tolist() == [[level] * 3]
        assert one.mask.audio.tolist() == [[level] * 25]
        np.testing.assert_array_equal(one.clean.audio[0], values.audio[0, 1 + 25 * block :][:25])
        np.testing.assert_array_equal(one.clean.video[0], values.video[0, 2 + 6 * block :][:6])


# -- block after block ----------------------------------------------------------------------------

ROLLOUT_BATCH, NUM_BLOCKS = 2, 3
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
prompt_kv = jit(student.prompt_kv, static_argnames=("model", "levels"))
block_step = jit(student.block_step, static_argnames=("model", "config", "first"))


class Stream:
    """A tiny 2.3 student, a rollout of three blocks, and clips to give it parts of."""

    def __init__(self, layout):
        self._programs = {}
        self.model = Transformer(tiny(num_audio_sinks=2, **LTX23_CHANGES))
        self.params = random_params(self.model.config)
        self.layout = layout
        self.config = RolloutConfig(CacheConfig(layout, window=2), (1.0, 0.6, 0.0), 1, 2)
        self.clip = ClipGeometry.from_blocks(layout, NUM_BLOCKS, 1, 2)
        self.contexts = random_contexts(self.model.config, batch=ROLLOUT_BATCH)
        self.rope = self.config.rope(self.model, NUM_BLOCKS)
        self.text = prompt_kv(
            self.model, self.params, *self.contexts, levels=self.config.sigma_levels
        )
        self.latents = random_latents(
            self.model.config, self.clip.video_tokens, self.clip.audio_frames,
            batch=ROLLOUT_BATCH, seed=5,
        )  # fmt: skip

    def rollout(self, condition):
        arguments = self.params, self.text, self.rope, jax.random.key(1)
        kind = condition is None
        if kind not in self._programs:
            lowered = student.rollout.lower(
                self.model, *arguments, config=self.config, num_blocks=NUM_BLOCKS,
                batch=ROLLOUT_BATCH, condition=condition,
            )  # fmt: skip
            self._programs[kind] = lowered.compile(compiler_options=QUICK_COMPILE)
        return self._programs[kind](*arguments, condition=condition)

    def condition(self, *modes):
        """Of one sample each, or of all."""
        start = AVLatents(self.layout.num_video_frames(1), self.layout.num_audio_frames(1))
        masks = [mode_mask(mode, self.clip, start) for mode in modes]
        return Condition.of_clip(self.latents, jax.tree.map(lambda *m: jnp.stack(m), *masks))


@pytest.fixture(scope="module", params=["prefix", slow("merged")])
def stream(request):
    return Stream(BlockLayout.from_name(request.param))


def test_a_rollout_keeps_what_is_given(stream):
    """In every mode, each sample its own, in one program. And no block looks ahead: what is given
    of the last one leaves the earlier ones as they are, bit for bit."""
    for modes in (("i2av", "a2v"), ("ia2v", "v2a"), ("extend", "t2av")):
        condition = stream.condition(*modes)
        found = stream.rollout(condition)
        for name in STREAMS:
            x, clean, mask = (
                np.asarray(getattr(tree, name)) for tree in (found, stream.latents, condition.mask)
            )
            given_tokens = np.repeat(mask == 0, x.shape[1] // mask.shape[1], axis=1)
            np.testing.assert_array_equal(x[given_tokens], clean[given_tokens])
            assert np.isfinite(x).all()
            assert (x != clean)[~given_tokens].any() or given_tokens.all()
        other = jax.tree.map(lambda x: x.at[:, -1].add(9.0), stream.latents)
        changed = stream.rollout(condition.replace(clean=other))
        video = stream.layout.num_video_frames(NUM_BLOCKS - 1) * stream.clip.patches
        sound = stream.layout.num_audio_frames(NUM_BLOCKS - 1)
        np.testing.assert_array_equal(changed.video[:, :video], found.video[:, :video])
        np.testing.assert_array_equal(changed.audio[:, :sound], found.audio[:, :sound])


@pytest.mark.slow
def test_a_rollout_of_which_nothing_is_given(stream):
    """Is the one without a condition."""
    generated = stream.rollout(stream.condition("t2av", "t2av"))
    plain = stream.rollout(None)
    for name in STREAMS:
        np.testing.assert_allclose(getattr(generated, name), getattr(plain, name), atol=1e-4)


def test_a_given_stream_is_clean_to_the_network(stream):
    """Noise levels of tokens and streams, and text K/V at each stream's own level, of a batch with
    and without given sound: against a pass that reads the contexts. Also where the refresh is
    noisy, of which what is given knows nothing."""
    condition, _ = split_condition(stream.condition("a2v", "t2av"), stream.layout, 2)
    config = dataclasses.replace(stream.config, sigmas=(1.0, 0.0), context_noise=0.4)
    assert config.text_levels(frozen=False) == config.sigma_levels == (1.0, 0.4)
    levels = config.text_levels(frozen=True)
    text = prompt_kv(stream.model, stream.params, *stream.contexts, levels=levels)
    cache = student.new_cache(stream.model, config, ROLLOUT_BATCH)
    noise = student.block_noise(
        jax.random.key(1), 0, config, stream.model, ROLLOUT_BATCH, first=True
    )
    trace, _ = block_step(
        stream.model, stream.params, cache, text, stream.rope, noise, config,
        first=True, condition=condition,
    )  # fmt: skip
    x = condition.keep(jax.tree.map(lambda n: n[0], noise))
    block = ClipGeometry.from_blocks(stream.layout, 1, 1, 2)
    sigma = AVLatents(jnp.ones((2, 1)), jnp.array([[0.0], [1.0]]))
    streams = modalities(
        x, sigma, block.stream_ropes(stream.model, stream.rope), stream.contexts,
        global_sigma=AVLatents(jnp.ones(2), jnp.array([0.0, 1.0])),
    )  # fmt: skip
    (by_hand, sound), _ = jit(stream.model.apply)({"params": stream.params}, *streams)
    np.testing.assert_allclose(trace.x0.video, x.video - by_hand, atol=1e-4)
    np.testing.assert_allclose(trace.x0.audio[1], (x.audio - sound)[1], atol=1e-4)
    np.testing.assert_array_equal(trace.x0.audio[0], x.audio[0])
    forward = student.bind(stream.model, stream.params, cache, stream.rope, config, first=True)
    refreshed = jnp.full(ROLLOUT_BATCH, 0.4)
    own = student.text_kv(stream.model, stream.params, stream.contexts, refreshed, condition)
    x0 = add_noise(trace.x0, jax.tree.map(lambda n: n[-1], noise), 0.4, condition)
    expected = jit(lambda x0: forward(x0, refreshed, own, condition, return_kv=True)[1])(x0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trace.kv, expected)


# -- mistakes --------------------------------------------------------------------------------------


def video(frames, height=1, width=2):
    return jnp.zeros((1, frames, height, width, 4))


def audio(frames):
    return jnp.zeros((1, frames, 6))


@pytest.mark.parametrize(
    "mode, latents, message",
    [
        ("i2av", {}, "mode i2av takes one video latent, not 0"),
        ("i2av", {"video": video(2)}, "mode i2av takes one video latent, not 2"),
        ("i2av", {"video": video(1), "audio": audio(1)}, "mode i2av takes no audio latents, not 1"),
        ("a2v", {"audio": audio(17)}, "takes all 18 audio latents of the clip, not 17"),
        ("extend", {"video": video(1)}, "takes 1 to 18 audio latents, not 0"),
        ("v2a", {"video": video(3, width=3)}, r"must be \[B, frames, 1, 2, 4\], got \[1, 3, 1, 3"),
        ("i2av", {"video": video(1), "strength": 2.0}, r"strength must be in \[0, 1\], not 2"),
    ],
)
def test_latents_that_do_not_fit_a_mode(mode, latents, message):
    with pytest.raises(ValueError, match=message):
        Condition.for_mode(mode, CLIP, Transformer(tiny()), **latents)


def test_other_latents_that_do_not_fit():
    nothing = Condition.for_mode("t2av", CLIP, Transformer(tiny()))
    with pytest.raises(ValueError, match="there are 4 video latents; 1 to 3 fit"):
        Condition.given(CLIP, Transformer(tiny()), video=video(4))
    with pytest.raises(ValueError, match="keyframe 17 is outside the clip's frames 0 to 16"):
        nothing.with_keyframe(CLIP, video(1), 17)
    with pytest.raises(ValueError, match="a reference voice already"):
        nothing.with_voice(audio(2)).with_voice(audio(2))
