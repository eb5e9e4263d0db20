"""Sigma schedules, noising, velocity <-> x0 and Euler steps against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.sampling import flow

ATOL = 2e-5


@pytest.fixture(params=["ltx20", "ltx23"])
def golden(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "steps, tokens", [(8, 4096), (30, 4096), (40, 4096), (8, 6144), (40, 1536)]
)
def test_schedule_matches_the_reference(golden, steps, tokens):
    expected = golden[f"k_sigmas_steps{steps}_tokens{tokens}"]
    sigmas = flow.ltx2_schedule(steps, tokens)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (steps + 1,)
    np.testing.assert_allclose(sigmas, expected, atol=ATOL, rtol=0)


def test_schedule_published_values():
    np.testing.assert_allclose(
        flow.ltx2_schedule(8),
        [1, 0.965712, 0.921875, 0.863856, 0.783445, 0.664579, 0.471003, 0.1, 0],
        atol=1e-6,
    )
    sigmas = flow.ltx2_schedule(40)
    np.testing.assert_allclose(sigmas[:4], [1, 0.996449, 0.992737, 0.988851], atol=1e-6)
    np.testing.assert_allclose(sigmas[-4:], [0.337809, 0.233936, 0.1, 0], atol=1e-6)


def test_schedule_of_1000_steps_is_the_score_table():
    table = flow.ltx2_schedule(1000)[::-1]
    at = [0, 1, 20, 50, 100, 200, 500, 980, 1000]
    expected = [0, 0.1, 0.217112, 0.3562078, 0.513178, 0.6917044, 0.8965548, 0.9976233, 1]
    np.testing.assert_allclose(table[at], expected, atol=1e-6)


def test_distilled_sigmas(golden):
    np.testing.assert_allclose(flow.DISTILLED_SIGMAS, golden["k_distilled_stage1"], atol=1e-7)
    np.testing.assert_allclose(
        flow.DISTILLED_STAGE2_SIGMAS, golden["k_distilled_stage2"], atol=1e-7
    )


def test_student_sigmas():
    expected = [1.0, 0.90622896, 0.72652376, 0.4207186, 0.0]
    np.testing.assert_allclose(flow.student_sigmas(), expected, atol=1e-6)
    three_steps = flow.student_sigmas((1000, 757, 522))
    np.testing.assert_allclose(three_steps, [1.0, 0.75069666, 0.5447712, 0.0], atol=1e-6)
    distilled = flow.student_sigmas(sigmas=flow.schedule("distilled"))
    np.testing.assert_array_equal(distilled, np.float32([1.0, 0.909375, 0.725, 0.421875, 0.0]))
    assert three_steps.dtype == distilled.dtype == np.float32
    flow.check_sigmas(three_steps)


@pytest.mark.parametrize(
    "timesteps, steps, message",
    [
        ((1000, 0), 40, r"\(0, 1000\]"),
        ((1200, 500), 40, r"\(0, 1000\]"),
        ((500, 900), 40, "must decrease"),
        ((1000, 999, 998), 4, "different entries"),
        ((), 40, "non-empty"),
    ],
)
def test_student_sigmas_errors(timesteps, steps, message):
    with pytest.raises(ValueError, match=message):
        flow.student_sigmas(timesteps, flow.ltx2_schedule(steps))


def test_schedule_errors():
    with pytest.raises(ValueError, match="'ltx3', must be one of ltx2, distilled"):
        flow.schedule("ltx3")
    for steps in (1, 2**31):  # which would take 17 GB
        with pytest.raises(ValueError, match="at least 2 steps, and has at most 1000"):
            flow.ltx2_schedule(steps)
    with pytest.raises(ValueError, match="num_tokens"):
        flow.ltx2_schedule(8, 0)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([1.0, 0.5], "end with 0"),
        ([1.0, 0.5, 0.5, 0.0], "strictly decrease"),
        ([0.5, 1.0, 0.0], "strictly decrease"),
        ([1000.0, 500.0, 0.0], "between 0"),
        ([1.0, float("nan"), 0.0], "between 0"),
        ([0.0], "at least two"),
        ([[1.0, 0.0]], "at least two"),
    ],
)
def test_check_sigmas_errors(sigmas, message):
    with pytest.raises(ValueError, match=message):
        flow.check_sigmas(sigmas)


def test_check_sigmas_accepts_what_the_samplers_use():
    for sigmas in (flow.DISTILLED_SIGMAS, flow.ltx2_schedule(40), flow.student_sigmas()):
        checked = flow.check_sigmas(sigmas)
        assert checked.dtype == np.float32
        np.testing.assert_array_equal(checked, np.asarray(sigmas, np.float32))


def test_euler_steps_match_the_reference(golden):
    sigmas = golden["m_euler_sigmas"]
    for i, expected in enumerate(golden["m_euler_out_per_step_index"]):
        got = flow.euler_step(
            golden["m_euler_sample"], golden["m_euler_denoised"], sigmas[i], sigmas[i + 1]
        )
        np.testing.assert_allclose(got, expected, atol=ATOL, rtol=0)


def test_velocity_to_x0_matches_the_reference(golden):
    x0 = flow.velocity_to_x0(
        golden["m_euler_sample"], golden["m_velocity"], golden["m_token_sigma"]
    )
    np.testing.assert_allclose(x0, golden["m_denoised_from_velocity"], atol=ATOL, rtol=0)


def test_per_token():
    scalar = flow.per_token(0.5, 3)
    np.testing.assert_array_equal(scalar, np.full((1, 3), 0.5))
    per_sample = flow.per_token(jnp.array([0.1, 0.2]), 3)
    np.testing.assert_allclose(per_sample, [[0.1] * 3, [0.2] * 3])
    per_frame = flow.per_token(jnp.array([[0.1, 0.2]]), 6)
    np.testing.assert_allclose(per_frame, [[0.1] * 3 + [0.2] * 3])
    tokens = jnp.linspace(0, 1, 6)[None]
    np.testing.assert_array_equal(flow.per_token(tokens, 6), tokens)
    assert flow.per_token(jnp.ones((2, 1), jnp.bfloat16), 4).dtype == jnp.float32


def test_per_token_errors():
    with pytest.raises(ValueError, match="4 sigmas per sample cannot be spread over 6 tokens"):
        flow.per_token(jnp.ones((2, 4)), 6)
    with pytest.raises(ValueError, match=r"\[2, 6, 1\]"):
        flow.per_token(jnp.ones((2, 6, 1)), 6)


def test_wrong_shapes_do_not_broadcast():
    x = jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match="differ"):
        flow.add_noise(x, jnp.ones((2, 1, 3)), 0.5)
    with pytest.raises(ValueError, match="3 samples"):
        flow.velocity_to_x0(x, x, jnp.ones(3))


def test_per_frame_sigma_on_latents_equals_per_token_sigma_on_tokens():
    keys = jax.random.split(jax.random.key(0), 3)
    x0, noise = (jax.random.normal(k, (2, 3, 2, 4, 5)) for k in keys[:2])  # [B, F, h, w, C]
    sigma = jax.random.uniform(keys[2], (2, 3))
    latents = flow.add_noise(x0, noise, sigma)
    tokens = flow.add_noise(x0.reshape(2, 24, 5), noise.reshape(2, 24, 5), sigma)
    np.testing.assert_array_equal(latents.reshape(2, 24, 5), tokens)


def test_velocity_and_noise_are_consistent():
    keys = jax.random.split(jax.random.key(1), 3)
    x0, noise = (jax.random.normal(k, (2, 6, 4)) for k in keys[:2])
    sigma = jax.random.uniform(keys[2], (2, 6), minval=0.1)
    x = flow.add_noise(x0, noise, sigma)
    np.testing.assert_allclose(flow.x0_to_velocity(x, x0, sigma), noise - x0, atol=ATOL)
    np.testing.assert_allclose(flow.velocity_to_x0(x, noise - x0, sigma), x0, atol=ATOL)
    # From the true x0, an Euler step of any length lands on the straight path.
    np.testing.assert_allclose(
        flow.euler_step(x, x0, sigma, 0.5 * sigma),
        flow.add_noise(x0, noise, 0.5 * sigma),
        atol=ATOL,
    )


def test_clean_tokens_stay_put_and_have_finite_gradients():
    x = jax.random.normal(jax.random.key(2), (1, 4, 3))
    x0 = jnp.zeros_like(x)
    sigma = jnp.array([[0.0, 0.0, 0.5, 0.5]])
    stepped = flow.euler_step(x, x0, sigma, 0.5 * sigma)
    np.testing.assert_array_equal(stepped[:, :2], x[:, :2])
    assert not np.allclose(stepped[:, 2:], x[:, 2:])
    gradient = jax.grad(lambda x: jnp.sum(flow.x0_to_velocity(x, x0, sigma) ** 2))(x)
    assert np.all(np.isfinite(gradient))


def test_computes_in_float32_from_bfloat16():
    x = jax.random.normal(jax.random.key(3), (1, 4, 3)).astype(jnp.bfloat16)
    for out in (
        flow.add_noise(x, x, 0.5),
        flow.velocity_to_x0(x, x, 0.5),
        flow.x0_to_velocity(x, x, 0.5),
        flow.euler_step(x, x, 0.5, 0.25),
    ):
        assert out.dtype == jnp.float32
