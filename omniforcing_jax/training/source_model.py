"""The model that trajectories are sampled from, on disk: LTX-2, a student, or a training run."""

import dataclasses
import pathlib

from omniforcing_jax.data.text_dataset import TextManifest
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.training.config.run_config import RunConfig
from omniforcing_jax.training.training_checkpoints import FOLDER, latest_step


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """What a model's folder says of it; `load_generator` reads its weights.

    Attributes:
      folder: a run, or a converted checkpoint.
      weights: "params" or "ema".
      connectors_folder: converted checkpoint with its connectors.
      connectors: their configuration.
      config: of the model and of its training; the decoders are those of the checkpoint.
    """

    folder: str
    weights: str
    connectors_folder: str
    connectors: ConnectorConfig
    config: PipelineConfig

    @classmethod
    def find(cls, checkpoint: str, generator: str | None, weights: str | None) -> "SourceModel":
        """Reads the descriptions; no weights.

        Args:
          checkpoint: the converted LTX-2.
          generator: a run or a converted checkpoint; None is the LTX-2 itself.
          weights: "params" or "ema" of a run; None takes the average.

        Raises:
          FileNotFoundError: a folder is not there, or a run has no complete checkpoint.
          ValueError: it holds something else.
        """
        folder = checkpoint if generator is None else generator
        content = checkpoints.load_config(checkpoint)
        decoders = PipelineConfig.from_checkpoint(checkpoint)
        if (pathlib.Path(folder) / FOLDER).is_dir():
            if latest_step(folder) is None:
                raise FileNotFoundError(f"{folder} has no complete checkpoint yet")
            run = RunConfig.read(folder)
            transformer, trained, model_version = run.student, run.trained, run.model_version
            weights = weights or "ema"
        else:
            found = checkpoints.load_config(folder)
            if weights == "ema":
                raise ValueError(f"{folder} is a converted checkpoint and has no moving average")
            weights = "params"
            model_version = found["model_version"]
            with checkpoints.parsing(pathlib.Path(folder) / "config.json"):
                section = checkpoints.component_metadata(found, "transformer")
                transformer = TransformerConfig.from_metadata(section, model_version)
                trained = TrainedSettings.read(found)
            if "connectors" in found["components"]:
                content, checkpoint = found, folder
        if "connectors" not in content["components"]:
            raise ValueError(f"{checkpoint} has no connectors; convert it again with them")
        with checkpoints.parsing(pathlib.Path(checkpoint) / "config.json"):
            section = checkpoints.component_metadata(content, "connectors")
            connectors = ConnectorConfig.from_metadata(section)
        config = dataclasses.replace(
            decoders,
            transformer=transformer,
            model_version=model_version,
            trained=trained,
        )
        return cls(folder, weights, checkpoint, connectors, config)

    def check_text(self, text: TextManifest, folder: str) -> None:
        """Raises ValueError for text features of another model."""
        c = self.connectors
        needed = {
            "model_version": self.config.model_version.split(".")[:2],
            "video_dim": c.video_dim,
            "audio_dim": c.audio_dim,
            "shared_features": not c.separate_projections,
        }
        found = {name: getattr(text, name) for name in needed}
        found["model_version"] = text.model_version.split(".")[:2]
        wrong = [
            f"{name} {found[name]} instead of {value}"
            for name, value in needed.items()
            if found[name] != value
        ]
        if wrong:
            raise ValueError(
                f"the text features in {folder} are of another model than {self.folder}: "
                f"{', '.join(wrong)}; encode the prompts with launch.encode_prompts and this "
                "model's checkpoint"
            )
        if text.text_length % c.num_registers:
            raise ValueError(
                f"the prompts in {folder} have {text.text_length} tokens, which must be a multiple "
                f"of the connectors' {c.num_registers} registers; encode them with another --length"
            )
        dims = (c.video_dim, c.audio_dim)
        if dims != self.config.transformer.text_dims:
            raise ValueError(
                f"{self.folder} takes contexts of widths {self.config.transformer.text_dims}, the "
                f"connectors in {self.connectors_folder} make {dims}: they belong to other models"
            )

    def check_latents(self, clip: ClipGeometry) -> None:
        """Raises ValueError when the clip's latents are not those of the checkpoint's VAEs."""
        c = self.config
        channels = (c.transformer.video_channels, c.transformer.audio_channels)
        expected = (c.video_vae.latent_channels, c.audio_vae.latent_width)
        if channels != expected:
            raise ValueError(
                f"{self.folder} makes latents of {channels} channels (video, audio), the VAEs of "
                f"the checkpoint take {expected}: they belong to different models"
            )
        size = (1, clip.video_frames, clip.height, clip.width, channels[0])
        video_vae.check_latents(c.video_vae, size)
