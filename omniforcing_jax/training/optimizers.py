"""AdamW with clipping, warm-up and schedules, one optimizer per trained network.

Moments and masters are float32. With a learning rate of 2e-5 an update is less than half of a
typical weight's (0.02) last bfloat16 bit, so bfloat16 masters would stand still.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from omniforcing_jax.ranges import NOT_NEGATIVE, POSITIVE
from omniforcing_jax.training.parameter_groups import is_audio, is_kernel, label_tree

SCHEDULES = ("constant", "cosine", "linear")
TRAINABLE = ("all", "audio")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) on gradients clipped by their global norm.

    Attributes:
      learning_rate: peak learning rate.
      beta1, beta2, eps: Adam's.
      weight_decay: decoupled: each update subtracts learning rate * weight_decay * weight. Only the
        matrices of linear layers decay. Norm scales start at 1 and biases at 0 and set a
        layer's operating point; the modulation tables and sinks are offsets and tokens: pulling
        any of those towards 0 changes what a layer computes and regularises nothing.
      clip_norm: gradients with a larger global norm are scaled down to it; None never clips.
      schedule: "constant", "cosine" or "linear", after the warm-up.
      warmup_steps: updates over which the learning rate rises linearly; the first is not zero.
      decay_steps: updates after the warm-up until the schedule reaches its end; 0 for "constant".
      end_scale: what is left of the learning rate then.
      audio_learning_rate_scale: factor on the updates (decay included) of the audio parameters.
      train: "all", or "audio": the others stand still and have no moments.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    end_scale: float = 0.0
    audio_learning_rate_scale: float = 1.0
    train: str = "all"

    def __post_init__(self):
        problems = []

        def check(good: bool, name: str, rule: str) -> None:
            if not good:
                problems.append(f"{name} must be {rule}, not {getattr(self, name)!r}")

        rate = self.learning_rate
        check(rate in POSITIVE, "learning_rate", "finite and positive")
        check(0 <= self.beta1 < 1, "beta1", "in [0, 1)")
        check(0 <= self.beta2 < 1, "beta2", "in [0, 1)")
        check(self.eps in POSITIVE, "eps", "positive")
        check(self.weight_decay in NOT_NEGATIVE, "weight_decay", "0 or more")
        check(self.clip_norm is None or self.clip_norm in POSITIVE, "clip_norm", "positive or None")
        check(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")
        check(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        if self.schedule == "constant":
            check(self.decay_steps == 0, "decay_steps", "0 with a constant schedule")
        else:
            check(self.decay_steps > 0, "decay_steps", f"positive with schedule {self.schedule!r}")
        check(0 <= self.end_scale <= 1, "end_scale", "in [0, 1]")
        check(self.audio_learning_rate_scale in POSITIVE, "audio_learning_rate_scale", "positive")
        check(self.train in TRAINABLE, "train", f"one of {', '.join(TRAINABLE)}")
        if problems:
            raise ValueError("optimizer: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of a network's weights.

    Attributes:
      decay: share of the average that is kept by an update.
      start_step: training step from which on is averaged; before it the average is the weights.
    """

    decay: float = 0.99
    start_step: int = 0

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), not {self.decay!r}")
        if self.start_step < 0:
            raise ValueError(f"EMA: start_step must be 0 or more, not {self.start_step!r}")


def learning_rate_at(config: OptimizerConfig, count: jax.Array | int) -> jax.Array:
    """Learning rate of the update after `count` updates of this network, float32."""
    count = jnp.asarray(count, jnp.float32)
    warmup = jnp.minimum(1.0, (count + 1) / max(config.warmup_steps, 1))
    scale = 1.0
    if config.schedule != "constant":
        progress = jnp.clip((count - config.warmup_steps) / config.decay_steps, min=0.0, max=1.0)
        left = 1 - progress
        if config.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        scale = config.end_scale + (1 - config.end_scale) * left
    return (config.learning_rate * warmup * scale).astype(jnp.float32)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer, for parameter trees of the transformer.

    Its schedule counts its own updates, so a generator that is updated at every fifth step has a
    warm-up of five times as many steps.
    """
    parts = [
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: label_tree(params, is_kernel)
        ),
        optax.scale_by_learning_rate(lambda count: learning_rate_at(config, count)),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.audio_learning_rate_scale != 1.0:
        parts.append(_scale_audio(config.audio_learning_rate_scale))
    optimizer = optax.chain(*parts)
    if config.train == "all":
        return optimizer
    # the norm that is clipped is then that of the trained parameters
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: label_tree(params, lambda path: "trained" if is_audio(path) else "frozen"),
    )


def _scale_audio(scale: float) -> optax.GradientTransformation:
    def update(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, u: scale * u if is_audio(path) else u, updates
        )

    return optax.stateless(update)
