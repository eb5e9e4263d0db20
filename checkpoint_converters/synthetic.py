"""Random checkpoints in the official LTX-2 single-file layout, of any size.

    python -m checkpoint_converters.synthetic --size tiny --version 2.0 --output tiny.safetensors

With --upsampler, it is a latent upsampler for the checkpoint of that size, in its own layout.
The weights are noise, but scaled so that activations stay finite and vary; a converted file runs
through every part of the system. Tensors are made and written one at a time.
"""

import json
import math
import os
import pathlib
import re
import sys
import zlib

import numpy as np

from checkpoint_converters.converting import DTYPE_CHOICES, stay_on_host
from checkpoint_converters.key_map import DIT, TEXT_PROJECTIONS
from checkpoint_converters.output import file_problems, write_file
from checkpoint_converters.published import published_config
from checkpoint_converters.safetensors_io import DTYPES as DTYPES_OF_FILES
from checkpoint_converters.safetensors_io import ConversionError
from checkpoint_converters.shapes import ANY, expected_shapes, model_shapes
from omniforcing_jax import programs
from omniforcing_jax.io import outputs
from omniforcing_jax.io.checkpoints import COMPONENTS
from omniforcing_jax.models.upsampler import UpsamplerConfig
from omniforcing_jax.types import DTYPES

PROGRAM = "checkpoint_converters.synthetic"
VERSIONS = {"2.0": "2.0.0", "2.3": "2.3.0", "2.5": "2.5.0"}

# The pocket model is taken through all stages on a CPU: the classes of LTX-2.0 with 8 times less
# compression in space, so that a clip of 64 x 48 pixels has 48 tokens per latent frame, and RoPE
# frequencies that suit its few tokens.
_POCKET = {
    "transformer": {
        "positional_embedding_theta": 300.0,
        "connector_num_learnable_registers": 16,
        "connector_positional_embedding_max_pos": [64],
    },
    "vae": {
        "encoder_blocks": [
            ["res_x", {"num_layers": 1}],
            ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}],
            ["compress_time_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 1}],
            ["compress_time_res", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}],
        ],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1}],
            ["compress_all", {"multiplier": 2, "residual": True}],
            ["res_x", {"num_layers": 1}],
            ["compress_time", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}],
            ["compress_time", {"multiplier": 1}],
            ["res_x", {"num_layers": 1}],
        ],
        "decoder_base_channels": 32,
        "spatial_padding_mode": "zeros",
    },
    "vocoder": {
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "upsample_rates": [8, 5, 4],
        "upsample_kernel_sizes": [16, 11, 8],
        "output_sampling_rate": 16000,
    },
}

# size: heads, head dims (video, audio), layers, text width, text states, latent channels,
# audio latent channels, audio VAE width, res blocks per VAE stage (None: as published),
# connector layers (None: as published), vocoder widths (None: as published), sections of the
# metadata that differ from the published ones (there is then a version 2.0 only)
SIZES = {
    "tiny": dict(heads=4, dims=(16, 8), layers=2, text=32, states=9, latent=8, z=2, ch=32,
                 res=1, connector_layers=1, wave=(64, 32)),
    "small": dict(heads=8, dims=(64, 32), layers=8, text=256, states=13, latent=32, z=4, ch=64,
                  res=2, connector_layers=2, wave=(256, 64)),
    "full": dict(heads=32, dims=(128, 64), layers=48, text=3840, states=49, latent=128, z=8,
                 ch=128, res=None, connector_layers=None, wave=(None, 512)),
    "pocket": dict(heads=4, dims=(32, 16), layers=6, text=64, states=2, latent=16, z=2, ch=16,
                   res=1, connector_layers=1, wave=(128, None), changes=_POCKET),
}  # fmt: skip


def metadata(
    size: str,
    version: str,
    num_layers: int | None = None,
    *,
    heads: int | None = None,
    dims: tuple[int, int] | None = None,
) -> dict:
    """The `config` object of a checkpoint of the given size ("full" is the published one).

    Args:
      size: a key of `SIZES`.
      version: a key of `VERSIONS`.
      num_layers, heads, dims: of the transformer, if other than the size's.

    Raises:
      ValueError: there is no such version of this size.
    """
    s = SIZES[size]
    newer = version != "2.0"
    if newer and "changes" in s:
        raise ValueError(f"size {size!r} is of version 2.0 only")
    config = published_config(version)
    heads, (video, audio) = heads or s["heads"], dims or s["dims"]
    transformer = config["transformer"]
    transformer |= {
        "num_layers": num_layers or s["layers"],
        "num_attention_heads": heads,
        "attention_head_dim": video,
        "cross_attention_dim": heads * video,
        "in_channels": s["latent"],
        "out_channels": s["latent"],
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio,
        "audio_cross_attention_dim": heads * audio,
        "audio_in_channels": s["z"] * 16,
        "audio_out_channels": s["z"] * 16,
        "caption_channels": s["text"],
        "connector_num_attention_heads": heads if newer else s["text"] // video,
        "connector_attention_head_dim": video,
    }
    if newer:
        transformer["audio_connector_num_attention_heads"] = heads
        transformer["audio_connector_attention_head_dim"] = audio
    vae = config["vae"]
    for name in ("latent_channels", "encoder_base_channels", "decoder_base_channels"):
        vae[name] = s["latent"]
    config["audio_vae"]["model"]["params"]["ddconfig"] |= {"z_channels": s["z"], "ch": s["ch"]}
    generators = config["vocoder"].values() if newer else [config["vocoder"]]
    for generator, width in zip(generators, s["wave"], strict=False):
        generator["upsample_initial_channel"] = width or generator["upsample_initial_channel"]
    if s["connector_layers"]:
        transformer["connector_num_layers"] = s["connector_layers"]
    for name, settings in vae["encoder_blocks"] + vae["decoder_blocks"]:
        if name == "res_x" and s["res"]:
            settings["num_layers"] = s["res"]
    for section, changes in s.get("changes", {}).items():
        config[section] |= changes
    return config


def write(
    path: str | os.PathLike,
    size: str = "tiny",
    version: str = "2.0",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    num_layers: int | None = None,
    components: tuple[str, ...] = COMPONENTS,
) -> dict:
    """Writes a random checkpoint.

    In "float8" the linear layers of all blocks but the first are scaled fp8, as in Lightricks' own
    files: beside each weight lie its scale and one for activations. All else is bfloat16.

    Args:
      path: file to create, `.safetensors`.
      size: a key of `SIZES`.
      version: a key of `VERSIONS`.
      seed: the weights are a function of seed and tensor name alone.
      dtype: "bfloat16", "float32" or "float8".
      num_layers: transformer layers, if other than the size's.
      components: those to write.

    Returns:
      The metadata's `config` object.

    Raises:
      ConversionError: there is no room for the file.
    """
    if size not in SIZES or version not in VERSIONS:
        raise ValueError(f"size must be one of {list(SIZES)}, version one of {list(VERSIONS)}")
    config = metadata(size, version, num_layers)
    features = SIZES[size]["text"] * SIZES[size]["states"]
    stored = DTYPE_CHOICES["bfloat16" if dtype == FLOAT8 else dtype]
    table = {
        key: (stored, tuple(features if n == ANY else n for n in shape))
        for component in components
        for key, shape in expected_shapes(config, component).items()
        # LTX-2.5 has them in the file of its text encoder
        if version != "2.5" or not key.startswith(TEXT_PROJECTIONS)
    }
    if dtype == FLOAT8:
        for key in [key for key in table if _QUANTISED.fullmatch(key)]:
            table[key] = (DTYPES_OF_FILES["F8_E4M3"], table[key][1])
            for name in ("weight_scale", "input_scale"):
                table[f"{key.removesuffix('weight')}{name}"] = (np.dtype(np.float32), ())
    strings = {
        "config": json.dumps(config),
        "model_version": VERSIONS[version],
        "license": "random weights",
        outputs.MARK: PROGRAM,
    }

    def make(key: str) -> np.ndarray:
        if key.endswith(_SCALES):
            weight = key.rpartition(".")[0] + ".weight"
            return np.full((), _scale(table[weight][1]), np.float32)
        shape = table[key][1]
        if not _QUANTISED.fullmatch(key) or dtype != FLOAT8:
            return _values(key, stored, shape, seed)
        values = _values(key, np.dtype(np.float32), shape, seed)
        values /= _scale(shape)
        return np.clip(values, -448, 448, out=values).astype(table[key][0])

    write_file(pathlib.Path(path).absolute(), table, strings, make)
    return config


FLOAT8 = "float8"
_SCALES = (".weight_scale", ".input_scale")
# linear layers of all blocks but the first; not the norms
_QUANTISED = re.compile(
    re.escape(DIT) + r"transformer_blocks\.[1-9]\d*\.\w+\.(to_\w+(\.0)?|net\.[02](\.proj)?)\.weight"
)


def _scale(shape: tuple[int, ...]) -> float:
    """Of weights N(0, 1/fan_in): nearly all lie within six standard deviations."""
    return 6 / math.sqrt(shape[-1]) / 448


def write_lora(
    path: str | os.PathLike,
    size: str = "tiny",
    version: str = "2.0",
    *,
    rank: int = 4,
    seed: int = 0,
) -> None:
    """Writes a random LoRA in the layout of LTX-2's trainer, for all attentions of the model.

    Args:
      path: file to create, `.safetensors`.
      size, version: of the model, see `write`.
      rank: width of the thin matrices.
      seed: the matrices are a function of seed and name alone.
    """
    table = {}
    for key, shape in expected_shapes(metadata(size, version), "transformer").items():
        if re.search(r"attn\d?\.to_(q|k|v|out\.0)\.weight$", key):
            layer = key.removeprefix("model.").removesuffix(".weight")
            table[f"{layer}.lora_A.weight"] = (DTYPE_CHOICES["bfloat16"], (rank, shape[1]))
            table[f"{layer}.lora_B.weight"] = (DTYPE_CHOICES["bfloat16"], (shape[0], rank))

    def make(key: str) -> np.ndarray:
        dtype, shape = table[key]
        return (noise(key, shape, seed) / math.sqrt(shape[1])).astype(dtype)

    write_file(pathlib.Path(path).absolute(), table, {"format": "pt"}, make)


def write_upsampler(
    path: str | os.PathLike,
    size: str = "tiny",
    version: str = "2.0",
    kind: str = "spatial",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> dict:
    """Writes a random upsampler; arguments as `write`.

    Args:
      kind: "spatial" (x2) or "temporal" (x2).

    Returns:
      The metadata's `config` object.

    Raises:
      ConversionError: there is no room for the file.
    """
    full = size == "full"
    config = {
        "_class_name": "LatentUpsampler",
        "in_channels": SIZES[size]["latent"],
        "mid_channels": 1024 if full else 32,
        "num_blocks_per_stage": 4 if full else 1,
        "dims": 3,
        "spatial_upsample": kind == "spatial",
        "temporal_upsample": kind == "temporal",
    }
    if kind == "spatial":
        config |= {"spatial_scale": 2.0, "rational_resampler": version == "2.0"}
    model = UpsamplerConfig.from_metadata(config)
    prefix = model.component + "."  # of our table; the file has none
    shapes = model_shapes(model.component, model)
    table = {
        key.removeprefix(prefix): (DTYPE_CHOICES[dtype], shape) for key, shape in shapes.items()
    }
    strings = {"config": json.dumps(config), "model_version": VERSIONS[version]}
    write_file(
        pathlib.Path(path).absolute(), table, strings, lambda key: _values(key, *table[key], seed)
    )
    return config


# at most so much noise is drawn and then repeated: drawing 19B weights would take an hour
_POOL = 1 << 22


def _values(key: str, dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of one tensor: N(0, 1/fan_in) weights, norms near 1, small biases and tables."""
    name = key.rsplit(".", 1)[-1]
    if key.endswith("std-of-means"):
        return np.ones(shape, dtype)
    if key.endswith("mean-of-means"):
        return np.zeros(shape, dtype)
    if name == "filter":  # low-pass of unit gain, as the anti-aliasing filters are
        return np.broadcast_to(_hann(shape[-1]), shape).astype(dtype)
    if name == "mel_basis":
        return np.full(shape, 1 / shape[-1], dtype)
    if "stft_fn" in key:
        return _stft_basis(shape).astype(dtype)
    if key.startswith("vae.decoder.") and name == "weight":
        return _smooth_conv(key, shape, seed).astype(dtype)
    if name == "kernel":  # of the rational resampler: binomial
        row = np.array([1, 4, 6, 4, 1]) / 16
        return np.broadcast_to(np.outer(row, row), shape).astype(dtype)
    mean, scale = 0.0, 0.05
    if re.search(r"(_norm|\.norm\d)\.weight$", key):
        mean = 1.0
    elif name == "weight":
        # a transposed convolution is stored as (in, out, k)
        fan_in = shape[0] if ".ups." in key else math.prod(shape[1:])
        scale = 1 / math.sqrt(fan_in)
    elif name in ("learnable_registers", "audio_sink_tokens"):
        scale = 1.0
    values = noise(key, shape, seed)
    values *= scale  # in place: the largest has gigabytes
    values += mean
    return values.astype(dtype)


def noise(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """N(0, 1) of the given shape, a function of key and seed; large tensors repeat themselves."""
    count = math.prod(shape)
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    return np.resize(rng.standard_normal(min(count, _POOL), np.float32), count).reshape(shape)


def _smooth_conv(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Video decoder weights that blur in space and time and mix channels at random.

    The pixels that one position turns into share their weights, so a random model shows drifting
    clouds of colour, in which a seam between blocks can be seen, and not grain.
    """
    outputs, inputs, *kernel = shape
    shared = 16 if "conv_out" in key else 8 if ".conv.conv." in key else 1
    if outputs % shared:
        shared = 1
    mix = noise(key, (outputs // shared, inputs), seed) / math.sqrt(inputs)
    blur = np.ones(())
    for size in kernel:
        blur = np.multiply.outer(blur, np.hanning(size + 2)[1:-1] / np.hanning(size + 2).sum())
    return np.multiply.outer(np.repeat(mix, shared, axis=0), blur).astype(np.float32)


def _hann(length: int) -> np.ndarray:
    window = np.hanning(length + 2)[1:-1].astype(np.float32)
    return window / window.sum()


def _stft_basis(shape: tuple[int, ...]) -> np.ndarray:
    """Windowed cosine rows, then sine rows: (2 * frequencies, 1, samples)."""
    rows, _, samples = shape
    angle = 2 * np.pi * np.outer(np.arange(rows // 2), np.arange(samples)) / samples
    basis = np.concatenate([np.cos(angle), -np.sin(angle)]) * np.hanning(samples)
    return basis[:, None].astype(np.float32)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.synthetic", __doc__)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--version", default="2.0", choices=list(VERSIONS))
    parser.add_argument("--output", required=True, type=pathlib.Path, help=".safetensors file")
    parser.add_argument("--dtype", default="bfloat16", choices=(*DTYPES, FLOAT8))
    parser.add_argument("--layers", type=int, help="transformer layers (default: the size's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one")
    parser.add_argument(
        "--upsampler", choices=("spatial", "temporal"), help="an upsampler for it, instead"
    )
    args = parser.parse_args(argv)
    if args.upsampler and args.dtype == FLOAT8:
        parser.error("upsamplers have no fp8 layout; leave out --dtype float8")
    stay_on_host()
    output = args.output.absolute()
    if problems := file_problems(output, args.overwrite, 0, PROGRAM):
        raise ConversionError(problems)
    common = {"seed": args.seed, "dtype": args.dtype}
    with programs.when_interrupted("nothing was written"):
        if args.upsampler:
            write_upsampler(args.output, args.size, args.version, args.upsampler, **common)
        else:
            write(args.output, args.size, args.version, num_layers=args.layers, **common)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
