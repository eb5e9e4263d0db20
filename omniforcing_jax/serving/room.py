"""How many more sessions the memory of a device holds, where the device says what is in use."""

import sys

import jax


class Room:
    """Measured with one session, and asked before others are let in.

    room = Room(jax.devices()[0])  # with the weights loaded, and no session
    ...                            # a session makes blocks
    room.measure()                 # and is there still
    room()                         # how many more fit now
    """

    def __init__(self, device: jax.Device):
        """Notes what is in use now."""
        self._device = device
        self._others = self._stats().get("bytes_in_use", 0)
        self._session = self._working = 0

    def _stats(self) -> dict[str, int]:
        return self._device.memory_stats() or {}

    def measure(self) -> None:
        """Notes what the one session holds, and what blocks take beside it for a moment."""
        stats = self._stats()
        if "bytes_limit" in stats:
            self._session = max(stats["bytes_in_use"] - self._others, 0)
            self._working = stats.get("peak_bytes_in_use", 0) - stats["bytes_in_use"]

    def __call__(self) -> int:
        """Sessions that fit besides those that are there; no limit where it is not known."""
        if not self._session:
            return sys.maxsize
        stats = self._stats()
        free = stats["bytes_limit"] - stats["bytes_in_use"] - max(self._working, 0)
        return max(free // self._session, 0)

    def __str__(self) -> str:
        """What was measured, in a line; empty where nothing is known."""
        if not self._session:
            return ""
        held, beside = (x / 2**30 for x in (self._session, max(self._working, 0)))
        return f"{held:.2f} GiB a session, {beside:.2f} GiB for a block beside: {self()} more fit"
