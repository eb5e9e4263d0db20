"""Stage II: the student learns to denoise under the block-causal masks.

A block's noise level is its own, drawn independently. Three objectives:

  velocity  |v_theta(x_t) - v_phi(x_t)|^2 on the states of the teacher's ODE trajectories (Eq. 6)
  x0        |x0_theta(x_t) - x_0|^2, the end of the trajectory (the public code)
  flow      |v_theta(x_t) - (noise - x_0)|^2 on clean clips: plain block-causal flow matching. It
            makes an autoregressive teacher, whose trajectories are the students' better target
            (Causal Forcing): those of a bidirectional one depend on a future no student sees.

The history is noisy at its own levels (diffusion forcing), or, with `clean_history`, clean as while
sampling (teacher forcing).
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, draw_noise
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.whole_clip import clip_velocity, sigmas_per_frame
from omniforcing_jax.training.adapters import bind
from omniforcing_jax.training.config.settings import StageII
from omniforcing_jax.training.mixture import GivenInput
from omniforcing_jax.training.objectives import losses, scores
from omniforcing_jax.training.objectives.common import (
    Frozen,
    TextInput,
    accumulate,
    checked_seed,
    fold,
    jit_step,
    numbered,
    on_devices,
    sample_keys,
    step_key,
)
from omniforcing_jax.training.state import TrainState, cast_params, update_network
from omniforcing_jax.training.students.blockwise import NoisyBlock, teacher_forced_gradient
from omniforcing_jax.types import AVLatents, RandomUse


@flax.struct.dataclass
class RegressionTask:
    """What a batch asks of the student.

    Attributes:
      clean: [B, T, C] the clip without noise.
      noisy: [B, T, C] with every block at its level.
      target: [B, T, C] the velocity, or the clean clip, to be predicted.
      weight: of each sample's blocks, [B, K].
      sigma: [B, K] level of every block.
      condition: what of the clip is given: clean whatever the level, and without loss.
    """

    clean: AVLatents
    noisy: AVLatents
    target: AVLatents
    weight: jax.Array
    sigma: jax.Array
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class ODERegression:
    """Stage II; `train_step` is what the training loop calls.

    Attributes:
      model: the student, without a mask.
      rollout: how it will be sampled; layout, sizes and, for a clean history, the cache.
      num_blocks: of the clips.
      text: contexts from batches.
      optimizer: from `optimizers.make_optimizer`.
      given: draws what is given, for the objective "flow"; None is nothing.
      shardings: NamedShardings of the train state; None on a single device.
    """

    model: Transformer
    rollout: RolloutConfig
    num_blocks: int
    text: TextInput
    optimizer: optax.GradientTransformation
    config: StageII
    given: GivenInput | None = None
    shardings: TrainState | None = None

    def __post_init__(self):
        by_sample = self.model.config.text_adaln or self.model.config.cross_timestep != "own"
        if by_sample and self.config.regression.level_per_block:
            raise ValueError(
                "this model modulates by the sample's noise level (LTX-2.3 and later), so its "
                "blocks cannot have levels of their own in one pass; give "
                "--config.regression.level_per_block=False"
            )

    @property
    def layout(self) -> BlockLayout:
        """How the clip is cut into blocks."""
        return self.rollout.cache.layout

    @property
    def clip(self) -> ClipGeometry:
        """The clip that is trained on."""
        return ClipGeometry.from_blocks(
            self.layout, self.num_blocks, self.rollout.height, self.rollout.width
        )

    def train_step(
        self, state: TrainState, frozen: Frozen, batch: dict[str, jax.Array], step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One training step; `state` is donated.

        Args:
          batch: text (see `TextInput.contexts`) and trajectories: "video" [B, S, T_v, C] and
            "audio" [B, S, T_a, C] states from noise to clean, "sigmas" [B, S] decreasing to 0, and,
            for the velocity objective, "video_velocity" and "audio_velocity" [B, S - 1, T, C], the
            teacher's at all states but the last. "flow" reads the last state alone. Trajectories
            under conditions bring "video_mask" [B, F] and "audio_mask" [B, T_a], 0 where given.
          step: `state.step` as the host knows it: it decides which history is shown.
        """
        draw = np.random.default_rng((self.config.seed, step)).random()
        clean = draw < self.config.regression.clean_history
        run = self.clean_history_step if clean else self.noisy_step
        return run(state, frozen, batch, self._seed)

    @functools.cached_property
    def _seed(self) -> jax.Array:
        return on_devices(checked_seed(self.config.seed), self.shardings and self.shardings.step)

    @functools.cached_property
    def noisy_step(self):
        """Jitted step with noisy history: one pass under the block-causal masks."""
        return jit_step(functools.partial(self._step, False), self.shardings)

    @functools.cached_property
    def clean_history_step(self):
        """Jitted step with clean history: block after block over the rolling cache."""
        return jit_step(functools.partial(self._step, True), self.shardings)

    def _step(self, clean: bool, state: TrainState, frozen: Frozen, batch, seed: jax.Array):
        stage = bind(self, frozen.teacher, self.config.adapters)
        gradient_of = stage._forced_gradient if clean else stage._masked_gradient
        params = self.shardings and self.shardings.generator.params
        weights = cast_params(state.generator.params, self.model.dtype, shardings=params)
        key = step_key(seed, state.step)

        def gradient(batch):
            contexts = self.text.contexts(frozen.connectors, batch)
            task = self.task(batch, sample_keys(key, batch["row"]))
            grads, per_block = gradient_of(weights, contexts, task)
            return grads, (per_block, *self._counted(task))

        values = accumulate(gradient, numbered(batch), self.config.microbatches, params)
        grads, (per_block, sigma, generated) = values
        per_sample = jax.tree.map(lambda x: jnp.sum(x, axis=1), per_block)  # [B]
        metrics = losses.report("generator", per_sample, self.config.loss, generated=generated)
        sigma = jax.tree.map(jnp.ravel, sigma)
        metrics |= losses.bands("generator", self._per_level(per_block), sigma)
        network, info = update_network(
            state.generator,
            grads,
            self.optimizer,
            self.config.ema,
            state.step,
            loss=metrics["generator/loss"],
        )
        metrics |= {f"generator/{name}": value for name, value in info.items()}
        return state.replace(generator=network, step=state.step + 1), metrics

    def _counted(self, task: RegressionTask) -> tuple[AVLatents | jax.Array, AVLatents | None]:
        """Noise levels [B, K] of the blocks, 0 where all of one is given, and for each stream the
        samples [B] in which it is generated; None is all."""
        if task.condition is None:
            return task.sigma, None
        counts = jax.tree.map(
            lambda mask, blocks: (mask > 0).astype(jnp.float32) @ blocks,
            task.condition.mask,
            self._frame_blocks(),
        )
        sigma = jax.tree.map(lambda n: jnp.where(n > 0, task.sigma, 0.0), counts)
        return sigma, jax.tree.map(lambda n: jnp.any(n > 0, axis=1), counts)

    def task(self, batch: dict[str, jax.Array], keys: jax.Array) -> RegressionTask:
        """Draws every block's level and gathers, or makes, its noisy tokens and their target."""
        clean = AVLatents(batch["video"][:, -1], batch["audio"][:, -1])
        clean = jax.tree.map(lambda x: x.astype(jnp.float32), clean)
        if self.config.regression.objective == "flow":
            return self._flow_task(clean, keys)
        last = batch["sigmas"].shape[1] - 1
        drawn = self._per_block(
            keys, lambda key, shape: jax.random.randint(key, shape, 0, last + self._clean_states)
        )
        level = jnp.take_along_axis(batch["sigmas"], drawn, axis=1)  # [B, K]
        noisy = self._gather(AVLatents(batch["video"], batch["audio"]), drawn)
        target = clean
        if self.config.regression.objective == "velocity":
            velocity = AVLatents(batch["video_velocity"], batch["audio_velocity"])
            target = self._gather(velocity, jnp.minimum(drawn, last - 1))
        # Drawing the clean state leaves a share of the blocks without loss.
        weight = (drawn < last) * ((last + self._clean_states) / last)
        condition = None
        if "video_mask" in batch:
            mask = AVLatents(batch["video_mask"], batch["audio_mask"])
            condition = Condition.of_clip(clean, mask)
        return RegressionTask(clean, noisy, target, weight, level, condition)

    @property
    def _clean_states(self) -> int:
        return int(self.config.regression.include_clean)

    def _flow_task(self, clean: AVLatents, keys: jax.Array) -> RegressionTask:
        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.randint(key, shape, 1, len(scores.sigma_table()))

        level = jnp.asarray(scores.sigma_table())[self._per_block(keys, draw)]
        weight = jnp.ones_like(level)
        if self.config.regression.include_clean:  # as often as among the student's levels
            last = self.rollout.num_steps
            drawn = self._per_block(
                fold(keys, RandomUse.CLEAN_STATE),
                lambda key, shape: jax.random.randint(key, shape, 0, last + 1),
            )
            level = jnp.where(drawn < last, level, 0.0)
            weight = (drawn < last) * ((last + 1) / last)
        sigma = sigmas_per_frame(level, self.layout, self.clip)
        noise = draw_noise(fold(keys, RandomUse.REGRESSION_NOISE), self.clip, self.model)
        condition = None
        if self.given is not None:
            condition = Condition.of_clip(clean, self.given.masks(keys))
            sigma = jax.tree.map(jnp.multiply, sigma, condition.mask)
        noisy = jax.tree.map(flow.add_noise, clean, noise, sigma)
        target = jax.tree.map(jnp.subtract, noise, clean)
        return RegressionTask(clean, noisy, target, weight, level, condition)

    def _per_block(self, keys: jax.Array, draw) -> jax.Array:
        """[B, K] draws, independent or one for all blocks of a sample."""
        count = self.num_blocks if self.config.regression.level_per_block else 1
        values = jax.vmap(lambda key: draw(key, (count,)))(fold(keys, RandomUse.REGRESSION_LEVEL))
        return jnp.broadcast_to(values, (keys.shape[0], self.num_blocks))

    def _gather(self, states: AVLatents, index: jax.Array) -> AVLatents:
        """Each block from the state with its index [B, K]: [B, S, T, C] -> [B, T, C] float32."""
        per_frame = sigmas_per_frame(index, self.layout, self.clip)  # [B, frames]

        def gather(states, index):
            batch, count, tokens, channels = states.shape
            frames = states.reshape(batch, count, index.shape[1], -1)
            taken = jnp.take_along_axis(frames, index[:, None, :, None], axis=1)
            return taken.reshape(batch, tokens, channels).astype(jnp.float32)

        return jax.tree.map(gather, states, per_frame)

    def _predict(self, noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
        if self.config.regression.objective == "x0":
            return flow.velocity_to_x0(noisy, velocity, sigma)
        return velocity

    def _masked_gradient(self, weights: Any, contexts, task: RegressionTask):
        """Gradients, and the losses of each block [B, K], in one pass over the clip."""
        clip, layout = self.clip, self.layout
        model = self.model.clone(causal=clip.mask(layout))
        sigma = sigmas_per_frame(task.sigma, layout, clip)
        weight = sigmas_per_frame(task.weight, layout, clip)
        shown = sigma
        if task.condition is not None:
            weight = jax.tree.map(jnp.multiply, weight, task.condition.frame_weights())
            sigma = jax.tree.map(jnp.multiply, sigma, task.condition.mask)
        elif not self.config.regression.level_per_block:
            shown = jax.tree.map(lambda s: s[:, :1], sigma)

        def loss(weights):
            velocity = clip_velocity(
                model, weights, task.noisy, shown, contexts, clip, condition=task.condition
            )
            prediction = jax.tree.map(self._predict, task.noisy, velocity, sigma)
            per_block = jax.tree.map(
                self._block_losses, prediction, task.target, weight, self._frame_blocks()
            )
            per_sample = jax.tree.map(lambda x: jnp.sum(x, axis=1), per_block)
            return losses.total(per_sample, self.config.loss), per_block

        return jax.grad(loss, has_aux=True)(weights)

    def _frame_blocks(self) -> AVLatents:
        """One-hot [frames, K]: the block of every frame."""
        frames = AVLatents(
            self.layout.block_of_video_frame(np.arange(self.clip.video_frames)),
            self.layout.block_of_audio_frame(np.arange(self.clip.audio_frames)),
        )
        return jax.tree.map(lambda f: np.eye(self.num_blocks, dtype=np.float32)[f], frames)

    def _block_losses(self, prediction, target, weight, frame_blocks) -> jax.Array:
        """[B, K] shares of the blocks in the mean over tokens and channels."""
        batch, frames = weight.shape
        error = jnp.square(prediction - target).reshape(batch, frames, -1)
        per_frame = weight * jnp.mean(error, axis=2) / frames
        return per_frame @ frame_blocks

    def _forced_gradient(self, weights: Any, contexts, task: RegressionTask):
        """As `_masked_gradient`, each block with the clean ones before it as history."""
        sizes = jax.tree.map(lambda x: x.shape[1] * x.shape[2], task.noisy)

        def block_loss(x0: AVLatents, block: NoisyBlock):
            target, weight = block.targets

            def share(x0, noisy, target, weight, size):
                velocity = flow.x0_to_velocity(noisy, x0, block.sigma)
                error = jnp.square(self._predict(noisy, velocity, block.sigma) - target)
                return jnp.sum(weight * error, axis=(1, 2)) / size

            shares = jax.tree.map(share, x0, block.x, target, weight, sizes)
            return losses.total(shares, self.config.loss), shares

        weight = sigmas_per_frame(task.weight, self.layout, self.clip)
        if task.condition is not None:
            weight = jax.tree.map(jnp.multiply, weight, task.condition.frame_weights())
        weight = AVLatents(
            jnp.repeat(weight.video, self.clip.patches, axis=1)[..., None], weight.audio[..., None]
        )
        grads, shares = teacher_forced_gradient(
            self.model,
            weights,
            contexts,
            task.clean,
            task.noisy,
            task.sigma,
            (task.target, weight),
            self.rollout,
            block_loss,
            task.condition,
        )
        return grads, jax.tree.map(jnp.transpose, shares)

    def _per_level(self, per_block: AVLatents) -> AVLatents:
        """Blocks' shares [B, K] as means over the block, [B * K]: comparable between blocks."""
        frames = jax.tree.map(lambda x: x.sum(axis=0) / x.shape[0], self._frame_blocks())
        return jax.tree.map(lambda x, share: (x / share[None]).reshape(-1), per_block, frames)
