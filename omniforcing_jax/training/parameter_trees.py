"""Trees of parameters by the paths of their leaves: what is saved against what is wanted."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from omniforcing_jax.training.config.run_config import listed


def match(path, saved: Mapping, expected: Any, allow_new: tuple[str, ...]) -> tuple[dict, dict]:
    """({"a/b": leaf} of the new parameters, tree of those to be loaded).

    Args:
      path: what they are loaded from, for messages.
      saved: {"a/b": leaf} there.
      expected: tree of those wanted.
      allow_new: names of parameters that the source may lack.

    Raises:
      ValueError: the source lacks parameters, has others or others' shapes: lists all of them.
    """
    wanted = by_path(expected)
    new = {
        name: leaf
        for name, leaf in wanted.items()
        if name not in saved and set(name.split("/")) & set(allow_new)
    }
    found = {name: leaf for name, leaf in wanted.items() if name not in new}
    problems = differences(saved, found)
    if problems:
        hint = "" if new else "; if they are new, name them in allow_new"
        raise ValueError(
            f"{path} does not hold this model's parameters: {listed(problems)}"
            f"{hint if any('missing' in p for p in problems) else ''}"
        )
    return new, unflatten_dict(found, sep="/")


def place_stored(
    path,
    stored: Mapping[str, np.ndarray],
    expected: Any,
    allow_new: tuple[str, ...],
    init: Callable,
) -> Any:
    """Parameters {"a/b": array of the host} on their devices, with the new ones.

    Args, raises: as `match` and `with_new`.
    """
    new, template = match(path, stored, expected, allow_new)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        whole = stored[name].astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding_of(leaf), lambda i: whole[i])

    placed = {name: place(name, leaf) for name, leaf in by_path(template).items()}
    return with_new(unflatten_dict(placed, sep="/"), new, init)


def with_new(params: dict, new: Mapping, init: Callable[[], Any] | None) -> dict:
    """`params` with the new ones {"a/b": leaf}, drawn by `init`; see `load_generator`."""
    if not new:
        return params
    if init is None:
        raise ValueError(f"{', '.join(new)}: new, so `init` must say how to initialise them")
    shardings = {path: sharding_of(leaf) for path, leaf in new.items()}

    def draw():  # compiled: what is not returned is not computed
        leaves = by_path(init())
        return {path: leaves[path].astype(leaf.dtype) for path, leaf in new.items()}

    drawn = jax.jit(draw, out_shardings=shardings)()
    return unflatten_dict(by_path(params) | drawn, sep="/")


def sharding_of(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Where the leaf lies; that of no place, on the first device."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def by_path(tree: Any) -> dict[str, Any]:
    """{"a/b/c": leaf}, whatever the containers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def differences(saved: Mapping, wanted: Mapping) -> list[str]:
    """What {"a/b": leaf} of a source lacks, has besides, or has in another shape."""
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} is not in the model" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name in saved and tuple(saved[name].shape) != tuple(leaf.shape):
            problems.append(f"{name} is {saved[name].shape}, must be {leaf.shape}")
    return problems
