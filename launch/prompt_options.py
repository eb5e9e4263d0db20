"""Where a sampler's text comes from: the options that `stream` and `sample_teacher` share."""

import argparse
import contextlib
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich.console import Console

from omniforcing_jax.models import quantization
from omniforcing_jax.text.prompts import PromptEncoder, TextTimes, default_cache

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
NO_CACHE = "none"
_SOURCES = ("--text-encoder", "--features", "--random-features")
_ENCODER_OPTIONS = ("--prompt-cache", "--quantize-encoder", "--text-length", "--keep-encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the text encoder and --random-features."""
    add = parser.add_argument
    add("--text-encoder", metavar="FOLDER", help="converted Gemma 3, which encodes --prompt")
    add("--quantize-encoder", choices=quantization.MODES, help="its weights (default none)")
    add("--text-length", type=int, help="tokens per prompt (default 1024, as LTX-2 was trained)")
    add(
        "--prompt-cache", metavar="FOLDER",
        help=f"where encoded prompts are kept (default: in the user's cache; {NO_CACHE}: nowhere)",
    )  # fmt: skip
    add("--random-features", action="store_true", help="stand-in contexts for random weights")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype; see `compute_dtype`."""
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: bfloat16 on accelerators, else float32"
    )


def check_source(args: argparse.Namespace) -> None:
    """Checks that there is one source of text, and nothing that it does not use.

    Raises:
      ValueError: what is wrong, and what would be right.
    """
    given = [option for option in _SOURCES if _value(args, option)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(
            "give one source of text: --text-encoder FOLDER with --prompt TEXT, --features FILE, "
            f"or --random-features (with --prompt TEXT); found {found}"
        )
    if args.text_encoder and args.prompt is None:
        raise ValueError("--text-encoder needs --prompt TEXT (which may be empty)")
    if args.features and args.prompt is not None:
        raise ValueError("--prompt goes with --text-encoder or --random-features, not --features")
    unused = [option for option in _ENCODER_OPTIONS if _value(args, option)]
    if unused and not args.text_encoder:
        raise ValueError(f"{unused[0]} has no effect without --text-encoder")


def _value(args: argparse.Namespace, option: str):
    return vars(args).get(option.removeprefix("--").replace("-", "_"))


def compute_dtype(args: argparse.Namespace) -> jnp.dtype:
    """That of --dtype, or what suits the device."""
    return DTYPES[args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")]


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
        length=1024 if args.text_length is None else args.text_length,
        keep=keep,
    )


def describe(times: TextTimes) -> str:
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
