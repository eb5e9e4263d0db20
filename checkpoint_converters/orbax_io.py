"""Streams tensors from safetensors files into Orbax checkpoints, a few at a time, and back.

Orbax's own writer wants the whole tree in memory. A stacked leaf [L, ...] of the 19B transformer
has 6 GB, so each leaf is written here through tensorstore, layer by layer, as the zarr array that
Orbax has for it without OCDBT; Orbax itself writes the tree's description. The arrays are not
compressed: weights hardly compress and on few cores compression is the bottleneck.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from checkpoint_converters import key_map
from checkpoint_converters.computed import ComputedTensor
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo, read_tensor

MAX_CHUNK_BYTES = 128 << 20
# below this a stacked leaf is gathered and written at once: fewer, larger files
MAX_GATHERED_BYTES = 64 << 20
# bytes of source tensors in flight over all threads; a larger tensor is handled alone
IN_FLIGHT_BYTES = 384 << 20
NUM_THREADS = max(2, min(4, os.cpu_count() or 1))

# kernels whose output axis is a stream's width; for all others it is the input axis
_WIDTH_LAST = ("out", "down", "video_out", "audio_out")


class LeafSource(NamedTuple):
    """One official tensor and how it lies in its leaf."""

    layer: int | None
    info: TensorInfo | ComputedTensor
    transform: key_map.Transform

    def read(self, dtype: np.dtype) -> np.ndarray:
        """In our layout; in `dtype` if it has to be computed, else as the file has it."""
        computed = isinstance(self.info, ComputedTensor)
        return self.transform.apply(self.info.read(dtype) if computed else read_tensor(self.info))


@dataclasses.dataclass(frozen=True)  # a tuple would be a tree of its own
class Leaf:
    """One array of the Orbax checkpoint.

    Attributes:
      path: "/"-separated path in the component's tree.
      shape: full shape, stacked over layers if it is.
      dtype: dtype on disk.
      chunks: chunk shape, each chunk is one file.
      sources: the official tensors, in the order of the layers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    sources: tuple[LeafSource, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_leaves(
    tensors: Mapping[str, TensorInfo],
    component: str,
    dtype: np.dtype | None = None,
    mesh: Mapping[str, int] | None = None,
) -> list[Leaf]:
    """Groups official tensors into the leaves of a component; nothing is read.

    Args:
      tensors: {official key: tensor}; must hold all layers of every stack.
      component: tensors of other components are skipped.
      dtype: dtype to store; None keeps the file's (float32 where the layers of a stack differ).
      mesh: {"fsdp": n, "tensor": m}: the shards a later restore will want.
    """
    sources: dict[str, list[LeafSource]] = {}
    for key, info in tensors.items():
        place = key_map.find_place(key)
        if place is not None and place.component == component:
            source = LeafSource(place.layer, info, place.transform)
            sources.setdefault(place.path, []).append(source)
    leaves = []
    for path, found in sorted(sources.items()):
        found.sort(key=lambda source: source.layer or 0)
        shape = found[0].transform.shape(found[0].info.shape)
        if found[0].layer is not None:
            shape = (len(found), *shape)
        dtypes = {source.info.dtype for source in found}
        stored = dtype or (dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32))
        chunks = chunk_shape(component, path, shape, stored.itemsize, mesh or {})
        leaves.append(Leaf(path, shape, stored, chunks, tuple(found)))
    return leaves


def chunk_shape(
    component: str, path: str, shape: tuple[int, ...], itemsize: int, mesh: Mapping[str, int]
) -> tuple[int, ...]:
    """Chunk grid of a leaf: one layer, one shard, at most `MAX_CHUNK_BYTES`.

    A linear kernel's width axis is cut for `fsdp`, its heads or hidden axis for `tensor`, where
    the sizes divide, so that each shard of a restore on such a mesh is a set of whole chunks.
    """
    chunks = list(shape)
    if key_map.is_stacked(path) and math.prod(shape) * itemsize > MAX_GATHERED_BYTES:
        chunks[0] = 1
    *_, parent, name = ("", *path.split("/"))
    if name == "kernel" and component in ("transformer", "connectors", key_map.TEXT_TOWER):
        width, hidden = (-1, -2) if parent in _WIDTH_LAST else (-2, -1)
        for axis, ways in ((width, mesh.get("fsdp", 1)), (hidden, mesh.get("tensor", 1))):
            if chunks[axis] % ways == 0:
                chunks[axis] //= ways
    # cut large chunks further, evenly, along the last axis that still divides
    while math.prod(chunks) * itemsize > MAX_CHUNK_BYTES:
        axis = max(range(len(chunks)), key=lambda a: (chunks[a] % 2 == 0, chunks[a]))
        chunks[axis] = math.ceil(chunks[axis] / 2)
    return tuple(chunks)


def write_component(
    folder: pathlib.Path,
    leaves: list[Leaf],
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
    share: tuple[int, int] = (0, 1),
    allow_non_finite: bool = False,
) -> None:
    """Writes one Orbax checkpoint.

    Args:
      folder: created; must not exist, unless other processes write their shares to it.
      leaves: from `plan_leaves`.
      advance: called from several threads with the number of source bytes just finished.
      share: (i, n): this process writes every n-th piece of work, beginning with the i-th.
      allow_non_finite: whether values that are not finite, as stored, are written as they are.

    Raises:
      ConversionError: there are such values, and they are not allowed.
    """
    index, count = share
    folder.mkdir(parents=True, exist_ok=count > 1)
    tasks = itertools.islice(_tasks(folder, leaves, allow_non_finite), index, None, count)
    _run(tasks, advance)
    if index == 0:
        _describe(folder, leaves)


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of NumPy arrays, which restore anywhere, for leaves that are streamed."""

    async def serialize(self, values, infos, args=None):
        return []


def _describe(folder: pathlib.Path, leaves: list[Leaf]) -> None:
    """Lets Orbax write down the tree's structure and the format of its arrays."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _StreamedHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where it is missing
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    tree = unflatten_dict({leaf.path: leaf for leaf in leaves}, sep="/")
    handler.save(folder, args=ocp.args.PyTreeSave(tree))


def open_leaf(folder: os.PathLike, path: str) -> ts.TensorStore:
    """An array of any Orbax checkpoint, unread.

    Args:
      folder: the component's folder.
      path: "/"-separated path in its tree.
    """
    root, name = f"{os.path.abspath(folder)}/", path.replace("/", ".") + "/"
    kvstore: dict = {"driver": "file", "path": root + name}
    if ocp.type_handlers.is_ocdbt_checkpoint(folder):
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": name}
    # a chunk that is missing was lost: those of zeros are written, too
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, read=True).result()


def _tasks(
    folder: pathlib.Path, leaves: list[Leaf], allow_non_finite: bool
) -> Iterator[tuple[int, Callable]]:
    """(bytes, work) whose chunks do not overlap: a leaf, or one layer of a large stack."""
    for leaf in leaves:
        layered = len(leaf.sources) > 1 and leaf.chunks[0] == 1
        groups = [(source,) for source in leaf.sources] if layered else [leaf.sources]
        for group in groups:
            size = sum(source.info.num_bytes for source in group)
            yield size, functools.partial(_copy, folder, leaf, group, allow_non_finite)


def _open(folder: pathlib.Path, leaf: Leaf) -> ts.TensorStore:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder / leaf.path.replace('/', '.')}/"},
        "metadata": {"chunks": list(leaf.chunks), "compressor": None},
        "store_data_equal_to_fill_value": True,
    }
    options = {"shape": leaf.shape, "dtype": leaf.dtype, "context": _context()}
    return ts.open(spec, create=True, open=True, **options).result()


@functools.cache
def _context() -> ts.Context:
    # an fsync per chunk file would take minutes; the converter syncs once, before it renames
    return ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


def _copy(
    folder: pathlib.Path,
    leaf: Leaf,
    group: tuple[LeafSource, ...],
    allow_non_finite: bool,
    stopped: threading.Event,
) -> None:
    """Writes the chunks that `group` covers, unless the conversion was stopped."""
    store = _open(folder, leaf)
    arrays = [source.read(leaf.dtype) for source in group]
    view, first = arrays[0], group[0].layer
    if first is not None:
        store = store[ts.d[0][first : first + len(arrays)].translate_to[0]]
        view = np.stack(arrays) if len(arrays) > 1 else view[None]
    grid = [range(0, size, chunk) for size, chunk in zip(view.shape, leaf.chunks, strict=True)]
    for corner in itertools.product(*grid):
        if stopped.is_set():
            return
        region = tuple(slice(start, min(start + chunk, size)) for start, chunk, size in
                       zip(corner, leaf.chunks, view.shape, strict=True))  # fmt: skip
        block = _contiguous(view[region], leaf.dtype)
        if not allow_non_finite and not np.isfinite(block).all():
            raise ConversionError(
                [
                    f"{group[0].info.file}: {leaf.path} has values that are not finite; get the "
                    "file again, or convert it as it is with --allow-non-finite"
                ]
            )
        store[region].write(block, can_reference_source_data_indefinitely=True).result()


def _contiguous(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-ordered copy. Narrow strips keep a transposed source in cache: 5x faster than one copy."""
    if view.ndim < 2 or view.flags.c_contiguous:
        return np.ascontiguousarray(view, dtype)
    block = np.empty(view.shape, dtype)
    for start in range(0, view.shape[-1], 16):
        block[..., start : start + 16] = view[..., start : start + 16]
    return block


def _run(tasks: Iterator[tuple[int, Callable]], advance: Callable[[int], None]) -> None:
    """Runs tasks on threads with a bound on the bytes in flight; stops all on the first error."""
    stopped = threading.Event()
    pending: dict[concurrent.futures.Future, int] = {}

    def finish_some() -> None:
        first = concurrent.futures.FIRST_COMPLETED
        for future in concurrent.futures.wait(pending, return_when=first).done:
            size = pending.pop(future)
            future.result()
            advance(size)

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for size, work in tasks:
                while pending and (
                    len(pending) >= NUM_THREADS or sum(pending.values()) + size > IN_FLIGHT_BYTES
                ):
                    finish_some()
                pending[pool.submit(work, stopped)] = size
            while pending:
                finish_some()
        except BaseException:
            stopped.set()
            raise
