"""One picture of a whole clip: its frames, its waveform and its spectrogram on one time axis.

Drawing needs matplotlib, which sampling does not: it is imported where it is used.

python -m omniforcing_jax.streaming.contact_sheet clip.mp4 clip.png
"""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.streaming import media

PROGRAM = "omniforcing_jax.streaming.contact_sheet"
SHEET_COLUMNS = 8
SHEET_FRAMES = 16
SHEET_INCHES = 16.0
WINDOW_SAMPLES, HOP_SAMPLES = 1024, 256
# {what is marked: [(seconds, colour as matplotlib names it)]}
Marks = Mapping[str, Sequence[tuple[float, str]]]


def new_figure(**options: Any):
    """A matplotlib `Figure` that is drawn without a display; options are the figure's.

    Raises:
      ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib (pip install matplotlib): {error}") from error
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def contact_sheet(
    frames: np.ndarray,
    path: str | os.PathLike,
    *,
    frame_rate: float,
    waveform: np.ndarray | None = None,
    sample_rate: int | None = None,
    every: int | None = None,
    marks: Marks | None = None,
    program: str = "",
) -> None:
    """Draws a clip as one picture: frames with their times, waveform and spectrogram below.

    Args:
      frames: [n, H, W, 3] uint8 RGB, n >= 1.
      path: where the PNG goes; parent folders are created.
      frame_rate: frames per second.
      waveform: [m, 1 or 2] float32 in [-1, 1], or None for frames only.
      sample_rate: Hz, with `waveform`.
      every: show every n-th frame; None spreads 16 frames over the clip.
      marks: two kinds of events, marked above and below the waveform if there is one.
      program: that draws it, kept in the PNG; see `io.outputs`.

    Raises:
      ValueError: wrong shapes or dtypes, no frames, a waveform without its sample rate, or no
        matplotlib.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or not len(frames) or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames must be uint8 [n, H, W, 3], n >= 1; got {frames.dtype} {list(frames.shape)}"
        )
    if waveform is not None and (
        np.ndim(waveform) != 2 or waveform.shape[1] not in (1, 2) or not sample_rate
    ):
        raise ValueError("waveform must be [m, 1 or 2] and come with its sample_rate")
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1 frame, got {every}")
    if every is None:
        shown = np.unique(np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int))
    else:
        shown = np.arange(0, len(frames), every)
    rows = -(-len(shown) // SHEET_COLUMNS)
    has_sound = waveform is not None and len(waveform) > 0

    cell_height = SHEET_INCHES / SHEET_COLUMNS * frames.shape[1] / frames.shape[2] + 0.25
    heights = [cell_height] * rows + [1.6, 2.4] * has_sound
    figure = new_figure(figsize=(SHEET_INCHES, sum(heights) + 0.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(heights), SHEET_COLUMNS, height_ratios=heights)
    for cell, index in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(cell, SHEET_COLUMNS)])
        axes.imshow(frames[index])
        axes.set_title(f"{index / frame_rate:.2f} s", fontsize=9, color="0.35", pad=3)
        axes.axis("off")
    if has_sound:
        duration = max(len(frames) / frame_rate, len(waveform) / sample_rate)
        axes = _draw_sound(
            figure, grid, rows, np.asarray(waveform, np.float32), sample_rate, duration
        )
        if marks and any(marks.values()):
            _draw_marks(axes, marks)
    outputs.save_picture(figure, path, program)


def write_clip(
    path: pathlib.Path,
    frames: np.ndarray,
    waveform: np.ndarray,
    frame_rate: float,
    sample_rate: int,
    marks: Marks | None = None,
    crf: int = 18,
    program: str = "",
) -> None:
    """Writes an MP4, and beside it a PNG with its frames, waveform and spectrogram.

    Args:
      frames: [F, H, W, 3] uint8.
      waveform: [N, 2] float32 in [-1, 1].
      marks: of `contact_sheet`.
      crf, program: of `media.ClipWriter`.
    """
    height, width = frames.shape[1:3]
    rates = {"frame_rate": frame_rate, "sample_rate": sample_rate}
    with media.ClipWriter(
        path, width=width, height=height, **rates, crf=crf, overwrite=True, program=program
    ) as writer:
        writer.write(frames, waveform)
    sheet = path.with_suffix(".png")
    contact_sheet(frames, sheet, waveform=waveform, marks=marks, program=program, **rates)


def _draw_marks(axes, marks: Marks):
    """Marks events on the waveform's axes: the first kind from above, the second from below."""
    low, high = axes.get_ylim()
    middle, room = (low + high) / 2, 0.12 * (high - low)
    axes.set_ylim(low - room, high + room)
    axes.set_facecolor("0.93")  # yellow and cyan can be told from it
    rows = (("v", high + room / 2), ("^", low - room / 2))
    for (name, events), (marker, level) in zip(marks.items(), rows, strict=False):
        for time, color in events:
            axes.plot([time, time], [middle, level], color=color, linewidth=1.0, zorder=0)
            axes.plot(time, level, marker, color=color, markersize=7, markeredgecolor="0.2")
        axes.text(1.003, level, name, transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def _draw_sound(figure, grid, row: int, waveform: np.ndarray, sample_rate: int, duration: float):
    """Draws the waveform in grid row `row` and the spectrogram in the next, on one time axis.

    Returns:
      The waveform's axes.
    """
    top = figure.add_subplot(grid[row, :])
    # Minimum and maximum per pixel column: drawing every sample would only smear.
    step = max(1, len(waveform) // 1500)
    usable = len(waveform) // step * step
    columns = waveform[:usable].reshape(-1, step, waveform.shape[1])  # [column, sample, channel]
    times = (np.arange(len(columns)) + 0.5) * step / sample_rate
    channels = waveform.shape[1]
    for channel, color in zip(range(channels), ("#2f6f9f", "#c8553d"), strict=False):
        offset = -2.2 * channel
        low, high = columns[..., channel].min(1) + offset, columns[..., channel].max(1) + offset
        top.fill_between(times, low, high, color=color, linewidth=0.4)
    top.set_ylim(-2.2 * (channels - 1) - 1.1, 1.1)
    top.set_yticks([-2.2 * channel for channel in range(channels)])
    top.set_yticklabels(("left", "right") if channels == 2 else range(channels), fontsize=9)
    top.tick_params(labelbottom=False)

    bottom = figure.add_subplot(grid[row + 1, :], sharex=top)
    size, hop = WINDOW_SAMPLES, HOP_SAMPLES
    mono = np.pad(waveform.mean(1), (size // 2, size))  # window i is centred on sample i * hop
    windows = np.lib.stride_tricks.sliding_window_view(mono, size)[::hop]
    magnitude = np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) / (size / 4)
    decibels = (
        20 * np.log10(np.maximum(magnitude, 1e-6)).T
    )  # [frequency, window]; full-scale sine is 0
    edges = (np.array([0, len(windows)]) - 0.5) * hop / sample_rate  # seconds
    image = bottom.imshow(decibels, aspect="auto", cmap="magma", vmin=-90, vmax=0, origin="lower")
    image.set_extent((*edges, 0, sample_rate / 2000))
    bottom.set_xlim(0, duration)
    bottom.set_xlabel("seconds")
    bottom.set_ylabel("kHz")
    figure.colorbar(image, ax=bottom, label="dB", pad=0.005, fraction=0.02, aspect=12)
    return top


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("omniforcing_jax.streaming.contact_sheet", __doc__)
    parser.add_argument("clip", help="a video file")
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--every", type=int, help="show every n-th frame (default: 16 frames)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one")
    args = parser.parse_args(argv)
    outputs.check(args.picture, program=PROGRAM, overwrite=args.overwrite, inputs=[args.clip])
    frames, frame_rate, waveform, sample_rate = media.read_clip(args.clip)
    sound = {"waveform": waveform, "sample_rate": sample_rate} if len(waveform) else {}
    options = {"frame_rate": frame_rate, "every": args.every, "program": PROGRAM}
    contact_sheet(frames, args.picture, **options, **sound)
    return 0


if __name__ == "__main__":
    sys.exit(main())
