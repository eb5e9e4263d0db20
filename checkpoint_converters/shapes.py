"""Which tensors a checkpoint must hold, with official keys and shapes, from its metadata alone.

The shapes are those of the models' own parameters, traced without allocating any, through the key
table in reverse. They are compared with the headers before anything is written, so a damaged or
unknown file is refused with a complete list of what is wrong with it.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from checkpoint_converters import key_map
from omniforcing_jax.io.checkpoints import UPSAMPLERS, metadata_section, parsing
from omniforcing_jax.models import tiny_decoder, upsampler
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio.vocoder import VocoderConfig, vocoder_module
from omniforcing_jax.models.text import gemma
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer import model as transformer
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.video_vae import model as video_vae

# A size that the metadata does not tell: the number of text features, a multiple of the text
# encoder's width.
ANY = -1

Shapes = dict[str, tuple[int, ...]]

_CONFIGS = {
    "transformer": TransformerConfig,
    "connectors": ConnectorConfig,
    "video_vae": video_vae.VideoVAEConfig,
    "audio_vae": audio_vae.AudioVAEConfig,
    "vocoder": VocoderConfig,
} | dict.fromkeys(UPSAMPLERS, upsampler.UpsamplerConfig)


def expected_shapes(config: Mapping[str, Any], component: str) -> Shapes:
    """{official key: PyTorch shape} of one component; a size of `ANY` is not determined.

    Args:
      config: the metadata's `config` object. Absent settings take the defaults of LTX-2's own
        loader.
      component: one of `checkpoints.COMPONENTS` or `checkpoints.UPSAMPLERS`.

    Raises:
      ValueError: a setting is missing or not supported; names it.
    """
    section = metadata_section(config, component)
    with parsing(f"config section {section!r}"):
        model_config = _CONFIGS[component].from_metadata(config[section])
    return model_shapes(component, model_config)


def model_shapes(component: str, model_config: Any) -> Shapes:
    """As `expected_shapes`, from a model's own config; `key_map.TEXT_TOWER` has shapes as well."""
    return dict(_model_shapes(component, model_config))


@functools.lru_cache(maxsize=64)
def _model_shapes(component: str, model_config: Any) -> Shapes:
    init = _INITS[component]
    tree = jax.eval_shape(lambda: nn.unbox(init(model_config, jax.random.key(0))))
    shapes = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        for key, piece in key_map.official_pieces(component, path, leaf).items():
            shapes[key] = piece.shape
            if key.startswith("text_embedding_projection.") and key.endswith(".weight"):
                shapes[key] = (piece.shape[0], ANY)
    return dict(sorted(shapes.items(), key=_by_layer))


def _by_layer(item: tuple[str, tuple[int, ...]]) -> list[str | int]:
    """Sorts keys as files have them: all of a layer together, layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def _init_transformer(config: TransformerConfig, key: jax.Array) -> dict:
    return transformer.init_params(transformer.Transformer(config), key)


def _init_connectors(config: ConnectorConfig, key: jax.Array) -> dict:
    """For a text encoder of one hidden state."""
    states = jnp.zeros((1, config.num_registers, config.text_channels, 1))
    mask = jnp.ones(states.shape[:2], jnp.int32)
    return TextConnectors(config).init(key, states, mask)["params"]


def _init_audio_vae(config: audio_vae.AudioVAEConfig, key: jax.Array) -> dict:
    log_mel = jnp.zeros((1, config.downsampling, config.mel.mel_bins, 2))
    latents = jnp.zeros((1, 1, config.latent_bins, config.latent_channels))
    statistics = jnp.zeros(config.latent_width)
    return {
        "encoder": audio_vae.AudioEncoder(config).init(key, log_mel)["params"],
        "decoder": audio_vae.AudioDecoder(config).init(key, latents)["params"],
        "per_channel_statistics": {"mean": statistics, "std": statistics},
    }


def _init_vocoder(config: VocoderConfig, key: jax.Array) -> dict:
    params = vocoder_module(config).init(key, jnp.zeros((1, 1, config.mel_bins, 2)))["params"]
    if "mel_stft" in params:  # files hold both bases, though only one is read
        bases = params["mel_stft"]["stft_fn"]
        bases["inverse_basis"] = bases["forward_basis"]
    return params


_INITS = {
    "transformer": _init_transformer,
    "connectors": _init_connectors,
    "video_vae": video_vae.init_params,
    "audio_vae": _init_audio_vae,
    "vocoder": _init_vocoder,
    "tiny_decoder": tiny_decoder.init_params,
    "spatial_upsampler": upsampler.init_params,
    "temporal_upsampler": upsampler.init_params,
    key_map.TEXT_TOWER: gemma.init_boxed_params,
}
