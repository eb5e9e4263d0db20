"""Putting a checked experiment onto a mesh: parameters, train state, frozen networks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import locate
from omniforcing_jax.models.quantization import (
    PRECISIONS,
    QuantizedArray,
    host_memory,
    quantize,
)
from omniforcing_jax.models.text.connectors import TextConnectors
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import (
    Transformer,
    init_boxed_params,
    init_params,
)
from omniforcing_jax.sampling.weights import QUANTIZED
from omniforcing_jax.training import adapters
from omniforcing_jax.training.adapters import NEW_PARAMETERS, AdapterConfig
from omniforcing_jax.training.batches import text_arrays
from omniforcing_jax.training.config.experiment import Experiment, make_stage
from omniforcing_jax.training.objectives.common import Frozen, TextInput
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.ode_regression import ODERegression
from omniforcing_jax.training.objectives.split_dmd import SplitDMD, SplitFrozen, split_meshes
from omniforcing_jax.training.optimizers import OptimizerConfig, make_optimizer
from omniforcing_jax.training.parameter_trees import place_stored
from omniforcing_jax.training.state import (
    Network,
    TrainState,
    create_network,
    create_state,
    state_shardings,
)
from omniforcing_jax.training.training_checkpoints import load_generator, verify_generator


def abstract_params(model: Transformer, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Any:
    """Shapes of a model's parameters with their places on the mesh."""
    return _placed(_boxed(model), mesh, dtype)


def abstract_trained(
    model: Transformer, config: AdapterConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> Any:
    """The same of those that are trained: all of them without adapters."""
    if not config.used:
        return abstract_params(model, mesh, dtype)
    return _placed(adapters.boxed_trained(_boxed(model), config), mesh, dtype)


def abstract_base(e: Experiment, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and places of the frozen weights: of the teacher, which is the base of adapters."""
    params = abstract_params(e.model(e.teacher), mesh, e.dtype)
    precision = PRECISIONS.get(e.config.compute.base_precision)
    if precision is None:
        return params

    def leaf(path: tuple[str, ...], x: jax.ShapeDtypeStruct):
        if not _in_low_precision(path):
            return x
        layers, _, outputs = x.shape
        layer_axis, _, output_axis = (*x.sharding.spec, None, None, None)[:3]
        place = NamedSharding(mesh, PartitionSpec(layer_axis, None, output_axis))
        scale = jax.ShapeDtypeStruct((layers, 1, outputs), jnp.float32, sharding=place)
        values = jax.ShapeDtypeStruct(x.shape, precision.dtype, sharding=x.sharding)
        return QuantizedArray(values, scale)

    return unflatten_dict({path: leaf(path, x) for path, x in flatten_dict(params).items()})


def _in_low_precision(path: tuple[str, ...]) -> bool:
    return path[0] == "blocks" and path[-1] == "kernel" and path[-2] in QUANTIZED


def _load_base(e: Experiment, mesh: jax.sharding.Mesh) -> Any:
    """Weights as `abstract_base` says. Those in 8 bits are read into the computer's memory, and
    rounded on the devices a layer at a time, which need not hold them as they were."""
    expected, folder = abstract_base(e, mesh), e.config.checkpoint
    precision = PRECISIONS.get(e.config.compute.base_precision)
    if precision is None:
        return load_generator(folder, expected, verify=False)
    host = host_memory()
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host),
        abstract_params(e.model(e.teacher), mesh, e.dtype),
    )
    weights = flatten_dict(load_generator(folder, plain, verify=False))
    round_layer = jax.jit(lambda kernel: quantize(kernel, -2, precision))

    def place(path: tuple[str, ...], leaf: Any):
        array = np.asarray(weights.pop(path))
        if not _in_low_precision(path):
            return jax.device_put(array, leaf.sharding)
        layer_place = NamedSharding(mesh, PartitionSpec(*leaf.values.sharding.spec[1:]))
        layers = [round_layer(jax.device_put(kernel, layer_place)) for kernel in array]
        stack = jax.jit(
            lambda layers: jax.tree.map(lambda *x: jnp.stack(x), *layers),
            out_shardings=jax.tree.map(lambda x: x.sharding, leaf),
        )
        return stack(layers)

    return unflatten_dict({path: place(path, x) for path, x in flatten_dict(expected).items()})


def _placed(boxed: Any, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
        nn.unbox(boxed),
        partitioning.shardings(boxed, mesh),
    )


@functools.lru_cache(maxsize=8)
def _boxed(model: Transformer) -> Any:
    return jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))


def adapter_share(e: Experiment) -> float:
    """Parameters of a network's adapters over those of the base."""
    boxed = _boxed(e.model(e.teacher))
    trees = adapters.boxed_trained(boxed, e.config.adapters), boxed
    few, all_of = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in trees)
    return few / all_of


def abstract_state(
    e: Experiment, mesh: jax.sharding.Mesh, scores: jax.sharding.Mesh | None = None
) -> TrainState:
    """The train state's shapes and places, the critic's on `scores` if that is given; nothing is
    allocated."""

    def network(name: str, config: TransformerConfig, ema: bool, mesh):
        optimizer = e.config.optimizers[name]
        return _abstract_network(e.model(config), e.config.adapters, mesh, optimizer, ema)

    generator = network("generator", e.student, e.config.ema is not None, mesh)
    critic = None
    if "critic" in e.config.optimizers:
        critic = network("critic", e.teacher, False, scores or mesh)
    return create_state(generator, critic)


@functools.lru_cache(maxsize=64)
def _abstract_network(
    model: Transformer, config: AdapterConfig, mesh, optimizer: OptimizerConfig, ema: bool
) -> Network:
    params = abstract_trained(model, config, mesh, jnp.float32)
    return create_network(params, make_optimizer(optimizer), ema=ema)


def make_meshes(e: Experiment) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh | None]:
    """The mesh, and that of the score networks if they have their own."""
    if not e.config.compute.separate_scores:
        return partitioning.make_mesh(**e.mesh_shape), None
    return split_meshes(e.mesh_shape)


def assemble(
    e: Experiment,
    mesh: jax.sharding.Mesh,
    scores: jax.sharding.Mesh | None = None,
    *,
    fresh: bool,
    verify: bool = True,
) -> tuple[DMD | SplitDMD | ODERegression, TrainState, Frozen | SplitFrozen]:
    """Loads weights onto the mesh: the stage, its state, and its frozen parts.

    Args:
      mesh, scores: from `make_meshes`.
      fresh: load the networks' starts; otherwise the state is a template for a checkpoint.
      verify: compare what will be read with its checksums first, all processes together.

    Raises:
      DamagedFile: a file is not what was written, or is missing.
    """
    c = e.config
    if verify:
        _verify(e, fresh)
    state = abstract_state(e, mesh, scores)
    stage = make_stage(e, state_shardings(state))
    if scores is not None:
        stage = SplitDMD(stage, mesh, scores)
    if fresh:
        generator = _start(e, state.generator.params)
        optimizers = {name: make_optimizer(config) for name, config in c.optimizers.items()}
        generator = create_network(generator, optimizers["generator"], ema=c.ema is not None)
        critic = None
        if state.critic is not None:
            with jax.set_mesh(scores or mesh):
                critic = _start(e, state.critic.params, critic=True)
                critic = create_network(critic, optimizers["critic"], ema=False)
        state = create_state(generator, critic)
    if scores is None:
        return stage, state, load_frozen(e, mesh)
    student = load_frozen(e, mesh, teacher=False)
    with jax.set_mesh(scores):
        return stage, state, SplitFrozen(student, load_frozen(e, scores))


def _start(e: Experiment, expected: Any, critic: bool = False) -> Any:
    """Where a network starts; the critic as the checkpoint, with adapters of zeros."""
    c, source = e.config, e.config.checkpoint if critic else e.config.generator
    model = e.model(e.teacher if critic else e.student)
    key = jax.random.key(c.seed)

    def init():
        params = init_params(model, key)
        if not c.adapters.used:
            return params
        return adapters.init_trained(params, c.adapters, jax.random.fold_in(key, 1 + critic))

    if c.adapters.used and (critic or not source):
        places = jax.tree.map(lambda x: x.sharding, expected)
        return jax.jit(init, out_shardings=places)()
    if e.stored is not None:
        return place_stored(source, e.stored.read(), expected, NEW_PARAMETERS, init)
    source = source or c.checkpoint
    is_run = (locate(source) / "checkpoints").is_dir()
    return load_generator(
        source,
        expected,
        which=c.generator_weights if is_run else "params",
        allow_new=() if critic else NEW_PARAMETERS,
        init=init,
        verify=False,
    )


def _verify(e: Experiment, fresh: bool) -> None:
    """Each file once, however many networks start from it."""
    c = e.config
    components = ["connectors"]
    if _has_teacher(e) or (fresh and not c.generator):
        components.append("transformer")
    checkpoints.verify_components(c.checkpoint, components)
    if fresh and c.generator and e.stored is None:
        verify_generator(c.generator)


def abstract_connectors(e: Experiment, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and places of what makes contexts from stored features."""
    module = TextConnectors(e.connectors, e.dtype)
    length = e.connectors.num_registers

    def init():
        video = jnp.zeros((1, length, e.connectors.video_dim))
        audio = jnp.zeros((1, length, e.connectors.audio_dim))
        mask = jnp.ones((1, length), bool)
        return module.init(jax.random.key(0), video, audio, mask, method="contexts")["params"]

    return _placed(jax.eval_shape(init), mesh, e.dtype)


def abstract_frozen(e: Experiment, mesh: jax.sharding.Mesh) -> Frozen:
    """What `load_frozen` will return, as shapes and places."""
    connectors = abstract_connectors(e, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    teacher = abstract_base(e, mesh) if _has_teacher(e) else None
    if e.config.stage == "stage2":
        return Frozen(teacher, connectors, None)
    negative = jax.eval_shape(_text_contexts(e), connectors, _abstract_text(e, 1, everywhere))
    negative = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), negative
    )
    return Frozen(teacher, connectors, negative)


def abstract_batch(e: Experiment, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of stored features, of clips where something is given, and of trajectories in stage
    II, as shapes and places."""
    rows, size = partitioning.batch_sharding(mesh), e.config.batch_size
    batch = _abstract_text(e, size, rows)
    channels = {"video": e.teacher.video_channels, "audio": e.teacher.audio_channels}
    tokens = {"video": e.clip.video_tokens, "audio": e.clip.audio_frames}
    if e.config.stage != "stage2":
        if not e.config.conditions.gives:
            return batch
        return batch | {
            name: jax.ShapeDtypeStruct(
                (size, tokens[name], channels[name]), jnp.bfloat16, sharding=rows
            )
            for name in tokens
        }
    states = len(e.sigmas)
    shapes = {"sigmas": ((size, states), jnp.float32)}
    for name in tokens:
        shape = (tokens[name], channels[name])
        shapes[name] = ((size, states, *shape), jnp.bfloat16)
        shapes[f"{name}_velocity"] = ((size, states - 1, *shape), jnp.bfloat16)
    for name, shape in getattr(e.data.manifest, "mask_shapes", {}).items():
        shapes[name] = ((size, *shape), jnp.float32)
    return batch | {
        name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in shapes.items()
    }


def _abstract_text(e: Experiment, size: int, sharding) -> dict[str, jax.ShapeDtypeStruct]:
    m = e.data.manifest
    widths = {"video_features": m.video_dim, "audio_features": m.audio_dim}
    if m.shared_features:
        del widths["audio_features"]
    text = {
        name: jax.ShapeDtypeStruct((size, m.text_length, width), jnp.bfloat16, sharding=sharding)
        for name, width in widths.items()
    }
    mask = jax.ShapeDtypeStruct((size, m.text_length), jnp.bool_, sharding=sharding)
    return text | {"mask": mask}


def load_frozen(e: Experiment, mesh: jax.sharding.Mesh, *, teacher: bool = True) -> Frozen:
    """Teacher, connectors and the negative prompt's contexts, in the compute dtype."""
    c = e.config
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights = None
    if _has_teacher(e) and teacher:
        weights = _load_base(e, mesh)
    places = jax.tree.map(lambda x: x.sharding, abstract_connectors(e, mesh))

    def place(path: tuple[str, ...], shape: tuple[int, ...]):
        del shape
        node = places
        for name in path:  # stored features are projected already: the projection has no place
            node = node.get(name, everywhere) if isinstance(node, dict) else node
        return node

    connectors = checkpoints.load_params(
        c.checkpoint, "connectors", dtype=e.dtype, sharding=place, verify=False
    )
    connectors = {name: connectors[name] for name in places}
    if weights is None or c.stage == "stage2":
        return Frozen(weights, connectors, None)
    negative = text_arrays(e.data.negative, e.data.manifest)
    negative = {name: jax.device_put(x[None], everywhere) for name, x in negative.items()}
    contexts = jax.jit(_text_contexts(e), out_shardings=everywhere)
    return Frozen(weights, connectors, contexts(connectors, negative))


def _has_teacher(e: Experiment) -> bool:
    """Whether its weights are frozen parts: also as the base of adapters."""
    return e.config.stage != "stage2" or e.config.adapters.used


def _text_contexts(e: Experiment) -> Callable[[Any, dict[str, Any]], dict[str, jax.Array]]:
    """(parameters of the connectors, stored text) -> contexts, under the names that a batch has."""
    text = TextInput(TextConnectors(e.connectors, e.dtype))
    names = ("video_context", "audio_context")
    return lambda params, batch: dict(zip(names, text.contexts(params, batch), strict=True))
