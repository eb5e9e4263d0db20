"""How fast the streaming sampler is, at any size, with random weights.

    python -m benchmarks.stream --size full --version 2.0 --dtype bfloat16 --output outputs/bench

prints time to first chunk with its parts, inter-chunk percentiles, FPS, real-time factor, deadline
attainment, peak memory, arithmetic and MFU, and where the time goes; writes `result.json` and
`row.md`. Sizes are those of `checkpoint_converters.synthetic` ("full" is the published 19B).

The rolling cache is filled before anything is timed, so the numbers are those of a long stream.
The text part of the time to first chunk is that of the connectors and of the text's keys and
values; how long Gemma takes is what `benchmarks.text` measures.

    python -m benchmarks.stream --size tiny --blocks 200 --height 128 --width 128

also compares the last blocks of a long stream with the first ones after the cache was filled.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.memory import peak_resident_bytes
from checkpoint_converters import synthetic
from omniforcing_jax import flops, flow, rollout, text_features
from omniforcing_jax.kv_cache import CacheConfig, cache_bytes
from omniforcing_jax.models import video_vae, vocoder
from omniforcing_jax.models.audio_vae import AudioDecoder
from omniforcing_jax.models.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer import TextKV, Transformer, init_params
from omniforcing_jax.ops.attention import IMPLEMENTATIONS
from omniforcing_jax.pipeline import Pipeline, PipelineConfig
from omniforcing_jax.rollout import RolloutConfig
from omniforcing_jax.streaming import StreamingSession, Timings, encode_prompt
from omniforcing_jax.streaming_video import StreamingVideoDecoder, seam_error, to_uint8

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# Dense bf16 peak of one device, TFLOP/s, by a part of `device_kind` (vendors' data sheets).
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "v6": 918, "v5p": 459, "v5 lite": 197}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream")
    add = parser.add_argument
    add("--size", choices=tuple(synthetic.SIZES), default="tiny")
    add("--version", choices=tuple(synthetic.VERSIONS), default="2.0")
    add("--layers", type=int, help="transformer layers, if other than the size's")
    add("--height", type=int, default=512)
    add("--width", type=int, default=768)
    add("--fps", type=float, default=24.0)
    add("--layout", choices=("prefix", "merged"), default="prefix")
    add("--sinks", type=int, default=0)
    add("--window", type=int, default=7)
    add("--anchors", type=int, default=0)
    add("--positions", choices=("relative", "absolute"), default="relative")
    add("--timesteps", type=float, nargs="+", default=list(flow.STUDENT_TIMESTEPS))
    add("--text-tokens", type=int, default=1024)
    add("--blocks", type=int, default=20, help="blocks timed after the cache is full")
    add("--decode", choices=("window", "causal"), default="window")
    add("--look-back", type=int, default=4)
    add("--look-ahead", type=int, default=1)
    add("--blend", type=int, default=1)
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--attention", choices=IMPLEMENTATIONS, default="auto")
    add("--seam-blocks", type=int, default=3, help="blocks of the seam measurement; 0 skips it")
    add("--peak-tflops", type=float, help="peak of the device, for MFU")
    add("--output", type=pathlib.Path, help="folder for result.json and row.md")
    return parser.parse_args(argv)


def random_transformer(model: Transformer, key: jax.Array) -> dict:
    """Random weights of any size in the model's dtype.

    The module's own `init` would draw 19B numbers in fp32 and hold them beside their bf16 copies.
    """
    return random_params(jax.eval_shape(lambda k: init_params(model, k), key), key, model.dtype)


def random_params(shapes: dict, key: jax.Array, dtype: jnp.dtype) -> dict:
    """Random weights of the given shapes, one array at a time."""
    leaves, tree = jax.tree.flatten_with_path(shapes)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, scale):
        return scale * jax.random.normal(key, shape, dtype)

    arrays = []
    for i, (path, leaf) in enumerate(leaves):
        name = path[-1].key
        if name in ("bias", "scale"):
            fill = jnp.zeros if name == "bias" else jnp.ones
            arrays.append(fill(leaf.shape, dtype))
        else:
            # [in, out], or [layers, in, out]; tables [rows, width] start small as well
            arrays.append(draw(jax.random.fold_in(key, i), leaf.shape, leaf.shape[-2] ** -0.5))
    return jax.tree.unflatten(tree, arrays)


def random_pipeline(args: argparse.Namespace) -> Pipeline:
    """A pipeline with random weights, made on the device in the dtype they are used in."""
    dtype = DTYPES[args.dtype]
    metadata = synthetic.metadata(args.size, args.version, args.layers)
    config = PipelineConfig.from_metadata(metadata, synthetic.VERSIONS[args.version])
    if args.sinks:
        transformer = dataclasses.replace(config.transformer, num_audio_sinks=args.sinks)
        config = dataclasses.replace(config, transformer=transformer)
    pipeline = Pipeline(config, {}, dtype)

    def cast(tree, dtype=dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    model = pipeline.transformer(args.attention)
    params = {
        "transformer": random_transformer(model, jax.random.key(0)),
        "video_vae": jax.jit(lambda k: cast(video_vae.init_params(config.video_vae, k)))(
            jax.random.key(1)
        ),
    }
    latents = jnp.zeros((1, 2, config.audio_vae.latent_bins, config.audio_vae.latent_channels))
    audio = jax.jit(AudioDecoder(config.audio_vae).init)(jax.random.key(2), latents)
    width = config.transformer.audio_channels
    params["audio_vae"] = cast(
        {
            "decoder": nn.unbox(audio["params"]),
            "per_channel_statistics": {"mean": jnp.zeros(width), "std": jnp.ones(width)},
        }
    )
    mel = jnp.zeros((1, 8, config.vocoder.mel_bins, 2))
    module = vocoder.vocoder_module(config.vocoder)
    params["vocoder"] = nn.unbox(jax.jit(module.init)(jax.random.key(3), mel)["params"])
    return dataclasses.replace(pipeline, params=params)


def contexts(pipeline: Pipeline, args, prompt: str) -> tuple[jax.Array, jax.Array]:
    """Random text contexts of video and audio."""
    dims = pipeline.config.transformer.text_dims
    key = text_features.prompt_key(prompt)
    features = text_features.random_text_features(key, 1, args.text_tokens, dims)
    return features.video_context, features.audio_context


def text_kv(pipeline: Pipeline, args, config: RolloutConfig, prompt: str) -> TextKV:
    """Their keys and values, as a session has them."""
    return encode_prompt(
        pipeline.transformer(args.attention),
        pipeline.params["transformer"],
        *contexts(pipeline, args, prompt),
        levels=config.sigma_levels,
    )


def make_session(pipeline: Pipeline, args, config: RolloutConfig, prompt: str) -> StreamingSession:
    """A session at its very beginning."""
    return pipeline.session(
        config,
        contexts(pipeline, args, prompt),
        implementation=args.attention,
        max_blocks=None if args.positions == "relative" else 10 * args.blocks,
        decode_mode=args.decode,
        look_back=args.look_back,
        look_ahead=args.look_ahead,
        blend=args.blend,
    )


def time_to_first_chunk(session: StreamingSession) -> dict[str, float]:
    """Seconds from the prompt to the first chunk with frames and sound, and its parts."""
    parts = dict.fromkeys(("text", "generate", "decode_video", "decode_audio", "host"), 0.0)
    start = time.perf_counter()
    while True:
        chunk = session.step()
        for name in parts:
            parts[name] += getattr(chunk.timings, name)
        if chunk.frames.shape[1] > 1 and chunk.waveform.shape[1]:
            return {"total": time.perf_counter() - start, **parts, "blocks": session.num_blocks}


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


def measure_stream(
    session: StreamingSession, num_blocks: int
) -> tuple[list[int], list[Timings], np.ndarray]:
    """Runs blocks; returns frames, timings and wall seconds of each. Keeps no picture."""
    counts, timings, seconds = [], [], []
    for _ in range(num_blocks):
        start = time.perf_counter()
        chunk = session.step()
        seconds.append(time.perf_counter() - start)
        counts.append(chunk.frames.shape[1])
        timings.append(chunk.timings)
    return counts, timings, np.asarray(seconds)


def deadline_attainment(counts: list[int], seconds: np.ndarray, frame_rate: float) -> float:
    """Share of chunks ready before a player that starts with the first chunk runs dry."""
    ready = np.cumsum(seconds) - seconds[0]
    due = np.cumsum([0, *counts[:-1]]) / frame_rate
    return float(np.mean(ready <= due + 1e-9))


def refresh_seconds(pipeline: Pipeline, args, config: RolloutConfig, repeats: int = 5) -> float:
    """Median wall seconds of the refresh pass alone, on a full cache."""
    model = pipeline.transformer(args.attention)
    held = 2 + config.cache.anchor_blocks + config.cache.window
    cache = rollout.new_cache(model, config, 1).replace(num_blocks=jnp.int32(held))
    rope = config.rope(model, None if args.positions == "relative" else held + 1)
    text = text_kv(pipeline, args, config, "refresh")
    noise = rollout.block_noise(jax.random.key(0), held, config, model, 1, first=False)

    @jax.jit
    def refresh(params, cache, text, noise):
        forward = rollout.bind(model, params, cache, rope, config, first=False)
        x0 = jax.tree.map(lambda n: n[0], noise)
        return rollout.refresh(forward, text, x0, noise, config).audio

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(refresh(pipeline.params["transformer"], cache, text, noise))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def measure_seams(pipeline: Pipeline, args, config: RolloutConfig) -> dict[str, float]:
    """Error of the streamed decode at chunk borders over its median error, on the same latents."""
    model, layout = pipeline.transformer(args.attention), config.cache.layout
    latents = rollout.rollout(
        model,
        pipeline.params["transformer"],
        text_kv(pipeline, args, config, "seams"),
        config.rope(model, args.seam_blocks),
        jax.random.key(0),
        config=config,
        num_blocks=args.seam_blocks,
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
        vae,
        params,
        mode=args.decode,
        look_back=args.look_back,
        look_ahead=args.look_ahead,
        blend=args.blend,
        dtype=pipeline.dtype,
    )
    state = decoder.init(1, args.height, args.width)
    ends = [layout.num_video_frames(1 + block) for block in range(args.seam_blocks)]
    chunks = []
    for start, end in zip([0, *ends], ends):
        state, frames = decoder.push(state, video[:, start:end])
        chunks.append(np.asarray(frames)[0])
    chunks.append(np.asarray(decoder.flush(state)[1])[0])
    borders = np.cumsum([len(chunk) for chunk in chunks[:-1]]).tolist()
    borders = sorted({border for border in borders if 0 < border < len(full)})
    return seam_error(full, np.concatenate(chunks), borders)


def peak_memory_bytes() -> tuple[int, str]:
    """Peak bytes on the device, or of this process where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return peak_resident_bytes(), "process"


def peak_tflops(args) -> float | None:
    """Given on the command line, or known for this kind of device."""
    if args.peak_tflops:
        return args.peak_tflops
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), None)


def run(args: argparse.Namespace) -> dict:
    """All measurements of one configuration.

    A session's cache is freed before the next one is made: peak memory is that of one stream.
    """
    pipeline = random_pipeline(args)
    config = rollout_config(args, pipeline.config)
    layout = config.cache.layout
    fill = 1 + config.cache.anchor_blocks + config.cache.window + 1
    measure_stream(make_session(pipeline, args, config, "warm-up"), 4)  # compiles every shape
    first = time_to_first_chunk(make_session(pipeline, args, config, "first chunk"))
    session = make_session(pipeline, args, config, "steady state")
    measure_stream(session, fill)
    memory_early = peak_memory_bytes()[0]
    counts, timings, seconds = measure_stream(session, args.blocks)
    memory, memory_kind = peak_memory_bytes()
    model_flops = flops.block_flops(
        pipeline.config.transformer, config, session.num_blocks, args.text_tokens
    )
    del session
    connectors = connector_seconds(args)  # only now: a stream has none of their weights in memory
    first |= {part: first[part] + connectors for part in ("total", "text")}
    decode_frames = (
        8 * (args.look_back + layout.video_frames + args.look_ahead + args.blend - 1) + 1
    )
    if args.decode == "causal":
        decode_frames = 8 * layout.video_frames + 1
    decode_flops = video_vae.decoder_flops(
        pipeline.config.video_vae, decode_frames, args.height, args.width
    )
    parts = {
        name: float(np.median([getattr(t, name) for t in timings]))
        for name in ("generate", "decode_video", "decode_audio", "host")
    }
    parts["refresh"] = refresh_seconds(pipeline, args, config)
    parts["denoise"] = parts["generate"] - parts["refresh"]
    fps = sum(counts) / seconds.sum()
    peak = peak_tflops(args)
    tail = max(1, args.blocks // 10)
    return {
        "command": "python -m benchmarks.stream " + " ".join(_shown(args)),
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}",
        "parameters": sum(x.size for x in jax.tree.leaves(pipeline.params["transformer"])),
        "cache_bytes": cache_bytes(
            config.cache,
            pipeline.config.transformer,
            batch=1,
            patches=config.patches,
            dtype=pipeline.dtype,
        ),
        "ttfc_seconds": first,
        "chunk_seconds": {p: float(np.percentile(seconds, p)) for p in (50, 95, 99)},
        "fps": fps,
        "real_time_factor": fps / args.fps,
        "deadline_attainment": deadline_attainment(counts, seconds, args.fps),
        "part_seconds": parts,
        "peak_memory_bytes": memory,
        "peak_memory_of": memory_kind,
        "flops_per_second_of_video": (model_flops + decode_flops) / layout.block_seconds,
        "transformer_flops_per_block": model_flops,
        "decode_flops_per_block": decode_flops,
        "mfu": None if peak is None else model_flops / parts["generate"] / (peak * 1e12),
        "late_over_early_seconds": float(np.median(seconds[-tail:]) / np.median(seconds[:tail])),
        "late_over_early_memory": memory / memory_early,
        "seams": measure_seams(pipeline, args, config) if args.seam_blocks else None,
    }


def rollout_config(args: argparse.Namespace, config: PipelineConfig) -> RolloutConfig:
    """The rollout that the command line describes."""
    height, width = config.check_size(args.height, args.width)
    layout = config.layout(args.layout, args.fps)
    return RolloutConfig(
        cache=CacheConfig(layout, args.window, args.anchors, args.positions),
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


def markdown(result: dict) -> str:
    """One table row with its header."""
    p, t = result["part_seconds"], result["ttfc_seconds"]
    chunk = result["chunk_seconds"]
    mfu = "–" if result["mfu"] is None else f"{result['mfu']:.0%}"
    seams = "–"
    if result["seams"] is not None:
        seams = "{seam:.2g} / {median:.2g} = {ratio:.3g}".format(**result["seams"])
    cells = {
        "date": result["date"],
        "device": result["device"],
        "parameters": f"{result['parameters'] / 1e9:.3g} B",
        "FPS": f"{result['fps']:.1f}",
        "× real time": f"{result['real_time_factor']:.2f}",
        "TTFC (text + generate + video + sound) s": f"{t['total']:.2f} ({t['text']:.2f} + "
        f"{t['generate']:.2f} + {t['decode_video']:.2f} + {t['decode_audio']:.2f})",
        "chunk p50 / p95 / p99 s": " / ".join(f"{chunk[q]:.3f}" for q in (50, 95, 99)),
        "denoise / refresh / video / sound / host s": " / ".join(
            f"{p[k]:.3f}" for k in ("denoise", "refresh", "decode_video", "decode_audio", "host")
        ),
        "deadlines met": f"{result['deadline_attainment']:.0%}",
        "peak memory GiB": f"{result['peak_memory_bytes'] / 2**30:.1f}",
        "TFLOP per s of video": f"{result['flops_per_second_of_video'] / 1e12:.3g}",
        "MFU": mfu,
        "error at seams / median, grey levels": seams,
        "late / early time": f"{result['late_over_early_seconds']:.2f}",
        "late / early memory": f"{result['late_over_early_memory']:.2f}",
        "command": f"`{result['command']}`",
    }
    rows = [cells.keys(), ["---"] * len(cells), cells.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    result = run(args)
    print(json.dumps(result, indent=2))
    print(markdown(result))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.output / "row.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
