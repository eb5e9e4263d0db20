"""From sentences to contexts: tokenizer, Gemma 3's text tower and the LTX-2 connectors in one.

    encoder = TextEncoder.load("gemma", "ltx2")
    features = encoder.encode(["A dog runs through tall grass."])

The tower has 11.8B weights: 23.5 GB in bfloat16, 11.8 GB as int8. Contexts depend on the prompt
only, so `close` frees the memory once the prompts are encoded.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from omniforcing_jax import checkpoints, partitioning
from omniforcing_jax.models import quantization
from omniforcing_jax.models.connectors import (
    ConnectorConfig,
    TextConnectors,
    kernel_by_layer,
    projection_scale,
)
from omniforcing_jax.models.gemma import LayerProjection, TextTower, init_boxed_params
from omniforcing_jax.models.gemma_config import GemmaConfig
from omniforcing_jax.text_features import TextFeatures
from omniforcing_jax.tokenizer import Tokenizer, load_tokenizer

TEXT_TOWER = "text_tower"
FAMILY = "gemma3"
_HOW_TO_CREATE = "python -m checkpoint_converters.gemma3 --input HF_FOLDER --output {folder}"
_SAMPLES_PER_AXIS = 16  # of each weight that goes into the fingerprint

_to_int8 = jax.jit(quantization.quantize, static_argnums=1)


class TextEncoder:
    """Encodes prompts on one device or a mesh.

    Attributes:
      tokenizer: of the Gemma folder.
      length: tokens per prompt, padding included; a multiple of the connectors' registers.
      shared_features: video and audio features are one array (LTX-2.0).
      model_version: of the LTX-2 model the connectors belong to.
      fingerprint: tells encoders apart whose features differ: configurations, compute dtype,
        quantisation and a sample of every weight. The same converted files give the same on any
        machine and mesh.
    """

    def __init__(
        self,
        config: GemmaConfig,
        connectors: ConnectorConfig,
        params: Mapping[str, Any],
        *,
        tokenizer: Tokenizer,
        model_version: str,
        fingerprint: str,
        dtype: jnp.dtype = jnp.bfloat16,
        quantize: str = "none",
        length: int = 1024,
        mesh: Mesh | None = None,
    ):
        """Use `load`; this takes what is in memory already.

        Args:
          params: {"tower": of `TextTower`, "projections": from `layer_projections`, "connectors":
            video_connector and audio_connector of `TextConnectors`}.
          mesh: where `params` lies; None is one device.
        """
        self.tokenizer = tokenizer
        self.length = length
        self.shared_features = not connectors.separate_projections
        self.model_version = model_version
        self.fingerprint = fingerprint
        self._params: dict[str, Any] | None = dict(params)
        self._mesh = mesh
        tower = TextTower(config, dtype, quantize)
        self._features = jax.jit(
            lambda params, ids, mask: tower.apply(
                {"params": params["tower"]},
                ids,
                mask,
                params["projections"],
                connectors,
                method="features",
            )
        )
        module = TextConnectors(connectors, dtype)
        self._contexts = jax.jit(
            lambda params, *args: module.apply(
                {"params": params["connectors"]}, *args, method="contexts"
            )
        )

    @classmethod
    def load(
        cls,
        gemma: str | os.PathLike,
        checkpoint: str | os.PathLike,
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        quantize: str = "none",
        length: int = 1024,
        mesh: Mesh | None = None,
    ) -> "TextEncoder":
        """Reads a converted Gemma and the connectors of a converted LTX-2 or student.

        Args:
          gemma: folder from `checkpoint_converters.gemma3`.
          checkpoint: folder from `checkpoint_converters.ltx2` or `.omniforcing`.
          dtype: compute dtype; weights are cast to it while loading.
          quantize: "int8" keeps the tower's matrices as int8, one at a time, so that the tower is
            never in memory as a whole in `dtype`.
          length: tokens per prompt; 1024 is what LTX-2 was trained with.
          mesh: from `partitioning.make_mesh`; None puts everything on the first device.

        Raises:
          FileNotFoundError: a folder is not there.
          ValueError: a folder holds something else, the tower does not fit the connectors, or the
            length is not a multiple of their registers; nothing large has been read then.
        """
        quantization.check_mode(quantize)
        config = load_gemma_config(gemma)
        content = checkpoints.load_config(checkpoint)
        connectors = ConnectorConfig.from_metadata(
            checkpoints.component_metadata(content, "connectors")
        )
        if "connectors" not in content["components"]:
            raise ValueError(
                f"{checkpoint} has no connectors (it has {', '.join(content['components'])}); "
                "convert again without leaving them out"
            )
        shapes = checkpoints.param_shapes(checkpoint, "connectors")
        _check_fit(config, connectors, shapes, length, gemma, checkpoint)
        tokenizer = load_tokenizer(gemma)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{gemma}: the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the text "
                f"tower embeds {config.vocab_size}; they belong to different models"
            )
        digest = hashlib.sha256(
            json.dumps(
                [
                    dataclasses.asdict(config),
                    dataclasses.asdict(connectors),
                    jnp.dtype(dtype).name,
                    quantize,
                    tokenizer.fingerprint,
                ]
            ).encode()
        )
        tower = load_text_tower(
            gemma,
            config,
            dtype=dtype,
            quantize=quantize,
            mesh=mesh,
            see=functools.partial(_add_sample, digest, mesh=mesh),
        )
        sharding = None  # the first device
        if mesh is not None:
            boxed = _boxed_connectors(connectors, config.num_states)
            sharding = partitioning.shardings(boxed, mesh)
        loaded = checkpoints.load_params(checkpoint, "connectors", dtype=dtype, sharding=sharding)
        for path, leaf in jax.tree.leaves_with_path(loaded):
            _add_sample(digest, _names(path), leaf, mesh=mesh)
        params = {
            "tower": tower,
            "projections": layer_projections(loaded, connectors, mesh),
            "connectors": {name: loaded[name] for name in ("video_connector", "audio_connector")},
        }
        return cls(
            config,
            connectors,
            params,
            tokenizer=tokenizer,
            model_version=content["model_version"],
            fingerprint=digest.hexdigest()[:16],
            dtype=dtype,
            quantize=quantize,
            length=length,
            mesh=mesh,
        )

    def features(
        self, token_ids: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """Features before the connectors, [B, S, Wv] and [B, S, Wa]; see `shared_features`.

        Args:
          token_ids: int32 [B, S].
          mask: bool [B, S], True at valid tokens.

        Raises:
          ValueError: shapes that do not fit, or the encoder was closed.
        """
        result = self._features(self._open(), self._place(token_ids), self._place(mask))
        if self.shared_features:
            return result["shared"], result["shared"]
        return result["video"], result["audio"]

    def contexts(
        self,
        video_features: jax.typing.ArrayLike,
        audio_features: jax.typing.ArrayLike,
        mask: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Contexts [B, S, Wv] and [B, S, Wa]; every token of them is to be attended to.

        Args:
          video_features, audio_features: from `features`, or stored ones.
          mask: bool [B, S], True at valid tokens.

        Raises:
          ValueError: shapes that do not fit, or the encoder was closed.
        """
        arrays = (video_features, audio_features, mask)
        return self._contexts(self._open(), *map(self._place, arrays))

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Contexts [B, length, Wv] and [B, length, Wa] of B prompts, as one batch.

        Warns when a prompt is cut. The result's `prompt` has one prompt per line.

        Raises:
          ValueError: no prompt, or one that is not a string of valid Unicode.
        """
        if not prompts:
            raise ValueError("there is no prompt to encode; pass at least one, which may be empty")
        token_ids, mask = self.tokenizer.encode_batch(prompts, self.length)
        contexts = self.contexts(*self.features(token_ids, mask), mask)
        text = "\n".join(prompt.strip() for prompt in prompts)
        return TextFeatures(*contexts, mask=None, prompt=text, model_version=self.model_version)

    def close(self) -> None:
        """Frees the weights' device memory; the encoder cannot be used any more."""
        for leaf in jax.tree.leaves(self._params):
            leaf.delete()
        self._params = None

    def _open(self) -> dict[str, Any]:
        if self._params is None:
            raise ValueError("the text encoder was closed; load it again")
        return self._params

    def _place(self, x: jax.typing.ArrayLike) -> jax.Array:
        """On the device, or with the batch split over the mesh where it divides."""
        if self._mesh is None:
            return jnp.asarray(x)
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        spec = P(("data", "fsdp")) if np.shape(x)[0] % ways == 0 else P()
        return jax.device_put(x, NamedSharding(self._mesh, spec))


def load_gemma_config(folder: str | os.PathLike) -> GemmaConfig:
    """Reads config.json of a converted Gemma 3.

    Raises:
      FileNotFoundError: no such folder, or it has no config.json.
      ValueError: not a converted Gemma 3, or a setting that is not supported.
    """
    file = pathlib.Path(folder) / "config.json"
    how = _HOW_TO_CREATE.format(folder=folder)
    if not file.is_file():
        what = "holds no config.json" if file.parent.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; {how} creates it")
    content = json.loads(file.read_text())
    if "model_type" in content:
        raise ValueError(
            f"{folder} is a Hugging Face folder; convert it: "
            f"{_HOW_TO_CREATE.format(folder='gemma').replace('HF_FOLDER', str(folder))}"
        )
    if (content.get("family"), content.get("format")) != (FAMILY, checkpoints.FORMAT):
        raise ValueError(
            f"{file}: found family {content.get('family')!r}, format {content.get('format')!r}; "
            f"expected {FAMILY!r}, {checkpoints.FORMAT}. {how} creates it"
        )
    return GemmaConfig.from_metadata(content["config"])


def load_text_tower(
    folder: str | os.PathLike,
    config: GemmaConfig,
    *,
    dtype: jnp.dtype,
    quantize: str = "none",
    mesh: Mesh | None = None,
    see: Callable[[str, jax.Array], None] = lambda name, leaf: None,
) -> dict[str, Any]:
    """Parameters of `TextTower`, restored and quantised leaf by leaf.

    Args:
      folder: converted Gemma 3.
      config: from `load_gemma_config`.
      dtype: of the leaves that are not quantised.
      quantize: one of `quantization.MODES`.
      mesh: see `TextEncoder.load`.
      see: called with the name and value of each leaf before it is quantised.

    Raises:
      FileNotFoundError: the folder has no weights.
      ValueError: they are not of the shapes that the configuration gives.
    """
    path = pathlib.Path(folder).absolute() / TEXT_TOWER
    if not path.is_dir():
        how = _HOW_TO_CREATE.format(folder=folder)
        raise FileNotFoundError(f"{folder} has no {TEXT_TOWER}; {how} creates it")
    boxed = jax.eval_shape(lambda key: init_boxed_params(config, key), jax.random.key(0))
    shardings = {}
    if mesh is not None:
        shardings = {
            _names(p): s for p, s in jax.tree.leaves_with_path(partitioning.shardings(boxed, mesh))
        }
    alone = SingleDeviceSharding(jax.local_devices()[0])
    expected = {_names(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(nn.unbox(boxed))}
    params: dict[str, Any] = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        found = {_names(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(tree)}
        _check_leaves(path, found, expected)
        for name in sorted(expected):
            sharding = shardings.get(name, alone)
            leaf = _restore_leaf(checkpointer, path, name, dtype, sharding)
            see(name, leaf)
            *parents, last = name.split("/")
            if quantize == "int8" and last in quantization.INPUT_AXIS:
                leaf = _to_int8(leaf, quantization.INPUT_AXIS[last])
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jax.block_until_ready(leaf)  # or two large leaves would be in flight
    return params


def layer_projections(
    connector_params: Mapping[str, Any], config: ConnectorConfig, mesh: Mesh | None = None
) -> dict[str, LayerProjection]:
    """The connectors' projections, taken apart by hidden state, for `TextTower.features`.

    Args:
      connector_params: parameters of `TextConnectors`.
      config: its configuration.
      mesh: where the parameters lie; None is one device.

    Returns:
      {"video", "audio"}, or {"shared"} where one projection serves both.
    """
    sources = {"shared": "projection"}
    if config.separate_projections:
        sources = {"video": "video_projection", "audio": "audio_projection"}

    def split(kernel):  # [D * L, W] -> [L, D, W]
        return jnp.swapaxes(kernel_by_layer(kernel, config), 0, 1)

    result = {}
    for name, source in sources.items():
        params = connector_params[source]
        out_dim = params["kernel"].shape[-1]
        sharding = None
        if mesh is not None:
            shape = jax.eval_shape(split, params["kernel"])
            box = nn.LogicallyPartitioned(shape, ("layers", "embed", "mlp"))
            sharding = partitioning.shardings(box, mesh)
        kernel = jax.jit(split, out_shardings=sharding)(params["kernel"])
        scale = projection_scale(out_dim, config)
        result[name] = LayerProjection(kernel, params.get("bias"), scale)
    return result


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
            "12B and 1024 tokens"
        )


def _check_leaves(
    path: pathlib.Path, found: Mapping[str, tuple], expected: Mapping[str, tuple]
) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(found[name])}, must be {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")


def _restore_leaf(
    checkpointer: ocp.Checkpointer,
    path: pathlib.Path,
    name: str,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    item: Any = 0
    restore_args: Any = ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
    for key in reversed(name.split("/")):
        item, restore_args = {key: item}, {key: restore_args}
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    return jax.tree.leaves(checkpointer.restore(path, args=args))[0]


def _boxed_connectors(config: ConnectorConfig, num_states: int) -> Any:
    """Abstract parameters of `TextConnectors` with their logical axis names."""
    states = jnp.zeros((1, config.num_registers, config.text_channels, num_states))
    mask = jnp.ones((1, config.num_registers))
    init = TextConnectors(config).init
    return jax.eval_shape(lambda key: init(key, states, mask), jax.random.key(0))["params"]


def _names(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)


def _add_sample(digest: Any, name: str, leaf: jax.Array, *, mesh: Mesh | None) -> None:
    """Adds a leaf's name and some of its values, evenly spread, to a hash."""
    steps = tuple(max(1, n // _SAMPLES_PER_AXIS) for n in leaf.shape)
    # replicated, so that every process of a multi-host mesh can read it
    sample = _sampler(steps, None if mesh is None else NamedSharding(mesh, P()))(leaf)
    digest.update(name.encode())
    digest.update(np.asarray(sample).tobytes())


@functools.cache
def _sampler(steps: tuple[int, ...], sharding: NamedSharding | None) -> Callable:
    every = tuple(slice(None, None, step) for step in steps)
    return jax.jit(lambda x: x[every], out_shardings=sharding)
