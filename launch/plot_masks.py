"""Draws the four block-causal attention masks in the manner of the paper's Fig. 3.

Example:
  python -m launch.plot_masks --layout prefix --seconds 3 --sinks 16 --output outputs/masks.png

The four masks appear as one joint matrix: queries downwards, keys to the right. Video latents are
drawn with a few patches each, since 384 would hide the audio.
"""

import argparse
import pathlib

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f"{error}; pictures need it: pip install -e '.[train]'") from None

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout

WHITE, BLUE, ORANGE, RED = "#ffffff", "#7fa8d9", "#f5a742", "#d64545"
MASKED, ALLOWED, PREFIX, SINK = range(4)
LINE, TEXT, FAINT = "#33415c", "#1f2933", "#7b8794"
# Beyond this many tokens on an axis single tokens are thinner than a pixel.
MAX_TOKENS = 2000
# Tick labels closer than this share of the axis would overlap.
MIN_TICK_SPACING = 0.035


def color_cells(mask: np.ndarray, key_blocks: np.ndarray, key_sinks: int) -> np.ndarray:
    """Colour index of every [query, key] pair: allowed keys by what they belong to."""
    kinds = np.where(key_blocks == 0, PREFIX, ALLOWED)
    kinds[:key_sinks] = SINK
    return np.where(mask, kinds[None, :], MASKED)


def group_borders(blocks: np.ndarray, sinks: int) -> np.ndarray:
    """First token of every group (sinks, then blocks), and the end of the sequence."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    if sinks:
        starts = np.union1d(starts, [sinks])
    return np.append(starts, len(blocks))


def spread(ticks: np.ndarray) -> list[int]:
    """Drops ticks whose labels would run into the next one."""
    kept = [int(ticks[-1])]
    for tick in ticks[-2::-1]:
        if kept[-1] - tick > MIN_TICK_SPACING * ticks[-1]:
            kept.append(int(tick))
    return kept[::-1]


def draw_panel(axes, cells, query, key, title: str) -> None:
    """Draws one mask; `query` and `key` are (borders, names) of the two axes."""
    axes.imshow(
        cells,
        cmap=ListedColormap([WHITE, BLUE, ORANGE, RED]),
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(0, cells.shape[1], cells.shape[0], 0),
    )
    (rows, row_names), (columns, column_names) = query, key
    for border in rows[1:-1]:
        axes.axhline(border, color=LINE, linewidth=0.6)
    for border in columns[1:-1]:
        axes.axvline(border, color=LINE, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set(color=LINE, linewidth=1.0)

    # Block names on the top and left, token indices of the block borders opposite.
    axes.set_xticks((columns[:-1] + columns[1:]) / 2, column_names)
    axes.set_yticks((rows[:-1] + rows[1:]) / 2, row_names)
    axes.tick_params(
        top=True,
        labeltop=True,
        bottom=False,
        labelbottom=False,
        length=0,
        pad=3,
        labelsize=10.5,
        labelcolor=TEXT,
    )
    for twin, axis, borders in (
        (axes.secondary_xaxis("bottom"), "x", columns),
        (axes.secondary_yaxis("right"), "y", rows),
    ):
        getattr(twin, f"set_{axis}ticks")(spread(borders))
        twin.tick_params(length=3, width=0.6, labelsize=7.5, color=LINE, labelcolor=FAINT)
        twin.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11.5, color=TEXT, pad=22)


def draw(layout: BlockLayout, num_blocks: int, patches: int):
    """Figure with the four masks of `num_blocks` blocks, `patches` tokens per video latent."""
    video_frames = layout.num_video_frames(num_blocks)
    audio_frames = layout.num_audio_frames(num_blocks)
    masks = layout.masks(video_frames, audio_frames, patches)
    video = layout.video_token_blocks(video_frames, patches)
    audio = layout.audio_token_blocks(audio_frames)
    video_axis = (group_borders(video, 0), [f"$V_{{{k}}}$" for k in range(num_blocks)])
    audio_axis = (
        group_borders(audio, layout.num_sinks),
        ["$s$"] * bool(layout.num_sinks) + [f"$A_{{{k}}}$" for k in range(num_blocks)],
    )

    figure, panels = plt.subplots(2, 2, figsize=(12.5, 13.2))
    video_keys, audio_keys = (video, 0), (audio, layout.num_sinks)
    for axes, mask, keys, query, key, title in (
        (
            panels[0, 0],
            masks.video,
            video_keys,
            video_axis,
            video_axis,
            r"Video self-attention: $\tau_v(k) \leq \tau_v(q)$  (Eq. 4)",
        ),
        (
            panels[0, 1],
            masks.a2v,
            audio_keys,
            video_axis,
            audio_axis,
            r"Audio to video (video attends to audio): $\tau_a(k) \leq \tau_v(q)$  (Eq. 5)",
        ),
        (
            panels[1, 0],
            masks.v2a,
            video_keys,
            audio_axis,
            video_axis,
            r"Video to audio (audio attends to video): $\tau_v(k) \leq \tau_a(q)$  (Eq. 5)",
        ),
        (
            panels[1, 1],
            masks.audio,
            audio_keys,
            audio_axis,
            audio_axis,
            r"Audio self-attention: $\tau_a(k) \leq \tau_a(q)$  (Eq. 4)",
        ),
    ):
        draw_panel(axes, color_cells(mask, *keys), query, key, title)

    video_label = f"video: {video_frames} latents × {patches} patches = {len(video)} tokens"
    sinks_label = f"{layout.num_sinks} sinks + " if layout.num_sinks else ""
    audio_label = f"audio: {sinks_label}{audio_frames} latents = {len(audio)} tokens"
    for row, label in enumerate((video_label, audio_label)):
        panels[row, 0].set_ylabel(f"queries, {label}", fontsize=10, color=TEXT, labelpad=6)
        panels[1, row].set_xlabel(f"keys, {label}", fontsize=10, color=TEXT, labelpad=22)
    finish(figure, layout, num_blocks)
    return figure


def finish(figure, layout: BlockLayout, num_blocks: int) -> None:
    """Adds the title and the legend."""
    first = "global prefix" if layout.name == "prefix" else "block 0"
    entries = [
        Patch(facecolor=BLUE, edgecolor=LINE, label="allowed"),
        Patch(facecolor=ORANGE, edgecolor=LINE, label=f"allowed, {first} ($V_0$, $A_0$)"),
        Patch(facecolor=WHITE, edgecolor=LINE, label="masked"),
    ]
    if layout.num_sinks:
        entries.insert(2, Patch(facecolor=RED, edgecolor=LINE, label="allowed, audio sinks ($s$)"))
    seconds = layout.pixel_frames(num_blocks) / layout.frame_rate
    figure.suptitle(
        f"Block-causal masks, layout “{layout.name}”: "
        f"video {layout.first_video_frames}-{layout.video_frames}-{layout.video_frames}-…, "
        f"audio {layout.first_audio_frames}-{layout.audio_frames}-{layout.audio_frames}-…",
        fontsize=15,
        color=TEXT,
        y=0.985,
    )
    figure.text(
        0.5,
        0.948,
        f"{num_blocks} blocks, {seconds:.2f} s at {layout.frame_rate:g} frames per second",
        ha="center",
        fontsize=11,
        color=FAINT,
    )
    figure.legend(
        handles=entries,
        loc="lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=11,
        labelcolor=TEXT,
        bbox_to_anchor=(0.5, 0.005),
    )
    figure.tight_layout(rect=(0.01, 0.04, 0.99, 0.955), h_pad=2.5, w_pad=2.5)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUT_NAMES, default="prefix")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the clip")
    parser.add_argument("--sinks", type=int, default=16, help="sink tokens before the audio")
    parser.add_argument("--frame_rate", type=float, default=24.0, help="pixel frames per second")
    parser.add_argument("--patches", type=int, default=8, help="tokens drawn per video latent")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/masks.png"))
    args = parser.parse_args(argv)

    try:
        layout = BlockLayout.from_name(
            args.layout, frame_rate=args.frame_rate, num_sinks=args.sinks
        )
        num_blocks = layout.blocks_for_seconds(args.seconds)
    except ValueError as error:
        parser.error(str(error))
    if args.patches < 1:
        parser.error(f"--patches must be at least 1, got {args.patches}")
    tokens = max(
        layout.num_video_frames(num_blocks) * args.patches,
        layout.num_audio_frames(num_blocks) + layout.num_sinks,
    )
    if tokens > MAX_TOKENS:
        parser.error(
            f"{tokens} tokens are too many to draw (at most {MAX_TOKENS}); "
            "lower --seconds or --patches"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(layout, num_blocks, args.patches).savefig(args.output, dpi=120)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
