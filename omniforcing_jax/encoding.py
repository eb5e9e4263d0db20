"""Pictures, clips and sound to latents, by the encoders of a converted checkpoint.

    encoder = load_encoders("checkpoints/ltx2", dtype=jnp.float32)
    picture = compress_image(read_image("cat.png"), encoder.config.image_crf)
    latents = encoder.encode_image(fit_pixels(picture, 512, 768))
    latents = encoder.encode_sound(read_sound("speech.wav"), num_latents=126)

Files are read first (`io.media_files`), so that what is wrong with them is said before any weight
is read.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.media_files import Sound
from omniforcing_jax.pipeline import Pipeline, PipelineConfig
from omniforcing_jax.streaming.encoders import StreamingAudioEncoder, StreamingVideoEncoder

_COMPONENTS = {"video": "video_vae", "audio": "audio_vae"}


@dataclasses.dataclass(frozen=True)
class MediaEncoder:
    """The encoders of a checkpoint's VAEs.

    Attributes:
      config: what the checkpoint says.
      params: {"video_vae", "audio_vae": {encoder, per_channel_statistics}}; those that were loaded.
      dtype: in which they compute; latents are float32.
    """

    config: PipelineConfig
    params: dict[str, Any]
    dtype: jnp.dtype

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline) -> "MediaEncoder":
        """Those of a pipeline that was loaded with them."""
        return cls(pipeline.config, pipeline.params, pipeline.dtype)

    def video(self, step: int = 3) -> StreamingVideoEncoder:
        """The video encoder, for clips that arrive in pieces."""
        params = self._loaded("video")
        return StreamingVideoEncoder(self.config.video_vae, params, step=step, dtype=self.dtype)

    def audio(self, step: int = 25) -> StreamingAudioEncoder:
        """The audio encoder, for sound that arrives in pieces."""
        params = self._loaded("audio")
        return StreamingAudioEncoder(self.config.audio_vae, params, step=step, dtype=self.dtype)

    def encode_image(self, pixels: np.ndarray) -> jax.Array:
        """The latent of a picture, as a clip's first frame.

        Args:
          pixels: [H, W, 3] float32 in [-1, 1] of the clip's size (`fit_pixels`).

        Returns:
          [1, P, C] normalised tokens of one video latent.

        Raises:
          ValueError: a size that is no multiple of the VAE's compression.
        """
        return self.encode_frames(pixels[None, None])

    def encode_frames(self, frames: np.ndarray) -> jax.Array:
        """The video latents of clips.

        Args:
          frames: [B, F, H, W, 3] float32 in [-1, 1]; of F = 8 k + 1 + r frames the last r are not
            encoded.

        Returns:
          [B, (k + 1) P, C] normalised tokens in the order f, h, w.

        Raises:
          ValueError: a size that is no multiple of the VAE's compression.
        """
        encoder = self.video()
        state = encoder.init(frames.shape[0], *frames.shape[2:4])
        state, latents = encoder.push(state, frames)
        latents = jnp.concatenate([latents, encoder.flush(state)[1]], axis=1)  # [B, f, h, w, C]
        return latents.reshape(latents.shape[0], -1, latents.shape[-1])

    def encode_sound(self, sound: Sound, num_latents: int | None = None) -> jax.Array:
        """The audio latents of a sound.

        Args:
          sound: as `read_sound` reads it.
          num_latents: how many (`ClipGeometry.audio_frames`): the rest of a longer sound is not
            encoded, and a shorter one is followed by silence. None is all of it.

        Returns:
          [1, T_a, C] normalised latents, 25 per second and one for the very beginning.

        Raises:
          ValueError: the sound is too short for a spectrum, and `num_latents` is None.
        """
        return self.audio().encode(sound.waveform[None], sound.sample_rate, num_latents)

    def _loaded(self, stream: str) -> Any:
        name = _COMPONENTS[stream]
        if name not in self.params:
            raise ValueError(f"the {stream} encoder was not loaded: load_encoders(streams=…)")
        return self.params[name]


def load_encoders(
    directory: str | os.PathLike,
    *,
    dtype: jnp.dtype,
    streams: Sequence[str] = ("video", "audio"),
    verify: bool = True,
) -> MediaEncoder:
    """Restores the encoders of a converted checkpoint onto the first device, and nothing else.

    Args:
      directory: folder written by `checkpoint_converters`.
      dtype: of the parameters and of the computation.
      streams: which of "video" and "audio".
      verify: see `load_pipeline`.

    Returns:
      The encoders.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: another format, or a VAE was not converted.
    """
    config = PipelineConfig.from_checkpoint(directory)
    names = [_COMPONENTS[stream] for stream in streams]
    if lost := [name for name in names if name in config.missing]:
        raise ValueError(f"{directory} has no {' and no '.join(lost)}: convert it with them")
    params = {
        name: checkpoints.load_params(
            directory, name, dtype=dtype, without="decoder", verify=verify
        )
        for name in names
    }
    return MediaEncoder(config, params, dtype)
