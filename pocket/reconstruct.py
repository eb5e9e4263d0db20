"""What the pocket model's autoencoders lose: clips of the world, encoded, decoded, and measured.

    python -m pocket.reconstruct --folder outputs/pocket --clips 8 \\
        --output outputs/pocket/reconstruction

Takes clips of the validation split through the parts that pocket.pretrain has finished, and decodes
the video in all ways there are: whole, in overlapping windows as a stream is by default, causally
with a decoder that never learnt it, and causally with the fine-tuned one, if there is one. The
sound is the same for all of them; without a vocoder it is the world's own. Prints a table, and
writes it as JSON beside MP4s and contact sheets of the first clips.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from checkpoint_converters import reading
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.models.audio import mel, vocoder
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.streaming.contact_sheet import write_clip
from omniforcing_jax.streaming.video import StreamingVideoDecoder, to_uint8
from pocket.measure import make_table, measure_clip
from pocket.measures.scalars import pool
from pocket.pretrain_config import PARTS
from pocket.pretraining.autoencoders import to_video
from pocket.world.dataset import RenderedClip, make_clip, split_seeds
from pocket.world.physics import WorldConfig

LATENTS_PER_PUSH = 3  # a block
SHOWN = 3  # clips of which files are written


@dataclasses.dataclass(frozen=True)
class Coders:
    """Encoders and decoders of a folder."""

    config: PipelineConfig
    video: Any  # parameters of the VAE
    decoders: dict[str, Any]  # {name: latents [1, f, h, w, C] -> frames [F, H, W, 3] uint8}
    sound: dict[str, Any] | None  # parameters {"audio_vae", "vocoder"}; None if one is missing

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Coders":
        """Reads what is there; ConversionError without a video VAE."""
        files = {name: folder / f"{name}.safetensors" for name in PARTS}
        metadata = reading.read_metadata(files["video_vae"])
        config = PipelineConfig.from_metadata(metadata["config"], metadata["model_version"])

        def load(part: str, component: str) -> Any:
            return reading.load_component(files[part], component, np.float32)

        video = load("video_vae", "video_vae")
        decoders = {
            "whole": lambda z: np.asarray(to_uint8(_decode(config.video_vae, video, z))[0]),
            "window": _streaming(config, video, "window"),
            "causal, untrained": _streaming(config, video, "causal"),
        }
        if files["causal_decoder"].is_file():
            tuned = load("causal_decoder", "video_vae")
            decoders["causal, trained"] = _streaming(config, tuned, "causal")
        parts = ("audio_vae", "vocoder")
        complete = all(files[part].is_file() for part in parts)
        sound = {part: load(part, part) for part in parts} if complete else None
        return cls(config, video, decoders, sound)

    def hear(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """The sound [N, 2] after spectrogram, audio VAE and vocoder."""
        if self.sound is None:
            return waveform
        vae = self.config.audio_vae
        log_mel = mel.waveform_to_log_mel(jnp.asarray(waveform[None]), sample_rate, vae.mel)
        latents = audio_vae.encode_audio(self.sound["audio_vae"], vae, log_mel)
        log_mel = audio_vae.decode_audio(self.sound["audio_vae"], vae, latents)
        decoded = vocoder.vocode(self.sound["vocoder"], self.config.vocoder, log_mel)
        return np.asarray(decoded[0, : len(waveform)])


_encode = jax.jit(video_vae.encode, static_argnums=0)
_decode = jax.jit(video_vae.decode, static_argnums=0)


def _streaming(config: PipelineConfig, params, mode: str):
    decoder = StreamingVideoDecoder(config.video_vae, params, mode=mode)
    step = config.video_vae.spatial_compression

    def decode(latents: jax.Array) -> np.ndarray:
        """The first latent, then blocks of three."""
        state = decoder.init(1, latents.shape[2] * step, latents.shape[3] * step)
        frames, borders = [], [0, *range(1, latents.shape[1], LATENTS_PER_PUSH), latents.shape[1]]
        for start, end in itertools.pairwise(borders):
            state, new = decoder.push(state, latents[:, start:end])
            frames.append(np.asarray(new[0]))
        return np.concatenate([*frames, np.asarray(decoder.flush(state)[1][0])])

    return decode


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """In dB, of uint8 pixels."""
    error = np.mean((frames.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def judge(
    coders: Coders, clips: list[RenderedClip], output: pathlib.Path, console: Console
) -> dict:
    """{way: scalars} of all clips together; writes files of the first ones."""
    world = WorldConfig()
    rates = world.frame_rate, world.sample_rate
    ways = ("world", *coders.decoders)
    parts = {way: [] for way in ways}
    extra: dict[str, list[dict]] = {way: [] for way in ways}
    for number, clip in enumerate(track(clips, "clips", console=console, transient=True)):
        video = to_video(jnp.asarray(clip.frames[None]))
        latents = _encode(coders.config.video_vae, coders.video, video)
        heard = coders.hear(clip.waveform, rates[1])
        for way in ways:
            if way == "world":
                frames, waveform = clip.frames, clip.waveform
            else:
                frames, waveform = coders.decoders[way](latents), heard
            result = measure_clip(frames, rates[0], waveform, rates[1], truth=clip.truth)
            parts[way].append(result.total)
            extra[way].append(result.truth | {"psnr": psnr(frames, clip.frames)})
            if number < SHOWN and way != "causal, untrained":
                path = output / f"{number}_{way.replace(', ', '_')}.mp4"
                write_clip(path, frames, waveform, *rates)
    return {way: pool(parts[way]).scalars() | _means(extra[way]) for way in ways}


def _means(rows: list[dict]) -> dict[str, float]:
    values = {name: [r[name] for r in rows if r[name] is not None] for name in rows[0]}
    return {name: float(np.mean(found)) for name, found in values.items() if found}


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("pocket.reconstruct", __doc__)
    add = parser.add_argument
    add("--folder", type=pathlib.Path, default=pathlib.Path("outputs/pocket"))
    add("--clips", type=int, default=8, help="of the validation split (default 8)")
    add("--frames", type=int, default=121, help="of a clip, 8k + 1 (default 121)")
    add("--output", type=pathlib.Path, required=True, help="folder for clips and table")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    files = [args.folder / f"{name}.safetensors" for name in PARTS]
    coders = Coders.load(args.folder)
    coders.config.video_vae.latent_frames(args.frames)
    seeds = split_seeds("validation", args.clips)
    outputs.claim_folder(args.output, "pocket.reconstruct", files)
    clips = [make_clip(seed, args.frames) for seed in seeds]
    table = judge(coders, clips, args.output, console)
    Console(width=140).print(make_table(table))
    (args.output / "reconstruction.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
