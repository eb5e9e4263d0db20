"""Memory of the process and of the device."""

import resource
import sys
import types

import numpy as np
import pytest

from omniforcing_jax.scaling import memory


def test_memory_in_use_falls():
    """Unlike its peak."""
    size = 1 << 28
    before = memory.resident_bytes()
    block = np.ones(size, np.uint8)
    during, peak = memory.resident_bytes(), memory.peak_resident_bytes()
    del block
    after = memory.resident_bytes()
    assert during - before > 0.9 * size and during - after > 0.9 * size
    assert peak >= 0.99 * during and memory.peak_resident_bytes() >= peak


def test_the_device_is_asked_for_its_memory():
    device = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 7, "num_allocs": 1}
    )
    assert memory.bytes_in_use(device) == 5
    assert memory.peak_bytes(device) == (7, "device")
    silent = types.SimpleNamespace(memory_stats=lambda: None)
    assert memory.bytes_in_use(silent) > 1 << 20
    assert memory.peak_bytes(silent)[1] == "process"


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(monkeypatch, system, unit):
    usage = types.SimpleNamespace(ru_maxrss=12345)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", system)
    assert memory.peak_resident_bytes() == 12345 * unit
