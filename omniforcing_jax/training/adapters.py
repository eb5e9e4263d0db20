"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained beside one frozen base.

A product y = x W + b becomes y = x W + b + (x A) B alpha / rank. W and b are the base's, which
teacher, critic and generator share; A [L, in, rank] and B [L, rank, out] are trained, stacked over
layers as W is. They lie beside the kernel, as `lora_A` and `lora_B`, so that optimizer, average,
checkpoint and mesh treat the trained tree like any other. What a student has and the base has not
(sink tokens, the stabilisers of the paper's Table 3) is part of the trained tree, whole.

B starts at zero, so that before the first update a network computes what the base does. W + A B is
formed only on export (`merged`).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.ranges import POSITIVE
from omniforcing_jax.sampling.trained import TrainedSettings

# Parameters that a student has and its source may lack: they start from their initial values.
NEW_PARAMETERS = ("audio_sinks", "q_head_norm", "k_head_norm", "alpha")
# Products of a layer, by the module that they belong to.
PRODUCTS = {
    **dict.fromkeys(
        ("video_attn", "video_text_attn", "audio_attn", "audio_text_attn", "a2v_attn", "v2a_attn"),
        ("q", "k", "v", "out"),
    ),
    **dict.fromkeys(("video_ff", "audio_ff"), ("up", "down")),
}
DOWN, UP = "lora_A", "lora_B"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which products have adapters; without ranks there are none, and all weights are trained.

    Attributes:
      products: modules of a layer (`PRODUCTS`) whose products are adapted.
      ranks: one for all of them, or one for each.
      alphas: likewise; () is the ranks, so that A B is added as it is.
    """

    products: tuple[str, ...] = tuple(PRODUCTS)
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()

    def __post_init__(self):
        problems = []
        if unknown := [name for name in self.products if name not in PRODUCTS]:
            problems.append(f"there is no product {', '.join(unknown)}; {', '.join(PRODUCTS)} are")
        if not self.products or len(set(self.products)) < len(self.products):
            problems.append("products must be some modules of a layer, each once")
        for name in ("ranks", "alphas"):
            if len(getattr(self, name)) not in (0, 1, len(self.products)):
                problems.append(
                    f"{name} must be one number for all, or one for each of the "
                    f"{len(self.products)} products, not {getattr(self, name)}"
                )
        if any(rank < 1 for rank in self.ranks):
            problems.append(f"ranks must be 1 or more, not {self.ranks}")
        if not all(alpha in POSITIVE for alpha in self.alphas):
            problems.append(f"alphas must be positive, not {self.alphas}")
        if self.alphas and not self.ranks:
            problems.append("alphas need ranks")
        if problems:
            raise ValueError("adapters: " + "; ".join(problems))

    @property
    def used(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return bool(self.ranks)

    def rank(self, product: str) -> int:
        """Of the adapters of a module's products."""
        return self._of(self.ranks, product)

    def alpha(self, product: str) -> float:
        """Likewise; see the module's docstring."""
        return float(self._of(self.alphas or self.ranks, product))

    def scale(self, product: str) -> float:
        """alpha / rank."""
        return self.alpha(product) / self.rank(product)

    def _of(self, values: tuple, product: str) -> Any:
        return values[self.products.index(product)] if len(values) > 1 else values[0]

    def adapts(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` is the kernel of an adapted product."""
        return (
            self.used
            and len(path) == 4
            and path[0] == "blocks"
            and path[1] in self.products
            and path[2] in PRODUCTS[path[1]]
            and path[3] == "kernel"
        )


class StoredAdapters(NamedTuple):
    """Adapters in a file, where a student may start.

    Attributes:
      trained: what they were trained with.
      read: () -> {"blocks/video_attn/q/lora_A": float32 NumPy array, ...}, all of a network but
        its new parameters.
    """

    trained: TrainedSettings
    read: Callable[[], dict[str, np.ndarray]]


def boxed_trained(boxed: Any, config: AdapterConfig) -> Any:
    """Shapes and logical axes of what is trained of a network.

    Args:
      boxed: all of its parameters as shapes in boxes that name their axes, see
        `model.init_boxed_params`. Adapters are split as the kernels are, their rank is whole.
    """
    trained = {}
    for path, box in flatten_dict(boxed).items():
        if set(path) & set(NEW_PARAMETERS):
            trained[path] = box
        elif config.adapts(path):
            (layers, inputs, outputs), names = box.value.shape, box.names
            rank = config.rank(path[1])
            for name, shape, axes in (
                (DOWN, (layers, inputs, rank), (names[0], names[1], None)),
                (UP, (layers, rank, outputs), (names[0], None, names[2])),
            ):
                leaf = jax.ShapeDtypeStruct(shape, box.value.dtype)
                trained[*path[:-1], name] = box.replace(value=leaf, names=axes)
    return unflatten_dict(trained)


def init_trained(params: Any, config: AdapterConfig, key: jax.Array) -> Any:
    """What is trained of a network, before the first update; call it under `jax.jit`.

    Args:
      params: the network's own initial parameters [L, ...] float32, of which the new are taken.

    Returns:
      A uniform in +-1/sqrt(in), as in PEFT, and B zero, float32.
    """
    trained = {}
    for path, x in flatten_dict(params).items():
        if set(path) & set(NEW_PARAMETERS):
            trained[path] = x
        elif config.adapts(path):
            layers, inputs, outputs = x.shape
            rank, bound = config.rank(path[1]), 1 / math.sqrt(inputs)
            own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            shape = (layers, inputs, rank)
            trained[*path[:-1], DOWN] = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
            trained[*path[:-1], UP] = jnp.zeros((layers, rank, outputs))
    return unflatten_dict(trained)


def joined(base: Any, trained: Any, config: AdapterConfig) -> Any:
    """One tree of parameters for `Transformer.apply`: the base's, and the trained ones beside them.

    alpha / rank is a factor of B in it: the products (`layers.Linear`) know of neither.
    """
    parameters = flatten_dict(base)
    for path, x in flatten_dict(trained).items():
        scale = config.scale(path[1]) if path[-1] == UP else 1.0
        parameters[path] = x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
    return unflatten_dict(parameters)


def merged(base: Any, trained: Any, config: AdapterConfig) -> Any:
    """The network's weights: W + A B alpha / rank, summed in float32 and rounded once to W's dtype.

    Args:
      base, trained: trees of arrays; the base has no new parameters.
    """
    found, adapters = flatten_dict(base), flatten_dict(trained)

    @jax.jit
    def add(kernel, down, up, scale):  # one layer at a time: float32 copies of it, not of all
        def layer(parts):
            w, a, b = (x.astype(jnp.float32) for x in parts)
            product = jnp.matmul(a, b, precision="highest")
            return (w + scale * product).astype(kernel.dtype)

        return jax.lax.map(layer, (kernel, down, up))

    dtype = jax.tree.leaves(base)[0].dtype
    for path, x in adapters.items():
        if path[-1] == DOWN:
            kernel, up = (*path[:-1], "kernel"), adapters[*path[:-1], UP]
            found[kernel] = add(found[kernel], x, up, jnp.float32(config.scale(path[1])))
        elif path[-1] != UP:
            found[path] = x.astype(dtype)
    return unflatten_dict(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A transformer over a frozen base: `apply` takes the trained tree as its parameters.

    It stands where a `Transformer` does inside a traced step, and makes a gradient by "the
    parameters" one by the trained ones.

    Attributes:
      base: parameters of the base in the compute dtype.
    """

    model: Transformer
    base: Any
    adapters: AdapterConfig

    @property
    def config(self):
        """Of the transformer."""
        return self.model.config

    @property
    def dtype(self):
        """In which it computes."""
        return self.model.dtype

    def clone(self, **changes) -> "Adapted":
        """As `Transformer.clone`."""
        return dataclasses.replace(self, model=self.model.clone(**changes))

    def apply(self, variables: Any, *args, **kwargs):
        """As `Transformer.apply`."""
        params = joined(self.base, variables["params"], self.adapters)
        return self.model.apply({**variables, "params": params}, *args, **kwargs)


def bind(holder: Any, base: Any, config: AdapterConfig) -> Any:
    """A student or stage (its `model` a `Transformer`) over the base; itself without adapters."""
    if not config.used:
        return holder
    return dataclasses.replace(holder, model=Adapted(holder.model, base, config))
