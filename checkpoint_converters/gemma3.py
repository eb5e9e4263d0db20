"""Gemma 3's text tower -> Orbax.

    python -m checkpoint_converters.gemma3 --input gemma-3-12b-it --output gemma

Reads a Hugging Face folder (shards or one file) of a Gemma 3 with or without vision, or a single
file such as ComfyUI's, and writes OUTPUT/config.json, the Orbax checkpoint OUTPUT/text_tower and
the tokenizer's files. A single file needs no config.json if it has the sizes of the 12B model. The
tokenizer is that of --tokenizer, or lies in the weights (`spiece_model`), or beside them. Vision
tower, projector and head are left behind: LTX-2 reads hidden states of text only.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint_converters import checks, contents, converting
from checkpoint_converters.computed import ComputedTensor
from checkpoint_converters.key_map import GEMMA, TEXT_TOWER
from checkpoint_converters.reading import open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo, read_tensor
from checkpoint_converters.shapes import model_shapes
from omniforcing_jax import programs
from omniforcing_jax.io.checkpoints import parsing
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import FAMILY

PROGRAM = "checkpoint_converters.gemma3"
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
_GEMMA_4 = "is a Gemma 4; python -m checkpoint_converters.gemma4 converts it"
SPIECE = "spiece_model"  # bytes of a tokenizer.model among the tensors
_IGNORED = (
    SPIECE,
    r"(model\.)?vision_(tower|model)\..*",
    r"(model\.)?multi_modal_projector\..*",
    r"(language_model\.)?lm_head\.weight",
)

# text_config of google/gemma-3-12b-it
GEMMA_12B = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "model_type": "gemma3_text",
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}

Tensors = Mapping[str, TensorInfo | ComputedTensor]


def convert(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    **options: Any,
) -> dict:
    """Converts a Gemma 3.

    Args:
      source: Hugging Face folder with config.json and safetensors, or one safetensors file.
      output: folder to create.
      tokenizer: tokenizer.json or tokenizer.model, or a folder with one, if it is elsewhere.
      options: dtype, mesh, overwrite, allow_non_finite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source = pathlib.Path(source)
    problems: list[str] = []
    text_config, tensors, files = None, {}, ()
    notes: tuple[str, ...] = ()
    try:
        checkpoint = open_checkpoint(source)
        tensors, files, notes = checkpoint.tensors, checkpoint.files, checkpoint.notes
    except ConversionError as error:
        if source.is_file():
            raise
        problems += error.problems
    if wrong := contents.misplaced(source, tensors, contents.GEMMA3):
        raise ConversionError(wrong)
    if tensors or source.is_dir():
        try:
            text_config = _find_config(tensors, source)
        except ConversionError as error:
            problems += error.problems
    if tokenizer is None and SPIECE in tensors:
        found = {"tokenizer.model": read_tensor(tensors[SPIECE]).tobytes()}
    else:
        folder = source.parent if source.is_file() else source
        found, missing = tokenizer_files(pathlib.Path(tokenizer or folder))
        problems += missing
    if tensors and text_config is not None:
        tensors, wrong = select(tensors, GemmaConfig.from_metadata(text_config), source)
        problems += wrong
    content = converting.config_content(PROGRAM, FAMILY, text_config, files)
    if notes:
        content["notes"] = list(notes)
    inputs = (source, tokenizer or source)
    plan = converting.ConversionPlan(
        content, tensors, (TEXT_TOWER,), files=found, inputs=inputs, weights=tuple(files)
    )
    return converting.run(plan, problems, output, **options)


def _find_config(tensors: Tensors, source: pathlib.Path) -> dict:
    """`text_config` of a folder's config.json, or of what a single file holds.

    Beside a single file of the 12B model's sizes may lie the config.json of something else.

    Raises:
      ConversionError: there is none, or one that is not supported.
    """
    folder = source.parent if source.is_file() else source
    beside = (folder / "config.json").is_file()
    if not tensors or (beside and source.is_dir()):
        return read_text_config(folder)
    try:
        return known_config(tensors, source)
    except ConversionError:
        if not beside:
            raise
    return read_text_config(folder)


def known_config(tensors: Tensors, source: pathlib.Path) -> dict:
    """`text_config` of weights without a config.json: only the 12B model's sizes are known.

    Raises:
      ConversionError: the weights have other sizes.
    """
    prefix = _prefix(tensors)
    if prefix is None:
        return GEMMA_12B  # another model; `select` says so
    embed = tensors.get(f"{prefix}{_PROBES[0]}")
    last = f"{prefix}layers.{GEMMA_12B['num_hidden_layers'] - 1}.input_layernorm.weight"
    if embed is None or embed.shape[1:] != (GEMMA_12B["hidden_size"],) or last not in tensors:
        raise ConversionError(
            [f"{source}: has no config.json beside it, and not the sizes of google/gemma-3-12b-it, "
             "which LTX-2 uses; put the config.json of its release into the same folder"]
        )  # fmt: skip
    return GEMMA_12B | {"vocab_size": embed.shape[0]}


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
    elif str(kind).startswith("gemma4"):
        raise ConversionError([f"{file}: {_GEMMA_4}"])
    elif kind != "gemma3_text":
        raise ConversionError(
            [
                f"{file}: model_type is {kind!r}; supported are 'gemma3' with a text_config, and "
                "'gemma3_text'. LTX-2 uses google/gemma-3-12b-it"
            ]
        )
    try:
        with parsing(file):
            GemmaConfig.from_metadata(config)
    except ValueError as error:
        raise ConversionError([str(error)]) from error
    return config


def tokenizer_files(
    place: pathlib.Path,
) -> tuple[dict[str, pathlib.Path], list[str]]:
    """({name: file to copy}, problems).

    Args:
      place: a tokenizer's file, or the folder it is in.
    """
    if place.is_file():
        if place.suffix in (".json", ".model"):
            return {f"tokenizer{place.suffix}": place}, []
        return {}, [f"{place}: a tokenizer is a .json or .model file, or a folder with one"]
    found = {name: place / name for name in TOKENIZER_FILES if (place / name).is_file()}
    if any(name in TOKENIZERS for name in found):
        return found, []
    return found, [
        f"{place}: has neither {' nor '.join(TOKENIZERS)}; if the tokenizer is in another folder, "
        "pass it as --tokenizer"
    ]


def _prefix(tensors: Tensors, prefixes: Sequence[str] = PREFIXES) -> str | None:
    return next((p for p in prefixes if any(p + probe in tensors for probe in _PROBES)), None)


def select(
    tensors: Tensors,
    config: GemmaConfig,
    source: pathlib.Path,
    prefixes: Sequence[str] = PREFIXES,
    ignored: Sequence[str] = _IGNORED,
) -> tuple[dict[str, TensorInfo | ComputedTensor], list[str]]:
    """({official key: tensor} of the text tower, everything that is wrong with it).

    Args:
      tensors: all tensors of the folder, under its own keys.
      config: what they must fit.
      source: named in problems.
      prefixes: what may stand before the names.
      ignored: patterns of keys that are left behind.
    """
    prefix = _prefix(tensors, prefixes)
    if prefix is None:
        listed = ", ".join(repr(p + _PROBES[0]) for p in prefixes)
        generation = 4 if config.gemma4 else 3
        return {}, [f"{source}: no text tower of a Gemma {generation}; looked for {listed}"]
    shapes = model_shapes(TEXT_TOWER, config)
    names = {  # the file's: the table's, which has Gemma 4's unequal layers as a sequence
        prefix + key.removeprefix(GEMMA).replace("sequence.", "layers.", 1): key for key in shapes
    }
    problems = checks.compare(tensors, {name: shapes[key] for name, key in names.items()})
    problems += [
        (key, "is not part of the model that its configuration describes")
        for key in tensors
        if key not in names and not any(re.fullmatch(pattern, key) for pattern in ignored)
    ]
    chosen = {key: tensors[name] for name, key in names.items() if name in tensors}
    return chosen, checks.grouped(problems)


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser(PROGRAM, __doc__)
    converting.add_input(
        parser, "folder with config.json and safetensors, or one .safetensors file"
    )
    parser.add_argument(
        "--tokenizer",
        type=pathlib.Path,
        help="tokenizer.json or tokenizer.model, or the folder of one (default: in the "
        "weights, or beside them)",
    )
    return converting.main(parser, argv, convert, describe)


def describe(content: dict) -> str:
    """What was converted, a Gemma 3 or 4."""
    config = GemmaConfig.from_metadata(content["config"])
    text = f"Gemma {4 if config.gemma4 else 3}, "
    text += f"{config.num_layers} layers of width {config.hidden_size}"
    return "\n".join([text, *content.get("notes", [])])


if __name__ == "__main__":
    sys.exit(main())
