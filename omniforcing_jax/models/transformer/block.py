"""One layer of the dual-stream transformer: video and audio, coupled by cross-modal attention.

A block attends

  * to the whole clip (teacher),
  * block-causally (`causal`: training on full clips, Eq. 4-5 of the paper), or
  * to itself and to a history of earlier blocks (`history`: sampling and self-forcing),

with the same parameters. Axis letters: see `layers.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.blocks import KvEnds
from omniforcing_jax.distributed.partitioning import WeightRules
from omniforcing_jax.models.norms import rms_norm
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.inputs import ClipMask, Conditioning, Pathways, TextKV
from omniforcing_jax.models.transformer.layers import Attention, FeedForward
from omniforcing_jax.models.transformer.modulation import gated, modulate


class Block(nn.Module):
    """One layer: self-attention, text attention, cross-modal attention, feed-forward.

    Attributes:
      config, dtype, implementation, causal, return_kv, rules: as in `Transformer`.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    implementation: str
    causal: ClipMask | None = None
    return_kv: bool = False
    rules: WeightRules = WeightRules()

    def setup(self):
        c = self.config

        def attention(
            heads, head_dim, out_dim, split, causal=True, self_attention=False, measured=False
        ):
            return Attention(
                heads,
                head_dim,
                out_dim,
                c.norm_eps,
                self.dtype,
                c.rope_type,
                gated=c.gated_attention,
                head_norm=causal and c.extra_qk_norm,
                tanh_gate=causal and c.tanh_gated_attention,
                value_when_skipped=self_attention and c.perturbation == "value",
                split_tokens=split,
                measured=measured,
                implementation=self.implementation,
                rules=self.rules,
            )

        video, audio = (c.video_heads, c.video_head_dim), (c.audio_heads, c.audio_head_dim)
        # (queries, keys) are split over devices where there are many: video and text, but not the
        # 25 tokens of a second of audio
        self.video_attn = attention(*video, c.video_dim, (True, True), self_attention=True)
        self.audio_attn = attention(
            *audio, c.audio_dim, (False, False), self_attention=True, measured=True
        )
        self.video_text_attn = attention(*video, c.video_dim, (True, True), causal=False)
        self.audio_text_attn = attention(*audio, c.audio_dim, (False, True), causal=False)
        self.a2v_attn = attention(*audio, c.video_dim, (True, False))
        self.v2a_attn = attention(*audio, c.audio_dim, (False, True))
        self.video_ff = FeedForward(
            c.video_dim,
            self.dtype,
            use_bias=c.video_ff_bias,
            split_tokens=True,
            rules=self.rules,
        )
        self.audio_ff = FeedForward(c.audio_dim, self.dtype, rules=self.rules)
        self.video_table = parameter_table(self, "video_table", c.table_rows, c.video_dim)
        self.audio_table = parameter_table(self, "audio_table", c.table_rows, c.audio_dim)
        self.video_cross_table = parameter_table(self, "video_cross_table", 5, c.video_dim)
        self.audio_cross_table = parameter_table(self, "audio_cross_table", 5, c.audio_dim)
        if c.text_adaln:
            self.video_prompt_table = parameter_table(self, "video_prompt_table", 2, c.video_dim)
            self.audio_prompt_table = parameter_table(self, "audio_prompt_table", 2, c.audio_dim)

    def text_kv(self, carry, video: Conditioning | None, audio: Conditioning | None):
        """Text keys and values of this layer; `carry` is passed on, as `nn.scan` needs one."""
        v = None if video is None else self.video_text_attn.keys_values(self._context(video, True))
        a = None if audio is None else self.audio_text_attn.keys_values(self._context(audio, False))
        return carry, TextKV(v, a)

    def _context(self, stream: Conditioning, is_video: bool) -> jax.Array:
        if not self.config.text_adaln:
            return stream.context
        table = self.video_prompt_table if is_video else self.audio_prompt_table
        shift, scale = modulation_rows(table, stream.prompt_modulation, self.dtype)
        return modulate(stream.context, scale, shift).astype(self.dtype)

    def __call__(
        self,
        carry: tuple[jax.Array | None, jax.Array | None],
        history: Pathways | None,
        text: TextKV | None,
        keep: Pathways | None,
        video: Conditioning | None,
        audio: Conditioning | None,
    ):
        """One layer of both streams.

        Args:
          carry: hidden states v [B, T, D] and a [B, T, C]; None for a stream that is absent.
          history: `History` or `Slots` for each attention; None without earlier blocks.
          text: text keys and values [B, S, N, H]; None computes them from the contexts.
          keep: [B] for each attention; zero skips it for that sample.
          video, audio: what modulates and rotates the streams.

        Returns:
          The new hidden states, and with `return_kv` this layer's new keys and values (`Pathways`
          of `KV`, keys not rotated: the block's, or the buffers of `Slots`), else None.
        """
        v, a = carry
        history, keep = history or Pathways(), keep or Pathways()
        ends = KvEnds(None, None, None, None)
        if self.causal:
            ends = self.causal.kv_ends(self.config.num_audio_sinks)
        text = text or self.text_kv(None, video, audio)[1]
        new = Pathways()
        if video is not None:
            v, video_ff_rows, kv = self._self_and_text(
                v, video, True, text.video, history.video, ends.video, keep.video
            )
            new = new.replace(video=kv)
        if audio is not None:
            a, audio_ff_rows, kv = self._self_and_text(
                a, audio, False, text.audio, history.audio, ends.audio, keep.audio
            )
            new = new.replace(audio=kv)
        if video is not None and audio is not None:
            v, a, a2v, v2a = self._cross_modal(v, a, video, audio, history, ends, keep)
            new = new.replace(a2v=a2v, v2a=v2a)
        if video is not None:
            with jax.named_scope("video_feed_forward"):
                h = self._modulated(v, *video_ff_rows[:2])
                v = self._add(v, self.video_ff(h), video_ff_rows[2])
        if audio is not None:
            with jax.named_scope("audio_feed_forward"):
                h = self._modulated(a, *audio_ff_rows[:2])
                a = self._add(a, self.audio_ff(h), audio_ff_rows[2])
        return (v, a), (new if self.return_kv else None)

    def _self_and_text(self, x, stream, is_video, text_kv, history, kv_end, keep):
        """Self-attention, then text attention, of one stream.

        Returns:
          x [B, T, D], the feed-forward's (shift, scale, gate), and the new keys and values.
        """
        name = "video" if is_video else "audio"
        attn = self.video_attn if is_video else self.audio_attn
        text_attn = self.video_text_attn if is_video else self.audio_text_attn
        table = self.video_table if is_video else self.audio_table
        # [B, G, D] each: shift, scale, gate of self-attention, of feed-forward[, of text attention]
        rows = modulation_rows(table, stream.modulation, self.dtype)
        with jax.named_scope(f"{name}_self_attention"):
            h = self._modulated(x, *rows[:2])
            q, kv = attn.queries_keys_values(h)  # [B, T, N, H]
            where = {"rope": stream.rope, "history": history, "kv_end": kv_end}
            y, new = attn(h, q, kv, **where, bias=stream.self_bias, keep=keep)
            x = self._add(x, y, rows[2])
        with jax.named_scope(f"{name}_text_attention"):
            if self.config.text_adaln:
                h = self._modulated(x, *rows[6:8])
            else:
                h = rms_norm(x, self.config.norm_eps).astype(self.dtype)
            y, _ = text_attn(h, text_attn.queries(h), text_kv, mask=stream.context_mask)
            x = self._add(x, y, rows[8]) if self.config.text_adaln else x + y
        return x, rows[3:6], new

    def _cross_modal(self, v, a, video, audio, history, ends, keep):
        """Attention of each stream to the other; both read what they were before this step.

        Returns:
          v [B, T, D], a [B, T, C], and the new keys and values [B, T, N, H] of both directions.
        """
        eps, dtype = self.config.norm_eps, self.dtype
        # 4 rows [B, G, D]: scale, shift of what A2V reads, then of what V2A reads
        v_rows = modulation_rows(self.video_cross_table[:4], video.cross_modulation, dtype)
        a_rows = modulation_rows(self.audio_cross_table[:4], audio.cross_modulation, dtype)
        (v_gate,) = modulation_rows(self.video_cross_table[4:], video.cross_gate, dtype)
        (a_gate,) = modulation_rows(self.audio_cross_table[4:], audio.cross_gate, dtype)
        v_norm, a_norm = rms_norm(v, eps), rms_norm(a, eps)
        with jax.named_scope("a2v_attention"):
            x = modulate(v_norm, *v_rows[:2]).astype(dtype)
            to_video, a2v = self.a2v_attn(
                x,
                self.a2v_attn.queries(x),
                self.a2v_attn.keys_values(modulate(a_norm, *a_rows[:2]).astype(dtype)),
                rope=video.cross_rope,
                k_rope=audio.cross_rope,
                history=history.a2v,
                kv_end=ends.a2v,
                keep=keep.a2v,
            )  # [B, T, D]
        with jax.named_scope("v2a_attention"):
            x = modulate(a_norm, *a_rows[2:]).astype(dtype)
            to_audio, v2a = self.v2a_attn(
                x,
                self.v2a_attn.queries(x),
                self.v2a_attn.keys_values(modulate(v_norm, *v_rows[2:]).astype(dtype)),
                rope=audio.cross_rope,
                k_rope=video.cross_rope,
                history=history.v2a,
                kv_end=ends.v2a,
                keep=keep.v2a,
            )  # [B, T, C]
        return self._add(v, to_video, v_gate), self._add(a, to_audio, a_gate), a2v, v2a

    def _modulated(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        """Normalised and modulated: x [B, T, D], shift and scale [B, G, D] -> [B, T, D]."""
        return modulate(rms_norm(x, self.config.norm_eps), scale, shift).astype(self.dtype)

    def _add(self, x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
        """x + y * gate: x and y [B, T, D], gate [B, G, D]."""
        return x + gated(y, gate).astype(self.dtype)


def parameter_table(module: nn.Module, name: str, rows: int, dim: int) -> jax.Array:
    """A parameter [rows, dim], of which every device holds all, as of biases."""
    init = nn.with_logical_partitioning(nn.initializers.normal(dim**-0.5), (None, None))
    return module.param(name, init, (rows, dim))


def modulation_rows(table: jax.Array, modulation: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """table [k, D] + modulation [B, G, k, D] (or broadcast over k) -> k arrays [B, G, D]."""
    rows = table.astype(dtype)[None, None] + modulation
    return [rows[:, :, j] for j in range(table.shape[0])]
