"""Distribution matching distillation, for stage I (bidirectional) and stage III (self-forcing).

    every n-th step:  x <- generator's sample                         (generator update)
                      x_s <- (1 - s) x + s noise, s random
                      g <- (critic(x_s) - guided teacher(x_s)) / mean |x - teacher(x_s)|
                      the generator's weights move so that its sample moves along -g
    every step:       x <- generator's sample                         (critic update)
                      the critic fits x by flow matching

The stages differ in the generator alone; see `bidirectional` and `unrolled`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omniforcing_jax.distributed.partitioning import constrain
from omniforcing_jax.geometry import draw_noise
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition, add_noise
from omniforcing_jax.sampling.guidance import (
    interleave_rows,
    keep_frozen_streams,
    keep_pathways,
)
from omniforcing_jax.sampling.whole_clip import clip_velocity
from omniforcing_jax.training.adapters import Adapted, bind
from omniforcing_jax.training.config.settings import DMDStage
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
from omniforcing_jax.training.objectives.scores import BlockContext
from omniforcing_jax.training.state import Network, TrainState, cast_params, update_network
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.blockwise import NoisyBlock, teacher_forced_gradient
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import AVLatents, RandomUse

Student = BidirectionalStudent | UnrolledStudent


@dataclasses.dataclass(frozen=True)
class DMD:
    """One of the two DMD stages; `train_step` is what the training loop calls.

    Attributes:
      generator: student of stage I or III.
      teacher, critic: bidirectional models of the score networks, in their compute dtype.
      text: contexts from batches.
      generator_optimizer, critic_optimizer: from `optimizers.make_optimizer`.
      blocks: for block-causal scores, how the score networks see a clip.
      given: draws what is given of each sample; None is nothing, ever.
      shardings: NamedShardings of the train state; None on a single device.
    """

    generator: Student
    teacher: Transformer
    critic: Transformer
    text: TextInput
    generator_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    config: DMDStage
    blocks: BlockContext | None = None
    given: GivenInput | None = None
    shardings: TrainState | None = None

    def __post_init__(self):
        causal = self.config.score.context == "block_causal"
        if causal != (self.blocks is not None):
            raise ValueError(
                f"score context {self.config.score.context!r} "
                f"{'needs' if causal else 'does not take'} `blocks`"
            )
        if causal and self.blocks.num_blocks != getattr(self.generator, "num_blocks", None):
            raise ValueError(
                "block-causal scores need a rollout that is scored from its first block"
            )
        self.config.score.perturbation.check_layers(self.teacher.config.num_layers)

    def train_step(
        self, state: TrainState, frozen: Frozen, batch: dict[str, jax.Array], step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One training step; `state` is donated.

        Args:
          batch: text of B samples, see `TextInput.contexts`, and the clips of which something is
            given, see `GivenInput.condition`.
          step: `state.step` as the host knows it: it decides whether the generator is updated.
        """
        metrics = {}
        if step % self.config.critic_updates == 0:
            state, metrics = self.generator_step(state, frozen, batch, self._seed)
        state, more = self.critic_step(state, frozen, batch, self._seed)
        return state, metrics | more

    @functools.cached_property
    def _seed(self) -> jax.Array:
        return on_devices(checked_seed(self.config.seed), self.shardings and self.shardings.step)

    @functools.cached_property
    def generator_step(self):
        """Jitted (state, frozen, batch, seed) -> (state, metrics); the state is donated."""
        return jit_step(functools.partial(self._step, "generator"), self.shardings)

    @functools.cached_property
    def critic_step(self):
        """Jitted (state, frozen, batch, seed) -> (state, metrics); the state is donated."""
        return jit_step(functools.partial(self._step, "critic"), self.shardings)

    def _step(self, name: str, state: TrainState, frozen: Frozen, batch, seed: jax.Array):
        """The state after one update of "generator" or "critic", which ends the step."""
        stage = self.over(frozen.teacher)
        gradient_of = stage.generator_gradient if name == "generator" else stage.critic_gradient
        weights = self.cast("generator", state.generator.params)
        critic = self.cast("critic", state.critic.params)
        fixed = stage.fixed(state.generator.params, weights)
        key = self.update_key(name, seed, state.step)
        grads, (loss, sigma) = accumulate(
            lambda batch: gradient_of(weights, critic, frozen, batch, key, fixed),
            numbered(batch),
            self.config.microbatches,
            self.shardings and getattr(self.shardings, name).params,
        )
        network, metrics = self.updated(name, getattr(state, name), grads, loss, sigma, state.step)
        if name == "generator":
            return state.replace(generator=network), metrics
        return state.replace(critic=network, step=state.step + 1), metrics

    def over(self, base: Any) -> "DMD":
        """The stage with its networks over the base, where adapters are trained; else itself."""
        if not self.config.adapters.used:
            return self
        generator = bind(self.generator, base, self.config.adapters)
        critic = Adapted(self.critic, base, self.config.adapters)
        return dataclasses.replace(self, generator=generator, critic=critic)

    def updated(
        self, name: str, network: Network, grads: Any, loss: AVLatents, sigma, step: jax.Array
    ) -> tuple[Network, dict[str, jax.Array]]:
        """The generator, or the critic, moved along its gradients, and the scalars of the update.

        Args:
          loss, sigma: [B] per-sample losses, and the noise levels they were taken at; under
            conditions those of each stream, 0 where it is given as a whole.
        """
        is_generator = name == "generator"
        generated = jax.tree.map(lambda s: s > 0, sigma) if isinstance(sigma, AVLatents) else None
        metrics = losses.report(name, loss, self.config.loss, sigma, generated)
        network, info = update_network(
            network,
            grads,
            self.generator_optimizer if is_generator else self.critic_optimizer,
            self.config.ema if is_generator else None,
            step,
            loss=metrics[f"{name}/loss"],
        )
        return network, metrics | {f"{name}/{what}": value for what, value in info.items()}

    def update_key(self, name: str, seed: jax.Array, step: jax.Array) -> jax.Array:
        """Of the update of "generator" or "critic" in a step."""
        return jax.random.fold_in(step_key(seed, step), int(name == "critic"))

    def cast(self, name: str, params: Any, *, gather: bool = False) -> Any:
        """Masters of "generator" or "critic" in the dtype that the network computes in."""
        model = self.generator.model if name == "generator" else self.critic
        places = self.shardings and getattr(self.shardings, name).params
        return cast_params(params, model.dtype, shardings=places, gather=gather)

    def fixed(self, params: Any, weights: Any) -> tuple[Student, Any]:
        """The generator for passes without gradient, and its weights.

        Args:
          params: its masters.
          weights: the same as they are differentiated.
        """
        if not self.config.compute.gather_weights or self.shardings is None:
            return self.generator, weights
        model = self.generator.model
        rules = dataclasses.replace(model.rules, gathered=True)
        student = dataclasses.replace(self.generator, model=model.clone(rules=rules))
        return student, self.cast("generator", params, gather=True)

    def generator_gradient(
        self,
        weights: Any,
        critic: Any,
        frozen: Frozen,
        batch: dict[str, jax.Array],
        key: jax.Array,
        fixed: tuple[Student, Any] | None = None,
    ) -> tuple[Any, tuple[AVLatents, jax.Array]]:
        """Gradient of the DMD loss with respect to the generator's weights.

        Args:
          weights, critic: parameters in the compute dtype.
          batch: with "row" [b], the samples' rows in the global batch.
          key: of the step.
          fixed: from `fixed`; None: the generator and `weights`.

        Returns:
          Gradients of the mean over samples, and per-sample losses [b] and sigmas [b].
        """
        student, fixed_weights = fixed or (self.generator, weights)
        contexts = self.text.contexts(frozen.connectors, batch)
        of_samples, of_step = jax.random.split(key)
        keys = sample_keys(of_samples, batch["row"])
        of_rollout = fold(keys, RandomUse.SAMPLE)
        given = self.condition(batch, keys)
        trace = student.simulate(fixed_weights, contexts, of_rollout, of_step, given)
        x, pullback = self.generator.sample_with_pullback(weights, contexts, of_rollout, trace)
        cotangent, values = self.score(critic, frozen, x, contexts, keys, given)
        return pullback(cotangent), values

    def condition(self, batch: dict[str, jax.Array], keys: jax.Array) -> Condition | None:
        """What is given of the samples with these [B] keys: the student, the teacher and the critic
        see the same."""
        return None if self.given is None else self.given.condition(batch, keys)

    def score(
        self,
        critic: Any,
        frozen: Frozen,
        x: AVLatents,
        contexts,
        keys: jax.Array,
        given: Condition | None = None,
    ) -> tuple[AVLatents, tuple[AVLatents, jax.Array]]:
        """dL/dx of the DMD loss at the samples x [B, T, C]; per-sample losses [B], sigmas [B]."""
        gradient, sigma = self.score_gradient(critic, frozen, x, contexts, keys, given)
        weights = AVLatents(self.config.loss.video, self.config.loss.audio)
        tokens = _token_weights(given)
        loss = jax.tree.map(losses.dmd_loss, gradient, tokens)
        # the mean over samples, tokens that are generated, and channels
        cotangent = jax.tree.map(lambda weight, g: weight * g / g.size, weights, gradient)
        if given is not None:
            cotangent = jax.tree.map(jnp.multiply, cotangent, tokens)
        return cotangent, (loss, _levels(sigma, given))

    def score_gradient(
        self,
        critic: Any,
        frozen: Frozen,
        x: AVLatents,
        contexts,
        keys: jax.Array,
        given: Condition | None = None,
    ) -> tuple[AVLatents, jax.Array]:
        """Normalised DMD gradient [B, T, C] at the samples x, and their noise levels [B]."""
        sigma, noisy, _ = self._noised(x, keys, given)
        fake = self._x0(self.critic, critic, x, noisy, sigma, given, contexts)
        real = self._real_x0(frozen, x, noisy, sigma, given, contexts, keys)
        return jax.tree.map(losses.dmd_gradient, x, fake, real, _token_weights(given)), sigma

    def _x0(
        self, model: Transformer, params, x, noisy, sigma, given, contexts, keep=None
    ) -> AVLatents:
        """Clean prediction of a score network."""
        clip = self.generator.clip
        return scores.predict_x0(
            model, params, x, noisy, sigma, contexts, clip, self.blocks, keep, given
        )

    def _real_x0(self, frozen: Frozen, x, noisy, sigma, given, contexts, keys) -> AVLatents:
        """The guided teacher's clean prediction.

        All its passes are one of more rows: its weights are gathered once. A sample's rows are
        neighbours, so that nothing moves between devices.
        """
        score = self.config.score
        passes = score.passes()
        if passes == ("cond",):
            return self._x0(self.teacher, frozen.teacher, x, noisy, sigma, given, contexts)
        texts = {}
        if "uncond" in passes:
            negative = self.text.contexts(frozen.connectors, frozen.negative)
            texts["uncond"] = jax.tree.map(
                lambda n, c: jnp.broadcast_to(n, c.shape), negative, contexts
            )
        by_pass = [texts.get(name, contexts) for name in passes]
        rows = jax.tree.map(lambda x: _rows([x] * len(passes)), (x, noisy, sigma, given))
        texts = jax.tree.map(lambda *c: _rows(c), *by_pass)
        skipped = (score.perturbation.skipped,) * 2
        keep = keep_pathways(passes, skipped, self.teacher.config.num_layers, sigma.size)
        if keep is not None and given is not None:
            keep = keep_frozen_streams(keep, given.frozen, sigma.size)
        predictions = self._x0(self.teacher, frozen.teacher, *rows, texts, keep)
        cfg = scores.draw_guidance(fold(keys, RandomUse.GUIDANCE), score)

        def guide(predictions: jax.Array, cfg: jax.Array) -> jax.Array:
            """[B * passes, T, C] -> [B, T, C]."""
            apart = predictions.reshape(-1, len(passes), *predictions.shape[1:])
            by_name = {name: apart[:, i] for i, name in enumerate(passes)}
            return scores.guide_each(by_name, cfg, score)

        return jax.tree.map(guide, predictions, cfg)

    def critic_gradient(
        self,
        weights: Any,
        critic: Any,
        frozen: Frozen,
        batch: dict[str, jax.Array],
        key: jax.Array,
        fixed: tuple[Student, Any] | None = None,
    ) -> tuple[Any, tuple[AVLatents, jax.Array]]:
        """Gradient of the flow matching loss by the critic's weights; as `generator_gradient`."""
        student, fixed_weights = fixed or (self.generator, weights)
        contexts = self.text.contexts(frozen.connectors, batch)
        of_samples, of_step = jax.random.split(key)
        keys = sample_keys(of_samples, batch["row"])
        given = self.condition(batch, keys)
        x = student.sample(fixed_weights, contexts, fold(keys, RandomUse.SAMPLE), of_step, given)
        return self.fit_critic(critic, jax.lax.stop_gradient(x), contexts, keys, given)

    def fit_critic(
        self,
        critic: Any,
        x: AVLatents,
        contexts,
        keys: jax.Array,
        given: Condition | None = None,
    ) -> tuple[Any, tuple[AVLatents, jax.Array]]:
        """Gradient of the flow matching loss of the samples x [B, T, C] by the critic's weights."""
        sigma, noisy, noise = self._noised(x, keys, given)
        tokens = _token_weights(given)
        if self.blocks is not None:
            return self._block_causal_critic(critic, contexts, x, noisy, noise, sigma, given)

        def loss(params):
            clip = self.generator.clip
            velocity = clip_velocity(
                self.critic, params, noisy, sigma, contexts, clip, condition=given
            )
            per_sample = jax.tree.map(losses.flow_matching_loss, velocity, x, noise, tokens)
            return losses.total(per_sample, self.config.loss), per_sample

        grads, per_sample = jax.grad(loss, has_aux=True)(critic)
        return grads, (per_sample, _levels(sigma, given))

    def _block_causal_critic(self, critic, contexts, x, noisy, noise, sigma, given):
        sizes = jax.tree.map(lambda x: x.shape[1] * x.shape[2], x)
        targets = (x, noise)
        if given is not None:
            targets = (*targets, given.token_weights())

        def block_loss(x0: AVLatents, block: NoisyBlock):
            """The block's share of the mean over the clip's tokens and channels."""

            def share(size, x0, noisy, clean, noise, weight=1.0):
                velocity = flow.x0_to_velocity(noisy, x0, block.sigma)
                error = weight * jnp.square(velocity - (noise - clean))
                return jnp.sum(error, axis=(1, 2)) / size

            shares = jax.tree.map(share, sizes, x0, block.x, *block.targets)
            return losses.total(shares, self.config.loss), shares

        blocks = jnp.broadcast_to(sigma[:, None], (sigma.shape[0], self.blocks.num_blocks))
        grads, shares = teacher_forced_gradient(
            self.critic,
            critic,
            contexts,
            x,
            noisy,
            blocks,
            targets,
            self.blocks.config,
            block_loss,
            given,
        )
        return grads, (jax.tree.map(lambda s: jnp.sum(s, axis=0), shares), _levels(sigma, given))

    def _noised(
        self, x: AVLatents, keys: jax.Array, given: Condition | None
    ) -> tuple[jax.Array, AVLatents, AVLatents]:
        """Noise levels [B], noisy samples and noise."""
        sigma = scores.draw_sigmas(fold(keys, RandomUse.SCORE_SIGMA), self.config.score)
        noise = draw_noise(fold(keys, RandomUse.SCORE_NOISE), self.generator.clip, self.critic)
        return sigma, add_noise(x, noise, sigma, given), noise


def _token_weights(given: Condition | None) -> AVLatents:
    """Of the tokens [B, T, 1] in the losses: those that are generated count."""
    return AVLatents(1.0, 1.0) if given is None else given.token_weights()


def _levels(sigma: jax.Array, given: Condition | None) -> AVLatents | jax.Array:
    """Of the samples [B] as `DMD.updated` takes them."""
    if given is None:
        return sigma
    return jax.tree.map(lambda s: jnp.broadcast_to(s, sigma.shape), given.stream_sigma(sigma))


def _rows(passes: Sequence[jax.Array]) -> jax.Array:
    """The passes of each sample as neighbouring rows [B * P, ...], where the batch lies."""
    return constrain(interleave_rows(passes), "batch")
