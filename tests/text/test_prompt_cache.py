"""The cache of contexts: hits, misses, other encoders, and damaged entries."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_converters.safetensors_io import read_header
from omniforcing_jax.text import features as text_features
from omniforcing_jax.text.prompts import PromptCache

DIMS = (8, 4)


def random_features(prompt):
    key = text_features.prompt_key(prompt)
    return text_features.random_text_features(key, 1, 16, DIMS, jnp.bfloat16)


def test_hit_and_miss(tmp_path):
    cache = PromptCache(tmp_path / "cache", "an encoder", DIMS)
    assert cache.get("a calm sea") is None
    features = random_features("a calm sea")
    cache.put("a calm sea", features)
    for prompt in ("a calm sea", " a calm sea\n"):
        found = cache.get(prompt)
        np.testing.assert_array_equal(found.video_context, features.video_context)
        np.testing.assert_array_equal(found.audio_context, features.audio_context)
        assert found.prompt == "a calm sea" and found.mask is None
    assert cache.get("a storm") is None and cache.get("") is None
    assert PromptCache(tmp_path / "cache", "another encoder", DIMS).get("a calm sea") is None
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_entries_of_another_prompt_or_width_are_ignored(tmp_path):
    cache = PromptCache(tmp_path, "an encoder", DIMS)
    cache.put("a storm", random_features("a storm"))
    cache.path("a storm").rename(cache.path("a calm sea"))
    with pytest.warns(UserWarning, match="for another prompt, 'a storm'"):
        assert cache.get("a calm sea") is None
    wider = PromptCache(tmp_path, "an encoder", (16, 4))
    with pytest.warns(UserWarning, match="expects 16 and 4"):
        assert wider.get("a calm sea") is None


@pytest.mark.parametrize("name", ["video_context", "audio_context", "prompt", "model_version"])
def test_a_flipped_bit_is_named_and_not_used(tmp_path, name):
    cache = PromptCache(tmp_path, "an encoder", DIMS)
    cache.put("a calm sea", random_features("a calm sea"))
    file = cache.path("a calm sea")
    data = bytearray(file.read_bytes())
    tensors, metadata = read_header(file)
    texts = {"prompt": b"a calm sea", "model_version": b'"model_version":""'}
    place = data.index(texts[name]) + 2 if name in texts else tensors[name].offset + 7
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=f"ignored an entry of the prompt cache: .*{file}"):
        assert cache.get("a calm sea") is None
    cache.put("a calm sea", random_features("a calm sea"))
    assert cache.get("a calm sea") is not None and metadata["checksum"]


def test_files_made_elsewhere_need_no_checksum(tmp_path):
    file = tmp_path / "a.safetensors"
    names = ("video_context", "audio_context")
    arrays = {name: np.ones((1, 4, dim), np.float32) for name, dim in zip(names, DIMS, strict=True)}
    save_file(arrays, file, {"kind": "context", "prompt": "fog", "model_version": "2.0.0"})
    assert text_features.load_text_features(file, DIMS).prompt == "fog"


def test_a_read_only_cache_is_used_for_what_it_has(tmp_path, monkeypatch):
    PromptCache(tmp_path, "an encoder", DIMS).put("a calm sea", random_features("a calm sea"))
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    cache = PromptCache(tmp_path, "an encoder", DIMS)
    assert cache.get("a calm sea") is not None and cache.get("a storm") is None
    with pytest.raises(OSError, match=f"prompt cache {tmp_path} cannot be written to"):
        cache.put("a storm", random_features("a storm"))
    assert len(list(tmp_path.iterdir())) == 1
