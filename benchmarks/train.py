"""Speed of a training stage: steps and tokens per second, operations, and the host's share.

    python -m benchmarks.train --stage stage3
    python -m benchmarks.train --stage stage3 --size full --layers 4 --height 512 --width 768 \\
        --batch-size 1 --dtype bfloat16 --remat full

Weights are random and one batch in memory is repeated; everything else is the training loop itself.
Prints a row of benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import pathlib
import shlex
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stream import random_transformer
from checkpoint_converters import synthetic
from configs import base
from launch import dry_run
from omniforcing_jax import programs
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.scaling import planning
from omniforcing_jax.scaling.devices import check_memory
from omniforcing_jax.training import assembly
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.training.config.settings import STAGES
from omniforcing_jax.training.loop import train
from omniforcing_jax.training.metrics import JSONL, read_records
from omniforcing_jax.training.objectives.common import Frozen, TextInput
from omniforcing_jax.training.optimizers import make_optimizer
from omniforcing_jax.training.state import create_network, create_state, state_shardings
from omniforcing_jax.types import DTYPES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = programs.Parser("benchmarks.train", __doc__)
    add = parser.add_argument
    add("--stage", choices=tuple(STAGES), default="stage3")
    add("--size", choices=tuple(synthetic.SIZES), default="tiny")
    add("--layers", type=int, help="of the transformer (default: as the size has)")
    add("--height", type=int, default=64, help="pixels (default 64)")
    add("--width", type=int, default=64, help="pixels (default 64)")
    add("--blocks", type=int, default=3)
    add("--text-tokens", type=int, default=128)
    add("--batch-size", type=int, default=2)
    add("--microbatches", type=int, default=1)
    add("--steps", type=int, default=10, help="timed, after as many to warm up (default 10)")
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--remat", default="none")
    add("--attention", default="auto")
    return parser.parse_args(argv)


class Repeat:
    """One batch for ever."""

    def __init__(self, batch: dict[str, jax.Array]):
        self._batch = batch

    def __next__(self) -> dict[str, jax.Array]:
        return self._batch

    def get_state(self) -> dict:
        """There is none."""
        return {}

    def set_state(self, state: dict) -> None:
        """Nothing to do."""


def make_experiment(args: argparse.Namespace) -> Experiment:
    """A checked config for a model of this size, without weights or data on disk."""
    c = base.training(args.stage)
    c.clip.update({"height": args.height, "width": args.width, "blocks": args.blocks})
    c.update_from_flattened_dict(
        {
            "batch_size": args.batch_size,
            "microbatches": args.microbatches,
            "num_steps": 2 * args.steps,
            "log_every": args.steps,
            "checkpoint_every": 1000 * args.steps,
            "keep_every": 1000 * args.steps,
            "sample_every": 0,  # there are no decoders
            "student.window": max(args.blocks - 2, 1),
            "tensorboard": False,
            "compute.dtype": args.dtype,
            "compute.remat": args.remat,
            "compute.attention": args.attention,
        }
    )
    if args.stage == "stage3":
        c.rollout_blocks = args.blocks
    if args.stage == "stage2":
        c.regression.objective = "x0"
    return dry_run.make_experiment(
        c,
        jax.device_count(),
        size=args.size,
        layers=args.layers,
        text_length=args.text_tokens,
    )


def make_batch(e: Experiment) -> dict[str, jax.Array]:
    """Random contexts, and random trajectories for stage II."""
    size, rng = e.config.batch_size, np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), e.dtype)

    tokens = e.data.manifest.text_length
    batch = {
        f"{stream}_context": normal(size, tokens, width)
        for stream, width in zip(("video", "audio"), e.teacher.text_dims, strict=True)
    }
    if e.config.stage == "stage2":
        states = len(e.sigmas)
        batch["sigmas"] = jnp.tile(jnp.asarray(e.sigmas, jnp.float32), (size, 1))
        channels = e.teacher.video_channels, e.teacher.audio_channels
        batch["video"] = normal(size, states, e.clip.video_tokens, channels[0])
        batch["audio"] = normal(size, states, e.clip.audio_frames, channels[1])
    return batch


def run(args: argparse.Namespace) -> dict:
    """Trains, and returns the last record with what it was measured on."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        e = make_experiment(args)
        plan = planning.plan_step(e)
        check_memory("a step", sum(plan.bytes_per_device.values()))
        mesh = partitioning.make_mesh(**e.mesh_shape)
        with jax.set_mesh(mesh):
            state = assembly.abstract_state(e, mesh)
            stage = experiment.make_stage(e, state_shardings(state))
            stage = dataclasses.replace(stage, text=TextInput())
            state = random_state(e, state)
            frozen = Frozen()
            batch = make_batch(e)
            if state.critic is not None:
                negative = {name: x[:1] for name, x in batch.items()}
                teacher = jax.tree.map(
                    lambda x: jnp.array(x, e.dtype, copy=True), state.critic.params
                )  # a copy, since the critic is donated
                frozen = Frozen(teacher, None, negative)
            place = partitioning.batch_sharding(mesh)
            batches = Repeat({name: jax.device_put(x, place) for name, x in batch.items()})
            train(
                stage,
                state,
                frozen,
                batches,
                e.config.loop,
                folder,
                flops_per_step=plan.flops_per_step,
                tokens_per_step=plan.tokens_per_step,
            )
        record = read_records(pathlib.Path(folder) / JSONL)[-1]
    return record | {"parameters": plan.parameters["generator"]}


def random_state(e: Experiment, abstract):
    """Networks with random weights in the places of the abstract state."""

    def network(name: str, config, seed: int):
        params = random_transformer(Transformer(config), jax.random.key(seed))
        params = jax.tree.map(
            lambda x, a: jax.device_put(x.astype(a.dtype), a.sharding),
            params,
            getattr(abstract, name).params,
        )
        ema = name == "generator" and e.config.ema is not None
        return create_network(params, make_optimizer(e.config.optimizers[name]), ema=ema)

    generator = network("generator", e.student, 0)
    return create_state(generator, network("critic", e.teacher, 1) if abstract.critic else None)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Prints the row."""
    args = parse_arguments(argv)
    result = run(args)
    device = jax.devices()[0]
    command = "python -m benchmarks.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    mfu, peak = result.get("speed/mfu"), result.get("memory/peak_gib")
    cells = [
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}",
        args.stage,
        f"{result['parameters'] / 1e9:.3g} B",
        f"{result['speed/steps_per_second']:.3g}",
        f"{result['speed/tokens_per_second']:,.0f}",
        f"{result['speed/tflops_per_second']:.3g}",
        "–" if mfu is None else f"{mfu:.1%}",
        f"{result['speed/host_share']:.1%}",
        "–" if peak is None else f"{peak:.1f}",
        f"`{command.strip()}`",
    ]
    print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
