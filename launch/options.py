"""Options that several programs share: how they are declared, checked, and turned into objects."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import Mesh
from rich.console import Console

from omniforcing_jax import AVGuidance, PipelineConfig, PromptEncoder
from omniforcing_jax.distributed.partitioning import make_mesh, parse_mesh
from omniforcing_jax.io import checkpoints, outputs
from omniforcing_jax.models import quantization
from omniforcing_jax.ops.attention import IMPLEMENTATIONS
from omniforcing_jax.pipeline import check_split
from omniforcing_jax.sampling.kv_cache import DTYPES as CACHE_DTYPES
from omniforcing_jax.sampling.kv_cache import POSITIONS
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.scaling.devices import check_products
from omniforcing_jax.streaming import media
from omniforcing_jax.streaming.video import MODES
from omniforcing_jax.text import features as text_features
from omniforcing_jax.text.features import TextFeatures
from omniforcing_jax.text.prompts import TextTimes, default_cache
from omniforcing_jax.types import DTYPES

NO_CACHE = "none"
_RANDOM_TOKENS = 128
_SOURCES = ("--text-encoder", "--features", "--random-features")
_ENCODER_OPTIONS = ("--prompt-cache", "--quantize-encoder", "--text-length", "--keep-encoder")


def parse_flags(argv: list[str] | None = None) -> None:
    """Reads the flags of a program that has a config file; --config is required.

    Args:
      argv: words of the command line, None takes the process's.

    Raises:
      absl.flags.Error, ValueError: a flag, the config file or one of its settings is wrong.
    """
    logging.use_absl_handler()
    app.define_help_flags()
    flags.mark_flag_as_required("config")
    try:
        rest = flags.FLAGS([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])
    except flags.Error as error:
        if "Traceback" not in str(error):
            raise
        # of a config file that raises; the last line says what
        raise ValueError(f"--config: {str(error).strip().splitlines()[-1]}") from error
    except (KeyError, TypeError, AttributeError, OSError, SyntaxError, ImportError) as error:
        raise ValueError(f"--config: {error}") from error
    if len(rest) > 1:
        raise ValueError(f"what is {rest[1]!r} for? flags are written --name=value")


def add_text_encoder(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds the options of the text encoder."""
    add = parser.add_argument
    add(
        "--text-encoder", metavar="FOLDER", required=required,
        help="converted Gemma, which encodes --prompt; from checkpoint_converters.gemma3 (.gemma4 "
        "for LTX-2.5)",
    )  # fmt: skip
    add("--quantize-encoder", choices=quantization.MODES, help="its weights (default none)")
    add("--text-length", type=int, help="tokens per prompt (default: as trained, else 1024)")
    add(
        "--prompt-cache", metavar="FOLDER",
        help=f"where encoded prompts are kept (default: in the user's cache; {NO_CACHE}: nowhere)",
    )  # fmt: skip


def add_text_source(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the text encoder and --random-features."""
    add_text_encoder(parser)
    parser.add_argument(
        "--random-features", action="store_true", help="stand-in contexts for random weights"
    )


def add_clip_file(parser: argparse.ArgumentParser) -> None:
    """Adds --output and --overwrite of a clip."""
    parser.add_argument("--output", required=True, help="MP4 file, or - for standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def check_clip_output(args: argparse.Namespace, program: str) -> None:
    """Checks --output of a program before anything is read.

    Raises:
      ValueError: no place for a clip, or a file that exists, unless --overwrite is given and it is
        this program's and none of its inputs.
    """
    media.check_output_path(args.output)
    if args.output != media.STDOUT:
        settings = {"program": program, "overwrite": args.overwrite}
        outputs.check(args.output, **settings, inputs=_inputs(args))


def _inputs(args: argparse.Namespace) -> list[str]:
    """Every file and folder that a clip's program is told to read."""
    given = vars(args)
    features = given.get("features") or []
    features = [features] if isinstance(features, str) else list(features)
    if features:
        features += [spec.rpartition("@")[0] for spec in features]
        features += [file for _, file in given.get("at") or []]
    reference = given.get("reference") or []
    names = ("checkpoint", "text_encoder", "negative_features", "image", "audio", "video",
             "upsampler", "refiner")  # fmt: skip
    found = [
        *(given.get(name) for name in names),
        *(file for file, _ in given.get("loras") or []),
        *features,
        *([reference] if isinstance(reference, str) else reference),
        *(picture for picture, _ in given.get("keyframe") or []),
    ]
    return [path for path in found if path]


def add_size(parser: argparse.ArgumentParser) -> None:
    """Adds --height, --width and --fps; see `use_trained`."""
    add = parser.add_argument
    add("--height", type=int, help="pixels, a multiple of 32 (default: as trained, else 512)")
    add("--width", type=int, help="pixels, a multiple of 32 (default: as trained, else 768)")
    add("--fps", type=float, help="frames per second (default: as trained, else 24)")


# Options that are by default what a model was trained with: names in `TrainedSettings`.
_TRAINED = {
    "text_length": "text_length",
    "height": "height",
    "width": "width",
    "fps": "frame_rate",
    "frames": "frames",
    "layout": "layout",
    "window": "window",
    "anchors": "anchors",
    "positions": "positions",
    "timesteps": "timesteps",
}


def use_trained(args: argparse.Namespace, trained: TrainedSettings) -> list[str]:
    """Fills in size and rate that were not given, as the model was trained.

    Returns:
      The options that are given and are otherwise than in training, see `deviation`.
    """
    changed = []
    for option, name in _TRAINED.items():
        given, usual = getattr(args, option, None), getattr(trained, name)
        given = tuple(given) if isinstance(given, list) else given
        if given is not None and usual is not None and given != usual:
            changed.append(deviation(option, given, usual))
    filled = trained.filled()
    for option in ("height", "width", "fps"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(filled, _TRAINED[option]))
    return changed


def deviation(option: str, given: Any, usual: Any) -> str:
    """Words for an option that is given, and is otherwise in training."""

    def words(value: Any) -> str:
        values = value if isinstance(value, tuple) else (value,)
        return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)

    return f"--{option.replace('_', '-')} {words(given)}, not {words(usual)}"


def list_deviations(changed: list[str]) -> list[str]:
    """One line about the options that are otherwise than in training, or none."""
    return [f"otherwise than the model was trained: {'; '.join(changed)}"] if changed else []


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the rolling cache; see `TrainedSettings.cache`."""
    add = parser.add_argument
    add("--window", type=int, help="recent blocks in the cache (default: as trained, else 7)")
    add("--anchors", type=int, help="first blocks never evicted (default: as trained, else 0)")
    add("--positions", choices=POSITIONS, help="default: as trained, else relative")


def add_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --cache-dtype; see `CacheConfig`."""
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="of keys and values (default: as computed)"
    )


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the streaming video decoder."""
    add = parser.add_argument
    add("--decode", choices=MODES, help="video decoding (default: as trained)")
    add("--look-back", type=int, default=0, help="latent frames, window mode (default 0)")
    add("--look-ahead", type=int, default=2, help="latent frames, window mode (default 2)")
    add("--blend", type=int, default=0, help="latent frames, window mode (default 0)")


def decoder_settings(args: argparse.Namespace) -> dict[str, int]:
    """Arguments of `StreamingVideoDecoder` besides its mode."""
    return {"look_back": args.look_back, "look_ahead": args.look_ahead, "blend": args.blend}


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Adds the scales of guidance; see `change_guidance`."""
    add = parser.add_argument
    add("--cfg-video", type=float, help="guidance by the negative prompt, 1 is off (default 3)")
    add("--cfg-audio", type=float, help="the same for the sound (default 7)")
    add("--stg", type=float, help="spatio-temporal guidance, 0 is off (default 1)")
    add("--stg-block", type=int, nargs="+", help="blocks it perturbs (2.0: 29, 2.3: 28)")
    add("--modality", type=float, help="modality guidance, 1 is off (default 3)")
    add("--rescale", type=float, help="pull-back of the contrast, 0 to 1 (default 0.7)")


def change_guidance(args: argparse.Namespace, defaults: AVGuidance) -> AVGuidance:
    """The defaults, except for the scales that the command line gives."""
    return defaults.changed(
        cfg_video=args.cfg_video,
        cfg_audio=args.cfg_audio,
        stg=args.stg,
        modality=args.modality,
        rescale=args.rescale,
        stg_blocks=args.stg_block and tuple(args.stg_block),
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype; see `compute_dtype`."""
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: bfloat16 on accelerators, else float32"
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Adds --quantize; see `load_pipeline` and `check_products`."""
    parser.add_argument(
        "--quantize", choices=("none", *quantization.PRECISIONS), default="none",
        help="the transformer's weights in 8 bits; with w8a8, its products, too (default none)",
    )  # fmt: skip


def check_precision(args: argparse.Namespace) -> list[str]:
    """What a user should know of --quantize, a line each.

    Raises:
      ValueError: the device lacks it.
    """
    check_products(args.quantize, jax.local_devices()[0].device_kind)
    if "int8" in args.quantize and checkpoints.float8_scales(args.checkpoint):
        text = "weights were float8 in their file and are rounded once more; fp8 keeps them"
        return [f"--quantize {args.quantize}: {text}"]
    return []


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh; see `find_mesh`."""
    parser.add_argument(
        "--mesh", default="1", metavar="tensor=N",
        help="split the transformer's heads and hidden units over N devices (default: one)",
    )  # fmt: skip


def find_mesh(args: argparse.Namespace, config: PipelineConfig) -> Mesh | None:
    """The devices of --mesh; None for one.

    Raises:
      ValueError: not so many devices, or a model or precision that cannot be split over them.
    """
    shape = {"tensor": 1} | parse_mesh(args.mesh)
    check_split(config, shape, args.quantize)
    ways, devices = shape["tensor"], jax.local_devices()
    if ways > len(devices):
        raise ValueError(f"--mesh tensor={ways}: there are {len(devices)} devices")
    return make_mesh(tensor=ways, devices=devices[:ways]) if ways > 1 else None


def loading(args: argparse.Namespace) -> str:
    """Says what is loaded, in which precision, and where."""
    precision = compute_dtype(args).__name__
    if args.quantize != "none":
        precision += f" and {args.quantize}"
    ways = ({"tensor": 1} | parse_mesh(args.mesh))["tensor"]
    place = jax.devices()[0] if ways == 1 else f"{ways} x {jax.devices()[0].device_kind}"
    return f"loading {args.checkpoint} as {precision} on {place}"


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Adds --no-verify, as `args.verify`."""
    parser.add_argument(
        "--no-verify", action="store_false", dest="verify",
        help="load weights without comparing the files with their checksums",
    )  # fmt: skip


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Adds --attention."""
    parser.add_argument(
        "--attention", choices=IMPLEMENTATIONS, default="auto", help="backend (default auto)"
    )


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes (TPU pod, Slurm, …)",
    )


def dtype_name(args: argparse.Namespace) -> str:
    """--dtype, or the name of what suits the device."""
    return args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def compute_dtype(args: argparse.Namespace) -> jnp.dtype:
    """That of --dtype, or what suits the device."""
    return DTYPES[dtype_name(args)]


def check_source(args: argparse.Namespace) -> None:
    """Checks that there is one source of text, and nothing that it does not use.

    Raises:
      ValueError: what is wrong, and what would be right.
    """

    def given(option: str):
        return vars(args).get(option.removeprefix("--").replace("-", "_"))

    sources = [option for option in _SOURCES if given(option)]
    if len(sources) != 1:
        found = " and ".join(sources) or "none of them"
        raise ValueError(
            "give one source of text: --text-encoder FOLDER with --prompt TEXT, --features FILE, "
            f"or --random-features (with --prompt TEXT); found {found}"
        )
    if args.text_encoder and args.prompt is None:
        raise ValueError("--text-encoder needs --prompt TEXT (which may be empty)")
    if args.features and args.prompt is not None:
        raise ValueError("--prompt goes with --text-encoder or --random-features, not --features")
    unused = [option for option in _ENCODER_OPTIONS if given(option)]
    if unused and not args.text_encoder:
        raise ValueError(f"{unused[0]} has no effect without --text-encoder")


def load_features(path: str, dims: tuple[int, int]) -> TextFeatures:
    """The stored contexts [1, S, Wv] and [1, S, Wa] of one prompt.

    Raises:
      FileNotFoundError, ValueError: as `text_features.load_text_features`, or the file holds
        several prompts.
    """
    features = text_features.load_text_features(path, dims)
    count = len(features.video_context)
    if count != 1:
        raise ValueError(f"{path} holds {count} prompts; one clip takes one file for each prompt")
    return features


def random_features(prompt: str, dims: tuple[int, int], seed: int = 0) -> TextFeatures:
    """Contexts [1, 128, W] float32 that depend on the prompt's text and the seed alone."""
    key = text_features.prompt_key(prompt, seed)
    return text_features.random_text_features(key, 1, _RANDOM_TOKENS, dims)


def make_encoder(args: argparse.Namespace, *, keep: bool = False) -> PromptEncoder:
    """The text encoder that the command line describes; no weights are read.

    Raises:
      FileNotFoundError, ValueError: see `PromptEncoder`.
    """
    cache = None if args.prompt_cache == NO_CACHE else args.prompt_cache or default_cache()
    return PromptEncoder(
        args.text_encoder,
        args.checkpoint,
        cache=cache,
        dtype=compute_dtype(args),
        quantize=args.quantize_encoder or "none",
        length=args.text_length,
        keep=keep,
        verify=args.verify,
    )


def describe_times(times: TextTimes) -> str:
    """One line on what encoding has cost."""
    return (
        f"{times.total:6.2f} s  (look-up {times.lookup:.2f}, load {times.load:.2f}, encode "
        f"{times.encode:.2f})  {times.encoded} encoded, {times.found} from the cache"
    )


@contextlib.contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Shows warnings as a line each, without the place in the code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: console.print(
            f"warning: {message}", markup=False, highlight=False
        )
        yield
