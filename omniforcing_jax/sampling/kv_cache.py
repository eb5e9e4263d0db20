"""The rolling cache: keys and values of a few anchor blocks and of a window of recent blocks.

The cache is a value of fixed size, so time and memory per block do not depend on how long a stream
has run. Its slots hold, per pathway,

    [ block 0 (with the sinks) | anchor blocks 1..n | ring of `window` recent blocks ]

A ring slot is a whole block, so a write never straddles the ring's end, and until the ring is full
the valid slots are a prefix of the buffer: attention needs a length, never a mask. Which block a
slot holds follows from the number of blocks written, which is the only counter.

Keys are stored unrotated. `history` rotates them once per block for all its forward passes, at
positions that are absolute or relative to the window: there, evicting e blocks moves everything but
the anchors back by e blocks on both clocks, so positions stay within the range seen in training.

One type serves the self-attention of both streams and both directions between them: `video` and
`v2a` hold video tokens, `audio` and `a2v` audio tokens.
"""

import dataclasses
import math

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.distributed.partitioning import BATCH_AXES, HEAD_AXES
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.layers import KV, History
from omniforcing_jax.models.transformer.model import Pathways
from omniforcing_jax.models.transformer.rope import ClipRope

POSITIONS = ("absolute", "relative")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Shape of a rolling cache.

    Attributes:
      layout: frames per block.
      window: recent blocks kept besides the anchors; at least 1.
      anchors: blocks 1..n that are never evicted (block 0 never is).
      positions: "absolute" (a token keeps the time at which it was generated) or "relative" (to the
        window: streams of any length stay inside the trained range).

    Raises:
      ValueError: no window, fewer than no anchors, or other positions.
    """

    layout: BlockLayout
    window: int = 7
    anchors: int = 0
    positions: str = "relative"

    def __post_init__(self):
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

    def slot_positions(self, block: jax.Array | int) -> jax.Array:
        """Position, in blocks, of each slot 1..n+window while block `block` is generated.

        Empty slots get a position inside the tables; they are never attended to.
        """
        first = 1 + self.anchors
        ring = jnp.arange(self.window)
        # The youngest block in ring slot r is the largest b < block with (b - first) % window == r.
        held = block - 1 - (block - 1 - first - ring) % self.window
        if self.positions == "relative":
            held = held - self.evicted(block)
        held = jnp.maximum(held, first + 0 * ring)
        return jnp.concatenate([jnp.arange(1, first), held])


@flax.struct.dataclass
class RollingCache:
    """Keys and values of the blocks written so far.

    Attributes:
      kv: [L, B, slots, N, H] per pathway.
      num_blocks: [] int32, blocks written.
      config: shape of the cache.
      num_sinks: sink tokens of the model; they are the first audio slots.
    """

    kv: Pathways
    num_blocks: jax.Array
    config: CacheConfig = flax.struct.field(pytree_node=False)
    num_sinks: int = flax.struct.field(pytree_node=False, default=0)


def init_cache(
    config: CacheConfig,
    model: TransformerConfig,
    *,
    batch: int,
    patches: int,
    dtype: jnp.dtype = jnp.float32,
) -> RollingCache:
    """An empty cache for `patches` tokens per video latent."""
    video = config.layout.num_video_frames(config.capacity) * patches
    audio = config.layout.num_audio_frames(config.capacity) + model.num_audio_sinks

    def kv(slots, heads, head_dim):
        shape = (model.num_layers, batch, slots, heads, head_dim)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return RollingCache(
        kv=Pathways(
            video=kv(video, model.video_heads, model.video_head_dim),
            audio=kv(audio, model.audio_heads, model.audio_head_dim),
            a2v=kv(audio, model.audio_heads, model.audio_head_dim),
            v2a=kv(video, model.audio_heads, model.audio_head_dim),
        ),
        num_blocks=jnp.zeros((), jnp.int32),
        config=config,
        num_sinks=model.num_audio_sinks,
    )


def cache_bytes(
    config: CacheConfig, model: TransformerConfig, *, batch: int, patches: int, dtype: jnp.dtype
) -> int:
    """Size of the cache in bytes, without allocating it."""
    cache = jax.eval_shape(
        lambda: init_cache(config, model, batch=batch, patches=patches, dtype=dtype)
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.kv))


def cache_sharding(cache: RollingCache, mesh: Mesh) -> RollingCache:
    """Shardings of a rolling cache [L, B, S, N, H]: the batch, and the heads as in attention."""

    def place(leaf):
        if leaf.ndim != 5:
            return NamedSharding(mesh, P())
        batch_axes = tuple(a for a in BATCH_AXES if mesh.shape[a] > 1)
        batch_size = math.prod(mesh.shape[a] for a in batch_axes)
        batch = batch_axes if batch_axes and leaf.shape[1] % batch_size == 0 else None
        ways = math.prod(mesh.shape[a] for a in HEAD_AXES)
        heads = HEAD_AXES if leaf.shape[3] % ways == 0 else None
        return NamedSharding(mesh, P(None, batch, None, heads, None))

    return jax.tree.map(place, cache)


def write(
    cache: RollingCache, new: Pathways, patches: int, *, first: bool, detach: bool = True
) -> RollingCache:
    """Stores the next block's keys and values (of the refresh pass) in its slot.

    Args:
      new: Pathways of KV [L, B, S, N, H], keys not rotated.
      first: whether this is block 0, whose shape differs. It must be the first write.
      detach: let no gradient through to what made them.
    """
    c, layout, block = cache.config, cache.config.layout, cache.num_blocks
    if first:
        video_start = audio_start = 0
    else:
        slot = block - 1
        slot = jnp.where(slot < c.anchors, slot, c.anchors + (slot - c.anchors) % c.window)
        video_start = (layout.first_video_frames + slot * layout.video_frames) * patches
        audio_start = cache.num_sinks + layout.first_audio_frames + slot * layout.audio_frames

    def put(old: KV, kv: KV, start) -> KV:
        def update(buffer, x):
            x = (jax.lax.stop_gradient(x) if detach else x).astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, x, start, axis=2)

        return jax.tree.map(update, old, kv)

    return cache.replace(
        kv=Pathways(
            video=put(cache.kv.video, new.video, video_start),
            audio=put(cache.kv.audio, new.audio, audio_start),
            a2v=put(cache.kv.a2v, new.a2v, audio_start),
            v2a=put(cache.kv.v2a, new.v2a, video_start),
        ),
        num_blocks=block + 1,
    )


def written_anew(cache: RollingCache, num_blocks: jax.Array, patches: int) -> RollingCache:
    """A cache into which what it holds after `num_blocks` blocks was written again, from block 0.

    Its counter is `num_blocks` then, and its ring begins where that counter says.
    """
    c, layout = cache.config, cache.config.layout
    turn = c.evicted(num_blocks) % c.window
    video_start = layout.num_video_frames(1 + c.anchors) * patches
    audio_start = cache.num_sinks + layout.num_audio_frames(1 + c.anchors)

    def turned(kv: KV, start: int, step: int) -> KV:
        def roll(x: jax.Array) -> jax.Array:
            ring = jnp.roll(x[:, :, start:], turn * step, axis=2)
            return jnp.concatenate([x[:, :, :start], ring], axis=2)

        return jax.tree.map(roll, kv)

    video, audio = (video_start, layout.video_frames * patches), (audio_start, layout.audio_frames)
    kv = Pathways(
        video=turned(cache.kv.video, *video),
        audio=turned(cache.kv.audio, *audio),
        a2v=turned(cache.kv.a2v, *audio),
        v2a=turned(cache.kv.v2a, *video),
    )
    return cache.replace(kv=kv, num_blocks=num_blocks)


def history(cache: RollingCache, rope: ClipRope, rope_type: str, patches: int) -> Pathways:
    """What block `cache.num_blocks` (>= 1) attends to: rotated keys, values, and their lengths."""
    c, layout, block = cache.config, cache.config.layout, cache.num_blocks
    positions = c.slot_positions(block)
    video_frames = _frames(positions, layout.first_video_frames, layout.video_frames)
    audio_frames = _frames(positions, layout.first_audio_frames, layout.audio_frames)
    slots = jnp.minimum(block - 1, c.anchors + c.window)
    video_length = (layout.first_video_frames + slots * layout.video_frames) * patches
    audio_length = cache.num_sinks + layout.first_audio_frames + slots * layout.audio_frames
    sinks = cache.num_sinks > 0
    num_layers = cache.kv.video.k.shape[0]

    def rotated(kv: KV, table, length) -> History:
        k = table.rotate(kv.k, rope_type)
        return History(KV(k, kv.v), jnp.broadcast_to(length, (num_layers,)))

    return Pathways(
        video=rotated(cache.kv.video, rope.video_rope(video_frames), video_length),
        audio=rotated(cache.kv.audio, rope.audio_rope(audio_frames, sinks), audio_length),
        a2v=rotated(cache.kv.a2v, rope.audio_cross_rope(audio_frames, sinks), audio_length),
        v2a=rotated(cache.kv.v2a, rope.video_cross_rope(video_frames), video_length),
    )


def _frames(block_positions: jax.Array, first: int, later: int) -> jax.Array:
    """Frame indices of all slots: those of block 0, then `later` for each slot's block position."""
    starts = first + (block_positions - 1) * later
    return jnp.concatenate(
        [jnp.arange(first), (starts[:, None] + jnp.arange(later)[None]).reshape(-1)]
    )
