"""Measures folders of clips of the same prompts, and writes one table with differences.

    python -m launch.evaluate teacher=outputs/teacher student=outputs/student \\
        --layout student=prefix --output outputs/evaluation

Clips of one name belong to one prompt and seed in all folders (0000.mp4, sample_0001.mp4, …); the
first folder is the reference of the differences. Nothing is downloaded: the measures are those of
`omniforcing_jax.evaluation`, from pixels and samples alone, with 95 % intervals by bootstrap over
the clips. OUTPUT gets table.md, table.json, and page.html, which shows the clips side by side. What
has been measured is kept there: the same command goes on, and measures only what is new or changed.

What the measures are blind to, and how to get those that need networks: docs/evaluation.md.
"""

import argparse
import dataclasses
import hashlib
import html
import json
import os
import pathlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import track

from omniforcing_jax import programs
from omniforcing_jax.blocks import LAYOUT_NAMES
from omniforcing_jax.evaluation import tables
from omniforcing_jax.evaluation.clips import MEANINGS, find_clips, measure_clip
from omniforcing_jax.evaluation.published import PUBLISHED
from omniforcing_jax.evaluation.tables import Estimate
from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import new_file

PROGRAM = "launch.evaluate"
SHOWN_CLIPS = 24  # on the page
_ARROWS = {1: "↑", -1: "↓", 0: ""}

Measures = dict[str, dict[str, float | None]]  # by clip, by measure


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("clips", nargs="+", type=_named, metavar="NAME=FOLDER", help="the reference first")
    layouts = "that these clips were streamed in, for seams: prefix or merged"
    add("--layout", nargs="+", type=_named, default=[], metavar="NAME=LAYOUT", help=layouts)
    add("--prompts", type=pathlib.Path, help="text of each clip, a line each, for the page")
    add("--output", type=pathlib.Path, required=True, help="folder of the tables and the page")
    args = parser.parse_args(argv)
    names = [name for name, _ in args.clips]
    if len(set(names)) < len(names):
        parser.error(f"two folders have one name: {', '.join(names)}")
    args.clips, args.layout = dict(args.clips), dict(args.layout)
    for name, layout in args.layout.items():
        if name not in args.clips:
            parser.error(f"--layout {name}={layout}: the folders are {', '.join(names)}")
        if layout not in LAYOUT_NAMES:
            parser.error(f"--layout {name}={layout}: layouts are {', '.join(LAYOUT_NAMES)}")
    return args


def _named(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not value or not re.fullmatch(r"[\w.+-]{1,60}", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, with a name as in a file's")
    return name, value


def measure_folder(
    clips: dict[str, pathlib.Path], layout: str | None, kept: pathlib.Path, console: Console
) -> Measures:
    """The measures of all clips, of which those that are kept, and still hold, are not made anew.

    Raises:
      ValueError: a clip cannot be measured.
    """
    kept.mkdir(parents=True, exist_ok=True)

    def measure(name: str) -> dict[str, float | None]:
        file = kept / f"{name}.json"
        about = {"source": _fingerprint(clips[name]), "layout": layout, "names": list(MEANINGS)}
        try:
            content = json.loads(file.read_text())
            if content["about"] == about:
                return content["measures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or not to the end
        found = measure_clip(clips[name], layout)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps({"about": about, "measures": found}))
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = track(
            pool.map(measure, clips), kept.name, len(clips), console=console, transient=True
        )
        return dict(zip(clips, results, strict=True))


def _fingerprint(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure of all samplers: what they reach, and how far they are from the reference."""

    measure: str
    reached: dict[str, Estimate]
    differences: dict[str, Estimate]  # of all but the reference


def compare(measured: dict[str, Measures]) -> list[Row]:
    """The table's rows, without those for which no clip has a value."""
    reference = next(iter(measured))
    rows = []
    for measure in MEANINGS:
        values = {
            name: {clip: m[measure] for clip, m in clips.items()}
            for name, clips in measured.items()
        }
        reached = {name: tables.estimate(v) for name, v in values.items()}
        if not any(e.count for e in reached.values()):
            continue
        differences = {
            name: tables.difference(v, values[reference])
            for name, v in values.items()
            if name != reference
        }
        rows.append(Row(measure, reached, differences))
    return rows


def _text(estimate: Estimate, sign: bool = False) -> str:
    if estimate.mean is None:
        return "-"
    shown = f"{estimate.mean:{'+' if sign else ''}.4g}"
    return shown if estimate.low is None else f"{shown} [{estimate.low:.3g}, {estimate.high:.3g}]"


def table_cells(rows: list[Row], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text."""
    others = names[1:]
    head = ["measure", *names, *(f"{name} - {names[0]}" for name in others), "meaning"]
    body = []
    for row in rows:
        direction, meaning = MEANINGS[row.measure]
        body.append(
            [
                f"{row.measure} {_ARROWS[direction]}".strip(),
                *(_text(row.reached[name]) for name in names),
                *(_text(row.differences[name], sign=True) for name in others),
                meaning,
            ]
        )
    return head, body


def markdown(head: list[str], body: list[list[str]], counts: dict[str, int]) -> str:
    """table.md: our figures, then published ones, each with its source."""
    clips = ", ".join(f"{name}: {count} clips" for name, count in counts.items())
    lines = [f"{clips}. Means with 95 % intervals (bootstrap over the clips).", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    lines += ["", "Published, by other pipelines:", ""]
    lines += [
        f"- {row.system}: " + ", ".join(f"{n} {v:g}" for n, v in row.figures.items())
        + f". {row.source}"
        for row in PUBLISHED
    ]  # fmt: skip
    return "\n".join(lines)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .25rem .6rem; text-align: left }
tr + tr { border-top: 1px solid #8884 } video { width: 100%; background: #000 }
.clips { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
figure { margin: 0 } .wide { overflow-x: auto } :root { color-scheme: light dark }
"""


def page(
    head: list[str],
    body: list[list[str]],
    clips: dict[str, dict[str, pathlib.Path]],
    prompts: dict[str, str],
    folder: pathlib.Path,
) -> str:
    """page.html: the table, and the first clips side by side; opens without any server."""

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    common = [n for n in next(iter(clips.values())) if all(n in paths for paths in clips.values())]
    shown = []
    for name in common[:SHOWN_CLIPS]:
        figures = [
            f"<figure><video controls preload=metadata src="
            f'"{html.escape(pathlib.Path(os.path.relpath(paths[name], folder)).as_posix())}">'
            f"</video><figcaption>{html.escape(sampler)}</figcaption></figure>"
            for sampler, paths in clips.items()
        ]
        title = html.escape(f"{name}: {prompts[name]}" if name in prompts else name)
        shown.append(f"<h2>{title}</h2><div class=clips>{''.join(figures)}</div>")
    rows = "".join(row(cells, "td") for cells in body)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>Evaluation</h1><div class=wide><table>{row(head, 'th')}{rows}</table></div>"
        f"{''.join(shown)}"
    )


def read_prompts(file: pathlib.Path | None, clips: dict[str, pathlib.Path]) -> dict[str, str]:
    """The text of each clip, in the order of the clips' names.

    Raises:
      ValueError: another number of lines than of clips.
    """
    if file is None:
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    if len(lines) != len(clips):
        raise ValueError(f"{file} has {len(lines)} lines for {len(clips)} clips; give one for each")
    return dict(zip(clips, lines, strict=True))


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    clips = {name: find_clips(folder) for name, folder in args.clips.items()}
    prompts = read_prompts(args.prompts, next(iter(clips.values())))
    outputs.claim_folder(args.output, PROGRAM, [*args.clips.values(), args.prompts])
    console = Console(stderr=True)
    reference = next(iter(clips.values()))
    for name, paths in clips.items():
        if missing := reference.keys() - paths.keys():
            console.print(f"{name} lacks {len(missing)} clips of {next(iter(clips))}: compared "
                          "where both have them")  # fmt: skip
    left = f"what has been measured is in {args.output}, and the same command goes on"
    with programs.when_interrupted(left):
        measured = {
            name: measure_folder(
                paths, args.layout.get(name), args.output / "measures" / name, console
            )
            for name, paths in clips.items()
        }
    rows = compare(measured)
    head, body = table_cells(rows, list(clips))
    counts = {name: len(paths) for name, paths in clips.items()}
    outputs.save_markdown(markdown(head, body, counts), args.output / "table.md", PROGRAM)
    content = {
        outputs.MARK: PROGRAM,
        "clips": counts,
        "rows": [dataclasses.asdict(row) for row in rows],
        "published": [row._asdict() for row in PUBLISHED],
    }
    with new_file(args.output / "table.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with new_file(args.output / "page.html") as temporary:
        temporary.write_text(page(head, body, clips, prompts, args.output))
    for cells in (head, *body):
        print("  ".join(f"{cell:<26}" for cell in cells[:-1]).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
