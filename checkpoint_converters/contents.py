"""What a file of weights holds, told by its keys, and which program is for it."""

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import NamedTuple, TypeVar

from checkpoint_converters import key_map
from omniforcing_jax.io.checkpoints import COMPONENTS
from omniforcing_jax.models import lora

Tensor = TypeVar("Tensor")  # anything with a shape

# a key of the transformer that every version has, used to find what stands before the names
_PROBE = "transformer_blocks.0.attn1.to_q.weight"
_KNOWN_PREFIXES = (
    "model.diffusion_model.",
    "model.velocity_model.",
    "diffusion_model.",
    "velocity_model.",
    "model.",
    "",
)
# prefix of the official key: component; the first that fits
_OWNERS = (
    (key_map.DIT + "video_embeddings_connector.", "connectors"),
    (key_map.DIT + "audio_embeddings_connector.", "connectors"),
    (key_map.TEXT_PROJECTIONS, "connectors"),
    (key_map.DIT, "transformer"),
    ("vae.", "video_vae"),
    ("audio_vae.", "audio_vae"),
    ("vocoder.", "vocoder"),
)
_WITHOUT_DIT = tuple(prefix for prefix, _ in _OWNERS if not prefix.startswith(key_map.DIT))
_TEXT_ENCODER = "layers.0.input_layernorm.weight"  # a key that language models have
_TINY_DECODER = {"decoder.1.weight", "decoder.22.weight"}  # keys of TAEHV's
_UPSAMPLER = "post_upsample_res_blocks.0.conv1.weight"  # one that latent upsamplers have

LTX2, GEMMA3, GEMMA4, UPSAMPLER, LORA = "ltx2", "gemma3", "gemma4", "upsampler", "lora"
TINY_DECODER = "tiny decoder"
_USE = {
    kind: f"python -m checkpoint_converters.{kind} --input {{path}} converts it"
    for kind in (LTX2, GEMMA3, GEMMA4)
} | {
    UPSAMPLER: "python -m checkpoint_converters.upsampler --input {path} converts it, for "
    "--upsampler of launch.sample_teacher",
    TINY_DECODER: "python -m checkpoint_converters.tiny_decoder --input {path} --checkpoint FOLDER "
    "adds it to a converted LTX-2",
    LORA: "python -m checkpoint_converters.ltx2 --input MODEL --lora {path} merges it into the "
    "model it was made for",
}


class Contents(NamedTuple):
    """What a file is: `kind`, such as `LORA`, and in words."""

    kind: str
    text: str

    def problem(self, path: str | PathLike) -> str:
        """The line for whoever gave this file in another's place."""
        return f"{path}: is {self.text}; {_USE[self.kind].format(path=path)}"


def identify(tensors: Mapping[str, Tensor]) -> Contents | None:
    """What a file holds, None if it is nothing that is known here.

    Args:
      tensors: {key as the file has it: anything with a shape}.
    """
    layers, stray, others = lora.layers_of(tensors)
    if 2 * len(layers) > len(stray) + len(others):
        return Contents(LORA, f"a LoRA of {len(layers)} layers")
    if tensors.keys() >= _TINY_DECODER:
        return Contents(TINY_DECODER, "a tiny video decoder")
    if _UPSAMPLER in tensors:
        return Contents(UPSAMPLER, "a latent upsampler")
    there = present_components(canonical_keys(tensors))
    # LTX-2.5's text encoder comes with the projections, which are the connectors'
    if there in ((), ("connectors",)) and any(key.endswith(_TEXT_ENCODER) for key in tensors):
        if is_gemma4(tensors):
            return Contents(GEMMA4, "a Gemma 4, the text encoder of LTX-2.5")
        return Contents(GEMMA3, "a Gemma 3, the text encoder of LTX-2.0 and 2.3")
    return Contents(LTX2, f"LTX-2 ({', '.join(there)})") if there else None


def misplaced(path: str | PathLike, tensors: Mapping[str, Tensor], wanted: str) -> list[str]:
    """What is wrong with a file that holds something else than `wanted`, such as `LORA`."""
    found = identify(tensors)
    return [] if found is None or found.kind == wanted else [found.problem(path)]


def owner(key: str) -> str | None:
    """The component an official key belongs to, None if it belongs to none."""
    return next((name for prefix, name in _OWNERS if key.startswith(prefix)), None)


def present_components(tensors: Iterable[str]) -> tuple[str, ...]:
    """Components of which at least one tensor is there."""
    found = {owner(key) for key in tensors}
    return tuple(name for name in COMPONENTS if name in found)


def is_gemma4(tensors: Iterable[str]) -> bool:
    """Whether they are those of a Gemma 4, as published or in LTX-2.5's text encoder file."""
    return any(k == key_map.TOKENIZER_TENSOR or k.endswith(".layer_scalar") for k in tensors)


def canonical_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames to the official single-file keys.

    Accepts any of the prefixes in use before the transformer's names (`model.`,
    `model.velocity_model.`, none, ...) and VAE files whose keys have no prefix.
    """
    prefix = next((p for p in _KNOWN_PREFIXES if p + _PROBE in tensors), None)
    bare = {5: "vae.", 4: "audio_vae."}
    rank = next(
        (len(tensors[k].shape) for c in ("encoder", "decoder")
         if (k := f"{c}.conv_in.conv.weight") in tensors),
        0,
    )  # fmt: skip
    result = {}
    for key, info in tensors.items():
        if key.startswith(_WITHOUT_DIT):
            name = key
        elif rank in bare and re.match(r"(encoder|decoder|per_channel_statistics)\.", key):
            name = bare[rank] + key
        elif prefix is not None and key.startswith(prefix):
            name = key_map.DIT + key.removeprefix(prefix)
        else:
            name = key
        result[name] = info
    return result
