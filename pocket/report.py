"""Puts measures of pocket.sample side by side: a table in Markdown, and curves of drift.

    python -m pocket.report outputs/pocket/evaluation/* --output outputs/pocket/report

A folder is a row, or several that differ by /SEED behind the same name are one: then a cell is the
mean over seeds, with the largest difference from it. OUTPUT.md has two tables, of what matters most
and of all other measures. For rows that were measured by stretches it has another one, of the
stretches that end after 5, 30, 60 and 120 s, and OUTPUT.png has their curves.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

# scalar: (heading, format)
COLUMNS = {
    "abs_offset_ms": ("offset, ms", "{:.0f}"),
    "unmatched_rate": ("unmatched", "{:.0%}"),
    "pitch_right": ("pitch", "{:.0%}"),
    "prompt_pitch_right": ("tones of the prompt", "{:.0%}"),
    "colour_right": ("colour", "{:.0%}"),
    "size_right": ("size", "{:.0%}"),
    "gravity": ("gravity", "{:.2f}"),
    "air_kicks_per_second": ("turns in mid-air/s", "{:.2f}"),
    "vanishings_per_second": ("vanishings/s", "{:.2f}"),
    "motion": ("motion", "{:.1f}"),
    "seam_ratio": ("seam", "{:.2f}"),
    "frechet_distance": ("Fréchet", "{:.1f}"),
    "fps": ("FPS", "{:.0f}"),
    "first_frames_after": ("first frames, s", "{:.2f}"),
}
OTHERS = {
    "offset_ms": ("sound late by, ms", "{:.0f}"),
    "miss_rate": ("misses", "{:.0%}"),
    "phantom_rate": ("phantoms", "{:.0%}"),
    "seen_per_second": ("impacts/s", "{:.1f}"),
    "heard_per_second": ("tones/s", "{:.1f}"),
    "pan_error": ("pan error, widths", "{:.3f}"),
    "count_right": ("number of balls", "{:.0%}"),
    "colour_changes_per_second": ("changes of colour/s", "{:.2f}"),
    "parabola_error": ("off a parabola, heights", "{:.3f}"),
    "energy_spread": ("spread of energy", "{:.2f}"),
    "speed": ("speed, heights/s", "{:.2f}"),
    "flicker": ("flicker", "{:.2f}"),
    "seam_flicker_ratio": ("flicker at seams", "{:.2f}"),
    "sound_level_db": ("sound level, dB", "{:.1f}"),
}
CURVES = {
    **{
        name: COLUMNS[name][0]
        for name in ("abs_offset_ms", "unmatched_rate", "colour_right", "gravity", "motion")
    },
    "sound_level_db": "sound level, dB",
}
MOMENTS = (5, 30, 60, 120)  # s; stretches that end there are in the table, else the last one
COLORS = ("#3b6fb6", "#e08a2e", "#4c9a5b", "#c44e52", "#8067ad", "#7d6b5d", "#2a9d8f", "#b5838d")

Rows = dict[str, list[dict[str, Any]]]


def files_of_row(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The file of that name in a folder, or in its folders, one per seed.

    Raises:
      ValueError: there is none.
    """
    files = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
    if not files:
        raise ValueError(f"there is no {name} in {folder}, nor in the folders in it")
    return files


def read_rows(folders: list[pathlib.Path]) -> Rows:
    """{row: content of its measures.json, one per seed}.

    Raises:
      ValueError: a folder has no measures.
    """
    return {
        folder.name: [json.loads(f.read_text()) for f in files_of_row(folder, "measures.json")]
        for folder in folders
    }


def cell(values: list[float | None], form: str) -> str:
    """Mean and largest difference from it."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    mean = float(np.mean(found))
    text = form.format(mean)
    if len(found) > 1:
        text += " ±" + form.format(max(abs(value - mean) for value in found))
    return text


def table(rows: Rows, columns: dict[str, tuple[str, str]]) -> str:
    """All rows in Markdown, with the columns that at least one of them has."""
    scalars = {
        name: [content["all"] | content.get("speed", {}) for content in seeds]
        for name, seeds in rows.items()
    }
    known = {
        column: rule for column, rule in columns.items()
        if any(values.get(column) is not None for seeds in scalars.values() for values in seeds)
    }  # fmt: skip
    lines = [
        "| | clips | " + " | ".join(heading for heading, _ in known.values()) + " |",
        "|---" * (len(known) + 2) + "|",
    ]
    for name, seeds in scalars.items():
        cells = [
            cell([values.get(column) for values in seeds], form)
            for column, (_, form) in known.items()
        ]
        count = " + ".join(str(len(content["clips"])) for content in rows[name])
        lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_stretches(rows: Rows) -> Rows:
    """Those that were measured by stretches."""
    return {name: seeds for name, seeds in rows.items() if len(seeds[0]["stretches"]) > 1}


def drift_table(rows: Rows) -> str:
    """Measures of the stretches that end at `MOMENTS`, in Markdown; rows with stretches."""
    columns = {name: COLUMNS[name] for name in CURVES if name in COLUMNS}
    lines = [
        "| | stretches, s | " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, seeds in rows.items():
        length, count = seeds[0]["arguments"]["every"], len(seeds[0]["stretches"])
        last = count * length
        ends = [end for end in MOMENTS if end % length == 0 and end <= last] or [last]
        cells = [", ".join(f"{end - length:g}–{end:g}" for end in ends)]
        for column, (_, form) in columns.items():
            found = [
                [content["stretches"][round(end / length) - 1][column] for content in seeds]
                for end in ends
            ]
            known = [[value for value in values if value is not None] for values in found]
            cells.append(", ".join(form.format(np.mean(x)) if x else "–" for x in known))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_drift(rows: Rows, path: pathlib.Path) -> None:
    """Curves over time of rows that have stretches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for panel, (scalar, heading) in zip(axes.flat, CURVES.items()):
        for (name, seeds), color in zip(rows.items(), COLORS):
            length = seeds[0]["arguments"]["every"]
            values = np.array(
                [[np.nan if part[scalar] is None else part[scalar] for part in c["stretches"]]
                 for c in seeds]
            )  # fmt: skip
            seconds = length * (np.arange(values.shape[1]) + 0.5)
            known = np.ma.masked_invalid(values)  # a stretch may have nothing to go by
            panel.plot(seconds, known.mean(0), color=color, label=name)
            if len(values) > 1:
                low, high = known.min(0), known.max(0)
                panel.fill_between(seconds, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_title(heading, loc="left", fontsize=10)
        panel.set_xlabel("s")
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pocket.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="without extension")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.folders)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = table(rows, COLUMNS) + "\n" + table(rows, OTHERS)
    if drifting := with_stretches(rows):
        text += "\n" + drift_table(drifting)
        plot_drift(drifting, args.output.with_suffix(".png"))
    args.output.with_suffix(".md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
