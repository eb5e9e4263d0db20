"""What accelerators can do, and devices to compile for that are not here.

`DEVICES` is the project's only table of hardware. A row is what JAX calls a device: a chip, or half
of one on TPU v7x. Sources: the vendors' data sheets, without sparsity; link speeds of TPUs as in
"How to Scale Your Model" (Google DeepMind, 2025).

A target is a TPU topology ("v5p:4x4x4") or a number of GPUs ("h100:32"). TPU targets need libtpu
(the `tpu` extra), GPU targets jax's CUDA plugin; neither needs the hardware, a driver, or CUDA.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax
import numpy as np

GIB = 2**30
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      kind: regular expression that finds it in JAX's `device_kind`.
      flops: dense bfloat16 operations per second, at peak.
      flops_8bit: the same for int8 or float8, whichever is faster.
      hbm: bytes of memory that a program can use.
      hbm_speed: bytes per second.
      link_speed: bytes per second and direction to each neighbour of the torus, or, for a GPU, into
        the other GPUs of its node.
      node_speed: bytes per second and direction into other nodes (GPUs), or slices over the data
        centre's network (TPUs).
      dollars: per device and hour, list price on demand, for rough sums; it changes.
      torus: dimensions of a TPU slice's torus; 0 for a GPU.
      per_chip: devices of a chip.
    """

    kind: str
    flops: float
    flops_8bit: float
    hbm: float
    hbm_speed: float
    link_speed: float
    node_speed: float
    dollars: float
    torus: int = 0
    per_chip: int = 1

    def holds(self, size: float) -> bool:
        """Whether so many bytes leave a tenth of the memory free."""
        return size <= 0.9 * self.hbm


# fmt: off
DEVICES = {
    "v4": Device(r"v4$", 275e12, 275e12, 30.75 * GIB, 1.23e12, 4.5e10, 3.1e9, 3.22, 3),
    "v5e": Device(r"v5(e| lite)$", 197e12, 394e12, 15.75 * GIB, 8.2e11, 4.5e10, 3.1e9, 1.2, 2),
    "v5p": Device(r"v5p?$", 459e12, 918e12, 95.74 * GIB, 2.77e12, 9e10, 6.2e9, 4.2, 3),
    "v6e": Device(r"v6(e| lite)$", 918e12, 1836e12, 31.25 * GIB, 1.64e12, 9e10, 1.25e10, 2.7, 2),
    "tpu7x": Device(r"7x$", 1153e12, 2307e12, 94.75 * GIB, 3.69e12, 9e10, 1.25e10, 6, 3, 2),
    "a100": Device(r"\bA100\b", 312e12, 624e12, 79.1 * GIB, 2.04e12, 3e11, 2.5e10, 2),
    "h100": Device(r"H100\b(?! PCIe| NVL)", 989e12, 1979e12, 79.1 * GIB, 3.35e12, 4.5e11, 5e10, 3),
    "h200": Device(r"\bG?H200\b", 989e12, 1979e12, 140.4 * GIB, 4.8e12, 4.5e11, 5e10, 4),
    "b200": Device(r"\bB200\b", 2250e12, 4500e12, 178 * GIB, 8e12, 9e11, 5e10, 6),
    "gb200": Device(r"\bGB200\b", 2500e12, 5000e12, 184 * GIB, 8e12, 9e11, 5e10, 6),
    "b300": Device(r"\bB300\b", 2250e12, 4500e12, 268 * GIB, 8e12, 9e11, 1e11, 8),
    "gb300": Device(r"\bGB300\b", 2500e12, 5000e12, 276 * GIB, 8e12, 9e11, 1e11, 8),
}
# fmt: on
# Those whose products take float8, which the others widen first.
FLOAT8 = ("tpu7x", "h100", "h200", "b200", "gb200", "b300", "gb300")
EXAMPLES = "v5p:4x4x4, v6e:8x8, tpu7x:2x2x4, v5e:4x4, v4:4x4x4, h100:32, h200:8, cpu"


def memory_bytes() -> int:
    """Memory of a local device as the runtime says, else all that this computer has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, num_bytes: float) -> None:
    """Holds what will be needed at least against the memory of a device.

    Raises:
      ValueError: it is more.
    """
    there = memory_bytes()
    if num_bytes > there:
        raise ValueError(
            f"{what} takes {num_bytes / GIB:,.1f} GiB at least, and a device has "
            f"{there / GIB:,.1f} GiB: make it shorter, smaller or fewer at a time"
        )


def check_products(quantize: str, device_kind: str) -> None:
    """Whether a device can multiply in a precision, see `quantization.PRECISIONS`.

    Args:
      quantize: the precision; weights in 8 bits, and their products where it is w8a8.
      device_kind: JAX's name for it. One that is not in `DEVICES` is not known to lack anything.

    Raises:
      ValueError: its products take no float8.
    """
    known = (name for name, device in DEVICES.items() if re.search(device.kind, device_kind))
    if quantize == "w8a8-fp8" and next(known, "h100") not in FLOAT8:
        raise ValueError(
            f"{device_kind} multiplies no float8: use w8a8-int8, or fp8, where only the weights are"
        )


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device, by JAX's name for it; None if unknown."""
    rows = (device for device in DEVICES.values() if re.search(device.kind, device_kind))
    return next((device.flops for device in rows), None)


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine.

    Attributes:
      name: such as "v5p:4x4x4", "h100:32", or "cpu" for one device of this machine.
      device: what each of its devices can do; None for "cpu".
      sizes: chips along each dimension; of GPUs, their number.
    """

    name: str
    device: Device | None
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Target":
        """Raises ValueError if there is no such target; says what there is."""
        if name == "cpu":
            return cls(name, None, (1,))
        kind, _, shape = name.partition(":")
        device = DEVICES.get(kind)
        try:
            sizes = tuple(int(size) for size in shape.split("x"))
        except ValueError:
            sizes = ()
        if not device or not sizes or min(sizes) < 1 or (not device.torus and len(sizes) > 1):
            raise ValueError(f"unknown target {name!r}; there are, for example, {EXAMPLES}")
        return cls(name, device, sizes)

    @property
    def num_devices(self) -> int:
        """JAX's devices."""
        return math.prod(self.sizes) * (self.device.per_chip if self.device else 1)

    def load(self) -> tuple[Any, ...]:
        """Its devices, for `partitioning.make_mesh(devices=...)`; nothing can run on them.

        Raises:
          ValueError: what compiles for it is not installed, or has no such topology.
        """
        from jax.experimental import topologies

        if self.device is None:
            return tuple(jax.devices("cpu")[:1])
        tpu = self.device.torus > 0
        for variable, value in (_TPU_ENVIRONMENT if tpu else _GPU_ENVIRONMENT).items():
            os.environ.setdefault(variable, value)
        options = self._tpu_options() if tpu else self._gpu_options()
        name, platform = (self.name, "tpu") if tpu else ("", "cuda")
        try:
            return tuple(topologies.get_topology_desc(name, platform, **options).devices)
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            needs = "libtpu (pip install -e '.[tpu]')"
            if not tpu:
                plugin = "pip install jax-cuda12-plugin jax-cuda12-pjrt, at the version of jax"
                needs = f"jax's CUDA plugin ({plugin})"
            raise ValueError(
                f"no devices for target {self.name!r} ({line}); it needs {needs}, and a name such "
                f"as {EXAMPLES}"
            ) from error

    def _tpu_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if math.prod(self.sizes) < 4:  # less than a host's usual share
            options["chips_per_host_bounds"] = (*self.sizes, 1, 1)[:3]
        if self.name.startswith("v4"):  # or each of a chip's two cores would be a device
            options["chip_config_name"] = "megacore"
        return options

    def _gpu_options(self) -> dict[str, Any]:
        kind, (count,) = self.name.partition(":")[0], self.sizes
        if kind not in _HOPPER:
            raise ValueError(f"programs cannot be compiled for {kind}, only planned for it")
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            raise ValueError(f"{count} GPUs are not whole nodes of {GPUS_PER_NODE}")
        nodes = max(count // GPUS_PER_NODE, 1)
        # partitions, hosts, devices of a host
        return {"target_config": _HOPPER[kind], "topology": f"1x{nodes}x{count // nodes}"}


_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
# What XLA asks about a GPU of the Hopper generation, as its GpuTargetConfigProto.
_HOPPER = {
    kind: f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  device_memory_size: {memory}  memory_bandwidth: {speed}
  cuda_compute_capability {{ major: 9 }}
  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
    for kind, name, memory, speed in (
        ("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
        ("h200", "NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000),
    )
}


def group_speed(device: Device | None, mesh: jax.sharding.Mesh, group: tuple[int, ...]) -> float:
    """Bytes per second that a device takes in, in a collective over a group of a mesh.

    On a torus: twice the link's speed (a ring runs both ways) for every dimension of the topology
    along which the axes of the group extend. On GPUs: inside a node, or else between nodes.

    Args:
      group: positions in the mesh's devices, in order.

    Returns:
      Infinity for groups of one device, and where the device is not known.
    """
    positions = np.isin(np.arange(mesh.devices.size), group).reshape(mesh.devices.shape)
    spanned = np.ptp(np.argwhere(positions), axis=0) > 0 if positions.any() else np.array([False])
    if device is None or not spanned.any():
        return math.inf
    along = mesh.devices[tuple(slice(None) if s else 0 for s in spanned)].reshape(-1)
    if not device.torus:
        return device.link_speed if len(along) <= GPUS_PER_NODE else device.node_speed
    coordinates = np.array([one.coords for one in along])
    dimensions = int(np.sum(np.ptp(coordinates, axis=0) > 0))
    return 2 * device.link_speed * max(dimensions, 1)
