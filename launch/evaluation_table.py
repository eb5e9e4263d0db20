"""The table of `launch.evaluate`: as Markdown, and as a page with the clips side by side."""

import dataclasses
import html
import os
import pathlib
from collections.abc import Mapping

from launch.clip_measures import Measures
from omniforcing_jax.evaluation import tables
from omniforcing_jax.evaluation.published import PUBLISHED
from omniforcing_jax.evaluation.tables import Estimate

SHOWN_CLIPS = 24  # on the page
_ARROWS = {1: "↑", -1: "↓", 0: ""}

Meanings = Mapping[str, tuple[int, str]]  # see `evaluation.clips.MEANINGS`


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure of all samplers: what they reach, and how far they are from the reference."""

    measure: str
    reached: dict[str, Estimate]
    differences: dict[str, Estimate]  # of all but the reference


def compare(
    measured: dict[str, Measures], meanings: Meanings, sets: Mapping[str, Mapping[str, float]] = {}
) -> list[Row]:
    """The table's rows, without those for which no clip has a value.

    Args:
      measured: by sampler, the reference first.
      meanings: of the measures.
      sets: measures of all clips of a sampler together, by measure and sampler.
    """
    reference = next(iter(measured))
    rows = []
    for measure in meanings:
        values = {
            name: {clip: m.get(measure) for clip, m in clips.items()}
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
    for measure, by_name in sets.items():
        counts = {name: len(measured[name]) for name in by_name}
        reached = {
            name: Estimate(by_name.get(name), None, None, counts.get(name, 0)) for name in measured
        }
        differences = {
            name: Estimate(by_name[name] - by_name[reference], None, None, counts[name])
            if name in by_name and reference in by_name
            else Estimate(None, None, None, 0)
            for name in measured
            if name != reference
        }
        rows.append(Row(measure, reached, differences))
    return rows


def _text(estimate: Estimate, sign: bool = False) -> str:
    if estimate.mean is None:
        return "-"
    shown = f"{estimate.mean:{'+' if sign else ''}.4g}"
    return shown if estimate.low is None else f"{shown} [{estimate.low:.3g}, {estimate.high:.3g}]"


def table_cells(
    rows: list[Row], names: list[str], meanings: Meanings
) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text."""
    others = names[1:]
    head = ["measure", *names, *(f"{name} - {names[0]}" for name in others), "meaning"]
    body = []
    for row in rows:
        direction, meaning = meanings[row.measure]
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
