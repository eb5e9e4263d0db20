"""What a checkpoint says about its transformer, as one frozen dataclass.

Every published LTX-2 (2.0, 2.3, 2.5) and every OmniForcing student is described by it; no module
looks at a version number. `from_metadata` reads the JSON in the header of LTX-2's safetensors
files, so that nothing about a model has to be guessed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.ranges import Layers, Range, hold_fields


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Dual-stream transformer: `video_*` is the wide stream, `audio_*` the narrow one.

    Attributes:
      num_layers: L.
      video_heads, audio_heads: N, equal for both, as the cross-modal attention joins them.
      video_head_dim, audio_head_dim: H; heads times it is the width of a stream.
      video_channels, audio_channels: of a token's latents.
      video_context_dim, audio_context_dim: widths of the text contexts behind the caption
        projection.
      caption_channels: width of the text features before the caption projection; None when the
        context already has the streams' widths (LTX-2.3 and later).
      rope_type: "split" pairs channel j with j + H/2 inside a head, "interleaved" 2j with 2j + 1.
      rope_frequency_dtype: precision in which the frequency grid is formed on the host.
      rope_theta: base of the frequencies.
      video_max_position: (seconds, pixels, pixels) that positions are divided by.
      audio_max_position: the same for the audio, in seconds.
      timestep_scale: factor from sigma in [0, 1] to the timestep that is embedded.
      cross_gate_timestep_scale: the same for the gates of the cross-modal attention.
      norm_eps: of all norms.
      gated_attention: per-head output gates 2 * sigmoid(linear(x)) (2.3).
      text_adaln: text attention is modulated as well: 9-row tables and prompt AdaLN (2.3).
      cross_timestep: which sigma drives the cross-modal AdaLN: "own" (2.0), "other" (2.3), or
        "own_other_gate" (own sigma for scale and shift, the other stream's for the gate).
      perturbation: a skipped self-attention contributes nothing ("zero", 2.0) or its value
        projection ("value", 2.3).
      video_ff_bias: biases in the video feed-forward (absent in 2.5).
      keyframe_embedding: learnt vector added to tokens flagged as keyframes (2.5).
      num_audio_sinks: learnable sink tokens in front of the audio sequence (paper: 16).
      sink_rope: "identity" (Eq. 8) or "incremental": sinks continue the audio clock before t = 0.
      extra_qk_norm: per-head LayerNorm of q and k in the four causal attentions (Table 3).
      tanh_gated_attention: their outputs are scaled by tanh of a scalar that starts at 0 (Table 3).

    Raises:
      ValueError: a field of another type, a number out of range, a choice that does not exist, or
        sizes that do not fit each other.
    """

    num_layers: Layers = 48
    video_heads: int = 32
    video_head_dim: int = 128
    audio_heads: int = 32
    audio_head_dim: int = 64
    video_channels: int = 128
    audio_channels: int = 128
    caption_channels: int | None = 3840
    video_context_dim: int = 4096
    audio_context_dim: int = 2048
    rope_type: Literal["split", "interleaved"] = "split"
    rope_frequency_dtype: Literal["float64", "float32"] = "float64"
    rope_theta: float = 10000.0
    video_max_position: tuple[float, float, float] = (20.0, 2048.0, 2048.0)
    audio_max_position: float = 20.0
    timestep_scale: float = 1000.0
    cross_gate_timestep_scale: float = 1000.0
    norm_eps: float = 1e-6
    gated_attention: bool = False
    text_adaln: bool = False
    cross_timestep: Literal["own", "other", "own_other_gate"] = "own"
    perturbation: Literal["zero", "value"] = "zero"
    video_ff_bias: bool = True
    keyframe_embedding: bool = False
    num_audio_sinks: Annotated[int, Range(0, 2**20)] = 0
    sink_rope: Literal["identity", "incremental"] = "identity"
    extra_qk_norm: bool = False
    tanh_gated_attention: bool = False

    def __post_init__(self):
        hold_fields(self)
        if self.video_head_dim % 2 or self.audio_head_dim % 2:
            raise ValueError(
                "RoPE rotates pairs of channels, so head dims must be even, not "
                f"{self.video_head_dim} and {self.audio_head_dim}"
            )
        if self.video_heads != self.audio_heads:
            raise ValueError(
                "the cross-modal attention gives both streams the same heads, so video_heads "
                f"({self.video_heads}) must equal audio_heads ({self.audio_heads})"
            )
        if self.caption_channels is None and (self.video_context_dim, self.audio_context_dim) != (
            self.video_dim,
            self.audio_dim,
        ):
            raise ValueError(
                f"without a caption projection the contexts must have the streams' widths "
                f"{self.video_dim} and {self.audio_dim}, not {self.video_context_dim} and "
                f"{self.audio_context_dim}"
            )

    @property
    def video_dim(self) -> int:
        """D, width of the video stream."""
        return self.video_heads * self.video_head_dim

    @property
    def audio_dim(self) -> int:
        """C, width of the audio stream and inner width of the cross-modal attention."""
        return self.audio_heads * self.audio_head_dim

    @property
    def text_dims(self) -> tuple[int, int]:
        """Widths of the text contexts the model is called with: (video, audio)."""
        if self.caption_channels is not None:
            return self.caption_channels, self.caption_channels
        return self.video_dim, self.audio_dim

    @property
    def table_rows(self) -> int:
        """Rows of a block's modulation table: (shift, scale, gate) for attention, FFN [, text]."""
        return 9 if self.text_adaln else 6

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TransformerConfig":
        """The inverse of `dataclasses.asdict`, also after JSON has made its tuples lists.

        Raises:
          ValueError: a value that is not supported.
          TypeError: an unknown field.
        """
        return cls(**fields)

    @classmethod
    def from_metadata(
        cls, transformer: Mapping[str, Any], model_version: str = "2.0.0"
    ) -> "TransformerConfig":
        """Reads `config["transformer"]` of an LTX-2 safetensors header.

        Absent keys take the defaults of LTX-2's own loader, which differ from the published files'
        values (`rope_type`, for one), so a full header should be given.

        Raises:
          ValueError: a setting this implementation does not have; names the key and the choices.
        """
        t = dict(transformer)
        _check_metadata(t)
        heads = t["num_attention_heads"]
        audio_heads = t.get("audio_num_attention_heads", heads)
        text_adaln = t.get("cross_attention_adaln", False)
        projected = not t.get("caption_proj_before_connector", False)
        major_minor = _major_minor(model_version)
        if major_minor < (2, 3):
            cross_timestep, perturbation = "own", "zero"
        elif major_minor == (2, 3):
            cross_timestep, perturbation = "other", "value"
        else:
            cross_timestep, perturbation = "own_other_gate", "value"
        return cls(
            num_layers=t["num_layers"],
            video_heads=heads,
            video_head_dim=t["attention_head_dim"],
            audio_heads=audio_heads,
            audio_head_dim=t["audio_attention_head_dim"],
            video_channels=t["in_channels"],
            audio_channels=t.get("audio_in_channels", 128),
            caption_channels=t["caption_channels"] if projected else None,
            video_context_dim=t["cross_attention_dim"],
            audio_context_dim=t["audio_cross_attention_dim"],
            rope_type=t.get("rope_type", "interleaved"),
            rope_frequency_dtype=t.get("frequencies_precision", "float32"),
            rope_theta=t.get("positional_embedding_theta", 10000.0),
            video_max_position=t.get("positional_embedding_max_pos", (20, 2048, 2048)),
            audio_max_position=t.get("audio_positional_embedding_max_pos", (20,))[0],
            timestep_scale=t.get("timestep_scale_multiplier", 1000),
            cross_gate_timestep_scale=t.get("av_ca_timestep_scale_multiplier", 1),
            norm_eps=t.get("norm_eps", 1e-6),
            gated_attention=t.get("apply_gated_attention", False),
            text_adaln=text_adaln,
            cross_timestep=t.get("cross_timestep", cross_timestep),
            perturbation=perturbation,
            video_ff_bias=t.get("ff_bias", True),
            keyframe_embedding=t.get("use_keyframes_abs_pos_embedding", False),
            num_audio_sinks=t.get("num_audio_sink_tokens", 0),
            sink_rope=t.get("sink_rope", "identity"),
            extra_qk_norm=t.get("extra_qk_norm", False),
            tanh_gated_attention=t.get("tanh_gated_attention", False),
        )


def tiny(**changes: Any) -> TransformerConfig:
    """A model of a few hundred kilobytes with every mechanism of the 19B one, for tests."""
    config = TransformerConfig(
        num_layers=2,
        video_heads=2,
        video_head_dim=16,
        audio_heads=2,
        audio_head_dim=8,
        video_channels=4,
        audio_channels=6,
        caption_channels=12,
        video_context_dim=32,
        audio_context_dim=16,
    )
    return dataclasses.replace(config, **changes)


def _major_minor(model_version: str) -> tuple[int, int]:
    try:
        major, minor = str(model_version).split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        raise ValueError(
            f"model_version is {model_version!r}; it should look like '2.0.0' or '2.3.0'"
        ) from None


# Settings that exist in the metadata but have a single value in every published model.
FIXED_SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "standardization_norm": "rms_norm",
    "use_middle_indices_grid": True,
    "causal_temporal_positioning": True,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "double_self_attention": False,
    "only_cross_attention": False,
    "share_ff": False,
    "cross_attention_norm": True,
    "upcast_attention": False,
    "use_linear_projection": False,
}

_REQUIRED = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "audio_attention_head_dim",
    "in_channels",
    "caption_channels",
    "cross_attention_dim",
    "audio_cross_attention_dim",
)


def _check_metadata(transformer: Mapping[str, Any]) -> None:
    problems = find_problems(transformer, required=_REQUIRED, fixed=FIXED_SETTINGS)
    for stream in ("", "audio_"):
        inputs = transformer.get(f"{stream}in_channels")
        outputs = transformer.get(f"{stream}out_channels", inputs)
        if inputs is not None and outputs != inputs:
            problems.append(f"{stream}out_channels ({outputs}) must equal in_channels ({inputs})")
    raise_problems("transformer metadata", problems)
