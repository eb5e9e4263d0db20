"""Guidance on x0 against the reference, and which passes it asks for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.sampling.guidance import (
    LTX20_GUIDANCE,
    LTX23_GUIDANCE,
    NO_GUIDANCE,
    AVGuidance,
    Guidance,
    guide,
)

CASES = ("full", "norescale", "cfg_only", "cfg_rescale", "odd")


@pytest.fixture
def predictions():
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (2, 5, 3)) for k in keys]


@pytest.mark.parametrize("version", ["ltx20", "ltx23"])
@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(request, version, modality, case):
    golden = request.getfixturevalue(version)
    prefix = f"l_{modality}_"
    scales = golden[f"{prefix}{case}_scales_cfg_stg_mod_rescale"].tolist()
    guidance = Guidance(*scales, stg_blocks=(1,))
    names = {"uncond": "uncond_text", "perturbed": "perturbed", "isolated": "modality"}
    needed = guidance.passes()
    others = [golden[prefix + names[n]] if n in needed else None for n in names]
    got = guide(golden[prefix + "cond"], *others, guidance)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, golden[f"{prefix}{case}_out"], atol=2e-5, rtol=0)


def test_no_guidance_is_the_identity(predictions):
    cond = predictions[0]
    np.testing.assert_array_equal(guide(cond, None, None, None, Guidance()), cond)


def test_passes():
    assert Guidance().passes() == ("cond",)
    assert Guidance(cfg=3.0).passes() == ("cond", "uncond")
    assert Guidance(stg=1.0, stg_blocks=(1,)).passes() == ("cond", "perturbed")
    assert Guidance(modality=0.0).passes() == ("cond", "isolated")
    assert NO_GUIDANCE.passes() == ("cond",)
    # A pass runs if either modality needs it.
    pair = AVGuidance(video=Guidance(modality=3.0), audio=Guidance(cfg=7.0))
    assert pair.passes() == ("cond", "uncond", "isolated")


def test_defaults():
    assert LTX20_GUIDANCE.video == Guidance(3.0, 1.0, 3.0, 0.7, (29,))
    assert LTX20_GUIDANCE.audio == Guidance(7.0, 1.0, 3.0, 0.7, (29,))
    assert LTX23_GUIDANCE.video == dataclasses.replace(LTX20_GUIDANCE.video, stg_blocks=(28,))
    assert LTX20_GUIDANCE.passes() == ("cond", "uncond", "perturbed", "isolated")


def test_per_sample_std_makes_samples_independent(predictions):
    guidance = Guidance(cfg=4.0, rescale=0.7)
    cond, uncond = predictions[0], predictions[1] * jnp.array([1.0, 5.0])[:, None, None]
    alone = guide(cond[:1], uncond[:1], None, None, guidance)
    per_sample = guide(cond, uncond, None, None, guidance, per_sample_std=True)
    whole = guide(cond, uncond, None, None, guidance)
    np.testing.assert_allclose(per_sample[:1], alone, atol=1e-6)
    assert not np.allclose(whole[:1], alone, atol=1e-3)


def test_full_rescale_restores_the_standard_deviation(predictions):
    cond, uncond = predictions[:2]
    out = guide(cond, uncond, None, None, Guidance(cfg=5.0, rescale=1.0))
    np.testing.assert_allclose(jnp.std(out, ddof=1), jnp.std(cond, ddof=1), rtol=1e-5)


def test_runs_under_jit_in_float32_from_bfloat16(predictions):
    cond, uncond, perturbed, isolated = (p.astype(jnp.bfloat16) for p in predictions)
    out = jax.jit(lambda *p: guide(*p, LTX20_GUIDANCE.video))(cond, uncond, perturbed, isolated)
    expected = guide(cond, uncond, perturbed, isolated, LTX20_GUIDANCE.video)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_errors(predictions):
    cond, uncond = predictions[:2]
    with pytest.raises(ValueError, match="needs the 'uncond' prediction"):
        guide(cond, None, None, None, Guidance(cfg=2.0))
    with pytest.raises(ValueError, match="'uncond' prediction has shape"):
        guide(cond, uncond[:1], None, None, Guidance(cfg=2.0))
    with pytest.raises(ValueError, match="stg_blocks is empty"):
        Guidance(stg=1.0)
    with pytest.raises(ValueError, match=r"rescale is 1\.5"):
        Guidance(rescale=1.5)
