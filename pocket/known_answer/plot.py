"""Draws what `pocket.known_answer.solve` measured.

    python -m pocket.known_answer.plot outputs/known_answer/known_answer.json

The plots are written beside the file.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from omniforcing_jax.training.objectives.losses import SIGMA_BANDS

BLUE, ORANGE, GREEN, GREY, TEXT = "#2b6cb0", "#d9822b", "#3a7d44", "#7b8794", "#1f2933"
BAND_COLORS = ("#90b8e0", "#5b93cf", "#2b6cb0", "#14385f")
# what is drawn together: {title: {distance: (label, color)}}
DISTANCE_ROWS = {
    "distance of the distributions": {
        "wasserstein": ("2-Wasserstein", BLUE),
        "covariance": ("covariance", ORANGE),
        "cross_covariance": ("video-audio covariance", GREEN),
    },
    "error of the mean": {"mean_video": ("video", BLUE), "mean_audio": ("audio", ORANGE)},
}
SAMPLERS = {"sampler": "all steps", "random exit": "as trained (random exit)"}
LOSSES = {
    "generator/loss_video": ("generator, video", BLUE),
    "generator/loss_audio": ("generator, audio", ORANGE),
    "critic/loss_video": ("critic, video", GREEN),
    "critic/loss_audio": ("critic, audio", GREY),
}
TRAINING_ROWS = {
    "generator's video loss by sigma": {
        f"band/generator_video_{low:g}-{high:g}": (f"{low:g} to {high:g}", color)
        for low, high, color in zip(SIGMA_BANDS, SIGMA_BANDS[1:], BAND_COLORS)
    },
    "grad_norm": {
        "generator/grad_norm": ("generator", BLUE),
        "generator/grad_norm/audio": ("generator, audio", ORANGE),
        "critic/grad_norm": ("critic", GREEN),
    },
    "relative_update": {
        "generator/relative_update": ("generator", BLUE),
        "generator/relative_update/audio": ("generator, audio", ORANGE),
        "critic/relative_update": ("critic", GREEN),
    },
}


def columns(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{stage: {variant: curves}}: the objectives of stage II share a column."""
    groups: dict[str, dict[str, Any]] = {}
    for name, curves in result["stages"].items():
        title, _, objective = name.partition(" (")
        groups.setdefault(title, {})[objective.rstrip(")")] = curves
    return groups


def draw_lines(axes, variants, lines: dict[str, tuple[str, str]]) -> None:
    """Lines {name: (label, color)} of [(variant, steps, {name: values})]; the second is dashed.

    The legend names the colors, and below them the variants where there are several.
    """
    for (_, steps, curves), style in zip(variants, ("-", "--")):
        for name, (label, color) in lines.items():
            values = np.array(curves.get(name, []), float)
            there = np.isfinite(values)
            if there.any():
                shown = label if style == "-" else None
                axes.plot(np.array(steps)[there], values[there], style, color=color, label=shown)
    if len(variants) > 1:
        for (variant, *_), style in zip(variants, ("-", "--")):
            axes.plot([], [], style, color=TEXT, label=variant)


def metric_variants(variants: dict[str, Any]):
    """What `draw_lines` takes, of the logged metrics."""
    return [(name, curves["steps"], curves["metrics"]) for name, curves in variants.items()]


def distance_variants(variants: dict[str, Any]):
    """The same of the distances: by objective, or by how samples were made."""
    return [
        (name or SAMPLERS[sampler], curves["steps"], distances)
        for name, curves in variants.items()
        for sampler, distances in curves["distances"].items()
    ]


def finish(axes, title: str = "", log: bool = True) -> None:
    """What all panels share."""
    if log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10, color=TEXT)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def draw_distances(result: dict[str, Any]) -> Figure:
    """Losses above, distances to the truth below, a column per stage."""
    groups = columns(result)
    figure = Figure(figsize=(3.7 * len(groups), 8.4), layout="constrained")
    panels = figure.subplots(3, len(groups), sharey="row", sharex="col")
    teacher = next(row for name, row in result["table"].items() if name.startswith("teacher"))
    for column, (title, variants) in zip(panels.T, groups.items()):
        draw_lines(column[0], metric_variants(variants), LOSSES)
        finish(column[0], title)
        for axes, lines in zip(column[1:], DISTANCE_ROWS.values()):
            draw_lines(axes, distance_variants(variants), lines)
            for name, (_, color) in lines.items():
                axes.axhline(teacher[name], color=color, linestyle=":", linewidth=1.2)
            finish(axes)
        column[-1].set_xlabel("training step", fontsize=9)
    for axes, label in zip(panels[:, 0], ("loss", *DISTANCE_ROWS)):
        axes.set_ylabel(label, fontsize=9)
    figure.suptitle(
        "Gaussian clips with a known score: losses, and distances of the students' samples from "
        "the truth (dotted: those of the teacher's own samples)",
        fontsize=11,
        color=TEXT,
    )
    return figure


def draw_training(result: dict[str, Any]) -> Figure:
    """What a training log shows of each stage: losses by band, gradient norms, update sizes."""
    groups = columns(result)
    figure = Figure(figsize=(3.7 * len(groups), 8.4), layout="constrained")
    panels = figure.subplots(3, len(groups), sharex="col")
    for column, (title, variants) in zip(panels.T, groups.items()):
        first = metric_variants(variants)[:1]
        (objective, _, _), curves = first[0], [("", *first[0][1:])]
        for axes, lines in zip(column, TRAINING_ROWS.values()):
            draw_lines(axes, curves, lines)
            finish(axes)
        finish(column[0], f"{title} ({objective})" if objective else title)
        column[-1].set_xlabel("training step", fontsize=9)
    for axes, label in zip(panels[:, 0], TRAINING_ROWS):
        axes.set_ylabel(label, fontsize=9)
    return figure


def draw(result: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes both figures into a folder."""
    figures = {
        "known_answer.png": draw_distances(result),
        "training_curves.png": draw_training(result),
    }
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pocket.known_answer.plot")
    parser.add_argument("file", type=pathlib.Path, help="known_answer.json")
    file = parser.parse_args(argv).file
    draw(json.loads(file.read_text()), file.parent)


if __name__ == "__main__":
    main()
