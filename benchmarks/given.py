"""What giving something costs a stream: time and memory of a block against text alone, in one run.

    python -m checkpoint_converters.ltx2 --output outputs/demo/checkpoint \\
        --input pocket/weights/student.safetensors pocket/weights/shared.safetensors
    python -m benchmarks.given --checkpoint outputs/demo/checkpoint --blocks 20

Streams of all modes run side by side, a block of each in turn, so that what else the machine does
falls on all of them. Printed are medians of the blocks after the cache is full: seconds in the
transformer (generate), of the block as a whole with encoding what is given and decoding the rest
(block), and the working memory of the block's program (memory), each as a ratio to `t2av`.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from launch import options
from omniforcing_jax import PipelineConfig, StreamingSession, load_pipeline, programs
from omniforcing_jax.streaming.block_programs import generate_block

MODES = {
    "t2av": None,
    "i2av": None,
    "extend": None,
    "a2v": "audio",
    "ia2v": "audio",
    "v2a": "video",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.given", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="converted checkpoint, with its encoders")
    add("--blocks", type=int, default=20, help="blocks timed after the cache is full")
    options.add_dtype(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass
class Stream:
    """One mode's session, and the material that it is given, block by block.

    Attributes:
      mode: its name.
      session: not begun.
      sound: [1, n, 2] of a block's length; `film`: [1, n, H, W, 3] uint8.
      generate, block: seconds of each block.
    """

    mode: str
    session: StreamingSession
    sound: np.ndarray
    film: np.ndarray
    rate: int
    generate: list[float] = dataclasses.field(default_factory=list)
    block: list[float] = dataclasses.field(default_factory=list)

    def begin(self) -> None:
        """Gives what the mode gives at the start."""
        if self.mode in ("i2av", "ia2v"):
            self.session.set_image(self.film[0, 0].astype(np.float32) / 127.5 - 1)
        if self.mode == "extend":
            self.session.extend(self.film, self.sound, self.rate)
        if MODES[self.mode] == "audio":  # ahead by what the spectrogram looks ahead
            self.session.push_audio(self.sound[:, : self.rate // 5], self.rate)

    def step(self) -> None:
        """Gives and makes the next block."""
        start = time.perf_counter()
        if MODES[self.mode] == "audio" and self.session.num_blocks:
            self.session.push_audio(self.sound, self.rate)
        if MODES[self.mode] == "video":
            whole = self.session.config.cache.layout.pixel_frames(self.session.num_blocks + 1)
            self.session.push_frames(self.film[:, : whole - self.session.num_frames])
        chunk = self.session.step()
        if chunk.late:
            raise RuntimeError(f"block {chunk.block} of {self.mode} was late by {chunk.late} s")
        self.generate.append(chunk.timings.generate)
        self.block.append(time.perf_counter() - start)

    def memory(self) -> int:
        """Bytes that the program of a later block works with, besides arguments and results."""
        session = self.session
        condition = session._media.kinds(session._steering.given, first=False)[-1]
        arguments, how = session._blocks.arguments(
            session._steering, session._blocks.cache, condition, first=False
        )
        return (
            generate_block.lower(*arguments, **how).compile().memory_analysis().temp_size_in_bytes
        )


def streams(args: argparse.Namespace) -> list[Stream]:
    """One of each mode."""
    config = PipelineConfig.from_checkpoint(args.checkpoint)
    pipeline = load_pipeline(args.checkpoint, dtype=options.compute_dtype(args), encoders=True)
    features = options.random_features("a ball", config.transformer.text_dims)
    contexts = features.video_context, features.audio_context
    rollout, rate, rng = config.rollout(), config.vocoder.sample_rate, np.random.default_rng(0)
    size = config.video_vae.spatial_compression
    height, width = rollout.height * size, rollout.width * size
    layout = rollout.cache.layout
    count = layout.pixel_frames(2)
    film = rng.integers(0, 256, (1, count, height, width, 3), dtype=np.uint8)
    sound = rng.uniform(-0.5, 0.5, (1, round(layout.block_seconds * rate), 2)).astype(np.float32)
    how = {"timings": True}
    return [
        Stream(mode, pipeline.session(rollout, contexts, given=given, **how), sound, film, rate)
        for mode, given in MODES.items()
    ]


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    running = streams(args)
    for stream in running:
        stream.begin()
    full = running[0].session.config.cache.capacity + 1
    for _ in range(full + args.blocks):
        for stream in running:
            stream.step()
    found = {
        stream.mode: (
            statistics.median(stream.generate[full:]),
            statistics.median(stream.block[full:]),
            stream.memory(),
        )
        for stream in running
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.blocks} blocks")
    print(f"{'mode':8}{'generate s':>12}{'ratio':>8}{'block s':>10}{'ratio':>8}{'memory':>9}")
    for mode, values in found.items():
        generate, block, memory = (v / t for v, t in zip(values, found["t2av"], strict=True))
        print(f"{mode:8}{values[0]:12.4f}{generate:8.3f}{values[1]:10.4f}{block:8.3f}{memory:9.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
