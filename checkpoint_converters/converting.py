"""What all converters share: check everything, then stream into a folder that appears at once."""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint_converters import downloads, orbax_io, quantized
from checkpoint_converters.computed import ComputedTensor
from checkpoint_converters.output import appearing, folder_problems, progress_bar
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo, read_middle
from omniforcing_jax import programs
from omniforcing_jax.distributed import multihost
from omniforcing_jax.distributed.partitioning import parse_mesh
from omniforcing_jax.io import checksums, outputs
from omniforcing_jax.io.checkpoints import FORMAT, write_json
from omniforcing_jax.types import DTYPES

DTYPE_CHOICES = {"keep": None} | {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
SPLIT_AXES = ("fsdp", "tensor")
_SAMPLE_BYTES = 4096  # of each tensor that goes into a component's fingerprint


class ConversionPlan(NamedTuple):
    """A conversion whose inputs were found to be in order.

    Attributes:
      config_json: content of `config.json`.
      tensors: {official key: tensor} of the components to stream.
      components: those to stream.
      copies: {component: its folder} of an already converted checkpoint, copied as it is.
      copied_fingerprints: {component: fingerprint} of these.
      files: {name: what is in it} of other files that belong to the checkpoint; a path is copied.
      inputs: everything that was read, which the output must not touch.
      weights: files of weights, whose checksums may be known (`downloads`).
    """

    config_json: dict
    tensors: Mapping[str, TensorInfo]
    components: tuple[str, ...]
    copies: Mapping[str, os.PathLike] = {}
    copied_fingerprints: Mapping[str, str] = {}
    files: Mapping[str, pathlib.Path | bytes] = {}
    inputs: tuple[str | os.PathLike, ...] = ()
    weights: tuple[pathlib.Path, ...] = ()


def config_content(
    program: str,
    family: str,
    config: dict | None,
    files: Iterable[pathlib.Path],
    **entries: object,
) -> dict:
    """Content of `config.json` of a converted checkpoint, with the entries of its family."""
    source = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
    content = {"format": FORMAT, outputs.MARK: program, "family": family}
    return content | {"config": config, "source": source} | entries


def run(
    plan: ConversionPlan,
    problems: list[str],
    output: pathlib.Path,
    *,
    dtype: str = "keep",
    mesh: Mapping[str, int] | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    show_progress: bool = False,
    verify: bool = True,
) -> dict:
    """Writes a converted checkpoint, or raises and leaves nothing behind.

    With several JAX processes on a shared file system each writes its own share.

    Args:
      plan: what to write.
      problems: problems found so far; the output's are added.
      output: folder to create.
      dtype: "keep", "bfloat16" or "float32".
      mesh: {"fsdp": n, "tensor": m} to align the chunks with a later sharded restore.
      overwrite: replace an earlier conversion at `output`.
      allow_non_finite: write weights that are not finite as they are.
      show_progress: draw a progress bar.
      verify: hash files of weights whose checksum is known before anything is written.

    Returns:
      The content of `config.json`: the plan's, and "fingerprints".

    Raises:
      ConversionError: all problems at once.
      DiskFullError: a `ConversionError` as well; the disk was full, and nothing is left behind.
    """
    output = pathlib.Path(output).absolute()
    index, count, barrier = _processes()
    leaves: dict[str, list[orbax_io.Leaf]] = {}
    if not problems:  # otherwise the stacks may have holes
        leaves = {
            component: orbax_io.plan_leaves(plan.tensors, component, DTYPE_CHOICES[dtype], mesh)
            for component in plan.components
        }
    every = [leaf for group in leaves.values() for leaf in group]
    num_bytes = _copied_bytes(plan) + sum(leaf.num_bytes for leaf in every)
    program = plan.config_json.get(outputs.MARK, "")
    problems = problems + folder_problems(output, overwrite, num_bytes, program, plan.inputs)
    if not problems and verify:
        problems = downloads.damaged(plan.weights[index::count])
    if problems:
        raise ConversionError(problems)
    fingerprints = {component: fingerprint(group) for component, group in leaves.items()}
    content = plan.config_json | {"fingerprints": fingerprints | dict(plan.copied_fingerprints)}
    if scales := quantized.float8_scales(leaves.get("transformer", [])):
        content["float8"] = {"fingerprint": fingerprints["transformer"], "scales": scales}
    read_bytes = sum(source.info.num_bytes for leaf in every for source in leaf.sources)
    barrier("checked")
    show = show_progress and index == 0
    with appearing(output, owner=index == 0, barrier=barrier, num_bytes=num_bytes) as partial:
        with progress_bar(show, "converting", read_bytes // count) as advance:
            for component, group in leaves.items():
                orbax_io.write_component(
                    partial / component,
                    group,
                    advance=advance,
                    share=(index, count),
                    allow_non_finite=allow_non_finite,
                )
        if index == 0:
            _copy(plan, partial)
        barrier("copied")
        for component in leaves:
            checksums.write_part(partial / component, index, count)
        barrier("hashed")
        if index == 0:
            content |= {"checksums": _checksums(partial, leaves, plan)}
            write_json(partial / "config.json", content)
    return content


def _copied_bytes(plan: ConversionPlan) -> int:
    files = [f for folder in plan.copies.values()
             for f in pathlib.Path(folder).rglob("*") if f.is_file()]  # fmt: skip
    files += [file for file in plan.files.values() if isinstance(file, pathlib.Path)]
    return sum(file.stat().st_size for file in files)


def _copy(plan: ConversionPlan, output: pathlib.Path) -> None:
    """What is taken as it is: folders of components, and other files."""
    for component, folder in plan.copies.items():
        shutil.copytree(folder, output / component)
    for name, file in plan.files.items():
        (output / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())


def _checksums(folder: pathlib.Path, written: Iterable[str], plan: ConversionPlan) -> dict:
    """{component or other file: checksum}; copies must be what they were when they were written."""
    found = {component: checksums.write(folder / component) for component in written}
    for component in plan.copies:
        try:
            checksums.verify(folder / component)
        except checksums.DamagedFile as error:
            raise ConversionError([f"{plan.copies[component]}: {error}"]) from None
        found[component] = checksums.write(folder / component)
    names = list(plan.files)
    hashes = checksums.hash_files([folder / name for name in names])
    return found | dict(zip(names, hashes, strict=True))


def fingerprint(leaves: Iterable[orbax_io.Leaf]) -> str:
    """Tells the weights of a component apart from all others, without reading them in full.

    A hash of every tensor's name, place, shape and dtypes, and of 4 KiB from its middle: training a
    model further changes all of its tensors. What this gives is the same on any machine, and for
    any chunks.
    """
    digest = hashlib.sha256()
    for leaf in leaves:
        for source in leaf.sources:
            info = source.info
            what = [leaf.path, source.layer, list(info.shape), info.dtype_code, leaf.dtype.name]
            computed = isinstance(info, ComputedTensor)
            digest.update(json.dumps(what + info.recipe if computed else what).encode())
            for part in info.parts if computed else (info,):
                digest.update(read_middle(part, _SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _processes() -> tuple[int, int, Callable[[str], None]]:
    """(index, count, barrier) of the JAX processes; one if nobody started several."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return 0, 1, lambda name: None
    return jax.process_index(), jax.process_count(), multihost_utils.sync_global_devices


def stay_on_host() -> None:
    """Leaves accelerators, whose memory JAX would take, to others, unless JAX_PLATFORMS says so."""
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def add_input(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--input`, whose value is `source`; `text` is its help."""
    parser.add_argument(
        "--input", required=True, type=pathlib.Path, dest="source", metavar="INPUT", help=text
    )


def main(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    convert: Callable[..., dict],
    describe: Callable[[dict], str],
) -> int:
    """A converter's command: converts, prints what was written or everything that is wrong.

    Args:
      parser: has the converter's own arguments; those that all have are added.
      argv: words of the command line, None takes the process's.
      convert: called with all arguments by name, returns the content of config.json.
      describe: what to say of it.

    Returns:
      The exit status.
    """
    add = parser.add_argument
    add("--output", required=True, type=pathlib.Path, help="folder to create")
    add(
        "--dtype",
        default="keep",
        choices=list(DTYPE_CHOICES),
        help="dtype to store (default: that of the file; bfloat16 for what is quantised)",
    )
    add(
        "--mesh",
        default="",
        metavar="AXIS=SIZE,...",
        help="align the chunks with this mesh, e.g. fsdp=8 or fsdp=8,tensor=2; "
        "a restore on any other mesh works too, but reads more",
    )
    add("--overwrite", action="store_true", help="replace an earlier conversion")
    add("--no-verify", action="store_false", dest="verify", help="compare no known checksums")
    add("--allow-non-finite", action="store_true", help="convert weights with NaN or infinities")
    add(
        "--distributed",
        action="store_true",
        help="share the work among the processes of a jax.distributed launch (shared file system)",
    )
    add("--problems", type=pathlib.Path, metavar="FILE", help="where to list all that is wrong")
    args = vars(parser.parse_args(argv))
    full_list = args.pop("problems")
    try:
        args["mesh"] = parse_mesh(args["mesh"], SPLIT_AXES)
    except ValueError as error:
        parser.error(str(error))
    if args.pop("distributed"):
        multihost.join(multihost.find_job(True))
    else:
        stay_on_host()
    try:
        with programs.when_interrupted("nothing was written"):
            content = convert(**args, show_progress=True)
    except ConversionError as error:
        if full_list is not None:
            full_list.write_text("\n".join(error.problems) + "\n")
            error.add_note(f"all of it: {full_list}")
        elif error.shortened:
            error.add_note("--problems FILE writes the full list")
        raise
    print(f"{args['output']}: {describe(content)}")
    return 0
