"""The same losses, gradients and averages on every mesh: one device, 2, 4, 4 x 2, 2 x 2 x 2."""

import json
import os
import subprocess
import sys

import pytest

MESHES = {
    "one device": "data=1",
    "2": "fsdp=2",
    "2 x 2": "fsdp=2,tensor=2",
    "4 x 2": "fsdp=4,tensor=2",
    "2 x 2 x 2": "data=2,fsdp=2,tensor=2",
    "sequence": "data=2,sequence=2,tensor=2",
}


def losses(stage: str, *meshes: str) -> list[list[dict[str, float]]]:
    """Of each mesh, in one process, which compiles what does not depend on it once."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.distributed.mesh_losses", stage]
    command += [MESHES[mesh] for mesh in meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_losses_of_two_steps_on_a_mesh():
    """Step 2 sees the update of step 1, and so the gradients of the first step."""
    assert_same_losses("stage2", "2 x 2 x 2")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_losses_do_not_depend_on_the_mesh(stage):
    """In two microbatches, stage III with gathered weights, as the whole batch on one device."""
    assert_same_losses(stage, "4 x 2", "2 x 2 x 2", "sequence")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage2-given", "stage3-given"])
def test_conditions_do_not_depend_on_the_mesh(stage):
    """Every sample's mode is drawn from its own key, wherever it lies."""
    assert_same_losses(stage, "2 x 2 x 2", "sequence")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_adapters_do_not_depend_on_the_mesh(stage):
    """Over a frozen base that is split as well, under conditions, and in microbatches."""
    assert_same_losses(f"{stage}-given-adapters", "2", "2 x 2")


def assert_same_losses(stage: str, *meshes: str) -> None:
    expected, *of_meshes = losses(stage, "one device", *meshes)
    for mesh, found in zip(meshes, of_meshes, strict=True):
        for step, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert a.keys() == e.keys()
            for name, value in e.items():
                assert a[name] == pytest.approx(value, rel=1e-4, nan_ok=True), (mesh, step, name)
