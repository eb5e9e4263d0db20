"""Random checkpoints in the official LTX-2 single-file layout, of any size.

    python -m checkpoint_converters.synthetic --size tiny --version 2.0 --output tiny.safetensors

The weights are noise, but scaled so that activations stay finite and vary; a converted file runs
through every part of the system. Tensors are made and written one at a time.
"""

import argparse
import copy
import json
import math
import os
import pathlib
import sys
import zlib

import ml_dtypes
import numpy as np

from checkpoint_converters import shapes
from checkpoint_converters.converting import explaining_a_full_disk
from checkpoint_converters.key_map import COMPONENTS
from checkpoint_converters.safetensors_io import ConversionError, SafetensorsWriter

VERSIONS = {"2.0": "2.0.0", "2.3": "2.3.0"}

# the published metadata, without sizes
_TRANSFORMER = {
    "_class_name": "AVTransformer3DModel",
    "_diffusers_version": "0.25.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "causal_temporal_positioning": True,
    "connector_norm_output": True,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "frequencies_precision": "float64",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
_TRANSFORMER_23 = {
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_learnable_registers_std": 1,
    "text_encoder_norm_type": "per_token_rms",
}
_VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
}
_AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {
            "sampling_rate": 16000,
            "max_wav_value": 32768.0,
            "duration": 5.12,
            "stereo": True,
            "causal_padding": 3,
        },
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
_GENERATOR = {
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "stereo": True,
}
_SNAKE = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
_SCHEDULER = {
    "_class_name": "RectifiedFlowScheduler",
    "_diffusers_version": "0.25.1",
    "num_train_timesteps": 1000,
    "shifting": None,
    "base_resolution": None,
    "sampler": "LinearQuadratic",
}

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


def metadata(size: str, version: str, num_layers: int | None = None) -> dict:
    """The `config` object of a checkpoint of the given size ("full" is the published one).

    Args:
      size: a key of `SIZES`.
      version: "2.0" or "2.3".
      num_layers: transformer layers, if other than the size's.

    Raises:
      ValueError: there is no such version of this size.
    """
    s = SIZES[size]
    newer = version == "2.3"
    if newer and "changes" in s:
        raise ValueError(f"size {size!r} is of version 2.0 only")
    heads, (video, audio) = s["heads"], s["dims"]
    transformer = _TRANSFORMER | {
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
        "connector_num_layers": s["connector_layers"] or (8 if newer else 2),
    }
    if newer:
        transformer |= _TRANSFORMER_23 | {
            "audio_connector_num_attention_heads": heads,
            "audio_connector_attention_head_dim": audio,
        }
    audio_vae = copy.deepcopy(_AUDIO_VAE)
    audio_vae["model"]["params"]["ddconfig"] |= {"z_channels": s["z"], "ch": s["ch"]}
    config = {
        "transformer": transformer,
        "vae": _vae_metadata(s, newer),
        "audio_vae": audio_vae,
        "vocoder": _vocoder_metadata(s, newer),
        "scheduler": _SCHEDULER,
    }
    for section, changes in s.get("changes", {}).items():
        config[section] = config[section] | changes
    return config


def _vae_metadata(s: dict, newer: bool) -> dict:
    down = ["compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res"]
    if newer:
        up = ["compress_all", "compress_all", "compress_time", "compress_space"]
        layers, upper = (4, 6, 4, 2, 2), (2, 2, 4, 6, 4)
        factors, grow = (2, 1, 2, 2), (2, 2, 2, 1)
    else:
        up = ["compress_all"] * 3
        layers, upper = (4, 6, 6, 2, 2), (5, 5, 5, 5)
        factors, grow = (2, 2, 2), (2, 2, 2, 2)
    settings = {} if newer else {"inject_noise": False}
    encoder = [["res_x", {"num_layers": s["res"] or layers[0]}]]
    for name, factor, count in zip(down, grow, layers[1:]):
        encoder.append([name, {"multiplier": factor}])
        encoder.append(["res_x", {"num_layers": s["res"] or count}])
    decoder = [["res_x", {"num_layers": s["res"] or upper[0]} | settings]]
    for name, factor, count in zip(up, factors, upper[1:]):
        decoder.append([name, {"multiplier": factor} | ({} if newer else {"residual": True})])
        decoder.append(["res_x", {"num_layers": s["res"] or count} | settings])
    section = _VAE | {
        "latent_channels": s["latent"],
        "encoder_blocks": encoder,
        "decoder_blocks": decoder[::-1],
        "encoder_base_channels": s["latent"],
        "decoder_base_channels": s["latent"],
    }
    return section | ({"spatial_padding_mode": "zeros"} if newer else {})


def _vocoder_metadata(s: dict, newer: bool) -> dict:
    width, bwe_width = s["wave"]
    if not newer:
        return _GENERATOR | {
            "resblock": "1",
            "upsample_initial_channel": width or 1024,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [16, 15, 8, 4, 4],
            "output_sampling_rate": 24000,
        }
    return {
        "vocoder": _GENERATOR
        | _SNAKE
        | {
            "upsample_initial_channel": width or 1536,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": _GENERATOR
        | _SNAKE
        | {
            "upsample_initial_channel": bwe_width,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "apply_final_activation": False,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "hop_length": 80,
            "n_fft": 512,
            "win_size": 512,
            "num_mels": 64,
        },
    }


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

    Args:
      path: file to create, `.safetensors`.
      size: a key of `SIZES`.
      version: "2.0" or "2.3".
      seed: the weights are a function of seed and tensor name alone.
      dtype: "bfloat16" or "float32".
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
    table = {}
    for component in components:
        table |= shapes.expected_shapes(config, component)
    features = SIZES[size]["text"] * SIZES[size]["states"]
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    tensors = {
        key: (numpy_dtype, tuple(features if n == shapes.ANY else n for n in shape))
        for key, shape in table.items()
    }
    strings = {
        "config": json.dumps(config),
        "model_version": VERSIONS[version],
        "license": "random weights",
    }
    path = pathlib.Path(path).absolute()
    num_bytes = sum(math.prod(shape) for _, shape in tensors.values()) * numpy_dtype.itemsize
    with explaining_a_full_disk(path, path, num_bytes):
        try:
            with SafetensorsWriter(path, tensors, strings) as writer:
                for key, (_, shape) in tensors.items():
                    writer.write(key, _values(key, shape, seed, numpy_dtype))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return config


# at most so much noise is drawn and then repeated: drawing 19B weights would take an hour
_POOL = 1 << 22


def _values(key: str, shape: tuple[int, ...], seed: int, dtype: np.dtype) -> np.ndarray:
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
    mean, scale = 0.0, 0.05
    if "_norm.weight" in key:
        mean = 1.0
    elif name == "weight":
        # a transposed convolution is stored as (in, out, k)
        fan_in = shape[0] if ".ups." in key else math.prod(shape[1:])
        scale = 1 / math.sqrt(fan_in)
    elif name in ("learnable_registers", "audio_sink_tokens"):
        scale = 1.0
    return (mean + scale * noise(key, shape, seed)).astype(dtype)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_converters.synthetic",
        description="Writes a random LTX-2 checkpoint in the official single-file layout.",
    )
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--version", default="2.0", choices=list(VERSIONS))
    parser.add_argument("--output", required=True, type=pathlib.Path, help=".safetensors file")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, help="transformer layers (default: the size's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        write(
            args.output,
            args.size,
            args.version,
            seed=args.seed,
            dtype=args.dtype,
            num_layers=args.layers,
        )
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
