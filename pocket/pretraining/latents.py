"""Clips of the world as a teacher sees them: encoded once, stored in shards, all in memory later.

FOLDER/manifest.json       what the clips are, and by which encoders
FOLDER/00012.npz           video [n, T_v, C], audio [n, T_a, C], float16, normalised
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.audio import mel
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import PipelineConfig
from pocket.pretraining.autoencoders import to_video
from pocket.world.dataset import clip_caption, make_clip, split_seeds
from pocket.world.physics import WorldConfig

_SHARD = 128  # clips in a file
_BATCH = 4  # clips encoded at a time


@dataclasses.dataclass(frozen=True)
class WorldEncoder:
    """Clips of the world to latents."""

    config: PipelineConfig  # of the model
    world: WorldConfig
    clip: ClipGeometry  # sizes of the clips in latents
    video: Any  # parameters of the VAEs
    audio: Any

    def encode(self, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clips of these seeds -> video [n, T_v, C] and audio [n, T_a, C] float32."""
        num_frames = self.config.video_vae.pixel_frames(self.clip.video_frames)
        clips = [make_clip(seed, num_frames, self.world) for seed in seeds]
        frames = np.stack([clip.frames for clip in clips])
        waveform = np.stack([clip.waveform for clip in clips])
        return jax.device_get(self._encode(self.video, self.audio, frames, waveform))

    @functools.cached_property
    def _encode(self):
        c = self.config

        @jax.jit
        def encode(video_params, audio_params, frames, waveform):
            video = video_vae.encode(c.video_vae, video_params, to_video(frames))
            log_mel = mel.waveform_to_log_mel(waveform, self.world.sample_rate, c.audio_vae.mel)
            audio = audio_vae.encode_audio(audio_params, c.audio_vae, log_mel)
            # a clip lasts a little longer than its sound's last whole latent
            audio = audio[:, : self.clip.audio_frames]
            return video.reshape(video.shape[0], -1, video.shape[-1]), audio

        return encode


def write_latents(
    folder: str | os.PathLike,
    encoder: WorldEncoder,
    num_clips: int,
    fingerprint: str,
    say: Callable[[str], None] = print,
    split: str = "train",
) -> None:
    """Encodes the first clips of a split; shards that are there already stay.

    Args:
      fingerprint: tells the encoders' weights from others.
      say: is told of every shard.
      split: of `world.dataset.SPLITS`; one to a folder.

    Raises:
      ValueError: the folder holds other clips.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "world": dataclasses.asdict(encoder.world),
        "clip": dataclasses.asdict(encoder.clip),
        "encoders": fingerprint,
    }
    file = folder / "manifest.json"
    if file.is_file() and json.loads(file.read_text()) != manifest:
        raise ValueError(f"{folder} holds latents of other clips or encoders; delete it")
    file.write_text(json.dumps(manifest))
    seeds = list(split_seeds(split, num_clips))
    for shard, start in enumerate(range(0, num_clips, _SHARD)):
        path = folder / f"{shard:05d}.npz"
        chosen = seeds[start : start + _SHARD]
        if path.is_file() and _length(path) == len(chosen):
            continue
        batches = [chosen[i : i + _BATCH] for i in range(0, len(chosen), _BATCH)]
        streams = zip(*map(encoder.encode, batches), strict=True)
        video, audio = (np.concatenate(parts).astype(np.float16) for parts in streams)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, video=video, audio=audio)
        partial.rename(path)
        say(f"{start + len(chosen):,} of {num_clips:,} clips encoded")


def _length(path: pathlib.Path) -> int:
    with np.load(path) as shard:
        return len(shard["audio"])


def load_latents(
    folder: str | os.PathLike,
    num_clips: int,
    tokenizer: Any,
    world: WorldConfig,
    length: int,
    split: str = "train",
) -> dict[str, np.ndarray]:
    """What `write_latents` wrote, with tokens of the captions, which come from the clips' seeds.

    Returns:
      {"video", "audio": [N, T, C] float16, "ids", "mask": [N, length] tokens and which are valid}.
    """
    count = -(-num_clips // _SHARD)
    shards = [np.load(pathlib.Path(folder) / f"{shard:05d}.npz") for shard in range(count)]
    captions = [clip_caption(seed, world) for seed in split_seeds(split, num_clips)]
    ids, mask = tokenizer.encode_batch(captions, length)
    streams = {
        name: np.concatenate([shard[name] for shard in shards])[:num_clips]
        for name in ("video", "audio")
    }
    return streams | {"ids": ids, "mask": mask}


def draw_row(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One clip of `load_latents`, for `DrawnBatches`."""
    index = int(rng.integers(len(arrays["ids"])))
    return {name: array[index] for name, array in arrays.items()}
