"""The FLOP count against XLA's own, on a model small enough for XLA to unroll nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import TransformerConfig, tiny
from omniforcing_jax.models.transformer.inputs import Modality
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.models.transformer.rope import clip_rope
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.scaling import flops
from tests.tiny_model import abstract_params


def test_forward_flops_match_xla():
    config = tiny(num_layers=1, video_head_dim=64, audio_head_dim=32, video_context_dim=128,
                  audio_context_dim=64)  # fmt: skip
    model = Transformer(config, implementation="xla")
    params = jax.eval_shape(lambda k: init_params(model, k), jax.random.key(0))
    frames, audio_frames, text = 4, 26, 8
    rope = clip_rope(config, video_frames=frames, audio_frames=audio_frames, height=4, width=4)

    def forward(params, video, audio, contexts):
        sigma = jnp.ones((1, 1))
        index, audio_index = jnp.arange(frames), jnp.arange(audio_frames)
        text = model.apply({"params": params}, *contexts, method="text_kv")
        v = Modality(video, sigma, rope.video_rope(index), rope.video_cross_rope(index))
        a = Modality(audio, sigma, rope.audio_rope(audio_index), rope.audio_cross_rope(audio_index))
        return model.apply({"params": params}, v, a, text=text)[0]

    shape = jax.ShapeDtypeStruct
    contexts = (shape((1, text, 12), jnp.float32),) * 2
    inputs = shape((1, frames * 16, 4), jnp.float32), shape((1, audio_frames, 6), jnp.float32)
    compiled = jax.jit(forward).lower(params, *inputs, contexts).compile()
    ours = flops.text_flops(config, text) + flops.forward_flops(
        config,
        video_tokens=frames * 16,
        audio_tokens=audio_frames,
        video_keys=frames * 16,
        audio_keys=audio_frames,
        text_tokens=text,
    )
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


def test_published_size():
    """A standard block forward of the 19B model at 5 s of context costs about 36 TFLOP."""
    config = dataclasses.replace(TransformerConfig())
    one = flops.forward_flops(
        config,
        video_tokens=1152,
        audio_tokens=25,
        video_keys=6144,
        audio_keys=126,
        text_tokens=1024,
    )
    assert 3.2e13 < one < 4.0e13


@pytest.mark.parametrize("block", (0, 1, 3, 4, 9))
def test_block_flops_count_every_weight_and_every_key(block):
    """Each weight once per token that meets it, each pair of a query and a key that it sees."""
    config = tiny(num_audio_sinks=2)
    layout = BlockLayout.prefix()
    rollout = RolloutConfig(CacheConfig(layout, window=2, anchors=1), (1.0, 0.5, 0.0), 2, 3)
    # Blocks that are seen: the first, one anchor, the two before this one, and this one itself.
    seen = {0, 1, block - 2, block - 1, block} & set(range(block + 1))
    frames = {b: (1, 1 + 2) if b == 0 else (3, 25) for b in seen}  # with the sinks
    video, audio, text = 6 * frames[block][0], frames[block][1], 5
    video_keys, audio_keys = np.sum(list(frames.values()), axis=0).tolist()
    video_keys *= 6

    def tokens(layer: str, weight: str) -> int:
        """That are multiplied with a weight; text keys and values are at hand."""
        keys = weight in ("k", "v")
        match layer:
            case "video_text_attn" | "audio_text_attn" if keys:
                return 0
            case "a2v_attn" | "v2a_attn":
                return video if (layer == "a2v_attn") != keys else audio
        return video if layer.startswith("video") else audio

    weights = 0
    params = abstract_params(config)
    for path, leaf in jax.tree.leaves_with_path(params["blocks"]):
        if path[-1].key == "kernel":  # [layers, in, out]
            weights += tokens(path[0].key, path[1].key) * leaf.size
    for name in ("video_in", "video_out", "audio_in", "audio_out"):
        # the sinks count as if they were embedded, as they are read out
        weights += tokens(name, name) * params[name]["kernel"].size
    pairs = 0
    for queries, keys, width in (
        (video, video_keys, 32),
        (audio, audio_keys, 16),
        (video, text, 32),
        (audio, text, 16),
        (video, audio_keys, 16),
        (audio, video_keys, 16),
    ):
        pairs += 2 * queries * keys * width  # logits, and weighted sum
    passes = 2 + 1  # two denoising steps and the refresh
    expected = passes * 2 * (weights + config.num_layers * pairs)
    assert flops.block_flops(config, rollout, block, text) == expected
