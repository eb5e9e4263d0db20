"""What the files that a config names must be like: each function lists what does not fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.pipeline import PipelineConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.training.config.parsing import to_dict
from omniforcing_jax.training.config.settings import STAGES, StageConfig

DECODERS = ("video_vae", "audio_vae", "vocoder")  # of sample clips
# Settings that a causal student passes on to the one that starts from it.
PARAMETERS = ("num_sinks", "sink_rope", "extra_qk_norm", "tanh_gated_attention")


def head_problems(student: TransformerConfig, mesh_shape: Mapping[str, int]) -> list[str]:
    """Attention is split by heads."""
    tensor, sequence = mesh_shape["tensor"], mesh_shape["sequence"]
    heads = student.video_heads
    if heads % tensor:
        return [f"mesh.tensor: {tensor} does not divide the model's {heads} heads"]
    if heads % (tensor * sequence):
        return [
            f"mesh: tensor {tensor} x sequence {sequence} does not divide the model's {heads} "
            "heads, which attention is split by"
        ]
    return []


def version_problems(c: StageConfig, version: str, pipeline: PipelineConfig) -> list[str]:
    """Student and teacher are versions of one model; `version` is that of the start."""
    if version.split(".")[:2] == pipeline.model_version.split(".")[:2]:
        return []
    return [
        f"generator: {c.generator} is of version {version}, the teacher of "
        f"{pipeline.model_version}; student and teacher must be of the same model"
    ]


def start_problems(c: StageConfig, run: Mapping[str, Any], trained: TrainedSettings) -> list[str]:
    """A start that is a causal student already must be made and trained like this one: parameters
    that it lacks would start anew.

    Args:
      run: its settings, {} if it is no run.
      trained: what it was trained with.
    """
    if not trained.causal:
        return []
    then = {("clip", "layout"): trained.layout, ("student", "schedule"): trained.schedule}
    if trained.timesteps is not None:
        then["student", "timesteps"] = trained.timesteps
    if run:
        # a run from before the setting existed did what the setting's default does
        usual = to_dict(STAGES[run["stage"]]())["student"]
        then |= {("student", name): run["student"].get(name, usual[name]) for name in PARAMETERS}
    now = to_dict(c)
    differing = [
        f"{group}.{name} ({value} there, {now[group][name]} here)"
        for (group, name), value in then.items()
        if value != now[group][name]
    ]
    if not differing:
        return []
    return [
        f"generator: {c.generator} was trained with another {', '.join(differing)}; set "
        "them alike, or give --allow_config_change if this is meant"
    ]


def adapter_problems(
    c: StageConfig, run: Mapping[str, Any] | None, content: Mapping[str, Any]
) -> list[str]:
    """Adapters go on from adapters of the same kind over the same base.

    Args:
      run: settings of the run that `generator` is; {} for a converted checkpoint, None if it could
        not be read.
      content: of the checkpoint.
    """
    if run is None or not c.adapters.used:
        return []
    then = run.get("adapters", {})
    if not then.get("ranks"):
        return [
            f"generator: {c.generator} has weights of its own instead of adapters over "
            f"{c.checkpoint}; start from a run with adapters (configs/{c.stage}.py:19b-lora), from "
            "a LoRA file of one, from the checkpoint itself (--config.generator=''), or train all "
            "weights (--config.adapters.ranks='()')"
        ]
    problems = [
        f"adapters.{name}: {value} here, {then.get(name)} in {c.generator}; set them alike"
        for name, value in to_dict(c.adapters).items()
        if list(value) != list(then.get(name) or ())
    ]
    ours = content.get("fingerprints", {}).get("transformer")
    if run.get("base") != ours:
        problems.append(
            f"generator: the adapters of {c.generator} were trained over another transformer than "
            f"that of {c.checkpoint} (fingerprints {run.get('base')} and {ours}); give the "
            f"checkpoint that it was trained with, {run.get('checkpoint')}"
        )
    return problems


def teacher_problems(c: StageConfig, pipeline: PipelineConfig) -> list[str]:
    """The teacher of stages I and III is guided at all noise levels, which a distilled LTX-2, made
    for its own eight without guidance, is no good at."""
    if c.stage == "stage2" or pipeline.trained.stage != "distilled":
        return []
    return [
        f"checkpoint: {c.checkpoint} is a distilled LTX-2, which is no teacher; give the full one, "
        "and this as `generator`"
    ]


def data_problems(
    c: StageConfig,
    manifest: Any,
    pipeline: PipelineConfig,
    connectors: ConnectorConfig,
    rollout: RolloutConfig | None,
) -> list[str]:
    """The stored features and trajectories must be for this model and this clip."""
    problems, m = [], manifest
    if m.model_version != pipeline.model_version:
        problems.append(
            f"data: {c.data} was made for version {m.model_version}, the checkpoint is "
            f"{pipeline.model_version}"
        )
    if (m.video_dim, m.audio_dim) != (connectors.video_dim, connectors.audio_dim):
        problems.append(
            f"data: features are {m.video_dim} and {m.audio_dim} wide, the checkpoint's connectors "
            f"take {connectors.video_dim} and {connectors.audio_dim}"
        )
    if m.text_length % connectors.num_registers:
        problems.append(
            f"data: text length {m.text_length} is not a multiple of the connectors' "
            f"{connectors.num_registers} registers"
        )
    if rollout is not None and (c.stage == "stage2" or c.conditions.gives):
        problems += _clip_problems(c, m, rollout)
    if rollout is not None and c.stage == "stage2":
        problems += _trajectory_problems(c, m, rollout)
    return problems


def _clip_problems(c: StageConfig, manifest: Any, rollout: RolloutConfig) -> list[str]:
    layout, blocks = rollout.cache.layout, c.clip.blocks
    expected = {
        "video_frames": layout.num_video_frames(blocks),
        "audio_frames": layout.num_audio_frames(blocks),
        "height": rollout.height,
        "width": rollout.width,
    }
    found = {
        "video_frames": manifest.video_frames,
        "audio_frames": manifest.audio_frames,
        "height": manifest.height,
        "width": manifest.width,
    }
    if found == expected:
        return []
    what = "trajectories are of clips" if c.stage == "stage2" else "clips are stored"
    return [f"data: {what} with {found}, the config's clip has {expected}"]


def _trajectory_problems(c: StageConfig, manifest: Any, rollout: RolloutConfig) -> list[str]:
    problems, layout = [], rollout.cache.layout
    if c.regression.objective == "flow":  # reads their ends only, which any sampler may have made
        return problems
    if not _same_levels(manifest.sigmas, rollout.sigmas):
        steps = len(manifest.schedule) - 1
        timesteps = " ".join(f"{t:g}" for t in c.student.timesteps)
        ours = "" if c.student.schedule == "distilled" else f" --steps {flow.SCHEDULE_STEPS}"
        problems.append(
            f"data: the states of {c.data} are at sigma {_listed(manifest.sigmas)}, of {steps} "
            f"steps; student.timesteps {timesteps} are sigma {_listed(rollout.sigmas)} of the "
            f"schedule {c.student.schedule!r}: make them with launch.ode_pairs --timesteps "
            f"{timesteps}{ours}, or set student.timesteps and student.schedule to those they were "
            "made with (distilled for the trajectories of a distilled LTX-2)"
        )
    made = manifest.autoregression
    if made and made["layout"] != layout.name:
        problems.append(
            f"data: {c.data} was generated in blocks of layout {made['layout']!r}, clip.layout is "
            f"{layout.name!r}"
        )
    return problems


def _same_levels(a: Sequence[float], b: Sequence[float]) -> bool:
    """Up to what JSON and float32 make of a number."""
    return len(a) == len(b) and all(
        math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a, b, strict=True)
    )


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def deviations(c: StageConfig, text_length: int, trained: TrainedSettings) -> tuple[str, ...]:
    """One line about what is otherwise than the model was trained that the student starts from."""
    now = {
        "clip.height": (c.clip.height, trained.height),
        "clip.width": (c.clip.width, trained.width),
        "clip.frame_rate": (c.clip.frame_rate, trained.frame_rate),
        "frames of a clip": (c.layout.pixel_frames(c.clip.blocks), trained.frames),
        "text tokens": (text_length, trained.text_length),
    }
    changed = [
        f"{name} {value:g}, not {usual:g}"
        for name, (value, usual) in now.items()
        if usual not in (None, value)
    ]
    start = c.generator or c.checkpoint
    return (f"otherwise than {start} was trained: {'; '.join(changed)}",) if changed else ()


def preview_problems(c: StageConfig, content: Mapping[str, Any]) -> list[str]:
    """What the sample clips need must be there before the first of them is due."""
    missing = [name for name in DECODERS if name not in content.get("components", ())]
    if c.sample_every <= 0 or not missing:
        return []
    return [
        f"sample_every: {c.checkpoint} has no {', '.join(missing)} to decode sample clips with; "
        "convert it again with them, or set sample_every to 0"
    ]
