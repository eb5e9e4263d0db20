"""Encodes video files with captions into stored latents of picture and sound, for training.

    python -m launch.encode_prompts --gemma checkpoints/gemma3 --checkpoint checkpoints/ltx2 \\
        --prompts clips.csv --output features/clips
    python -m launch.encode_clips --clips clips.csv --text features/clips \\
        --checkpoint checkpoints/ltx2 --output data/clips

`clips.csv` (or .jsonl) has the columns `caption` and `video`, the path of a file; or --clips is a
folder that holds a.txt with the caption of a.mp4 beside it. Of each clip, the first --frames frames
are encoded. What is too short, too small, silent or damaged is left out and said; a content that
appears twice is encoded once. Ctrl-C, a kill or a crash loses at most the shards being written: the
same command continues. With --distributed every process takes its share of the shards.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from launch import options, shard_job
from launch.shard_job import ShardProgress
from omniforcing_jax import ClipGeometry, MediaEncoder, load_encoders, programs
from omniforcing_jax.data import shards
from omniforcing_jax.data.clip_files import ClipFile, ClipList, read_clip_list
from omniforcing_jax.data.clips import CLIPS, ClipsManifest, ClipsWriter, EncodedClip
from omniforcing_jax.data.text_dataset import TextDataset, open_text_dataset, own_tokens
from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checkpoints, media_files, outputs
from omniforcing_jax.training.source_model import SourceModel
from omniforcing_jax.types import DTYPES

MAX_LISTED = 5  # clips that are left out and described
_WORKERS_PER_DEVICE = 2  # one decodes a file while the other's clip is encoded


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.encode_clips", __doc__)
    add = parser.add_argument
    add("--clips", required=True, help="list of clips (.csv, .jsonl), or a folder with captions")
    add("--text", required=True, help="folder that launch.encode_prompts made of the same list")
    add("--checkpoint", required=True, help="converted LTX-2, for the encoders of its VAEs")
    add("--output", required=True, help="folder for the latents, new or to be continued")
    add("--caption-column", metavar="NAME", help="of the list (default: caption)")
    add("--video-column", metavar="NAME", default="video", help="of the list (default: video)")
    add("--frames", type=int, default=121, help="of a clip, 8k + 1 (default 121)")
    options.add_size(parser)
    add("--clips-per-shard", type=int, default=64, help="of a file (default 64)")
    add("--plan", action="store_true", help="say what would be encoded, and stop")
    options.add_dtype(parser)
    options.add_distributed(parser)
    return parser.parse_args(argv)


def make_manifest(
    args: argparse.Namespace,
    source: SourceModel,
    clips: ClipList,
    text: TextDataset,
    clip: ClipGeometry,
) -> ClipsManifest:
    """What the dataset will be; no weights are read."""
    content = json.dumps(dataclasses.asdict(text.manifest), sort_keys=True)
    config = source.config.transformer
    encoders = {
        name: checkpoints.weights_fingerprint(args.checkpoint, name, "checkpoint_converters.ltx2")
        for name in ("video_vae", "audio_vae")
    }
    return ClipsManifest(
        encoders=encoders,
        text=hashlib.sha256(content.encode()).hexdigest()[:16],
        model_version=source.config.model_version,
        compute_dtype=options.dtype_name(args),
        frames=args.frames,
        resolution=(args.height, args.width),
        frame_rate=args.fps,
        video_frames=clip.video_frames,
        audio_frames=clip.audio_frames,
        height=clip.height,
        width=clip.width,
        video_channels=config.video_channels,
        audio_channels=config.audio_channels,
        text_length=text.manifest.text_length,
        video_dim=text.manifest.video_dim,
        audio_dim=text.manifest.audio_dim,
        shared_features=text.manifest.shared_features,
        negative_prompt=text.manifest.negative_prompt,
        clips_sha256=clips.sha256,
        num_read=clips.num_read,
        num_duplicates=clips.num_duplicates,
        num_unusable=len(clips.unusable),
        num_clips=len(clips.clips),
        clips_per_shard=args.clips_per_shard,
    )


def describe(manifest: ClipsManifest, clips: ClipList, progress: ShardProgress) -> None:
    """Prints what was read, and what is left out."""
    m, print_line = manifest, progress.console.print
    size = 2 * sum(int(np.prod(shape)) for shape in m.array_shapes.values())
    print_line(
        f"{m.num_clips} clips ({m.num_read} read, {m.num_duplicates} repeated, {m.num_unusable} "
        f"left out), {m.num_shards} shards"
    )
    print_line(
        f"each {m.frames} frames of {m.resolution[1]}x{m.resolution[0]} at {m.frame_rate:g} per "
        f"second with sound, {size / 1e6:.3g} MB and its text"
    )
    for reason in clips.unusable[:MAX_LISTED]:
        print_line(f"  left out: {reason}")
    if len(clips.unusable) > MAX_LISTED:
        print_line(f"  and {len(clips.unusable) - MAX_LISTED} more")


def encode_clip(
    encoder: MediaEncoder, clip: ClipFile, manifest: ClipsManifest
) -> dict[str, np.ndarray] | str:
    """Latents "video" and "audio" [T, C] bfloat16 of one clip, or why there are none."""
    m = manifest
    try:
        frames = media_files.read_video(clip.path, m.frame_rate, *m.resolution, m.frames)
        seconds = m.frames / m.frame_rate
        sound = media_files.read_sound(clip.path, seconds + 1)  # the last latent looks ahead
        if short := media_files.check_sound_length(sound, seconds, clip.path):
            return short
    except (OSError, ValueError) as error:
        return str(error)
    latents = {
        "video": encoder.encode_frames(frames[None]),
        "audio": encoder.encode_sound(sound, m.audio_frames),
    }
    return {
        name: np.asarray(x[0].astype(jnp.bfloat16)).view(ml_dtypes.bfloat16)
        for name, x in latents.items()
    }


def encode_shard(
    encoders: Sequence[MediaEncoder],
    pool: futures.Executor,
    clips: Sequence[ClipFile],
    text: TextDataset,
    manifest: ClipsManifest,
    progress: ShardProgress,
) -> Iterator[EncodedClip]:
    """The clips of a shard that can be decoded, in order."""
    waiting = [
        pool.submit(encode_clip, encoders[number % len(encoders)], clip, manifest)
        for number, clip in enumerate(clips)
    ]
    for clip, future in zip(clips, waiting, strict=True):
        latents = future.result()
        progress.records_done(1)
        if isinstance(latents, str):
            progress.console.print(f"  left out: {latents}")
            continue
        features = own_tokens(text[clip.prompt], text.manifest)
        yield EncodedClip(clip.name, clip.caption, features, latents)


def run(args: argparse.Namespace, progress: ShardProgress) -> None:
    """Checks, encodes and writes."""
    text = open_text_dataset(args.text)
    source = SourceModel.find(args.checkpoint, None, None)
    options.use_trained(args, source.config.trained)
    clip = ClipGeometry.from_pixels(args.frames, args.height, args.width, args.fps)
    source.check_text(text.manifest, args.text)
    source.check_latents(clip)
    clips = read_clip_list(
        args.clips,
        height=args.height,
        width=args.width,
        seconds=args.frames / args.fps,
        caption_column=args.caption_column,
        video_column=args.video_column,
    )
    if text.manifest.prompts_sha256 != clips.prompts.sha256:
        raise ValueError(
            f"the text features in {args.text} are of other captions than those of {args.clips}: "
            f"run launch.encode_prompts with --prompts {args.clips}"
        )
    manifest = make_manifest(args, source, clips, text, clip)
    describe(manifest, clips, progress)
    if args.plan:
        return
    outputs.check_apart(args.output, [args.clips, args.text, args.checkpoint])
    shards.check_folder(CLIPS, args.output, manifest)
    writer = ClipsWriter(args.output, manifest)
    if writer.complete:
        progress.console.print(f"{args.output} is complete already")
        return
    devices = jax.local_devices()
    progress.console.print(f"loading the encoders onto {len(devices)} x {devices[0].device_kind}")
    loaded = load_encoders(args.checkpoint, dtype=DTYPES[manifest.compute_dtype])
    encoders = [
        dataclasses.replace(loaded, params=jax.device_put(loaded.params, device))
        for device in devices
    ]
    write_negative = functools.partial(
        writer.write_negative_arrays, own_tokens(text.negative, text.manifest)
    )
    writer.load_libraries()
    pool = futures.ThreadPoolExecutor(_WORKERS_PER_DEVICE * len(devices))
    try:
        with shard_job.missing_shards(writer, write_negative, progress) as missing:
            for shard, numbers in missing.items():
                files = [clips.clips[number] for number in numbers]
                writer.write_shard(
                    shard, encode_shard(encoders, pool, files, text, manifest, progress)
                )
                progress.shard_done()
    finally:
        pool.shutdown(cancel_futures=True)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return shard_job.main(run, parse_arguments(argv), "encoding", "clips")


if __name__ == "__main__":
    multihost.end(main())
