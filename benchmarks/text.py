"""The text encoder's speed, what folding its projection saves, and what int8 costs in accuracy.

    python -m benchmarks.text --size tiny
    python -m benchmarks.text --size full --batch 8 --quantize int8       # on an accelerator
    python -m benchmarks.text --gemma gemma --checkpoint ltx2             # trained weights

Weights are random, unless converted folders are given. Prints and writes (`--output`) one JSON
object:

* `prompts_per_second`: prompts to contexts, after a warm-up, text padded to `--length`;
* `memory`: what the compiler reserves for temporaries, besides weights and results, to turn token
  ids into features, with the projection folded into the scan over the layers and with all hidden
  states of 1024 tokens stacked; nothing is allocated, any size can be asked for (`--memory-size`).
  Compiled in float32 on a CPU, which has no bfloat16 matrix product and would copy all weights;
* `accuracy`: relative error and cosine of features and contexts between compute dtypes and int8.
  Trained weights have outliers that random ones lack: give the folders for numbers to rely on.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from checkpoint_converters import synthetic, synthetic_gemma
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.models import quantization
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.text.encoder_files import EncoderFiles, boxed_tower, check_encoder
from omniforcing_jax.text.text_encoder import TextEncoder, boxed_connectors, layer_projections
from omniforcing_jax.text.tokenizer import load_tokenizer
from omniforcing_jax.types import DTYPES

PROGRAM = "benchmarks.text"
TRAINED_LENGTH = 1024  # tokens of a prompt, padding included


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--size", choices=tuple(synthetic_gemma.SIZES), default="tiny")
    add("--version", choices=tuple(synthetic.VERSIONS), default="2.0")
    add("--gemma", type=pathlib.Path, help="converted Gemma; with --checkpoint, instead of --size")
    add("--checkpoint", type=pathlib.Path, help="converted LTX-2 with connectors")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--quantize", choices=quantization.MODES, default="none")
    add("--batch", type=int, default=4)
    add("--length", type=int, default=TRAINED_LENGTH)
    add("--steps", type=int, default=5, help="batches timed")
    add("--memory-size", choices=tuple(synthetic_gemma.SIZES), default="full")
    add("--output", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if (args.gemma is None) != (args.checkpoint is None):
        parser.error("--gemma and --checkpoint belong together")
    return args


def configs(size: str, version: str) -> tuple[GemmaConfig, ConnectorConfig]:
    """Configurations of a size of `synthetic`."""
    transformer = synthetic.metadata(size, version)["transformer"]
    return (
        GemmaConfig.from_metadata(synthetic_gemma.text_config(size)),
        ConnectorConfig.from_metadata(transformer),
    )


def abstract(config: GemmaConfig, connectors: ConnectorConfig) -> tuple[dict, dict]:
    """Shapes of the parameters of the tower and of `TextConnectors`."""
    return nn.unbox((boxed_tower(config), boxed_connectors(connectors, config.num_states)))


_to_int8 = jax.jit(quantization.quantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _normal(key: jax.Array, shape: tuple[int, ...], mean, scale, dtype: jnp.dtype) -> jax.Array:
    noise = jax.random.normal(key, shape, jnp.bfloat16)
    return (mean + scale * noise).astype(jnp.bfloat16).astype(dtype)


def random_params(shapes: dict, norm_mean: float, dtype: jnp.dtype, quantize: str = "none") -> dict:
    """Random weights, one leaf at a time, the same whatever `dtype` and `quantize` are.

    Args:
      shapes: tree of arrays or their shapes.
      norm_mean: about what the norms' weights are: 1, or 0 where they act as 1 + w.
      dtype, quantize: of the result; the values are those of bfloat16.
    """

    def draw(path, leaf):
        name, label = path[-1].key, jax.tree_util.keystr(path)
        input_axis = quantization.INPUT_AXIS.get(name)
        mean, scale = (norm_mean, 0.1) if name == "scale" else (0.0, 0.1)
        if input_axis is not None:
            scale = leaf.shape[input_axis] ** -0.5
        elif name == "registers":
            scale = 1.0

        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(label.encode()))
        array = _normal(key, leaf.shape, mean, scale, dtype)
        if quantize == "int8" and input_axis is not None:
            array = _to_int8(array, input_axis)
        return jax.block_until_ready(array)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_encoder(args: argparse.Namespace, dtype: str, quantize: str) -> TextEncoder:
    """The encoder to measure: from the folders, or with random weights."""
    options = {"dtype": DTYPES[dtype], "quantize": quantize}
    if args.gemma is not None:
        return TextEncoder.load(args.gemma, args.checkpoint, **options, length=args.length)
    config, connectors = configs(args.size, args.version)
    tower, other = abstract(config, connectors)
    loaded = random_params(other, 1.0, DTYPES[dtype])
    params = {
        "tower": random_params(tower, 0.0, DTYPES[dtype], quantize),
        "projections": layer_projections(loaded, connectors),
        "connectors": {name: loaded[name] for name in ("video_connector", "audio_connector")},
    }
    with tempfile.TemporaryDirectory() as folder:
        synthetic_gemma.write_tokenizer(
            pathlib.Path(folder), synthetic_gemma.SIZES[args.size]["vocab"]
        )
        tokenizer = load_tokenizer(folder)
    version, weights = synthetic.VERSIONS[args.version], ("random", "random")
    files = EncoderFiles(config, connectors, tokenizer, args.length, version, weights)
    return TextEncoder(files, params, **options)


def prompts(count: int) -> list[str]:
    """Sentences of usual length, none twice."""
    sentences = synthetic_gemma.SENTENCES
    return [f"{i}. {sentences[i % len(sentences)]}" for i in range(count)]


def prompts_per_second(encoder: TextEncoder, batch: int, steps: int) -> float:
    """From prompts to contexts, tokeniser included, without compilation."""
    texts = prompts(batch)
    jax.block_until_ready(encoder.encode(texts).video_context)
    start = time.perf_counter()
    for _ in range(steps):
        result = encoder.encode(texts)
    jax.block_until_ready((result.video_context, result.audio_context))
    return batch * steps / (time.perf_counter() - start)


def temporaries(size: str, version: str, batch: int, dtype: jnp.dtype) -> dict:
    """Bytes of temporaries from token ids to features; see the module's docstring."""
    config, connectors = configs(size, version)
    tower, other = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract(config, connectors)
    )
    shape = (batch, TRAINED_LENGTH)
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    model, module = TextTower(config, dtype), TextConnectors(connectors, dtype)
    projections = jax.eval_shape(lambda params: layer_projections(params, connectors), other)

    def folded(tower, projections, ids, mask):
        arguments = (ids, mask, projections, connectors)
        return model.apply({"params": tower}, *arguments, method="features")

    def stacked(tower, other, ids, mask):
        states = model.apply({"params": tower}, ids, mask)
        return module.apply({"params": other}, states, mask, method="features")

    def measure(function, *arguments):
        analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    return {
        "size": size,
        "batch": batch,
        "length": TRAINED_LENGTH,
        "dtype": jnp.dtype(dtype).name,
        "folded_bytes": measure(folded, tower, projections, ids, mask),
        "stacked_bytes": measure(stacked, tower, other, ids, mask),
    }


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What an encoder makes of the prompts' tokens; the contexts without what were registers."""

    features: np.ndarray
    context: np.ndarray

    @classmethod
    def of(cls, args: argparse.Namespace, dtype: str, quantize: str) -> "Encoded":
        encoder = make_encoder(args, dtype, quantize)
        ids, mask = encoder.tokenizer.encode_batch(prompts(args.batch), args.length)
        features = encoder.features(ids, mask)
        context, _ = encoder.contexts(*features, mask)
        in_front = np.sort(mask, axis=1)[:, ::-1]  # where the connectors move the text
        result = cls(
            np.asarray(features[0], np.float32)[mask], np.asarray(context, np.float32)[in_front]
        )
        encoder.close()
        return result

    def against(self, reference: "Encoded") -> dict[str, float]:
        """Relative error |a - b| / |b| and cosine of features and contexts."""
        result = {}
        for name in ("features", "context"):
            a, b = (np.float64(getattr(x, name)).ravel() for x in (self, reference))
            result[f"{name}_relative_error"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
            result[f"{name}_cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        return result


def accuracy(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How much bfloat16 and int8 change the result."""
    with jax.default_matmul_precision("highest"):  # or GPUs and TPUs round what they multiply
        exact = Encoded.of(args, "float32", "none")
    half = Encoded.of(args, "bfloat16", "none")
    rounded = Encoded.of(args, "bfloat16", "int8")
    return {
        "bfloat16 against float32": half.against(exact),
        "int8 against bfloat16": rounded.against(half),
        "int8 against float32": rounded.against(exact),
    }


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    inputs = [args.gemma, args.checkpoint]
    outputs.check(args.output, program=PROGRAM, overwrite=True, inputs=inputs)
    if min(args.batch, args.length, args.steps) < 1:
        raise ValueError("--batch, --length and --steps must be at least 1")
    if args.gemma is None:
        tower = configs(args.size, args.version)[0]
    else:
        tower = check_encoder(args.gemma, args.checkpoint, length=args.length).config
    check_memory("a batch", tower.batch_bytes(args.batch, args.length, DTYPES[args.dtype]))
    on_cpu = jax.default_backend() == "cpu"
    encoder = make_encoder(args, args.dtype, args.quantize)
    speed = prompts_per_second(encoder, args.batch, args.steps)
    encoder.close()
    memory_dtype = jnp.float32 if on_cpu else DTYPES[args.dtype]
    result = {
        outputs.MARK: PROGRAM,
        "device": jax.devices()[0].device_kind,
        "size": args.size if args.gemma is None else str(args.gemma.name),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "batch": args.batch,
        "length": args.length,
        "prompts_per_second": speed,
        "memory": [
            temporaries(args.memory_size, args.version, batch, memory_dtype)
            for batch in sorted({1, args.batch})
        ],
        "accuracy": accuracy(args),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(args.output) as temporary:
            temporary.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
