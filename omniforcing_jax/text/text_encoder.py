"""From sentences to contexts: tokenizer, Gemma's text tower and the LTX-2 connectors in one.

    encoder = TextEncoder.load("gemma", "ltx2")
    features = encoder.encode(["A dog runs through tall grass."])

The tower has 11.8B weights: 23.5 GB in bfloat16, 11.8 GB as int8. Contexts depend on the prompt
only, so `close` frees the memory once the prompts are encoded.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from omniforcing_jax.distributed import partitioning
from omniforcing_jax.io import checkpoints, damage
from omniforcing_jax.models import quantization
from omniforcing_jax.models.text.connectors import (
    ConnectorConfig,
    TextConnectors,
    projection_scale,
)
from omniforcing_jax.models.text.gemma import LayerProjection, TextTower
from omniforcing_jax.models.text.gemma_config import GemmaConfig
from omniforcing_jax.text.encoder_files import (
    EncoderFiles,
    boxed_tower,
    check_encoder,
    check_tower,
    tower_path,
    verify_tower,
)
from omniforcing_jax.text.features import TextFeatures

_to_int8 = jax.jit(quantization.quantize, static_argnums=1)


class TextEncoder:
    """Encodes prompts on one device or a mesh.

    Attributes:
      tokenizer: of the Gemma folder.
      length: S, tokens per prompt with padding; a multiple of the connectors' registers.
      shared_features: video and audio features are one array (LTX-2.0).
      fingerprint: see `EncoderFiles.fingerprint`.
    """

    def __init__(
        self,
        files: EncoderFiles,
        params: Mapping[str, Any],
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        quantize: str = "none",
        mesh: Mesh | None = None,
    ):
        """Use `load`; this takes what is in memory already.

        Args:
          files: what the parameters belong to.
          params: {"tower": of `TextTower`, "projections": from `layer_projections`, "connectors":
            video_connector and audio_connector of `TextConnectors`}.
          dtype, quantize: see `load`.
          mesh: where `params` lies; None is one device.
        """
        self.tokenizer, self.length = files.tokenizer, files.length
        self.shared_features = not files.connectors.separate_projections
        self.fingerprint = files.fingerprint(dtype, quantize)
        self._model_version = files.model_version
        self._params: dict[str, Any] | None = dict(params)
        self._mesh = mesh
        self._tower = TextTower(files.config, dtype, quantize)
        self._connectors = TextConnectors(files.connectors, dtype)

    @classmethod
    def load(
        cls,
        gemma: str | os.PathLike,
        checkpoint: str | os.PathLike,
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        quantize: str = "none",
        length: int | None = None,
        mesh: Mesh | None = None,
        verify: bool = True,
    ) -> "TextEncoder":
        """Reads a converted Gemma and the connectors of a converted LTX-2 or student.

        Args:
          gemma: folder from `checkpoint_converters.gemma3` or `.gemma4`.
          checkpoint: folder from `checkpoint_converters.ltx2` or `.omniforcing`.
          dtype: compute dtype; weights are cast to it while loading.
          quantize: "int8" keeps the tower's matrices as int8, one at a time, so that the tower is
            never in memory as a whole in `dtype`.
          length: tokens per prompt; None as the model was trained, which for LTX-2 is 1024.
          mesh: from `partitioning.make_mesh`; None puts everything on the first device.
          verify: compare the files with their checksums first.

        Raises:
          FileNotFoundError, ValueError: as `check_encoder`; nothing large has been read then.
          ValueError: unknown quantisation.
          DamagedFile: a file is not what was written, or is missing.
        """
        quantization.check_mode(quantize)
        files = check_encoder(gemma, checkpoint, length=length)
        config, connectors = files.config, files.connectors
        if verify:
            verify_tower(gemma)
        tower = load_text_tower(gemma, config, dtype=dtype, quantize=quantize, mesh=mesh)
        sharding = None  # the first device
        if mesh is not None:
            boxed = boxed_connectors(connectors, config.num_states)
            sharding = partitioning.shardings(boxed, mesh)
        loaded = checkpoints.load_params(
            checkpoint, "connectors", dtype=dtype, sharding=sharding, verify=verify
        )
        params = {
            "tower": tower,
            "projections": layer_projections(loaded, connectors, mesh),
            "connectors": {name: loaded[name] for name in ("video_connector", "audio_connector")},
        }
        return cls(files, params, dtype=dtype, quantize=quantize, mesh=mesh)

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
        arrays = (self._place(token_ids), self._place(mask))
        result = _features(self._tower, self._connectors.config, self._open(), *arrays)
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
        return _contexts(self._connectors, self._open(), *map(self._place, arrays))

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
        return TextFeatures(*contexts, mask=None, prompt=text, model_version=self._model_version)

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
        return jax.device_put(x, partitioning.row_sharding(self._mesh, np.shape(x)[0]))


# jitted here, not per encoder: one that is loaded again is not compiled again
@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(tower: TextTower, config: ConnectorConfig, params, ids, mask):
    return tower.apply(
        {"params": params["tower"]}, ids, mask, params["projections"], config, method="features"
    )


@functools.partial(jax.jit, static_argnums=0)
def _contexts(connectors: TextConnectors, params, *arrays):
    return connectors.apply({"params": params["connectors"]}, *arrays, method="contexts")


def load_text_tower(
    folder: str | os.PathLike,
    config: GemmaConfig,
    *,
    dtype: jnp.dtype,
    quantize: str = "none",
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Parameters of `TextTower`, restored and quantised leaf by leaf.

    Args:
      folder: converted Gemma.
      config: from `encoder_files.load_gemma_config`.
      dtype: of the leaves that are not quantised.
      quantize: one of `quantization.MODES`.
      mesh: see `TextEncoder.load`.

    Raises:
      FileNotFoundError: the folder has no weights.
      ValueError: they are not of the shapes that the configuration gives.
    """
    path, boxed = tower_path(folder), boxed_tower(config)
    check_tower(path, boxed)
    handler = ocp.PyTreeCheckpointHandler()
    shapes = nn.unbox(boxed)
    alone = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: alone, shapes)
    if mesh is not None:
        shardings = partitioning.shardings(boxed, mesh)

    def load(keys, _, sharding):
        leaf = _restore_leaf(handler, path, keys, dtype, sharding)
        axis = quantization.INPUT_AXIS.get(keys[-1].key)
        if quantize == "int8" and axis is not None:
            leaf = _to_int8(leaf, axis)
        return jax.block_until_ready(leaf)  # or two large leaves would be in flight

    return jax.tree_util.tree_map_with_path(load, shapes, shardings)


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

    def split(kernel):  # [D * L, W], row d * L + l -> [L, D, W]
        return kernel.reshape(config.text_channels, -1, kernel.shape[-1]).swapaxes(0, 1)

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


def _restore_leaf(handler, path: pathlib.Path, keys, dtype: jnp.dtype, sharding) -> jax.Array:
    """One leaf of the checkpoint in `path`, by its keys in the tree."""
    item: Any = 0
    restore_args: Any = ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
    for key in reversed(keys):
        item, restore_args = {key.key: item}, {key.key: restore_args}
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    with damage.reading(path):
        return jax.tree.leaves(handler.restore(path, args=args))[0]


def boxed_connectors(config: ConnectorConfig, num_states: int) -> Any:
    """Abstract parameters of `TextConnectors` with their logical axis names."""
    states = jnp.zeros((1, config.num_registers, config.text_channels, num_states))
    mask = jnp.ones((1, config.num_registers))
    init = TextConnectors(config).init
    return jax.eval_shape(lambda key: init(key, states, mask), jax.random.key(0))["params"]
