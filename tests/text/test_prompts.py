"""Sentences to contexts: what is in the cache loads nothing, and the encoder stays or goes."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.io import checkpoints
from omniforcing_jax.text import prompts
from omniforcing_jax.text.prompts import PromptEncoder, default_cache
from omniforcing_jax.text.text_encoder import TextEncoder

SEA, STORM = "a calm sea", "a storm comes up"


@pytest.fixture
def loads(monkeypatch):
    """Options of every encoder that is loaded."""
    found, load = [], TextEncoder.load

    def recorded(*args, **options):
        found.append(options)
        return load(*args, **options)

    monkeypatch.setattr(TextEncoder, "load", recorded)
    return found


@pytest.fixture
def make(random_gemma, random_checkpoint, tmp_path):
    def encoder(**options):
        defaults = {"cache": tmp_path / "cache", "dtype": jnp.float32, "length": 128}
        return PromptEncoder(random_gemma, random_checkpoint("2.0"), **defaults | options)

    return encoder


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_in_the_cache_loads_nothing(make, loads, tmp_path, monkeypatch):
    first = make()
    assert not loads  # constructing reads no weights
    sea, storm, again = first.encode([SEA, STORM, SEA])
    assert sea[0].shape == (1, 128, 32) and sea[1].shape == (1, 128, 32)
    assert np.abs(sea[0] - storm[0]).max() > 0.05
    assert_same(again, sea)
    assert len(loads) == 1 and (first.times.encoded, first.times.found) == (2, 0)
    assert min(first.times.lookup, first.times.load, first.times.encode) > 0

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("weights were read"))
        second = make()
        assert_same(second.contexts(f" {STORM}\n"), storm)
        assert_same(second.encode([SEA])[0], sea)
    times = second.times
    assert (times.encoded, times.found, times.load, times.encode) == (0, 2, 0, 0)
    assert times.total == times.lookup > 0

    # a damaged entry is made again
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-7])
    third = make()
    with pytest.warns(UserWarning, match="ignored an entry of the prompt cache"):
        assert_same(third.contexts(SEA), sea)
    assert (len(loads), third.times.encoded) == (2, 1)
    with pytest.warns(UserWarning, match="complete safetensors"):  # the storm's still is
        assert third.encode([SEA, STORM])[0] is not None


def test_another_encoder_has_other_entries(make, loads, random_gemma, random_checkpoint, tmp_path):
    make().contexts(SEA)
    make(quantize="int8").contexts(SEA)
    trained = tmp_path / "trained"
    shutil.copytree(random_checkpoint("2.0"), trained)
    params = checkpoints.load_params(trained, "connectors")
    checkpoints.save_params(trained, "connectors", params)
    for _ in range(2):
        PromptEncoder(
            random_gemma, trained, cache=tmp_path / "cache", dtype=jnp.float32, length=128
        ).contexts(SEA)
    assert [options["quantize"] for options in loads] == ["none", "int8", "none"]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_kept_or_unloaded(make, loads):
    """One encoder for all prompts if it is kept; otherwise its memory is free after each call."""
    kept = make(cache=None, keep=True)
    sea = kept.contexts(SEA)
    weights = jax.tree.leaves(kept._encoder._params)
    assert_same(kept.contexts(SEA), sea)  # no cache: encoded again
    assert len(loads) == 1 and kept.times.encoded == 2
    assert not any(leaf.is_deleted() for leaf in weights)
    kept.close()
    kept.close()
    assert all(leaf.is_deleted() for leaf in weights)

    unloading = make(cache=None)
    encoders = []
    load = unloading._load
    unloading._load = lambda: encoders.append(load()) or encoders[-1]
    assert_same(unloading.contexts(SEA), sea)
    assert len(loads) == 2 and unloading._encoder is None and encoders[0]._params is None


def test_prompts_that_cannot_be_encoded(make, loads, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        make().encode([SEA, "\ud800"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"prompt cache .*file is not a folder"):
        make(cache=tmp_path / "file")
    with pytest.raises(ValueError, match="quantize must be one of none, int8"):
        make(quantize="int4")
    assert not loads

    def full(*args):
        raise OSError("disk full")

    encoder = make(keep=True)
    with monkeypatch.context() as patch:
        patch.setattr(prompts.PromptCache, "put", full)
        with pytest.warns(UserWarning, match="an encoded prompt was not stored: disk full"):
            encoder.contexts(SEA)
    tower = encoder._encoder._params["tower"]
    tower["final_norm"]["scale"] = jnp.full_like(tower["final_norm"]["scale"], jnp.nan)
    with pytest.raises(FloatingPointError, match="contexts of the prompt 'a storm comes up'"):
        encoder.contexts(STORM)
    assert not list((tmp_path / "cache").iterdir())


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "omniforcing_jax" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "omniforcing_jax" / "prompts"
