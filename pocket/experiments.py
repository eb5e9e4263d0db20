"""Trains teachers of equal cost with different settings, and puts them side by side.

    python -m pocket.experiments --folder outputs/pocket --budget 40
    python -m pocket.experiments --folder outputs/pocket --budget 40 --settings base wide --table

The folder holds what the teacher of pocket.pretrain needs. A run is in
FOLDER/experiments/BUDGET/SETTING; killed at any time, the program goes on where it was when it is
started again. The budget is of matrix products, 10^12 operations forward and backward: a larger
network gets fewer clips, a larger batch fewer steps. Warm-up and average are shares of a run. What
is compared is the loss of the average on clips that training has not met, at fixed noise levels
(`pretraining.teacher.HeldOut`), every tenth of a run: FOLDER/experiments/BUDGET.md and .png, which
are written after every run, or with --table from what there is, and nothing is trained then.
"""

import argparse
import pathlib
import sys
from typing import Any

import ml_collections

from checkpoint_converters import synthetic
from launch.plot_run import Curves, read_run
from omniforcing_jax import programs
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.io import outputs
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.ranges import Range
from omniforcing_jax.scaling.flops import forward_flops, text_flops
from omniforcing_jax.streaming.contact_sheet import new_figure
from omniforcing_jax.training.metrics import JSONL
from pocket import pretrain, pretrain_config
from pocket.report import markdown

PROGRAM = "pocket.experiments"
_MIXTURE = {"t2av": 0.5, "i2av": 0.15, "extend": 0.1, "a2v": 0.1, "ia2v": 0.05, "v2a": 0.1}
# Changes of the teacher's config, each beside those of `base`.
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {f"conditions.{mode}": share for mode, share in _MIXTURE.items()},
    "rate_2e-3": {"optimizer.learning_rate": 2e-3},
    "shift_2": {"loss.shift": 2.0},
    "deep": {"model.layers": 10, "unroll": 5},
    "wide": {"model.heads": 6},
    "batch_16": {"batch_size": 16},
    "batch_2": {"batch_size": 2},
    "wide_sound": {"model.audio_head_dim": 32},
    "more_heads": {"model.heads": 8, "model.video_head_dim": 16, "model.audio_head_dim": 8},
    "narrow_deep": {"model.heads": 3, "model.layers": 10, "unroll": 5},
    "shift_0": {"loss.shift": 0.0},
    "rate_5e-4": {"optimizer.learning_rate": 5e-4},
    "text_only": {f"conditions.{mode}": float(mode == "t2av") for mode in _MIXTURE},
    "more_clips": {"num_clips": 32_768},
}
# Of "heldout/...", in the table.
_LEVELS = ("0.2", "0.5", "0.8", "0.95")
_GIVEN = ("i2av_video", "i2av_audio", "a2v_video", "v2a_audio")
_COLUMNS = ("mean", *(f"{s}_{x}" for s in ("video", "audio") for x in _LEVELS), *_GIVEN)
_COLORS = ("#3b6fb6", "#e08a2e", "#4c9a5b", "#c44e52", "#8067ad", "#7d6b5d", "#2a9d8f")
_STYLES = ("-", "--")


def clip_flops(c) -> float:
    """Operations of training on one clip: a forward pass, and twice as many backward."""
    metadata = pretrain.model_metadata(c)
    pipeline = PipelineConfig.from_metadata(metadata, synthetic.VERSIONS[pretrain.VERSION])
    size = pipeline.check_size(c.world.height, c.world.width)
    layout = BlockLayout.from_name(c.clip.layout, frame_rate=c.clip.frame_rate)
    clip = ClipGeometry.from_blocks(layout, c.clip.blocks, *size)
    video, audio = clip.video_tokens, clip.audio_frames
    forward = forward_flops(
        pipeline.transformer,
        video_tokens=video,
        audio_tokens=audio,
        video_keys=video,
        audio_keys=audio,
        text_tokens=c.text_length,
    )
    return 3.0 * (forward + text_flops(pipeline.transformer, c.text_length))


def config_of(setting: str, folder: pathlib.Path, budget: float) -> ml_collections.ConfigDict:
    """The teacher's config with a setting, for as many steps as the budget has."""
    c = pretrain_config.get_config("teacher")
    c.update_from_flattened_dict(SETTINGS["base"] | SETTINGS[setting])
    c.folder, c.name = str(folder), f"experiments/{budget:g}/{setting}"
    c.num_steps = steps = max(int(budget * 1e12 / clip_flops(c) / c.batch_size), 40)
    c.optimizer.warmup_steps = max(steps // 40, 10)
    c.ema.update({"decay": 1 - 20 / steps, "start_step": steps // 20})
    c.heldout.every = steps // 10
    c.log_every = c.checkpoint_every = steps // 20
    return c


def table(folder: pathlib.Path, budget: float) -> tuple[str, dict[str, Curves]]:
    """All runs that there are, in Markdown, the best first, and their curves over the budget.

    Those that are under way say how far they are, and stand by the loss that they have.
    """
    rows, curves = [], {}
    for setting in SETTINGS:
        c = config_of(setting, folder, budget)
        records = folder / c.name / JSONL
        if not records.is_file() or not records.stat().st_size:  # begun, and no step is written yet
            continue
        run = read_run(folder / c.name)
        if "heldout/mean" not in run:
            continue
        done = run["heldout/mean"][0][-1] / c.num_steps
        cells = [setting, f"{done:.0%}", f"{c.num_steps:,} x {c.batch_size}"]
        loss = [run[f"heldout/{column}"][1][-1] for column in _COLUMNS]
        rows.append((loss[0], [*cells, *(f"{value:.3f}" for value in loss)]))
        curves[setting] = {
            name: (steps * (budget / c.num_steps), values)
            for name, (steps, values) in run.items()
            if name.startswith("heldout/")
        }
    headings = ["done", "steps x batch", *(column.replace("_", " ") for column in _COLUMNS)]
    return markdown(headings, [cells for _, cells in sorted(rows)]), curves


def draw(curves: dict[str, Curves], path: pathlib.Path) -> None:
    """Mean held-out loss of all runs against what they cost."""
    figure = new_figure(figsize=(13, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "mean": "held-out loss, mean",
        "video_0.8": "video, σ 0.8",
        "audio_0.8": "audio, σ 0.8",
    }
    for panel, (scalar, title) in zip(panels, titles.items(), strict=True):
        for number, (setting, run) in enumerate(curves.items()):
            costs, values = run[f"heldout/{scalar}"]
            color = _COLORS[number % len(_COLORS)]
            style = _STYLES[number // len(_COLORS) % len(_STYLES)]
            panel.plot(costs, values, color=color, linestyle=style, label=setting)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("10¹² operations")
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=7)
    outputs.save_picture(figure, path, PROGRAM)


def compare(args: argparse.Namespace) -> None:
    """Writes table and picture of what there is."""
    text, curves = table(args.folder, args.budget)
    path = args.folder / "experiments" / f"{args.budget:g}"
    outputs.save_markdown(text, path.with_name(f"{path.name}.md"), PROGRAM)
    if curves:
        draw(curves, path.with_name(f"{path.name}.png"))
    print(text, end="")


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--folder", type=pathlib.Path, default=pathlib.Path("outputs/pocket"))
    tera = programs.number(float, Range(0, 1e6, above=True))
    add("--budget", type=tera, default=40.0, help="of a run, 10^12 operations (default 40)")
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS), metavar="NAME",
        help=f"of {', '.join(SETTINGS)} (default: all)")  # fmt: skip
    add("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    for setting in () if args.table else args.settings:
        if status := pretrain.run(config_of(setting, args.folder, args.budget)):
            return status
        compare(args)
    if args.table:
        compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
