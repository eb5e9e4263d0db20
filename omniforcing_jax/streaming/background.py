"""Writing a clip beside its generation."""

import contextlib
import queue
import threading

from omniforcing_jax.streaming.media import ClipWriter
from omniforcing_jax.streaming.session import Chunk


class BackgroundWriter:
    """Encodes chunks in a thread, so that the encoder and the accelerator work at the same time.

    As a context manager it ends with `close`; if the block raised, that exception is the one that
    is seen. What ends a program at once (KeyboardInterrupt) does not wait for a reader that takes
    nothing. The thread has ended in any case.
    """

    def __init__(self, writer: ClipWriter, enlarge: int = 1):
        """Starts the thread; every pixel is written as `enlarge` x `enlarge`."""
        self._writer, self._enlarge = writer, enlarge
        self._queue: queue.Queue[Chunk | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clip-writer")
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._abandon()
            return
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.close()

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            if self._error is None:
                try:
                    frames = chunk.frames[0].repeat(self._enlarge, 1).repeat(self._enlarge, 2)
                    self._writer.write(frames, chunk.waveform[0])
                except BaseException as error:  # re-raised in the main thread by put or close
                    self._error = error

    def put(self, chunk: Chunk) -> None:
        """Queues a chunk; waits while the encoder is far behind.

        Raises:
          What writing an earlier chunk raised, OSError for instance.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(chunk)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          As `put`.
        """
        try:
            self._queue.put(None)
            self._thread.join()
        except BaseException:  # Ctrl-C, while the reader of a pipe takes nothing
            self._abandon()
            raise
        if self._error is not None:
            raise self._error

    def _abandon(self) -> None:
        """Ends the thread, whatever it waits for: nobody else may close what it writes to."""
        self._writer.stop_waiting()
        while self._thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt, queue.Full):  # it is about to end
                self._queue.put(None, timeout=0.1)
                self._thread.join()
