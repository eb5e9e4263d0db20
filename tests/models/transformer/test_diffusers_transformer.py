"""The transformer against diffusers' LTX-2, through the converter: random weights, fp32."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders import LTX2LoraLoaderMixin

from checkpoint_converters import adapter_files
from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax.models.transformer import rope
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Modality, Transformer, init_boxed_params
from omniforcing_jax.training import adapters
from omniforcing_jax.training.adapters import AdapterConfig
from tests.checkpoint_converters.files import write_file
from tests.tiny_model import QUICK_COMPILE

TOLERANCE = 1e-4
BATCH, FRAMES, HEIGHT, WIDTH, AUDIO_FRAMES, TEXT = 2, 3, 2, 3, 7, 6
FPS = 24.0
PATCHES = HEIGHT * WIDTH
SMALL = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,  # 16 / 6 leaves a remainder: the table is padded in front
    cross_attention_dim=16,
    audio_in_channels=5,
    audio_out_channels=5,
    audio_num_attention_heads=2,
    audio_attention_head_dim=4,
    audio_cross_attention_dim=8,
    num_layers=2,
    caption_channels=12,
    rope_type="split",
)
LTX23 = dict(
    gated_attn=True,
    cross_attn_mod=True,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    perturbed_attn=True,
)


class Pair:
    """A diffusers model with random weights, and ours converted from the folder it saves."""

    def __init__(self, folder, **settings):
        torch.manual_seed(0)
        self.torch = LTX2VideoTransformer3DModel(**SMALL | settings).eval()
        with torch.no_grad():
            for name, p in self.torch.named_parameters():
                if p.ndim == 2 and "table" not in name:
                    p.normal_(std=p.shape[1] ** -0.5)
                elif "norm_" in name:
                    p.normal_(mean=1, std=0.2)
                else:
                    p.normal_(std=0.2)
        self.torch.save_pretrained(folder / "transformer")
        metadata = read_metadata(folder)
        self.config = TransformerConfig.from_metadata(
            metadata["config"]["transformer"], metadata["model_version"]
        )
        self.params = load_component(folder, "transformer")
        rng = np.random.default_rng(1)

        def draw(*shape):
            return rng.standard_normal((BATCH, *shape)).astype(np.float32)

        self.latents = draw(FRAMES * PATCHES, 4), draw(AUDIO_FRAMES, 5)
        self.contexts = tuple(draw(TEXT, dim) for dim in self.config.text_dims)

    def reference(self, sigmas, **settings):
        """Velocities of diffusers; it takes timesteps (1000 sigma), one per sample or token."""
        tensors = [torch.from_numpy(x) for x in (*self.latents, *self.contexts)]
        if self.torch.config.cross_attn_mod:
            video, audio = (torch.from_numpy(s.max(axis=1)) * 1000 for s in sigmas)
            settings = {"sigma": video, "audio_sigma": audio} | settings
        with torch.no_grad():
            out = self.torch(
                *tensors,
                timestep=torch.from_numpy(sigmas[0]) * 1000,
                audio_timestep=torch.from_numpy(sigmas[1]) * 1000,
                num_frames=FRAMES,
                height=HEIGHT,
                width=WIDTH,
                fps=FPS,
                audio_num_frames=AUDIO_FRAMES,
                **settings,
            )
        return out.sample.numpy(), out.audio_sample.numpy()

    def ours(self, sigmas, *, global_sigmas=None, keyframes=None, params=None, **changes):
        config = dataclasses.replace(self.config, **changes)
        # Always present, for one program instead of two; the maximum is what absence means.
        global_sigmas = global_sigmas or tuple(s.max(axis=1) for s in sigmas)
        tables = rope.clip_rope(
            config, video_frames=FRAMES, audio_frames=AUDIO_FRAMES, height=HEIGHT, width=WIDTH,
            frame_rate=FPS,
        )  # fmt: skip
        frames, audio_frames = jnp.arange(FRAMES), jnp.arange(AUDIO_FRAMES)
        video = Modality(
            self.latents[0], sigmas[0], tables.video_rope(frames), tables.video_cross_rope(frames),
            self.contexts[0], global_sigma=global_sigmas[0], keyframes=keyframes,
        )  # fmt: skip
        audio = Modality(
            self.latents[1], sigmas[1], tables.audio_rope(audio_frames),
            tables.audio_cross_rope(audio_frames), self.contexts[1], global_sigma=global_sigmas[1],
        )  # fmt: skip
        return apply(Transformer(config), params or self.params, video, audio)


@functools.partial(jax.jit, static_argnames="model", compiler_options=QUICK_COMPILE)
def apply(model, params, video, audio):
    return model.apply({"params": params}, video, audio)[0]


def check(ours, reference):
    for actual, expected in zip(ours, reference, strict=True):
        assert np.std(expected) > 0.1
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def differ(a, b) -> bool:
    return all(np.abs(x - y).max() > 100 * TOLERANCE for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def ltx20(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("ltx20"))


@pytest.fixture(scope="module")
def ltx23(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("ltx23"), **LTX23)


def uniform():
    sigma = np.array([[0.73], [0.21]], np.float32)
    return np.tile(sigma, (1, FRAMES * PATCHES)), np.tile(sigma, (1, AUDIO_FRAMES))


def per_token():
    """A clean first frame and first audio third, noise everywhere else."""
    rng = np.random.default_rng(2)
    video = rng.uniform(0.05, 1.0, (BATCH, FRAMES * PATCHES)).astype(np.float32)
    audio = rng.uniform(0.05, 1.0, (BATCH, AUDIO_FRAMES)).astype(np.float32)
    video[:, :PATCHES], audio[:, : AUDIO_FRAMES // 3] = 0, 0
    return video, audio


def test_positions(ltx20):
    reference = ltx20.torch
    video = reference.rope.prepare_video_coords(1, 11, HEIGHT, WIDTH, "cpu", fps=FPS)[0]
    video = np.asarray(video).reshape(3, 11, HEIGHT, WIDTH, 2)
    rows, columns = rope._pixel_bounds(HEIGHT), rope._pixel_bounds(WIDTH)
    ours = (rope.video_time_bounds(11, FPS)[:, None, None], rows[:, None], columns)
    for bounds, expected in zip(ours, video, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(bounds, expected.shape), expected)
    audio = reference.audio_rope.prepare_audio_coords(1, 300, "cpu")[0, 0]
    np.testing.assert_array_equal(rope.audio_time_bounds(300), audio)


@pytest.mark.parametrize("name", ["video", "audio", "video_cross", "audio_cross"])
def test_rope_tables(ltx20, name):
    """All four tables, front padding included, over ten seconds."""
    frames, audio_frames = 31, 251
    config, reference = ltx20.config, ltx20.torch
    tables = rope.clip_rope(
        config, video_frames=frames, audio_frames=audio_frames, height=HEIGHT, width=WIDTH
    )
    length = frames if "video" in name else audio_frames
    ours = getattr(tables, f"{name}_rope")(jnp.arange(length))
    if "video" in name:
        coords = reference.rope.prepare_video_coords(1, frames, HEIGHT, WIDTH, "cpu", fps=FPS)
    else:
        coords = reference.audio_rope.prepare_audio_coords(1, audio_frames, "cpu")
    embed = {
        "video": reference.rope,
        "audio": reference.audio_rope,
        "video_cross": reference.cross_attn_rope,
        "audio_cross": reference.cross_attn_audio_rope,
    }[name]
    expected = embed(coords[:, :1] if "cross" in name else coords)
    for actual, table in zip((ours.cos, ours.sin), expected, strict=True):
        # One fp32 ulp of the largest angle, 1.6e4 rad, is 1e-3 rad.
        np.testing.assert_allclose(np.swapaxes(actual, 1, 2), table, atol=2e-3)


@pytest.mark.parametrize("model", ["ltx20", "ltx23"])
def test_uniform_sigma(model, request):
    pair = request.getfixturevalue(model)
    check(pair.ours(uniform()), pair.reference(uniform()))


def test_cross_timestep_variants(ltx20):
    """Sigma per token, where diffusers' legacy mode (`own`) and its newer one (`other`) differ."""
    sigmas = per_token()
    video, audio = (torch.from_numpy(s.max(axis=1)) * 1000 for s in sigmas)
    own = ltx20.reference(sigmas)
    other = ltx20.reference(sigmas, use_cross_timestep=True, sigma=video, audio_sigma=audio)
    assert ltx20.config.cross_timestep == "own"
    check(ltx20.ours(sigmas), own)
    check(ltx20.ours(sigmas, cross_timestep="other"), other)
    assert differ(own, other)


def test_global_sigmas(ltx23):
    """The sample's own sigmas drive the prompts' and the other stream's modulation."""
    assert ltx23.config.cross_timestep == "other"
    sigmas = per_token()
    sample = np.array([0.9, 0.4], np.float32), np.array([0.3, 0.6], np.float32)
    reference = ltx23.reference(
        sigmas,
        sigma=torch.from_numpy(sample[0]) * 1000,
        audio_sigma=torch.from_numpy(sample[1]) * 1000,
        use_cross_timestep=True,
    )
    ours = ltx23.ours(sigmas, global_sigmas=sample)
    check(ours, reference)
    assert differ(ours, ltx23.ours(sigmas))


def test_exported_lora(ltx20, tmp_path):
    """Adapters in LTX-2's layout, read by diffusers' loader, give the velocities that ours have.

    PEFT, which diffusers leaves the sums to, is not needed for them: y + B A x, since its alpha is
    the rank where a file has none.
    """
    config = AdapterConfig(ranks=(3,), alphas=(6.0,))
    model = Transformer(ltx20.config)
    boxed = jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))
    rng = np.random.default_rng(3)
    trained = jax.tree.map(
        lambda x: 0.2 * rng.standard_normal(x.shape, np.float32),
        nn.unbox(adapters.boxed_trained(boxed, config)),
    )
    made = adapter_files.tensors(trained, config)
    file = write_file(tmp_path / "lora.safetensors", {key: make() for key, make in made.items()})
    loaded = LTX2LoraLoaderMixin.lora_state_dict(str(file))
    layers = {key.rpartition(".lora_")[0] for key in loaded}
    assert len(layers) == 2 * (6 * 4 + 2 * 2)  # attentions and feed-forwards of two layers

    def add(name: str):
        down, up = (loaded[f"{name}.lora_{part}.weight"].T for part in "AB")
        module = ltx20.torch.get_submodule(name.removeprefix("transformer."))
        return module.register_forward_hook(lambda module, x, y: y + x[0] @ down @ up)

    before = ltx20.reference(uniform())
    hooks = [add(name) for name in layers]
    reference = ltx20.reference(uniform())
    for hook in hooks:
        hook.remove()
    assert differ(reference, before)
    merged = adapters.merged(ltx20.params, trained, config)
    check(ltx20.ours(uniform(), params=merged), reference)


def test_interleaved_rope_and_gate_scale(tmp_path):
    """What the public OmniForcing weights use: rope interleaved, gates fed with sigma itself."""
    pair = Pair(
        tmp_path,
        rope_type="interleaved",
        rope_double_precision=False,
        cross_attn_timestep_scale_multiplier=1,
    )
    assert pair.config.rope_type == "interleaved"
    assert pair.config.cross_gate_timestep_scale == 1.0
    sigmas = per_token()
    reference = pair.reference(sigmas)
    # torch and numpy form the fp32 frequency grid with other roundings: phases differ by an ulp.
    for actual, expected in zip(pair.ours(sigmas), reference, strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-3)
    pair.torch.register_to_config(cross_attn_timestep_scale_multiplier=1000)
    assert differ(pair.reference(sigmas), reference)


def test_ltx25(tmp_path):
    """No biases in the video feed-forward, and an embedding on keyframe tokens."""
    pair = Pair(tmp_path, **LTX23, ff_bias=False, use_keyframes_abs_pos_embedding=True)
    assert pair.config.keyframe_embedding and not pair.config.video_ff_bias
    keyframes = np.zeros((BATCH, FRAMES * PATCHES), bool)
    keyframes[0, :PATCHES] = True
    mask = torch.from_numpy(keyframes.astype(np.float32))[..., None]
    reference = pair.reference(uniform(), video_keyframes_mask=mask)
    check(pair.ours(uniform(), keyframes=jnp.asarray(keyframes)), reference)
