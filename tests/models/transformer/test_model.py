"""The transformer against the official LTX-2 and OmniForcing code, fp32."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from checkpoint_converters.reading import load_component
from omniforcing_jax.models.quantization import QuantizedArray
from omniforcing_jax.models.transformer import rope as rope_module
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Modality, Pathways, Transformer
from omniforcing_jax.models.transformer.rope import Rope, axis_angles, frequencies
from omniforcing_jax.sampling.weights import per_layer
from tests.tiny_model import QUICK_COMPILE

pytestmark = pytest.mark.default_xla
TOLERANCE = 1e-4  # the references' own fp32 error is 9e-6; phases are formed in their order


def rope_from_bounds(
    bounds: np.ndarray,
    *,
    dim: int,
    heads: int,
    max_position: tuple[float, ...],
    theta: float = 10000.0,
    frequency_dtype: str = "float64",
) -> Rope:
    """Table for tokens at arbitrary places.

    Args:
      bounds: [B, axes, T, 2] start and end of each token on each axis (seconds, pixels, pixels).
      dim: inner width N * H of the attention.
      max_position: one divisor per axis.

    Returns:
      Rope of shape [B, T, N, H/2]; entries run frequency-major, axis-minor, after identity padding.
    """
    num_axes = bounds.shape[1]
    freqs = frequencies(dim // (2 * num_axes), theta, frequency_dtype)
    bounds = bounds.astype(np.float32)
    middle = (bounds[..., 0] + bounds[..., 1]) / np.float32(2)  # [B, axes, T]
    angles = np.stack(
        [axis_angles(middle[:, a], max_position[a], freqs) for a in range(num_axes)], axis=-1
    )  # [B, T, n, axes]
    angles = angles.reshape(*angles.shape[:2], -1)
    pad = dim // 2 - angles.shape[-1]
    cos = np.pad(np.cos(angles), ((0, 0), (0, 0), (pad, 0)), constant_values=1.0)
    sin = np.pad(np.sin(angles), ((0, 0), (0, 0), (pad, 0)))
    split = functools.partial(rearrange, pattern="B T (N h) -> B T N h", N=heads)
    return Rope(jnp.asarray(split(cos)), jnp.asarray(split(sin)))


@functools.partial(jax.jit, static_argnums=0)
def velocities(model, params, video, audio, keep):
    """One program for all cases that differ in values alone."""
    return model.apply({"params": params}, video, audio, keep=keep)[0]


class Reference:
    """A golden LTX-2 file: config, weights, arrays, and its inputs as `Modality` objects."""

    def __init__(self, name: str, version: str, golden_dir):
        self.arrays = np.load(golden_dir / f"{name}_expected.npz")
        metadata = json.loads(str(self.arrays["config_json"]))
        self.config = TransformerConfig.from_metadata(metadata["transformer"], version)
        weights = load_component(golden_dir / f"{name}.safetensors", "transformer")
        self.params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)

    def modality(self, stream: str, case: str, per_token: bool = True) -> Modality:
        a, c = self.arrays, self.config
        bounds = a[f"dit_{stream}_positions"]
        is_video = stream == "video"
        table = functools.partial(
            rope_from_bounds, heads=c.video_heads, frequency_dtype=c.rope_frequency_dtype
        )
        own = c.video_max_position if is_video else (c.audio_max_position,)
        # the single-stream cases share the noise levels of a_uniform
        sigma = a.get(f"{case}_timesteps_{stream}", a[f"a_uniform_timesteps_{stream}"])
        key = f"{case}_sigma_{stream}"
        return Modality(
            latents=jnp.asarray(a[f"dit_{stream}_tokens"]),
            sigma=jnp.asarray(sigma if per_token else sigma[:, :1]),
            rope=table(bounds, dim=c.video_dim if is_video else c.audio_dim, max_position=own),
            cross_rope=table(bounds[:, :1], dim=c.audio_dim, max_position=(20.0,)),
            context=jnp.asarray(a[f"dit_{stream}_context"]),
            global_sigma=jnp.asarray(a[key]) if key in a else None,
        )

    def run(self, video, audio, *, keep=None, unroll=1, **changes):
        config = dataclasses.replace(self.config, **changes) if changes else self.config
        return velocities(Transformer(config, unroll=unroll), self.params, video, audio, keep)

    def check(self, case, outputs, streams=("video", "audio")):
        for stream, velocity in zip(("video", "audio"), outputs, strict=True):
            if stream in streams:
                expected = self.arrays[f"{case}_{stream}_velocity"]
                np.testing.assert_allclose(velocity, expected, atol=TOLERANCE, err_msg=case)


@pytest.fixture(scope="module")
def ltx20_model(golden_dir):
    return Reference("ltx2_tiny", "2.0.0", golden_dir)


@pytest.fixture(scope="module")
def ltx23_model(golden_dir):
    return Reference("ltx23_tiny", "2.3.0", golden_dir)


@pytest.fixture
def reference(request, ltx20_model, ltx23_model):
    version = request.param
    return ltx20_model if version == "2.0" else ltx23_model


def versions(*names):
    """Runs a test on the references of these versions, `names` being versions or tuples of them."""
    return lambda *arguments: pytest.mark.parametrize(
        ",".join(("reference", *arguments)), names, indirect=["reference"]
    )


both = versions("2.0", "2.3")()


@versions("2.3")()
def test_low_precision(reference):
    """A sampler's weights, with the products of the layers in 8 bits, and nothing else.

    The bound is twice the error of benchmarks/RESULTS.md; what others change, test_quantization.
    """
    streams = [reference.modality(s, "a_uniform") for s in ("video", "audio")]
    model = Transformer(reference.config)
    apply = jax.jit(
        lambda params: model.apply({"params": params}, *streams)[0], compiler_options=QUICK_COMPILE
    )
    params = per_layer(jax.tree.map(jnp.array, reference.params), quantize="int8")
    names = {
        path[-2].key
        for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_quantized)
        if is_quantized(leaf)
    }
    assert names == {"qkv", "q", "k", "v", "kv", "out", "up", "down"}
    for stream, velocity in zip(("video", "audio"), apply(params), strict=True):
        expected = reference.arrays[f"a_uniform_{stream}_velocity"]
        error = np.linalg.norm(velocity - expected) / np.linalg.norm(expected)
        assert 1e-3 < error < 0.02, stream


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QuantizedArray)


@both
@pytest.mark.parametrize("per_token", [True, False])
def test_uniform_sigma(reference, per_token):
    video, audio = (reference.modality(s, "a_uniform", per_token) for s in ("video", "audio"))
    reference.check("a_uniform", reference.run(video, audio))


def test_layers_compiled_as_one(ltx20_model):
    video, audio = (ltx20_model.modality(s, "a_uniform") for s in ("video", "audio"))
    layers = ltx20_model.config.num_layers
    assert layers > 1
    ltx20_model.check("a_uniform", ltx20_model.run(video, audio, unroll=layers))


@both
def test_text_mask(reference):
    mask = jnp.asarray(reference.arrays["a_ctxmask_mask"]) > 0
    video, audio = (
        reference.modality(s, "a_ctxmask").replace(context_mask=mask) for s in ("video", "audio")
    )
    reference.check("a_ctxmask", reference.run(video, audio))


@both
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_single_stream(reference, stream):
    modality = reference.modality(stream, f"a_{stream}only")
    streams = (modality, None) if stream == "video" else (None, modality)
    outputs = reference.run(*streams)
    reference.check(f"a_{stream}only", outputs, (stream,))
    assert outputs[1 if stream == "video" else 0] is None


VARIANTS = {"A": "own", "B": "other", "C": "own_other_gate"}


@pytest.mark.parametrize("case", ["b_pertoken", "b_modalsigma"])
@versions(("2.0", "A"), ("2.0", "C"), ("2.3", "B"), ("2.3", "C"))("variant")
def test_sigma_per_token_and_per_stream(reference, case, variant):
    name = f"{case}_variant{variant}"
    video, audio = (reference.modality(s, case) for s in ("video", "audio"))
    outputs = reference.run(video, audio, cross_timestep=VARIANTS[variant])
    reference.check(name, outputs)


def keep_all(reference):
    ones = jnp.ones((reference.config.num_layers, 2))
    return Pathways(video=ones, audio=ones, a2v=ones, v2a=ones)


@both
def test_cross_modal_attention_off(reference):
    video, audio = (reference.modality(s, "c_isolated") for s in ("video", "audio"))
    keep = keep_all(reference)
    off = jnp.zeros_like(keep.a2v)
    outputs = reference.run(video, audio, keep=keep.replace(a2v=off, v2a=off))
    reference.check("c_isolated", outputs)

    video, audio = (reference.modality(s, "c_mixed") for s in ("video", "audio"))
    mixed = keep.replace(a2v=keep.a2v.at[:, 0].set(0), v2a=keep.v2a.at[-1, 1].set(0))
    reference.check("c_mixed", reference.run(video, audio, keep=mixed))


@versions(("2.0", "zero"), ("2.0", "value"), ("2.3", "value"))("semantics")
def test_self_attention_skipped(reference, semantics):
    case = {"zero": "d_stg_zero", "value": "d_stg_vpass"}[semantics]
    video, audio = (reference.modality(s, "d_stg") for s in ("video", "audio"))
    keep = keep_all(reference)
    layer = 1 if reference.config.caption_channels else 0
    off = keep.video.at[layer].set(0)
    keep = keep.replace(video=off, audio=off)
    reference.check(case, reference.run(video, audio, keep=keep, perturbation=semantics))


@both
def test_rope_tables(reference):
    a = reference.arrays
    for stream in ("video", "audio"):
        modality = reference.modality(stream, "a_uniform")
        for name, rope in (("", modality.rope), ("_cross", modality.cross_rope)):
            for part in ("cos", "sin"):
                table = a[f"e_rope_{stream}{name}_{part}"]  # [B, N, T, H/2]
                ours = np.swapaxes(getattr(rope, part), 1, 2)
                np.testing.assert_allclose(ours, table, atol=2e-6)


@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
def test_rotation_on_tpus_is_the_same(rope_type, monkeypatch):
    """There the other channel of each pair comes from a product, which is exact."""
    angles = np.random.default_rng(0).uniform(0, 7, (1, 5, 2, 8)).astype(np.float32)
    rope = Rope(jnp.cos(angles), jnp.sin(angles))
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 16), jnp.bfloat16)
    expected = rope.rotate(x, rope_type)
    monkeypatch.setattr(rope_module, "platform", lambda: "tpu")
    np.testing.assert_array_equal(rope.rotate(x, rope_type), expected)
    assert not np.array_equal(Rope(rope.cos, -rope.sin).rotate(x, rope_type), expected)
