"""The cache of contexts: hits, misses, other encoders, and damaged entries."""

import jax.numpy as jnp
import numpy as np
import pytest

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
