"""What a model was trained with: the entry "trained" of a checkpoint's config.json.

It decides how the pictures come out and cannot be seen in the weights: a model that learnt from 48
text tokens makes wrong colours and pitches of 1024, without an error. So it goes with the weights
from the training run through every conversion, and whoever samples them takes it as the default.
The mode in which video is decoded is not here: the video VAE's own section says it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from omniforcing_jax.blocks import LAYOUT_NAMES, BlockLayout
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import MODES
from omniforcing_jax.sampling.guidance import NO_GUIDANCE, AVGuidance, Guidance
from omniforcing_jax.sampling.kv_cache import POSITIONS, CacheConfig

ENTRY = "trained"
STAGES = ("base", "distilled", "stage1", "stage2", "stage3", "released")
# What LTX-2 is sampled with where a checkpoint does not say what it was trained with.
LTX2_CLIP = {
    "text_length": 1024,
    "frame_rate": 24.0,
    "height": 512,
    "width": 768,
    "frames": 121,
}
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class TrainedSettings:
    """What a model was trained with; None where nobody said.

    Attributes:
      stage: "base" (a bidirectional model, before distillation), "distilled" (LTX-2's own distilled
        model), "stage1", "stage2", "stage3", or "released" (OmniForcing's own weights).
      layout: how a block-causal student cuts time into blocks; None is a bidirectional model.
      timesteps: of a distilled model's denoising steps, without the final 0.
      schedule: whose nearest noise levels these stand for; see `flow.schedule`.
      window, anchors, positions: of the student's cache; see `CacheConfig`.
      context_noise: noise level at which its finished blocks write their keys and values.
      text_length: tokens per prompt, padding included.
      frame_rate: frames per second.
      height, width: of the video, in pixels.
      frames: of a training clip.
      guidance: scales to sample with; none once a model was distilled from a guided one.
      distilled_cfg: ranges (video, audio) of the classifier-free guidance of the teacher that it
        was distilled from.
      modes: in which it was trained (`sampling.conditions.MODES`); None is text alone, or nobody
        said.

    Raises:
      ValueError: a value that cannot be.
    """

    stage: str | None = None
    layout: str | None = None
    timesteps: tuple[float, ...] | None = None
    schedule: str = "ltx2"
    window: int | None = None
    anchors: int | None = None
    positions: str | None = None
    context_noise: float = 0.0
    text_length: int | None = None
    frame_rate: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: AVGuidance | None = None
    distilled_cfg: tuple[Interval, Interval] | None = None
    modes: tuple[str, ...] | None = None

    def __post_init__(self):
        def check(name: str, fits: bool, what: str) -> None:
            if not fits and (name == "context_noise" or getattr(self, name) is not None):
                raise ValueError(f"{ENTRY}.{name} must be {what}, not {getattr(self, name)!r}")

        def whole(name: str, least: int) -> None:
            value = getattr(self, name)
            fits = type(value) is int and least <= value < 2**31
            check(name, fits, f"a whole number from {least} on")

        check("stage", self.stage in STAGES, f"one of {', '.join(STAGES)}")
        check("layout", self.layout in LAYOUT_NAMES, f"one of {', '.join(LAYOUT_NAMES)}")
        check("positions", self.positions in POSITIONS, f"one of {', '.join(POSITIONS)}")
        for name in ("window", "text_length", "height", "width", "frames"):
            whole(name, 1)
        whole("anchors", 0)
        rate = self.frame_rate
        check("frame_rate", _is_number(rate) and rate > 0, "a positive number")
        noise = self.context_noise
        check("context_noise", _is_number(noise) and 0 <= noise < 1, "in [0, 1)")
        if self.timesteps is not None:
            numbers = isinstance(self.timesteps, tuple) and all(map(_is_number, self.timesteps))
            check("timesteps", numbers, "a list of numbers")
            flow.student_sigmas(self.timesteps, flow.schedule(self.schedule))
        if self.causal and rate is not None:
            BlockLayout.from_name(self.layout, frame_rate=rate)
        ranges = self.distilled_cfg
        fits = _is_pair(ranges) and all(
            _is_pair(one) and all(map(_is_number, one)) for one in ranges
        )
        check("distilled_cfg", fits, "two ranges (low, high), of video and sound")
        known = isinstance(self.modes, tuple) and all(mode in MODES for mode in self.modes)
        check("modes", known, f"a list of any of {', '.join(MODES)}")

    @property
    def causal(self) -> bool:
        """Whether it is a block-causal student, which can be streamed, or bidirectional."""
        return self.layout is not None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """The entry of a converted checkpoint's config.json.

        Raises:
          ValueError: a value that cannot be, or an unknown one.
        """
        if content.get("student"):
            raise ValueError(
                "config.json was written by an earlier version, which did not keep all that the "
                "model was trained with; convert the weights, or export the run, again"
            )
        return cls.from_json(content.get(ENTRY, {}))

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The inverse of `to_json`.

        Raises:
          ValueError: see `read`.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or (unknown := sorted({*values} - {*names})):
            found = f"has {', '.join(unknown)}" if isinstance(values, Mapping) else repr(values)
            raise ValueError(f"{ENTRY} {found}; it is an object with any of {', '.join(names)}")
        found = {name: _tuples(value) for name, value in values.items()}
        if found.get("guidance") is not None:
            found["guidance"] = _guidance(found["guidance"])
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"{ENTRY}: {error}") from None

    @classmethod
    def of_run(cls, config: Mapping[str, Any]) -> Self:
        """Of what a training run made, from the configuration in its config.json.

        Raises:
          ValueError, KeyError: it is not that of a stage.
        """
        clip, student, stage = config["clip"], config["student"], config["stage"]
        causal = stage != "stage1"
        layout = BlockLayout.from_name(clip["layout"], frame_rate=clip["frame_rate"])
        values = {
            "stage": stage,
            "timesteps": student["timesteps"],
            "schedule": student.get("schedule", "ltx2"),  # of a run from before there were two
            "text_length": config.get("text_length"),
            "frame_rate": clip["frame_rate"],
            "height": clip["height"],
            "width": clip["width"],
            "frames": layout.pixel_frames(clip["blocks"]),
            "guidance": _guidance_to_json(NO_GUIDANCE),
        }
        if causal:
            values["layout"] = clip["layout"]
            values |= {name: student[name] for name in ("window", "anchors", "positions")}
            values["context_noise"] = student["context_noise"]
        if "score" in config:
            scales = (config["score"]["video_cfg"], config["score"]["audio_cfg"])
            values["distilled_cfg"] = [_range(scale) for scale in scales]
        shares = config.get("pairs_conditions") or config.get("conditions", {})
        modes = [mode for mode in MODES if shares.get(mode)]
        if modes not in ([], ["t2av"]):
            values["modes"] = modes
        return cls.from_json(values)

    def untrained_mode(self, mode: str) -> str | None:
        """What to tell a user of a student that is sampled in a mode it was not trained in."""
        ltx2 = self.stage in (None, "base", "distilled")  # which can do all of them
        if ltx2 or mode == "t2av" or mode in (self.modes or ()):
            return None
        return (
            f"this student was not trained in mode {mode}, so expect less of it; "
            f"--config.conditions.{mode} of the stages trains one"
        )

    def to_json(self) -> dict[str, Any]:
        """What is known, for config.json and for a safetensors file's metadata."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        if self.guidance is not None:
            values["guidance"] = _guidance_to_json(self.guidance)
        return {name: _lists(value) for name, value in values.items()}

    def filled(self) -> Self:
        """With LTX-2's text length, size, rate and length of a clip where nobody said."""
        unsaid = {name: x for name, x in LTX2_CLIP.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unsaid)

    def cache(
        self,
        layout: BlockLayout,
        window: int | None = None,
        anchors: int | None = None,
        positions: str | None = None,
    ) -> CacheConfig:
        """A rolling cache: as asked for, else as the student was trained, else of 7 blocks.

        Raises:
          ValueError: as `CacheConfig`.
        """
        chosen = {
            "window": self.window if window is None else window,
            "anchors": self.anchors if anchors is None else anchors,
            "positions": self.positions if positions is None else positions,
        }
        return CacheConfig(layout, **{name: x for name, x in chosen.items() if x is not None})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _range(scale: float | Sequence[float]) -> Sequence[float]:
    return scale if isinstance(scale, Sequence) else (scale, scale)


def _guidance(values: Any) -> AVGuidance:
    try:
        return AVGuidance(**{name: Guidance(**scales) for name, scales in values.items()})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{ENTRY}.guidance: {error}") from None


def _guidance_to_json(guidance: AVGuidance) -> dict[str, Any]:
    return {name: _lists(dataclasses.asdict(scales)) for name, scales in guidance._asdict().items()}


def _tuples(value: Any) -> Any:
    """As JSON gives it, with its lists as tuples."""
    if isinstance(value, Mapping):
        return {name: _tuples(x) for name, x in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    """For JSON: tuples as lists."""
    if isinstance(value, Mapping):
        return {name: _lists(x) for name, x in value.items()}
    return list(map(_lists, value)) if isinstance(value, list | tuple) else value


UNSAID = TrainedSettings()
LTX2_DISTILLED = TrainedSettings(
    stage="distilled",
    timesteps=tuple(1000 * sigma for sigma in flow.DISTILLED_SIGMAS[:-1]),
    schedule="distilled",
    text_length=LTX2_CLIP["text_length"],
    guidance=NO_GUIDANCE,
)
# What LTX-2's own files mean, which say nothing.
LTX2_BASE = TrainedSettings(stage="base", text_length=LTX2_CLIP["text_length"])
