"""Configs without a checkpoint, data or devices: the published models as shapes.

What they are for: plans, compilation ahead of time, and benchmarks with random weights.
"""

import importlib
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from checkpoint_converters import synthetic
from omniforcing_jax import (
    BlockLayout,
    CacheConfig,
    PipelineConfig,
    RolloutConfig,
    TransformerConfig,
)
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import Experiment

SIZES = tuple(synthetic.SIZES)
STREAM = {
    "height": 512, "width": 768, "window": 7, "layout": "prefix", "text_tokens": 1024,
    "quantize": "none", "cache_dtype": None,
}  # fmt: skip


def mesh_text(mesh: Mapping[str, int]) -> str:
    """Axes that are split: "fsdp=8,tensor=4"."""
    return ",".join(f"{axis}={n}" for axis, n in mesh.items() if n > 1) or "1"


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """["clip.blocks=2", ...] -> {"clip.blocks": 2, ...}.

    Raises:
      ValueError: a value is not JSON.
    """
    parts = [pair.partition("=") for pair in pairs]
    try:
        return {name: json.loads(value) for name, _, value in parts}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"settings are written NAME=VALUE, a value as in JSON, not {list(pairs)}: {error}"
        ) from error


def stage_config(
    stage: str,
    variant: str = "19b",
    changes: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> ml_collections.ConfigDict:
    """A stage's config with other settings and a mesh.

    Raises:
      ValueError: a setting that there is not.
    """
    c = importlib.import_module(f"configs.{stage}").get_config(variant)
    c.mesh.update({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | dict(mesh or {}))
    try:
        c.update_from_flattened_dict(dict(changes or {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"settings {dict(changes)}: {error}") from error
    return c


def make_experiment(
    c: ml_collections.ConfigDict,
    num_devices: int,
    *,
    size: str = "full",
    layers: int | None = None,
    text_length: int = 1024,
) -> Experiment:
    """A checked experiment for a config of a stage; its paths are ignored.

    Args:
      size, layers: of the model, version 2.0; see `checkpoint_converters.synthetic`.
      text_length: of the stored features.

    Raises:
      ConfigError: the config has mistakes.
    """
    content = {
        "format": 1,
        "family": "ltx2",
        "model_version": synthetic.VERSIONS["2.0"],
        "config": synthetic.metadata(size, "2.0", layers),
        "components": ["transformer", "connectors", "video_vae", "audio_vae", "vocoder"],
        "source": "no weights",
    }
    c = ml_collections.ConfigDict(c.to_dict())
    c.generator = ""
    data = types.SimpleNamespace(manifest=_manifest(c, content, text_length))
    return experiment.check(c, num_devices, data, content)


def _manifest(c: ml_collections.ConfigDict, content: Mapping[str, Any], text_length: int) -> Any:
    """That of data that would fit."""
    connectors = ConnectorConfig.from_metadata(content["config"]["transformer"])
    layout = BlockLayout.from_name(c.clip.layout, frame_rate=c.clip.frame_rate)
    compression = VideoVAEConfig.from_metadata(content["config"]["vae"]).spatial_compression
    return types.SimpleNamespace(
        model_version=content["model_version"],
        video_dim=connectors.video_dim,
        audio_dim=connectors.audio_dim,
        text_length=text_length,
        shared_features=connectors.video_dim == connectors.audio_dim,
        video_frames=layout.num_video_frames(c.clip.blocks),
        audio_frames=layout.num_audio_frames(c.clip.blocks),
        height=c.clip.height // compression,
        width=c.clip.width // compression,
        sigmas=flow.student_sigmas(c.student.timesteps, flow.schedule(c.student.schedule)).tolist(),
        autoregression=None,
        conditions=None,
    )


def stream_config(
    changes: Mapping[str, Any] | None = None,
    *,
    size: str = "full",
    version: str = "2.0",
    layers: int | None = None,
) -> tuple[TransformerConfig, RolloutConfig, int, str]:
    """A model, how it is sampled, the length of its text, and the precision of its weights.

    Args:
      changes: settings of `STREAM` that differ.

    Raises:
      ValueError: another setting, or one that does not fit the model.
    """
    if unknown := sorted(set(changes or {}) - set(STREAM)):
        raise ValueError(f"the sampler has no setting {', '.join(unknown)}; it has {STREAM}")
    s = types.SimpleNamespace(**STREAM | dict(changes or {}))
    metadata = synthetic.metadata(size, version, layers)
    config = PipelineConfig.from_metadata(metadata, synthetic.VERSIONS[version])
    rollout = RolloutConfig(
        CacheConfig(config.layout(s.layout), s.window, dtype=s.cache_dtype),
        tuple(float(sigma) for sigma in flow.student_sigmas()),
        *config.check_size(s.height, s.width),
    )
    return config.transformer, rollout, s.text_tokens, s.quantize
