"""The rolling cache: keys and values of a few anchor blocks and of a window of recent blocks.

The cache is a value of fixed size, so time and memory per block do not depend on how long a stream
has run. Its slots hold, per pathway,

    [ block 0 (with the sinks) | anchor blocks 1..n | ring of `window` recent blocks ]

A ring slot is a whole block, so a write never straddles the ring's end, and until the ring is full
the valid slots are a prefix of the buffer: attention needs a length, never a mask. Which block a
slot holds follows from the number of blocks written, which is the only counter.

A sampler whose weights lie per layer has buffers per layer, too, and one more slot in the ring: the
block that is made is written into its slot in every pass, so that attention reads one buffer, in
place (`slots`). Elsewhere the layers' buffers are stacked, and a block's keys and values join those
of the history (`history`).

Keys are stored unrotated, and rotated for a block at positions that are absolute or relative to
the window: there, evicting e blocks moves everything but the anchors back by e blocks on both
clocks, so positions stay within the range seen in training. `history` rotates them once for all
forward passes of a block; with `slots` a layer rotates its own when it reads them, so that those of
the other layers need no memory.

One type serves the self-attention of both streams and both directions between them: `video` and
`v2a` hold video tokens, `audio` and `a2v` audio tokens.
"""

import dataclasses
import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.distributed.partitioning import BATCH_AXES, HEAD_AXES
from omniforcing_jax.models import quantization
from omniforcing_jax.models.quantization import QuantizedArray
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.layers import KV, History, Slots
from omniforcing_jax.models.transformer.model import Pathways
from omniforcing_jax.models.transformer.rope import ClipRope, GridRope, Rope

POSITIONS = ("absolute", "relative")
DTYPES = ("int8",)  # other than the model's


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Shape of a rolling cache.

    Attributes:
      layout: frames per block.
      window: recent blocks kept besides the anchors; at least 1.
      anchors: blocks 1..n that are never evicted (block 0 never is).
      positions: "absolute" (a token keeps the time at which it was generated) or "relative" (to the
        window: streams of any length stay inside the trained range).
      dtype: of keys and values, those of the text included: "int8", with a scale for each token and
        head, where buffers lie per layer; None is the model's.

    Raises:
      ValueError: no window, fewer than no anchors, or other positions or dtypes.
    """

    layout: BlockLayout
    window: int = 7
    anchors: int = 0
    positions: str = "relative"
    dtype: str | None = None

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"a cache's dtype must be one of {DTYPES}, not {self.dtype!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 block, not {self.window}")
        if self.anchors < 0:
            raise ValueError(f"anchors must be 0 or more, not {self.anchors}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {self.positions!r}")

    @property
    def capacity(self) -> int:
        """Blocks that the cache holds: block 0, the anchors and the window."""
        return 1 + self.anchors + self.window

    def blocks_in_positions(self, num_blocks: int | None) -> int:
        """Blocks for which RoPE tables are needed to stream `num_blocks` (None: without end).

        Raises:
          ValueError: an endless stream with absolute positions.
        """
        if self.positions == "relative":
            bounded = self.capacity + 1
            return bounded if num_blocks is None else min(bounded, num_blocks)
        if num_blocks is None:
            raise ValueError(
                "absolute positions need a known length; use positions='relative' for a stream "
                "without end"
            )
        return num_blocks

    def holds(self, num_blocks: int) -> bool:
        """Whether nothing has been evicted after `num_blocks` blocks."""
        return num_blocks <= self.capacity

    def for_clip(self, num_blocks: int) -> "CacheConfig":
        """The same for a clip of known length: without slots that it would leave empty, and with
        one for its last block where only that one would evict another, for nobody to miss."""
        whole = num_blocks - 1 - self.anchors
        window = self.window if self.window < whole - 1 else whole
        return dataclasses.replace(self, window=max(window, 1))

    def evicted(self, block: jax.Array | int) -> jax.Array:
        """Blocks that have left the window when block `block` is generated."""
        return jnp.maximum(0, block - self.capacity)

    def position_of(self, block: jax.Array | int) -> jax.Array:
        """Block index by which the block being generated is positioned."""
        return block - self.evicted(block) if self.positions == "relative" else jnp.asarray(block)

    def slot_positions(self, block: jax.Array | int, ring: int | None = None) -> jax.Array:
        """Position, in blocks, of each slot behind block 0's while block `block` is generated.

        Empty slots get a position inside the tables; they are never attended to.

        Args:
          ring: slots of the ring, where it has one for block `block` as well; else it has `window`.
        """
        first, size = 1 + self.anchors, ring or self.window
        youngest = block if ring else block - 1
        # The youngest block in ring slot r is the largest b with (b - first) % size == r.
        held = youngest - (youngest - first - jnp.arange(size)) % size
        if self.positions == "relative":
            held = held - self.evicted(block)
        held = jnp.maximum(held, first)
        return jnp.concatenate([jnp.arange(1, first), held])


@flax.struct.dataclass
class RollingCache:
    """Keys and values of the blocks written so far.

    Attributes:
      kv: [L, B, slots, N, H] per pathway; or, for weights per layer, a tuple of the layers', each
        [B, slots, N, H], or in another order of `KV`.
      num_blocks: [] int32, blocks written.
      config: shape of the cache.
      num_sinks: sink tokens of the model; they are the first audio slots.
    """

    kv: Pathways | tuple[Pathways, ...]
    num_blocks: jax.Array
    config: CacheConfig = flax.struct.field(pytree_node=False)
    num_sinks: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def buffers(self) -> Pathways | tuple[Pathways, ...]:
        """`kv` with heads behind tokens."""
        return jax.tree.map(lambda kv: kv.ordered(), self.kv, is_leaf=_is_kv)

    def holding(self, buffers: Pathways | tuple[Pathways, ...]) -> "RollingCache":
        """The cache with other `buffers`."""
        kv = jax.tree.map(lambda old, kv: kv.ordered(old.order), self.kv, buffers, is_leaf=_is_kv)
        return self.replace(kv=kv)

    @property
    def ring(self) -> int:
        """Slots of the ring, in blocks."""
        return self.config.window + isinstance(self.kv, tuple)

    def slot(self, block: jax.Array | int) -> jax.Array:
        """The slot of block `block` >= 1, counted behind that of block 0."""
        anchors = self.config.anchors
        ringed = anchors + (block - 1 - anchors) % self.ring
        return jnp.where(block - 1 < anchors, block - 1, ringed)

    def starts(self, slots: jax.Array | int, patches: int) -> tuple[jax.Array, jax.Array]:
        """Where so many slots behind block 0 end: first video and audio token behind them."""
        layout = self.config.layout
        video = (layout.first_video_frames + slots * layout.video_frames) * patches
        return video, self.num_sinks + layout.first_audio_frames + slots * layout.audio_frames


def init_cache(
    config: CacheConfig,
    model: TransformerConfig,
    *,
    batch: int,
    patches: int,
    dtype: jnp.dtype = jnp.float32,
    per_layer: bool = False,
    by_heads: bool = False,
) -> RollingCache:
    """An empty cache for `patches` tokens per video latent.

    Args:
      per_layer: buffers of their own for each layer, with a slot for the block that is made.
      by_heads: in the order of `KV.order_on_tpu`.

    Raises:
      ValueError: 8 bits for buffers that are not per layer.
    """
    if config.dtype and not per_layer:
        raise ValueError(f"a cache in {config.dtype} needs weights per layer, as streams have them")
    blocks = config.capacity + per_layer
    video = config.layout.num_video_frames(blocks) * patches
    audio = config.layout.num_audio_frames(blocks) + model.num_audio_sinks
    leading = (batch,) if per_layer else (model.num_layers, batch)

    def kv(slots, heads, head_dim):
        shape = (*leading, slots, heads, head_dim)

        def buffer() -> jax.Array | QuantizedArray:
            if config.dtype is None:
                return jnp.zeros(shape, dtype)
            return QuantizedArray(jnp.zeros(shape, config.dtype), jnp.zeros((*shape[:-1], 1)))

        kv = KV(buffer(), buffer())
        return kv.order_on_tpu() if by_heads else kv

    def pathways():
        return Pathways(
            video=kv(video, model.video_heads, model.video_head_dim),
            audio=kv(audio, model.audio_heads, model.audio_head_dim),
            a2v=kv(audio, model.audio_heads, model.audio_head_dim),
            v2a=kv(video, model.audio_heads, model.audio_head_dim),
        )

    return RollingCache(
        kv=tuple(pathways() for _ in range(model.num_layers)) if per_layer else pathways(),
        num_blocks=jnp.zeros((), jnp.int32),
        config=config,
        num_sinks=model.num_audio_sinks,
    )


def cache_bytes(config: CacheConfig, model: TransformerConfig, **how: Any) -> int:
    """Size of the cache in bytes, without allocating it; `how` as for `init_cache`."""
    cache = jax.eval_shape(lambda: init_cache(config, model, **how))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.kv))


def cache_sharding(cache: RollingCache, mesh: Mesh) -> RollingCache:
    """Shardings of keys and values [..., B, S, N, H]: the batch, and the heads as in attention."""

    def place(leaf, heads_axis: int = -2):
        if leaf.ndim < 4:
            return NamedSharding(mesh, P())
        batch_axes = tuple(a for a in BATCH_AXES if mesh.shape[a] > 1)
        batch_size = math.prod(mesh.shape[a] for a in batch_axes)
        batch = batch_axes if batch_axes and leaf.shape[-4] % batch_size == 0 else None
        ways = math.prod(mesh.shape[a] for a in HEAD_AXES)
        last = [None] * 3
        if leaf.shape[heads_axis] % ways == 0:
            last[heads_axis] = HEAD_AXES
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 4), batch, *last))

    def places(x):
        if not isinstance(x, KV):
            return place(x)
        return jax.tree.map(functools.partial(place, heads_axis=x.order.index("N") - 3), x)

    return jax.tree.map(places, cache, is_leaf=_is_kv)


def constrained(cache: RollingCache) -> RollingCache:
    """In a program: the cache where `cache_sharding` puts it, if there is a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return cache
    where = cache_sharding(cache, mesh)
    return jax.tree.map(jax.lax.with_sharding_constraint, cache, where)


def write(
    cache: RollingCache, new: Pathways, patches: int, *, first: bool, detach: bool = True
) -> RollingCache:
    """Stores the next block's keys and values (of the refresh pass) in its slot.

    Args:
      new: Pathways of KV [L, B, S, N, H], keys not rotated; or, per layer, a tuple of Pathways of
        KV [B, S, N, H]: of block 0, and later the buffers, which hold the block already.
      first: whether this is block 0, whose shape differs. It must be the first write.
      detach: let no gradient through to what made them.
    """
    block = cache.num_blocks
    if isinstance(cache.kv, tuple) and not first:
        return cache.holding(new).replace(num_blocks=block + 1)
    video, audio = (0, 0) if first else cache.starts(cache.slot(block), patches)

    def put(old: KV, kv: KV, start) -> KV:
        def update(buffer, x):
            return quantization.put(buffer, jax.lax.stop_gradient(x) if detach else x, start, -3)

        return KV(update(old.k, kv.k), update(old.v, kv.v))

    starts = Pathways(video=video, audio=audio, a2v=audio, v2a=video)
    kv = jax.tree.map(put, cache.buffers, new, _like(cache.kv, starts), is_leaf=_is_kv)
    return cache.holding(kv).replace(num_blocks=block + 1)


def empty_block(cache: RollingCache, patches: int, dtype: jnp.dtype, *, first: bool) -> Any:
    """Zeros of the shapes of a block's keys and values in `dtype`, as `write` takes them."""
    layout, block = cache.config.layout, 0 if first else 1
    video = layout.video_frames_in(block) * patches
    audio = layout.audio_frames_in(block) + (cache.num_sinks if first else 0)
    tokens = Pathways(video=video, audio=audio, a2v=audio, v2a=video)

    def zeros(kv: KV, length: int) -> KV:
        def of(buffer: jax.Array | QuantizedArray) -> jax.Array:
            shape = jax.tree.leaves(buffer)[0].shape
            return jnp.zeros((*shape[:-3], length, *shape[-2:]), dtype)

        return KV(of(kv.k), of(kv.v))

    return jax.tree.map(zeros, cache.buffers, _like(cache.kv, tokens), is_leaf=_is_kv)


def _like(kv: Pathways | tuple, pathways: Pathways) -> Pathways | tuple:
    """The same for every layer, where `kv` is per layer."""
    return (pathways,) * len(kv) if isinstance(kv, tuple) else pathways


def _is_kv(x: Any) -> bool:
    return isinstance(x, KV)


def written_anew(cache: RollingCache, num_blocks: jax.Array, patches: int) -> RollingCache:
    """A cache into which what it holds after `num_blocks` blocks was written again, from block 0.

    Its counter is `num_blocks` then, and its ring begins where that counter says.
    """
    c, layout = cache.config, cache.config.layout
    turn = c.evicted(num_blocks) % cache.ring
    video_start, audio_start = cache.starts(c.anchors, patches)
    video, audio = (video_start, layout.video_frames * patches), (audio_start, layout.audio_frames)
    places = Pathways(
        video=Place(*video), audio=Place(*audio), a2v=Place(*audio), v2a=Place(*video)
    )

    def turned(kv: KV, place: Place) -> KV:
        def roll(x: jax.Array) -> jax.Array:
            ring = jnp.roll(x[..., place.start :, :, :], turn * place.step, axis=-3)
            return jnp.concatenate([x[..., : place.start, :, :], ring], axis=-3)

        return jax.tree.map(roll, kv)

    kv = jax.tree.map(turned, cache.buffers, _like(cache.kv, places), is_leaf=_is_kv)
    return cache.holding(kv).replace(num_blocks=num_blocks)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the ring of a buffer begins, and the tokens of a block in it."""

    start: int
    step: int


def history(cache: RollingCache, rope: ClipRope, rope_type: str, patches: int) -> Pathways:
    """What block `cache.num_blocks` (>= 1) attends to: rotated keys, values, and their lengths."""
    c = cache.config
    held = jnp.minimum(cache.num_blocks - 1, c.anchors + c.window)
    video_length, audio_length = cache.starts(held, patches)
    lengths = Pathways(video_length, audio_length, audio_length, video_length)
    num_layers = cache.kv.video.k.shape[0]

    def rotated(kv: KV, table: Rope | GridRope, length) -> History:
        k = table.rotate(kv.k, rope_type)
        return History(KV(k, kv.v), jnp.broadcast_to(length, (num_layers,)))

    return jax.tree.map(rotated, cache.kv, _slot_ropes(cache, rope), lengths, is_leaf=_is_kv)


def slots(cache: RollingCache, rope: ClipRope, patches: int, *, full: bool) -> tuple[Pathways, ...]:
    """A cache per layer as block `cache.num_blocks` (>= 1) reads and writes it: `Slots` each.

    Args:
      full: whether all slots are filled once the block is in its own; nothing needs a mask then.
    """
    starts = cache.starts(cache.slot(cache.num_blocks), patches)
    video, audio = starts
    starts = Pathways(video=video, audio=audio, a2v=audio, v2a=video)
    lengths = Pathways(None, None, None, None)
    if not full:
        held = jnp.minimum(cache.num_blocks, cache.config.anchors + cache.ring)
        video, audio = cache.starts(held, patches)
        lengths = Pathways(video=video, audio=audio, a2v=audio, v2a=video)
    tables = _slot_ropes(cache, rope)

    def of_layer(kv: Pathways) -> Pathways:
        def of(name: str) -> Slots:
            return Slots(*(getattr(of_name, name) for of_name in (kv, tables, starts, lengths)))

        return Pathways(**{name: of(name) for name in ("video", "audio", "a2v", "v2a")})

    return tuple(of_layer(kv) for kv in cache.buffers)


def _slot_ropes(cache: RollingCache, rope: ClipRope) -> Pathways:
    """Tables of all slots of each pathway."""
    layout, sinks = cache.config.layout, cache.num_sinks > 0
    ring = cache.ring if isinstance(cache.kv, tuple) else None
    positions = cache.config.slot_positions(cache.num_blocks, ring)
    video_frames = _frames(positions, layout.first_video_frames, layout.video_frames)
    audio_frames = _frames(positions, layout.first_audio_frames, layout.audio_frames)
    return Pathways(
        video=rope.video_rope(video_frames),
        audio=rope.audio_rope(audio_frames, sinks),
        a2v=rope.audio_cross_rope(audio_frames, sinks),
        v2a=rope.video_cross_rope(video_frames),
    )


def _frames(block_positions: jax.Array, first: int, later: int) -> jax.Array:
    """Frame indices of all slots: those of block 0, then `later` for each slot's block position."""
    starts = first + (block_positions - 1) * later
    return jnp.concatenate(
        [jnp.arange(first), (starts[:, None] + jnp.arange(later)[None]).reshape(-1)]
    )
