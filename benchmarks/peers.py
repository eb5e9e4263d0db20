"""Our transformer and video decoder beside diffusers' LTX-2, with the same weights, on a CPU.

    python -m benchmarks.peers --sizes tiny mid --threads 1 2 --dtypes float32 bfloat16

diffusers makes a model of random weights and writes it, our converter's reader reads it. Both must
agree before anything is timed. A forward pass of the transformer is over a whole clip, with a
sampler's weights (`sampling.weights.per_layer`), as diffusers has no cache; the decoder decodes a
clip. Calls take turns; the ratio is that of a pair, theirs over ours, so that 2 says that ours
takes half the time. A number of threads has a process of its own, with as many processors. Needs
torch and diffusers (`pip install -e '.[test]'`).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from omniforcing_jax import programs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.ranges import Range
from omniforcing_jax.types import DTYPES

PROGRAM = "benchmarks.peers"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # relative: of bfloat16, of all its roundings
FPS = 24.0


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and a clip.

    Attributes:
      heads, dims: of both streams' attention; `layers` of it.
      latent, vae: channels of the latents, and of the decoder's stages from the outermost in.
      frames, audio_frames, height, width, text: of the clip, in latents and tokens.
    """

    heads: int
    dims: tuple[int, int]
    layers: int
    latent: int
    vae: tuple[int, int, int]
    frames: int
    audio_frames: int
    height: int
    width: int
    text: int


SIZES = {
    "tiny": Size(4, (16, 8), 2, 8, (16, 32, 64), 2, 9, 2, 2, 16),
    "small": Size(4, (64, 32), 4, 16, (16, 32, 64), 4, 26, 4, 6, 64),
    "mid": Size(16, (64, 32), 4, 32, (32, 64, 128), 4, 26, 8, 12, 128),  # 256 x 384, width 1024
}
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, theirs: a call that ends when it is done


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser(PROGRAM, __doc__)
    add = parser.add_argument
    count = programs.number(int, Range(1, 1000))
    add("--sizes", nargs="+", choices=tuple(SIZES), default=["tiny", "mid"])
    add("--threads", nargs="+", type=count, default=[1], help="processors (default 1)")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    add("--pairs", type=count, default=9, help="calls of each (default 9)")
    add("--output", type=pathlib.Path, help="JSON file; default: standard output alone")
    return parser.parse_args(argv)


def transformers(size: Size, folder: pathlib.Path, dtype: str) -> Pair:
    """A forward pass of both."""
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import LTX2VideoTransformer3DModel

    from checkpoint_converters.reading import load_component, read_metadata
    from omniforcing_jax.models.transformer import rope
    from omniforcing_jax.models.transformer.config import TransformerConfig
    from omniforcing_jax.models.transformer.model import Modality, Transformer
    from omniforcing_jax.sampling.weights import per_layer

    (video, audio), heads = size.dims, size.heads
    torch.manual_seed(0)
    theirs = LTX2VideoTransformer3DModel(
        in_channels=size.latent, out_channels=size.latent, audio_in_channels=size.latent,
        audio_out_channels=size.latent, num_attention_heads=heads, attention_head_dim=video,
        cross_attention_dim=heads * video, audio_num_attention_heads=heads,
        audio_attention_head_dim=audio, audio_cross_attention_dim=heads * audio,
        num_layers=size.layers, caption_channels=heads * video, rope_type="split",
    ).eval()  # fmt: skip
    _randomise(theirs)
    theirs.save_pretrained(folder / "transformer")
    metadata = read_metadata(folder)
    section = metadata["config"]["transformer"]
    config = TransformerConfig.from_metadata(section, metadata["model_version"])
    params = jax.tree.map(
        lambda x: jnp.asarray(x, DTYPES[dtype]), load_component(folder, "transformer")
    )
    params, model = per_layer(params), Transformer(config, DTYPES[dtype])
    tables = rope.clip_rope(
        config, video_frames=size.frames, audio_frames=size.audio_frames, height=size.height,
        width=size.width, frame_rate=FPS,
    )  # fmt: skip
    frames, audio_frames = jnp.arange(size.frames), jnp.arange(size.audio_frames)
    rng = np.random.default_rng(1)
    tokens = size.frames * size.height * size.width
    shapes = [(tokens, size.latent), (size.audio_frames, size.latent)]
    shapes += [(size.text, width) for width in config.text_dims]
    inputs = [rng.standard_normal((1, *shape), np.float32) for shape in shapes]
    sigma = np.full((1, 1), 0.7, np.float32)

    @jax.jit
    def forward(params, x, a, context, audio_context):
        streams = (
            Modality(x, sigma, tables.video_rope(frames), tables.video_cross_rope(frames), context),
            Modality(a, sigma, tables.audio_rope(audio_frames),
                     tables.audio_cross_rope(audio_frames), audio_context),
        )  # fmt: skip
        return model.apply({"params": params}, *streams)[0]

    theirs = theirs.to(getattr(torch, dtype))
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in inputs]
    arrays = [jnp.asarray(x) for x in inputs]
    step = torch.tensor([700.0])

    def call():
        with torch.no_grad():
            out = theirs(
                *tensors, timestep=step, audio_timestep=step, num_frames=size.frames,
                height=size.height, width=size.width, fps=FPS,
                audio_num_frames=size.audio_frames,
            )  # fmt: skip
        return out.sample.float().numpy(), out.audio_sample.float().numpy()

    return lambda: jax.block_until_ready(forward(params, *arrays)), call


def decoders(size: Size, folder: pathlib.Path, dtype: str) -> Pair:
    """Of a clip's video."""
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import AutoencoderKLLTX2Video

    from checkpoint_converters.reading import load_component, read_metadata
    from omniforcing_jax.models.video_vae import model as video_vae

    torch.manual_seed(0)
    theirs = AutoencoderKLLTX2Video(
        latent_channels=size.latent,
        block_out_channels=(*(2 * channels for channels in size.vae), 4 * size.vae[-1]),
        decoder_block_out_channels=size.vae, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(2,) * 4, decoder_causal=False,
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder / "vae")
    config = video_vae.VideoVAEConfig.from_metadata(read_metadata(folder)["config"]["vae"])
    params = load_component(folder, "video_vae")
    params = jax.tree.map(lambda x: jnp.asarray(x, DTYPES[dtype]), params)
    rng = np.random.default_rng(2)
    shape = (1, size.frames, size.height, size.width, size.latent)
    latents = rng.standard_normal(shape, np.float32)
    decode = jax.jit(lambda params, z: video_vae.decode(config, params, z, dtype=DTYPES[dtype]))
    theirs = theirs.to(getattr(torch, dtype))
    raw = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()).to(getattr(torch, dtype))

    def call():
        with torch.no_grad():
            return (np.moveaxis(theirs.decode(raw).sample.float().numpy(), 1, -1),)

    return lambda: (jax.block_until_ready(decode(params, latents)),), call


def _randomise(model: Any) -> None:
    """Weights of which no part is zero, or much larger than the others."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "table" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                p.normal_(mean=float("norm_" in name), std=0.2)


def compare(pair: Pair, pairs: int, dtype: str) -> dict[str, float]:
    """Times of both, in turns.

    Raises:
      ValueError: they do not agree.
    """
    ours, theirs = pair
    for mine, reference in zip(ours(), theirs(), strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float32) - reference) / np.linalg.norm(reference)
        if not error < TOLERANCE[dtype]:
            raise ValueError(f"ours is another result than diffusers': it is {error:.2g} away")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for call, found in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "ours_seconds": statistics.median(times[0]),
        "theirs_seconds": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
    }


def measure(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """All cases with so many threads, for which this process keeps to as many processors."""
    if hasattr(os, "sched_setaffinity"):  # before JAX counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import torch

    torch.set_num_threads(threads)
    rows = []
    for name in args.sizes:
        for dtype in args.dtypes:
            for part, make in (("transformer", transformers), ("decoder", decoders)):
                with tempfile.TemporaryDirectory() as folder:
                    pair = make(SIZES[name], pathlib.Path(folder), dtype)
                found = compare(pair, args.pairs, dtype)
                rows.append(
                    {"size": name, "part": part, "dtype": dtype, "threads": threads} | found
                )
                print(describe(rows[-1]), file=sys.stderr, flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """A line of text."""
    return (
        f"{row['size']:<6}{row['part']:<12}{row['dtype']:<9} {row['threads']} threads: "
        f"{1000 * row['ours_seconds']:8.1f} ms, diffusers {1000 * row['theirs_seconds']:8.1f} ms, "
        f"ratio {row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
    )


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    for library in ("torch", "diffusers"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"{library} is not installed: pip install -e '.[test]'")
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    if max(args.threads) > len(processors):
        raise ValueError(f"--threads {max(args.threads)}: there are {len(processors)} processors")
    if len(args.threads) == 1:
        rows = measure(args, args.threads[0])
    else:
        rows = [row for threads in args.threads for row in _in_process(args, threads)]
    if args.output:
        with new_file(args.output) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    else:
        print(json.dumps(rows, indent=1))
    return 0


def _in_process(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """`measure` in a process that has so many processors from its start on."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        words = ["--sizes", *args.sizes, "--threads", threads, "--dtypes", *args.dtypes]
        words += ["--pairs", args.pairs, "--output", file]
        command = [sys.executable, "-m", PROGRAM, *map(str, words)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


if __name__ == "__main__":
    sys.exit(main())
