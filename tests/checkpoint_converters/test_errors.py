"""Converters refuse what is wrong, say all of it at once, and leave nothing behind."""

import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from checkpoint_converters import checks, downloads, export, ltx2, omniforcing, orbax_io, synthetic
from checkpoint_converters.key_map import DIT
from checkpoint_converters.safetensors_io import ConversionError, read_header
from omniforcing_jax.io import checkpoints, checksums
from tests.checkpoint_converters.files import rewrite_file as rewrite

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Random LTX-2.0 file."""
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    synthetic.write(path, "tiny", "2.0")
    return path


def refused(inputs, output, **options):
    """Converts, which must fail and leave nothing; the text of the error."""
    before = set(output.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        ltx2.convert(inputs, output, **options)
    assert set(output.parent.iterdir()) == before
    return str(error.value)


def test_missing_extra_and_misshapen_tensors_are_listed_together(source, tmp_path):
    def damage(arrays):
        for layer in range(2):
            del arrays[f"{DIT}transformer_blocks.{layer}.attn1.to_q.weight"]
        del arrays["vocoder.conv_pre.bias"]
        arrays[DIT + "proj_out.weight"] = arrays[DIT + "proj_out.weight"].T.copy()
        arrays[DIT + "audio_sink_tokens"] = np.zeros((1, 4, 32), np.float32)
        arrays["lora_up.weight"] = np.ones((1, 2), np.float32)
        arrays["vae.decoder.conv_in.conv.bias"] = np.zeros(64, np.int8)

    text = refused(rewrite(source, tmp_path / "bad.safetensors", damage), tmp_path / "out")
    assert text.splitlines()[0] == "6 problems, nothing was written:"
    assert f"{DIT}transformer_blocks.{{0-1}}.attn1.to_q.weight: missing, shape (64, 64)" in text
    assert "vocoder.conv_pre.bias: missing, shape (64)" in text
    assert f"{DIT}proj_out.weight: has shape (64, 8), must be (8, 64)" in text
    assert f"{DIT}audio_sink_tokens: is not part of the model" in text
    assert "lora_up.weight: is not part of the model" in text
    assert "vae.decoder.conv_in.conv.bias: has dtype I8" in text


def test_a_selection_is_not_stopped_by_the_rest(source, tmp_path):
    def damage(arrays):
        del arrays["vocoder.conv_pre.bias"]

    bad = rewrite(source, tmp_path / "bad.safetensors", damage)
    ltx2.convert(bad, tmp_path / "out", components=("connectors",))
    assert checkpoints.load_config(tmp_path / "out")["components"] == ["connectors"]


def test_text_projection_must_be_a_multiple_of_the_text_width(source, tmp_path):
    def damage(arrays):
        key = "text_embedding_projection.aggregate_embed.weight"
        arrays[key] = arrays[key][:, :-1].copy()

    text = refused(rewrite(source, tmp_path / "bad.safetensors", damage), tmp_path / "out")
    assert "aggregate_embed.weight: has shape (32, 287), must be (32, any)" in text


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_truncated_file(source, tmp_path, keep):
    data = source.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:keep])
    text = refused(tmp_path / "cut.safetensors", tmp_path / "out")
    assert "truncated" in text or "no valid header" in text


def test_not_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 20) + b"not json" * 5)
    assert "not a safetensors file" in refused(tmp_path / "x.safetensors", tmp_path / "out")
    assert "no such file" in refused(tmp_path / "absent.safetensors", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors" in refused(tmp_path / "empty", tmp_path / "out")


def with_header(path, change, data=bytes(16)):
    """A file of two tensors of 8 bytes whose header was changed."""
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}
              for name, at in (("a", 0), ("b", 8))}  # fmt: skip
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize("change, text", [
    ({"data_offsets": [4, 12]}, "b overlaps a; the header is damaged"),
    ({"data_offsets": [0, 8]}, "overlaps"),
    ({"data_offsets": [12, 20]}, "b leaves a gap behind a; the header is damaged"),
    ({"data_offsets": [-8, 0]}, "overlaps the header"),
    ({"data_offsets": [8, 12], "shape": [1]}, "4 bytes behind its tensors"),
    ({"data_offsets": [16, 8]}, "has -8 bytes for shape"),
    ({"shape": [-1, -2]}, "has 8 bytes for shape"),
    ({"shape": [2.0]}, "bad header"),
    ({"shape": "22"}, "bad header"),
    ({"data_offsets": [8, 16, 24]}, "bad header"),
    ({"dtype": ["F32"]}, "unsupported dtype"),
    ({"dtype": "F4"}, r"dtype F4 \(1 of its tensors, such as b\); use the bfloat16 file"),
])  # fmt: skip
def test_offsets_that_overlap_or_leave_gaps(tmp_path, change, text):
    assert set(read_header(with_header(tmp_path / "good", lambda header: None))[0]) == {"a", "b"}
    bad = with_header(tmp_path / "bad", lambda header: header["b"].update(change))
    with pytest.raises(ConversionError, match=text):
        read_header(bad)


def test_a_flipped_bit_of_our_own_files_is_named(source, tmp_path):
    data = bytearray(source.read_bytes())
    name = data.index(b"attention_head_dim") + 3
    for place, text in (
        (-5, ": a tensor is damaged (another"),
        (name, ": its header is damaged (another"),
    ):
        copy = bytearray(data)
        copy[place] ^= 1
        (tmp_path / "bad.safetensors").write_bytes(copy)
        said = refused(tmp_path / "bad.safetensors", tmp_path / "out")
        assert f"bad.safetensors{text}" in said


@pytest.mark.parametrize("layout", ["cache", "folder", "list"])
def test_downloads_are_compared_with_what_was_published(source, tmp_path, layout):
    """A flipped bit in a file that has no checksum inside, but of which the hub says it."""
    file, name = tmp_path / "in" / "model.safetensors", checksums.hash_files([source])[0]
    file.parent.mkdir()
    if layout == "cache":
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        shutil.copy(source, blobs / name)
        file.symlink_to(blobs / name)
    else:
        shutil.copy(source, file)
    if layout == "folder":
        note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{name}\n{file.stat().st_mtime}\n")
    if layout == "list":
        (file.parent / "SHA256SUMS").write_text(f"{name}  {file.name}\n")
    assert downloads.known_checksum(file) == name and downloads.damaged([file]) == []
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    if layout == "folder":
        os.utime(file, (0, 0))  # damaged on the disk, not changed by anybody
    said = refused(file, tmp_path / "out")
    assert f"{file}: is damaged (its SHA-256 is not that of what was published)" in said


@pytest.mark.parametrize("metadata", [[], "x", None, 3])
def test_metadata_of_another_shape(tmp_path, metadata):
    bad = with_header(tmp_path / "bad", lambda header: header.update(__metadata__=metadata))
    with pytest.raises(ConversionError, match="bad header"):
        read_header(bad)


def test_metadata(source, tmp_path):
    _, strings = read_header(source)
    only = json.dumps({"transformer": json.loads(strings["config"])["transformer"]})
    cases = {
        "absent": ({}, ["no `config`", "no `model_version`"]),
        "not_json": (strings | {"config": "{"}, ["not JSON"]),
        "unknown": (strings | {"model_version": "7.1"}, ["unknown model_version '7.1'"]),
        "no_section": (
            strings | {"config": only},
            ["no section 'vae'", "no section 'audio_vae'", "no section 'vocoder'"],
        ),
    }  # fmt: skip
    for name, (metadata, expected) in cases.items():
        bad = rewrite(source, tmp_path / f"{name}.safetensors", metadata=metadata)
        text = refused(bad, tmp_path / "out")
        assert all(part in text for part in expected), text
        bad.unlink()


def test_the_version_can_be_given(source, tmp_path):
    _, strings = read_header(source)
    del strings["model_version"]
    silent = rewrite(source, tmp_path / "silent.safetensors", metadata=strings)
    assert "pass --model-version" in refused(silent, tmp_path / "out")
    content = ltx2.convert(
        silent, tmp_path / "out", components=("connectors",), model_version="2.0.0"
    )
    assert content["model_version"] == "2.0.0"


def test_unsupported_settings_are_named(source, tmp_path):
    """All that the models refuse is refused before anything is written, also what is no matter of
    shapes: a rotation, a setting that is not known, one whose absence means another value."""
    _, strings = read_header(source)
    config = json.loads(strings["config"])
    del config["vae"]["timestep_conditioning"]
    config["vocoder"]["harmonics"] = 8
    config["audio_vae"]["model"]["params"]["ddconfig"]["norm_type"] = "group"
    del config["transformer"]["num_layers"]
    bad = rewrite(
        source, tmp_path / "bad.safetensors", metadata=strings | {"config": json.dumps(config)}
    )
    text = refused(bad, tmp_path / "out")
    assert "timestep_conditioning is True; only False is supported" in text
    assert "vocoder: unknown settings harmonics" in text
    assert "norm_type is 'group'" in text
    assert "num_layers is missing" in text
    config["transformer"] |= {"num_layers": 2, "rope_type": "spiral"}
    bad = rewrite(
        source, tmp_path / "bad.safetensors", metadata=strings | {"config": json.dumps(config)}
    )
    assert "rope_type must be one of split, interleaved" in refused(bad, tmp_path / "out")


def test_mixed_versions(source, tmp_path):
    """The transformer of one release with the VAE of another."""
    new = tmp_path / "new.safetensors"
    synthetic.write(new, "tiny", "2.3", components=("video_vae",))

    def only_transformer(arrays):
        for key in [k for k in arrays if not k.startswith(DIT)]:
            del arrays[key]

    old = rewrite(source, tmp_path / "old.safetensors", only_transformer)
    text = refused([old, new], tmp_path / "out")
    assert "mixed model versions" in text and "2.0.0" in text and "2.3.0" in text


def test_output(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert "not empty" in refused(source, tmp_path / "full")
    assert "and so is not replaced" in refused(source, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(source, tmp_path / "file")
    with pytest.raises(ConversionError, match="cannot be written to"):
        ltx2.convert(source, tmp_path / "file" / "below")
    (tmp_path / ".out.partial").mkdir()
    assert "interrupted conversion" in refused(source, tmp_path / "out")


def test_disk_space(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000_000))
    assert "0.1 GB needed" in refused(source, tmp_path / "out")


def test_input_and_output_problems_come_together(source, tmp_path):
    (tmp_path / "out").write_text("")

    def damage(arrays):
        del arrays["vocoder.conv_pre.bias"]

    text = refused(rewrite(source, tmp_path / "bad.safetensors", damage), tmp_path / "out")
    assert "vocoder.conv_pre.bias" in text and "is a file" in text


def test_overwrite_keeps_the_old_one_until_the_new_is_complete(source, tmp_path, monkeypatch):
    ltx2.convert(source, tmp_path / "out", components=("connectors",))
    read = orbax_io.read_tensor
    calls = []

    def fail(info):
        calls.append(info)
        if len(calls) == 5:
            raise OSError("disk on fire")
        return read(info)

    monkeypatch.setattr(orbax_io, "read_tensor", fail)
    with pytest.raises(OSError, match="fire"):
        ltx2.convert(source, tmp_path / "out", components=("audio_vae",), overwrite=True)
    assert checkpoints.load_config(tmp_path / "out")["components"] == ["connectors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(orbax_io, "read_tensor", read)
    ltx2.convert(source, tmp_path / "out", components=("audio_vae",), overwrite=True)
    assert checkpoints.load_config(tmp_path / "out")["components"] == ["audio_vae"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_clean_up(source, tmp_path, number):
    """The conversion is held after its third tensor, then gets the signal."""
    script = textwrap.dedent(
        """
        import signal, sys, threading
        from checkpoint_converters import ltx2, orbax_io
        # what a suite in the background of a shell starts would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signalled = threading.Event()
        closed = lambda: sys.stdin.read() or signalled.set()
        threading.Thread(target=closed, daemon=True).start()
        read, count = orbax_io.read_tensor, []
        def held(info):
            count.append(info)
            if len(count) == 3:
                print("ready", flush=True)
            if len(count) >= 3:
                signalled.wait()
            return read(info)
        orbax_io.read_tensor = held
        source, output = sys.argv[1:]
        sys.exit(ltx2.main(["--input", source, "--output", output, "--components", "connectors"]))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while b"ready" not in process.stdout.readline():
        assert process.poll() is None
    assert (tmp_path / ".out.partial").is_dir()
    os.kill(process.pid, number)
    process.communicate(timeout=120)  # closes its standard input
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_command_line_status(source, tmp_path, capsys):
    assert ltx2.main(["--input", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert ltx2.main([*arguments, "--components", "connectors"]) == 0
    assert "not converted: transformer" in capsys.readouterr().out


# -- students ------------------------------------------------------------------------------------


def test_student_heads(golden_dir, tmp_path):
    with pytest.raises(ConversionError, match="--num-heads"):
        omniforcing.convert(golden_dir / "omniforcing_v1", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_student_damage_and_wrong_base_come_together(golden_dir, source, tmp_path):
    def damage(arrays):
        del arrays["model.transformer_blocks.1.audio_attn2.to_v.bias"]
        arrays["model.extra"] = np.zeros(1, np.float32)

    student = golden_dir / "omniforcing_v1" / "omniforcing_v1_tiny.safetensors"
    bad = rewrite(student, tmp_path / "bad.safetensors", damage)
    with pytest.raises(ConversionError) as error:
        omniforcing.convert(bad, tmp_path / "out", base=source, num_heads=4)
    text = str(error.value)
    assert f"{DIT}transformer_blocks.1.audio_attn2.to_v.bias: missing" in text
    assert f"{DIT}extra: is not part of the model" in text
    assert "text features have width 32, the student's 20" in text


def test_student_of_another_version(golden_dir, tmp_path):
    with pytest.raises(ConversionError, match="distilled from 2"):
        omniforcing.convert(
            golden_dir / "omniforcing_v2", tmp_path / "out", num_heads=4,
            base=golden_dir / "ltx23_tiny.safetensors",
        )  # fmt: skip


def test_ltx_converter_points_to_the_student_converter(golden_dir, tmp_path):
    text = refused(golden_dir / "omniforcing_v2", tmp_path / "out")
    assert "checkpoint_converters.omniforcing" in text


def test_missing_shard(golden_dir, tmp_path):
    for file in (golden_dir / "omniforcing_v2").iterdir():
        if "00002-of" not in file.name:
            shutil.copy(file, tmp_path)
    with pytest.raises(ConversionError, match=r"00002-of-00002\.safetensors: shard .* is missing"):
        omniforcing.convert(tmp_path, tmp_path / "out", num_heads=4)


# -- export and loading --------------------------------------------------------------------------


def test_export_refuses(source, tmp_path):
    with pytest.raises(ConversionError, match="cannot be read"):
        export.export(tmp_path, tmp_path / "a.safetensors")
    ltx2.convert(source, tmp_path / "out", components=("connectors",))
    (tmp_path / "there.safetensors").write_text("precious")
    with pytest.raises(ConversionError) as error:
        export.export(
            tmp_path / "out", tmp_path / "there.safetensors", components=("vocoder", "connectors")
        )
    assert "vocoder: not an Orbax checkpoint" in str(error.value)
    assert "exists; choose another --output" in str(error.value)
    assert (tmp_path / "there.safetensors").read_text() == "precious"


def test_loading_errors_say_what_to_do(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m checkpoint_converters\.ltx2"):
        checkpoints.load_config(tmp_path / "absent")
    ltx2.convert(source, tmp_path / "out", components=("connectors",))
    with pytest.raises(FileNotFoundError, match=r"has no vocoder \(it has connectors\)"):
        checkpoints.load_params(tmp_path / "out", "vocoder")
    with pytest.raises(ValueError, match="must be one of transformer"):
        checkpoints.load_params(tmp_path / "out", "decoder")
    content = checkpoints.load_config(tmp_path / "out")
    with pytest.raises(ValueError, match="not finite"):
        checkpoints.save_params(tmp_path / "out", "vocoder", {"a": np.array([np.nan])})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "connectors"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        checkpoints.load_params(tmp_path / "out", "connectors")


def test_ranges():
    assert checks._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_unless_asked_for(source, tmp_path, value):
    """They are found in any tensor, be it streamed by layer or as a whole."""

    def damage(arrays):
        weight = arrays[f"{DIT}transformer_blocks.1.attn1.to_q.weight"].copy()
        weight[-1, -1] = value
        arrays[f"{DIT}transformer_blocks.1.attn1.to_q.weight"] = weight

    bad = rewrite(source, tmp_path / "bad.safetensors", damage)
    text = refused(bad, tmp_path / "out")
    assert "bad.safetensors: blocks/video_attn/q/kernel has values that are not finite" in text
    ltx2.convert(bad, tmp_path / "out", allow_non_finite=True)
    params = checkpoints.load_params(tmp_path / "out", "transformer")
    assert not np.isfinite(params["blocks"]["video_attn"]["q"]["kernel"]).all()
