"""A world in which every answer is known: clips are Gaussian, so their scores are closed forms.

A clip is a sample of N(mu_c, Sigma). Its mean depends on the prompt c; its covariance is that of an
Ornstein-Uhlenbeck process (AR(1) on any regular grid) in time, and couples video and audio channels
at equal times:

    cov(x[t, i], x[t', j]) = exp(-|t - t'| / correlation_time) C[i, j]

With x = (1 - s) x0 + s noise the velocity that a perfect teacher predicts is

    E[x0 | x] = mu + (1 - s) Sigma ((1 - s)^2 Sigma + s^2 I)^-1 (x - (1 - s) mu)
    v = E[noise - x0 | x] = (x - E[x0 | x]) / s

How far a student is from its teacher is read off the mean and the covariance of its samples.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.evaluation.distances import gaussian_distance, matrix_root
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.inputs import Modality, Pathways, TextKV
from omniforcing_jax.types import AVLatents

DISTANCES = ("mean_video", "mean_audio", "covariance", "cross_covariance", "wasserstein")


@dataclasses.dataclass(frozen=True)
class GaussianWorld:
    """Distribution of the clips, one Gaussian per prompt.

    A clip as a vector [D] holds the video tokens, then the audio tokens, channels fastest.
    """

    config: TransformerConfig  # of the networks that shall learn it: channels and text widths
    layout: BlockLayout  # blocks of the clip; one patch per video latent
    num_blocks: int = 3  # of the clip
    num_prompts: int = 2  # each with its own mean and its own random context
    correlation_time: float = 0.75  # in blocks
    std: float = 0.7  # standard deviation of every channel
    seed: int = 0  # of contexts, means and channel correlations

    @property
    def clip(self) -> ClipGeometry:
        """Sizes and positions of the clip."""
        return ClipGeometry.from_blocks(self.layout, self.num_blocks, 1, 1)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers in the video and in the audio of a clip; their sum is D."""
        clip, c = self.clip, self.config
        return clip.video_tokens * c.video_channels, clip.audio_frames * c.audio_channels

    @functools.cached_property
    def contexts(self) -> tuple[np.ndarray, np.ndarray]:
        """(video, audio) text contexts of the prompts, [prompts, 3, text_dim]."""
        rng = np.random.default_rng((self.seed, 0))
        return tuple(
            rng.standard_normal((self.num_prompts, 3, dim)).astype(np.float32)
            for dim in self.config.text_dims
        )

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """[prompts, D] float64: a wave in every channel, with phases that depend on the prompt."""
        rng = np.random.default_rng((self.seed, 1))
        phases = rng.uniform(0, 2 * np.pi, (self.num_prompts, self._num_channels))
        times, channels = self._coordinates()
        return np.cos(phases[:, channels] + times)

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """[D, D] float64."""
        rng = np.random.default_rng((self.seed, 2))
        # two factors that all channels of both modalities share, and a part of each channel's own
        factors = rng.standard_normal((self._num_channels, 2))
        factors /= np.linalg.norm(factors, axis=1, keepdims=True)
        correlation = 0.6 * factors @ factors.T + 0.4 * np.eye(self._num_channels)
        times, channels = self._coordinates()
        in_time = np.exp(-np.abs(times[:, None] - times[None, :]) / self.correlation_time)
        return self.std**2 * in_time * correlation[np.ix_(channels, channels)]

    @property
    def _num_channels(self) -> int:
        return self.config.video_channels + self.config.audio_channels

    def _coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Time in blocks and channel (audio behind video) of each of the D numbers."""
        clip, c = self.clip, self.config
        video_times = np.arange(clip.video_frames) / self.layout.video_frames
        audio_times = np.arange(clip.audio_frames) / self.layout.audio_frames
        times = [np.repeat(video_times, c.video_channels), np.repeat(audio_times, c.audio_channels)]
        channels = [
            np.tile(np.arange(c.video_channels), clip.video_frames),
            np.tile(c.video_channels + np.arange(c.audio_channels), clip.audio_frames),
        ]
        return np.concatenate(times), np.concatenate(channels)

    def prompt_batch(self, batch: int) -> dict[str, jax.Array]:
        """Text of `batch` samples, the prompts in turn: what a stage's batch needs."""
        index = np.arange(batch) % self.num_prompts
        video, audio = (jnp.asarray(context[index]) for context in self.contexts)
        return {"video_context": video, "audio_context": audio}

    def sample(self, key: jax.Array, batch: int) -> AVLatents:
        """Exact samples [B, T, C] for the prompts of `prompt_batch(batch)`."""
        index = np.arange(batch) % self.num_prompts
        factor = np.linalg.cholesky(self.covariance)
        noise = jax.random.normal(key, (batch, self.mean.shape[1]))
        return self.split(jnp.asarray(self.mean[index], jnp.float32) + noise @ factor.T)

    def split(self, x: jax.Array) -> AVLatents:
        """[B, D] -> tokens [B, T, C]."""
        video, audio = jnp.split(x, [self.sizes[0]], axis=1)
        c = self.config
        return AVLatents(
            video.reshape(x.shape[0], -1, c.video_channels),
            audio.reshape(x.shape[0], -1, c.audio_channels),
        )

    def distances(self, samples: AVLatents) -> dict[str, float]:
        """How far the distribution of samples, for the prompts of `prompt_batch`, is from the true.

        Returns:
          mean_video, mean_audio: norm of the error of the prompts' means over that of the means.
          covariance: Frobenius norm of its error over its own, root mean square over the prompts.
          cross_covariance: the same for the block of video times audio alone.
          wasserstein: 2-Wasserstein distance between the Gaussians with the samples' and the true
            moments, root mean square over the prompts, over the standard deviation sqrt(tr Sigma).
        """
        x = np.asarray(join(samples), np.float64)
        by_prompt = [x[i :: self.num_prompts] for i in range(self.num_prompts)]
        mean = np.stack([x.mean(axis=0) for x in by_prompt])
        covariance = np.stack([np.cov(x, rowvar=False) for x in by_prompt])
        size, truth = self.sizes[0], self.covariance
        moments = zip(mean, covariance, self.mean, strict=True)
        squares = [gaussian_distance(m, c, mu, truth) for m, c, mu in moments]

        def relative(found, truth, *part):
            """Of [prompts, ...] and truth that may be the same for all prompts."""
            error, truth = (found - truth)[:, *part], truth[:, *part]
            return float(np.sqrt(np.sum(error**2) / np.sum(truth**2) / len(error) * len(truth)))

        video, audio = slice(None, size), slice(size, None)
        return {
            "mean_video": relative(mean, self.mean, video),
            "mean_audio": relative(mean, self.mean, audio),
            "covariance": relative(covariance, truth[None]),
            "cross_covariance": relative(covariance, truth[None], video, audio),
            "wasserstein": float(np.sqrt(np.mean(squares) / np.trace(truth))),
        }


def join(x: AVLatents) -> jax.Array:
    """Tokens [B, T, C] of both streams -> [B, D]."""
    return jnp.concatenate([part.reshape(part.shape[0], -1) for part in (x.video, x.audio)], axis=1)


def best_regression_student(
    world: GaussianWorld, sigmas: tuple[float, ...], objective: str, batch: int, *, causal: bool
) -> AVLatents:
    """Samples [B, T, C] of the student that stage II would find if it could learn anything.

    The teacher's ODE is linear: from noise z it passes x_s = (1 - s) mu + ((1 - s)^2 Sigma + s^2
    I)^1/2 z. Stage II's optimum is the conditional mean of the target, given the block's own tokens
    and the clean blocks before it; both are linear in z, so it is a linear regression. While
    sampling, a block's noise is independent of its history. On the teacher's trajectories it is
    not: earlier blocks have read it. That is what a causal student cannot repair by regression.

    Args:
      sigmas: of the student, with the final 0.
      objective: "velocity" or "x0", as in `RegressionConfig`.
      causal: False lets it see the whole clip, as if that were a single block.
    """
    rng = np.random.default_rng(world.seed)
    size, c, clip = len(world.covariance), world.config, world.clip
    video_blocks = world.layout.block_of_video_frame(np.arange(clip.video_frames))
    audio_blocks = world.layout.block_of_audio_frame(np.arange(clip.audio_frames))
    blocks = np.repeat(video_blocks, c.video_channels), np.repeat(audio_blocks, c.audio_channels)
    block_of = np.concatenate(blocks) if causal else np.zeros(size, int)
    clean = matrix_root(world.covariance)  # x0 - mu = clean @ z
    x0 = np.zeros((batch, size))  # without the mean
    for block in range(block_of.max() + 1):
        past, own = block_of < block, block_of == block
        x = rng.standard_normal((batch, own.sum()))
        for s, s_next in itertools.pairwise(sigmas):
            noisy = matrix_root((1 - s) ** 2 * world.covariance + s**2 * np.eye(size))
            # at s the teacher's velocity amounts to the clean prediction E[x0 | x_s]
            expected = (1 - s) * np.linalg.solve(noisy, world.covariance).T
            target = (clean if objective == "x0" else expected)[own]
            seen = np.concatenate([clean[past], noisy[own]])
            weights = np.linalg.solve(seen @ seen.T, seen @ target.T)
            prediction = np.concatenate([x0[:, past], x], axis=1) @ weights
            x = (1 - s_next) * prediction + s_next * rng.standard_normal(prediction.shape)
        x0[:, own] = prediction
    x0 += world.mean[np.arange(batch) % world.num_prompts]
    return world.split(jnp.asarray(x0, jnp.float32))


class GaussianTeacher(nn.Module):
    """The exact velocity of Gaussian clips, called like `Transformer` on whole clips.

    It sees the whole clip, at one noise level, and finds the prompt by its context. Its parameters
    come from `make_teacher`.
    """

    config: TransformerConfig  # of the networks it is exchanged for
    num_prompts: int  # this and `sizes` as in `GaussianWorld`
    sizes: tuple[int, int]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        size, width = sum(self.sizes), 3 * self.config.text_dims[0]
        zeros = nn.initializers.zeros
        self.contexts = self.param("contexts", zeros, (self.num_prompts, width))
        self.mean = self.param("mean", zeros, (self.num_prompts, size))
        self.eigenvalues = self.param("eigenvalues", zeros, (size,))
        self.eigenvectors = self.param("eigenvectors", zeros, (size, size))

    def text_kv(self, video_context: jax.Array, audio_context: jax.Array, sigma=None) -> TextKV:
        """What the sampler computes once per prompt: here the contexts, as a single layer's."""
        return TextKV(video_context[None], audio_context[None])

    def __call__(
        self,
        video: Modality,
        audio: Modality,
        *,
        history: Pathways | None = None,
        text: TextKV | None = None,
        keep: Pathways | None = None,
    ):
        """Velocities [B, T, C] of both streams, and no keys and values.

        Raises:
          ValueError: asked for anything but the bidirectional pass over a clip at one level.
        """
        levels = {m.sigma.shape[1] for m in (video, audio)}
        if history is not None or keep is not None or levels != {1}:
            raise ValueError("the analytic teacher sees whole clips, at one noise level each")
        context = video.context if text is None else text.video[0]
        distance = (
            context.reshape(len(context), 1, -1) - self.contexts[None]
        )  # [B, prompts, S * dim]
        mean = self.mean[jnp.argmin(jnp.sum(distance**2, axis=2), axis=1)]  # [B, D]
        x = join(AVLatents(video.latents, audio.latents)).astype(jnp.float32)
        s = video.sigma  # [B, 1]
        eigenvalues = self.eigenvalues[None]
        gain = (1 - s) * eigenvalues / ((1 - s) ** 2 * eigenvalues + s**2)  # [B, D]
        x0 = mean + (((x - (1 - s) * mean) @ self.eigenvectors) * gain) @ self.eigenvectors.T
        velocity = (x - x0) / s
        parts = jnp.split(velocity, [self.sizes[0]], axis=1)
        latents = (video.latents, audio.latents)
        return tuple(v.reshape(like.shape) for v, like in zip(parts, latents, strict=True)), None


def make_teacher(world: GaussianWorld) -> tuple[GaussianTeacher, dict[str, jax.Array]]:
    """The teacher of a world and its parameters."""
    teacher = GaussianTeacher(world.config, world.num_prompts, world.sizes)
    values, vectors = np.linalg.eigh(world.covariance)
    params = {
        "contexts": world.contexts[0].reshape(world.num_prompts, -1),
        "mean": world.mean,
        "eigenvalues": values,
        "eigenvectors": vectors,
    }
    return teacher, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
