"""LTX-2.5's Gemma 4 text tower against `transformers`, from the file it is published in."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

from checkpoint_converters import gemma3, gemma4, ltx2, synthetic_gemma
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import load_gemma_config
from omniforcing_jax.text.text_encoder import load_text_tower
from omniforcing_jax.text.tokenizer import load_tokenizer
from tests.checkpoint_converters.files import write_file

TEXT = {
    "model_type": "gemma4_unified_text",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


@pytest.fixture(scope="module")
def reference():
    """`transformers`' model with random weights."""
    torch.manual_seed(0)
    settings = {name: value for name, value in TEXT.items() if name != "model_type"}
    model = Gemma4UnifiedTextModel(Gemma4UnifiedTextConfig(**settings)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith("layer_scalar"):
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def arrays(reference, tmp_path_factory):
    """{name: array} of LTX-2.5's text encoder file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    synthetic_gemma.write_tokenizer(folder, TEXT["vocab_size"])
    content = (folder / "tokenizer.json").read_bytes()
    arrays = {f"model.{name}": x.numpy() for name, x in reference.state_dict().items()}
    arrays |= {
        "tokenizer_json": np.frombuffer(content, np.uint8),
        "hf_asset__tokenizer_config.json": np.frombuffer(b"{}", np.uint8),
        "text_embedding_projection.video_aggregate_embed.bias": np.zeros(4, np.float32),
        "vision_model.patch_dense.weight": np.zeros((2, 2), np.float32),
    }
    return arrays


METADATA = {"gemma_config": json.dumps({"model_type": "gemma4_unified", "text_config": TEXT})}


@pytest.fixture(scope="module")
def converted(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4")
    source = write_file(folder / "encoder.safetensors", arrays, METADATA)
    assert not gemma4.main(["--input", str(source), "--output", str(folder / "gemma4")])
    return folder / "gemma4"


def test_hidden_states(converted, reference):
    config = load_gemma_config(converted)
    assert config.gemma4 and config.heads(True) == (16, 1) and config.heads(False) == (8, 2)
    params = load_text_tower(converted, config, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 256, (2, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5] = 0  # padded on the left
    found = jax.jit(TextTower(config).apply)({"params": params}, ids, mask)
    with torch.no_grad():
        states = reference(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states
    expected = np.stack([state.numpy() for state in states], -1)
    assert found.shape == expected.shape == (2, 12, 32, 7)
    valid = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(found)[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert np.isfinite(np.asarray(found)).all()


def test_other_converters_point_here(arrays, tmp_path):
    """A Gemma 4 as Hugging Face has it, given as an LTX-2 or a Gemma 3."""
    tower = {key: x for key, x in arrays.items() if key.startswith("model.")}
    write_file(tmp_path / "model.safetensors", tower)
    with pytest.raises(ConversionError, match=r"is a Gemma 4, .*checkpoint_converters\.gemma4"):
        ltx2.convert(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_unified"}')
    with pytest.raises(ConversionError, match=r"is a Gemma 4; python -m checkpoint_converters"):
        gemma3.convert(tmp_path, tmp_path / "out")


def test_a_stock_gemma_is_not_that_of_ltx(arrays, tmp_path, monkeypatch, capsys):
    """Given as the folder that holds nothing else, as well."""
    monkeypatch.setattr(gemma4, "_SIZE", (6, 32))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_file(folder / "encoder.safetensors", arrays, METADATA)
    assert not gemma4.main(["--input", str(folder), "--output", str(tmp_path / "out")])
    assert "is not LTX-2.5's own fine-tune of Gemma 4" in capsys.readouterr().out


def test_tokenizer_comes_with_it(converted):
    (ids,) = load_tokenizer(converted).encode(["A dog"])
    assert ids[0] == load_tokenizer(converted).bos_id and len(ids) > 1


def test_scaled_fp8(arrays, converted, tmp_path):
    """The linear layers with a scale each; the vision tower may be quantised, too."""
    scaled = dict(arrays)
    for key in [k for k in arrays if k.endswith("_proj.weight")]:
        scaled[key] = np.clip(arrays[key] * 64, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        scaled[key + "_scale"] = np.full((), 1 / 64, np.float32)
    source = write_file(tmp_path / "fp8.safetensors", scaled, METADATA)
    content = gemma4.convert(source, tmp_path / "out", dtype="float32")
    assert content["notes"] == [f"{len(scaled) - len(arrays)} weights were scaled fp8"]
    config = load_gemma_config(converted)
    ours, exact = (
        load_text_tower(folder, config, dtype=jnp.float32)
        for folder in (tmp_path / "out", converted)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.07, atol=1e-4), ours, exact)


def test_what_is_wrong_is_listed(arrays, tmp_path):
    def problems(arrays, metadata=METADATA):
        source = write_file(tmp_path / "bad.safetensors", arrays, metadata)
        with pytest.raises(ConversionError) as caught:
            gemma4.convert(source, tmp_path / "out")
        return "\n".join(map(str, caught.value.problems))

    some = {
        name: x for name, x in arrays.items() if name != "model.layers.2.self_attn.k_proj.weight"
    }
    some["model.layers.2.self_attn.v_proj.weight"] = np.zeros((16, 32), np.float32)
    text = problems(some)
    assert "model.layers.2.self_attn.k_proj.weight: missing" in text
    assert "model.layers.2.self_attn.v_proj.weight: is not part" in text
    assert "has no gemma_config in its metadata, and no config.json" in problems(arrays, {})
    gemma3 = {"gemma_config": json.dumps(synthetic_gemma.text_config("tiny"))}
    assert "not the settings of a Gemma 4 as LTX-2.5 uses it" in problems(arrays, gemma3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma4_text"}, "hidden_size_per_layer_input is 256; only 0"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2; only 0"),
        ({"use_bidirectional_attention": "all"}, "only causal towers"),
        ({"layer_types": ["linear_attention"] * 6}, "layer_types has linear_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
            "rope_parameters of sliding_attention have no rope_theta",
        ),
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_metadata(TEXT | changes)


def test_size_of_the_published_tower():
    big = GemmaConfig.from_metadata(
        TEXT
        | {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
        | {"global_head_dim": 512, "vocab_size": 262144, "layer_types": None}
    )
    assert big.num_states == 49 and sum(big.is_global) == 8
