"""What a run will need, by arithmetic: parameters, memory per device, operations per step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.scaling import cost
from omniforcing_jax.training.assembly import abstract_params, abstract_state
from omniforcing_jax.training.config.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Plan:
    """See `make_plan`.

    Attributes:
      parameters: {network: count}.
      bytes_per_device: {what: bytes} of what stays in memory during a whole step.
      flops_per_step: operations of all devices in an average step, without recomputation.
      tokens_per_step: video and audio tokens that are trained on.
    """

    parameters: dict[str, int]
    bytes_per_device: dict[str, int]
    flops_per_step: float
    tokens_per_step: int


def make_plan(e: Experiment) -> Plan:
    """Counts; nothing is allocated, and no device is needed."""
    mesh = AbstractMesh(
        tuple(e.mesh_shape[axis] for axis in partitioning.MESH_AXES),
        partitioning.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(partitioning.MESH_AXES),
    )
    state = abstract_state(e, mesh)
    parameters = {"generator": _count(state.generator.params)}
    memory = {
        "generator: masters": _bytes(state.generator.params),
        "generator: optimizer": _bytes(state.generator.opt_state),
    }
    if state.generator.ema is not None:
        memory["generator: average"] = _bytes(state.generator.ema)
    memory["generator: gradients"] = _bytes(state.generator.params)
    compute = abstract_params(e.model(e.student), mesh, e.dtype)
    memory["generator: compute weights"] = _bytes(compute)
    if e.config.compute.gather_weights:
        ways = e.mesh_shape["fsdp"] * e.mesh_shape["sequence"]
        memory["generator: whole weights for rollouts"] = _bytes(compute) * ways
    if state.critic is not None:
        parameters["critic"] = _count(state.critic.params)
        memory["critic: masters"] = _bytes(state.critic.params)
        memory["critic: optimizer"] = _bytes(state.critic.opt_state)
        teacher = abstract_params(e.model(e.teacher), mesh, e.dtype)
        parameters["teacher"] = _count(teacher)
        memory["critic: compute weights"] = memory["teacher"] = _bytes(teacher)
    if e.config.compute.remat == "full":
        memory["activations between layers"] = _activation_bytes(e)
    if e.config.stage == "stage3":
        memory["rollout: cache of keys and values"] = rollout_bytes(e)
    tokens = e.config.batch_size * (e.clip.video_tokens + e.clip.audio_frames)
    return Plan(parameters, memory, cost.step(e).flops, tokens)


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    """On one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def samples_per_device(e: Experiment) -> int:
    """Rows of a microbatch that a device works on."""
    ways = e.mesh_shape["data"] * e.mesh_shape["fsdp"]
    return -(-e.config.batch_size // (e.config.microbatches * ways))


def _activation_bytes(e: Experiment) -> int:
    """The residual streams in front of every layer, of what is differentiated at once."""
    video, audio = e.clip.video_tokens, e.clip.audio_frames + e.student.num_audio_sinks
    if e.config.stage == "stage3":  # the critic sees the whole clip, the generator a block
        audio = e.clip.audio_frames
    video = video // e.mesh_shape["sequence"] * e.student.video_dim
    size = jnp.dtype(e.dtype).itemsize
    streams = video + audio * e.student.audio_dim
    return samples_per_device(e) * e.student.num_layers * streams * size


def rollout_bytes(e: Experiment) -> int:
    """The cache, and what blocks wrote that leave it before they are differentiated."""
    cache = e.rollout.cache.for_clip(e.config.rollout_blocks)
    kwargs = {"batch": samples_per_device(e), "patches": e.rollout.patches, "dtype": e.dtype}
    total = cache_bytes(cache, e.student, **kwargs)
    if not cache.holds(e.config.rollout_blocks):
        whole = dataclasses.replace(cache, window=max(e.config.clip.blocks - 1, 1), anchor_blocks=0)
        total += cache_bytes(whole, e.student, **kwargs)
    return total // (e.mesh_shape["tensor"] * e.mesh_shape["sequence"])


def describe(e: Experiment, plan: Plan) -> str:
    """The plan as text."""
    c = e.config
    latents = f"{e.clip.video_frames} video and {e.clip.audio_frames} audio latents"
    lines = [
        f"{c.stage}: {c.num_steps:,} steps of {c.batch_size} clips, "
        f"{c.clip.width}x{c.clip.height}, {latents} in {c.clip.blocks} blocks ({c.clip.layout})",
        "",
        "parameters",
        *(f"  {name:<58}{count:>18,}" for name, count in plan.parameters.items()),
    ]
    axes = ", ".join(f"{name} {size}" for name, size in e.mesh_shape.items())
    lines += ["", f"memory per device (mesh: {axes})"]
    memory = plan.bytes_per_device
    lines += [
        f"  {what:<58}{_scaled(size, 1024, 'B'):>18}"
        for what, size in (memory | _sums(e, memory)).items()
    ]
    devices, flop = math.prod(e.mesh_shape.values()), plan.flops_per_step
    if e.config.compute.separate_scores:
        devices *= 2
    lines += [
        "",
        "arithmetic of an average step",
        f"  {'operations':<58}{_scaled(flop, 1000, 'FLOP'):>18}",
        f"  {'operations per device':<58}{_scaled(flop / devices, 1000, 'FLOP'):>18}",
        f"  {'tokens trained on':<58}{plan.tokens_per_step:>18,}",
    ]
    return "\n".join(lines)


def _sums(e: Experiment, memory: dict[str, int]) -> dict[str, int]:
    if not e.config.compute.separate_scores:
        return {"sum, without temporaries": sum(memory.values())}
    scores = {what: size for what, size in memory.items() if what.startswith(("critic", "teacher"))}
    gradients = memory["generator: gradients"]  # the critic's are as large
    activations = memory.get("activations between layers", 0)
    return {
        "sum on the student's devices": sum(memory.values()) - sum(scores.values()),
        "sum on those of the scores": sum(scores.values()) + gradients + activations,
    }


def _scaled(value: float, base: int, unit: str) -> str:
    """A number with a prefix: 1536 B is 1.50 KiB."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if base == 1024 else ["", "k", "M", "G", "T", "P"]
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {prefixes[power]}{unit}"
