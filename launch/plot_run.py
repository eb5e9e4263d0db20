"""Draws the curves of one or several runs.

Example:
  python -m launch.plot_run outputs/stage3 --output outputs/stage3.png
  python -m launch.plot_run outputs/a outputs/b --smooth 5

Losses per modality and per band of sigma, gradient norms and relative update sizes (global and of
the audio), the entropy of the audio attention, the latents of sample clips, and speed, from the
runs' metrics.jsonl. With several runs, colours tell them apart and
line styles the curves of a panel.
"""

import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f"{error}; pictures need it: pip install -e '.[train]'") from None

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.io.checkpoints import parsing
from omniforcing_jax.training.metrics import JSONL, is_band, read_records

PROGRAM = "launch.plot_run"
COLORS = ("#3b6fb6", "#e08a2e", "#4c9a5b", "#c44e52", "#8067ad", "#7d6b5d")
STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1)))
TEXT, FAINT = "#1f2933", "#7b8794"
COLUMNS = 3
# ratios of speed that lie in [0, 1]
SHARES = ("speed/mfu", "speed/data_share", "speed/host_share", "speed/other_share")


class Panel(NamedTuple):
    """Curves that share axes: {label: name of the scalar}."""

    title: str
    curves: dict[str, str]
    log: bool = False


Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(path: pathlib.Path) -> Curves:
    """{scalar: (steps, values)} of a run's folder or of its metrics.jsonl.

    Raises:
      ValueError: there is no metrics.jsonl, or nothing in it.
    """
    file = path / JSONL if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; the runs' folders hold {JSONL}")
    points: dict[str, list[tuple[int, float]]] = {}
    with parsing(file, "the metrics of a run"):
        for record in read_records(file):
            step = float(record.pop("step"))
            for name, value in record.items():
                points.setdefault(name, []).append((step, float(value)))
    if not points:
        raise ValueError(f"{file} holds no records yet")
    arrays = {name: np.asarray(pairs, np.float64) for name, pairs in points.items()}
    return {name: (pairs[:, 0], pairs[:, 1]) for name, pairs in arrays.items()}


def choose_panels(names: list[str]) -> list[Panel]:
    """What to draw of the scalars that there are, in the order of the panels."""
    losses: dict[str, dict[str, str]] = {}
    bands: dict[str, dict[str, str]] = {}
    norms, updates = {}, {}
    for name in names:
        network, _, last = name.rpartition("/")
        if not is_band(name) and last.startswith("loss"):
            losses.setdefault(network, {})[last] = name
        elif match := re.fullmatch(r"(?:.*/)?band/(.+)_([^_]+)", name):
            bands.setdefault(match[1], {})[f"σ {match[2].replace('-', '–')}"] = name
        elif match := re.fullmatch(r"(.*?)/?(grad_norm|relative_update)(/audio)?", name):
            curves = norms if match[2] == "grad_norm" else updates
            curves[f"{match[1]} {'audio' if match[3] else 'all'}".strip()] = name
    panels = [
        Panel(f"{network} losses".strip(), losses[network], log=True)
        for network in sorted(losses, reverse=True)
    ]
    panels += [
        Panel(f"{title.replace('_', ' ')} loss by noise level", dict(sorted(c.items())), log=True)
        for title, c in bands.items()
    ]
    latents = [name for name in names if re.fullmatch(r"sample/(video|audio)_(mean|std)", name)]
    panels += [
        Panel("gradient norm", norms, log=True),
        Panel("relative update size", updates, log=True),
        Panel("audio attention entropy", _labels([n for n in names if "entropy" in n])),
        Panel("latents of sample clips", _labels(latents)),
        Panel("steps per second", _labels([n for n in names if n == "speed/steps_per_second"])),
        Panel("shares of time, and MFU", _labels([n for n in SHARES if n in names])),
    ]
    return [panel for panel in panels if panel.curves]


def _labels(names: list[str]) -> dict[str, str]:
    return {name.rpartition("/")[2].replace("_", " "): name for name in names}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw(runs: dict[str, Curves], window: int = 1):
    """Figure with the curves of the runs {label: curves}."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    panels = choose_panels(names)
    rows = -(-len(panels) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(15, 3.5 * rows + 0.8), squeeze=False)
    for axes, panel in zip(grid.flat[: len(panels)], panels, strict=True):
        draw_panel(axes, panel, runs, window)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2, label=label)
            for i, label in enumerate(runs)
        ]
        figure.legend(handles=handles, loc="upper center", ncols=min(len(runs), 4), frameon=False)
    else:
        figure.suptitle(next(iter(runs)), fontsize=12, color=TEXT)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()), h_pad=1.8, w_pad=1.8)
    return figure


def draw_panel(axes, panel: Panel, runs: dict[str, Curves], window: int) -> None:
    """One panel; curves that a run lacks are left out."""
    several = len(runs) > 1
    positive = True
    for r, curves in enumerate(runs.values()):
        for c, (label, name) in enumerate(panel.curves.items()):
            if name not in curves:
                continue
            steps, values = curves[name]
            color = COLORS[(r if several else c) % len(COLORS)]
            if window > 1:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(
                steps,
                smooth(values, window),
                color=color,
                linestyle=STYLES[c % len(STYLES)] if several else "-",
                marker="." if len(steps) < 3 else None,
                linewidth=1.4,
                label=label if label not in axes.get_legend_handles_labels()[1] else None,
            )
            positive &= bool((values > 0).all())
    if panel.log and positive:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0 if positive else None)
    axes.set_title(panel.title, fontsize=10.5, color=TEXT)
    axes.set_xlabel("step", fontsize=8.5, color=FAINT, labelpad=1)
    axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=TEXT)
    axes.grid(True, which="major", color="#e3e7ec", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(panel.curves) > 1:
        legend = axes.legend(fontsize=8, edgecolor="none", framealpha=0.7, labelcolor=TEXT)
        if several:
            for handle in legend.legend_handles:
                handle.set_color(TEXT)


def run_labels(paths: list[pathlib.Path]) -> list[str]:
    """Names that tell the runs apart: folders' names, or whole paths where those are alike."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("launch.plot_run", __doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help=f"folders with {JSONL}")
    parser.add_argument("--output", type=pathlib.Path, help="PNG; by default in the first run")
    parser.add_argument("--smooth", type=int, default=1, help="records to average over")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error(f"--smooth must be at least 1, got {args.smooth}")
    if len(set(args.runs)) < len(args.runs):
        parser.error("the same run was given twice")
    curves = [read_run(path) for path in args.runs]
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    output = args.output or first / "curves.png"
    inputs = args.runs if args.output else ()  # the first run's folder is the place for its curves
    outputs.check(output, program=PROGRAM, overwrite=True, inputs=inputs)
    figure = draw(dict(zip(run_labels(args.runs), curves, strict=True)), args.smooth)
    outputs.save_picture(figure, output, PROGRAM, dpi=110)
    plt.close(figure)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
