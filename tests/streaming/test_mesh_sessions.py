"""Sessions over several devices; the programs run in a process of their own, with four of them."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from launch import serve, stream
from omniforcing_jax.distributed.partitioning import make_mesh
from omniforcing_jax.pipeline import check_split, load_pipeline


def streamed(checkpoint, *how: str) -> dict:
    command = [sys.executable, "-m", "tests.streaming.mesh_sessions", str(checkpoint), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, ways: int, weights: float) -> None:
    assert found["range"] > 100
    assert found["pictures"] <= 2 and found["sound"] < 5e-4  # sums over devices: other roundings
    assert found["compiled"] == 0  # in a block
    assert found["heads"] == 4 // ways  # of the cache, on a device
    assert found["weights"] < weights
    # A pass, of three, of two layers: the sums behind 6 products of attentions and 2 of
    # feed-forwards, and those of the norms of 9 queries and keys over all heads; embeddings of the
    # noise level, some of them combined. No weights are sent, no keys, and no values.
    messages = found["messages"]
    assert messages.pop("all-reduce") <= 3 * 2 * (6 + 2 + 9)
    assert messages.pop("all-gather") <= 3 * 6
    assert messages.pop("collective-permute") <= 24  # positions
    assert not messages


def test_a_stream_over_a_mesh_is_that_of_one_device(random_checkpoint):
    found = streamed(random_checkpoint("2.0"), "plain", "none", "4")
    check(found["4"], 4, 0.27)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("how", ["steered", "by_heads"])
def test_a_steered_stream_over_a_mesh(random_checkpoint, how, quantize, version):
    """Its cache is written anew, and it is taken up from a snapshot."""
    found = streamed(random_checkpoint(version), how, quantize, "2", "4")
    check(found["2"], 2, 0.6)
    # biases and what is no kernel are whole on each device: of 8-bit weights a larger share
    check(found["4"], 4, 0.34 if (quantize, version) == ("int8", "2.3") else 0.32)


def test_what_cannot_be_split(random_checkpoint, random_pipeline, tmp_path, capsys):
    config = random_pipeline("2.0").config
    check_split(config, {"tensor": 4}, "fp8")
    for mesh, quantize, message in (
        (
            {"tensor": 3},
            "none",
            "tensor=3 does not divide the 4 heads of the video stream; 1, 2, 4",
        ),
        ({"data": 2, "tensor": 2}, "none", "over tensor alone, not over data"),
        ({"tensor": 2}, "w8a8-int8", "over a mesh use int8 or fp8"),
    ):
        with pytest.raises(ValueError, match=message):
            check_split(config, mesh, quantize)
    mesh = make_mesh()
    with pytest.raises(ValueError, match="leave per_layer"):
        load_pipeline(random_checkpoint("2.0"), dtype=jnp.float32, mesh=mesh, per_layer=False)

    size = ["--prompt", "x", "--random-features", "--height", "64", "--width", "64"]
    output = ["--bidirectional", "--output", str(tmp_path / "clip.mp4")]
    checkpoint = ["--checkpoint", str(random_checkpoint("2.0"))]
    for words, message in (
        (["--mesh", "tensor=2"], "--mesh tensor=2: there are 1 devices"),
        (["--mesh", "heads=2"], "'heads=2' must be AXIS=SIZE, with an axis of data, fsdp"),
        (["--mesh", "fsdp=2"], "a stream is split over tensor alone, not over fsdp"),
    ):
        assert stream.main([*checkpoint, *size, *output, *words]) == 2
        assert message in capsys.readouterr().err
    assert serve.parse_arguments([*checkpoint, "--text-encoder", "x"]).mesh == "1"
    assert not list(tmp_path.iterdir())
