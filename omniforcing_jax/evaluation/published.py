"""Published figures, to be shown beside one's own. Pipelines differ: compare differences only.

SALT++ and others measured OmniForcing's released checkpoint again and found other values than its
paper, for the teacher too; so no row here is a mark to be reached.
"""

from typing import NamedTuple


class PublishedRow(NamedTuple):
    """One row of a paper's table."""

    system: str
    source: str
    figures: dict[str, float]


JAVIS = "OmniForcing (paper, Table 1), JavisBench, 480p, 5 s"
VBENCH = "OmniForcing (paper, Table 2), VBench"
SALT = "SALT++ (paper), JavisBench-mini, 832x480"
OMNI_SHORT = "Omni-LiveAvatar (paper, as digested), H200, 5 s"
OMNI_LONG = "Omni-LiveAvatar (paper, as digested), H200, 60 s"
VORCH = "Vorch-Streamer (paper, as digested), H200, 2 minutes"

_JAVIS_NAMES = (
    *("FVD", "FAD", "TV-IB", "TA-IB", "CLIP", "CLAP"),
    *("AV-IB", "AVHScore", "JavisScore", "DeSync", "runtime s"),
)
_VBENCH_NAMES = (
    *("aesthetic", "imaging", "motion smoothness", "subject consistency"),
    *("temporal_flickering", "TTFC s", "FPS"),
)
_SALT_NAMES = ("VQ", "MQ", "AQ", "CLIP", "AV-IB", "JavisScore", "DeSync")
_SHORT_NAMES = ("FPS", "quality", "UTMOS", "SyncNet")
_LONG_NAMES = ("FPS", "human ID", "UTMOS", "SyncNet")
_VORCH_NAMES = ("FPS", "Sync-C", "WER %")


def _row(system: str, source: str, names: tuple[str, ...], *values: float) -> PublishedRow:
    shown = zip(names, values, strict=True)
    return PublishedRow(system, source, {n: v for n, v in shown if v == v})


_NONE = float("nan")

PUBLISHED = (
    _row("LTX-2", JAVIS, _JAVIS_NAMES,
         125.4, 4.6, 0.290, 0.173, 0.318, 0.442, 0.318, 0.298, 0.253, 0.384, 197),
    _row("OmniForcing", JAVIS, _JAVIS_NAMES,
         137.2, 5.7, 0.287, 0.162, 0.322, 0.401, 0.269, 0.254, 0.208, 0.392, 5.7),
    _row("LTX-2", VBENCH, _VBENCH_NAMES, 0.569, 0.574, 0.993, 0.945, 0.988, 197, _NONE),
    _row("OmniForcing", VBENCH, _VBENCH_NAMES, 0.595, 0.594, 0.995, 0.955, 0.989, 0.7, 25),
    _row("LTX-2, 40 steps", SALT, _SALT_NAMES, 1.884, 0.566, 4.986, 0.311, 0.239, 0.200, 0.608),
    _row("OmniForcing", SALT, _SALT_NAMES, 1.807, 0.699, 4.718, 0.303, 0.163, 0.124, 0.745),
    _row("SALT++", SALT, _SALT_NAMES, 2.838, 1.010, 4.991, 0.316, 0.184, 0.146, 0.759),
    _row("LTX-2", OMNI_SHORT, _SHORT_NAMES, 0.60, 79.39, 3.54, 6.89),
    _row("OmniForcing", OMNI_SHORT, _SHORT_NAMES, 16.11, 80.05, 2.46, 1.60),
    _row("Hallo-Live", OMNI_SHORT, _SHORT_NAMES, 16.50, 74.21, 2.96, 4.50),
    _row("Omni-LiveAvatar", OMNI_SHORT, _SHORT_NAMES, 19.57, 81.72, 3.19, 6.16),
    _row("OmniForcing", OMNI_LONG, _LONG_NAMES, 16.18, 50.19, 1.60, 0.28),
    _row("Hallo-Live", OMNI_LONG, _LONG_NAMES, 13.80, 67.60, 2.02, 0.72),
    _row("Omni-LiveAvatar", OMNI_LONG, _LONG_NAMES, 21.99, 98.61, 2.80, 6.76),
    _row("LTX-2.3", VORCH, _VORCH_NAMES, 1.83, 6.80, 7.59),
    _row("OmniForcing", VORCH, _VORCH_NAMES, 12.12, 0.75, 98.79),
    _row("Hallo-Live", VORCH, _VORCH_NAMES, 11.51, 0.58, 94.13),
    _row("Vorch-Streamer", VORCH, _VORCH_NAMES, 27.12, 6.62, 7.92),
)  # fmt: skip
