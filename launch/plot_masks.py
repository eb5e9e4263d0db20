"""Draws the four block-causal attention masks in the manner of the paper's Fig. 3.

Example:
  python -m launch.plot_masks --layout prefix --seconds 3 --sinks 16 --output outputs/masks.png

The four masks appear as one joint matrix: queries downwards, keys to the right. Video latents are
drawn with a few patches each, since 384 would hide the audio.
"""

import dataclasses
import pathlib
import sys

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f"{error}; pictures need it: pip install -e '.[train]'") from None

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from omniforcing_jax import BlockLayout, programs
from omniforcing_jax.blocks import LAYOUT_NAMES
from omniforcing_jax.io import outputs
from omniforcing_jax.ranges import Range

PROGRAM = "launch.plot_masks"
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


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One axis of a mask: the tokens of a stream.

    Attributes:
      stream: "video" or "audio".
      blocks: block of each token.
      num_sinks: tokens in front that belong to no block.
    """

    stream: str
    blocks: np.ndarray
    num_sinks: int = 0

    @property
    def borders(self) -> np.ndarray:
        """First token of every group (sinks, then blocks), and the end of the sequence."""
        starts = np.flatnonzero(np.diff(self.blocks, prepend=-1))
        if self.num_sinks:
            starts = np.union1d(starts, [self.num_sinks])
        return np.append(starts, len(self.blocks))

    @property
    def names(self) -> list[str]:
        """Of the groups."""
        letter = self.stream[0].upper()
        blocks = [f"${letter}_{{{k}}}$" for k in range(self.blocks[-1] + 1)]
        return ["$s$"] * bool(self.num_sinks) + blocks


def spread(ticks: np.ndarray) -> list[int]:
    """Drops ticks whose labels would run into the next one."""
    kept = [int(ticks[-1])]
    for tick in ticks[-2::-1]:
        if kept[-1] - tick > MIN_TICK_SPACING * ticks[-1]:
            kept.append(int(tick))
    return kept[::-1]


def panel_title(query: str, key: str) -> str:
    """Says what attends to what, with the paper's condition."""
    condition = rf"$\tau_{key[0]}(k) \leq \tau_{query[0]}(q)$"
    if query == key:
        return f"{query.capitalize()} self-attention: {condition}  (Eq. 4)"
    return f"{key.capitalize()} to {query} ({query} attends to {key}): {condition}  (Eq. 5)"


def draw_panel(axes, mask: np.ndarray, query: Tokens, key: Tokens) -> None:
    """Draws one mask [query tokens, key tokens]."""
    cells = color_cells(mask, key.blocks, key.num_sinks)
    axes.imshow(
        cells,
        cmap=ListedColormap([WHITE, BLUE, ORANGE, RED]),
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(0, cells.shape[1], cells.shape[0], 0),
    )
    rows, columns = query.borders, key.borders
    for border in rows[1:-1]:
        axes.axhline(border, color=LINE, linewidth=0.6)
    for border in columns[1:-1]:
        axes.axvline(border, color=LINE, linewidth=0.6)
    axes.spines[:].set(color=LINE, linewidth=1.0)

    # Block names on the top and left, token indices of the block borders opposite.
    axes.set_xticks((columns[:-1] + columns[1:]) / 2, key.names)
    axes.set_yticks((rows[:-1] + rows[1:]) / 2, query.names)
    sides = {"top": True, "labeltop": True, "bottom": False, "labelbottom": False}
    axes.tick_params(**sides, length=0, pad=3, labelsize=10.5, labelcolor=TEXT)
    below, right = axes.secondary_xaxis("bottom"), axes.secondary_yaxis("right")
    below.set_xticks(spread(columns))
    right.set_yticks(spread(rows))
    for twin in (below, right):
        twin.tick_params(length=3, width=0.6, labelsize=7.5, color=LINE, labelcolor=FAINT)
        twin.spines[:].set_visible(False)
    axes.set_title(panel_title(query.stream, key.stream), fontsize=11.5, color=TEXT, pad=22)


def draw(layout: BlockLayout, num_sinks: int, num_blocks: int, patches: int):
    """Figure with the four masks of `num_blocks` blocks, `patches` tokens per video latent."""
    video_frames = layout.num_video_frames(num_blocks)
    audio_frames = layout.num_audio_frames(num_blocks)
    masks = layout.masks(video_frames, audio_frames, patches, num_sinks)
    video = Tokens("video", layout.video_token_blocks(video_frames, patches))
    audio = Tokens("audio", layout.audio_token_blocks(audio_frames, num_sinks), num_sinks)
    figure, panels = plt.subplots(2, 2, figsize=(12.5, 13.2))
    draw_panel(panels[0, 0], masks.video, video, video)
    draw_panel(panels[0, 1], masks.a2v, video, audio)
    draw_panel(panels[1, 0], masks.v2a, audio, video)
    draw_panel(panels[1, 1], masks.audio, audio, audio)
    sinks = f"{num_sinks} sinks + " if num_sinks else ""
    for i, label in enumerate(
        (
            f"video: {video_frames} latents × {patches} patches = {len(video.blocks)} tokens",
            f"audio: {sinks}{audio_frames} latents = {len(audio.blocks)} tokens",
        )
    ):
        panels[i, 0].set_ylabel(f"queries, {label}", fontsize=10, color=TEXT, labelpad=6)
        panels[1, i].set_xlabel(f"keys, {label}", fontsize=10, color=TEXT, labelpad=22)
    add_title_and_legend(figure, layout, num_sinks, num_blocks)
    return figure


def add_title_and_legend(figure, layout: BlockLayout, num_sinks: int, num_blocks: int) -> None:
    """What the figure shows, and what its colours mean."""
    first = "global prefix" if layout.name == "prefix" else "block 0"
    colors = {
        "allowed": BLUE,
        f"allowed, {first} ($V_0$, $A_0$)": ORANGE,
        "allowed, audio sinks ($s$)": RED,
        "masked": WHITE,
    }
    if not num_sinks:
        del colors["allowed, audio sinks ($s$)"]
    seconds = layout.pixel_frames(num_blocks) / layout.frame_rate
    title = (
        f"Block-causal masks, layout “{layout.name}”: "
        f"video {layout.first_video_frames}-{layout.video_frames}-{layout.video_frames}-…, "
        f"audio {layout.first_audio_frames}-{layout.audio_frames}-{layout.audio_frames}-…"
    )
    length = f"{num_blocks} blocks, {seconds:.2f} s at {layout.frame_rate:g} frames per second"
    figure.suptitle(title, fontsize=15, color=TEXT, y=0.985)
    figure.text(0.5, 0.948, length, ha="center", fontsize=11, color=FAINT)
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=LINE, label=name) for name, c in colors.items()],
        loc="lower center",
        ncols=len(colors),
        frameon=False,
        fontsize=11,
        labelcolor=TEXT,
        bbox_to_anchor=(0.5, 0.005),
    )
    figure.tight_layout(rect=(0.01, 0.04, 0.99, 0.955), h_pad=2.5, w_pad=2.5)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("launch.plot_masks", __doc__)
    parser.add_argument("--layout", choices=LAYOUT_NAMES, default="prefix")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the clip")
    parser.add_argument(
        "--sinks",
        type=programs.number(int, Range(0, MAX_TOKENS)),
        default=16,
        help="sink tokens before the audio",
    )
    parser.add_argument("--frame_rate", type=float, default=24.0, help="pixel frames per second")
    parser.add_argument(
        "--patches",
        type=programs.number(int, Range(1, MAX_TOKENS)),
        default=8,
        help="tokens drawn per video latent",
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/masks.png"))
    args = parser.parse_args(argv)

    layout = BlockLayout.from_name(args.layout, frame_rate=args.frame_rate)
    num_blocks = layout.blocks_for_seconds(args.seconds)
    outputs.check(args.output, program=PROGRAM, overwrite=True)
    tokens = max(
        layout.num_video_frames(num_blocks) * args.patches,
        layout.num_audio_frames(num_blocks) + args.sinks,
    )
    if tokens > MAX_TOKENS:
        parser.error(
            f"{tokens} tokens are too many to draw (at most {MAX_TOKENS}); "
            "lower --seconds or --patches"
        )
    figure = draw(layout, args.sinks, num_blocks, args.patches)
    outputs.save_picture(figure, args.output, PROGRAM, dpi=120)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
