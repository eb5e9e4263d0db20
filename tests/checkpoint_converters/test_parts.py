"""Checkpoints in parts and variants as people have them, and files that are none."""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from checkpoint_converters import (
    contents,
    gemma3,
    gemma4,
    lora,
    ltx2,
    reading,
    synthetic,
    synthetic_gemma,
    upsampler,
)
from checkpoint_converters.file_kinds import what_else
from checkpoint_converters.key_map import DIT
from checkpoint_converters.safetensors_io import MAX_SHOWN, ConversionError, read_header
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import COMPONENTS
from tests.checkpoint_converters.files import read_file, rewrite_file, write_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Random LTX-2.3 file with all components."""
    path = tmp_path_factory.mktemp("whole") / "tiny.safetensors"
    synthetic.write(path, "tiny", "2.3")
    return path


def refused(inputs, output, **options):
    with pytest.raises(ConversionError) as error:
        ltx2.convert(inputs, output, **options)
    assert not output.exists()
    return str(error.value)


def same(folder, source, component):
    ours = checkpoints.load_params(folder, component)
    wanted = reading.load_component(source, component)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), ours, wanted)


# -- components in files of their own --------------------------------------------------------------


def split(whole, folder):
    """The VAEs under bare names and the vocoder without metadata, the rest with."""
    arrays, strings = read_file(whole)
    parts = {
        "vae.": ("vae", "vae."),
        "audio_vae.": ("audio", "audio_vae."),
        "vocoder.": ("voc", ""),
    }
    files = []
    for prefix, (name, bare) in parts.items():
        chosen = {key.removeprefix(bare): arrays.pop(key)
                  for key in list(arrays) if key.startswith(prefix)}  # fmt: skip
        files.append(write_file(folder / f"{name}.safetensors", chosen, {"format": "pt"}))
    return [write_file(folder / "transformer.safetensors", arrays, strings), *files]


def test_files_without_metadata_take_that_of_the_file_that_has_it(whole, tmp_path):
    files = split(whole, tmp_path)
    content = ltx2.convert(files, tmp_path / "out")
    assert content["components"] == list(COMPONENTS)
    assert content["model_version"] == "2.3.0"
    assert content["config"] == reading.read_metadata(whole)["config"]
    for component in ("video_vae", "audio_vae", "vocoder"):
        same(tmp_path / "out", whole, component)


def test_parts_of_other_shapes_are_found(whole, tmp_path):
    """A VAE of LTX-2.0 that does not say so."""
    files = split(whole, tmp_path)
    synthetic.write(tmp_path / "old.safetensors", "tiny", "2.0", components=("video_vae",))
    old = rewrite_file(tmp_path / "old.safetensors", tmp_path / "silent.safetensors", metadata={})
    text = refused([files[0], old], tmp_path / "out")
    assert "vae.decoder" in text and "must be" in text


def test_parts_alone(whole, tmp_path):
    files = split(whole, tmp_path)
    text = refused(files[1:2], tmp_path / "out")
    assert "no `config` in the metadata" in text and "add a file of the same release" in text
    assert "no `model_version`" in text


def test_two_whole_files_and_many_missing_shards_are_short(whole, tmp_path):
    shutil.copy(whole, tmp_path / "copy.safetensors")
    [_, line] = refused([whole, tmp_path / "copy.safetensors"], tmp_path / "out").splitlines()
    assert re.search(r"copy.*\(and \d+ more\) is in another input as well; drop one", line)
    weight_map = {f"{number}.weight": f"{number}.safetensors" for number in range(12)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    lines = refused(index, tmp_path / "out").splitlines()
    assert lines[0].startswith("12 problems") and len(lines) == 1 + MAX_SHOWN


def test_a_whole_model_without_metadata(whole, tmp_path, monkeypatch):
    """It is what its user says it is, as published, if all shapes agree."""
    monkeypatch.setattr(ltx2, "published_config", lambda v: synthetic.metadata("tiny", v))
    bare = rewrite_file(whole, tmp_path / "distilled.safetensors", metadata={})
    assert "--model-version takes the published one's" in refused(bare, tmp_path / "out")
    assert "must be" in refused(bare, tmp_path / "out", model_version="2.0.0")
    content = ltx2.convert(bare, tmp_path / "out", model_version="2.3.0")
    assert "is converted already; programs take it" in refused(tmp_path / "out", tmp_path / "x")
    assert content["config"] == reading.read_metadata(whole)["config"]
    assert content["notes"] == [
        "the file does not say what it is: taken for an LTX-2 2.3 as published"
    ]
    [part] = split(whole, tmp_path)[2:3]
    assert "no `config` in the metadata" in refused(part, tmp_path / "x", model_version="2.3.0")


def shards(whole, folder, count=3):
    arrays, strings = read_file(whole)
    for number in range(count):
        chosen = {k: a for i, (k, a) in enumerate(arrays.items()) if i % count == number}
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_file(folder / name, chosen, strings if number == 0 else {})


def test_shards_without_an_index(whole, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    shards(whole, folder)
    content = ltx2.convert(folder, tmp_path / "out", components=("audio_vae",))
    assert [entry["name"][-14:] for entry in content["source"]] == [
        f"{number:05d}-of-00003.safetensors"[-14:] for number in (1, 2, 3)
    ]
    same(tmp_path / "out", whole, "audio_vae")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "of 3 shards, 2 is missing" in refused(folder, tmp_path / "x")
    shutil.copy(whole, folder)
    assert "pass the one, or all parts of one LTX-2.5, as --input FILE" in refused(
        folder, tmp_path / "x"
    )


def test_a_folder_without_safetensors_says_what_is_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.gguf").touch()
    assert "holds no .safetensors file" in refused(tmp_path / "folder", tmp_path / "out")
    assert "it holds model.gguf" in refused(tmp_path / "folder", tmp_path / "out")


def test_a_folder_of_published_parts_is_no_diffusers_folder(whole, tmp_path):
    """As LTX-2.5 is downloaded, and as ComfyUI keeps its models: each file is named."""
    what = "LTX-2 (transformer, connectors, video_vae, audio_vae, vocoder)"
    expected = []
    for folder in ("diffusion_models", "vae"):
        (tmp_path / "models" / folder).mkdir(parents=True)
        file = tmp_path / "models" / folder / "x.safetensors"
        shutil.copy(whole, file)
        expected.append(
            f"{file}: is {what}; python -m checkpoint_converters.ltx2 --input {file} converts it"
        )
    lines = refused(tmp_path / "models", tmp_path / "out").splitlines()[1:]
    assert lines == [
        f"{tmp_path / 'models'}: holds diffusion_models/x.safetensors, vae/x.safetensors; pass the "
        "one, or all parts of one LTX-2.5, as --input FILE …",
        *expected,
    ]


def test_each_kind_of_file_in_the_place_of_every_other(whole, tmp_path):
    """The converter says what the file is, and which program takes it."""
    files = {name: tmp_path / f"{name}.safetensors" for name in ("lora", "upsampler", "gemma4")}
    synthetic.write_lora(files["lora"], "tiny", "2.3")
    synthetic.write_upsampler(files["upsampler"], "tiny", "2.3")
    synthetic_gemma.main(["--gemma4", "--output", str(files["gemma4"])])
    synthetic_gemma.write(tmp_path / "gemma", "tiny")
    files |= {"ltx2": whole, "gemma3": tmp_path / "gemma"}
    says = {
        "ltx2": "is LTX-2 (transformer, connectors, video_vae, audio_vae, vocoder); python -m "
        "checkpoint_converters.ltx2 --input {} converts it",
        "lora": "is a LoRA of 48 layers; python -m checkpoint_converters.ltx2 --input MODEL --lora "
        "{} merges it into the model it was made for",
        "gemma3": "is a Gemma 3, the text encoder of LTX-2.0 and 2.3; python -m "
        "checkpoint_converters.gemma3 --input {} converts it",
        "gemma4": "is a Gemma 4, the text encoder of LTX-2.5; python -m "
        "checkpoint_converters.gemma4 --input {} converts it",
        "upsampler": "is a latent upsampler; python -m checkpoint_converters.upsampler --input {} "
        "converts it, for --upsampler of launch.sample_teacher",
    }
    programs = {"ltx2": ltx2, "gemma3": gemma3, "gemma4": gemma4, "upsampler": upsampler}
    for name, file in files.items():
        for program, module in programs.items():
            if name == program or (name, program) == ("gemma4", "ltx2"):  # has its projections
                continue
            with pytest.raises(ConversionError) as error:
                module.convert(file, tmp_path / "out")
            assert error.value.problems == [f"{file}: {says[name].format(file)}"], (name, program)
        if name != "lora":
            [problem] = lora.merge({}, [(file, 1.0)], ())[2]
            assert problem == f"{file}: {says[name].format(file)}"
    tiny = contents.identify(dict.fromkeys(("decoder.1.weight", "decoder.22.weight")))
    assert tiny.problem("x").startswith("x: is a tiny video decoder; python -m")


# -- tensors that are not LTX-2's ------------------------------------------------------------------


def channel_condition(value):
    """As in a public student of LTX-2.3, where all of them are zero."""

    def add(arrays):
        shapes = {"proj.weight": (64, 8), "gate.weight": (64, 64), "gate.bias": (64,)}
        for name, shape in shapes.items():
            arrays[f"{DIT}video_channel_condition_{name}"] = np.zeros(shape, ml_dtypes.bfloat16)
        arrays[f"{DIT}video_channel_condition_gate.bias"][-1] = value

    return add


def test_unknown_tensors_that_are_zero_are_left_out(whole, tmp_path):
    """And LTX-2.5's duration head, which is known and not implemented."""

    def add(arrays):
        channel_condition(0)(arrays)
        arrays["duration_head.pooler.weight"] = np.ones((4, 4), ml_dtypes.bfloat16)

    source = rewrite_file(whole, tmp_path / "student.safetensors", add)
    content = ltx2.convert(source, tmp_path / "out", components=("transformer",))
    assert content["notes"] == [
        f"{DIT}video_channel_condition_{name} is unknown and zero throughout, so it was left out"
        for name in ("proj.weight", "gate.weight", "gate.bias")
    ] + [
        "duration_head was left out, as it is not implemented: the samplers take the clip's length"
    ]
    same(tmp_path / "out", whole, "transformer")


def test_unknown_tensors_that_are_not_zero_are_refused_by_name(whole, tmp_path):
    source = rewrite_file(whole, tmp_path / "student.safetensors", channel_condition(1))
    title, line = refused(source, tmp_path / "out").splitlines()
    assert title == "1 problem, nothing was written:"
    assert line.startswith(f"{DIT}video_channel_condition_gate.bias: is not part of the model")


def test_known_tensors_that_the_model_lacks_are_refused_even_if_zero(whole, tmp_path):
    """Sinks of zeros are still attended to."""

    def add(arrays):
        arrays[DIT + "audio_sink_tokens"] = np.zeros((1, 4, 32), ml_dtypes.bfloat16)

    source = rewrite_file(whole, tmp_path / "sinks.safetensors", add)
    assert "audio_sink_tokens: is not part of the model" in refused(source, tmp_path / "out")


def test_vocoder_widths_that_do_not_halve_evenly(tmp_path):
    """The official code rounds down; the last stage of 36 channels has 36 / 32, that is 1."""
    source = tmp_path / "odd.safetensors"
    synthetic.write(source, "tiny", "2.0", components=("vocoder",))
    arrays, strings = read_file(source)
    config = json.loads(strings["config"])
    width = config["vocoder"]["upsample_initial_channel"]
    config["vocoder"]["upsample_initial_channel"] = width + 1
    strings["config"] = json.dumps(config)
    key = "vocoder.conv_pre."
    for name in ("weight", "bias"):
        arrays[key + name] = np.concatenate([arrays[key + name], arrays[key + name][:1]])
    first = "vocoder.ups.0.weight"  # (in, out, k)
    arrays[first] = np.concatenate([arrays[first], arrays[first][:1]])
    odd = write_file(tmp_path / "changed.safetensors", arrays, strings)
    ltx2.convert(odd, tmp_path / "out")
    shapes = checkpoints.param_shapes(tmp_path / "out", "vocoder")
    assert shapes["ups_0"]["kernel"].shape[1:] == (width + 1, width // 2)


# -- files that are no weights ---------------------------------------------------------------------

OTHERS = {
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file"),
    "zip": (b"PK\x03\x04" + bytes(64), "is a zip archive"),
    "pickle": (b"\x80\x02}q\0" + bytes(64), "is a PyTorch file"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "is a Git LFS pointer",
    ),
    "page": (b"\n<!DOCTYPE html><html><title>Log in</title>", "is a web page, such as the login"),
    "page without a doctype": (b"<html lang='en'><head>", "is a web page"),
    "refusal": (b'{"error":"Access to model Lightricks/LTX-2 is restricted."}', "of a server"),
    "nothing": (b"", "is empty"),
    "unfinished": (bytes(2048), "begins with zeros"),
    "archive": (b"\x1f\x8b\x08\0" + bytes(9), "is a gzip archive"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_recognised(tmp_path, kind):
    content, text = OTHERS[kind]
    file = tmp_path / "ltx-2.safetensors"
    file.write_bytes(content)
    title, line = refused(file, tmp_path / "out").splitlines()
    assert title == "1 problem, nothing was written:"
    assert line.startswith(f"{file}: ") and text in line


@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_pytorch_are_recognised(tmp_path, as_zip):
    file = tmp_path / "model.safetensors"  # whatever somebody calls it
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=as_zip)
    assert "is a PyTorch file" in refused(file, tmp_path / "out")


@pytest.mark.parametrize("length", [0x0480, 0x0280, 0x8B1F, 0x3C, 0x0450])
def test_safetensors_of_any_header_length_are_not_mistaken(tmp_path, length):
    """Their first bytes are those of a length, such as 80 04 00 00 00 00 00 00."""
    header = b'{"__metadata__":{"a":"b"}}'.ljust(length)
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header)
    assert what_else(file) is None
    assert read_header(file) == ({}, {"a": "b"})
