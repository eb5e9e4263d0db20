"""Clips of the same prompts and seeds by several samplers, for `launch.evaluate`.

A sampler is a command line of launch.stream, or for a bidirectional checkpoint of
launch.sample_teacher, without prompt, seed and output: it is read and checked by that program, and
the clip is what that program would write. A clip appears under its name when it is complete, with a
record of what it was made by, so that a killed run goes on, and what another command line made is
made anew.

    OUTPUT/clips/NAME/sample_0000.mp4, .wav    as JavisBench, VBench and av-benchmark read them
    OUTPUT/records/NAME/sample_0000.json       what it was made by, and how fast
    OUTPUT/prompts/NAME.json, prompts.csv      VBench's --prompt_file, and av-benchmark's --text_csv
"""

import argparse
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import statistics
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import options, sample_teacher, stream
from launch.sample_teacher import ClipRequest
from launch.shard_job import ShardProgress
from launch.stream import StreamRequest
from omniforcing_jax import (
    AVLatents,
    Chunk,
    ClipWriter,
    Pipeline,
    PipelineConfig,
    decode_clip,
    load_pipeline,
)
from omniforcing_jax import sample as sample_whole
from omniforcing_jax.distributed import multihost
from omniforcing_jax.evaluation.picture import slope
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.sampling.teacher import Prompt
from omniforcing_jax.scaling.memory import peak_bytes
from omniforcing_jax.streaming.background import BackgroundWriter
from omniforcing_jax.streaming.chunks import Timings
from omniforcing_jax.types import Contexts

# What is measured while a clip is made, as `evaluation.clips.MEANINGS`.
TIMINGS: dict[str, tuple[int, str]] = {
    "first_chunk": (-1, "seconds from the encoded prompt to the first frames, all compiled"),
    "chunk_gap": (-1, "seconds between chunks, the median of a clip"),
    "longest_chunk_gap": (-1, "seconds between chunks, the longest of a clip"),
    "fps": (+1, "frames made per second"),
    "peak_memory": (-1, "GB of the device (on CPU: of the process)"),
    "video_latent_drift": (0, "spread of the latents over that of the clip, per minute"),
    "audio_latent_drift": (0, "the same of the sound's"),
}
# What is the same for all samplers, or belongs to one clip only.
_NOT_HERE = (
    *("at", "features", "negative_features", "endless", "image", "audio", "video", "keyframe"),
    *("reference", "keep_encoder", "overwrite"),
)
_LINES = 50  # of progress, where there is no terminal


class Spread(NamedTuple):
    """Standard deviations of latent frames, [F] and [T]."""

    video: np.ndarray
    audio: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler that was checked, and its clips' place.

    Attributes:
      name: of its folder and column.
      words: of its command line.
      args: as its program reads them.
      config: of its checkpoint.
      request: as its program checks them, for the first prompt.
      folder: of all samplers' clips and records.
    """

    name: str
    words: tuple[str, ...]
    args: argparse.Namespace
    config: PipelineConfig
    request: StreamRequest | ClipRequest
    folder: pathlib.Path

    @property
    def layout(self) -> str | None:
        """Of the blocks in which its clips are streamed; None if they are made as a whole."""
        if isinstance(self.request, ClipRequest):
            return None
        return self.args.layout or self.config.trained.layout or "prefix"

    def clip_settings(self) -> tuple[dict[str, Any], int]:
        """Of the clips' writer, and into how many every pixel is made, squared."""
        args, enlarge = self.args, getattr(self.args, "enlarge", 1)
        size = {"width": args.width * enlarge, "height": args.height * enlarge}
        rates = {"frame_rate": args.fps, "sample_rate": self.config.vocoder.sample_rate}
        return size | rates, enlarge

    @property
    def clips(self) -> pathlib.Path:
        """Folder of the clips."""
        return self.folder / "clips" / self.name

    def record(self, clip: str) -> pathlib.Path:
        """What is known of a clip."""
        return self.folder / "records" / self.name / f"{clip}.json"

    def about(self, prompt: str, seed: int) -> dict[str, Any]:
        """All that a clip depends on."""
        checkpoint = pathlib.Path(self.args.checkpoint) / "config.json"  # has the weights' checksum
        return {
            "words": list(self.words),
            "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "prompt": prompt,
            "seed": seed,
        }

    def timings(self, clip: str, about: dict[str, Any]) -> dict[str, float | None] | None:
        """Those of a clip that is there and was made so; None if it is to be made."""
        try:
            record = json.loads(self.record(clip).read_text())
            made = record["about"] == about and (self.clips / f"{clip}.mp4").exists()
            return record["timings"] if made else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def make_sampler(
    name: str, words: Sequence[str], prompts: Sequence[str], folder: pathlib.Path
) -> Sampler:
    """Reads and checks a sampler's command line; no weights are read.

    Raises:
      ValueError, OSError: what is wrong, and what would be right.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--checkpoint")
    finder.add_argument("--bidirectional", action="store_true")
    found, _ = finder.parse_known_args(list(words))
    if not found.checkpoint:
        raise ValueError(f"{name}: the sampler has no --checkpoint FOLDER")
    config = PipelineConfig.from_checkpoint(found.checkpoint)
    program = stream if config.trained.causal or found.bidirectional else sample_teacher
    clip = [f"--prompt={prompts[0]}", "--output=clip.mp4"]
    args = program.parse_arguments([*words, *clip])
    wrong = [option for option in _NOT_HERE if getattr(args, option, None)]
    if args.seed != 0:
        wrong.append("seed")
    if args.output != "clip.mp4" or args.prompt not in (prompts[0], [prompts[0]]):
        wrong.append("prompt or output")
    if wrong:
        raise ValueError(f"{name}: no --{wrong[0].replace('_', '-')} here: all samplers have the "
                         "same prompts and seeds, and nothing else is given")  # fmt: skip
    config, request = program.check_request(args)
    if request.encoder is not None:
        request.encoder.check(list(prompts))
    return Sampler(name, tuple(words), args, config, request, folder)


def sample_missing(
    samplers: Sequence[Sampler], prompts: Mapping[str, str], seed: int, progress: ShardProgress
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Makes all clips that are not there, this process its share of them.

    Args:
      samplers: of the clips.
      prompts: by the names of the clips; the n-th has the seed `seed + n` from every sampler.
      seed: of the first one.
      progress: told of the number of clips.

    Returns:
      {sampler: {name of a clip: timings}} of all clips.
    """
    rank, processes = jax.process_index(), jax.process_count()
    if rank == 0:
        for sampler in samplers:
            _write_prompts(sampler, prompts)
    multihost.barrier("prompts")
    abouts = {
        s.name: {clip: s.about(text, seed + n) for n, (clip, text) in enumerate(prompts.items())}
        for s in samplers
    }
    missing = {
        s.name: [clip for clip, about in abouts[s.name].items() if s.timings(clip, about) is None]
        for s in samplers
    }
    multihost.barrier("share")  # nobody writes before all have seen the same clips missing
    share = {name: found[rank::processes] for name, found in missing.items()}
    total = sum(map(len, share.values()))
    every, done = max(total // _LINES, 1), 0
    with progress.running(total):
        for sampler in samplers:
            mine = {clip: abouts[sampler.name][clip] for clip in share[sampler.name]}
            for _ in _make_clips(sampler, mine) if mine else ():
                progress.records_done(1)
                done += 1
                if done % every == 0:
                    progress.shard_done()
    multihost.barrier("clips")
    return {
        s.name: {clip: s.timings(clip, about) or {} for clip, about in abouts[s.name].items()}
        for s in samplers
    }


def _write_prompts(sampler: Sampler, prompts: Mapping[str, str]) -> None:
    """Folders of a sampler, and its prompts as public tools take them."""
    for folder in (sampler.clips, sampler.record("").parent, sampler.folder / "prompts"):
        folder.mkdir(parents=True, exist_ok=True)
    paths = {os.path.abspath(sampler.clips / f"{clip}.mp4"): text for clip, text in prompts.items()}
    with new_file(sampler.folder / "prompts" / f"{sampler.name}.json") as temporary:
        temporary.write_text(json.dumps(paths, indent=1, ensure_ascii=False) + "\n")
    with (
        new_file(sampler.folder / "prompts" / "prompts.csv") as temporary,
        temporary.open("w", newline="") as file,
    ):
        csv.writer(file).writerows([["name", "caption"], *prompts.items()])


def _make_clips(sampler: Sampler, abouts: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Makes clips, the first one twice: at its first time it compiles."""
    device = jax.local_devices()[0]
    before, _ = peak_bytes(device)
    make = _load(sampler, [about["prompt"] for about in abouts.values()])
    for _ in make(next(iter(abouts.values()))):
        pass
    settings, enlarge = sampler.clip_settings()
    for name, about in abouts.items():
        clip, partial = sampler.clips / f"{name}.mp4", sampler.clips / f".{name}.mp4"
        partial.unlink(missing_ok=True)
        chunks, came, frames, sound, spreads = make(about), [], 0, [], []
        with (
            ClipWriter(partial, program="launch.evaluate", **settings) as writer,
            BackgroundWriter(writer, enlarge) as background,
        ):
            start = time.perf_counter()
            for chunk, spread in chunks:
                spreads.append(spread)
                if chunk.frames.shape[1]:
                    came.append(time.perf_counter())
                frames += chunk.frames.shape[1]
                sound.append(chunk.waveform[0])
                background.put(chunk)
        write_wav(clip.with_suffix(".wav"), np.concatenate(sound), settings["sample_rate"])
        partial.replace(clip)
        peak, _ = peak_bytes(device)
        timings = _timings(start, came, frames, peak if peak > before else None)
        timings |= latent_drifts(spreads, frames / settings["frame_rate"])
        with new_file(sampler.record(name)) as temporary:
            temporary.write_text(json.dumps({"about": about, "timings": timings}) + "\n")
        yield


def _timings(
    start: float, came: list[float], frames: int, peak: int | None
) -> dict[str, float | None]:
    gaps = [b - a for a, b in itertools.pairwise(came)]
    return {
        "first_chunk": came[0] - start,
        "chunk_gap": statistics.median(gaps) if gaps else None,
        "longest_chunk_gap": max(gaps, default=None),
        "fps": frames / (came[-1] - start),
        "peak_memory": peak and peak / 1e9,
    }


def spread_of(latents: AVLatents | None, patches: int) -> Spread:
    """Standard deviation of each latent frame: of the picture's tokens [1, F P, C], and of the
    sound's [1, T, C]; nothing where there are no latents."""
    if latents is None:
        return Spread(np.zeros(0), np.zeros(0))
    video, audio = (np.asarray(x[0], np.float64) for x in (latents.video, latents.audio))
    return Spread(video.reshape(-1, patches * video.shape[-1]).std(1), audio.std(1))


def latent_drifts(spreads: Sequence[Spread], seconds: float) -> dict[str, float | None]:
    """Straight line through the spread of a clip's latents, per minute, over its mean.

    A student that drifts moves its latents away from what it was trained on, before it shows.

    Args:
      spreads: of the clip's blocks.
      seconds: that they last.
    """
    drifts = {}
    for name, parts in zip(Spread._fields, zip(*spreads, strict=True), strict=True):
        values = np.concatenate(parts)
        known = len(values) > 2 and values.mean() > 0
        drift = slope(values, len(values) / seconds) / float(values.mean()) if known else None
        drifts[f"{name}_latent_drift"] = drift
    return drifts


def write_wav(path: pathlib.Path, waveform: np.ndarray, sample_rate: int) -> None:
    """[N, 2] float32 in [-1, 1] as 16-bit samples."""
    with new_file(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((2, 2, sample_rate, 0, "NONE", ""))
        file.writeframes((waveform.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


# chunks, each with the spread of the latents that it came with
MakeClip = Callable[[dict[str, Any]], Iterator[tuple[Chunk, Spread]]]


def _load(sampler: Sampler, prompts: list[str]) -> MakeClip:
    """Encodes the prompts, then loads the weights.

    Returns:
      What makes the chunks of a clip; it has compiled what they need when it returns.
    """
    args, request = sampler.args, sampler.request
    whole = isinstance(request, ClipRequest)
    negative = request.negative if whole else None
    if request.encoder is not None:
        texts = list(dict.fromkeys([*prompts, *([] if negative is None else [negative])]))
        contexts = dict(zip(texts, request.encoder.encode(texts), strict=True))
        negative = None if negative is None else Prompt(*contexts[negative])
        request.encoder.close()
    else:
        dims = sampler.config.transformer.text_dims
        found = {text: options.random_features(text, dims) for text in prompts}
        contexts = {text: (f.video_context, f.audio_context) for text, f in found.items()}
    if whole:
        how = {"dtype": options.compute_dtype(args), "verify": args.verify}
        pipeline = load_pipeline(args.checkpoint, per_layer=False, **how)
        return lambda about: whole_clip(
            pipeline, args, request, contexts[about["prompt"]], negative, about["seed"]
        )
    pipeline, compiled = stream.load(args, request), set()

    def make(about: dict[str, Any]) -> Iterator[tuple[Chunk, Spread]]:
        text = contexts[about["prompt"]]
        session = pipeline.session(
            request.rollout,
            text,
            seed=about["seed"],
            max_blocks=request.length.blocks,
            **stream.session_options(args),
        )
        if text[0].shape not in compiled:
            session.warm_up()
            compiled.add(text[0].shape)
        length, patches = request.length, request.rollout.patches
        for chunk in session.stream(length.blocks):
            latents = session.latents if chunk.block >= 0 else None  # what was held back
            yield chunk.until(length.frames, length.samples), spread_of(latents, patches)

    return make


def whole_clip(
    pipeline: Pipeline,
    args: argparse.Namespace,
    request: ClipRequest,
    contexts: Contexts,
    negative: Prompt | None,
    seed: int,
) -> Iterator[tuple[Chunk, Spread]]:
    """A clip as launch.sample_teacher makes it, as one chunk."""
    key, clip, prompt = jax.random.key(seed), request.sample.clip, Prompt(*contexts)
    weights = pipeline.params["transformer"]
    model = pipeline.transformer(args.attention)
    latents = sample_whole(model, weights, prompt, negative, key, request.sample)
    if request.second is not None:
        clip = request.second.clip
        latents = request.second(
            prompt,
            key,
            latents,
            weights if request.second.folder is None else None,
            pipeline.params["video_vae"],
            condition=None,
            dtype=pipeline.dtype,
            implementation=args.attention,
            verify=args.verify,
        )
    size = (clip.video_frames, clip.height, clip.width)
    frames, waveform = decode_clip(pipeline.config, pipeline.params, latents, size, pipeline.dtype)
    nothing = Timings(0.0, 0.0, 0.0, 0.0, 0.0)  # is told apart
    chunk = Chunk(0, 0, 0, frames[None], waveform[None], nothing)
    yield chunk, spread_of(latents, size[1] * size[2])
