"""Converters: official file -> Orbax -> official file, students, shards, chunks, loading."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint_converters import (
    export,
    key_map,
    ltx2,
    omniforcing,
    orbax_io,
    reading,
    synthetic,
)
from checkpoint_converters.converting import SPLIT_AXES
from checkpoint_converters.safetensors_io import ConversionError, read_header, read_tensor
from omniforcing_jax.distributed.partitioning import parse_mesh
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import COMPONENTS
from tests.checkpoint_converters.files import read_file, write_file

ROOT = pathlib.Path(__file__).parents[2]


def raw(path, keys=None):
    """{key: (dtype code, shape, bytes)} of a safetensors file."""
    tensors, _ = read_header(path)
    return {
        key: (info.dtype_code, info.shape, read_tensor(info).tobytes())
        for key, info in tensors.items()
        if keys is None or key in keys
    }


def assert_trees_equal(actual, expected):
    """Same structure, shapes, dtypes and bits."""
    actual = jax.tree_util.tree_leaves_with_path(actual)
    expected = jax.tree_util.tree_leaves_with_path(expected)
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(random LTX-2.0 file, its conversion)."""
    folder = tmp_path_factory.mktemp("tiny")
    synthetic.write(folder / "tiny.safetensors", "tiny", "2.0")
    ltx2.convert(folder / "tiny.safetensors", folder / "ltx2")
    return folder / "tiny.safetensors", folder / "ltx2"


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ltx2_tiny", "ltx23_tiny"])
def test_round_trip_is_bitwise(golden_dir, tmp_path, name):
    """Mixed float32 and bfloat16 file; only the statistics that nobody reads are dropped."""
    source = golden_dir / f"{name}.safetensors"
    content = ltx2.convert(source, tmp_path / "out")
    assert content["components"] == list(COMPONENTS)
    assert checkpoints.load_config(tmp_path / "out") == content
    export.export(tmp_path / "out", tmp_path / "back.safetensors")
    before, after = raw(source), raw(tmp_path / "back.safetensors")
    wanted = {key for key in before if key_map.find_place(key)}
    assert after == {key: before[key] for key in wanted}
    assert set(before) - wanted == {
        f"vae.per_channel_statistics.{n}"
        for n in ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")
    }
    assert reading.read_metadata(tmp_path / "back.safetensors") == reading.read_metadata(source)


def test_restored_parameters_equal_the_file(tiny):
    source, converted = tiny
    for component in ("transformer", "connectors", "audio_vae"):
        assert_trees_equal(
            checkpoints.load_params(converted, component),
            reading.load_component(source, component),
        )


def test_plain_orbax_restores_it_too(tiny):
    source, converted = tiny
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(converted / "connectors")
    assert_trees_equal(tree, reading.load_component(source, "connectors"))


def test_dtype_option(tiny, tmp_path):
    source, _ = tiny
    ltx2.convert(source, tmp_path / "out", components=("connectors",), dtype="float32")
    tree = checkpoints.load_params(tmp_path / "out", "connectors")
    assert_trees_equal(tree, reading.load_component(source, "connectors", np.float32))


def test_fingerprints(tiny, tmp_path):
    """They tell weights apart, by name, place, dtype and content; not files or chunks."""
    source, converted = tiny
    names = ("connectors", "vocoder")
    before = checkpoints.load_config(converted)["fingerprints"]
    assert set(before) == set(COMPONENTS) and len(set(before.values())) == 5

    def fingerprints(path, **options):
        content = ltx2.convert(path, tmp_path / "out", components=names, overwrite=True, **options)
        assert checkpoints.load_config(tmp_path / "out") == content
        return content["fingerprints"]

    assert fingerprints(source, mesh={"fsdp": 4}) == {name: before[name] for name in names}
    cast = fingerprints(source, dtype="float32")
    assert all(cast[name] != before[name] for name in names)
    arrays, metadata = read_file(source)
    changed = next(key for key in arrays if key.startswith("vocoder.") and key.endswith("weight"))
    arrays[changed] *= 2
    write_file(tmp_path / "trained.safetensors", dict(sorted(arrays.items())), metadata)
    trained = fingerprints(tmp_path / "trained.safetensors")
    assert trained["connectors"] == before["connectors"]
    assert trained["vocoder"] != before["vocoder"]


# -- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout", "sinks"), [
    ("omniforcing_v1", "prefix", 16), ("omniforcing_v2", "merged", 0),
])  # fmt: skip
def test_student(golden_dir, tmp_path, name, layout, sinks):
    content = omniforcing.convert(golden_dir / name, tmp_path / "out", num_heads=4)
    reference = json.loads((golden_dir / name / "tiny_config.json").read_text())
    assert content["family"] == "omniforcing"
    assert (
        content["trained"]["layout"],
        content["config"]["transformer"]["num_audio_sink_tokens"],
    ) == (layout, sinks)
    transformer = content["config"]["transformer"]
    assert transformer["rope_type"] == "interleaved"
    assert transformer["frequencies_precision"] == "float32"
    assert transformer["num_audio_sink_tokens"] == sinks
    for ours, theirs in (
        ("num_layers", "num_layers"),
        ("attention_head_dim", "video_d_head"),
        ("audio_attention_head_dim", "audio_d_head"),
        ("in_channels", "in_channels"),
        ("caption_channels", "caption_channels"),
        ("cross_attention_dim", "cross_attention_dim"),
        ("audio_cross_attention_dim", "audio_cross_attention_dim"),
        ("av_ca_timestep_scale_multiplier", "av_ca_timestep_scale_multiplier"),
        ("timestep_scale_multiplier", "timestep_scale_multiplier"),
    ):
        assert transformer[ours] == reference[theirs]
    tree = checkpoints.load_params(tmp_path / "out", "transformer")
    assert_trees_equal(tree, reading.load_component(golden_dir / name, "transformer"))
    if sinks:
        assert tree["audio_sinks"].shape == (sinks, reference["audio_dim"])


@pytest.mark.parametrize(
    "prefix", ["model.velocity_model.", "model.diffusion_model.", "", "model."]
)
def test_student_prefixes(golden_dir, tmp_path, prefix):
    source = golden_dir / "omniforcing_v1" / "omniforcing_v1_tiny.safetensors"
    tensors, _ = read_header(source)
    arrays = {prefix + k.removeprefix("model."): read_tensor(t) for k, t in tensors.items()}
    arrays["vocoder.anything"] = np.zeros(3, np.float32)  # other components are not taken
    write_file(tmp_path / "renamed.safetensors", arrays)
    found = reading.open_checkpoint(tmp_path / "renamed.safetensors").tensors
    expected = {f"{key_map.DIT}{k.removeprefix('model.')}" for k in tensors}
    assert set(found) == expected | {"vocoder.anything"}


def test_student_with_base(tiny, tmp_path):
    """Everything but the transformer comes from the base, converted or not."""
    source, converted = tiny
    tensors, _ = read_header(source)
    arrays = {
        "model." + key.removeprefix(key_map.DIT): read_tensor(info)
        for key, info in tensors.items()
        if key_map.find_place(key).component == "transformer"
    }
    write_file(tmp_path / "student.safetensors", arrays)
    for name, base in (("a", source), ("b", converted)):
        out = tmp_path / name
        content = omniforcing.convert(tmp_path / "student.safetensors", out, base=base, num_heads=4)
        assert content["components"] == list(COMPONENTS)
        assert content["fingerprints"] == checkpoints.load_config(converted)["fingerprints"]
        teacher = checkpoints.load_config(converted)["config"]["transformer"]
        assert checkpoints.component_metadata(content, "connectors") == teacher
        assert checkpoints.component_metadata(content, "transformer")["rope_type"] == "interleaved"
        for component in ("transformer", "connectors"):
            assert_trees_equal(
                checkpoints.load_params(out, component),
                checkpoints.load_params(converted, component),
            )
    export.export(tmp_path / "b", tmp_path / "back.safetensors", components=("transformer",))
    back = raw(tmp_path / "back.safetensors")
    assert {"model." + k.removeprefix(key_map.DIT): v for k, v in back.items()} == raw(
        tmp_path / "student.safetensors"
    )


# -- layouts of the input ------------------------------------------------------------------------


def test_shards_with_index(tiny, tmp_path):
    source, converted = tiny
    tensors, metadata = read_header(source)
    weight_map = {}
    for number in range(2):
        name = f"model-{number}.safetensors"
        arrays = {k: read_tensor(t) for i, (k, t) in enumerate(tensors.items()) if i % 2 == number}
        write_file(tmp_path / name, arrays, metadata)
        weight_map |= dict.fromkeys(arrays, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        assert_trees_equal(
            reading.load_component(path, "audio_vae"), reading.load_component(source, "audio_vae")
        )
    with pytest.raises(ConversionError, match="out: lies in the input"):
        ltx2.convert(tmp_path, tmp_path / "out", components=("audio_vae",))
    content = ltx2.convert(index, tmp_path / "out", components=("audio_vae",))
    assert content["config"] == checkpoints.load_config(converted)["config"]
    assert [entry["name"] for entry in content["source"]] == sorted(set(weight_map.values()))


def test_components_in_separate_files(tiny, tmp_path):
    """As LTX-2.5 is published; the VAE's keys have no prefix there."""
    source, _ = tiny
    tensors, metadata = read_header(source)
    for name, prefix in (("video", "vae."), ("audio", "audio_vae.")):
        arrays = {k.removeprefix(prefix): read_tensor(t) for k, t in tensors.items()
                  if k.startswith(prefix)}  # fmt: skip
        write_file(tmp_path / f"{name}.safetensors", arrays, metadata)
    files = [tmp_path / "video.safetensors", tmp_path / "audio.safetensors"]
    content = ltx2.convert(files, tmp_path / "out")
    assert content["components"] == ["video_vae", "audio_vae"]
    assert_trees_equal(
        checkpoints.load_params(tmp_path / "out", "audio_vae"),
        reading.load_component(source, "audio_vae"),
    )


def test_the_transformer_of_ltx25(tmp_path):
    """As it is published: with connectors, but the text projections are in another file."""
    source, bare = tmp_path / "source.safetensors", tmp_path / "bare.safetensors"
    synthetic.write(source, "tiny", "2.3", components=("transformer", "connectors"))
    tensors, metadata = read_header(source)
    config = json.loads(metadata["config"])
    config["transformer"] |= {
        "ff_bias": False,
        "use_keyframes_abs_pos_embedding": True,
        "text_encoder_norm_type": "PER_TOKEN_RMS",
    }
    metadata |= {"config": json.dumps(config), "model_version": "2.5.0"}
    video_ff_bias = re.compile(r".*transformer_blocks\.\d+\.ff\..*bias")
    arrays = {
        key: read_tensor(info)
        for key, info in tensors.items()
        if not key.startswith("text_embedding_projection.") and not video_ff_bias.fullmatch(key)
    }
    arrays[key_map.DIT + "keyframes_abs_pos_embedding"] = np.ones((1, 64), ml_dtypes.bfloat16)
    write_file(bare, arrays, metadata)
    content = ltx2.convert(bare, tmp_path / "out", components=("transformer",))
    assert (content["model_version"], content["components"]) == ("2.5.0", ["transformer"])
    with pytest.raises(ConversionError, match=r"video_aggregate_embed.weight: missing"):
        ltx2.convert(bare, tmp_path / "all")


# -- where other systems than Linux differ -------------------------------------------------------


def test_systems_without_advice_on_caching(tiny, tmp_path, monkeypatch):
    source, _ = tiny
    expected = raw(source)
    monkeypatch.delattr(os, "posix_fadvise")
    assert raw(source) == expected


# -- chunks and shardings ------------------------------------------------------------------------


def test_chunks_follow_the_mesh(tiny, tmp_path):
    source, _ = tiny
    mesh = {"fsdp": 4, "tensor": 2}
    ltx2.convert(source, tmp_path / "out", components=("transformer",), mesh=mesh)
    folder = tmp_path / "out" / "transformer"
    up, down = (
        orbax_io.open_leaf(folder, f"blocks/video_ff/{half}/kernel") for half in ("up", "down")
    )
    assert (up.shape, up.chunk_layout.write_chunk.shape) == ((2, 64, 256), (2, 16, 128))
    assert (down.shape, down.chunk_layout.write_chunk.shape) == ((2, 256, 64), (2, 128, 16))
    assert_trees_equal(
        checkpoints.load_params(tmp_path / "out", "transformer"),
        reading.load_component(source, "transformer"),
    )


def test_a_shard_is_read_from_its_own_chunks_alone(tiny, tmp_path):
    """All other files of the array are cut off, so that reading any of them would fail."""
    source, _ = tiny
    ltx2.convert(source, tmp_path / "out", components=("transformer",), mesh={"fsdp": 4})
    folder = tmp_path / "out" / "transformer"
    for file in (folder / "blocks.video_ff.up.kernel").glob("*.*.*"):
        if file.name != "0.2.0":
            file.write_bytes(b"")
    kernel = orbax_io.open_leaf(folder, "blocks/video_ff/up/kernel")  # [2, 64, 256]
    expected = reading.load_component(source, "transformer")["blocks"]["video_ff"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel[:, 32:48].read().result(), expected[:, 32:48])
    with pytest.raises(ValueError, match="Not enough data"):
        kernel[:, 31:48].read().result()


def test_real_sizes_are_chunked_by_layer_and_shard():
    shape = orbax_io.chunk_shape(
        "transformer", "blocks/video_ff/up/kernel", (48, 4096, 16384), 2, {"fsdp": 8}
    )
    assert shape == (1, 512, 16384)
    # 1.4 GB without a layer axis: cut until a chunk is small enough to be held
    shape = orbax_io.chunk_shape("connectors", "projection/kernel", (188160, 3840), 2, {})
    assert np.prod(shape) * 2 <= orbax_io.MAX_CHUNK_BYTES
    # biases of all layers in one file
    shape = orbax_io.chunk_shape("transformer", "blocks/video_ff/up/bias", (48, 16384), 2, {})
    assert shape == (48, 16384)


def test_large_stacks_are_written_layer_by_layer(tiny, tmp_path, monkeypatch):
    """With the limits lowered, the tiny model takes the path of the 19B one."""
    monkeypatch.setattr(orbax_io, "MAX_GATHERED_BYTES", 1 << 14)
    monkeypatch.setattr(orbax_io, "MAX_CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(orbax_io, "IN_FLIGHT_BYTES", 1 << 15)
    source, _ = tiny
    ltx2.convert(source, tmp_path / "out", components=("transformer", "audio_vae"))
    up = orbax_io.open_leaf(tmp_path / "out" / "transformer", "blocks/video_ff/up/kernel")
    assert up.chunk_layout.write_chunk.shape == (1, 64, 64)
    for component in ("transformer", "audio_vae"):
        assert_trees_equal(
            checkpoints.load_params(tmp_path / "out", component),
            reading.load_component(source, component),
        )


def test_load_with_shardings_and_cast(tiny):
    source, converted = tiny
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def rule(path, shape):
        return NamedSharding(mesh, P("fsdp") if path[-1] == "kernel" else P())

    tree = checkpoints.load_params(converted, "connectors", dtype="float32", sharding=rule)
    assert tree["projection"]["kernel"].sharding.spec == P("fsdp")
    assert tree["video_connector"]["registers"].sharding.spec == P()
    assert_trees_equal(tree, reading.load_component(source, "connectors", np.float32))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    again = checkpoints.load_params(converted, "connectors", dtype=np.float32, sharding=shardings)
    assert_trees_equal(again, tree)
    with pytest.raises(ValueError, match="structure"):
        checkpoints.load_params(
            converted, "connectors", sharding={"projection": rule(("bias",), ())}
        )


def test_param_shapes_reads_no_weights(tiny):
    source, converted = tiny
    described = checkpoints.param_shapes(converted, "transformer")
    expected = reading.load_component(source, "transformer")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), described) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )


def test_saved_parameters_can_be_loaded_and_exported(tiny, tmp_path):
    _, converted = tiny
    shutil.copytree(converted, tmp_path / "out")
    params = checkpoints.load_params(converted, "connectors")
    trained = jax.tree.map(lambda leaf: leaf * 2, params)
    checkpoints.save_params(tmp_path / "out", "connectors", trained)
    assert_trees_equal(checkpoints.load_params(tmp_path / "out", "connectors"), trained)
    content = checkpoints.load_config(tmp_path / "out")
    folders = {checkpoints.component_folder(tmp_path / "out", name, content).name
               for name in COMPONENTS}  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", *folders}
    export.export(tmp_path / "out", tmp_path / "trained.safetensors", components=("connectors",))
    back = reading.load_component(tmp_path / "trained.safetensors", "connectors")
    assert_trees_equal(back, trained)


def test_two_processes_share_the_work(tiny, free_port, tmp_path):
    """Each writes half; together they give what one process gives."""
    source, converted = tiny
    script = textwrap.dedent(
        """
        import sys, jax
        index, port, source, output = sys.argv[1:]
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=240)
        from checkpoint_converters import ltx2
        ltx2.convert(source, output, components=("connectors",))
        """
    )
    command = [sys.executable, "-c", script]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(free_port), str(source), str(tmp_path / "out")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()[-2000:]
    assert_trees_equal(
        checkpoints.load_params(tmp_path / "out", "connectors"),
        checkpoints.load_params(converted, "connectors"),
    )


def test_shares_are_disjoint_and_complete(tiny, tmp_path):
    source, _ = tiny
    tensors = reading.open_checkpoint(source).tensors
    leaves = orbax_io.plan_leaves(tensors, "connectors")
    (tmp_path / "x").mkdir()
    orbax_io.write_component(tmp_path / "x", leaves, share=(0, 2))
    first = {path.name for path in (tmp_path / "x").iterdir() if path.is_dir()}
    assert 0 < len(first) < len(leaves)
    orbax_io.write_component(tmp_path / "x", leaves, share=(1, 2))
    both = {path.name for path in (tmp_path / "x").iterdir() if path.is_dir()}
    assert both == {leaf.path.replace("/", ".") for leaf in leaves}


# -- random checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_synthetic_weights_are_well_scaled_and_reproducible(tmp_path, version):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    config = synthetic.write(a, "tiny", version, dtype="float32", components=("transformer",))
    synthetic.write(b, "tiny", version, dtype="float32", components=("transformer",))
    assert a.read_bytes() == b.read_bytes()
    assert reading.read_metadata(a) == {"config": config, "model_version": f"{version}.0"}
    blocks = reading.load_component(a, "transformer")["blocks"]
    kernel = blocks["video_ff"]["up"]["kernel"]
    assert abs(kernel.std() * np.sqrt(kernel.shape[1]) - 1) < 0.05
    assert abs(blocks["video_attn"]["q_norm"]["scale"].mean() - 1) < 0.05
    assert not np.array_equal(kernel[0], kernel[1])


def test_mesh_argument():
    assert parse_mesh("fsdp=8,tensor=2", SPLIT_AXES) == {"fsdp": 8, "tensor": 2}
    assert parse_mesh("") == parse_mesh("1") == {}
    assert parse_mesh("data=-1", rest=True) == {"data": -1}
    for text in ("fsdp", "data=2", "fsdp=0", "fsdp=x", "fsdp=-1", "fsdp=2,"):
        with pytest.raises(ValueError, match="AXIS=SIZE"):
            parse_mesh(text, SPLIT_AXES)


def test_bfloat16_is_kept(tiny):
    _, converted = tiny
    leaves = jax.tree.leaves(checkpoints.load_params(converted, "connectors"))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}
