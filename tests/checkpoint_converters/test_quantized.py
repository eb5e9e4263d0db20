"""Low-precision files become the weights they stand for; other layouts are named and refused."""

import argparse
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoint_converters import computed, ltx2, reading, safetensors_io, synthetic
from checkpoint_converters.key_map import DIT, find_place
from checkpoint_converters.safetensors_io import ConversionError, read_header
from launch import options
from omniforcing_jax.io import checkpoints
from omniforcing_jax.sampling.weights import per_layer
from tests.checkpoint_converters.files import read_file, rewrite_file, write_file

ROOT = pathlib.Path(__file__).parents[2]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = DIT + "transformer_blocks.1."
QUERY = BLOCK + "attn1.to_q"


@functools.lru_cache(maxsize=2)
def component(folder, name):
    return checkpoints.load_params(folder, name)


def converted(folder, key):
    """A tensor of a converted checkpoint in the official layout, as float32."""
    place = find_place(key)
    leaf = component(folder, place.component)
    for part in place.path.split("/"):
        leaf = leaf[part]
    leaf = np.asarray(leaf if place.layer is None else leaf[place.layer])
    return place.transform.invert(leaf).astype(np.float32)


def refused(path, output, **options):
    with pytest.raises(ConversionError) as error:
        ltx2.convert(path, output, **options)
    assert not output.exists()
    return error.value


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Random LTX-2.0 file in scaled fp8: block 1 of two."""
    path = tmp_path_factory.mktemp("scaled") / "fp8.safetensors"
    synthetic.write(path, "tiny", "2.0", dtype="float8", components=("transformer",))
    return path


# -- what is converted -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "keep"])
@pytest.mark.parametrize("name", ["ltx23_fp8", "nvfp4_tiny"])
def test_reference_weights_are_exact(golden_dir, tmp_path, name, dtype):
    """Those that LTX-2's own code dequantises, or whose layout it documents."""
    folder = golden_dir / "conditions"
    source = folder / f"{name}.safetensors"
    content = ltx2.convert(source, tmp_path / "out", dtype=dtype)
    assert content["components"] == ["transformer", "connectors"]
    expected = np.load(folder / f"{name.removesuffix('_tiny')}_expected.npz")
    keys = [key for key in expected.files if key.startswith("dequant_fp32/")]
    assert len(keys) >= 5
    for key in keys:
        wanted = expected[key]
        if dtype == "keep":
            wanted = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
        official = DIT + key.removeprefix("dequant_fp32/")
        np.testing.assert_array_equal(converted(tmp_path / "out", official), wanted, err_msg=key)
    leaves = jax.tree.leaves(checkpoints.param_shapes(tmp_path / "out", "transformer"))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16" if dtype == "keep" else "float32"}


@pytest.mark.parametrize("case", ["a", "b", "nvfp4"])
def test_layouts_of_comfyui_match_its_own_code(golden_dir, tmp_path, monkeypatch, case):
    """Rotated int8 in groups of 64 and 256, and NVFP4, as comfy-kitchen dequantises them."""
    monkeypatch.setattr(computed, "SLICE_BYTES", 1)
    monkeypatch.setattr(computed, "TILE", 128 if case == "nvfp4" else 5)
    stored = np.load(golden_dir / "conditions" / "comfy_kitchen.npz")
    arrays = {f"x.{name}": stored[f"{case}_{name}"] for name in ("weight", "weight_scale")}
    if case == "nvfp4":
        settings = {"format": "nvfp4"}
        arrays["x.weight_scale"] = arrays["x.weight_scale"].view(FP8)
        arrays["x.weight_scale_2"] = stored["nvfp4_weight_scale_2"]
    else:
        size = int(stored[f"{case}_groupsize"])
        settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    arrays["x.comfy_quant"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    file = write_file(tmp_path / "x.safetensors", arrays)
    tensors = reading.open_checkpoint(file).tensors
    assert set(tensors) == {"x.weight"}
    actual = tensors["x.weight"].read(np.dtype(np.float32))
    atol = 0 if case == "nvfp4" else 1e-6
    np.testing.assert_allclose(actual, stored[f"{case}_dequant"], atol=atol, rtol=0)


def test_what_was_not_quantised_is_kept(scaled, tmp_path, monkeypatch):
    """All of it, bit for bit; and slices and layers make no difference."""
    monkeypatch.setattr(computed, "SLICE_BYTES", 1 << 10)  # slices of 128 rows
    whole = reading.load_component(scaled, "transformer")
    monkeypatch.undo()
    content = ltx2.convert(scaled, tmp_path / "out")
    assert content["notes"] == ["28 weights were scaled fp8"]
    arrays, _ = read_file(scaled)
    assert sum(array.dtype == FP8 for array in arrays.values()) == 28
    for key, array in arrays.items():
        if key.endswith("_scale"):
            continue
        wanted = array.astype(np.float32)
        if array.dtype == FP8:
            wanted *= arrays[key + "_scale"]
        wanted = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(converted(tmp_path / "out", key), wanted, err_msg=key)
    for a, b in zip(
        jax.tree.leaves(whole),
        jax.tree.leaves(checkpoints.load_params(tmp_path / "out", "transformer")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_float8_weights_are_streamed_as_the_file_has_them(scaled, tmp_path):
    """On disk they are bfloat16; the scales that the converter notes make them again, bit by bit,
    also beside a LoRA, and layers that were not float8 stay what they were."""
    ltx2.convert(scaled, tmp_path / "out")
    arrays, _ = read_file(scaled)
    params = checkpoints.load_params(tmp_path / "out", "transformer")
    scales = checkpoints.float8_scales(tmp_path / "out")
    assert {tuple(s is None for s in found) for found in scales.values()} == {(True, False)}
    up = params["blocks"]["audio_ff"]["up"]["kernel"]
    params["blocks"]["audio_ff"]["up"]["kernel"] = up.at[1, :, 0].add(10)  # more than its scale can
    blocks = per_layer(params, quantize="w8a8-fp8", scales=scales)["blocks"]
    assert isinstance(blocks[0]["video_ff"]["up"]["kernel"], jax.Array)
    names = [f"{BLOCK}attn1.to_{name}.weight" for name in "qkv"]
    found = blocks[1]["video_attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(found.values, np.concatenate([arrays[name] for name in names]))
    expected = np.repeat([arrays[name + "_scale"] for name in names], len(found.scale) // 3)
    np.testing.assert_array_equal(found.scale[:, 0], expected)
    found, key = blocks[1]["audio_ff"]["up"]["kernel"], f"{BLOCK}audio_ff.net.0.proj.weight"
    np.testing.assert_array_equal(found.values[1:], arrays[key][1:])
    assert np.asarray(found.scale[0]) > 10 / 449 and found.values[0].astype(np.float32).max() == 448
    args = {"quantize": "w8a8-int8", "checkpoint": tmp_path / "out"}
    (note,) = options.check_precision(argparse.Namespace(**args))
    assert note.startswith("--quantize w8a8-int8: weights were float8")
    checkpoints.save_params(tmp_path / "out", "transformer", {"blocks": {"a": np.ones(1)}})
    assert checkpoints.float8_scales(tmp_path / "out") == {}  # other weights


def per_row(arrays):
    """Every second weight gets a scale for each row, in one of the two usual shapes."""
    for number, key in enumerate(sorted(k for k in arrays if k.endswith(".weight_scale"))):
        out, inputs = arrays[key.removesuffix("_scale")].shape
        if number % 2:
            column = np.linspace(0.5, 2, out, dtype=np.float32)[:, None]
            arrays[key] = arrays[key] * (column[:, 0] if out != inputs else column)


def older_comfy(arrays):
    for key in [k for k in arrays if k.endswith(("weight_scale", "input_scale"))]:
        module, _, name = key.rpartition(".")
        arrays[f"{module}.scale_{name.removesuffix('_scale')}"] = arrays.pop(key)
    arrays[DIT + "scaled_fp8"] = np.zeros(2, FP8)


def marked(settings):
    def change(arrays):
        for key in [k for k in arrays if k.endswith(".weight_scale")]:
            blob = np.frombuffer(json.dumps(settings).encode(), np.uint8)
            arrays[key.replace(".weight_scale", ".comfy_quant")] = blob

    return change


def int8(arrays):
    marked({"format": "int8_tensorwise"})(arrays)
    for key in [k for k in arrays if k.endswith(".weight_scale")]:
        weight = key.removesuffix("_scale")
        arrays[weight] = np.round(arrays[weight].astype(np.float32) / 4).astype(np.int8)
        arrays[key] = np.full((arrays[weight].shape[0], 1), arrays[key] * 4)


def cast(arrays):
    """Everything in fp8, biases and tables too, as plain casts leave it."""
    for key in list(arrays):
        if key.endswith("_scale"):
            del arrays[key]
        else:
            arrays[key] = arrays[key].astype(np.float32).astype(FP8)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (per_row, "scaled fp8"),
        (older_comfy, "scaled fp8"),
        (marked({"format": "float8_e4m3fn"}), "scaled fp8"),
        (int8, "int8"),
        (cast, "fp8 without scales"),
    ],
)
def test_other_layouts_whose_rule_is_known(scaled, tmp_path, change, note):
    source = rewrite_file(scaled, tmp_path / "other.safetensors", change)
    content = ltx2.convert(source, tmp_path / "out", dtype="float32")
    assert re.fullmatch(rf"\d+ weights were {note}", *content["notes"])
    arrays, _ = read_file(source)
    for key in (QUERY + ".weight", BLOCK + "ff.net.0.proj.weight", QUERY + ".bias"):
        wanted = arrays[key].astype(np.float32)
        module = key.removesuffix(".weight")
        scale = next((arrays[f"{module}.{n}"] for n in ("weight_scale", "scale_weight")
                      if f"{module}.{n}" in arrays), np.float32(1))  # fmt: skip
        wanted = wanted * (scale[:, None] if scale.ndim == 1 else scale)
        np.testing.assert_array_equal(converted(tmp_path / "out", key), wanted, err_msg=key)


# -- what is refused -------------------------------------------------------------------------------


def packed(arrays):
    for key in [k for k in arrays if k.endswith(".weight_scale")]:
        weight = key.removesuffix("_scale")
        arrays[weight] = arrays[weight].view(np.uint8)


def mxfp8(arrays):
    """As files really have it: the scale is an exponent for every 32 inputs of a row."""
    for key in [k for k in arrays if k.endswith(".weight_scale")]:
        out, inputs = arrays[key.removesuffix("_scale")].shape
        arrays[key] = np.ones((out, inputs // 32), ml_dtypes.float8_e8m0fnu)


def gptq(arrays):
    for key in [k for k in arrays if k.endswith(".weight_scale")]:
        arrays[key.replace("weight_scale", "qweight")] = np.zeros((8, 8), np.int32)
        del arrays[key.removesuffix("_scale")]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (marked({"format": "float8_e4m3fn", "convrot": True}),
         r"holds ComfyUI's float8_e4m3fn, rotated \(convrot\) \(28 of its weights"),
        (marked({"format": "mxfp8"}), r"holds ComfyUI's mxfp8 \(28 of its weights"),
        (mxfp8, r"holds mxfp8 \(a power of two for 32 inputs each\) \(28 of its weights"),
        (packed, r"holds packed bytes \(uint8\) of an unknown layout"),
        (gptq, "quantised as GPTQ or AWQ does"),
    ],
)  # fmt: skip
def test_an_unknown_layout_is_one_line(scaled, tmp_path, change, name):
    source = rewrite_file(scaled, tmp_path / "other.safetensors", change)
    title, line = str(refused(source, tmp_path / "out")).splitlines()
    assert title == "1 problem, nothing was written:"
    assert re.search(name, line) and "use the bfloat16 file of the same model" in line


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({QUERY.removeprefix(DIT): {"format": "mxfp8"}}, "holds ComfyUI's mxfp8 (1 of its weights"),
        ({QUERY: "nvfp4"}, "holds ComfyUI's nvfp4 (1 of its weights"),
        ({QUERY: None}, "holds ComfyUI's None (1 of its weights"),
        (["no", "layers"], None),
    ],
)
def test_metadata_that_names_the_layout(scaled, tmp_path, said, text):
    """As older files of ComfyUI have it, with or without the prefix of the names."""
    strings = read_file(scaled)[1]
    strings["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": said})
    source = rewrite_file(scaled, tmp_path / "x.safetensors", metadata=strings)
    if text is None:
        assert reading.open_checkpoint(source).notes == ("28 weights were scaled fp8",)
    else:
        assert text in str(refused(source, tmp_path / "out"))


def test_int8_without_a_marker(scaled, tmp_path):
    def unmarked(arrays):
        int8(arrays)
        for key in [k for k in arrays if k.endswith("comfy_quant")]:
            del arrays[key]

    source = rewrite_file(scaled, tmp_path / "other.safetensors", unmarked)
    assert "int8 without a comfy_quant" in str(refused(source, tmp_path / "out"))


def test_scales_that_do_not_fit(scaled, tmp_path):
    def damage(arrays):
        arrays[QUERY + ".weight_scale"] = np.ones(64, np.float32)  # rows or columns?
        arrays[BLOCK + "attn1.to_k.weight_scale"] = np.ones((4, 4), np.float32)  # blocks
        arrays[BLOCK + "attn1.to_v.weight_scale"] = np.float32(np.inf) * np.ones((), np.float32)
        del arrays[BLOCK + "attn2.to_q.weight_scale"]

    source = rewrite_file(scaled, tmp_path / "bad.safetensors", damage)
    text = str(refused(source, tmp_path / "out"))
    assert "to_q.weight: has a scale of shape (64,) for a weight of shape (64, 64)" in text
    assert "to_k.weight: has a scale of shape (4, 4)" in text
    assert "to_v.weight: has a scale that is zero or not finite" in text
    assert "attn2.to_q.weight: has no scale in a file of scaled weights" in text


def test_a_long_list_is_shortened_and_can_be_had_in_full(scaled, tmp_path, capsys):
    def damage(arrays):
        for key in [k for k in arrays if k.endswith(".weight_scale")]:
            arrays[key] = np.zeros((), np.float32)

    source = rewrite_file(scaled, tmp_path / "bad.safetensors", damage)
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert ltx2.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 28 problems, nothing was written:"
    assert len(lines) == 1 + safetensors_io.MAX_SHOWN + 1
    assert lines[-2] == "... and 19 more lines of this kind (scales)"
    assert lines[-1] == "--problems FILE writes the full list"
    full = tmp_path / "all.txt"
    assert ltx2.main([*arguments, "--problems", str(full)]) == 2
    assert len(full.read_text().splitlines()) == 28


def test_missing_tensors_are_shortened_by_kind(scaled, tmp_path):
    def damage(arrays):
        kinds = [k for k in arrays if k.startswith(BLOCK) and k.endswith(".bias")]
        for key in kinds:
            del arrays[key]
        arrays[DIT + "proj_out.weight"] = np.zeros((3, 3), np.float32)

    text = str(refused(rewrite_file(scaled, tmp_path / "b.safetensors", damage), tmp_path / "out"))
    assert text.splitlines()[0] == "29 problems, nothing was written:"
    assert text.count("missing, shape") == 9 + 1 and "19 more lines" in text
    assert "proj_out.weight: has shape (3, 3)" in text


# -- memory ----------------------------------------------------------------------------------------

_CONVERT = """
import sys
from omniforcing_jax.scaling.memory import peak_resident_bytes
from checkpoint_converters import ltx2
from checkpoint_converters.converting import stay_on_host
stay_on_host()
ltx2.convert(sys.argv[1], sys.argv[2])
print(peak_resident_bytes())
"""


@pytest.mark.slow
def test_memory_of_a_large_fp8_file(tmp_path):
    """Layers of the published sizes, 8.9 GB with the other components."""
    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip("needs 30 GB of disk")
    source = tmp_path / "fp8.safetensors"
    write = ["--size", "full", "--layers", "6", "--dtype", "float8"]
    command = [sys.executable, "-m", "checkpoint_converters.synthetic", *write]
    options = dict(check=True, capture_output=True, text=True, cwd=ROOT)
    subprocess.run([*command, "--output", str(source)], **options)
    largest = max(info.num_bytes for info in read_header(source)[0].values())
    command = [sys.executable, "-c", _CONVERT, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, **options)
    assert int(done.stdout.splitlines()[-1]) < (2 << 30) + 2 * largest
