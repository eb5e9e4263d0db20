"""Gemma's text tower: token ids -> the hidden states that LTX-2's connectors read.

LTX-2.0 and 2.3 read Gemma 3, LTX-2.5 a Gemma 4.

LTX-2 reads all of Gemma's hidden states: the scaled embeddings, the output of every layer but the
last, and the last one's after the final norm. Stacked, those of 1024 tokens of the 12B model take
0.4 GB in bfloat16 per prompt and 0.8 GB while they are normalised. `TextTower.features` never has
the stack: it normalises and projects each state where the scan over the layers produces it.

Five of six layers are local: they see a sliding window and rotate with a small base. Every sixth is
global: it sees all earlier tokens and rotates with a large base. Masks and rotation tables of both
kinds are made once. In Gemma 3 all layers have the same parameters, so one block is scanned over
them, and a flag per layer selects. Gemma 4's global layers have wider heads and values that are
their keys, so its layers are called one after the other.

Axis letters: B batch, S, T text tokens, D width, N heads, K key/value heads, H head dim, L layers,
W width of the projected features, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from omniforcing_jax.models import quantization
from omniforcing_jax.models.norms import rms_norm
from omniforcing_jax.models.text.connectors import ConnectorConfig, normalize_hidden_states
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.models.transformer.rope import Rope
from omniforcing_jax.ops.attention import attention


@flax.struct.dataclass
class LayerProjection:
    """The connectors' projection, with one kernel for each hidden state.

    Attributes:
      kernel: [L + 1, D, W].
      bias: [W], or None.
      scale: factor on the sum over the states, before the bias.
    """

    kernel: jax.Array
    bias: jax.Array | None
    scale: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class AttentionInputs:
    """Mask and rotations of the attention of one kind of layer, local or global.

    Attributes:
      mask: bool [B, 1, T, S], True = attend.
      rope: tables [1, T, 1, H/2].
    """

    mask: jax.Array
    rope: Rope


def rope_table(
    length: int, head_dim: int, theta: float, factor: float, fraction: float = 1.0
) -> Rope:
    """Rotation by p / factor * theta^(-2i/H), positions 0, 1, 2, …, formed in float32.

    Padding counts: the rotation is relative, so where a text begins makes no difference.

    Args:
      fraction: of the pairs of channels that are rotated; the last ones are not.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents / np.float32(factor)
    frequencies[int(fraction * head_dim // 2) :] = 0.0
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies  # [T, H/2]
    return Rope(
        jnp.asarray(np.cos(angles)[None, :, None]), jnp.asarray(np.sin(angles)[None, :, None])
    )


def attention_inputs(
    attention_mask: jax.Array, config: GemmaConfig
) -> tuple[AttentionInputs, AttentionInputs]:
    """Of local layers, which see a window, and of global ones.

    Args:
      attention_mask: [B, S], non-zero at valid tokens.
    """
    c, length = config, attention_mask.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)  # [T, S], back into the past
    distance = distance[None, None]
    valid = attention_mask.astype(bool)[:, None, None, :]
    local = AttentionInputs(
        valid & (distance >= 0) & (distance < c.sliding_window),
        rope_table(length, c.head_dim, c.local_rope_theta, c.local_rope_factor),
    )
    global_ = AttentionInputs(
        valid & (distance >= 0),
        rope_table(
            length,
            c.global_head_dim,
            c.global_rope_theta,
            c.global_rope_factor,
            c.global_rope_fraction,
        ),
    )
    return local, global_


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, in fp32.

    Attributes:
      offset: 1 in Gemma 3, whose scales are stored as differences from 1.
    """

    dim: int
    eps: float
    offset: float
    dtype: jnp.dtype

    def setup(self):
        init = nn.initializers.constant(1.0 - self.offset)
        self.scale = self.param("scale", nn.with_logical_partitioning(init, (None,)), (self.dim,))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.expand_dims(self.scale.astype(jnp.float32), range(x.ndim - 1))
        return (rms_norm(x, self.eps) * (self.offset + scale)).astype(self.dtype)


class Linear(nn.Module):
    """y = x W without a bias: x [..., E] -> [..., features]; W an array or `QuantizedArray`."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: jnp.dtype
    quantize: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = quantization.initializer(
            nn.initializers.lecun_normal(), self.axes, self.quantize, input_axis=-2
        )
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        return quantization.matmul(x, kernel, self.dtype)


class Embedding(nn.Module):
    """Token embeddings times sqrt(D), the factor rounded to the compute dtype as in training."""

    config: GemmaConfig
    dtype: jnp.dtype
    quantize: str

    @nn.compact
    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """token_ids int [B, S] -> [B, S, D]."""
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)
        init = quantization.initializer(init, (None, "embed"), self.quantize, input_axis=-1)
        table = self.param("embedding", init, (c.vocab_size, c.hidden_size))
        scale = jnp.asarray(c.hidden_size**0.5, self.dtype)
        return quantization.take_rows(table, token_ids, self.dtype) * scale


class SelfAttention(nn.Module):
    """Grouped-query attention; q and k are normalised per head and rotated.

    Gemma 4 normalises the values as well, without a scale; those of its global layers are the keys
    before their norm.

    Attributes:
      is_global: whether it is the attention of a global layer, where that makes a difference.
    """

    config: GemmaConfig
    is_global: bool
    dtype: jnp.dtype
    quantize: str

    def setup(self):
        c = self.config
        head_dim, kv_heads = c.heads(self.is_global)

        def linear(features, axes):
            return Linear(features, axes, self.dtype, self.quantize)

        self.q = linear(c.num_heads * head_dim, ("embed", "heads"))
        self.k = linear(kv_heads * head_dim, ("embed", "heads"))
        if not self.keys_are_values:
            self.v = linear(kv_heads * head_dim, ("embed", "heads"))
        self.out = linear(c.hidden_size, ("heads", "embed"))
        self.q_norm = RMSNorm(head_dim, c.norm_eps, c.norm_offset, self.dtype)
        self.k_norm = RMSNorm(head_dim, c.norm_eps, c.norm_offset, self.dtype)

    @property
    def keys_are_values(self) -> bool:
        return self.is_global and self.config.global_keys_are_values

    def __call__(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        head_dim, kv_heads = c.heads(self.is_global)
        heads = partial(rearrange, pattern="B T (N H) -> B T N H", H=head_dim)
        q, k = heads(self.q(x)), heads(self.k(x))
        v = k if self.keys_are_values else heads(self.v(x))
        if c.gemma4:
            v = rms_norm(v, c.norm_eps).astype(self.dtype)
        q = inputs.rope.rotate(self.q_norm(q), "split")  # [B, T, N, H]
        k = inputs.rope.rotate(self.k_norm(k), "split")  # [B, T, K, H]
        # [B, T, K, H] -> [B, T, N, H]
        k, v = (jnp.repeat(y, c.num_heads // kv_heads, axis=2) for y in (k, v))
        y = attention(q, k, v, mask=inputs.mask, scale=c.query_pre_attn_scalar**-0.5)
        return self.out(rearrange(y, "B T N H -> B T (N H)"))


class GatedFeedForward(nn.Module):
    """(gelu(x G) * x U) D with the tanh approximation of GELU."""

    config: GemmaConfig
    dtype: jnp.dtype
    quantize: str

    def setup(self):
        c = self.config
        up_axes, down_axes = ("embed", "mlp"), ("mlp", "embed")
        self.gate = Linear(c.intermediate_size, up_axes, self.dtype, self.quantize)
        self.up = Linear(c.intermediate_size, up_axes, self.dtype, self.quantize)
        self.down = Linear(c.hidden_size, down_axes, self.dtype, self.quantize)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        return self.down(nn.gelu(self.gate(x), approximate=True) * self.up(x))


class GemmaLayer(nn.Module):
    """One layer; a norm before and after attention and feed-forward.

    Gemma 4 scales the result by a number of the layer's own.
    """

    config: GemmaConfig
    is_global: bool
    dtype: jnp.dtype
    quantize: str

    def setup(self):
        c = self.config

        def norm():
            return RMSNorm(c.hidden_size, c.norm_eps, c.norm_offset, self.dtype)

        self.attn = SelfAttention(c, self.is_global, self.dtype, self.quantize)
        self.ff = GatedFeedForward(c, self.dtype, self.quantize)
        self.pre_attn_norm, self.post_attn_norm = norm(), norm()
        self.pre_ff_norm, self.post_ff_norm = norm(), norm()
        if c.gemma4:
            init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
            self.scalar = self.param("scalar", init, (1,))

    def __call__(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x), inputs))
        x = x + self.post_ff_norm(self.ff(self.pre_ff_norm(x)))
        return x * self.scalar.astype(self.dtype)[None, None] if self.config.gemma4 else x


class TextTower(nn.Module):
    """Gemma without its head, its vision tower and its cache: one causal pass over a prompt.

    Attributes:
      dtype: compute dtype; parameters are cast to it at use.
      quantize: "int8" declares the linear layers' kernels and the embedding table as
        `QuantizedArray`.
    """

    config: GemmaConfig
    dtype: jnp.dtype = jnp.float32
    quantize: str = "none"

    def setup(self):
        quantization.check_mode(self.quantize)
        c = self.config
        self.embed = Embedding(c, self.dtype, self.quantize)
        if c.gemma4:
            self.layers = [GemmaLayer(c, g, self.dtype, self.quantize) for g in c.is_global]
        else:
            self.blocks = GemmaLayer(c, False, self.dtype, self.quantize)
        self.final_norm = RMSNorm(c.hidden_size, c.norm_eps, c.norm_offset, self.dtype)

    def __call__(self, token_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """All hidden states, stacked. For small models and tests; see `features`.

        Args:
          token_ids: int [B, S].
          attention_mask: [B, S], non-zero at valid tokens; the padding may be on either side.

        Returns:
          [B, S, D, L + 1] in `dtype`; finite, but without meaning, at padded positions.

        Raises:
          ValueError: shapes that do not fit.
        """
        _check_tokens(token_ids, attention_mask)

        def body(apply, x, layer):
            return apply(x, layer), x

        x, states = self._scan(body, self.embed(token_ids), attention_mask)  # [L, B, S, D]
        states = jnp.concatenate([states, self.final_norm(x)[None]])
        return jnp.moveaxis(states, 0, -1)

    def features(
        self,
        token_ids: jax.Array,
        attention_mask: jax.Array,
        projections: Mapping[str, LayerProjection],
        connectors: ConnectorConfig,
    ) -> dict[str, jax.Array]:
        """Normalised and projected hidden states, as `TextConnectors.features` makes them.

        Each state is projected as soon as it is computed; only the sums are held, in float32.

        Args:
          token_ids, attention_mask: as for `__call__`.
          projections: by name; see `LayerProjection`.
          connectors: says which normalisation.

        Returns:
          {name: [B, S, W] in `dtype`}.

        Raises:
          ValueError: shapes that do not fit.
        """
        _check_tokens(token_ids, attention_mask)
        shape = (self.config.num_states, self.config.hidden_size)
        for name, projection in projections.items():
            if projection.kernel.shape[:2] != shape:
                raise ValueError(
                    f"{name}: the projection's kernel must have shape [{shape[0]}, {shape[1]}, W] "
                    f"for this text tower, got {list(projection.kernel.shape)}"
                )

        def add(sums, x, state):
            y = normalize_hidden_states(x, attention_mask, connectors).astype(self.dtype)
            return {
                name: sums[name]
                + jnp.einsum(
                    "BSD,DW->BSW",
                    y,
                    projection.kernel[state].astype(self.dtype),
                    preferred_element_type=jnp.float32,
                )
                for name, projection in projections.items()
            }

        def body(apply, carry, layer):
            x, sums = carry
            return (apply(x, layer), add(sums, x, layer)), None

        zeros = {
            name: jnp.zeros((*token_ids.shape, projection.kernel.shape[-1]), jnp.float32)
            for name, projection in projections.items()
        }
        (x, sums), _ = self._scan(body, (self.embed(token_ids), zeros), attention_mask)
        sums = add(sums, self.final_norm(x), self.config.num_layers)
        results = {}
        for name, projection in projections.items():
            y = projection.scale * sums[name]
            y = (
                y
                if projection.bias is None
                else y + projection.bias.astype(jnp.float32)[None, None]
            )
            results[name] = y.astype(self.dtype)
        return results

    def _scan(self, body: Callable, carry: Any, attention_mask: jax.Array) -> tuple[Any, Any]:
        """Scan over the layers: body(apply, carry, layer) -> (carry, y); apply(x, layer) -> x."""
        inputs = attention_inputs(attention_mask, self.config)
        if self.config.gemma4:
            return self._call_layers(body, carry, inputs)
        is_global = jnp.asarray(self.config.is_global)

        def step(block, carry, layer):
            def apply(x, layer):
                choose = lambda a, b: jnp.where(is_global[layer], b, a)  # noqa: E731
                return block(x, jax.tree.map(choose, *inputs))

            return body(apply, carry, layer)

        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.blocks, carry, jnp.arange(self.config.num_layers))

    def _call_layers(self, body: Callable, carry: Any, inputs: tuple) -> tuple[Any, Any]:
        """As `_scan`, layer after layer."""
        results = []
        for i, (layer, is_global) in enumerate(
            zip(self.layers, self.config.is_global, strict=True)
        ):
            apply = lambda x, _, layer=layer, kind=is_global: layer(x, inputs[kind])  # noqa: E731
            carry, result = body(apply, carry, i)
            results.append(result)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def init_boxed_params(config: GemmaConfig, key: jax.Array, quantize: str = "none") -> Any:
    """Random parameters with their logical axis names; under `jax.eval_shape` only shapes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return TextTower(config, quantize=quantize).init(key, tokens, jnp.ones_like(tokens))["params"]


def _check_tokens(token_ids: jax.Array, attention_mask: jax.Array) -> None:
    if token_ids.ndim != 2 or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(
            f"token_ids must be integers of shape [B, S], got {token_ids.dtype} "
            f"{list(token_ids.shape)}"
        )
    if attention_mask.shape != token_ids.shape:
        raise ValueError(
            f"attention_mask must have shape {list(token_ids.shape)} to match token_ids, got "
            f"{list(attention_mask.shape)}"
        )
