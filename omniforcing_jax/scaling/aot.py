"""Programs compiled ahead of time: which there are, and what their compiled form says.

`launch.aot` is the command line. The programs are the ones that run: the jitted steps of the
stages, and the block step that the sampler and the live session call.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from checkpoint_converters import synthetic
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow, kv_cache
from omniforcing_jax.sampling import student as rollout
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.scaling import collectives, cost, dry_run, flops
from omniforcing_jax.scaling.cost import Work
from omniforcing_jax.scaling.devices import Target, axis_speed
from omniforcing_jax.training import assembly
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.objectives.split_dmd import SplitDMD, SplitFrozen, split_meshes
from omniforcing_jax.training.state import state_shardings

PROGRAMS = ("stage1", "stage2", "stage3", "stream")
# With it the compiler takes half to a quarter of the time; where both were tried, peaks differed by
# less than 1 % (docs/scaling.md).
QUICK = {"exec_time_optimization_effort": -1.0}
# libtpu 0.0.42 aborts when it moves an all-reduce to v7x's SparseCores (a failed check of
# offload_collective_strategies, "std::abs(inc) < core_count()").
V7X = {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": False}
# Where no GPU is there to try tiles out on, XLA takes Triton's default ones for fused products, and
# fails for those of audio tokens split by heads ("couldn't find output tile sizes").
GPU = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Programs:
    """What one case compiles.

    Attributes:
      mesh: over the target's devices.
      lowered: {part: makes the lowered program}.
      work: {part: what it asks of all devices}.
      share: {part: how often it runs per step}.
      open_loops: {part: iterations of loops that the data ends}.
      weights_bytes: of a network, as a device reads it in one pass.
      state_bytes: read or written by an update, on a device.
      compiled: parts that are compiled; later ones take what these give.
    """

    target: Target
    mesh: jax.sharding.Mesh
    lowered: dict[str, Callable[[], Any]]
    work: dict[str, Work]
    share: dict[str, float]
    open_loops: dict[str, float]
    weights_bytes: float
    state_bytes: float
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Devices per axis."""
        return dict(self.mesh.shape)


def stage_programs(
    target: Target,
    stage: str,
    mesh_shape: Mapping[str, int],
    *,
    variant: str = "19b",
    size: str = "full",
    layers: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Programs:
    """The steps of a training stage.

    Raises:
      ConfigError: the mesh or a setting is wrong.
      ValueError: a setting that there is not.
    """
    c = stage_config(stage, mesh_shape, variant, changes or {})
    e = dry_run.make_experiment(c, len(target.devices), size=size, layers=layers)
    if c.compute.separate_scores:
        return _split_programs(target, e)
    mesh = partitioning.make_mesh(**e.mesh_shape, devices=target.devices)
    with jax.set_mesh(mesh):
        state = assembly.abstract_state(e, mesh)
        frozen, batch = assembly.abstract_frozen(e, mesh), assembly.abstract_batch(e, mesh)
    module = experiment.make_stage(e, state_shardings(state))
    work = cost.updates(e)
    if stage == "stage2":
        parts = {"step": (module.noisy_step, "generator", 1.0)}
    else:
        parts = {
            "generator_step": (module.generator_step, "generator", 1 / c.critic_updates),
            "critic_step": (module.critic_step, "critic", 1.0),
        }

    def lower(step):
        with jax.set_mesh(mesh):
            return step.lower(state, frozen, batch, jax.ShapeDtypeStruct((), jnp.uint32))

    params = sum(x.size for x in jax.tree.leaves(state.generator.params))
    held = _held_bytes(state.generator)
    return Programs(
        target,
        mesh,
        {name: functools.partial(lower, step) for name, (step, _, _) in parts.items()},
        {name: work[network] for name, (_, network, _) in parts.items()},
        {name: share for name, (_, _, share) in parts.items()},
        dict.fromkeys(parts, _steps_to_exit(e)),
        2 * params / e.mesh_shape["tensor"],
        2 * held,
    )


def _split_programs(target: Target, e: experiment.Experiment) -> Programs:
    """The programs of a step whose score networks have devices of their own, in their order.

    There is no roofline: halves of the devices work side by side, and wait for each other.
    """
    meshes = student, scores = split_meshes(e.mesh_shape, list(target.devices))
    frozen, batches = [], []
    for mesh in meshes:
        with jax.set_mesh(mesh):
            frozen.append(assembly.abstract_frozen(e, mesh))
            batches.append(assembly.abstract_batch(e, mesh))
    with jax.set_mesh(student):
        state = assembly.abstract_state(e, student, scores)
    module = experiment.make_stage(e, state_shardings(state))
    stage = SplitDMD(module, student, scores)
    held = frozen[0].replace(teacher=None), frozen[1]
    compiled: dict[str, Any] = {}
    lowered = {
        name: functools.partial(lower, compiled)
        for name, lower in stage.lowered(state, SplitFrozen(*held), *batches).items()
    }
    loops = dict.fromkeys(lowered, _steps_to_exit(e))
    return Programs(target, student, lowered, {}, {}, loops, 0.0, 0.0, compiled)


def _steps_to_exit(e: experiment.Experiment) -> float:
    """Of the loops that end at a drawn step: the average, or stage I's last sample's."""
    steps = len(e.sigmas) - 1
    return steps - 1.0 if e.config.stage == "stage1" else (steps + 1) / 2


def stage_config(
    stage: str, mesh_shape: Mapping[str, int], variant: str, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A stage's config with a mesh and other settings.

    Raises:
      ValueError: a setting that there is not.
    """
    c = importlib.import_module(f"configs.{stage}").get_config(variant)
    c.mesh.update({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | dict(mesh_shape))
    try:
        c.update_from_flattened_dict(dict(changes))
    except (KeyError, TypeError) as error:
        raise ValueError(f"settings {dict(changes)}: {error}") from error
    return c


def stream_programs(
    target: Target,
    mesh_shape: Mapping[str, int],
    *,
    size: str = "full",
    version: str = "2.0",
    layers: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Programs:
    """The sampler's block step in its steady state, window full, bfloat16, one stream.

    Args:
      changes: height, width, window, layout, text_tokens.

    Raises:
      ValueError: another setting, or a mesh that does not fit the devices.
    """
    settings = {"height": 512, "width": 768, "window": 7, "layout": "prefix", "text_tokens": 1024}
    unknown = sorted(set(changes or {}) - set(settings))
    if unknown:
        raise ValueError(f"the sampler has no setting {', '.join(unknown)}; it has {settings}")
    s = ml_collections.ConfigDict(settings | dict(changes or {}))
    config = PipelineConfig.from_metadata(
        synthetic.metadata(size, version, layers), synthetic.VERSIONS[version]
    )
    rollout_config = RolloutConfig(
        cache=CacheConfig(config.layout(s.layout), s.window),
        sigmas=tuple(float(x) for x in flow.student_sigmas()),
        **dict(zip(("height", "width"), config.check_size(s.height, s.width))),
    )
    shape = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | dict(mesh_shape)
    shape = {k: len(target.devices) if v == -1 else v for k, v in shape.items()}
    mesh = partitioning.make_mesh(**shape, devices=target.devices)
    model = Transformer(config.transformer, jnp.bfloat16)
    boxed = jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))
    params = _abstract(nn.unbox(boxed), partitioning.shardings(boxed, mesh), jnp.bfloat16)
    cache = jax.eval_shape(lambda: rollout.new_cache(model, rollout_config, 1))
    cache = _abstract(cache, kv_cache.cache_sharding(cache, mesh))
    contexts = [
        jax.ShapeDtypeStruct((1, s.text_tokens, d), jnp.bfloat16)
        for d in config.transformer.text_dims
    ]
    encode = functools.partial(rollout.prompt_kv, model, levels=rollout_config.sigma_levels)
    text = jax.eval_shape(encode, params, *contexts)
    text = _abstract(text, kv_cache.cache_sharding(text, mesh))
    noise = jax.eval_shape(
        lambda: rollout.block_noise(jax.random.key(0), 1, rollout_config, model, 1, first=False)
    )
    rope = rollout_config.rope(model)

    def step(params, cache, text, noise):
        return rollout.block_step(
            model, params, cache, text, rope, noise, rollout_config, first=False
        )

    def lower():
        with jax.set_mesh(mesh):
            return jax.jit(step, donate_argnums=1).lower(params, cache, text, noise)

    count = sum(x.size for x in jax.tree.leaves(params))
    passes = rollout_config.num_steps + 1
    one_block = flops.block_flops(config.transformer, rollout_config, s.window + 2, s.text_tokens)
    tokens = rollout_config.cache.layout.video_frames * rollout_config.patches
    work = Work(one_block, 0.0, passes, 0.0, ((tokens, float(passes)),))
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.kv, text)))
    return Programs(
        target,
        mesh,
        {"block_step": lower},
        {"block_step": work},
        {"block_step": 1.0},
        {"block_step": float(rollout_config.num_steps)},
        (2 * count + read) / shape["tensor"],
        0.0,
    )


def _abstract(tree, sharding, dtype=None):
    def leaf(x, s):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s)

    return jax.tree.map(leaf, tree, sharding)


def _held_bytes(tree: Any) -> float:
    """Of a tree of arrays or shapes, on one device."""
    return float(
        sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def compile_part(
    programs: Programs, name: str, lowered: Any, *, thorough: bool = False
) -> tuple[dict[str, Any], str]:
    """Compiles, and reads memory and messages off the result.

    Args:
      thorough: optimize as for use.

    Returns:
      {"arguments", "temporaries", "peak", "hbm": bytes per device, "fits": peak at most 90 % of the
      device, "moved": {kind: bytes a device takes in}, "communication": seconds}, and the program.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit.
    """
    target = programs.target
    if target.is_tpu:
        options = {} if thorough else QUICK
    else:
        options = {} if target.device is None else GPU
    if target.name.startswith("tpu7x"):
        options = options | V7X
    compiled = lowered.compile(compiler_options=options or None)
    programs.compiled[name] = compiled
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    messages = collectives.read(text, open_loops=programs.open_loops[name])
    part = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "moved": {k: round(v) for k, v in collectives.total_bytes(messages).items()},
        "communication": _seconds(programs, messages),
    }
    if target.device is not None:
        part["hbm"] = target.device.hbm
        part["fits"] = part["peak"] <= 0.9 * target.device.hbm
    return part, text


def _seconds(programs: Programs, messages) -> float:
    """Time of all messages, one after the other, at the speed of the axes they travel along."""
    if programs.target.device is None:
        return 0.0
    positions = np.arange(programs.mesh.devices.size).reshape(programs.mesh.devices.shape)
    total = 0.0
    for message in messages:
        if len(message.group) < 2:
            continue
        where = np.argwhere(np.isin(positions, message.group))
        spanned = np.flatnonzero(np.ptp(where, axis=0))
        axes = tuple(programs.mesh.axis_names[i] for i in spanned)
        total += message.bytes * message.count / axis_speed(programs.target, programs.mesh, axes)
    return total


def step_times(programs: Programs, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The roofline of an average step; empty without a known device, without known work, or when a
    part was refused."""
    device = programs.target.device
    if device is None or not programs.work or any("refused" in part for part in parts.values()):
        return {}
    devices = len(programs.target.devices)
    work = sum((programs.work[n] * programs.share[n] for n in parts), Work(0, 0, 0, 0, ()))
    communication = sum(parts[n]["communication"] * programs.share[n] for n in parts)
    t = cost.times(
        work,
        device,
        devices,
        weights_bytes=programs.weights_bytes,
        state_bytes=programs.state_bytes,
        communication=communication,
    )
    mfu = functools.partial(cost.model_flops_utilisation, work, device=device, devices=devices)
    return {
        "flops": work.flops,
        "repeated": work.repeated,
        "compute": t.compute,
        "memory": t.memory,
        "communication": t.communication,
        "overlapped": t.overlapped,
        "summed": t.summed,
        "mfu_bound": mfu(t.overlapped),
        "mfu_summed": mfu(t.summed),
    }


def reason(error: Exception) -> str:
    """Why a compiler refused a program, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    used = [line for line in lines if "Used" in line and "hbm" in line]
    return (used or lines or [type(error).__name__])[0][:300]
