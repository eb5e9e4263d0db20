"""The weights of a sampler: one tree a layer, with products that share their input joined.

Training stacks the weights of all layers in one array, which a scan goes through; on a GPU such a
scan copies each layer's weights out of the stack in every pass, 136 GB for a block of the 19B
student. A sampler's weights are prepared here, once, when they have been loaded, and nowhere else:
whatever else changes them for sampling (low precision, adapters) belongs here, too.
"""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

# (attention, name of the joined product): what it is joined of, in the order of its outputs.
JOINED = {
    ("video_attn", "qkv"): ("q", "k", "v"),
    ("audio_attn", "qkv"): ("q", "k", "v"),
    ("a2v_attn", "kv"): ("k", "v"),
    ("v2a_attn", "kv"): ("k", "v"),
}


def is_per_layer(params: Mapping[str, Any]) -> bool:
    """Whether a transformer's weights are those of `per_layer`."""
    return isinstance(params.get("blocks"), tuple)


def per_layer(params: Mapping[str, Any], *, join: bool = True) -> dict[str, Any]:
    """A transformer's weights as samplers use them; the stacked arrays are deleted on the way.

    No second copy of the weights exists at any time, only one of the three largest arrays.

    Args:
      params: from `io.checkpoints.load_params`, layers stacked on the first axis of `blocks`.
      join: join the products of `JOINED`. Over devices that split the heads, leave them apart.

    Returns:
      The same tree with `blocks` a tuple of the layers' trees; q, k and v of the self-attentions
      are one product "qkv" there, k and v of the attentions between the streams one product "kv".
    """
    flat = flax.traverse_util.flatten_dict(params["blocks"])
    num_layers = next(iter(flat.values())).shape[0]
    layers: list[dict[tuple, Any]] = [{} for _ in range(num_layers)]

    def place(path: tuple[str, ...], *parts: jax.Array) -> None:
        for layer, piece in zip(layers, _unstacked(*parts), strict=True):
            layer[path] = piece
        if not isinstance(parts[0], jax.core.Tracer):
            jax.block_until_ready([layer[path] for layer in layers])
            for part in parts:
                part.delete()

    for (attention, name), parts in JOINED.items() if join else ():
        for leaf in ("kernel", "bias"):
            paths = [(attention, part, leaf) for part in parts]
            if all(path in flat for path in paths):
                place((attention, name, leaf), *(jnp.asarray(flat.pop(path)) for path in paths))
    for path in list(flat):
        place(path, jnp.asarray(flat.pop(path)))
    blocks = tuple(flax.traverse_util.unflatten_dict(layer) for layer in layers)
    return {**params, "blocks": blocks}


@jax.jit
def _unstacked(*parts: jax.Array) -> tuple[jax.Array, ...]:
    """[L, ..., n] arrays -> L arrays [..., sum of n]."""
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return tuple(joined[i] for i in range(joined.shape[0]))
