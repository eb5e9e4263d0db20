"""From a sentence to contexts: looked up on disk, or encoded by a text encoder loaded on demand.

    prompts = PromptEncoder("gemma", "ltx2", cache=default_cache())
    video_context, audio_context = prompts.contexts("A dog runs through tall grass.")

Gemma 3 12B is as large as the sampler and is needed for a moment per prompt. By default it is
loaded when a prompt is not in the cache and unloaded afterwards; a live session that changes
prompts while it plays keeps it (`keep`), as int8 if both shall fit on one device. It meets the same
prompts again and again; with their contexts on disk the encoder need not even be loaded.
"""

import dataclasses
import hashlib
import os
import pathlib
import threading
import time
import warnings
from collections.abc import Sequence

import jax.numpy as jnp

from omniforcing_jax.io.paths import user_cache
from omniforcing_jax.models import quantization
from omniforcing_jax.text.encoder_files import check_encoder
from omniforcing_jax.text.features import TextFeatures, load_text_features, save_text_features
from omniforcing_jax.text.prompt_files import prompt_hash
from omniforcing_jax.text.text_encoder import TextEncoder
from omniforcing_jax.types import Contexts


def default_cache() -> pathlib.Path:
    """Folder for encoded prompts: `omniforcing_jax/prompts` in the user's cache folder."""
    return user_cache("prompts")


@dataclasses.dataclass
class TextTimes:
    """What prompts have cost so far.

    Attributes:
      lookup, load, encode: wall seconds spent on the cache, on loading weights, and on encoding,
        compilation included.
      found, encoded: prompts that were in the cache, and those that were not.
    """

    lookup: float = 0.0
    load: float = 0.0
    encode: float = 0.0
    found: int = 0
    encoded: int = 0

    @property
    def total(self) -> float:
        """Sum of the seconds."""
        return self.lookup + self.load + self.encode


class PromptCache:
    """Contexts by prompt, for one text encoder.

    Several processes can share a folder, and so can several encoders: entries appear complete or
    not at all, and their names depend on the encoder.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str, dims: tuple[int, int]):
        """Opens a cache, creating its folder.

        Args:
          folder: of the cache.
          fingerprint: of the encoder (`TextEncoder.fingerprint`).
          dims: (Wv, Wa), widths of its contexts (`TransformerConfig.text_dims`).

        Raises:
          ValueError: it is a file, or no path.
        """
        self._folder, self._fingerprint, self._dims = pathlib.Path(folder), fingerprint, dims
        self._writable = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writable = os.access(folder, os.W_OK | os.X_OK)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"the prompt cache {folder} is not a folder: {error}") from error
        except OSError:  # read-only; what is in it serves all the same
            self._writable = False

    def path(self, prompt: str) -> pathlib.Path:
        """File of a prompt's entry, whether it exists or not."""
        key = hashlib.sha256(f"{self._fingerprint} {prompt_hash(prompt)}".encode()).hexdigest()
        return self._folder / f"{key}.safetensors"

    def get(self, prompt: str) -> TextFeatures | None:
        """Contexts of a prompt, or None if they are not stored.

        An entry that cannot be read counts as missing, with a warning; `put` replaces it.
        """
        path = self.path(prompt)
        try:
            features = load_text_features(path, self._dims)
            if features.prompt != prompt.strip():
                raise ValueError(f"{path} is for another prompt, {features.prompt[:60]!r}")
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            warnings.warn(f"ignored an entry of the prompt cache: {error}", stacklevel=2)
            return None
        return features

    def put(self, prompt: str, features: TextFeatures) -> None:
        """Stores the contexts of a prompt, replacing an earlier entry.

        Raises:
          ValueError: contexts of a wrong shape or dtype, or with values that are not finite.
          OSError: the folder cannot be written to.
        """
        if not self._writable:
            raise OSError(f"the prompt cache {self._folder} cannot be written to")
        save_text_features(
            self.path(prompt),
            features.video_context,
            features.audio_context,
            prompt.strip(),
            features.model_version,
            features.mask,
        )


class PromptEncoder:
    """Encodes prompts one by one, remembering them on disk; of several threads one at a time.

    Attributes:
      keep: the encoder stays in memory after a prompt.
      length: tokens per prompt.
      times: see `TextTimes`.
    """

    def __init__(
        self,
        gemma: str | os.PathLike,
        checkpoint: str | os.PathLike,
        *,
        cache: str | os.PathLike | None,
        dtype: jnp.dtype = jnp.bfloat16,
        quantize: str = "none",
        length: int | None = None,
        keep: bool = False,
        verify: bool = True,
    ):
        """Checks the folders; no weights are read yet.

        Args:
          gemma: folder from `checkpoint_converters.gemma3` or `.gemma4`.
          checkpoint: converted LTX-2 or student, for its connectors.
          cache: folder of encoded prompts; None keeps none on disk.
          dtype, quantize, length: see `TextEncoder.load`.
          keep: leave the encoder in memory after a prompt.
          verify: see `TextEncoder.load`.

        Raises:
          FileNotFoundError, ValueError: as `TextEncoder.load`, or the cache is a file.
        """
        quantization.check_mode(quantize)
        self._files = check_encoder(gemma, checkpoint, length=length)
        self._load = lambda: TextEncoder.load(
            gemma, checkpoint, dtype=dtype, quantize=quantize, length=length, verify=verify
        )
        self._encoder: TextEncoder | None = None
        self._cache = None
        if cache is not None:
            connectors = self._files.connectors
            fingerprint = self._files.fingerprint(dtype, quantize)
            fingerprint += "" if self._files.length == 1024 else f"-{self._files.length}"
            dims = (connectors.video_dim, connectors.audio_dim)
            self._cache = PromptCache(cache, fingerprint, dims)
        self.keep, self.length = keep, self._files.length
        self.times, self._lock = TextTimes(), threading.Lock()

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that cannot be encoded; reads no weights."""
        self._files.tokenizer.encode(prompts)

    def contexts(self, prompt: str) -> Contexts:
        """Contexts [1, S, Wv] and [1, S, Wa] of a prompt.

        Raises:
          ValueError, FloatingPointError: as `encode`.
        """
        return self.encode([prompt])[0]

    def encode(self, prompts: Sequence[str]) -> list[Contexts]:
        """Contexts of several prompts, as `contexts`; the encoder is loaded at most once.

        Raises:
          ValueError: a prompt is not valid Unicode.
          FloatingPointError: contexts are not finite.
        """
        self.check(prompts)
        with self._lock:
            found = {prompt: self._lookup(prompt) for prompt in prompts}
            try:
                for prompt in found:
                    if found[prompt] is None:
                        found[prompt] = self._compute(prompt)
            finally:
                if not self.keep:
                    self.close()
        return [found[prompt] for prompt in prompts]

    def _lookup(self, prompt: str) -> Contexts | None:
        start = time.perf_counter()
        features = None if self._cache is None else self._cache.get(prompt)
        self.times.lookup += time.perf_counter() - start
        if features is None:
            return None
        self.times.found += 1
        return features.video_context, features.audio_context

    def _compute(self, prompt: str) -> Contexts:
        start = time.perf_counter()
        if self._encoder is None:
            self._encoder = self._load()
        loaded = time.perf_counter()
        self.times.load += loaded - start
        features = self._encoder.encode([prompt])
        contexts = (features.video_context, features.audio_context)
        if not all(bool(jnp.isfinite(context).all()) for context in contexts):
            raise FloatingPointError(
                f"the contexts of the prompt {prompt[:60]!r} are not finite; the text encoder "
                "overflows: check its weights, or run it in float32"
            )
        if self._cache is not None:
            try:
                self._cache.put(prompt, features)
            except OSError as error:  # the contexts are at hand all the same
                warnings.warn(f"an encoded prompt was not stored: {error}", stacklevel=3)
        self.times.encode += time.perf_counter() - loaded
        self.times.encoded += 1
        return contexts

    def close(self) -> None:
        """Unloads the encoder; a later prompt loads it again."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None
