"""Gemma 3's text tower -> Orbax.

    python -m checkpoint_converters.gemma3 --input gemma-3-12b-it --output gemma

Reads a Hugging Face folder (shards with an index, or one file) of a Gemma 3 with or without vision,
and writes OUTPUT/config.json, the Orbax checkpoint OUTPUT/text_tower and the tokenizer's files.
Vision tower, projector and head are left behind: LTX-2 reads hidden states of text only.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from checkpoint_converters import checks, converting
from checkpoint_converters.key_map import GEMMA, TEXT_TOWER
from checkpoint_converters.reading import open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo
from checkpoint_converters.shapes import model_shapes
from omniforcing_jax import programs
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import FAMILY

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# what stands before the names: as published, as newer `transformers` write it, the text-only model
# with and without its head
PREFIXES = (GEMMA, "model.language_model.", "model.", "")
_PROBES = ("embed_tokens.weight", "norm.weight", "layers.0.input_layernorm.weight")
_IGNORED = (
    r"(model\.)?vision_tower\..*",
    r"(model\.)?multi_modal_projector\..*",
    r"(language_model\.)?lm_head\.weight",
)


def convert(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    **options: Any,
) -> dict:
    """Converts a Gemma 3 folder.

    Args:
      source: Hugging Face folder with config.json and safetensors.
      output: folder to create.
      tokenizer: folder with tokenizer.json or tokenizer.model, if it is another one.
      options: dtype, mesh, overwrite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source = pathlib.Path(source)
    problems: list[str] = []
    text_config, tensors, files = None, {}, ()
    try:
        text_config = read_text_config(source)
    except ConversionError as error:
        problems += error.problems
    try:
        checkpoint = open_checkpoint(source)
        tensors, files = checkpoint.tensors, checkpoint.files
    except ConversionError as error:
        problems += error.problems
    found, missing = tokenizer_files(pathlib.Path(tokenizer or source))
    problems += missing
    if tensors and text_config is not None:
        tensors, wrong = select(tensors, GemmaConfig.from_metadata(text_config), source)
        problems += wrong
    content = converting.config_content(FAMILY, text_config, files)
    plan = converting.ConversionPlan(content, tensors, (TEXT_TOWER,), files=found)
    return converting.run(plan, problems, output, **options)


def read_text_config(folder: pathlib.Path) -> dict:
    """The text tower's part of FOLDER/config.json.

    Raises:
      ConversionError: no such file, not JSON, not a Gemma 3, or settings that are not supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConversionError(
            [f"{file}: no such file; --input must be the folder of a Gemma 3 model"]
        )
    try:
        config = json.loads(file.read_text())
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ConversionError([f"{file}: not a JSON object ({error})"]) from error
    if kind == "gemma3" and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    elif kind != "gemma3_text":
        raise ConversionError(
            [
                f"{file}: model_type is {kind!r}; supported are 'gemma3' with a text_config, and "
                "'gemma3_text'. LTX-2 uses google/gemma-3-12b-it"
            ]
        )
    try:
        GemmaConfig.from_metadata(config)
    except ValueError as error:
        raise ConversionError([f"{file}: {error}"]) from error
    return config


def tokenizer_files(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], list[str]]:
    """(files to copy, problems)."""
    found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    if any(file.name in TOKENIZERS for file in found):
        return found, []
    return found, [
        f"{folder}: has neither {' nor '.join(TOKENIZERS)}; if the tokenizer is in another folder, "
        "pass it as --tokenizer"
    ]


def select(
    tensors: Mapping[str, TensorInfo], config: GemmaConfig, source: pathlib.Path
) -> tuple[dict[str, TensorInfo], list[str]]:
    """({official key: tensor} of the text tower, everything that is wrong with it).

    Args:
      tensors: all tensors of the folder, under its own keys.
      config: what they must fit.
      source: named in problems.
    """
    prefix = next((p for p in PREFIXES if any(p + probe in tensors for probe in _PROBES)), None)
    if prefix is None:
        listed = ", ".join(repr(p + _PROBES[0]) for p in PREFIXES)
        return {}, [f"{source}: no text tower of a Gemma 3; looked for {listed}"]
    shapes = model_shapes(TEXT_TOWER, config)
    expected = {prefix + key.removeprefix(GEMMA): shape for key, shape in shapes.items()}
    problems = checks.compare(tensors, expected)
    problems += [
        (key, "is not part of the model that config.json describes")
        for key in tensors
        if key not in expected and not any(re.fullmatch(pattern, key) for pattern in _IGNORED)
    ]
    chosen = {GEMMA + key.removeprefix(prefix): tensors[key] for key in expected if key in tensors}
    return chosen, checks.grouped(problems)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.gemma3", __doc__)
    parser.add_argument(
        "--input",
        required=True,
        type=pathlib.Path,
        dest="source",
        metavar="INPUT",
        help="folder with config.json and safetensors",
    )
    parser.add_argument(
        "--tokenizer",
        type=pathlib.Path,
        help="folder with tokenizer.json or tokenizer.model (default: --input)",
    )
    return converting.main(parser, argv, convert, _describe)


def _describe(content: dict) -> str:
    config = GemmaConfig.from_metadata(content["config"])
    return f"Gemma 3, {config.num_layers} layers of width {config.hidden_size}"


if __name__ == "__main__":
    sys.exit(main())
