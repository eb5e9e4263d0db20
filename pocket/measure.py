"""Measures clips of the pocket world: what is seen against what is heard, and against a prompt.

    python -m pocket.measure outputs/clip.mp4 --prompt "a small red ball and a big blue ball bounce"
    python -m pocket.measure outputs/long.mp4 --seconds 5 --layout merged --sheet outputs/long.png
    python -m pocket.measure outputs/world/*.mp4 --truth --json outputs/world/measures.json
    python -m pocket.measure outputs/student/*.mp4 --reference outputs/world

Prints a table, one column per clip, or per stretch of a single clip with --seconds, and the last
column for all together. What the rows mean is in `pocket.measures.report.MEANINGS`.
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

from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.contact_sheet import contact_sheet
from pocket.make_world import mark_colour
from pocket.measures.frechet import clip_features, frechet_distance
from pocket.measures.observation import Observation, observe
from pocket.measures.report import MEANINGS, Measures, compare_with_truth, measure, pool, windows
from pocket.world.captions import scene_from_caption
from pocket.world.physics import Scene, Truth, WorldConfig

MAX_COLUMNS = 8  # of single clips in the printed table; the JSON has all


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m pocket.measure", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("clips", nargs="+", type=pathlib.Path, help="MP4s")
    add("--prompt", nargs="+", help="what should be there: one for all clips, or one for each")
    add(
        "--truth", nargs="*", type=pathlib.Path, metavar="JSON",
        help="what pocket.make_world wrote, a file per clip; without names, those beside the clips",
    )  # fmt: skip
    add("--seconds", type=float, help="also measure every so many seconds, for drift")
    add("--layout", choices=LAYOUT_NAMES, help="look for seams at the borders of these blocks")
    add("--reference", type=pathlib.Path, help="folder of real clips, for the Fréchet distance")
    add("--json", type=pathlib.Path, metavar="FILE", help="write everything there")
    add("--sheet", type=pathlib.Path, metavar="PNG", help="contact sheet of the first clip, marked")
    return parser.parse_args(argv)


def read_targets(args: argparse.Namespace) -> tuple[list[Scene | None], list[Truth | None]]:
    """What should be in each clip, from prompts or truth.

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
        scenes = [scene_from_caption(prompt) for prompt in args.prompt]
        return scenes * (count // len(scenes)), [None] * count
    if args.truth is None:
        return [None] * count, [None] * count
    files = args.truth or [clip.with_suffix(".json") for clip in args.clips]
    if len(files) != count:
        raise ValueError(f"{len(files)} files of truth for {count} clips; give one for each")
    truths = [Truth.from_json(json.loads(file.read_text())) for file in files]
    return [truth.scene for truth in truths], truths


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one clip."""

    path: pathlib.Path
    observation: Observation
    total: Measures
    windows: list[Measures]
    truth: dict[str, float | None]
    features: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What is written with --json."""
        matching = self.observation.matching
        pairs = [
            {"seen": dataclasses.asdict(impact), "heard": dataclasses.asdict(tone)}
            for impact, tone in matching.pairs
        ]
        return {
            "measures": self.total.scalars(),
            "windows": [part.scalars() for part in self.windows],
            "truth": self.truth,
            "pairs": pairs,
            "misses": [dataclasses.asdict(impact) for impact in matching.misses],
            "phantoms": [dataclasses.asdict(tone) for tone in matching.phantoms],
        }


def shrink(frames: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] uint8 of a clip that was written enlarged -> the world's own pixels."""
    count, height, width, _ = frames.shape
    factor = width // WorldConfig().width
    if factor < 2 or width % factor or height % factor:
        return frames
    shape = (count, height // factor, factor, width // factor, factor, 3)
    sums = frames.reshape(shape).sum((2, 4), dtype=np.uint32)
    return np.round(sums / factor**2).astype(np.uint8)


def marks(observation: Observation) -> dict[str, list[tuple[float, str]]]:
    """Impacts seen and tones heard, as `contact_sheet` marks them.

    Changes of course in mid-air are marked if there is a tone to them, as in the measures.
    """
    matching = observation.matching
    seen = sorted([*(pair[0] for pair in matching.pairs), *matching.misses], key=lambda i: i.time)
    return {
        "seen": [(i.time, mark_colour(i.colour)) for i in seen],
        "heard": [(t.time, mark_colour(t.colour)) for t in observation.tones],
    }


def measure_file(
    path: pathlib.Path,
    scene: Scene | None,
    truth: Truth | None,
    seconds: float | None,
    layout: str | None,
    sheet: pathlib.Path | None = None,
) -> Result:
    """Everything about one clip.

    Raises:
      ValueError: it cannot be read as a clip of this world.
      OSError: it cannot be read.
    """
    frames, frame_rate, waveform, sample_rate = media.read_clip(path)
    frames = shrink(frames)
    observation = observe(frames, frame_rate, waveform, sample_rate)
    blocks = BlockLayout.from_name(layout, frame_rate=frame_rate) if layout else None
    options = dict(scene=scene, layout=blocks)
    if sheet:
        contact_sheet(
            frames,
            sheet,
            frame_rate=frame_rate,
            waveform=waveform if len(waveform) else None,
            sample_rate=sample_rate,
            **marks(observation),
        )
    return Result(
        path=path,
        observation=observation,
        total=measure(observation, **options),
        windows=windows(observation, seconds, **options) if seconds else [],
        truth=compare_with_truth(observation, truth) if truth else {},
        features=clip_features(observation, waveform, sample_rate),
    )


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


def choose_columns(results: list[Result]) -> dict[str, dict[str, float | None]]:
    """What the table shows: clips or stretches, and all together."""
    columns = {}
    if len(results) == 1:
        start = 0.0
        for part in results[0].windows:
            columns[f"{start:.0f}-{start + part.seconds:.0f} s"] = part.scalars()
            start += part.seconds
    else:
        for result in results[:MAX_COLUMNS]:
            columns[result.path.stem] = result.total.scalars() | result.truth
    truth = results[0].truth if len(results) == 1 else {}
    columns["all"] = pool([result.total for result in results]).scalars() | truth
    return columns


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    console = Console(stderr=True)
    try:
        if args.seconds is not None and not args.seconds > 0:
            raise ValueError(f"--seconds must be positive, not {args.seconds}")
        targets = list(zip(args.clips, *read_targets(args)))
        references = sorted(args.reference.glob("*.mp4")) if args.reference else []
        if args.reference and min(len(references), len(args.clips)) < 2:
            raise ValueError(
                f"the Fréchet distance compares sets: {len(args.clips)} clips were given, "
                f"{args.reference} holds {len(references)}; take 2 or more each"
            )
        results = []
        for path, scene, truth in track(targets, "clips", console=console, transient=True):
            sheet = None if results else args.sheet
            results.append(measure_file(path, scene, truth, args.seconds, args.layout, sheet))
        content: dict[str, Any] = {"clips": {str(r.path): r.to_json() for r in results}}
        content["all"] = pool([result.total for result in results]).scalars()
        if references:
            real = [measure_file(path, None, None, None, None).features for path in references]
            content["frechet_distance"] = frechet_distance(real, [r.features for r in results])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Console(width=max(80, 30 + 14 * (len(results) + len(results[0].windows))))
    table.print(make_table(choose_columns(results)))
    if "frechet_distance" in content:
        print(f"Fréchet distance to {args.reference}: {content['frechet_distance']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content["meanings"] = MEANINGS
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
