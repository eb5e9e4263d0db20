"""Ctrl-C and SIGTERM of a program that streams."""

import os
import select
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from omniforcing_jax import programs

GRACE = 0.8  # seconds in which a second signal must have ended the program


class Interrupt:
    """The first signal ends a stream after the current block, a second one ends it at once.

    Before `ends_after_block` is set there is no stream to end, and the first signal raises
    KeyboardInterrupt at once, as the second one always does. Python handles a signal between two of
    its instructions only, which a compilation or a block of a large model keeps from coming; so a
    thread of its own sees the second signal, and ends the process where it has not ended by itself.

    Attributes:
      ends_after_block: whether the first signal waits for the block.
      requested: whether a signal has come.
      before_exit: called before the process is ended that way.
    """

    def __init__(self):
        self.ends_after_block = self.requested = False
        self._status = programs.INTERRUPTED
        self.before_exit: Callable[[], None] = lambda: None
        self._over = threading.Event()

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="interrupt", daemon=True).start()
        return self

    def _handle(self, signum, frame) -> None:
        at_once = self.requested or not self.ends_after_block
        self.requested = True
        self._status = 128 + signum
        if at_once:
            raise programs.Terminated if signum == signal.SIGTERM else KeyboardInterrupt
        programs.say("\nending after this block (Ctrl-C again: at once)")

    def _watch(self) -> None:
        """Waits for the second signal, and then for the end."""
        seen = 0
        while seen < 2:
            if not (signum := os.read(self._reader, 1)):  # closed: it is over
                os.close(self._reader)
                return
            if signum[0] in (signal.SIGINT, signal.SIGTERM):
                seen, self._status = seen + 1, 128 + signum[0]
        if not self._over.wait(GRACE):
            self.leave()

    def leave(self) -> NoReturn:
        """Ends the process at once, whatever its threads do and whoever reads what it says."""
        try:
            self.before_exit()
            if select.select([], [2], [], 0)[1]:  # else writing would wait for its reader
                os.write(2, b"\ninterrupted\n")
        finally:
            os._exit(self._status)

    def __exit__(self, *_) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread
