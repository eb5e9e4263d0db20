"""Pictures that a client sends, decoded in a process of their own.

What decodes files of strangers may crash, or be made to use much memory or time: it is given
little of each, and nothing but the bytes.
"""

import asyncio
import contextlib
import io
import pathlib
import sys
import tempfile

import numpy as np

MEMORY = 2 << 30  # bytes of address space
SECONDS = 10
MOST_PIXELS = 64_000_000
_CHILD = """
import sys
from omniforcing_jax.serving.uploads import decode_standard_input
sys.exit(decode_standard_input())
"""


async def decode_image(data: bytes) -> np.ndarray:
    """The picture in a file's bytes, as `io.media_files.read_image` reads it.

    Returns:
      [H, W, 3] uint8.

    Raises:
      ValueError: it is no picture, too large a one, or takes too long.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _CHILD),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, problem = await asyncio.wait_for(process.communicate(data), SECONDS + 5)
    except TimeoutError:
        raise ValueError("the picture takes too long to be read") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        lines = problem.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if process.returncode == 1 and lines else "it cannot be decoded"
        raise ValueError(f"the picture was refused: {reason[:200]}")
    return np.load(io.BytesIO(output), allow_pickle=False)


def decode_standard_input() -> int:
    """Reads a file from standard input, writes the pixels as .npy, or one line to stderr."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    from PIL import Image

    from omniforcing_jax.io.media_files import read_image

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # an error from twice as many on
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "upload"
        file.write_bytes(sys.stdin.buffer.read())
        try:
            pixels = read_image(file)
        except Exception as error:
            print(str(error).replace(str(file), "the file"), file=sys.stderr)
            return 1
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    sys.stdout.buffer.write(buffer.getvalue())
    return 0
