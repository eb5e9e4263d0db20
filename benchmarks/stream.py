"""How fast the streaming sampler is, at any size, with random weights.

    JAX_COMPILATION_CACHE_DIR=outputs/bench/xla python -m benchmarks.stream --size full \\
        --output outputs/bench

times the published 19B model as it streams by default (version 2.0, 512x768, four steps and the
refresh, window of 7 blocks, bfloat16); other sizes and settings likewise. It prints time to first
chunk with its parts, inter-chunk percentiles, FPS, real-time factor, deadline attainment, memory,
arithmetic and MFU, and where the time goes, and writes `result.json` and `row.md` to the folder:
first when the steady state is known, then again with whatever was measured after it, so that a run
that is cut off keeps the main row. Its programs are in the compilation cache for the next run, and
stderr says what it was doing. Sizes are those of `checkpoint_converters.synthetic`.

* The rolling cache is filled before any block is timed: chunks, parts and memory are those of a
  long stream. Memory in use is read after each block: of the device, or of this process where the
  device does not say. Its peak is that of the run so far, with compilation.
* Time to first chunk is that of a new stream, on an empty cache, with all programs compiled: from
  the prompt's text features to the first chunk that has frames and sound. It has the connectors and
  the text's keys and values (text), and the RoPE tables and the allocation of the cache (setup). It
  does not have Gemma, whose time `benchmarks.text` measures.
* A block's parts are told apart by waiting for each. What a block takes without that is measured in
  another stream: one by one, and each begun before the one before it is copied to the host.
* A block's time in the transformer is split in the refresh, with the write to the cache, which is
  timed as a program of its own, and denoising, which is the rest.
* Error at seams is measured up to size "small" unless it is asked for: it decodes a clip at once,
  which is long to compile for a large decoder and says little of random weights.

    python -m benchmarks.stream --size tiny --blocks 200 --height 128 --width 128

compares the last tenth of a long stream's blocks with the first one after the cache was filled
(blocks 189 to 208 with 9 to 28), in time and in memory in use. Beside the ratio stands the range of
the tenths in between, over the same first one: what stretches of this stream differ by anyway.
`result.json` has all of them in order, where a trend would show.
"""

import argparse
import dataclasses
import datetime
import functools
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import stream_report
from benchmarks.stream_report import block_seconds, measure_stream
from checkpoint_converters import synthetic
from launch import options
from omniforcing_jax import programs
from omniforcing_jax.io.checkpoints import TINY_DECODER
from omniforcing_jax.models import tiny_decoder
from omniforcing_jax.models.audio import bigvgan, vocoder
from omniforcing_jax.models.audio.vae import AudioDecoder
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.models.transformer.model import TextKV, Transformer, init_params
from omniforcing_jax.models.transformer.rope import ClipRope
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import Pipeline, PipelineConfig
from omniforcing_jax.sampling import flow, kv_cache, student, weights
from omniforcing_jax.sampling.kv_cache import CacheConfig, RollingCache, cache_bytes
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.scaling import flops
from omniforcing_jax.scaling.devices import check_memory, check_products, peak_flops
from omniforcing_jax.scaling.memory import peak_bytes
from omniforcing_jax.streaming.block_programs import jitted_prompt_kv
from omniforcing_jax.streaming.session import StreamingSession
from omniforcing_jax.streaming.video import StreamingVideoDecoder, seam_error, to_uint8
from omniforcing_jax.text import features as text_features
from omniforcing_jax.types import DTYPES, AVLatents

# All weights are cut from so many random numbers: to compile a generator for each of their shapes
# takes a minute or more, and to draw 3e9 numbers at once more memory than a stream, which would be
# the peak. It is a prime, so that no two rows of a kernel are the same.
POOL = 1_048_573


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.stream", __doc__)
    add = parser.add_argument
    add("--size", choices=tuple(synthetic.SIZES), default="tiny")
    add("--version", choices=tuple(synthetic.VERSIONS), default="2.0")
    add("--layers", type=int, help="transformer layers, if other than the size's")
    options.add_size(parser)
    add("--layout", choices=("prefix", "merged"), default="prefix")
    add("--sinks", type=int, default=0)
    options.add_cache(parser)
    options.add_cache_dtype(parser)
    add("--timesteps", type=float, nargs="+", default=list(flow.STUDENT_TIMESTEPS))
    add("--text-tokens", type=int, default=1024)
    add("--blocks", type=int, default=20, help="blocks timed after the cache is full")
    options.add_decoder(parser)
    options.add_dtype(parser)
    options.add_quantize(parser)
    options.add_attention(parser)
    parser.set_defaults(
        **{"height": 512, "width": 768, "fps": 24.0, "dtype": "bfloat16"},
        **{"window": 7, "anchors": 0, "positions": "relative", "decode": "window"},
    )
    seams = "blocks of the seam measurement; 0 skips it (default: 3, and 0 at size full)"
    add("--seam-blocks", type=int, help=seams)
    add("--peak-tflops", type=float, help="peak of the device, for MFU")
    add("--output", type=pathlib.Path, help="folder for result.json and row.md")
    return parser.parse_args(argv)


def random_transformer(model: Transformer, key: jax.Array) -> dict:
    """Random weights of any size in the model's dtype.

    The module's own `init` would draw 19B numbers in fp32 and hold them beside their bf16 copies.
    """
    return random_params(jax.eval_shape(lambda k: init_params(model, k), key), key, model.dtype)


def random_params(shapes: dict, key: jax.Array, dtype: jnp.dtype) -> dict:
    """Random weights of the given shapes, one array at a time.

    Kernels are N(0, 1 / fan_in), with their extent in space and time part of the fan-in, and tables
    start small as well: activations stay finite. The rest is what the modules start with.
    """
    pool = jax.random.normal(key, (POOL,))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    arrays, offset = [], 0
    for path, leaf in leaves:
        array = _constant(path[-1].key, leaf.shape, dtype)
        if array is None:
            # [..., in, out], or [layers, in, out]
            layers = leaf.shape[0] if any(entry.key == "blocks" for entry in path) else 1
            fan_in = leaf.size // layers // leaf.shape[-1]
            array = _cut(pool, offset % POOL, fan_in**-0.5, leaf.shape, dtype)
            offset += leaf.size
        arrays.append(array)
    return jax.tree.unflatten(tree, arrays)


def _constant(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array | None:
    """What a module's own `init` gives a parameter of this name; None where that is random."""
    match name:
        case "bias" | "alpha" | "beta" | "mean":
            return jnp.zeros(shape, dtype)
        case "scale" | "std":
            return jnp.ones(shape, dtype)
        case "filter":
            return bigvgan.kaiser_lowpass(None, shape, dtype)
        case "forward_basis":
            return bigvgan.fourier_basis(None, shape, dtype)
        case "mel_basis":  # all bins alike: the mean of the spectrum
            return jnp.full(shape, 1 / shape[-1], dtype)
    return None


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _cut(pool: jax.Array, offset: int, scale: float, shape: tuple[int, ...], dtype) -> jax.Array:
    """The pool's numbers from `offset` on, over and over, times `scale`."""
    index = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.asarray(offset, jnp.uint32)
    return (scale * pool[index % POOL]).astype(dtype).reshape(shape)


def random_pipeline(args: argparse.Namespace) -> Pipeline:
    """A pipeline with random weights, made on the device in the dtype they are used in."""
    dtype = DTYPES[args.dtype]
    check_products(args.quantize, jax.local_devices()[0].device_kind)
    metadata = synthetic.metadata(args.size, args.version, args.layers)
    config = PipelineConfig.from_metadata(metadata, synthetic.VERSIONS[args.version])
    if args.sinks:
        transformer = dataclasses.replace(config.transformer, num_audio_sinks=args.sinks)
        config = dataclasses.replace(config, transformer=transformer)
    pipeline = Pipeline(config, {}, dtype)
    _check_memory(args, pipeline)
    keys, model = jax.random.split(jax.random.key(0), 4), pipeline.transformer(args.attention)
    latents = jnp.zeros((1, 2, config.audio_vae.latent_bins, config.audio_vae.latent_channels))
    mel = jnp.zeros((1, 8, config.vocoder.mel_bins, vocoder.STEREO))
    vae = jax.eval_shape(functools.partial(video_vae.init_params, config.video_vae), keys[1])
    vae = {name: tree for name, tree in vae.items() if name != "encoder"}
    audio = jax.eval_shape(AudioDecoder(config.audio_vae).init, keys[2], latents)
    sound = jax.eval_shape(vocoder.vocoder_module(config.vocoder).init, keys[3], mel)
    width = config.transformer.audio_channels
    params = {
        "transformer": weights.per_layer(
            random_transformer(model, keys[0]),
            quantize=args.quantize,
            by_heads=weights.laid_out_for(jax.default_backend(), config.transformer),
        ),
        "video_vae": random_params(vae, keys[1], dtype),  # without its encoder, as loaded
        "audio_vae": {
            "decoder": random_params(nn.unbox(audio["params"]), keys[2], dtype),
            "per_channel_statistics": {
                "mean": jnp.zeros(width, dtype),
                "std": jnp.ones(width, dtype),
            },
        },
        "vocoder": random_params(nn.unbox(sound["params"]), keys[3], jnp.float32),
    }
    if args.decode == "tiny":
        tiny = TinyDecoderConfig(config.video_vae.latent_channels)
        pipeline = dataclasses.replace(
            pipeline, config=dataclasses.replace(config, tiny_decoder=tiny)
        )
        shapes = jax.eval_shape(functools.partial(tiny_decoder.init_params, tiny), keys[1])
        params[TINY_DECODER] = random_params(shapes, keys[1], dtype)
        del params["video_vae"]
    return dataclasses.replace(pipeline, params=jax.block_until_ready(params))


def _check_memory(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Raises ValueError where transformer, text and cache are more than a device has."""
    model, config = pipeline.transformer(args.attention), pipeline.config
    weights = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    text = args.text_tokens * sum(config.transformer.text_dims)
    numbers = text + sum(leaf.size for leaf in jax.tree.leaves(weights))
    rollout = rollout_config(args, config)
    sizes = {"batch": 1, "patches": rollout.patches, "dtype": model.dtype}
    cache = cache_bytes(rollout.cache, config.transformer, **sizes)
    check_memory("the stream", numbers * jnp.dtype(model.dtype).itemsize + cache)


def contexts(pipeline: Pipeline, args, prompt: str) -> tuple[jax.Array, jax.Array]:
    """Random text contexts of video and audio."""
    dims = pipeline.config.transformer.text_dims
    key = text_features.prompt_key(prompt)
    features = text_features.random_text_features(key, 1, args.text_tokens, dims)
    return features.video_context, features.audio_context


def text_kv(pipeline: Pipeline, args, config: RolloutConfig, prompt: str) -> TextKV:
    """Their keys and values, as a session has them."""
    return jitted_prompt_kv(
        pipeline.transformer(args.attention),
        pipeline.params["transformer"],
        *contexts(pipeline, args, prompt),
        levels=config.sigma_levels,
        dtype=config.cache.dtype,
    )


def make_session(
    pipeline: Pipeline,
    args,
    config: RolloutConfig,
    prompt: tuple[jax.Array, jax.Array],
    timings: bool = True,
) -> StreamingSession:
    """A session at its very beginning."""
    return pipeline.session(
        config,
        prompt,
        implementation=args.attention,
        max_blocks=None if args.positions == "relative" else 10 * args.blocks,
        decode_mode=args.decode,
        timings=timings,
        **options.decoder_settings(args),
    )


def time_to_first_chunk(pipeline: Pipeline, args, config: RolloutConfig) -> dict[str, float]:
    """Seconds from a prompt's contexts to the first chunk with frames and sound, and its parts.

    What the device still does for the setup when the host is through is in the part that follows.
    """
    prompt = jax.block_until_ready(contexts(pipeline, args, "first chunk"))
    start = time.perf_counter()
    session = make_session(pipeline, args, config, prompt)
    setup = time.perf_counter() - start
    parts = dict.fromkeys(("text", "generate", "decode_video", "decode_audio", "host"), 0.0)
    while True:
        chunk = session.step()
        for name in parts:
            parts[name] += getattr(chunk.timings, name)
        if chunk.frames.shape[1] > 1 and chunk.waveform.shape[1]:
            total = time.perf_counter() - start
            return {"total": total, "setup": setup, **parts, "blocks": session.num_blocks}


def connector_seconds(args: argparse.Namespace, repeats: int = 5) -> float:
    """Median wall seconds from a prompt's projected text features to its contexts."""
    transformer = synthetic.metadata(args.size, args.version)["transformer"]
    config, dtype = ConnectorConfig.from_metadata(transformer), DTYPES[args.dtype]
    module = TextConnectors(config, dtype)
    widths = (config.video_dim, config.audio_dim)
    features = [jnp.ones((1, args.text_tokens, width), dtype) for width in widths]
    mask = jnp.ones((1, args.text_tokens), bool)
    init = functools.partial(module.init, method="contexts")
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *features, mask)["params"])
    params = random_params(shapes, jax.random.key(0), dtype)
    connect = jax.jit(lambda p, *x: module.apply({"params": p}, *x, method="contexts"))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(connect(params, *features, mask))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("cache",))
def refresh_block(
    model: Transformer,
    params,
    cache: RollingCache,
    text: TextKV,
    rope: ClipRope,
    x0: AVLatents,
    noise: AVLatents,
    *,
    config: RolloutConfig,
) -> RollingCache:
    """The end of a block: refresh pass, and write of its K/V."""
    forward = student.bind(model, params, cache, rope, config, first=False)
    kv = student.refresh(forward, text, x0, noise, config)
    return kv_cache.write(cache, kv, config.patches, first=False)


def refresh_seconds(pipeline: Pipeline, args, config: RolloutConfig, repeats: int = 5) -> float:
    """Median wall seconds of `refresh_block`, on a full cache."""
    model, params = pipeline.transformer(args.attention), pipeline.params["transformer"]
    held = config.cache.capacity + 1
    cache = student.new_cache(model, config, 1, params).replace(num_blocks=jnp.int32(held))
    rope = config.rope(model, None if args.positions == "relative" else held + repeats + 1)
    text = text_kv(pipeline, args, config, "refresh")
    noise = student.block_noise(jax.random.key(0), held, config, model, 1, first=False)
    x0 = jax.tree.map(lambda n: n[0], noise)
    seconds = []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        cache = refresh_block(model, params, cache, text, rope, x0, noise, config=config)
        jax.block_until_ready(cache)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def measure_seams(
    pipeline: Pipeline, args, config: RolloutConfig, num_blocks: int
) -> dict[str, float]:
    """Error of the streamed decode at chunk borders over its median error, on the same latents."""
    model, layout = pipeline.transformer(args.attention), config.cache.layout
    latents = student.rollout(
        model,
        pipeline.params["transformer"],
        text_kv(pipeline, args, config, "seams"),
        config.rope(model, num_blocks),
        jax.random.key(0),
        config=config,
        num_blocks=num_blocks,
        batch=1,
    ).video
    video = latents.reshape(1, -1, config.height, config.width, latents.shape[-1])
    vae, params = pipeline.config.video_vae, pipeline.params["video_vae"]

    @jax.jit
    def decode(params, video):
        causal = args.decode == "causal"
        return to_uint8(video_vae.decode(vae, params, video, causal, pipeline.dtype))

    full = np.asarray(decode(params, video))[0]
    decoder = StreamingVideoDecoder(
        vae, params, mode=args.decode, dtype=pipeline.dtype, **options.decoder_settings(args)
    )
    state = decoder.init(1, args.height, args.width)
    ends = [layout.num_video_frames(1 + block) for block in range(num_blocks)]
    chunks = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        state, frames = decoder.push(state, video[:, start:end])
        chunks.append(np.asarray(frames)[0])
    chunks.append(np.asarray(decoder.flush(state)[1])[0])
    borders = np.cumsum([len(chunk) for chunk in chunks[:-1]]).tolist()
    borders = sorted({border for border in borders if 0 < border < len(full)})
    return seam_error(full, np.concatenate(chunks), borders)


def run(args: argparse.Namespace, report: Callable[[dict], None] = lambda result: None) -> dict:
    """All measurements of one configuration; `report` gets what is known whenever it is more.

    A session's cache is freed before the next one is made: memory is that of one stream.
    """
    progress("making the weights")
    pipeline = random_pipeline(args)
    config = rollout_config(args, pipeline.config)
    result = steady_state(pipeline, args, config)
    report(result)
    progress("timing the connectors")  # only now: a stream has none of their weights in memory
    connectors, first = connector_seconds(args), result["ttfc_seconds"]
    first = first | {part: first[part] + connectors for part in ("total", "text")}
    result = result | {"ttfc_seconds": first, "connector_seconds": connectors}
    progress("timing the parts of a block")
    parts = result["part_seconds"] | {"refresh": refresh_seconds(pipeline, args, config)}
    parts["denoise"] = parts["generate"] - parts["refresh"]
    result = result | {"part_seconds": parts}
    report(result)
    progress("beginning blocks before the ones before them are copied")
    prompt = contexts(pipeline, args, "ahead")
    session = make_session(pipeline, args, config, prompt, timings=False)
    measure_stream(session, config.cache.capacity + 1)
    result = result | {"block_seconds": block_seconds(session, args.blocks)}
    report(result)
    seam_blocks = args.seam_blocks
    if seam_blocks is None:
        seam_blocks = 0 if args.size == "full" else 3
    if seam_blocks and args.decode != "tiny":  # which has none
        progress("decoding a clip at once and in chunks")
        result = result | {"seams": measure_seams(pipeline, args, config, seam_blocks)}
        report(result)
    return result


def steady_state(pipeline: Pipeline, args, config: RolloutConfig) -> dict:
    """Start and long run of a stream, which all other measurements only explain."""
    fill = config.cache.capacity + 1
    prompt = contexts(pipeline, args, "steady state")
    progress("compiling every shape")
    measure_stream(make_session(pipeline, args, config, prompt), 4)
    progress("timing the first chunk")
    first = time_to_first_chunk(pipeline, args, config)
    progress(f"filling the cache with {fill} blocks")
    session = make_session(pipeline, args, config, prompt)
    measure_stream(session, fill)
    progress(f"timing {args.blocks} blocks")
    trace = measure_stream(session, args.blocks)
    peak_memory, memory_of = peak_bytes(jax.devices()[0])
    figures, counts = trace.figures(args.fps), arithmetic(pipeline, args, config)
    mfu, generate = None, figures["part_seconds"]["generate"]
    peak = 1e12 * (args.peak_tflops or 0) or peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        mfu = counts["transformer_flops_per_block"] / generate / peak
    return {
        "command": "python -m benchmarks.stream " + " ".join(_shown(args)),
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}",
        "ttfc_seconds": first,
        "connector_seconds": None,
        **figures,
        "peak_memory_bytes": peak_memory,
        "memory_of": memory_of,
        **counts,
        "mfu": mfu,
        "block_seconds": None,
        "seams": None,
    }


def arithmetic(pipeline: Pipeline, args, config: RolloutConfig) -> dict[str, float]:
    """Sizes of the model and its cache, and operations for a block while the cache is full."""
    model, layout = pipeline.config.transformer, config.cache.layout
    late, patches = config.cache.capacity + 1, config.patches
    cache_shape = {"batch": 1, "patches": patches, "dtype": pipeline.dtype, "per_layer": True}
    transformer = flops.block_flops(model, config, late, args.text_tokens)
    latents = layout.video_frames
    if args.decode == "window":
        latents += args.look_back + args.look_ahead + args.blend
    if pipeline.config.tiny_decoder is None:
        decoder = flops.video_decoder_flops(
            pipeline.config.video_vae, latents, args.height, args.width, continued=True
        )
    else:
        decoder = tiny_decoder.decoder_flops(pipeline.config.tiny_decoder, latents * config.patches)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(pipeline.params["transformer"])),
        "cache_bytes": cache_bytes(config.cache, model, **cache_shape),
        "flops_per_second_of_video": (transformer + decoder) / layout.block_seconds,
        "transformer_flops_per_block": transformer,
        "decode_flops_per_block": decoder,
    }


def progress(doing: str) -> None:
    """Says on stderr what comes next: a run that is cut off shows what took its time."""
    print(time.strftime("%H:%M:%S"), doing, file=sys.stderr, flush=True)


def rollout_config(args: argparse.Namespace, config: PipelineConfig) -> RolloutConfig:
    """The rollout that the command line describes."""
    height, width = config.check_size(args.height, args.width)
    layout = config.layout(args.layout, args.fps)
    return RolloutConfig(
        cache=CacheConfig(layout, args.window, args.anchors, args.positions, args.cache_dtype),
        sigmas=tuple(float(s) for s in flow.student_sigmas(args.timesteps)),
        height=height,
        width=width,
    )


def _shown(args: argparse.Namespace) -> list[str]:
    defaults = parse_arguments([])
    words = []
    for name, value in vars(args).items():
        if value != getattr(defaults, name) and name != "output":
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv)
    stream_report.check_folder(args.output)
    run(args, functools.partial(stream_report.publish, folder=args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
