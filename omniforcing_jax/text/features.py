"""Stored text features: the contexts of one prompt, ready for the transformer.

A file holds `video_context` [B, S, Wv] and `audio_context` [B, S, Wa] as the connectors produce
them, an optional `mask` [B, S], and the prompt. It is plain safetensors, so any framework can make
one. Contexts depend on the prompt only: they are computed once and the text encoder, which is as
large as a transformer, stays out of memory while sampling and training.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omniforcing_jax.io.checksums import DamagedFile
from omniforcing_jax.io.paths import new_file

_KIND = "context"
_DTYPES = (jnp.bfloat16, jnp.float32)
_NAMES = ("video_context", "audio_context")


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """Contexts of a prompt.

    Attributes:
      video_context: [B, S, Wv] bfloat16 or float32.
      audio_context: [B, S, Wa] of the same dtype.
      mask: [B, S] boolean, True = attend; None attends to all tokens, as after the connectors.
      prompt: the text.
      model_version: version of the model whose connectors made the contexts, e.g. "2.0.0".
    """

    video_context: jax.Array
    audio_context: jax.Array
    mask: jax.Array | None
    prompt: str
    model_version: str


def save_text_features(
    path: str | os.PathLike,
    video_context: jax.typing.ArrayLike,
    audio_context: jax.typing.ArrayLike,
    prompt: str,
    model_version: str,
    mask: jax.typing.ArrayLike | None = None,
) -> None:
    """Writes the contexts of one prompt to a safetensors file, completely or not at all.

    Args:
      path: file to write; an existing one is replaced once the new one is complete.
      video_context: [B, S, Wv] bfloat16 or float32.
      audio_context: [B, S, Wa] of the same dtype.
      prompt: the text, stored with the arrays.
      model_version: version of the model, e.g. "2.0.0".
      mask: [B, S], True = attend; None if all tokens are to be attended to.

    Raises:
      ValueError: arrays of a wrong shape or dtype, or with values that are not finite.
    """
    path = pathlib.Path(path)
    arrays = {
        "video_context": np.asarray(video_context),
        "audio_context": np.asarray(audio_context),
    }
    if mask is not None:
        arrays["mask"] = np.asarray(mask).astype(bool)
    _check(path, arrays)
    metadata = {"kind": _KIND, "prompt": prompt, "model_version": model_version}
    metadata["checksum"] = _checksum(arrays, metadata)
    with new_file(path) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, temporary, metadata)


def load_text_features(path: str | os.PathLike, expected_dims: tuple[int, int]) -> TextFeatures:
    """Reads a file written by `save_text_features`.

    Args:
      path: the file.
      expected_dims: (Wv, Wa), the widths the transformer takes (`TransformerConfig.text_dims`).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file, holds something else, or was made for a model with
        other text widths; says what was found, what was expected and what to do.
      DamagedFile: its checksum is another (a file made elsewhere need not have one).
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text feature file")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            _check_contents(path, names, metadata)
            arrays = {name: file.get_tensor(name) for name in sorted(names & {*_NAMES, "mask"})}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: found something other than a complete safetensors file ({error}); expected "
            "text features as `save_text_features` writes them. Encode the prompt again."
        ) from error
    _check(path, arrays)
    known = metadata.pop("checksum", None)
    if known is not None and known != _checksum(arrays, metadata):
        raise DamagedFile(f"{path} is damaged (another checksum); encode the prompt again")
    found = tuple(arrays[name].shape[-1] for name in _NAMES)
    if found != tuple(expected_dims):
        raise ValueError(
            f"{path}: found contexts of widths {found[0]} (video) and {found[1]} (audio) for model "
            f"version {metadata['model_version']}; the loaded model expects {expected_dims[0]} and "
            f"{expected_dims[1]}. Encode the prompt with the text encoder and connectors of the "
            "model you sample with."
        )
    mask = arrays["mask"].astype(bool) if "mask" in arrays else None
    return TextFeatures(
        arrays["video_context"],
        arrays["audio_context"],
        mask,
        metadata["prompt"],
        metadata["model_version"],
    )


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a file holds, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def prompt_key(prompt: str, seed: int = 0) -> jax.Array:
    """Random key that depends on nothing but the prompt (surrounding space aside) and the seed."""
    digest = hashlib.sha256(prompt.strip().encode()).digest()
    key = jax.random.key(int.from_bytes(digest[:4], "big") >> 1)  # 31 bits: int32 without x64
    return jax.random.fold_in(key, seed)


def random_text_features(
    key: jax.Array,
    batch: int,
    length: int,
    dims: tuple[int, int],
    dtype: jnp.dtype = jnp.float32,
) -> TextFeatures:
    """Stand-in for encoded text, for models with random weights.

    Tokens have unit RMS, as the connectors' output has. With `prompt_key(prompt)` the same prompt
    gives the same features in every run.

    Args:
      key: from `prompt_key`, or any other.
      batch: B, samples of different features.
      length: S, tokens.
      dims: (Wv, Wa).
      dtype: of the contexts.

    Returns:
      Features with an empty prompt and model version.
    """
    contexts = []
    for subkey, dim in zip(jax.random.split(key), dims, strict=True):
        x = jax.random.normal(subkey, (batch, length, dim))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        contexts.append(x.astype(dtype))
    return TextFeatures(*contexts, mask=None, prompt="", model_version="")


def _check_contents(path: pathlib.Path, names: set[str], metadata: dict[str, str]) -> None:
    """Tells text features from other safetensors files before any array is read."""
    kind = metadata.get("kind")
    missing = [name for name in _NAMES if name not in names]
    missing += [f"metadata {key!r}" for key in ("prompt", "model_version") if key not in metadata]
    if kind == _KIND and not missing:
        return
    listed = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
    lacks = f"; missing: {', '.join(missing)}" if missing else ""
    raise ValueError(
        f"{path}: found a safetensors file of kind {kind!r} with the arrays {listed or 'none'}"
        f"{lacks}; expected text features of kind {_KIND!r} with {' and '.join(_NAMES)}. Pass the "
        "output of the prompt encoder, not model weights, or encode the prompt again."
    )


def _check(path: pathlib.Path, arrays: dict[str, np.ndarray | jax.Array]) -> None:
    """Raises ValueError for arrays that are not the contexts (and mask) of prompts."""
    video, audio = (arrays[name] for name in _NAMES)
    problems = [
        f"{name} has shape {list(arrays[name].shape)}; expected [batch, tokens, width], none of "
        "them 0"
        for name in _NAMES
        if arrays[name].ndim != 3 or 0 in arrays[name].shape
    ]
    if not problems:
        tokens, mask = video.shape[:2], arrays.get("mask")
        if audio.shape[:2] != tokens:
            problems.append(
                f"video_context is for {tokens[0]} x {tokens[1]} tokens, audio_context for "
                f"{audio.shape[0]} x {audio.shape[1]}; expected the same"
            )
        if mask is not None and mask.shape != tokens:
            problems.append(f"mask has shape {list(mask.shape)}; expected {list(tokens)}")
    if video.dtype != audio.dtype or video.dtype not in _DTYPES:
        problems.append(
            f"the contexts are {video.dtype} and {audio.dtype}; expected both bfloat16 or both "
            "float32"
        )
    else:
        problems += [
            f"{name} holds values that are not finite (NaN or infinity); expected finite ones"
            for name in _NAMES
            if not np.isfinite(np.asarray(arrays[name], np.float32)).all()
        ]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}. Encode the prompt again.")
