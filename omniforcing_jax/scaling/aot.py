"""Programs compiled ahead of time: which there are, and what their compiled form says.

`launch.aot` is the command line. The programs are the ones that run: the jitted steps of the
stages, and the block step that the sampler and the live session call.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.geometry import modalities, stream_ropes
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import clip_rope
from omniforcing_jax.sampling import kv_cache, weights
from omniforcing_jax.sampling.student import (
    RolloutConfig,
    block_noise,
    block_step,
    new_cache,
    prompt_kv,
    text_at,
)
from omniforcing_jax.scaling import collectives, planning, traffic
from omniforcing_jax.scaling.devices import Target, check_products, group_speed
from omniforcing_jax.scaling.flops import block_flops, forward_flops
from omniforcing_jax.scaling.planning import Work
from omniforcing_jax.training import assembly
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.objectives.split_dmd import SplitDMD, SplitFrozen, split_meshes
from omniforcing_jax.training.state import state_shardings
from omniforcing_jax.types import AVLatents

# With it the compiler takes less time; where both were tried, peaks differed by less than 1 %
# (docs/scaling.md). Below -0.4 libtpu 0.0.42 aborts at a reduce-scatter of a small array, such as
# an adapter's gradient, over four devices of a plane ("reduction_loop_bound == max_shard_scaling").
QUICK = {"exec_time_optimization_effort": -0.4}
# libtpu 0.0.42 aborts when it moves an all-reduce to v7x's SparseCores (a failed check of
# offload_collective_strategies, "std::abs(inc) < core_count()").
V7X = {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": False}
# Where no GPU is there to try tiles out on, XLA takes Triton's default ones for fused products, and
# fails for those of audio tokens split by heads ("couldn't find output tile sizes").
GPU = {"xla_gpu_enable_triton_gemm": False}
SECONDS = 5  # of the clip that a forward pass sees


@dataclasses.dataclass(frozen=True)
class Program:
    """A part of a step.

    Attributes:
      lower: makes the lowered program.
      open_loops: iterations of its loops that the data ends.
      work: what it asks of all devices; None where no roofline is drawn.
      share: how often it runs per step.
    """

    lower: Callable[[], Any]
    open_loops: float
    work: Work | None = None
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled for a target.

    Attributes:
      mesh: over the target's devices.
      programs: {part: program}, in their order.
      weights_bytes: of a network, as a device reads it in one pass.
      state_bytes: read or written by an update, on a device.
      compiled: {part: compiled program}; the later parts of a step may need the earlier ones.
    """

    target: Target
    mesh: jax.sharding.Mesh
    programs: dict[str, Program]
    weights_bytes: float = 0.0
    state_bytes: float = 0.0
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)


def stage_case(e: Experiment, target: Target, devices: Sequence[Any]) -> Case:
    """The steps of a training stage, on the target's devices."""
    steps = len(e.sigmas) - 1
    # of the loops that end at a drawn step: stage I's last sample's, or the average and the refresh
    open_loops = steps - 1.0 if e.config.stage == "stage1" else (steps + 1) / 2 + 1
    if e.config.compute.separate_scores:
        return _split_case(e, target, devices, open_loops)
    mesh = partitioning.make_mesh(**e.mesh_shape, devices=devices)
    with jax.set_mesh(mesh):
        state = assembly.abstract_state(e, mesh)
        frozen, batch = assembly.abstract_frozen(e, mesh), assembly.abstract_batch(e, mesh)
    module, work = experiment.make_stage(e, state_shardings(state)), planning.work_of_updates(e)

    def lower(step):
        with jax.set_mesh(mesh):
            return step.lower(state, frozen, batch, jax.ShapeDtypeStruct((), jnp.uint32))

    def program(step, network: str, share: float) -> Program:
        return Program(functools.partial(lower, step), open_loops, work[network], share)

    if e.config.stage == "stage2":
        programs = {"step": program(module.noisy_step, "generator", 1.0)}
    else:
        share = 1 / e.config.critic_updates
        programs = {
            "generator_step": program(module.generator_step, "generator", share),
            "critic_step": program(module.critic_step, "critic", 1.0),
        }
    read = 2 * planning.count(state.generator.params)
    if e.config.adapters.used:
        read += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen.teacher))
    read /= e.mesh_shape["tensor"]
    held = 2 * planning.bytes_on_device(state.generator)
    return Case(target, mesh, programs, read, held)


def _split_case(e: Experiment, target: Target, devices: Sequence[Any], open_loops: float) -> Case:
    """A step whose score networks have devices of their own.

    There is no roofline: halves of the devices work side by side, and wait for each other.
    """
    meshes = student, scores = split_meshes(e.mesh_shape, list(devices))
    frozen, batches = [], []
    for mesh in meshes:
        with jax.set_mesh(mesh):
            frozen.append(assembly.abstract_frozen(e, mesh))
            batches.append(assembly.abstract_batch(e, mesh))
    with jax.set_mesh(student):
        state = assembly.abstract_state(e, student, scores)
    stage = SplitDMD(experiment.make_stage(e, state_shardings(state)), student, scores)
    held = SplitFrozen(frozen[0].replace(teacher=None), frozen[1])
    case = Case(target, student, {})
    for name, lower in stage.lowered(state, held, *batches).items():
        case.programs[name] = Program(functools.partial(lower, case.compiled), open_loops)
    return case


def stream_case(
    target: Target,
    devices: Sequence[Any],
    mesh_shape: Mapping[str, int],
    config: TransformerConfig,
    rollout: RolloutConfig,
    text_tokens: int = 1024,
    quantize: str = "none",
) -> Case:
    """The sampler's block step in its steady state, window full, bfloat16, one stream.

    Args:
      quantize: as for `load_pipeline`.
      mesh_shape: devices per axis; those not named are 1, and -1 is all of the target's.

    Raises:
      ValueError: the mesh does not fit the devices, or they lack a precision, or there is none of
        that name.
    """
    mesh, model, params = _sampler(target, devices, mesh_shape, config, quantize)
    empty = jax.eval_shape(functools.partial(new_cache, model, rollout, 1), params)
    cache = _placed(empty, mesh)
    contexts = [jax.ShapeDtypeStruct((1, text_tokens, d), jnp.bfloat16) for d in config.text_dims]
    how = {"levels": rollout.sigma_levels, "dtype": rollout.cache.dtype}
    encode = functools.partial(prompt_kv, model, **how)
    text = _placed(jax.eval_shape(encode, params, *contexts), mesh)
    noise = jax.eval_shape(
        lambda: block_noise(jax.random.key(0), 1, rollout, model, 1, first=False)
    )
    rope = rollout.rope(model)

    def step(params, cache, text, noise):
        where = cache, text, rope, noise, rollout
        return block_step(model, params, *where, first=False, full=True)

    def lower():
        with jax.set_mesh(mesh):
            return jax.jit(step, donate_argnums=1).lower(params, cache, text, noise)

    passes = rollout.num_steps + 1
    flops = block_flops(config, rollout, rollout.cache.window + 2, text_tokens)
    work = Work(flops, 0.0, passes, 0.0, rollout.cache.layout.video_frames * rollout.patches)
    program = Program(lower, float(rollout.num_steps), work)
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, cache.kv, text)))
    read /= mesh.shape["tensor"]
    return Case(target, mesh, {"block_step": program}, read)


def forward_case(
    target: Target,
    devices: Sequence[Any],
    mesh_shape: Mapping[str, int],
    config: TransformerConfig,
    rollout: RolloutConfig,
    text_tokens: int = 1024,
    quantize: str = "none",
) -> Case:
    """One pass over a clip of five seconds in bfloat16, with weights as streams have them, and the
    keys and values of its text at hand.

    Args and errors are those of `stream_case`; of `rollout` it needs the picture's size.
    """
    mesh, model, params = _sampler(target, devices, mesh_shape, config, quantize)
    blocks = BlockLayout.prefix()
    count = SECONDS + 1  # the first is a single picture
    frames, audio_frames = blocks.num_video_frames(count), blocks.num_audio_frames(count)
    clip = {"video_frames": frames, "audio_frames": audio_frames}
    rope = clip_rope(config, height=rollout.height, width=rollout.width, **clip)
    indices = jnp.arange(frames), jnp.arange(audio_frames)
    ropes = functools.partial(stream_ropes, rope, *indices, sinks=config.num_audio_sinks > 0)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct((1, *sizes), jnp.bfloat16, sharding=where)

    latents = AVLatents(
        shape(frames * rollout.patches, config.video_channels),
        shape(audio_frames, config.audio_channels),
    )
    contexts = tuple(shape(text_tokens, width) for width in config.text_dims)
    encode = functools.partial(prompt_kv, model, levels=(1.0,))
    text = _placed(jax.eval_shape(encode, params, *contexts), mesh)

    def forward(params, x, text):
        sigma = jnp.ones((1, 1))
        streams = modalities(x, AVLatents(sigma, sigma), ropes())
        return model.apply({"params": params}, *streams, text=text_at(model, text, 0))[0]

    def lower():
        with jax.set_mesh(mesh):
            return jax.jit(forward).lower(params, latents, text)

    video, audio = latents.video.shape[1], latents.audio.shape[1]
    flops = forward_flops(
        config, video_tokens=video, audio_tokens=audio, video_keys=video, audio_keys=audio,
        text_tokens=text_tokens,
    )  # fmt: skip
    program = Program(lower, 1.0, Work(flops, 0.0, 1, 0.0, video))
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, text)))
    return Case(target, mesh, {"forward": program}, read / mesh.shape["tensor"])


def _sampler(
    target: Target,
    devices: Sequence[Any],
    mesh_shape: Mapping[str, int],
    config: TransformerConfig,
    quantize: str,
) -> tuple[jax.sharding.Mesh, Transformer, Any]:
    """The mesh, the model, and shapes and places of its weights, as `load_pipeline` has them."""
    if target.device is not None:
        check_products(quantize, devices[0].device_kind)
    shape = {axis: len(devices) if n == -1 else n for axis, n in mesh_shape.items()}
    mesh = partitioning.make_mesh(**shape, devices=devices)
    model = Transformer(config, jnp.bfloat16)
    stacked = assembly.abstract_params(model, mesh, jnp.bfloat16)
    by_heads = weights.laid_out_for(devices[0].platform, config)
    return mesh, model, _per_layer(stacked, mesh, quantize, by_heads)


def _per_layer(
    params: Any, mesh: jax.sharding.Mesh, quantize: str, by_heads: TransformerConfig | None
) -> Any:
    """Shapes and places of `weights.per_layer`."""
    join = mesh.size == 1
    how = {"join": join, "quantize": quantize, "by_heads": by_heads}
    blocks = jax.eval_shape(lambda p: weights.per_layer(p, **how), params)["blocks"]
    whole = NamedSharding(mesh, P())

    def place(path, x):
        stacked = params["blocks"]
        keys = [key.key for key in path[1:] if isinstance(key, jax.tree_util.DictKey)]
        for key in keys:
            stacked = stacked.get(key, {})  # joined ones have no place of their own
        place = weights.layer_place(stacked.sharding, x.shape) if stacked else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return {**params, "blocks": jax.tree.map_with_path(place, blocks)}


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of keys and values with their places on the mesh."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        kv_cache.cache_sharding(tree, mesh),
    )


def measure(case: Case, name: str, *, thorough: bool = False) -> tuple[dict[str, Any], str]:
    """Compiles a program, and reads memory and messages off the result.

    Args:
      thorough: optimize as for use.

    Returns:
      {"arguments", "temporaries", "peak", "hbm": bytes per device, "fits": peak at most 90 % of the
      device, "moved": {kind: bytes a device takes in}, "communication": seconds}, and the program.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit.
    """
    device, program = case.target.device, case.programs[name]
    options = {}
    if device is not None:
        options = GPU if not device.torus else {} if thorough else QUICK
    if case.target.name.startswith("tpu7x"):
        options = options | V7X
    compiled = program.lower().compile(compiler_options=options or None)
    case.compiled[name] = compiled
    memory, text = compiled.memory_analysis(), compiled.as_text()
    messages = collectives.read(text, open_loops=program.open_loops)
    part = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "moved": {k: round(v) for k, v in collectives.total_bytes(messages).items()},
        # one message after the other, at the speed of the links along which its group extends
        "communication": sum(
            m.bytes * m.count / group_speed(device, case.mesh, m.group) for m in messages
        ),
    }
    if device is not None:
        part |= {"hbm": device.hbm, "fits": device.holds(part["peak"])}
    return part, text


def traffic_report(case: Case, name: str, text: str) -> dict[str, Any]:
    """What a compiled program moves in a device's memory.

    Returns:
      {"bytes": {group or kind of movement: (read, written)}, "largest": [(kind, place in the model,
      bytes written)], "seconds": the roofline by share}. The roofline is of a device that does one
      thing after the other: the model's products and attention at the peak of its arithmetic, and
      what all else reads and writes at the speed of its memory; empty where device or work are not
      known.
    """
    program, device = case.programs[name], case.target.device
    kernels = traffic.read(text, open_loops=program.open_loops)
    totals, seconds = traffic.totals(kernels), {}
    if device is not None and program.work is not None:
        seconds = {"compute": program.work.flops / case.mesh.size / device.flops}
        for group in ("arithmetic", "moves"):
            seconds[group] = sum(totals[group]) / device.hbm_speed
    return {"bytes": totals, "largest": traffic.largest(kernels), "seconds": seconds}


def step_times(case: Case, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The roofline of an average step; empty without a known device, without known work, or when a
    part was refused."""
    programs = case.programs
    known = case.target.device and all(program.work for program in programs.values())
    if not known or any("refused" in part for part in parts.values()):
        return {}
    return planning.roofline(
        sum((programs[n].work * programs[n].share for n in parts), Work(0, 0, 0, 0, 0)),
        case.target.device,
        case.mesh.size,
        weights_bytes=case.weights_bytes,
        state_bytes=case.state_bytes,
        communication=sum(parts[n]["communication"] * programs[n].share for n in parts),
    )


def reason(error: Exception) -> str:
    """Why a compiler refused a program, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    used = [line for line in lines if "Used" in line and "hbm" in line]
    return (used or lines or [type(error).__name__])[0][:300]
