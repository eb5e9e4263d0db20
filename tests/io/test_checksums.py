"""Checksums of folders: by one process or several, and what they find."""

import shutil
import subprocess

import pytest

from omniforcing_jax.io import checksums
from omniforcing_jax.io.checksums import DamagedFile

FILES = {"a": b"one", "b/c": b"", "b/d/e": bytes(range(256)) * 9000}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_list_is_that_of_sha256sum(folder):
    checksums.write(folder)
    assert len((folder / checksums.FILE).read_text().splitlines()) == len(FILES)
    subprocess.run(["sha256sum", "--check", "--strict", checksums.FILE], cwd=folder, check=True)


def test_parts_of_several_processes_are_the_list_of_one(folder):
    expected = checksums.write(folder)
    text = (folder / checksums.FILE).read_text()
    (folder / checksums.FILE).unlink()
    for process in range(2):
        checksums.write_part(folder, process, 2)
    checksums.write_part(folder, 7, within="b/")
    assert checksums.write(folder) == expected
    assert (folder / checksums.FILE).read_text() == text
    assert {path.name for path in folder.iterdir()} == {"a", "b", checksums.FILE}


def test_what_is_damaged_is_named(folder, tmp_path):
    expected = checksums.write(folder)
    checksums.verify(folder, expected=expected)
    file = folder / "b" / "d" / "e"
    damages = {
        "flipped": FILES["b/d/e"][:-1] + b"\0",
        "cut": FILES["b/d/e"][:1000],
        "longer": FILES["b/d/e"] + b"\0",
    }
    for content in damages.values():
        file.write_bytes(content)
        with pytest.raises(DamagedFile, match=f"^{file} is damaged") as error:
            checksums.verify(folder)
        assert "\n" not in str(error.value)
    (folder / "a").unlink()
    with pytest.raises(DamagedFile, match=f"{folder / 'a'} is missing; {file} is damaged"):
        checksums.verify(folder)


def test_each_process_looks_at_its_share(folder):
    checksums.write(folder)
    (folder / "a").write_bytes(b"two")
    (folder / "b" / "c").write_bytes(b"two")
    for index, name in enumerate(("a", "b/c")):
        with pytest.raises(DamagedFile) as error:
            checksums.verify(folder, index=index, count=3)
        assert str(folder / name) in str(error.value) and str(error.value).count(" is ") == 1
    checksums.verify(folder, index=2, count=3)


def test_the_list_itself(folder):
    expected = checksums.write(folder)
    file = folder / checksums.FILE
    for text in (file.read_text().replace("0", "1"), "nonsense\n", ""):
        file.write_text(text)
        with pytest.raises(DamagedFile, match=f"{file} is damaged"):
            checksums.verify(folder, expected=expected)
    file.unlink()
    with pytest.raises(DamagedFile, match="no complete copy"):
        checksums.verify(folder, expected=expected)
    checksums.verify(folder)  # of an earlier version, which wrote none


def test_a_moved_folder_is_the_same(folder, tmp_path):
    expected = checksums.write(folder)
    checksums.verify(shutil.copytree(folder, tmp_path / "copy"), expected=expected)


def test_sealed_content():
    content = {"a": [1, 2.5, None], "b": {"z": "ü", "c": True}}
    sealed = checksums.seal(content)
    assert checksums.check_seal("f.json", sealed) == content
    assert checksums.check_seal("f.json", content) == content  # of an earlier version
    with pytest.raises(DamagedFile, match=r"f\.json is damaged, or was changed by hand"):
        checksums.check_seal("f.json", sealed | {"a": [1, 2.25, None]})
