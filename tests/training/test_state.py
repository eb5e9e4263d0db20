"""Updates of a network, microbatches, compute copies; the mesh part runs in its own process."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniforcing_jax.training.objectives.common import accumulate
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import (
    Network,
    cast_params,
    create_network,
    create_state,
    update_network,
)
from tests.training.toy_stage import ToyBatches, toy_loss, toy_params

OPTIMIZER = make_optimizer(OptimizerConfig(1e-2, clip_norm=None))
EMA = EMAConfig(decay=0.75, start_step=2)


@jax.jit
def update(network, grads, step, loss=None):
    return update_network(network, grads, OPTIMIZER, EMA, step, loss=loss)


def ones_like(params):
    return jax.tree.map(jnp.ones_like, params)


def test_metrics_say_what_they_mean():
    params = toy_params()
    grads = jax.tree.map(lambda p: 2 * jnp.ones_like(p), params)
    network, metrics = update(create_network(params, OPTIMIZER, ema=False), grads, 0)
    sizes = {"video_self_attn": 84, "audio_ff": 72, "v2a_attn": 12, "sinks": 12, "heads": 36}
    expected = {f"grad_norm/{group}": 2 * np.sqrt(n) for group, n in sizes.items()}
    expected["grad_norm"] = 2 * np.sqrt(sum(sizes.values()))
    expected["grad_norm/audio"] = 2 * np.sqrt(72 + 12 + 12)
    old, new = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
                for t in (params, network.params))  # fmt: skip
    expected["param_norm"] = np.linalg.norm(old)
    expected["relative_update"] = np.linalg.norm(new - old) / np.linalg.norm(old)
    expected["update_skipped"] = 0
    audio = metrics.pop("relative_update/audio")
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()
        np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(  # scales near 1 dominate the audio's norm
        float(audio), 1e-2 * np.sqrt(96) / np.linalg.norm(old[np.abs(old) > 0.5]), rtol=0.01
    )


def test_average_starts_at_its_step():
    network = create_network(toy_params(), OPTIMIZER, ema=True)
    trace = []
    for step in range(5):
        network, _ = update(network, ones_like(network.params), step)
        trace.append((network.params["audio_sinks"], network.ema["audio_sinks"]))
    average = trace[1][0]
    for step, (value, ema) in enumerate(trace):
        if step < 2:
            np.testing.assert_array_equal(ema, value)
        else:
            average = 0.75 * average + 0.25 * value
            np.testing.assert_allclose(ema, average, rtol=1e-6)
    with pytest.raises(ValueError, match="EMAConfig must be given"):
        update_network(network, network.params, OPTIMIZER, None, jnp.int32(0))


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    network, _ = update(create_network(toy_params(), OPTIMIZER, ema=True), toy_params(1), 5)
    grads, loss = toy_params(2), jnp.float32(1.0)
    if bad == "gradient":
        grads["audio_sinks"] = grads["audio_sinks"].at[1, 2].set(jnp.inf)
    else:
        loss = jnp.float32(jnp.nan)
    after, metrics = update(network, grads, 6, loss)
    jax.tree.map(np.testing.assert_array_equal, after, network)
    assert float(metrics["update_skipped"]) == 1 and float(metrics["relative_update"]) == 0
    if bad == "gradient":
        assert not np.isfinite(metrics["grad_norm/sinks"])
        assert np.isfinite(metrics["grad_norm/audio_ff"])


def test_float32_masters_move_where_bfloat16_ones_stand_still():
    """The public code's defect: at a learning rate of 2e-5 every update rounds away."""
    optimizer = make_optimizer(OptimizerConfig(2e-5))
    params = {"audio_sinks": 0.02 + 0.01 * jax.random.uniform(jax.random.key(0), (16, 64))}
    grads = {"audio_sinks": jax.random.normal(jax.random.key(1), (16, 64))}
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        masters = jax.tree.map(lambda p, d=dtype: p.astype(d), params)
        network = Network(masters, optimizer.init(masters), None)
        for _ in range(10):
            network, metrics = update_network(network, grads, optimizer, None, jnp.int32(0))
        change = network.params["audio_sinks"] - masters["audio_sinks"]
        moved[dtype.dtype.name] = float(jnp.abs(change.astype(jnp.float32)).mean())
        assert (float(metrics["relative_update"]) == 0) == (dtype == jnp.bfloat16)
    np.testing.assert_allclose(moved["float32"], 10 * 2e-5, rtol=0.01)
    assert moved["bfloat16"] == 0
    with pytest.raises(ValueError, match=r"\['audio_sinks'\] is bfloat16.*dtype=jnp.float32"):
        create_network(masters, optimizer, ema=False)


def test_microbatches_equal_the_large_batch():
    params, batch = toy_params(), next(ToyBatches(batch=8))
    expected = jax.grad(toy_loss, has_aux=True)(params, batch)[0]
    gradient = lambda rows: (jax.grad(toy_loss, has_aux=True)(params, rows)[0], rows["x"])  # noqa: E731
    grads, x = jax.jit(lambda batch: accumulate(gradient, batch, 2))(batch)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(x, batch["x"])


def test_cast_params_needs_shardings_to_gather():
    cast = cast_params(toy_params(), jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(cast)} == {"bfloat16"}
    with pytest.raises(ValueError, match="needs the shardings"):
        cast_params(toy_params(), jnp.bfloat16, gather=True)


def test_created_inside_jit_equals_created_outside():
    params = toy_params()
    outside = create_state(create_network(params, OPTIMIZER, ema=True))
    inside = jax.jit(lambda p: create_network(p, OPTIMIZER, ema=True))(params)
    jax.tree.map(np.testing.assert_array_equal, inside, outside.generator)
    assert not optax.tree.norm(inside.opt_state[0].mu)


MESH = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.training.optimizers import *
from omniforcing_jax.training.objectives.common import accumulate
from omniforcing_jax.training.state import *

mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
rng = np.random.default_rng(0)
tree = lambda: {"blocks": {"video_attn": {"q": {"kernel": rng.standard_normal((2, 8, 8), "f")}},
                           "audio_ff": {"up": {"kernel": rng.standard_normal((2, 8, 8), "f")}}}}
shardings = tree()
# as in the model: one matrix widens over `tensor`, the next one comes back
wide = NamedSharding(mesh, P(None, "fsdp", "tensor"))
back = NamedSharding(mesh, P(None, "tensor", "fsdp"))
shardings["blocks"]["video_attn"]["q"]["kernel"] = wide
shardings["blocks"]["audio_ff"]["up"]["kernel"] = back
plain, batch = tree(), rng.standard_normal((32, 8), "f")
params = jax.device_put(plain, shardings)
placed = jax.device_put(batch, NamedSharding(mesh, P(partitioning.BATCH_AXES)))

def loss(params, x, **cast):
    if cast:
        params = cast_params(params, jnp.float32, **cast)
    b = params["blocks"]
    for layer in range(2):
        x = jnp.tanh(x @ b["video_attn"]["q"]["kernel"][layer])
        x = x @ b["audio_ff"]["up"]["kernel"][layer]
    return jnp.mean(x ** 2)

expected = jax.grad(loss)(plain, batch)
with jax.set_mesh(mesh):
    for cast in (dict(shardings=shardings), dict(shardings=shardings, gather=True)):
        step = jax.jit(lambda p, b: accumulate(
            lambda rows: (jax.grad(loss)(p, rows, **cast), rows), b, 4, shardings))
        grads, rows = step(params, placed)
        np.testing.assert_array_equal(np.asarray(rows), batch)
        assert state_shardings(grads) == shardings, state_shardings(grads)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-6)
    gather = jax.jit(lambda p: cast_params(p, jnp.bfloat16, shardings=shardings, gather=True))
    blocks = gather(params)["blocks"]
    for leaf, spec in ((blocks["video_attn"]["q"], P(None, None, "tensor")),
                       (blocks["audio_ff"]["up"], P(None, "tensor"))):
        assert leaf["kernel"].dtype == jnp.bfloat16
        assert leaf["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)

    # each device already has its rows of every microbatch
    rows = jax.jit(lambda x: accumulate(lambda rows: (jnp.sum(rows), rows), x, 4)[1])
    program = rows.lower(placed).compile().as_text()
    for word in ("all-to-all", "all-gather", "collective-permute"):
        assert word not in program, word

for train in ("all", "audio"):
    optimizer = make_optimizer(OptimizerConfig(1e-3, train=train))
    state = create_state(create_network(params, optimizer, ema=True))
    abstract = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), plain, shardings)
    template = create_state(create_network(abstract, optimizer, ema=True))
    assert state_shardings(state) == state_shardings(template)
    moments = [x for x in jax.tree.leaves(state.generator.opt_state) if x.ndim]
    assert [x.sharding for x in moments] == {"all": [back, wide] * 2, "audio": [back] * 2}[train]
    assert state.step.sharding == NamedSharding(mesh, P())
print("ok")
"""


def test_shardings_on_a_mesh():
    result = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")
