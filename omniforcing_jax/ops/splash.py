"""TPU splash attention for masks in which every query row sees a prefix of the keys.

The Pallas kernel skips key blocks that no row of a query block may see and computes the mask inside
the others, so nothing of size T x S exists at any time. Axis letters as in `ops.attention`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from omniforcing_jax.distributed.partitioning import BATCH_AXES, HEAD_AXES

# Blocks are multiples of the kernel's lanes. The backward pass holds more tiles at a time.
LANES, LARGEST, LARGEST_BACKWARD = 128, 1024, 512
# What a block costs beside its tokens, in tokens: large blocks are better, padding is worse.
OVERHEAD = 64


def supports(q_len: int, kv_len: int, head_dim: int) -> bool:
    """Whether the kernel can run these sizes without much padding: at least one block each way."""
    return head_dim % 64 == 0 and q_len >= LANES and kv_len >= LANES


class BlockCausalMask(splash_mask._ComputableMask):
    """Query row t sees keys [0, kv_end[t]); computed in the kernel, never stored.

    For each row the kernel calls `mask_function` with the row's entry of `q_sequence` (normally a
    query position, but any int32 will do) and the key indices. Masks of equal content are equal and
    have equal hashes, so that the kernel shares one between heads and calls.
    """

    def __init__(self, kv_end: np.ndarray, kv_len: int):
        super().__init__(shape=(len(kv_end), kv_len), mask_function=_is_visible)
        self.q_sequence = np.asarray(kv_end, np.int32)

    def __eq__(self, other: object):
        if not isinstance(other, BlockCausalMask):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.q_sequence, other.q_sequence)

    def __hash__(self) -> int:
        return hash((type(self), self.shape, self.q_sequence.tobytes()))


def _is_visible(kv_end, kv_index):
    # A module-level function: the kernel is compiled once per mask_function object.
    return kv_index < kv_end


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kv_end: np.ndarray | None,
    kv_length: jax.Array | None,
    scale: float,
    platform: str,
) -> jax.Array:
    """Attention of `ops.attention.attention` on the splash kernel.

    If a mesh is set, the kernel runs under `jax.shard_map`: batch over `data` and `fsdp`, heads
    over `tensor` and `sequence`, each where the size divides; other axes hold copies.

    Args:
      q: [B, T, N, H].
      k: [B, S, N, H].
      v: [B, S, N, H].
      kv_end: int [T] in 1..S, or None for all keys.
      kv_length: int32 [B] >= 1, or None for all keys.
      scale: factor on the logits.
      platform: the kernel is interpreted on `cpu` and compiled elsewhere.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: the platform is neither `tpu` nor `cpu`.
    """
    if platform not in ("tpu", "cpu"):
        raise ValueError(
            f"'splash' attention runs on TPU (and, interpreted, on CPU), not on "
            f"{platform!r}; use 'auto'"
        )
    q_len, kv_len = q.shape[1], k.shape[1]
    q_block, q_padded = _block_and_padded(q_len)
    kv_block, kv_padded = _block_and_padded(kv_len)

    # Padded queries see one key, to keep their softmax finite; their output is cut off.
    ends = np.ones(q_padded, np.int32)
    ends[:q_len] = kv_len if kv_end is None else kv_end
    kernel = _make_kernel(ends, kv_padded, q_block, kv_block, interpret=platform == "cpu")

    def to_kernel(x, length):
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)  # [B, N, T or S, H]

    def run(q, k, v, kv_length):
        q = to_kernel(q * jnp.asarray(scale, q.dtype), q_padded)
        k, v = to_kernel(k, kv_padded), to_kernel(v, kv_padded)
        if kv_length is None:
            out = jax.vmap(kernel)(q, k, v)
        else:
            # Keys behind the end get a segment of their own, which no query is in.
            segments = (jnp.arange(kv_padded)[None] >= kv_length[:, None]).astype(
                jnp.int32
            )  # [B, S]
            ids = splash_kernel.SegmentIds(
                q=jnp.zeros((q.shape[0], q_padded), jnp.int32), kv=segments
            )
            out = jax.vmap(kernel)(q, k, v, ids)
        return jnp.swapaxes(out, 1, 2)[:, :q_len]  # [B, T, N, H]

    return _sharded(run, q.shape[0], q.shape[2])(q, k, v, kv_length)


def _make_kernel(ends, kv_padded, q_block, kv_block, *, interpret):
    """Splash kernel on q [N, T, H], k and v [N, S, H] for any N: all heads share one mask."""
    q_backward, kv_backward = _backward_block(len(ends)), _backward_block(kv_padded)
    sizes = splash_kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=kv_block,
        block_q_dkv=q_backward,
        block_kv_dkv=kv_backward,
        block_kv_dkv_compute=kv_backward,
        block_q_dq=q_backward,
        block_kv_dq=kv_backward,
    )
    return splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([BlockCausalMask(ends, kv_padded)]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _block_and_padded(length: int) -> tuple[int, int]:
    """Block size for a sequence and its length after padding to whole blocks."""

    def cost(block: int) -> float:
        return -(-length // block) * (block + OVERHEAD)

    block = min(range(LANES, LARGEST + 1, LANES), key=cost)
    return block, -(-length // block) * block


def _backward_block(padded: int) -> int:
    """The largest block of the backward pass for a padded length."""
    return next(b for b in range(LARGEST_BACKWARD, 0, -LANES) if padded % b == 0)


def _sharded(run, batch: int, heads: int):
    """Wraps `run(q, k, v, kv_length)` in `shard_map` over the free axes of the current mesh.

    XLA cannot partition a Pallas call by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes that an enclosing shard_map has already taken are split before we see the arrays.
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if not free:
        return run
    batch_axes = _dividing_axes(batch, BATCH_AXES, free)
    head_axes = _dividing_axes(heads, HEAD_AXES, free)
    spec = P(batch_axes, None, head_axes, None)
    return jax.shard_map(
        run,
        in_specs=(spec, spec, spec, P(batch_axes)),
        out_specs=spec,
        axis_names=set(free),
        # Pallas outputs carry no record of the axes they vary over.
        check_vma=False,
    )


def _dividing_axes(size: int, names: tuple[str, ...], free: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes among `names` over which a dimension of this size can be split evenly."""
    chosen, parts = [], 1
    for name in names:
        if name in free and size % (parts * free[name]) == 0:
            chosen.append(name)
            parts *= free[name]
    return tuple(chosen)
