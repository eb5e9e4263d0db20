"""Every setting of a training run, by stage, as frozen dataclasses with the paper's values.

    parsing.parse(ConfigDict) -> StageI, StageII or StageIII

`configs/` turns them into an `ml_collections.ConfigDict`, which the command line changes by
`--config.name=value`; `parsing` turns that back once, and from there on only the dataclasses are
passed. A group of settings refuses what is wrong in itself when it is made; `problems` of the whole
lists what does not go together.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator

import jax

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.models.transformer.model import check_remat
from omniforcing_jax.ops.attention import IMPLEMENTATIONS
from omniforcing_jax.ranges import COUNT, SHARE, Range, check_fields
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.kv_cache import CacheConfig
from omniforcing_jax.sampling.student import RolloutConfig
from omniforcing_jax.training.adapters import AdapterConfig
from omniforcing_jax.training.config.problems import Problems
from omniforcing_jax.training.loop import LoopConfig
from omniforcing_jax.training.mixture import ConditionMixture
from omniforcing_jax.training.objectives.common import checked_seed
from omniforcing_jax.training.objectives.losses import LossWeights
from omniforcing_jax.training.objectives.scores import ScoreConfig
from omniforcing_jax.training.optimizers import EMAConfig, OptimizerConfig
from omniforcing_jax.types import DTYPES

OBJECTIVES = ("velocity", "x0", "flow")


# -- groups ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The clip, in pixels and blocks: six prefix blocks at 24 frames per second are 121 frames.

    Raises:
      ValueError: a size that no network can be trained at, or see `BlockLayout.from_name`.
    """

    height: int = 512
    width: int = 768
    layout: str = "prefix"
    blocks: int = 6
    frame_rate: float = 24.0

    def __post_init__(self):
        sizes = dict.fromkeys(("height", "width"), Range(1, 2**14))
        check_fields(self, "clip.", blocks=Range(1, 3600), **sizes)
        BlockLayout.from_name(self.layout, frame_rate=self.frame_rate)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Noise levels, audio sink tokens and the other stabilisers of the paper's Table 3, and how the
    student will be streamed. Stage I has no use for all but the first two.

    Attributes:
      schedule: whose nearest levels the timesteps stand for: "ltx2", or "distilled" for a student
        that starts from a distilled LTX-2.
      sink_rope: "identity" or "incremental".
      window: a stream with the default's 4 stays at the positions of six trained blocks.
    """

    timesteps: tuple[float, ...] = (1000.0, 909.0, 725.0, 421.0)
    schedule: str = "ltx2"
    num_sinks: int = 16
    sink_rope: str = "identity"
    extra_qk_norm: bool = False
    tanh_gated_attention: bool = False
    window: int = 4
    anchors: int = 0
    positions: str = "relative"
    context_noise: float = 0.0

    def __post_init__(self):
        blocks = Range(0, 2**20)
        check_fields(
            self, num_sinks=Range(0, 4096), window=COUNT, anchors=blocks, context_noise=SHARE
        )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the denoising steps, with the final 0."""
        return tuple(flow.student_sigmas(self.timesteps, flow.schedule(self.schedule)).tolist())


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 takes those that the other axes leave."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = list(dataclasses.asdict(self).values())
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                "axes must be positive, one of them may be -1 (the rest), not "
                f"{dataclasses.asdict(self)}"
            )

    def shape(self, num_devices: int) -> dict[str, int]:
        """Devices per axis.

        Raises:
          ValueError: they do not multiply to the number of devices.
        """
        shape = dataclasses.asdict(self)
        known = math.prod(size for size in shape.values() if size != -1)
        shape = {
            name: max(num_devices // known, 1) if size == -1 else size
            for name, size in shape.items()
        }
        if math.prod(shape.values()) != num_devices:
            divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
            raise ValueError(
                f"{dataclasses.asdict(self)} does not multiply to the {num_devices} devices; axes "
                f"can be any of {', '.join(map(str, divisors))} whose product is {num_devices}"
            )
        return shape


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the networks are computed.

    Attributes:
      remat: "none", "full", or a policy of `jax.checkpoint_policies`.
      reduce_dtype: in which gradients of weights are added up over devices.
      gather_weights: gather the generator's compute-dtype weights once per update, rather than
        layer by layer in every pass of a rollout: faster, and they have to fit on a device.
      separate_scores: teacher and critic on half of the devices, the student on the others, `mesh`
        being the shape of either half.
      base_precision: in which the frozen base of adapters is kept: "none" is `dtype`, "int8" and
        "fp8" are weights in 8 bits (see `models.quantization`), multiplied in `dtype`.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "auto"
    reduce_dtype: str = "float32"
    gather_weights: bool = False
    separate_scores: bool = False
    base_precision: str = "none"

    def __post_init__(self):
        for name in ("dtype", "reduce_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"{name} must be one of {tuple(DTYPES)}, not {getattr(self, name)!r}"
                )
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, not {self.attention!r}")
        check_remat(self.remat)
        if self.base_precision not in BASE_PRECISIONS:
            raise ValueError(
                f"base_precision must be one of {BASE_PRECISIONS}, not {self.base_precision!r}"
            )


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    """The objective of stage II.

    Attributes:
      objective: "velocity" (Eq. 6), "x0", or "flow": an autoregressive teacher.
      level_per_block: a noise level for every block; False: one for the clip (needed by LTX-2.3 and
        later, which modulate by the sample's level).
      include_clean: the clean state is among those drawn. It has no loss of its own (and the loss
        is scaled so that its expectation does not change), but is history to later blocks.
      clean_history: probability with which a training step shows clean instead of noisy history.
    """

    objective: str = "velocity"
    level_per_block: bool = True
    include_clean: bool = True
    clean_history: float = 0.0

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, not {self.objective!r}")
        if not 0 <= self.clean_history <= 1:
            raise ValueError(f"clean_history must lie in [0, 1], not {self.clean_history}")


BASE_PRECISIONS = ("none", "int8", "fp8")

# AdamW on float32 masters. A schedule counts the updates of its own network.
OPTIMIZER = OptimizerConfig(learning_rate=2e-5, weight_decay=0.01)


# -- stages ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What the stages have in common.

    Attributes:
      checkpoint: a converted LTX-2: teacher, start of the critic, connectors and decoders.
      generator: where the student starts: a run of another stage, a converted checkpoint, or "" for
        `checkpoint`; `generator_weights`: of a run, the average ("ema") or the "params".
      data: stored prompts, or trajectories in stage II; with conditions, clips: encoded ones
        (`launch.encode_clips`) or the teacher's own, which stored trajectories end with.
      adapters: what is trained of every network, if not all of it; `checkpoint` is then the base of
        all, and `generator` a run with the same adapters, or a LoRA file of them.
      conditions: with which probability a sample is trained in each mode.
      loss: lambda_v and lambda_a.
      sample_every, sample_clips: steps between sample clips (0: none), and how many.
      others: see `LoopConfig`.
    """

    stage: str = ""
    seed: int = 0
    checkpoint: str = "checkpoints/ltx2"
    generator: str = ""
    generator_weights: str = "ema"
    data: str = "data/prompts"
    clip: ClipConfig = ClipConfig()
    conditions: ConditionMixture = ConditionMixture()
    adapters: AdapterConfig = AdapterConfig()
    student: StudentConfig = StudentConfig()
    batch_size: int = 32
    microbatches: int = 1
    num_steps: int = 2000
    generator_optimizer: OptimizerConfig = OPTIMIZER
    ema: EMAConfig | None = EMAConfig(decay=0.99, start_step=200)
    loss: LossWeights = LossWeights()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    log_every: int = 10
    checkpoint_every: int = 100
    keep_last: int = 3
    keep_every: int | None = 500
    tensorboard: bool = True
    sample_every: int = 100
    sample_clips: int = 2

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """Of every trained network: the generator, and the critic if there is one."""
        names = ("generator", "critic")
        found = {name: getattr(self, f"{name}_optimizer", None) for name in names}
        return {name: config for name, config in found.items() if config is not None}

    @property
    def loop(self) -> LoopConfig:
        """How long the loop runs, and what it leaves behind."""
        names = {field.name for field in dataclasses.fields(LoopConfig)}
        return LoopConfig(**{name: x for name, x in vars(self).items() if name in names})

    @property
    def layout(self) -> BlockLayout:
        """How clips are cut into blocks."""
        return BlockLayout.from_name(self.clip.layout, frame_rate=self.clip.frame_rate)

    def rollout(self, height: int, width: int) -> RolloutConfig:
        """How the student is unrolled, for a video of so many latents."""
        s = self.student
        cache = CacheConfig(self.layout, s.window, s.anchors, s.positions)
        return RolloutConfig(cache, s.sigmas, height, width, context_noise=s.context_noise)

    def mesh_shape(self, num_devices: int) -> dict[str, int]:
        """Devices per axis; with separate scores, of either half.

        Raises:
          ValueError: they do not fit the number of devices.
        """
        if not self.compute.separate_scores:
            return self.mesh.shape(num_devices)
        own = num_devices // jax.process_count()
        if own % 2:
            raise ValueError(
                f"compute.separate_scores: {own} devices of a process cannot be halved; give every "
                "process an even number: best one process per node with all of its devices (under "
                "SLURM a task has one device, unless JAX_LOCAL_DEVICE_IDS lists others)"
            )
        return self.mesh.shape(num_devices // 2)

    def problems(self, num_devices: int) -> list[str]:
        """Everything that is wrong with settings that are right one by one."""
        problems = Problems()
        problems.attempt("student.timesteps", lambda: self.student.sigmas)
        problems.attempt("seed", lambda: checked_seed(self.seed))
        problems.attempt("loop", lambda: self.loop)
        shape = problems.attempt("mesh", lambda: self.mesh_shape(num_devices))
        return problems + list(self.contradictions()) + self._batch_problems(shape)

    def _batch_problems(self, mesh_shape: dict[str, int] | None) -> list[str]:
        for name in ("batch_size", "microbatches"):
            if getattr(self, name) < 1:
                return [f"{name}: must be at least 1, not {getattr(self, name)}"]
        ways = mesh_shape["data"] * mesh_shape["fsdp"] if mesh_shape else 1
        multiple = self.microbatches * ways
        if not self.batch_size % multiple:
            return []
        return [
            f"batch_size: {self.batch_size} is not a multiple of {self.microbatches} microbatches "
            f"x {ways} devices of the mesh's data and fsdp axes; the next one is "
            f"{-(-self.batch_size // multiple) * multiple}"
        ]

    def contradictions(self) -> Iterator[str]:
        """Settings that do not go together."""
        if self.generator_weights not in ("params", "ema"):
            yield f"generator_weights: must be 'params' or 'ema', not {self.generator_weights!r}"
        for name in ("separate_scores", "gather_weights"):
            if self.adapters.used and getattr(self.compute, name):
                yield f"compute.{name}: adapters share one base, which lies where the networks are"
        if self.compute.base_precision != "none" and not self.adapters.used:
            yield "compute.base_precision: without adapters no weights are frozen in all networks"
        if self.sample_every < 0:
            yield f"sample_every: must be 0 (no sample clips) or more, not {self.sample_every}"
        if self.sample_every > 0 and self.sample_clips < 1:
            yield (
                f"sample_clips: must be at least 1, not {self.sample_clips}; sample_every=0 makes "
                "none"
            )

    def untrained_positions(self, name: str, blocks: int) -> Iterator[str]:
        """The student must have been trained as it will be streamed.

        Args:
          name, blocks: the setting that says on how many blocks in a row it is trained.
        """
        s = self.student
        reached = 1 + s.anchors + s.window
        if s.positions != "relative" or reached < blocks:
            return
        text = (
            f"a stream with a window of {s.window} and {s.anchors} anchors reaches block position "
            f"{reached}, {name}={blocks} trains positions up to {blocks - 1}"
        )
        fitting = blocks - 2 - s.anchors
        if fitting >= 1:
            yield f"student.window: {text}; set it to {fitting}, or train on more blocks"
        else:
            warnings.warn(
                f"student.window: {text}; no window is short enough. Train on {3 + s.anchors} "
                "blocks or more for a student that is to be streamed for longer than that",
                stacklevel=2,
            )


@dataclasses.dataclass(frozen=True)
class DMDStage(StageConfig):
    """What the stages of distribution matching have in common.

    Attributes:
      critic_updates: per update of the generator.
      exit_weights: probabilities of the steps at which the student exits, one per timestep; () is
        uniform. Uniform matches the mixture of all exits, (0, ..., 0, 1) the clip after all steps.
      score: the guidance scales are ranges to draw from.
    """

    critic_optimizer: OptimizerConfig = OPTIMIZER
    critic_updates: int = 5
    exit_weights: tuple[float, ...] = ()
    score: ScoreConfig = ScoreConfig(video_cfg=(3.0, 3.0), audio_cfg=(5.0, 5.0))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.critic_updates < 1:
            yield f"critic_updates: must be at least 1, not {self.critic_updates}"
        if self.compute.separate_scores and self.microbatches != 1:
            yield (
                "compute.separate_scores: takes a batch in one piece; microbatches must be 1, not "
                f"{self.microbatches}"
            )
        # whoever shows clean history says that it has this level, and adds no noise
        if self.student.context_noise > 0 and self.score.context == "block_causal":
            yield (
                "student.context_noise: must be 0 with score.context='block_causal', where scores "
                "see a history without noise"
            )


@dataclasses.dataclass(frozen=True)
class StageI(DMDStage):
    """Distribution matching distillation of the bidirectional model."""

    stage: str = "stage1"
    student: StudentConfig = StudentConfig(num_sinks=0)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.student.num_sinks:
            yield "student: num_sinks must be 0 in stage I: the model is bidirectional"


@dataclasses.dataclass(frozen=True)
class StageII(StageConfig):
    """Regression under the block-causal masks."""

    stage: str = "stage2"
    num_steps: int = 3000
    regression: RegressionConfig = RegressionConfig()

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.compute.gather_weights:
            yield "compute.gather_weights: stage II has no rollouts to gather weights for"
        if self.compute.separate_scores:
            yield "compute.separate_scores: stage II has no score networks"
        if self.conditions.gives and self.regression.objective != "flow":
            yield (
                f"conditions: trajectories of the objective {self.regression.objective!r} record "
                "what was given when they were made (launch.ode_pairs --conditions); set t2av to 1"
            )
        if self.student.context_noise > 0 and self.regression.clean_history > 0:
            yield (
                "student.context_noise: must be 0 with regression.clean_history > 0, whose history "
                "has no noise"
            )
        yield from self.untrained_positions("clip.blocks", self.clip.blocks)


@dataclasses.dataclass(frozen=True)
class StageIII(DMDStage):
    """Joint self-forcing.

    Attributes:
      rollout_blocks: if more than clip.blocks, only the last clip.blocks are scored.
    """

    stage: str = "stage3"
    rollout_blocks: int = 6
    detach_history: bool = True

    def __post_init__(self):
        check_fields(self, rollout_blocks=Range(1, 3600))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.conditions.gives and self.rollout_blocks != self.clip.blocks:
            yield (
                f"conditions: what is given is of clip.blocks = {self.clip.blocks} blocks; "
                f"rollout_blocks must be as many, not {self.rollout_blocks}"
            )
        yield from self.untrained_positions("rollout_blocks", self.rollout_blocks)


STAGES = {config.stage: config for config in (StageI, StageII, StageIII)}
