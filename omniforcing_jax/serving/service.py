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

LARGEST_UPLOAD = 16 << 20  # bytes
LONGEST_PROMPT = 4000  # characters


@dataclasses.dataclass(frozen=True)
class SessionRequest:
    """What the runtime opens a stream for.

    Attributes:
      contexts: of the first prompt, as the text encoder gives them.
      seed: of all noise.
      sound: whether the sound is pushed.
    """

    contexts: Any
    seed: int
    sound: bool = False

    @classmethod
    def of(cls, contexts: Any, seed: int | None, sound: bool = False) -> "SessionRequest":
        """With the seed that was asked for, or a new one."""
        return cls(contexts, secrets.randbits(32) if seed is None else seed, sound)


@dataclasses.dataclass(frozen=True)
class Service:
    """What a server serves.

    Attributes:
      runtime: steps the sessions.
      encode: text to contexts; called beside the runtime's thread, by one thread at a time. Raises
        ValueError for a text that it cannot take.
      width, height, frame_rate, sample_rate: of the streams.
      enlarge: every pixel is sent as so many by so many.
      image_crf: H.264 quality that pictures are given, see `media_files.compress_image`.
      hosts: names by which the server may be called, without port; "*" for any.
      token: that clients must have; None lets all in.
      compilations: how many programs the process has compiled, a figure that must stand still.
    """

    runtime: Runtime
    encode: Callable[[str], Any]
    width: int
    height: int
    frame_rate: float
    sample_rate: int
    enlarge: int = 1
    image_crf: int = 0
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    token: str | None = None
    compilations: Callable[[], int] = lambda: 0

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
      encoders: threads that encode fragments and fit pictures.
      decoding: held while a client's picture is decoded; one at a time, as each may use gigabytes.
    """

    def __init__(self, service: Service):
        self._service = service
        self._text_thread = ThreadPoolExecutor(1, "text")
        self.encoders = ThreadPoolExecutor(max(2, service.runtime.limits.sessions), "encoder")
        self.decoding = asyncio.Semaphore(1)

    async def encode(self, text: str) -> Any:
        """Contexts of a prompt.

        Raises:
          ValueError: it is empty, too long, or none that the text encoder takes.
        """
        if not text.strip():
            raise ValueError("the prompt is empty")
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"a prompt has at most {LONGEST_PROMPT} characters")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_thread, self._service.encode, text)

    def close(self) -> None:
        """Starts nothing more."""
        for pool in (self._text_thread, self.encoders):
            pool.shutdown(wait=False, cancel_futures=True)
