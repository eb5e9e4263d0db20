"""Puts training runs side by side in a table: how far they came, how calmly, and how fast.

    python -m pocket.compare_runs outputs/pocket/ablations/* --output outputs/pocket/ablations.md

A run is a row, or several that differ by /SEED behind the same name are one, with mean and largest
difference from it. Losses are means over the records of the last tenth of a run; `half way` is the
same around half of its steps, so a run that has converged shows the same twice. Gradient norms are
the largest of all records, before clipping. Updates are skipped whose gradient is not finite.
"""

import argparse
import pathlib
import sys

from launch.plot_run import Curves, read_run
from omniforcing_jax.training.metrics import JSONL
from pocket.report import cell, files_of_row

FIRST, HALF, WHOLE = (0.0, 0.01), (0.45, 0.55), (0.9, 1.0)  # shares of the run
# heading: (scalar, share of the run or None for the largest value)
COLUMNS = {
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


def value(curves: Curves, scalar: str, share: tuple[float, float] | None) -> float | None:
    """Mean of a scalar over a share of the steps, or its largest value; None if it is not there."""
    if scalar not in curves:
        return None
    steps, values = curves[scalar]
    if share is None:
        return float(values.max())
    low, high = (steps.max() * x for x in share)
    chosen = values[(steps >= low) & (steps <= high)]
    return float(chosen.mean()) if len(chosen) else None


def read_rows(folders: list[pathlib.Path]) -> dict[str, list[Curves]]:
    """{row: curves of its runs}.

    Raises:
      ValueError: a folder holds no run.
    """
    return {
        folder.name: [read_run(file) for file in files_of_row(folder, JSONL)] for folder in folders
    }


def table(rows: dict[str, list[Curves]]) -> str:
    """All rows in Markdown, with the columns that at least one run has."""
    known = {heading: rule for heading, rule in COLUMNS.items()
             if any(rule[0] in curves for runs in rows.values() for curves in runs)}  # fmt: skip
    lines = [f"| | runs | {' | '.join(known)} |", "|---" * (len(known) + 2) + "|"]
    for name, runs in rows.items():
        cells = [cell([value(curves, *rule) for curves in runs], "{:.3f}")
                 for rule in known.values()]  # fmt: skip
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pocket.compare_runs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, help="Markdown file")
    args = parser.parse_args(argv)
    try:
        text = table(read_rows(args.folders))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
