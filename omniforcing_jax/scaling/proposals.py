"""Meshes and policies for a machine: every one that is possible, with its memory and its time.

The arithmetic is that of `planning` (what stays in memory during a step) and `cost` (operations and
messages), with two allowances read off compiled programs: see `TEMPORARIES`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from omniforcing_jax.scaling import aot, cost, dry_run, planning
from omniforcing_jax.scaling.devices import (
    DEVICES,
    GPUS_PER_NODE,
    TPUS,
    Device,
    device_count,
    parse,
)
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.config.settings import ConfigError

# Bytes of temporaries per video token on a device and unit of the video's width, at the worst
# moment of a layer's backward pass; copies of a layer's gathered weights that live at a time; and
# what a rollout takes, in caches (keys are rotated in float32, beside the text's keys and values).
# Fitted to the programs of docs/scaling.md, which also says how far off the sums are.
TEMPORARIES = 60.0
GATHERED_LAYERS = 4.0
CACHES = 3.0
# Dimensions of the torus along which a gather over all devices runs.
TORUS_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
# Products with a weight in a layer, each with a gather of its own, and the time of a hop.
PRODUCTS_PER_LAYER = 28
SECONDS_PER_HOP = 1e-6
MICROBATCHES = (1, 2, 4, 8, 16, 32)
# Attention is split by heads, of which LTX-2 has 32.
MAX_HEADS_SPLIT = 32


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A mesh with its policies.

    Attributes:
      mesh: devices per axis.
      microbatches, gather_weights: settings of the config.
      memory: {what: bytes} on a device, temporaries included.
      seconds: of an average step: a lower bound, and an estimate without overlap.
      mfu: model FLOPs utilisation at the estimate.
      parts: seconds of compute at peak, and of communication.
    """

    mesh: dict[str, int]
    microbatches: int
    gather_weights: bool
    memory: dict[str, int]
    seconds: tuple[float, float]
    mfu: float
    parts: dict[str, float]

    @property
    def bytes(self) -> int:
        """On a device, at the worst moment."""
        return sum(self.memory.values())


def propose(
    stage: str,
    target: str,
    *,
    variant: str = "19b",
    size: str = "full",
    changes: Mapping[str, Any] | None = None,
    slices: int = 1,
) -> list[Proposal]:
    """Every mesh and policy that the config admits, fastest estimate first.

    Args:
      target: see `hardware`.
      changes: settings that differ from the variant's, such as {"batch_size": 64}.
      slices: into how many of them, connected by the data centre's network, the target is split.

    Raises:
      ValueError: the target or a setting is unknown, or no mesh is possible.
    """
    kind, _ = parse(target)
    device, devices = DEVICES[kind], device_count(target)
    found, refused = [], None
    for mesh, microbatches, gather in _candidates(devices, stage, slices):
        settings = {"microbatches": microbatches, **(changes or {})}
        if stage != "stage2":
            settings["compute.gather_weights"] = gather
        c = aot.stage_config(stage, mesh, variant, settings)
        if c.batch_size % (microbatches * mesh["data"] * mesh["fsdp"]):
            continue
        try:
            e = dry_run.make_experiment(c, devices, size=size)
        except ConfigError as error:
            refused = error
            continue
        found.append(evaluate(e, kind, device, devices))
    if not found and refused is not None:
        raise ValueError(f"no mesh is possible; of the last one tried:\n{refused}")
    return sorted(found, key=lambda p: (p.seconds[1], p.bytes))


def _candidates(
    devices: int, stage: str, slices: int = 1
) -> Iterator[tuple[dict[str, int], int, bool]]:
    inside = devices // slices
    few = [d for d in range(1, MAX_HEADS_SPLIT + 1) if inside % d == 0]
    for sequence, tensor in itertools.product(few, few):
        if inside % (sequence * tensor) or sequence * tensor > MAX_HEADS_SPLIT:
            continue
        mesh = {"fsdp": inside // (sequence * tensor), "sequence": sequence, "tensor": tensor}
        for microbatches in MICROBATCHES:
            for gather in (False, True) if stage != "stage2" else (False,):
                yield {"data": slices, **mesh}, microbatches, gather


def evaluate(e: Experiment, kind: str, device: Device, devices: int) -> Proposal:
    """Memory and time of one experiment."""
    plan = planning.make_plan(e)
    work = cost.step(e)
    weights = plan.parameters["generator"]
    traffic = cost.traffic(e, work, weights)
    messages = (work.gathers + work.reductions) * e.student.num_layers * PRODUCTS_PER_LAYER
    seconds = communication_seconds(traffic, messages, kind, device, e.mesh_shape)
    size = jnp.dtype(e.dtype).itemsize
    held = sum(v for k, v in plan.bytes_per_device.items() if k.startswith("generator"))
    times = cost.times(
        work,
        device,
        devices,
        weights_bytes=size * weights / e.mesh_shape["tensor"],
        state_bytes=2.0 * held,
        communication=seconds,
    )
    return Proposal(
        mesh=dict(e.mesh_shape),
        microbatches=e.config.microbatches,
        gather_weights=e.config.compute.gather_weights,
        memory=peak_memory(e, plan),
        seconds=(times.overlapped, times.summed),
        mfu=cost.model_flops_utilisation(work, times.summed, device, devices),
        parts={"compute": times.compute, "communication": times.communication},
    )


def peak_memory(e: Experiment, plan: planning.Plan) -> dict[str, int]:
    """{what: bytes on a device} at the worst moment: in a rollout, or in a pass over whole clips.

    The two do not meet. Both have a few layers' gathered weights beside them, and gradients of one
    microbatch where those of others are added up.
    """
    memory = dict(plan.bytes_per_device)
    cache = memory.pop("rollout: cache of keys and values", 0)
    kept = memory.pop("activations between layers", 0)
    tokens = planning.samples_per_device(e) * e.clip.video_tokens / e.mesh_shape["sequence"]
    layer = int(TEMPORARIES * tokens * e.student.video_dim)
    if CACHES * cache > kept + layer:
        memory["rollout: cache of keys and values"] = cache
        temporaries = (CACHES - 1) * cache
    else:
        memory["activations between layers"] = kept
        temporaries = layer
    weights = plan.parameters["generator"] / e.student.num_layers / e.mesh_shape["tensor"]
    temporaries += GATHERED_LAYERS * weights * jnp.dtype(e.dtype).itemsize
    if e.config.microbatches > 1:
        temporaries += memory["generator: gradients"]
    return memory | {"temporaries": int(temporaries)}


def communication_seconds(
    traffic: cost.Traffic, messages: float, kind: str, device: Device, mesh: Mapping[str, int]
) -> float:
    """Seconds of all messages, one axis after the other.

    A gather or reduction over n devices takes, besides its bytes, as long as a signal around half
    of each ring (a torus), or through the levels of a tree.

    Small axes lie along one dimension of a torus (or inside a node of GPUs), that of the weights
    along all of them. `data` lies over the data centre's network: one slice, or node, each.
    """
    inside = mesh["fsdp"] * mesh["sequence"] * mesh["tensor"]
    if kind in TPUS:
        wide = 2 * device.link_speed * TORUS_DIMENSIONS[kind]
        small = 2 * device.link_speed
    else:
        wide = device.link_speed if inside <= GPUS_PER_NODE else device.node_speed
        small = device.link_speed
    exchanged = traffic.sequence + traffic.tensor
    group = mesh["fsdp"] * mesh["sequence"]
    if kind in TPUS:
        dimensions = TORUS_DIMENSIONS[kind]
        hops = dimensions * group ** (1 / dimensions) / 2
    else:
        hops = 2 * math.log2(group) if group > 1 else 0.0
    waiting = messages * hops * SECONDS_PER_HOP
    return waiting + traffic.fsdp / wide + exchanged / small + traffic.data / device.node_speed


def steps_of(stage: str, variant: str) -> int:
    """Training steps of a variant."""
    return aot.stage_config(stage, {}, variant, {}).num_steps
