"""Batches of a stored dataset on the devices of a mesh."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from omniforcing_jax.distributed import partitioning


class DeviceBatches:
    """Batches as arrays over the mesh, of which this process reads the rows its devices hold.

    Where an axis of the mesh repeats rows on several processes (`tensor`, `sequence`), each of them
    reads them.
    """

    def __init__(self, source: Any, batch_size: int, seed: int, mesh: jax.sharding.Mesh):
        from omniforcing_jax.data.text_dataset import grain_batches

        self._manifest, self._size = source.manifest, batch_size
        self._sharding = partitioning.batch_sharding(mesh)
        held = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        everyone = np.arange(batch_size)
        self._rows = np.unique(np.concatenate([everyone[index] for index in held]))
        self._iterator = grain_batches(source, batch_size, seed=seed, rows=self._rows.tolist())

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        rows = text_arrays(next(self._iterator), self._manifest)
        return {name: self._place(x) for name, x in rows.items()}

    def _place(self, x: np.ndarray) -> jax.Array:
        """[rows of this process, ...] -> [B, ...] over the mesh."""

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._size)
            first = np.searchsorted(self._rows, start)
            return x[first : first + stop - start]

        shape = (self._size, *x.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)

    def get_state(self) -> Any:
        """Where the iterator stands, in batches: the same for all processes."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        """Goes there."""
        self._iterator.set_state(state)


def text_arrays(element: Mapping[str, Any], manifest: Any) -> dict[str, Any]:
    """The arrays of a dataset's element that a stage reads; shared features travel once."""
    drop = {"prompt", "prompt_hash", *(("audio_features",) if manifest.shared_features else ())}
    return {name: value for name, value in element.items() if name not in drop}
