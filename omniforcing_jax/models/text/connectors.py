"""From the text encoder's hidden states to the contexts of the transformer.

All hidden states of the text encoder (the scaled embeddings and the output of each layer, 49 for
Gemma 3 12B) are normalised and projected together, and a small bidirectional transformer for each
stream, the connector, turns them into its context. Learnt registers take the place of the padding,
so the context needs no mask. Contexts depend on the prompt only and can be stored.

Axis letters: B batch, T, S text tokens, D text encoder width, L text encoder layers (or connector
layers where stacked), N heads, H head dim, W connector width (the context's width).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.models.norms import rms_norm
from omniforcing_jax.models.transformer.layers import Attention, FeedForward
from omniforcing_jax.models.transformer.rope import Rope, axis_angles, frequencies
from omniforcing_jax.ranges import Layers, hold_fields

_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Text projection and connectors. The defaults are LTX-2.0.

    Attributes:
      text_channels: D, width of the text encoder.
      video_heads, video_head_dim, audio_heads, audio_head_dim: of the connectors' attention; their
        products are the widths of the two contexts.
      num_layers: layers of each connector.
      num_registers: learnt tokens that replace the padding; the text length is a multiple of it.
      max_position: divisor of the token index in the rotary embedding.
      rope_type: "split" or "interleaved".
      rope_frequency_dtype: "float64" or "float32", in which the frequencies are formed.
      gated_attention: a sigmoid gate per head on the attention's output (2.3).
      separate_projections: False (2.0) is one projection without bias for both modalities, after
        a normalisation per sample and layer over tokens and channels by mean and range; True (2.3)
        is one with bias for each, after an RMS norm per token and layer.
    """

    text_channels: int = 3840
    video_heads: int = 30
    video_head_dim: int = 128
    audio_heads: int = 30
    audio_head_dim: int = 128
    num_layers: Layers = 2
    num_registers: int = 128
    max_position: int = 4096
    rope_type: Literal["split", "interleaved"] = "split"
    rope_frequency_dtype: Literal["float64", "float32"] = "float64"
    gated_attention: bool = False
    separate_projections: bool = False

    def __post_init__(self):
        hold_fields(self)
        if not self.separate_projections and self.video_dim != self.audio_dim:
            raise ValueError(
                "a projection shared by both modalities needs connectors of one width, not "
                f"{self.video_dim} (video) and {self.audio_dim} (audio)"
            )

    @property
    def video_dim(self) -> int:
        """Width of the video context."""
        return self.video_heads * self.video_head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio context."""
        return self.audio_heads * self.audio_head_dim

    @classmethod
    def from_metadata(cls, transformer: Mapping[str, Any]) -> "ConnectorConfig":
        """Reads `config["transformer"]` of an LTX-2 safetensors header.

        Raises:
          ValueError: a missing key, or a setting this implementation does not have; names all of
            them and what is supported.
        """
        t = dict(transformer)
        _check_metadata(t)
        heads, head_dim = t["connector_num_attention_heads"], t["connector_attention_head_dim"]
        return cls(
            text_channels=t["caption_channels"],
            video_heads=heads,
            video_head_dim=head_dim,
            audio_heads=t.get("audio_connector_num_attention_heads", heads),
            audio_head_dim=t.get("audio_connector_attention_head_dim", head_dim),
            num_layers=t["connector_num_layers"],
            num_registers=t["connector_num_learnable_registers"],
            max_position=t["connector_positional_embedding_max_pos"][0],
            rope_type=t.get("rope_type", "interleaved"),
            rope_frequency_dtype=t.get("frequencies_precision", "float32"),
            gated_attention=t.get("connector_apply_gated_attention", False),
            separate_projections=t.get("caption_proj_before_connector", False),
        )


_REQUIRED = (
    "caption_channels",
    "connector_attention_head_dim",
    "connector_num_attention_heads",
    "connector_num_layers",
    "connector_num_learnable_registers",
    "connector_positional_embedding_max_pos",
)

# Settings with a single value in every published model that has them.
_FIXED = {
    "use_embeddings_connector": True,
    "connector_norm_output": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}


def _check_metadata(t: Mapping[str, Any]) -> None:
    problems = find_problems(t, required=_REQUIRED, fixed=_FIXED)
    registers = t.get("connector_num_learnable_registers", 1)
    if not isinstance(registers, int) or registers < 1:
        problems.append(
            f"connector_num_learnable_registers is {registers!r}; a positive number is supported"
        )
    max_position = t.get("connector_positional_embedding_max_pos", [1])
    if len(max_position) != 1:
        problems.append(
            f"connector_positional_embedding_max_pos is {max_position!r}; one number is supported"
        )
    separate = bool(t.get("caption_proj_before_connector", False))
    norm, expected = t.get("text_encoder_norm_type"), "per_token_rms" if separate else None
    # LTX-2.5 writes it in upper case
    if (norm.lower() if isinstance(norm, str) else norm) != expected:
        problems.append(
            f"text_encoder_norm_type is {norm!r}; only {expected!r} is supported when "
            f"caption_proj_before_connector is {separate}"
        )
    raise_problems("transformer metadata, connectors", problems)


def normalize_hidden_states(
    hidden_states: jax.Array, attention_mask: jax.Array, config: ConnectorConfig
) -> jax.Array:
    """Normalises the text encoder's states; every layer independently of the others.

    LTX-2.0, per sample and layer over valid tokens and channels:
    8 (x - mean) / (max - min + eps). LTX-2.3, per token and layer over channels:
    x / sqrt(mean(x^2) + eps). What padded positions hold has no influence; they become 0.

    Args:
      hidden_states: [B, S, D, L], or [B, S, D] of a single layer.
      attention_mask: [B, S], non-zero at valid tokens.
      config: which of the two norms.

    Returns:
      The shape of `hidden_states`, float32.
    """
    x = hidden_states.astype(jnp.float32)
    valid = attention_mask.astype(bool).reshape(attention_mask.shape + (1,) * (x.ndim - 2))
    if config.separate_projections:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=2, keepdims=True) + _NORM_EPS)
    else:
        count = jnp.sum(valid, axis=1, keepdims=True) * x.shape[2]
        total = jnp.sum(x, axis=(1, 2), keepdims=True, where=valid)
        highest = jnp.max(x, axis=(1, 2), keepdims=True, where=valid, initial=-jnp.inf)
        lowest = jnp.min(x, axis=(1, 2), keepdims=True, where=valid, initial=jnp.inf)
        mean = total / (count + _NORM_EPS)
        y = 8.0 * (x - mean) / (highest - lowest + _NORM_EPS)
    return jnp.where(valid, y, 0.0)


def projection_scale(out_dim: int, config: ConnectorConfig) -> float:
    """Factor on the projected features, before the bias: sqrt(W / D) for LTX-2.3, else 1."""
    return float(np.sqrt(out_dim / config.text_channels)) if config.separate_projections else 1.0


def fill_with_registers(
    features: jax.Array, attention_mask: jax.Array, registers: jax.Array
) -> jax.Array:
    """Moves valid tokens to the front, in order, and fills the rest with registers.

    Position i behind the valid tokens gets register i mod R (i counts from the sequence's start).

    Args:
      features: [B, S, W].
      attention_mask: [B, S], non-zero at valid tokens, which may lie anywhere.
      registers: [R, W]; R divides S.

    Returns:
      [B, S, W] in the dtype of `features`.
    """
    valid = attention_mask.astype(bool)
    order = jnp.argsort(~valid, axis=1, stable=True)  # [B, S]
    compact = jnp.take_along_axis(features, order[:, :, None], axis=1)
    tiled = jnp.tile(registers, (features.shape[1] // registers.shape[0], 1))  # [S, W]
    num_valid = jnp.sum(valid, axis=1, keepdims=True)
    is_text = jnp.arange(features.shape[1])[None] < num_valid  # [B, S]
    return jnp.where(is_text[:, :, None], compact, tiled.astype(features.dtype)[None])


def connector_rope(length: int, heads: int, dim: int, config: ConnectorConfig) -> Rope:
    """Rotation table [1, length, N, H/2] of positions 0, 1, 2, … (no mid-points here)."""
    freqs = frequencies(dim // 2, _ROPE_THETA, config.rope_frequency_dtype)
    angles = axis_angles(np.arange(length), config.max_position, freqs)  # [length, N * H/2]
    split = partial(rearrange, pattern="T (N h) -> 1 T N h", N=heads)
    return Rope(jnp.asarray(split(np.cos(angles))), jnp.asarray(split(np.sin(angles))))


class ConnectorLayer(nn.Module):
    """Pre-norm layer of a connector, in the carry form of `nn.scan`."""

    heads: int
    dim: int
    config: ConnectorConfig
    dtype: jnp.dtype

    def setup(self):
        self.attn = Attention(
            heads=self.heads,
            head_dim=self.dim // self.heads,
            out_dim=self.dim,
            eps=_NORM_EPS,
            dtype=self.dtype,
            rope_type=self.config.rope_type,
            gated=self.config.gated_attention,
        )
        self.ff = FeedForward(self.dim, self.dtype)

    def __call__(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, None]:
        """x [B, T, W] -> [B, T, W]."""
        y = rms_norm(x, _NORM_EPS).astype(self.dtype)
        x = x + self.attn(y, *self.attn.queries_keys_values(y), rope=rope)[0]  # [B, T, W]
        x = x + self.ff(rms_norm(x, _NORM_EPS).astype(self.dtype))
        return x, None


class Connector(nn.Module):
    """Transformer over the text features of one modality, padding replaced by registers."""

    heads: int
    dim: int
    config: ConnectorConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """features [B, S, W], attention_mask [B, S] -> context [B, S, W], of unit RMS per token."""
        init = nn.with_logical_partitioning(_uniform, (None, "embed"))
        registers = self.param("registers", init, (self.config.num_registers, self.dim))
        x = fill_with_registers(features.astype(self.dtype), attention_mask, registers)
        rope = connector_rope(x.shape[1], self.heads, self.dim, self.config)
        blocks = nn.scan(
            ConnectorLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.num_layers,
            check_constancy_invariants=False,  # or the layer is traced twice
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.dim, self.config, self.dtype, name="blocks")
        x, _ = blocks(x, rope)
        return rms_norm(x, _NORM_EPS).astype(self.dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


class Projection(nn.Module):
    """scale * x W + b over the text encoder's channels and layers together."""

    features: int
    scale: float
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D, L] normalised states -> [B, S, W]."""
        x = x.reshape(*x.shape[:2], -1).astype(self.dtype)  # [B, S, D * L], index d * L + l
        shape = (x.shape[-1], self.features)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        kernel = self.param("kernel", init, shape)
        y = self.scale * (x @ kernel.astype(self.dtype))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",))
            bias = self.param("bias", init, (self.features,))
            y = y + jnp.expand_dims(bias.astype(self.dtype), range(y.ndim - 1))
        return y


class TextConnectors(nn.Module):
    """Text encoder states -> contexts of the video and the audio stream.

    `contexts` alone turns features projected elsewhere (see `TextTower.features`) into contexts.
    """

    config: ConnectorConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config

        def projection(features):
            scale = projection_scale(features, c)
            return Projection(features, scale, use_bias=c.separate_projections, dtype=self.dtype)

        if c.separate_projections:
            self.video_projection = projection(c.video_dim)
            self.audio_projection = projection(c.audio_dim)
        else:
            self.projection = projection(c.video_dim)
        self.video_connector = Connector(c.video_heads, c.video_dim, c, self.dtype)
        self.audio_connector = Connector(c.audio_heads, c.audio_dim, c, self.dtype)

    def __call__(
        self, hidden_states: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """States [B, S, D, L] and mask [B, S] -> contexts [B, S, Wv] and [B, S, Wa] in `dtype`.

        Raises:
          ValueError: shapes that do not fit the configuration or each other, or a text length that
            is not a multiple of the number of registers.
        """
        return self.contexts(*self.features(hidden_states, attention_mask), attention_mask)

    def features(
        self, hidden_states: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Projected features [B, S, Wv] and [B, S, Wa] in `dtype`.

        Args:
          hidden_states: [B, S, D, L], all layers of the text encoder.
          attention_mask: [B, S], non-zero at valid tokens.
        """
        channels = self.config.text_channels
        if hidden_states.ndim != 4 or hidden_states.shape[2] != channels:
            raise ValueError(
                f"hidden_states must have shape [B, S, {channels}, L], got "
                f"{list(hidden_states.shape)}"
            )
        _check_mask(hidden_states, attention_mask)
        x = normalize_hidden_states(hidden_states, attention_mask, self.config)
        if self.config.separate_projections:
            return self.video_projection(x), self.audio_projection(x)
        shared = self.projection(x)
        return shared, shared

    def contexts(
        self, video_features: jax.Array, audio_features: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Contexts [B, S, Wv] and [B, S, Wa]; every token of them is to be attended to."""
        widths = {"video": self.config.video_dim, "audio": self.config.audio_dim}
        for features, (name, width) in zip(
            (video_features, audio_features), widths.items(), strict=True
        ):
            if features.ndim != 3 or features.shape[-1] != width:
                raise ValueError(
                    f"{name} features must have shape [B, S, {width}], got {list(features.shape)}"
                )
            _check_mask(features, attention_mask)
        length, registers = attention_mask.shape[1], self.config.num_registers
        if length % registers:
            raise ValueError(
                f"the text is {length} tokens long; pad it to a multiple of the {registers} "
                f"registers, for instance to {-(-length // registers) * registers}"
            )
        return (
            self.video_connector(video_features, attention_mask),
            self.audio_connector(audio_features, attention_mask),
        )


def _check_mask(x: jax.Array, attention_mask: jax.Array) -> None:
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape {list(x.shape[:2])} to match the text, got "
            f"{list(attention_mask.shape)}"
        )
