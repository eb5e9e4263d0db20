"""The key table against every tensor of the published LTX-2.0 and 2.3 checkpoints."""

import ast
import copy
import csv
import gzip
import pathlib

import numpy as np
import pytest

from checkpoint_converters import key_map, shapes, synthetic
from checkpoint_converters.contents import owner
from checkpoint_converters.diffusers_layout import official_from_diffusers
from omniforcing_jax.io.checkpoints import COMPONENTS
from omniforcing_jax.models.video_vae.model import VideoVAEConfig

DATA = pathlib.Path(__file__).parents[1] / "golden"
COMPONENT = {"vae": "video_vae"}


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def published(request):
    """(version, [(component, official key, shape, diffusers key)]) of the real checkpoint."""
    with gzip.open(DATA / f"ltx{request.param}_keys.tsv.gz", "rt") as file:
        rows = [
            (
                COMPONENT.get(row["component"], row["component"]),
                row["single_file_key"],
                tuple(ast.literal_eval(row["shape"])),
                row["diffusers_key"],
            )
            for row in csv.DictReader(file, delimiter="\t")
        ]
    return request.param, rows


def test_every_published_tensor_has_one_place_and_comes_back(published):
    version, rows = published
    assert len(rows) == {"2.0": 4049, "2.3": 5947}[version]
    places = set()
    for component, key, shape, _ in rows:
        target = key_map.find_place(key)
        assert target is not None, key
        assert target.component == component == owner(key)
        target.transform.shape(shape)  # raises if the rank is wrong
        assert key_map.is_stacked(target.path) == (target.layer is not None)
        assert key_map.official_key(component, target.path, target.layer) == (
            key,
            target.transform,
        )
        places.add((component, target.path, target.layer))
    assert len(places) == len(rows)


def test_diffusers_names_map_onto_the_official_ones(published):
    _, rows = published
    for component in COMPONENTS:
        ours = [row for row in rows if row[0] == component]
        names = official_from_diffusers(component, [row[3] for row in ours])
        assert names == {row[3]: row[1] for row in ours}


def test_expected_shapes_equal_the_published_ones(published):
    version, rows = published
    config = synthetic.metadata("full", version)
    expected = {}
    for component in COMPONENTS:
        expected |= shapes.expected_shapes(config, component)
    assert set(expected) == {row[1] for row in rows}
    for _, key, shape, _ in rows:
        found = expected[key]
        assert len(found) == len(shape)
        assert all(f in (n, shapes.ANY) for f, n in zip(found, shape, strict=True)), (
            key,
            found,
            shape,
        )


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_absent_multipliers_are_those_of_the_reference(version):
    """2 in the encoder, 1 in the decoder; the model reads the same."""
    config = synthetic.metadata("tiny", version)
    bare = copy.deepcopy(config)
    removed = 0
    for side, default in (("encoder", 2), ("decoder", 1)):
        for name, settings in bare["vae"][f"{side}_blocks"]:
            if name != "res_x" and settings["multiplier"] == default:
                del settings["multiplier"]
                removed += 1
    assert removed == {"2.0": 4, "2.3": 4}[version]
    expected = shapes.expected_shapes(config, "video_vae")
    assert shapes.expected_shapes(bare, "video_vae") == expected
    model = VideoVAEConfig.from_metadata(config["vae"])
    assert VideoVAEConfig.from_metadata(bare["vae"]) == model


@pytest.mark.parametrize(
    ("key", "component", "path", "layer"),
    [
        ("model.diffusion_model.patchify_proj.weight", "transformer", "video_in/kernel", None),
        (
            "model.diffusion_model.transformer_blocks.11.audio_to_video_attn.to_out.0.bias",
            "transformer",
            "blocks/a2v_attn/out/bias",
            11,
        ),
        (
            "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.ff.net.2.weight",
            "connectors",
            "audio_connector/blocks/ff/down/kernel",
            1,
        ),
        (
            "vae.encoder.down_blocks.3.conv.conv.weight",
            "video_vae",
            "encoder/down_blocks_3/conv/kernel",
            None,
        ),
        (
            "audio_vae.decoder.mid.block_2.conv1.conv.bias",
            "audio_vae",
            "decoder/mid/block_2/conv1/bias",
            None,
        ),
        (
            "audio_vae.encoder.down.0.downsample.conv.weight",
            "audio_vae",
            "encoder/down_0/downsample/kernel",
            None,
        ),
        (
            "vocoder.resblocks.3.convs1.0.weight",
            "vocoder",
            "resblocks_3/convs1_0/kernel",
            None,
        ),
        (
            "vocoder.bwe_generator.act_post.downsample.lowpass.filter",
            "vocoder",
            "bwe_generator/act_post/downsample/lowpass/filter",
            None,
        ),
    ],
)
def test_examples(key, component, path, layer):
    target = key_map.find_place(key)
    assert (target.component, target.path, target.layer) == (component, path, layer)


@pytest.mark.parametrize(
    ("key", "shape", "ours"),
    [
        ("vae.decoder.conv_in.conv.weight", (7, 5, 2, 3, 4), (2, 3, 4, 5, 7)),
        ("audio_vae.decoder.conv_in.conv.weight", (7, 5, 2, 3), (2, 3, 5, 7)),
        ("vocoder.conv_pre.weight", (7, 5, 3), (3, 5, 7)),
        ("vocoder.ups.0.weight", (7, 5, 3), (3, 7, 5)),
        ("model.diffusion_model.proj_out.weight", (7, 5), (5, 7)),
        ("model.diffusion_model.audio_sink_tokens", (1, 7, 5), (7, 5)),
    ],
)
def test_transforms_and_their_inverses(key, shape, ours):
    transform = key_map.find_place(key).transform
    array = np.arange(np.prod(shape)).reshape(shape)
    moved = transform.apply(array)
    assert moved.shape == ours == transform.shape(shape)
    np.testing.assert_array_equal(transform.invert(moved), array)


def test_a_linear_kernel_is_transposed_and_a_transposed_convolution_is_not_flipped():
    linear = key_map.find_place("model.diffusion_model.proj_out.weight").transform
    array = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(linear.apply(array), array.T)
    up = key_map.find_place("vocoder.ups.0.weight").transform
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(up.apply(array)[1], array[:, :, 1])


def test_unknown_and_ignored_keys():
    assert (
        key_map.find_place("model.diffusion_model.transformer_blocks.0.attn3.to_q.weight") is None
    )
    assert key_map.find_place("model.diffusion_model.transformer_blocks.01.attn1.to_q.bias") is None
    assert key_map.is_ignored("vae.per_channel_statistics.mean-of-stds")
    assert not key_map.is_ignored("vae.per_channel_statistics.mean-of-means")
    with pytest.raises(ValueError, match="no official key"):
        key_map.official_key("transformer", "video_in/scale")


def test_wrong_rank_is_refused():
    transform = key_map.find_place("vae.decoder.conv_in.conv.weight").transform
    with pytest.raises(ValueError, match="5 axes"):
        transform.shape((1, 2, 3, 4))
