"""Accelerators by name: what a chip can do, and devices to compile for that are not here.

A target is a TPU topology ("v5p:4x4x4") or a number of GPUs ("h100:32"). TPU targets need libtpu
(the `tpu` extra), GPU targets jax's CUDA plugin; neither needs the hardware, a driver, or CUDA.

Sources of the numbers: the vendors' data sheets; link speeds of TPUs as in "How to Scale Your
Model" (Google DeepMind, 2025). A device is what JAX calls one: half a chip of TPU v7x.
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

GIB = 2**30
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      hbm: bytes of memory that a program can use.
      flops: dense bfloat16 operations per second, at peak.
      hbm_speed: bytes per second.
      link_speed: bytes per second and direction to each neighbour of the torus, or, for a GPU, into
        the other GPUs of its node.
      node_speed: bytes per second and direction into other nodes (GPUs), or slices over the data
        centre's network (TPUs).
      dollars: per device and hour, list price on demand, for rough sums; it changes.
    """

    hbm: float
    flops: float
    hbm_speed: float
    link_speed: float
    node_speed: float
    dollars: float


DEVICES = {
    "v4": Device(30.75 * GIB, 275e12, 1.23e12, 4.5e10, 3.1e9, 3.22),
    "v5e": Device(15.75 * GIB, 197e12, 8.2e11, 4.5e10, 3.1e9, 1.20),
    "v5p": Device(95.74 * GIB, 459e12, 2.77e12, 9e10, 6.2e9, 4.20),
    "v6e": Device(31.25 * GIB, 918e12, 1.64e12, 9e10, 1.25e10, 2.70),
    "tpu7x": Device(94.75 * GIB, 1153e12, 3.69e12, 9e10, 1.25e10, 6.0),
    "h100": Device(79.1 * GIB, 989e12, 3.35e12, 4.5e11, 5e10, 3.0),
    "h200": Device(140.4 * GIB, 989e12, 4.8e12, 4.5e11, 5e10, 4.0),
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
EXAMPLES = "v5p:4x4x4, v6e:8x8, tpu7x:2x2x4, v5e:4x4, v4:4x4x4, h100:32, h200:8, cpu"


@dataclasses.dataclass(frozen=True)
class Target:
    """A target's name, its devices, and what each of them can do (None for this machine's CPU)."""

    name: str
    devices: tuple[Any, ...]
    device: Device | None

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU topology."""
        return self.name.partition(":")[0] in TPUS

    @property
    def chips(self) -> int:
        """Chips, which are what is rented."""
        return len(self.devices) // 2 if self.name.startswith("tpu7x") else len(self.devices)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5p", (4, 4, 4)), or ("h100", (32,)).

    Raises:
      ValueError: unknown; says what there is.
    """
    kind, _, shape = name.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
    except ValueError:
        sizes = ()
    if kind not in DEVICES or not sizes or min(sizes) < 1 or (kind not in TPUS and len(sizes) > 1):
        raise ValueError(f"unknown target {name!r}; there are, for example, {EXAMPLES}")
    return kind, sizes


def device_count(name: str) -> int:
    """Devices of a target, without asking its compiler."""
    if name == "cpu":
        return 1
    kind, sizes = parse(name)
    return math.prod(sizes) * (2 if kind == "tpu7x" else 1)


def load(name: str) -> Target:
    """The target's devices, for `partitioning.make_mesh(devices=...)`; nothing can run on them.

    Raises:
      ValueError: the target is unknown, or what compiles for it is not installed.
    """
    if name == "cpu":
        return Target(name, tuple(jax.devices("cpu")[:1]), None)
    kind, sizes = parse(name)
    devices = _tpu_devices(name, sizes) if kind in TPUS else _gpu_devices(kind, sizes[0])
    return Target(name, tuple(devices), DEVICES[kind])


def _tpu_devices(name: str, sizes: tuple[int, ...]):
    from jax.experimental import topologies

    for variable, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_LOG_DIR", "disabled"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(variable, value)
    options = {}
    if math.prod(sizes) < 4:  # less than a host's usual share
        options["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:
        raise ValueError(
            f"no TPU topology {name!r} ({_first_line(error)}); it needs libtpu "
            f"(pip install -e '.[tpu]'), and a name such as {EXAMPLES}"
        ) from error


def _gpu_devices(kind: str, count: int):
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    nodes = max(count // GPUS_PER_NODE, 1)
    if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise ValueError(f"{count} GPUs are not whole nodes of {GPUS_PER_NODE}")
    options = {
        "target_config": _gpu_description(kind),
        "topology": f"1x{nodes}x{count // nodes}",  # partitions, hosts, devices of a host
    }
    try:
        return topologies.get_topology_desc("", "cuda", **options).devices
    except Exception as error:
        raise ValueError(
            f"no GPU target {kind}:{count} ({_first_line(error)}); it needs jax's CUDA plugin "
            f"(pip install jax-cuda12-plugin jax-cuda12-pjrt, at the version of jax)"
        ) from error


def _gpu_description(kind: str) -> str:
    """What XLA asks about a GPU of the Hopper generation, as its GpuTargetConfigProto."""
    name, memory, speed = {
        "h100": ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
        "h200": ("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000),
    }[kind]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": 232_448,
        "shared_memory_per_core": 233_472,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "memory_bandwidth": speed,
        "l2_cache_size": 50 * 2**20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": memory,
    }
    lines = "".join(f"  {key}: {value}\n" for key, value in fields.items())
    return (
        f"gpu_device_info {{\n{lines}  cuda_compute_capability {{ major: 9 }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"
        f'device_description_str: "{name}"\n'
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def axis_speed(target: Target, mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> float:
    """Bytes per second that a device takes in, in a collective over some axes of a mesh.

    On a torus: twice the link's speed (a ring runs both ways) for every dimension of the topology
    along which the group extends. On GPUs: inside a node, or else between nodes.

    Returns:
      Infinity for groups of one device.
    """
    names = [mesh.axis_names.index(axis) for axis in axes if mesh.shape[axis] > 1]
    if not names or target.device is None:
        return math.inf
    index = tuple(slice(None) if i in names else 0 for i in range(mesh.devices.ndim))
    group = np.asarray(mesh.devices[index]).reshape(-1)
    if not target.is_tpu:
        inside = len(group) <= GPUS_PER_NODE
        return target.device.link_speed if inside else target.device.node_speed
    coordinates = np.array([device.coords for device in group])
    spanned = int(np.sum(np.ptp(coordinates, axis=0) > 0))
    return 2 * target.device.link_speed * max(spanned, 1)
