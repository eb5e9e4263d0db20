"""Folders of clips, and all measures of a clip that need no weights."""

import itertools
import os
import pathlib

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.evaluation.picture import measure_picture, picture_statistics
from omniforcing_jax.evaluation.sound import measure_sound
from omniforcing_jax.evaluation.synchrony import measure_synchrony
from omniforcing_jax.io import media_files

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")

# What the measures mean, in the order in which they are shown. The sign says which way is better:
# +1 more, -1 less, 0 neither (compare with the reference).
MEANINGS: dict[str, tuple[int, str]] = {
    "motion": (0, "change of the picture, levels of 255 per second"),
    "still": (-1, "share of frames in which nothing moves"),
    "temporal_flickering": (+1, "VBench: 1 - mean change of a frame / 255; stillness wins"),
    "seams": (-1, "change over block borders by that elsewhere; 1 is no seam"),
    "brightness_drift": (0, "levels of 255 per minute"),
    "contrast_drift": (0, "levels of 255 per minute"),
    "saturation_drift": (0, "levels of 255 per minute"),
    "repetition": (-1, "1 is a loop"),
    "silence": (-1, "share of the time below -60 dB"),
    "clipping": (-1, "share of samples at full scale"),
    "offset": (-1, "mean of the waveform, of full scale"),
    "loudness": (0, "dB of full scale, without the silence"),
    "loudness_drift": (0, "dB per minute"),
    "centroid_drift": (0, "of the spectrum, octaves per minute"),
    "clicks": (-1, "bends of the waveform at block borders by those elsewhere; 1 is none"),
    "sound_repetition": (-1, "1 is a loop"),
    "clock_error": (-1, "length of the sound beyond that of the picture, in samples"),
    "sync": (+1, "correlation of onsets of sound and motion at the best offset"),
    "sync_chance": (0, "what other offsets reach"),
    "sync_offset": (0, "seconds by which the sound is late there"),
    "av_align": (+1, "share of peaks of sound and motion with a partner"),
}


def find_clips(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """The clips of a folder by their names without suffix, in order.

    Raises:
      ValueError: it is no folder, or there are none.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of clips")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))  # one is half written
    found = {p.stem: p for p in files if p.suffix.lower() in SUFFIXES}
    if not found:
        raise ValueError(f"{folder}: there is no clip in it ({', '.join(SUFFIXES)})")
    return found


def measure_clip(
    path: str | os.PathLike, layout_name: str | None = None
) -> dict[str, float | None]:
    """The measures of `MEANINGS`, as far as the clip has what they need.

    The frames are read one after the other; the sound is held as a whole.

    Args:
      path: a file that FFmpeg reads, with or without sound.
      layout_name: of the blocks in which it was generated, for seams and clicks at their borders;
        "prefix", "merged", or None for a clip that was made as a whole.

    Raises:
      ValueError: no clip, too short a one, or blocks of that layout do not fit its frame rate.
    """
    about = media_files.describe_clip(path)
    rate = about.frame_rate
    frames = media_files.read_frames(path, rate)
    statistics = picture_statistics(frames, rate)
    count = len(statistics.thumbnails)
    borders = [] if layout_name is None else block_borders(layout_name, rate, count)
    found = measure_picture(statistics, borders)
    if about.has_sound:
        sound = media_files.read_sound(path)
        heard = measure_sound(sound.waveform, sound.sample_rate, [b / rate for b in borders])
        found |= heard | measure_synchrony(statistics, sound.waveform, sound.sample_rate)
    return {name: found.get(name) for name in MEANINGS}


def block_borders(layout_name: str, frame_rate: float, count: int) -> list[int]:
    """First pixel frame of every block but the first."""
    layout = BlockLayout.from_name(layout_name, frame_rate=frame_rate)
    firsts = map(layout.pixel_frames, itertools.count(1))
    return list(itertools.takewhile(lambda frame: frame < count, firsts))
