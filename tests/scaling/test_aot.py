"""Programs of the published size, compiled ahead of time: nothing is allocated."""

import json

import pytest

from launch import aot as launch_aot
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.sampling import kv_cache
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.scaling import aot, devices

PARAMETERS = {"2.0": 18_876_174_592, "2.3": 18_988_838_144}


@pytest.mark.parametrize("version", ["2.0", pytest.param("2.3", marks=pytest.mark.slow)])
def test_full_size_block_step_compiles(version):
    programs = aot.stream_programs(devices.load("cpu"), {"tensor": 1}, version=version)
    part, _ = aot.compile_part(programs, "block_step", programs.lowered["block_step"]())
    cache = kv_cache.cache_bytes(
        CacheConfig(BlockLayout.prefix(), 7),
        TransformerConfig(),
        batch=1,
        patches=16 * 24,
        dtype="bfloat16",
    )
    levels = 5 if version == "2.3" else 1  # text keys depend on the noise level there
    text = levels * 48 * 2 * 1024 * (4096 + 2048) * 2
    # The step gets text keys and values, so it does not take the weights that make them.
    unused = 48 * 2 * (4096**2 + 2048**2) * 2
    held = 2 * PARAMETERS[version] + cache + text - unused
    assert part["arguments"] == pytest.approx(held, rel=0.01)
    assert part["moved"] == {}


@pytest.mark.slow
def test_a_training_step_is_measured(tmp_path, capsys):
    """The whole command line, at tiny size on one CPU."""
    file = tmp_path / "results.json"
    settings = ["clip.height=64", "clip.width=64", "clip.blocks=2", "batch_size=2"]
    arguments = ["--program", "stage2", "--size", "tiny", "--mesh", "fsdp=1", "--set", *settings,
                 'compute.dtype="float32"', "--output", str(file)]  # fmt: skip
    assert launch_aot.main(arguments) == 0
    assert "peak" in capsys.readouterr().err
    (result,) = json.loads(file.read_text())
    part = result["parts"]["step"]
    assert part["peak"] > part["arguments"] > 1e6
    assert result["settings"]["clip.blocks"] == 2
    launch_aot.add_result(file, result | {"target": "v5p:4x4x4"})
    launch_aot.add_result(file, result | {"date": "later"})  # takes the first one's place
    assert [(r["target"], r["date"]) for r in json.loads(file.read_text())] == [
        ("v5p:4x4x4", result["date"]),
        ("cpu", "later"),
    ]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--target", "v99:1x1"], "there are, for example, v5p:4x4x4"),
        (["--target", "h100:12"], "whole nodes of 8"),
        (["--mesh", "rows=2"], "axes are data, fsdp, sequence, tensor"),
        (["--mesh", "fsdp=2"], "does not multiply to the 1 devices"),
        (["--set", "no.such=1", "--mesh", "fsdp=1"], "no.such"),
        (["--set", "compute.separate_scores=true", "--mesh", "fsdp=1"], "cannot be halved"),
        (["--program", "stream", "--set", "depth=1"], "has no setting depth"),
    ],
)
def test_bad_input(arguments, expected, capsys):
    assert launch_aot.main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_speed_of_an_axis():
    class Chip:
        def __init__(self, *coords):
            self.coords = coords

    import numpy as np

    chips = np.array([[Chip(x, y, 0) for y in range(2)] for x in range(4)], object)
    target = devices.Target("v5p:4x2x1", tuple(chips.reshape(-1)), devices.DEVICES["v5p"])
    mesh = type("Mesh", (), {})()
    mesh.axis_names, mesh.shape, mesh.devices = ("fsdp", "tensor"), {"fsdp": 4, "tensor": 2}, chips
    link = devices.DEVICES["v5p"].link_speed
    assert devices.axis_speed(target, mesh, ("fsdp",)) == 2 * link
    assert devices.axis_speed(target, mesh, ("fsdp", "tensor")) == 4 * link
    assert devices.axis_speed(target, mesh, ()) == float("inf")


@pytest.mark.slow
def test_the_smallest_tpu_case():
    """Two layers of the 19B model's stage II on four TPU v5p chips, through libtpu."""
    target = devices.load("v5p:2x2x1")
    programs = aot.stage_programs(
        target, "stage2", {"fsdp": 2, "sequence": 2}, layers=2, changes={"batch_size": 2}
    )
    part, text = aot.compile_part(programs, "step", programs.lowered["step"]())
    assert part["fits"] and part["moved"]["all-gather"] > 1e9
    assert "splash" in text
    with pytest.raises(Exception, match=r"memory|RESOURCE|exceed"):
        refused = aot.stage_programs(devices.load("v5e:2x2"), "stage2", {"fsdp": 4}, layers=8,
                                     changes={"batch_size": 4})  # fmt: skip
        aot.compile_part(refused, "step", refused.lowered["step"]())
