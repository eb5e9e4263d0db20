"""Pre-training of the pocket model, part by part: autoencoders, vocoder, teacher, causal decoder.

    python -m pocket.pretrain --config=pocket/pretrain_config.py:PART

A part's run is in FOLDER/NAME (started again, it goes on), and what it has made is
FOLDER/NAME.safetensors in LTX-2's key layout; NAME is the part's, unless `name` says otherwise.
Parts need those before them. Parts, and what to expect of them:

  video_vae       Reconstruction of 17 frames from anywhere in a clip. 19 dB, which is the empty
                  world, for the first 50 steps; 25 dB after 550, 28 dB after 1,200.
  audio_vae       Reconstruction of spectrograms of 1.3 s. An error of 1.6, which is silence, for
                  the first 20 steps; 0.35 after 100, sides included.
  vocoder         Waveforms from spectrograms; needs audio_vae. 1.5 dB after 160 steps, low tones
                  before high ones; the shipped one is at 10.5 dB after 6,500.
  causal_decoder  The video decoder, fine-tuned to run causally; needs video_vae. Optional.
  teacher         Flow matching of both streams with their captions, the connectors included; needs
                  video_vae, audio_vae and the text tower in FOLDER/gemma (a converted
                  checkpoint_converters.synthetic_gemma). Encodes its clips first. `conditions`
                  mixes in other modes than text alone; every `heldout.every` steps the average's
                  loss on other clips is recorded ("heldout/..." in metrics.jsonl).

pocket.reconstruct judges the autoencoders, pocket.sample the teacher.
"""

import dataclasses

import ml_collections
from flax.traverse_util import flatten_dict

from omniforcing_jax.ranges import SHARE, Range
from omniforcing_jax.training.mixture import ConditionMixture

PARTS = ("video_vae", "audio_vae", "vocoder", "causal_decoder", "teacher")


def all_settings(part: str) -> ml_collections.ConfigDict:
    """Settings that all parts have, and those of this part."""
    c = ml_collections.ConfigDict()
    c.part = c.name = part
    c.size = "pocket"  # of checkpoint_converters.synthetic
    c.folder = "outputs/pocket"
    c.seed = 0
    c.world = ml_collections.ConfigDict({"width": 64, "height": 48, "max_balls": 2})
    c.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 1e-3,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "warmup_steps": 50,
            "end_scale": 0.05,
        }
    )
    c.ema = ml_collections.ConfigDict({"decay": 0.99, "start_step": 100})
    c.log_every = 20
    c.checkpoint_every = 100
    c.tensorboard = False
    return c


_COUNT, _SIZE = Range(1, 2**20), Range(1, 1024)
_RANGES = {
    "seed": Range(0, 2**32 - 1),
    **dict.fromkeys(("width", "height", "frames", "blocks", "batch_size", "unroll"), _SIZE),
    **dict.fromkeys(("num_steps", "log_every", "checkpoint_every", "num_clips"), _COUNT),
    **dict.fromkeys(("samples", "text_length"), _COUNT),
    "max_balls": Range(1, 3),
    **dict.fromkeys(("layers", "heads", "video_head_dim", "audio_head_dim"), _SIZE),
    **dict.fromkeys(("every", "clips"), _COUNT),
    **dict.fromkeys(("uniform", "caption_dropout"), SHARE),
}


def check(c: ml_collections.ConfigDict) -> None:
    """Holds all settings against those of their part.

    Raises:
      ValueError: lists those of another type, that are missing or too many, and numbers that cannot
        be.
    """
    part = c.get("part")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    found, usual = (flatten_dict(x.to_dict(), sep=".") for x in (c, get_config(part)))
    problems = [f"{name}: there is no such setting" for name in sorted(found.keys() - usual.keys())]
    for name, was in usual.items():
        value, numbers = found.get(name), isinstance(was, int | float) and type(was) is not bool
        number = isinstance(value, int | float) and type(value) is not bool
        within = _RANGES.get(name.split(".")[-1], Range(0, 1e9))
        if numbers and (
            not number or value not in within or (type(was), type(value)) == (int, float)
        ):
            whole = "a whole number, " * isinstance(was, int)
            problems.append(f"{name}: must be {whole}{within}, not {value!r}")
        elif not numbers and not isinstance(value, type(was)):
            problems.append(f"{name}: must be {type(was).__name__}, not {value!r}")
    if problems:
        raise ValueError("\n".join(["the config cannot be run:", *problems]))


def get_config(part: str) -> ml_collections.ConfigDict:
    """The config of a part; see the module's docstring."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    c = all_settings(part)
    if part == "video_vae":
        c.batch_size, c.num_steps, c.frames = 4, 2400, 17
        c.optimizer.learning_rate = 1.5e-3
        c.latents = ml_collections.ConfigDict({"noise": 0.1, "penalty": 1e-3})
        c.error = ml_collections.ConfigDict({"absolute": 0.3, "square": 10.0})
    elif part == "causal_decoder":
        c.batch_size, c.num_steps, c.frames = 4, 600, 25
        c.latents = ml_collections.ConfigDict({"noise": 0.1, "penalty": 0.0})
        c.error = ml_collections.ConfigDict({"absolute": 0.3, "square": 10.0})
        c.optimizer.learning_rate = 3e-4
    elif part == "audio_vae":
        c.batch_size, c.num_steps, c.samples = 4, 1200, 20_480
        c.optimizer.learning_rate = 2e-3
        c.error = ml_collections.ConfigDict({"absolute": 0.3, "square": 0.1})
        c.latents = ml_collections.ConfigDict({"noise": 0.1, "penalty": 1e-3})
    elif part == "vocoder":
        c.batch_size, c.num_steps, c.samples = 8, 2400, 8_000
        c.optimizer.learning_rate = 2e-3
        c.loss = ml_collections.ConfigDict({"waveform": 4.0})
    else:
        c.batch_size, c.num_steps = 4, 10_000
        c.clip = ml_collections.ConfigDict({"blocks": 3, "layout": "prefix", "frame_rate": 24.0})
        c.num_clips, c.text_length = 4096, 48
        c.model = ml_collections.ConfigDict(
            {"layers": 6, "heads": 4, "video_head_dim": 32, "audio_head_dim": 16}
        )
        c.conditions = ml_collections.ConfigDict(dataclasses.asdict(ConditionMixture()))
        c.heldout = ml_collections.ConfigDict({"every": 2000, "clips": 64})  # a multiple of 16
        c.guidance = 1.5  # classifier-free, of both streams: what the teacher is to be sampled with
        c.unroll = 6  # layers compiled as one, all here
        c.init = ""  # folder of another teacher run, whose average this one starts from
        c.loss = ml_collections.ConfigDict(
            {"video": 1.0, "audio": 1.0, "shift": 1.0, "uniform": 0.1, "caption_dropout": 0.1}
        )
        c.optimizer.learning_rate = 1e-3
        c.optimizer.weight_decay = 0.01
        c.ema = ml_collections.ConfigDict({"decay": 0.998, "start_step": 500})
        c.log_every, c.checkpoint_every = 100, 500
    return c
