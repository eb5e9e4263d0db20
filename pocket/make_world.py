"""Makes clips of the pocket world: to look at, to train on, or their captions only.

    python -m pocket.make_world --output outputs/world --clips 8
    python -m pocket.make_world --format array_record --output data/world --clips 4096
    python -m pocket.make_world --format captions --output data/captions.txt --clips 20000

Clips to look at are MP4s, each with the truth about it (JSON, for `pocket.measure --truth`) and a
contact sheet (PNG). Training does not need stored clips: `BounceSource` makes them on the fly, and
they are the same.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from rich.console import Console
from rich.progress import track

from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.contact_sheet import contact_sheet
from pocket.world.dataset import (
    SPLITS,
    BounceSource,
    Clip,
    Manifest,
    clip_caption,
    split_seeds,
    write_dataset,
)
from pocket.world.physics import COLOURS, RGB, WorldConfig

FORMATS = ("mp4", "array_record", "captions")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    defaults = WorldConfig()
    parser = argparse.ArgumentParser(
        prog="python -m pocket.make_world", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--output", required=True, help="folder; for captions, a text file")
    add("--format", choices=FORMATS, default="mp4", help="(default mp4)")
    add("--clips", type=int, default=8, help="how many (default 8)")
    add("--split", choices=tuple(SPLITS), default="train", help="whose clips (default train)")
    add("--frames", type=int, default=121, help="of a clip (default 121)")
    add("--width", type=int, default=defaults.width, help="pixels (default %(default)s)")
    add("--height", type=int, default=defaults.height, help="pixels (default %(default)s)")
    add("--sample-rate", type=int, default=defaults.sample_rate, help="Hz (default %(default)s)")
    add("--min-balls", type=int, default=defaults.min_balls, help="(default %(default)s)")
    add("--max-balls", type=int, default=defaults.max_balls, help="(default %(default)s)")
    add("--clips-per-shard", type=int, default=256, help="of array_record (default 256)")
    return parser.parse_args(argv)


def write_example(folder: pathlib.Path, clip: Clip, config: WorldConfig) -> None:
    """Writes NAME.mp4, NAME.json and NAME.png; the name is the seed."""
    path = folder / f"{clip.seed:010d}.mp4"
    settings = dict(width=config.width, height=config.height, frame_rate=config.frame_rate)
    with media.ClipWriter(
        path, sample_rate=config.sample_rate, crf=12, overwrite=True, **settings
    ) as writer:
        writer.write(clip.frames, clip.waveform)
    content = {"caption": clip.caption, "seed": clip.seed} | clip.truth.to_json()
    path.with_suffix(".json").write_text(json.dumps(content) + "\n")
    colours = [mark_colour(ball.colour) for ball in clip.truth.scene]
    contact_sheet(
        clip.frames,
        path.with_suffix(".png"),
        frame_rate=config.frame_rate,
        waveform=clip.waveform,
        sample_rate=config.sample_rate,
        seen=[(hit["time"], colours[hit["ball"]]) for hit in clip.truth.impacts],
        heard=[(hit["time"], colours[hit["ball"]]) for hit in clip.truth.tones],
    )


def mark_colour(colour: str) -> str:
    """A ball's colour as matplotlib takes it."""
    return "#{:02x}{:02x}{:02x}".format(*RGB[COLOURS.index(colour)])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    console = Console(stderr=True)
    output = pathlib.Path(args.output)
    try:
        names = {field.name for field in dataclasses.fields(WorldConfig)}
        config = WorldConfig(**{k: v for k, v in vars(args).items() if k in names})
        seeds = split_seeds(args.split, args.clips)
        if args.format == "captions":
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("".join(clip_caption(seed, config) + "\n" for seed in seeds))
        elif args.format == "array_record":
            write_dataset(
                output,
                Manifest(
                    world=dataclasses.asdict(config),
                    split=args.split,
                    num_frames=args.frames,
                    num_clips=args.clips,
                    clips_per_shard=args.clips_per_shard,
                ),
            )
        else:
            source = BounceSource(args.frames, args.split, args.clips, config)
            for index in track(range(args.clips), "clips", console=console, transient=True):
                write_example(output, source.clip(index), config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"{args.clips} {args.format} of split {args.split}: {output}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
