"""What can be wrong with a config, apart from what its parts refuse themselves.

Each check adds what it finds to the problems, so that `experiment.check` can report all at once.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.paths import locate
from omniforcing_jax.models.transformer.config import TransformerConfig
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.student import RolloutConfig

DECODERS = ("video_vae", "audio_vae", "vocoder")  # of sample clips
# Settings that a causal student passes on to the one that starts from it.
INHERITED = (
    "student.num_sinks",
    "student.sink_rope",
    "student.extra_qk_norm",
    "student.tanh_gated_attention",
    "student.timesteps",
    "clip.layout",
)


class Problems(list):
    """Problems found so far."""

    def attempt(self, what: str, build: Callable[[], Any]) -> Any:
        """What `build` returns, or None after its error has been noted."""
        try:
            return build()
        except (ValueError, OSError, TypeError, KeyError) as error:
            self.append(f"{what}: {error}")
            return None


def unknown_settings(config, reference, prefix: str = "") -> list[str]:
    """Settings that do not exist, that are missing, or that have another type."""
    problems = []
    for name in sorted({*config, *reference}):
        path = f"{prefix}{name}"
        if name not in reference:
            problems.append(f"{path}: there is no such setting; there are {', '.join(reference)}")
        elif name not in config:
            problems.append(f"{path}: is missing")
        elif isinstance(reference[name], ml_collections.ConfigDict):
            if isinstance(config[name], ml_collections.ConfigDict):
                problems += unknown_settings(config[name], reference[name], f"{path}.")
            elif config[name] is not None:
                problems.append(f"{path}: must be a group of settings, not {config[name]!r}")
    if not prefix and config.get("stage") != reference.get("stage"):
        problems.append(
            f"stage: this config is for {config.get('stage')!r}, started was {reference.stage!r}"
        )
    return problems


def devices_of_a_mesh(c, num_devices: int, problems: Problems) -> int:
    """All, or half of them where the score networks have their own."""
    if c.stage == "stage2" and c.compute.gather_weights:
        problems.append("compute.gather_weights: stage II has no rollouts to gather weights for")
    if not c.compute.separate_scores:
        return num_devices
    if c.stage == "stage2":
        problems.append("compute.separate_scores: stage II has no score networks")
    if c.microbatches != 1:
        problems.append(
            "compute.separate_scores: takes a batch in one piece; microbatches must be 1, not "
            f"{c.microbatches}"
        )
    own = num_devices // jax.process_count()
    if own % 2:
        problems.append(
            f"compute.separate_scores: {own} devices of a process cannot be halved; give every "
            "process an even number: best one process per node with all of its devices (under "
            "SLURM a task has one device, unless JAX_LOCAL_DEVICE_IDS lists others)"
        )
    return max(num_devices // 2, 1)


def mesh_shape(c, num_devices: int, problems: Problems) -> dict[str, int] | None:
    shape = dict(c.mesh)
    bad = [f"{name}={size}" for name, size in shape.items() if size < 1 and size != -1]
    open_axes = [name for name, size in shape.items() if size == -1]
    if bad or len(open_axes) > 1:
        problems.append(
            f"mesh: axes must be positive, one of them may be -1 (the rest), not {dict(c.mesh)}"
        )
        return None
    known = math.prod(size for size in shape.values() if size != -1)
    for name in open_axes:
        shape[name] = max(num_devices // known, 1)
    if math.prod(shape.values()) != num_devices:
        divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
        problems.append(
            f"mesh: {dict(c.mesh)} does not multiply to the {num_devices} devices; axes can be "
            f"any of {', '.join(map(str, divisors))} whose product is {num_devices}"
        )
        return None
    return shape


def check_heads(student: TransformerConfig, mesh_shape, problems: Problems) -> None:
    if mesh_shape and student.video_heads % mesh_shape["tensor"]:
        problems.append(
            f"mesh.tensor: {mesh_shape['tensor']} does not divide the model's "
            f"{student.video_heads} heads"
        )
    elif mesh_shape and student.video_heads % (mesh_shape["tensor"] * mesh_shape["sequence"]):
        problems.append(
            f"mesh: tensor {mesh_shape['tensor']} x sequence {mesh_shape['sequence']} does not "
            f"divide the model's {student.video_heads} heads, which attention is split by"
        )


def check_batch(c, mesh_shape: dict[str, int] | None, problems: Problems) -> None:
    for name in ("batch_size", "microbatches"):
        if c[name] < 1:
            problems.append(f"{name}: must be at least 1, not {c[name]}")
            return
    ways = mesh_shape["data"] * mesh_shape["fsdp"] if mesh_shape else 1
    if c.batch_size % (c.microbatches * ways):
        problems.append(
            f"batch_size: {c.batch_size} is not a multiple of {c.microbatches} microbatches x "
            f"{ways} devices of the mesh's data and fsdp axes; the next one is "
            f"{-(-c.batch_size // (c.microbatches * ways)) * c.microbatches * ways}"
        )


def check_source(c, content, problems: Problems, allow_config_change: bool) -> None:
    """Where the student starts must exist, be of the teacher's version, and, if it is a causal
    student already, be made like this one: parameters that it lacks would start anew."""
    if c.generator_weights not in ("params", "ema"):
        problems.append(
            f"generator_weights: must be 'params' or 'ema', not {c.generator_weights!r}"
        )
    if not c.generator:
        return
    file = locate(c.generator) / "config.json"
    if not file.is_file():
        problems.append(f"generator: {c.generator} is neither a run nor a converted checkpoint")
        return
    source = checkpoints.read_json(file)
    version = source.get("model_version") or source.get("config", {}).get("model_version")
    if version != content["model_version"]:
        problems.append(
            f"generator: {c.generator} is of version {version}, the teacher of "
            f"{content['model_version']}; student and teacher must be of the same model"
        )
    run = source.get("config", {})
    if run.get("stage") in ("stage2", "stage3") and not allow_config_change:
        differing = [
            f"{name} ({old} there, {new} here)"
            for name, old, new in zip(INHERITED, _inherited(run), _inherited(c))
            if old != new
        ]
        if differing:
            problems.append(
                f"generator: {c.generator} was trained with another {', '.join(differing)}; set "
                "them alike, or give --allow_config_change if this is meant"
            )


def _inherited(config: Mapping[str, Any]) -> list[Any]:
    groups = (name.split(".") for name in INHERITED)
    values = (config[group][name] for group, name in groups)
    return [tuple(value) if isinstance(value, (list, tuple)) else value for value in values]


def check_data(
    c, data, content, connectors, rollout: RolloutConfig | None, problems: Problems
) -> None:
    """The stored features and trajectories must be for this model and this clip."""
    if data is None or connectors is None:
        return
    m = data.manifest
    if m.model_version != content["model_version"]:
        problems.append(
            f"data: {c.data} was made for version {m.model_version}, the checkpoint is "
            f"{content['model_version']}"
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
    if c.stage == "stage2" and rollout is not None:
        _check_trajectories(c, m, rollout, problems)


def _check_trajectories(c, manifest, rollout: RolloutConfig, problems: Problems) -> None:
    layout = rollout.cache.layout
    blocks = max(c.clip.blocks, 1)
    expected = {
        "video_frames": layout.num_video_frames(blocks),
        "audio_frames": layout.num_audio_frames(blocks),
        "height": rollout.height,
        "width": rollout.width,
    }
    found = {name: getattr(manifest, name) for name in expected}
    if found != expected:
        problems.append(
            f"data: trajectories are of clips with {found}, the config's clip has {expected}"
        )
    if c.regression.objective == "flow":  # reads their ends only, which any sampler may have made
        return
    if not _same_levels(manifest.sigmas, rollout.sigmas):
        steps = len(manifest.schedule) - 1
        timesteps = " ".join(f"{t:g}" for t in c.student.timesteps)
        problems.append(
            f"data: the states of {c.data} are at sigma {_listed(manifest.sigmas)}, of {steps} "
            f"steps; student.timesteps {timesteps} are sigma {_listed(rollout.sigmas)}: "
            f"make them with launch.ode_pairs --timesteps {timesteps} --steps "
            f"{flow.SCHEDULE_STEPS}, or set student.timesteps to those they were made with"
        )
    made = manifest.autoregression
    if made and made["layout"] != layout.name:
        problems.append(
            f"data: {c.data} was generated in blocks of layout {made['layout']!r}, clip.layout is "
            f"{layout.name!r}"
        )


def _same_levels(a: Sequence[float], b: Sequence[float]) -> bool:
    """Up to what JSON and float32 make of a number."""
    return len(a) == len(b) and all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a, b))


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def check_previews(c, content: Mapping[str, Any], problems: Problems) -> None:
    """What the sample clips need must be there before the first of them is due."""
    if c.sample_every < 0:
        problems.append(f"sample_every: must be 0 (no sample clips) or more, not {c.sample_every}")
    if c.sample_every <= 0:
        return
    if c.sample_clips < 1:
        problems.append(
            f"sample_clips: must be at least 1, not {c.sample_clips}; sample_every=0 makes none"
        )
    missing = [name for name in DECODERS if name not in content["components"]]
    if missing:
        problems.append(
            f"sample_every: {c.checkpoint} has no {', '.join(missing)} to decode sample clips "
            "with; convert it again with them, or set sample_every to 0"
        )


def check_streaming(c, problems: Problems) -> None:
    """The student must have been trained as it will be streamed."""
    s = c.student
    if s.context_noise > 0:
        # whoever shows clean history says that it has this level, and adds no noise
        if c.stage == "stage2" and c.regression.clean_history > 0:
            problems.append(
                "student.context_noise: must be 0 with regression.clean_history > 0, whose history "
                "has no noise"
            )
        if c.stage != "stage2" and c.score.context == "block_causal":
            problems.append(
                "student.context_noise: must be 0 with score.context='block_causal', where scores "
                "see a history without noise"
            )
    if c.stage == "stage1" or s.positions != "relative":
        return
    name = "rollout_blocks" if c.stage == "stage3" else "clip.blocks"
    trained = (c.rollout_blocks if c.stage == "stage3" else c.clip.blocks) - 1
    reached = 1 + s.anchors + s.window
    if reached <= trained:
        return
    text = (
        f"a stream with a window of {s.window} and {s.anchors} anchors reaches block position "
        f"{reached}, {name}={trained + 1} trains positions up to {trained}"
    )
    fitting = trained - 1 - s.anchors
    if fitting >= 1:
        problems.append(f"student.window: {text}; set it to {fitting}, or train on more blocks")
    else:
        warnings.warn(
            f"student.window: {text}; no window is short enough. Train on {3 + s.anchors} blocks "
            "or more for a student that is to be streamed for longer than that",
            stacklevel=2,
        )
