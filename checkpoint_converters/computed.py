"""Tensors that a file does not hold as such, but that follow from what it holds.

Dequantised weights (`quantized`) and weights with LoRAs merged in (`lora`) are computed a slice of
rows at a time, while the converter streams them.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np

from checkpoint_converters.safetensors_io import DTYPES, TensorInfo, read_tensor

SLICE_BYTES = 32 << 20  # of float32, computed at once
TILE = 128  # slices begin at multiples of this, as the tiles of some layouts do

# (first row, row behind the last) -> float32 [rows, ...]
Rows = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedTensor:
    """What the converters take in place of a `TensorInfo`.

    Attributes:
      shape: official shape, with at least one axis.
      dtype_code: what it is stored as unless another dtype is asked for.
      parts: the tensors of files that it is computed from.
      recipe: how, with every number that is not in `parts`; JSON.
      open: gives the function that computes rows; what all rows need is read then.
    """

    shape: tuple[int, ...]
    dtype_code: str
    parts: tuple[TensorInfo, ...]
    recipe: list
    open: Callable[[], Rows]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_code]

    @property
    def file(self) -> pathlib.Path:
        return self.parts[0].file

    @property
    def num_bytes(self) -> int:
        """As stored, not of what is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The whole tensor, computed in float32 and rounded to `dtype` slice by slice."""
        rows, out = self.open(), np.empty(self.shape, dtype)
        step = SLICE_BYTES // (4 * max(1, math.prod(self.shape[1:])))
        step = max(TILE, step // TILE * TILE)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out[start:stop] = rows(start, stop)
        return out


def rows_of(tensor: TensorInfo | ComputedTensor) -> Rows:
    """Reads rows of any tensor as float32."""
    if isinstance(tensor, ComputedTensor):
        return tensor.open()
    return lambda start, stop: read_tensor(some_rows(tensor, start, stop)).astype(np.float32)


def some_rows(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """The part of a file's tensor that holds these rows, without the checksum of the whole."""
    row = info.num_bytes // max(1, info.shape[0])
    return info._replace(
        checksum=None,
        shape=(stop - start, *info.shape[1:]),
        offset=info.offset + start * row,
        num_bytes=(stop - start) * row,
    )
