"""Experiments without a checkpoint, data, or devices: configs of published models, as shapes only.

What they are for: plans, compilation ahead of time, and benchmarks with random weights.
"""

import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from checkpoint_converters import synthetic
from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.video_vae.model import VideoVAEConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.training.config import experiment
from omniforcing_jax.training.config.experiment import Experiment

SIZES = tuple(synthetic.SIZES)


def content_of(size: str, version: str = "2.0", layers: int | None = None) -> dict[str, Any]:
    """What config.json of a converted checkpoint of this size would hold."""
    return {
        "format": 1,
        "family": "ltx2",
        "model_version": synthetic.VERSIONS[version],
        "config": synthetic.metadata(size, version, layers),
        "student": None,
        "components": ["transformer", "connectors", "video_vae", "audio_vae", "vocoder"],
        "source": "no weights",
    }


def make_experiment(
    c: ml_collections.ConfigDict,
    num_devices: int,
    *,
    size: str = "full",
    version: str = "2.0",
    layers: int | None = None,
    text_length: int = 1024,
) -> Experiment:
    """A checked experiment for a config of a stage; its paths are ignored.

    Args:
      size, version, layers: of the model, see `checkpoint_converters.synthetic`.
      text_length: of the stored features.

    Raises:
      ConfigError: the config has mistakes.
    """
    content = content_of(size, version, layers)
    c = ml_collections.ConfigDict(c.to_dict())
    c.generator = ""
    data = _Data(c, content, text_length)
    return experiment.check(c, num_devices, data, content)


class _Data:
    """The manifest of data that would fit."""

    def __init__(self, c: ml_collections.ConfigDict, content: Mapping[str, Any], text_length: int):
        connectors = ConnectorConfig.from_metadata(content["config"]["transformer"])
        layout = BlockLayout.from_name(c.clip.layout, frame_rate=c.clip.frame_rate)
        compression = VideoVAEConfig.from_metadata(content["config"]["vae"]).spatial_compression
        self.manifest = types.SimpleNamespace(
            model_version=content["model_version"],
            video_dim=connectors.video_dim,
            audio_dim=connectors.audio_dim,
            text_length=text_length,
            shared_features=connectors.video_dim == connectors.audio_dim,
            video_frames=layout.num_video_frames(c.clip.blocks),
            audio_frames=layout.num_audio_frames(c.clip.blocks),
            height=c.clip.height // compression,
            width=c.clip.width // compression,
            sigmas=flow.student_sigmas(c.student.timesteps).tolist(),
            autoregression=None,
        )
