"""From a config to everything a training run needs, checked before anything is allocated.

`check` reads small files only (config.json of the checkpoint and of where the student starts, the
dataset's manifest) and reports every problem it finds at once. `assembly.assemble` then loads
weights onto the mesh.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.distributed.partitioning import WeightRules
from omniforcing_jax.geometry import ClipGeometry
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import locate
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.training.adapters import AdapterConfig, StoredAdapters
from omniforcing_jax.training.config import fit, run_config
from omniforcing_jax.training.config.parsing import parse, to_dict
from omniforcing_jax.training.config.problems import ConfigError, Problems
from omniforcing_jax.training.config.run_config import RunConfig
from omniforcing_jax.training.config.settings import StageConfig
from omniforcing_jax.training.mixture import GivenInput
from omniforcing_jax.training.objectives.common import TextInput
from omniforcing_jax.training.objectives.dmd import DMD
from omniforcing_jax.training.objectives.ode_regression import ODERegression
from omniforcing_jax.training.objectives.scores import BlockContext
from omniforcing_jax.training.optimizers import make_optimizer
from omniforcing_jax.training.state import TrainState
from omniforcing_jax.training.students.bidirectional import BidirectionalStudent
from omniforcing_jax.training.students.unrolled import UnrolledStudent
from omniforcing_jax.types import DTYPES


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config: what will be built, as static values.

    Attributes:
      config: the settings.
      content: config.json of the checkpoint.
      pipeline: the same, parsed.
      student: of the trained model.
      clip: what is scored or regressed.
      rollout: how the student is unrolled (stages II and III).
      data: the opened dataset, with `manifest` and `negative`.
      mesh_shape: devices per axis; with separate scores, of either half.
      notes: what is otherwise than the model was trained that the student starts from.
      stored: adapters in a file that the student starts from, if it does.
    """

    config: StageConfig
    content: Mapping[str, Any]
    pipeline: PipelineConfig
    student: TransformerConfig
    connectors: ConnectorConfig
    clip: ClipGeometry
    rollout: RolloutConfig
    data: Any
    mesh_shape: dict[str, int]
    notes: tuple[str, ...] = ()
    stored: StoredAdapters | None = None

    @property
    def teacher(self) -> TransformerConfig:
        """Of the bidirectional model."""
        return self.pipeline.transformer

    @property
    def layout(self) -> BlockLayout:
        """How clips are cut into blocks."""
        return self.rollout.cache.layout

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student, with the final 0."""
        return self.rollout.sigmas

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return DTYPES[self.config.compute.dtype]

    def model(self, config: TransformerConfig) -> Transformer:
        """A network as it is trained or scored with."""
        compute = self.config.compute
        rules = WeightRules(reduce_dtype=DTYPES[compute.reduce_dtype])
        return Transformer(config, self.dtype, compute.attention, remat=compute.remat, rules=rules)

    def run_config(self) -> dict[str, Any]:
        """The config as JSON, with what the run depends on besides."""
        c = self.config
        found = {
            **to_dict(c),
            "model_version": self.content["model_version"],
            "text_length": self.data.manifest.text_length,
            "student_config": dataclasses.asdict(self.student),
        }
        if c.adapters.used:
            found["base"] = self.content.get("fingerprints", {}).get("transformer")
        reads_pairs = c.stage == "stage2" and c.regression.objective != "flow"
        if reads_pairs and self.data.manifest.conditions is not None:
            found["pairs_conditions"] = self.data.manifest.conditions  # they say what was given
        return found


@dataclasses.dataclass(frozen=True)
class StudentStart:
    """Where a student starts: a converted checkpoint, or a run.

    Attributes:
      settings: of the run.
      trained: what its weights were trained with.
    """

    version: str
    transformer: TransformerConfig
    settings: Mapping[str, Any]
    trained: TrainedSettings

    @classmethod
    def read(cls, folder: str) -> "StudentStart":
        """Reads its config.json.

        Raises:
          ValueError, KeyError: it is neither, or the file is damaged.
        """
        if run_config.is_run(folder):
            run = RunConfig.read(folder)
            return cls(run.model_version, run.student, run.settings, run.trained)
        if not (locate(folder) / run_config.NAME).is_file():
            raise ValueError(f"{folder} is neither a run nor a converted checkpoint")
        content = checkpoints.load_config(folder)
        version = content["model_version"]
        with checkpoints.parsing(locate(folder) / run_config.NAME):
            metadata = checkpoints.component_metadata(content, "transformer")
            transformer = TransformerConfig.from_metadata(metadata, version)
            return cls(version, transformer, {}, TrainedSettings.read(content))


def check(
    config: Mapping[str, Any],
    num_devices: int,
    data: Any = None,
    content: Mapping[str, Any] | None = None,
    *,
    stage: str | None = None,
    allow_config_change: bool = False,
    read_lora: Callable[[str, Mapping, AdapterConfig], StoredAdapters] | None = None,
) -> Experiment:
    """Checks a config.

    Args:
      config: all settings of a stage, an `ml_collections.ConfigDict`; see `settings`.
      num_devices: devices of all hosts together.
      data: a dataset with a manifest; None opens the one that the config names.
      content: of the checkpoint's config.json; None reads it.
      stage: the stage that was started; None takes any.
      allow_config_change: go on from a causal student whose settings are not those of the config.
      read_lora: (file, content, what is trained) -> its adapters, where `generator` is a LoRA; the
        layout of such files is `checkpoint_converters`' business.

    Raises:
      ConfigError: lists every problem.
    """
    problems = Problems()
    c = parse(config, problems)
    if stage not in (None, c.stage):
        problems.append(f"stage: this config is for {c.stage!r}, started was {stage!r}")
    problems += c.problems(num_devices)
    attempt = problems.attempt
    if content is None:
        content = attempt("checkpoint", lambda: checkpoints.load_config(c.checkpoint))
    pipeline = content and attempt("checkpoint", lambda: PipelineConfig.from_content(content))
    is_lora = read_lora is not None and c.generator and locate(c.generator).is_file()
    source = stored = None
    if c.generator and not is_lora:
        source = attempt("generator", lambda: StudentStart.read(c.generator))
    if data is None:
        data = attempt("data", lambda: _open_data(c))
    if not pipeline:
        raise ConfigError(problems)

    if is_lora and not c.adapters.used:
        problems.append(
            f"generator: {c.generator} is a file, which only a stage with adapters starts from; to "
            "train all weights, merge it with checkpoint_converters.ltx2 --lora"
        )
    elif is_lora:
        stored = attempt("generator", lambda: read_lora(c.generator, content, c.adapters))
    if source is not None:
        problems += fit.version_problems(c, source.version, pipeline)
    if (start := source or stored) is not None and not allow_config_change:
        settings = source.settings if source else {}
        found = attempt("generator", lambda: fit.start_problems(c, settings, start.trained))
        problems += found or []
    if content is not None and c.generator and not is_lora:
        problems += fit.adapter_problems(c, source and source.settings, content)
    problems += fit.teacher_problems(c, pipeline) + fit.preview_problems(c, content)
    student = attempt("student", lambda: _student(c, pipeline, source))
    connectors = attempt("connectors", lambda: _connectors(content))
    size = attempt("clip", lambda: pipeline.check_size(c.clip.height, c.clip.width))
    rollout = None
    if size and problems.free("clip", "student.timesteps", "student:"):
        rollout = attempt("student", lambda: c.rollout(*size))
    if data is not None and connectors is not None:
        problems += fit.data_problems(c, data.manifest, pipeline, connectors, rollout)
    mesh_shape = c.mesh_shape(num_devices) if problems.free("mesh") else None
    if student is not None and mesh_shape is not None:
        problems += fit.head_problems(student, mesh_shape)
    if problems:
        raise ConfigError(problems)

    clip = ClipGeometry.from_blocks(c.layout, c.clip.blocks, *size)
    trained = (source or stored or pipeline).trained
    notes = fit.deviations(c, data.manifest.text_length, trained)
    experiment = Experiment(
        c, content, pipeline, student, connectors, clip, rollout, data, mesh_shape, notes, stored
    )
    attempt(c.stage, lambda: make_stage(experiment))
    if problems:
        raise ConfigError(problems)
    return experiment


def _student(
    c: StageConfig, pipeline: PipelineConfig, source: StudentStart | None
) -> TransformerConfig:
    """Built as where it starts, which may rotate otherwise than the teacher."""
    if pipeline.transformer.num_audio_sinks:
        raise ValueError(
            "the checkpoint is a block-causal student; give a converted LTX-2 as `checkpoint` and "
            "this one as `generator`"
        )
    return dataclasses.replace(
        source.transformer if source else pipeline.transformer,
        num_audio_sinks=c.student.num_sinks,
        sink_rope=c.student.sink_rope,
        extra_qk_norm=c.student.extra_qk_norm,
        tanh_gated_attention=c.student.tanh_gated_attention,
    )


def _connectors(content: Mapping[str, Any]) -> ConnectorConfig:
    with checkpoints.parsing("the checkpoint's config.json"):
        return ConnectorConfig.from_metadata(checkpoints.component_metadata(content, "connectors"))


def _open_data(c: StageConfig) -> Any:
    if c.stage == "stage2":
        from omniforcing_jax.data.ode_pairs import open_ode_pairs

        return open_ode_pairs(c.data)
    if c.conditions.gives:
        from omniforcing_jax.data.given_clips import open_given_clips

        return open_given_clips(c.data)
    from omniforcing_jax.data.text_dataset import open_text_dataset

    return open_text_dataset(c.data)


def make_stage(e: Experiment, shardings: TrainState | None = None) -> DMD | ODERegression:
    """The stage's module; without shardings for a single device."""
    c = e.config
    text = TextInput(TextConnectors(e.connectors, e.dtype))
    optimizers = {name: make_optimizer(config) for name, config in c.optimizers.items()}
    student = e.model(e.student)
    given = GivenInput(c.conditions, e.clip, e.layout) if c.conditions.gives else None
    if c.stage == "stage2":
        return ODERegression(
            model=student,
            rollout=e.rollout,
            num_blocks=c.clip.blocks,
            text=text,
            optimizer=optimizers["generator"],
            config=c,
            given=given,
            shardings=shardings,
        )
    exit_weights = c.exit_weights or None
    if c.stage == "stage1":
        generator = BidirectionalStudent(student, e.clip, e.sigmas, exit_weights)
    else:
        generator = UnrolledStudent(
            student, e.rollout, c.rollout_blocks, c.clip.blocks, c.detach_history, exit_weights
        )
    blocks = None
    if c.score.context == "block_causal":
        cache = e.rollout.cache.for_clip(c.clip.blocks)
        blocks = BlockContext(dataclasses.replace(e.rollout, cache=cache), c.clip.blocks)
    scoring = e.model(e.teacher)
    return DMD(
        generator=generator,
        teacher=scoring,
        critic=scoring,
        text=text,
        generator_optimizer=optimizers["generator"],
        critic_optimizer=optimizers["critic"],
        config=c,
        blocks=blocks,
        given=given,
        shardings=shardings,
    )
