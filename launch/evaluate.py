"""Samples the same prompts by several samplers, measures their clips, and compares them.

    python -m launch.evaluate --prompts prompts.txt --common="--text-encoder checkpoints/gemma3" \\
        --sampler "teacher=--checkpoint checkpoints/ltx2" \\
        --sampler "student=--checkpoint checkpoints/omniforcing" --output outputs/evaluation

A sampler is a command line of launch.stream, or for a bidirectional checkpoint of
launch.sample_teacher, without prompt, seed and output. Clips that are there already are measured by
their folders:

    python -m launch.evaluate teacher=outputs/teacher student=outputs/student \\
        --layout student=prefix --output outputs/evaluation

Clips of one name belong to one prompt and seed in all folders (0000.mp4, sample_0001.mp4, …); the
first folder, or else the first sampler, is the reference of the differences. Nothing is downloaded:
most measures need pixels and samples alone; 95 % intervals are by bootstrap over the clips. OUTPUT
gets the clips, table.md, table.json, and page.html, which shows the clips side by side. What has
been sampled and measured is kept there: the same command goes on, and makes only what is new or
changed, on several hosts with --distributed.

What the measures are blind to, and how to get those that need networks: docs/evaluation.md.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

import jax

from launch import compilation, network_measures, options, sampled_clips, shard_job
from launch.clip_measures import PIXELS, Measurer, Measures, measure_folder, merged
from launch.evaluation_table import compare, markdown, page, table_cells
from launch.sampled_clips import TIMINGS, Sampler
from launch.shard_job import ShardProgress
from omniforcing_jax import programs
from omniforcing_jax.blocks import LAYOUT_NAMES
from omniforcing_jax.distributed import multihost
from omniforcing_jax.evaluation.clips import find_clips
from omniforcing_jax.evaluation.published import PUBLISHED
from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.text import prompt_files

PROGRAM = "launch.evaluate"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("clips", nargs="*", type=_named, metavar="NAME=FOLDER", help="clips that are there already")
    layouts = "that these clips were streamed in, for seams: prefix or merged"
    add("--layout", nargs="+", type=_named, default=[], metavar="NAME=LAYOUT", help=layouts)
    add("--sampler", action="append", type=_named, default=[], metavar="NAME=OPTIONS",
        help="samples clips; may be repeated")  # fmt: skip
    add(
        "--samplers", type=pathlib.Path, metavar="FILE", help="of them, a line each; # is a comment"
    )
    add("--common", default="", metavar="OPTIONS", help="of all samplers")
    prompts = "of the clips: text with one a line, CSV, JSON lines, or a list in JSON"
    add("--prompts", type=pathlib.Path, metavar="FILE", help=prompts)
    add("--column", help="of CSV or JSON (default: caption, text, prompt or prompt_en)")
    add("--seed", type=int, default=0, help="of the first clip, the next has the next (default 0)")
    add("--output", type=pathlib.Path, required=True, help="folder of clips, tables and page")
    network_measures.add_options(parser)
    options.add_distributed(parser)
    compilation.add_option(parser)
    args = parser.parse_args(argv)
    if args.samplers:
        args.sampler += _read_samplers(args.samplers)
    names = [name for name, _ in (*args.clips, *args.sampler)]
    if not names:
        parser.error("give clips as NAME=FOLDER, or samplers as --sampler NAME=OPTIONS")
    if len(set(names)) < len(names):
        parser.error(f"two of them have one name: {', '.join(names)}")
    if args.sampler and not args.prompts:
        parser.error("--sampler needs --prompts FILE")
    args.clips, args.layout, args.sampler = map(dict, (args.clips, args.layout, args.sampler))
    for name, layout in args.layout.items():
        if name not in args.clips:
            parser.error(f"--layout {name}={layout}: the folders are {', '.join(args.clips)}")
        if layout not in LAYOUT_NAMES:
            parser.error(f"--layout {name}={layout}: layouts are {', '.join(LAYOUT_NAMES)}")
    return args


def _read_samplers(file: pathlib.Path) -> list[tuple[str, str]]:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    try:
        return [_named(line) for line in lines if line and not line.startswith("#")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{file}: {error}") from error


def _named(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not value or not re.fullmatch(r"[\w.+-]{1,60}", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, with a name as in a file's")
    return name, value


def make_samplers(args: argparse.Namespace, prompts: list[str]) -> list[Sampler]:
    """The samplers, checked; no weights are read.

    Raises:
      ValueError, OSError: what is wrong, and what would be right.
    """
    samplers = []
    for name, text in args.sampler.items():
        try:
            words = [*shlex.split(args.common), *shlex.split(text)]
        except ValueError as error:
            raise ValueError(f"{name}: {text!r} is no command line: {error}") from error
        samplers.append(sampled_clips.make_sampler(name, words, prompts, args.output))
    return samplers


def read_prompts(
    args: argparse.Namespace, folders: dict[str, dict[str, pathlib.Path]]
) -> dict[str, str]:
    """The prompt of each clip, in the order of the names that they have in the first folder.

    Raises:
      ValueError: another number of prompts than of clips in the first folder.
    """
    if args.prompts is None:
        return {}
    prompts = prompt_files.read_benchmark(args.prompts, args.column)
    names = [f"sample_{number:04d}" for number in range(len(prompts))]  # as JavisBench reads them
    if folders:
        names = list(next(iter(folders.values())))
    if len(prompts) != len(names):
        raise ValueError(
            f"{args.prompts} has {len(prompts)} prompts for {len(names)} clips; give one for each"
        )
    return dict(zip(names, prompts, strict=True))


def measure_all(
    args: argparse.Namespace,
    clips: dict[str, dict[str, pathlib.Path]],
    layouts: dict[str, str | None],
    prompts: dict[str, str],
    measurers: Sequence[Measurer],
    progress: ShardProgress,
) -> dict[str, list[Measures]]:
    """By all measurers; every process measures a share, and the first one has all."""

    def measure(name: str, measurer: Measurer, paths: dict[str, pathlib.Path]) -> Measures:
        kept = args.output / "measures" / measurer.name / name
        return measure_folder(measurer, paths, layouts[name], prompts, kept, progress.console)

    rank, processes = jax.process_index(), jax.process_count()
    if processes > 1:
        for name, paths in clips.items():
            for measurer in measurers:
                measure(name, measurer, dict(list(paths.items())[rank::processes]))
        multihost.barrier("measures")
    if rank > 0:
        return {}
    return {name: [measure(name, m, paths) for m in measurers] for name, paths in clips.items()}


def run(args: argparse.Namespace, progress: ShardProgress, *, further: Sequence[Measurer]) -> None:
    """Samples, measures, and writes the tables.

    Raises:
      ValueError, OSError: an argument or a clip is wrong.
    """
    folders = {name: find_clips(folder) for name, folder in args.clips.items()}
    prompts = read_prompts(args, folders)
    samplers = make_samplers(args, list(prompts.values()))
    network_measures.check(args)
    outputs.claim_folder(args.output, PROGRAM, [*args.clips.values(), args.prompts, args.samplers])
    compilation.use_cache(not args.no_compilation_cache)
    timings = sampled_clips.sample_missing(samplers, prompts, args.seed, progress)
    sampled = {s.name: {clip: s.clips / f"{clip}.mp4" for clip in prompts} for s in samplers}
    clips, layouts = folders | sampled, {name: args.layout.get(name) for name in folders}
    layouts |= {s.name: s.layout for s in samplers}
    reference = next(iter(clips))
    for name, paths in clips.items():
        if missing := clips[reference].keys() - paths.keys():
            progress.console.print(f"{name} lacks {len(missing)} clips of {reference}: compared "
                                   "where both have them")  # fmt: skip
    measurers = (PIXELS, *further, *network_measures.measurers(args))
    found = measure_all(args, clips, layouts, prompts, measurers, progress)
    if found:
        measured = {name: merged([*found[name], timings.get(name, {})]) for name in clips}
        meanings = {k: v for m in measurers for k, v in m.meanings.items()} | TIMINGS
        sets = network_measures.of_sets(args, clips, prompts)
        meanings |= network_measures.SET_MEANINGS
        write_tables(args, clips, prompts, compare(measured, meanings, sets), meanings)


def write_tables(args, clips, prompts, rows, meanings) -> None:
    """table.md, table.json and page.html; and the table on standard output."""
    head, body = table_cells(rows, list(clips), meanings)
    counts = {name: len(paths) for name, paths in clips.items()}
    outputs.save_markdown(markdown(head, body, counts), args.output / "table.md", PROGRAM)
    content = {
        outputs.MARK: PROGRAM,
        "clips": counts,
        "samplers": args.sampler,
        "rows": [dataclasses.asdict(row) for row in rows],
        "published": [row._asdict() for row in PUBLISHED],
    }
    with new_file(args.output / "table.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with new_file(args.output / "page.html") as temporary:
        temporary.write_text(page(head, body, clips, prompts, args.output))
    for cells in (head, *body):
        print("  ".join(f"{cell:<26}" for cell in cells[:-1]).rstrip())


@programs.entry
def main(argv: list[str] | None = None, further: Sequence[Measurer] = ()) -> int:
    """Entry point; returns the exit status.

    Args:
      argv: of the command line.
      further: more measures of the clips.
    """
    args = parse_arguments(argv)
    return shard_job.main(functools.partial(run, further=further), args, "sampling", "clips")


if __name__ == "__main__":
    sys.exit(main())
