"""Makes clips of the pocket world: to look at, to train on, or their captions only.

    python -m pocket.make_world --output outputs/world --clips 8
    python -m pocket.make_world --format array_record --output data/world --clips 4096
    python -m pocket.make_world --format captions --output data/captions.txt --clips 20000

Clips to look at are MP4s, each with the truth about it (JSON, for `pocket.measure --truth`) and a
contact sheet (PNG). Training does not need stored clips: `BounceSource` makes them on the fly, and
they are the same. `--format words` writes all words that captions have, a line each.
"""

import argparse
import json
import pathlib
import sys

from rich.console import Console
from rich.progress import track

from omniforcing_jax import programs
from omniforcing_jax.streaming.contact_sheet import write_clip
from pocket.world.captions import VOCABULARY
from pocket.world.dataset import (
    SPLITS,
    BounceSource,
    RenderedClip,
    clip_caption,
    split_seeds,
    write_dataset,
)
from pocket.world.physics import COLOURS, RGB, WorldConfig

FORMATS = ("mp4", "array_record", "captions", "words")
SETTINGS = {  # of the world
    "width": "pixels",
    "height": "pixels",
    "sample_rate": "Hz",
    "min_balls": "of a drawn scene",
    "max_balls": "of a drawn scene",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("pocket.make_world", __doc__)
    add = parser.add_argument
    add("--output", required=True, type=pathlib.Path, help="folder; for captions, a text file")
    add("--format", choices=FORMATS, default="mp4", help="(default mp4)")
    add("--clips", type=int, default=8, help="how many (default 8)")
    add("--split", choices=tuple(SPLITS), default="train", help="whose clips (default train)")
    add("--frames", type=int, default=121, help="of a clip (default 121)")
    for name, what in SETTINGS.items():
        option, default = f"--{name.replace('_', '-')}", getattr(WorldConfig(), name)
        add(option, type=int, default=default, help=f"{what} (default {default})")
    add("--clips-per-shard", type=int, default=256, help="of array_record (default 256)")
    return parser.parse_args(argv)


def write_example(folder: pathlib.Path, clip: RenderedClip, config: WorldConfig) -> None:
    """Writes NAME.mp4, NAME.json and NAME.png; the name is the seed."""
    path = folder / f"{clip.seed:010d}.mp4"
    colours = [mark_colour(ball.colour) for ball in clip.truth.scene]
    marks = {
        name: [(hit["time"], colours[hit["ball"]]) for hit in hits]
        for name, hits in (("seen", clip.truth.impacts), ("heard", clip.truth.tones))
    }
    rates = config.frame_rate, config.sample_rate
    write_clip(path, clip.frames, clip.waveform, *rates, marks, crf=12)
    content = {"caption": clip.caption, "seed": clip.seed} | clip.truth.to_json()
    path.with_suffix(".json").write_text(json.dumps(content) + "\n")


def mark_colour(colour: str) -> str:
    """A ball's colour as matplotlib takes it."""
    return "#{:02x}{:02x}{:02x}".format(*RGB[COLOURS.index(colour)])


def make(args: argparse.Namespace, console: Console) -> None:
    """Writes what the arguments ask for.

    Raises:
      ValueError, OSError, ImportError: see `BounceSource`, `write_dataset` and `write_clip`.
    """
    world = WorldConfig(**{name: getattr(args, name) for name in SETTINGS})
    if args.format in ("captions", "words"):
        seeds = split_seeds(args.split, args.clips)
        captions = (clip_caption(seed, world) for seed in seeds)
        lines = VOCABULARY if args.format == "words" else captions
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(line + "\n" for line in lines))
        return
    source = BounceSource(args.frames, args.split, args.clips, world, args.clips_per_shard)
    if args.format == "array_record":
        write_dataset(args.output, source)
        return
    for index in track(range(args.clips), "clips", console=console, transient=True):
        write_example(args.output, source.clip(index), world)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args, console = parse_arguments(argv), Console(stderr=True)
    make(args, console)
    many = "" if args.format == "words" else f"{args.clips} {args.format} of split {args.split}: "
    console.print(f"{many}{args.output}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
