"""Adapters over a frozen base: the base at zero, merged weights, gradients, what is not trained."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from checkpoint_converters import adapter_files, synthetic
from checkpoint_converters.key_map import find_place
from checkpoint_converters.safetensors_io import ConversionError
from launch import dry_run
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models import quantization
from omniforcing_jax.models.lora import layers_of
from omniforcing_jax.models.transformer.config import TransformerConfig, tiny
from omniforcing_jax.models.transformer.layers import linear
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params
from omniforcing_jax.sampling.whole_clip import clip_velocity
from omniforcing_jax.training import adapters, assembly
from omniforcing_jax.training.adapters import AdapterConfig
from omniforcing_jax.training.config.experiment import make_stage
from omniforcing_jax.training.parameter_trees import by_path
from omniforcing_jax.training.state import state_shardings
from tests.checkpoint_converters.files import write_file
from tests.tiny_model import QUICK_COMPILE, random_contexts, random_latents, random_params

CLIP = ClipGeometry.from_blocks(BlockLayout(1, 1, 1, 2), 2, 1, 1)
CONFIG = AdapterConfig(
    products=("video_attn", "audio_ff", "a2v_attn"), ranks=(2, 3, 1), alphas=(4.0,)
)


@pytest.fixture(scope="module")
def network():
    """A remat'ed model of two layers, its base, adapters of zeros and of random numbers, and one
    jitted (base, trained) -> velocities and the trained tree's gradient."""
    model = Transformer(dataclasses.replace(tiny(), num_layers=2), remat="full")
    base = random_params(model.config, 1)
    zero = adapters.init_trained(base, CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), zero)
    x = random_latents(model.config, CLIP.video_tokens, CLIP.audio_frames)
    contexts = random_contexts(model.config)

    def velocity(model, params):
        cast = jax.tree.map(lambda a: a.astype(jax.tree.leaves(params)[0].dtype), (x, contexts))
        out = clip_velocity(model, params, cast[0], jnp.full((1,), 0.5), cast[1], CLIP)
        return out, sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(out))

    @jax.jit
    def adapted(base, trained):
        over = adapters.Adapted(model, base, CONFIG)
        gradient = jax.grad(lambda t: velocity(over, t)[1])(trained)
        return velocity(over, trained)[0], gradient

    plain = jax.jit(lambda params: velocity(model, params)[0], compiler_options=QUICK_COMPILE)
    return model, base, zero, moved, adapted, plain


def test_the_base_at_zero_and_merged_weights(network):
    _, base, zero, moved, adapted, plain = network
    expected = plain(base)
    jax.tree.map(np.testing.assert_array_equal, adapted(base, zero)[0], expected)
    found = adapted(base, moved)[0]
    merged = plain(adapters.merged(base, moved, CONFIG))
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    assert all(np.abs(np.asarray(a) - b).max() > 1e-2 for a, b in leaves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, merged)


def test_gradients_are_finite_differences(network):
    """Along one direction of each adapter matrix, of weights in float64."""
    model, base, _, moved, _, _ = network
    with jax.enable_x64():
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)  # noqa: E731
        model = model.clone(dtype=jnp.float64)
        base, moved = wide(base), wide(moved)
        x = wide(random_latents(model.config, CLIP.video_tokens, CLIP.audio_frames))
        contexts = wide(random_contexts(model.config))

        @jax.jit
        def value_and_grad(trained):
            def loss(trained):
                over = adapters.Adapted(model, base, CONFIG)
                level = jnp.full((1,), 0.5)
                out = clip_velocity(over, trained, x, level, contexts, CLIP)
                return sum(jnp.sum(jnp.sin(v.astype(jnp.float64))) for v in jax.tree.leaves(out))

            return jax.value_and_grad(loss)(trained)

        gradient = flatten_dict(value_and_grad(moved)[1])
        rng = np.random.default_rng(1)
        flat = flatten_dict(moved)
        for path in list(flat)[:6]:
            direction = rng.standard_normal(flat[path].shape)

            def at(step, path=path, direction=direction):
                there = flat | {path: flat[path] + step * direction}
                return float(value_and_grad(unflatten_dict(there))[0])

            slope = (at(1e-3) - at(-1e-3)) / 2e-3
            expected = float(np.sum(np.asarray(gradient[path]) * direction))
            np.testing.assert_allclose(slope, expected, rtol=2e-2, atol=2e-3, err_msg=str(path))


def test_over_a_kernel_in_8_bits():
    """As over the numbers that it stands for; gradients of the adapters as well."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    x, bias, module = draw(2, 5, 16), draw(24), linear(24, ("embed", "mlp"), jnp.float32)
    rounded = quantization.quantize(draw(16, 24), -2, quantization.PRECISIONS["int8"])

    def loss(trained, kernel):
        y = module.apply({"params": {"kernel": kernel, "bias": bias, **trained}}, x)
        return jnp.sum(jnp.sin(y)), y

    trained = {"lora_A": draw(16, 3), "lora_B": draw(3, 24)}
    found, expected = (
        jax.grad(loss, has_aux=True)(trained, kernel)
        for kernel in (rounded, quantization.dequantize(rounded, jnp.float32))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_only_adapters_and_new_parameters_are_trained():
    config = dataclasses.replace(tiny(), num_audio_sinks=2, extra_qk_norm=True, num_layers=2)
    boxed = jax.eval_shape(lambda: init_boxed_params(Transformer(config), jax.random.key(0)))
    trained = flatten_dict(adapters.boxed_trained(boxed, CONFIG))
    names = {path[-1] for path in trained}
    assert names == {"lora_A", "lora_B", "scale", "audio_sinks"}
    down, up = (trained["blocks", "audio_ff", "up", name] for name in ("lora_A", "lora_B"))
    width = config.audio_dim
    assert (down.value.shape, up.value.shape) == ((2, width, 3), (2, 3, 4 * width))
    assert (down.names, up.names) == (("layers", "embed", None), ("layers", None, "mlp"))
    assert not any(path[1:2] == ("audio_attn",) and path[-1] == "lora_A" for path in trained)


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"products": ("attn",), "ranks": (4,)}, "there is no product attn"),
        ({"ranks": (4, 8)}, "ranks must be one number for all, or one for each of the 8"),
        ({"ranks": (0,)}, "ranks must be 1 or more"),
        ({"ranks": (4,), "alphas": (-1.0,)}, "alphas must be positive"),
        ({"alphas": (4.0,)}, "alphas need ranks"),
    ],
)
def test_bad_settings_are_refused(bad, text):
    with pytest.raises(ValueError, match=text):
        AdapterConfig(**bad)


def _results(jaxpr):
    """Shapes of the results of all equations, and of those inside them."""
    for equation in jaxpr.eqns:
        yield from (getattr(v.aval, "shape", ()) for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _results(inner)


@pytest.mark.parametrize("ranks", [(4,), pytest.param((), marks=pytest.mark.slow)])
def test_frozen_weights_have_no_gradient_and_no_optimizer_state(ranks):
    """In the program of a critic's update; with all weights trained the same search finds them."""
    changes = {"sample_every": 0, "student.timesteps": (1000.0, 725.0), "adapters.ranks": ranks}
    c = dry_run.stage_config("stage1", "tiny-lora", changes)
    e = dry_run.make_experiment(c, 1, size="tiny", layers=2, text_length=128)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = assembly.abstract_state(e, mesh)
        frozen = assembly.abstract_frozen(e, mesh)
        stage = make_stage(e, state_shardings(state))
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        traced = stage.critic_step.trace(state, frozen, assembly.abstract_batch(e, mesh), seed)
    kernels = {
        x.shape
        for path, x in flatten_dict(frozen.teacher).items()
        if path[0] == "blocks" and path[-1] == "kernel"
    }
    arguments = jax.tree.leaves(traced.args_info)
    assert kernels and kernels <= {x.shape for x in arguments if not x.donated}
    assert bool(kernels & {x.shape for x in arguments if x.donated}) == (not ranks)
    held = {x.shape for x in jax.tree.leaves(traced.out_info)}
    assert bool(kernels & held) == (not ranks)
    assert bool(kernels & set(_results(traced.jaxpr.jaxpr))) == (not ranks)


def test_the_tensors_of_an_exported_lora_are_what_is_merged(network):
    """Keys and layout of LTX-2's trainer, read back by the table of official names."""
    _, base, _, moved, _, _ = network
    tensors = adapter_files.tensors(moved, CONFIG)
    names, stray, others = layers_of(tensors)
    assert not stray and not others
    assert "diffusion_model.transformer_blocks.1.attn1.to_out.0" in names
    merged, flat = flatten_dict(adapters.merged(base, moved, CONFIG)), flatten_dict(base)
    changed = set()
    for name, keys in names.items():
        place = find_place(f"model.{name}.weight")
        path = tuple(place.path.split("/"))
        found = flat[path][place.layer] + (tensors[keys.up]() @ tensors[keys.down]()).T
        np.testing.assert_allclose(found, merged[path][place.layer], atol=1e-6)
        changed.add((path, place.layer))
    assert len(changed) == 2 * (4 + 2 + 4)  # layers of attentions and feed-forward
    with pytest.raises(ValueError, match="cannot hold what the run trains"):
        adapter_files.tensors(moved | {"audio_sinks": jnp.zeros((2, 4))}, CONFIG)


def test_a_lora_file_as_start(tmp_path):
    """Read back as it was trained; what does not fit is said in words, all of it."""
    content = {
        "model_version": "2.0.0",
        "config": synthetic.metadata("tiny", "2.0", 2),
        "fingerprints": {"transformer": "abc"},
    }
    model = Transformer(TransformerConfig.from_metadata(content["config"]["transformer"], "2.0.0"))
    boxed = jax.eval_shape(lambda: init_boxed_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(x.shape, np.float32)  # noqa: E731
    trained = jax.tree.map(draw, nn.unbox(adapters.boxed_trained(boxed, CONFIG)))
    arrays = {key: make() for key, make in adapter_files.tensors(trained, CONFIG).items()}

    def start(config=CONFIG, content=content, rename=str, **strings):
        named = {rename(key): x for key, x in arrays.items()}
        file = write_file(tmp_path / "lora.safetensors", named, strings)
        return adapter_files.stored(file, content, config)

    found = start(base="abc", model_version="2.0.1", trained='{"text_length": 77}')
    assert found.trained.text_length == 77
    leaves, expected = found.read(), by_path(trained)
    assert leaves.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(leaves[name], x, rtol=1e-6)

    other = content | {"config": synthetic.metadata("tiny", "2.0", 1)}
    for kwargs, text in (
        ({"base": "xyz"}, r"over another transformer .* \(fingerprints xyz and abc\)"),
        ({"model_version": "2.3.0"}, "was made for version 2.3.0, the checkpoint is 2.0.0"),
        ({"content": other}, "blocks.1.attn1.to_k matches no layer of the model"),
        ({"rename": lambda key: key.replace("attn1", "self")}, "self.to_k matches no layer"),
        (
            {"config": AdapterConfig(CONFIG.products, (2, 4, 1))},
            "audio_ff has rank 3, the config 4",
        ),
        ({"config": AdapterConfig(("video_attn",), (2,))}, "is none of adapters.products"),
        (
            {"config": AdapterConfig((*CONFIG.products, "v2a_attn"), (2, 3, 1, 1))},
            "has no transformer_blocks.0.video_to_audio_attn.to_k.weight, which the stage trains",
        ),
    ):
        with pytest.raises(ConversionError) as error:
            start(**kwargs)
        assert re.search(text, "\n".join(error.value.problems)), error.value
