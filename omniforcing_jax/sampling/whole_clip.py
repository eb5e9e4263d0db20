"""The network on a whole clip in one forward pass.

Training looks at whole clips where sampling looks at blocks: score networks see a clip at one
noise level, bidirectionally; a student in stage II sees it under the block-causal masks, with a
noise level of its own for every block.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, modalities
from omniforcing_jax.models.transformer.inputs import Pathways
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling.conditions import Condition, velocity_to_x0
from omniforcing_jax.types import AVLatents, Contexts


def clip_velocity(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: Contexts,
    clip: ClipGeometry,
    keep: Pathways | None = None,
    condition: Condition | None = None,
) -> AVLatents:
    """Velocity of a noisy clip in one forward pass.

    Args:
      model: bidirectional, or with `causal` set to the clip's mask.
      x: [B, T, C] noisy tokens.
      sigma: [B] of the samples, or AVLatents [B, G] of equal groups of each stream's tokens.
      contexts: (video, audio) text contexts [B, S, text_dim].
      keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).
      condition: what is given, whose noise level is 0; `sigma` is [B], or AVLatents of every
        latent frame, then.

    Returns:
      AVLatents [B, T, C] float32.
    """
    streams = _modalities(model, x, sigma, contexts, clip, condition)
    (video, audio), _ = model.apply({"params": params}, *streams, keep=keep)
    return AVLatents(video, audio)


def audio_attention_entropy(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: Contexts,
    clip: ClipGeometry,
) -> jax.Array:
    """Entropy of the audio self-attention, [L, T_a + sinks], see `ops.attention_entropy`.

    Arguments as `clip_velocity`.
    """
    streams = _modalities(model, x, sigma, contexts, clip)
    _, measured = model.apply({"params": params}, *streams, mutable=["diagnostics"])
    (entropy,) = jax.tree.leaves(measured)
    return entropy


def _modalities(model, x, sigma, contexts, clip: ClipGeometry, condition=None):
    stream_sigma = None
    if condition is not None and isinstance(sigma, AVLatents):
        stream_sigma = jax.tree.map(
            lambda s, frozen: jnp.where(frozen, 0.0, jnp.max(s, axis=1)), sigma, condition.frozen
        )
        sigma = jax.tree.map(jnp.multiply, sigma, condition.mask)
    elif condition is not None:
        sigma, stream_sigma = condition.sigma(sigma), condition.stream_sigma(sigma)
    elif not isinstance(sigma, AVLatents):
        sigma = AVLatents(sigma[:, None], sigma[:, None])
    ropes = clip.stream_ropes(model)
    return modalities(x, sigma, ropes, contexts, global_sigma=stream_sigma)


def clip_x0(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents | jax.Array,
    contexts: Contexts,
    clip: ClipGeometry,
    keep: Pathways | None = None,
    condition: Condition | None = None,
) -> AVLatents:
    """The clean prediction x0 = x - sigma v of a noisy clip; other arguments as `clip_velocity`.

    Args:
      sigma: [B]; without a condition also [B, frames] of each stream.

    Returns:
      [B, T, C] float32, with what is given in its place.
    """
    velocity = clip_velocity(model, params, x, sigma, contexts, clip, keep, condition)
    return velocity_to_x0(x, velocity, sigma, condition)


def sigmas_per_frame(block_sigma: jax.Array, layout: BlockLayout, clip: ClipGeometry) -> AVLatents:
    """A noise level per block [B, K] -> per video latent [B, F] and per audio latent [B, T_a].

    An audio latent takes the level of its own block. (Matching by the ratio of frame counts instead
    gives latents at the border the level of a neighbour, which never happens while sampling.)
    """
    video = layout.block_of_video_frame(np.arange(clip.video_frames))
    audio = layout.block_of_audio_frame(np.arange(clip.audio_frames))
    return AVLatents(block_sigma[:, video], block_sigma[:, audio])
