"""Softmax attention behind one function, with masks given as row ends or lengths.

Under block-causal masks (Eq. 4-5), and in a rolling cache that is not full, what a query sees is a
prefix of the keys. Both are therefore given as lengths, not as dense masks:

* `kv_end`, one static integer per query row, for training on whole clips;
* `kv_length`, one number (or one per sample), for sampling from the cache.

Backends: `xla`, `chunked`, `prefix`, `cudnn`, `splash`; see `attention`.

Axis letters: B batch, T query tokens, S key tokens, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.layout import Layout, with_layout_constraint

from omniforcing_jax.distributed.partitioning import WHOLE, constrain
from omniforcing_jax.ops import splash

IMPLEMENTATIONS = ("auto", "xla", "chunked", "prefix", "cudnn", "splash")

# Queries in a chunk of `chunked` attention.
CHUNK = 512

# With fewer queries or keys, such as the 25 audio tokens of a block, plain matrix products take the
# place of a flash kernel: most of its tile would be padding, and the logits are small. Some cuDNN
# versions also refuse a length of 1, which block 0 has.
MIN_FLASH_LENGTH = 64

# Each group of equal kv_end is one kernel call in the program; a mask that changes on every row
# would unroll into thousands.
MAX_PREFIX_GROUPS = 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kv_end: np.ndarray | None = None,
    kv_length: int | jax.Array | None = None,
    mask: jax.Array | np.ndarray | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T * scale + bias) v per head, with the softmax in fp32.

    At most one of `kv_end`, `kv_length`, `mask` and `bias` may be given; without any, every query
    sees every key. Keys and values that no query sees may hold anything finite (their weight is
    zero, and zero times infinity is not a number).

    Implementations:
      * `xla`: einsums with a dense mask, the reference for the others. The float32 logits
        [B, N, T, S] are in memory, so that long sequences need much of it.
      * `chunked`: the same for 512 queries at a time, forward and backward: logits [B, N, 512, S].
        Needs as little memory as a flash kernel, on any hardware.
      * `prefix`: queries with equal `kv_end` attend, without a mask, to a static slice of the keys,
        so that nothing is computed for hidden keys. Runs on `cudnn` if it can, else on `xla`.
      * `cudnn`: as `prefix`, on cuDNN's flash attention (NVIDIA GPU, 16-bit dtypes); on `xla` where
        queries or keys are too few for a flash kernel.
      * `splash`: a Pallas kernel for TPUs that computes the mask block by block. On a CPU it is
        interpreted, which is slow and meant for tests.
      * `auto`: a dense mask: `xla`; a bias: `chunked`. On a TPU: `splash` where the shapes allow
        it. On a GPU, with enough queries and keys for a flash kernel: `cudnn` where it supports
        dtype and head dim, else (and when compiling for a GPU that this machine does not have)
        `chunked`. Everything else: `prefix` with `kv_end`, `xla` without.

    Args:
      q: [B, T, N, H].
      k: [B, S, N, H], same dtype as q.
      v: [B, S, N, H], same dtype as q.
      kv_end: numpy int [T] in 1..S; query t attends to keys [0, kv_end[t]). Static.
      kv_length: every query attends to keys [0, kv_length). A Python int in 1..S slices the keys
        statically; a traced scalar or int [B] must be at least 1, which is not checked.
      mask: bool, broadcastable to [B, N, T, S], True where attention is allowed; rows without any
        allowed key give zeros. `xla` only.
      bias: [B or 1, G, G] float32 of G equal groups of queries and of keys. `xla` and `chunked`
        only.
      scale: factor on the logits, H**-0.5 by default.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: inconsistent shapes, dtypes or masks, or an implementation that cannot run them
        on this platform.
    """
    _check_inputs(q, k, v, kv_end, kv_length, mask, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(kv_length, int | np.integer):
        k, v, kv_length = k[:, :kv_length], v[:, :kv_length], None
    if implementation == "auto":
        implementation = "chunked" if bias is not None else choose(q, k, kv_end, mask)
    if bias is not None and implementation not in ("xla", "chunked"):
        raise ValueError(f"{implementation!r} attention takes no bias; use 'chunked' or 'auto'")
    if mask is not None and implementation != "xla":
        raise ValueError(f"{implementation!r} attention takes no dense mask; use 'xla' or 'auto'")
    q, k, v = (constrain(x, "batch", WHOLE, "attention_heads") for x in (q, k, v))
    if bias is not None:
        chunk = CHUNK if implementation == "chunked" else q.shape[1]
        return constrain(_biased(q, k, v, bias, scale, chunk), "batch", WHOLE, "attention_heads")
    with jax.named_scope("attention"):
        q, k, v = (_as_stored(x, implementation) for x in (q, k, v))
        out = _run(q, k, v, kv_end, kv_length, mask, scale, implementation)
        out = _as_stored(out, implementation)
    return constrain(out, "batch", WHOLE, "attention_heads")


def _run(q, k, v, kv_end, kv_length, mask, scale, implementation: str) -> jax.Array:
    match implementation:
        case "xla":
            return _masked_xla(q, k, v, kv_end, kv_length, mask, scale)
        case "chunked":
            return _chunked(q, k, v, kv_end, kv_length, scale)
        case "prefix":
            kernel = "cudnn" if _cudnn_refusal(q) is None else "xla"
            return _prefix(q, k, v, kv_end, kv_length, scale, kernel)
        case "cudnn":
            if (refusal := _cudnn_refusal(q)) is not None:
                raise ValueError(f"'cudnn' attention {refusal}; use 'prefix', 'xla' or 'auto'")
            return _prefix(q, k, v, kv_end, kv_length, scale, "cudnn")
        case "splash":
            if kv_length is not None:
                kv_length = _per_sample(kv_length, q.shape[0])
            return splash.splash_attention(
                q, k, v, kv_end=kv_end, kv_length=kv_length, scale=scale, platform=platform()
            )
    raise ValueError(f"unknown implementation {implementation!r}; known: {IMPLEMENTATIONS}")


def platform() -> str:
    """Platform the program is being traced for: `tpu`, `gpu`, `absent gpu` or `cpu`.

    That of the mesh, if one is set, so that programs can be compiled ahead of time for devices that
    this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    if device.platform == "gpu" and jax.default_backend() != "gpu":
        return "absent gpu"  # one can ask cuDNN what it supports only where it is installed
    return device.platform


def _as_stored(x: jax.Array, implementation: str) -> jax.Array:
    """Lays out [B, T, N, H] on one GPU as caches are, where plain products attend: those want
    other layouts, and XLA would hold all layers' buffers in both, over all passes of a block.

    Where `chunked` stands in for cuDNN, as the GPU is not here, operands are laid out as cuDNN has
    them and kept apart: the program around it is compiled as it will be there.
    """
    stands_in = implementation == "chunked" and platform() == "absent gpu"
    plain = implementation == "xla" and platform() in ("gpu", "absent gpu")
    if not (stands_in or plain) or jax.sharding.get_abstract_mesh().size > 1:
        return x
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(x) if stands_in else x


def choose(q, k, kv_end=None, mask=None) -> str:
    """The implementation that `auto` stands for, without a bias."""
    if mask is not None:
        return "xla"
    if platform() == "tpu" and splash.supports(q.shape[1], k.shape[1], q.shape[-1]):
        return "splash"
    if platform() in ("gpu", "absent gpu") and not _is_short(q, k):
        return "cudnn" if _cudnn_refusal(q) is None else "chunked"
    return "xla" if kv_end is None else "prefix"


def _is_short(q, k) -> bool:
    return min(q.shape[1], k.shape[1]) < MIN_FLASH_LENGTH


def _cudnn_refusal(q) -> str | None:
    """Why cuDNN cannot run these inputs here, or None if it can."""
    if platform() != "gpu":
        return f"needs an NVIDIA GPU, but the platform is {platform()!r}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q.dtype.name}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"needs a head dim that is a multiple of 8 and at most 128, got {q.shape[-1]}"
    return None


# Dense kernels


def _xla(q, k, v, mask, scale, bias=None):
    """Reference attention; `mask` and `bias` broadcast to [B, N, T, S] or are None."""
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    if mask is None:
        probs = jax.nn.softmax(logits, axis=-1)
    else:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        # The second select turns the uniform softmax of rows without any key into zeros.
        probs = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(v.dtype), v).astype(q.dtype)


def _chunked(q, k, v, kv_end, kv_length, scale):
    """`_masked_xla` on chunks of queries; the backward pass computes each chunk's logits again."""
    length = q.shape[1]
    count = -(-length // CHUNK)
    if count == 1:
        return _masked_xla(q, k, v, kv_end, kv_length, None, scale)
    padding = count * CHUNK - length
    rows = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    rows = rearrange(rows, "B (chunks T) N H -> chunks B T N H", T=CHUNK)
    ends = jnp.full((count, CHUNK), k.shape[1], jnp.int32)
    if kv_end is not None:
        ends = jnp.asarray(np.pad(kv_end, (0, padding), mode="edge").reshape(count, CHUNK))
    keys = jnp.arange(k.shape[1])

    @jax.checkpoint
    def chunk(q, ends):
        mask = (keys[None] < ends[:, None])[None, None]  # [1, 1, T, S]
        if kv_length is not None:
            mask = mask & (
                keys[None, None, None] < _per_sample(kv_length, q.shape[0])[:, None, None, None]
            )
        return _xla(q, k, v, mask, scale)

    out = jax.lax.map(lambda rows: chunk(*rows), (rows, ends))
    return rearrange(out, "chunks B T N H -> B (chunks T) N H")[:, :length]


def _biased(q, k, v, bias, scale, chunk: int):
    """`_xla` with a bias of groups of tokens, `chunk` queries at a time."""
    length, groups = q.shape[1], bias.shape[1]
    per_group, keys = length // groups, k.shape[1] // groups
    chunk = min(chunk, length)
    count = -(-length // chunk)
    rows = jnp.pad(q, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    rows = rearrange(rows, "B (chunks T) N H -> chunks B T N H", T=chunk)
    group = np.minimum(np.arange(count * chunk) // per_group, groups - 1).reshape(count, chunk)

    @jax.checkpoint
    def attend(q, group):
        expanded = jnp.repeat(jnp.asarray(bias)[:, group], keys, axis=2)  # [B or 1, T, S]
        return _xla(q, k, v, None, scale, expanded[:, None])

    out = jax.lax.map(lambda rows: attend(*rows), (rows, jnp.asarray(group)))
    return rearrange(out, "chunks B T N H -> B (chunks T) N H")[:, :length]


def _dense(q, k, v, kv_length, scale, kernel):
    """All queries attend to keys [0, kv_length), or to all keys.

    `kernel` is `xla` or `cudnn`; short sequences are computed by `xla` in any case.
    """
    if kernel == "xla" or _is_short(q, k):
        return _masked_xla(q, k, v, None, kv_length, None, scale)
    lengths = None if kv_length is None else _per_sample(kv_length, q.shape[0])
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _prefix(q, k, v, kv_end, kv_length, scale, kernel):
    """Attention as one dense call per group of rows that see the same keys."""
    if kv_end is None:
        return _dense(q, k, v, kv_length, scale, kernel)
    starts = np.flatnonzero(np.diff(kv_end, prepend=-1))  # first row of each group
    if len(starts) > MAX_PREFIX_GROUPS:
        raise ValueError(
            f"kv_end changes {len(starts)} times along the queries, and prefix decomposition "
            f"unrolls at most {MAX_PREFIX_GROUPS} groups; use 'splash' or 'xla'"
        )
    stops = [*starts[1:], len(kv_end)]
    groups = [
        _dense(q[:, i:j], k[:, : kv_end[i]], v[:, : kv_end[i]], None, scale, kernel)
        for i, j in zip(starts, stops, strict=True)
    ]
    return jnp.concatenate(groups, axis=1)  # [B, T, N, H]


def _masked_xla(q, k, v, kv_end, kv_length, mask, scale):
    """`_xla` with the dense mask of `kv_end` or `kv_length`."""
    keys = jnp.arange(k.shape[1])  # [S]
    if kv_end is not None:
        mask = (keys[None] < jnp.asarray(kv_end)[:, None])[None, None]  # [1, 1, T, S]
    elif kv_length is not None:
        mask = (
            keys[None, None, None] < _per_sample(kv_length, q.shape[0])[:, None, None, None]
        )  # [B, 1, 1, S]
    return _xla(q, k, v, mask, scale)


def _per_sample(kv_length, batch: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(kv_length, jnp.int32), (batch,))


# Checks


def _check_inputs(q, k, v, kv_end, kv_length, mask, bias) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "expected q [B, T, N, H] and k, v [B, S, N, H], "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch, heads or head dim")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if sum(x is not None for x in (kv_end, kv_length, mask, bias)) > 1:
        raise ValueError("give at most one of kv_end, kv_length, mask and bias")
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    if kv_end is not None:
        _check_kv_end(kv_end, q_len, kv_len)
    if isinstance(kv_length, int | np.integer):
        if not 1 <= kv_length <= kv_len:
            raise ValueError(f"kv_length must be in 1..{kv_len}, got {kv_length}")
    elif kv_length is not None and jnp.shape(kv_length) not in ((), (batch,)):
        raise ValueError(
            f"kv_length must be a scalar or have shape ({batch},), got {jnp.shape(kv_length)}"
        )
    if bias is not None:
        groups = bias.shape[-1]
        if bias.shape not in ((1, groups, groups), (batch, groups, groups)) or (
            q_len % groups or kv_len % groups
        ):
            raise ValueError(
                f"bias must be [1 or {batch}, G, G] with G a divisor of {q_len} queries and "
                f"{kv_len} keys, got {list(bias.shape)}"
            )
    if mask is not None:
        full = (batch, heads, q_len, kv_len)
        padded = (1,) * (4 - mask.ndim) + mask.shape
        fits = len(padded) == 4 and all(m in (1, n) for m, n in zip(padded, full, strict=True))
        if mask.dtype != bool or not fits:
            raise ValueError(
                f"mask must be bool and broadcastable to {full}, got {mask.dtype} {mask.shape}"
            )


def _check_kv_end(kv_end, q_len: int, kv_len: int) -> None:
    if not isinstance(kv_end, np.ndarray) or not np.issubdtype(kv_end.dtype, np.integer):
        raise ValueError(f"kv_end must be a numpy int array, known at trace time, got {kv_end!r}")
    if kv_end.shape != (q_len,):
        raise ValueError(f"kv_end must have shape ({q_len},), got {kv_end.shape}")
    if kv_end.min() < 1 or kv_end.max() > kv_len:
        raise ValueError(
            f"kv_end must lie in 1..{kv_len} (no row may see nothing), "
            f"got {kv_end.min()}..{kv_end.max()}"
        )


def attention_entropy(q: jax.Array, k: jax.Array, kv_end: np.ndarray | None = None) -> jax.Array:
    """Entropy of each query's attention, divided by that of uniform attention to what it may see.

    1 is uniform, 0 is one-hot: the collapse that sink tokens prevent (paper section 3.3). Holds all
    logits in memory, so it is for short sequences only.

    Args:
      q: [B, T, N, H]; k: [B, S, N, H]; both rotated.
      kv_end: [T] as for `attention`.

    Returns:
      [T] float32, mean over batch and heads; 1 for a query that sees a single key.
    """
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    ends = np.full(q.shape[1], k.shape[1]) if kv_end is None else np.asarray(kv_end)
    visible = np.arange(k.shape[1]) < ends[:, None]  # [T, S]
    log_p = jax.nn.log_softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    entropy = -jnp.sum(jnp.where(visible, jnp.exp(log_p) * log_p, 0.0), axis=-1)  # [B, N, T]
    highest = np.log(np.maximum(ends, 2))
    return jnp.where(ends > 1, jnp.mean(entropy, axis=(0, 1)) / highest, 1.0)
