"""Speed and memory of the LTX-2 converter, beside a plain copy of the same file.

    python -m benchmarks.convert --folder /tmp/convert_benchmark --layers 2

Writes a random checkpoint with the keys and widths of LTX-2 19B but fewer layers (2 layers are
7.8 GB), copies it, converts it, prints MB/s of both and the converter's peak resident memory, and
deletes everything. Needs 2.1 times the file's size on disk. The page cache is dropped for the file
before each pass, where the system can do that (macOS cannot: what is in memory is read from there);
copy and conversion both end with their data on disk.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from checkpoint_converters import ltx2, synthetic
from checkpoint_converters.converting import parse_mesh
from omniforcing_jax import programs
from omniforcing_jax.scaling.memory import peak_resident_bytes

COPY_BYTES = 16 << 20


def forget(path: pathlib.Path) -> None:
    """Drops a file from the page cache, so that the next pass reads it from disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def copy_seconds(source: pathlib.Path, target: pathlib.Path) -> float:
    """Time of reading a file and writing it to disk again."""
    forget(source)
    start = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(COPY_BYTES):
            writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - start


def convert_here(source: pathlib.Path, target: pathlib.Path, mesh: str) -> dict[str, float]:
    """Converts in this process; {"seconds", "peak_bytes"}."""
    forget(source)
    start = time.perf_counter()
    ltx2.convert(source, target, mesh=ltx2.converting.parse_mesh(mesh))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes()}


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("benchmarks.convert", __doc__)
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="created, then deleted")
    parser.add_argument("--size", default="full", choices=list(synthetic.SIZES))
    parser.add_argument("--layers", type=int, default=2, help="transformer layers")
    parser.add_argument("--mesh", default="", help="as for checkpoint_converters.ltx2")
    parser.add_argument("--convert-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    parse_mesh(args.mesh)  # before a large file is written
    source, target = args.folder / "source.safetensors", args.folder / "converted"
    if args.convert_only:  # a process of its own, so that its peak memory is the converter's
        print(json.dumps(convert_here(source, target, args.mesh)))
        return 0
    args.folder.mkdir(parents=True)
    try:
        # in a process of its own as well: a process counts its parent's peak memory as its own
        write = [sys.executable, "-m", "checkpoint_converters.synthetic", "--output", str(source)]
        subprocess.run(
            [*write, "--size", args.size, "--layers", str(args.layers)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        num_bytes = source.stat().st_size
        copied = copy_seconds(source, args.folder / "copy")
        (args.folder / "copy").unlink()
        command = [
            sys.executable,
            "-m",
            "benchmarks.convert",
            *(sys.argv[1:] if argv is None else argv),
            "--convert-only",
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(f"file        {num_bytes / 1e9:8.2f} GB")
        print(f"plain copy  {num_bytes / 1e6 / copied:8.0f} MB/s")
        print(f"conversion  {num_bytes / 1e6 / result['seconds']:8.0f} MB/s")
        print(f"peak memory {result['peak_bytes'] / 2**30:8.2f} GiB")
    finally:
        shutil.rmtree(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
