"""How a student generates blocks: cache, noise levels, sizes."""

import dataclasses

from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import ClipRope
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.kv_cache import CacheConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a student generates blocks.

    Attributes:
      cache: layout, window, anchors and positions.
      sigmas: noise levels of the denoising steps, decreasing, with the final 0.
      height, width: of the video, in latents (32 pixels each).
      context_noise: noise level at which a finished block writes its keys and values.
      recache: whether a session writes the keys and values that the cache holds anew when the
        prompt changes, under the new one; it keeps these blocks' latents for that.

    Raises:
      ValueError: a size or noise level that cannot be, or `recache` with absolute positions, which
        blocks written anew could not keep; see also `flow.check_sigmas`.
    """

    cache: CacheConfig
    sigmas: tuple[float, ...]
    height: int
    width: int
    context_noise: float = 0.0
    recache: bool = False

    def __post_init__(self):
        flow.check_sigmas(self.sigmas)
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))  # hashable
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be positive, not {self.height}x{self.width}")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise must be in [0, 1), not {self.context_noise}")
        if self.recache and self.cache.positions != "relative":
            raise ValueError("recache needs positions='relative': evicted blocks leave no gap then")

    @property
    def patches(self) -> int:
        """P, tokens per video latent frame."""
        return self.height * self.width

    @property
    def num_steps(self) -> int:
        """Denoising steps per block."""
        return len(self.sigmas) - 1

    @property
    def sigma_levels(self) -> tuple[float, ...]:
        """Noise levels at which the network is called, in order; the last is the refresh pass."""
        return (*self.sigmas[:-1], self.context_noise)

    def text_levels(self, frozen: bool) -> tuple[float, ...]:
        """Noise levels for `prompt_kv`: `sigma_levels`, and behind them 0 where it is needed.

        Args:
          frozen: whether a condition may freeze a stream, which then reads the text at level 0 also
            where the refresh is noisy.
        """
        return (*self.sigma_levels, 0.0) if frozen and self.context_noise else self.sigma_levels

    def rope(self, model: Transformer, num_blocks: int | None = None) -> ClipRope:
        """RoPE tables for `num_blocks` blocks, or for a stream without end."""
        blocks = self.cache.blocks_in_positions(num_blocks)
        clip = ClipGeometry.from_blocks(self.cache.layout, blocks, self.height, self.width)
        return clip.rope(model)

    def check_rope(self, rope: ClipRope, num_blocks: int | None) -> None:
        """Raises ValueError when the tables are too short for `num_blocks` blocks."""
        layout, blocks = self.cache.layout, self.cache.blocks_in_positions(num_blocks)
        have = rope.video_time.cos.shape[0], rope.audio.cos.shape[0]
        need = layout.num_video_frames(blocks), layout.num_audio_frames(blocks)
        if have[0] < need[0] or have[1] < need[1]:
            raise ValueError(
                f"the RoPE tables cover {have[0]} video and {have[1]} audio latents, but "
                f"{num_blocks} blocks need {need[0]} and {need[1]}; make them with "
                f"rope(model, {num_blocks})"
            )
