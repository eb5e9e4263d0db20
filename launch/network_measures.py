"""Measures that need weights: from folders and tools that the user names; nothing is downloaded."""

import argparse
import csv
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

from launch.clip_measures import Measurer, fingerprint
from omniforcing_jax.evaluation import distances, networks
from omniforcing_jax.io.paths import new_file

REAL = "real"
KINDS = ("fvd", "fad")  # of features, by the names that their Fréchet distances have
JAVISBENCH = {
    "ib_tv": (+1, "ImageBind, prompt and picture (JavisBench)"),
    "ib_ta": (+1, "ImageBind, prompt and sound (JavisBench)"),
    "ib_av": (+1, "ImageBind, sound and picture (JavisBench)"),
    "avh_score": (+1, "ImageBind, sound and each frame (JavisBench)"),
    "javis_score": (+1, "ImageBind, the worst of each stretch (JavisBench)"),
    "desync": (-1, "seconds, by Synchformer (JavisBench); stillness wins"),
}
_JAVIS_METRICS = ("imagebind-score", "av-score", "desync")
# as its README has them
_JAVIS_SETTINGS = ("--max_frames", "16", "--image_size", "224", "--max_audio_len_s", "4.0")
_JAVIS_MAIN = pathlib.Path("eval/javisbench/main.py")

SET_MEANINGS = {
    "fvd": (-1, "Fréchet distance of the pictures' features that were given"),
    "kvd": (-1, "kernel distance of the same"),
    "fad": (-1, "Fréchet distance of the sounds' features that were given"),
    "kad": (-1, "kernel distance of the same"),
    **JAVISBENCH,
}

SetValues = dict[str, dict[str, float]]  # by measure, by sampler


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of these measures."""
    group = parser.add_argument_group("measures with weights")
    add = group.add_argument
    add("--clip-model", type=pathlib.Path, metavar="FOLDER", help="for CLIP scores")
    add("--clap-model", type=pathlib.Path, metavar="FOLDER", help="for CLAP scores")
    add("--features", type=pathlib.Path, metavar="FOLDER",
        help="of fvd/NAME.npy [clips, features] and fvd/real.npy; fad/ likewise")  # fmt: skip
    add("--javisbench", type=pathlib.Path, metavar="FOLDER",
        help="clone of JavisVerse/JavisDiT, for ImageBind scores and DeSync")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Checks the options before anything is made.

    Raises:
      ValueError: what is missing, and how to get it.
    """
    if (args.clip_model or args.clap_model or args.javisbench) and not args.prompts:
        raise ValueError("CLIP, CLAP and JavisBench compare clips with prompts: give --prompts")
    for folder, kind in ((args.clip_model, "CLIP"), (args.clap_model, "CLAP")):
        if folder:
            networks.check_model(folder, kind)
    if args.features:
        read_features(args.features, ())
    if args.javisbench and not (args.javisbench / _JAVIS_MAIN).is_file():
        raise ValueError(
            f"{args.javisbench}: {_JAVIS_MAIN} is not there; get it by `git clone "
            "https://github.com/JavisVerse/JavisDiT` and install requirements/requirements-eval.txt"
            " into its own .venv (code Apache-2.0; its ImageBind weights are CC BY-NC-SA 4.0, for "
            "non-commercial use only; Synchformer's are MIT)"
        )


def measurers(args: argparse.Namespace) -> list[Measurer]:
    """Of single clips; reads the weights.

    Raises:
      ImportError, ValueError: see `evaluation.networks`.
    """
    found = []
    for name, folder, load, meaning in (
        ("clip", args.clip_model, networks.clip_score, "cosine of prompt and frames (CLIP)"),
        ("clap", args.clap_model, networks.clap_score, "cosine of prompt and sound (CLAP)"),
    ):
        if folder is None:
            continue
        score, column = load(folder), f"{name}_score"

        def measure(path, layout, prompt, score=score, column=column):
            return {column: None if prompt is None else score(path, prompt)}

        version = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        version = f"{os.path.abspath(folder)} {version}"
        meanings = {column: (+1, meaning)}
        found.append(Measurer(name, meanings, measure, True, version, threads=1))
    return found


def read_features(
    folder: pathlib.Path, samplers: tuple[str, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {"real" or sampler: [clips, features] float64}} of the files that are there.

    Raises:
      ValueError: there are none, none of real clips, or one is no such array.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind in KINDS:
        files = {name: folder / kind / f"{name}.npy" for name in (REAL, *samplers)}
        there = {name: file for name, file in files.items() if file.is_file()}
        if not (folder / kind).is_dir():
            continue
        if REAL not in there:
            raise ValueError(f"{folder / kind}: {REAL}.npy, the features of real clips, is missing")
        for name, file in there.items():
            array = np.load(file, allow_pickle=False)
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                raise ValueError(
                    f"{file}: {array.dtype} {list(array.shape)}, not [clips, features]"
                )
            found.setdefault(kind, {})[name] = array.astype(np.float64)
    if not found:
        raise ValueError(
            f"{folder}: no folder of features in it ({', '.join(KINDS)}); JavisBench's and "
            "av-benchmark's extractors make them, see docs/evaluation.md"
        )
    return found


def feature_distances(folder: pathlib.Path, samplers: tuple[str, ...]) -> SetValues:
    """Fréchet and kernel distances of each sampler's features from those of real clips."""
    values: SetValues = {}
    for kind, features in read_features(folder, samplers).items():
        real = features.pop(REAL)
        for name, own in features.items():
            kernel = f"k{kind[1:]}"
            values.setdefault(kind, {})[name] = distances.frechet_distance(real, own)
            values.setdefault(kernel, {})[name] = distances.kernel_distance(real, own)
    return values


def of_sets(
    args: argparse.Namespace,
    clips: Mapping[str, Mapping[str, pathlib.Path]],
    prompts: Mapping[str, str],
) -> SetValues:
    """The measures of all clips of a sampler together that were asked for."""
    values = feature_distances(args.features, tuple(clips)) if args.features else {}
    if args.javisbench:
        values |= javisbench(args.javisbench, clips, prompts, args.output / "javisbench")
    return values


def javisbench(
    checkout: pathlib.Path,
    clips: Mapping[str, Mapping[str, pathlib.Path]],
    prompts: Mapping[str, str],
    folder: pathlib.Path,
) -> SetValues:
    """ImageBind scores and DeSync by JavisBench's own program, with the Python of its .venv.

    Args:
      checkout: clone of JavisVerse/JavisDiT.
      clips: of each sampler, by name.
      prompts: of the clips.
      folder: for its results; what it has measured already it leaves out itself.

    Raises:
      ValueError: it failed; names its output.
    """
    values: SetValues = {}
    for sampler, paths in clips.items():
        own = (folder / sampler).absolute()
        results = own / "results.json"
        _link_clips(own, paths, prompts)
        python = checkout.absolute() / ".venv" / "bin" / "python"
        words = ["-m", "eval.javisbench.main", "--input_file", own / "prompts.csv"]
        words += ["--infer_data_dir", own / "clips", "--output_file", results]
        words += [*_JAVIS_SETTINGS, "--metrics", *_JAVIS_METRICS]
        log = own / "log.txt"
        with log.open("w") as file:
            command = [
                str(word) for word in (python if python.is_file() else sys.executable, *words)
            ]
            done = subprocess.run(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise ValueError(f"JavisBench ended with status {done.returncode}; it said: {log}")
        for name, value in json.loads(results.read_text()).items():
            if name in JAVISBENCH:
                value = value["overall"] if isinstance(value, dict) else value
                values.setdefault(name, {})[sampler] = float(value)
    return values


def _link_clips(
    own: pathlib.Path, paths: Mapping[str, pathlib.Path], prompts: Mapping[str, str]
) -> None:
    """Clips and prompts as JavisBench reads them; its results for others are forgotten."""
    (own / "clips").mkdir(parents=True, exist_ok=True)
    names = [name for name in paths if name in prompts]
    known = {name: [prompts[name], fingerprint(paths[name])] for name in names}
    about = own / "about.json"
    if not about.exists() or json.loads(about.read_text()) != known:
        (own / "results.json").unlink(missing_ok=True)
    with new_file(about) as temporary:
        temporary.write_text(json.dumps(known))
    with new_file(own / "prompts.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text"], *(["", prompts[name]] for name in names)])
    for number, name in enumerate(names):
        for suffix in (".mp4", ".wav"):
            link = own / "clips" / f"sample_{number:04d}{suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(paths[name].with_suffix(suffix).absolute())
