"""The programs of a stream's blocks, compiled before there are weights: from their shapes alone.

A session compiles what it needs before its first block (`StreamingSession.warm_up`). What takes
longest of that, the blocks of a stream that is given nothing but text, can begin sooner, while the
text is encoded and the weights are read.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import student
from omniforcing_jax.sampling.kv_cache import RollingCache
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.streaming.block_programs import fills_cache, generate_block, on_device
from omniforcing_jax.streaming.parallel import parallel


class BlocksAhead:
    """Compiles in threads of its own, from its construction on.

    Threads that compile cannot be stopped, nor Python end under them: leave the program by
    `os._exit`, or `wait` for them.
    """

    def __init__(
        self,
        model: Transformer,
        weights: Any,
        config: RolloutConfig,
        *,
        text_length: int,
        max_blocks: int | None,
    ):
        """
        Args:
          model: of the session, and `weights`: the tree of its parameters, or of their shapes, all
            on the first device.
          config: of the session.
          text_length: S of its contexts [1, S, text_dim], none of which is masked.
          max_blocks: of the session.
        """
        self._inputs = model, weights, config, text_length, max_blocks
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when all is compiled, or has failed to be: the session will say why it does."""
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            parallel(dict(_parts(*self._inputs)))


def _parts(
    model: Transformer,
    weights: Any,
    config: RolloutConfig,
    text_length: int,
    max_blocks: int | None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled, with the places of its inputs as in a session."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    weights = _placed(weights, device)
    contexts = [
        jax.ShapeDtypeStruct((1, text_length, width), jnp.float32)
        for width in model.config.text_dims
    ]
    how = {"levels": config.text_levels(frozen=False), "dtype": config.cache.dtype}
    text = jax.eval_shape(functools.partial(student.prompt_kv, model, **how), weights, *contexts)
    inputs = _placed(text, device), config.rope(model, max_blocks), jax.random.key(0), None, None
    cache = jax.eval_shape(functools.partial(student.new_cache, model, config, 1), weights)

    def compile_block(cache: RollingCache, **how: bool) -> None:
        options = {"config": config, "batch": 1, **how}
        generate_block.lower(model, weights, cache, *inputs, **options).compile()

    later = _placed(cache, device)  # as a block gives it back
    yield "first block", functools.partial(compile_block, cache, first=True)
    yield "blocks", functools.partial(compile_block, later, first=False)
    if fills_cache(weights, config, max_blocks):
        yield "full cache", functools.partial(compile_block, later, first=False, full=True)


def _placed(tree: Any, device: Sharding) -> Any:
    return jax.tree.map(lambda x: on_device(x.shape, x.dtype, device), tree)
