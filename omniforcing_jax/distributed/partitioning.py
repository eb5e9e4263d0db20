"""Meshes, and where each array lives on them: one table of logical axis names.

Parameters are declared with logical names (`embed`, `heads`, `mlp`, `layers`); the rules say which
mesh axis splits each of them. In a product of B x E activations with E x M weights, `fsdp` and
`sequence` split E (weights are gathered before use: `product`) and `tensor` splits M and N (each
device computes its own heads and hidden units). Of the activations, `data` and `fsdp` split the
batch and `sequence` the tokens of the video.

Set the mesh with `jax.set_mesh`: under `with mesh:` Flax silently drops sharding constraints.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# In this order: with ("data", "fsdp"), jax 0.10's partitioner permutes rows between devices in some
# backward products where data, fsdp and tensor are all split, and does not put them back: wrong
# gradients without a word (tests/distributed/test_meshes.py).
BATCH_AXES = ("fsdp", "data")

# Attention is split by heads along both: tokens that were split over `sequence` are exchanged for
# heads and back (DeepSpeed-Ulysses), so that keys never have to be gathered.
HEAD_AXES = ("tensor", "sequence")

# Weights, with all that belongs to them, are spread over every device that shares a batch's work.
WEIGHT_AXES = ("fsdp", "sequence")

# A name for `constrain`: this axis is not split.
WHOLE = "whole"

LOGICAL_AXIS_RULES = (
    ("batch", BATCH_AXES),
    ("tokens", "sequence"),
    ("attention_heads", HEAD_AXES),
    ("layers", None),
    ("embed", WEIGHT_AXES),
    ("heads", "tensor"),
    ("mlp", "tensor"),
)


@dataclasses.dataclass(frozen=True)
class WeightRules:
    """How the weights of products travel between devices; passed from `Transformer` to `product`.

    Attributes:
      gathered: they are whole on every device already, but for the split over `tensor`.
      keep_gathered: what was gathered for a product stays for its backward pass. That is right
        where the layer is rematerialised, and its backward pass comes right behind; elsewhere the
        weights of all layers would be held whole, so that pass gathers them once more.
      reduce_dtype: in which gradients are added up over devices.
    """

    gathered: bool = False
    keep_gathered: bool = False
    reduce_dtype: Any = jnp.float32


def parse_mesh(
    text: str, axes: tuple[str, ...] = MESH_AXES, *, rest: bool = False
) -> dict[str, int]:
    """ "fsdp=32,sequence=2" -> {"fsdp": 32, "sequence": 2}; "1", for one device, -> {}.

    Args:
      axes: that may be named.
      rest: whether a size may be -1, for all devices that are left.

    Raises:
      ValueError: not of this form, or another axis.
    """
    mesh: dict[str, int] = {}
    for part in text.split(",") if text not in ("", "1") else ():
        name, _, size = part.partition("=")
        if name not in axes or not ((size.isdecimal() and int(size)) or (rest and size == "-1")):
            raise ValueError(
                f"mesh {text!r}: {part!r} must be AXIS=SIZE, with an axis of {', '.join(axes)} and "
                f"a size from 1 on, such as {axes[0]}=8"
            )
        mesh[name] = int(size)
    return mesh


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices=None,
    in_order: bool = False,
) -> Mesh:
    """A mesh over all devices, or over the given ones.

    Args:
      in_order: takes the devices as they are listed, the last axis running fastest, instead of by
        their places in the machine: for some of a TPU slice's, between which there are gaps.

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, sequence, tensor)
    if math.prod(shape) != len(devices):
        axes = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(
            f"a mesh of {axes} needs {math.prod(shape)} devices, there are {len(devices)}"
        )
    if in_order:
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of parameters boxed with logical names (from `Module.init`).

    An axis that its mesh axis does not divide is left whole.
    """

    def place(leaf):
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*_fitting(leaf.names, leaf.value.shape, mesh)))

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Splits an array over the mesh by logical names of its leading axes; no mesh, no effect.

    An axis named `WHOLE` is not split. The axes behind the names, those named None, and those that
    the mesh does not divide, are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    logical = tuple(None if name == WHOLE else name for name in names)
    axes = nn.logical_to_mesh_axes(logical, LOGICAL_AXIS_RULES)

    def place(name, axis, size):
        if name == WHOLE:
            return None
        ways = _ways(axis, mesh)
        return axis if ways > 1 and size % ways == 0 else P.UNCONSTRAINED

    spec = [place(*each) for each in zip(names, axes, x.shape, strict=False)]
    spec += [P.UNCONSTRAINED] * (x.ndim - len(names))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def product(
    x: jax.Array,
    kernel: jax.Array,
    axes: tuple[str | None, ...],
    rules: WeightRules = WeightRules(),
    *,
    split_tokens: bool = False,
) -> jax.Array:
    """x @ kernel, with every message between devices written down.

    Left to itself, the partitioner decides product by product whether weights or activations
    travel, moves a batch to the weights where that looks cheaper, and reduces gradients whole. Here
    the weight is gathered along `WEIGHT_AXES` in its compute dtype, right before its use, and its
    gradient is reduced and scattered in one step, in `rules.reduce_dtype`, and then rounded to the
    compute dtype. Over `tensor`, a weight [E, heads or mlp] makes its share of the outputs, and one
    [heads or mlp, E] sums the shares of its inputs.

    Args:
      x: [B, ..., E].
      kernel: [E, M] in x's dtype, split by the rules for `axes`.
      axes: logical names of its axes.
      split_tokens: x [B, T, E] has its tokens over `sequence`.

    Returns:
      [B, ..., M].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x @ kernel
    held = _fitting(axes, kernel.shape, mesh)
    if rules.gathered:
        held = tuple(None if axis == WEIGHT_AXES else axis for axis in held)
    rows = BATCH_AXES if x.shape[0] % _ways(BATCH_AXES, mesh) == 0 else None
    split = split_tokens and x.ndim == 3 and x.shape[1] % mesh.shape["sequence"] == 0
    copied = (() if rows else BATCH_AXES) + (() if split else ("sequence",))
    between = ("sequence" if split else None,) + (None,) * (x.ndim - 3) if x.ndim > 2 else ()
    last = tuple("tensor" if axis == "tensor" else None for axis in held)
    spec = _Split(
        x=P(rows, *between, last[0]),
        kernel=P(*held),
        y=P(rows, *between, last[1]),
        copies=_ways(copied, mesh),
        keep=rules.keep_gathered,
        reduce_dtype=jnp.dtype(rules.reduce_dtype),
    )
    return _split_product(x, kernel, spec)


class _Split(NamedTuple):
    """Where operands and result of a product lie, how many devices hold the same rows of x, and two
    of the `WeightRules`."""

    x: P
    kernel: P
    y: P
    copies: int
    keep: bool
    reduce_dtype: jnp.dtype

    @property
    def gathered(self) -> int | None:
        """The axis of the kernel that is gathered."""
        return self.kernel.index(WEIGHT_AXES) if WEIGHT_AXES in tuple(self.kernel) else None

    @property
    def whole(self) -> P:
        """Where the kernel lies once it is gathered."""
        return P(*(axis if axis == "tensor" else None for axis in self.kernel))

    def gather(self, kernel: jax.Array) -> jax.Array:
        """On a device: its part of the kernel -> all of it."""
        if self.gathered is None:
            return kernel
        # One mesh axis after the other: no more bytes than both at once, whereas a gather over all
        # devices of a TPU slice may be compiled to an all-reduce, with twice the bytes.
        for name in reversed(WEIGHT_AXES):
            if jax.lax.axis_size(name) > 1:
                kernel = jax.lax.all_gather(kernel, name, axis=self.gathered, tiled=True)
        return kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_product(x: jax.Array, kernel: jax.Array, split: _Split) -> jax.Array:
    return _product_forward(x, kernel, split)[0]


def _product_forward(x, kernel, split):
    def local(x, kernel):
        kernel = split.gather(kernel)
        y = x @ kernel
        return (jax.lax.psum(y, "tensor") if split.x[-1] == "tensor" else y), kernel

    y, whole = _manual(local, (split.x, split.kernel), (split.y, split.whole))(x, kernel)
    return y, (x, whole if split.keep else kernel)


def _product_backward(split, residuals, gradient):
    def local(x, kernel, gradient):
        kernel = kernel if split.keep else split.gather(kernel)
        of_x = gradient @ kernel.T
        if split.y[-1] == "tensor":
            of_x = jax.lax.psum(of_x, "tensor")
        of_kernel = jnp.einsum(
            "...e,...m->em", x, gradient, preferred_element_type=split.reduce_dtype
        )
        if split.copies > 1:  # the same sum on several devices, which are about to be added up
            of_kernel = of_kernel / split.copies
        scattered = () if split.gathered is None else WEIGHT_AXES
        for name in scattered:
            of_kernel = jax.lax.psum_scatter(
                of_kernel, name, scatter_dimension=split.gathered, tiled=True
            )
        of_kernel = jax.lax.psum(of_kernel, tuple(a for a in MESH_AXES[:3] if a not in scattered))
        return of_x, of_kernel.astype(kernel.dtype)

    held = split.whole if split.keep else split.kernel
    specs = (split.x, held, split.y), (split.x, split.kernel)
    return _manual(local, *specs)(*residuals, gradient)


_split_product.defvjp(_product_forward, _product_backward)


def _manual(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    # What the devices of an axis hold in common cannot be inferred here.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _fitting(names, shape, mesh) -> tuple[Any, ...]:
    """The mesh axes that split each axis of a parameter; what is not divided stays whole."""
    axes = nn.logical_to_mesh_axes(names, LOGICAL_AXIS_RULES)
    return tuple(
        axis if size % _ways(axis, mesh) == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    )


def _ways(axes: tuple[str, ...] | str | None, mesh) -> int:
    """Into how many parts these mesh axes split something."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """`batch_sharding` where it divides the rows; otherwise every device holds all of them."""
    fits = rows % _ways(BATCH_AXES, mesh) == 0
    return batch_sharding(mesh) if fits else NamedSharding(mesh, P())
