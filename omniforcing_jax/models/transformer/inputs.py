"""What the transformer is called with, and what its layers pass around."""

import dataclasses

import flax
import jax
import jax.numpy as jnp

from omniforcing_jax.blocks import BlockLayout, KvEnds
from omniforcing_jax.models.transformer.layers import KV, History, Slots
from omniforcing_jax.models.transformer.rope import GridRope, Rope


@flax.struct.dataclass
class Modality:
    """What one stream is called with.

    Attributes:
      latents: [B, T, channels] noisy tokens; video in the order f, h, w, audio one per latent.
      sigma: [B, G] noise level in [0, 1] of each of G equal groups of tokens (G divides T).
      rope, cross_rope: tables of the self-attention and the cross-modal attention. With sinks,
        the audio tables start with the sinks' rows.
      context: [B, S, text_dim] text features; None when text keys and values are given instead.
      context_mask: [B, S] boolean, True = attend; None attends to everything.
      global_sigma: [B] the sample's own noise level, where it differs from max(sigma): it feeds the
        prompt AdaLN and the other stream's cross-modal AdaLN in LTX-2.3.
      keyframes: [B or 1, T] boolean, tokens that get the keyframe embedding of models that have one
        (LTX-2.5): those of video latents that stand for a single frame.
      self_bias: [B or 1, G, G] float32 added to the logits of the self-attention of G equal groups
        of tokens; None is nothing.
    """

    latents: jax.Array
    sigma: jax.Array
    rope: Rope | GridRope
    cross_rope: Rope | GridRope
    context: jax.Array | None = None
    context_mask: jax.Array | None = None
    global_sigma: jax.Array | None = None
    keyframes: jax.Array | None = None
    self_bias: jax.Array | None = None

    @property
    def sample_sigma(self) -> jax.Array:
        """[B, 1] noise level of each sample."""
        sigma = jnp.max(self.sigma, axis=1) if self.global_sigma is None else self.global_sigma
        return sigma[:, None]


@flax.struct.dataclass
class Pathways:
    """One value for each of the four causal attentions; None where a stream is absent.

    `a2v` are queries of the video on keys of the audio, `v2a` the reverse.
    """

    video: KV | History | Slots | jax.Array | None = None
    audio: KV | History | Slots | jax.Array | None = None
    a2v: KV | History | Slots | jax.Array | None = None
    v2a: KV | History | Slots | jax.Array | None = None


@flax.struct.dataclass
class TextKV:
    """Text keys and values of both streams: [B, S, N, H] in a layer, [L, B, S, N, H] of all."""

    video: KV | None
    audio: KV | None


@flax.struct.dataclass
class Conditioning:
    """What every layer reads of one stream, computed once per forward pass.

    Attributes:
      modulation: [B, G, 6 or 9, width] shift, scale, gate of self-attention and of feed-forward
        [and of text attention].
      cross_modulation: [B, G, 4, width] scale, shift of what A2V reads, then of what V2A reads.
      cross_gate: [B, G, 1, width] of what the other stream adds.
      prompt_modulation: [B, 1, 2, width] shift, scale of the context.
      context: [B, S, width].
      context_mask: [B, 1, 1, S] boolean, True = attend.
      rope, cross_rope, self_bias: as in `Modality`.
    """

    modulation: jax.Array | None = None
    cross_modulation: jax.Array | None = None
    cross_gate: jax.Array | None = None
    prompt_modulation: jax.Array | None = None
    context: jax.Array | None = None
    context_mask: jax.Array | None = None
    rope: Rope | GridRope | None = None
    cross_rope: Rope | GridRope | None = None
    self_bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ClipMask:
    """Block-causal attention over a whole clip; hashable, so that programs may depend on it."""

    layout: BlockLayout
    video_frames: int
    audio_frames: int
    patches: int

    def kv_ends(self, num_sinks: int) -> KvEnds:
        """For each query of the four attentions, the number of keys it sees. Sinks come first."""
        return self.layout.kv_ends(self.video_frames, self.audio_frames, self.patches, num_sinks)
