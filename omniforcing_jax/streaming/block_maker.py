"""What makes a session's blocks: the model with its cache, and latents to be written anew."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import kv_cache, student
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.streaming.block_programs import (
    all_finite,
    block_program,
    fills_cache,
    latent_shapes,
    on_device,
    on_mesh,
    write_block,
    written_anew,
)
from omniforcing_jax.streaming.given import GivenMedia, is_whole
from omniforcing_jax.streaming.steering import Steering
from omniforcing_jax.types import AVLatents

REACH = 60  # blocks that a steerable session can be rewound over
DECODED_ANEW = 4  # blocks: what a decoder still knows of those before them cannot be seen


class BlockMaker:
    """Makes block after block on the device.

    Attributes:
      model, params, config, batch: see `StreamingSession`; `rope`: tables of all positions.
      cache: of the blocks that are made; donated to each call.
      held: conditions with the latents of blocks, by index, that may be written anew.
      steerable: whether the number of steps is an argument of the programs.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        config: RolloutConfig,
        *,
        batch: int,
        max_blocks: int | None,
        steerable: bool,
        device: Sharding | None,
    ):
        """
        Args:
          max_blocks: of the longest stream; None is without end.
          device: where everything is put, on a mesh what is not split; None leaves that to JAX.

        Raises:
          ValueError: an endless stream with absolute positions.
        """
        self.model, self.params, self.config, self.batch = model, params, config, batch
        self.steerable, self._max_blocks, self._device = steerable, max_blocks, device
        self.rope = config.rope(model, max_blocks)
        if isinstance(device, NamedSharding):
            self.rope = jax.device_put(self.rope, device)
        self.cache = self._new_cache()
        self.held: dict[int, Condition] = {}

    def _new_cache(self) -> RollingCache:
        how = self.model, self.config, self.batch, self.params
        if not isinstance(self._device, NamedSharding):
            return student.new_cache(*how)
        shapes = jax.eval_shape(lambda: student.new_cache(*how))
        where = kv_cache.cache_sharding(shapes, self._device.mesh)
        return jax.jit(lambda: student.new_cache(*how), out_shardings=where)()

    def _cache_place(self, x: jax.Array) -> Sharding | None:
        """Of an array of the cache, as a block gives it back."""
        return x.sharding if isinstance(self._device, NamedSharding) else self._device

    @property
    def keeps_latents(self) -> bool:
        """Whether blocks can be written anew."""
        return self.config.recache or self.steerable

    def arguments(
        self,
        now: Steering,
        cache: RollingCache,
        condition: Condition | None,
        *,
        first: bool,
        full: bool = False,
        again: bool = False,
    ) -> tuple[tuple, dict]:
        """Of a block's program; `again` if that is `write_block` for one that was generated."""
        text = now.text, self.rope, now.key, now.text_mask
        options = {"config": self.config, "batch": self.batch, "first": first}
        if not (again or is_whole(condition)):
            if full:
                options["full"] = True
            if self.steerable:
                options["exit_step"] = np.int32(now.steps - 1)
        condition = jax.device_put(condition, self._device)
        return (self.model, self.params, cache, *text, condition), options

    def make(
        self, now: Steering, block: int, condition: Condition | None, media: GivenMedia
    ) -> AVLatents:
        """Asks for the latents [B, T, C] of a block, the one behind those in the cache."""
        full = fills_cache(self.params, self.config, block + 1)
        arguments, options = self.arguments(now, self.cache, condition, first=block == 0, full=full)
        with on_mesh(self._device):
            latents, self.cache = block_program(condition)(*arguments, **options)
        if self.keeps_latents:
            condition = condition or media.generated(block)
            self.held[block] = condition.replace(clean=latents)
            cache = self.config.cache
            kept = max(cache.window, DECODED_ANEW) + REACH if self.steerable else cache.window
            if block - kept > cache.anchors:
                self.held.pop(block - kept, None)
        return latents

    def in_cache(self, num_blocks: int) -> list[int]:
        """Blocks that the cache holds behind so many."""
        cache = self.config.cache
        recent = max(1 + cache.anchors, num_blocks - cache.window)
        return [*range(min(1 + cache.anchors, num_blocks)), *range(recent, num_blocks)]

    def recache(self, now: Steering, num_blocks: int) -> None:
        """Writes what the cache holds behind so many blocks anew, under the prompt that is now."""
        start, count = (jax.device_put(np.int32(n), self._device) for n in (0, num_blocks))
        cache = self.cache.replace(num_blocks=start)
        for block in self.in_cache(num_blocks):
            how = {"first": block == 0, "again": True}
            arguments, options = self.arguments(now, cache, self.held[block], **how)
            with on_mesh(self._device):
                _, cache = write_block(*arguments, **options)
        with on_mesh(self._device):
            self.cache = written_anew(cache, count, self.config.patches)

    def check_kept(self, block: int, num_blocks: int) -> None:
        """Raises ValueError where a stream of `num_blocks` blocks cannot go back to this one."""
        if not 0 <= block <= num_blocks or not set(self.in_cache(block)) <= self.held.keys():
            raise ValueError(
                f"block {block} cannot be gone back to: {num_blocks} are made, of which the last "
                f"{REACH} are kept"
            )

    def go_back(self, block: int) -> list[AVLatents]:
        """Forgets the blocks from this one on; the cache is to be written anew then.

        Returns:
          Latents of what a decoder must have seen of the blocks before.
        """
        self.held = {other: held for other, held in self.held.items() if other < block}
        if not block:
            self.cache = self._new_cache()
        seen = [other for other in self.held if not other or other >= block - DECODED_ANEW]
        return [self.held[other].clean for other in sorted(seen)]

    def parts(
        self, now: Steering, media: GivenMedia, wait: Callable[[], None]
    ) -> dict[str, Callable[[], None]]:
        """What compiles the programs, by its name; what makes blocks waits before."""
        # as a block gives them back
        cache = jax.tree.map(
            lambda x: on_device(x.shape, x.dtype, self._cache_place(x)), self.cache
        )
        first, later = map(self.shapes, (0, 1))

        def compile_block(cache: RollingCache, shapes: AVLatents, **how: bool) -> None:
            wait()
            for condition in media.programs(now.given, first=how["first"]):
                arguments, options = self.arguments(now, cache, condition, **how)
                with on_mesh(self._device):
                    block_program(condition).lower(*arguments, **options).compile()
            all_finite.lower(shapes).compile()

        def compile_recache() -> None:
            for block in (0, 1):
                how = {"first": block == 0, "again": True}
                arguments, options = self.arguments(now, cache, media.generated(block), **how)
                with on_mesh(self._device):
                    write_block.lower(*arguments, **options).compile()
            with on_mesh(self._device):
                written_anew.lower(cache, cache.num_blocks, self.config.patches).compile()

        parts = {
            "first block": lambda: compile_block(self.cache, first, first=True),
            "blocks": lambda: compile_block(cache, later, first=False),
        }
        if self.keeps_latents:
            parts["recache"] = compile_recache
        if fills_cache(self.params, self.config, self._max_blocks):
            parts["full cache"] = lambda: compile_block(cache, later, first=False, full=True)
        return parts

    def shapes(self, block: int) -> AVLatents:
        """[B, T, C] of a block's latents."""
        return latent_shapes(block, self.config, self.model, self.batch, self._device)

    def zeros(self) -> Iterator[AVLatents]:
        """Blocks of zeros where those of a stream would be."""
        block = 0
        while self._max_blocks is None or block < self._max_blocks:
            yield jax.tree.map(
                lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                self.shapes(block),
            )
            block += 1

    def check_snapshot(self, snapshot: dict[str, Any]) -> None:
        """Raises ValueError for the snapshot of another cache or size."""
        cache = snapshot["cache"]
        if cache.config != self.config.cache:
            raise ValueError(
                f"the snapshot's cache is {cache.config}, this session's is {self.config.cache}"
            )
        if jax.tree.map(np.shape, cache) != jax.tree.map(np.shape, self.cache):
            raise ValueError("the snapshot was taken at another batch or video size")

    def snapshot(self) -> dict[str, Any]:
        """What the next blocks depend on, as it is."""
        return {"cache": self.cache, "held": self.held}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes on from a `snapshot` that was checked."""
        where = jax.tree.map(self._cache_place, self.cache)
        self.cache, self.held = jax.device_put(snapshot["cache"], where), {}
        for block, condition in snapshot["held"].items():
            clean = jax.device_put(condition.clean, self._device)
            self.held[block] = condition.replace(clean=clean)
