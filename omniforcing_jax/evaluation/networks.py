"""CLIP and CLAP scores of clips, by transformers, from folders that are there already.

Both are cosines between the prompt and what is seen or heard; nothing is downloaded. They need
`pip install -e '.[eval]'`, and are imported only when they are asked for.
"""

import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np
from scipy.signal import resample_poly

from omniforcing_jax.io import media_files

CLIP_FRAMES = 16  # of a clip, as many as JavisBench takes
CLAP_SECONDS = 10.0  # that it hears at a time
HOW_TO_GET = {
    "CLIP": (
        "openai/clip-vit-large-patch14 (MIT), for example by `hf download "
        "openai/clip-vit-large-patch14 --local-dir FOLDER`"
    ),
    "CLAP": (
        "laion/clap-htsat-unfused (Apache-2.0), for example by `hf download "
        "laion/clap-htsat-unfused --local-dir FOLDER`"
    ),
}

Score = Callable[[pathlib.Path, str], float | None]


def check_model(folder: str | os.PathLike, kind: str) -> None:
    """Checks a folder before its weights are read.

    Args:
      folder: of a model as `save_pretrained` writes it, with its processor.
      kind: a key of `HOW_TO_GET`.

    Raises:
      ImportError: transformers or torch is not installed.
      ValueError: the folder is none of such a model.
    """
    try:
        found = json.loads((pathlib.Path(folder) / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}: no {kind} model (a folder with config.json) is there; get "
            f"{HOW_TO_GET[kind]}"
        ) from None
    if found != kind.lower():
        raise ValueError(f"{folder}: a {found} model, not {kind}; get {HOW_TO_GET[kind]}")
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"{kind} scores need {missing[0]}: pip install -e '.[eval]'")


def _load(folder: str | os.PathLike, kind: str, model_class: str):
    """Model and processor of a folder; raises as `check_model`."""
    check_model(folder, kind)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False).to(device), processor


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of the cosines of the rows of [n, D] with [1, D]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / norms))


def clip_score(folder: str | os.PathLike) -> Score:
    """Cosine of the prompt and a frame, mean of 16 frames that are spread over the clip.

    A prompt beyond the model's 77 tokens is cut there, as usual.

    Args:
      folder: of a CLIP model as `save_pretrained` writes it, with its processor.

    Raises:
      ImportError, ValueError: see `check_model`.
    """
    model, processor = _load(folder, "CLIP", "CLIPModel")
    length = model.config.text_config.max_position_embeddings

    def score(path: pathlib.Path, prompt: str) -> float | None:
        rate = media_files.describe_clip(path).frame_rate
        frames = np.stack(list(media_files.read_frames(path, rate)))
        chosen = np.linspace(0, len(frames) - 1, min(CLIP_FRAMES, len(frames))).round().astype(int)
        text = {"padding": True, "truncation": True, "max_length": length}
        inputs = processor(
            text=[prompt], images=list(frames[chosen]), return_tensors="pt", **text
        ).to(model.device)
        found = model(**inputs)
        return _cosine(found.image_embeds.cpu().numpy(), found.text_embeds.cpu().numpy())

    return score


def clap_score(folder: str | os.PathLike) -> Score:
    """Cosine of the prompt and the sound, mean over stretches of 10 s; None without sound.

    Args:
      folder: of a CLAP model as `save_pretrained` writes it, with its processor.

    Raises:
      ImportError, ValueError: see `check_model`.
    """
    model, processor = _load(folder, "CLAP", "ClapModel")
    rate = processor.feature_extractor.sampling_rate

    def score(path: pathlib.Path, prompt: str) -> float | None:
        if not media_files.describe_clip(path).has_sound:
            return None
        sound = media_files.read_sound(path)
        common = math.gcd(rate, sound.sample_rate)
        mono = resample_poly(
            sound.waveform.mean(1), rate // common, sound.sample_rate // common
        ).astype(np.float32)
        pieces = np.array_split(mono, math.ceil(len(mono) / (CLAP_SECONDS * rate)))
        inputs = processor(
            text=[prompt], audio=pieces, sampling_rate=rate, return_tensors="pt", padding=True
        ).to(model.device)
        found = model(**inputs)
        return _cosine(found.audio_embeds.cpu().numpy(), found.text_embeds.cpu().numpy())

    return score
