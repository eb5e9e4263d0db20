"""Audio latents to waveform, chunk by chunk, equal to decoding the whole clip at once.

The audio VAE is causal: its decoder needs the last two rows of each convolution's previous input.
The vocoder looks ahead: it runs on [left context | new frames | right context], and the samples
that do not depend on later frames are final and are returned. Every layer of it pads at its input's
ends, so the stream's first and last frame must lie at these ends. As long as there are fewer frames
than the window holds, filler frames complete it, at the end from which no final sample depends on
them, so that the vocoder always runs at the same length.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from omniforcing_jax.models.audio.vae import (
    AudioVAEConfig,
    check_latents,
    decode_audio_chunk,
    init_decoder_history,
)
from omniforcing_jax.models.audio.vocoder import STEREO, VocoderConfig, vocode


@struct.dataclass
class StreamingAudioState:
    """State of a stream between two chunks: arrays of fixed shape and three numbers; a pytree.

    Attributes:
      history: last input rows of every VAE convolution.
      mel_tail: [B, left + right context, M, 2] float32, the latest mel frames, newest last, and
        filler before the first.
      num_latents: latents decoded so far (host integer).
      filler_frames: mel frames `flush` adds to reach the length that `push` ran at (host integer).
      flushed: whether the stream has ended (host boolean).
    """

    history: dict
    mel_tail: jax.Array
    num_latents: int
    filler_frames: int
    flushed: bool


class StreamingAudioDecoder:
    """Decodes a stream of audio latents into a waveform.

    A push decodes the new latents with the VAE and runs the vocoder over
    `left_context + right_context` mel frames more than it returns. Pushes of one size share one
    compiled vocoder, from the first to the flush, and two compiled VAE decoders (first push and
    others). Samples are counted on the host, so nothing waits for the device.
    """

    def __init__(
        self,
        vae_config: AudioVAEConfig,
        vocoder_config: VocoderConfig,
        params: Mapping[str, Any],
        *,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Puts the parameters on the default device.

        Args:
          vae_config: audio VAE.
          vocoder_config: vocoder.
          params: {"audio_vae": {decoder, per_channel_statistics}, "vocoder": tree}.
          dtype: compute dtype of the VAE and of a HiFi-GAN's convolutions, for which bfloat16 is
            inaudible; BigVGANs compute in float32 (benchmarks/RESULTS.md).

        Raises:
          ValueError: a component is missing, or the vocoder expects another number of mel bins.
        """
        missing = [name for name in ("audio_vae", "vocoder") if name not in params]
        if missing:
            raise ValueError(f"params lack {' and '.join(missing)}; they hold {sorted(params)}")
        if vae_config.mel.mel_bins != vocoder_config.mel_bins:
            raise ValueError(
                f"the audio VAE makes {vae_config.mel.mel_bins} mel bins, the vocoder takes "
                f"{vocoder_config.mel_bins}"
            )
        self.vae_config = vae_config
        self.vocoder_config = vocoder_config
        self.dtype = dtype
        vae = params["audio_vae"]
        used = {
            "audio_vae": {name: vae[name] for name in ("decoder", "per_channel_statistics")},
            "vocoder": params["vocoder"],
        }
        self._vocoder_dtype = jnp.float32 if vocoder_config.has_snakes else dtype
        used["vocoder"] = jax.tree.map_with_path(self._vocoder_weight, used["vocoder"])
        self.params = jax.tree.map(jnp.asarray, used)
        self._right = vocoder_config.right_context
        self._window = vocoder_config.left_context + self._right

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveform, Hz."""
        return self.vocoder_config.sample_rate

    def samples_after(self, num_latents: int, flushed: bool) -> int:
        """Samples emitted in total after `num_latents` latents (exact).

        (4 T - 3) * hop once flushed; before that the vocoder's right context is held back
        (0.18 s of LTX-2.0, 0.52 s of LTX-2.3 as published).

        Raises:
          ValueError: `num_latents` is negative.
        """
        if num_latents < 0:
            raise ValueError(f"num_latents must be 0 or more, not {num_latents}")
        frames = self.vae_config.num_mel_frames(num_latents)
        if not flushed:
            frames = max(0, frames - self._right)
        return frames * self.vocoder_config.hop

    def init(self, batch: int) -> StreamingAudioState:
        """State of `batch` streams that have not begun.

        Raises:
          ValueError: `batch` is less than 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, not {batch}")
        history = init_decoder_history(
            self.params["audio_vae"], self.vae_config, batch, dtype=self.dtype
        )
        mel_tail = jnp.zeros((batch, self._window, self.vocoder_config.mel_bins, STEREO))
        return StreamingAudioState(history, mel_tail, num_latents=0, filler_frames=0, flushed=False)

    def push(
        self, state: StreamingAudioState, latents: jax.Array
    ) -> tuple[StreamingAudioState, jax.Array]:
        """Decodes the next latents.

        Args:
          state: from `init` or the previous call; not modified.
          latents: [B, t, C] normalised, t >= 1 of any size.

        Returns:
          The new state and [B, n, 2] float32, the samples that became final;
          n = samples_after(T + t, False) - samples_after(T, False) may be 0 at the beginning.

        Raises:
          ValueError: the stream has ended, or latents of another batch, width or of length 0.
        """
        if state.flushed:
            raise ValueError("the stream was flushed; begin a new one with init(batch)")
        check_latents(latents, self.vae_config)
        batch = state.mel_tail.shape[0]
        if latents.shape[0] != batch:
            raise ValueError(f"the stream has batch {batch}, latents have {latents.shape[0]}")
        before = int(state.num_latents)
        after = before + latents.shape[1]
        history, mel_tail, frames = _decode(
            self.params["audio_vae"],
            state.history,
            state.mel_tail,
            latents,
            self._window - self._num_valid(before),
            config=self.vae_config,
            dtype=self.dtype,
            start=before == 0,
        )
        num_samples = self.samples_after(after, False) - self.samples_after(before, False)
        # `frames` begins with the stream, or with the left context of the next sample
        begin = max(0, self._num_valid(before) - self._right)
        waveform = self._synthesise(frames, begin, num_samples)
        filler_frames = frames.shape[1] - self._window
        return StreamingAudioState(history, mel_tail, after, filler_frames, False), waveform

    def warm_up(self, state: StreamingAudioState, blocks: Iterable[jax.Array]) -> None:
        """Compiles what a stream needs whose chunks have the shapes of `blocks`.

        Args:
          state: from `init`.
          blocks: the latents of the stream's chunks; only as many are read as differ.
        """
        before = None
        for latents in blocks:
            valid = self._num_valid(int(state.num_latents))
            state, waveform = self.push(state, latents)
            if (valid, waveform.shape) == before:
                break
            before = valid, waveform.shape
        jax.block_until_ready(self.flush(state))

    def flush(self, state: StreamingAudioState) -> tuple[StreamingAudioState, jax.Array]:
        """Ends the stream and returns the samples that waited for more: [B, n, 2] float32.

        n = samples_after(T, True) - samples_after(T, False), 0 for a stream without latents.

        Raises:
          ValueError: the stream has ended already.
        """
        if state.flushed:
            raise ValueError("the stream was flushed already")
        num_latents = int(state.num_latents)
        valid = self._num_valid(num_latents)
        if valid == self._window:
            filler = ((0, 0), (int(state.filler_frames), 0), (0, 0), (0, 0))
            frames = jnp.pad(state.mel_tail, filler)
        else:
            frames = state.mel_tail[:, self._window - valid :]
        waiting = min(self._right, valid)
        num_samples = self.samples_after(num_latents, True) - self.samples_after(num_latents, False)
        waveform = self._synthesise(frames, frames.shape[1] - waiting, num_samples)
        return state.replace(flushed=True), waveform

    def _synthesise(self, frames: jax.Array, begin: int, num_samples: int) -> jax.Array:
        """[B, num_samples, 2] from mel frame `begin` of `frames` on."""
        if num_samples == 0:
            return jnp.zeros((frames.shape[0], 0, STEREO), jnp.float32)
        waveform = vocode(self.params["vocoder"], self.vocoder_config, frames, self._vocoder_dtype)
        offset = begin * self.vocoder_config.hop
        return waveform[:, offset : offset + num_samples]

    def _vocoder_weight(self, path: tuple, weight: jax.Array) -> jax.Array:
        """Kernels, nearly all of the weights, in the dtype they are used in, others as they are."""
        layer, name = path[-2].key, path[-1].key
        rounded = name == "kernel" and layer != "conv_post"
        return jnp.asarray(weight, self._vocoder_dtype if rounded else None)

    def _num_valid(self, num_latents: int) -> int:
        """Frames of `mel_tail` that belong to the stream."""
        return min(self.vae_config.num_mel_frames(num_latents), self._window)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "start"))
def _decode(params, history, mel_tail, latents, num_filler, *, config, dtype, start):
    """New VAE history, new mel tail, and the window for the vocoder [B, window + 4 t, M, 2].

    The first `num_filler` (traced) frames of `mel_tail` are filler; they move to the window's end.
    """
    new_frames, history = decode_audio_chunk(
        params, config, latents, history, start=start, dtype=dtype
    )
    # The first latent of a stream makes fewer frames than the others; filler makes up for it
    short = config.downsampling * latents.shape[1] - new_frames.shape[1]
    frames = jnp.pad(mel_tail, ((0, 0), (short, 0), (0, 0), (0, 0)))
    frames = jnp.concatenate([frames, new_frames], axis=1)
    mel_tail = frames[:, -mel_tail.shape[1] :]
    return history, mel_tail, jnp.roll(frames, -(num_filler + short), axis=1)
