"""Parameter counts and names of the published models, without allocating one parameter."""

import dataclasses
import json
import math

import flax
import pytest

from omniforcing_jax.models.transformer.config import TransformerConfig
from tests.tiny_model import abstract_params

# `config.transformer` as the published files carry it.
LTX20 = {
    "_class_name": "AVTransformer3DModel",
    "_diffusers_version": "0.25.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_type": "default",
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "caption_channels": 3840,
    "causal_temporal_positioning": True,
    "connector_attention_head_dim": 128,
    "connector_norm_output": True,
    "connector_num_attention_heads": 30,
    "connector_num_layers": 2,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_dim": 4096,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0,
    "frequencies_precision": "float64",
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_attention_heads": 32,
    "num_embeds_ada_norm": 1000,
    "num_layers": 48,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 128,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
LTX23 = LTX20 | {
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_learnable_registers_std": 1,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "text_encoder_norm_type": "per_token_rms",
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
}
LTX25 = LTX23 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
MODELS = {
    "2.0": TransformerConfig.from_metadata(LTX20, "2.0.0"),
    "2.3": TransformerConfig.from_metadata(LTX23, "2.3.0"),
    "2.5": TransformerConfig.from_metadata(LTX25, "2.5.0"),
}

# First component of a parameter's path, below `blocks` where it has that.
GROUPS = {
    "video stream": (
        "video_in", "video_caption", "video_adaln", "video_prompt_adaln", "keyframe_embedding",
        "video_out", "video_out_table",
        "video_attn", "video_text_attn", "video_ff", "video_table", "video_prompt_table",
    ),
    "a2v": ("video_cross_adaln", "a2v_gate_adaln", "a2v_attn", "video_cross_table"),
    "audio stream": (
        "audio_in", "audio_caption", "audio_adaln", "audio_prompt_adaln", "audio_sinks",
        "audio_out", "audio_out_table",
        "audio_attn", "audio_text_attn", "audio_ff", "audio_table", "audio_prompt_table",
    ),
    "v2a": ("audio_cross_adaln", "v2a_gate_adaln", "v2a_attn", "audio_cross_table"),
}  # fmt: skip


def flat_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def parameters():
    """{version: {path: shape}} at full size."""
    return {version: flat_shapes(config) for version, config in MODELS.items()}


def count(shapes_by_path, group=None, in_blocks=None) -> int:
    total = 0
    for path, shape in shapes_by_path.items():
        name = path.removeprefix("blocks/").split("/")[0]
        (owner,) = [g for g, names in GROUPS.items() if name in names]
        if group in (None, owner) and in_blocks in (None, path.startswith("blocks/")):
            total += math.prod(shape)
    return total


@pytest.mark.parametrize(
    "group, in_blocks, top_level",
    [
        ("video stream", 12_889_423_872, 152_096_896),
        ("a2v", 1_209_630_720, 119_574_528),
        ("audio stream", 3_223_486_464, 42_494_080),
        ("v2a", 1_209_040_896, 30_427_136),
    ],
)
def test_groups_of_the_19b_model(parameters, group, in_blocks, top_level):
    assert count(parameters["2.0"], group, True) == in_blocks
    assert count(parameters["2.0"], group, False) == top_level


def test_totals(parameters):
    p = parameters["2.0"]
    assert count(p, "video stream") + count(p, "a2v") == 14_370_726_016
    assert count(p, "audio stream") + count(p, "v2a") == 4_505_448_576
    assert count(p) == 18_876_174_592
    assert count(parameters["2.3"]) == 18_988_838_144
    assert count(parameters["2.5"]) == 18_987_859_200


def test_2_5_drops_video_ff_biases_and_adds_the_keyframe_embedding(parameters):
    older, newer = parameters["2.3"], parameters["2.5"]
    assert set(older) - set(newer) == {"blocks/video_ff/up/bias", "blocks/video_ff/down/bias"}
    assert {path: newer[path] for path in set(newer) - set(older)} == {
        "keyframe_embedding": (1, 4096)
    }


def test_sinks_add_one_table(parameters):
    config = TransformerConfig.from_metadata(LTX20 | {"num_audio_sink_tokens": 16}, "2.0.0")
    assert flat_shapes(config) == parameters["2.0"] | {"audio_sinks": (16, 2048)}


def test_what_the_metadata_says_holds():
    a, b, c = MODELS.values()
    assert (a.rope_type, a.rope_frequency_dtype) == ("split", "float64")
    assert (a.timestep_scale, a.cross_gate_timestep_scale) == (1000.0, 1000.0)
    assert (a.cross_timestep, a.perturbation, a.caption_channels) == ("own", "zero", 3840)
    assert (b.cross_timestep, b.perturbation, b.caption_channels) == ("other", "value", None)
    assert (b.gated_attention, b.text_adaln, b.text_dims) == (True, True, (4096, 2048))
    assert (c.cross_timestep, c.video_ff_bias, c.keyframe_embedding) == (
        "own_other_gate",
        False,
        True,
    )
    changed = LTX20 | {
        "rope_type": "interleaved",
        "frequencies_precision": "float32",
        "av_ca_timestep_scale_multiplier": 1,
        "audio_in_channels": 32,
        "audio_out_channels": 32,
    }
    config = TransformerConfig.from_metadata(changed)
    assert (config.rope_type, config.rope_frequency_dtype) == ("interleaved", "float32")
    assert (config.cross_gate_timestep_scale, config.audio_channels) == (1.0, 32)


@pytest.mark.parametrize("version", MODELS)
def test_config_survives_json(version):
    config = MODELS[version]
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TransformerConfig.from_dict(fields) == config
    with pytest.raises(TypeError, match="num_heads"):
        TransformerConfig.from_dict(fields | {"num_heads": 3})


def test_all_problems_of_metadata_are_reported_together():
    bad = LTX20 | {"activation_fn": "relu", "share_ff": True}
    for key in ("num_layers", "cross_attention_dim"):
        del bad[key]
    with pytest.raises(ValueError) as error:
        TransformerConfig.from_metadata(bad)
    message = str(error.value)
    parts = (
        "activation_fn is 'relu'",
        "'gelu-approximate'",
        "share_ff is True",
        "num_layers is missing",
    )
    for part in (*parts, "cross_attention_dim is missing"):
        assert part in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_type": "half"}, "rope_type must be one of split, interleaved"),
        ({"frequencies_precision": "bfloat16"}, "float64, float32"),
        ({"audio_num_attention_heads": 16}, "must equal audio_heads"),
        ({"caption_proj_before_connector": True, "cross_attention_dim": 3840}, "4096 and 2048"),
        ({"num_audio_sink_tokens": -1}, "num_audio_sinks"),
    ],
)
def test_unsupported_values(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_metadata(LTX20 | changes)
