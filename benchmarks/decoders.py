"""How far the decoders of a stream are from those of a whole clip in float32, and at what work.

    python -m pocket.make_world --split validation --clips 3 --output outputs/world
    python -m benchmarks.decoders pocket/weights/shared.safetensors --clips outputs/world/*.mp4
    python -m benchmarks.decoders tests/golden/ltx2*_tiny.safetensors

takes the latents of clips, or random ones where the encoders are random as well, and prints two
tables for each file of weights in the official layout.

* Pictures: the decode in windows, after every block of three latents, against the decode of the
  whole clip. Work is in latents decoded per block. PSNR is that of all 8-bit pixels; the error at
  seams that of the two frames at every border between chunks, and the jump how much the error
  changes there, which is what flickers, both in grey levels.
* Sound: the vocoder in bfloat16 against float32. The segmental signal-to-noise ratio is the mean
  over frames of 20 ms that are louder than -60 dBFS. The log-spectral distance is the root mean
  square difference of a frame's level, in dB, over 64 mel bands, none below -80 dBFS. Inaudible is
  a mean of at most 1 dB, with at most 2 % of the frames above 2 dB (the criterion of speech coding,
  Paliwal and Atal, 1993), and a ratio of at least 30 dB.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax import programs
from omniforcing_jax.models.audio import mel
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio.vocoder import VocoderConfig, vocode
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.video import StreamingVideoDecoder, seam_error, to_uint8

BLOCK = 3  # latents
# (look_back, look_ahead, blend)
WINDOWS = ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 2, 0), (4, 2, 0), (0, 2, 1), (0, 3, 0))
QUIETEST, FLOOR = -60.0, -80.0  # dBFS
FRAME_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Configs:
    """Of the networks in a file."""

    video_vae: video_vae.VideoVAEConfig
    audio_vae: audio_vae.AudioVAEConfig
    vocoder: VocoderConfig

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "Configs":
        """Of the file's metadata; ValueError where something is missing."""
        if missing := {"vae", "audio_vae", "vocoder"} - metadata.keys():
            raise ValueError(f"the file describes no {', '.join(sorted(missing))}")
        return cls(
            video_vae.VideoVAEConfig.from_metadata(metadata["vae"]),
            audio_vae.AudioVAEConfig.from_metadata(metadata["audio_vae"]),
            VocoderConfig.from_metadata(metadata["vocoder"]),
        )


@dataclasses.dataclass(frozen=True)
class Latents:
    """Of clips: video [B, f, h, w, C] and audio [B, t, C]."""

    video: jax.Array
    audio: jax.Array


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.decoders", __doc__)
    add = parser.add_argument
    add("weights", nargs="+", type=pathlib.Path, help="VAEs and vocoder, official layout")
    add(
        "--clips",
        nargs="+",
        type=pathlib.Path,
        help="MP4s of 8k+1 frames (default: random latents)",
    )
    add("--seconds", type=int, default=5, help="of the random latents (default 5)")
    return parser.parse_args(argv)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv)
    for file in args.weights:
        config = Configs.read(read_metadata(file)["config"])
        load = functools.partial(load_component, file, dtype=np.float32)
        params = {name: load(name) for name in ("video_vae", "audio_vae", "vocoder")}
        if args.clips:
            latents = encode_clips(config, params, args.clips)
        else:
            latents = random_latents(config, args.seconds)
        print(f"\n{file.name}, {len(latents.video)} clips\n\n{PICTURES}", flush=True)
        for window in WINDOWS:
            print(window_row(config, params["video_vae"], latents.video, window), flush=True)
        print(f"\n{SOUND}\n{vocoder_row(config, params, latents.audio)}", flush=True)
    return 0


def encode_clips(config: Configs, params: Any, files: list[pathlib.Path]) -> Latents:
    """Latents of clips of one size and length."""
    encode = jax.jit(video_vae.encode, static_argnums=0)
    video, audio = [], []
    for file in files:
        frames, _, waveform, rate = media.read_clip(file)
        pixels = jnp.asarray(frames, jnp.float32)[None] / 127.5 - 1
        video.append(encode(config.video_vae, params["video_vae"], pixels))
        log_mel = mel.waveform_to_log_mel(jnp.asarray(waveform)[None], rate, config.audio_vae.mel)
        audio.append(audio_vae.encode_audio(params["audio_vae"], config.audio_vae, log_mel))
    return Latents(jnp.concatenate(video), jnp.concatenate(audio))


def random_latents(config: Configs, seconds: int) -> Latents:
    """Two clips of N(0, 1), of 3x3 latents a frame."""
    rng = np.random.default_rng(0)
    sizes = (
        (2, 1 + BLOCK * seconds, 3, 3, config.video_vae.latent_channels),
        (2, 25 * seconds, config.audio_vae.latent_width),
    )
    return Latents(*(jnp.asarray(rng.standard_normal(size, np.float32)) for size in sizes))


PICTURES = """\
| look back, ahead, blend | latents per block | lag | PSNR dB | at seams | jump | most |
| --- | --- | --- | --- | --- | --- | --- |"""
SOUND = """\
| vocoder | segmental SNR dB | log-spectral distance dB: mean, 99th percentile | frames above 2 dB |
| --- | --- | --- | --- |"""


def window_row(
    config: Configs, params: Any, latents: jax.Array, window: tuple[int, int, int]
) -> str:
    """Error of one setting, as a row of the table `PICTURES`."""
    whole = np.asarray(decode_whole(config.video_vae, params, latents))
    back, ahead, blend = window
    decoder = StreamingVideoDecoder(
        config.video_vae, params, look_back=back, look_ahead=ahead, blend=blend
    )
    step = config.video_vae.spatial_compression
    state = decoder.init(len(latents), latents.shape[2] * step, latents.shape[3] * step)
    chunks = []
    ends = [0, *range(1, latents.shape[1] + 1, BLOCK)]
    for begin, end in itertools.pairwise(ends):
        state, frames = decoder.push(state, latents[:, begin:end])
        chunks.append(np.asarray(frames))
    chunks.append(np.asarray(decoder.flush(state)[1]))
    streamed = np.concatenate(chunks, axis=1)
    borders = np.cumsum([chunk.shape[1] for chunk in chunks[:-1]]).tolist()
    borders = sorted({border for border in borders if 0 < border < streamed.shape[1]})
    error = streamed.astype(np.float32) - whole
    psnr = 10 * np.log10(255**2 / max(np.square(error).mean(dtype=np.float64), 1e-9))
    seam = np.mean(
        [seam_error(*pair, borders)["seam"] for pair in zip(whole, streamed, strict=True)]
    )
    before = [border - 1 for border in borders]
    jump = np.abs(error[:, borders] - error[:, before]).mean()
    return (
        f"| {back}, {ahead}, {blend} | {BLOCK + sum(window)} | {ahead + blend} | {psnr:.1f} | "
        f"{seam:.3f} | {jump:.3f} | {np.abs(error).max():.0f} |"
    )


@functools.partial(jax.jit, static_argnums=0)
def decode_whole(config, params, latents):
    """Frames uint8 of whole clips."""
    return to_uint8(video_vae.decode(config, params, latents, causal=False))


def vocoder_row(config: Configs, params: Any, latents: jax.Array) -> str:
    """Error of the vocoder in bfloat16, as a row of the table `SOUND`."""
    log_mel = audio_vae.decode_audio(params["audio_vae"], config.audio_vae, latents)
    exact, rough = (
        np.asarray(vocode(params["vocoder"], config.vocoder, log_mel, dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    rate = config.vocoder.sample_rate
    distance = spectral_distance(exact, rough, rate)
    return (
        f"| bfloat16 | {segmental_snr(exact, rough, rate):.1f} | {distance.mean():.3f}, "
        f"{np.quantile(distance, 0.99):.3f} | {100 * (distance > 2).mean():.1f} % |"
    )


def segmental_snr(exact: np.ndarray, rough: np.ndarray, rate: int) -> float:
    """Mean over the loud frames of 10 log10(power / power of the error), of waveforms [B, N, 2]."""
    size = round(FRAME_SECONDS * rate)
    count = exact.shape[1] // size

    def power(x: np.ndarray) -> np.ndarray:
        frames = x[:, : count * size].reshape(len(x), count, size, -1)
        return np.square(frames, dtype=np.float64).mean(axis=(2, 3))

    signal, noise = power(exact), power(rough.astype(np.float64) - exact)
    ratio = 10 * np.log10(signal / np.maximum(noise, 1e-20))
    return float(ratio[signal > 10 ** (QUIETEST / 10)].mean())


def spectral_distance(exact: np.ndarray, rough: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square over the mel bands of the difference in dB, for each frame."""
    config = mel.MelConfig(sample_rate=rate, hop=round(FRAME_SECONDS * rate), f_max=rate / 2)
    full_scale = mel.log_mel_spectrogram(
        jnp.sin(jnp.arange(4 * config.n_fft) * (2 * np.pi * 1000 / rate))[None, :, None]
        * jnp.ones((1, 1, 2)), config,
    ).max()  # fmt: skip
    floor = full_scale + FLOOR * np.log(10) / 20
    levels = [
        jnp.maximum(mel.log_mel_spectrogram(jnp.asarray(x), config), floor) * 20 / np.log(10)
        for x in (exact, rough)
    ]
    difference = np.square(np.asarray(levels[1] - levels[0], np.float64))
    return np.sqrt(difference.mean(axis=2)).ravel()


if __name__ == "__main__":
    sys.exit(main())
