"""LTX-2 as diffusers stores it: its tensor names and configs in terms of the official single file.

diffusers writes one sub-folder per component, each with weights and a `config.json`. The tables
here rename the tensors to official keys; `metadata_of_folder` turns the configs into the JSON that
the official file carries in its header, so that everything downstream sees one format.
"""

import pathlib
import re

from checkpoint_converters.key_map import DIT
from checkpoint_converters.published import published_config
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax.io.checkpoints import read_json
from omniforcing_jax.models.transformer.config import FIXED_SETTINGS

# sub-folder of a diffusers model: component
DIFFUSERS_FOLDERS = {
    "transformer": "transformer",
    "connectors": "connectors",
    "vae": "video_vae",
    "audio_vae": "audio_vae",
    "vocoder": "vocoder",
}

# component: (prefix of the official key, ((pattern, replacement), ...)), all patterns are tried
DIFFUSERS_NAMES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "transformer": (
        DIT,
        (
            (r"^(audio_)?proj_in\.", r"\1patchify_proj."),
            (r"^(audio_)?time_embed\.", r"\1adaln_single."),
            (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
            (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
            (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
            (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
            (r"(video|audio)_a2v_cross_attn_scale_shift_table$", r"scale_shift_table_a2v_ca_\1"),
            (r"\.norm_([qk])\.", r".\1_norm."),
        ),
    ),
    "connectors": (
        "",
        (
            (r"^text_proj_in\.", "text_embedding_projection.aggregate_embed."),
            (r"^(video|audio)_text_proj_in\.", r"text_embedding_projection.\1_aggregate_embed."),
            (r"^(video|audio)_connector\.", DIT + r"\1_embeddings_connector."),
            (r"\.transformer_blocks\.", ".transformer_1d_blocks."),
            (r"\.norm_([qk])\.", r".\1_norm."),
        ),
    ),
    "video_vae": (
        "vae.",
        (
            (r"^latents_(mean|std)$", r"per_channel_statistics.\1-of-means"),
            (r"\.resnets\.", ".res_blocks."),
        ),
    ),
    "audio_vae": (
        "audio_vae.",
        ((r"^latents_(mean|std)$", r"per_channel_statistics.\1-of-means"),),
    ),
    "vocoder": (
        "vocoder.",
        (
            (r"(^|\.)upsamplers\.", r"\1ups."),
            (r"(^|\.)resnets\.", r"\1resblocks."),
            (r"(^|\.)conv_in\.", r"\1conv_pre."),
            (r"(^|\.)conv_out\.", r"\1conv_post."),
            (r"(^|\.)act_out\.", r"\1act_post."),
            (r"\.downsample\.filter$", ".downsample.lowpass.filter"),
        ),
    ),
}


def _official_stage(key: str, num_down: int) -> str:
    """Stage of the video VAE. diffusers groups a sampler with its resnets, official files do not.

    Encoder: stage 2i = resnets of group i, 2i+1 = its downsampler, the last = mid block.
    Decoder: stage 0 = mid block, 2i+1 = upsampler of group i, 2i+2 = its resnets.
    """
    match = re.match(r"(encoder|decoder)\.(mid_block|(?:down|up)_blocks\.(\d+))\.(\w+)\.(.*)", key)
    if match is None:
        return key
    coder, _, group, member, rest = match.groups()
    first = 0 if coder == "encoder" else 1
    if group is None:
        stage = 2 * num_down if coder == "encoder" else 0
    else:
        stage = 2 * int(group) + (member == "resnets" if first else member != "resnets") + first
    if member != "resnets":  # "downsamplers.0.conv" is "conv"
        rest = rest.removeprefix("0.")
        member = ""
    stages = "down_blocks" if coder == "encoder" else "up_blocks"
    return ".".join(part for part in (coder, stages, str(stage), member, rest) if part)


def official_from_diffusers(component: str, keys: list[str]) -> dict[str, str]:
    """{diffusers key: official key} for all keys of one diffusers sub-folder.

    The keys are needed together because the number of the encoder's last stage depends on how
    many stages there are. Unknown keys come out as unknown official keys.
    """
    prefix, renames = DIFFUSERS_NAMES[component]
    groups = [int(m[1]) for k in keys if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", k))]
    num_down = 1 + max(groups, default=-1)
    result = {}
    for key in keys:
        name = _official_stage(key, num_down) if component == "video_vae" else key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        result[key] = prefix + name
    return result


# -- configs -------------------------------------------------------------------------------------

# Settings that diffusers got with LTX-2.3 and later: the configs of LTX-2.0 were written before and
# lack them. Absent ones are the defaults of diffusers' classes, as they are for diffusers itself.
_ADDED_LATER: dict[str, dict] = {
    "transformer": {
        "gated_attn": False,
        "cross_attn_mod": False,
        "audio_gated_attn": False,
        "audio_cross_attn_mod": False,
        "use_prompt_embeddings": True,
        "ff_bias": True,
        "audio_ff_bias": True,
        "use_prompt_adaln_single": True,
        "use_keyframes_abs_pos_embedding": False,
    },
    "connectors": {
        "video_gated_attn": False,
        "audio_gated_attn": False,
        "per_modality_projections": False,
        "proj_bias": False,
    },
    "vae": {"upsample_type": ["spatiotemporal"] * 3},
    # of the vocoder without bandwidth extension; the one with it came with all of its settings
    "vocoder": {
        "act_fn": "leaky_relu",
        "antialias": False,
        "final_act_fn": "tanh",
        "final_bias": True,
    },
}
_VERSIONS = ("2.0", "2.3", "2.5")


def metadata_of_folder(path: pathlib.Path) -> tuple[dict, str]:
    """(config, model_version) in the official schema, derived from the sub-folders' configs.

    Sections of absent sub-folders are absent.

    Raises:
      ConversionError: a config is missing or unreadable, or says something that the official
        schema cannot express.
    """
    configs, problems = {}, []
    for folder in DIFFUSERS_FOLDERS:
        if not any((path / folder).glob("*.safetensors")):
            continue
        file = path / folder / "config.json"
        try:
            configs[folder] = read_json(file)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: cannot be read ({error}); diffusers writes it with the model")
    if problems:
        raise ConversionError(problems)
    # diffusers' own quantisation changes names and layouts in ways of the library it names
    problems += [
        f"{path / folder}: quantised by diffusers with {method!r}, which is not converted; use the "
        "bfloat16 folder, or the single file in scaled fp8"
        for folder, config in configs.items()
        if (method := (config.get("quantization_config") or {}).get("quant_method"))
    ]
    if problems:
        raise ConversionError(problems)
    sections = {
        "transformer": lambda: _transformer_section(
            configs.get("transformer"), configs.get("connectors")
        ),
        "vae": lambda: _video_vae_section(configs["vae"]),
        "audio_vae": lambda: _audio_vae_section(configs["audio_vae"]),
        "vocoder": lambda: _vocoder_section(configs["vocoder"]),
    }
    config: dict = {}
    for name, section in sections.items():
        if name in configs or (name == "transformer" and "connectors" in configs):
            try:
                config[name] = section()
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                lacks = "lacks " if isinstance(error, KeyError) else ""
                problems.append(f"{path / name / 'config.json'}: {lacks}{error}")
    stated = _stated_versions(configs)
    possible = [v for v in _VERSIONS if all(v in versions for versions, _ in stated.values())]
    if not possible:
        listing = ", ".join(
            f"{folder} is of {' or '.join(versions)} ({reason})"
            for folder, (versions, reason) in stated.items()
        )
        problems.append(
            f"{path}: components of different LTX-2 versions: {listing}. Their latents are "
            "different spaces; take all sub-folders from one version"
        )
    if problems:
        raise ConversionError(problems)
    return config, f"{possible[0]}.0"


def _stated_versions(configs: dict) -> dict[str, tuple[tuple[str, ...], str]]:
    """{sub-folder: (versions that it may be of, what tells)}; those that say nothing are absent.

    diffusers does not store a version; the architecture tells. What LTX-2.3 added is off where a
    config lacks it, as in those of LTX-2.0. The audio VAE is the same in all versions.
    """
    older, newer = _VERSIONS[:1], _VERSIONS[1:]
    settings = {
        "transformer": ("gated_attn", _VERSIONS[1:2]),
        "connectors": ("per_modality_projections", newer),
        "vocoder": ("bwe_hidden_channels", newer),
    }
    stated = {}
    for folder, (name, versions) in settings.items():
        if folder in configs:
            there = configs[folder].get(name, False)
            stated[folder] = (versions, f"has {name}") if there else (older, f"has no {name}")
    name = "use_keyframes_abs_pos_embedding"
    if configs.get("transformer", {}).get(name, False):
        stated["transformer"] = _VERSIONS[2:], f"has {name}"
    padding = configs.get("vae", {}).get("decoder_spatial_padding_mode")
    if versions := {"reflect": older, "zeros": newer}.get(padding):
        stated["vae"] = versions, f"decoder_spatial_padding_mode is {padding!r}"
    return stated


def _require(config: dict, **values) -> None:
    """Raises ValueError unless every named setting has the only value that can be expressed."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, only {value!r} is supported")


# settings of the transformer that both name alike, and {official name: diffusers' name}
_KEPT = (
    "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "in_channels",
    "audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim",
    "audio_in_channels", "caption_channels", "norm_eps", "rope_type", "timestep_scale_multiplier",
    "ff_bias", "use_keyframes_abs_pos_embedding",
)  # fmt: skip
_RENAMED = {
    "positional_embedding_theta": "rope_theta",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "apply_gated_attention": "gated_attn",
    "cross_attention_adaln": "cross_attn_mod",
}


def _transformer_section(t: dict | None, c: dict | None) -> dict:
    section = {"_class_name": "AVTransformer3DModel"}
    if t is not None:
        t = _ADDED_LATER["transformer"] | t
        _require(
            t, patch_size=1, patch_size_t=1, audio_patch_size=1, audio_patch_size_t=1,
            qk_norm="rms_norm_across_heads", norm_elementwise_affine=False, attention_bias=True,
            attention_out_bias=True, audio_ff_bias=True, causal_offset=1,
            activation_fn="gelu-approximate", use_prompt_adaln_single=True,
        )  # fmt: skip
        if t["gated_attn"] != t["audio_gated_attn"]:
            raise ValueError("gated_attn and audio_gated_attn differ")
        if t["cross_attn_mod"] != t["audio_cross_attn_mod"]:
            raise ValueError("cross_attn_mod and audio_cross_attn_mod differ")
        section |= FIXED_SETTINGS | {name: t[name] for name in _KEPT}
        section |= {official: t[name] for official, name in _RENAMED.items()}
        section |= {
            "out_channels": t["out_channels"] or t["in_channels"],
            "audio_out_channels": t["audio_out_channels"] or t["audio_in_channels"],
            "positional_embedding_max_pos": [
                t[name] for name in ("pos_embed_max_pos", "base_height", "base_width")
            ],
            "audio_positional_embedding_max_pos": [t["audio_pos_embed_max_pos"]],
            "frequencies_precision": "float64" if t["rope_double_precision"] else "float32",
            "caption_proj_before_connector": not t["use_prompt_embeddings"],
        }
    if c is not None:
        connectors = _connector_fields(c)
        for name in ("caption_channels", "caption_proj_before_connector"):
            if name in section and section[name] != connectors[name]:
                raise ValueError(f"{name} disagrees with the connectors' config.json")
        section |= connectors
    return section


def _connector_fields(c: dict) -> dict:
    c = _ADDED_LATER["connectors"] | c
    _require(c, proj_bias=c["per_modality_projections"])
    for name in ("num_layers", "num_learnable_registers"):
        if c[f"video_connector_{name}"] != c[f"audio_connector_{name}"]:
            raise ValueError(f"connectors: {name} differs between video and audio")
    if c["video_gated_attn"] != c["audio_gated_attn"]:
        raise ValueError("connectors: video_gated_attn and audio_gated_attn differ")
    fields = {
        "caption_channels": c["caption_channels"],
        "caption_proj_before_connector": c["per_modality_projections"],
        "use_embeddings_connector": True,
        "connector_num_layers": c["video_connector_num_layers"],
        "connector_num_attention_heads": c["video_connector_num_attention_heads"],
        "connector_attention_head_dim": c["video_connector_attention_head_dim"],
        "audio_connector_num_attention_heads": c["audio_connector_num_attention_heads"],
        "audio_connector_attention_head_dim": c["audio_connector_attention_head_dim"],
        "connector_num_learnable_registers": c["video_connector_num_learnable_registers"],
        "connector_positional_embedding_max_pos": [c["connector_rope_base_seq_len"]],
        "connector_norm_output": True,
        "connector_apply_gated_attention": c["video_gated_attn"],
    }
    # the official file has one entry each for the transformer and the connectors
    fields |= {
        "rope_type": c["rope_type"],
        "frequencies_precision": "float64" if c["rope_double_precision"] else "float32",
        "positional_embedding_theta": c["rope_theta"],
    }
    if c["per_modality_projections"]:
        newer = published_config("2.3")["transformer"]
        fields |= {
            name: newer[name]
            for name in (
                "text_encoder_norm_type",
                "caption_projection_first_linear",
                "caption_projection_second_linear",
                "caption_proj_input_norm",
            )
        }
    return fields


_SAMPLERS = {"spatial": "space", "temporal": "time", "spatiotemporal": "all"}


def _video_vae_section(v: dict) -> dict:
    v = _ADDED_LATER["vae"] | v
    _require(
        v, patch_size_t=1, timestep_conditioning=False, encoder_causal=True,
        encoder_spatial_padding_mode="zeros", scaling_factor=1.0,
    )  # fmt: skip
    if any(v["decoder_inject_noise"]):
        raise ValueError("decoder_inject_noise is set, which is not supported")
    channels = v["latent_channels"]  # diffusers gives the first stage this width
    encoder = []
    for count, kind, width in zip(v["layers_per_block"], v["downsample_type"],
                                  v["block_out_channels"], strict=False):  # fmt: skip
        encoder.append(["res_x", {"num_layers": count}])
        encoder.append([f"compress_{_SAMPLERS[kind]}_res", {"multiplier": width // channels}])
        channels = width
    encoder.append(["res_x", {"num_layers": v["layers_per_block"][-1]}])

    layers = v["decoder_layers_per_block"][::-1]
    factors, residuals = v["upsample_factor"][::-1], v["upsample_residual"][::-1]
    width = v["decoder_block_out_channels"][-1]
    decoder = [["res_x", {"num_layers": layers[0]}]]
    for i, kind in enumerate(v["upsample_type"]):
        if v["decoder_block_out_channels"][::-1][i] != width:
            raise ValueError("decoder_block_out_channels must follow upsample_factor")
        settings = {"multiplier": factors[i], "residual": bool(residuals[i])}
        decoder.append([f"compress_{_SAMPLERS[kind]}", settings])
        decoder.append(["res_x", {"num_layers": layers[i + 1]}])
        width //= factors[i]
    section = published_config("2.0")["vae"] | {
        "in_channels": v["in_channels"],
        "out_channels": v["out_channels"],
        "latent_channels": v["latent_channels"],
        "encoder_blocks": encoder,
        "decoder_blocks": decoder[::-1],  # official files list them from the pixels' side
        "patch_size": v["patch_size"],
        "causal_decoder": v["decoder_causal"],
        "encoder_base_channels": v["latent_channels"],
        "decoder_base_channels": width,
    }
    # the official default is zeros in the encoder, reflect in the decoder
    if v["decoder_spatial_padding_mode"] != "reflect":
        section["spatial_padding_mode"] = v["decoder_spatial_padding_mode"]
    return section


def _audio_vae_section(a: dict) -> dict:
    _require(a, is_causal=True)
    section = published_config("2.0")["audio_vae"]
    parameters, audio = section["model"]["params"], section["preprocessing"]
    parameters["sampling_rate"] = audio["audio"]["sampling_rate"] = a["sample_rate"]
    audio["audio"]["stereo"] = a["in_channels"] == 2
    audio["stft"]["hop_length"] = a["mel_hop_length"]
    audio["mel"]["n_mel_channels"] = a["mel_bins"]
    kept = ("double_z", "mel_bins", "resolution", "in_channels", "ch_mult", "num_res_blocks",
            "dropout", "mid_block_add_attention", "norm_type", "causality_axis")  # fmt: skip
    parameters["ddconfig"] |= {name: a[name] for name in kept} | {
        "z_channels": a["latent_channels"],
        "out_ch": a["output_channels"],
        "ch": a["base_channels"],
        "attn_resolutions": a["attn_resolutions"] or [],
    }
    return section


def _generator(v: dict, prefix: str = "") -> dict:
    snake = v[f"{prefix}act_fn"] == "snakebeta"
    section = {
        "resblock": "AMP1" if snake else "1",
        "stereo": v[f"{prefix}out_channels"] == 2,
        "upsample_initial_channel": v[f"{prefix}hidden_channels"],
        "upsample_rates": v[f"{prefix}upsample_factors"],
        "upsample_kernel_sizes": v[f"{prefix}upsample_kernel_sizes"],
        "resblock_kernel_sizes": v[f"{prefix}resnet_kernel_sizes"],
        "resblock_dilation_sizes": v[f"{prefix}resnet_dilations"],
    }
    if snake:
        section["activation"] = "snakebeta"
        section["use_bias_at_final"] = v[f"{prefix}final_bias"]
        section["use_tanh_at_final"] = v[f"{prefix}final_act_fn"] == "tanh"
    return section


def _vocoder_section(v: dict) -> dict:
    if "bwe_hidden_channels" not in v:
        v = _ADDED_LATER["vocoder"] | v
        _require(v, final_act_fn="tanh", final_bias=True, antialias=False)
        return _generator(v) | {"output_sampling_rate": v["output_sampling_rate"]}
    _require(v, antialias_ratio=2, antialias_kernel_size=12, final_act_fn=None)
    return {
        "vocoder": _generator(v),
        "bwe": _generator(v, "bwe_")
        | {
            "apply_final_activation": v["bwe_final_act_fn"] is not None,
            "input_sampling_rate": v["input_sampling_rate"],
            "output_sampling_rate": v["output_sampling_rate"],
            "hop_length": v["hop_length"],
            "n_fft": v["filter_length"],
            "win_size": v["window_length"],
            "num_mels": v["num_mel_channels"],
        },
    }
