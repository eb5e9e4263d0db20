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

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from omniforcing_jax.models.transformer.model import init_params
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.trajectories import sample_trajectory, schedule_indices
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
from pocket.known_answer import plot as known_answer_plot
from pocket.known_answer.gaussian_world import DISTANCES, best_regression_student
from pocket.known_answer.problem import (
    LAYOUT,
    NUM_BLOCKS,
    STAGES,
    TEACHER_STEPS,
    Problem,
    Settings,
    sample_as_trained,
    sample_causal,
    sample_config,
    sample_euler,
    sample_few_steps,
)

EMA = EMAConfig(0.95)
# The teacher is the truth itself: there is nothing to guide it towards.
UNGUIDED = {"video_cfg": 1.0, "audio_cfg": 1.0}


def train(
    name: str,
    problem: Problem,
    stage: DMD | ODERegression,
    state: TrainState,
    frozen: Frozen,
    batch_at: Callable[[int], dict[str, jax.Array]],
    num_steps: int,
    samplers: dict[str, Callable[[Any], AVLatents]],
) -> tuple[Any, dict[str, Any]]:
    """Trains one stage and measures the generator's average as it goes.

    Returns:
      The averaged parameters of the generator, and curves: "steps" [points + 1], "distances"
      {sampler: {name: values}} and "metrics" {name: values}; a metric is the mean since the last
      point, None at the start.
    """
    every = max(1, num_steps // problem.settings.points)
    averages, records, pending = Averages(), [], []
    start = time.perf_counter()
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            for scalars in jax.device_get(pending):
                averages.add({key: float(value) for key, value in scalars.items()})
            pending, scalars = [], averages.take()
            distances = {
                name: problem.world.distances(sample(state.generator.ema))
                for name, sample in samplers.items()
            }
            records.append((step, distances, scalars))
            seconds = time.perf_counter() - start
            print(_progress(name, step, num_steps, seconds, distances, scalars), flush=True)
        if step < num_steps:
            state, metrics = stage.train_step(state, frozen, batch_at(step), step)
            pending.append(metrics)
    return state.generator.ema, _curves(records)


def _progress(name, step, num_steps, seconds, distances, scalars) -> str:
    losses = [f"{key} {value:.3g}" for key, value in scalars.items() if key.endswith("/loss")]
    found = [f"{key} {value:.3f}" for key, value in distances["sampler"].items()]
    return f"{name} {step}/{num_steps} ({seconds:.0f} s)  " + "  ".join(losses + found)


def _curves(records) -> dict[str, Any]:
    steps, distances, scalars = zip(*records)
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
    return make_optimizer(
        OptimizerConfig(
            learning_rate,
            schedule="cosine",
            warmup_steps=20,
            decay_steps=max(1, num_updates),
            end_scale=0.1,
            **changes,
        )
    )


def pretrain(problem: Problem):
    """Flow matching of exact samples by a bidirectional transformer; parameters and curves.

    This is stage II with a single block, which holds the whole clip.
    """
    settings, clip = problem.settings, problem.world.clip
    layout = dataclasses.replace(
        LAYOUT, first_video_frames=clip.video_frames, first_audio_frames=clip.audio_frames
    )
    optimizer = adam(3e-3, settings.steps[0], beta2=0.99)
    model = problem.network
    config = RolloutConfig(CacheConfig(layout), problem.sigmas, height=1, width=1)
    # one block has no history, so clean states would teach nothing
    regression = StageII(
        seed=settings.seed, ema=EMA, regression=RegressionConfig("flow", include_clean=False)
    )
    stage = ODERegression(model, config, 1, TextInput(), optimizer, regression)
    params = jax.jit(lambda key: init_params(model, key))(problem.key(4))
    text = problem.world.prompt_batch(settings.batch)

    @jax.jit
    def batch_at(step):
        clean = problem.world.sample(jax.random.fold_in(problem.key(5), step), settings.batch)
        return {"video": clean.video[:, None], "audio": clean.audio[:, None], **text}

    samplers = {"sampler": functools.partial(sample_euler, problem, model)}
    state = create_state(create_network(_copy(params), optimizer, ema=True))
    steps = settings.steps[0]
    return train(STAGES[0], problem, stage, state, Frozen(), batch_at, steps, samplers)


def distribution_matching(
    problem: Problem, name: str, generator, learning_rates: tuple[float, float], params, critic
):
    """Stage I or III, by its generator, from given weights; parameters and curves."""
    settings, num_steps = problem.settings, problem.settings.steps[STAGES.index(name)]
    config = DMDStage(seed=settings.seed, ema=EMA, score=ScoreConfig(**UNGUIDED))
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
    text = problem.world.prompt_batch(settings.batch)
    full = sample_few_steps if name == STAGES[1] else sample_causal
    samplers = {"sampler": functools.partial(full, problem)}
    if generator.num_steps > 1:
        samplers["random exit"] = functools.partial(sample_as_trained, problem, generator)
    frozen = Frozen(teacher_params)
    return train(name, problem, stage, state, frozen, lambda _: text, num_steps, samplers)


def _copy(params):
    """The state is donated to every step, and these weights are needed again; on the device where
    the step leaves its result, or it is compiled again for the second step."""
    return jax.device_put(jax.tree.map(jnp.copy, params), jax.devices()[0])


def trajectories(problem: Problem, model, params, sigmas: tuple[float, ...]) -> dict[str, Any]:
    """Stage II's data: states and velocities of a model's ODE at the student's noise levels.

    Args:
      sigmas: of the Euler steps; the student's are among them.
    """
    count = problem.settings.trajectories
    text = problem.world.prompt_batch(count)
    config = dataclasses.replace(sample_config(problem, TEACHER_STEPS), sigmas=sigmas)
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


def regress(problem: Problem, objective: str, params, data: dict[str, jax.Array]):
    """Stage II from stage I's weights and new sinks; parameters and curves."""
    settings, model = problem.settings, problem.causal_network
    optimizer = adam(1e-3, settings.steps[2], beta2=0.99)
    config = StageII(seed=settings.seed, ema=EMA, regression=RegressionConfig(objective))
    stage = ODERegression(model, problem.rollout, NUM_BLOCKS, TextInput(), optimizer, config)
    sinks = jax.jit(lambda key: init_params(model, key)["audio_sinks"])(problem.key(7))
    params = _copy(params | {"audio_sinks": sinks})
    state = create_state(create_network(params, optimizer, ema=True))

    @jax.jit
    def batch_at(step):
        key = jax.random.fold_in(problem.key(8), step)
        rows = jax.random.randint(key, (settings.batch,), 0, settings.trajectories)
        return jax.tree.map(lambda x: x[rows], data)

    name, steps = f"{STAGES[2]} ({objective})", settings.steps[2]
    samplers = {"sampler": functools.partial(sample_causal, problem)}
    return train(name, problem, stage, state, Frozen(), batch_at, steps, samplers)


def run(settings: Settings) -> dict[str, Any]:
    """All stages, one after the other; what `known_answer.json` holds."""
    problem = Problem(settings)
    world, network = problem.world, problem.network
    teacher = sample_euler(problem, *problem.teacher)
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
    best = functools.partial(best_regression_student, world, problem.sigmas, batch=settings.samples)
    rows = {
        "exact samples": world.sample(problem.key(9), settings.samples),
        f"teacher, {steps}": teacher,
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
    return {"settings": dataclasses.asdict(settings), "table": table, "stages": stages}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python -m pocket.known_answer.solve")
    add, default = parser.add_argument, Settings()
    add("--output", type=pathlib.Path, required=True, help="folder for the JSON file and the plots")
    add("--steps", type=int, nargs=4, default=default.steps, help=", ".join(STAGES))
    add(
        "--timesteps", type=int, nargs="+", default=default.timesteps, help="of the student's steps"
    )
    for name, what in (
        ("batch", "samples per training step"),
        ("samples", "samples per measurement"),
        ("points", "measurements per stage"),
        ("seed", "of everything random"),
    ):
        add(f"--{name}", type=int, default=getattr(default, name), help=what)
    args = parser.parse_args(argv)
    if min(*args.steps, args.batch, args.samples, args.points) < 1:
        parser.error("steps, batch, samples and points must be positive")
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line: runs everything, writes the JSON file and the plots, prints the table."""
    args = parse_arguments(argv)
    settings = Settings(
        steps=tuple(args.steps),
        batch=args.batch,
        samples=args.samples,
        points=args.points,
        timesteps=tuple(args.timesteps),
        seed=args.seed,
    )
    start = time.perf_counter()
    result = run(settings) | {"minutes": round((time.perf_counter() - start) / 60, 1)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "known_answer.json").write_text(json.dumps(result, indent=1) + "\n")
    known_answer_plot.draw(result, args.output)
    print(format_table(result["table"]))


def format_table(table: dict[str, dict[str, float]]) -> str:
    """The table in Markdown."""
    head = ("", *(name.replace("_", " ") for name in DISTANCES))
    lines = [head, ("---",) * len(head)]
    lines += [(name, *(f"{row[key]:.3f}" for key in DISTANCES)) for name, row in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
