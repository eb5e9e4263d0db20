"""Speed of stored text features: writing, random reading, and batches for training.

    python -m benchmarks.text_dataset --folder /tmp/text_benchmark --prompts 512 --tokens 100

Writes features of LTX-2's widths (random, as large as those of captions), reads them back in random
order and through `grain_batches`, prints prompts per second and MB per second, and deletes them.
The files come from the page cache when they are read: this is the cost of the format, not of the
disk. How fast the text encoder itself is says `benchmarks.text`.
"""

import itertools
import pathlib
import shutil
import sys
import time

import ml_dtypes
import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.data.text_dataset import (
    TextDatasetWriter,
    TextManifest,
    grain_batches,
    open_text_dataset,
)

DIMS = {"2.0": (3840, 3840), "2.3": (4096, 2048)}  # video, audio
LENGTH = 1024


def write(folder: pathlib.Path, version: str, num_prompts: int, num_tokens: int) -> int:
    """Writes a dataset; returns its bytes."""
    video, audio = DIMS[version]
    shared = version == "2.0"
    manifest = TextManifest(
        encoder="random",
        tokenizer="none",
        model_version=f"{version}.0",
        compute_dtype="bfloat16",
        text_length=LENGTH,
        video_dim=video,
        audio_dim=audio,
        shared_features=shared,
        negative_prompt="",
        prompts_sha256="none",
        prompts_per_shard=256,
        num_read=num_prompts,
        num_blank=0,
        num_duplicates=0,
        num_prompts=num_prompts,
        num_truncated=0,
    )
    rng = np.random.default_rng(0)
    # Random features hardly differ in how they compress: a few will do for all prompts.
    pool = rng.standard_normal((num_tokens + 64, video)).astype(ml_dtypes.bfloat16)

    def features(index: int):
        rows = pool[index % 64 :][:num_tokens]
        return rows, None if shared else rows[:, :audio]

    writer = TextDatasetWriter(folder, manifest)
    writer.begin()
    for shard in writer.missing():
        indices = manifest.shard_range(shard)
        writer.write_shard(shard, (f"prompt {i}" for i in indices), map(features, indices))
    writer.write_negative(features(0))
    writer.finish()
    return sum(path.stat().st_size for path in folder.iterdir())


def report(what: str, num_prompts: int, seconds: float, num_bytes: float) -> None:
    """Prints one line."""
    rate, volume = num_prompts / seconds, num_bytes / 1e6
    print(f"{what:32s} {rate:8.0f} prompts/s  {volume / seconds:8.0f} MB/s")


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("benchmarks.text_dataset", __doc__)
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="created, then deleted")
    parser.add_argument("--version", default="2.0", choices=list(DIMS))
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100, help="per prompt, 1024 at most")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args(argv)
    if args.tokens > LENGTH or not 1 <= args.batch_size <= args.prompts:
        parser.error(f"--tokens must be {LENGTH} at most, --batch-size 1 to --prompts")
    args.folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        folder = args.folder / "features"
        num_bytes = write(folder, args.version, args.prompts, args.tokens)
        seconds = time.perf_counter() - start
        print(f"{num_bytes / 1e6 / args.prompts:.2f} MB per prompt of {args.tokens} tokens")
        report("write", args.prompts, seconds, num_bytes)

        dataset = open_text_dataset(folder)
        order = np.random.default_rng(1).permutation(args.prompts).tolist()
        start = time.perf_counter()
        for index in order:
            dataset[index]
        report("read one by one, padded", args.prompts, time.perf_counter() - start, num_bytes)

        batches = grain_batches(dataset, args.batch_size)
        count = args.prompts // args.batch_size
        next(batches)  # the threads have started
        start = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        seconds = time.perf_counter() - start
        padded = 2 * LENGTH * sum(DIMS[args.version])  # bytes that reach the training step
        done = count * args.batch_size
        report("grain_batches, both streams", done, seconds, padded * done)
    finally:
        shutil.rmtree(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
