"""What a training step needs, by arithmetic: memory, operations, messages, and so time.

`plan_step` counts what stays in memory, `work_of_updates` operations and passes, `traffic` the
bytes between devices, and `roofline` turns them into seconds. `propose` does so for every mesh that
a machine admits, with three allowances read off compiled programs (`TEMPORARIES`).

In the notation of sharding arithmetic, a product of B x E activations with E x M weights is

    B_{fsdp,sequence} x E  *  E_{fsdp,sequence} x M_tensor

(the tokens of the video, part of B, lie over `sequence`): the weights' E is gathered, and the
result's M stays split over `tensor`. So a network is gathered once in every pass over it, and its
gradient is reduced and scattered once; these are the messages that grow with the model.
docs/scaling.md derives the rest.
"""

import copy
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, AxisType

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.scaling.devices import GPUS_PER_NODE, Device, Target
from omniforcing_jax.scaling.flops import block_flops, forward_flops, text_flops
from omniforcing_jax.training import assembly
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.config.problems import ConfigError
from omniforcing_jax.types import DTYPES

# Share of the peak that large matrix products reach on today's accelerators.
ACHIEVABLE = 0.6
# Bytes of temporaries per video token on a device and unit of the video's width, at the worst
# moment of a layer's backward pass; copies of a layer's gathered weights that live at a time; and
# what a rollout takes, in caches (keys are rotated in float32, beside the text's keys and values).
# Fitted to the programs of docs/scaling.md, which also says how far off the sums are.
TEMPORARIES = 60.0
GATHERED_LAYERS = 4.0
CACHES = 3.0
# Products with a weight in a layer, each with a gather of its own, and the time of a hop.
PRODUCTS_PER_LAYER = 28
SECONDS_PER_HOP = 1e-6
MICROBATCHES = (1, 2, 4, 8, 16, 32)
# Attention is split by heads, of which LTX-2 has 32.
MAX_HEADS_SPLIT = 32
_CACHE, _ACTIVATIONS = "rollout: cache of keys and values", "activations between layers"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one update of a network, or one step of a program, asks of all devices together.

    Attributes:
      flops: operations of the mathematics: forward 1, backward 2.
      repeated: operations done a second time, by rematerialisation or a blockwise backward pass.
      gathers: passes for which the weights of a network are gathered, or read.
      reductions: whole gradients that are reduced.
      tokens: of a sample's video, in all passes over activations; a backward pass counts as two,
        and one that is done again counts again.
    """

    flops: float
    repeated: float
    gathers: float
    reductions: float
    tokens: float

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(value * factor for value in dataclasses.astuple(self)))

    def gradient(self, remat: bool, backward: float) -> "Work":
        """This forward pass with its backward pass, of so many times its operations."""
        f = self.flops
        return Work((1 + backward) * f, remat * f, 2 * self.gathers, 1.0, (3 + remat) * self.tokens)


def work_of_updates(e: Experiment) -> dict[str, Work]:
    """The work of an update of each network: {"generator", "critic"}, or {"generator"}.

    A rollout counts the steps until its average exit. Stage I simulates until the last sample of
    the batch has exited, which with many samples is all steps.
    """
    c, remat = e.config, e.config.compute.remat != "none"
    # no gradient of a base's weights; adapters there and back
    backward = 1 + 3 * assembly.adapter_share(e) if c.adapters.used else 2.0
    how = remat, backward
    if c.stage == "stage2":
        return {"generator": _clip_pass(e, e.student).gradient(*how) * c.microbatches}
    clip = score = _clip_pass(e, e.teacher)
    if c.score.context == "block_causal":
        score = _rollout_pass(e, e.teacher, c.clip.blocks) * 2
    steps = len(e.sigmas) - 1
    if c.stage == "stage1":
        sample, last = clip * steps, clip.gradient(*how)
        # the forward pass of the last step is part of the sample
        last = dataclasses.replace(last, flops=backward * clip.flops, gathers=last.gathers - 1)
    else:
        whole = _rollout_pass(e, e.student, c.rollout_blocks)
        sample = whole * ((steps + 1) / 2 + 1)
        scored = whole * (c.clip.blocks / c.rollout_blocks)
        last = scored.gradient(*how)
        again = (1 + remat) * scored.flops
        last = dataclasses.replace(last, flops=backward * scored.flops, repeated=again)
    # all passes of the teacher are one of as many times the rows: one gather
    scores = score * (1 + len(c.score.passes()))
    scores = dataclasses.replace(scores, gathers=2 * score.gathers)
    updates = {"generator": sample + last + scores, "critic": sample + clip.gradient(*how)}
    if c.compute.gather_weights:  # once for all passes of the sample
        fewer = sample.gathers - 1 / c.microbatches
        updates = {
            name: dataclasses.replace(work, gathers=work.gathers - fewer)
            for name, work in updates.items()
        }
    return {name: work * c.microbatches for name, work in updates.items()}


def work_of_step(e: Experiment) -> Work:
    """The work of an average training step."""
    work = work_of_updates(e)
    if "critic" not in work:
        return work["generator"]
    return work["critic"] + work["generator"] * (1 / e.config.critic_updates)


def _clip_pass(e: Experiment, config: TransformerConfig) -> Work:
    """One pass over a microbatch's clips. Block-causal masks leave out half of the attention."""
    video, audio = e.clip.video_tokens, e.clip.audio_frames + config.num_audio_sinks
    blocks, text = e.config.clip.blocks, e.data.manifest.text_length
    keys = (blocks + 1) / 2 / blocks if e.config.stage == "stage2" else 1.0
    flops = text_flops(config, text) + forward_flops(
        config,
        video_tokens=video,
        audio_tokens=audio,
        video_keys=round(video * keys),
        audio_keys=round(audio * keys),
        text_tokens=text,
    )
    return Work(e.config.batch_size / e.config.microbatches * flops, 0.0, 1.0, 0.0, video)


def _rollout_pass(e: Experiment, config: TransformerConfig, blocks: int) -> Work:
    """One pass over each of so many blocks, one after the other."""
    passes, text = e.rollout.num_steps + 1, e.data.manifest.text_length
    flops = sum(block_flops(config, e.rollout, b, text) / passes for b in range(blocks))
    rows = e.config.batch_size / e.config.microbatches
    tokens = e.layout.video_frames * e.clip.patches
    return Work(rows * flops, 0.0, blocks, 0.0, tokens * blocks)


def traffic(e: Experiment, work: Work, weights: int, trained: int) -> dict[str, float]:
    """Bytes that a device takes in, by the axis of the mesh over which they travel.

    Those of `fsdp` are the weights and gradients, which travel over `sequence` as well.

    Args:
      weights: parameters of a network.
      trained: those of them, or beside them, that have gradients.
    """
    n, t, copies = (e.mesh_shape[axis] for axis in ("sequence", "tensor", "data"))
    size, ways = jnp.dtype(e.dtype).itemsize, e.mesh_shape["fsdp"] * n
    held = weights * size / t  # of a network once it is gathered
    reduced = trained * jnp.dtype(DTYPES[e.config.compute.reduce_dtype]).itemsize / t
    rows = e.config.batch_size / e.config.microbatches
    tokens = work.tokens * rows / (copies * e.mesh_shape["fsdp"]) / n
    d, c, layers = e.teacher.video_dim, e.teacher.audio_dim, e.teacher.num_layers
    # queries, keys, values and outputs of the self-attention; of the text attention and the one to
    # the audio queries and outputs; keys and values of the one from the audio
    exchanged = 4 * d + 2 * d + 2 * c + 2 * c
    # four products per layer end in a sum over tensor, of which each device gets all of it
    summed = 4 * d
    return {
        "fsdp": (work.gathers * held + work.reductions * reduced) * (ways - 1) / ways,
        # gradients are scattered already when the copies of `data` are added up: there and back
        "data": work.reductions * 2 * reduced / ways * (copies - 1) / copies,
        "sequence": layers * tokens * exchanged * size / t * (n - 1) / n,
        "tensor": layers * tokens * summed * size * 2 * (t - 1) / t,
    }


def communication_seconds(
    sent: Mapping[str, float], messages: float, device: Device, mesh: Mapping[str, int]
) -> float:
    """Seconds of all messages, one axis after the other.

    A gather or reduction over n devices takes, besides its bytes, as long as a signal around half
    of each ring (a torus), or through the levels of a tree.

    Small axes lie along one dimension of a torus (or inside a node of GPUs), that of the weights
    along all of them. `data` lies over the data centre's network: one slice, or node, each.

    Args:
      sent: from `traffic`.
      messages: number of gathers and reductions.
    """
    group = mesh["fsdp"] * mesh["sequence"]
    if device.torus:
        small = 2 * device.link_speed
        wide = small * device.torus
        hops = device.torus * group ** (1 / device.torus) / 2
    else:
        small = device.link_speed
        wide = small if group * mesh["tensor"] <= GPUS_PER_NODE else device.node_speed
        hops = 2 * math.log2(group) if group > 1 else 0.0
    exchanged = sent["sequence"] + sent["tensor"]
    moving = sent["fsdp"] / wide + exchanged / small + sent["data"] / device.node_speed
    return messages * hops * SECONDS_PER_HOP + moving


def roofline(
    work: Work,
    device: Device,
    devices: int,
    *,
    weights_bytes: float,
    state_bytes: float,
    communication: float,
) -> dict[str, float]:
    """Seconds of `work` on so many devices: of its parts, and two estimates of the whole.

    Args:
      weights_bytes: of a network as a device reads it in a pass.
      state_bytes: read or written by an update of its parameters.
      communication: seconds of messages, one after the other.

    Returns:
      "flops" and "repeated" of the work; "compute" of all operations at the hardware's peak,
      "memory" to read weights (and states) at its speed, "communication"; "overlapped", the slowest
      part alone, which is a lower bound; "summed", products at `ACHIEVABLE` of the peak and no
      overlap: what one may hope for without tuning; the model FLOPs utilisation at either of them,
      "mfu_bound" and "mfu_summed".
    """
    compute = (work.flops + work.repeated) / devices / device.flops
    memory = (work.gathers * weights_bytes + work.reductions * state_bytes) / device.hbm_speed
    times = {"overlapped": max(compute, memory, communication)}
    times["summed"] = compute / ACHIEVABLE + communication
    bound, summed = (work.flops / (t * devices * device.flops) for t in times.values())
    parts = {"compute": compute, "memory": memory, "communication": communication}
    counts = {"flops": work.flops, "repeated": work.repeated}
    return counts | parts | times | {"mfu_bound": bound, "mfu_summed": summed}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """See `plan_step`.

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


def plan_step(e: Experiment) -> StepPlan:
    """Counts; nothing is allocated, and no device is needed."""
    axes = partitioning.MESH_AXES
    sizes = tuple(e.mesh_shape[axis] for axis in axes)
    mesh = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    state = assembly.abstract_state(e, mesh)
    parameters = {"generator": count(state.generator.params)}
    memory = {
        "generator: masters": bytes_on_device(state.generator.params),
        "generator: optimizer": bytes_on_device(state.generator.opt_state),
    }
    if state.generator.ema is not None:
        memory["generator: average"] = bytes_on_device(state.generator.ema)
    memory["generator: gradients"] = bytes_on_device(state.generator.params)
    adapters = e.config.adapters
    compute = bytes_on_device(
        assembly.abstract_trained(e.model(e.student), adapters, mesh, e.dtype)
    )
    memory["generator: compute weights"] = compute
    if e.config.compute.gather_weights:
        ways = e.mesh_shape["fsdp"] * e.mesh_shape["sequence"]
        memory["generator: whole weights for rollouts"] = compute * ways
    teacher = assembly.abstract_params(e.model(e.teacher), mesh, e.dtype)
    if state.critic is not None:
        parameters["critic"] = count(state.critic.params)
        memory["critic: masters"] = bytes_on_device(state.critic.params)
        memory["critic: optimizer"] = bytes_on_device(state.critic.opt_state)
        compute = assembly.abstract_trained(e.model(e.teacher), adapters, mesh, e.dtype)
        memory["critic: compute weights"] = bytes_on_device(compute)
    if state.critic is not None or adapters.used:
        name = "base and teacher" if adapters.used else "teacher"
        parameters[name] = count(teacher)
        memory[name] = bytes_on_device(assembly.abstract_base(e, mesh))
    if e.config.compute.remat == "full":
        memory[_ACTIVATIONS] = _activation_bytes(e)
    if e.config.stage == "stage3":
        memory[_CACHE] = _rollout_bytes(e)
    tokens = e.config.batch_size * (e.clip.video_tokens + e.clip.audio_frames)
    return StepPlan(parameters, memory, work_of_step(e).flops, tokens)


def count(tree: Any) -> int:
    """Numbers in arrays, or in their shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> int:
    """Of arrays, or of shapes with shardings, on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _samples_per_device(e: Experiment) -> int:
    """Rows of a microbatch that a device works on."""
    ways = e.mesh_shape["data"] * e.mesh_shape["fsdp"]
    return -(-e.config.batch_size // (e.config.microbatches * ways))


def _activation_bytes(e: Experiment) -> int:
    """The residual streams in front of every layer, of what is differentiated at once."""
    video, audio = e.clip.video_tokens, e.clip.audio_frames + e.student.num_audio_sinks
    if e.config.stage == "stage3":  # the critic sees the whole clip, the generator a block
        audio = e.clip.audio_frames
    video = video // e.mesh_shape["sequence"] * e.student.video_dim
    streams = video + audio * e.student.audio_dim
    size = jnp.dtype(e.dtype).itemsize
    return _samples_per_device(e) * e.student.num_layers * streams * size


def _rollout_bytes(e: Experiment) -> int:
    """The cache, and what blocks wrote that leave it before they are differentiated."""
    cache = e.rollout.cache.for_clip(e.config.rollout_blocks)
    kwargs = {"batch": _samples_per_device(e), "patches": e.rollout.patches, "dtype": e.dtype}
    total = cache_bytes(cache, e.student, **kwargs)
    if not cache.holds(e.config.rollout_blocks):
        whole = dataclasses.replace(cache, window=max(e.config.clip.blocks - 1, 1), anchors=0)
        total += cache_bytes(whole, e.student, **kwargs)
    return total // (e.mesh_shape["tensor"] * e.mesh_shape["sequence"])


def describe(e: Experiment, plan: StepPlan) -> str:
    """The plan as text."""
    c, memory = e.config, plan.bytes_per_device
    latents = f"{e.clip.video_frames} video and {e.clip.audio_frames} audio latents"
    axes = ", ".join(f"{name} {size}" for name, size in e.mesh_shape.items())
    devices = math.prod(e.mesh_shape.values()) * (2 if c.compute.separate_scores else 1)
    flops = {
        "operations": plan.flops_per_step,
        "operations per device": plan.flops_per_step / devices,
    }
    rows = lambda table: [f"  {name:<58}{value:>18}" for name, value in table.items()]  # noqa: E731
    lines = [
        f"{c.stage}: {c.num_steps:,} steps of {c.batch_size} clips, "
        f"{c.clip.width}x{c.clip.height}, {latents} in {c.clip.blocks} blocks ({c.clip.layout})",
        "",
        "parameters",
        *rows({name: f"{count:,}" for name, count in plan.parameters.items()}),
        "",
        f"memory per device (mesh: {axes})",
        *rows({k: _scaled(v, 1024, "B") for k, v in (memory | _sums(e, memory)).items()}),
        "",
        "arithmetic of an average step",
        *rows({name: _scaled(value, 1000, "FLOP") for name, value in flops.items()}),
        *rows({"tokens trained on": f"{plan.tokens_per_step:,}"}),
    ]
    return "\n".join(lines)


def _sums(e: Experiment, memory: dict[str, int]) -> dict[str, int]:
    if not e.config.compute.separate_scores:
        return {"sum, without temporaries": sum(memory.values())}
    scores = sum(v for what, v in memory.items() if what.startswith(("critic", "teacher")))
    gradients = memory["generator: gradients"]  # the critic's are as large
    return {
        "sum on the student's devices": sum(memory.values()) - scores,
        "sum on those of the scores": scores + gradients + memory.get(_ACTIVATIONS, 0),
    }


def _scaled(value: float, base: int, unit: str) -> str:
    """A number with a prefix: 1536 B is 1.50 KiB."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti"] if base == 1024 else ["", "k", "M", "G", "T", "P"]
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {prefixes[power]}{unit}"


@dataclasses.dataclass(frozen=True)
class MeshProposal:
    """A mesh with its policies.

    Attributes:
      mesh: devices per axis.
      microbatches, gather_weights: settings of the config.
      memory: {what: bytes} on a device at the worst moment, temporaries included.
      sent: {axis: bytes} that a device takes in, in an average step.
      step: the `roofline` of an average step.
    """

    mesh: dict[str, int]
    microbatches: int
    gather_weights: bool
    memory: dict[str, int]
    sent: dict[str, float]
    step: dict[str, float]

    @property
    def bytes(self) -> int:
        """On a device, at the worst moment."""
        return sum(self.memory.values())


def propose(
    config: ml_collections.ConfigDict,
    check: Callable[[ml_collections.ConfigDict, int], Experiment],
    target: Target,
    *,
    slices: int = 1,
    microbatches: Sequence[int] = MICROBATCHES,
) -> list[MeshProposal]:
    """Every mesh and policy that a config admits, fastest estimate first.

    Args:
      config: of a stage; its mesh, microbatches and gather_weights are replaced.
      check: (config, number of devices) to a checked experiment.
      slices: into how many of them, connected by the data centre's network, the target is split.
      microbatches: numbers of them to try.

    Raises:
      ValueError: no mesh is possible.
    """
    inside = target.num_devices // slices
    ways = [n for n in range(1, MAX_HEADS_SPLIT + 1) if inside % n == 0]
    policies = (False, True) if config.stage != "stage2" else (False,)
    found, refused = [], None
    for sequence, tensor, parts, gather in itertools.product(ways, ways, microbatches, policies):
        fsdp, rest = divmod(inside, sequence * tensor)
        if rest or sequence * tensor > MAX_HEADS_SPLIT:
            continue
        if config.batch_size % (parts * slices * fsdp):
            continue
        c = copy.deepcopy(config)
        c.mesh.update({"data": slices, "fsdp": fsdp, "sequence": sequence, "tensor": tensor})
        c.microbatches = parts
        if c.stage != "stage2":
            c.compute.gather_weights = gather
        try:
            e = check(c, target.num_devices)
        except ConfigError as error:
            refused = error
            continue
        found.append(evaluate(e, target))
    if not found and refused is not None:
        raise ValueError(f"no mesh is possible; of the last one tried:\n{refused}")
    return sorted(found, key=lambda p: (p.step["summed"], p.bytes))


def evaluate(e: Experiment, target: Target) -> MeshProposal:
    """Memory and time of one experiment."""
    plan, work = plan_step(e), work_of_step(e)
    weights, trained = max(plan.parameters.values()), plan.parameters["generator"]
    sent = traffic(e, work, weights, trained)
    messages = (work.gathers + work.reductions) * e.student.num_layers * PRODUCTS_PER_LAYER
    held = sum(v for k, v in plan.bytes_per_device.items() if k.startswith("generator"))
    step = roofline(
        work,
        target.device,
        target.num_devices,
        weights_bytes=jnp.dtype(e.dtype).itemsize * weights / e.mesh_shape["tensor"],
        state_bytes=2.0 * held,
        communication=communication_seconds(sent, messages, target.device, e.mesh_shape),
    )
    gather = e.config.compute.gather_weights
    memory = peak_memory(e, plan)
    return MeshProposal(dict(e.mesh_shape), e.config.microbatches, gather, memory, sent, step)


def peak_memory(e: Experiment, plan: StepPlan) -> dict[str, int]:
    """{what: bytes on a device} at the worst moment: in a rollout, or in a pass over whole clips.

    The two do not meet. Both have a few layers' gathered weights beside them, and gradients of one
    microbatch where those of others are added up.
    """
    memory = dict(plan.bytes_per_device)
    cache, kept = memory.pop(_CACHE, 0), memory.pop(_ACTIVATIONS, 0)
    tokens = _samples_per_device(e) * e.clip.video_tokens / e.mesh_shape["sequence"]
    layer = int(TEMPORARIES * tokens * e.student.video_dim)
    if CACHES * cache > kept + layer:
        memory[_CACHE], temporaries = cache, (CACHES - 1) * cache
    else:
        memory[_ACTIVATIONS], temporaries = kept, layer
    weights = max(plan.parameters.values()) / e.student.num_layers / e.mesh_shape["tensor"]
    temporaries += GATHERED_LAYERS * weights * jnp.dtype(e.dtype).itemsize
    if e.config.microbatches > 1:
        temporaries += memory["generator: gradients"]
    return memory | {"temporaries": int(temporaries)}
