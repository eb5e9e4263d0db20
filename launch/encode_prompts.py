"""Encodes a file of captions into stored text features, for training.

    python -m launch.encode_prompts --gemma checkpoints/gemma3 --checkpoint checkpoints/ltx2 \\
        --prompts captions.jsonl --column caption --output features/captions

Captions are `.txt` (one per line), `.csv` or `.jsonl`; blank ones are skipped, repeated ones
encoded once. Ctrl-C, a kill or a crash loses at most the shards being written: the same command
continues, and the files are then the same, byte by byte, as those of a run without interruption
(on the same hardware, with the same batch size). With --distributed every process takes its share
of the shards, encodes it on its own accelerators, and writes to the same folder.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from launch import options, shard_job
from launch.shard_job import ShardProgress
from omniforcing_jax import programs
from omniforcing_jax.data.text_dataset import PromptFeatures, TextDatasetWriter, TextManifest
from omniforcing_jax.distributed import multihost
from omniforcing_jax.io import checkpoints, outputs
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.text.encoder_files import EncoderFiles, check_encoder
from omniforcing_jax.text.prompt_files import PromptList, read_prompts
from omniforcing_jax.text.text_encoder import TextEncoder
from omniforcing_jax.text.tokenizer import Tokenizer
from omniforcing_jax.types import DTYPES

SHORTEST = 128  # tokens; prompts are encoded at this length times 1, 2, 4, …
MAX_LISTED = 5  # truncated prompts that are described


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("launch.encode_prompts", __doc__)
    add = parser.add_argument
    add("--gemma", required=True, help="folder written by checkpoint_converters.gemma3 or .gemma4")
    add("--checkpoint", required=True, help="converted LTX-2 checkpoint, for its text projection")
    add("--prompts", required=True, metavar="FILE", help="captions: .txt, .csv or .jsonl")
    add("--column", help="of the .csv, or key in the .jsonl (default: caption)")
    add("--output", required=True, help="folder for the features, new or to be continued")
    add("--negative", default="", metavar="TEXT", help="negative prompt (default: empty)")
    add("--batch-size", type=int, default=16, help="prompts per step of one process (default 16)")
    add(
        "--prompts-per-shard", type=int, default=256,
        help="prompts per file; two files are held in memory (default 256)",
    )  # fmt: skip
    add("--length", type=int, help="tokens per prompt (default: as trained, else 1024)")
    add("--quantize", choices=("none", "int8"), default="none", help="weights of the text encoder")
    options.add_dtype(parser)
    options.add_verify(parser)
    options.add_distributed(parser)
    return parser.parse_args(argv)


def describe_prompts(
    prompts: PromptList, tokenizer: Tokenizer, length: int, print_line: Callable[[str], None]
) -> int:
    """Prints what was read and what will be cut; returns how many prompts are too long."""
    print_line(
        f"{len(prompts.prompts)} prompts ({prompts.num_read} read, {prompts.num_blank} blank, "
        f"{prompts.num_duplicates} repeated)"
    )
    cuts = tokenizer.cuts(tokenizer.encode(prompts.prompts), length)
    if cuts:
        print_line(f"warning: {len(cuts)} prompts of more than {length} tokens are cut:")
    for cut in cuts[:MAX_LISTED]:
        print_line(f"  line {prompts.lines[cut.index]}: {cut}")
    if len(cuts) > MAX_LISTED:
        print_line(f"  and {len(cuts) - MAX_LISTED} more")
    return len(cuts)


def encode(
    encoder: TextEncoder,
    prompts: Sequence[str],
    batch_size: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[PromptFeatures]:
    """Features of each prompt's own tokens.

    A prompt is padded to the next of 128, 256, … tokens, not always to the full length: padding is
    masked and the encoder's positions are relative, so it only costs time. Length and batch size
    of a step depend on the prompt alone, so its features do not depend on its neighbours.

    Args:
      encoder: the text encoder.
      prompts: N texts; what exceeds the encoder's length is cut.
      batch_size: prompts per step; the last batch of each length is filled up with empty prompts.
      on_done: called with the number of prompts of each step.

    Returns:
      N pairs ([tokens, Wv], [tokens, Wa]) bfloat16; the second is None if both are the same.
    """
    tokens = encoder.tokenizer.encode(prompts)
    filler = encoder.tokenizer.encode([""])
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        by_length.setdefault(padded_length(len(ids), encoder.length), []).append(index)
    result: list[PromptFeatures | None] = [None] * len(tokens)

    def collect(indices: list[int], video: jax.Array, audio: jax.Array | None) -> None:
        arrays = [np.asarray(x) for x in (video, audio) if x is not None]
        for row, index in enumerate(indices):
            count = min(len(tokens[index]), encoder.length)
            # copies, as a view would keep the whole batch in memory
            own = [x[row, -count:].copy() for x in arrays]
            result[index] = (own[0], own[1] if len(own) == 2 else None)
        on_done(len(indices))

    pending = None  # the device computes one batch while the one before it is fetched
    for length in sorted(by_length):
        for start in range(0, len(by_length[length]), batch_size):
            indices = by_length[length][start : start + batch_size]
            rows = [tokens[i] for i in indices] + filler * (batch_size - len(indices))
            video, audio = encoder.features(*encoder.tokenizer.pad(rows, length))
            video = jnp.asarray(video, jnp.bfloat16)
            audio = None if encoder.shared_features else jnp.asarray(audio, jnp.bfloat16)
            if pending is not None:
                collect(*pending)
            pending = indices, video, audio
    if pending is not None:
        collect(*pending)
    return result


def padded_length(num_tokens: int, longest: int) -> int:
    """The smallest of 128, 256, 512, … that holds the tokens, and `longest` at most."""
    length = SHORTEST
    while length < num_tokens:
        length *= 2
    return min(length, longest)


def make_manifest(
    args: argparse.Namespace, prompts: PromptList, files: EncoderFiles, num_truncated: int
) -> TextManifest:
    """What the dataset will be."""
    connectors, dtype = files.connectors, options.dtype_name(args)
    return TextManifest(
        encoder=files.fingerprint(DTYPES[dtype], args.quantize),
        tokenizer=files.tokenizer.fingerprint,
        model_version=files.model_version,
        compute_dtype=dtype,
        text_length=files.length,
        video_dim=connectors.video_dim,
        audio_dim=connectors.audio_dim,
        shared_features=not connectors.separate_projections,
        negative_prompt=args.negative.strip(),
        prompts_sha256=prompts.sha256,
        prompts_per_shard=args.prompts_per_shard,
        num_read=prompts.num_read,
        num_blank=prompts.num_blank,
        num_duplicates=prompts.num_duplicates,
        num_prompts=len(prompts.prompts),
        num_truncated=num_truncated,
    )


def write(
    writer: TextDatasetWriter,
    encoder: TextEncoder,
    prompts: Sequence[str],
    batch_size: int,
    progress: ShardProgress,
) -> None:
    """Encodes and writes what is missing, this process's share of it."""
    writer.load_libraries()

    def write_negative() -> None:
        writer.write_negative(encode(encoder, [writer.manifest.negative_prompt], batch_size)[0])

    writing: futures.Future | None = None
    with (
        shard_job.missing_shards(writer, write_negative, progress) as shards,
        futures.ThreadPoolExecutor(1) as pool,  # compresses one shard while the next is encoded
    ):
        for shard, indices in shards.items():
            texts = [prompts[i] for i in indices]
            features = encode(encoder, texts, batch_size, progress.records_done)
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write_shard, shard, texts, features)
            progress.shard_done()
        if writing is not None:
            writing.result()


def run(args: argparse.Namespace, progress: ShardProgress) -> None:
    """Reads, checks, encodes and writes."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    print_line = progress.console.print
    prompts = read_prompts(args.prompts, args.column)
    files = check_encoder(args.gemma, args.checkpoint, length=args.length)
    outputs.check_apart(args.output, [args.gemma, args.checkpoint, args.prompts])
    trained = TrainedSettings.read(checkpoints.load_config(args.checkpoint)).text_length
    if trained not in (None, files.length):
        print_line(*options.list_deviations([options.deviation("length", files.length, trained)]))
    dtype = options.compute_dtype(args)
    shortest = min(SHORTEST, files.length)
    check_memory("a batch", files.config.batch_bytes(args.batch_size, shortest, dtype))
    num_truncated = describe_prompts(prompts, files.tokenizer, files.length, print_line)
    manifest = make_manifest(args, prompts, files, num_truncated)
    writer = TextDatasetWriter(args.output, manifest)
    if writer.complete:
        print_line(f"{args.output} is complete already")
        return
    devices = jax.local_devices()
    print_line(
        f"loading {args.gemma} as {dtype.__name__} on {len(devices)} x {devices[0].device_kind}"
    )
    encoder = TextEncoder.load(
        args.gemma,
        args.checkpoint,
        dtype=dtype,
        quantize=args.quantize,
        length=files.length,
        mesh=shard_job.local_mesh(),
        verify=args.verify,
    )
    write(writer, encoder, prompts.prompts, args.batch_size, progress)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return shard_job.main(run, parse_arguments(argv), "encoding", "prompts")


if __name__ == "__main__":
    multihost.end(main())
