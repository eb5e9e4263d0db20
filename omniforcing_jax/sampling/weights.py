"""The weights of a sampler: one tree a layer, with products that share their input joined.

Training stacks the weights of all layers in one array, which a scan goes through; on a GPU such a
scan copies each layer's weights out of the stack in every pass, 136 GB for a block of the 19B
student. A sampler's weights are prepared here, once, when they have been loaded, and nowhere else:
whatever else changes them for sampling (low precision, adapters) belongs here, too.

In low precision are the products of the layers: q, k, v, out, and both of the feed-forward, which
are 98 % of the weights of the 19B model. First and last layer, modulation and gates stay as they
are; `benchmarks.precision` measures what each kind of module costs.

A TPU attends to heads, one after the other, [B, N, T, H]. A product whose weights lie as [in, N H]
makes [B, T, N H], which XLA then copies twice for each of q, k and v. Weights that lie by heads,
[N, H, in], make what attention reads, and those behind it, [N, H, out], read what it makes.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.models import quantization
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params

# (attention, name of the joined product): what it is joined of, in the order of its outputs.
JOINED = {
    ("video_attn", "qkv"): ("q", "k", "v"),
    ("audio_attn", "qkv"): ("q", "k", "v"),
    ("a2v_attn", "kv"): ("k", "v"),
    ("v2a_attn", "kv"): ("k", "v"),
}
# Names of the modules in a layer whose kernels may be in low precision.
QUANTIZED = ("q", "k", "v", "qkv", "kv", "out", "up", "down")
# Those that may lie by heads.
BY_HEADS = ("q", "k", "v", "out")


def is_per_layer(params: Mapping[str, Any]) -> bool:
    """Whether a transformer's weights are those of `per_layer`."""
    return isinstance(params.get("blocks"), tuple)


def is_by_heads(params: Mapping[str, Any]) -> bool:
    """Whether they lie by heads."""
    return is_per_layer(params) and params["blocks"][0]["video_attn"]["out"]["kernel"].ndim == 3


def laid_out_for(platform: str, config: TransformerConfig) -> TransformerConfig | None:
    """`by_heads` of `per_layer` for devices of a platform."""
    return config if platform == "tpu" else None


def check_mesh(config: TransformerConfig, mesh: Mapping[str, int]) -> None:
    """Raises ValueError for a mesh (devices per axis) that a sampler cannot be split over.

    Heads and hidden units are split over `tensor`; one stream has nothing for the other axes.
    """
    others = [axis for axis, ways in mesh.items() if axis != "tensor" and ways != 1]
    if others:
        raise ValueError(f"a stream is split over tensor alone, not over {', '.join(others)}")
    ways = mesh["tensor"]
    for name, heads in (("video", config.video_heads), ("audio", config.audio_heads)):
        if ways < 1 or heads % ways:
            fits = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"tensor={ways} does not divide the {heads} heads of the {name} stream; "
                f"{', '.join(fits)} do"
            )


def places(config: TransformerConfig, mesh: Mesh) -> dict[tuple[str, ...], NamedSharding]:
    """{path: where a stacked parameter is} of a sampler over a mesh."""
    model = Transformer(config)
    boxed = jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))
    return flax.traverse_util.flatten_dict(partitioning.shardings(boxed, mesh))


def layer_place(stacked: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Where a layer's part of a stacked parameter is; of a kernel in 8 bits its scales, too.

    Args:
      shape: of the part, perhaps by heads; what has one entry along the input axis are scales.
    """
    spec = stacked.spec[1:]
    if len(shape) == 3:
        spec = P(*(axis for axis in spec if axis == "tensor" and shape[0] > 1))
    elif len(shape) == 2 and shape[0] == 1:
        spec = P(None, *spec[1:])
    return NamedSharding(stacked.mesh, P(*spec))


def per_layer(
    params: Mapping[str, Any],
    *,
    join: bool = True,
    quantize: str = "none",
    at: Mapping[tuple[str, ...], NamedSharding] | None = None,
    by_heads: TransformerConfig | None = None,
    scales: Mapping[str, Sequence[float | None]] | None = None,
) -> dict[str, Any]:
    """A transformer's weights as samplers use them; the stacked arrays are deleted on the way.

    No second copy of the weights exists at any time, only one of the three largest arrays. What is
    quantised is moved to the first device a layer's kernel at a time, so `params` may lie in the
    computer's memory, and a device that cannot hold them as they are need never do so.

    Args:
      params: from `io.checkpoints.load_params`, layers stacked on the first axis of `blocks`.
      join: join the products of `JOINED`. Over devices that split the heads, leave them apart.
      at: from `places`, for the layers over a mesh, which are then not joined; None leaves them on
        the device where they are, or where they are quantised.
      by_heads: of the model, if the weights around attention shall lie by heads, as is best for
        TPUs; they are not joined then. None leaves them [in, out].
      quantize: "none", or one of `quantization.PRECISIONS`, for the kernels of `QUANTIZED`.
      scales: of weights that were float8 in their file, from `io.checkpoints.float8_scales`. As
        float8 they become again what they were there, and those without a scale are left as they
        are; for int8 the scales say nothing.

    Returns:
      The same tree with `blocks` a tuple of the layers' trees; q, k and v of the self-attentions
      are one product "qkv" there, k and v of the attentions between the streams one product "kv".

    Raises:
      ValueError: no such precision.
    """
    quantization.check_mode(quantize, ("none", *quantization.PRECISIONS))
    precision = quantization.PRECISIONS.get(quantize)
    as_filed = scales if precision and precision.dtype == jnp.float8_e4m3fn else None
    flat = flax.traverse_util.flatten_dict(params["blocks"])
    num_layers = next(iter(flat.values())).shape[0]
    layers: list[dict[tuple, Any]] = [{} for _ in range(num_layers)]

    join = join and at is None and by_heads is None
    heads = {} if by_heads is None else _heads(by_heads)

    def put(path: tuple[str, ...], piece: Any) -> Any:
        stacked = at["blocks", *path]
        return jax.tree.map(lambda x: jax.device_put(x, layer_place(stacked, x.shape)), piece)

    def place(path: tuple[str, ...], *paths: tuple[str, ...]) -> None:
        """Puts what lies at `paths`, joined, at `path` of the layers."""
        parts = [jnp.asarray(flat.pop(path)) for path in paths]
        pieces: Iterable[Any]
        count = heads.get(path[0]) if path[-1] == "kernel" and path[-2] in BY_HEADS else None
        if precision and path[-1] == "kernel" and path[-2] in QUANTIZED:
            known = [[math.nan] * num_layers] * len(parts)  # for all to be found
            if as_filed:
                known = [as_filed.get("/".join(("blocks", *p)), [None] * num_layers) for p in paths]
            pieces = _quantized_layers(parts, precision, known)
        else:
            pieces = _unstacked(*parts)
        if count:
            pieces = (split_by_heads(piece, count, path[-2] == "out") for piece in pieces)
        for layer, piece in zip(layers, pieces, strict=True):
            layer[path] = piece if at is None else put(path, piece)
        if not isinstance(parts[0], jax.core.Tracer):
            jax.block_until_ready([layer[path] for layer in layers])
            for part in parts:
                part.delete()

    for (attention, name), parts in JOINED.items() if join else ():
        for leaf in ("kernel", "bias"):
            paths = [(attention, part, leaf) for part in parts]
            if all(path in flat for path in paths):
                place((attention, name, leaf), *paths)
    for path in list(flat):
        place(path, path)
    blocks = tuple(flax.traverse_util.unflatten_dict(layer) for layer in layers)
    return {**params, "blocks": blocks}


def _quantized_layers(
    parts: Sequence[jax.Array],
    precision: quantization.Precision,
    scales: Sequence[Sequence[float | None]],
) -> Iterator[quantization.QuantizedArray | jax.Array]:
    """[L, in, n] arrays -> of each layer, one kernel [in, sum of n].

    Args:
      scales: of each part's layers; NaN is found here, and what has none is not rounded.
    """
    device = jax.local_devices()[0]
    for i in range(parts[0].shape[0]):
        kernels, known = [part[i] for part in parts], [scale[i] for scale in scales]
        if not isinstance(parts[0], jax.core.Tracer):
            kernels = jax.block_until_ready(jax.device_put(kernels, device))
        if None in known:
            yield jnp.concatenate(kernels, axis=-1)
        else:
            yield _quantized(kernels, known, precision=precision)


def _heads(config: TransformerConfig) -> dict[str, int]:
    """{attention: heads}."""
    audio = dict.fromkeys(
        ("audio_attn", "audio_text_attn", "a2v_attn", "v2a_attn"), config.audio_heads
    )
    return audio | dict.fromkeys(("video_attn", "video_text_attn"), config.video_heads)


@functools.partial(jax.jit, static_argnums=(1, 2))
def split_by_heads(
    kernel: quantization.QuantizedArray | jax.Array, heads: int, behind: bool
) -> quantization.QuantizedArray | jax.Array:
    """A kernel [in, N H] as [N, H, in], or, of a product behind attention, [N H, out] as
    [N, H, out]."""
    turned = isinstance(kernel, quantization.QuantizedArray) and kernel.products  # [out, in]

    def split(x: jax.Array) -> jax.Array:
        x = x if turned != behind else x.T  # [N H, in], or [N H, out]
        return x.reshape(heads, -1, x.shape[1]) if x.shape[0] > 1 else x[None]

    return jax.tree.map(split, kernel)


@functools.partial(jax.jit, static_argnames="precision")
def _quantized(
    kernels: list[jax.Array], scales: list[float], *, precision: quantization.Precision
) -> quantization.QuantizedArray:
    kernel = jnp.concatenate(kernels, axis=-1)  # [in, sum of out]
    widths = [(1, kernel.shape[1]) for kernel in kernels]
    known = [jnp.full(width, scale) for width, scale in zip(widths, scales, strict=True)]
    return quantization.quantize_kernel(kernel, precision, jnp.concatenate(known, axis=-1))


@jax.jit
def _unstacked(*parts: jax.Array) -> tuple[jax.Array, ...]:
    """[L, ..., n] arrays -> L arrays [..., sum of n]."""
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return tuple(joined[i] for i in range(joined.shape[0]))
