"""Meshes on eight CPU devices, in a process of their own: the backend's size is fixed at start."""

import subprocess
import sys
import textwrap

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.sampling import student
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params
from tests.tiny_model import random_params

config = tiny(num_audio_sinks=4)
model = Transformer(config)
settings = student.RolloutConfig(
    CacheConfig(BlockLayout.prefix(), window=1), (1.0, 0.5, 0.0), 1, 2)
contexts = [jax.random.normal(jax.random.key(i), (4, 3, 12)) for i in range(2)]
rope = settings.rope(model)

def clip(params, contexts):
    text = student.prompt_kv(model, params, *contexts, settings.sigma_levels)
    return student.rollout(
        model, params, text, rope, jax.random.key(7), config=settings, num_blocks=3, batch=4)

params = random_params(config)
clip = jax.jit(clip)
expected = clip(params, contexts)
boxed = jax.eval_shape(lambda k: init_boxed_params(model, k), jax.random.key(0))
mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
placed = jax.device_put(params, partitioning.shardings(boxed, mesh))
q = placed["blocks"]["video_attn"]["q"]["kernel"].sharding.spec
assert q == jax.sharding.PartitionSpec(None, ("fsdp", "sequence"), "tensor"), q
with jax.set_mesh(mesh):
    actual = clip(placed, contexts)
for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)
try:
    partitioning.make_mesh(data=3)
except ValueError as error:
    assert "needs 3 devices, there are 8" in str(error)
else:
    raise AssertionError("a mesh of 3 over 8 devices was accepted")
print("ok")
"""


def test_sharded_rollout_equals_unsharded():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")


RESTORE = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params
from omniforcing_jax.pipeline import PipelineConfig

folder = sys.argv[1]
model = Transformer(PipelineConfig.from_checkpoint(folder).transformer)
boxed = jax.eval_shape(lambda k: init_boxed_params(model, k), jax.random.key(0))
mesh = partitioning.make_mesh(fsdp=4, tensor=2)
places = partitioning.shardings(boxed, mesh)
sharded = checkpoints.load_params(folder, "transformer", dtype=jnp.float32, sharding=places)
whole = checkpoints.load_params(folder, "transformer", dtype=jnp.float32)
kernel = sharded["blocks"]["video_ff"]["up"]["kernel"]
layers, width, hidden = kernel.shape
assert kernel.addressable_shards[0].data.shape == (layers, width // 4, hidden // 2)
for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("ok")
"""


def test_converted_checkpoint_restores_onto_a_mesh(random_checkpoint):
    result = subprocess.run(
        [sys.executable, "-c", RESTORE, str(random_checkpoint("2.0"))],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")


PRODUCT = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from omniforcing_jax.distributed.partitioning import BATCH_AXES, WeightRules, make_mesh, product

rng = np.random.default_rng(0)
x, kernel = rng.standard_normal((16, 32)), rng.standard_normal((32, 8))
mesh = make_mesh(fsdp=4, data=2)
x = jax.device_put(jnp.asarray(x, jnp.bfloat16), NamedSharding(mesh, P(BATCH_AXES)))
kernel = jax.device_put(jnp.asarray(kernel, jnp.bfloat16), NamedSharding(mesh, P(("fsdp",))))
call = jax.jit(lambda x, kernel, rules: product(x, kernel, ("embed", "mlp"), rules),
               static_argnums=2)

def residuals(rules):
    _, pullback = jax.vjp(lambda kernel: call(x, kernel, rules), kernel)
    return [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == kernel.shape]

def gradient(rules):
    def loss(kernel):
        return jnp.sum(call(x, kernel, rules).astype(jnp.float32) ** 2)
    step = jax.jit(jax.grad(loss))
    return step(kernel), step.lower(kernel).as_text()

with jax.set_mesh(mesh):
    # without rematerialisation no weight is held whole for the backward pass
    assert residuals(WeightRules()) and all(
        not leaf.sharding.is_fully_replicated for leaf in residuals(WeightRules()))
    assert any(leaf.sharding.is_fully_replicated
               for leaf in residuals(WeightRules(keep_gathered=True)))
    grads = {}
    for dtype, name in ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
        for keep in (False, True):
            grad, text = gradient(WeightRules(keep_gathered=keep, reduce_dtype=dtype))
            assert grad.dtype == jnp.bfloat16
            at = text.index("stablehlo.reduce_scatter")
            kind = text[at:].split("-> tensor<")[1].split(">")[0]
            assert kind.endswith(f"x{name}"), (kind, name)
            grads[name, keep] = np.asarray(grad, np.float32)
    np.testing.assert_array_equal(grads["f32", True], grads["f32", False])
    whole = np.asarray(x, np.float32), np.asarray(kernel, np.float32)
    y = np.asarray(call(x, kernel, WeightRules()), np.float32)
    exact = whole[0].T @ (2 * y)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    # one rounding, at the end: all but a few sums that lie between two numbers are the same
    assert np.mean(grads["f32", True] == rounded) > 0.95

    # rules are part of what is compiled: nothing is gathered where weights are whole
    texts = [call.lower(x, kernel, WeightRules(gathered=whole)).as_text() for whole in (0, 1)]
    assert ["all_gather" in text for text in texts] == [True, False]
print("ok")
"""


def test_weights_are_gathered_and_gradients_added_up_as_the_rules_say():
    result = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")
