"""Sessions on disk: whose clients have vanished, whose server has ended, or may die.

A file holds what the stream goes on from, and the log of its turns. It is named by a hash of the
session's name, so that no client's text reaches the file system, and reading it can make nothing
but the values that a session consists of.
"""

import contextlib
import hashlib
import os
import pathlib
import struct
import threading
from collections.abc import Callable
from typing import Any

from flax.serialization import msgpack_restore, msgpack_serialize

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.io import plain
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.models.quantization import QuantizedArray
from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.models.transformer.layers import KV
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.kv_cache import CacheConfig, RollingCache
from omniforcing_jax.serving.turn_log import TurnLog
from omniforcing_jax.streaming.audio import StreamingAudioState
from omniforcing_jax.streaming.chunks import ChunkPart
from omniforcing_jax.streaming.encoders import AudioEncoderState, VideoEncoderState
from omniforcing_jax.streaming.given import GivenState
from omniforcing_jax.streaming.steering import Blend
from omniforcing_jax.streaming.turns import Turn, WaitingTurn
from omniforcing_jax.streaming.video import CausalVideoState, WindowVideoState
from omniforcing_jax.types import AVLatents

_MAGIC = b"omniforcing_jax session 2\n"
_HEAD = struct.Struct(f"<{len(_MAGIC)}sI32s")  # with how often it was taken up, and SHA-256
_CLASSES = {
    kind.__name__: kind
    for kind in (
        *(AVLatents, AudioEncoderState, Blend, BlockLayout, CacheConfig, CausalVideoState),
        *(ChunkPart, Condition, GivenState, KV, Pathways, RollingCache, StreamingAudioState, Turn),
        *(QuantizedArray, VideoEncoderState, WaitingTurn, WindowVideoState),
    )
}


class SnapshotStore:
    """A folder of sessions that can be taken up again."""

    def __init__(self, folder: str | os.PathLike, most_bytes: int, fingerprint: str):
        """Makes the folder, which nobody else may read.

        Args:
          folder: may be shared by several servers.
          most_bytes: of all files together; the oldest are removed for new ones.
          fingerprint: of everything a snapshot fits to: weights, configuration, options.

        Raises:
          OSError: the folder cannot be made.
          ValueError: no bytes at all.
        """
        if most_bytes < 1:
            raise ValueError(f"snapshots need more than {most_bytes} bytes")
        self._folder, self._most_bytes = pathlib.Path(folder), most_bytes
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _path(self, name: str) -> pathlib.Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.session"

    def save(self, log: TurnLog, snapshot: dict[str, Any]) -> bool:
        """Writes a session; False if it alone is larger than all may be, or was taken up elsewhere.

        Raises:
          OSError: it cannot be written; no part of it is left.
        """
        content = {
            "fingerprint": self._fingerprint,
            "log": log.to_json(),
            "snapshot": plain.to_plain(snapshot, _CLASSES),
        }
        data = msgpack_serialize(content)
        if len(data) > self._most_bytes:
            return False
        head = _HEAD.pack(_MAGIC, len(log.taken_up), hashlib.sha256(data).digest())
        path = self._path(log.name)
        with self._lock:
            if _times_taken_up(path) > len(log.taken_up):
                return False
            self._make_room(len(data), path)
            with new_file(path) as temporary:
                temporary.touch(0o600)
                with temporary.open("wb") as file:
                    file.write(head)
                    file.write(data)
        return True

    def _make_room(self, size: int, replaced: pathlib.Path) -> None:
        files = []
        for file in self._folder.glob("*.session"):
            with contextlib.suppress(FileNotFoundError):
                if file == replaced:
                    continue
                files.append((file.stat().st_mtime, file.stat().st_size, file))
        used = sum(size for _, size, _ in files)
        for _, freed, file in sorted(files):
            if used + size <= self._most_bytes:
                return
            file.unlink(missing_ok=True)
            used -= freed

    def read(self, name: str) -> tuple[TurnLog, dict[str, Any]]:
        """The log and the snapshot of a session, which is to be taken up now.

        Raises:
          ValueError: there is none of that name, it is damaged, or of another model or server;
            says so in one line.
        """
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            raise ValueError("this session is not kept any more; begin a new one") from None
        head, data = data[: _HEAD.size], data[_HEAD.size :]
        whole = _MAGIC, hashlib.sha256(data).digest()
        if len(head) < _HEAD.size or _HEAD.unpack(head)[::2] != whole:
            raise ValueError("the file of this session is damaged; begin a new one")
        content = msgpack_restore(data)
        if content.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "this session was made with another model, or with other options of the server; "
                "begin a new one"
            )
        log = TurnLog.from_json(content["log"], name)
        snapshot = plain.from_plain(content["snapshot"], _CLASSES)
        log.taken_up.append(snapshot["num_made"])
        return log, snapshot

    def remove(self, name: str) -> None:
        """Forgets a session, if it is there."""
        with self._lock:
            self._path(name).unlink(missing_ok=True)


def _times_taken_up(path: pathlib.Path) -> int:
    """Of the session in a file; 0 for none."""
    try:
        with path.open("rb") as file:
            magic, times, _ = _HEAD.unpack(file.read(_HEAD.size))
    except (FileNotFoundError, struct.error):
        return 0
    return times if magic == _MAGIC else 0


class SessionKeeper:
    """Keeps a runtime's sessions in a store: those that are left, and copies of those that run.

    Attributes:
      every: seconds between the copies of a session; infinity makes none.
    """

    def __init__(self, store: SnapshotStore, every: float = float("inf")):
        """A `runtime.Keeper` for requests that have a `log`."""
        self._store, self.every = store, every

    def saving(self, request: Any, stream: Any, *, goes_on: bool) -> Callable[[], bool]:
        """See `runtime.Keeper`."""
        if not goes_on:
            return lambda: self._store.save(request.log, stream.snapshot())
        log, snapshot = request.log.copy(), stream.begin_snapshot()
        return lambda: self._store.save(log, snapshot())

    def forget(self, request: Any) -> None:
        """See `runtime.Keeper`."""
        self._store.remove(request.log.name)
