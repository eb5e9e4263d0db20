"""Measures clips of the pocket world: what is seen against what is heard, and against a prompt.

    python -m pocket.measure outputs/clip.mp4 --prompt "a small red ball and a big blue ball bounce"
    python -m pocket.measure outputs/long.mp4 --seconds 5 --layout merged --sheet outputs/long.png
    python -m pocket.measure outputs/world/*.mp4 --truth --json outputs/world/measures.json
    python -m pocket.measure outputs/student/*.mp4 --reference outputs/world

Prints a table, one column per clip, or per stretch of a single clip with --seconds, and the last
column for all together. What the rows mean is in `pocket.measures.scalars.MEANINGS`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from omniforcing_jax import programs
from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout
from omniforcing_jax.io import checkpoints, outputs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.contact_sheet import Marks, contact_sheet
from pocket.make_world import mark_colour
from pocket.measures.frechet import clip_features, frechet_distance
from pocket.measures.observation import Observation, observe
from pocket.measures.scalars import MEANINGS, Measures, compare_with_truth, measure, pool, windows
from pocket.world.captions import scene_from_caption
from pocket.world.physics import Scene, Truth, WorldConfig

PROGRAM = "pocket.measure"
MAX_COLUMNS = 8  # of single clips in the printed table; the JSON has all


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("pocket.measure", __doc__)
    add = parser.add_argument
    add("clips", nargs="+", type=pathlib.Path, help="MP4s")
    add("--prompt", nargs="+", help="what should be there: one for all clips, or one for each")
    truth = "what pocket.make_world wrote, a file per clip; without names, those beside the clips"
    add("--truth", nargs="*", type=pathlib.Path, metavar="JSON", help=truth)
    add("--seconds", type=float, help="also measure every so many seconds, for drift")
    add("--layout", choices=LAYOUT_NAMES, help="look for seams at the borders of these blocks")
    add("--reference", type=pathlib.Path, help="folder of real clips, for the Fréchet distance")
    add("--json", type=pathlib.Path, metavar="FILE", help="write everything there")
    add("--sheet", type=pathlib.Path, metavar="PNG", help="contact sheet of the first clip, marked")
    add("--overwrite", action="store_true", help="replace what this program wrote before")
    return parser.parse_args(argv)


def read_targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What should be in each clip, from prompts or truth: arguments of `measure_clip`.

    Raises:
      ValueError: both or wrongly many are given, or one cannot be read.
      OSError: a file cannot be read.
    """
    count = len(args.clips)
    if args.prompt and args.truth is not None:
        raise ValueError("give --prompt or --truth, not both")
    if args.prompt:
        if len(args.prompt) not in (1, count):
            raise ValueError(f"{len(args.prompt)} prompts for {count} clips; give 1 or {count}")
        scenes = [{"scene": scene_from_caption(prompt)} for prompt in args.prompt]
        return scenes * (count // len(scenes))
    if args.truth is None:
        return [{}] * count
    files = args.truth or [clip.with_suffix(".json") for clip in args.clips]
    if len(files) != count:
        raise ValueError(f"{len(files)} files of truth for {count} clips; give one for each")
    what = "the truth of pocket.make_world"
    return [{"truth": checkpoints.parse_json(file, what, Truth.from_json)} for file in files]


@dataclasses.dataclass(frozen=True)
class MeasuredClip:
    """Of one clip."""

    observation: Observation
    total: Measures
    windows: list[Measures]
    truth: dict[str, float | None]  # how far it is from what happened, if that is known
    features: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What is written with --json."""
        matching = dataclasses.asdict(self.observation.matching)
        pairs = [{"seen": impact, "heard": tone} for impact, tone in matching.pop("pairs")]
        return {
            "measures": self.total.scalars(),
            "windows": [part.scalars() for part in self.windows],
            "truth": self.truth,
            "pairs": pairs,
            **matching,
        }


def measure_clip(
    frames: np.ndarray,
    frame_rate: float,
    waveform: np.ndarray,
    sample_rate: int,
    *,
    scene: Scene | None = None,
    truth: Truth | None = None,
    seconds: float | None = None,
    layout: BlockLayout | None = None,
) -> MeasuredClip:
    """Everything about one clip.

    Args:
      frames, frame_rate, waveform, sample_rate: see `observe`.
      scene: what should be there; None: what the truth has, or what is there.
      truth: about the clip.
      seconds: length of the stretches that are measured as well.
      layout: at whose borders seams are looked for.

    Raises:
      ValueError: it cannot be read as a clip of this world.
    """
    observation = observe(frames, frame_rate, waveform, sample_rate)
    options = {"scene": truth.scene if truth else scene, "layout": layout}
    return MeasuredClip(
        observation,
        measure(observation, **options),
        windows(observation, seconds, **options) if seconds else [],
        compare_with_truth(observation, truth) if truth else {},
        clip_features(observation, waveform, sample_rate),
    )


def shrink(frames: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] uint8 of a clip that was written enlarged -> the world's own pixels."""
    count, height, width, _ = frames.shape
    factor = width // WorldConfig().width
    if factor < 2 or width % factor or height % factor:
        return frames
    shape = (count, height // factor, factor, width // factor, factor, 3)
    sums = frames.reshape(shape).sum((2, 4), dtype=np.uint32)
    return np.round(sums / factor**2).astype(np.uint8)


def marks(observation: Observation) -> Marks:
    """Impacts seen and tones heard, as `contact_sheet` marks them.

    Changes of course in mid-air are marked if there is a tone to them, as in the measures.
    """
    matching = observation.matching
    impacts = [*(impact for impact, _ in matching.pairs), *matching.misses]
    events = {"seen": sorted(impacts, key=lambda i: i.time), "heard": observation.tones}
    return {
        name: [(e.time, mark_colour(e.colour)) for e in found] for name, found in events.items()
    }


def measure_file(
    path: pathlib.Path, layout: str | None = None, sheet: pathlib.Path | None = None, **options
) -> MeasuredClip:
    """Everything about one clip, and a contact sheet of it; options as `measure_clip`.

    Raises:
      ValueError: it cannot be read as a clip of this world.
      OSError: it cannot be read.
    """
    frames, frame_rate, waveform, sample_rate = media.read_clip(path)
    frames = shrink(frames)
    blocks = BlockLayout.from_name(layout, frame_rate=frame_rate) if layout else None
    result = measure_clip(frames, frame_rate, waveform, sample_rate, layout=blocks, **options)
    if sheet:
        sound = {"waveform": waveform, "sample_rate": sample_rate} if len(waveform) else {}
        shown = marks(result.observation)
        contact_sheet(frames, sheet, frame_rate=frame_rate, marks=shown, program=PROGRAM, **sound)
    return result


def make_table(columns: dict[str, dict[str, float | None]]) -> Table:
    """One column of scalars per name, one row per scalar that is there."""
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    rows = list(dict.fromkeys(row for scalars in columns.values() for row in scalars))
    for row in rows:
        values = [scalars.get(row) for scalars in columns.values()]
        if any(value is not None for value in values):
            table.add_row(row, *("–" if value is None else f"{value:.3f}" for value in values))
    return table


def choose_columns(
    paths: list[pathlib.Path], results: list[MeasuredClip], everything: dict[str, float | None]
) -> dict[str, dict[str, float | None]]:
    """What the table shows: clips or stretches, and all together."""
    if len(results) > 1:
        shown = list(zip(paths, results, strict=True))[:MAX_COLUMNS]
        return {p.stem: r.total.scalars() | r.truth for p, r in shown} | {"all": everything}
    columns, start = {}, 0.0
    for part in results[0].windows:
        columns[f"{start:.0f}-{start + part.seconds:.0f} s"] = part.scalars()
        start += part.seconds
    return columns | {"all": everything | results[0].truth}


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    console = Console(stderr=True)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, not {args.seconds}")
    inputs = [*args.clips, *(args.truth or ()), args.reference]
    settings = {"program": PROGRAM, "overwrite": args.overwrite, "inputs": inputs}
    outputs.check(args.json, option="--json", **settings)
    outputs.check(args.sheet, option="--sheet", **settings)
    targets = list(zip(args.clips, read_targets(args), strict=True))
    references = sorted(args.reference.glob("*.mp4")) if args.reference else []
    if args.reference and min(len(references), len(args.clips)) < 2:
        raise ValueError(
            f"the Fréchet distance compares sets: {len(args.clips)} clips were given, "
            f"{args.reference} holds {len(references)}; take 2 or more each"
        )
    results = []
    for path, target in track(targets, "clips", console=console, transient=True):
        sheet = None if results else args.sheet
        results.append(measure_file(path, args.layout, sheet, seconds=args.seconds, **target))
    clips = {str(path): result.to_json() for path, result in zip(args.clips, results, strict=True)}
    content: dict[str, Any] = {"clips": clips}
    content["all"] = pool([result.total for result in results]).scalars()
    if references:
        real = [measure_file(path).features for path in references]
        content["frechet_distance"] = frechet_distance(real, [r.features for r in results])
    table = Console(width=max(80, 30 + 14 * (len(results) + len(results[0].windows))))
    table.print(make_table(choose_columns(args.clips, results, content["all"])))
    if "frechet_distance" in content:
        print(f"Fréchet distance to {args.reference}: {content['frechet_distance']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content["meanings"] = MEANINGS
        with new_file(args.json) as temporary:
            temporary.write_text(json.dumps({outputs.MARK: PROGRAM} | content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
