"""Streams a clip from a pocket model, looks at it and listens to it, and says whether both agree.

    python -m pocket.demo --checkpoint outputs/demo/checkpoint --text-encoder outputs/demo/gemma \\
        --prompt "a small red ball and a big blue ball bounce" --output outputs/demo

That is launch.stream and pocket.measure in one: OUTPUT/clip.mp4, OUTPUT/clip.png (frames, waveform
and spectrogram, with the impacts seen and the tones heard), and a line with the time to the first
chunk, frames per second and synchrony. Where the prompt does not say how the balls sound, that is
added, since the model has learnt from captions that say. A prompt that is not of the world of balls
is streamed as it is; what comes of it is not compared with it then.
"""

import argparse
import pathlib
import sys

from rich.console import Console

from launch import stream
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from pocket import measure
from pocket.measure import MeasuredClip, measure_file
from pocket.world.captions import scene_from_caption, with_sound

ENLARGE = 8  # 64 x 48 pixels are a stamp on a screen


def stream_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Those of launch.stream."""
    options = {
        "--checkpoint": args.checkpoint,
        "--text-encoder": args.text_encoder,
        "--prompt": args.prompt,
        "--prompt-cache": args.output / "prompts",
        "--seconds": args.seconds,
        "--seed": args.seed,
        "--enlarge": ENLARGE,
        "--output": args.output / "clip.mp4",
    }
    words = [str(word) for option in options.items() for word in option]
    return stream.parse_arguments([*words, "--overwrite"])


def describe(result: MeasuredClip) -> str:
    """What was measured, in a sentence."""
    matching, values = result.observation.matching, result.total.scalars()
    seen, heard = len(matching.pairs) + len(matching.misses), len(result.observation.tones)
    if not matching.pairs:
        return f"{seen} impacts seen, {heard} tones heard, none of them together"
    return (
        f"{seen} impacts seen, {heard} tones heard, {len(matching.pairs)} of them together; the "
        f"sound is {values['offset_ms']:+.0f} ms late (median), its pitch that of the ball in "
        f"{values['pitch_right']:.0%}"
    )


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("pocket.demo", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="converted pocket model")
    add("--text-encoder", required=True, help="its converted Gemma")
    add("--prompt", required=True)
    add("--seconds", type=float, default=10.0, help="length of the clip (default 10)")
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, required=True, help="folder for clip and picture")
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        args.prompt = with_sound(args.prompt)
        console.print(f"prompt: {args.prompt}", markup=False)
        scene = scene_from_caption(args.prompt)
    except ValueError as error:
        console.print(f"The prompt is none of this world: {error}", markup=False)
        scene = None
    clip = args.output / "clip.mp4"
    picture, inputs = clip.with_suffix(".png"), [args.checkpoint, args.text_encoder]
    outputs.check(picture, program=measure.PROGRAM, overwrite=True, inputs=inputs)
    options = stream_arguments(args)
    config, plan = stream.prepare(options)
    report = stream.stream(options, config, plan)
    result = measure_file(clip, config.trained.layout, picture, scene=scene)
    console.print(
        f"first chunk after {report.seconds_to_first_chunk:.2f} s (compilation included), "
        f"{report.median_fps:.1f} FPS (median block); {describe(result)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
