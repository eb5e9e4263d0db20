"""Exported files in a PyTorch tool: diffusers' own single-file converter reads what we write."""

import numpy as np
import pytest
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_ltx2_audio_vae_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx2_vae_to_diffusers,
)
from safetensors.torch import load_file

from checkpoint_converters import export
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.transformer.config import TransformerConfig
from tests.models.transformer.test_diffusers_transformer import (
    AUDIO_FRAMES,
    BATCH,
    FRAMES,
    LTX23,
    PATCHES,
    TEXT,
    Pair,
    check,
    uniform,
)

# names that both have
SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
    "in_channels", "out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
    "audio_cross_attention_dim", "audio_in_channels", "audio_out_channels", "caption_channels",
    "rope_type", "norm_eps", "timestep_scale_multiplier",
)  # fmt: skip


class Exported(Pair):
    """A converted checkpoint, and diffusers' model with the weights of its exported file."""

    def __init__(self, checkpoint, file, version):
        export.export(checkpoint, file, components=("transformer",))
        content = checkpoints.load_config(checkpoint)
        section = content["config"]["transformer"]
        self.config = TransformerConfig.from_metadata(section, content["model_version"])
        self.params = checkpoints.load_params(checkpoint, "transformer", dtype=np.float32)
        self.torch = LTX2VideoTransformer3DModel(
            **{name: section[name] for name in SIZES},
            rope_theta=section["positional_embedding_theta"],
            rope_double_precision=section["frequencies_precision"] == "float64",
            cross_attn_timestep_scale_multiplier=section["av_ca_timestep_scale_multiplier"],
            **(LTX23 if version == "2.3" else {}),
        ).eval()
        weights = convert_ltx2_transformer_to_diffusers(load_file(file))
        # the one name, new in 2.3, that the converter of diffusers 0.42 leaves as it is
        weights = {
            key.replace("prompt_adaln_single.", "prompt_adaln."): weight.float()
            for key, weight in weights.items()
        }
        self.torch.load_state_dict(weights, strict=True)
        rng = np.random.default_rng(1)
        video, audio = self.config.video_channels, self.config.audio_channels
        shapes = ((FRAMES * PATCHES, video), (AUDIO_FRAMES, audio))
        self.latents, self.contexts = (
            tuple(rng.standard_normal((BATCH, *shape)).astype(np.float32) for shape in group)
            for group in (shapes, [(TEXT, width) for width in self.config.text_dims])
        )


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_diffusers_computes_the_same_with_an_exported_transformer(
    random_checkpoint, tmp_path, version
):
    pair = Exported(random_checkpoint(version), tmp_path / "back.safetensors", version)
    check(pair.ours(uniform()), pair.reference(uniform()))


def test_diffusers_takes_the_exported_vaes(random_checkpoint, tmp_path):
    """Every tensor under the name and in the shape that it expects."""
    file = tmp_path / "back.safetensors"
    export.export(random_checkpoint("2.0"), file, components=("video_vae", "audio_vae"))
    weights = load_file(file)
    video = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(16, 32, 64, 128),
        decoder_block_out_channels=(16, 32, 64),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )
    audio = AutoencoderKLLTX2Audio(base_channels=32, latent_channels=2)
    for model, prefix, rename in (
        (video, "vae.", convert_ltx2_vae_to_diffusers),
        (audio, "audio_vae.", convert_ltx2_audio_vae_to_diffusers),
    ):
        own = {key: weight for key, weight in weights.items() if key.startswith(prefix)}
        model.load_state_dict(rename(own), strict=True)
