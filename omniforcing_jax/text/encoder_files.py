"""A text encoder on disk: its parts, whether they fit each other, and what tells it from others.

It consists of a Gemma's text tower and tokenizer in one folder, and of the connectors of a
converted LTX-2 or student. Nothing here reads weights.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from omniforcing_jax.io import checkpoints, checksums, damage
from omniforcing_jax.models.text.connectors import ConnectorConfig
from omniforcing_jax.models.text.gemma import init_boxed_params
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.sampling.trained import TrainedSettings
from omniforcing_jax.text.tokenizer import Tokenizer, load_tokenizer

TEXT_TOWER = "text_tower"
FAMILY, GEMMA4_FAMILY = "gemma3", "gemma4"
GEMMA_VERSION = "gemma_version"  # in config.json of a Gemma 4, and of the LTX-2.5 trained with it
_CONVERTERS = "checkpoint_converters.gemma3 (or .gemma4, for LTX-2.5)"
_HOW_TO_CREATE = (
    "python -m checkpoint_converters.gemma3 --input HF_FOLDER --output {folder} (LTX-2.5's Gemma: "
    "checkpoint_converters.gemma4)"
)


@dataclasses.dataclass(frozen=True)
class EncoderFiles:
    """A text encoder on disk that was found to be in order; made by `check_encoder`.

    Attributes:
      config: of the text tower.
      connectors: of the projection and the connectors.
      tokenizer: of the Gemma folder.
      length: tokens per prompt.
      model_version: of the LTX-2 model the connectors belong to.
      weights: fingerprints of the text tower's weights and of the connectors'.
    """

    config: GemmaConfig
    connectors: ConnectorConfig
    tokenizer: Tokenizer
    length: int
    model_version: str
    weights: tuple[str, str]

    def fingerprint(self, dtype: jnp.dtype, quantize: str) -> str:
        """Tells encoders apart whose features differ: 16 hexadecimal digits.

        A hash of configurations, weights, tokenizer, compute dtype and quantisation. The same
        converted files give the same on any machine and mesh.
        """
        parts = [
            dataclasses.asdict(self.config),
            dataclasses.asdict(self.connectors),
            self.weights,
            self.tokenizer.fingerprint,
            jnp.dtype(dtype).name,
            quantize,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_encoder(
    gemma: str | os.PathLike, checkpoint: str | os.PathLike, *, length: int | None = None
) -> EncoderFiles:
    """Checks everything about a text encoder that can be checked without reading its weights.

    Args:
      gemma: folder from `checkpoint_converters.gemma3` or `.gemma4`.
      checkpoint: folder from `checkpoint_converters.ltx2` or `.omniforcing`.
      length: tokens per prompt; None as the model was trained, else 1024.

    Raises:
      FileNotFoundError: a folder, or the weights in it, are not there.
      ValueError: a folder holds something else, the tower does not fit the connectors or its own
        config.json, or the length is not a multiple of the connectors' registers.
      DamagedFile: config.json or the tokenizer is not what was written.
    """
    config = load_gemma_config(gemma)
    content = checkpoints.load_config(checkpoint)
    with checkpoints.parsing(pathlib.Path(checkpoint) / "config.json"):
        if length is None:
            length = TrainedSettings.read(content).filled().text_length
        section = checkpoints.component_metadata(content, "connectors")
        connectors = ConnectorConfig.from_metadata(section)
    if "connectors" not in content["components"]:
        raise ValueError(
            f"{checkpoint} has no connectors (it has {', '.join(content['components'])}); "
            "convert again without leaving them out"
        )
    shapes = checkpoints.param_shapes(checkpoint, "connectors")
    _check_generation(config, content, gemma, checkpoint)
    _check_fit(config, connectors, shapes, length, gemma, checkpoint)
    _verify_tokenizer(pathlib.Path(gemma))
    tokenizer = load_tokenizer(gemma)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{gemma}: the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the text "
            f"tower embeds {config.vocab_size}; they belong to different models"
        )
    check_tower(tower_path(gemma), boxed_tower(config))
    weights = (
        checkpoints.weights_fingerprint(gemma, TEXT_TOWER, _CONVERTERS),
        checkpoints.weights_fingerprint(
            checkpoint, "connectors", "checkpoint_converters.ltx2 (or .omniforcing, with --base)"
        ),
    )
    version = content["model_version"]
    return EncoderFiles(config, connectors, tokenizer, length, version, weights)


def _verify_tokenizer(gemma: pathlib.Path) -> None:
    known = checkpoints.read_json(gemma / "config.json").get("checksums", {})
    for name in sorted(known.keys() - {TEXT_TOWER}):
        file = gemma / name
        if not file.is_file():
            raise checkpoints.DamagedFile(f"{file} is missing; copy {gemma} again")
        if checksums.hash_files([file]) != [known[name]]:
            raise checkpoints.DamagedFile(
                f"{file} is damaged (another checksum); copy {gemma} again, or convert it again"
            )


def verify_tower(gemma: str | os.PathLike) -> None:
    """Raises DamagedFile where the text tower's files do not have their checksums."""
    known = checkpoints.read_json(pathlib.Path(gemma) / "config.json").get("checksums", {})
    checksums.verify(tower_path(gemma), expected=known.get(TEXT_TOWER))


def load_gemma_config(folder: str | os.PathLike) -> GemmaConfig:
    """Reads config.json of a converted Gemma 3 or 4.

    Raises:
      FileNotFoundError: no such folder, or it has no config.json.
      ValueError: not a converted Gemma, or a setting that is not supported.
    """
    file = pathlib.Path(folder) / "config.json"
    how = _HOW_TO_CREATE.format(folder=folder)
    if not file.is_file():
        what = "holds no config.json" if file.parent.is_dir() else "does not exist"
        if file.parent.is_file() or any(file.parent.glob("*.safetensors")):
            what = "is not converted yet: programs read the folder that a converter writes"
            how = _HOW_TO_CREATE.format(folder="FOLDER").replace("HF_FOLDER", str(folder))
        raise FileNotFoundError(f"{folder} {what}; {how} creates it")
    content = checkpoints.read_json(file)
    if "model_type" in content:
        raise ValueError(
            f"{folder} is a Hugging Face folder; convert it: "
            f"{_HOW_TO_CREATE.format(folder='gemma').replace('HF_FOLDER', str(folder))}"
        )
    known = content.get("family") in (FAMILY, GEMMA4_FAMILY)
    if not known or content.get("format") != checkpoints.FORMAT:
        option = "--upsampler" if content.get("family") == checkpoints.UPSAMPLER else "--checkpoint"
        what = f", which is for {option}" if content.get("family") in checkpoints.FAMILIES else ""
        raise ValueError(
            f"{file}: found family {content.get('family')!r}{what}, format "
            f"{content.get('format')!r}; expected {FAMILY!r} or {GEMMA4_FAMILY!r}, "
            f"{checkpoints.FORMAT}. {_HOW_TO_CREATE.format(folder='FOLDER')} creates it"
        )
    groups = ("config", "fingerprints", "checksums")
    if wrong := [name for name in groups if not isinstance(content.get(name, {}), dict)]:
        raise ValueError(f"{file}: no encoder has such {', '.join(wrong)}; {how} creates it")
    with checkpoints.parsing(file):
        config = GemmaConfig.from_metadata(content["config"])
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, "int") and not (type(value) is int and 0 <= value < 2**31):
            raise ValueError(f"{file}: {field.name} must be a whole number, not {value!r:.60}")
    return config


def _check_generation(
    config: GemmaConfig,
    content: Mapping[str, Any],
    gemma: str | os.PathLike,
    checkpoint: str | os.PathLike,
) -> None:
    """Gemma 3 12B, Gemma 4 12B and LTX-2.5's own Gemma 4 have the same sizes, which do not tell."""
    model_version = content["model_version"]
    newer = tuple(int(number) for number in model_version.split(".")[:2]) >= (2, 4)
    if newer != config.gemma4:
        found, needed = ("Gemma 4", "Gemma 3") if config.gemma4 else ("Gemma 3", "Gemma 4")
        raise ValueError(
            f"{gemma} cannot be used with {checkpoint}: LTX-{model_version} reads a {needed}, this "
            f"is a {found} (checkpoint_converters.gemma3 and .gemma4 convert them)"
        )
    found = checkpoints.read_json(pathlib.Path(gemma) / "config.json").get(GEMMA_VERSION)
    needed = content.get(GEMMA_VERSION)
    if None not in (found, needed) and found != needed:
        raise ValueError(
            f"{gemma} cannot be used with {checkpoint}: it is Gemma {found}, the model was trained "
            f"with {needed}; convert the text encoder of the same release"
        )


def _check_fit(
    config: GemmaConfig,
    connectors: ConnectorConfig,
    shapes: Mapping[str, Any],
    length: int,
    gemma: str | os.PathLike,
    checkpoint: str | os.PathLike,
) -> None:
    problems = []
    if config.hidden_size != connectors.text_channels:
        problems.append(
            f"the connectors take hidden states of width {connectors.text_channels}, the text "
            f"tower's have {config.hidden_size}"
        )
    name = "video_projection" if connectors.separate_projections else "projection"
    rows = shapes[name]["kernel"].shape[0]
    if rows != connectors.text_channels * config.num_states:
        problems.append(
            f"the connectors project {rows / connectors.text_channels:g} hidden states, the text "
            f"tower has {config.num_states} (embeddings and {config.num_layers} layers)"
        )
    if length < 1 or length % connectors.num_registers:
        problems.append(
            f"the text length must be a multiple of the {connectors.num_registers} registers, not "
            f"{length}"
        )
    if problems:
        raise ValueError(
            f"{gemma} cannot be used with {checkpoint}: {'; '.join(problems)}. LTX-2 uses Gemma 3 "
            "12B, LTX-2.5 its Gemma 4 12B, and 1024 tokens"
        )


def tower_path(folder: str | os.PathLike) -> pathlib.Path:
    """Where the text tower's weights are; FileNotFoundError if they are not."""
    path = pathlib.Path(folder).absolute() / TEXT_TOWER
    if not path.is_dir():
        how = _HOW_TO_CREATE.format(folder=folder)
        raise FileNotFoundError(f"{folder} has no {TEXT_TOWER}; {how} creates it")
    return path


def boxed_tower(config: GemmaConfig) -> Any:
    """Abstract parameters of `TextTower` with their logical axis names."""
    return jax.eval_shape(lambda key: init_boxed_params(config, key), jax.random.key(0))


def check_tower(path: pathlib.Path, boxed: Any) -> None:
    """Raises ValueError unless just the leaves of `boxed` are on disk, in their shapes."""
    with damage.reading(path):
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
    found, expected = _shapes(tree), _shapes(nn.unbox(boxed))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, must be {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shapes of a tree's leaves by their keys, joined by "/"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in path): list(leaf.shape) for path, leaf in leaves}
