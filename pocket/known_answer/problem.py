"""What `known_answer` trains and how it judges: sizes, networks, and samples of each of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow, student
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import SampleConfig, sample
from omniforcing_jax.sampling.whole_clip import clip_x0
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.types import AVLatents
from pocket.known_answer.gaussian_world import GaussianTeacher, GaussianWorld, make_teacher

STAGES = ("pre-training", "stage I", "stage II", "stage III")
LAYOUT = BlockLayout(1, 2, 1, 3)
NUM_BLOCKS, NUM_SINKS, TEACHER_STEPS = 3, 4, 40


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of a run.

    Attributes:
      steps: training steps of pre-training and of the three stages.
      batch: samples per training step.
      trajectories: ODE trajectories that stage II reads.
      samples: samples by which a distribution is judged.
      points: measurements per stage, besides the one before its first step.
      timesteps: of the student's denoising steps.
      seed: of everything random.
    """

    steps: tuple[int, int, int, int] = (1500, 1500, 600, 1000)
    batch: int = 128
    trajectories: int = 8192
    samples: int = 4096
    points: int = 20
    timesteps: tuple[int, ...] = (1000, 909, 421)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """The world and the networks that shall learn it."""

    settings: Settings = dataclasses.field(default_factory=Settings)

    @functools.cached_property
    def world(self) -> GaussianWorld:
        """Two channels of video, three of audio; one patch per video latent."""
        config = tiny(video_channels=2, audio_channels=3)
        return GaussianWorld(config, LAYOUT, NUM_BLOCKS, seed=self.settings.seed)

    @functools.cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student, with the final 0."""
        return tuple(flow.student_sigmas(self.settings.timesteps, TEACHER_STEPS).tolist())

    @functools.cached_property
    def teacher(self) -> tuple[GaussianTeacher, dict]:
        """The analytic teacher and its parameters."""
        return make_teacher(self.world)

    @property
    def network(self) -> Transformer:
        """Bidirectional: stage I's student, and the critic."""
        return Transformer(self.world.config)

    @property
    def causal_network(self) -> Transformer:
        """The block-causal student: the same with sink tokens."""
        return Transformer(dataclasses.replace(self.world.config, num_audio_sinks=NUM_SINKS))

    @property
    def rollout(self) -> RolloutConfig:
        """How a causal student samples; its window holds the whole clip."""
        cache = CacheConfig(LAYOUT, window=NUM_BLOCKS - 1)
        return RolloutConfig(cache, self.sigmas, height=1, width=1)

    def key(self, use: int) -> jax.Array:
        """A key for one use; training steps draw from the stages' own seeds."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), use)

    @functools.cached_property
    def test_text(self) -> dict[str, jax.Array]:
        """Prompts of the samples by which a distribution is judged."""
        return self.world.prompt_batch(self.settings.samples)


# -- samples by which a network is judged ------------------------------------------------------


def sample_euler(problem: Problem, model, params, num_steps: int = TEACHER_STEPS) -> AVLatents:
    """Samples of a bidirectional model by the LTX-2 schedule and Euler steps."""
    contexts = tuple(problem.test_text.values())
    return sample(model, params, contexts, None, problem.key(1), sample_config(problem, num_steps))


def sample_config(problem: Problem, num_steps: int) -> SampleConfig:
    """The teacher's sampler."""
    clip = problem.world.clip
    sigmas = tuple(flow.ltx2_schedule(num_steps).tolist())
    return SampleConfig(sigmas, clip, NO_GUIDANCE)


@functools.partial(jax.jit, static_argnames=("model", "clip", "sigmas"))
def few_steps(
    model: Transformer,
    params,
    contexts,
    key: jax.Array,
    clip: ClipGeometry,
    sigmas: tuple[float, ...],
) -> AVLatents:
    """Samples of a bidirectional few-step student: predict x0, add fresh noise, repeat."""
    batch = contexts[0].shape[0]
    levels = jnp.asarray(sigmas, jnp.float32)

    def noise(step):
        keys = jax.random.split(jax.random.fold_in(key, step), batch)
        return draw_noise(keys, clip, model)

    def step(x, i):
        x0 = clip_x0(model, params, x, jnp.full((batch,), levels[i]), contexts, clip)
        return jax.tree.map(
            lambda x0, n: flow.add_noise(x0, n, levels[i + 1]), x0, noise(i + 1)
        ), None

    return jax.lax.scan(step, noise(0), jnp.arange(len(sigmas) - 1))[0]


def sample_few_steps(problem: Problem, params) -> AVLatents:
    """Samples of stage I's student, all steps."""
    contexts = tuple(problem.test_text.values())
    clip, key = problem.world.clip, problem.key(2)
    return few_steps(problem.network, params, contexts, key, clip, problem.sigmas)


def sample_causal(problem: Problem, params, num_sinks: int = NUM_SINKS) -> AVLatents:
    """Samples of a block-causal student: the rollout that streaming uses."""
    model = problem.causal_network if num_sinks else problem.network
    config = problem.rollout
    return _roll_out(model, params, tuple(problem.test_text.values()), problem.key(3), config)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _roll_out(model, params, contexts, key, config: RolloutConfig) -> AVLatents:
    text = student.prompt_kv(model, params, *contexts, levels=config.sigma_levels)
    sizes = {"num_blocks": NUM_BLOCKS, "batch": contexts[0].shape[0]}
    rope = config.rope(model, NUM_BLOCKS)
    return student.rollout(model, params, text, rope, key, config=config, **sizes)


@functools.partial(jax.jit, static_argnames="generator")
def _training_samples(generator, params, contexts, key, step_key) -> AVLatents:
    keys = jax.random.split(key, contexts[0].shape[0])
    return generator.sample(params, contexts, keys, step_key)


def sample_as_trained(problem: Problem, generator, params) -> AVLatents:
    """What a DMD stage compares with the teacher: samples that leave at a random step.

    Stage I draws a step per sample, stage III one per batch: here a third of the samples each.
    """
    key, contexts = problem.key(10), tuple(problem.test_text.values())
    if isinstance(generator, BidirectionalStudent):
        return _training_samples(generator, params, contexts, key, key)
    parts, exits = [], generator.num_steps
    share = problem.settings.samples // exits // problem.world.num_prompts
    contexts = jax.tree.map(lambda x: x[: share * problem.world.num_prompts], contexts)
    for exit_step in range(exits):
        draws = (jax.random.fold_in(key, i) for i in range(1000))
        step_key = next(k for k in draws if jax.random.randint(k, (), 0, exits) == exit_step)
        noise_key = jax.random.fold_in(key, exit_step)
        parts.append(_training_samples(generator, params, contexts, noise_key, step_key))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
