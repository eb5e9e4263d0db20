"""Reading and writing safetensors files piece by piece, without holding a file in memory.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets},
"__metadata__": {str: str}}, then the tensors' bytes in C order. The library `safetensors` maps
whole files, whose pages count as resident, knows no bfloat16 without PyTorch, and writes only what
is in memory as a whole; so header and bytes are read and written here.
"""

import hashlib
import json
import math
import operator
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from checkpoint_converters.file_kinds import what_else
from omniforcing_jax import programs

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHECKSUMS = "sha256"  # key of the metadata
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


# where weights are quantised in a way that is not read
USE_INSTEAD = (
    "use the bfloat16 file of the same model, or one in scaled fp8 (a weight_scale beside each "
    "weight)"
)
MAX_SHOWN = 10  # lines of one kind


class Problem(str):
    """One line of what is wrong.

    Attributes:
      kind: what it has in common with others, of which only the first are shown; None: always.
    """

    kind: str | None

    def __new__(cls, text: str, kind: str | None = None):
        problem = super().__new__(cls, text)
        problem.kind = kind
        return problem


class ConversionError(Exception):
    """Everything that is wrong with a conversion, in plain words.

    Attributes:
      problems: all of them, a line each.
      shortened: whether the message leaves some out, as more than `MAX_SHOWN` are of one kind.
    """

    exit_status = programs.REFUSED

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = len(self.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        shown = _shown(self.problems)
        self.shortened = len(shown) < count
        super().__init__("\n".join([f"{title}, nothing was written:", *shown]))


def _shown(problems: list[str]) -> list[str]:
    """At most `MAX_SHOWN` lines of each kind, the last of which says how many are left out."""
    members: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        if (kind := getattr(problem, "kind", None)) is not None:
            members.setdefault(kind, []).append(index)
    left_out = {}
    for kind, indices in members.items():
        if len(indices) > MAX_SHOWN:
            rest = indices[MAX_SHOWN - 1 :]
            left_out |= dict.fromkeys(rest)
            left_out[rest[0]] = f"... and {len(rest)} more lines of this kind ({kind})"
    lines = (left_out.get(index, problem) for index, problem in enumerate(problems))
    return [line for line in lines if line is not None]


class TensorInfo(NamedTuple):
    """One tensor of a file: dtype code of the format, shape, where its bytes are, and their SHA-256
    where the file says it."""

    file: pathlib.Path
    dtype_code: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: str | None = None

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_code]


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file; reads the header only.

    Raises:
      ConversionError: the file is missing, is not a safetensors file, or ends too early.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConversionError([f"{path}: no such file"])
    size = path.stat().st_size
    if (other := what_else(path)) is not None:
        raise ConversionError([f"{path}: {other}"])
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ConversionError([f"{path}: not a safetensors file (no valid header length)"])
        raw = file.read(length)
    if len(raw) < length:
        raise ConversionError(
            [f"{path}: truncated inside its header ({size} bytes); download it again"]
        )
    try:
        header = json.loads(raw)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        known = _take_checksums(path, header, metadata)
        tensors = {}
        for name, entry in header.items():
            begin, end = map(operator.index, entry["data_offsets"])
            shape = tuple(map(operator.index, entry["shape"]))
            offset = 8 + length + begin
            code = str(entry["dtype"])
            size_and_sum = (end - begin, known.get(name))
            tensors[name] = TensorInfo(path, code, shape, offset, *size_and_sum)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError([f"{path}: not a safetensors file (bad header: {error})"]) from error
    _check_header(path, tensors, 8 + length, size)
    return tensors, metadata


def _take_checksums(path: pathlib.Path, header: dict, metadata: dict[str, str]) -> dict[str, str]:
    """Those of the tensors in a file that `write_safetensors` wrote; checks that of the header."""
    known = json.loads(metadata.pop(_CHECKSUMS, "{}"))
    if known and known.pop("") != _header_checksum(header, metadata, known):
        raise ConversionError([f"{path}: its header is damaged (another checksum); copy it again"])
    return known


def _header_checksum(header: Mapping, metadata: Mapping, known: Mapping[str, str]) -> str:
    return hashlib.sha256(
        json.dumps([header, metadata, known], sort_keys=True).encode()
    ).hexdigest()


def _check_header(
    path: pathlib.Path, tensors: dict[str, TensorInfo], start: int, size: int
) -> None:
    """The format wants the tensors' bytes side by side, from the header to the end of the file."""
    unknown: dict[str, list[str]] = {}
    for name, info in tensors.items():
        if info.dtype_code not in DTYPES:
            unknown.setdefault(info.dtype_code, []).append(name)
    problems = [
        f"{path}: the unsupported dtype {code} ({len(names)} of its tensors, such as {names[0]}); "
        f"{USE_INSTEAD}"
        for code, names in unknown.items()
    ]
    for name, info in tensors.items():
        if info.dtype_code in DTYPES and (
            min(info.shape, default=0) < 0
            or math.prod(info.shape) * info.dtype.itemsize != info.num_bytes
        ):
            text = f"{path}: {name} has {info.num_bytes} bytes for shape {info.shape}"
            problems.append(Problem(text, "bytes for shape"))
    end, last = start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: item[1][3:5]):
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a gap behind"
            text = f"{path}: {name} {what} {last}; the header is damaged, download it again"
            problems.append(Problem(text, "offsets"))
        end, last = info.offset + info.num_bytes, name
    if end > size:
        problems.append(f"{path}: truncated, {size} of {end} bytes are there; download it again")
    elif end < size:
        problems.append(f"{path}: has {size - end} bytes behind its tensors; download it again")
    if problems:
        raise ConversionError(problems)


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Reads one tensor into fresh memory (no memory map: mapped pages would count as resident)."""
    with info.file.open("rb", buffering=0) as file:
        data = np.fromfile(file, np.uint8, info.num_bytes, offset=info.offset)
        # the page cache of a 40 GB file would push everything else out of memory
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), info.offset, info.num_bytes, os.POSIX_FADV_DONTNEED)
    if data.size < info.num_bytes:
        raise ConversionError([f"{info.file}: ends inside a tensor; download it again"])
    if info.checksum is not None and hashlib.sha256(data).hexdigest() != info.checksum:
        raise ConversionError(
            [f"{info.file}: a tensor is damaged (another checksum); copy it again"]
        )
    return data.view(info.dtype).reshape(info.shape)


def read_middle(info: TensorInfo, num_bytes: int) -> bytes:
    """Bytes from the middle of a tensor: `num_bytes`, or all of a smaller one."""
    count = min(num_bytes, info.num_bytes)
    with info.file.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), count, info.offset + (info.num_bytes - count) // 2)


def _raw_header(header: Mapping, metadata: Mapping[str, str], known: Mapping[str, str]) -> bytes:
    """The beginning of a file; as long for any checksums."""
    strings = {**metadata, _CHECKSUMS: json.dumps(known, sort_keys=True, separators=(",", ":"))}
    raw = json.dumps({"__metadata__": strings, **header}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8
    return struct.pack("<Q", len(raw)) + raw


# {name: (dtype, shape)}
Table = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def table_bytes(table: Table) -> int:
    """Bytes of the tensors in a table."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in table.values())


def write_safetensors(
    path: str | os.PathLike,
    table: Table,
    metadata: Mapping[str, str],
    make: Callable[[str], np.ndarray],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a safetensors file tensor by tensor, down to the disk, with their checksums.

    Args:
      path: file to create.
      table: all tensors, in the order in which they are made and written.
      metadata: strings for `__metadata__`.
      make: the tensor of a name.
      advance: called with the number of bytes just written.

    Raises:
      ValueError: a tensor has another shape or dtype than the table says.
    """
    header: dict[str, object] = {}
    position = 0
    for name, (dtype, shape) in table.items():
        end = position + table_bytes({name: (dtype, shape)})
        header[name] = {
            "dtype": DTYPE_CODES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    known = dict.fromkeys(("", *table), "0" * 64)  # of the tensors, and under "" of the header
    raw = _raw_header(header, metadata, known)
    with pathlib.Path(path).open("wb") as file:
        file.write(raw)
        for name, (dtype, shape) in table.items():
            array = make(name)
            if (array.dtype, array.shape) != (np.dtype(dtype), tuple(shape)):
                raise ValueError(f"{name}: not {dtype} {shape}, but {array.dtype} {array.shape}")
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            known[name] = hashlib.sha256(data).hexdigest()
            if data.size:
                file.write(memoryview(data))
            advance(array.nbytes)
        del known[""]
        known[""] = _header_checksum(header, metadata, known)
        file.seek(0)
        file.write(_raw_header(header, metadata, known))
        file.flush()
        os.fsync(file.fileno())
