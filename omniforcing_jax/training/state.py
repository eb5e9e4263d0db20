"""What training changes: networks with their optimizer states and averages.

Everything here is float32 and stays so; `cast_params` makes the copies that are computed with.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.distributed.partitioning import WEIGHT_AXES
from omniforcing_jax.training.optimizers import EMAConfig
from omniforcing_jax.training.parameter_groups import GROUPS, group_of, is_audio


@flax.struct.dataclass
class Network:
    """One trained network.

    Attributes:
      params: float32 masters.
      opt_state: of the optimizer, float32.
      ema: moving average of params, float32; None when none is kept.
    """

    params: Any
    opt_state: Any
    ema: Any | None


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and replaces.

    Attributes:
      step: int32 [], steps done.
      critic: the fake score, in the DMD stages.
    """

    step: jax.Array
    generator: Network
    critic: Network | None


def create_network(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> Network:
    """A network before its first update; `params` become its masters.

    Optimizer state and average get the shardings of the parameters, the counters live on all
    devices. `params` may be arrays, or jax.ShapeDtypeStructs with shardings: then so is the result.

    Raises:
      ValueError: a parameter is not float32.
    """
    wrong = [
        f"{jax.tree_util.keystr(path)} is {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype != jnp.float32
    ]
    if wrong:
        raise ValueError(
            f"trained parameters must be float32, or small updates are lost: {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' * (len(wrong) > 5)}; load them with dtype=jnp.float32"
        )

    def build(params):
        return Network(
            params=None,
            opt_state=optimizer.init(params),
            # a copy: donating the state would give the same buffer away twice
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return build(params).replace(params=params)
    abstract = jax.eval_shape(build, params)
    shardings = _shardings_like(abstract, params)
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        network = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            abstract,
            shardings,
        )
    else:
        network = jax.jit(build, out_shardings=shardings)(params)
    return network.replace(params=params)


def create_state(generator: Network, critic: Network | None = None) -> TrainState:
    """The state before the first step, arrays or abstract as the generator is."""
    first = jax.tree.leaves(generator.params)[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=_everywhere(first.sharding))
    else:
        step = jax.device_put(np.int32(0), _everywhere(first.sharding))
    return TrainState(step=step, generator=generator, critic=critic)


def state_shardings(state: Any) -> Any:
    """The tree's shardings, for `jax.jit(step, out_shardings=(state_shardings(state), None))`.

    Without them the compiler may place a step's result otherwise than its argument, and the second
    step is compiled again.
    """
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _shardings_like(network: Network, params: Any) -> Any:
    """Shardings of an abstract network: a parameter's for what belongs to it, else replicated."""
    placed = jax.tree_util.tree_leaves_with_path(params)
    known = {path: leaf.sharding for path, leaf in placed}
    other = _everywhere(placed[0][1].sharding)

    def place(path, leaf):
        del leaf
        # moments and averages are trees of the parameters' structure inside other containers
        start = len(path)
        while start and isinstance(path[start - 1], jax.tree_util.DictKey):
            start -= 1
        return known.get(path[start:], other)

    return jax.tree_util.tree_map_with_path(place, network)


def _everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P())
    return sharding


def update_network(
    network: Network,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema_config: EMAConfig | None,
    step: jax.Array,
    *,
    loss: jax.Array | None = None,
) -> tuple[Network, dict[str, jax.Array]]:
    """One update: clip, AdamW, average.

    If the loss or a gradient is not finite, nothing changes, so that a run which stops because of
    it still has a good state.

    Args:
      network: before the update.
      grads: gradients, in the structure of the parameters.
      optimizer: from `make_optimizer`; clips.
      ema_config: needed if the network has an average.
      step: int32 [], training steps done before this one.
      loss: checked besides the gradients.

    Returns:
      (network, metrics): float32 [] each:
        grad_norm: L2 norm of all gradients, before clipping; grad_norm/audio: of the audio
          parameters; grad_norm/GROUP: of each group that the tree has (`parameter_groups.GROUPS`).
        param_norm: L2 norm of the parameters before the update.
        relative_update, relative_update/audio: rms of what the parameters changed by over the
          parameters' rms. It is taken from the stored values, so it is 0 when rounding eats it.
        update_skipped: 1 if something was not finite.

    Raises:
      ValueError: the network keeps an average and `ema_config` is None.
    """
    if network.ema is not None and ema_config is None:
        raise ValueError("the network keeps a moving average, so an EMAConfig must be given")
    metrics = _gradient_norms(grads)
    finite = jnp.isfinite(metrics["grad_norm"])
    if loss is not None:
        finite &= jnp.isfinite(loss)

    new = apply_gradients(network, grads, optimizer, ema_config, step, finite)
    changes = jax.tree.map(
        lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), new.params, network.params
    )
    changes, sizes = _squares(changes), _squares(network.params)
    for suffix, keep in (("", _all), ("/audio", is_audio)):
        ratio = _norm(changes, keep) / jnp.maximum(_norm(sizes, keep), 1e-30)
        metrics[f"relative_update{suffix}"] = ratio
    metrics["param_norm"] = _norm(sizes, _all)
    metrics["update_skipped"] = 1 - finite.astype(jnp.float32)
    return new, metrics


def apply_gradients(
    network: Network,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema_config: EMAConfig | None,
    step: jax.Array,
    finite: jax.Array,
) -> Network:
    """The network after an update; as it was where `finite` [] is False. See `update_network`."""
    updates, opt_state = optimizer.update(grads, network.opt_state, network.params)
    params = optax.apply_updates(network.params, updates)
    ema = None
    if network.ema is not None:
        decay = jnp.where(step < ema_config.start_step, 0.0, ema_config.decay)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, network.ema, params)
    new = Network(params=params, opt_state=opt_state, ema=ema)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, network)


def _gradient_norms(grads: Any) -> dict[str, jax.Array]:
    squares = _squares(grads)
    metrics = {"grad_norm": _norm(squares, _all), "grad_norm/audio": _norm(squares, is_audio)}
    there = {group_of(path) for path, _ in squares}
    for group in (group for group in GROUPS if group in there):
        metrics[f"grad_norm/{group}"] = _norm(squares, lambda path, g=group: group_of(path) == g)
    return metrics


def _all(path: tuple) -> bool:
    del path
    return True


def _squares(tree: Any) -> list[tuple[tuple, jax.Array]]:
    """(path, sum of squares) of every leaf."""
    return [
        (path, jnp.sum(jnp.square(leaf.astype(jnp.float32))))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _norm(squares: list[tuple[tuple, jax.Array]], keep: Callable[[tuple], bool]) -> jax.Array:
    """L2 norm over the leaves whose path is kept, float32 []."""
    return jnp.sqrt(sum((square for path, square in squares if keep(path)), jnp.float32(0)))


def cast_params(
    params: Any, dtype: jnp.dtype, *, shardings: Any | None = None, gather: bool = False
) -> Any:
    """float32 masters -> what is computed with. Call it under `jax.jit`.

    Args:
      params: tree of arrays.
      dtype: compute dtype.
      shardings: NamedShardings of the masters (`partitioning.shardings`); None without a mesh.
      gather: hold the copy whole on every device (but for the split over `tensor`), so that one
        all-gather serves all forwards of a rollout; see `partitioning.WeightRules`. Otherwise the
        copy lies as the masters do, and each use gathers its layer in `dtype`.

    Returns:
      The tree in `dtype`. Its gradient comes back in the masters' dtype and sharding: it is
      reduced and scattered, never held whole.

    Raises:
      ValueError: `gather` without shardings.
    """
    if shardings is None:
        if gather:
            raise ValueError("gather=True needs the shardings of the parameters")
        return jax.tree.map(lambda p: p.astype(dtype), params)
    return jax.tree.map(lambda p, s: _cast(p, dtype, s, gather), params, shardings)


def _cast(param: jax.Array, dtype: jnp.dtype, sharding: NamedSharding, gather: bool) -> jax.Array:
    master_dtype = param.dtype

    @jax.custom_vjp
    def cast(p):
        # constrained before the gather, so that bytes travel in the narrow dtype
        p = jax.lax.with_sharding_constraint(p.astype(dtype), sharding)
        if gather:
            p = jax.lax.with_sharding_constraint(p, _whole(sharding))
        return p

    def backward(_, grad):
        grad = jax.lax.with_sharding_constraint(grad.astype(master_dtype), sharding)
        return (grad,)

    cast.defvjp(lambda p: (cast(p), None), backward)
    return cast(param)


def _whole(sharding: NamedSharding) -> NamedSharding:
    def drop(entry):
        axes = entry if isinstance(entry, tuple) else (entry,)
        return None if any(axis in WEIGHT_AXES for axis in axes) else entry

    return NamedSharding(sharding.mesh, P(*(drop(entry) for entry in sharding.spec)))
