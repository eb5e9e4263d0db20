"""The three stages on a problem whose answer is known: Gaussian clips and their exact score.

    python -m pocket.known_answer.solve --output outputs/known_answer
    python -m pocket.known_answer.solve --timesteps 1000 --output outputs/one_step

Took 26 minutes on two CPU cores shared with other work.

Everything but the teacher is what a real run uses: the stages, their optimizers, the rollout with
its cache, and a transformer with all of LTX-2's mechanisms at tiny size. The teacher is the closed
form of `gaussian_world`, so each stage can be held against the truth, and not merely against its
own loss.

  0    a bidirectional transformer is pre-trained on exact samples; student and critic start there
  I    bidirectional DMD to a few steps
  II   regression under the block-causal masks, with sink tokens: to the velocities of stage I's
       student (Eq. 6), and to the ends of the teacher's ODE trajectories (the public code)
  III  self-forcing DMD, from the second student of stage II

Writes `known_answer.json` (settings, table, curves), `known_answer.png` (losses and distances) and
`training_curves.png` (what a training log shows of each stage).
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from omniforcing_jax import programs
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.io import outputs
from omniforcing_jax.models.transformer.config import tiny
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.sampling import flow, student
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.teacher import SampleConfig, sample
from omniforcing_jax.sampling.trajectories import sample_trajectory, schedule_indices
from omniforcing_jax.sampling.whole_clip import clip_x0
from omniforcing_jax.training.config.settings import DMDStage, RegressionConfig, StageII
from omniforcing_jax.training.metrics import Averages
from omniforcing_jax.training.objectives.common import Frozen, TextInput
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.ode_regression import ODERegression
from omniforcing_jax.training.objectives.scores import ScoreConfig
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import TrainState, create_network, create_state
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import AVLatents
from pocket.known_answer import plot
from pocket.known_answer.gaussian_world import (
    DISTANCES,
    GaussianTeacher,
    GaussianWorld,
    best_regression_student,
    make_teacher,
)
from pocket.report import markdown

STAGES = ("pre-training", "stage I", "stage II", "stage III")
LAYOUT = BlockLayout(1, 2, 1, 3)
NUM_BLOCKS, NUM_SINKS, TEACHER_STEPS = 3, 4, 40
EMA = EMAConfig(0.95)
# The teacher is the truth itself: there is nothing to guide it towards.
UNGUIDED = {"video_cfg": 1.0, "audio_cfg": 1.0}


@dataclasses.dataclass(frozen=True)
class GaussianProblem:
    """The world and the networks that shall learn it, and the size of a run."""

    steps: tuple[int, int, int, int] = (1500, 1500, 600, 1000)  # of training, by `STAGES`
    batch: int = 128  # samples per training step
    trajectories: int = 8192  # ODE trajectories that stage II reads
    samples: int = 4096  # by which a distribution is judged
    points: int = 20  # measurements per stage, besides the one before its first step
    timesteps: tuple[int, ...] = (1000, 909, 421)  # of the student's denoising steps
    seed: int = 0  # of everything random

    @functools.cached_property
    def world(self) -> GaussianWorld:
        """Two channels of video, three of audio; one patch per video latent."""
        config = tiny(video_channels=2, audio_channels=3)
        return GaussianWorld(config, LAYOUT, NUM_BLOCKS, seed=self.seed)

    @functools.cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student, with the final 0."""
        schedule = flow.ltx2_schedule(TEACHER_STEPS)
        return tuple(flow.student_sigmas(self.timesteps, schedule).tolist())

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
        return jax.random.fold_in(jax.random.key(self.seed), use)

    @functools.cached_property
    def contexts(self) -> tuple[jax.Array, jax.Array]:
        """Of the prompts of the samples by which a distribution is judged."""
        return tuple(self.world.prompt_batch(self.samples).values())


# -- samples by which a network is judged ------------------------------------------------------


def sample_euler(
    problem: GaussianProblem, model, params, num_steps: int = TEACHER_STEPS
) -> AVLatents:
    """Samples of a bidirectional model by the LTX-2 schedule and Euler steps."""
    config = sample_config(problem, num_steps)
    return sample(model, params, problem.contexts, None, problem.key(1), config)


def sample_config(problem: GaussianProblem, num_steps: int) -> SampleConfig:
    """The teacher's sampler."""
    clip = problem.world.clip
    return SampleConfig(SamplingRecipe.of_steps(num_steps), clip)


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


def sample_few_steps(problem: GaussianProblem, params) -> AVLatents:
    """Samples of stage I's student, all steps."""
    clip, key = problem.world.clip, problem.key(2)
    return few_steps(problem.network, params, problem.contexts, key, clip, problem.sigmas)


def sample_causal(problem: GaussianProblem, params, num_sinks: int = NUM_SINKS) -> AVLatents:
    """Samples of a block-causal student: the rollout that streaming uses."""
    model = problem.causal_network if num_sinks else problem.network
    config = problem.rollout
    return _roll_out(model, params, problem.contexts, problem.key(3), config)


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


def sample_as_trained(problem: GaussianProblem, generator, params) -> AVLatents:
    """What a DMD stage compares with the teacher: samples that leave at a random step.

    Stage I draws a step per sample, stage III one per batch: here a third of the samples each.
    """
    key, contexts = problem.key(10), problem.contexts
    if isinstance(generator, BidirectionalStudent):
        return _training_samples(generator, params, contexts, key, key)
    parts, exits = [], generator.num_steps
    share = problem.samples // exits // problem.world.num_prompts
    contexts = jax.tree.map(lambda x: x[: share * problem.world.num_prompts], contexts)
    for exit_step in range(exits):
        draws = (jax.random.fold_in(key, i) for i in range(1000))
        step_key = next(k for k in draws if jax.random.randint(k, (), 0, exits) == exit_step)
        noise_key = jax.random.fold_in(key, exit_step)
        parts.append(_training_samples(generator, params, contexts, noise_key, step_key))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


# -- training --------------------------------------------------------------------------------------


def train(
    name: str,
    problem: GaussianProblem,
    stage: DMD | ODERegression,
    state: TrainState,
    frozen: Frozen,
    batch_at: Callable[[int], dict[str, jax.Array]],
    samplers: dict[str, Callable[[Any], AVLatents]],
) -> tuple[Any, dict[str, Any]]:
    """Trains one stage and measures the generator's average as it goes.

    Returns:
      The averaged parameters of the generator, and curves: "steps" [points + 1], "distances"
      {sampler: {name: values}} and "metrics" {name: values}; a metric is the mean since the last
      point, None at the start.
    """
    num_steps = problem.steps[STAGES.index(name.partition(" (")[0])]
    every = max(1, num_steps // problem.points)
    averages, records, pending = Averages(), [], []
    start = time.perf_counter()
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            for scalars in jax.device_get(pending):
                averages.add({key: float(value) for key, value in scalars.items()})
            pending, scalars = [], averages.take()
            distances = {
                name: problem.world.distances(draw(state.generator.ema))
                for name, draw in samplers.items()
            }
            records.append((step, distances, scalars))
            shown = {key: f"{x:.3g}" for key, x in scalars.items() if key.endswith("/loss")}
            shown |= {key: f"{x:.3f}" for key, x in distances["sampler"].items()}
            line = "  ".join(f"{key} {x}" for key, x in shown.items())
            seconds = time.perf_counter() - start
            print(f"{name} {step}/{num_steps} ({seconds:.0f} s)  {line}", flush=True)
        if step < num_steps:
            state, metrics = stage.train_step(state, frozen, batch_at(step), step)
            pending.append(metrics)
    return state.generator.ema, _curves(records)


def _curves(records) -> dict[str, Any]:
    steps, distances, scalars = zip(*records, strict=True)
    # norms by parameter group say little here, and are most of a log
    names = sorted(
        {n for s in scalars for n in s if "grad_norm/" not in n or n.endswith("grad_norm/audio")}
    )
    return {
        "steps": list(steps),
        "distances": {
            sampler: {n: [_round(d[sampler][n]) for d in distances] for n in DISTANCES}
            for sampler in distances[0]
        },
        "metrics": {n: [_round(s.get(n)) for s in scalars] for n in names},
    }


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def adam(learning_rate: float, num_updates: int, **changes: Any):
    """Adam with a short warm-up and a cosine to a tenth of the learning rate."""
    shape = {"schedule": "cosine", "warmup_steps": 20, "end_scale": 0.1}
    decay_steps = max(1, num_updates)
    return make_optimizer(
        OptimizerConfig(learning_rate, decay_steps=decay_steps, **shape, **changes)
    )


def pretrain(problem: GaussianProblem):
    """Flow matching of exact samples by a bidirectional transformer; parameters and curves.

    This is stage II with a single block, which holds the whole clip.
    """
    clip, model = problem.world.clip, problem.network
    layout = dataclasses.replace(
        LAYOUT, first_video_frames=clip.video_frames, first_audio_frames=clip.audio_frames
    )
    optimizer = adam(3e-3, problem.steps[0], beta2=0.99)
    config = RolloutConfig(CacheConfig(layout), problem.sigmas, height=1, width=1)
    # one block has no history, so clean states would teach nothing
    regression = StageII(
        seed=problem.seed, ema=EMA, regression=RegressionConfig("flow", include_clean=False)
    )
    stage = ODERegression(model, config, 1, TextInput(), optimizer, regression)
    params = jax.jit(lambda key: init_params(model, key))(problem.key(4))
    text = problem.world.prompt_batch(problem.batch)

    @jax.jit
    def batch_at(step):
        clean = problem.world.sample(jax.random.fold_in(problem.key(5), step), problem.batch)
        return {"video": clean.video[:, None], "audio": clean.audio[:, None], **text}

    samplers = {"sampler": functools.partial(sample_euler, problem, model)}
    state = create_state(create_network(_copy(params), optimizer, ema=True))
    return train(STAGES[0], problem, stage, state, Frozen(), batch_at, samplers)


def distribution_matching(
    problem: GaussianProblem,
    name: str,
    generator,
    learning_rates: tuple[float, float],
    params,
    critic,
):
    """Stage I or III, by its generator, from given weights; parameters and curves."""
    num_steps = problem.steps[STAGES.index(name)]
    config = DMDStage(seed=problem.seed, ema=EMA, score=ScoreConfig(**UNGUIDED))
    optimizers = (
        adam(learning_rates[0], num_steps // config.critic_updates, beta1=0.0),
        adam(learning_rates[1], num_steps, beta1=0.0),
    )
    teacher, teacher_params = problem.teacher
    stage = DMD(generator, teacher, problem.network, TextInput(), *optimizers, config)
    state = create_state(
        create_network(_copy(params), optimizers[0], ema=True),
        create_network(_copy(critic), optimizers[1], ema=False),
    )
    text = problem.world.prompt_batch(problem.batch)
    full = sample_few_steps if name == STAGES[1] else sample_causal
    samplers = {"sampler": functools.partial(full, problem)}
    if generator.num_steps > 1:
        samplers["random exit"] = functools.partial(sample_as_trained, problem, generator)
    return train(name, problem, stage, state, Frozen(teacher_params), lambda _: text, samplers)


def _copy(params):
    """The state is donated to every step, and these weights are needed again; on the device where
    the step leaves its result, or it is compiled again for the second step."""
    return jax.device_put(jax.tree.map(jnp.copy, params), jax.devices()[0])


def trajectories(
    problem: GaussianProblem, model, params, sigmas: tuple[float, ...]
) -> dict[str, Any]:
    """Stage II's data: states and velocities of a model's ODE at the student's noise levels.

    Args:
      sigmas: of the Euler steps; the student's are among them.
    """
    count = problem.trajectories
    text = problem.world.prompt_batch(count)
    config = SampleConfig(SamplingRecipe(sigmas), problem.world.clip)
    indices = schedule_indices(sigmas, problem.sigmas)
    keys = jax.random.split(problem.key(6), count)
    found = sample_trajectory(model, params, tuple(text.values()), None, keys, config, indices)
    return {
        "video": found.states.video,
        "audio": found.states.audio,
        "video_velocity": found.velocities.video,
        "audio_velocity": found.velocities.audio,
        "sigmas": jnp.tile(jnp.asarray(problem.sigmas, jnp.float32), (count, 1)),
        **text,
    }


def regress(problem: GaussianProblem, objective: str, params, data: dict[str, jax.Array]):
    """Stage II from stage I's weights and new sinks; parameters and curves."""
    model, optimizer = problem.causal_network, adam(1e-3, problem.steps[2], beta2=0.99)
    config = StageII(seed=problem.seed, ema=EMA, regression=RegressionConfig(objective))
    stage = ODERegression(model, problem.rollout, NUM_BLOCKS, TextInput(), optimizer, config)
    sinks = jax.jit(lambda key: init_params(model, key)["audio_sinks"])(problem.key(7))
    params = _copy(params | {"audio_sinks": sinks})
    state = create_state(create_network(params, optimizer, ema=True))

    @jax.jit
    def batch_at(step):
        key = jax.random.fold_in(problem.key(8), step)
        rows = jax.random.randint(key, (problem.batch,), 0, problem.trajectories)
        return jax.tree.map(lambda x: x[rows], data)

    samplers = {"sampler": functools.partial(sample_causal, problem)}
    name = f"{STAGES[2]} ({objective})"
    return train(name, problem, stage, state, Frozen(), batch_at, samplers)


def run(problem: GaussianProblem) -> dict[str, Any]:
    """All stages, one after the other; what `known_answer.json` holds."""
    world, network = problem.world, problem.network
    pretrained, curves = pretrain(problem)
    stages = {STAGES[0]: curves}
    first = BidirectionalStudent(network, world.clip, problem.sigmas)
    bidirectional, stages[STAGES[1]] = distribution_matching(
        problem, STAGES[1], first, (1e-3, 1e-3), pretrained, pretrained
    )
    # Eq. 6 regresses the few-step student's own velocities: those of a many-step teacher point at
    # posterior means, from which no few-step student can be made.
    data = {
        "velocity": trajectories(problem, network, bidirectional, problem.sigmas),
        "x0": trajectories(problem, *problem.teacher, sample_config(problem, TEACHER_STEPS).sigmas),
    }
    students = {}
    for objective in data:
        found = regress(problem, objective, bidirectional, data[objective])
        students[objective], stages[f"{STAGES[2]} ({objective})"] = found
    last = UnrolledStudent(
        problem.causal_network, problem.rollout, NUM_BLOCKS, scored_blocks=NUM_BLOCKS
    )
    student, stages[STAGES[3]] = distribution_matching(
        problem, STAGES[3], last, (2e-4, 5e-4), students["x0"], pretrained
    )
    steps, few = f"{TEACHER_STEPS} Euler steps", f"{len(problem.sigmas) - 1} step(s)"
    best = functools.partial(best_regression_student, world, problem.sigmas, batch=problem.samples)
    rows = {
        "exact samples": world.sample(problem.key(9), problem.samples),
        f"teacher, {steps}": sample_euler(problem, *problem.teacher),
        f"pre-trained, {steps}": sample_euler(problem, network, pretrained),
        f"pre-trained, {few}": sample_few_steps(problem, pretrained),
        f"stage I, {few}": sample_few_steps(problem, bidirectional),
        "stage I, random exit": sample_as_trained(problem, first, bidirectional),
        "stage I's weights, rolled out causally": sample_causal(problem, bidirectional, 0),
        "stage II (velocity)": sample_causal(problem, students["velocity"]),
        "stage II (x0)": sample_causal(problem, students["x0"]),
        "optimum of stage II (x0)": best("x0", causal=True),
        "the same without causality": best("x0", causal=False),
        "optimum for the teacher's velocities": best("velocity", causal=True),
        "stage III": sample_causal(problem, student),
        "stage III, random exit": sample_as_trained(problem, last, student),
    }
    if last.num_steps == 1:  # there is one exit: these rows would say the same twice
        rows = {name: samples for name, samples in rows.items() if "random exit" not in name}
    table = {
        name: {key: _round(value) for key, value in world.distances(samples).items()}
        for name, samples in rows.items()
    }
    return {"settings": dataclasses.asdict(problem), "table": table, "stages": stages}


def parse_arguments(argv: list[str] | None = None) -> tuple[GaussianProblem, pathlib.Path]:
    """What the command line asks for, and where it goes."""
    parser = programs.Parser("pocket.known_answer.solve", __doc__)
    add, default = parser.add_argument, GaussianProblem()
    add("--output", type=pathlib.Path, required=True, help="folder for the JSON file and the plots")
    add("--steps", type=int, nargs=4, default=default.steps, help=", ".join(STAGES))
    levels = "of the student's steps"
    add("--timesteps", type=int, nargs="+", default=default.timesteps, help=levels)
    for name, what in (
        ("batch", "samples per training step"),
        ("samples", "samples per measurement"),
        ("points", "measurements per stage"),
        ("seed", "of everything random"),
    ):
        add(f"--{name}", type=int, default=getattr(default, name), help=what)
    args = vars(parser.parse_args(argv))
    if min(*args["steps"], args["batch"], args["samples"], args["points"]) < 1:
        parser.error("steps, batch, samples and points must be positive")
    output = args.pop("output")
    lists = {name: tuple(args[name]) for name in ("steps", "timesteps")}
    return GaussianProblem(**args | lists), output


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Command line: runs everything, writes the JSON file and the plots, prints the table."""
    problem, output = parse_arguments(argv)
    outputs.claim_folder(output, "pocket.known_answer.solve")
    start = time.perf_counter()
    result = run(problem) | {"minutes": round((time.perf_counter() - start) / 60, 1)}
    (output / "known_answer.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [(name, *(f"{row[d]:.3f}" for d in DISTANCES)) for name, row in result["table"].items()]
    print(markdown([name.replace("_", " ") for name in DISTANCES], rows))
    plot.draw(result, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
