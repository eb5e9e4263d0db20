"""Optimizer, schedules, weight decay, parameter groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.training import parameter_groups
from omniforcing_jax.training.optimizers import (
    EMAConfig,
    OptimizerConfig,
    learning_rate_at,
    make_optimizer,
)
from tests.tiny_model import LTX23_CHANGES, abstract_params
from tests.training.toy_stage import toy_params


def steps(config: OptimizerConfig, params: dict, grads: list) -> tuple[list, tuple]:
    """Parameters after each update, and the last state."""
    optimizer = make_optimizer(config)
    state, trace = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        trace.append(params)
    return trace, state


def update_counts(state) -> set[int]:
    """Values of all counters in an optimizer's state."""
    return {int(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 0}


def random_grads(params: dict, count: int, scale: float = 1.0) -> list:
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(scale * rng.standard_normal(p.shape), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, params) for _ in range(count)]


def leaf(params: dict, path: str):
    for name in path.split("/"):
        params = params[name]
    return np.asarray(params)


def test_equals_torch_adamw_with_clipping():
    params = toy_params()
    config = OptimizerConfig(1e-3, 0.8, 0.95, 1e-6, weight_decay=0.1, clip_norm=0.5)
    grads = random_grads(params, 4)
    trace, state = steps(config, params, grads)
    assert update_counts(state) == {4}

    flat = jax.tree_util.tree_leaves_with_path(params)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for _, x in flat]
    decays = [path[-1].key == "kernel" for path, _ in flat]
    groups = [
        {
            "params": [t for t, d in zip(tensors, decays, strict=True) if d == decay],
            "weight_decay": value,
        }
        for decay, value in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), eps=1e-6)
    for grad in grads:
        for tensor, g in zip(tensors, jax.tree.leaves(grad), strict=True):
            tensor.grad = torch.tensor(np.asarray(g))
        torch.nn.utils.clip_grad_norm_(tensors, 0.5)
        optimizer.step()
    for tensor, ours in zip(tensors, jax.tree.leaves(trace[-1]), strict=True):
        np.testing.assert_allclose(np.asarray(ours), tensor.detach().numpy(), atol=2e-7)


def test_only_kernels_decay():
    params = toy_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    (after,), _ = steps(OptimizerConfig(1e-2, weight_decay=0.5), params, [zeros])
    for path, new in jax.tree_util.tree_leaves_with_path(after):
        old = leaf(params, "/".join(key.key for key in path))
        factor = 1 - 1e-2 * 0.5 if path[-1].key == "kernel" else 1.0
        np.testing.assert_allclose(np.asarray(new), old * factor, rtol=1e-6)


def test_audio_learning_rate_scale_and_audio_only_training():
    params = toy_params()
    grads = random_grads(params, 1)
    (plain,), _ = steps(OptimizerConfig(1e-3, clip_norm=None), params, grads)
    scaled_config = OptimizerConfig(1e-3, clip_norm=None, audio_learning_rate_scale=0.25)
    (scaled,), _ = steps(scaled_config, params, grads)
    (audio,), state = steps(OptimizerConfig(1e-3, clip_norm=None, train="audio"), params, grads)
    assert update_counts(state) == {1}
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    trained = 0
    for path, old in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        step = leaf(plain, name) - np.asarray(old)
        is_audio = name.startswith(("audio_sinks", "blocks/audio_ff", "blocks/v2a_attn"))
        trained += 2 * is_audio
        expected = step * (0.25 if is_audio else 1.0)
        np.testing.assert_allclose(leaf(scaled, name) - np.asarray(old), expected, atol=2e-7)
        expected = step if is_audio else 0 * step
        np.testing.assert_allclose(leaf(audio, name) - np.asarray(old), expected, atol=1e-9)
    assert len(moments) == trained, "frozen parameters must have no moments"


def test_schedules():
    def rates(**settings):
        config = OptimizerConfig(2e-5, warmup_steps=4, **settings)
        return [float(learning_rate_at(config, count)) / 2e-5 for count in range(16)]

    warmup = [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(rates(), warmup + [1.0] * 12, rtol=1e-6)
    linear = rates(schedule="linear", decay_steps=10, end_scale=0.1)
    np.testing.assert_allclose(linear[4:], [*np.linspace(1, 0.1, 11), 0.1], rtol=1e-5)
    cosine = rates(schedule="cosine", decay_steps=10)
    np.testing.assert_allclose(cosine[9], 0.5, rtol=1e-5)
    np.testing.assert_allclose(cosine[14:], 0, atol=1e-6)
    assert (np.diff(cosine[4:15]) < 0).all()
    unwarmed = OptimizerConfig(1.0)
    assert float(learning_rate_at(unwarmed, 0)) == 1.0


def test_schedule_is_the_optimizers():
    """Adam's first updates are sign(g): their sizes are the learning rates."""
    params = {"audio_sinks": jnp.zeros((3, 2), jnp.float32)}
    config = OptimizerConfig(1e-2, warmup_steps=3, clip_norm=None)
    trace, _ = steps(config, params, [jax.tree.map(jnp.ones_like, params)] * 4)
    values = [0.0, *(float(p["audio_sinks"][0, 0]) for p in trace)]
    expected = [-float(learning_rate_at(config, count)) for count in range(4)]
    np.testing.assert_allclose(np.diff(values), expected, rtol=1e-4)


def test_config_problems_are_reported_together():
    with pytest.raises(ValueError, match=r"learning_rate.*schedule must be one of constant.*train"):
        OptimizerConfig(learning_rate=0.0, schedule="step", decay_steps=2, train="video")
    with pytest.raises(ValueError, match="decay_steps must be positive with schedule 'cosine'"):
        OptimizerConfig(1e-4, schedule="cosine")
    with pytest.raises(ValueError, match="decay must be in"):
        EMAConfig(decay=1.0)
    with pytest.raises(ValueError, match="start_step"):
        EMAConfig(start_step=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_audio_sinks": 4, "extra_qk_norm": True, "tanh_gated_attention": True},
        LTX23_CHANGES
        | {"keyframe_embedding": True, "video_context_dim": 32, "audio_context_dim": 16},
    ],
)
def test_every_parameter_of_the_transformer_has_a_group(changes):
    groups = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(tiny(**changes))):
        names = parameter_groups.path_names(path)
        groups.setdefault(parameter_groups.group_of(path), set()).add("/".join(names[:2]))
    expected = set(parameter_groups.GROUPS)
    if "num_audio_sinks" not in changes:
        expected -= {"sinks"}
    assert set(groups) == expected
    with pytest.raises(ValueError, match="blocks/lora/kernel belongs to no group"):
        parameter_groups.group_of(("blocks", "lora", "kernel"))
