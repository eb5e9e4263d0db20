"""The dual-stream LTX-2 transformer: video and audio, coupled in every layer.

`Transformer.__call__` embeds both streams, runs `Block` for every layer and applies the output
heads, which predict the velocity v = noise - x0. Weights that are stacked over the layers, as they
are trained, are scanned; those that lie in a tuple, one tree a layer, are a Python loop: what
samplers use (`sampling.weights`), as a scan copies each layer's weights out of the stack on GPUs.
Axis letters: see `layers.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.distributed.partitioning import WHOLE, WeightRules, constrain
from omniforcing_jax.models.norms import layer_norm
from omniforcing_jax.models.transformer.block import Block, modulation_rows, parameter_table
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.inputs import (
    ClipMask,
    Conditioning,
    Modality,
    Pathways,
    TextKV,
)
from omniforcing_jax.models.transformer.layers import CaptionProjection, linear
from omniforcing_jax.models.transformer.modulation import AdaLN, modulate
from omniforcing_jax.models.transformer.rope import clip_rope


class Transformer(nn.Module):
    """The network of all layers. See the module's docstring; `apply` needs `{"params": tree}`.

    Attributes:
      config: what the checkpoint says.
      dtype: compute dtype; the residual stream has it too. Norms, softmax, sigmas, phases are fp32.
      implementation: attention backend, see `ops.attention`.
      causal: the clip's block-causal mask; None attends to everything given.
      return_kv: return the new keys and values of all layers (for the rolling cache).
      remat: "none", "full", or the name of a policy in `jax.checkpoint_policies`.
      unroll: layers in one step of the scan over layers; more take longer to compile.
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
            self.keyframe_embedding = parameter_table(self, "keyframe_embedding", 1, c.video_dim)
        if c.num_audio_sinks:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None))
            self.audio_sinks = self.param("audio_sinks", init, (c.num_audio_sinks, c.audio_dim))
        self.blocks = self._scanned_block()
        self.video_out_table = parameter_table(self, "video_out_table", 2, c.video_dim)
        self.audio_out_table = parameter_table(self, "audio_out_table", 2, c.audio_dim)
        self.video_out = linear(c.video_channels, ("embed", None), *how, split_tokens=True)
        self.audio_out = linear(c.audio_channels, ("embed", None), *how)

    def _rules(self) -> WeightRules:
        return dataclasses.replace(self.rules, keep_gathered=self.remat == "full")

    def _block_fields(self) -> tuple:
        c = self.config
        return c, self.dtype, self.implementation, self.causal, self.return_kv, self._rules()

    def _layers(self, method: str, carry, per_layer: tuple, shared: tuple):
        """A method of all layers: what it carries through them, and what each of them returns.

        Args:
          per_layer: arguments of which each layer has its own: arrays with a leading axis L, tuples
            of L trees, or None.
          shared: the same for all layers.
        """
        weights = self.variables["params"]["blocks"] if not self.is_initializing() else None
        if not isinstance(weights, tuple):
            return getattr(self.blocks, method)(carry, *per_layer, *shared)
        block = Block(*self._block_fields(), parent=None)
        # traced once for all layers
        layer = jax.jit(lambda params, *args: block.apply({"params": params}, *args, method=method))

        def of_layer(x, i: int):
            return x[i] if isinstance(x, tuple) else jax.tree.map(lambda leaf: leaf[i], x)

        found = []
        for i, params in enumerate(weights):
            carry, new = layer(params, carry, *(of_layer(x, i) for x in per_layer), *shared)
            found.append(new)
        return carry, tuple(found)

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
            "check_constancy_invariants": False,  # or the layer is traced twice
        }
        call = {**shared, "in_axes": (0, 0, 0, nn.broadcast, nn.broadcast)}
        text_kv = {**shared, "in_axes": (nn.broadcast, nn.broadcast)}
        scanned = nn.scan(block, methods={"__call__": call, "text_kv": text_kv})
        return scanned(*self._block_fields())

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
          history: `History` per pathway with arrays [L, B, S, N, H] and lengths [L], or a tuple of
            the layers' `Pathways` of `Slots`.
          text: text keys and values from `text_kv`; otherwise they are computed from the contexts.
          keep: [L, B] arrays per pathway, zero skips it (guidance by perturbation).

        Every call without a history, which means block 0 and whole clips, puts the sinks before
        the audio.

        Returns:
          (video [B, T_v, channels], audio [B, T_a, channels]) float32, and, with `return_kv`, the
          new keys and values: Pathways of KV [L, B, S, N, H], keys not rotated, else None. From
          weights per layer they are a tuple of what each layer's `Block` returns.

        Raises:
          ValueError: inputs that do not fit each other or the model.
        """
        self._check(video, audio, text)
        sinks = self.config.num_audio_sinks if history is None and audio is not None else 0
        if audio is not None:
            audio = self._audio_sigma_with_sinks(audio, sinks)
        with jax.named_scope("embed_video"):
            v, v_stream, v_time = self._embed(video, audio, True, text)
        with jax.named_scope("embed_audio"):
            a, a_stream, a_time = self._embed(audio, video, False, text)
        if sinks:
            tokens = self.audio_sinks.astype(self.dtype)  # [sinks, C]
            tokens = jnp.broadcast_to(tokens, (a.shape[0], *tokens.shape))
            a = jnp.concatenate([tokens, a], axis=1)  # [B, sinks + T, C]
        # Splitting 25 audio tokens a second costs more than it saves (docs/scaling.md).
        v = None if v is None else constrain(v, "batch", "tokens", WHOLE)
        a = None if a is None else constrain(a, "batch", WHOLE, WHOLE)
        (v, a), new_kv = self._layers(
            "__call__", (v, a), (history, text, keep), (v_stream, a_stream)
        )
        with jax.named_scope("output_heads"):
            if v is not None:
                v = self._head(v, self.video_out_table, v_time, self.video_out)
            if a is not None:
                a = self._head(a, self.audio_out_table, a_time, self.audio_out)[:, sinks:]
        return (v, a), new_kv

    def text_kv(
        self,
        video_context: jax.Array | None,
        audio_context: jax.Array | None,
        sigma: tuple[jax.Array, jax.Array] | jax.Array | None = None,
    ) -> TextKV:
        """Text keys and values [L, B, S, N, H] of all layers, to compute them once per prompt; from
        weights per layer, a tuple of those of each layer [B, S, N, H].

        Args:
          video_context, audio_context: [B, S, text_dim].
          sigma: [B], or that of both streams (video, audio), needed when the text attention is
            modulated (LTX-2.3): K/V depend on it there.

        Raises:
          ValueError: sigma is missing where it matters.
        """
        if self.config.text_adaln and sigma is None:
            raise ValueError("this model's text attention is modulated: text_kv needs sigma [B]")

        sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)

        def conditioning(context, is_video):
            if context is None:
                return None
            prompt = None
            if self.config.text_adaln:
                prompt = self._prompt_modulation(sigmas[0 if is_video else 1][:, None], is_video)
            return Conditioning(prompt_modulation=prompt, context=self._context(context, is_video))

        video, audio = conditioning(video_context, True), conditioning(audio_context, False)
        return self._layers("text_kv", None, (), (video, audio))[1]

    def _check(self, video, audio, text):
        """Raises ValueError for streams that do not fit each other or the model."""
        if video is None and audio is None:
            raise ValueError("at least one of video and audio must be given")
        for name, stream in (("video", video), ("audio", audio)):
            if stream is None:
                continue
            tokens, groups = stream.latents.shape[1], stream.sigma.shape[1]
            if tokens % groups:
                raise ValueError(
                    f"{name}: {tokens} tokens cannot share {groups} sigmas evenly; give one per "
                    "sample, frame or token"
                )
            if stream.context is None and text is None:
                raise ValueError(f"{name}: neither a text context nor text K/V was given")
            width = self.config.text_dims[0 if name == "video" else 1]
            if stream.context is not None and stream.context.shape[-1] != width:
                raise ValueError(
                    f"{name}: text features are {stream.context.shape[-1]} wide, this model takes "
                    f"{width}; were they encoded for another model version?"
                )
            if self.causal is None:
                continue
            expected = self.causal.audio_frames
            if name == "video":
                expected = self.causal.video_frames * self.causal.patches
            if tokens != expected:
                raise ValueError(
                    f"{name}: {tokens} tokens, but the block-causal mask was made for {expected}"
                )
            by_sample = self.config.text_adaln or self.config.cross_timestep != "own"
            if by_sample and groups > 1 and stream.global_sigma is None:
                # While sampling, a block's own sigma takes the place of the sample's.
                raise ValueError(
                    "this model modulates by the sample's sigma, which has no meaning in a "
                    "block-causal clip whose blocks differ; give one sigma per sample [B, 1], or "
                    "the sample's own beside those of its tokens"
                )

    def _audio_sigma_with_sinks(self, audio: Modality, sinks: int) -> Modality:
        """Gives the sinks the sigma of the first audio frame."""
        tokens, groups = audio.latents.shape[1], audio.sigma.shape[1]
        if not sinks or groups == 1:
            return audio
        sigma = jnp.repeat(audio.sigma, tokens // groups, axis=1)
        first = jnp.repeat(sigma[:, :1], sinks, axis=1)
        return audio.replace(sigma=jnp.concatenate([first, sigma], axis=1))  # [B, sinks + T]

    def _embed(self, stream: Modality | None, other: Modality | None, is_video: bool, text):
        """Hidden states [B, T, D], what the layers read, and the embedded timestep [B, G, D]."""
        if stream is None:
            return None, None, None
        c = self.config
        x = (self.video_in if is_video else self.audio_in)(stream.latents.astype(self.dtype))
        if stream.keyframes is not None and c.keyframe_embedding:
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
            self_bias=stream.self_bias,
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
        """Velocities: x [B, T, D], embedded_timestep [B, G, D] -> [B, T, channels] float32."""
        shift, scale = modulation_rows(table, embedded_timestep[:, :, None], self.dtype)
        x = modulate(layer_norm(x, self.config.norm_eps), scale, shift)
        return out(x.astype(self.dtype)).astype(jnp.float32)


def check_remat(remat: str) -> None:
    """Raises ValueError unless `remat` is a value of `Transformer.remat`."""
    if remat not in ("none", "full") and not hasattr(jax.checkpoint_policies, remat):
        raise ValueError(
            f"remat is {remat!r}; it must be 'none', 'full', or the name of a policy in "
            "jax.checkpoint_policies"
        )


def init_params(model: Transformer, key: jax.Array) -> dict:
    """Random parameters, as plain arrays: nested dict, fp32, layers stacked on axis 0.

    Call it under `jax.jit` (or `jax.eval_shape`) for large models, so that no forward pass is run.
    """
    return nn.unbox(init_boxed_params(model, key))


def init_boxed_params(model: Transformer, key: jax.Array) -> dict:
    """As `init_params`, with every parameter in a box that names its logical axes."""
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
