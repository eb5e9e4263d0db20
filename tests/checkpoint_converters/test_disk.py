"""A disk that is full in the middle of a conversion ends it in one line, and leaves nothing."""

import contextlib
import errno
import re
import resource
import shutil

import pytest

from checkpoint_converters import (
    export,
    gemma3,
    ltx2,
    omniforcing,
    output,
    reading,
    synthetic,
    synthetic_gemma,
)


@contextlib.contextmanager
def small_disk(num_bytes):
    """No file can get larger: the system's own error, wherever it is written from."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, golden_dir):
    """{name: path} of what is converted: an LTX-2.0 file and its conversion, a Gemma, a student."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {"file": folder / "tiny.safetensors", "ltx2": folder / "ltx2", "gemma": folder / "hf"}
    synthetic.write(paths["file"], "tiny", "2.0", components=("connectors", "vocoder"))
    ltx2.convert(paths["file"], paths["ltx2"])
    synthetic_gemma.write(paths["gemma"], "tiny")
    return paths | {"student": golden_dir / "omniforcing_v1" / "omniforcing_v1_tiny.safetensors"}


CASES = {
    "ltx2": (ltx2, ["--input", "{file}"], 20_000),
    "gemma3": (gemma3, ["--input", "{gemma}"], 20_000),
    "omniforcing": (omniforcing, ["--input", "{student}", "--num-heads", "4"], 10_000),
    "header of an export": (export, ["--input", "{ltx2}"], 1000),
    "tensors of an export": (export, ["--input", "{ltx2}"], 300_000),
    "synthetic": (synthetic, ["--size", "tiny"], 1_000_000),
    "synthetic_gemma": (synthetic_gemma, ["--size", "tiny"], 20_000),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(inputs, tmp_path, capsys, case):
    converter, arguments, limit = CASES[case]
    out = tmp_path / "out.safetensors"
    arguments = [word.format(**inputs) for word in arguments]
    with small_disk(limit):
        assert converter.main([*arguments, "--output", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {out}: File too large while it was being written; ")
    assert "0.1 GB are needed, " in captured.err or case == "synthetic_gemma"  # size not known
    assert f"GB are free in {tmp_path}; nothing was left behind; make room" in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_earlier_conversion_stays(inputs, tmp_path):
    ltx2.convert(inputs["file"], tmp_path / "out", components=("connectors",))
    before = sorted(tmp_path.rglob("*"))
    with small_disk(20_000), pytest.raises(output.DiskFullError, match="File too large"):
        ltx2.convert(inputs["file"], tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_copied_components(inputs, tmp_path):
    """shutil.copytree goes on after an error, and raises a list at its end."""
    with (
        small_disk(20_000),
        pytest.raises(output.DiskFullError, match="File too large"),
        output.appearing(tmp_path / "out") as partial,
    ):
        shutil.copytree(inputs["ltx2"], partial / "copy")
    assert list(tmp_path.iterdir()) == []


def test_trees_in_memory(inputs, tmp_path):
    config = synthetic.metadata("tiny", "2.0")
    tree = reading.load_component(inputs["file"], "vocoder")
    with small_disk(20_000), pytest.raises(output.DiskFullError, match="nothing was left"):
        export.write_components(tmp_path / "a.safetensors", {"vocoder": tree}, config, "2.0.0")
    assert list(tmp_path.iterdir()) == []


# As they came from a full tmpfs, which takes root to mount, and from /dev/full.
FULL = {
    "python": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "tensorstore": ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "/full/.out.partial/vocoder/bias/0": Failed '
        "to write 307200 bytes to file 4: No space left on device [os_error_code='28']"
    ),
    "tokenizers": Exception("No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_errors_of_a_full_disk(tmp_path, error):
    with (
        pytest.raises(output.DiskFullError) as raised,
        output.appearing(tmp_path / "out", num_bytes=43_300_000_000),
    ):
        raise error
    assert re.search(r"; 43\.4 GB are needed, \d+\.\d GB are free in ", str(raised.value))
    assert raised.value.__cause__ is error and "\n" not in str(raised.value)


def test_other_errors_stay_what_they_are(tmp_path):
    numbered = ValueError("INTERNAL: Error writing local file [os_error_code='5']")
    for error in (OSError(errno.EIO, "Input/output error"), numbered, ValueError("shapes differ")):
        with (
            pytest.raises(type(error)) as raised,
            output.appearing(tmp_path / "out"),
        ):
            raise error
        assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_removed_is_named(tmp_path):
    partial = tmp_path / "partial"
    partial.touch()
    with (
        pytest.raises(output.DiskFullError, match=f"what there is of it is in {partial}"),
        output.explaining_a_full_disk(tmp_path / "out", partial),
    ):
        raise FULL["python"]
