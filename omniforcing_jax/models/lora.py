"""LoRA: thin matrices that are added to the weights of some linear layers.

A weight w [out, in] becomes w + strength * alpha / rank * up @ down, with down [rank, in] and up
[out, rank]; without an alpha, it is the rank. Here are the arithmetic, on NumPy or JAX arrays
alike, the names under which files hold the matrices, and the sum in a tree of parameters. Which
layer of a model a name means is told by whoever knows the model's files; nothing is read here.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Array = TypeVar("Array")

# what stands behind the name of a layer: part
_PARTS = (
    (r"(lora_A|lora_down|lora\.down)(\.default)?\.weight", "down"),
    (r"(lora_B|lora_up|lora\.up)(\.default)?\.weight", "up"),
    (r"alpha", "alpha"),
)
# adapters that add something else than up @ down, and the name by which people know them
_OTHERS = (
    (r"dora_scale|(lora_)?magnitude_vector(\.default)?(\.weight)?", "DoRA"),
    (r"lokr_\w+", "LoKr"),
    (r"hada_\w+", "LoHa"),
    (r"oft_\w+(\.weight)?", "OFT"),
    (r"lora_mid\.weight", "LoRA of a convolution"),
    (r"lora_B(\.default)?\.bias", "LoRA with biases"),
    (r"diff(_b)?", "full difference of weights"),
)


class LayerKeys(NamedTuple):
    """Keys of one layer's tensors in a LoRA file; `alpha` is a scalar, and may be absent."""

    down: str
    up: str
    alpha: str | None


def layers_of(keys: Iterable[str]) -> tuple[dict[str, LayerKeys], list[str], dict[str, str]]:
    """Which tensors of a file belong together.

    Args:
      keys: all of a file.

    Returns:
      ({name of a layer as the file has it: its keys}, keys that belong to no pair of matrices,
      {kind of adapter that is no plain LoRA: one of its keys}).
    """
    found: dict[str, dict[str, str]] = {}
    stray, others = [], {}
    for key in keys:
        layer, part = _split(key)
        if part is None:
            stray.append(key)
        elif part in ("down", "up", "alpha"):
            found.setdefault(layer, {})[part] = key
        else:
            others.setdefault(part, key)
    layers = {}
    for layer, parts in found.items():
        if "down" in parts and "up" in parts:
            layers[layer] = LayerKeys(parts["down"], parts["up"], parts.get("alpha"))
        else:
            stray += parts.values()
    return layers, stray, others


def _split(key: str) -> tuple[str, str | None]:
    """(layer, part or kind of other adapter), or (key, None)."""
    for pattern, part in (*_PARTS, *_OTHERS):
        if match := re.fullmatch(rf"(.+)\.(?:{pattern})", key):
            return match[1], part
    return key, None


def factor(strength: float, rank: int, alpha: float | None) -> float:
    """What up @ down is multiplied with."""
    return strength if alpha is None else strength * alpha / rank


def update(down: Array, up: Array, scale: float) -> Array:
    """What is added to a weight: scale * up @ down, in the arrays' dtype.

    Args:
      down: [rank, in].
      up: [out, rank], or some of its rows.
      scale: see `factor`.

    Returns:
      [out, in], or those rows of it. Our own kernels are [in, out], the transpose.
    """
    return (up * scale) @ down


class KernelUpdate(NamedTuple):
    """What a LoRA adds to one kernel [in, out] of a tree of parameters.

    Attributes:
      path: "/"-separated, of the leaf.
      layer: index along its leading axis; None for a leaf that is not stacked.
      scale: see `factor`.
      read: the matrices, down [rank, in] and up [out, rank], float32; called once, when it is due.
    """

    path: str
    layer: int | None
    scale: float
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


def merge(params: dict[str, Any], updates: Sequence[KernelUpdate]) -> dict[str, Any]:
    """Parameters with LoRAs in them: summed in float32, rounded once to each leaf's own dtype.

    Args:
      params: nested dict of arrays; the leaves that change are donated.
      updates: of any number of LoRAs, added in this order.
    """
    leaves = flatten_dict(params, sep="/")
    kernels: dict[tuple[str, int | None], list[KernelUpdate]] = {}
    for found in updates:
        kernels.setdefault((found.path, found.layer), []).append(found)
    for (path, layer), group in kernels.items():
        added = sum(
            update(*map(jnp.asarray, found.read()), jnp.float32(found.scale)) for found in group
        )
        index = jnp.int32(0 if layer is None else layer)
        leaves[path] = _add(leaves[path], index, added, stacked=layer is not None)
    return unflatten_dict(leaves, sep="/")


@functools.partial(jax.jit, static_argnames="stacked", donate_argnums=0)
def _add(leaf: jax.Array, layer: jax.Array, added: jax.Array, *, stacked: bool) -> jax.Array:
    """leaf [L, in, out] or [in, out] with added [out, in] in one kernel."""
    kernel = leaf[layer] if stacked else leaf
    total = (kernel.astype(jnp.float32) + added.T).astype(leaf.dtype)
    return leaf.at[layer].set(total) if stacked else total
