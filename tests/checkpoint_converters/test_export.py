"""Students that were trained here, as official files and back."""

import jax
import numpy as np
import pytest

from checkpoint_converters import export, key_map, ltx2, reading, synthetic
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.sampling.trained import TrainedSettings

STABILISERS = {"extra_qk_norm": True, "tanh_gated_attention": True}


@pytest.fixture(scope="module")
def student():
    """(metadata, parameters) of a random student with all options."""
    section = synthetic.metadata("tiny", "2.0")["transformer"] | STABILISERS
    section |= {"num_audio_sink_tokens": 4, "sink_rope": "incremental"}
    model, rng = Transformer(TransformerConfig.from_metadata(section)), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    return {"transformer": section}, params


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_student_with_stabilisers_goes_out_and_comes_back(student, tmp_path):
    config, params = student
    state = TrainedSettings(layout="prefix", timesteps=(1000, 500), text_length=48).to_json()
    content = {"family": "omniforcing", "model_version": "2.0.0", "config": config}
    content |= {"trained": state, "source": []}
    checkpoints.save_params(tmp_path / "student", "transformer", params, content)
    file = tmp_path / "student.safetensors"
    export.export(tmp_path / "student", file)
    assert_equal(reading.load_component(file, "transformer"), params)
    converted = ltx2.convert(file, tmp_path / "again")
    assert_equal(checkpoints.load_params(tmp_path / "again", "transformer"), params)
    assert (converted["trained"], converted["config"]) == (state, config)


def test_names_of_stabilisers():
    """Beside the keys of their attention; the text attentions have none."""
    block = key_map.DIT + "transformer_blocks.1."
    for key, path in (
        ("attn1.q_head_norm.weight", "blocks/video_attn/q_head_norm/scale"),
        ("audio_to_video_attn.k_head_norm.weight", "blocks/a2v_attn/k_head_norm/scale"),
        ("audio_attn1.alpha", "blocks/audio_attn/alpha"),
    ):
        target = key_map.find_place(block + key)
        assert (target.path, target.layer) == (path, 1)
    config = {"transformer": synthetic.metadata("tiny", "2.0")["transformer"] | STABILISERS}
    names = {"q_head_norm.weight", "k_head_norm.weight", "alpha"}
    keys = [key for key in export.expected_shapes(config, "transformer")
            if key.removeprefix(block).partition(".")[2] in names]  # fmt: skip
    assert len(keys) == 12 and not any("attn2" in key for key in keys)
