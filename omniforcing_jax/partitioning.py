"""Meshes, and where each array lives on them: one table of logical axis names.

Parameters are declared with logical names (`embed`, `heads`, `mlp`, `layers`); the rules say which
mesh axis splits each of them. In a product of B x E activations with E x M weights, `fsdp` splits E
(weights are gathered before use) and `tensor` splits M and N (each device computes its own heads
and hidden units).

Set the mesh with `jax.set_mesh`: under `with mesh:` Flax silently drops sharding constraints.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# In this order: with ("data", "fsdp"), jax 0.10's partitioner permutes rows between devices in some
# backward products where data, fsdp and tensor are all split, and does not put them back: wrong
# gradients without a word (tests/test_meshes.py).
BATCH_AXES = ("fsdp", "data")

LOGICAL_AXIS_RULES = (
    ("batch", BATCH_AXES),
    ("tokens", "sequence"),
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices=None
) -> Mesh:
    """A mesh over all devices, or over the given ones.

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, sequence, tensor)
    if math.prod(shape) != len(devices):
        axes = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape))
        raise ValueError(
            f"a mesh of {axes} needs {math.prod(shape)} devices, there are {len(devices)}"
        )
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of parameters boxed with logical names (from `Module.init`).

    An axis that its mesh axis does not divide is left whole.
    """

    def place(leaf):
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, P())
        value, axes = leaf.value, nn.logical_to_mesh_axes(leaf.names, LOGICAL_AXIS_RULES)
        fits = (
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, value.shape)
        )
        return NamedSharding(mesh, P(*fits))

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Splits an array over the mesh by logical names of its leading axes; no mesh, no effect.

    The axes behind the names, and those that the mesh does not divide, are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = nn.logical_to_mesh_axes(names, LOGICAL_AXIS_RULES)

    def place(axis, size):
        ways = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        return axis if ways > 1 and size % ways == 0 else P.UNCONSTRAINED

    spec = [place(axis, size) for axis, size in zip(axes, x.shape)]
    spec += [P.UNCONSTRAINED] * (x.ndim - len(names))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))
