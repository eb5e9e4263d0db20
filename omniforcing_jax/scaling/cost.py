"""What a training step costs: operations, bytes between devices and from memory, and so time.

In the notation of sharding arithmetic, a product of B x E activations with E x M weights is

    B_{fsdp,sequence} x E  *  E_{fsdp,sequence} x M_tensor

(the tokens of the video, part of B, lie over `sequence`): the weights' E is gathered, and the
result's M stays split over `tensor`. So a network is gathered once in every pass over it, and its
gradient is reduced and scattered once; these are the messages that grow with the model.
docs/scaling.md derives the rest.
"""

import dataclasses
import math

import jax.numpy as jnp

from omniforcing_jax.scaling import flops
from omniforcing_jax.scaling.devices import Device
from omniforcing_jax.training.config.experiment import Experiment
from omniforcing_jax.types import DTYPES


@dataclasses.dataclass(frozen=True)
class Work:
    """What one update of a network, or one step of a program, asks of all devices together.

    Attributes:
      flops: operations of the mathematics: forward 1, backward 2.
      repeated: operations done a second time, by rematerialisation or a blockwise backward pass.
      gathers: passes for which the weights of a network are gathered, or read.
      reductions: whole gradients that are reduced.
      passes: (tokens of a sample's video, how often) of the passes over activations; a backward
        pass counts as two, and one that is done again counts again.
    """

    flops: float
    repeated: float
    gathers: float
    reductions: float
    passes: tuple[tuple[int, float], ...]

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.repeated + other.repeated,
            self.gathers + other.gathers,
            self.reductions + other.reductions,
            self.passes + other.passes,
        )

    def __mul__(self, factor: float) -> "Work":
        return Work(
            self.flops * factor,
            self.repeated * factor,
            self.gathers * factor,
            self.reductions * factor,
            tuple((tokens, count * factor) for tokens, count in self.passes),
        )


def updates(e: Experiment) -> dict[str, Work]:
    """The work of an update of each network: {"generator", "critic"}, or {"generator"}.

    A rollout counts the steps until its average exit. Stage I simulates until the last sample of
    the batch has exited, which with many samples is all steps.
    """
    c = e.config
    text = e.data.manifest.text_length
    remat = c.compute.remat != "none"
    if c.stage == "stage2":
        one = _clip_flops(e, e.student, text) + _text(e.student, text)
        return {"generator": _gradient(e, one, e.clip.video_tokens, remat) * c.microbatches}
    clip = _clip_flops(e, e.teacher, text) + _text(e.teacher, text)
    score = _forward(e, clip, e.clip.video_tokens)
    if c.score.context == "block_causal":
        block_pass = _rollout_pass(e, e.teacher, e.config.clip.blocks, text)
        score = _blocks(e, block_pass, e.config.clip.blocks) * 2
    steps = len(e.sigmas) - 1
    if c.stage == "stage1":
        sample = _forward(e, clip, e.clip.video_tokens) * steps
        last = _gradient(e, clip, e.clip.video_tokens, remat)
        last = dataclasses.replace(last, flops=last.flops * 2 / 3, gathers=last.gathers - 1)
    else:
        whole = _rollout_pass(e, e.student, c.rollout_blocks, text)
        sample = _blocks(e, whole, c.rollout_blocks) * ((steps + 1) / 2 + 1)
        scored = _blocks(e, whole * c.clip.blocks / c.rollout_blocks, c.clip.blocks)
        last = Work(
            2 * scored.flops,
            (1 + remat) * scored.flops,
            2 * scored.gathers,
            1,
            tuple((tokens, (3 + remat) * count) for tokens, count in scored.passes),
        )
    # all passes of the teacher are one of as many times the rows: one gather
    scores = score * (1 + len(c.score.passes()))
    scores = dataclasses.replace(scores, gathers=2 * score.gathers)
    critic = _gradient(e, clip, e.clip.video_tokens, remat)
    per_microbatch = {"generator": sample + last + scores, "critic": sample + critic}
    if c.compute.gather_weights:
        for name in per_microbatch:
            work = per_microbatch[name]
            fewer = work.gathers - sample.gathers + 1 / c.microbatches
            per_microbatch[name] = dataclasses.replace(work, gathers=fewer)
    return {name: work * c.microbatches for name, work in per_microbatch.items()}


def step(e: Experiment) -> Work:
    """The work of an average training step."""
    work = updates(e)
    if "critic" not in work:
        return work["generator"]
    return work["critic"] + work["generator"] * (1 / e.config.critic_updates)


def _rows(e: Experiment) -> float:
    return e.config.batch_size / e.config.microbatches


def _forward(e: Experiment, flops_of_sample: float, tokens: int) -> Work:
    return Work(_rows(e) * flops_of_sample, 0.0, 1.0, 0.0, ((tokens, 1.0),))


def _gradient(e: Experiment, flops_of_sample: float, tokens: int, remat: bool) -> Work:
    one = _rows(e) * flops_of_sample
    return Work(3 * one, remat * one, 2.0, 1.0, ((tokens, 3.0 + remat),))


def _blocks(e: Experiment, flops_of_sample: float, blocks: int) -> Work:
    """A pass over each of so many blocks, one after the other."""
    tokens = e.layout.video_frames * e.clip.patches
    return Work(_rows(e) * flops_of_sample, 0.0, blocks, 0.0, ((tokens, float(blocks)),))


def _text(config, text: int) -> int:
    return flops.text_flops(config, text)


def _rollout_pass(e: Experiment, config, blocks: int, text: int) -> float:
    """One pass over every block, as operations of a sample."""
    passes = e.rollout.num_steps + 1
    return sum(flops.block_flops(config, e.rollout, b, text) / passes for b in range(blocks))


def _clip_flops(e: Experiment, config, text: int) -> int:
    """One pass over the clip. Under block-causal masks, half of the attention is left out."""
    video, audio = e.clip.video_tokens, e.clip.audio_frames + config.num_audio_sinks
    blocks = e.config.clip.blocks
    keys = (blocks + 1) / 2 / blocks if e.config.stage == "stage2" else 1.0
    return flops.forward_flops(
        config,
        video_tokens=video,
        audio_tokens=audio,
        video_keys=round(video * keys),
        audio_keys=round(audio * keys),
        text_tokens=text,
    )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device takes in during a step, by the axis over which they travel.

    `fsdp` are the weights and gradients, which travel over `sequence` as well.
    """

    fsdp: float
    data: float
    sequence: float
    tensor: float


def traffic(e: Experiment, work: Work, weights: int) -> Traffic:
    """What `work` sends between devices.

    Args:
      weights: parameters of a network.
    """
    shape, config = e.mesh_shape, e.teacher
    size = jnp.dtype(e.dtype).itemsize
    held = weights * size / shape["tensor"]  # of a network once it is gathered
    reduced = held * jnp.dtype(DTYPES[e.config.compute.reduce_dtype]).itemsize / size
    ways = shape["fsdp"] * shape["sequence"]
    fsdp = (work.gathers * held + work.reductions * reduced) * (ways - 1) / ways
    # gradients are scattered already when the copies of `data` are added up: there and back
    data = work.reductions * 2 * reduced / ways * (shape["data"] - 1) / shape["data"]
    samples = _rows(e) / (shape["data"] * shape["fsdp"])
    tokens = sum(tokens * count for tokens, count in work.passes) * samples
    d, c = config.video_dim, config.audio_dim
    n = shape["sequence"]
    # queries, keys, values and outputs of the self-attention; of the text attention and the one to
    # the audio queries and outputs; keys and values of the one from the audio
    exchanged = 4 * d + 2 * d + 2 * c + 2 * c
    sequence = config.num_layers * tokens / n * exchanged * size / shape["tensor"] * (n - 1) / n
    t = shape["tensor"]
    # four products per layer end in a sum over tensor, of which each device gets all of it
    summed = 4 * d
    tensor = config.num_layers * tokens / n * summed * size * 2 * (t - 1) / t
    return Traffic(fsdp, data, sequence, tensor)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step: lower bounds of its parts, and two estimates of the whole.

    Attributes:
      compute: operations, repeated ones included, at the peak of the hardware.
      memory: reading weights (and, after an update, states) at the memory's speed.
      communication: messages at the links' speed, the axes one after the other.
    """

    compute: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        """The slowest part alone: a lower bound."""
        return max(self.compute, self.memory, self.communication)

    @property
    def summed(self) -> float:
        """Nothing overlaps, at 60 % of the peak: what one may hope for without tuning."""
        return self.compute / ACHIEVABLE + self.communication


# Share of the peak that large matrix products reach on today's accelerators.
ACHIEVABLE = 0.6


def times(
    work: Work,
    device: Device,
    devices: int,
    *,
    weights_bytes: float,
    state_bytes: float,
    communication: float,
) -> Times:
    """Times of `work` on so many devices.

    Args:
      weights_bytes: of a network as a device reads it in a pass.
      state_bytes: read or written by an update of its parameters.
      communication: seconds, from messages and speeds.
    """
    compute = (work.flops + work.repeated) / devices / device.flops
    memory = (work.gathers * weights_bytes + work.reductions * state_bytes) / device.hbm_speed
    return Times(compute, memory, communication)


def model_flops_utilisation(work: Work, seconds: float, device: Device, devices: int) -> float:
    """MFU: useful operations over what the hardware could have done."""
    return work.flops / (seconds * devices * device.flops) if seconds else math.nan
