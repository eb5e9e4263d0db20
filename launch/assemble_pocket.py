"""Puts the parts that launch.pretrain trained into one file in LTX-2's key layout.

    python -m launch.assemble_pocket --folder outputs/pocket --output ltx2.safetensors

The result is a checkpoint like any other: checkpoint_converters.ltx2 makes what the stages and
launch.stream take. With --causal-decoder, the video decoder is the one that was fine-tuned to run
causally, and the metadata say so. --vaes-only leaves transformer and connectors out, to judge what
the autoencoders lose before there is a teacher.
"""

import argparse
import pathlib
import sys

import ml_dtypes
import numpy as np

from checkpoint_converters import reading
from checkpoint_converters.safetensors_io import ConversionError
from checkpoint_converters.writing import write_components

# component: part
SOURCES = {
    "transformer": "teacher",
    "connectors": "teacher",
    "video_vae": "video_vae",
    "audio_vae": "audio_vae",
    "vocoder": "vocoder",
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def assemble(
    folder: pathlib.Path,
    output: pathlib.Path,
    *,
    causal_decoder: bool = False,
    vaes_only: bool = False,
    dtype: str = "float32",
) -> None:
    """Writes one file from the parts of a folder.

    Raises:
      ConversionError: a part is missing or does not fit the others.
    """
    sources = dict(SOURCES)
    if vaes_only:
        del sources["transformer"], sources["connectors"]
    if causal_decoder:
        sources["video_vae"] = "causal_decoder"
    files = {part: folder / f"{part}.safetensors" for part in dict.fromkeys(sources.values())}
    missing = [f"{file} is missing" for file in files.values() if not file.is_file()]
    if missing:
        raise ConversionError(
            [*missing, "python -m launch.pretrain --config=configs/pretrain.py:PART makes each"]
        )
    described = {part: reading.read_metadata(file) for part, file in files.items()}
    video = described[sources["video_vae"]]
    first = described["vocoder"]
    components = {
        name: reading.load_component(files[part], name, np.float32)
        for name, part in sources.items()
    }
    config = first["config"] | {"vae": video["config"]["vae"]}
    write_components(output, components, config, first["model_version"], dtype=DTYPES[dtype])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.assemble_pocket", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("outputs/pocket"))
    parser.add_argument("--output", type=pathlib.Path, required=True, help=".safetensors file")
    parser.add_argument("--causal-decoder", action="store_true", help="take the fine-tuned decoder")
    parser.add_argument("--vaes-only", action="store_true", help="no transformer, no connectors")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    args = parser.parse_args(argv)
    try:
        assemble(
            args.folder,
            args.output,
            causal_decoder=args.causal_decoder,
            vaes_only=args.vaes_only,
            dtype=args.dtype,
        )
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
