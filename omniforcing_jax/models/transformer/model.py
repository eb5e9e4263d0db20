"""The dual-stream LTX-2 transformer: video and audio, coupled in every layer.

One forward pass reads top to bottom: `Transformer.__call__` embeds both streams, scans `Block` over
the layers and applies the output heads. A block attends

  * to the whole clip (teacher),
  * block-causally (`causal`: training on full clips, Eq. 4-5 of the paper), or
  * to itself and to a history of earlier blocks (`history`: sampling and self-forcing),

with the same parameters. It predicts the velocity v = noise - x0. Axis letters: see `layers.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.blocks import KvEnds
from omniforcing_jax.distributed.partitioning import WHOLE, WeightRules, constrain
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.inputs import (
    ClipMask,
    Conditioning,
    Modality,
    Pathways,
    TextKV,
)
from omniforcing_jax.models.transformer.layers import (
    Attention,
    CaptionProjection,
    FeedForward,
    linear,
)
from omniforcing_jax.models.transformer.modulation import (
    AdaLN,
    gated,
    layer_norm,
    modulate,
    rms_norm,
)
from omniforcing_jax.models.transformer.rope import clip_rope


class Block(nn.Module):
    """One layer: self-attention, text attention, cross-modal attention, feed-forward."""

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
        # whether the tokens of queries, and of keys, are many: 25 of the audio a second are not
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
        self.video_table = _table(self, "video_table", c.table_rows, c.video_dim)
        self.audio_table = _table(self, "audio_table", c.table_rows, c.audio_dim)
        self.video_cross_table = _table(self, "video_cross_table", 5, c.video_dim)
        self.audio_cross_table = _table(self, "audio_cross_table", 5, c.audio_dim)
        if c.text_adaln:
            self.video_prompt_table = _table(self, "video_prompt_table", 2, c.video_dim)
            self.audio_prompt_table = _table(self, "audio_prompt_table", 2, c.audio_dim)

    def text_kv(self, carry, video: Conditioning | None, audio: Conditioning | None):
        """Text keys and values of this layer; `carry` only makes it scannable."""
        v = None if video is None else self.video_text_attn.keys_values(self._context(video, True))
        a = None if audio is None else self.audio_text_attn.keys_values(self._context(audio, False))
        return carry, TextKV(v, a)

    def _context(self, stream: Conditioning, is_video: bool) -> jax.Array:
        if not self.config.text_adaln:
            return stream.context
        table = self.video_prompt_table if is_video else self.audio_prompt_table
        shift, scale = _rows(table, stream.prompt_modulation, self.dtype)
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
        """carry: hidden states (v [B, T, D], a [B, T, C]) -> the same, and this layer's new K/V."""
        v, a = carry
        history, keep = history or Pathways(), keep or Pathways()
        ends = (
            self.causal.kv_ends(self.config.num_audio_sinks)
            if self.causal
            else KvEnds(None, None, None, None)
        )
        text = text or self.text_kv(None, video, audio)[1]
        new = Pathways()
        if video is not None:
            v, video_mlp, kv = self._self_and_text(
                v, video, True, text.video, history.video, ends.video, keep.video
            )
            new = new.replace(video=kv)
        if audio is not None:
            a, audio_mlp, kv = self._self_and_text(
                a, audio, False, text.audio, history.audio, ends.audio, keep.audio
            )
            new = new.replace(audio=kv)
        if video is not None and audio is not None:
            v, a, a2v, v2a = self._cross_modal(v, a, video, audio, history, ends, keep)
            new = new.replace(a2v=a2v, v2a=v2a)
        if video is not None:
            v = self._feed_forward(v, self.video_ff, video_mlp)
        if audio is not None:
            a = self._feed_forward(a, self.audio_ff, audio_mlp)
        return (v, a), (new if self.return_kv else None)

    def _self_and_text(self, x, stream, is_video, text_kv, history, kv_end, keep):
        eps = self.config.norm_eps
        attn = self.video_attn if is_video else self.audio_attn
        text_attn = self.video_text_attn if is_video else self.audio_text_attn
        table = self.video_table if is_video else self.audio_table
        shift, scale, gate, *mlp_and_text = _rows(table, stream.modulation, self.dtype)
        h = modulate(rms_norm(x, eps), scale, shift).astype(self.dtype)
        kv = attn.keys_values(h)
        y = attn(h, kv, rope=stream.rope, history=history, kv_end=kv_end, keep=keep)
        x = x + gated(y, gate).astype(self.dtype)
        if self.config.text_adaln:
            shift, scale, gate = mlp_and_text[3:]
            h = modulate(rms_norm(x, eps), scale, shift).astype(self.dtype)
            x = x + gated(text_attn(h, text_kv, mask=stream.context_mask), gate).astype(self.dtype)
        else:
            h = rms_norm(x, eps).astype(self.dtype)
            x = x + text_attn(h, text_kv, mask=stream.context_mask)
        return x, mlp_and_text[:3], kv

    def _cross_modal(self, v, a, video, audio, history, ends, keep):
        """Both directions read the streams as they were before either was updated."""
        eps = self.config.norm_eps
        v_rows = _rows(self.video_cross_table[:4], video.cross_modulation, self.dtype)
        a_rows = _rows(self.audio_cross_table[:4], audio.cross_modulation, self.dtype)
        (v_gate,) = _rows(self.video_cross_table[4:], video.cross_gate, self.dtype)
        (a_gate,) = _rows(self.audio_cross_table[4:], audio.cross_gate, self.dtype)
        v_norm, a_norm = rms_norm(v, eps), rms_norm(a, eps)

        def stream(x, rows, direction):  # rows come as (scale, shift), unlike the other tables
            return modulate(x, rows[2 * direction], rows[2 * direction + 1]).astype(self.dtype)

        a2v_kv = self.a2v_attn.keys_values(stream(a_norm, a_rows, 0))
        to_video = self.a2v_attn(
            stream(v_norm, v_rows, 0),
            a2v_kv,
            rope=video.cross_rope,
            k_rope=audio.cross_rope,
            history=history.a2v,
            kv_end=ends.a2v,
            keep=keep.a2v,
        )
        v2a_kv = self.v2a_attn.keys_values(stream(v_norm, v_rows, 1))
        to_audio = self.v2a_attn(
            stream(a_norm, a_rows, 1),
            v2a_kv,
            rope=audio.cross_rope,
            k_rope=video.cross_rope,
            history=history.v2a,
            kv_end=ends.v2a,
            keep=keep.v2a,
        )
        v = v + gated(to_video, v_gate).astype(self.dtype)
        a = a + gated(to_audio, a_gate).astype(self.dtype)
        return v, a, a2v_kv, v2a_kv

    def _feed_forward(self, x, ff, rows):
        shift, scale, gate = rows
        h = modulate(rms_norm(x, self.config.norm_eps), scale, shift).astype(self.dtype)
        return x + gated(ff(h), gate).astype(self.dtype)


class Transformer(nn.Module):
    """The whole network. See the module's docstring; `apply` needs `{"params": tree}`.

    Attributes:
      config: what the checkpoint says.
      dtype: compute dtype; the residual stream has it too. Norms, softmax, sigmas, phases are fp32.
      implementation: attention backend, see `ops.attention`.
      causal: the clip's block-causal mask; None attends to everything given.
      return_kv: return the new keys and values of all layers (for the rolling cache).
      remat: "none", "full", or the name of a policy in `jax.checkpoint_policies`.
      unroll: layers in one step of the scan; more take longer to compile, and may run faster.
      rules: how weights travel between devices; `keep_gathered` follows from `remat`.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    implementation: str = "auto"
    causal: ClipMask | None = None
    return_kv: bool = False
    remat: str = "none"
    unroll: int = 1
    rules: WeightRules = WeightRules()

    def setup(self):
        c = self.config
        how = self.dtype, self._rules()
        self.video_in = linear(c.video_dim, (None, "embed"), *how, split_tokens=True)
        self.audio_in = linear(c.audio_dim, (None, "embed"), *how)
        if c.caption_channels is not None:
            self.video_caption = CaptionProjection(c.video_dim, *how)
            self.audio_caption = CaptionProjection(c.audio_dim, *how)
        self.video_adaln = AdaLN(c.video_dim, c.table_rows, *how)
        self.audio_adaln = AdaLN(c.audio_dim, c.table_rows, *how)
        self.video_cross_adaln = AdaLN(c.video_dim, 4, *how)
        self.audio_cross_adaln = AdaLN(c.audio_dim, 4, *how)
        self.a2v_gate_adaln = AdaLN(c.video_dim, 1, *how)
        self.v2a_gate_adaln = AdaLN(c.audio_dim, 1, *how)
        if c.text_adaln:
            self.video_prompt_adaln = AdaLN(c.video_dim, 2, *how)
            self.audio_prompt_adaln = AdaLN(c.audio_dim, 2, *how)
        if c.keyframe_embedding:
            self.keyframe_embedding = _table(self, "keyframe_embedding", 1, c.video_dim)
        if c.num_audio_sinks:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None))
            self.audio_sinks = self.param("audio_sinks", init, (c.num_audio_sinks, c.audio_dim))
        self.blocks = self._scanned_block()
        self.video_out_table = _table(self, "video_out_table", 2, c.video_dim)
        self.audio_out_table = _table(self, "audio_out_table", 2, c.audio_dim)
        self.video_out = linear(c.video_channels, ("embed", None), *how, split_tokens=True)
        self.audio_out = linear(c.audio_channels, ("embed", None), *how)

    def _rules(self) -> WeightRules:
        return dataclasses.replace(self.rules, keep_gathered=self.remat == "full")

    def _scanned_block(self) -> Block:
        block = Block
        if self.remat != "none":
            check_remat(self.remat)
            policy = None if self.remat == "full" else getattr(jax.checkpoint_policies, self.remat)
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        shared = {
            "variable_axes": {"params": 0, "diagnostics": 0},
            "split_rngs": {"params": True},
            "length": self.config.num_layers,
            "metadata_params": {nn.PARTITION_NAME: "layers"},
            "out_axes": 0,
            "unroll": self.unroll,
        }
        call = {**shared, "in_axes": (0, 0, 0, nn.broadcast, nn.broadcast)}
        text_kv = {**shared, "in_axes": (nn.broadcast, nn.broadcast)}
        scanned = nn.scan(block, methods={"__call__": call, "text_kv": text_kv})
        return scanned(
            self.config,
            self.dtype,
            self.implementation,
            self.causal,
            self.return_kv,
            self._rules(),
        )

    def __call__(
        self,
        video: Modality | None,
        audio: Modality | None,
        *,
        history: Pathways | None = None,
        text: TextKV | None = None,
        keep: Pathways | None = None,
    ):
        """Predicts the velocities of both streams.

        Args:
          video, audio: the streams; one of them may be None (then the cross-modal attention is
            skipped).
          history: `History` per pathway with arrays [L, B, S, N, H] and lengths [L].
          text: text keys and values from `text_kv`; otherwise they are computed from the contexts.
          keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).

        Sinks are part of every call without a history: block 0 and whole clips.

        Returns:
          (video [B, T_v, channels], audio [B, T_a, channels]) float32, and, with `return_kv`, the
          new keys and values: Pathways of KV [L, B, S, N, H], keys not rotated, else None.
        """
        self._check(video, audio, text)
        self._check_causal(video, audio)
        sinks = self.config.num_audio_sinks if history is None and audio is not None else 0
        if audio is not None:
            audio = self._audio_sigma_with_sinks(audio, sinks)
        v, v_stream, v_time = self._embed(video, audio, True, text)
        a, a_stream, a_time = self._embed(audio, video, False, text)
        if sinks:
            tokens = jnp.broadcast_to(
                self.audio_sinks.astype(self.dtype), (a.shape[0], sinks, a.shape[2])
            )
            a = jnp.concatenate([tokens, a], axis=1)
        # Splitting 25 audio tokens a second costs more than it saves (docs/scaling.md).
        v = None if v is None else constrain(v, "batch", "tokens", WHOLE)
        a = None if a is None else constrain(a, "batch", WHOLE, WHOLE)
        (v, a), new_kv = self.blocks((v, a), history, text, keep, v_stream, a_stream)
        if v is not None:
            v = self._head(v, self.video_out_table, v_time, self.video_out)
        if a is not None:
            a = self._head(a, self.audio_out_table, a_time, self.audio_out)[:, sinks:]
        return (v, a), new_kv

    def text_kv(
        self,
        video_context: jax.Array | None,
        audio_context: jax.Array | None,
        sigma: jax.Array | None = None,
    ) -> TextKV:
        """Text keys and values of all layers, [L, B, S, N, H], so that a prompt is paid for once.

        Args:
          video_context, audio_context: [B, S, text_dim].
          sigma: [B], needed when the text attention is modulated (LTX-2.3): K/V depend on it there.

        Raises:
          ValueError: sigma is missing where it matters.
        """
        if self.config.text_adaln and sigma is None:
            raise ValueError("this model's text attention is modulated: text_kv needs sigma [B]")

        def conditioning(context, is_video):
            if context is None:
                return None
            prompt = None
            if self.config.text_adaln:
                prompt = self._prompt_modulation(sigma[:, None], is_video)
            return Conditioning(
                modulation=None,
                cross_modulation=None,
                cross_gate=None,
                prompt_modulation=prompt,
                context=self._context(context, is_video),
                context_mask=None,
                rope=None,
                cross_rope=None,
            )

        video, audio = conditioning(video_context, True), conditioning(audio_context, False)
        return self.blocks.text_kv(None, video, audio)[1]

    def _check(self, video, audio, text):
        if video is None and audio is None:
            raise ValueError("at least one of video and audio must be given")
        for name, stream in (("video", video), ("audio", audio)):
            if stream is None:
                continue
            if stream.latents.shape[1] % stream.sigma.shape[1]:
                raise ValueError(
                    f"{name}: {stream.latents.shape[1]} tokens cannot share "
                    f"{stream.sigma.shape[1]} sigmas evenly; give one per sample, frame or token"
                )
            if stream.context is None and text is None:
                raise ValueError(f"{name}: neither a text context nor text K/V was given")
            if stream.keyframes is not None and not self.config.keyframe_embedding:
                raise ValueError(f"{name}: this model has no keyframe embedding (LTX-2.5 has)")
            width = self.config.text_dims[0 if name == "video" else 1]
            if stream.context is not None and stream.context.shape[-1] != width:
                raise ValueError(
                    f"{name}: text features are {stream.context.shape[-1]} wide, this model takes "
                    f"{width}; were they encoded for another model version?"
                )

    def _check_causal(self, video, audio):
        if self.causal is None:
            return
        clip = self.causal
        expected = {"video": clip.video_frames * clip.patches, "audio": clip.audio_frames}
        for name, stream in (("video", video), ("audio", audio)):
            if stream is None:
                continue
            if stream.latents.shape[1] != expected[name]:
                raise ValueError(
                    f"{name}: {stream.latents.shape[1]} tokens, but the block-causal mask was made "
                    f"for {expected[name]}"
                )
            by_sample = self.config.text_adaln or self.config.cross_timestep != "own"
            if by_sample and stream.sigma.shape[1] > 1:
                # While sampling, a block's own sigma takes the place of the sample's.
                raise ValueError(
                    "this model modulates by the sample's sigma, which has no meaning in a "
                    "block-causal clip whose blocks differ; give one sigma per sample [B, 1]"
                )

    def _audio_sigma_with_sinks(self, audio: Modality, sinks: int) -> Modality:
        """Sinks take the sigma of the first audio frame."""
        tokens, groups = audio.latents.shape[1], audio.sigma.shape[1]
        if not sinks or groups == 1:
            return audio
        sigma = jnp.repeat(audio.sigma, tokens // groups, axis=1)
        first = jnp.repeat(sigma[:, :1], sinks, axis=1)
        return audio.replace(sigma=jnp.concatenate([first, sigma], axis=1))

    def _embed(self, stream: Modality | None, other: Modality | None, is_video: bool, text):
        """Hidden states [B, T, width], what the layers read, and the embedded timestep."""
        if stream is None:
            return None, None, None
        c = self.config
        x = (self.video_in if is_video else self.audio_in)(stream.latents.astype(self.dtype))
        if stream.keyframes is not None:
            x = x + jnp.where(stream.keyframes[..., None], self.keyframe_embedding, 0).astype(
                x.dtype
            )
        adaln = self.video_adaln if is_video else self.audio_adaln
        modulation, embedded = adaln(stream.sigma * c.timestep_scale)
        cross_modulation = cross_gate = None
        if other is not None:
            own = c.cross_timestep == "own"
            gate_sigma = stream.sigma if own else other.sample_sigma
            sigma = other.sample_sigma if c.cross_timestep == "other" else stream.sigma
            cross_adaln = self.video_cross_adaln if is_video else self.audio_cross_adaln
            gate_adaln = self.a2v_gate_adaln if is_video else self.v2a_gate_adaln
            cross_modulation = cross_adaln(sigma * c.timestep_scale)[0]
            cross_gate = gate_adaln(gate_sigma * c.cross_gate_timestep_scale)[0]
        context = prompt = mask = None
        if text is None:
            context = self._context(stream.context, is_video)
            if c.text_adaln:
                prompt = self._prompt_modulation(stream.sample_sigma, is_video)
        if stream.context_mask is not None:
            mask = stream.context_mask.astype(bool)[:, None, None]
        conditioning = Conditioning(
            modulation=modulation,
            cross_modulation=cross_modulation,
            cross_gate=cross_gate,
            prompt_modulation=prompt,
            context=context,
            context_mask=mask,
            rope=stream.rope,
            cross_rope=stream.cross_rope,
        )
        return x, conditioning, embedded

    def _context(self, context: jax.Array, is_video: bool) -> jax.Array:
        context = context.astype(self.dtype)
        if self.config.caption_channels is None:
            return context
        return (self.video_caption if is_video else self.audio_caption)(context)

    def _prompt_modulation(self, sigma: jax.Array, is_video: bool) -> jax.Array:
        adaln = self.video_prompt_adaln if is_video else self.audio_prompt_adaln
        return adaln(sigma * self.config.timestep_scale)[0]

    def _head(self, x, table, embedded_timestep, out) -> jax.Array:
        shift, scale = _rows(table, embedded_timestep[:, :, None], self.dtype)
        x = modulate(layer_norm(x, self.config.norm_eps), scale, shift)
        return out(x.astype(self.dtype)).astype(jnp.float32)


def check_remat(remat: str) -> None:
    """Raises ValueError for a name that `Transformer.remat` does not take."""
    if remat not in ("none", "full") and not hasattr(jax.checkpoint_policies, remat):
        raise ValueError(
            f"remat is {remat!r}; it must be 'none', 'full', or the name of a policy in "
            "jax.checkpoint_policies"
        )


def init_params(model: Transformer, key: jax.Array) -> dict:
    """Random parameters, as plain arrays: nested dict, fp32, layers stacked on axis 0.

    Call it under `jax.jit` (or `jax.eval_shape`) for large models: nothing but the parameters is
    then computed.
    """
    return nn.unbox(init_boxed_params(model, key))


def init_boxed_params(model: Transformer, key: jax.Array) -> dict:
    """As `init_params`, each parameter boxed with its logical axis names."""
    c = model.config
    rope = clip_rope(c, video_frames=1, audio_frames=1, height=1, width=1)
    sinks = c.num_audio_sinks > 0
    frame, sigma = jnp.zeros((1,), jnp.int32), jnp.ones((1, 1))
    video = Modality(
        latents=jnp.zeros((1, 1, c.video_channels)),
        sigma=sigma,
        rope=rope.video_rope(frame),
        cross_rope=rope.video_cross_rope(frame),
        context=jnp.zeros((1, 1, c.text_dims[0])),
        keyframes=jnp.zeros((1, 1), bool) if c.keyframe_embedding else None,
    )
    audio = Modality(
        latents=jnp.zeros((1, 1, c.audio_channels)),
        sigma=sigma,
        rope=rope.audio_rope(frame, sinks),
        cross_rope=rope.audio_cross_rope(frame, sinks),
        context=jnp.zeros((1, 1, c.text_dims[1])),
    )
    plain = model.clone(implementation="xla", causal=None)
    return plain.init(key, video, audio)["params"]


def _table(module: nn.Module, name: str, rows: int, dim: int) -> jax.Array:
    # whole on every device, as biases are
    init = nn.with_logical_partitioning(nn.initializers.normal(dim**-0.5), (None, None))
    return module.param(name, init, (rows, dim))


def _rows(table: jax.Array, modulation: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """table [k, D] + modulation [B, G, k, D] (or broadcast over k) -> k arrays [B, G, D]."""
    rows = table.astype(dtype) + modulation
    return [rows[:, :, j] for j in range(table.shape[0])]
