"""From a config to everything a training run needs, checked before anything is allocated.

`check` reads small files only (the checkpoint's config.json, the dataset's manifest) and reports
every problem it finds at once. `assembly.assemble` then loads weights onto the mesh.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import Clip
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import locate
from omniforcing_jax.models.text.connectors import ConnectorConfig, TextConnectors
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.models.transformer.model import Transformer, check_remat
from omniforcing_jax.ops.attention import IMPLEMENTATIONS
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.training.config import checks
from omniforcing_jax.training.config.checks import Problems
from omniforcing_jax.training.loop import LoopConfig
from omniforcing_jax.training.objectives.common import TextInput
from omniforcing_jax.training.objectives.dmd import DMD, DMDConfig
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.objectives.ode_regression import ODERegression, RegressionConfig
from omniforcing_jax.training.objectives.scores import BlockContext, ScoreConfig
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig, make_optimizer
from omniforcing_jax.training.state import TrainState
from omniforcing_jax.training.students.bidirectional import BidirectionalGenerator
from omniforcing_jax.training.students.unrolled import UnrolledGenerator

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
STAGES = ("stage1", "stage2", "stage3")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config: what will be built, as static values.

    Attributes:
      config: the config itself.
      content: config.json of the checkpoint.
      pipeline: the same, parsed.
      teacher, student: of the bidirectional model and the trained one.
      layout, clip: blocks, and the clip that is scored or regressed.
      rollout: how the student is unrolled (stages II and III).
      sigmas: noise levels of the student.
      data: the opened dataset, with `manifest` and `negative`.
      mesh_shape: devices per axis; with separate scores, of either half.
      optimizers: {"generator": ..., "critic": ...}.
    """

    config: ml_collections.ConfigDict
    content: Mapping[str, Any]
    pipeline: PipelineConfig
    teacher: TransformerConfig
    student: TransformerConfig
    connectors: ConnectorConfig
    layout: BlockLayout
    clip: Clip
    rollout: RolloutConfig
    sigmas: tuple[float, ...]
    data: Any
    mesh_shape: dict[str, int]
    optimizers: dict[str, OptimizerConfig]
    ema: EMAConfig | None
    settings: DMDConfig | RegressionConfig
    loop: LoopConfig

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return DTYPES[self.config.compute.dtype]

    def model(self, config: TransformerConfig) -> Transformer:
        """A network as it is trained or scored with."""
        compute = self.config.compute
        return Transformer(config, self.dtype, compute.attention, remat=compute.remat)

    def run_config(self) -> dict[str, Any]:
        """The config as JSON, with what the run depends on besides."""
        return {
            **self.config.to_dict(),
            "model_version": self.content["model_version"],
            "student_config": dataclasses.asdict(self.student),
        }


def check(
    config: ml_collections.ConfigDict,
    reference: ml_collections.ConfigDict,
    num_devices: int,
    data: Any = None,
    content: Mapping[str, Any] | None = None,
    *,
    allow_config_change: bool = False,
) -> Experiment:
    """Checks a config.

    Args:
      config: of a stage.
      reference: one with all settings that exist, with their types (`configs.base.training`).
      num_devices: devices of all hosts together.
      data: a dataset with a manifest; None opens the one that the config names.
      content: of the checkpoint's config.json; None reads it.
      allow_config_change: go on from a causal student whose settings are not those of the config.

    Raises:
      ConfigError: lists every problem.
    """
    problems = Problems(checks.unknown_settings(config, reference))
    if problems:
        raise ConfigError(problems)
    c, attempt = config, problems.attempt
    if content is None:
        content = attempt("checkpoint", lambda: checkpoints.load_config(c.checkpoint))
    pipeline = content and attempt("checkpoint", lambda: PipelineConfig.from_content(content))
    sigmas = attempt(
        "student.timesteps", lambda: tuple(flow.student_sigmas(c.student.timesteps).tolist())
    )
    optimizers = _optimizers(c, problems)
    ema = attempt("ema", lambda: EMAConfig(**c.ema) if c.ema else None)
    settings = attempt("settings", lambda: _settings(c))
    loop = attempt("loop", lambda: _loop(c))
    devices = checks.devices_of_a_mesh(c, num_devices, problems)
    mesh_shape = checks.mesh_shape(c, devices, problems)
    checks.check_batch(c, mesh_shape, problems)
    attempt("compute", lambda: _check_compute(c.compute))
    if content is None or pipeline is None:
        raise ConfigError(problems)

    teacher = pipeline.transformer
    student = attempt("student", lambda: _student(c, teacher))
    connectors = attempt(
        "connectors",
        lambda: ConnectorConfig.from_metadata(
            checkpoints.component_metadata(content, "connectors")
        ),
    )
    size = attempt("clip", lambda: pipeline.check_size(c.clip.height, c.clip.width))
    layout = attempt("clip.layout", lambda: _layout(c))
    checks.check_source(c, content, problems, allow_config_change)
    checks.check_previews(c, content, problems)
    checks.check_streaming(c, problems)
    if isinstance(settings, DMDConfig):
        attempt("score", lambda: settings.score.perturbation.check_layers(teacher.num_layers))
    rollout = None
    if size and layout and sigmas:
        rollout = attempt("student", lambda: _rollout(c, layout, sigmas, size))
    if data is None:
        data = attempt("data", lambda: _open_data(c))
    checks.check_data(c, data, content, connectors, rollout, problems)
    if None in (student, connectors, rollout, settings) or problems:
        raise ConfigError(problems)
    checks.check_heads(student, mesh_shape, problems)
    clip = Clip.from_blocks(layout, c.clip.blocks, *size)
    experiment = Experiment(
        config=ml_collections.FrozenConfigDict(c),
        content=content,
        pipeline=pipeline,
        teacher=teacher,
        student=student,
        connectors=connectors,
        layout=layout,
        clip=clip,
        rollout=rollout,
        sigmas=sigmas,
        data=data,
        mesh_shape=mesh_shape,
        optimizers=optimizers,
        ema=ema,
        settings=settings,
        loop=loop,
    )
    if not problems:
        attempt(c.stage, lambda: make_stage(experiment))
    if problems:
        raise ConfigError(problems)
    return experiment


def _check_compute(compute) -> None:
    if compute.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, not {compute.dtype!r}")
    if compute.attention not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, not {compute.attention!r}")
    check_remat(compute.remat)


def _optimizers(c, problems: Problems) -> dict[str, OptimizerConfig]:
    names = ["generator"] if c.stage == "stage2" else ["generator", "critic"]
    return {
        name: problems.attempt(
            f"{name}_optimizer", lambda name=name: OptimizerConfig(**c[f"{name}_optimizer"])
        )
        for name in names
    }


def _settings(c) -> DMDConfig | RegressionConfig:
    weights = LossWeights(**c.loss)
    shared = {"weights": weights, "microbatches": c.microbatches, "seed": c.seed}
    if c.stage == "stage2":
        return RegressionConfig(**c.regression, **shared)
    score = {
        **c.score,
        "video_cfg": tuple(c.score.video_cfg),
        "audio_cfg": tuple(c.score.audio_cfg),
        "stg_blocks": tuple(c.score.stg_blocks),
    }
    return DMDConfig(
        score=ScoreConfig(**score),
        critic_updates=c.critic_updates,
        gather_weights=c.compute.gather_weights,
        **shared,
    )


def _loop(c) -> LoopConfig:
    names = ("num_steps", "log_every", "checkpoint_every", "keep_last", "keep_every", "tensorboard")
    return LoopConfig(**{name: c[name] for name in names})


def _student(c, teacher: TransformerConfig) -> TransformerConfig:
    if teacher.num_audio_sinks:
        raise ValueError(
            "the checkpoint is a block-causal student; give a converted LTX-2 as `checkpoint` and "
            "this one as `generator`"
        )
    if c.stage == "stage1" and c.student.num_sinks:
        raise ValueError("num_sinks must be 0 in stage I: the model is bidirectional")
    return dataclasses.replace(
        _source_config(c) or teacher,
        num_audio_sinks=c.student.num_sinks,
        sink_rope=c.student.sink_rope,
        extra_qk_norm=c.student.extra_qk_norm,
        tanh_gated_attention=c.student.tanh_gated_attention,
    )


def _source_config(c) -> TransformerConfig | None:
    """Of the network from which the student starts: it may rotate otherwise than the teacher."""
    if not c.generator:
        return None
    source = checkpoints.read_json(locate(c.generator) / "config.json")
    if "student_config" in source["config"]:  # a run's folder
        return TransformerConfig.from_dict(source["config"]["student_config"])
    return PipelineConfig.from_checkpoint(c.generator).transformer


def _layout(c) -> BlockLayout:
    if c.clip.blocks < 1:
        raise ValueError(f"clip.blocks must be at least 1, not {c.clip.blocks}")
    return BlockLayout.from_name(
        c.clip.layout, frame_rate=c.clip.frame_rate, num_sinks=c.student.num_sinks
    )


def _rollout(c, layout: BlockLayout, sigmas, size: tuple[int, int]) -> RolloutConfig:
    s = c.student
    cache = CacheConfig(layout, s.window, s.anchors, s.positions)
    return RolloutConfig(cache, sigmas, *size, context_noise=s.context_noise)


def _open_data(c):
    if c.stage == "stage2":
        from omniforcing_jax.data.ode_pairs import open_ode_pairs

        return open_ode_pairs(c.data)
    from omniforcing_jax.data.text_dataset import open_text_dataset

    return open_text_dataset(c.data)


def make_stage(e: Experiment, shardings: TrainState | None = None) -> DMD | ODERegression:
    """The stage's module; without shardings for a single device."""
    c = e.config
    text = TextInput(TextConnectors(e.connectors, e.dtype))
    optimizers = {name: make_optimizer(config) for name, config in e.optimizers.items()}
    student = e.model(e.student)
    if c.stage == "stage2":
        return ODERegression(
            model=student,
            rollout=e.rollout,
            num_blocks=c.clip.blocks,
            text=text,
            optimizer=optimizers["generator"],
            config=e.settings,
            ema=e.ema,
            shardings=shardings,
        )
    exit_weights = tuple(c.exit_weights) or None
    if c.stage == "stage1":
        generator = BidirectionalGenerator(student, e.clip, e.sigmas, exit_weights)
    else:
        generator = UnrolledGenerator(
            student, e.rollout, c.rollout_blocks, c.clip.blocks, c.detach_history, exit_weights
        )
    blocks = None
    if e.settings.score.context == "block_causal":
        cache = e.rollout.cache.for_clip(c.clip.blocks)
        layout = dataclasses.replace(cache.layout, num_sinks=e.teacher.num_audio_sinks)
        config = dataclasses.replace(e.rollout, cache=dataclasses.replace(cache, layout=layout))
        blocks = BlockContext(config, c.clip.blocks)
    scoring = e.model(e.teacher)
    return DMD(
        generator=generator,
        teacher=scoring,
        critic=scoring,
        text=text,
        generator_optimizer=optimizers["generator"],
        critic_optimizer=optimizers["critic"],
        config=e.settings,
        ema=e.ema,
        blocks=blocks,
        shardings=shardings,
    )
