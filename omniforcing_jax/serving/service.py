"""What a server serves: the streams of one runtime, and what it takes from clients."""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from omniforcing_jax.io.media_files import check_enlargement, compress_image, fit_pixels
from omniforcing_jax.serving import protocol
from omniforcing_jax.serving.fragments import Fragments
from omniforcing_jax.serving.runtime import Runtime
from omniforcing_jax.serving.snapshots import SnapshotStore
from omniforcing_jax.serving.turn_log import TurnLog, TurnLogs

LARGEST_UPLOAD = 16 << 20  # bytes
LONGEST_PROMPT = 4000  # characters


@dataclasses.dataclass(frozen=True)
class SessionRequest:
    """What the runtime opens a stream for.

    Attributes:
      log: prompt, seed, whether the sound is pushed, and the turns, as they are applied.
      snapshot: that the stream goes on from, if it was saved.
    """

    log: TurnLog
    snapshot: dict[str, Any] | None = None

    @classmethod
    def of(cls, prompt: str, seed: int | None, sound: bool = False) -> "SessionRequest":
        """A new session, with the seed that was asked for, or a new one."""
        seed = secrets.randbits(32) if seed is None else seed
        return cls(TurnLog(secrets.token_urlsafe(16), prompt, seed, sound))


@dataclasses.dataclass(frozen=True)
class Service:
    """What a server serves.

    Attributes:
      runtime: steps the sessions.
      check: raises ValueError for a text that cannot be encoded. A session's first one is encoded
        when its stream is opened: a client without a place costs nothing.
      width, height, frame_rate, sample_rate: of the streams.
      enlarge: every pixel is sent as so many by so many.
      image_crf: H.264 quality that pictures are given, see `media_files.compress_image`.
      hosts: names by which the server may be called, without port; "*" for any.
      token: that clients must have; None lets all in.
      compilations: how many programs the process has compiled, a figure that must stand still.
      device_memory: bytes that are in use on the device; None where that is the host's.
      snapshots: of sessions whose clients have vanished; None keeps none.
      log_prompts: whether the logs hold what clients ask for.
    """

    runtime: Runtime
    check: Callable[[str], None]
    width: int
    height: int
    frame_rate: float
    sample_rate: int
    enlarge: int = 1
    image_crf: int = 0
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    token: str | None = None
    compilations: Callable[[], int] = lambda: 0
    device_memory: Callable[[], int | None] = lambda: None
    snapshots: SnapshotStore | None = None
    log_prompts: bool = False

    def fragments(self) -> Fragments:
        """An encoder of one stream."""
        return Fragments(
            width=self.width,
            height=self.height,
            frame_rate=self.frame_rate,
            sample_rate=self.sample_rate,
            enlarge=self.enlarge,
        )

    def fitted(self, pixels: np.ndarray) -> np.ndarray:
        """A client's picture [H, W, 3] uint8 as a stream takes it, float32 in [-1, 1].

        Raises:
          ValueError: it is too small.
        """
        check_enlargement(pixels.shape[:2], self.height, self.width, "the picture")
        pixels = compress_image(pixels, self.image_crf)
        return fit_pixels(pixels, self.height, self.width)

    def hello(self) -> protocol.Hello:
        """What a client is told first."""
        return protocol.Hello(
            protocol=protocol.VERSION,
            width=self.width * self.enlarge,
            height=self.height * self.enlarge,
            frame_rate=self.frame_rate,
            sample_rate=self.sample_rate,
            lead=self.runtime.limits.lead,
            longest_prompt=LONGEST_PROMPT,
            largest_upload=LARGEST_UPLOAD,
        )


class Workers:
    """What is done beside the runtime's thread, as it would make blocks late.

    Attributes:
      encoders: threads that encode fragments, fit pictures, and read and write logs and snapshots.
      decoding: held while a client's picture is decoded; one at a time, as each may use gigabytes.
      logs: of the sessions' turns.
      seated: what ends the session of a name that runs, and waits for that.
    """

    def __init__(self, service: Service):
        self._service = service
        self._text_thread = ThreadPoolExecutor(1, "text")
        self.encoders = ThreadPoolExecutor(max(2, service.runtime.limits.sessions), "encoder")
        self.decoding = asyncio.Semaphore(1)
        self.logs = TurnLogs()
        self.seated: dict[str, Callable[[], Any]] = {}

    async def beside(self, function: Callable, *args: Any) -> Any:
        """The result of a function, in one of the `encoders`."""
        return await asyncio.get_running_loop().run_in_executor(self.encoders, function, *args)

    async def with_text(self, text: str, function: Callable[[str], Any]) -> Any:
        """The result of a function that encodes a prompt, in the thread where that is done.

        Raises:
          ValueError: it is empty, too long, or none that the text encoder takes.
        """
        if not text.strip():
            raise ValueError("the prompt is empty")
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"a prompt has at most {LONGEST_PROMPT} characters")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, function, text)

    async def check(self, text: str) -> None:
        """Raises as `with_text` for what cannot be a first prompt."""
        await self.with_text(text, self._service.check)

    async def saved(self, name: str) -> SessionRequest:
        """A session that was saved; one that still runs is ended and saved before.

        Raises:
          ValueError: see `SnapshotStore.read`.
        """
        if self._service.snapshots is None:
            raise ValueError("this server keeps no sessions; begin a new one")
        if (end := self.seated.get(name)) is not None:
            try:
                await end()
            except TimeoutError:
                raise ValueError("the session is still being saved; try again soon") from None
        return SessionRequest(*await self.beside(self._service.snapshots.read, name))

    def close(self) -> None:
        """Starts nothing more."""
        for pool in (self._text_thread, self.encoders):
            pool.shutdown(wait=False, cancel_futures=True)
