"""Reading and writing safetensors files piece by piece, without holding a file in memory.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets},
"__metadata__": {str: str}}, then the tensors' bytes in C order. The library `safetensors` maps
whole files, whose pages count as resident, knows no bfloat16 without PyTorch, and writes only what
is in memory as a whole; so header and bytes are read and written here.
"""

import json
import math
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
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


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
    """One tensor of a file: dtype code of the format, shape, and where its bytes are."""

    file: pathlib.Path
    dtype_code: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

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
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(
                path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError([f"{path}: not a safetensors file (bad header: {error})"]) from error
    _check_header(path, tensors, size)
    return tensors, metadata


def _check_header(path: pathlib.Path, tensors: dict[str, TensorInfo], size: int) -> None:
    problems = []
    for name, info in tensors.items():
        if info.dtype_code not in DTYPES:
            text = f"{path}: {name} has the unsupported dtype {info.dtype_code}"
            problems.append(Problem(text, f"dtype {info.dtype_code}"))
        elif math.prod(info.shape) * info.dtype.itemsize != info.num_bytes:
            text = f"{path}: {name} has {info.num_bytes} bytes for shape {info.shape}"
            problems.append(Problem(text, "bytes for shape"))
    needed = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
    if needed > size:
        problems.append(f"{path}: truncated, {size} of {needed} bytes are there; download it again")
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
    return data.view(info.dtype).reshape(info.shape)


def read_middle(info: TensorInfo, num_bytes: int) -> bytes:
    """Bytes from the middle of a tensor: `num_bytes`, or all of a smaller one."""
    count = min(num_bytes, info.num_bytes)
    with info.file.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), count, info.offset + (info.num_bytes - count) // 2)


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
    """Writes a safetensors file tensor by tensor, down to the disk.

    Args:
      path: file to create.
      table: all tensors, in the order in which they are made and written.
      metadata: strings for `__metadata__`.
      make: the tensor of a name.
      advance: called with the number of bytes just written.

    Raises:
      ValueError: a tensor has another shape or dtype than the table says.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in table.items():
        end = position + table_bytes({name: (dtype, shape)})
        header[name] = {
            "dtype": DTYPE_CODES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8
    with pathlib.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, (dtype, shape) in table.items():
            array = make(name)
            if (array.dtype, array.shape) != (np.dtype(dtype), tuple(shape)):
                raise ValueError(f"{name}: not {dtype} {shape}, but {array.dtype} {array.shape}")
            if array.size:
                file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
            advance(array.nbytes)
        file.flush()
        os.fsync(file.fileno())
