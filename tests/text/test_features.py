"""Stored text features: round trip, and what is said about files that cannot be used."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from omniforcing_jax.text.features import (
    load_text_features,
    prompt_key,
    random_text_features,
    save_text_features,
)

DIMS = (12, 8)
METADATA = {"kind": "context", "prompt": "rain", "model_version": "2.0.0"}


def contexts(dtype=np.float32, batch=1, length=6):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(batch, length, dim)).astype(dtype) for dim in DIMS)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, dtype):
    video, audio = contexts(dtype, batch=2)
    path = tmp_path / "prompt.safetensors"
    prompt = "Ein Käuzchen ruft, 雨が降る\n"
    save_text_features(path, jnp.asarray(video), audio, prompt, "2.3.0")
    features = load_text_features(path, DIMS)
    assert features.video_context.dtype == features.audio_context.dtype == dtype
    np.testing.assert_array_equal(features.video_context, video)
    np.testing.assert_array_equal(features.audio_context, audio)
    assert features.mask is None
    assert (features.prompt, features.model_version) == (prompt, "2.3.0")
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_mask_round_trip(tmp_path):
    path = tmp_path / "prompt.safetensors"
    mask = np.array([[1, 1, 1, 0, 0, 0]])
    save_text_features(path, *contexts(), "rain", "2.0.0", mask=mask)
    loaded = load_text_features(path, DIMS).mask
    assert loaded.dtype == bool
    np.testing.assert_array_equal(loaded, mask.astype(bool))


def test_file_is_plain_safetensors(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, *contexts(), "rain", "2.0.0")
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"video_context", "audio_context"}
        assert file.metadata().items() > METADATA.items()  # and a checksum


def test_non_contiguous_arrays_are_stored_in_order(tmp_path):
    video, audio = contexts()
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, np.asfortranarray(video), audio[:, ::-1], "rain", "2.0.0")
    features = load_text_features(path, DIMS)
    np.testing.assert_array_equal(features.video_context, video)
    np.testing.assert_array_equal(features.audio_context, audio[:, ::-1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, a: (v[0], a), r"video_context has shape \[6, 12\]"),
        (lambda v, a: (v, a[:, :3]), "1 x 6 tokens, audio_context for 1 x 3"),
        (lambda v, a: (v[:, :0], a[:, :0]), "none of them 0"),
        (lambda v, a: (v, a.astype(np.float16)), "float32 and float16"),
        (lambda v, a: (v.astype(np.float64), a.astype(np.float64)), "both bfloat16 or both"),
        (lambda v, a: (v * np.nan, a), "video_context holds values that are not finite"),
    ],
)
def test_save_refuses_and_leaves_the_old_file(tmp_path, change, message):
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, *contexts(), "rain", "2.0.0")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        save_text_features(path, *change(*contexts()), "rain", "2.0.0")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, *contexts(), "rain", "2.0.0")
    before = path.read_bytes()

    def full_disk(arrays, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("omniforcing_jax.text.features.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_text_features(path, *contexts(), "snow", "2.0.0")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_mask_shape(tmp_path):
    with pytest.raises(ValueError, match=r"mask has shape \[1, 5\]; expected \[1, 6\]"):
        save_text_features(tmp_path / "x", *contexts(), "rain", "2.0.0", mask=np.ones((1, 5), bool))


def test_wrong_width_names_both_and_the_remedy(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, *contexts(), "rain", "2.0.0")
    with pytest.raises(
        ValueError, match=r"12 \(video\) and 8 \(audio\).*2\.0\.0.*expects 16 and 8"
    ) as e:
        load_text_features(path, (16, 8))
    assert "Encode the prompt" in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text feature file"):
        load_text_features(tmp_path / "nothing.safetensors", DIMS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of something", b"{}" * 100])
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other than a complete safetensors file"):
        load_text_features(path, DIMS)


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="other than a complete safetensors file"):
        load_text_features(tmp_path, DIMS)


def test_truncated_file(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_text_features(path, *contexts(), "rain", "2.0.0")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="other than a complete safetensors file"):
        load_text_features(path, DIMS)


def test_missing_array(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_file({"video_context": contexts()[0]}, path, METADATA)
    with pytest.raises(ValueError, match="missing: audio_context"):
        load_text_features(path, DIMS)


def test_model_weights_instead_of_features(golden_dir):
    with pytest.raises(
        ValueError, match=r"of kind None with the arrays audio_vae.*not model weights"
    ):
        load_text_features(golden_dir / "ltx2_tiny.safetensors", DIMS)


def test_features_before_the_connectors_are_refused(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_file(
        dict(zip(("video_context", "audio_context"), contexts(), strict=True)),
        path,
        METADATA | {"kind": "x"},
    )
    with pytest.raises(ValueError, match=r"of kind 'x'.*expected text features of kind 'context'"):
        load_text_features(path, DIMS)


def test_broken_values_are_found_on_loading(tmp_path):
    video, audio = contexts()
    audio[0, 0, 0] = np.inf
    path = tmp_path / "prompt.safetensors"
    save_file({"video_context": video, "audio_context": audio}, path, METADATA)
    with pytest.raises(ValueError, match="audio_context holds values that are not finite"):
        load_text_features(path, DIMS)


def test_random_features_depend_on_the_prompt_only():
    def features(prompt, **kwargs):
        return random_text_features(prompt_key(prompt, **kwargs), 2, 128, DIMS)

    first, again = features("a dog barks"), features(" a dog barks\n")
    np.testing.assert_array_equal(first.video_context, again.video_context)
    np.testing.assert_array_equal(first.audio_context, again.audio_context)
    assert not np.allclose(first.video_context, features("a cat").video_context)
    assert not np.allclose(first.video_context, features("a dog barks", seed=1).video_context)
    assert not np.allclose(first.video_context[0], first.video_context[1])


def test_prompt_key_is_stable():
    """The hash must not depend on the process, as Python's own does."""
    assert jax.random.key_data(prompt_key("a dog barks")).tolist() == [249030176, 3815420481]


def test_random_features_have_unit_rms_and_the_dtype():
    features = random_text_features(prompt_key("x"), 1, 128, DIMS, jnp.bfloat16)
    assert features.video_context.shape == (1, 128, 12)
    assert features.audio_context.shape == (1, 128, 8)
    assert features.video_context.dtype == features.audio_context.dtype == jnp.bfloat16
    rms = np.sqrt(np.mean(np.asarray(features.video_context, np.float32) ** 2, axis=-1))
    np.testing.assert_allclose(rms, 1.0, atol=2e-2)
