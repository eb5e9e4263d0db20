"""Reading a compiled program's messages, and what the model sends on a mesh."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest

from omniforcing_jax.scaling import collectives

LOOP = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(48)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%open_cond (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] get-tuple-element(%q), index=1
  ROOT %on = pred[] compare(%j, %end), direction=LT
}

%body (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[], bf16[4,8]) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%p.1), index=1
  %gathered = bf16[16,8]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="layer/all_gather"}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %w)
}

%open_body (q.1: (s32[], s32[])) -> (s32[], s32[]) {
  %q.1 = (s32[], s32[]) parameter(0)
  %inner = (s32[], bf16[4,8]) while(%init), condition=%cond, body=%body
  ROOT %u = (s32[], s32[]) tuple(%j, %end)
}

ENTRY %main (x: bf16[4,8]) -> f32[8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], s32[]) while(%start), condition=%open_cond, body=%open_body
  %sum.1 = f32[8]{0} all-reduce(%y), replica_groups={{0,2},{1,3}}, to_apply=%add
  %part = f32[2]{0} reduce-scatter(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %sent = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,4}}
  %both = ((bf16[2,8], bf16[2,4]), (bf16[8,8], bf16[8,4])) all-gather-start(%m, %n), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="combined"}
  %one = (f32[8], f32[2]) reduce-scatter-start(%y), replica_groups={{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %out = f32[8]{0} copy(%sum.1)
}
"""  # noqa: E501


def test_messages_are_counted_with_their_loops():
    messages = collectives.read(LOOP, open_loops=2.5)
    (combined,) = [m for m in messages if m.name == "combined"]
    assert combined.bytes == (8 * 8 + 8 * 4) * 2 * 3 / 4
    (started,) = [m for m in messages if m.group == (4, 5, 6, 7)]
    assert (started.kind, started.bytes) == ("reduce-scatter", 8 * 3)
    found = {m.kind: m for m in messages if m not in (combined, started)}
    gather = found["all-gather"]
    assert gather.count == 48 * 2.5
    assert gather.bytes == 16 * 8 * 2 * 3 / 4
    assert gather.group == (0, 1, 2, 3)
    assert (gather.shape, gather.name) == ("bf16[16,8]", "layer/all_gather")
    assert found["all-reduce"].bytes == 2 * 32 / 2  # there and back, half of it is here already
    assert found["all-reduce"].group == (0, 2)
    assert found["reduce-scatter"].bytes == 8 * 3  # three of four parts come from elsewhere
    assert found["reduce-scatter"].group == (0, 1, 2, 3)
    assert (found["collective-permute"].bytes, found["collective-permute"].count) == (32, 1)
    assert found["collective-permute"].group == (0, 1, 2, 3)
    total = collectives.total_bytes(list(found.values()))
    assert total["all-gather"] == gather.bytes * 120


@functools.cache
def program(*axes: str) -> dict:
    """What tests/scaling/sharded_program.py prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.scaling.sharded_program", *axes],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "axes",
    [
        ("fsdp=4", "sequence=2"),
        pytest.param(("fsdp=2", "sequence=2", "tensor=2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_the_model_sends(axes):
    """Weights layer by layer, once per pass; activations are exchanged, never gathered."""
    found = program(*axes)
    layers = found["layers"]
    ways = math.prod(int(a.split("=")[1]) for a in axes if not a.startswith("tensor"))
    tensor = math.prod(int(a.split("=")[1]) for a in axes if a.startswith("tensor"))
    messages = [dict(zip(("kind", "shape", "bytes", "group", "count", "name"), m, strict=True))
                for m in found["messages"]]  # fmt: skip
    of = lambda kind: [m for m in messages if m["kind"] == kind]  # noqa: E731
    layer_shapes = {tuple(s[1:]) for n, s in found["weights"].items() if n.startswith("blocks/")}
    outside = {tuple(s) for n, s in found["weights"].items() if not n.startswith("blocks/")}
    largest = max(math.prod(s) for s in layer_shapes | outside) * 4

    # no stack of weights, and nothing but weights and a few scalars per token, is gathered
    for m in of("all-gather"):
        by_hand = "shard_map/all_gather" in m["name"]
        assert m["bytes"] <= largest if by_hand else m["bytes"] < 0.1 * largest, m
    # once in the forward pass, and once for the backward pass
    gathered = sum(m["bytes"] * m["count"] for m in of("all-gather"))
    ideal = 2 * found["split"] / tensor * (ways - 1) / ways
    assert 0.8 * ideal < gathered < 1.25 * ideal
    # gradients are scattered while they are reduced
    scattered = sum(m["bytes"] * m["count"] for m in of("reduce-scatter"))
    assert scattered == pytest.approx(ideal / 2, rel=0.15)
    in_layers = [m for m in of("reduce-scatter") if m["count"] == layers]
    assert len(in_layers) > 20
    # the sequence's tokens are exchanged for heads
    assert sum(m["count"] for m in of("all-to-all")) >= 4 * layers
    reduced = sum(m["bytes"] * m["count"] for m in of("all-reduce"))
    if tensor == 1:  # what is left: biases, tables, norms
        assert reduced < 0.1 * ideal
