"""What a stream needs, against the shapes of what it makes; and what is chosen for a memory."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import synthetic
from launch import fit, stream
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import student, weights
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.scaling import fitting
from omniforcing_jax.scaling.devices import GIB
from omniforcing_jax.scaling.fitting import StreamSettings

AS_TRAINED = StreamSettings("none", None, 7, tiny=False)
FREE = {"quantize", "cache_dtype", "window", "tiny"}
DECODERS = {"video": int(1.1e9), "tiny": int(2e7), "sound": int(2.5e8)}


@functools.cache
def full(version: str):
    """The 19B model at 512 x 768, with a tiny decoder: its config, rollout and shapes."""
    metadata = synthetic.metadata("full", version)
    config = PipelineConfig.from_metadata(metadata, f"{version}.0")
    config = dataclasses.replace(config, tiny_decoder=TinyDecoderConfig())
    cache = CacheConfig(BlockLayout.from_name("prefix", frame_rate=24.0))
    model = Transformer(config.transformer)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return config, config.rollout(512, 768, cache=cache), shapes


def needs(version: str, settings: StreamSettings) -> fitting.StreamNeeds:
    config, rollout, shapes = full(version)
    how = {"dtype": jnp.bfloat16, "text_length": 1024, "latents": 5}
    return fitting.needs(config, rollout, settings, shapes, DECODERS, **how)


def chosen(version: str, memory: float) -> StreamSettings | None:
    steps = fitting.ladder(AS_TRAINED, FREE, tiny=True)
    room = fitting.USABLE * memory * GIB
    return next((s for s in steps if needs(version, s).total <= room), None)


@pytest.mark.parametrize("text_adaln", [False, True])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_sums_are_the_bytes_of_what_is_made(dtype, text_adaln):
    config = tiny(text_adaln=text_adaln, gated_attention=text_adaln)
    model = Transformer(config, jnp.bfloat16)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    layout = BlockLayout(1, 2, 1, 3)
    rollout = RolloutConfig(CacheConfig(layout, window=2, dtype=dtype), (1.0, 0.5, 0.0), 1, 4)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    for quantize in ("none", "int8", "w8a8-fp8"):
        made = jax.eval_shape(functools.partial(weights.per_layer, quantize=quantize), half)
        assert fitting.weights_bytes(shapes, 2, quantize) == size(made)
    contexts = [jax.ShapeDtypeStruct((1, 6, d), jnp.bfloat16) for d in config.text_dims]
    how = {"levels": rollout.text_levels(frozen=False), "dtype": dtype}
    text = jax.eval_shape(functools.partial(student.prompt_kv, model, **how), half, *contexts)
    assert fitting.text_bytes(config, rollout, 6, 2, int8=dtype is not None) == size(text)


def test_what_is_chosen_for_the_19b_model():
    """docs/scaling.md: the sums by card; 24 GB would need weights in 4 bits."""
    found = needs("2.0", AS_TRAINED)
    assert found.weights / GIB == pytest.approx(35.2, abs=0.1)
    assert found.cache / GIB == pytest.approx(10.7, abs=0.1)
    assert found.text / GIB == pytest.approx(1.1, abs=0.1)
    for version in ("2.0", "2.3"):
        assert chosen(version, 79.1) == AS_TRAINED  # 80 GB
        in_int8 = chosen(version, 44.7)  # 48 GB
        assert (in_int8.quantize, in_int8.window, in_int8.tiny) == ("int8", 7, False)
        for memory in (29.8, 31.25):  # 32 GB; TPU v6e
            small = chosen(version, memory)
            assert (small.quantize, small.cache_dtype) == ("int8", "int8") and small.window >= 3
        assert chosen(version, 22.4) is None  # 24 GB
    assert chosen("2.3", 29.8) == StreamSettings("int8", "int8", 3, tiny=True)


def test_what_is_given_stays():
    given = StreamSettings("fp8", None, 5, tiny=False)
    steps = list(fitting.ladder(given, {"cache_dtype"}, tiny=True))
    assert steps == [given, dataclasses.replace(given, cache_dtype="int8")]
    windows = [s.window for s in fitting.ladder(given, {"window"})]
    assert windows == [5, 4, 3]
    assert [s.quantize for s in fitting.ladder(AS_TRAINED, {"quantize"}, precision="fp8")] == [
        "none",
        "fp8",
    ]


def test_of_the_program(random_checkpoint, tmp_path, monkeypatch, capsys):
    """--fit says what it chose; without it a stream that may not fit is told so, and one whose
    weights cannot is refused; before anything is read."""
    size = ["--prompt", "x", "--random-features", "--height", "64", "--width", "64"]
    output = ["--bidirectional", "--output", str(tmp_path / "clip.mp4")]
    words = ["--checkpoint", str(random_checkpoint("2.0")), *size, *output]

    def asked(memory: float, *more: str) -> argparse.Namespace:
        monkeypatch.setattr(fit, "memory_bytes", lambda: int(memory))
        args = stream.parse_arguments([*words, *more])
        _, request = stream.check_request(args)
        assert request.rollout.cache.window == (args.window or 7)
        assert request.rollout.cache.dtype == args.cache_dtype
        return args

    assert asked(1e12).quantize == "none"
    assert capsys.readouterr().err == ""
    args = asked(1e12, "--fit")
    assert "--fit: everything as it is: 0.0 GiB" in capsys.readouterr().err
    config = PipelineConfig.from_checkpoint(random_checkpoint("2.0"))
    rollout = config.rollout(64, 64, cache=CacheConfig(config.layout("prefix", 24.0)))
    stream_of = fit._Stream(args, config, rollout, False, 1)
    whole = stream_of.needs(stream_of.asked).total
    found = {}
    for share in np.arange(1.0, 0.2, -0.05):  # of what it needs as it is
        memory = share * whole / fitting.USABLE + 1
        monkeypatch.setattr(fit, "memory_bytes", lambda memory=memory: int(memory))
        args.quantize, args.cache_dtype, args.window = "none", None, None
        try:
            fit.fit(args, config, rollout, encoders=False)
        except ValueError as error:
            assert "at the least a stream takes" in str(error)
            break
        found[share] = args.quantize, args.cache_dtype, args.window
    assert set(found.values()) == {("none", None, 7), ("int8", "int8", 7)}  # decoding is the most
    capsys.readouterr()
    asked(min(found) * whole / fitting.USABLE + 1)
    assert "--fit would choose --quantize int8" in capsys.readouterr().err
    asked(memory)
    assert "nothing would fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="leave --keep-encoder"):
        asked(1e12, "--fit", "--keep-encoder")
    with pytest.raises(ValueError, match="the stream takes some"):
        asked(1e4)
