"""Contexts of prompts that were encoded before, on disk.

An interactive session meets the same prompts again and again; with their contexts at hand the text
encoder need not even be loaded.
"""

import hashlib
import os
import pathlib
import warnings

from omniforcing_jax.text.features import TextFeatures, load_text_features, save_text_features
from omniforcing_jax.text.prompt_files import prompt_hash


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
        """
        self._folder = pathlib.Path(folder)
        self._fingerprint = fingerprint
        self._dims = dims
        self._folder.mkdir(parents=True, exist_ok=True)

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
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            warnings.warn(f"ignored an entry of the prompt cache: {error}", stacklevel=2)
            return None
        if features.prompt != prompt.strip():
            warnings.warn(
                f"ignored an entry of the prompt cache: {path} is for another prompt, "
                f"{features.prompt[:60]!r}",
                stacklevel=2,
            )
            return None
        return features

    def put(self, prompt: str, features: TextFeatures) -> None:
        """Stores the contexts of a prompt, replacing an earlier entry.

        Raises:
          ValueError: contexts of a wrong shape or dtype, or with values that are not finite.
          OSError: the folder cannot be written to.
        """
        save_text_features(
            self.path(prompt),
            features.video_context,
            features.audio_context,
            prompt.strip(),
            features.model_version,
            features.mask,
        )
