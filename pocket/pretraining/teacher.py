"""The bidirectional teacher: flow matching of video and sound together, from captions.

The transformer and the connectors, projection included, learn together; the text tower stands still
at its random start. LTX-2, too, has a text encoder that it does not train; and a random one is
enough here, since its embeddings tell the words apart, and what they mean is learnt from the clips.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.sampling.conditions import Condition, add_noise, mode_frozen, mode_mask
from omniforcing_jax.sampling.whole_clip import clip_velocity
from omniforcing_jax.training.mixture import GivenInput
from omniforcing_jax.training.objectives import losses
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.types import AVLatents
from pocket.pretraining.step import Scalars

_LOWEST_SIGMA = 1e-3


@dataclasses.dataclass(frozen=True)
class TeacherLoss:
    """Conditional flow matching; parameters {transformer, connectors}.

    x = (1 - σ) x0 + σ n, and the loss is λ_v |v_θ - (n - x0)|² + λ_a the same of the sound, with
    one σ for both streams of a sample: σ = e^μ / (e^μ + 1/u - 1), u uniform, the density that the
    sampler's schedule spends its steps in, but for a share of σ that is uniform itself. What
    `given` draws of a clip is clean, at σ = 0, and has no part in the loss.
    """

    model: Transformer  # without a mask
    connectors: ConnectorConfig
    tower: TextTower
    given: GivenInput  # what of the clips is given, and their sizes
    weights: LossWeights  # λ_v and λ_a
    shift: float = 1.0  # μ
    uniform: float = 0.1  # share of the samples whose σ is uniform
    caption_dropout: float = 0.1  # share that sees the empty caption, for guidance

    def __call__(self, params, frozen, batch, key) -> tuple[jax.Array, Scalars]:
        """batch: video, audio [B, T, C] and ids, mask [B, S]; `frozen` is {"tower": ...}."""
        keys = jax.random.split(key, 5)
        size = batch["audio"].shape[0]
        sigma = self.draw_sigma(keys[0], size)
        dropped = jax.random.bernoulli(keys[3], self.caption_dropout, (size,))
        batch = batch | {"mask": self.kept(batch["mask"], dropped)}
        given = self.given.condition(batch, jax.random.split(keys[4], size))
        per_sample = self.errors(params, frozen, batch, keys[1:3], sigma, given)
        levels, generated = sigma, None
        if given is not None:
            levels = given.stream_sigma(sigma)
            generated = jax.tree.map(jnp.logical_not, given.frozen)
        scalars = losses.report("teacher", per_sample, self.weights, levels, generated)
        return losses.total(per_sample, self.weights), scalars

    def errors(
        self, params, frozen, batch, keys: jax.Array, sigma: jax.Array, given: Condition | None
    ) -> AVLatents:
        """Losses [B] of both streams at the noise levels `sigma` [B], with noise of two keys."""
        clean = clean_latents(batch)
        noise = AVLatents(
            jax.random.normal(keys[0], clean.video.shape),
            jax.random.normal(keys[1], clean.audio.shape),
        )
        noisy = add_noise(clean, noise, sigma, given)
        contexts = self.contexts(params, frozen, batch["ids"], batch["mask"])
        velocity = clip_velocity(
            self.model,
            params["transformer"],
            noisy,
            sigma,
            contexts,
            self.given.clip,
            condition=given,
        )
        tokens = AVLatents(1.0, 1.0) if given is None else given.token_weights()
        return jax.tree.map(losses.flow_matching_loss, velocity, clean, noise, tokens)

    def draw_sigma(self, key: jax.Array, size: int) -> jax.Array:
        """[size] noise levels."""
        first, second, third = jax.random.split(key, 3)
        u = jax.random.uniform(first, (size,), minval=_LOWEST_SIGMA, maxval=1.0)
        shifted = jnp.exp(self.shift) / (jnp.exp(self.shift) + 1 / u - 1)
        plain = jax.random.uniform(second, (size,), minval=_LOWEST_SIGMA, maxval=1.0)
        return jnp.where(jax.random.bernoulli(third, self.uniform, (size,)), plain, shifted)

    def kept(self, mask: jax.Array, dropped: jax.Array) -> jax.Array:
        """The mask [B, S] with nothing left of dropped captions but <bos>, as the empty text has.

        Where <bos> lies makes no difference: the tower rotates relatively, and the connectors move
        what is valid to the front.
        """
        first = mask & (jnp.cumsum(mask, axis=1) == 1)
        return jnp.where(dropped[:, None], first, mask)

    def contexts(self, params, frozen, ids, mask) -> tuple[jax.Array, jax.Array]:
        """Contexts [B, S, W] of both streams."""
        states = self.tower.apply({"params": frozen["tower"]}, ids, mask)
        module = TextConnectors(self.connectors, self.model.dtype)
        return module.apply({"params": params["connectors"]}, states, mask)


# What is asked of clips that training has not met: mode, and its noise levels.
_HELD_OUT = {"t2av": (0.2, 0.5, 0.8, 0.95), "i2av": (0.8,), "a2v": (0.8,), "v2a": (0.8,)}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The loss on clips that training has not met, always with the same noise.

    Attributes:
      loss: what is trained.
      frozen: as the loss takes it.
      clips: see `latents.load_latents`.
      batch: how many are looked at together; the number of clips must be a multiple.
    """

    loss: TeacherLoss
    frozen: Any
    clips: dict[str, np.ndarray]
    batch: int = 16

    def __call__(self, params) -> dict[str, float]:
        """{"heldout/video_0.8", ...} from captions alone, by stream and noise level, their mean
        "heldout/mean", and, by mode, what is generated at one: {"heldout/v2a_audio", ...}."""
        found = {}
        for mode, levels in _HELD_OUT.items():
            frozen = mode_frozen(mode)
            for sigma in levels:
                errors = self._mean_errors(params, mode, sigma)
                for stream in ("video", "audio"):
                    if not getattr(frozen, stream):
                        name = f"{stream}_{sigma:g}" if mode == "t2av" else f"{mode}_{stream}"
                        found[f"heldout/{name}"] = float(getattr(errors, stream))
        plain = [found[f"heldout/{s}_{x:g}"] for s in ("video", "audio") for x in _HELD_OUT["t2av"]]
        return {"heldout/mean": float(np.mean(plain))} | found

    def _mean_errors(self, params, mode: str, sigma: float) -> AVLatents:
        one = AVLatents(1, 1)  # of the mode `extend` only, which is not asked for
        mask = jax.tree.map(lambda m: m[None], mode_mask(mode, self.loss.given.clip, one))
        parts = []
        for start in range(0, len(self.clips["ids"]), self.batch):
            batch = {name: x[start : start + self.batch] for name, x in self.clips.items()}
            given = jax.device_put((batch, mask, np.uint32(start), np.float32(sigma)))
            parts.append(self._errors(params, self.frozen, *given))
        return jax.tree.map(lambda *x: np.mean(x), *jax.device_get(parts))

    @functools.cached_property
    def _errors(self):
        """One program for all modes and levels."""

        @jax.jit
        def errors(params, frozen, batch, mask, start, sigma):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), start))
            given = Condition.of_clip(clean_latents(batch), mask)
            sigma = jnp.broadcast_to(sigma, batch["audio"].shape[:1])
            return self.loss.errors(params, frozen, batch, keys, sigma, given)

        return errors


def clean_latents(batch: dict[str, jax.Array]) -> AVLatents:
    """A batch's clips [B, T, C] float32."""
    clean = AVLatents(batch["video"], batch["audio"])
    return jax.tree.map(lambda x: x.astype(jnp.float32), clean)


def init_teacher(loss: TeacherLoss, num_states: int, key: jax.Array) -> dict[str, Any]:
    """Random {transformer, connectors}, in which no noise level and no output speaks yet.

    The last matrices of the modulations and of the heads are 0 (Peebles & Xie, arXiv 2212.09748):
    a network from scratch learns faster so.
    """
    first, second = jax.random.split(key)
    c = loss.connectors
    states = jnp.zeros((1, c.num_registers, c.text_channels, num_states))
    mask = jnp.ones((1, c.num_registers), bool)
    connectors = jax.jit(TextConnectors(c).init)(second, states, mask)["params"]
    transformer = jax.jit(lambda key: init_params(loss.model, key))(first)
    for name in transformer:
        if name.endswith("adaln"):
            kernel = transformer[name]["linear"]["kernel"]
            transformer[name]["linear"]["kernel"] = jnp.zeros_like(kernel)
        elif name in ("video_out", "audio_out"):
            transformer[name]["kernel"] = jnp.zeros_like(transformer[name]["kernel"])
    return {"transformer": transformer, "connectors": nn.unbox(connectors)}
