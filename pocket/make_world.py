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
from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.streaming.contact_sheet import write_clip
from pocket.world.captions import VOCABULARY, scene_from_caption
from pocket.world.dataset import (
    SPLITS,
    BounceSource,
    RenderedClip,
    clip_caption,
    split_seeds,
    write_dataset,
)
from pocket.world.physics import COLOURS, RGB, WorldConfig

PROGRAM = "pocket.make_world"
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
    add("--overwrite", action="store_true", help="replace what this program wrote before")
    return parser.parse_args(argv)


def example_path(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The MP4 of a clip; its truth and its picture lie beside it."""
    return folder / f"{seed:010d}.mp4"


def write_text(path: pathlib.Path, lines: list[str], overwrite: bool) -> None:
    """Writes captions or words; what a file of others holds is not replaced.

    Raises:
      ValueError: there is a file, and `overwrite` is not given, or has lines of another kind.
    """
    if path.exists():
        if not overwrite:
            raise ValueError(f"{path}: exists; choose another --output or pass --overwrite")
        for line in path.read_text().splitlines():
            if line not in VOCABULARY:
                try:
                    scene_from_caption(line)
                except ValueError:
                    raise ValueError(
                        f"{path}: {line[:60]!r} is no caption of {PROGRAM}, so --overwrite does "
                        "not replace it; delete it yourself, or choose another --output"
                    ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def write_example(folder: pathlib.Path, clip: RenderedClip, config: WorldConfig) -> None:
    """Writes NAME.mp4, NAME.json and NAME.png; the name is the seed."""
    path = example_path(folder, clip.seed)
    colours = [mark_colour(ball.colour) for ball in clip.truth.scene]
    marks = {
        name: [(hit["time"], colours[hit["ball"]]) for hit in hits]
        for name, hits in (("seen", clip.truth.impacts), ("heard", clip.truth.tones))
    }
    rates = config.frame_rate, config.sample_rate
    write_clip(path, clip.frames, clip.waveform, *rates, marks, crf=12, program=PROGRAM)
    content = {outputs.MARK: PROGRAM, "caption": clip.caption, "seed": clip.seed}
    with new_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content | clip.truth.to_json()) + "\n")


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
        lines = list(VOCABULARY)
        if args.format == "captions":
            lines = [clip_caption(seed, world) for seed in split_seeds(args.split, args.clips)]
        write_text(args.output, lines, args.overwrite)
        return
    source = BounceSource(args.frames, args.split, args.clips, world, args.clips_per_shard)
    if args.format == "array_record":
        write_dataset(args.output, source)
        return
    paths = [example_path(args.output, seed) for seed in split_seeds(args.split, args.clips)]
    files = [path.with_suffix(suffix) for path in paths for suffix in (".mp4", ".json", ".png")]
    outputs.check(*files, program=PROGRAM, overwrite=args.overwrite)
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
