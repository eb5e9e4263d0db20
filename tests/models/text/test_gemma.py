"""Gemma's text tower against `transformers`, and what folding the projection into it saves."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

from checkpoint_converters import gemma3
from checkpoint_converters.gemma3 import GEMMA_12B
from omniforcing_jax.models import quantization
from omniforcing_jax.models.text.connectors import (
    ConnectorConfig,
    TextConnectors,
    projection_scale,
)
from omniforcing_jax.models.text.gemma import LayerProjection, TextTower, init_boxed_params
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from tests.tiny_gemma import apply, convert_golden, load, torch_gemma, torch_states


@pytest.fixture(scope="module")
def golden(golden_dir, tmp_path_factory):
    """(configuration, parameters, reference) of the reference weights, through the converter."""
    folder = convert_golden(golden_dir, tmp_path_factory.mktemp("golden"))
    return *load(folder), np.load(golden_dir / "gemma3_tiny" / "expected.npz")


def test_hidden_states_match_the_reference(golden):
    config, params, expected = golden
    states = apply(config)(params, expected["input_ids"], expected["attention_mask"])
    valid = expected["attention_mask"].astype(bool)
    actual = np.moveaxis(np.asarray(states), -1, 1)[valid.nonzero()[0], :, valid.nonzero()[1]]
    wanted = expected["hidden_states"][valid.nonzero()[0], :, valid.nonzero()[1]]
    assert actual.shape == (valid.sum(), 9, 32)
    np.testing.assert_allclose(actual, wanted, atol=1e-4, rtol=0)
    assert np.isfinite(np.asarray(states)).all()


SCALED = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
PATTERNS = {
    "every third global": dict(
        num_hidden_layers=7,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
        rope_parameters={"full_attention": SCALED, "sliding_attention": {"rope_type": "default"}},
    ),
    # both kinds scaled, other bases
    "global first": dict(
        num_hidden_layers=3,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
        num_key_value_heads=1,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_states_match_transformers(pattern, tmp_path):
    model = torch_gemma(tmp_path / "hf", **PATTERNS[pattern])
    gemma3.convert(tmp_path / "hf", tmp_path / "gemma")
    config, params = load(tmp_path / "gemma")
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 64, (3, 14)).astype(np.int32)
    mask = np.arange(14) >= np.array([[0], [5], [13]])
    ids[~mask] = 0
    expected = torch_states(model, ids, mask)
    actual = np.asarray(apply(config)(params, ids, mask))
    assert actual.shape == (3, 14, 32, config.num_states)
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4, rtol=0)


def test_bfloat16_stays_close_and_embeds_as_transformers_does(golden, golden_dir):
    config, params, expected = golden
    config = dataclasses.replace(config, is_global=config.is_global[:1])
    params = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    ids, mask = expected["input_ids"], expected["attention_mask"].astype(bool)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    states = apply(config, jnp.bfloat16)(half, ids, mask)
    assert states.dtype == jnp.bfloat16
    states = np.asarray(states, np.float32)
    # sqrt(32) is rounded before it multiplies: 5.65625
    table = torch.from_numpy(np.array(params["embed"]["embedding"])).bfloat16()
    embedded = table[torch.from_numpy(ids).long()] * torch.tensor(32**0.5).bfloat16()
    np.testing.assert_array_equal(states[..., 0], embedded.float().numpy())
    exact = np.asarray(apply(config)(params, ids, mask))
    error = np.linalg.norm((states - exact)[mask]) / np.linalg.norm(exact[mask])
    assert error < 0.02


def test_padding_and_future_have_no_influence(golden):
    config, params, expected = golden
    ids, mask = expected["input_ids"], expected["attention_mask"].astype(bool)
    states = np.asarray(apply(config)(params, ids, mask))
    garbage = np.where(mask, ids, 99).astype(np.int32)
    other = np.asarray(apply(config)(params, garbage, mask))
    np.testing.assert_array_equal(other[mask], states[mask])
    last = ids.copy()
    last[:, -1] = 77
    other = np.asarray(apply(config)(params, last, mask))
    np.testing.assert_array_equal(other[:, :-1][mask[:, :-1]], states[:, :-1][mask[:, :-1]])
    assert np.abs(other - states)[:, -1].max() > 0.1
    # the rotation is relative: text on the other side of the padding is the same text
    for row, count in enumerate(mask.sum(1)):
        moved_ids, moved_mask = np.zeros_like(ids[:1]), np.zeros_like(mask[:1])
        moved_ids[0, :count], moved_mask[0, :count] = ids[row, mask[row]], True
        moved = apply(config)(params, np.tile(moved_ids, (3, 1)), np.tile(moved_mask, (3, 1)))
        np.testing.assert_allclose(moved[0, :count], states[row, mask[row]], atol=5e-5, rtol=0)


def projections_of(connectors: ConnectorConfig, num_states: int, seed: int = 0):
    """(parameters of the projections for `TextConnectors`, the same by layer)."""
    rng = np.random.default_rng(seed)
    widths = {"video": connectors.video_dim, "audio": connectors.audio_dim}
    params, by_layer = {}, {}
    for name, width in widths.items() if connectors.separate_projections else [("shared", 16)]:
        rows = connectors.text_channels * num_states
        kernel = (rng.standard_normal((rows, width)) * rows**-0.5).astype(np.float32)
        bias = rng.standard_normal(width).astype(np.float32)
        bias = bias if connectors.separate_projections else None
        key = f"{name}_projection" if name != "shared" else "projection"
        params[key] = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        split = jnp.asarray(kernel).reshape(connectors.text_channels, -1, width).swapaxes(0, 1)
        scale = projection_scale(width, connectors)
        by_layer[name] = LayerProjection(split, bias, scale)
    return params, by_layer


VERSIONS = {
    "2.0": ConnectorConfig(32, 2, 8, 2, 8),
    "2.3": ConnectorConfig(32, 2, 8, 3, 8, separate_projections=True),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_folded_projection_equals_the_stack(golden, version):
    config, params, expected = golden
    connectors = VERSIONS[version]
    whole, by_layer = projections_of(connectors, config.num_states)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    model = TextTower(config)
    actual = jax.jit(
        lambda params: model.apply(
            {"params": params}, ids, mask, by_layer, connectors, method="features"
        )
    )(params)
    states = apply(config)(params, ids, mask)
    video, audio = TextConnectors(connectors).apply(
        {"params": whole}, states, mask, method="features"
    )
    assert actual.keys() == by_layer.keys()
    for name, wanted in (("video", video), ("audio", audio)):
        found = actual[name if name in actual else "shared"]
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


def largest_value(jaxpr) -> int:
    """Elements of the largest array that a program computes, loops included."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in equation.outvars)])
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                largest = max(largest, largest_value(value.jaxpr))
    return largest


def test_features_never_hold_the_stack(golden):
    config, _, _ = golden
    connectors = VERSIONS["2.0"]
    _, by_layer = projections_of(connectors, config.num_states)
    boxed = jax.eval_shape(lambda k: init_boxed_params(config, k), jax.random.key(0))
    batch, length = 40, 8
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    variables = {"params": nn.unbox(boxed)}
    model = TextTower(config)

    def features(variables, ids, mask):
        return model.apply(variables, ids, mask, by_layer, connectors, method="features")

    stack = batch * length * config.hidden_size * config.num_layers
    assert largest_value(jax.make_jaxpr(model.apply)(variables, tokens, tokens).jaxpr) >= stack
    folded = largest_value(jax.make_jaxpr(features)(variables, tokens, tokens).jaxpr)
    assert folded <= 2 * batch * length * config.hidden_size  # one state or feed-forward


def test_wrong_inputs_are_named(golden):
    config, _, _ = golden
    model, connectors = TextTower(config), VERSIONS["2.0"]
    ids = jnp.ones((2, 4), jnp.int32)
    cases = [
        ((ids[0], ids), "token_ids must be integers of shape"),
        ((ids.astype(jnp.float32), ids), "float32"),
        ((ids, ids[:, :3]), r"attention_mask must have shape \[2, 4\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.apply({"params": {}}, *arguments)
    _, by_layer = projections_of(connectors, config.num_states - 1)
    with pytest.raises(ValueError, match=r"shape \[9, 32, W\].*got \[8, 32, 16\]"):
        model.apply({"params": {}}, ids, ids, by_layer, connectors, method="features")
    with pytest.raises(ValueError, match="quantize must be one of none, int8"):
        TextTower(config, quantize="int4").apply({"params": {}}, ids, ids)


# int8


def test_int8_rounds_each_channel_to_half_a_step():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 20, 5)).astype(np.float32) * np.array([1, 9, 0, 1e-3, 5])
    array = quantization.quantize(jnp.asarray(weights, jnp.float32), -2)
    assert array.values.dtype == jnp.int8 and array.scale.shape == (3, 1, 5)
    error = np.abs(np.asarray(quantization.dequantize(array, jnp.float32)) - weights)
    assert (error <= 0.5001 * np.asarray(array.scale)).all() and error[..., 2].max() == 0
    np.testing.assert_array_equal(np.abs(array.values).max(1)[:, [0, 1, 3, 4]], 127)
    x = rng.standard_normal((4, 20)).astype(np.float32)
    layer = jax.tree.map(lambda leaf: leaf[0], array)
    np.testing.assert_allclose(
        quantization.matmul(x, layer, jnp.float32),
        x @ quantization.dequantize(layer, jnp.float32),
        atol=1e-5,
    )
    rows = quantization.quantize(jnp.asarray(weights[0], jnp.float32), -1)
    np.testing.assert_array_equal(
        quantization.take_rows(rows, jnp.array([[7, 3]]), jnp.float32)[0],
        quantization.dequantize(rows, jnp.float32)[np.array([7, 3])],
    )


def test_int8_parameters_are_declared_and_sharded():
    config = GemmaConfig.from_metadata(GEMMA_12B)
    boxed = jax.eval_shape(
        lambda k: init_boxed_params(config, k, quantize="int8"), jax.random.key(0)
    )
    up = boxed["blocks"]["ff"]["up"]["kernel"]
    assert up.values.names == ("layers", "embed", "mlp")
    assert up.scale.names == ("layers", None, "mlp")
    assert up.values.value.shape == (48, 3840, 15360) and up.values.value.dtype == jnp.int8
    assert up.scale.value.shape == (48, 1, 15360)
    assert boxed["embed"]["embedding"].scale.value.shape == (262208, 1)
    int8 = sum(x.size for x in jax.tree.leaves(boxed) if x.dtype == jnp.int8)
    rest = sum(x.size for x in jax.tree.leaves(boxed) if x.dtype != jnp.int8)
    assert int8 > 0.999 * (int8 + rest)


# configuration


def test_12b_has_the_parameters_of_transformers():
    config = GemmaConfig.from_metadata(GEMMA_12B)
    assert config == GemmaConfig()
    assert config.num_states == 49 and sum(config.is_global) == 8 and config.is_global[5]
    with torch.device("meta"):
        reference = Gemma3TextModel(Gemma3TextConfig(**GEMMA_12B))
    boxed = jax.eval_shape(lambda k: init_boxed_params(config, k), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed)))
    assert count == sum(p.numel() for p in reference.parameters()) == 11_766_034_176


def test_old_and_new_form_of_the_config_agree():
    new = Gemma3TextConfig(**GEMMA_12B).to_dict()
    assert "layer_types" in new and "rope_parameters" in new
    assert GemmaConfig.from_metadata(json.loads(json.dumps(new))) == GemmaConfig()
    old = GEMMA_12B | {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e3,
        "sliding_window_pattern": 2,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    }
    config = GemmaConfig.from_metadata(old)
    assert (config.global_rope_theta, config.local_rope_theta) == (2e6, 3e3)
    assert (config.global_rope_factor, config.local_rope_factor) == (4.0, 1.0)
    assert config.is_global == (False, True) * 24


def test_unsupported_settings_are_all_named():
    wrong = GEMMA_12B | {
        "model_type": "gemma2",
        "hidden_activation": "silu",
        "attn_logit_softcapping": 50.0,
        "layer_types": ["full_attention"] * 3 + ["chunked_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "yarn"}},
    }
    del wrong["intermediate_size"]
    with pytest.raises(ValueError) as error:
        GemmaConfig.from_metadata(wrong)
    for part in (
        "intermediate_size is missing",
        "model_type is 'gemma2'; only 'gemma3_text'",
        "hidden_activation is 'silu'",
        "attn_logit_softcapping is 50.0",
        "layer_types has chunked_attention",
        "4 entries for 48 layers",
        "rope_type of full_attention is 'yarn'; only default and linear",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="cannot share 3 key/value heads"):
        GemmaConfig.from_metadata(GEMMA_12B | {"num_key_value_heads": 3})
