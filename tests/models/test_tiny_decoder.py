"""The tiny decoder: from TAEHV's files into a checkpoint, against its code."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoint_converters import tiny_decoder
from checkpoint_converters.reading import read_metadata
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.tiny_decoder import (
    TinyDecoderConfig,
    decode_chunk,
    decoder_flops,
    init_params,
)
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.streaming.video import StreamingVideoDecoder, to_uint8
from tests.checkpoint_converters.files import read_file, rewrite_file, write_file

decode = jax.jit(decode_chunk, static_argnames=("config", "dtype"))


@pytest.fixture(scope="module")
def source(golden_dir, tmp_path_factory):
    """The golden file under a name that says which LTX-2 it is for."""
    file = tmp_path_factory.mktemp("taehv") / "taeltx_2.safetensors"
    return rewrite_file(golden_dir / "conditions" / "taeltx2_tiny.safetensors", file)


@pytest.fixture(scope="module")
def vae(golden_dir):
    return read_metadata(golden_dir / "ltx2_tiny.safetensors")["config"]["vae"]


@pytest.fixture
def checkpoint(vae, tmp_path):
    """A converted LTX-2.0 of which nothing but the description is there."""
    content = {"format": checkpoints.FORMAT, "family": "ltx2", "model_version": "2.0.0"}
    content |= {"config": {"vae": vae}, "components": []}
    (tmp_path / "ltx2").mkdir()
    checkpoints.write_json(tmp_path / "ltx2" / "config.json", content)
    return tmp_path / "ltx2"


def main(*words):
    return tiny_decoder.main(list(map(str, words)))


def load(checkpoint):
    content = checkpoints.load_config(checkpoint)
    metadata = checkpoints.component_metadata(content, "tiny_decoder")
    params = checkpoints.load_params(checkpoint, "tiny_decoder", dtype=jnp.float32)
    return TinyDecoderConfig.from_metadata(metadata), params


@pytest.mark.default_xla
def test_parity_whole_and_streamed(golden_dir, source, checkpoint, vae, tmp_path):
    assert not main("--input", source, "--checkpoint", checkpoint)
    config, params = load(checkpoint)
    assert config == TinyDecoderConfig(6, (32, 16, 8, 8), 4)
    expected = np.load(golden_dir / "conditions" / "taeltx2_expected.npz")
    latents = np.moveaxis(expected["tae_latents"], 2, -1)
    reference = np.moveaxis(expected["tae_decode_every_third"], 2, -1)
    video, _ = decode(config, params, latents)
    found = np.clip((np.asarray(video) + 1) / 2, 0, 1)
    np.testing.assert_allclose(found[:, ::3], reference, atol=2e-5)
    assert reference.std() > 0.1

    decoder = StreamingVideoDecoder(
        VideoVAEConfig.from_metadata(vae), params, mode="tiny", tiny=config
    )
    state, chunks = decoder.init(1, 64, 64), []
    for begin, end in ((0, 1), (1, 2), (2, 4)):
        state, frames = decoder.push(state, latents[:, begin:end])
        chunks.append(np.asarray(frames))
        if end == 2:
            for name, kept in state.cache.items():
                memory = expected[f"tae_stream_memory_after1/{name.removeprefix('layers_')}"]
                np.testing.assert_allclose(kept[:, 0], np.moveaxis(memory, 1, -1), atol=2e-5)
            assert len(state.cache) == 9
    state, rest = decoder.flush(state)
    assert [chunk.shape[1] for chunk in chunks] == [1, 8, 16] and rest.shape == (1, 0, 64, 64, 3)
    assert state.num_latents == 0 and bool(state.finite)
    difference = np.concatenate(chunks, axis=1).astype(int) - np.asarray(to_uint8(video))
    assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 1e-3

    # The same file as PyTorch's own.
    arrays, _ = read_file(source)
    tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    torch.save(tensors, tmp_path / "taeltx_2.pth")
    again = ("--input", tmp_path / "taeltx_2.pth", "--checkpoint", checkpoint)
    assert main(*again) == 2
    assert not main(*again, "--overwrite")
    jax.tree.map(np.testing.assert_array_equal, load(checkpoint)[1], params)
    # Checked like the other components.
    leaf = max((checkpoint / "tiny_decoder.new").rglob("*"), key=lambda f: f.stat().st_size)
    content = leaf.read_bytes()
    leaf.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(checkpoints.DamagedFile):
        load(checkpoint)


class Runs:
    """Something that would run code when it is unpickled."""

    def __reduce__(self):
        return exit, (7,)


def test_what_is_refused(source, checkpoint, tmp_path, monkeypatch):
    arrays, _ = read_file(source)

    def add(name, change=None, **options):
        changed = dict(arrays)
        if change is not None:
            change(changed)
        tiny_decoder.add(write_file(tmp_path / name, changed), checkpoint, **options)

    def widen(arrays):
        arrays["decoder.4.conv.0.weight"] = np.zeros((32, 63, 3, 3), np.float16)
        del arrays["decoder.9.conv.2.bias"]
        arrays["decoder.21.weight"] = np.zeros(3, np.float16)

    def other_latents(arrays):
        arrays["decoder.1.weight"] = np.zeros((32, 7, 3, 3), np.float16)

    for name, change, messages in (
        ("taeltx2_3.safetensors", None, ["LTX-2 2.3 and 2.5", "an LTX-2 2.0.0", "--any-version"]),
        ("x.safetensors", None, ["does not say which"]),
        ("taeltx_2.safetensors", other_latents, ["latents of 7 channels", "have 6"]),
        ("taeltx_2.safetensors", dict.clear, ["no tiny decoder in the layout"]),
        (
            "taeltx_2.safetensors",
            widen,
            ["wide is built otherwise", "has shape (32, 63, 3, 3), must be (32, 64, 3, 3)",
             "decoder.9.conv.2.bias: missing", "decoder.21.weight: is unknown"],
        ),
    ):  # fmt: skip
        with pytest.raises(ConversionError) as caught:
            add(name, change)
        for message in messages:
            assert message in str(caught.value)
    torch.save({"decoder.1.weight": Runs()}, tmp_path / "taeltx_2.pth")
    with pytest.raises(ConversionError, match="no plain weights in it"):
        tiny_decoder.add(tmp_path / "taeltx_2.pth", checkpoint)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match="use safetensors/taeltx_2"):
        tiny_decoder.add(tmp_path / "taeltx_2.pth", checkpoint)
    assert [file.name for file in checkpoint.iterdir()] == ["config.json"]
    add("x.safetensors", any_version=True)


def test_published_size():
    """10.19 M parameters, 0.21 TFLOP for a second of 512x768: three latents of 16x24."""
    config = TinyDecoderConfig()
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(10.19e6, rel=1e-3)
    latents = jax.ShapeDtypeStruct((1, 3, 16, 24, 128), jnp.float32)
    counted = decoder_flops(config, 3 * 16 * 24)
    assert counted == pytest.approx(0.209e12, rel=0.01)
    analysis = decode.lower(config, shapes, latents).cost_analysis()
    assert counted == pytest.approx(analysis["flops"], rel=0.05)
