"""LoRAs of all kinds of files are merged as they should be, or refused by what they are."""

import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoint_converters import export, lora, ltx2, reading, synthetic
from checkpoint_converters.diffusers_layout import official_from_diffusers
from checkpoint_converters.key_map import DIT
from checkpoint_converters.safetensors_io import ConversionError, read_header
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.lora import merge
from tests.checkpoint_converters.files import read_file, rewrite_file, write_file

LAYER = "transformer_blocks.0.attn1.to_q"
F32 = np.dtype(np.float32)
PARTS = ("transformer", "connectors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random LTX-2.3 file."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    synthetic.write(path, "tiny", "2.3", components=PARTS)
    return path


@pytest.fixture(scope="module")
def style(model):
    """Random LoRA for it, in the official layout."""
    synthetic.write_lora(model.parent / "style.safetensors", "tiny", "2.3")
    return model.parent / "style.safetensors"


def merged(path, *loras, components=PARTS):
    """{official key: tensor}, which must go without problems."""
    tensors, _, problems = lora.merge(reading.open_checkpoint(path).tensors, loras, components)
    assert problems == []
    return tensors


def weight(tensors, key):
    tensor = tensors[key]
    return tensor.read(F32) if hasattr(tensor, "recipe") else None


def wrong(path, *loras, components=PARTS):
    return lora.merge(reading.open_checkpoint(path).tensors, loras, components)[2]


# -- against the reference -------------------------------------------------------------------------


def test_merged_weights_match_the_reference(golden_dir):
    """Official code, and its formula with alpha where a third party's file has one."""
    folder, base = golden_dir / "conditions", golden_dir / "ltx23_tiny.safetensors"
    expected = np.load(folder / "ltx23_lora_expected.npz")
    files = {"r4": "ltx23_lora_rank4", "r3alpha": "ltx23_lora_rank3_alpha"}
    for name, file in files.items():
        tensors = merged(base, (folder / f"{file}.safetensors", 0.6))
        wanted = {DIT + key.partition("/")[2]: array for key, array in expected.items()
                  if key.startswith(f"{name}_s060")}  # fmt: skip
        if name == "r3alpha":
            full = merged(base, (folder / f"{file}.safetensors", 1.0))
            for key in [key for key in expected if key.startswith("notofficial")]:
                official = key.partition("/")[2]
                np.testing.assert_allclose(weight(full, official), expected[key], atol=1e-5)
        assert len(wanted) >= 3
        for key, array in wanted.items():
            np.testing.assert_allclose(weight(tensors, key), array, atol=1e-5, err_msg=key)


def test_conversion_with_two_loras(model, style, tmp_path, capsys):
    """Sums in float32, rounded once; what was merged stands in config.json."""
    other = tmp_path / "other.safetensors"
    synthetic.write_lora(other, "tiny", "2.3", rank=2, seed=1)
    arguments = ["--input", str(model), "--output", str(tmp_path / "out")]
    assert ltx2.main([*arguments, "--lora", f"{style}:0.5", "--lora", str(other)]) == 0
    content = checkpoints.load_config(tmp_path / "out")
    first, second = content["loras"]
    assert first == {
        "name": "style.safetensors",
        "bytes": style.stat().st_size,
        "sha256": hashlib.sha256(style.read_bytes()).hexdigest(),
        "strength": 0.5,
        "layers": 48,
        "rank": [4],
        "alpha": [None],
    }
    assert (second["name"], second["strength"], second["rank"]) == ("other.safetensors", 1.0, [2])
    total = read_file(model)[0][DIT + LAYER + ".weight"].astype(F32)
    for file, strength in ((style, 0.5), (other, 1.0)):
        arrays, _ = read_file(file)
        down, up = (arrays[f"diffusion_model.{LAYER}.lora_{n}.weight"].astype(F32) for n in "AB")
        total += strength * up @ down
    kernel = checkpoints.load_params(tmp_path / "out", "transformer")["blocks"]["video_attn"]["q"][
        "kernel"
    ][0]
    wanted = total.astype(ml_dtypes.bfloat16).astype(F32)
    ulp = np.abs(wanted) * 2.0**-8
    actual = np.asarray(kernel).T.astype(F32)
    assert (np.abs(actual - wanted) <= ulp).all() and (actual == wanted).mean() > 0.99
    # added to weights in memory, as launch.stream does, they are the same
    loras = [(style, 0.5), (other, 1.0)]
    updates, lines = lora.updates(loras, content["config"])
    assert lines == [lora.describe(first), lora.describe(second)]
    ltx2.convert(model, tmp_path / "plain")
    params = checkpoints.load_params(tmp_path / "plain", "transformer")
    jax.tree.map(
        lambda ours, converted: np.testing.assert_array_max_ulp(
            np.asarray(ours, F32), np.asarray(converted, F32), maxulp=1 << 16
        ),
        merge(params, updates),
        checkpoints.load_params(tmp_path / "out", "transformer"),
    )
    # what was merged is in an exported file as well, and another one comes on top
    export.export(tmp_path / "out", tmp_path / "out.safetensors", components=("transformer",))
    arguments = ["--input", str(tmp_path / "out.safetensors"), "--lora", str(style)]
    assert ltx2.main([*arguments, "--output", str(tmp_path / "back")]) == 0
    back = checkpoints.load_config(tmp_path / "back")
    assert back["loras"] == [first, second, first | {"strength": 1.0}]
    assert back["config"] == content["config"]
    assert "merged: style.safetensors, strength 0.5, 48 layers" in capsys.readouterr().out
    strings = read_header(tmp_path / "out.safetensors")[1]
    strings["config"] = strings["config"].replace('"strength"', '"weight"')
    bad = rewrite_file(tmp_path / "out.safetensors", tmp_path / "bad.safetensors", metadata=strings)
    with pytest.raises(ConversionError, match="metadata of merged LoRAs cannot be read"):
        ltx2.convert(bad, tmp_path / "x")
    # other weights, so another fingerprint
    plain = checkpoints.load_config(tmp_path / "plain")
    assert "loras" not in plain
    assert content["fingerprints"]["transformer"] != plain["fingerprints"]["transformer"]
    assert content["fingerprints"]["connectors"] == plain["fingerprints"]["connectors"]
    ltx2.convert(model, tmp_path / "half", loras=[(style, 0.25), (other, 1.0)])
    half = checkpoints.load_config(tmp_path / "half")
    assert content["fingerprints"]["transformer"] != half["fingerprints"]["transformer"]


def test_lora_on_scaled_fp8(style, tmp_path):
    base = tmp_path / "fp8.safetensors"
    synthetic.write(base, "tiny", "2.3", dtype="float8", components=("transformer",))
    key = f"{DIT}transformer_blocks.1.attn1.to_q.weight"
    plain = reading.open_checkpoint(base).tensors[key].read(F32)
    arrays, _ = read_file(style)
    down, up = (
        arrays[f"diffusion_model.transformer_blocks.1.attn1.to_q.lora_{n}.weight"].astype(F32)
        for n in "AB"
    )
    actual = weight(merged(base, (style, 2.0), components=("transformer",)), key)
    np.testing.assert_allclose(actual, plain + 2.0 * up @ down, atol=1e-6)


# -- names in other files --------------------------------------------------------------------------


def renamed(style, target, rename, change=lambda arrays: None, metadata=None):
    arrays, _ = read_file(style)
    arrays = {rename(key): array for key, array in arrays.items()}
    change(arrays)
    return write_file(target, arrays, metadata)


def kohya(key):
    layer, _, part = key.removeprefix("diffusion_model.").partition(".lora_")
    part = {"A": "lora_down", "B": "lora_up"}[part[0]]
    return f"lora_unet_{layer.replace('.', '_')}.{part}.weight"


RENAMES = {
    "diffusers": lambda key: key.replace("diffusion_model.", "transformer."),
    "PEFT": lambda key: "base_model.model." + key.replace("diffusion_model.", ""),
    "PEFT with an adapter's name": lambda key: (
        "base_model.model."
        + key.replace("diffusion_model.", "").replace(".weight", ".default.weight")
    ),
    "no prefix": lambda key: key.replace("diffusion_model.", ""),
    "down and up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "underscores": kohya,
}


@pytest.mark.parametrize("layout", RENAMES)
def test_names(model, style, tmp_path, layout):
    other = renamed(style, tmp_path / "x.safetensors", RENAMES[layout])
    ours, official = merged(model, (other, 1.0)), merged(model, (style, 1.0))
    keys = [key for key in official if hasattr(official[key], "recipe")]
    assert len(keys) == 48
    for key in keys:
        np.testing.assert_array_equal(weight(ours, key), weight(official, key), err_msg=key)


def test_names_that_only_diffusers_has(model, tmp_path):
    names = {
        "transformer.proj_in": DIT + "patchify_proj.weight",
        "transformer.time_embed.linear": DIT + "adaln_single.linear.weight",
        "transformer.prompt_adaln.linear": DIT + "prompt_adaln_single.linear.weight",
        "connectors.video_connector.transformer_blocks.0.attn1.to_q": DIT
        + "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight",
        "connectors.video_text_proj_in": "text_embedding_projection.video_aggregate_embed.weight",
        "text_embedding_projection.audio_aggregate_embed": (
            "text_embedding_projection.audio_aggregate_embed.weight"
        ),
    }
    shapes = {key: info.shape for key, info in reading.open_checkpoint(model).tensors.items()}
    arrays = {}
    for name, key in names.items():
        out, inputs = shapes[key]
        arrays[f"{name}.lora_A.weight"] = np.ones((2, inputs), F32)
        arrays[f"{name}.lora_B.weight"] = np.ones((out, 2), F32)
    file = write_file(tmp_path / "x.safetensors", arrays, {})
    tensors = merged(model, (file, 1.0))
    before = read_file(model)[0]
    for key in names.values():
        np.testing.assert_array_equal(weight(tensors, key), before[key].astype(F32) + 2)
    back = official_from_diffusers("transformer", ["proj_in.weight"])
    assert back == {"proj_in.weight": DIT + "patchify_proj.weight"}


@pytest.mark.parametrize("where", ["tensor", "metadata", "settings"])
def test_alpha(model, style, tmp_path, where):
    """An alpha of 1 at rank 4 is a strength of a quarter."""
    folder, settings = tmp_path / "peft", {"r": 4, "lora_alpha": 1}
    folder.mkdir()
    metadata = {"format": "pt"}

    def add(arrays):
        for key in [k for k in arrays if "lora_A" in k]:
            arrays[key.replace("lora_A.weight", "alpha")] = np.ones((), F32)

    if where == "metadata":
        strings = {f"transformer.{name}": value for name, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(strings)
    elif where == "settings":
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    other = renamed(
        style, folder / "adapter_model.safetensors", RENAMES["PEFT"],
        add if where == "tensor" else lambda arrays: None, metadata,
    )  # fmt: skip
    key = f"{DIT}{LAYER}.weight"
    np.testing.assert_array_equal(
        weight(merged(model, (folder, 1.0)), key), weight(merged(model, (style, 0.25)), key)
    )
    _, records, _ = lora.merge(reading.open_checkpoint(model).tensors, [(other, 1.0)], PARTS)
    assert records[0]["alpha"] == [1.0]


def test_strength_of_an_argument(tmp_path):
    assert lora.parse("a/b.safetensors") == (lora.pathlib.Path("a/b.safetensors"), 1.0)
    assert lora.parse("b.safetensors:-0.5") == (lora.pathlib.Path("b.safetensors"), -0.5)
    assert lora.parse("C:\\b.safetensors")[1] == 1.0
    odd = tmp_path / "b:2"
    odd.touch()
    assert lora.parse(str(odd)) == (odd, 1.0)
    for text in ("b:0", "b:nan", "b:inf"):
        with pytest.raises(ValueError, match="finite number other than zero"):
            lora.parse(text)


# -- what is refused -------------------------------------------------------------------------------


def test_layers_that_match_nothing_and_shapes_that_do_not_fit(model, style, tmp_path):
    def damage(arrays):
        key = f"diffusion_model.{LAYER}.lora_B.weight"
        arrays[key] = arrays[key][:-1].copy()
        for number in range(12):
            for part in "AB":
                name = f"diffusion_model.single_blocks.{number}.qkv.lora_{part}.weight"
                arrays[name] = np.ones((4, 4), F32)
        arrays["diffusion_model.vae.encoder.conv_in.lora_A.weight"] = np.ones((4, 4), F32)

    bad = rewrite_file(style, tmp_path / "bad.safetensors", damage)
    assert wrong(model, (bad, 1.0)) == [
        f"{bad}: diffusion_model.vae.encoder.conv_in.lora_A.weight belongs to no pair of LoRA "
        "matrices"
    ]
    bad = rewrite_file(
        style, tmp_path / "bad.safetensors",
        lambda arrays: [damage(arrays), arrays.popitem()],
    )  # fmt: skip
    problems = wrong(model, (bad, 1.0))
    assert len(problems) == 13
    assert "single_blocks.3.qkv matches no layer of the model" in "\n".join(problems)
    assert f"{LAYER} has matrices of shape (4, 64) and (63, 4), which do not fit" in problems[-1]
    with pytest.raises(ConversionError, match="3 more lines of this kind"):
        ltx2.convert(model, tmp_path / "out", loras=[(bad, 1.0)])
    assert not (tmp_path / "out").exists()


def test_components_that_are_not_converted(model, tmp_path):
    name = "text_embedding_projection.video_aggregate_embed"
    shape = reading.open_checkpoint(model).tensors[name + ".weight"].shape
    arrays = {
        f"{name}.lora_A.weight": np.ones((1, shape[1]), F32),
        f"{name}.lora_B.weight": np.ones((shape[0], 1), F32),
    }
    file = write_file(tmp_path / "x.safetensors", arrays)
    problems = wrong(model, (file, 1.0), components=("transformer",))
    assert problems == [
        f"{file}: {name} changes the connectors, which is not converted; add it to --components"
    ]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("dora_scale", "not a plain LoRA but DoRA"),
        ("lora_magnitude_vector", "not a plain LoRA but DoRA"),
        ("lokr_w1", "not a plain LoRA but LoKr"),
        ("diff_b", "not a plain LoRA but full difference of weights"),
    ],
)
def test_other_adapters_are_named(model, style, tmp_path, extra, text):
    def add(arrays):
        arrays[f"diffusion_model.{LAYER}.{extra}"] = np.ones((64, 1), F32)

    file = rewrite_file(style, tmp_path / "x.safetensors", add)
    assert text in wrong(model, (file, 1.0))[0]


def test_a_lora_and_a_model_in_each_others_place(model, style, tmp_path):
    with pytest.raises(ConversionError, match=r"is a LoRA of 48 layers; .* --lora"):
        ltx2.convert(style, tmp_path / "out")
    [problem] = wrong(model, (model, 1.0))
    assert "is LTX-2 (transformer, connectors); python -m checkpoint_converters.ltx2" in problem
    [problem] = wrong(model, (tmp_path / "absent.safetensors", 1.0))
    assert "no such file" in problem
    other = write_file(tmp_path / "x.safetensors", {"a.weight": np.ones(3, F32)})
    [problem] = wrong(model, (other, 1.0))
    assert "no pairs of lora_A and lora_B" in problem


def test_what_cannot_be_added_in_memory(model, style, tmp_path):
    """Said before weights are read, all of it."""
    config = reading.read_metadata(model)["config"]

    def change(arrays):
        for n in "AB":
            wrong = arrays.pop(f"diffusion_model.{LAYER}.lora_{n}.weight")
            arrays[f"diffusion_model.{LAYER}_x.lora_{n}.weight"] = wrong
            name = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
            arrays[f"diffusion_model.{name}.lora_{n}.weight"] = wrong
        name = f"diffusion_model.{LAYER.replace('to_q', 'to_k')}.lora_A.weight"
        arrays[name] = arrays[name][:, :-1]

    bad = rewrite_file(style, tmp_path / "bad.safetensors", change)
    with pytest.raises(ConversionError) as error:
        lora.updates([(bad, 1.0), (model, 1.0)], config)
    text = "\n".join(error.value.problems)
    assert f"{LAYER}_x matches no layer of the model" in text
    assert "changes the connectors, which is done once and for all, by" in text
    assert "to_k has matrices of shape" in text and "is LTX-2 (transformer, connectors)" in text


def test_values_that_are_not_finite(model, style, tmp_path):
    """They are met while weights are streamed; nothing is left behind."""

    def damage(arrays):
        arrays[f"diffusion_model.{LAYER}.lora_A.weight"][1, 2] = np.nan

    bad = rewrite_file(style, tmp_path / "bad.safetensors", damage)
    with pytest.raises(ConversionError, match=rf"{LAYER} is not finite"):
        ltx2.convert(model, tmp_path / "out", loras=[(bad, 1.0)])
    assert {path.name for path in tmp_path.iterdir()} == {"bad.safetensors"}


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan])
def test_alphas_that_are_none(model, style, tmp_path, alpha):
    def add(arrays):
        arrays[f"diffusion_model.{LAYER}.alpha"] = np.full((), alpha, F32)

    file = rewrite_file(style, tmp_path / "x.safetensors", add)
    [problem] = wrong(model, (file, 1.0))
    assert f"{LAYER} has alpha {alpha}; it must be a positive number" in problem


def test_settings_that_change_the_scale(model, style, tmp_path):
    shutil.copy(style, tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    [problem] = wrong(model, (tmp_path, 1.0))
    assert "use_rslora, which is not supported" in problem
