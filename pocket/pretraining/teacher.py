"""The bidirectional teacher: flow matching of video and sound together, from captions.

The transformer and the connectors, projection included, learn together; the text tower stands still
at its random start. LTX-2, too, has a text encoder that it does not train; and a random one is
enough here, since its embeddings tell the words apart, and what they mean is learnt from the clips.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.text.gemma import TextTower
from omniforcing_jax.models.transformer.model import Transformer, init_params
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.whole_clip import clip_velocity
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
    sampler's schedule spends its steps in, but for a share of σ that is uniform itself.
    """

    model: Transformer  # without a mask
    connectors: ConnectorConfig
    tower: TextTower
    clip: ClipGeometry  # of the batches
    weights: LossWeights  # λ_v and λ_a
    shift: float = 1.0  # μ
    uniform: float = 0.1  # share of the samples whose σ is uniform
    caption_dropout: float = 0.1  # share that sees the empty caption, for guidance

    def __call__(self, params, frozen, batch, key) -> tuple[jax.Array, Scalars]:
        """batch: video, audio [B, T, C] and ids, mask [B, S]; `frozen` is {"tower": ...}."""
        keys = jax.random.split(key, 5)
        clean = AVLatents(batch["video"], batch["audio"])
        clean = jax.tree.map(lambda x: x.astype(jnp.float32), clean)
        size = clean.audio.shape[0]
        sigma = self.draw_sigma(keys[0], size)
        noise = AVLatents(
            jax.random.normal(keys[1], clean.video.shape),
            jax.random.normal(keys[2], clean.audio.shape),
        )
        noisy = jax.tree.map(lambda x, n: flow.add_noise(x, n, sigma), clean, noise)
        dropped = jax.random.bernoulli(keys[3], self.caption_dropout, (size,))
        contexts = self.contexts(params, frozen, batch["ids"], self.kept(batch["mask"], dropped))
        velocity = clip_velocity(
            self.model, params["transformer"], noisy, sigma, contexts, self.clip
        )
        per_sample = jax.tree.map(losses.flow_matching_loss, velocity, clean, noise)
        scalars = losses.report("teacher", per_sample, self.weights, sigma)
        return losses.total(per_sample, self.weights), scalars

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
