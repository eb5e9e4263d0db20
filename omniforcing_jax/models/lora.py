"""LoRA: thin matrices that are added to the weights of some linear layers.

A weight w [out, in] becomes w + strength * alpha / rank * up @ down, with down [rank, in] and up
[out, rank]; without an alpha, it is the rank. Here are the arithmetic, on NumPy or JAX arrays
alike, and the names under which files hold the matrices. Which layer of a model a name means is
told by whoever knows the model's files; nothing is read here.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

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
