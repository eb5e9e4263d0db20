"""Draws what `pocket.known_answer.solve` measured.

    python -m pocket.known_answer.plot outputs/known_answer/known_answer.json

The plots are written beside the file.
"""

import pathlib
import sys
from typing import Any

import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.io import checkpoints
from omniforcing_jax.streaming.contact_sheet import new_figure

BLUE, ORANGE, GREEN, GREY, TEXT = "#2b6cb0", "#d9822b", "#3a7d44", "#7b8794", "#1f2933"
# what is drawn together: {title: {metric or distance: (label, color)}}
ROWS = {
    "loss": {
        "generator/loss_video": ("generator, video", BLUE),
        "generator/loss_audio": ("generator, audio", ORANGE),
        "critic/loss_video": ("critic, video", GREEN),
        "critic/loss_audio": ("critic, audio", GREY),
    },
    "distance of the distributions": {
        "wasserstein": ("2-Wasserstein", BLUE),
        "covariance": ("covariance", ORANGE),
        "cross_covariance": ("video-audio covariance", GREEN),
    },
    "error of the mean": {"mean_video": ("video", BLUE), "mean_audio": ("audio", ORANGE)},
}
SAMPLERS = {"sampler": "all steps", "random exit": "as trained (random exit)"}


def columns(result: dict[str, Any]) -> dict[str, list[tuple[str, list[int], dict[str, list]]]]:
    """{stage: [(variant, steps, {name: values})]}, of the losses and of the distances.

    The objectives of stage II share a column; a stage is sampled in all steps, and as trained.
    """
    groups: dict[str, list] = {}
    for name, curves in result["stages"].items():
        title, _, objective = name.partition(" (")
        for sampler, distances in curves["distances"].items():
            metrics = curves["metrics"] if sampler == "sampler" else {}
            variant = objective.rstrip(")") or SAMPLERS[sampler]
            groups.setdefault(title, []).append((variant, curves["steps"], metrics | distances))
    return groups


def draw_panel(axes, variants, lines: dict[str, tuple[str, str]], teacher: dict) -> None:
    """Lines {name: (label, color)} of all variants; the second is dashed, the teacher's dotted.

    The legend names the colors, and below them the variants where there are several.
    """
    drawn = [variant for variant in variants if any(name in variant[2] for name in lines)]
    for (_, steps, curves), style in zip(drawn, ("-", "--"), strict=False):
        for name, (label, color) in lines.items():
            values = np.array(curves.get(name, []), float)
            there = np.isfinite(values)
            if there.any():
                shown = label if style == "-" else None
                axes.plot(np.array(steps)[there], values[there], style, color=color, label=shown)
    if len(drawn) > 1:
        for (variant, *_), style in zip(drawn, ("-", "--"), strict=False):
            axes.plot([], [], style, color=TEXT, label=variant)
    for name, (_, color) in lines.items():
        if name in teacher:
            axes.axhline(teacher[name], color=color, linestyle=":", linewidth=1.2)
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def draw_distances(result: dict[str, Any]):
    """Losses above, distances to the truth below, a column per stage."""
    groups = columns(result)
    figure = new_figure(figsize=(3.7 * len(groups), 8.4), layout="constrained")
    panels = figure.subplots(len(ROWS), len(groups), sharey="row", sharex="col")
    teacher = next(row for name, row in result["table"].items() if name.startswith("teacher"))
    for column, (title, variants) in zip(panels.T, groups.items(), strict=False):
        for axes, lines in zip(column, ROWS.values(), strict=False):
            draw_panel(axes, variants, lines, teacher)
        column[0].set_title(title, fontsize=10, color=TEXT)
        column[-1].set_xlabel("training step", fontsize=9)
    for axes, label in zip(panels[:, 0], ROWS, strict=False):
        axes.set_ylabel(label, fontsize=9)
    figure.suptitle(
        "Gaussian clips with a known score: losses, and distances of the students' samples from "
        "the truth (dotted: those of the teacher's own samples)",
        fontsize=11,
        color=TEXT,
    )
    return figure


def draw_training(result: dict[str, Any]):
    """What a training log shows of each stage, as launch.plot_run draws it."""
    from launch import plot_run  # which imports matplotlib

    runs = {}
    for name, curves in result["stages"].items():
        points = {metric: np.array(values, float) for metric, values in curves["metrics"].items()}
        known = {metric: np.isfinite(values) for metric, values in points.items()}
        steps = np.array(curves["steps"])
        runs[name] = {m: (steps[known[m]], points[m][known[m]]) for m in points if known[m].any()}
    return plot_run.draw(runs)


def draw(result: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes both figures into a folder.

    Raises:
      ValueError: matplotlib is missing.
    """
    for name, draw_figure in (("known_answer", draw_distances), ("training_curves", draw_training)):
        draw_figure(result).savefig(folder / f"{name}.png", dpi=110)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = programs.Parser("pocket.known_answer.plot", __doc__)
    parser.add_argument("file", type=pathlib.Path, help="known_answer.json")
    file = parser.parse_args(argv).file
    what = "the known_answer.json of pocket.known_answer.solve"
    checkpoints.parse_json(file, what, lambda result: draw(result, file.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
