"""What 8-bit weights and products cost: errors of the transformer's velocities, and of a stream.

    python -m benchmarks.precision tests/golden/ltx2*_tiny.safetensors \\
        pocket/weights/student.safetensors

prints two tables for each file of weights in the official layout, all compared with float32 and
unchanged weights. An error is the root mean square of the difference over that of what it is
compared with; it and the cosine are those of the stream, video or audio, that suffers more.

* Kernels rounded: of each kind of module alone, then of those that `--quantize` rounds, then of
  all. One forward pass of a clip of two blocks, at each of the student's noise levels.
* `--quantize`: the same pass, and the clean latents of a stream's first and last block, of which
  the last has left the window of two behind: what drifts shows there; then the same with
  `--cache-dtype int8`.

Latents and text are random; the files' weights are what matters.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from checkpoint_converters.reading import load_component, read_metadata
from omniforcing_jax import programs
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models import quantization
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow, student, weights
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.whole_clip import clip_velocity
from omniforcing_jax.text.features import random_text_features
from omniforcing_jax.types import AVLatents

SIDE = 4  # latents of height and width
BLOCKS, WINDOW = 8, 2
TEXT_TOKENS = 16
FORMATS = ("int8", "fp8")
# {kind of module: path of its kernels}
KINDS = {
    "self-attention": r"blocks/(video|audio)_attn/(q|k|v|out)/kernel",
    "attention to text": r"blocks/(video|audio)_text_attn/(q|k|v|out)/kernel",
    "attention between streams": r"blocks/(a2v|v2a)_attn/(q|k|v|out)/kernel",
    "feed-forward": r"blocks/(video|audio)_ff/(up|down)/kernel",
    "gates of attention": r"blocks/\w+/gate/kernel",
    "modulation": r"\w*adaln/\w+/kernel",
    "first and last": r"(video|audio)_(in|out|caption)(/\w+)?/kernel",
}
IN_LAYERS = tuple(KINDS)[:4]  # what --quantize rounds

# these programs run for milliseconds and compile for seconds
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.precision", __doc__)
    add = parser.add_argument
    add("weights", nargs="+", type=pathlib.Path, help="transformers, official layout")
    return parser.parse_args(argv)


def rounded(params: dict[str, Any], kinds: tuple[str, ...], name: str) -> tuple[dict, float]:
    """Parameters with the kernels of these kinds rounded, and their share of all numbers."""
    leaves, count = flatten_dict(params, sep="/"), 0
    for path, leaf in leaves.items():
        if any(re.fullmatch(KINDS[kind], path) for kind in kinds):
            array = quantization.quantize(leaf, -2, quantization.PRECISIONS[name])
            leaves[path] = quantization.dequantize(array, leaf.dtype)
            count += leaf.size
    return unflatten_dict(leaves, sep="/"), count / sum(leaf.size for leaf in leaves.values())


def inputs(config: TransformerConfig, clip: ClipGeometry, samples: int):
    """N(0, 1) latents of a clip, and text contexts."""
    video = clip.video_frames * clip.height * clip.width
    keys = jax.random.split(jax.random.key(0), 3)
    x = AVLatents(
        jax.random.normal(keys[0], (samples, video, config.video_channels)),
        jax.random.normal(keys[1], (samples, clip.audio_frames, config.audio_channels)),
    )
    text = random_text_features(keys[2], samples, TEXT_TOKENS, config.text_dims)
    return x, (text.video_context, text.audio_context)


@functools.partial(jit, static_argnums=(0, 5))
def velocities(model, params, x, sigma, contexts, clip) -> AVLatents:
    """Of a clip, compiled."""
    return clip_velocity(model, params, x, sigma, contexts, clip)


def error(found: AVLatents, expected: AVLatents) -> tuple[float, float]:
    """Relative root mean square error, and cosine, each of the stream where it is worse."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in ((found.video, expected.video), (found.audio, expected.audio))
    ]
    errors = [np.sqrt(np.square(a - b).sum() / np.square(b).sum()) for a, b in pairs]
    cosines = [(a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()) for a, b in pairs]
    return max(errors), min(cosines)


def stream(model: Transformer, params: dict, rollout: RolloutConfig, contexts):
    """Clean latents of each block of a stream, from weights per layer."""
    encode = jit(student.prompt_kv, static_argnums=0, static_argnames=("levels", "dtype"))
    step = jit(student.block_step, static_argnums=(0, 6), static_argnames="first")
    how = {"levels": rollout.sigma_levels, "dtype": rollout.cache.dtype}
    text = encode(model, params, *contexts, **how)
    cache = student.new_cache(model, rollout, 1, params)
    rope, found = rollout.rope(model), []
    for block in range(BLOCKS):
        noise = student.block_noise(jax.random.key(1), block, rollout, model, 1, first=block == 0)
        trace, cache = step(model, params, cache, text, rope, noise, rollout, first=block == 0)
        found.append(jax.block_until_ready(trace.x0))
    return found


def tables(file: pathlib.Path) -> None:
    """Prints both tables of a file."""
    metadata = read_metadata(file)
    config = TransformerConfig.from_metadata(
        metadata["config"]["transformer"], metadata["model_version"]
    )
    params = jax.tree.map(jnp.asarray, load_component(file, "transformer", dtype=np.float32))
    model, layout = Transformer(config), BlockLayout.prefix()
    sigmas = tuple(float(sigma) for sigma in flow.student_sigmas())
    clip = ClipGeometry.from_blocks(layout, 2, SIDE, SIDE)
    x, contexts = inputs(config, clip, len(sigmas) - 1)
    levels = jnp.asarray(sigmas[:-1])

    def velocity(changed: dict) -> AVLatents:
        return velocities(model, changed, x, levels, contexts, clip)

    expected = velocity(params)
    columns = " | ".join(f"{name}: error | cosine" for name in FORMATS)
    print(f"\n{file.name}\n\n| kernels rounded | share of the weights | {columns} |")
    print("| --- " * (2 + 2 * len(FORMATS)) + "|")
    rows = {kind: (kind,) for kind in KINDS}
    rows |= {"those in layers": IN_LAYERS, "all": tuple(KINDS)}
    for label, kinds in rows.items():
        cells = [label]
        for name in FORMATS:
            changed, share = rounded(params, kinds, name)
            cells += [] if len(cells) > 1 else [f"{share:.1%}"]
            cells += figures(*error(velocity(changed), expected))
        if share:
            print(f"| {' | '.join(cells)} |", flush=True)

    def prepared(quantize: str) -> dict:
        return weights.per_layer(jax.tree.map(jnp.array, params), quantize=quantize)

    rollout = RolloutConfig(CacheConfig(layout, WINDOW), sigmas, SIDE, SIDE)
    one = jax.tree.map(lambda c: c[:1], contexts)
    plain = stream(model, prepared("none"), rollout, one)
    blocks = " | ".join(f"{which} block: error | cosine" for which in ("first", "last"))
    print(f"\n| `--quantize` | velocities: error | cosine | {blocks} | cache in int8, {blocks} |")
    print("| --- " * 11 + "|")
    in_int8 = dataclasses.replace(rollout, cache=CacheConfig(layout, WINDOW, dtype="int8"))
    for name in ("none", *quantization.PRECISIONS):
        changed = prepared(name)
        cells = [f"`{name}`", *figures(*error(velocity(changed), expected))]
        for how in (rollout, in_int8):
            found = stream(model, changed, how, one)
            cells += [c for i in (0, -1) for c in figures(*error(found[i], plain[i]))]
        print(f"| {' | '.join(cells)} |", flush=True)


def figures(relative: float, cosine: float) -> list[str]:
    """As cells of a table."""
    return [f"{relative:.4f}", f"{cosine:.6f}"]


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv)
    for file in args.weights:
        tables(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
