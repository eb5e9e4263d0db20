"""launch.evaluate for pocket models: with the exact measures of the world of balls as well.

    make pocket-evaluate

compares the shipped teacher and student with true clips of the same captions. The command line is
that of launch.evaluate; rows that begin with "world" are those of `pocket.measures.scalars`, here
as means over the clips.
"""

import pathlib
import sys

from launch import evaluate
from launch.clip_measures import Measurer
from omniforcing_jax import programs
from pocket.measure import measure_file
from pocket.measures.scalars import MEANINGS
from pocket.world.captions import scene_from_caption

_OF_SCENE = {"colour_right", "size_right", "count_right", "prompt_pitch_right"}
_MORE = {*_OF_SCENE, "pitch_right"}
_LESS = {
    *("abs_offset_ms", "miss_rate", "phantom_rate", "unmatched_rate", "pan_error"),
    *("parabola_error", "energy_spread", "air_kicks_per_second", "vanishings_per_second"),
    *("colour_changes_per_second", "flicker", "seam_ratio", "seam_flicker_ratio"),
}


def measure_world(
    path: pathlib.Path, layout: str | None, prompt: str | None
) -> dict[str, float | None]:
    """The world's measures of a clip; those of the scene only if the prompt is of this world."""
    try:
        scene = scene_from_caption(prompt) if prompt else None
    except ValueError:
        scene = None
    values = measure_file(path, layout, scene=scene).total.scalars()
    if scene is None:  # it would be compared with what it shows itself
        values |= dict.fromkeys(_OF_SCENE)
    return {f"world {name}": value for name, value in values.items()}


WORLD = Measurer(
    "world",
    {
        f"world {name}": ((name in _MORE) - (name in _LESS), meaning)
        for name, meaning in MEANINGS.items()
    },
    measure_world,
    reads_prompt=True,
)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return evaluate.main(argv, further=[WORLD])


if __name__ == "__main__":
    sys.exit(main())
