"""Puts the parts that pocket.pretrain trained into one file in LTX-2's key layout.

    python -m pocket.assemble --folder outputs/pocket --output ltx2.safetensors
    python -m pocket.assemble --folder outputs/pocket --dtype bfloat16 \\
        --components transformer --output pocket/weights/teacher.safetensors
    python -m pocket.assemble --folder outputs/pocket --dtype bfloat16 \\
        --components connectors video_vae audio_vae vocoder \\
        --output pocket/weights/shared.safetensors

The result is a checkpoint like any other: checkpoint_converters.ltx2 makes what the stages and
launch.stream take, from one file or from several that hold some of the components each, so that
teacher and student, which differ in the transformer alone, share a file. With --causal-decoder, the
video decoder is the one that was fine-tuned to run causally, and the metadata say so. --teacher
takes another run's than FOLDER/teacher, such as experiments/40/base of pocket.experiments.
"""

import argparse
import pathlib
import sys

import numpy as np

from checkpoint_converters import reading
from checkpoint_converters.export import write_components
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.io.checkpoints import metadata_section
from omniforcing_jax.sampling.trained import ENTRY
from omniforcing_jax.types import DTYPES

PROGRAM = "pocket.assemble"
# component: part
SOURCES = {
    "transformer": "teacher",
    "connectors": "teacher",
    "video_vae": "video_vae",
    "audio_vae": "audio_vae",
    "vocoder": "vocoder",
}


def assemble(args: argparse.Namespace) -> None:
    """Writes one file from the parts of a folder, with the metadata of its components.

    Raises:
      ConversionError: a part is missing or does not fit the others.
    """
    folder, output = args.folder, args.output.absolute()
    if problems := outputs.problems(output, PROGRAM, overwrite=args.overwrite):
        raise ConversionError(problems)
    sources = {name: SOURCES[name] for name in args.components}
    if args.causal_decoder and "video_vae" in sources:
        sources["video_vae"] = "causal_decoder"
    names = {"teacher": args.teacher}
    files = {part: folder / f"{names.get(part, part)}.safetensors" for part in sources.values()}
    if found := outputs.overlap(output, files.values()):
        raise ConversionError([found])
    missing = [f"{file} is missing" for file in files.values() if not file.is_file()]
    if missing:
        command = "python -m pocket.pretrain --config=pocket/pretrain_config.py:PART makes each"
        raise ConversionError([*missing, command])
    config, trees = {}, {}
    for name, part in sources.items():
        metadata = reading.read_metadata(files[part])
        section = metadata_section(metadata["config"], name)
        # A student's transformer is described otherwise than the teacher's, so connectors that are
        # to go with either have a section of their own.
        alone = name == "connectors" and "transformer" not in sources
        config[name if alone else section] = metadata["config"][section]
        if name == "transformer" and ENTRY in metadata["config"]:
            config[ENTRY] = metadata["config"][ENTRY]
        trees[name] = reading.load_component(files[part], name, np.float32)
    version = metadata["model_version"]
    dtype = DTYPES[args.dtype]
    write_components(output, trees, config, version, dtype=dtype, program=PROGRAM)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("pocket.assemble", __doc__)
    add, all_of_them = parser.add_argument, tuple(SOURCES)
    add("--folder", type=pathlib.Path, default=pathlib.Path("outputs/pocket"))
    add("--output", type=pathlib.Path, required=True, help=".safetensors file")
    only = "only these (default: all)"
    add("--components", nargs="+", choices=all_of_them, default=all_of_them, help=only)
    add("--teacher", default="teacher", metavar="NAME", help="of its run (default: teacher)")
    add("--causal-decoder", action="store_true", help="take the fine-tuned decoder")
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--overwrite", action="store_true", help="replace an earlier one")
    args = parser.parse_args(argv)
    assemble(args)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
