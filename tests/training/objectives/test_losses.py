"""Losses, score noise levels and guidance against the recorded DMD arithmetic, and by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import Guidance, guide
from omniforcing_jax.training.objectives import losses, scores
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.objectives.scores import ScoreConfig
from omniforcing_jax.types import AVLatents


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "dmd_math.npz")


def tokens(x):
    """[B, F, C, h, w] or [B, T, C] -> [B, T, C]; what is computed does not depend on the order."""
    return jnp.asarray(x.reshape(x.shape[0], x.shape[1], -1))


def pair(golden, name):
    return AVLatents(tokens(golden[name.format("video")]), tokens(golden[name.format("audio")]))


def test_score_levels(golden):
    np.testing.assert_allclose(
        scores.sigma_table(), golden["score_sigma_table_t0_to_t1000"], atol=2e-7
    )
    low, high = golden["score_timestep_clamp_min_max"].tolist()
    config = ScoreConfig(min_timestep=low, max_timestep=high)
    for name in ("dmd", "critic"):
        drawn = jnp.asarray(golden[f"{name}_raw_timesteps_randint"][:, 0])
        sigma = scores.sigma_of(drawn, config)
        np.testing.assert_allclose(sigma, golden[f"{name}_sigma_video"][:, 0], atol=2e-7)
        np.testing.assert_allclose(sigma, golden[f"{name}_sigma_audio"][:, 5], atol=2e-7)


def test_drawn_levels_cover_the_range():
    keys = jax.random.split(jax.random.key(0), 4000)
    sigma = np.asarray(scores.draw_sigmas(keys, ScoreConfig()))
    table = scores.sigma_table()
    assert sigma.min() == table[20]
    assert table[960] < sigma.max() <= table[980]
    # spec: mean 0.82, median 0.896
    assert abs(sigma.mean() - 0.82) < 0.01
    assert abs(np.median(sigma) - 0.896) < 0.01


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_student_sigmas(golden, version):
    steps = golden[f"student_steps_{version}"]
    np.testing.assert_allclose(
        flow.student_sigmas(steps[:-1]), golden[f"student_sigmas_{version}"], atol=2e-7
    )


def test_noising(golden):
    x0, eps = tokens(golden["noise_x0"]), tokens(golden["noise_eps"])
    for name in ("per_frame", "per_sample"):
        noisy = flow.add_noise(x0, eps, golden[f"noise_sigma_{name}"])
        np.testing.assert_allclose(noisy, tokens(golden[f"noise_out_{name}"]), atol=1e-6)


def test_guided_teacher(golden):
    cond = pair(golden, "dmd_real_cond_{}_x0")
    uncond = pair(golden, "dmd_real_uncond_{}_x0")
    keys = jax.random.split(jax.random.key(0), 2)
    scale = scores.draw_guidance(keys, ScoreConfig(video_cfg=3.0, audio_cfg=5.0))
    real = jax.tree.map(
        lambda c, u, w: scores.guide_each({"cond": c, "uncond": u}, w, ScoreConfig()),
        cond,
        uncond,
        scale,
    )
    expected = pair(golden, "dmd_real_cfg_{}_x0")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), real, expected)


def test_dmd_gradient_and_loss(golden):
    x = pair(golden, "dmd_generated_{}")
    gradient = jax.tree.map(
        losses.dmd_gradient, x, pair(golden, "dmd_fake_{}_x0"), pair(golden, "dmd_real_cfg_{}_x0")
    )
    expected = pair(golden, "dmd_grad_normalised_{}")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), gradient, expected)
    loss = jax.tree.map(losses.dmd_loss, gradient)
    np.testing.assert_allclose(jnp.mean(loss.video), golden["dmd_loss_video"], rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(loss.audio), golden["dmd_loss_audio"], rtol=1e-5)
    total = losses.total(loss, LossWeights())
    np.testing.assert_allclose(total, golden["dmd_loss_total_float64"], rtol=1e-5)


def test_dmd_gradient_is_that_of_the_written_loss(golden):
    """d/dx of 0.5 mean((x - stopgrad(x - g))^2), in float64, is g / size: what is pulled back."""
    x = pair(golden, "dmd_generated_{}")
    for stream in ("video", "audio"):
        sample, fake, real = (
            np.asarray(getattr(p, stream), np.float64)
            for p in (x, pair(golden, "dmd_fake_{}_x0"), pair(golden, "dmd_real_cfg_{}_x0"))
        )
        normaliser = np.abs(sample - real).mean(axis=(1, 2), keepdims=True) + 1e-8
        g = (fake - real) / normaliser
        target = sample - g

        def loss(v, target=target):
            return 0.5 * np.mean((v - target) ** 2)

        step, index = 1e-6, (1, 2, 3)
        up, down = sample.copy(), sample.copy()
        up[index] += step
        down[index] -= step
        finite_difference = (loss(up) - loss(down)) / (2 * step)
        ours = losses.dmd_gradient(sample, fake, real)[index] / sample.size
        np.testing.assert_allclose(ours, finite_difference, rtol=1e-4)
        expected = tokens(golden[f"dmd_grad_wrt_generated_{stream}"])
        np.testing.assert_allclose(losses.dmd_gradient(sample, fake, real) / sample.size, expected,
                                   atol=1e-8)  # fmt: skip


def test_critic_loss(golden):
    x, noise = pair(golden, "dmd_generated_{}"), pair(golden, "critic_noise_{}")
    sigma = AVLatents(golden["critic_sigma_video"][:, 0], golden["critic_sigma_audio"][:, 0])
    noisy = jax.tree.map(flow.add_noise, x, noise, sigma)
    expected = pair(golden, "critic_noisy_{}")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), noisy, expected)
    predicted = pair(golden, "critic_pred_{}_x0")
    velocity = jax.tree.map(flow.x0_to_velocity, noisy, predicted, sigma)
    loss = jax.tree.map(losses.flow_matching_loss, velocity, x, noise)
    np.testing.assert_allclose(jnp.mean(loss.video), golden["critic_loss_video"], rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(loss.audio), golden["critic_loss_audio"], rtol=1e-5)


def test_guidance_from_a_range():
    keys = jax.random.split(jax.random.key(0), 1000)
    scale = scores.draw_guidance(keys, ScoreConfig(video_cfg=(1.0, 3.5), audio_cfg=(2.0, 7.0)))
    assert 1.0 <= scale.video.min() < 1.1
    assert 3.4 < scale.video.max() <= 3.5
    assert abs(float(scale.audio.mean()) - 4.5) < 0.1
    assert abs(float(jnp.corrcoef(scale.video, scale.audio)[0, 1])) < 0.1
    np.testing.assert_array_equal(scores.draw_guidance(keys[:3], ScoreConfig()).video, 3.0)
    assert ScoreConfig(1.0, 1.0).passes() == ("cond",)
    assert ScoreConfig((1.0, 2.0), 1.0).passes() == ("cond", "uncond")


def test_guidance_of_scores_is_that_of_the_sampler():
    """One sample at a time, with a scale of its own, by the formula of LTX-2's pipelines."""
    config = ScoreConfig((1.0, 3.0), 1.0, stg=0.7, stg_blocks=(1,))
    assert config.passes() == ("cond", "uncond", "perturbed")
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    cfg = jnp.array([1.5, 2.5])
    ours = scores.guide_each(dict(zip(config.passes(), x, strict=True)), cfg, config)
    for i in range(2):
        settings = Guidance(cfg=float(cfg[i]), stg=0.7, stg_blocks=(1,))
        expected = guide(*x[:, i : i + 1], None, settings)
        np.testing.assert_allclose(ours[i : i + 1], expected, atol=1e-6)


def test_nan_is_not_hidden():
    x = jnp.ones((1, 2, 3))
    assert jnp.isnan(losses.dmd_gradient(x, x.at[0, 0, 0].set(jnp.nan), x)).any()


def test_bands():
    """Means per band of sigma; empty bands are NaN and clean values do not count."""
    values = AVLatents(jnp.array([1.0, 2.0, 4.0, 9.0]), jnp.array([1.0, 1.0, 3.0, 9.0]))
    metrics = losses.bands("critic", values, jnp.array([0.1, 0.3, 0.5, 0.0]))
    assert metrics["band/critic_video_0-0.25"] == 1.0
    assert metrics["band/critic_video_0.25-0.5"] == 3.0
    assert metrics["band/critic_audio_0.25-0.5"] == 2.0
    assert jnp.isnan(metrics["band/critic_video_0.75-1"])


def test_what_is_given_does_not_count():
    """Means are over the samples whose stream is generated; the loss itself is over all."""
    values = AVLatents(jnp.array([2.0, 4.0]), jnp.array([0.0, 3.0]))
    sigma = AVLatents(jnp.array([0.1, 0.6]), jnp.array([0.0, 0.6]))
    generated = jax.tree.map(lambda s: s > 0, sigma)
    metrics = losses.report("generator", values, losses.LossWeights(), sigma, generated)
    assert metrics["generator/loss"] == 3.0 + 1.5
    assert metrics["generator/loss_video"] == metrics["generator/loss_audio"] == 3.0
    assert metrics["band/generator_audio_0.5-0.75"] == 3.0
    assert jnp.isnan(metrics["band/generator_audio_0-0.25"])
    plain = losses.report("generator", values, losses.LossWeights())
    assert plain["generator/loss_audio"] == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_timestep": 0}, "0 < min <= max <= 1000"),
        ({"min_timestep": 500, "max_timestep": 400}, "not 500 and 400"),
        ({"context": "causal"}, "one of"),
        ({"video_cfg": (3.0, 1.0)}, "a range"),
        ({"stg": 1.0}, "stg_blocks is empty"),
    ],
)
def test_bad_score_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScoreConfig(**changes)
