"""OmniForcing's released causal student (PyTorch) -> Orbax.

    python -m checkpoint_converters.omniforcing --input causal.safetensors \\
        --base ltx2 --output student

The release holds the transformer only; VAEs, vocoder and text connectors come from the LTX-2.0
checkpoint it was distilled from (`--base`, converted or not). Its files carry no metadata: the
sizes follow from the shapes, the rest is fixed by how the student was trained, which differs from
LTX-2 (interleaved RoPE on a float32 frequency grid, cross-modal gates at sigma, not 1000 sigma).
"""

import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from checkpoint_converters import checks, contents, converting, ltx2
from checkpoint_converters.key_map import DIT
from checkpoint_converters.reading import open_checkpoint
from checkpoint_converters.safetensors_io import ConversionError, TensorInfo
from omniforcing_jax import programs
from omniforcing_jax.io import checkpoints
from omniforcing_jax.models.transformer.config import FIXED_SETTINGS
from omniforcing_jax.sampling.guidance import NO_GUIDANCE
from omniforcing_jax.sampling.trained import ENTRY, LTX2_CLIP, TrainedSettings

MODEL_VERSION = "2.0.0"  # of the model it was distilled from

# what the shapes cannot tell, as the released students were trained
_FIXED = FIXED_SETTINGS | {
    "_class_name": "AVTransformer3DModel",
    "norm_eps": 1e-06,
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "rope_type": "interleaved",
    "frequencies_precision": "float32",
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1,
    "caption_proj_before_connector": False,
    "apply_gated_attention": False,
    "cross_attention_adaln": False,
}

# sizes that stand in the shape of one tensor: name, official key, axis
_SIZES = (
    ("in_channels", "patchify_proj.weight", 1),
    ("out_channels", "proj_out.weight", 0),
    ("audio_in_channels", "audio_patchify_proj.weight", 1),
    ("audio_out_channels", "audio_proj_out.weight", 0),
    ("caption_channels", "caption_projection.linear_1.weight", 1),
    ("cross_attention_dim", "transformer_blocks.0.attn2.to_k.weight", 1),
    ("audio_cross_attention_dim", "transformer_blocks.0.audio_attn2.to_k.weight", 1),
)


def infer_metadata(
    tensors: dict[str, TensorInfo], num_heads: int = 32
) -> tuple[dict, TrainedSettings]:
    """(`config` in the schema of LTX-2's metadata, what it was trained with) from the shapes.

    Args:
      tensors: {official key: tensor} of the student.
      num_heads: attention heads of both streams, which no shape tells.

    Raises:
      ConversionError: the tensors from which the sizes are read are missing, or the heads do not
        divide the widths.
    """
    problems = []

    def size(key: str, axis: int) -> int:
        info = tensors.get(DIT + key)
        if info is None or len(info.shape) <= axis:
            problems.append(f"{DIT + key}: missing or misshapen, needed to find the sizes")
            return num_heads
        return info.shape[axis]

    transformer = _FIXED | {name: size(key, axis) for name, key, axis in _SIZES}
    widths = {"": size("patchify_proj.weight", 0), "audio_": size("audio_patchify_proj.weight", 0)}
    for prefix, width in widths.items():
        if width % num_heads:
            problems.append(f"width {width} is no multiple of {num_heads} heads; pass --num-heads")
        transformer[f"{prefix}num_attention_heads"] = num_heads
        transformer[f"{prefix}attention_head_dim"] = width // num_heads
    pattern = re.compile(re.escape(DIT) + r"transformer_blocks\.(\d+)\.")
    layers = [int(match[1]) for key in tensors if (match := pattern.match(key))]
    transformer["num_layers"] = 1 + max(layers, default=-1)
    sinks = 0
    if DIT + "audio_sink_tokens" in tensors:
        sinks = size("audio_sink_tokens", 1)
    transformer["num_audio_sink_tokens"] = sinks
    if problems:
        raise ConversionError(problems)
    trained = TrainedSettings(
        stage="released",
        layout="prefix" if sinks else "merged",
        # the sigmas are the entries of the 40-step schedule nearest to these timesteps
        timesteps=(1000, 757, 522) if sinks else (1000, 909, 725, 421),
        guidance=NO_GUIDANCE,
        **LTX2_CLIP,
    )
    return {"transformer": transformer}, trained


def convert(
    path: pathlib.Path,
    output: pathlib.Path,
    *,
    base: pathlib.Path | None = None,
    num_heads: int = 32,
    **options: Any,
) -> dict:
    """Converts a released OmniForcing student.

    Args:
      path: the student's weights, see `reading.open_checkpoint`.
      output: folder to create.
      base: LTX-2.0 checkpoint, converted or not, for the other components; None leaves them out.
      num_heads: attention heads of both streams.
      options: dtype, mesh, overwrite, allow_non_finite, show_progress of `converting.run`.

    Returns:
      The content of OUTPUT/config.json.

    Raises:
      ConversionError: everything that is wrong; nothing was written then.
    """
    problems: list[str] = []
    config, trained, tensors, files = {}, TrainedSettings(), {}, ()
    notes: tuple[str, ...] = ()
    try:
        checkpoint = open_checkpoint(path)
        if wrong := contents.misplaced(path, checkpoint.tensors, contents.LTX2):
            raise ConversionError(wrong)
        notes = checkpoint.notes
        # other components, if any, have no metadata to check them against: they come from --base
        tensors = {k: t for k, t in checkpoint.tensors.items()
                   if contents.owner(k) in (None, "transformer")}  # fmt: skip
        files = checkpoint.files
        config, trained = infer_metadata(tensors, num_heads)
        problems += checks.tensor_problems(tensors, config, ("transformer",))
    except ConversionError as error:
        problems += error.problems
    other = _Base({})
    if base is not None:
        other = _read_base(pathlib.Path(base))
        problems += [*other.problems, *_base_problems(base, config, other.config)]
        if "connectors" in other.components:
            # they keep the base's RoPE settings, which the student's section does not have
            section = other.config.get("connectors", other.config["transformer"])
            config = other.config | config | {"connectors": section}
        else:
            config = other.config | config
    components = ("transformer", *other.components)
    content = converting.config_content(
        "checkpoint_converters.omniforcing",
        "omniforcing",
        config,
        (*files, *other.files),
        model_version=MODEL_VERSION,
        components=list(components),
        trained=trained.to_json(),
    )
    if notes:
        content["notes"] = list(notes)
    streamed = tuple(name for name in components if name not in other.copies)
    plan = converting.ConversionPlan(
        content,
        tensors | other.tensors,
        streamed,
        other.copies,
        other.fingerprints,
        inputs=(path,) if base is None else (path, base),
        weights=(*files, *other.files),
    )
    return converting.run(plan, problems, output, **options)


class _Base(NamedTuple):
    """What an LTX-2 checkpoint has to offer besides its transformer."""

    config: dict
    tensors: Mapping[str, TensorInfo] = {}
    copies: Mapping[str, os.PathLike] = {}
    fingerprints: Mapping[str, str] = {}  # of the copies
    components: tuple[str, ...] = ()
    files: tuple[pathlib.Path, ...] = ()
    problems: Sequence[str] = ()


def _read_base(base: pathlib.Path) -> _Base:
    if (base / "config.json").is_file():
        try:
            content = checkpoints.load_config(base)
        except ValueError:
            problem = f"{base}: not a converted checkpoint of this version; convert LTX-2 again"
            return _Base({}, problems=[problem])
        names = tuple(name for name in content["components"] if name != "transformer")
        missing = checkpoints.missing_components(base, names)
        problems = [f"{base / name}: missing; convert LTX-2 again" for name in missing]
        known = content.get("fingerprints", {})  # an earlier version did not write any
        return _Base(
            config=content["config"],
            copies={name: checkpoints.component_folder(base, name, content) for name in names},
            fingerprints={name: known[name] for name in names if name in known},
            components=names,
            files=(base / "config.json",),
            problems=problems + _version_problem(base, content["model_version"]),
        )
    checkpoint, problems = ltx2.open_inputs([base])
    if checkpoint is None:
        return _Base({}, problems=problems)
    there = contents.present_components(checkpoint.tensors)
    names = tuple(name for name in there if name != "transformer")
    checkpoint, taken, found = ltx2.check_components(checkpoint, names)
    tensors = {k: t for k, t in checkpoint.tensors.items() if contents.owner(k) in taken}
    problems += found + _version_problem(base, checkpoint.model_version)
    return _Base(
        config={name: x for name, x in (checkpoint.config or {}).items() if name != ENTRY},
        tensors=tensors,
        components=taken,
        files=checkpoint.files,
        problems=problems,
    )


def _version_problem(base: pathlib.Path, version: str | None) -> list[str]:
    if str(version).startswith("2.0"):
        return []
    return [f"{base}: is LTX-2 {version}; the student was distilled from 2.0, whose latents differ"]


def _base_problems(base: pathlib.Path, config: dict, base_config: dict) -> list[str]:
    """Sizes in which the student and the base's VAEs and connectors must agree."""
    student = config.get("transformer", {})
    latent = base_config.get("vae", {}).get("latent_channels")
    problems = []
    if student and latent is not None and latent != student["in_channels"]:
        problems.append(
            f"{base}: its VAE has {latent} channels, the student {student['in_channels']}"
        )
    width = base_config.get("transformer", {}).get("caption_channels")
    if student and width is not None and width != student["caption_channels"]:
        problems.append(
            f"{base}: its text features have width {width}, the student's "
            f"{student['caption_channels']}"
        )
    return problems


@programs.entry
def main(argv: list[str] | None = None) -> int:
    parser = programs.Parser("checkpoint_converters.omniforcing", __doc__)
    parser.add_argument(
        "--input",
        required=True,
        type=pathlib.Path,
        dest="path",
        metavar="INPUT",
        help=".safetensors file, .safetensors.index.json, or folder with one of them",
    )
    parser.add_argument(
        "--base",
        type=pathlib.Path,
        help="LTX-2.0 checkpoint or its conversion: source of VAEs, vocoder and connectors",
    )
    parser.add_argument(
        "--num-heads", type=int, default=32, help="attention heads of both streams (default 32)"
    )
    return converting.main(parser, argv, convert, ltx2.describe)


if __name__ == "__main__":
    sys.exit(main())
