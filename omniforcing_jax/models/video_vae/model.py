"""LTX-2 video VAE: pixels [B, F, H, W, 3] in [-1, 1] <-> normalised latents [B, f, h, w, C].

F = 8 (f - 1) + 1 and H, W = 32 h, 32 w for the published checkpoints; the factors follow from the
checkpoint's own block lists. The encoder is causal. The decoder was trained non-causal; with the
same weights it also runs causally (see `streaming.video`), at a quality to be measured.
The functions `encode`, `decode` and their `_chunk`s are to be jitted with `config`, `causal` and
`dtype` static.
Source: the convolutional video VAE of Lightricks LTX-2 ("CausalVideoAutoencoder").
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.models.video_vae.layers import (
    CausalConv3d,
    ConvCache,
    DepthToSpaceUpsample,
    ResBlocks,
    SpaceToDepthDownsample,
    patchify,
    pixel_norm_silu,
    unpatchify,
)
from omniforcing_jax.ranges import MOST_LAYERS, Range, hold_fields

_STRIDES = {
    "res_x": (1, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_time": (2, 1, 1),
    "compress_all": (2, 2, 2),
}
_ENCODER_KINDS = ("res_x", "compress_space_res", "compress_time_res", "compress_all_res")
_DECODER_KINDS = ("res_x", "compress_space", "compress_time", "compress_all")

# Settings with a single supported value
_FIXED_SETTINGS = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
}
_READ_SETTINGS = (
    "latent_channels",
    "encoder_blocks",
    "decoder_blocks",
    "patch_size",
    "causal_decoder",
    "encoder_base_channels",
    "decoder_base_channels",
    "spatial_padding_mode",
)


@dataclasses.dataclass(frozen=True)
class VAEStage:
    """One entry of a block list: several residual blocks, or a change of resolution.

    Attributes:
      kind: "res_x", "compress_space", "compress_time" or "compress_all" (without the suffix "_res"
        of the encoder's entries, which all have it).
      num_layers: residual blocks of a "res_x".
      multiplier: factor by which the width grows in the encoder and shrinks in the decoder.
      residual: whether the decoder's stage has a skip path.
    """

    kind: str
    num_layers: Annotated[int, Range(0, MOST_LAYERS)] = 0
    multiplier: int = 1
    residual: bool = False

    def __post_init__(self):
        hold_fields(self)

    @property
    def stride(self) -> tuple[int, int, int]:
        """(time, height, width) factor of this stage."""
        return _STRIDES[self.kind]


def _parse_stage(field: str, entry: Any, is_encoder: bool) -> VAEStage:
    """A [name, parameters] pair of a checkpoint's block list."""
    kinds = _ENCODER_KINDS if is_encoder else _DECODER_KINDS
    try:
        name, given = entry
    except (TypeError, ValueError):
        raise ValueError(f"{field}: expected [name, parameters], got {entry!r}") from None
    if name not in kinds:
        raise ValueError(
            f"{field}: block {name!r} is not supported (supported: {', '.join(kinds)})"
        )
    given = {"num_layers": given} if isinstance(given, int) else dict(given)
    count, option = (
        ("num_layers", "inject_noise") if name == "res_x" else ("multiplier", "residual")
    )
    if name != "res_x":
        given.setdefault("multiplier", 2 if is_encoder else 1)
    fixed = {} if name == "compress_all" else {option: False}
    problems = find_problems(given, required=(count,), fixed=fixed, known=(count, option))
    number = given.get(count, 1)
    if not isinstance(number, int) or number < 1:
        problems.append(f"{count} is {number!r}; 1 or more is supported")
    raise_problems(f"{field}, {name}", problems)
    residual = given.get("residual", False)
    return VAEStage(name.removesuffix("_res"), **{count: number}, residual=residual)


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig:
    """Architecture of a video VAE.

    Attributes:
      encoder_blocks, decoder_blocks: the stages in the file's order, in which the encoder applies
        them; the decoder applies its own in reverse order.
      latent_channels: C.
      patch_size: pixels per patch along height and width, at the outer end of both networks.
      decoder_base_channels: width of the decoder's last stage.
      causal_decoder: whether the decoder was trained causal in time.
      encoder_padding_mode, decoder_padding_mode: "zeros" or "reflect", in space.
    """

    encoder_blocks: tuple[VAEStage, ...]
    decoder_blocks: tuple[VAEStage, ...]
    latent_channels: int = 128
    patch_size: int = 4
    decoder_base_channels: int = 128
    causal_decoder: bool = False
    encoder_padding_mode: Literal["zeros", "reflect"] = "zeros"
    decoder_padding_mode: Literal["zeros", "reflect"] = "reflect"

    def __post_init__(self):
        hold_fields(self)
        for field in ("encoder_blocks", "decoder_blocks"):
            if not getattr(self, field):
                raise ValueError(f"{field} is missing or empty")
        encoder, decoder = (
            [math.prod(s.stride[axis] for s in blocks) for axis in (0, 1)]
            for blocks in (self.encoder_blocks, self.decoder_blocks)
        )
        if encoder != decoder:
            raise ValueError(
                f"encoder_blocks compress (time, space) by {encoder}, decoder_blocks by {decoder}"
            )
        self._check_widths()

    def _check_widths(self):
        width = self.latent_channels
        for i, stage in enumerate(self.encoder_blocks):
            volume, out = math.prod(stage.stride), width * stage.multiplier
            if out % volume or (width * volume) % out:
                raise ValueError(f"encoder_blocks[{i}]: width {width} -> {out} at {stage.stride}")
            width = out
        width = self.bottleneck_channels
        for i, stage in reversed(list(enumerate(self.decoder_blocks))):
            volume = math.prod(stage.stride)
            skip_fits = width % volume == 0 and volume % stage.multiplier == 0
            if stage.residual and not skip_fits:
                raise ValueError(f"decoder_blocks[{i}]: residual path of width {width}: {stage}")
            width //= stage.multiplier

    @classmethod
    def from_metadata(cls, vae: dict[str, Any]) -> "VideoVAEConfig":
        """Reads `config["vae"]` of an LTX-2 checkpoint.

        Absent settings have the defaults of the reference loader.

        Raises:
          ValueError: settings that are unknown or that this implementation does not have; names
            them and what is supported.
        """
        if vae.get("_class_name") == "CausalDiffusionVAE":
            raise ValueError(
                "vae: is LTX-2.5's diffusion decoder, which is not implemented; use "
                "ltx-2.5-video-vae-conv-bf16.safetensors"
            )
        latent_channels = vae.get("latent_channels", 128)
        # The encoder starts as wide as the latents; the reference loader ignores this setting.
        fixed = _FIXED_SETTINGS | {"encoder_base_channels": latent_channels}
        given = {"timestep_conditioning": True} | vae  # True is the reference loader's default
        problems = find_problems(given, fixed=fixed, known=(*_FIXED_SETTINGS, *_READ_SETTINGS))
        raise_problems("vae", problems)
        return cls(
            encoder_blocks=tuple(
                _parse_stage("vae.encoder_blocks", entry, is_encoder=True)
                for entry in vae.get("encoder_blocks", ())
            ),
            decoder_blocks=tuple(
                _parse_stage("vae.decoder_blocks", entry, is_encoder=False)
                for entry in vae.get("decoder_blocks", ())
            ),
            latent_channels=latent_channels,
            patch_size=vae.get("patch_size", 4),
            decoder_base_channels=vae.get("decoder_base_channels", 128),
            causal_decoder=vae.get("causal_decoder", False),
            # 2.0 files do not name the mode: encoder and decoder then differ.
            encoder_padding_mode=vae.get("spatial_padding_mode", "zeros"),
            decoder_padding_mode=vae.get("spatial_padding_mode", "reflect"),
        )

    @property
    def temporal_compression(self) -> int:
        """Pixel frames per latent frame (8), the first latent frame excepted: it holds one."""
        return math.prod(stage.stride[0] for stage in self.encoder_blocks)

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along height and width (32)."""
        return self.patch_size * math.prod(stage.stride[1] for stage in self.encoder_blocks)

    @property
    def bottleneck_channels(self) -> int:
        """Width after the decoder's first convolution."""
        return self.decoder_base_channels * math.prod(s.multiplier for s in self.decoder_blocks)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of the first `latent_frames` latents: 8 (f - 1) + 1, and 0 for 0."""
        return max(0, self.temporal_compression * (latent_frames - 1) + 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames of a clip; raises ValueError unless `pixel_frames` is 8 k + 1."""
        step = self.temporal_compression
        if pixel_frames < 1 or (pixel_frames - 1) % step:
            below = max(0, pixel_frames - 1) // step * step + 1
            raise ValueError(
                f"a clip needs {step}k+1 frames, got {pixel_frames}; "
                f"nearest valid: {below} or {below + step}"
            )
        return (pixel_frames - 1) // step + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) in latents; raises ValueError unless both are positive multiples of 32."""
        step = self.spatial_compression
        if height < step or width < step or height % step or width % step:
            raise ValueError(
                f"height and width must be positive multiples of {step}, got {height}x{width}"
            )
        return height // step, width // step


def _check_reflection(mode: str, height: int, width: int, name: str) -> None:
    if mode == "reflect" and min(height, width) < 2:
        raise ValueError(
            f"the {name} pads by reflection and needs at least 2x2 latents, got {height}x{width}"
        )


class VideoEncoder(nn.Module):
    """Causal encoder; its result holds the latent means and one shared log-variance."""

    config: VideoVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, video: jax.Array, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        """[B, F, H, W, 3] in [-1, 1] -> ([B, f, h, w, C + 1], not normalised, and the cache).

        With `cache` None the clip starts here and F = 8 (f - 1) + 1; with that of the chunk before
        F = 8 f.
        """
        config, mode = self.config, self.config.encoder_padding_mode
        width = config.latent_channels
        past, new = cache or {}, {}
        x = patchify(video, config.patch_size)  # [B, F, H/4, W/4, 48]
        conv_in = CausalConv3d(width, mode, self.dtype, name="conv_in")
        x, new["conv_in"] = conv_in(x, True, past.get("conv_in"))
        for i, stage in enumerate(config.encoder_blocks):
            name = f"down_blocks_{i}"
            if stage.kind == "res_x":
                layer = ResBlocks(stage.num_layers, mode, self.dtype, name=name)
            else:
                width *= stage.multiplier
                layer = SpaceToDepthDownsample(width, stage.stride, mode, self.dtype, name=name)
            x, new[name] = layer(x, True, past.get(name))
        conv_out = CausalConv3d(config.latent_channels + 1, mode, self.dtype, name="conv_out")
        x, new["conv_out"] = conv_out(pixel_norm_silu(x), True, past.get("conv_out"))
        return x, new


class VideoDecoder(nn.Module):
    """Decoder, non-causal (as it was trained) or causal."""

    config: VideoVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, latents: jax.Array, causal: bool, cache: ConvCache | None = None
    ) -> tuple[jax.Array, ConvCache]:
        """[B, f, h, w, C], not normalised -> ([B, F, H, W, 3], cache for the next chunk).

        With `cache` None the clip starts here and F = 8 (f - 1) + 1; with the cache of the chunk
        before F = 8 f.
        """
        config, mode = self.config, self.config.decoder_padding_mode
        past, new = cache or {}, {}
        conv_in = CausalConv3d(config.bottleneck_channels, mode, self.dtype, name="conv_in")
        x, new["conv_in"] = conv_in(latents, causal, past.get("conv_in"))
        for i, stage in enumerate(reversed(config.decoder_blocks)):
            name = f"up_blocks_{i}"
            if stage.kind == "res_x":
                layer = ResBlocks(stage.num_layers, mode, self.dtype, name=name)
            else:
                layer = DepthToSpaceUpsample(
                    stage.multiplier, stage.stride, stage.residual, mode, self.dtype, name=name
                )
            x, new[name] = layer(x, causal, past.get(name))
        conv_out = CausalConv3d(3 * config.patch_size**2, mode, self.dtype, name="conv_out")
        x, new["conv_out"] = conv_out(pixel_norm_silu(x), causal, past.get("conv_out"))
        return unpatchify(x, config.patch_size), new


def init_params(config: VideoVAEConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters {encoder, decoder, per_channel_statistics: {mean, std}} in float32.

    Kernels are N(0, 1 / fan_in), everything else is 0 and the latents' std 1. All kernels are cut
    from one draw, because compiling one for each takes half a minute on a CPU.
    """
    channels, side = config.latent_channels, 2 * config.spatial_compression
    video, latents = jnp.zeros((1, 1, side, side, 3)), jnp.zeros((1, 1, 2, 2, channels))
    shapes = {
        "encoder": jax.eval_shape(VideoEncoder(config).init, key, video)["params"],
        "decoder": jax.eval_shape(
            lambda k, z: VideoDecoder(config).init(k, z, causal=True), key, latents
        )["params"],
    }
    leaves, structure = jax.tree.flatten(shapes)
    kernel_sizes = [leaf.size if leaf.ndim > 1 else 0 for leaf in leaves]
    normal = jax.random.normal(key, (sum(kernel_sizes),))
    values, offset = [], 0
    for leaf, size in zip(leaves, kernel_sizes, strict=True):
        if size:
            fan_in = leaf.size // leaf.shape[-1]
            kernel = normal[offset : offset + size].reshape(leaf.shape)
            values.append(kernel * fan_in**-0.5)
        else:
            values.append(jnp.zeros(leaf.shape))
        offset += size
    statistics = {"mean": jnp.zeros(channels), "std": jnp.ones(channels)}
    return structure.unflatten(values) | {"per_channel_statistics": statistics}


def encode(
    config: VideoVAEConfig, params: dict[str, Any], video: jax.Array, dtype=jnp.float32
) -> jax.Array:
    """Latent means of a clip, normalised per channel: (z - mean) / std.

    Args:
      params: tree {encoder, decoder, per_channel_statistics}; the decoder is not read.
      video: [B, 8k+1, H, W, 3] in [-1, 1]; H and W multiples of 32.
      dtype: compute dtype; the result is float32.

    Returns:
      [B, k+1, H/32, W/32, C] float32.

    Raises:
      ValueError: on a wrong rank, channel count, frame count or size.
    """
    return encode_chunk(config, params, video, dtype=dtype)[0]


def encode_chunk(
    config: VideoVAEConfig,
    params: dict[str, Any],
    video: jax.Array,
    cache: ConvCache | None = None,
    dtype=jnp.float32,
) -> tuple[jax.Array, ConvCache]:
    """Encodes the next frames of a clip. Chunks put together equal `encode` of the whole clip.

    Args:
      params, dtype: as for `encode`.
      video: [B, F, H, W, 3] in [-1, 1], F = 8 (f - 1) + 1 in a clip's first chunk, else 8 f.
      cache: what the previous chunk's call returned; None starts a clip.

    Returns:
      [B, f, H/32, W/32, C] float32 as of `encode`, and the convolutions' cache.

    Raises:
      ValueError: as `encode`.
    """
    _check_video(config, video.shape)
    if cache is None:
        config.latent_frames(video.shape[1])
    elif video.shape[1] < 1 or video.shape[1] % config.temporal_compression:
        raise ValueError(
            f"a chunk that continues a clip has {config.temporal_compression}k frames, got "
            f"{video.shape[1]}"
        )
    with jax.named_scope("video_encoder"):
        variables = {"params": params["encoder"]}
        moments, cache = VideoEncoder(config, dtype).apply(variables, video.astype(dtype), cache)
    # moments [B, f, h, w, C + 1]
    mean, std = latent_statistics(params)
    return (moments[..., : config.latent_channels].astype(jnp.float32) - mean) / std, cache


def _check_video(config: VideoVAEConfig, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `shape` is one of frames [B, F, H, W, 3] for the encoder."""
    if len(shape) != 5 or shape[-1] != 3:
        raise ValueError(f"video must be [B, F, H, W, 3], got {shape}")
    size = config.latent_size(*shape[2:4])
    _check_reflection(config.encoder_padding_mode, *size, "encoder")


def decode(
    config: VideoVAEConfig,
    params: dict[str, Any],
    latents: jax.Array,
    causal: bool | None = None,
    dtype=jnp.float32,
) -> jax.Array:
    """Pixels of a whole clip.

    Args:
      params: tree {encoder, decoder, per_channel_statistics}; the encoder is not read.
      latents: normalised, [B, f, h, w, C]; h and w at least 2 where the decoder reflects.
      causal: None as the checkpoint was trained (`config.causal_decoder`).
      dtype: compute dtype and dtype of the result.

    Returns:
      [B, 8(f-1)+1, 32h, 32w, 3], about [-1, 1], not clipped.

    Raises:
      ValueError: on a wrong rank or channel count, or too few latents for reflection.
    """
    causal = config.causal_decoder if causal is None else causal
    return decode_chunk(config, params, latents, causal=causal, dtype=dtype)[0]


def latent_statistics(params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the latents' channels, [1, 1, 1, 1, C] float32."""
    statistics = params["per_channel_statistics"]
    return tuple(
        statistics[name].astype(jnp.float32)[None, None, None, None] for name in ("mean", "std")
    )


def decode_chunk(
    config: VideoVAEConfig,
    params: dict[str, Any],
    latents: jax.Array,
    cache: ConvCache | None = None,
    causal: bool = True,
    dtype=jnp.float32,
) -> tuple[jax.Array, ConvCache]:
    """Decodes one chunk of a stream.

    Causal chunks put together equal the causal decode of the whole clip. Without `causal` the chunk
    is decoded as the end of a clip, of which the cache holds what came before.

    Args:
      params, latents, dtype: as for `decode`.
      cache: of the convolutions; None starts a clip. Causal: what the previous chunk's call
        returned. Otherwise: `layers.frames_before` the chunk, of what that call returned.

    Returns:
      Pixels [B, 8(f-1)+1, 32h, 32w, 3] of a first chunk, [B, 8f, 32h, 32w, 3] of any other, and the
      convolutions' cache; without `causal` their inputs.

    Raises:
      ValueError: as `decode`.
    """
    check_latents(config, latents.shape)
    mean, std = latent_statistics(params)
    latents = (latents.astype(jnp.float32) * std + mean).astype(dtype)
    variables = {"params": params["decoder"]}
    with jax.named_scope("video_decoder"):
        return VideoDecoder(config, dtype).apply(variables, latents, causal, cache)


def check_latents(config: VideoVAEConfig, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `shape` is one of latents [B, f >= 1, h, w, C] for the decoder."""
    if len(shape) != 5 or shape[-1] != config.latent_channels or shape[1] < 1:
        raise ValueError(
            f"latents must be [B, f >= 1, h, w, {config.latent_channels}], got {shape}"
        )
    _check_reflection(config.decoder_padding_mode, *shape[2:4], "decoder")
