"""LTX-2 weights -> Orbax.

    python -m checkpoint_converters.ltx2 --input ltx-2-19b-dev.safetensors --output ltx2

Reads the official single file (2.0, 2.3), shards with an index, or a diffusers folder, and writes
OUTPUT/config.json and one Orbax checkpoint per component. Several inputs of one release may be
given, each with some of the components. Students that were trained here and exported by
checkpoint_converters.export come back as what they were.

Of LTX-2.5, which is published in parts, the transformer (with `--components transformer`), the
convolutional video VAE and the audio VAE convert. Its text projections are in the file of its text
encoder, a Gemma 4, which is not implemented here.
"""

import argparse
import dataclasses
import pathlib
import sys

from checkpoint_converters import checks, converting, key_map
from checkpoint_converters.reading import Checkpoint, open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError


def convert(
    inputs: list[pathlib.Path] | pathlib.Path,
    output: pathlib.Path,
    *,
    components: tuple[str, ...] | None = None,
    model_version: str | None = None,
    dtype: str = "keep",
    mesh: dict[str, int] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> dict:
    """Converts an LTX-2 checkpoint.

    Args:
      inputs: file(s) or folder(s), see `reading.open_checkpoint`.
      output: folder to create.
      components: subset of `key_map.COMPONENTS`; None takes those that the inputs hold.
      model_version: e.g. "2.0.0", for files whose metadata does not say.
      dtype: "keep", "bfloat16" or "float32".
      mesh: {"fsdp": n, "tensor": m} to align the chunks with a later sharded restore.
      overwrite: replace an earlier conversion at `output`.
      show_progress: draw a progress bar.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    inputs = [inputs] if isinstance(inputs, str | pathlib.Path) else list(inputs)
    checkpoint, problems = open_inputs(inputs, model_version)
    content = None
    taken: tuple[str, ...] = ()
    if checkpoint is not None:
        taken, found = check_components(checkpoint, components)
        problems += found
        config = dict(checkpoint.config or {})
        student = config.pop("student", None)  # of a file that checkpoint_converters.export wrote
        family = "omniforcing" if student and student["layout"] else "ltx2"
        content = converting.config_content(
            family, checkpoint.model_version, config, taken, checkpoint.files, student
        )
    plan = converting.Plan(content, checkpoint.tensors if checkpoint else {}, taken)
    return converting.run(
        plan,
        problems,
        output,
        dtype=converting.DTYPE_CHOICES[dtype],
        mesh=mesh,
        overwrite=overwrite,
        show_progress=show_progress,
    )


def open_inputs(
    inputs: list[pathlib.Path], model_version: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Reads all headers; (merged checkpoint or None if some could not be read, problems)."""
    opened, problems = [], []
    for path in inputs:
        try:
            checkpoint = open_checkpoint(path)
            version = checkpoint.model_version or model_version
            opened.append(dataclasses.replace(checkpoint, model_version=version))
        except ConversionError as error:
            problems += error.problems
    if problems:
        return None, problems
    return checks.merge(opened)


def check_components(
    checkpoint: Checkpoint, components: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[str]]:
    """(components to convert, problems with their tensors)."""
    there = checks.present_components(checkpoint.tensors)
    wanted = there if components is None else tuple(components)
    problems = [f"{checkpoint.path}: has no {name}" for name in wanted if name not in there]
    taken = tuple(name for name in wanted if name in there)
    if not there:
        problems.append(f"{checkpoint.path}: has no tensors of LTX-2")
    elif checkpoint.config:
        problems += checks.tensor_problems(checkpoint.tensors, checkpoint.config, taken)
    return taken, problems


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that both importing converters have."""
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to create")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=list(converting.DTYPE_CHOICES),
        help="dtype to store (default: that of the file)",
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=SIZE,...",
        help="align the chunks with this mesh, e.g. fsdp=8 or fsdp=8,tensor=2; "
        "a restore on any other mesh works too, but reads more",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="share the work among the processes of a jax.distributed launch (shared file system)",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_converters.ltx2",
        description="Converts LTX-2 weights (safetensors or diffusers) to Orbax.",
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=pathlib.Path,
        help=".safetensors file, .safetensors.index.json, or folder (shards or diffusers)",
    )
    parser.add_argument(
        "--components",
        nargs="+",
        choices=key_map.COMPONENTS,
        help="convert only these (default: all that the input holds); of LTX-2.5's transformer "
        "file: transformer, for its text projections are in another file, with a Gemma 4",
    )
    parser.add_argument(
        "--model-version", metavar="X.Y.Z", help="for files whose metadata does not say, e.g. 2.0.0"
    )
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    try:
        mesh = converting.parse_mesh(args.mesh)
    except ValueError as error:
        parser.error(str(error))
    converting.join_processes(args.distributed)
    return report(
        lambda: convert(
            args.input,
            args.output,
            components=args.components and tuple(args.components),
            model_version=args.model_version,
            dtype=args.dtype,
            mesh=mesh,
            overwrite=args.overwrite,
            show_progress=True,
        ),
        args.output,
    )


def report(work, output: pathlib.Path) -> int:
    """Runs `work`, prints what was written or everything that is wrong; the exit status."""
    try:
        content = work()
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    absent = [name for name in key_map.COMPONENTS if name not in content["components"]]
    print(f"{output}: LTX-2 {content['model_version']}, {', '.join(content['components'])}")
    if absent:
        print(f"not converted: {', '.join(absent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
