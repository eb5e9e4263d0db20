"""The Gemma converter: exact weights out of every layout, and a complete list of what is wrong."""

import json
import pathlib
import re
import shutil

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from checkpoint_converters import gemma3, orbax_io, synthetic, synthetic_gemma
from checkpoint_converters.gemma3 import GEMMA_12B
from checkpoint_converters.key_map import GEMMA, TEXT_TOWER
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.text.gemma import init_boxed_params
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import load_gemma_config
from omniforcing_jax.text.text_encoder import load_text_tower
from tests.checkpoint_converters.files import read_file, write_file
from tests.tiny_gemma import write_word_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Random Gemma folder, sharded."""
    folder = tmp_path_factory.mktemp("gemma") / "hf"
    assert not synthetic_gemma.main(["--size", "tiny", "--output", str(folder)])
    return folder


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: array for file in files for key, array in read_file(file)[0].items()}


def rewrite(source, target, change=lambda arrays: None, rename=lambda key: key):
    """Copies a folder into one file of weights, with `change` applied to {key: array}."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    arrays = {rename(key): array for key, array in weights(source).items()}
    change(arrays)
    write_file(target / "model.safetensors", arrays, {"format": "pt"})
    return target


def refused(source, output, **options) -> str:
    """Converts, which must fail and leave nothing; the text of the error."""
    before = set(output.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        gemma3.convert(source, output, **options)
    assert set(output.parent.iterdir()) == before
    return str(error.value)


def tower(folder, dtype="bfloat16"):
    return load_text_tower(folder, load_gemma_config(folder), dtype=jax.numpy.dtype(dtype))


LAYOUTS = {
    "published": GEMMA,
    "newer transformers": "model.language_model.",
    "text only": "model.",
    "text only, without head": "",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_exact_weights(layout, source, tmp_path):
    def others(arrays):
        extra = np.ones((2, 2), np.float32)
        for key in ("vision_tower.vision_model.head.x", "multi_modal_projector.mm_soft_emb_norm.w"):
            if "language_model" in LAYOUTS[layout]:
                arrays["model." * LAYOUTS[layout].startswith("model.") + key] = extra
        if layout != "text only, without head":
            arrays["language_model." * (layout == "published") + "lm_head.weight"] = extra

    folder = rewrite(
        source, tmp_path / "hf", others, lambda key: LAYOUTS[layout] + key.removeprefix(GEMMA)
    )
    content = gemma3.convert(folder, tmp_path / "out")
    assert checkpoints.read_json(tmp_path / "out" / "config.json") == content
    assert content["family"] == "gemma3" and content["format"] == 1
    assert content["config"] == json.loads((folder / "config.json").read_text())["text_config"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    params, arrays = tower(tmp_path / "out"), weights(source)
    np.testing.assert_array_equal(
        params["embed"]["embedding"], arrays[GEMMA + "embed_tokens.weight"]
    )
    np.testing.assert_array_equal(params["final_norm"]["scale"], arrays[GEMMA + "norm.weight"])
    names = {
        "attn/q/kernel": "self_attn.q_proj",
        "attn/out/kernel": "self_attn.o_proj",
        "attn/k_norm/scale": "self_attn.k_norm",
        "ff/gate/kernel": "mlp.gate_proj",
        "ff/down/kernel": "mlp.down_proj",
        "pre_attn_norm/scale": "input_layernorm",
        "post_attn_norm/scale": "post_attention_layernorm",
        "pre_ff_norm/scale": "pre_feedforward_layernorm",
        "post_ff_norm/scale": "post_feedforward_layernorm",
    }
    for path, name in names.items():
        leaf = params["blocks"]
        for part in path.split("/"):
            leaf = leaf[part]
        assert leaf.shape[0] == 8
        for i in (0, 7):
            expected = arrays[f"{GEMMA}layers.{i}.{name}.weight"].T
            np.testing.assert_array_equal(leaf[i], expected)


def test_everything_wrong_is_listed_together(source, tmp_path):
    def damage(arrays):
        for layer in (2, 3, 4):
            del arrays[f"{GEMMA}layers.{layer}.mlp.up_proj.weight"]
        arrays[GEMMA + "norm.weight"] = np.zeros(31, np.float32)
        arrays[GEMMA + "layers.0.self_attn.q_proj.weight"] = np.zeros((64, 32), np.int8)
        arrays[GEMMA + "layers.8.input_layernorm.weight"] = np.zeros(32, np.float32)
        arrays["lora.weight"] = np.zeros(3, np.float32)

    bad = rewrite(source, tmp_path / "hf", damage)
    (bad / "tokenizer.json").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    lines = refused(bad, tmp_path / "out").splitlines()
    assert lines[0] == "7 problems, nothing was written:"
    for part in (
        "has neither tokenizer.json nor tokenizer.model; if the tokenizer is in another folder",
        f"{GEMMA}layers.{{2-4}}.mlp.up_proj.weight: missing, shape (64, 32)",
        f"{GEMMA}norm.weight: has shape (31), must be (32)",
        f"{GEMMA}layers.0.self_attn.q_proj.weight: has dtype I8",
        f"{GEMMA}layers.8.input_layernorm.weight: is not part of the model",
        "lora.weight: is not part of the model",
        "out: not empty; choose another --output",
    ):
        assert any(part in line for line in lines), (part, lines)


def test_folders_that_are_not_gemma3(source, tmp_path):
    def with_config(name, change):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    out = tmp_path / "out"
    assert "no such file or folder" in refused(tmp_path / "absent", out)
    folder = with_config("other", lambda c: c.update(model_type="gemma2"))
    assert "model_type is 'gemma2'; supported are 'gemma3'" in refused(folder, out)
    folder = with_config("capped", lambda c: c["text_config"].update(attn_logit_softcapping=30.0))
    assert "attn_logit_softcapping is 30.0; only None is supported" in refused(folder, out)
    (folder / "config.json").write_text("[1")
    assert "not a JSON object" in refused(folder, out)
    (folder / "config.json").unlink()
    assert "has no config.json beside it, and not the sizes of google" in refused(folder, out)
    folder = with_config("holes", lambda c: None)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard named in model.safetensors.index.json is missing" in refused(folder, out)
    folder = rewrite(source, tmp_path / "alien", rename=lambda key: "transformer." + key)
    assert "no text tower of a Gemma 3; looked for 'language_model.model." in refused(folder, out)


def test_an_older_conversion_survives_until_the_new_one_is_complete(
    source, tmp_path, monkeypatch, capsys
):
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert gemma3.main(arguments) == 0
    assert "Gemma 3, 8 layers of width 32" in capsys.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    assert gemma3.main(arguments) == 2
    assert "not empty; choose another --output or pass --overwrite" in capsys.readouterr().err

    def fail(*args):
        raise OSError("the disk broke")

    with monkeypatch.context() as patch:
        patch.setattr(orbax_io, "_copy", fail)
        assert gemma3.main([*arguments, "--overwrite"]) == 1
    assert capsys.readouterr().err == "error: the disk broke\n"
    assert sorted(tmp_path.rglob("*")) == before
    assert gemma3.main([*arguments, "--overwrite", "--dtype", "float32"]) == 0
    assert tower(tmp_path / "out", "float32")["final_norm"]["scale"].dtype == np.float32
    assert sorted(tmp_path.rglob("*")) == before


def single_file(source, target, change=lambda arrays: None):
    """All weights in one file in a folder of its own, as ComfyUI has them."""
    target.mkdir()
    arrays = {"model." + key.removeprefix(GEMMA): a for key, a in weights(source).items()}
    arrays["vision_model.head.x"] = arrays["multi_modal_projector.w"] = np.ones(2, np.float32)
    change(arrays)
    return write_file(target / "gemma.safetensors", arrays)


def test_a_single_file_with_its_tokenizer_inside(source, tmp_path):
    def spiece(arrays):
        arrays["spiece_model"] = np.frombuffer(b"a sentencepiece model", np.uint8)

    file = single_file(source, tmp_path / "one", spiece)
    shutil.copy(source / "config.json", tmp_path / "one")
    content = gemma3.convert(file, tmp_path / "out")
    assert [entry["name"] for entry in content["source"]] == ["gemma.safetensors"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    wanted = weights(source)[GEMMA + "norm.weight"]
    np.testing.assert_array_equal(tower(tmp_path / "out")["final_norm"]["scale"], wanted)
    # what lies beside it may be another model's; what is given goes before what is inside
    shutil.copy(source / "tokenizer.json", tmp_path / "one")
    gemma3.convert(file, tmp_path / "beside")
    assert (tmp_path / "beside" / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    assert not (tmp_path / "beside" / "tokenizer.json").exists()
    (tmp_path / "other.model").write_bytes(b"another")
    gemma3.convert(file, tmp_path / "given", tokenizer=tmp_path / "other.model")
    assert (tmp_path / "given" / "tokenizer.model").read_bytes() == b"another"
    assert not (tmp_path / "given" / "tokenizer.json").exists()
    text = refused(file, tmp_path / "x", tokenizer=source / "model.safetensors.index.txt")
    assert "index.txt: has neither tokenizer.json nor tokenizer.model" in text
    (tmp_path / "notes.txt").touch()
    text = refused(file, tmp_path / "x", tokenizer=tmp_path / "notes.txt")
    assert "a tokenizer is a .json or .model file" in text


def test_a_single_file_without_tokenizer_or_config(source, tmp_path):
    text = refused(single_file(source, tmp_path / "one"), tmp_path / "out")
    assert "one: has neither tokenizer.json nor tokenizer.model" in text
    assert "has no config.json beside it, and not the sizes of google/gemma-3-12b-it" in text


def test_a_single_file_of_the_12b_model_beside_the_config_of_another(source, tmp_path, monkeypatch):
    config = json.loads((source / "config.json").read_text())["text_config"]
    monkeypatch.setattr(gemma3, "GEMMA_12B", config)
    file = single_file(source, tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text('{"model_type": "t5"}')
    content = gemma3.convert(file, tmp_path / "out", tokenizer=source)
    assert content["config"] == config
    monkeypatch.undo()  # of any other size it is needed
    text = refused(file, tmp_path / "x", tokenizer=source)
    assert "model_type is 't5'; supported are 'gemma3'" in text


def test_scaled_fp8(source, tmp_path):
    """As ComfyUI's text encoders are: the linear layers, each with a scale."""
    key = "model.layers.3.mlp.up_proj.weight"

    def quantise(arrays):
        for name in [n for n in arrays if n.endswith("_proj.weight")]:
            scaled = arrays[name].astype(np.float32) * 64
            arrays[name] = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            arrays[name + "_scale"] = np.full((), 1 / 64, np.float32)

    file = single_file(source, tmp_path / "one", quantise)
    shutil.copy(source / "config.json", tmp_path / "one")
    content = gemma3.convert(file, tmp_path / "out", tokenizer=source)
    assert content["notes"] == ["56 weights were scaled fp8"]
    kernel = tower(tmp_path / "out")["blocks"]["ff"]["up"]["kernel"][3]
    wanted = read_file(file)[0][key].astype(np.float32) / 64
    np.testing.assert_array_equal(np.asarray(kernel).T.astype(np.float32), wanted)


def test_tokenizer_of_another_folder(source, tmp_path):
    folder = rewrite(source, tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "tokenizer").mkdir()
    write_word_tokenizer(tmp_path / "tokenizer")
    gemma3.convert(folder, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    wanted = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == wanted
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.fixture(scope="module")
def real_names():
    """{key: shape} of google/gemma-3-12b-it as `transformers` names it."""
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                  num_attention_heads=16, image_size=896, patch_size=14)  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=GEMMA_12B, vision_config=vision)
        )
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_the_12b_model_needs_no_config(real_names):
    tensors = {
        key.replace("model.language_model.", "model."): TensorInfo(
            pathlib.Path("absent"), "BF16", shape, 0, 2 * int(np.prod(shape))
        )
        for key, shape in real_names.items()
    }
    config = GemmaConfig.from_metadata(gemma3.known_config(tensors, pathlib.Path("gemma")))
    assert config == GemmaConfig()
    assert gemma3.select(tensors, config, pathlib.Path("gemma"))[1] == []


@pytest.mark.parametrize("layout", ["published", "newer transformers"])
def test_every_key_of_the_12b_model_has_its_place(layout, real_names):
    def published(key):
        key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
        key = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", key)
        return re.sub(r"^lm_head\.", "language_model.lm_head.", key)

    names = real_names
    if layout == "published":
        names = {published(key): shape for key, shape in names.items()}
        assert any(key.startswith("vision_tower.") for key in names)
    tensors = {
        key: TensorInfo(pathlib.Path("absent"), "BF16", shape, 0, 2 * int(np.prod(shape)))
        for key, shape in names.items()
    }
    config = GemmaConfig.from_metadata(GEMMA_12B)
    chosen, problems = gemma3.select(tensors, config, pathlib.Path("gemma"))
    assert problems == []
    assert len(chosen) == 2 + 48 * 13
    leaves = orbax_io.plan_leaves(chosen, TEXT_TOWER, mesh={"fsdp": 4, "tensor": 2})
    boxed = jax.eval_shape(lambda k: init_boxed_params(config, k), jax.random.key(0))
    expected = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(nn.unbox(boxed))
    }
    assert {leaf.path: leaf.shape for leaf in leaves} == expected
    assert sum(len(leaf.sources) for leaf in leaves) == len(chosen)
    chunks = {leaf.path: leaf.chunks for leaf in leaves}
    assert chunks["blocks/ff/down/kernel"] == (1, 15360 // 2, 3840 // 4)
    assert chunks["blocks/attn/q/kernel"] == (1, 3840 // 4, 4096 // 2)


@pytest.mark.parametrize("size", synthetic_gemma.SIZES)
def test_synthetic_sizes_fit_the_synthetic_ltx2(size):
    config = GemmaConfig.from_metadata(synthetic_gemma.text_config(size))
    ltx = synthetic.SIZES[size]
    assert (config.hidden_size, config.num_states) == (ltx["text"], ltx["states"])
    assert size != "full" or config == GemmaConfig()


def test_synthetic_folder(source, tmp_path):
    synthetic_gemma.write(tmp_path / "again", "tiny")
    for file in source.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    synthetic_gemma.write(tmp_path / "other", "tiny", seed=1)
    name = "model-00001-of-00002.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (source / name).read_bytes()
    with pytest.raises(ConversionError, match="not empty; choose another"):
        synthetic_gemma.write(tmp_path / "other", "tiny")
    with pytest.raises(ValueError, match=r"size must be one of tiny, small, .*full"):
        synthetic_gemma.write(tmp_path / "new", "huge")
    from omniforcing_jax.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    assert tokenizer.vocab_size <= 512 and tokenizer.bos_id == 2
    ids, _ = tokenizer.encode_batch(["A dog ☂ rüns."], 32)
    assert 3 not in ids  # byte fallback: nothing is unknown
