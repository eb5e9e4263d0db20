"""With which settings a stream fits into a device's memory, by sums over shapes; nothing is read.

What a stream holds between two blocks follows from shapes: weights, cache, keys and values of the
text, decoders. What a program needs while it runs is an allowance, by what was compiled
(docs/scaling.md): of a block 44 arrays of the size of all cached video tokens, [S, D] (48 layers in
bfloat16 for an H200; in 8 bits a third of that), of a decoder 8 arrays of its last stage. Blocks
and decoders run in turns, so the larger of both counts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.kv_cache import cache_bytes
from omniforcing_jax.sampling.rollout_config import RolloutConfig
from omniforcing_jax.sampling.weights import QUANTIZED
from omniforcing_jax.scaling.devices import GIB

USABLE = 0.9  # of a device's memory
LEAST_WINDOW = 3  # blocks
_BLOCK_ARRAYS = 44
_DECODER_ARRAYS = 8


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """What may be given up for memory.

    Attributes:
      quantize: of the weights, see `pipeline.load_pipeline`.
      cache_dtype: see `CacheConfig`.
      window: blocks of the cache.
      tiny: whether the tiny decoder takes the place of the VAE's.
    """

    quantize: str
    cache_dtype: str | None
    window: int
    tiny: bool


@dataclasses.dataclass(frozen=True)
class StreamNeeds:
    """Bytes of a device, by what they are for; see `needs`."""

    weights: int
    cache: int
    text: int
    decoders: int
    programs: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = dataclasses.asdict(self).items()
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts) + " GiB"


def needs(
    config: PipelineConfig,
    rollout: RolloutConfig,
    settings: StreamSettings,
    shapes: Mapping[str, Any],
    decoders: Mapping[str, int],
    *,
    dtype: jnp.dtype,
    text_length: int,
    latents: int,
    ways: int = 1,
) -> StreamNeeds:
    """What one stream takes of each device.

    Args:
      rollout: of the stream; `settings` say the window and the dtype of its cache.
      shapes: of the transformer's parameters, layers stacked.
      decoders: bytes of the weights of "video", "tiny" and "sound", as they are on the device.
      dtype: of the computation.
      text_length: tokens of a prompt.
      latents: that the video decoder sees at a time.
      ways: devices that heads and hidden units are split over.
    """
    model = config.transformer
    cache = dataclasses.replace(rollout.cache, window=settings.window, dtype=settings.cache_dtype)
    patches, size = rollout.patches, jnp.dtype(dtype).itemsize
    int8 = settings.cache_dtype is not None
    how = {"batch": 1, "patches": patches, "dtype": dtype, "per_layer": True}
    slots = cache.layout.num_video_frames(cache.capacity + 1) * patches
    block = _BLOCK_ARRAYS * slots * model.video_dim * size // ways
    frames = latents * config.video_vae.temporal_compression
    channels = config.video_vae.decoder_base_channels
    if settings.tiny and config.tiny_decoder is not None:
        channels = config.tiny_decoder.widths[-1]
    pixels = patches * config.video_vae.spatial_compression**2
    last_stage = frames * pixels // config.video_vae.patch_size**2 * channels * size
    picture = frames * pixels * 3 * 4  # float32
    return StreamNeeds(
        weights=weights_bytes(shapes, size, settings.quantize) // ways,
        cache=cache_bytes(cache, model, **how) // ways,
        text=text_bytes(model, rollout, text_length, size, int8=int8) // ways,
        decoders=decoders["tiny" if settings.tiny else "video"] + decoders["sound"],
        programs=max(block, _DECODER_ARRAYS * last_stage + 2 * picture),
    )


def weights_bytes(shapes: Mapping[str, Any], itemsize: int, quantize: str) -> int:
    """A sampler's weights, see `sampling.weights.per_layer`; `shapes`: the stacked parameters."""
    total = 0
    for path, x in flatten_dict(shapes).items():
        if (
            quantize != "none"
            and path[0] == "blocks"
            and path[-1] == "kernel"
            and (path[-2] in QUANTIZED)
        ):
            layers, _, outputs = x.shape
            total += x.size + 4 * layers * outputs  # and a scale for each output
        else:
            total += x.size * itemsize
    return total


def text_bytes(
    model: TransformerConfig, rollout: RolloutConfig, length: int, itemsize: int, *, int8: bool
) -> int:
    """Keys and values of a prompt's tokens, see `sampling.student.prompt_kv`."""
    levels = len(rollout.text_levels(frozen=False)) if model.text_adaln else 1
    heads = ((model.video_heads, model.video_head_dim), (model.audio_heads, model.audio_head_dim))
    token = sum(n * (h + 4 if int8 else h * itemsize) for n, h in heads)
    return 2 * levels * model.num_layers * length * token


def ladder(
    best: StreamSettings, free: Set[str], *, precision: str = "int8", tiny: bool = False
) -> Iterator[StreamSettings]:
    """Settings to try, the best first: weights in 8 bits, then the cache, then a shorter window,
    then the tiny decoder.

    Args:
      best: as asked for, or as trained.
      free: names of the fields that may be changed.
      precision: of the weights in 8 bits.
      tiny: whether there is a tiny decoder.
    """
    now = best
    yield now
    for name, value in (("quantize", precision), ("cache_dtype", "int8")):
        if name in free and getattr(now, name) != value:
            now = dataclasses.replace(now, **{name: value})
            yield now
    while "window" in free and now.window > LEAST_WINDOW:
        now = dataclasses.replace(now, window=now.window - 1)
        yield now
    if tiny and "tiny" in free and not now.tiny:
        yield dataclasses.replace(now, tiny=True)
