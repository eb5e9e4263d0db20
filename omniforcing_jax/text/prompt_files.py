"""Files of captions: text (one per line), CSV or JSON lines, in UTF-8; or a folder of text files.

Captions are stripped; blank ones are skipped, repeated ones kept once, and both are counted. What
cannot be read is an error that names the file and the line, never a silently damaged caption.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

DEFAULT_COLUMN = "caption"
BENCHMARK_COLUMNS = ("caption", "text", "prompt", "prompt_en")  # ours, JavisBench's, VBench's
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class PromptList:
    """The captions of a file.

    Attributes:
      prompts: stripped, each once, in the order of their first appearance.
      lines: line (from 1) of each prompt's first appearance, where it begins.
      num_read: captions in the file; num_blank + num_duplicates + len(prompts).
      num_blank: how many were empty.
      num_duplicates: how many had appeared before.
    """

    prompts: tuple[str, ...]
    lines: tuple[int, ...]
    num_read: int
    num_blank: int
    num_duplicates: int

    @property
    def sha256(self) -> str:
        """Hash of the prompts and their order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(bytes.fromhex(prompt_hash(prompt)))
        return digest.hexdigest()


def prompt_hash(prompt: str) -> str:
    """SHA-256 of a prompt, surrounding space aside: 64 hexadecimal digits."""
    return hashlib.sha256(prompt.strip().encode()).hexdigest()


def read_prompts(path: str | os.PathLike, column: str | None = None) -> PromptList:
    """Reads a file of captions.

    Args:
      path: see `read_column`; or a folder, each of whose `.txt` files is one caption, in the order
        of their names (of which lines are then the numbers).
      column: of the CSV file, or key of the objects, that holds the caption; "caption" if None.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: see `read_column`, or there is no caption in it.
    """
    first_line: dict[str, int] = {}
    num_read = num_blank = num_duplicates = 0
    for line, caption in read_column(path, column):
        num_read += 1
        prompt = caption.strip()
        if not prompt:
            num_blank += 1
        elif prompt in first_line:
            num_duplicates += 1
        else:
            first_line[prompt] = line
    if not first_line:
        raise ValueError(f"{path}: no captions ({num_read} read, {num_blank} of them blank)")
    return PromptList(
        prompts=tuple(first_line),
        lines=tuple(first_line.values()),
        num_read=num_read,
        num_blank=num_blank,
        num_duplicates=num_duplicates,
    )


def read_benchmark(path: str | os.PathLike, column: str | None = None) -> list[str]:
    """All prompts of a file in their order, repeated ones too: clip n is of prompt n.

    Args:
      path: see `read_column`, such as JavisBench's CSV or VBench's all_dimension.txt; or a `.json`
        with a list of texts or objects, as VBench_full_info.json.
      column: None takes the first of "caption", "text", "prompt" and "prompt_en" that is there.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: see `read_column`; no such column; a prompt that is empty, or none at all.
    """
    path = pathlib.Path(path)
    rows = _read_list(path, column) if path.suffix.lower() == ".json" else _guess(path, column)
    prompts = []
    for line, text in rows:
        if not text.strip():
            raise ValueError(f"{path}, line {line}: an empty prompt; every line is a clip's")
        prompts.append(text.strip())
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def _guess(path: pathlib.Path, column: str | None) -> Iterator[tuple[int, str]]:
    if column is not None or path.suffix.lower() == ".txt" or path.is_dir():
        return read_column(path, column)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of captions")
    first = next(_lines(path), "")
    try:
        names = json.loads(first) if path.suffix.lower() == ".jsonl" else next(csv.reader([first]))
        found = [name for name in BENCHMARK_COLUMNS if name in [x.strip() for x in names]]
    except (ValueError, StopIteration, TypeError, AttributeError, csv.Error):
        found = []  # the reader says what is wrong
    return read_column(path, found[0] if found else None)


def _read_list(path: pathlib.Path, column: str | None) -> Iterator[tuple[int, str]]:
    """Entries, from 1, of a JSON list."""
    try:
        rows = json.loads("".join(_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); expected a list of prompts") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a JSON {type(rows).__name__}; expected a list of prompts")
    names = (column,) if column else BENCHMARK_COLUMNS
    for number, row in enumerate(rows, start=1):
        texts = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        text = next((text for text in texts if isinstance(text, str)), None)
        if text is None:
            raise ValueError(f"{path}, entry {number}: no text, and none under {', '.join(names)}")
        yield number, text


def read_column(path: str | os.PathLike, column: str | None = None) -> Iterator[tuple[int, str]]:
    """The texts of a file, of one column where there are several.

    Args:
      path: `.txt` with one text per line, `.csv` with a header, or `.jsonl` with one object per
        line; or a folder of `.txt` files.
      column: of the CSV file, or key of the objects; "caption" if None.

    Yields:
      The line on which a text begins, from 1, and the text; empty for an empty line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, or a line that cannot be read: bytes that are not UTF-8,
        broken CSV or JSON, no such column, not a string. Names the line.
    """
    path = pathlib.Path(path)
    readers = {".txt": _read_text, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = _read_folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: captions are read from {', '.join(readers)} files, not {path.suffix!r}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of captions")
    if reader in (_read_text, _read_folder) and column is not None:
        raise ValueError(f"{path}: a text file has no columns; leave out column {column!r}")
    return reader(path, column or DEFAULT_COLUMN)


def _read_folder(path: pathlib.Path, column: str) -> Iterator[tuple[int, str]]:
    del column
    for number, file in enumerate(sorted(path.glob("*.txt")), start=1):
        yield number, "".join(_lines(file))


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; only \\n ends a line, as in a text editor's count."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is "
                    "not UTF-8; save the file as UTF-8, for example with "
                    f"`iconv -f LATIN1 -t UTF-8 {path.name}` if it is Latin-1"
                ) from error


def _read_text(path: pathlib.Path, column: str) -> Iterator[tuple[int, str]]:
    del column
    yield from enumerate(_lines(path), start=1)


def _read_csv(path: pathlib.Path, column: str) -> Iterator[tuple[int, str]]:
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header.count(column) != 1:
            how_many = "no" if column not in header else "more than one"
            raise ValueError(
                f"{path}, line 1: {how_many} column {column!r}; the first line must name the "
                f"columns, found {', '.join(map(repr, header)) or 'nothing'}"
            )
        index = header.index(column)
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {line}: {len(row)} fields, the header has {len(header)}; put "
                    "captions that contain commas in double quotes"
                )
            yield line, row[index] if row else ""
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error


def _read_jsonl(path: pathlib.Path, column: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            yield number, ""
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: broken JSON ({error}); expected one object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}; expected an object")
        if column not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise ValueError(f"{where}: no key {column!r}, found {found}")
        caption = row[column]
        if not isinstance(caption, str):
            raise ValueError(
                f"{where}: {column!r} is {json.dumps(caption)[:60]}; expected a string"
            )
        try:
            caption.encode()
        except UnicodeEncodeError as error:  # half of an escaped surrogate pair
            raise ValueError(f"{where}: {column!r} is not valid Unicode ({error})") from error
        yield number, caption
