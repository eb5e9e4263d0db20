"""Trajectories for stored prompts: the generator on disk, batches sampled from it, previews."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax.data import text_dataset
from omniforcing_jax.data.ode_pairs import STREAMS
from omniforcing_jax.data.text_dataset import TextDataset
from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer, init_boxed_params
from omniforcing_jax.models.video_vae import model as video_vae
from omniforcing_jax.pipeline import PipelineConfig, decode_clip
from omniforcing_jax.sampling.kv_cache import TrainedCache
from omniforcing_jax.sampling.student import AVLatents, RolloutConfig
from omniforcing_jax.sampling.teacher import Prompt, SampleConfig
from omniforcing_jax.sampling.trajectories import (
    Trajectory,
    autoregressive_trajectory,
    sample_trajectory,
)
from omniforcing_jax.streaming.contact_sheet import write_clip
from omniforcing_jax.training.training_checkpoints import FOLDER, latest_step, load_generator

_SAMPLES_PER_AXIS = 16  # of each weight that goes into the fingerprint
_CONNECTORS = ("video_connector", "audio_connector")


@dataclasses.dataclass(frozen=True)
class Generator:
    """The model that is sampled, as its folder describes it.

    Attributes:
      folder: a run, or a converted checkpoint.
      weights: "params" or "ema".
      connectors_folder: converted checkpoint with its connectors.
      layout_name: how it cuts a clip into blocks; None if it is bidirectional or does not say.
      trained_cache: what it says of its cache.
      context_noise: and of the noise level of its history.
    """

    folder: str
    weights: str
    connectors_folder: str
    model_version: str
    transformer: TransformerConfig
    connectors: ConnectorConfig
    layout_name: str | None
    trained_cache: TrainedCache
    context_noise: float

    @classmethod
    def find(cls, checkpoint: str, generator: str | None, weights: str | None) -> "Generator":
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
        if (pathlib.Path(folder) / FOLDER).is_dir():
            transformer, student, model_version = _describe_run(pathlib.Path(folder))
            weights = weights or "ema"
        else:
            found = checkpoints.load_config(folder)
            if weights == "ema":
                raise ValueError(f"{folder} is a converted checkpoint and has no moving average")
            weights = "params"
            model_version = found["model_version"]
            section = checkpoints.component_metadata(found, "transformer")
            transformer = TransformerConfig.from_metadata(section, model_version)
            student = found["student"] or {}
            if "connectors" in found["components"]:
                content, checkpoint = found, folder
        if "connectors" not in content["components"]:
            raise ValueError(f"{checkpoint} has no connectors; convert it again with them")
        section = checkpoints.component_metadata(content, "connectors")
        return cls(
            folder=folder,
            weights=weights,
            connectors_folder=checkpoint,
            model_version=model_version,
            transformer=transformer,
            connectors=ConnectorConfig.from_metadata(section),
            layout_name=student.get("layout"),
            trained_cache=TrainedCache.read(student),
            context_noise=student.get("context_noise", 0.0),
        )

    def check_text(self, text: text_dataset.Manifest, folder: str) -> None:
        """Raises ValueError for text features of another model."""
        c = self.connectors
        needed = {
            "model_version": self.model_version.split(".")[:2],
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
        if dims != self.transformer.text_dims:
            raise ValueError(
                f"{self.folder} takes contexts of widths {self.transformer.text_dims}, the "
                f"connectors in {self.connectors_folder} make {dims}: they belong to other models"
            )

    def check_latents(self, pipeline: PipelineConfig, clip: SampleConfig) -> None:
        """Raises ValueError when the clip's latents are not those of the checkpoint's VAEs."""
        channels = (self.transformer.video_channels, self.transformer.audio_channels)
        expected = (pipeline.video_vae.latent_channels, pipeline.audio_vae.latent_width)
        if channels != expected:
            raise ValueError(
                f"{self.folder} makes latents of {channels} channels (video, audio), the VAEs of "
                f"the checkpoint take {expected}: they belong to different models"
            )
        size = (1, clip.video_frames, clip.height, clip.width, channels[0])
        video_vae.check_latents(pipeline.video_vae, size)


def _describe_run(run: pathlib.Path) -> tuple[TransformerConfig, dict[str, Any], str]:
    """Transformer, settings of a causal student, and model version of a training run."""
    if latest_step(run) is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint yet")
    config = checkpoints.read_json(run / "config.json").get("config", {})
    names = ("stage", "clip", "model_version", "student", "student_config")
    if missing := [name for name in names if name not in config]:
        raise ValueError(f"{run / 'config.json'}: the configuration lacks {', '.join(missing)}")
    fields = config["student_config"].items()
    transformer = TransformerConfig(
        **{name: tuple(x) if isinstance(x, list) else x for name, x in fields}
    )
    student = {}
    if config["stage"] != "stage1":
        student = config["student"] | {"layout": config["clip"]["layout"]}
    return transformer, student, config["model_version"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clips are sampled.

    Attributes:
      clip: size, schedule and guidance.
      indices: of the stored states in the schedule.
      seed: clip i has the key fold_in(key(seed), i).
      rollout, num_blocks: of an autoregressive generator; None for whole clips at once.
    """

    clip: SampleConfig
    indices: tuple[int, ...]
    seed: int
    rollout: RolloutConfig | None = None
    num_blocks: int | None = None


class ClipArrays(NamedTuple):
    """One trajectory: {"video", "audio"} [S, T, C] and [S - 1, T, C] bfloat16."""

    states: dict[str, np.ndarray]
    velocities: dict[str, np.ndarray]


class TrajectorySampler:
    """Samples batches of trajectories for stored prompts, on one device or a mesh.

    Attributes:
      fingerprint: tells generators apart: configurations and a sample of every weight.
    """

    def __init__(
        self,
        generator: Generator,
        recipe: Recipe,
        text: TextDataset,
        *,
        dtype: jnp.dtype,
        implementation: str = "auto",
        mesh: Mesh | None = None,
    ):
        """Loads the weights.

        Raises:
          FileNotFoundError, ValueError: see `load_generator`.
        """
        self.recipe, self.text, self._mesh = recipe, text, mesh
        self.model = Transformer(generator.transformer, dtype, implementation)
        self._params = load_generator(generator.folder, self._expected(), which=generator.weights)
        place = SingleDeviceSharding(jax.local_devices()[0])
        connectors = checkpoints.load_params(
            generator.connectors_folder,
            "connectors",
            dtype=dtype,
            sharding=place if mesh is None else NamedSharding(mesh, P()),
        )
        connectors = {name: connectors[name] for name in _CONNECTORS}
        module = TextConnectors(generator.connectors, dtype)
        self._contexts = jax.jit(
            lambda *features: module.apply({"params": connectors}, *features, method="contexts")
        )
        description = [
            dataclasses.asdict(generator.transformer),
            dataclasses.asdict(generator.connectors),
            jnp.dtype(dtype).name,
        ]
        self.fingerprint = _fingerprint(
            description, {"transformer": self._params, "connectors": connectors}
        )
        self._negative = None
        if "uncond" in recipe.clip.guidance.passes():
            self._negative = self._prompt([text.negative])

    def _expected(self) -> Any:
        """Shapes, dtypes and places of the generator's parameters."""
        boxed = jax.eval_shape(lambda: init_boxed_params(self.model, jax.random.key(0)))
        shapes = nn.unbox(boxed)
        if self._mesh is None:
            place = SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: place, shapes)
        else:
            places = partitioning.shardings(boxed, self._mesh)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, self.model.dtype, sharding=place),
            shapes,
            places,
        )

    def _prompt(self, elements: Sequence[Mapping[str, Any]]) -> Prompt:
        names = ("video_features", "audio_features", "mask")
        arrays = (np.stack([element[name] for element in elements]) for name in names)
        return Prompt(*self._contexts(*map(self._place, arrays)))

    def _place(self, x: np.ndarray | jax.Array) -> jax.Array:
        """On the device, or with the batch split over the mesh where it divides."""
        if self._mesh is None:
            return jnp.asarray(x)
        fits = x.shape[0] % self._mesh.size == 0
        split = partitioning.batch_sharding(self._mesh) if fits else NamedSharding(self._mesh, P())
        return jax.device_put(x, split)

    def __call__(self, clips: Sequence[int]) -> list[ClipArrays]:
        """Trajectories of the clips with these numbers; a clip does not depend on the others.

        Raises:
          FloatingPointError: the model produced values that are not finite; names the clip.
        """
        recipe, elements = self.recipe, [self.text[clip % len(self.text)] for clip in clips]
        mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with mesh:
            key = jax.random.key(recipe.seed)
            numbers = jnp.asarray(clips, jnp.uint32)
            keys = self._place(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
            inputs = (self.model, self._params, self._prompt(elements), self._negative, keys)
            if recipe.rollout is None:
                trajectory = sample_trajectory(*inputs, recipe.clip, recipe.indices)
            else:
                trajectory = autoregressive_trajectory(
                    *inputs,
                    recipe.rollout,
                    recipe.num_blocks,
                    recipe.clip.guidance,
                    recipe.indices,
                )
            trajectory, finite = jax.device_get(_rounded(trajectory))
        for row, clip in enumerate(clips):
            if not finite[row]:
                raise FloatingPointError(
                    f"clip {clip} ({elements[row]['prompt'][:60]!r}) is not finite; try --dtype "
                    "float32, and check the checkpoint"
                )

        def of_row(latents, row):
            return {stream: getattr(latents, stream)[row] for stream in STREAMS}

        return [
            ClipArrays(of_row(trajectory.states, row), of_row(trajectory.velocities, row))
            for row in range(len(clips))
        ]


@jax.jit
def _rounded(trajectory: Trajectory) -> tuple[Trajectory, jax.Array]:
    """As bfloat16, and whether each clip is finite, [B]."""
    finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in jax.tree.leaves(trajectory)]
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), trajectory), jnp.stack(finite).all(axis=0)


def _fingerprint(description: Any, params: Any) -> str:
    """Hash of a description and of some values of every weight, evenly spread."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(_thinned(params))):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _thinned(params: Any) -> Any:
    def thin(x):
        return x[tuple(slice(None, None, max(1, n // _SAMPLES_PER_AXIS)) for n in x.shape)]

    return jax.tree.map(thin, params)


class Previews:
    """Decodes the first clips of a run to MP4 files and pictures; loads the decoders when needed.

    Attributes:
      folder: where they go.
      count: clips to decode.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        count: int,
        checkpoint: str,
        pipeline: PipelineConfig,
        clip: SampleConfig,
        dtype: jnp.dtype,
    ):
        self.folder, self.count = pathlib.Path(folder), count
        self._checkpoint, self._config, self._clip, self._dtype = checkpoint, pipeline, clip, dtype

    def write(self, number: int, states: Mapping[str, np.ndarray]) -> None:
        """Decodes the last state of clip `number`, if it is one of the first and not there yet."""
        path = self.folder / f"clip_{number:05d}.mp4"
        # write_clip ends with the picture
        if number >= self.count or path.with_suffix(".png").exists():
            return
        clip, config = self._clip, self._config
        latents = {name: jnp.asarray(x[-1:], jnp.float32) for name, x in states.items()}
        size = (clip.video_frames, clip.height, clip.width)
        decoded = decode_clip(config, self._params, AVLatents(**latents), size, self._dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_clip(path, *decoded, clip.frame_rate, config.vocoder.sample_rate)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        dtypes = {"video_vae": self._dtype, "audio_vae": self._dtype, "vocoder": jnp.float32}
        return {
            name: checkpoints.load_params(self._checkpoint, name, dtype=dtype)
            for name, dtype in dtypes.items()
        }
