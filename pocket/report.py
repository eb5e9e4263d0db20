"""Puts measures of pocket.sample, or training runs, side by side: tables, and curves of drift.

    python -m pocket.report outputs/pocket/evaluation/* --output outputs/pocket/report
    python -m pocket.report --runs outputs/pocket/ablations/* --output outputs/pocket/ablations

A folder is a row, or several that differ by /SEED behind the same name are one: then a cell is the
mean over seeds, with the largest difference from it. OUTPUT.md has two tables, of what matters most
and of all other measures. For rows that were measured by stretches it has another one, of the
stretches that end after 5, 30, 60 and 120 s, and OUTPUT.png has their curves.

Of runs, losses are means over the records of the last tenth; `half way` is the same around half of
the steps, so a run that has converged shows the same twice. Gradient norms are the largest of all
records, before clipping. Updates are skipped whose gradient is not finite.
"""

import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.io import checkpoints, outputs
from omniforcing_jax.streaming.contact_sheet import new_figure
from omniforcing_jax.training.metrics import JSONL

PROGRAM = "pocket.report"
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
_DRIFTING = ("abs_offset_ms", "unmatched_rate", "colour_right", "gravity", "motion")
CURVES = {name: COLUMNS[name][0] for name in _DRIFTING} | {"sound_level_db": "sound level, dB"}
FIRST, HALF, WHOLE = (0.0, 0.01), (0.45, 0.55), (0.9, 1.0)  # shares of a run
# of runs, {heading: (scalar, share of the run or None for the largest value)}
RUNS = {
    "first loss": ("generator/loss", FIRST),
    "video loss": ("generator/loss_video", WHOLE),
    "audio loss": ("generator/loss_audio", WHOLE),
    "half way": ("generator/loss_audio", HALF),
    "audio, σ 0.25–0.5": ("band/generator_audio_0.25-0.5", WHOLE),
    "audio, σ 0.5–0.75": ("band/generator_audio_0.5-0.75", WHOLE),
    "largest gradient norm": ("generator/grad_norm", None),
    "of the audio": ("generator/grad_norm/audio", None),
    "entropy of audio attention": ("sample/audio_entropy", WHOLE),
    "updates skipped": ("generator/update_skipped", (0.0, 1.0)),
}
MOMENTS = (5, 30, 60, 120)  # s; stretches that end there are in the table, else the last one
COLORS = ("#3b6fb6", "#e08a2e", "#4c9a5b", "#c44e52", "#8067ad", "#7d6b5d", "#2a9d8f", "#b5838d")

Rows = dict[str, list[dict[str, Any]]]


def read_rows(folders: list[pathlib.Path], name: str, read: Callable) -> dict[str, list]:
    """{row: what `read` makes of a folder's file of that name, or of one in each of its folders}.

    Raises:
      ValueError: a folder has none.
    """
    rows = {}
    for folder in folders:
        files = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
        if not files:
            raise ValueError(f"there is no {name} in {folder}, nor in the folders in it")
        rows[folder.name] = [read(file) for file in files]
    return rows


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


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column has no heading."""
    lines = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def table(
    rows: Rows, columns: dict[str, tuple[str, str]], counted: str, counts: dict[str, str]
) -> str:
    """All rows in Markdown, with the columns that at least one of them has.

    Args:
      rows: scalars of every seed.
      columns: {scalar: (heading, format)}.
      counted, counts: heading and cells of the column before.
    """
    every = [values for seeds in rows.values() for values in seeds]
    known = {c: rule for c, rule in columns.items() if any(v.get(c) is not None for v in every)}
    lines = [
        [name, counts[name]]
        + [cell([values.get(c) for values in seeds], form) for c, (_, form) in known.items()]
        for name, seeds in rows.items()
    ]
    return markdown([counted, *(heading for heading, _ in known.values())], lines)


def with_stretches(rows: Rows) -> Rows:
    """Those that were measured by stretches."""
    return {name: seeds for name, seeds in rows.items() if len(seeds[0]["stretches"]) > 1}


def drift_table(rows: Rows) -> str:
    """Measures of the stretches that end at `MOMENTS`, in Markdown; rows with stretches."""
    columns = {name: COLUMNS[name] for name in _DRIFTING}
    lines = []
    for name, seeds in rows.items():
        length, count = seeds[0]["arguments"]["every"], len(seeds[0]["stretches"])
        last = count * length
        ends = [end for end in MOMENTS if end % length == 0 and end <= last] or [last]
        cells = [name, ", ".join(f"{end - length:g}–{end:g}" for end in ends)]
        for column, (_, form) in columns.items():
            indices = [round(end / length) - 1 for end in ends]
            found = [[content["stretches"][i][column] for content in seeds] for i in indices]
            known = [[value for value in values if value is not None] for values in found]
            cells.append(", ".join(form.format(np.mean(x)) if x else "–" for x in known))
        lines.append(cells)
    return markdown(["stretches, s", *(heading for heading, _ in columns.values())], lines)


def plot_drift(rows: Rows, path: pathlib.Path) -> None:
    """Curves over time of rows that have stretches."""
    figure = new_figure(figsize=(14, 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    for panel, (scalar, heading) in zip(axes.flat, CURVES.items(), strict=False):
        for (name, seeds), color in zip(rows.items(), COLORS, strict=False):
            stretches = [[part[scalar] for part in content["stretches"]] for content in seeds]
            values = np.array(stretches, float)  # None, where there is nothing to go by, is NaN
            seconds = seeds[0]["arguments"]["every"] * (np.arange(values.shape[1]) + 0.5)
            known = np.ma.masked_invalid(values)
            panel.plot(seconds, known.mean(0), color=color, label=name)
            if len(values) > 1:
                low, high = known.min(0), known.max(0)
                panel.fill_between(seconds, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_title(heading, loc="left", fontsize=10)
        panel.set_xlabel("s")
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    outputs.save_picture(figure, path, PROGRAM)


def value(curves: dict[str, Any], scalar: str, share: tuple[float, float] | None) -> float | None:
    """Mean of a scalar over a share of a run's steps, or its largest value; None if not there."""
    if scalar not in curves:
        return None
    steps, values = curves[scalar]
    if share is None:
        return float(values.max())
    low, high = (steps.max() * x for x in share)
    chosen = values[(steps >= low) & (steps <= high)]
    return float(chosen.mean()) if len(chosen) else None


def report_runs(folders: list[pathlib.Path]) -> str:
    """The table of training runs.

    Raises:
      ValueError: a folder holds no run.
    """
    from launch.plot_run import read_run  # which imports matplotlib

    rows = read_rows(folders, JSONL, read_run)
    scalars = {
        name: [{c: value(curves, *rule) for c, rule in RUNS.items()} for curves in runs]
        for name, runs in rows.items()
    }
    counts = {name: str(len(runs)) for name, runs in rows.items()}
    return table(scalars, {c: (c, "{:.3f}") for c in RUNS}, "runs", counts)


def _checked(content: dict) -> dict:
    """The content, if it has what is read of it."""
    _ = content["all"] | content.get("speed", {}), len(content["clips"]), content["stretches"][:]
    return content


def report_samples(folders: list[pathlib.Path], plot: pathlib.Path) -> str:
    """The tables of what pocket.sample measured; the plot is written where there is drift.

    Raises:
      ValueError: a folder has no measures, or matplotlib is missing.
    """
    what = "the measures.json of pocket.sample"
    rows = read_rows(folders, "measures.json", lambda f: checkpoints.parse_json(f, what, _checked))
    scalars = {n: [c["all"] | c.get("speed", {}) for c in seeds] for n, seeds in rows.items()}
    counts = {n: " + ".join(str(len(c["clips"])) for c in seeds) for n, seeds in rows.items()}
    text = "\n".join(table(scalars, rules, "clips", counts) for rules in (COLUMNS, OTHERS))
    if drifting := with_stretches(rows):
        text += "\n" + drift_table(drifting)
        plot_drift(drifting, plot)
    return text


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser(PROGRAM, __doc__)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--runs", action="store_true", help="they hold training runs")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="without extension")
    args = parser.parse_args(argv)
    if not args.output.name:
        raise ValueError(f"--output {args.output} is a folder; name the files in it")
    table, picture = args.output.with_suffix(".md"), args.output.with_suffix(".png")
    outputs.check(table, None if args.runs else picture, program=PROGRAM, overwrite=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.runs:
        text = report_runs(args.folders)
    else:
        text = report_samples(args.folders, picture)
    outputs.save_markdown(text, table, PROGRAM)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
