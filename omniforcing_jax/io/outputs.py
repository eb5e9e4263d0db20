"""Which files and folders a program may replace: those that it wrote, and never its inputs.

What a program writes carries its name, as `written_by`: in config.json or manifest.json of a
folder or a file of that name, among the fields of a JSON file, in the metadata of a safetensors
file, a PNG or an MP4, in a comment at the end of a Markdown file. So --overwrite cannot destroy
what the same program would not make again.
"""

import json
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from omniforcing_jax.io.paths import is_remote, locate, new_file

MARK = "written_by"
_CLAIM = f".{MARK}"
_DESCRIPTIONS = ("config.json", "manifest.json")
# Who may have written a converted checkpoint from before there were marks, by its family.
_EARLIER = {
    "gemma3": ("checkpoint_converters.gemma3",),
    "ltx2": ("checkpoint_converters.ltx2",),
    "omniforcing": ("checkpoint_converters.ltx2", "checkpoint_converters.omniforcing"),
}
_PNG = b"\x89PNG\r\n\x1a\n"

Path = str | os.PathLike


def problems(
    output: Path,
    program: str,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path | None] = (),
    option: str = "--output",
) -> list[str]:
    """Why a program may not write there: nothing is touched.

    Args:
      output: file or folder, which may exist; an empty folder is as good as none.
      program: its name, which it leaves in what it writes, e.g. "launch.stream".
      overwrite: whether what it wrote before may be replaced.
      inputs: what it reads; None where it does not.
      option: that names the output.
    """
    output = pathlib.Path(output)
    if found := overlap(output, inputs, option):
        return [found]
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return []
    if not overwrite:
        there = "not empty" if output.is_dir() else "exists"
        return [f"{output}: {there}; choose another {option} or pass --overwrite"]
    if (author := written_by(output)) != program and program not in _earlier_authors(output):
        by = f"was written by {author}" if author else f"does not say that {program} wrote it"
        return [
            f"{output}: {by}, and so is not replaced; delete it yourself, or choose another "
            f"{option}"
        ]
    return []


def check(*outputs: Path | None, program: str, **settings: Any) -> None:
    """Raises ValueError with all `problems` of the outputs, None of which are written."""
    found = [text for path in outputs if path for text in problems(path, program, **settings)]
    if found:
        raise ValueError("; ".join(found))


def claim_folder(folder: Path, program: str, inputs: Iterable[Path | None] = ()) -> None:
    """Creates a folder for several files of a program, or takes one that it had before.

    Raises:
      ValueError: it is not empty and not the program's, or is, holds or lies in an input.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; choose another --output")
    check(folder, program=program, overwrite=True, inputs=inputs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CLAIM).write_text(f"{program}\n")


def check_apart(output: Path, inputs: Iterable[Path | None]) -> None:
    """Raises ValueError for an output that is, holds or lies in an input."""
    if found := overlap(output, inputs):
        raise ValueError(found)


def overlap(output: Path, inputs: Iterable[Path | None], option: str = "--output") -> str | None:
    """What is wrong with an output that is, holds or lies in an input; None if it does not."""
    if is_remote(output):
        return None
    own = pathlib.Path(os.path.realpath(output))
    for given in inputs:
        if given is None or is_remote(given):
            continue
        other = pathlib.Path(os.path.realpath(given))
        if own == other:
            relation = "is the input"
        elif own in other.parents:
            relation = "holds the input"
        elif other in own.parents:
            relation = "lies in the input"
        else:
            continue
        return f"{output}: {relation} {given}; choose another {option}"
    return None


def written_by(path: Path) -> str | None:
    """The program that says that it wrote a file or folder, if any says so."""
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            if (path / _CLAIM).is_file():
                return (path / _CLAIM).read_text().strip()
            marks = (_json_mark(path / name) for name in _DESCRIPTIONS if (path / name).is_file())
            return next(filter(None, marks), None)
        readers = {".json": _json_mark, ".safetensors": _safetensors_mark}
        readers |= {".png": _png_mark, ".mp4": _mp4_mark, ".md": _markdown_mark}
        read = readers.get(path.suffix.lower())
        mark = read(path) if read else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None  # damaged, or something else of that name
    return mark if isinstance(mark, str) else None


def _earlier_authors(path: pathlib.Path) -> tuple[str, ...]:
    """Programs of which one has written a checkpoint whose config.json does not say which."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if content["format"] != 1 or MARK in content:
            return ()
        if not all(source["bytes"] for source in content["source"]):  # the run that it is of
            return ("launch.export_run",)
        return _EARLIER.get(content["family"], ())
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _json_mark(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")).get(MARK)


def _safetensors_mark(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, 100_000_000)))
    return header["__metadata__"].get(MARK)


def _png_mark(path: pathlib.Path) -> str | None:
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            return None
        while True:
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind not in (b"IHDR", b"tEXt", b"pHYs"):  # the texts stand before the picture
                return None
            name, _, text = file.read(length).partition(b"\0")
            if kind == b"tEXt" and name == MARK.encode():
                return text.decode("latin-1")
            file.read(4)  # the chunk's checksum


def _mp4_mark(path: pathlib.Path) -> str | None:
    import av

    try:
        with av.open(path) as container:
            return container.metadata.get("comment")
    except av.error.FFmpegError:
        return None


def _comment(program: str) -> str:
    return f"<!-- {MARK} {program} -->\n"


def _markdown_mark(path: pathlib.Path) -> str | None:
    *_, last = path.read_text(encoding="utf-8").splitlines()
    start, end = _comment("|").strip().split("|")
    return last[len(start) : -len(end)] if last.startswith(start) and last.endswith(end) else None


def save_markdown(text: str, path: Path, program: str) -> None:
    """Writes a text with the program's name in a comment at its end."""
    with new_file(pathlib.Path(path)) as temporary:
        temporary.write_text(f"{text}\n{_comment(program)}", encoding="utf-8")


def save_picture(figure: Any, path: Path, program: str, **settings: Any) -> None:
    """Writes a matplotlib figure, with the program's name if it is a PNG; settings: `savefig`'s."""
    path = pathlib.Path(path)
    kind = path.suffix[1:].lower() or "png"
    if kind == "png":
        settings["metadata"] = {MARK: program}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        figure.savefig(temporary, format=kind, **settings)


def check_run(
    workdir: Path,
    kind: tuple[str, str],
    own: Sequence[str],
    inputs: Iterable[Path | None] = (),
    option: str = "--workdir",
) -> None:
    """Checks that a folder is new, or holds a run of the same kind.

    Args:
      workdir: the folder.
      kind: name and value of the setting by which its runs are known, e.g. ("stage", "stage1").
      own: names of what a run leaves there, without its config.json too (it was killed).
      inputs: what the run reads.
      option: that names the folder.

    Raises:
      ValueError: it is, holds or lies in an input, or holds something else.
    """
    if found := overlap(workdir, inputs, option):
        raise ValueError(found)
    folder = locate(workdir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another {option}")
    config = folder / "config.json"
    if not config.exists():
        others = [path.name for path in folder.iterdir() if path.name not in own]
        others = sorted(name for name in others if not name.startswith("."))
        if not others:
            return
        what = f"holds other files ({others[0]}) and no run"
    else:
        try:
            found = json.loads(config.read_text())["config"][kind[0]]
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, ValueError) and (folder / "checkpoints").is_dir():
                return  # a run's, damaged: it is written anew, and the checkpoints have it, too
            found = None
        if found == kind[1]:
            return
        what = f"holds a run of {found}" if found else "holds no run, but another config.json"
    raise ValueError(f"{folder}: {what}; choose another {option}")
