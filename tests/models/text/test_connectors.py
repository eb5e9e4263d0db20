"""Text features and connectors against the reference and against diffusers."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax.models.text.connectors import (
    ConnectorConfig,
    TextConnectors,
    connector_rope,
    fill_with_registers,
    normalize_hidden_states,
    projection_scale,
)

ATOL = 2e-5
FILES = {"ltx20": "ltx2_tiny.safetensors", "ltx23": "ltx23_tiny.safetensors"}


@functools.cache
def compiled(config: ConnectorConfig, method: str):
    return jax.jit(functools.partial(TextConnectors(config).apply, method=method))


class Case(NamedTuple):
    config: ConnectorConfig
    params: dict[str, Any]
    golden: Any

    def run(self, *args, method="__call__"):
        return compiled(self.config, method)({"params": self.params}, *args)

    @property
    def inputs(self):
        return self.golden["f_hidden_states"], self.golden["f_attention_mask"]


@pytest.fixture(params=FILES)
def case(request, golden_dir):
    path = golden_dir / FILES[request.param]
    config = ConnectorConfig.from_metadata(read_metadata(path)["config"]["transformer"])
    params = load_component(path, "connectors", dtype=np.float32)
    return Case(config, params, request.getfixturevalue(request.param))


def test_features_match_the_reference(case):
    video, audio = case.run(*case.inputs, method="features")
    np.testing.assert_allclose(video, case.golden["f_video_features"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(audio, case.golden["f_audio_features"], atol=ATOL, rtol=0)


def test_contexts_match_the_reference(case):
    video, audio = case.run(*case.inputs)
    np.testing.assert_allclose(video, case.golden["f_video_context"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(audio, case.golden["f_audio_context"], atol=ATOL, rtol=0)


def test_contexts_from_features_match_the_reference(case):
    golden = case.golden
    features = golden["f_video_features"], golden["f_audio_features"]
    video, audio = case.run(*features, golden["f_attention_mask"], method="contexts")
    np.testing.assert_allclose(video, golden["f_video_context"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(audio, golden["f_audio_context"], atol=ATOL, rtol=0)


def test_rope_matches_the_reference(case):
    c = case.config
    dims = {"video": (c.video_heads, c.video_dim), "audio": (c.audio_heads, c.audio_dim)}
    for name, (heads, dim) in dims.items():
        rope = connector_rope(32, heads, dim, c)
        for got, part in ((rope.cos, "cos"), (rope.sin, "sin")):
            expected = case.golden[f"f_rope_{name}_connector_{part}"]  # [1, N, T, H/2]
            np.testing.assert_allclose(got, expected.swapaxes(1, 2), atol=ATOL, rtol=0)


def test_initialised_parameters_have_the_checkpoint_layout(case):
    init = jax.eval_shape(TextConnectors(case.config).init, jax.random.key(0), *case.inputs)
    shapes = jax.tree.map(lambda x: x.shape, nn.unbox(init["params"]))
    assert shapes == jax.tree.map(lambda x: x.shape, case.params)


def test_layer_parameters_are_sharded_by_name(case):
    init = jax.eval_shape(TextConnectors(case.config).init, jax.random.key(0), *case.inputs)
    specs = nn.get_partition_spec(init["params"])
    kernel = specs["video_connector"]["blocks"]["attn"]["q"]["kernel"]
    assert kernel == jax.sharding.PartitionSpec("layers", "embed", "heads")


@pytest.mark.parametrize("garbage", [1e4, np.nan])
def test_padding_has_no_influence(case, garbage):
    hidden, mask = case.inputs
    changed = np.where(mask[:, :, None, None] > 0, hidden, np.float32(garbage))
    for a, b in zip(case.run(hidden, mask), case.run(changed, mask), strict=True):
        np.testing.assert_array_equal(a, b)


def test_side_of_the_padding_has_no_influence(case):
    hidden, mask = case.inputs
    counts = mask.sum(axis=1)
    rolled = np.stack(
        [np.roll(h, n, axis=0) for h, n in zip(hidden, counts, strict=True)]
    )  # left -> right pad
    right = np.stack([np.roll(m, n) for m, n in zip(mask, counts, strict=True)])
    assert np.all(right[:, 0] == 1)
    for a, b in zip(case.run(hidden, mask), case.run(rolled, right), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_every_valid_token_matters(case):
    hidden, mask = case.inputs
    first = int(np.argmax(mask[0]))
    changed = hidden.copy()
    changed[0, first] = np.random.default_rng(0).normal(size=changed[0, first].shape)
    for a, b in zip(case.run(hidden, mask), case.run(changed, mask), strict=True):
        assert np.abs(np.asarray(a - b)[0]).max() > 1e-3
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("num_valid", [0, 1])
def test_empty_prompt(case, num_valid):
    """The empty prompt is one token (BOS); even none at all must not give NaN."""
    hidden, mask = case.inputs
    mask = np.zeros_like(mask)
    mask[:, mask.shape[1] - num_valid :] = 1
    contexts = case.run(hidden, mask)
    for context in contexts:
        assert np.all(np.isfinite(context))
        rms = np.sqrt(np.mean(np.square(context), axis=-1))
        np.testing.assert_allclose(rms, 1.0, atol=1e-3)
    if not num_valid:  # registers only: the text has no say
        np.testing.assert_array_equal(contexts[0][0], contexts[0][1])


def test_projection_folded_into_the_layer_loop(case):
    """What a text encoder does that never holds all hidden states at once."""
    hidden, mask = case.inputs
    expected = case.run(hidden, mask, method="features")
    names = (
        ("video_projection", "audio_projection")
        if case.config.separate_projections
        else ("projection", "projection")
    )
    for name, features in zip(names, expected, strict=True):
        kernel = case.params[name]["kernel"]
        kernel = kernel.reshape(case.config.text_channels, -1, kernel.shape[-1])
        total = 0.0
        for layer in range(hidden.shape[-1]):
            x = normalize_hidden_states(hidden[..., layer], mask, case.config)
            total = total + x @ kernel[:, layer]
        total = projection_scale(kernel.shape[-1], case.config) * total
        total = np.asarray(total) + np.asarray(case.params[name].get("bias", 0.0))
        np.testing.assert_allclose(total, features, atol=ATOL)


def test_bfloat16(case):
    model = TextConnectors(case.config, dtype=jnp.bfloat16)
    contexts = jax.jit(model.apply)({"params": case.params}, *case.inputs)
    for context, name in zip(contexts, ("video", "audio"), strict=True):
        assert context.dtype == jnp.bfloat16
        error = np.asarray(context, np.float32) - case.golden[f"f_{name}_context"]
        assert np.sqrt(np.mean(error**2)) < 0.05  # contexts have unit RMS


def test_fill_with_registers():
    features = np.arange(1, 9, dtype=np.float32).reshape(1, 8, 1)
    registers = -np.arange(1, 5, dtype=np.float32).reshape(4, 1)
    mask = np.array([[0, 1, 0, 0, 1, 1, 0, 0]])
    filled = fill_with_registers(features, mask, registers)
    # tokens 2, 5, 6 in order, then the registers of positions 3, 4 … 7 (modulo 4)
    np.testing.assert_array_equal(filled[0, :, 0], [2, 5, 6, -4, -1, -2, -3, -4])


def diffusers_model(config: ConnectorConfig, num_text_layers: int) -> LTX2TextConnectors:
    """Random weights, norms and gates included (their initial values would hide mistakes)."""
    torch.manual_seed(0)
    model = LTX2TextConnectors(
        caption_channels=config.text_channels,
        text_proj_in_factor=num_text_layers,
        video_connector_num_attention_heads=config.video_heads,
        video_connector_attention_head_dim=config.video_head_dim,
        video_connector_num_layers=config.num_layers,
        video_connector_num_learnable_registers=config.num_registers,
        video_gated_attn=config.gated_attention,
        audio_connector_num_attention_heads=config.audio_heads,
        audio_connector_attention_head_dim=config.audio_head_dim,
        audio_connector_num_layers=config.num_layers,
        audio_connector_num_learnable_registers=config.num_registers,
        audio_gated_attn=config.gated_attention,
        connector_rope_base_seq_len=config.max_position,
        rope_type=config.rope_type,
        per_modality_projections=config.separate_projections,
        proj_bias=config.separate_projections,
        video_hidden_dim=config.video_dim,
        audio_hidden_dim=config.audio_dim,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


def tree_from_diffusers(model: LTX2TextConnectors) -> dict[str, Any]:
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    layers = {"attn1.to_q": "attn/q", "attn1.to_k": "attn/k", "attn1.to_v": "attn/v"}
    layers |= {"attn1.to_out.0": "attn/out", "attn1.to_gate_logits": "attn/gate"}
    layers |= {"ff.net.0.proj": "ff/up", "ff.net.2": "ff/down"}
    norms = {"attn1.norm_q": "attn/q_norm", "attn1.norm_k": "attn/k_norm"}
    flat = {}
    for name in ("text_proj_in", "video_text_proj_in", "audio_text_proj_in"):
        ours = name.replace("text_proj_in", "projection")
        if f"{name}.weight" in weights:
            flat[f"{ours}/kernel"] = weights.pop(f"{name}.weight").T
        if f"{name}.bias" in weights:
            flat[f"{ours}/bias"] = weights.pop(f"{name}.bias")
    for connector in ("video_connector", "audio_connector"):
        flat[f"{connector}/registers"] = weights.pop(f"{connector}.learnable_registers")

        def stacked(suffix, connector=connector):
            keys = [k for k in weights if k.startswith(connector) and k.endswith(suffix)]
            return np.stack([weights.pop(key) for key in sorted(keys)]) if keys else None

        for theirs, ours in layers.items():
            kernel, bias = stacked(f"{theirs}.weight"), stacked(f"{theirs}.bias")
            if kernel is not None:
                flat[f"{connector}/blocks/{ours}/kernel"] = kernel.swapaxes(1, 2)
                flat[f"{connector}/blocks/{ours}/bias"] = bias
        for theirs, ours in norms.items():
            flat[f"{connector}/blocks/{ours}/scale"] = stacked(f"{theirs}.weight")
    assert not weights, f"left over: {sorted(weights)}"
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


TINY = ConnectorConfig(
    text_channels=24,
    video_heads=2,
    video_head_dim=12,
    audio_heads=2,
    audio_head_dim=12,
    num_layers=2,
    num_registers=8,
)
TINY_23 = dataclasses.replace(
    TINY,
    video_heads=3,
    video_head_dim=8,
    audio_heads=3,
    audio_head_dim=4,
    num_layers=3,
    gated_attention=True,
    separate_projections=True,
)


@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_matches_diffusers(version, rope_type):
    config = dataclasses.replace({"2.0": TINY, "2.3": TINY_23}[version], rope_type=rope_type)
    reference = diffusers_model(config, num_text_layers=5)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(3, 24, config.text_channels, 5)).astype(np.float32)
    mask = np.arange(24)[None] >= np.array([[11], [23], [0]])  # 13, 1 (empty prompt), all 24 tokens
    with torch.no_grad():
        expected = reference(torch.from_numpy(hidden), torch.from_numpy(mask.astype(np.int64)))[:2]
    params = {"params": tree_from_diffusers(reference)}
    got = jax.jit(TextConnectors(config).apply)(params, hidden, mask)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e.numpy(), atol=ATOL, rtol=0)


def test_errors_come_before_any_work():
    model = TextConnectors(TINY)
    hidden, mask = jnp.ones((1, 16, 24, 5)), jnp.ones((1, 16))

    def init(hidden, mask):
        jax.eval_shape(model.init, jax.random.key(0), hidden, mask)

    init(hidden, mask)
    with pytest.raises(ValueError, match=r"12 tokens long; pad it to a multiple of the 8 .* to 16"):
        init(hidden[:, :12], mask[:, :12])
    with pytest.raises(ValueError, match=r"shape \[B, S, 24, L\], got \[1, 16, 20, 5\]"):
        init(hidden[:, :, :20], mask)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[1, 16\]"):
        init(hidden, mask[:, :15])
    with pytest.raises(ValueError, match=r"video features must have shape \[B, S, 24\]"):
        model.apply({"params": {}}, jnp.ones((1, 16, 20)), jnp.ones((1, 16, 24)), mask,
                    method="contexts")  # fmt: skip


@pytest.mark.parametrize(
    "config, count",
    [
        (ConnectorConfig(), 1_431_475_200),
        (
            ConnectorConfig(
                video_heads=32,
                audio_heads=32,
                audio_head_dim=64,
                num_layers=8,
                gated_attention=True,
                separate_projections=True,
            ),
            3_172_227_584,
        ),
    ],
    ids=["2.0", "2.3"],
)
def test_parameter_count_of_the_published_models(config, count):
    hidden = jax.ShapeDtypeStruct((1, 1024, 3840, 49), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    params = jax.eval_shape(TextConnectors(config).init, jax.random.key(0), hidden, mask)
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_config_of_the_published_models(ltx20, ltx23):
    header = json.loads(str(ltx20["config_json"]))["transformer"]
    published = header | {
        "caption_channels": 3840,
        "connector_num_attention_heads": 30,
        "connector_attention_head_dim": 128,
    }
    assert ConnectorConfig.from_metadata(published) == ConnectorConfig()
    header = json.loads(str(ltx23["config_json"]))["transformer"]
    config = ConnectorConfig.from_metadata(header)
    assert (config.video_dim, config.audio_dim, config.num_layers) == (56, 40, 3)
    assert config.gated_attention and config.separate_projections
    # as LTX-2.5 writes it
    shouted = header | {"text_encoder_norm_type": "PER_TOKEN_RMS"}
    assert ConnectorConfig.from_metadata(shouted) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"connector_num_layers": None}, "connector_num_layers is missing"),
        ({"connector_norm_output": False}, "connector_norm_output is False; only True"),
        ({"text_encoder_norm_type": "layer"}, "text_encoder_norm_type is 'layer'; only None"),
        ({"text_encoder_norm_type": 1}, "text_encoder_norm_type is 1; only None"),
        ({"caption_proj_before_connector": True}, "only 'per_token_rms' is supported"),
        ({"connector_num_learnable_registers": None}, "learnable_registers is missing"),
        ({"connector_num_learnable_registers": 0}, "registers is 0; a positive number"),
        ({"connector_positional_embedding_max_pos": [20, 20]}, "one number is supported"),
        ({"rope_type": "spiral"}, "rope_type must be one of split, interleaved"),
        ({"frequencies_precision": "bf16"}, "one of float64, float32"),
        ({"audio_connector_attention_head_dim": 3}, "connectors of one width"),
    ],
)
def test_unsupported_metadata(ltx20, changes, message):
    header = json.loads(str(ltx20["config_json"]))["transformer"] | changes
    header = {key: value for key, value in header.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ConnectorConfig.from_metadata(header)
