"""Linear layers, feed-forward and attention of the LTX-2 transformer.

Axis letters used throughout the model: B batch, F latent frames, P patches per frame, T query
tokens, S key tokens, N heads, H head dim, D video width, C audio width, L layers, K blocks,
G groups of tokens that share a noise level.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from omniforcing_jax.distributed.partitioning import WeightRules, constrain, product
from omniforcing_jax.models import quantization
from omniforcing_jax.models.norms import layer_norm, rms_norm
from omniforcing_jax.models.transformer.rope import GridRope, Rope
from omniforcing_jax.ops.attention import attention, attention_entropy


@flax.struct.dataclass
class KV:
    """Keys, normalised and (unless said otherwise) not rotated, and values: [..., B, S, N, H].

    Those of a stream's cache and text may be `QuantizedArray`, with a scale for each token and
    head; attention expands what it reads.

    Attributes:
      order: of the axes S, N and H. "SNH" it is in programs; what is kept between those of a TPU
        lies as attention reads it there (`order_on_tpu`), or they would copy it as they start.
    """

    k: jax.Array
    v: jax.Array
    order: str = flax.struct.field(pytree_node=False, default="SNH")

    def ordered(self, order: str = "SNH") -> "KV":
        """The same in another order; scales of quantised ones have their tokens last in all but
        "SNH", as nothing else fills a register."""

        def turned(x: jax.Array, old: str, new: str) -> jax.Array:
            axes = [x.ndim - 3 + old.index(letter) for letter in new]
            return jnp.transpose(x, (*range(x.ndim - 3), *axes))

        def one(x: jax.Array | quantization.QuantizedArray):
            if not isinstance(x, quantization.QuantizedArray):
                return turned(x, self.order, order)
            scales = ("SNH" if o == "SNH" else "NHS" for o in (self.order, order))
            values = turned(x.values, self.order, order)
            return x.replace(values=values, scale=turned(x.scale, *scales))

        return self if order == self.order else KV(one(self.k), one(self.v), order)

    def order_on_tpu(self) -> "KV":
        """By heads; of less than a register's 128 channels, the tokens are the last axis."""
        head_dim = jax.tree.leaves(self.k)[0].shape[-1]
        return self.ordered("NHS" if head_dim % 128 else "NSH")


@flax.struct.dataclass
class History:
    """Keys and values of earlier blocks, keys already rotated; only [0, length) is valid."""

    kv: KV
    length: jax.Array

    def join(self, new: KV, rope: Rope | GridRope, rope_type: str) -> tuple[KV, jax.Array, KV]:
        """What a block attends to: itself, and behind it the history, so that valid keys are a
        prefix and need no mask.

        Args:
          new: the block's own keys, not rotated, and values [B, T, N, H].
          rope: of its keys.

        Returns:
          Keys, rotated, and values [B, S, N, H]; how many of them are valid; and what was new.
        """
        rotated = rope.rotate(new.k, rope_type)
        k = jnp.concatenate([rotated, self.kv.k], axis=1)
        v = jnp.concatenate([new.v, self.kv.v], axis=1)
        return KV(k, v), rotated.shape[1] + self.length, new


@flax.struct.dataclass
class Slots:
    """The buffers of a layer's rolling cache, in which the block that is being made has slots, too.

    Nothing is joined or copied then: each pass over a block overwrites its slots. Keys are rotated
    when they are read, so that no layer's rotated keys are held while the others run.

    Attributes:
      kv: keys, not rotated, and values [B, S, N, H].
      rope: of all slots, those of the block as well.
      start: [] int32, the block's first slot.
      length: [] int32, only slots [0, length) are valid; None: all are.
    """

    kv: KV
    rope: Rope | GridRope
    start: jax.Array
    length: jax.Array | None

    def join(
        self, new: KV, rope: Rope | GridRope, rope_type: str
    ) -> tuple[KV, jax.Array | None, KV]:
        """As `History.join`; what is new are the buffers. `rope` is where `self.rope` says."""
        del rope

        def put(buffer, x: jax.Array):
            return quantization.put(buffer, x, self.start, axis=1)

        kv = KV(put(self.kv.k, new.k), put(self.kv.v, new.v))
        with jax.named_scope("rotate_keys"):
            rotated = self.rope.rotate(quantization.expanded(kv.k, new.k.dtype), rope_type)
        return KV(rotated, kv.v), self.length, kv


class Linear(nn.Dense):
    """y = x W + b, made by `linear`; plus (x A) B where its parameters have adapters beside W.

    Adapters are `lora_A` [in, rank] and `lora_B` [rank, out], see `training/adapters.py`. W is an
    array, or, of a sampler, a `QuantizedArray` (see `sampling/weights.py`). A sampler's W may also
    lie by heads: as [N, H, in], which makes [B, T, N, H] of [B, T, in], or the other way round.
    """

    axes: tuple[str | None, str | None] = (None, None)
    rules: WeightRules = WeightRules()
    split_tokens: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.get_variable("params", "kernel")
        if _lies_by_heads(kernel):
            y = quantization.matmul_by_heads(x, kernel, self.dtype, x.ndim == 4)
            if self.use_bias:
                bias = self.get_variable("params", "bias").astype(self.dtype)
                y = y + bias.reshape(1, 1, *y.shape[2:])  # [B, T, out] or [B, T, N, H]
            return y
        if isinstance(kernel, quantization.QuantizedArray):
            y = self._quantized(x.astype(self.dtype), kernel)
        else:
            y = super().__call__(x)
        if not self.has_variable("params", "lora_A"):
            return y
        x = x.astype(self.dtype)
        for name, axes in (("lora_A", (self.axes[0], None)), ("lora_B", (None, self.axes[1]))):
            kernel = self.get_variable("params", name).astype(self.dtype)
            x = product(x, kernel, axes, self.rules, split_tokens=self.split_tokens)
        return y + x  # [B, ..., out]

    def _quantized(self, x: jax.Array, kernel: quantization.QuantizedArray) -> jax.Array:
        """x [B, ..., in] -> [B, ..., out]; over several devices, only with 8-bit weights."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            y = quantization.matmul(x, kernel, self.dtype)
        elif kernel.products:
            raise ValueError("8-bit products run on one device: over a mesh, use int8 or fp8")
        else:
            how = {"split_tokens": self.split_tokens}
            y = product(x, kernel.values.astype(self.dtype), self.axes, self.rules, **how)
            y = quantization.scaled(y, kernel).astype(self.dtype)
        if self.use_bias:
            bias = self.get_variable("params", "bias").astype(self.dtype)
            y = y + jnp.expand_dims(bias, range(y.ndim - 1))
        return y


def _lies_by_heads(kernel: jax.Array | quantization.QuantizedArray | None) -> bool:
    """Whether a kernel is one of three axes; None, or in a box, it is being initialised."""
    return getattr(kernel, "ndim", 2) == 3


def linear(
    features: int,
    axes: tuple[str | None, str | None],
    dtype: jnp.dtype,
    rules: WeightRules = WeightRules(),
    *,
    use_bias: bool = True,
    zero_init: bool = False,
    split_tokens: bool = False,
    name: str | None = None,
) -> "Linear":
    """A module for y = x W + b, whose parameters are cast to `dtype` when they are used.

    Args:
      features: width of the output.
      axes: logical names of the kernel's two axes, see `partitioning`. Every device holds a whole
        bias unless the kernel's output axis is split: biases are small, and gathering thousands of
        them in every step would take longer.
      dtype: of the computation and the result.
      zero_init: kernels start at zero.
      split_tokens: whether the input's tokens are split over the mesh's sequence axis.
      name: of the module, where it is made in a compact method.
    """

    def dot_general(x, kernel, dimensions, **kwargs):
        del dimensions, kwargs  # nn.Dense contracts the last axis with the first
        return product(x, kernel, axes, rules, split_tokens=split_tokens)

    bias_axes = tuple(None if axis == "embed" else axis for axis in axes[1:])
    kernel_init = nn.initializers.zeros if zero_init else nn.initializers.lecun_normal()
    return Linear(
        features,
        axes=axes,
        rules=rules,
        split_tokens=split_tokens,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, bias_axes),
        dot_general=dot_general,
        name=name,
    )


class RMSNorm(nn.Module):
    """`rms_norm` times a learnt scale, in float32, over the last axis, or over heads [..., N, H]
    of so many channels together."""

    dim: int
    eps: float
    dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
        self.scale = self.param("scale", init, (self.dim,))

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.dim:
            scale = jnp.expand_dims(self.scale, range(x.ndim - 1))
            return (rms_norm(x, self.eps) * scale).astype(self.dtype)
        # as attention reads them, or a TPU turns them on the way
        x = jnp.swapaxes(x, -3, -2)  # [B, N, T, H]
        scale = self.scale.reshape(1, x.shape[-3], 1, x.shape[-1])
        normalised = rms_norm(x, self.eps, (-3, -1)) * scale
        return jnp.swapaxes(normalised.astype(self.dtype), -3, -2)


class HeadNorm(nn.Module):
    """LayerNorm without bias over each head's channels (ViT-22B's QK-norm, paper Table 3)."""

    head_dim: int
    eps: float
    dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        self.scale = self.param("scale", init, (self.head_dim,))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.expand_dims(self.scale, range(x.ndim - 1))
        return (layer_norm(x, self.eps) * scale).astype(self.dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), Linear, with a hidden width of four times `dim`."""

    dim: int
    dtype: jnp.dtype
    use_bias: bool = True
    split_tokens: bool = False
    rules: WeightRules = WeightRules()

    def setup(self):
        how = self.dtype, self.rules
        options = {"use_bias": self.use_bias, "split_tokens": self.split_tokens}
        self.up = linear(4 * self.dim, ("embed", "mlp"), *how, **options)
        self.down = linear(self.dim, ("mlp", "embed"), *how, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, dim] -> [B, T, dim]."""
        return self.down(nn.gelu(self.up(x), approximate=True))  # hidden [B, T, 4 dim]


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh approximation), Linear: text features to a stream's width (LTX-2.0)."""

    dim: int
    dtype: jnp.dtype
    rules: WeightRules = WeightRules()

    def setup(self):
        how = self.dtype, self.rules
        self.linear_1 = linear(self.dim, (None, "embed"), *how, split_tokens=True)
        self.linear_2 = linear(self.dim, ("embed", None), *how, split_tokens=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, text_dim] -> [B, S, dim]."""
        return self.linear_2(nn.gelu(self.linear_1(x), approximate=True))


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised q and k (over all heads together) and RoPE.

    Attributes:
      heads, head_dim: N and H.
      out_dim: width of the output (the query stream's width).
      eps: of the norms of q and k.
      dtype: of the computation and the result.
      rope_type: "split" or "interleaved", see `rope.Rope.rotate`.
      gated: per-head output gates 2 * sigmoid(linear(x)) (LTX-2.3).
      head_norm, tanh_gate: the stabilisers of paper Table 3.
      value_when_skipped: a self-attention that is skipped returns its values instead of zero
        (LTX-2.3).
      split_tokens: whether the tokens of the queries, and of the keys, are split over the mesh's
        sequence axis: those of the video and of the text are, because there are many.
      measured: stores its entropy (see `attention_entropy`) when the collection "diagnostics" is
        mutable.
      implementation: attention backend, see `ops.attention`.
    """

    heads: int
    head_dim: int
    out_dim: int
    eps: float
    dtype: jnp.dtype
    rope_type: str
    gated: bool = False
    head_norm: bool = False
    tanh_gate: bool = False
    value_when_skipped: bool = False
    split_tokens: tuple[bool, bool] = (False, False)
    measured: bool = False
    implementation: str = "auto"
    rules: WeightRules = WeightRules()

    def setup(self):
        inner = self.heads * self.head_dim
        q_split, kv_split = self.split_tokens
        how = self.dtype, self.rules
        self.q = linear(inner, ("embed", "heads"), *how, split_tokens=q_split)
        self.k = linear(inner, ("embed", "heads"), *how, split_tokens=kv_split)
        self.v = linear(inner, ("embed", "heads"), *how, split_tokens=kv_split)
        # a sampler's weights have one of these in the place of q, k and v, or of k and v
        self.qkv = linear(3 * inner, ("embed", "heads"), *how, split_tokens=q_split)
        self.kv = linear(2 * inner, ("embed", "heads"), *how, split_tokens=kv_split)
        self.out = linear(self.out_dim, ("heads", "embed"), *how, split_tokens=q_split)
        self.q_norm = RMSNorm(inner, self.eps, self.dtype)
        self.k_norm = RMSNorm(inner, self.eps, self.dtype)
        if self.gated:
            self.gate = linear(self.heads, ("embed", None), *how, zero_init=True)
        if self.head_norm:
            self.q_head_norm = HeadNorm(self.head_dim, self.eps, self.dtype)
            self.k_head_norm = HeadNorm(self.head_dim, self.eps, self.dtype)
        if self.tanh_gate:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            self.alpha = self.param("alpha", init, (1,))

    @property
    def by_heads(self) -> bool:
        """Whether the weights are a sampler's that lie by heads, see `sampling/weights.py`."""
        out = self.variables.get("params", {}).get("out", {})
        return _lies_by_heads(out.get("kernel"))

    def _heads(self, x: jax.Array) -> jax.Array:
        """[B, T, N, H] of a product's [B, T, N H], or of one that is by heads already."""
        return x if x.ndim == 4 else rearrange(x, "B T (N H) -> B T N H", N=self.heads)

    def keys_values(self, x: jax.Array) -> KV:
        """x [B, S, D_kv] -> keys (normalised, not rotated) and values [B, S, N, H]."""
        if self.has_variable("params", "kv"):
            return self._normalised_kv(*jnp.split(self.kv(x), 2, axis=-1))
        return self._normalised_kv(self.k(x), self.v(x))

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, KV]:
        """x [B, T, D] -> queries [B, T, N, H] and `keys_values` of it: a self-attention's."""
        if self.has_variable("params", "qkv"):
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
            return self._normalised_q(q), self._normalised_kv(k, v)
        return self.queries(x), self.keys_values(x)

    def queries(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> queries, normalised but not rotated [B, T, N, H]."""
        return self._normalised_q(self.q(x))

    def _normalised_q(self, q: jax.Array) -> jax.Array:
        q = self._heads(self.q_norm(q))
        return self.q_head_norm(q) if self.head_norm else q

    def _normalised_kv(self, k: jax.Array, v: jax.Array) -> KV:
        k = self._heads(self.k_norm(k))  # [B, S, N, H]
        return KV(self.k_head_norm(k) if self.head_norm else k, self._heads(v))

    def __call__(
        self,
        x: jax.Array,
        q: jax.Array,
        kv: KV,
        *,
        rope: Rope | GridRope | None = None,
        k_rope: Rope | GridRope | None = None,
        history: History | Slots | None = None,
        kv_end: np.ndarray | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """Attends from x to `kv` and, if given, to `history`.

        Args:
          x: [B, T, D], what the queries are made of; gates are, too.
          q: from `queries`, [B, T, N, H].
          kv: from `keys_values`, this call's keys (not rotated) and values [B, S, N, H].
          rope, k_rope: rotations of q and of kv.k; `k_rope` is `rope` when None, and without
            `rope` nothing is rotated.
          history: keys and values of earlier blocks, which `kv` joins.
          kv_end: [T] host integers; row t sees keys [0, kv_end[t]).
          mask: [B, 1, 1, S] boolean, True = attend.
          bias: [B or 1, G, G] added to the logits of G equal groups of queries and keys.
          keep: [B] one or zero; zero skips this attention for that sample.

        Returns:
          [B, T, out_dim], and what this call adds to the history: `kv`, or its buffers with `kv` in
          the block's slots.
        """
        kv = kv.ordered()
        k, v, length, new = kv.k, kv.v, None, kv
        if rope is not None:
            q = rope.rotate(q, self.rope_type)
        if history is not None:
            joined, length, new = history.join(kv, k_rope or rope, self.rope_type)
            k, v = joined.k, joined.v  # [B, S + history, N, H]
        elif rope is not None:
            k = (k_rope or rope).rotate(k, self.rope_type)
        k, v = (quantization.expanded(x, self.dtype) for x in (k, v))
        if self.measured and self.is_mutable_collection("diagnostics"):
            self.sow("diagnostics", "entropy", attention_entropy(q, k, kv_end))
        y = attention(
            q,
            k,
            v,
            kv_end=kv_end,
            kv_length=length,
            mask=mask,
            bias=bias,
            implementation=self.implementation,
        )  # [B, T, N, H]
        if keep is not None and self.value_when_skipped:
            y = jnp.where(keep[:, None, None, None] > 0, y, kv.v)
        if self.gated:
            y = y * (2 * nn.sigmoid(self.gate(x)))[..., None]  # gates [B, T, N, 1]
        if not self.by_heads:
            y = rearrange(y, "B T N H -> B T (N H)")
            y = constrain(y, "batch", "tokens" if self.split_tokens[0] else None)
        y = self.out(y)
        if self.tanh_gate:
            y = y * jnp.tanh(self.alpha).astype(self.dtype)[None, None]
        if keep is not None and not self.value_when_skipped:
            y = jnp.where(keep[:, None, None] > 0, y, 0)
        return y, new
