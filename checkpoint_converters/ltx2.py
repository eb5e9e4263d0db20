"""LTX-2 weights -> Orbax.

    python -m checkpoint_converters.ltx2 --input ltx-2-19b-dev.safetensors --output ltx2

Reads the official single file (2.0, 2.3), in bfloat16 or scaled fp8, shards, or a diffusers folder,
and writes OUTPUT/config.json and one Orbax checkpoint per component. Several inputs of one release
may be given, each with some of the components; one of them must have the metadata (a whole model
that lost it is taken for the published one of --model-version). LoRAs (`--lora`) are merged into
the weights. docs/files.md lists what files there are. Students that were trained here and exported
by checkpoint_converters.export come back as what they were. A distilled LTX-2 is known by the name
or metadata of its file, or the name of the LoRA that made it (`trained` in config.json; --recipe
decides otherwise), for its tensors do not tell.

LTX-2.5 is published in parts: give the files of the transformer, the VAEs, the vocoder, and the
text encoder, whose text projections belong to the connectors. The text encoder itself, a Gemma 4,
is converted by checkpoint_converters.gemma4; the diffusion decoder is not implemented.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint_converters import checks, contents, converting, key_map, lora
from checkpoint_converters.published import published_config
from checkpoint_converters.reading import Checkpoint, open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError
from omniforcing_jax import programs
from omniforcing_jax.io.checkpoints import COMPONENTS
from omniforcing_jax.sampling import recipes
from omniforcing_jax.sampling.trained import ENTRY, LTX2_BASE, LTX2_DISTILLED, TrainedSettings
from omniforcing_jax.text.encoder_files import GEMMA_VERSION

_RECIPES = {  # of LTX-2's own models
    LTX2_BASE.stage: "\nfull: sampled in many steps with guidance; --recipe distilled otherwise",
    LTX2_DISTILLED.stage: "\ndistilled: sampled in eight steps without guidance; --recipe full "
    "otherwise",
}
_DURATION_HEAD = (
    "duration_head was left out, as it is not implemented: the samplers take the clip's length"
)


def convert(
    inputs: list[pathlib.Path] | pathlib.Path,
    output: pathlib.Path,
    *,
    components: tuple[str, ...] | None = None,
    model_version: str | None = None,
    loras: Sequence[tuple[pathlib.Path, float]] = (),
    recipe: str | None = None,
    **options: Any,
) -> dict:
    """Converts an LTX-2 checkpoint.

    Args:
      inputs: file(s) or folder(s), see `reading.open_checkpoint`.
      output: folder to create.
      components: subset of `checkpoints.COMPONENTS`; None takes those that the inputs hold.
      model_version: e.g. "2.0.0", for files whose metadata does not say.
      loras: (file, strength) to merge into the weights, in this order.
      recipe: how an LTX-2 is sampled, one of `RECIPE_NAMES`; None goes by what the transformer's
        file and the LoRAs say.
      options: dtype, mesh, overwrite, allow_non_finite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    inputs = [inputs] if isinstance(inputs, str | pathlib.Path) else list(inputs)
    checkpoint, problems = open_inputs(inputs, model_version)
    plan = converting.ConversionPlan({}, {}, ())
    if checkpoint is not None:
        checkpoint, taken, found = check_components(checkpoint, components)
        problems += found
        tensors, merged, found = lora.merge(checkpoint.tensors, loras, taken)
        problems += found
        config = dict(checkpoint.config or {})
        trained, found = pop_trained(config, checkpoint.path)
        problems += found
        before, found = pop_loras(config, checkpoint.path)
        problems += found
        if trained == LTX2_BASE:
            distilled = (recipe or find_recipe(checkpoint, loras)) == recipes.DISTILLED
            trained = LTX2_DISTILLED if distilled else LTX2_BASE
        elif recipe is not None:
            problems.append(
                f"{checkpoint.path}: says itself what it was trained with; leave out --recipe"
            )
        content = converting.config_content(
            "checkpoint_converters.ltx2",
            "omniforcing" if trained.causal else "ltx2",
            config,
            checkpoint.files,
            model_version=checkpoint.model_version,
            components=list(taken),
            trained=trained.to_json(),
        )
        if version := gemma_version(checkpoint.strings):
            content[GEMMA_VERSION] = version
        if before + merged:
            content[lora.ENTRY] = before + merged
        if checkpoint.notes:
            content["notes"] = list(checkpoint.notes)
        read = (*inputs, *(file for file, _ in loras))
        plan = converting.ConversionPlan(
            content, tensors, taken, inputs=read, weights=checkpoint.files
        )
    return converting.run(plan, problems, output, **options)


def gemma_version(strings: Mapping[str, str]) -> str | None:
    """Which Gemma an LTX-2.5's metadata say it was trained with; None if they do not."""
    try:
        return json.loads(strings.get(key_map.GEMMA_SOURCE, "{}")).get(GEMMA_VERSION)
    except (ValueError, AttributeError):
        return None


def pop_trained(config: dict, path: os.PathLike) -> tuple[TrainedSettings, list[str]]:
    """Takes out of the metadata what checkpoint_converters.export put there; and its problems."""
    try:
        if "student" in config:
            TrainedSettings.read(config)
        if (values := config.pop(ENTRY, None)) is None:
            return LTX2_BASE, []
        return TrainedSettings.from_json(values), []
    except ValueError as error:
        return TrainedSettings(), [f"{path}: {error}"]


def pop_loras(config: dict, path: os.PathLike) -> tuple[list[dict], list[str]]:
    """Takes out of the metadata which LoRAs checkpoint_converters.export says are in the weights;
    and its problems."""
    records = config.pop(lora.ENTRY, [])
    try:
        for record in records:
            lora.describe(record)
    except (KeyError, TypeError, ValueError) as error:
        return [], [f"{path}: metadata of merged LoRAs cannot be read ({error!r})"]
    return list(records), []


def open_inputs(
    inputs: list[pathlib.Path], model_version: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Reads all headers; (merged checkpoint or None if some could not be read, problems)."""
    opened, problems = [], []
    for path in inputs:
        try:
            checkpoint = open_checkpoint(path)
            parts = contents.present_components(checkpoint.tensors)
            if not parts or (len(inputs) == 1 and parts == ("connectors",)):
                problems += contents.misplaced(path, checkpoint.tensors, contents.LTX2)
            if key_map.TOKENIZER_TENSOR in checkpoint.tensors:
                # LTX-2.5's text encoder, of which only the projections are LTX-2's
                tensors = {
                    key: info
                    for key, info in checkpoint.tensors.items()
                    if key.startswith(key_map.TEXT_PROJECTIONS)
                }
                checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
            version = checkpoint.model_version or model_version
            opened.append(dataclasses.replace(checkpoint, model_version=version))
        except ConversionError as error:
            problems += error.problems
    if problems:
        return None, problems
    there = {name for part in opened for name in contents.present_components(part.tensors)}
    short = ".".join((model_version or "").split(".")[:2])
    whole = there == set(COMPONENTS) and all(part.config is None for part in opened)
    if whole and short in checks.KNOWN_VERSIONS:
        note = f"the file does not say what it is: taken for an LTX-2 {short} as published"
        opened[0] = dataclasses.replace(
            opened[0], config=published_config(short), notes=(*opened[0].notes, note)
        )
    return checks.merge(opened)


def find_recipe(checkpoint: Checkpoint, loras: Sequence[tuple[pathlib.Path, float]]) -> str:
    """The recipe told by the transformer's file, folder or metadata, or by a LoRA's name."""
    names = {
        info.file.name
        for key, info in checkpoint.tensors.items()
        if contents.owner(key) == "transformer"
    }
    if checkpoint.path.is_dir():
        names.add(checkpoint.path.absolute().name)
    # a config names settings, not what the weights are
    names |= {f"{k} {text}" for k, text in checkpoint.strings.items() if not k.endswith("config")}
    told = [recipes.recipe_in_text(name) for name in names]
    told += [recipes.recipe_in_lora_name(file.name) for file, _ in loras]
    return next(filter(None, told), recipes.FULL)


def check_components(
    checkpoint: Checkpoint, components: tuple[str, ...] | None
) -> tuple[Checkpoint, tuple[str, ...], list[str]]:
    """(checkpoint without what can be left out, components to convert, their problems)."""
    there = contents.present_components(checkpoint.tensors)
    wanted = there if components is None else tuple(components)
    problems = [f"{checkpoint.path}: has no {name}" for name in wanted if name not in there]
    taken = tuple(name for name in wanted if name in there)
    tensors, dropped = checks.without_zeros(checkpoint.tensors, taken)
    notes = (*checkpoint.notes, *dropped)
    if any(key.startswith("duration_head.") for key in tensors):
        notes = (*notes, _DURATION_HEAD)
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors, notes=notes)
    if not there:
        problems.append(f"{checkpoint.path}: has no tensors of LTX-2")
    elif checkpoint.config:
        problems += checks.tensor_problems(checkpoint.tensors, checkpoint.config, taken)
    return checkpoint, taken, problems


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.ltx2", __doc__)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=pathlib.Path,
        dest="inputs",
        metavar="INPUT",
        help=".safetensors file, .safetensors.index.json, or folder (shards or diffusers)",
    )
    parser.add_argument(
        "--components",
        nargs="+",
        choices=COMPONENTS,
        help="convert only these (default: all that the input holds)",
    )
    parser.add_argument(
        "--model-version",
        metavar="X.Y.Z",
        help="for files whose metadata does not say, e.g. 2.0.0; a whole model without metadata "
        "is taken for the published one of that version, every shape checked",
    )
    lora.add_option(
        parser, "LoRA to merge into the weights (strength 1 if none is given); may be repeated"
    )
    parser.add_argument(
        "--recipe",
        choices=recipes.RECIPE_NAMES,
        help="how the model is sampled (default: distilled if the file's name or metadata say so)",
    )
    return converting.main(parser, argv, convert, describe)


def describe(content: dict) -> str:
    """What was converted, and what was not."""
    there = content["components"]
    text = f"LTX-2 {content['model_version']}, {', '.join(there)}"
    text += _RECIPES.get(content[ENTRY]["stage"], "")
    absent = [name for name in COMPONENTS if name not in there]
    lines = [f"not converted: {', '.join(absent)}"] if absent else []
    lines += map(lora.describe, content.get(lora.ENTRY, []))
    return "\n".join([text, *lines, *content.get("notes", [])])


if __name__ == "__main__":
    sys.exit(main())
