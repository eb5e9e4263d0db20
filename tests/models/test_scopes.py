"""Names in the compiled programs' metadata, by which a profile is read."""

import re

import jax
import jax.numpy as jnp
import pytest

from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio import vocoder
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import clip_rope
from omniforcing_jax.models.video_vae import model as video_vae
from tests.tiny_model import abstract_params, modalities, random_contexts, random_latents

BLOCK_SCOPES = {
    *(f"{stream}_self_attention" for stream in ("video", "audio")),
    *(f"{stream}_text_attention" for stream in ("video", "audio")),
    *(f"{stream}_feed_forward" for stream in ("video", "audio")),
    "a2v_attention",
    "v2a_attention",
}


def op_names(function, *args) -> list[list[str]]:
    """Path of every operation: names of the scopes around it, then its own."""
    text = jax.jit(function).lower(*args).as_text(dialect="hlo", debug_info=True)
    return [name.split("/") for name in re.findall(r'op_name="([^"]+)"', text)]


@pytest.mark.parametrize("text_adaln", [False, True])
def test_every_product_of_a_block_has_a_scope(text_adaln):
    config = tiny(text_adaln=text_adaln, num_audio_sinks=1)
    model = Transformer(config)
    rope = clip_rope(config, video_frames=1, audio_frames=1, height=1, width=2)
    x, contexts = random_latents(config, 2, 1), random_contexts(config)
    streams = modalities(config, rope, x, ([[1]], [[1]]), ([0], [0]), contexts, sinks=True)
    params = abstract_params(config)
    names = op_names(lambda p: model.apply({"params": p}, *streams), params)
    # Where the loop's body becomes a function of its own, its names begin there; else at the jit.
    of_blocks = [name for name in names if "blocks" in name and name[-1] == "dot_general"]
    assert of_blocks, names
    text_kv = [name for name in of_blocks if "blocks.text_kv" in name]
    scopes = [BLOCK_SCOPES.intersection(name) for name in of_blocks if name not in text_kv]
    assert set().union(*scopes) == BLOCK_SCOPES
    assert {len(found) for found in scopes} == {1}
    # q, k, v, out, logits and sum of 4 attentions; text attentions have k and v elsewhere; 2 FFs
    assert len(scopes) == 4 * 6 + 2 * 4 + 2 * 2 and len(text_kv) == 4
    outside = {part for name in names if "blocks" not in name for part in name}
    assert outside >= {"embed_video", "embed_audio", "output_heads"}


def test_decoders_have_scopes(random_pipeline):
    """And within them the names of their modules, stage by stage."""
    pipeline = random_pipeline("2.0")
    config, params = pipeline.config, pipeline.params
    video = jnp.zeros((1, 2, 2, 2, config.video_vae.latent_channels))
    names = op_names(
        lambda p, z: video_vae.decode(config.video_vae, p, z), params["video_vae"], video
    )
    stages = {
        name[i + 2] for name in names for i, part in enumerate(name) if part == "video_decoder"
    }
    assert stages >= {f"up_blocks_{i}" for i in range(len(config.video_vae.decoder_blocks))}
    latents = jnp.zeros((1, 2, config.audio_vae.latent_width))
    names = op_names(
        lambda p, z: audio_vae.decode_audio(p, config.audio_vae, z), params["audio_vae"], latents
    )
    parts = {part for name in names for part in name}
    assert parts >= {"audio_decoder", "mid", "up_0", "up_1", "up_2"}
    mel = jnp.zeros((1, 2, config.vocoder.mel_bins, vocoder.STEREO))
    names = op_names(lambda p, x: vocoder.vocode(p, config.vocoder, x), params["vocoder"], mel)
    assert {part for name in names for part in name} >= {"vocoder", "ups_0", "resblocks_0"}
