"""How Orbax writes a training checkpoint's parts: uncompressed, hashed, and telling of failures."""

import base64
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from omniforcing_jax.io import checksums


@dataclasses.dataclass
class _Noted:
    """A part of a save under way, in the background."""

    future: Any  # Orbax's, or `_Hashing`
    note: Callable[[Exception], None]

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except Exception as error:
            self.note(error)
            raise


@dataclasses.dataclass
class _Hashing:
    """What comes after the other parts: the checksums of the files that this process wrote."""

    folder: epath.Path
    done: Callable[[], None]

    def result(self, timeout: float | None = None) -> None:
        del timeout
        index = jax.process_index()
        checksums.write_part(self.folder, part=index, within=f"ocdbt.process_{index}/")
        self.done()


class _Handler:
    """A handler that leaves checksums, and hands the error of a save that fails in the background
    to `note`.

    The manager itself tells of it when the next save begins. With several processes not even then:
    it waits for all of them before.
    """

    note: Callable[[Exception], None] = staticmethod(lambda error: None)

    async def async_save(self, directory: epath.Path, *args, **settings) -> list[_Noted]:
        futures = await super().async_save(directory, *args, **settings)
        return [_Noted(future, self.note) for future in futures or ()]

    def finalize(self, directory: epath.Path) -> None:
        """Process 0's, when all have written their parts and before the checkpoint is valid."""
        try:
            super().finalize(directory)
            checksums.write(directory)
        except Exception as error:
            self.note(error)
            raise


class StateHandler(_Handler, ocp.PyTreeCheckpointHandler):
    """Calls `done` when this process has written its part."""

    done: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self):
        # uncompressed: weights hardly shrink, and zstd would be the bottleneck
        super().__init__(use_compression=False)

    async def async_save(self, directory: epath.Path, *args, **settings) -> list[_Noted]:
        futures = await super().async_save(directory, *args, **settings)
        return [*futures, _Noted(_Hashing(directory, self.done), self.note)]


class JsonHandler(_Handler, ocp.JsonCheckpointHandler):
    """What process 0 writes."""


# Orbax finds a handler by the types of its arguments, and wants to know both.


@ocp.args.register_with_handler(StateHandler, for_save=True)
class SaveState(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(StateHandler, for_restore=True)
class RestoreState(ocp.args.PyTreeRestore):
    pass


@ocp.args.register_with_handler(JsonHandler, for_save=True)
class SaveJson(ocp.args.JsonSave):
    pass


@ocp.args.register_with_handler(JsonHandler, for_restore=True)
class RestoreJson(ocp.args.JsonRestore):
    pass


def to_json(state: dict | bytes) -> dict:
    """An iterator's state as JSON."""
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def from_json(state: dict) -> dict | bytes:
    """The same backwards."""
    return base64.b64decode(state["base64"]) if set(state) == {"base64"} else state
