"""Settings of a stream that fit into the memory that is there, for launch.stream."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from launch import options
from omniforcing_jax import PipelineConfig, RolloutConfig
from omniforcing_jax.io import checkpoints
from omniforcing_jax.io.checkpoints import TINY_DECODER
from omniforcing_jax.scaling import fitting
from omniforcing_jax.scaling.devices import GIB, memory_bytes
from omniforcing_jax.scaling.fitting import USABLE, StreamNeeds, StreamSettings


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Adds --fit; see `fit`."""
    parser.add_argument(
        "--fit", action="store_true",
        help="choose --quantize, --cache-dtype, --window and --decode tiny, where they are not "
        "given, for the memory that is there",
    )  # fmt: skip


def fit(
    args: argparse.Namespace,
    config: PipelineConfig,
    rollout: RolloutConfig,
    *,
    encoders: bool,
    ways: int = 1,
) -> tuple[RolloutConfig, list[str]]:
    """Holds what a stream needs against the device's memory, and with --fit changes `args` so that
    it fits.

    Args:
      rollout: as asked for.
      encoders: whether the VAEs' encoders are loaded, too.
      ways: devices of --mesh.

    Returns:
      The rollout, and what a user should know, a line each.

    Raises:
      ValueError: the weights alone are more than there is, or with --fit nothing fits, or the text
        encoder is kept.
    """
    if args.fit and args.keep_encoder:
        raise ValueError("--fit counts on a text encoder that is unloaded: leave --keep-encoder")
    stream = _Stream(args, config, rollout, encoders, ways)
    there = memory_bytes()
    room, first = USABLE * there, stream.needs(stream.asked)
    if first.total <= room and not args.fit:
        return rollout, []
    chosen, found = stream.asked, first
    for chosen in stream.ladder():
        found = stream.needs(chosen)
        if found.total <= room:
            break
    fits, changes = found.total <= room, _words(stream.asked, chosen)
    where = f"{there / GIB:.1f} GiB, of which {room / GIB:.1f} can be used"
    if not args.fit:
        advice = f"--fit would choose {changes}" if fits else "nothing would fit"
        text = f"the stream takes some {first.total / GIB:.1f} GiB ({first}) of {where}: {advice}"
        if first.weights > there:
            raise ValueError(text)
        return rollout, [text]
    if not fits:
        raise ValueError(
            f"nothing fits into {where}: at the least a stream takes {found.total / GIB:.1f} GiB "
            f"({found}), with {changes}; weights in 4 bits there are none: take a larger device, "
            "--mesh tensor=2, or a smaller --height and --width"
        )
    args.quantize, args.cache_dtype, args.window = (
        chosen.quantize, chosen.cache_dtype, chosen.window,
    )  # fmt: skip
    args.decode = "tiny" if chosen.tiny else args.decode
    cache = dataclasses.replace(rollout.cache, window=chosen.window, dtype=chosen.cache_dtype)
    text = f"--fit: {changes}: {found.total / GIB:.1f} GiB ({found}) of {where}"
    return dataclasses.replace(rollout, cache=cache), [text]


class _Stream:
    """What `fitting` asks of a command line.

    Attributes:
      asked: its settings as they are given, or as trained.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: PipelineConfig,
        rollout: RolloutConfig,
        encoders: bool,
        ways: int,
    ):
        self._args, self._config, self._rollout, self._ways = args, config, rollout, ways
        cache, dtype = rollout.cache, options.compute_dtype(args)
        self.asked = StreamSettings(args.quantize, cache.dtype, cache.window, args.decode == "tiny")
        self._shapes = checkpoints.param_shapes(args.checkpoint, "transformer")
        size = jnp.dtype(dtype).itemsize

        def count(component: str) -> int:
            shapes = checkpoints.param_shapes(args.checkpoint, component)
            kept = {name: tree for name, tree in shapes.items() if encoders or name != "encoder"}
            return sum(x.size for x in jax.tree.leaves(kept))

        tiny = count(TINY_DECODER) if config.tiny_decoder is not None else 0
        sound = count("audio_vae") * size + count("vocoder") * 4
        self._decoders = {"video": count("video_vae") * size, "tiny": tiny * size, "sound": sound}

    def needs(self, settings: StreamSettings) -> StreamNeeds:
        """Bytes of each device."""
        args, config = self._args, self._config
        latents = self._rollout.cache.layout.video_frames + args.look_back + args.look_ahead
        return fitting.needs(
            config,
            self._rollout,
            settings,
            self._shapes,
            self._decoders,
            dtype=options.compute_dtype(args),
            text_length=args.text_length or config.trained.filled().text_length,
            latents=latents,
            ways=self._ways,
        )

    def ladder(self):
        """Settings to try."""
        args, tiny = self._args, self._config.tiny_decoder is not None
        given = {
            "quantize": args.quantize != "none",
            "cache_dtype": args.cache_dtype is not None,
            "window": args.window is not None,
            "tiny": args.decode is not None,
        }
        free = {name for name, is_given in given.items() if not is_given}
        as_filed = checkpoints.float8_scales(args.checkpoint)  # fp8 is what such weights are
        how = {"precision": "fp8" if as_filed else "int8", "tiny": tiny}
        return fitting.ladder(self.asked, free, **how)


def _words(asked: StreamSettings, chosen: StreamSettings) -> str:
    """What is otherwise than asked for, as options."""
    words = []
    if chosen.quantize != asked.quantize:
        words.append(f"--quantize {chosen.quantize}")
    if chosen.cache_dtype != asked.cache_dtype:
        words.append(f"--cache-dtype {chosen.cache_dtype}")
    if chosen.window != asked.window:
        words.append(f"--window {chosen.window}")
    if chosen.tiny != asked.tiny:
        words.append("--decode tiny")
    return " ".join(words) or "everything as it is"
