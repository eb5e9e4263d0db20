"""What a program reads and writes, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from omniforcing_jax.scaling import traffic

# A loop of three: keys that are rotated join others that are not, an update in place, a product.
PROGRAM = """HloModule jit_step

%fused_concatenate (p.0: bf16[2,8], p.1: bf16[6,8]) -> bf16[8,8] {
  %p.0 = bf16[2,8]{1,0} parameter(0)
  %p.1 = bf16[6,8]{1,0} parameter(1)
  %twice = bf16[2,8]{1,0} add(%p.0, %p.0)
  ROOT %joined = bf16[8,8]{1,0} concatenate(%twice, %p.1), dimensions={0}
}

%fused_update (p.2: bf16[64,8], p.3: bf16[4,8], p.4: s32[]) -> bf16[64,8] {
  %p.2 = bf16[64,8]{1,0} parameter(0)
  %p.3 = bf16[4,8]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  %half = bf16[2,8]{1,0} slice(%p.3), slice={[0:2], [0:8]}
  ROOT %put = bf16[64,8]{1,0} dynamic-update-slice(%p.2, %half, %p.4, %p.4)
}

%cond (c: (s32[], bf16[64,8])) -> pred[] {
  %c = (s32[], bf16[64,8]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%body (b: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %b = (s32[], bf16[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %ring = bf16[64,8]{1,0} get-tuple-element(%b), index=1
  %x = bf16[8,8]{1,0} custom-call(%ring), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/while/body/layers_1/layers_1._ff/up/dot"}
  %y = bf16[2,8]{1,0} slice(%x), slice={[0:2], [0:8]}
  %z = bf16[6,8]{1,0} slice(%x), slice={[2:8], [0:8]}
  %keys = bf16[8,8]{1,0} fusion(%y, %z), kind=kInput, calls=%fused_concatenate, metadata={op_name="jit(step)/while/body/layers_1/heads/concatenate"}
  %new = bf16[64,8]{1,0} fusion(%ring, %keys, %i), kind=kLoop, calls=%fused_update
  ROOT %t = (s32[], bf16[64,8]) tuple(%i, %new)
}

ENTRY %main (a: bf16[64,8]) -> f32[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %loop = (s32[], bf16[64,8]) while(%a), condition=%cond, body=%body
  %out = bf16[64,8]{1,0} get-tuple-element(%loop), index=1
  %near = bf16[64,8]{1,0:T(8,128)S(1)} copy(%out)
  %half = ((bf16[64,8]{1,0}), bf16[32,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:32], [0:8]}
  %whole = (bf16[64,8]{1,0:T(8,128)S(1)}, bf16[64,8]{1,0}, u32[]{:S(2)}) copy-start(%a)
  ROOT %wide = f32[64,8]{1,0} convert(%near)
}
"""  # noqa: E501


def test_a_program_by_hand():
    kernels = traffic.read(PROGRAM)
    totals = traffic.totals(kernels)
    row = 8 * 2  # bytes
    ahead = (32 + 64) * row  # into the vector memory of a TPU
    assert totals["products"] == (3 * 64 * row + ahead, 3 * 8 * row)
    assert totals["slice"] == (3 * 8 * row, 3 * 8 * row)
    assert totals["concatenate"] == (3 * 6 * row, 3 * 6 * row)  # without the rows that were added
    assert totals["arithmetic"] == (3 * 2 * row, 3 * 2 * row)
    assert totals["update"][1] == 3 * 2 * row  # not the whole ring
    assert totals["copy"][1] == 0  # into vector memory as well
    assert totals["convert"][1] == 64 * 8 * 4
    moves = [totals[kind][1] for kind in traffic.MOVES]
    assert totals["moves"][1] == sum(moves)
    assert ("concatenate", "heads", 3.0 * 6 * row) in traffic.largest(kernels)


def test_a_compiled_loop_over_stacked_weights():
    """Each turn copies its layer's weights out of the stack, which is what a sampler must not."""
    layers, rows, width = 5, 64, 32

    def layer(i, carry):
        stack, x = carry
        with jax.named_scope("weights"):
            w = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        return stack, jnp.cos(x @ w) + x

    def run(stack, x):
        return jax.lax.fori_loop(0, layers, layer, (stack, x))[1]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((layers, width, width), (rows, width)))
    kernels = traffic.read(jax.jit(run).lower(*shapes).compile().as_text())
    assert ("slice", "weights", layers * width**2 * 4.0) in traffic.largest(kernels)
    products = [k for k in kernels if k.group == "products"]
    assert sum(k.written * k.count for k in products) == pytest.approx(layers * rows * width * 4)
