"""The world with known answers, and the stages against it; the long run is the benchmark."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniforcing_jax.evaluation.distances import gaussian_distance
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.sampling.whole_clip import clip_velocity
from omniforcing_jax.training.config.settings import DMDStage
from omniforcing_jax.training.objectives.common import Frozen, TextInput, numbered
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.scores import ScoreConfig
from omniforcing_jax.types import AVLatents
from pocket.known_answer import gaussian_world, plot, solve
from pocket.known_answer.gaussian_world import (
    GaussianWorld,
    best_regression_student,
    join,
    make_teacher,
)
from pocket.known_answer.solve import (
    LAYOUT,
    TEACHER_STEPS,
    UNGUIDED,
    GaussianProblem,
    few_steps,
    sample_config,
    sample_euler,
)

WORLD = GaussianWorld(tiny(video_channels=2, audio_channels=3), LAYOUT)
TEACHER, TEACHER_PARAMS = make_teacher(WORLD)
SCORE = ScoreConfig(**UNGUIDED)
SIGMAS = GaussianProblem().sigmas


# -- the analytic teacher ----------------------------------------------------------------------


def test_world_is_as_described():
    """Mean by prompt, correlation that falls with time, and coupling of the modalities."""
    times, channels = WORLD._coordinates()
    assert WORLD.sizes == (5 * 2, 7 * 3)
    assert np.linalg.norm(WORLD.mean[0] - WORLD.mean[1]) > 1
    covariance = WORLD.covariance
    assert np.linalg.eigvalsh(covariance)[0] > 0
    np.testing.assert_allclose(np.diag(covariance), WORLD.std**2)
    same = (channels[:, None] == channels[None, :]) & (np.abs(times[:, None] - times) == 1.0)
    np.testing.assert_allclose(covariance[same], WORLD.std**2 * np.exp(-1 / WORLD.correlation_time))
    video = slice(0, WORLD.sizes[0])
    assert np.abs(covariance[video, WORLD.sizes[0] :]).max() > 0.4 * WORLD.std**2
    exact = WORLD.distances(WORLD.sample(jax.random.key(0), 8192))
    assert max(exact.values()) < 0.08, exact


def test_wasserstein_of_known_gaussians():
    """Commuting covariances: sum of (sqrt(a) - sqrt(b))^2."""
    a, b = np.diag([4.0, 9.0]), np.diag([1.0, 16.0])
    mean = np.zeros(2)
    assert gaussian_distance(mean, a, mean + 1, b) == pytest.approx(2 + 1 + 1)
    assert gaussian_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-12)


def test_teacher_velocity_is_that_of_the_density():
    """v from the gradient of log p(x_s), which knows nothing of eigenvectors or E[x0 | x]."""
    batch, sigma = 4, jnp.array([0.2, 0.5, 0.8, 0.97])
    text = WORLD.prompt_batch(batch)
    x = join(WORLD.sample(jax.random.key(1), batch))
    velocity = clip_velocity(
        TEACHER, TEACHER_PARAMS, WORLD.split(x), sigma, tuple(text.values()), WORLD.clip
    )
    velocity = np.asarray(join(velocity))

    def log_density(x, s, mean):
        covariance = (1 - s) ** 2 * WORLD.covariance + s**2 * np.eye(x.size)
        return -0.5 * (x - (1 - s) * mean) @ np.linalg.solve(covariance, x - (1 - s) * mean)

    for i, s in enumerate(np.asarray(sigma, np.float64)):
        at, mean = np.asarray(x[i], np.float64), WORLD.mean[i % 2]
        steps = 1e-4 * np.eye(at.size)
        score = [
            (log_density(at + e, s, mean) - log_density(at - e, s, mean)) / 2e-4 for e in steps
        ]
        # Tweedie: (1 - s) E[x0 | x] = x + s^2 score, and v = (x - E[x0 | x]) / s
        expected = (at - (at + s**2 * np.array(score)) / (1 - s)) / s
        np.testing.assert_allclose(velocity[i], expected, atol=2e-4 * np.abs(expected).max())


def test_teacher_samples_the_world():
    """100 Euler steps: right means, and covariances up to the steps' and the samples' errors."""
    problem = GaussianProblem(samples=4096)
    fine = sample_euler(problem, TEACHER, TEACHER_PARAMS, 100)
    found = problem.world.distances(fine)
    assert max(found["mean_video"], found["mean_audio"]) < 0.04, found
    assert max(found["covariance"], found["cross_covariance"]) < 0.12, found
    coarse = sample_euler(problem, TEACHER, TEACHER_PARAMS, 10)
    assert problem.world.distances(coarse)["covariance"] > 0.2, "ten steps cannot be exact"


def test_teacher_refuses_other_contexts():
    x, text = WORLD.sample(jax.random.key(0), 2), WORLD.prompt_batch(2)
    levels = AVLatents(jnp.full((2, 5), 0.5), jnp.full((2, 7), 0.5))
    with pytest.raises(ValueError, match="at one noise level"):
        clip_velocity(TEACHER, TEACHER_PARAMS, x, levels, tuple(text.values()), WORLD.clip)


# -- distribution matching with a generator and a critic that are closed forms, too ------------


@dataclasses.dataclass(frozen=True)
class AffineGenerator:
    """x = mean[prompt] + noise @ factor^T: any Gaussian, so also the right one."""

    @property
    def clip(self) -> ClipGeometry:
        return WORLD.clip

    def simulate(self, weights, contexts, keys, step_key, condition) -> None:
        """There are no steps before the only one."""

    def sample(self, weights, contexts, keys, step_key, condition) -> AVLatents:
        index = jnp.arange(keys.shape[0]) % WORLD.num_prompts
        noise = join(draw_noise(keys, WORLD.clip, TEACHER))
        return WORLD.split(weights["mean"][index] + noise @ weights["factor"].T)

    def sample_with_pullback(self, weights, contexts, keys, trace):
        sample, pullback = jax.vjp(lambda w: self.sample(w, contexts, keys, trace, None), weights)
        return sample, lambda cotangent: pullback(cotangent)[0]


def affine_dmd() -> DMD:
    return DMD(AffineGenerator(), TEACHER, TEACHER, TextInput(), None, None, DMDStage(score=SCORE))


def true_weights() -> dict[str, jax.Array]:
    factor = np.linalg.cholesky(WORLD.covariance)
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), {"mean": WORLD.mean, "factor": factor}
    )


def exact_critic(weights) -> dict[str, jax.Array]:
    """The fake score of an affine generator, in closed form."""
    values, vectors = jnp.linalg.eigh(weights["factor"] @ weights["factor"].T)
    return TEACHER_PARAMS | {
        "mean": weights["mean"],
        "eigenvalues": values,
        "eigenvectors": vectors,
    }


@jax.jit
def generator_gradient(weights, critic, key):
    batch = numbered(WORLD.prompt_batch(512))
    frozen = Frozen(TEACHER_PARAMS)
    return affine_dmd().generator_gradient(weights, critic, frozen, batch, key)


def test_critic_gradient_vanishes_in_expectation_at_the_true_score():
    """Flow matching of the generator's samples leaves the exact score where it is."""
    dmd, batch = affine_dmd(), numbered(WORLD.prompt_batch(512))

    @jax.jit
    def gradients(critic, keys):
        def one(key):
            return dmd.critic_gradient(true_weights(), critic, Frozen(), batch, key)[0]

        found = jax.lax.map(one, keys)
        # eigenvectors at a fixed basis: their gradient is that of a direction in matrix space
        return {name: found[name] for name in ("mean", "eigenvalues", "eigenvectors")}

    keys = jax.random.split(jax.random.key(3), 64)
    off = TEACHER_PARAMS | {
        "mean": TEACHER_PARAMS["mean"] + 0.1,
        "eigenvalues": 1.3 * TEACHER_PARAMS["eigenvalues"],
        "eigenvectors": 1.05 * TEACHER_PARAMS["eigenvectors"],
    }
    at_truth, away = gradients(exact_critic(true_weights()), keys), gradients(off, keys)
    for name, values in at_truth.items():
        error = jnp.linalg.norm(values.std(axis=0)) / np.sqrt(len(keys))
        assert float(jnp.linalg.norm(values.mean(axis=0)) / error) < 1.6, name
        assert float(jnp.linalg.norm(away[name].mean(axis=0)) / error) > 5, name


def test_generator_gradient_vanishes_at_the_teachers_distribution():
    """And away from it points back: along what was added to the mean, and to the covariance."""
    key, truth = jax.random.key(4), true_weights()
    at_truth, _ = generator_gradient(truth, exact_critic(truth), key)
    shift = jax.random.normal(jax.random.key(5), truth["mean"].shape)
    moved = truth | {"mean": truth["mean"] + 0.1 * shift}
    away, _ = generator_gradient(moved, exact_critic(moved), key)
    # zero but for the rounding of two ways to write the same covariance
    assert float(jnp.abs(at_truth["mean"]).max()) < 1e-2 * float(jnp.abs(away["mean"]).max())
    along = jnp.sum(away["mean"] * shift)
    assert float(along / jnp.linalg.norm(away["mean"]) / jnp.linalg.norm(shift)) > 0.5
    wide = truth | {"factor": 1.2 * truth["factor"]}
    grown, _ = generator_gradient(wide, exact_critic(wide), key)
    assert float(jnp.sum(grown["factor"] * truth["factor"])) > 0


def test_distribution_matching_converges_with_exact_scores():
    """Descent on the DMD gradient, with the critic always exact, ends at the teacher."""
    truth = true_weights()
    weights = {"mean": 0 * truth["mean"], "factor": 0.5 * jnp.eye(truth["factor"].shape[0])}

    @jax.jit
    def descend(weights, keys):
        def step(weights, key):
            gradient, _ = generator_gradient(weights, exact_critic(weights), key)
            return jax.tree.map(lambda w, g: w - 2.0 * g, weights, gradient), None

        return jax.lax.scan(step, weights, keys)[0]

    def distance(weights):
        covariance = np.asarray(weights["factor"] @ weights["factor"].T, np.float64)
        pairs = zip(np.asarray(weights["mean"], np.float64), WORLD.mean, strict=True)
        squares = [gaussian_distance(m, covariance, mu, WORLD.covariance) for m, mu in pairs]
        return float(np.sqrt(np.mean(squares) / np.trace(WORLD.covariance)))

    before = distance(weights)
    after = distance(descend(weights, jax.random.split(jax.random.key(6), 200)))
    assert before > 0.8
    assert after < 0.1 * before, (before, after)


# -- the real network, and the benchmark's own parts -------------------------------------------


@pytest.mark.slow
def test_a_short_stage_lowers_the_distance():
    """Pre-training, which is stage II's step with one block, by a network of one layer."""

    class Small(GaussianProblem):
        @property
        def world(self) -> GaussianWorld:
            config = tiny(num_layers=1, video_channels=2, audio_channels=3)
            return GaussianWorld(config, LAYOUT)

    problem = Small(steps=(60, 1, 1, 1), batch=64, samples=512, points=1)
    _, curves = solve.pretrain(problem)
    assert curves["steps"] == [0, 60]
    start, end = curves["distances"]["sampler"]["wasserstein"]
    assert end < 0.8 * start, curves["distances"]
    assert curves["metrics"]["generator/loss"][0] is None


def test_trajectories_end_where_the_sampler_does():
    """Stage II's data: from noise to the world's samples, with the teacher's own velocities."""
    problem = GaussianProblem(trajectories=512)
    sigmas = sample_config(problem, TEACHER_STEPS).sigmas
    data = solve.trajectories(problem, TEACHER, TEACHER_PARAMS, sigmas)
    assert data["video"].shape == (512, len(SIGMAS), 5, 2)
    clean = AVLatents(data["video"][:, -1], data["audio"][:, -1])
    found = WORLD.distances(clean)
    assert max(found["mean_video"], found["mean_audio"]) < 0.1
    x = AVLatents(data["video"][:, 1], data["audio"][:, 1])
    contexts = (data["video_context"], data["audio_context"])
    velocity = clip_velocity(
        TEACHER, TEACHER_PARAMS, x, jnp.full((512,), SIGMAS[1]), contexts, WORLD.clip
    )
    np.testing.assert_allclose(data["audio_velocity"][:, 1], velocity.audio, atol=2e-4)


def test_optimum_of_stage_two():
    """Without causality the ends of trajectories are exact; what causality costs; what means do."""
    problem = GaussianProblem()

    def distances(objective, causal):
        samples = best_regression_student(WORLD, SIGMAS, objective, 4096, causal=causal)
        return WORLD.distances(samples)

    assert max(distances("x0", False).values()) < 0.12
    causal = distances("x0", True)
    assert max(causal["mean_video"], causal["mean_audio"]) < 0.04
    assert 0.2 < causal["covariance"] < 0.3
    # the regression on velocities is the teacher's own sampler with few, stochastic steps
    teacher = WORLD.distances(
        few_steps(
            TEACHER,
            TEACHER_PARAMS,
            problem.contexts,
            problem.key(2),
            WORLD.clip,
            SIGMAS,
        )
    )
    means = distances("velocity", False)
    assert means["covariance"] > 0.8
    assert means["wasserstein"] == pytest.approx(teacher["wasserstein"], abs=0.03)


def test_bad_command_lines_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        solve.parse_arguments(["--output", str(tmp_path), "--batch", "0"])
    assert "must be positive" in capsys.readouterr().err


def test_plots_are_drawn(tmp_path):
    """From a record with everything in it that a real one has."""
    curves = {
        "steps": [0, 5, 10],
        "distances": {"sampler": {name: [1.0, 0.5, 0.2] for name in gaussian_world.DISTANCES}},
        "metrics": {
            f"{network}/{name}": [None, 1.0, 0.5]
            for network in ("generator", "critic")
            for name in ("loss", "loss_video", "loss_audio", "grad_norm", "relative_update")
        },
    }
    curves["metrics"]["band/generator_video_0-0.25"] = [None, None, 1.0]
    names = ("pre-training", "stage I", "stage II (velocity)", "stage II (x0)", "stage III")
    teacher = {name: 0.1 for name in gaussian_world.DISTANCES}
    result = {"table": {"teacher": teacher}, "stages": {name: curves for name in names}}
    (tmp_path / "known_answer.json").write_text(json.dumps(result))
    plot.main([str(tmp_path / "known_answer.json")])
    for name in ("known_answer.png", "training_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
