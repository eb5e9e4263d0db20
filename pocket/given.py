"""What a student's stream makes of what it is given: a first picture, a clip to go on from, sound.

    python -m pocket.given --checkpoint outputs/demo/checkpoint --text-encoder outputs/demo/gemma

For true clips of the test split, each streamed under its own caption: how near the first frame
comes to the picture that is given (PSNR); how far the balls jump where the stream goes on behind
two seconds of the clip, and by how much their velocities change there, beside what the true clip
does in the same frame; and whether sound that arrives in pieces comes out to the sample.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.pipeline import Pipeline, load_pipeline
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import Contexts
from pocket.measures.tracking import track_balls
from pocket.sample import choose_seeds
from pocket.world.dataset import RenderedClip, make_clip
from pocket.world.physics import WorldConfig

WORLD = WorldConfig()
SEAM, SHOWN = 49, 73  # frames that are given to go on from, and all that are looked at
REACH = 4  # frames on each side of the seam, of which a velocity is taken


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("pocket.given", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="converted pocket student, with its encoders")
    add("--text-encoder", required=True, help="its converted Gemma")
    add("--clips", type=int, default=16, help="of the test split (default 16)")
    add("--seconds", type=int, default=60, help="of given sound (default 60)")
    args = parser.parse_args(argv)
    if not (1 <= args.seconds <= 3600 and 1 <= args.clips <= 1000):
        parser.error("--seconds must be 1 to 3600, --clips 1 to 1000")
    return args


def first_frame(
    pipeline: Pipeline, rollout: RolloutConfig, contexts: Contexts, clip: RenderedClip
) -> float:
    """PSNR in dB of a stream's first frame against the picture it was given."""
    session = pipeline.session(rollout, contexts, max_blocks=2)
    session.set_image(clip.frames[0].astype(np.float32) / 127.5 - 1)
    shown = next(chunk.frames for chunk in session.stream(2) if chunk.frames.shape[1])
    error = np.mean((shown[0, 0].astype(np.float32) - clip.frames[0]) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-4)))


def seam(
    pipeline: Pipeline, rollout: RolloutConfig, contexts: Contexts, clip: RenderedClip
) -> np.ndarray:
    """Frames [SHOWN, H, W, 3] of a stream that goes on behind the clip's first `SEAM`."""
    layout = rollout.cache.layout
    count = layout.blocks_for_seconds(SHOWN / WORLD.frame_rate)
    session = pipeline.session(rollout, contexts, max_blocks=count)
    samples = round(SEAM / WORLD.frame_rate * WORLD.sample_rate)
    session.extend(clip.frames[None, :SEAM], clip.waveform[None, :samples], WORLD.sample_rate)
    frames = np.concatenate([chunk.frames for chunk in session.stream(count)], axis=1)
    return frames[0, :SHOWN]


def jumps(frames: np.ndarray) -> Iterator[tuple[float, float]]:
    """At the seam: by how far each ball misses where its velocity would have it, in pixels, and by
    how much that velocity changes, in pixels a frame. Balls that are not seen have none."""
    for track in track_balls(frames):
        near = track.positions[SEAM - REACH : SEAM + REACH] * WORLD.height
        if np.isnan(near).any():
            continue
        before, after = near[:REACH], near[REACH:]
        velocity, later = ((x[-1] - x[0]) / (REACH - 1) for x in (before, after))
        missed = np.linalg.norm(after[0] - before[-1] - (velocity + later) / 2)
        yield float(missed), float(np.linalg.norm(later - velocity))


def equal_samples(
    pipeline: Pipeline, rollout: RolloutConfig, contexts: Contexts, seconds: int
) -> tuple[int, int]:
    """Samples of given sound that are heard as they were given, and all of them.

    The sound arrives in pieces of uneven lengths while blocks are made.
    """
    rate, rng = WORLD.sample_rate, np.random.default_rng(0)
    waveform = rng.uniform(-0.5, 0.5, (1, (seconds + 1) * rate, 2)).astype(np.float32)
    session = pipeline.session(rollout, contexts, given="audio")
    heard, begin = [], 0
    for block in range(seconds + 1):
        end = round((block + rng.uniform(0.3, 0.9)) * rate)
        session.push_audio(waveform[:, begin:end], rate)
        begin = end
        heard.append(session.step().waveform)
    played = np.concatenate(heard, axis=1)
    return int((played == waveform[:, : played.shape[1]]).all(-1).sum()), seconds * rate


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    clips = [make_clip(seed, SHOWN, WORLD) for seed in choose_seeds(args.clips, None)]
    encoder = PromptEncoder(args.text_encoder, args.checkpoint, cache=None, dtype=jnp.float32)
    contexts = encoder.encode([clip.caption for clip in clips])
    pipeline = load_pipeline(args.checkpoint, dtype=jnp.float32, encoders=True)
    rollout = pipeline.config.rollout(WORLD.height, WORLD.width)
    how = pipeline, rollout
    given = list(zip(contexts, clips, strict=True))
    decibels = [first_frame(*how, *each) for each in given]
    streams = [jump for each in given for jump in jumps(seam(*how, *each))]
    truth = [jump for clip in clips for jump in jumps(clip.frames)]
    equal, whole = equal_samples(*how, contexts[0], args.seconds)
    print(f"first frame: {statistics.median(decibels):.1f} dB (lowest {min(decibels):.1f})")
    for name, found in (("extend", streams), ("true clips", truth)):
        missed, turned = (np.quantile(x, (0.5, 0.9)) for x in zip(*found, strict=True))
        print(
            f"{name}: {len(found)} balls at the seam, {missed[0]:.2f} px off (90 %: "
            f"{missed[1]:.2f}), velocity changes by {turned[0]:.2f} px a frame ({turned[1]:.2f})"
        )
    print(f"sound: {equal:,} of {whole:,} samples as given")
    return 0


if __name__ == "__main__":
    sys.exit(main())
