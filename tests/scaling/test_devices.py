"""The table of devices, and targets to plan and compile for."""

import re

import numpy as np
import pytest

from benchmarks import stream
from omniforcing_jax.scaling import devices
from omniforcing_jax.scaling.devices import DEVICES, Target, group_speed, peak_flops
from omniforcing_jax.training import metrics

# What JAX's devices call themselves, and dense bfloat16 TFLOP/s of one of them.
KINDS = {
    "TPU v4": ("v4", 275),
    "TPU v5 lite": ("v5e", 197),
    "TPU v5e": ("v5e", 197),
    "TPU v5": ("v5p", 459),
    "TPU v5p": ("v5p", 459),
    "TPU v6 lite": ("v6e", 918),
    "TPU v6e": ("v6e", 918),
    "TPU7x": ("tpu7x", 1153),
    "NVIDIA A100-SXM4-40GB": ("a100", 312),
    "NVIDIA A100-SXM4-80GB": ("a100", 312),
    "NVIDIA A100 80GB PCIe": ("a100", 312),
    "NVIDIA H100 80GB HBM3": ("h100", 989),
    "NVIDIA H200": ("h200", 989),
    "NVIDIA GH200 480GB": ("h200", 989),
    "NVIDIA B200": ("b200", 2250),
    "NVIDIA GB200": ("gb200", 2500),
    "NVIDIA B300 SXM6 AC": ("b300", 2250),
    "NVIDIA GB300": ("gb300", 2500),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_finds_its_row_and_no_other(kind):
    name, tflops = KINDS[kind]
    assert [n for n, row in DEVICES.items() if re.search(row.kind, kind)] == [name]
    assert peak_flops(kind) == tflops * 1e12


def test_every_row_is_tried():
    assert {name for name, _ in KINDS.values()} == set(DEVICES)


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v2", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA L4", ""]
)
def test_unknown_devices_have_no_peak(kind):
    """Those with PCIe have three quarters of the usual H100's, and no row."""
    assert peak_flops(kind) is None


def test_there_is_one_table():
    assert stream.peak_flops is metrics.peak_flops is devices.peak_flops


def test_device_counts():
    assert Target.parse("tpu7x:2x2x1").num_devices == 8
    assert Target.parse("v6e:16x16").num_devices == 256
    assert Target.parse("h100:32").num_devices == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:1x1x1", "v6e:2x4", "tpu7x:2x2x1",
                                  "h100:16", "h200:1"])  # fmt: skip
def test_targets_have_the_devices_of_their_row(name):
    """As many as are planned with, and they call themselves what the table says."""
    target = Target.parse(name)
    loaded = target.load()
    assert len(loaded) == target.num_devices
    assert peak_flops(loaded[0].device_kind) == target.device.flops


def test_speed_of_a_group():
    class Chip:
        def __init__(self, *coords):
            self.coords = coords

    chips = np.array([[Chip(x, y, 0) for y in range(2)] for x in range(4)], object)
    mesh = type("Mesh", (), {"devices": chips})()
    v5p, h100 = DEVICES["v5p"], DEVICES["h100"]
    along_x, along_y, everywhere = (0, 2, 4, 6), (0, 1), tuple(range(8))
    assert group_speed(v5p, mesh, along_x) == 2 * v5p.link_speed
    assert group_speed(v5p, mesh, along_y) == 2 * v5p.link_speed
    assert group_speed(v5p, mesh, everywhere) == 4 * v5p.link_speed
    assert group_speed(v5p, mesh, (3,)) == group_speed(v5p, mesh, ()) == float("inf")
    assert group_speed(None, mesh, everywhere) == float("inf")
    assert group_speed(h100, mesh, everywhere) == h100.link_speed
    nodes = type("Mesh", (), {"devices": np.array([chips, chips])})()
    assert group_speed(h100, nodes, tuple(range(16))) == h100.node_speed
