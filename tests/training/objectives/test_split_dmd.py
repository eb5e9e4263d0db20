"""Score networks on devices of their own: the same steps as on one device."""

import json
import os
import subprocess
import sys
import types

import pytest

from omniforcing_jax.training.objectives.split_dmd import split_devices


def device(process: int, number: int, kind: str = "TPU v5") -> types.SimpleNamespace:
    return types.SimpleNamespace(process_index=process, id=number, device_kind=kind)


def test_every_process_gives_half_of_its_devices():
    devices = [device(n // 4, n) for n in range(8)]
    student, scores = split_devices(devices)
    assert [d.id for d in student] == [0, 1, 4, 5] and [d.id for d in scores] == [2, 3, 6, 7]
    with pytest.raises(ValueError, match="process 1 has 3 devices, which cannot be halved"):
        split_devices(devices[:7])
    with pytest.raises(ValueError, match="8 x TPU v6 lite of 2 hosts messages"):
        split_devices([device(n // 4, n, "TPU v6 lite") for n in range(8)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["I", "III"])
def test_three_steps_equal_those_on_one_device(stage):
    """Losses, norms and updates of generator and critic; both stay where they are."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.objectives.split_program", stage],
        capture_output=True,
        text=True,
        env=os.environ
        | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    together, split = json.loads(result.stdout.splitlines()[-1])
    assert "generator/loss" in together[0] and "generator/loss" not in together[1]
    for one, other in zip(together, split, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-6)
    # and the losses, which do not pile up rounding, much closer
    for name in ("generator/loss", "critic/loss"):
        assert together[2][name] == pytest.approx(split[2][name], rel=2e-5)
