"""Measures of all clips of a folder, kept so that a clip is measured once."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import track

from omniforcing_jax.evaluation.clips import MEANINGS, measure_clip
from omniforcing_jax.io.paths import new_file

Measures = dict[str, dict[str, float | None]]  # by clip, by measure


@dataclasses.dataclass(frozen=True)
class Measurer:
    """Measures of a single clip.

    Attributes:
      name: of the folder in which they are kept.
      meanings: see `evaluation.clips.MEANINGS`.
      measure: called with the clip, the layout of its blocks (or None), and its prompt (or None if
        that is not known).
      reads_prompt: whether the prompt matters.
      version: what else they depend on, such as weights.
      threads: that may measure at the same time; None: one for each processor.
    """

    name: str
    meanings: Mapping[str, tuple[int, str]]
    measure: Callable[[pathlib.Path, str | None, str | None], dict[str, float | None]]
    reads_prompt: bool = False
    version: str = ""
    threads: int | None = None


def _measure_pixels(path: pathlib.Path, layout: str | None, prompt: str | None):
    return measure_clip(path, layout)


PIXELS = Measurer("pixels", MEANINGS, _measure_pixels)


def measure_folder(
    measurer: Measurer,
    clips: Mapping[str, pathlib.Path],
    layout: str | None,
    prompts: Mapping[str, str],
    kept: pathlib.Path,
    console: Console,
) -> Measures:
    """The measures of all clips, of which those that are kept, and still hold, are not made anew.

    Raises:
      ValueError: a clip cannot be measured.
    """
    kept.mkdir(parents=True, exist_ok=True)

    def measure(name: str) -> dict[str, float | None]:
        file, prompt = kept / f"{name}.json", prompts.get(name) if measurer.reads_prompt else None
        about = {"source": fingerprint(clips[name]), "layout": layout, "prompt": prompt}
        about |= {"names": list(measurer.meanings), "version": measurer.version}
        try:
            content = json.loads(file.read_text())
            if content["about"] == about:
                return content["measures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or not to the end
        found = measurer.measure(clips[name], layout, prompt)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps({"about": about, "measures": found}))
        return found

    with ThreadPoolExecutor(measurer.threads or os.cpu_count()) as pool:
        results = track(
            pool.map(measure, clips), f"{measurer.name} of {kept.name}", len(clips),
            console=console, transient=True,
        )  # fmt: skip
        return dict(zip(clips, results, strict=True))


def fingerprint(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def merged(parts: Iterable[Measures]) -> Measures:
    """Several measures of the same clips as one."""
    result: Measures = {}
    for part in parts:
        for clip, values in part.items():
            result.setdefault(clip, {}).update(values)
    return result
