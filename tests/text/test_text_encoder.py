"""From sentences to contexts: the reference end to end, misfits refused early, meshes, int8."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint_converters import gemma3, ltx2, synthetic_gemma
from omniforcing_jax.io import checkpoints
from omniforcing_jax.text import text_encoder
from omniforcing_jax.text.encoder_files import check_encoder
from omniforcing_jax.text.text_encoder import TextEncoder
from tests.tiny_gemma import convert_golden

PROMPTS = ["A black dog runs through tall grass, panting.", ""]


@pytest.fixture(scope="module")
def golden_gemma(golden_dir, tmp_path_factory):
    """The reference text tower, converted."""
    return convert_golden(golden_dir, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def gemma(random_gemma):
    return random_gemma


def load(gemma, checkpoint, **options):
    return TextEncoder.load(gemma, checkpoint, **{"dtype": jnp.float32, "length": 128} | options)


@pytest.fixture(scope="module")
def encoder(gemma, random_checkpoint):
    return load(gemma, random_checkpoint("2.0"))


@pytest.mark.parametrize("name", ["ltx2_tiny", "ltx23_tiny"])
def test_contexts_from_token_ids_match_the_reference(name, golden_gemma, golden_dir, tmp_path):
    ltx2.convert(golden_dir / f"{name}.safetensors", tmp_path / "ltx", components=("connectors",))
    expected = np.load(golden_dir / f"{name}_expected.npz")
    encoder = load(golden_gemma, tmp_path / "ltx", length=256)
    ids, mask = expected["f_e2e_input_ids"], expected["f_e2e_attention_mask"]
    features = encoder.features(ids, mask)
    assert encoder.shared_features == (name == "ltx2_tiny") == (features[0] is features[1])
    video, audio = encoder.contexts(*features, mask)
    np.testing.assert_allclose(video, expected["f_e2e_video_context"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(audio, expected["f_e2e_audio_context"], atol=2e-5, rtol=0)


def test_sentences_become_contexts(encoder, random_checkpoint):
    result = encoder.encode(PROMPTS)
    widths = (32, 32)
    for context, width in zip((result.video_context, result.audio_context), widths, strict=True):
        assert context.shape == (2, 128, width) and context.dtype == jnp.float32
        np.testing.assert_allclose(np.mean(np.square(context), axis=-1), 1.0, atol=1e-3)
    assert result.mask is None
    assert result.prompt == PROMPTS[0] + "\n" and result.model_version == "2.0.0"
    same = encoder.encode([PROMPTS[1], f"  {PROMPTS[0]}\n"])
    np.testing.assert_allclose(same.video_context[::-1], result.video_context, atol=1e-5)
    other = encoder.encode([PROMPTS[0].replace("dog", "cat"), ""])
    assert np.abs(other.video_context - result.video_context)[0].max() > 0.05
    with pytest.raises(ValueError, match="there is no prompt"):
        encoder.encode([])


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(encoder):
    words = PROMPTS[0] + " word" * 5000
    with pytest.warns(UserWarning, match="1 of 2 prompts exceed 128 tokens"):
        result = encoder.encode([words, ""])
    assert np.isfinite(result.video_context).all()


def test_what_does_not_fit_is_refused_before_weights_are_read(
    gemma, random_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_encoder, "load_text_tower", None)
    checkpoint = random_checkpoint("2.0")

    def changed(name, **changes):
        folder = tmp_path / name
        shutil.copytree(gemma, folder)
        content = checkpoints.read_json(folder / "config.json")
        content["config"] |= changes
        checkpoints.write_json(folder / "config.json", content)
        return folder

    cases = [
        (changed("shallow", num_hidden_layers=7), {}, "project 9 hidden states.* tower has 8 "),
        (changed("wide", hidden_size=64), {}, "of width 32, the text tower's have 64"),
        (gemma, {"length": 100}, "a multiple of the 128 registers, not 100"),
        (gemma, {"quantize": "int3"}, "quantize must be one of none, int8"),
        (gemma.parent / "hf", {}, "is a Hugging Face folder; convert it: python -m"),
        (
            checkpoint,
            {},
            "found family 'ltx2', which is for --checkpoint, format 1; expected 'gemma3' or",
        ),
        (changed("words", vocab_size=300), {}, "the tokenizer makes ids up to"),
    ]
    for folder, options, message in cases:
        with pytest.raises(ValueError, match=message):
            load(folder, checkpoint, **options)
    with pytest.raises(FileNotFoundError, match="does not exist; python -m checkpoint_converters"):
        load(tmp_path / "absent", checkpoint)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(gemma, tmp_path / "absent")


def test_weights_that_do_not_fit_the_config_are_named(gemma, random_checkpoint, tmp_path):
    shutil.copytree(gemma, tmp_path / "gemma")
    file = tmp_path / "gemma" / "config.json"
    content = checkpoints.read_json(file)
    content["config"]["intermediate_size"] = 65
    checkpoints.write_json(file, content)
    with pytest.raises(ValueError, match=r"ff/up/kernel has shape \[8, 32, 64\], must be \[8, 32"):
        load(tmp_path / "gemma", random_checkpoint("2.0"))
    shutil.rmtree(tmp_path / "gemma" / "text_tower")
    with pytest.raises(FileNotFoundError, match="has no text_tower"):
        load(tmp_path / "gemma", random_checkpoint("2.0"))


def test_the_fingerprint_is_that_of_the_files(encoder, gemma, random_checkpoint, tmp_path):
    shutil.copytree(gemma, tmp_path / "copy")
    checkpoint = random_checkpoint("2.0")
    assert load(tmp_path / "copy", checkpoint).fingerprint == encoder.fingerprint
    synthetic_gemma.write(tmp_path / "hf", "tiny", seed=1)
    gemma3.convert(tmp_path / "hf", tmp_path / "gemma")
    others = {
        load(tmp_path / "gemma", checkpoint).fingerprint,
        load(gemma, random_checkpoint("2.3")).fingerprint,
        load(gemma, checkpoint, dtype=jnp.bfloat16).fingerprint,
        load(gemma, checkpoint, quantize="int8").fingerprint,
        encoder.fingerprint,
    }
    assert len(others) == 5


def test_converted_folders_without_a_fingerprint_are_refused(gemma, random_checkpoint, tmp_path):
    def without(folder):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        content = checkpoints.read_json(copy / "config.json")
        del content["fingerprints"]
        checkpoints.write_json(copy / "config.json", content)
        return copy

    checkpoint = random_checkpoint("2.0")
    with pytest.raises(ValueError, match=r"no fingerprint of its text_tower.*_converters\.gemma3"):
        check_encoder(without(gemma), checkpoint)
    with pytest.raises(ValueError, match=r"no fingerprint of its connectors.*_converters\.ltx2"):
        check_encoder(gemma, without(checkpoint))


def test_trained_connectors_are_another_encoder(gemma, random_checkpoint, tmp_path):
    shutil.copytree(random_checkpoint("2.0"), tmp_path / "trained")
    before = check_encoder(gemma, tmp_path / "trained")
    params = checkpoints.load_params(tmp_path / "trained", "connectors")
    checkpoints.save_params(tmp_path / "trained", "connectors", params)
    after = check_encoder(gemma, tmp_path / "trained")
    assert after.weights[0] == before.weights[0] and after.weights[1] != before.weights[1]
    checkpoints.save_params(tmp_path / "trained", "vocoder", {"other": np.zeros(3)})
    assert check_encoder(gemma, tmp_path / "trained").weights == after.weights


def test_int8_changes_the_context_little(encoder, gemma, random_checkpoint):
    small = load(gemma, random_checkpoint("2.0"), quantize="int8")
    tower = small._params["tower"]
    assert tower["blocks"]["ff"]["up"]["kernel"].values.dtype == jnp.int8
    assert tower["embed"]["embedding"].values.dtype == jnp.int8
    ids, mask = encoder.tokenizer.encode_batch(PROMPTS, 128)
    exact, rounded = encoder.features(ids, mask)[0], small.features(ids, mask)[0]
    error = np.linalg.norm((rounded - exact)[mask]) / np.linalg.norm(exact[mask])
    assert 1e-4 < error < 0.03


def test_closing_frees_the_weights(gemma, random_checkpoint):
    encoder = load(gemma, random_checkpoint("2.0"))
    leaves = jax.tree.leaves(encoder._params)
    encoder.close()
    encoder.close()
    assert all(leaf.is_deleted() for leaf in leaves)
    with pytest.raises(ValueError, match="the text encoder was closed"):
        encoder.encode(PROMPTS)


MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.text.text_encoder import TextEncoder

gemma, checkpoint = sys.argv[1:]
options = dict(dtype=jnp.float32, length=128)
prompts = ["A dog.", "Rain falls; thunder.", "", "Two men talk."]
alone = TextEncoder.load(gemma, checkpoint, **options)
expected = alone.encode(prompts)
mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
sharded = TextEncoder.load(gemma, checkpoint, mesh=mesh, **options)
assert sharded.fingerprint == alone.fingerprint
kernel = sharded._params["tower"]["blocks"]["ff"]["up"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (8, 16, 32), kernel.sharding
kernel = sharded._params["projections"]["shared"].kernel
assert kernel.addressable_shards[0].data.shape == (9, 16, 16), kernel.sharding
int8 = TextEncoder.load(gemma, checkpoint, mesh=mesh, quantize="int8", **options)
kernel = int8._params["tower"]["blocks"]["ff"]["up"]["kernel"]
assert kernel.values.addressable_shards[0].data.shape == (8, 16, 32), kernel.values.sharding
for count in (4, 3):
    actual = sharded.encode(prompts[:count])
    for name in ("video_context", "audio_context"):
        a, b = np.asarray(getattr(actual, name)), np.asarray(getattr(expected, name))[:count]
        np.testing.assert_allclose(a, b, atol=2e-5)
print("ok")
"""


def test_sharded_contexts_equal_unsharded(gemma, random_checkpoint):
    arguments = [str(gemma), str(random_checkpoint("2.0"))]
    result = subprocess.run(
        [sys.executable, "-c", MESH, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")
