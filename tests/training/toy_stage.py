"""A stage that trains in milliseconds: linear regression with the transformer's parameter names.

Also a program that kills itself: `python -m tests.training.toy_stage WORKDIR STEPS step|save AT`.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.training import training_checkpoints
from omniforcing_jax.training.loop import LoopConfig, Outcome, train
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import TrainState, create_network, create_state, update_network

WIDTH = 6
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=1e-3)
EMA = EMAConfig(decay=0.9, start_step=3)


def toy_params(seed: int = 0, layers: int = 2) -> dict:
    """float32 parameters of a few of the transformer's groups."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.02, jnp.float32)

    return {
        "blocks": {
            "video_attn": {
                "q": {"kernel": draw(layers, WIDTH, WIDTH), "bias": draw(layers, WIDTH)}
            },
            "audio_ff": {"up": {"kernel": draw(layers, WIDTH, WIDTH)}},
            "v2a_attn": {"q_norm": {"scale": 1 + draw(layers, WIDTH)}},
        },
        "audio_sinks": draw(2, WIDTH),
        "video_out": {"kernel": draw(WIDTH, WIDTH)},
    }


def toy_loss(params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """Mean squared error of a linear map, over samples."""
    blocks = params["blocks"]
    w = blocks["video_attn"]["q"]["kernel"].sum(0) @ params["video_out"]["kernel"]
    w = w + blocks["audio_ff"]["up"]["kernel"].sum(0)
    y = batch["x"].astype(w.dtype) @ w + blocks["video_attn"]["q"]["bias"].sum(0)[None]
    y = y * blocks["v2a_attn"]["q_norm"]["scale"].prod(0)[None]
    y = y + params["audio_sinks"].sum(0)[None]
    error = jnp.square(y.astype(jnp.float32) - batch["y"]).mean(-1)  # [B]
    high = batch["x"][:, 0] > 1.5
    loss = error.mean()
    band = jnp.where(high, error, 0).sum() / high.sum()  # NaN if nothing fell into it
    return loss, {"loss": loss, "band/high": band}


class ToyBatches:
    """Endless batches with the interface of a grain iterator."""

    def __init__(self, batch: int = 8, seed: int = 0, nan_at: int | None = None):
        self.index, self.batch, self.seed, self.nan_at = 0, batch, seed, nan_at

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        rng = np.random.default_rng((self.seed, self.index))
        x = rng.standard_normal((self.batch, WIDTH)).astype(np.float32)
        y = x @ np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH) / 20
        if self.index == self.nan_at:
            y[0, 0] = np.nan
        self.index += 1
        return {"x": x, "y": y}

    def get_state(self) -> dict:
        return {"index": self.index}

    def set_state(self, state: dict) -> None:
        self.index = state["index"]


class ToyStage:
    """Implements the protocol of `omniforcing_jax.training.loop.Stage`."""

    def __init__(self):
        self.optimizer = make_optimizer(OPTIMIZER)

        def step(state: TrainState, frozen: jax.Array, batch: dict):
            noise_key = jax.random.fold_in(jax.random.key(0), state.step)
            noise = 0.01 * jax.random.normal(noise_key, batch["y"].shape)
            batch = batch | {"y": batch["y"] + noise + frozen}
            gradient = jax.value_and_grad(toy_loss, has_aux=True)
            (loss, aux), grads = gradient(state.generator.params, batch)
            generator, metrics = update_network(
                state.generator, grads, self.optimizer, EMA, state.step, loss=loss
            )
            return state.replace(step=state.step + 1, generator=generator), aux | metrics

        self.jitted = jax.jit(step, donate_argnums=0)

    def init_state(self, params: dict | None = None) -> TrainState:
        params = toy_params() if params is None else params
        return create_state(create_network(params, self.optimizer, ema=True))

    def train_step(self, state, frozen, batch, step):
        del step
        return self.jitted(state, *jax.device_put((frozen, batch), state.step.sharding))


RUN_CONFIG = {"optimizer": {"learning_rate": 1e-2, "betas": (0.9, 0.999)}, "seed": 0}


def train_toy(workdir, num_steps: int = 20, stage: ToyStage | None = None, **settings) -> Outcome:
    """Trains, or goes on training, with checkpoints at 5, 10, ... and records at 4, 8, ..."""
    stage = stage or ToyStage()
    state = settings.pop("state", None) or stage.init_state()
    batches = settings.pop("batches", None) or ToyBatches()
    extra = {"run_config": RUN_CONFIG, "flops_per_step": 1e3, "tokens_per_step": 80}
    passed = ("run_config", "hooks", "watchdog")
    extra |= {name: settings.pop(name) for name in passed if name in settings}
    loop = {"log_every": 4, "checkpoint_every": 5, "keep_last": 2, "tensorboard": False} | settings
    config = LoopConfig(num_steps, **loop)
    return train(stage, state, jnp.float32(0), batches, config, workdir, **extra)


def amid_saves(call: Callable[[int], Any]) -> None:
    """Calls `call(index)` in every save, when the iterator's state has been written."""
    handler = training_checkpoints.JsonHandler
    save = handler.async_save

    async def async_save(self, directory, args):
        futures = await save(self, directory, args=args)
        for future in futures if "index" in args.item else ():
            written = future.result
            future.result = lambda timeout=None, w=written: (w(timeout), call(args.item["index"]))
        return futures

    handler.async_save = async_save


def main(workdir: str, num_steps: str, where: str, at: str) -> None:
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    stage = ToyStage()
    if where == "step":
        step = stage.train_step

        def train_step(state, frozen, batch, done):
            result = step(state, frozen, batch, done)
            return die() if done + 1 == int(at) else result

        stage.train_step = train_step
    else:
        amid_saves(lambda index: index == int(at) and die())
    train_toy(workdir, int(num_steps), stage)


if __name__ == "__main__":
    main(*sys.argv[1:])
