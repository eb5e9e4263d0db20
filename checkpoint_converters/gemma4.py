"""LTX-2.5's text encoder, the text tower of a Gemma 4 -> Orbax.

    python -m checkpoint_converters.gemma4 --input ltx-2.5-text-encoder.safetensors --output gemma4

Reads the single file in which LTX-2.5 publishes it (configuration, tokenizer and weights in one),
a folder with that file alone, or a Hugging Face folder of a Gemma 4, and writes OUTPUT/config.json,
the Orbax checkpoint OUTPUT/text_tower and the tokenizer. Whatever else is in there is
left behind; LTX-2.5's text projections, which lie in the same file, are read by
checkpoint_converters.ltx2.
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from checkpoint_converters import contents, converting
from checkpoint_converters.gemma3 import describe, select, tokenizer_files
from checkpoint_converters.key_map import TEXT_TOWER, TOKENIZER_TENSOR
from checkpoint_converters.reading import open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, read_tensor
from omniforcing_jax import programs
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import GEMMA4_FAMILY, GEMMA_VERSION

PROGRAM = "checkpoint_converters.gemma4"
METADATA = "gemma_config"  # of LTX-2.5's file: the content of a Hugging Face config.json
_SIZE = (48, 3840)  # layers and width of Gemma 4 12B
_NOT_OF_LTX = (
    "states no gemma_version, so it is not LTX-2.5's own fine-tune of Gemma 4, which its "
    "connectors were trained with (gemma4-12b-with-proj-ltx-2.5-bf16.safetensors)"
)
# what stands before the names: in LTX-2.5's file, as published by Google, the text-only model
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
_IGNORED = (
    r"(model\.)?(vision_tower|audio_tower|vision_model|vision_embedder)\..*",
    r"(model\.)?(embed_vision|embed_audio|multi_modal_projector|audio_projector)\..*",
    r"(model\.)?(language_model\.)?lm_head\.weight",
    r"text_embedding_projection\..*",
    TOKENIZER_TENSOR,
    r"hf_asset__.*",
)


def convert(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    **options: Any,
) -> dict:
    """Converts a Gemma 4.

    Args:
      source: LTX-2.5's text encoder file, its folder, or a Hugging Face folder.
      output: folder to create.
      tokenizer: tokenizer.json, or a folder with one, if it is elsewhere.
      options: dtype, mesh, overwrite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    source = pathlib.Path(source)
    checkpoint = open_checkpoint(source)
    tensors, files = checkpoint.tensors, checkpoint.files
    if wrong := contents.misplaced(source, tensors, contents.GEMMA4):
        raise ConversionError(wrong)
    whole, text_config = _read_config(source, checkpoint.strings)
    config = GemmaConfig.from_metadata(text_config)
    chosen, problems = select(tensors, config, source, PREFIXES, _IGNORED)
    if tokenizer is None and TOKENIZER_TENSOR in tensors:
        copied = {"tokenizer.json": read_tensor(tensors[TOKENIZER_TENSOR]).tobytes()}
    else:
        place = source.parent if source.is_file() else source
        copied, missing = tokenizer_files(pathlib.Path(tokenizer or place))
        problems += missing
    content = converting.config_content(PROGRAM, GEMMA4_FAMILY, text_config, files)
    notes = list(checkpoint.notes)
    if version := whole.get(GEMMA_VERSION):
        content[GEMMA_VERSION] = version
    elif (config.num_layers, config.hidden_size) == _SIZE:
        notes.append(_NOT_OF_LTX)
    if notes:
        content["notes"] = notes
    inputs = (source, tokenizer or source)
    plan = converting.ConversionPlan(
        content, chosen, (TEXT_TOWER,), files=copied, inputs=inputs, weights=files
    )
    return converting.run(plan, problems, output, **options)


def _read_config(source: pathlib.Path, metadata: Mapping[str, str]) -> tuple[dict, dict]:
    """All settings, of the weights' metadata or of config.json beside them, and those of the tower.

    Raises:
      ConversionError: there are none, or they are of another model.
    """
    file = (source if source.is_dir() else source.parent) / "config.json"
    if METADATA not in metadata and not file.is_file():
        raise ConversionError(
            [f"{source}: has no {METADATA} in its metadata, and no config.json beside it; give "
             "LTX-2.5's own text encoder file, or the whole Hugging Face folder of a Gemma 4"]
        )  # fmt: skip
    where = f"{source}: metadata {METADATA}" if METADATA in metadata else file
    try:
        whole = json.loads(metadata[METADATA] if METADATA in metadata else file.read_text())
        config = whole.get("text_config") or whole
        if not GemmaConfig.from_metadata(config).gemma4:
            raise ValueError("it is a Gemma 3's")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            [f"{where}: not the settings of a Gemma 4 as LTX-2.5 uses it ({error})"]
        ) from error
    return whole, config


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser(PROGRAM, __doc__)
    converting.add_input(
        parser, "LTX-2.5's text encoder .safetensors, its folder, or a Hugging Face one"
    )
    parser.add_argument(
        "--tokenizer",
        type=pathlib.Path,
        help="tokenizer.json, or the folder of one (default: in the weights, or beside them)",
    )
    return converting.main(parser, argv, convert, describe)


if __name__ == "__main__":
    sys.exit(main())
