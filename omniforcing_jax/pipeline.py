"""A converted checkpoint, read from disk: every component with the configuration it came with."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import TINY_DECODER, UPSAMPLER
from omniforcing_jax.models import lora, quantization
from omniforcing_jax.models.audio import vae as audio_vae
from omniforcing_jax.models.audio import vocoder
from omniforcing_jax.models.audio.vae import AudioVAEConfig
from omniforcing_jax.models.audio.vocoder import VocoderConfig
from omniforcing_jax.models.tiny_decoder import TinyDecoderConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.models.video_vae.model import VideoVAEConfig, check_latents
from omniforcing_jax.sampling import flow, weights
from omniforcing_jax.sampling.guidance import default_guidance
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.recipes import SamplingRecipe, default_steps, is_ancestral
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.trained import UNSAID, TrainedSettings
from omniforcing_jax.streaming.audio import StreamingAudioDecoder
from omniforcing_jax.streaming.encoders import StreamingAudioEncoder, StreamingVideoEncoder
from omniforcing_jax.streaming.session import StreamingSession
from omniforcing_jax.streaming.turns import Turn
from omniforcing_jax.streaming.video import StreamingVideoDecoder, to_uint8
from omniforcing_jax.text.prompts import PromptEncoder
from omniforcing_jax.types import AVLatents

# What is sampled and decoded with; the text connectors are the prompt encoder's.
PIPELINE_COMPONENTS = ("transformer", "video_vae", "audio_vae", "vocoder")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What `config.json` of a converted checkpoint says, parsed.

    Attributes:
      transformer, video_vae, audio_vae, vocoder: configurations of the networks.
      model_version: of LTX-2, such as "2.3.0".
      trained: what the model was trained with.
      missing: components that are described but were not converted; see `check_complete`.
      tiny_decoder: of the checkpoint's tiny decoder, if one was added.
    """

    transformer: TransformerConfig
    video_vae: VideoVAEConfig
    audio_vae: AudioVAEConfig
    vocoder: VocoderConfig
    model_version: str
    trained: TrainedSettings = UNSAID
    missing: tuple[str, ...] = ()
    tiny_decoder: TinyDecoderConfig | None = None

    @classmethod
    def from_checkpoint(cls, directory: str | pathlib.Path) -> "PipelineConfig":
        """Reads and checks `config.json`; no weights are touched.

        Components may be missing, as training and encoding read some of them only.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: another format, or a setting that is not supported.
        """
        content = checkpoints.load_config(directory)
        with checkpoints.parsing(pathlib.Path(directory) / "config.json"):
            config = cls.from_content(content)
        missing = checkpoints.missing_components(directory, PIPELINE_COMPONENTS)
        return dataclasses.replace(config, missing=missing)

    def check_complete(self) -> None:
        """Raises ValueError unless all that sampling and decoding read was converted."""
        if self.missing:
            raise ValueError(
                f"the checkpoint has no {', '.join(self.missing)}, so nothing can be sampled from "
                "it; convert again with all components, which is what the converters do without "
                "--components"
            )

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "PipelineConfig":
        """The same from what `config.json` holds."""
        if content["family"] == UPSAMPLER:
            raise ValueError(
                "this checkpoint is a latent upsampler, for --upsampler of launch.sample_teacher"
            )
        trained = TrainedSettings.read(content)
        return cls.from_metadata(content["config"], content["model_version"], trained)

    @classmethod
    def from_metadata(
        cls,
        metadata: dict[str, Any],
        model_version: str,
        trained: TrainedSettings = UNSAID,
    ) -> "PipelineConfig":
        """Parses the `config` object of an LTX-2 safetensors header.

        Args:
          trained: what the model was trained with, which LTX-2's own files do not say.

        Raises:
          ValueError: a component's configuration is missing, or a setting is not supported.
        """
        missing = [k for k in ("transformer", "vae", "audio_vae", "vocoder") if not metadata.get(k)]
        if missing:
            raise ValueError(
                f"the checkpoint has no configuration for {', '.join(missing)}; convert again from "
                "a complete LTX-2 file, or give one as --base to checkpoint_converters.omniforcing"
            )
        transformer = TransformerConfig.from_metadata(metadata["transformer"], model_version)
        video_vae = VideoVAEConfig.from_metadata(metadata["vae"])
        audio_vae = AudioVAEConfig.from_metadata(metadata["audio_vae"])
        channels = (transformer.video_channels, transformer.audio_channels)
        if channels != (video_vae.latent_channels, audio_vae.latent_width):
            raise ValueError(
                f"the transformer makes latents of {channels} channels (video, audio), the VAEs "
                f"take {(video_vae.latent_channels, audio_vae.latent_width)}: they belong to "
                "different models; convert both from the same release"
            )
        _check_versions(model_version, transformer, video_vae)
        tiny = metadata.get(TINY_DECODER)
        return cls(
            transformer=transformer,
            video_vae=video_vae,
            audio_vae=audio_vae,
            vocoder=VocoderConfig.from_metadata(metadata["vocoder"]),
            model_version=model_version,
            trained=trained,
            tiny_decoder=tiny and TinyDecoderConfig.from_metadata(tiny),
        )

    @property
    def image_crf(self) -> int:
        """H.264 quality of the pictures that the model was trained with; see `compress_image`."""
        major, minor = (int(number) for number in self.model_version.split(".")[:2])
        return 18 if (major, minor) >= (2, 4) else 33

    def layout(self, name: str | None = None, frame_rate: float | None = None) -> BlockLayout:
        """The block layout, as the model was trained but for what is given (else "prefix")."""
        name = name or self.trained.layout or "prefix"
        rate = self.trained.filled().frame_rate if frame_rate is None else frame_rate
        return BlockLayout.from_name(name, frame_rate=rate)

    def cache(
        self,
        layout: BlockLayout,
        window: int | None = None,
        anchors: int | None = None,
        positions: str | None = None,
    ) -> CacheConfig:
        """A rolling cache for this model; see `TrainedSettings.cache`."""
        return self.trained.cache(layout, window, anchors, positions)

    def sigmas(self, timesteps: Sequence[float] | None = None) -> tuple[float, ...]:
        """Noise levels of a student's steps, with the final 0: those of `timesteps`, else those it
        was trained with, else OmniForcing's four; see `flow.student_sigmas`."""
        timesteps = timesteps or self.trained.timesteps or flow.STUDENT_TIMESTEPS
        schedule = flow.schedule(self.trained.schedule)
        return tuple(flow.student_sigmas(timesteps, schedule).tolist())

    def recipe(self, num_steps: int | None = None) -> SamplingRecipe:
        """How whole clips are sampled from this checkpoint: as it was trained, and LTX-2 itself as
        its own pipelines do.

        Args:
          num_steps: the LTX-2 schedule of so many steps instead, with the same guidance.

        Raises:
          ValueError: see `default_guidance` and `flow.ltx2_schedule`.
        """
        guidance = self.trained.guidance
        if guidance is None:
            guidance = default_guidance(self.model_version)
        if self.trained.timesteps is not None and num_steps is None:
            ancestral = is_ancestral(self.trained.stage, self.model_version)
            return SamplingRecipe(self.sigmas(), guidance, ancestral)
        return SamplingRecipe.of_steps(num_steps or default_steps(self.model_version), guidance)

    def rollout(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        cache: CacheConfig | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> RolloutConfig:
        """How this checkpoint streams video: as it was trained, but for what is given.

        Args:
          height, width: of the video, in pixels; None as trained, else 512 and 768.
          cache: layout, window and positions; see `cache`.
          sigmas: noise levels, decreasing from 1 to 0; see `sigmas`.

        Raises:
          ValueError: see `check_complete`, `check_size` and `flow.check_sigmas`.
        """
        self.check_complete()
        trained = self.trained.filled()
        height, width = self.check_size(
            trained.height if height is None else height,
            trained.width if width is None else width,
        )
        cache = cache or self.cache(self.layout())
        sigmas = tuple(sigmas or self.sigmas())
        return RolloutConfig(cache, sigmas, height, width, trained.context_noise)

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels to latents.

        Raises:
          ValueError: not multiples of the VAE's spatial compression, or too small for its decoder.
        """
        size = self.video_vae.latent_size(height, width)
        check_latents(self.video_vae, (1, 1, *size, self.video_vae.latent_channels))
        return size


def _check_versions(version: str, transformer: TransformerConfig, vae: VideoVAEConfig) -> None:
    """Raises ValueError where a network is not of the checkpoint's version, as far as it shows.

    The channels do not tell LTX-2.0 from 2.3, whose latents are different spaces. Gated attention
    came with 2.3, and all its decoders pad with zeros; smaller ones of 2.0 may do so as well.
    """
    newer = not version.startswith("2.0")
    wrong = []
    if transformer.gated_attention != newer:
        wrong.append(f"the transformer is of LTX-{'2.0' if newer else '2.3 or later'}")
    if newer and vae.decoder_padding_mode == "reflect":
        wrong.append("the video VAE is of LTX-2.0")
    if wrong:
        raise ValueError(
            f"the checkpoint is of LTX-{version}, but {' and '.join(wrong)}: latents of 2.0 and "
            "later versions are different spaces; convert all components from the same release"
        )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Configuration and weights.

    Attributes:
      config: what the checkpoint says.
      params: {"transformer", "video_vae", "audio_vae", "vocoder": parameter tree}; the VAEs have
        an "encoder" only if they were loaded with it. With a "tiny_decoder" the video VAE has no
        "decoder", and is not there at all without an encoder.
      dtype: in which the transformer, the VAEs and a stream's vocoder compute.
    """

    config: PipelineConfig
    params: dict[str, Any]
    dtype: jnp.dtype

    def transformer(self, implementation: str = "auto") -> Transformer:
        """The network as a module; its weights are `params["transformer"]`."""
        return Transformer(self.config.transformer, self.dtype, implementation)

    def session(
        self,
        rollout_config: RolloutConfig,
        prompt: str | tuple[jax.Array, jax.Array],
        *,
        prompts: PromptEncoder | None = None,
        seed: int = 0,
        max_blocks: int | None = None,
        text_length: int | None = None,
        implementation: str = "auto",
        decode_mode: str | None = None,
        look_back: int = 0,
        look_ahead: int = 2,
        blend: int = 0,
        given: str | None = None,
        wait: bool = False,
        steerable: bool = False,
        timings: bool = False,
        log: Callable[[Turn], None] | None = None,
    ) -> StreamingSession:
        """A live session; see `StreamingSession` and `StreamingVideoDecoder` for the options.

        Args:
          rollout_config: from `PipelineConfig.rollout`.
          prompt: a sentence, which needs `prompts`, or contexts of video and audio, each
            [B, S, text_dim].
          prompts: encodes sentences.
          seed, max_blocks, text_length: see `StreamingSession`.
          implementation: attention backend, see `ops.attention`.
          decode_mode: one of `streaming.video.MODES`; None is "tiny" if that decoder was loaded,
            else "causal" for a decoder that was trained so, else "window".
          look_back, look_ahead, blend: latent frames, of a "window" decoder only.
          given, wait, steerable, timings, log: see `StreamingSession`; what is given needs the
            pipeline's encoders.

        Raises:
          ValueError: see `StreamingSession` and `StreamingVideoDecoder`.
        """
        c = self.config
        tiny = TINY_DECODER in self.params
        trained = "causal" if c.video_vae.causal_decoder else "window"
        video_decoder = StreamingVideoDecoder(
            c.video_vae,
            self.params[TINY_DECODER if tiny else "video_vae"],
            mode=decode_mode or ("tiny" if tiny else trained),
            tiny=c.tiny_decoder if tiny else None,
            look_back=look_back,
            look_ahead=look_ahead,
            blend=blend,
            dtype=self.dtype,
        )
        audio_params = {name: self.params[name] for name in ("audio_vae", "vocoder")}
        audio_decoder = StreamingAudioDecoder(
            c.audio_vae, c.vocoder, audio_params, dtype=self.dtype
        )
        layout, encoders = rollout_config.cache.layout, {}
        if "encoder" in self.params.get("video_vae", {}):
            encoders["video_encoder"] = StreamingVideoEncoder(
                c.video_vae, self.params["video_vae"], step=layout.video_frames, dtype=self.dtype
            )
        if "encoder" in self.params["audio_vae"]:
            encoders["audio_encoder"] = StreamingAudioEncoder(
                c.audio_vae, self.params["audio_vae"], step=layout.audio_frames, dtype=self.dtype
            )
        return StreamingSession(
            self.transformer(implementation),
            self.params["transformer"],
            rollout_config,
            video_decoder,
            audio_decoder,
            prompt,
            prompts=prompts,
            seed=seed,
            max_blocks=max_blocks,
            text_length=text_length,
            given=given,
            wait=wait,
            steerable=steerable,
            timings=timings,
            log=log,
            **encoders,
        )


def load_pipeline(
    directory: str | pathlib.Path,
    *,
    dtype: jnp.dtype,
    encoders: bool = False,
    tiny: bool = False,
    verify: bool = True,
    loras: Sequence[lora.KernelUpdate] = (),
    per_layer: bool = True,
    quantize: str = "none",
    mesh: Mesh | None = None,
) -> Pipeline:
    """Restores the components that a sampler needs, onto the first device or a mesh.

    Args:
      directory: folder written by `checkpoint_converters`.
      dtype: of the transformer's and the VAEs' parameters; the vocoder's are float32.
      encoders: whether the VAEs' encoders are loaded as well; sampling and decoding need none.
      tiny: load the tiny decoder in place of the video VAE's.
      verify: compare the files with the checksums that they were written with, if they have any.
      loras: what LoRAs add to the transformer, see `checkpoint_converters.lora.updates`.
      per_layer: prepare the transformer's weights for streaming, see `sampling.weights`. Whole
        clips are sampled from stacked ones as well, whose programs compile sooner.
      quantize: "none", or one of `quantization.PRECISIONS` for the transformer, whose weights are
        read into the computer's memory then, and go to the device in that precision.
      mesh: devices, along `tensor` alone, that the heads and hidden units of the transformer are
        split over, for streaming; from `distributed.partitioning.make_mesh`. All else is on the
        first of them.

    Returns:
      Configuration and parameters, from which sessions start.

    Raises:
      FileNotFoundError, ValueError: see `PipelineConfig.from_checkpoint` and `check_complete`;
        before any weights are read. No such precision, or not for weights that are stacked, or for
        8-bit products over a mesh; a mesh that does not divide the heads, or has other axes.
      DamagedFile: a file is not what was written, or is missing.
    """
    config = PipelineConfig.from_checkpoint(directory)
    config.check_complete()
    at, first = None, jax.local_devices()[0]
    if mesh is not None:
        check_split(config, mesh.shape, quantize)
        if not per_layer:
            raise ValueError("a mesh is for streaming: leave per_layer as it is")
        at, first = weights.places(config.transformer, mesh), mesh.devices.flat[0]
    alone = jax.sharding.SingleDeviceSharding(first)
    places = {"transformer": alone if at is None else lambda path, shape: at[path]}
    if quantize != "none":
        places["transformer"] = _host(quantize, per_layer)
    dtypes = dict.fromkeys(PIPELINE_COMPONENTS, dtype) | {"vocoder": jnp.float32}
    left_out = dict.fromkeys(dtypes, None if encoders else "encoder")
    if tiny:
        dtypes[TINY_DECODER] = dtype
        left_out |= {"video_vae": "decoder", TINY_DECODER: None}
        if not encoders:
            del dtypes["video_vae"]
    params = {}
    for name, component_dtype in dtypes.items():
        how = {"without": left_out[name], "verify": verify, "sharding": places.get(name, alone)}
        params[name] = checkpoints.load_params(directory, name, dtype=component_dtype, **how)
    params["transformer"] = lora.merge(params["transformer"], loras)
    if per_layer:
        how = {"quantize": quantize, "scales": checkpoints.float8_scales(directory), "at": at}
        how["by_heads"] = weights.laid_out_for(first.platform, config.transformer)
        params["transformer"] = weights.per_layer(params["transformer"], **how)
    if quantize != "none":  # what is not waits in the computer's memory still
        rest = dict(params["transformer"])
        layers = () if at is None else rest.pop("blocks")  # on their mesh already
        where = alone if at is None else unflatten_dict({p: at[p] for p in flatten_dict(rest)})
        params["transformer"] = jax.device_put(rest, where) | ({"blocks": layers} if layers else {})
    return Pipeline(config, params, dtype)


def check_split(config: PipelineConfig, mesh: Mapping[str, int], quantize: str = "none") -> None:
    """Raises ValueError where `load_pipeline` cannot split a model over a mesh.

    Args:
      mesh: devices per axis.
      quantize: as for `load_pipeline`.
    """
    weights.check_mesh(config.transformer, mesh)
    precision = quantization.PRECISIONS.get(quantize)
    if precision is not None and precision.products and math.prod(mesh.values()) > 1:
        raise ValueError(
            f"{quantize}: 8-bit products run on one device; over a mesh use int8 or fp8"
        )


def _host(quantize: str, per_layer: bool) -> jax.sharding.Sharding:
    """Where weights wait to be quantised.

    Raises:
      ValueError: no such precision, not for weights that are stacked, or JAX has no CPU.
    """
    quantization.check_mode(quantize, ("none", *quantization.PRECISIONS))
    if not per_layer:
        raise ValueError(f"quantize={quantize!r} is for streaming: leave per_layer as it is")
    return quantization.host_memory()


def transformer_shapes(directory: str | pathlib.Path, dtype: jnp.dtype) -> Any:
    """Shapes of the transformer's weights as `load_pipeline` prepares them for streaming.

    Raises:
      FileNotFoundError, ValueError: as `load_pipeline`.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        checkpoints.param_shapes(directory, "transformer"),
    )
    config = PipelineConfig.from_checkpoint(directory).transformer
    by_heads = weights.laid_out_for(jax.local_devices()[0].platform, config)
    return jax.eval_shape(functools.partial(weights.per_layer, by_heads=by_heads), shapes)


def decode_clip(
    config: PipelineConfig,
    params: dict[str, Any],
    latents: AVLatents,
    size: tuple[int, int, int],
    dtype: jnp.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole clip at once.

    Args:
      config: of the networks.
      params: at least "video_vae", "audio_vae" and "vocoder".
      latents: [1, T, C] normalised latents, as the samplers make them.
      size: (frames, height, width) of the video, in latents.
      dtype: in which the VAEs compute; the vocoder does in float32.

    Returns:
      frames [F, H, W, 3] uint8 RGB and waveform [N, 2] float32, at
      `config.vocoder.sample_rate` samples per second.

    Raises:
      FloatingPointError: pictures or sound are not finite.
    """
    frames, finite = _decode_video(
        config.video_vae, params["video_vae"], latents.video, size, dtype
    )
    log_mel = audio_vae.decode_audio(
        params["audio_vae"], config.audio_vae, latents.audio, dtype=dtype
    )
    waveform = np.asarray(vocoder.vocode(params["vocoder"], config.vocoder, log_mel))
    for part, good in (("pictures", finite), ("sound", np.isfinite(waveform).all())):
        if not good:
            raise FloatingPointError(
                f"the decoded {part} are not finite: check the weights, or compute in float32"
            )
    return np.asarray(frames[0]), waveform[0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode_video(config: VideoVAEConfig, params, tokens: jax.Array, size, dtype):
    """Frames uint8 [1, F, H, W, 3], and whether all pixels are numbers."""
    grid = tokens.reshape(1, *size, tokens.shape[-1])
    video = video_vae.decode(config, params, grid, dtype=dtype)
    return to_uint8(video), jnp.isfinite(video).all()
