"""Official checkpoint keys <-> paths in our parameter trees: one table, both directions.

A row of a component is (official key, path, kind). Placeholders stand for the parts that vary:
`<i>`, `<j>` are integers that appear on both sides, `<layer>` is an integer that becomes the
leading axis of a stacked array, any other `<name>` is looked up in `NAMES`. The `kind` says which
tensors hang below the key and how each is laid out (`KINDS`). Example:

    model.diffusion_model.transformer_blocks.7.attn1.to_q.weight (out, in)
        -> transformer: blocks/video_attn/q/kernel[7] (in, out)

The stabilisers of a student (paper Table 3) have no official keys. They lie beside those of their
attention: per-head norms `attn1.q_head_norm.weight` and `attn1.k_head_norm.weight` (head_dim,), and
`attn1.alpha` (1,), whose tanh scales the output; so do those of the three other causal attentions.

All transforms are permutations of axes or a squeeze of a leading axis of size one, so they can be
undone bit by bit.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from omniforcing_jax.text.encoder_files import TEXT_TOWER

DIT = "model.diffusion_model."
GEMMA = "language_model.model."
TEXT_PROJECTIONS = "text_embedding_projection."
# the bytes of tokenizer.json in LTX-2.5's text encoder file, which no other file has
GEMMA_SOURCE = "gemma_source_checkpoint"  # metadata: JSON that names LTX-2.5's Gemma
TOKENIZER_TENSOR = "tokenizer_json"


class Transform(NamedTuple):
    """Layout change of one tensor: squeeze a leading axis of size 1, then permute axes."""

    permutation: tuple[int, ...] | None = None
    squeeze: bool = False

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Official layout -> ours; a view."""
        array = array[0] if self.squeeze else array
        return array if self.permutation is None else array.transpose(self.permutation)

    def invert(self, array: np.ndarray) -> np.ndarray:
        """Our layout -> official; a view."""
        if self.permutation is not None:
            array = array.transpose(np.argsort(self.permutation))
        return array[None] if self.squeeze else array

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Our shape of a tensor with the official shape `shape`.

        Raises:
          ValueError: the tensor has another rank than this kind of tensor must have.
        """
        shape = tuple(shape)
        if self.squeeze:
            if not shape or shape[0] != 1:
                raise ValueError(f"leading axis must have size 1, shape is {shape}")
            shape = shape[1:]
        if self.permutation is None:
            return shape
        if len(shape) != len(self.permutation):
            raise ValueError(f"must have {len(self.permutation)} axes, shape is {shape}")
        return tuple(shape[axis] for axis in self.permutation)


_AS_IS = Transform()

# kind: {what follows the official key: (what follows our path, transform)}
KINDS: dict[str, dict[str, tuple[str, Transform]]] = {
    "linear": {".weight": ("/kernel", Transform((1, 0))), ".bias": ("/bias", _AS_IS)},
    "conv1d": {".weight": ("/kernel", Transform((2, 1, 0))), ".bias": ("/bias", _AS_IS)},
    "conv2d": {".weight": ("/kernel", Transform((2, 3, 1, 0))), ".bias": ("/bias", _AS_IS)},
    "conv3d": {".weight": ("/kernel", Transform((2, 3, 4, 1, 0))), ".bias": ("/bias", _AS_IS)},
    # PyTorch stores a transposed convolution as (in, out, k); ours is (k, in, out), not flipped
    "conv_transpose1d": {".weight": ("/kernel", Transform((2, 0, 1))), ".bias": ("/bias", _AS_IS)},
    "norm": {".weight": ("/scale", _AS_IS)},
    "group_norm": {".weight": ("/scale", _AS_IS), ".bias": ("/bias", _AS_IS)},
    "embedding": {".weight": ("/embedding", _AS_IS)},
    "array": {"": ("", _AS_IS)},
    "sinks": {"": ("", Transform(squeeze=True))},
}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# placeholder: {official name: our name}
NAMES: dict[str, dict[str, str]] = {
    "projection": {
        "patchify_proj": "video_in",
        "audio_patchify_proj": "audio_in",
        "proj_out": "video_out",
        "audio_proj_out": "audio_out",
    },
    "caption": {"caption_projection": "video_caption", "audio_caption_projection": "audio_caption"},
    "adaln": {
        "adaln_single": "video_adaln",
        "audio_adaln_single": "audio_adaln",
        "prompt_adaln_single": "video_prompt_adaln",
        "audio_prompt_adaln_single": "audio_prompt_adaln",
        "av_ca_video_scale_shift_adaln_single": "video_cross_adaln",
        "av_ca_audio_scale_shift_adaln_single": "audio_cross_adaln",
        "av_ca_a2v_gate_adaln_single": "a2v_gate_adaln",
        "av_ca_v2a_gate_adaln_single": "v2a_gate_adaln",
    },
    "head_table": {
        "scale_shift_table": "video_out_table",
        "audio_scale_shift_table": "audio_out_table",
    },
    "attention": {
        "attn1": "video_attn",
        "attn2": "video_text_attn",
        "audio_attn1": "audio_attn",
        "audio_attn2": "audio_text_attn",
        "audio_to_video_attn": "a2v_attn",
        "video_to_audio_attn": "v2a_attn",
    },
    "heads": {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out", "to_gate_logits": "gate"},
    "qk_norm": _same("q_norm", "k_norm"),
    "head_norm": _same("q_head_norm", "k_head_norm"),
    "feed_forward": {"ff": "video_ff", "audio_ff": "audio_ff"},
    "half_ff": {"net.0.proj": "up", "net.2": "down"},
    "block_table": {
        "scale_shift_table": "video_table",
        "audio_scale_shift_table": "audio_table",
        "scale_shift_table_a2v_ca_video": "video_cross_table",
        "scale_shift_table_a2v_ca_audio": "audio_cross_table",
        "prompt_scale_shift_table": "video_prompt_table",
        "audio_prompt_scale_shift_table": "audio_prompt_table",
    },
    "connector": {
        "video_embeddings_connector": "video_connector",
        "audio_embeddings_connector": "audio_connector",
    },
    "aggregate": {
        "aggregate_embed": "projection",
        "video_aggregate_embed": "video_projection",
        "audio_aggregate_embed": "audio_projection",
    },
    "coder": _same("encoder", "decoder"),
    "end": _same("conv_in", "conv_out"),
    "stage": _same("down_blocks", "up_blocks"),
    "level": _same("down", "up"),
    "conv": _same("conv1", "conv2"),
    "upsampler_end": _same("initial_conv", "final_conv"),
    "upsampler_stage": _same("res_blocks", "post_upsample_res_blocks"),
    "group_norm": _same("norm1", "norm2"),
    "audio_conv": _same("conv1", "conv2", "nin_shortcut"),
    "statistic": {"mean-of-means": "mean", "std-of-means": "std"},
    # LTX-2.0 has one generator, LTX-2.3 a vocoder and a bandwidth extension
    "generator": {"": "", "vocoder.": "vocoder/", "bwe_generator.": "bwe_generator/"},
    "wave_end": _same("conv_pre", "conv_post"),
    "wave_conv": _same("convs1", "convs2"),
    "wave_act": _same("acts1", "acts2"),
    "snake": {
        "act.alpha": "act/alpha",
        "act.beta": "act/beta",
        "upsample.filter": "upsample/filter",
        "downsample.lowpass.filter": "downsample/lowpass/filter",
    },
    "stft": {
        "mel_basis": "mel_basis",
        "stft_fn.forward_basis": "stft_fn/forward_basis",
        "stft_fn.inverse_basis": "stft_fn/inverse_basis",
    },
    "gemma_norm": {
        "input_layernorm": "pre_attn_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "pre_ff_norm",
        "post_feedforward_layernorm": "post_ff_norm",
    },
    "gemma_heads": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"},
    "gemma_ff": {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
}

_BLOCK = "transformer_blocks.<layer>."
_GEMMA4_LAYER = "sequence.<i>."
_CONNECTOR = DIT + "<connector>."
_CONNECTOR_BLOCK = _CONNECTOR + "transformer_1d_blocks.<layer>."

_UPSAMPLER_BLOCK = "<upsampler_stage>.<i>."
_UPSAMPLER = (
    ("<upsampler_end>", "<upsampler_end>", "conv3d"),
    ("initial_norm", "initial_norm", "group_norm"),
    (_UPSAMPLER_BLOCK + "<conv>", "<upsampler_stage>_<i>/<conv>", "conv3d"),
    (_UPSAMPLER_BLOCK + "<group_norm>", "<upsampler_stage>_<i>/<group_norm>", "group_norm"),
)

# component: (what its official keys begin with, ((the rest of the key, our path, kind), ...))
KEY_MAP: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "transformer": (
        DIT,
        (
            ("<projection>", "<projection>", "linear"),
            ("<caption>.linear_<i>", "<caption>/linear_<i>", "linear"),
            ("<adaln>.emb.timestep_embedder.linear_<i>", "<adaln>/linear_<i>", "linear"),
            ("<adaln>.linear", "<adaln>/linear", "linear"),
            ("<head_table>", "<head_table>", "array"),
            ("keyframes_abs_pos_embedding", "keyframe_embedding", "array"),
            ("audio_sink_tokens", "audio_sinks", "sinks"),
            (_BLOCK + "<attention>.<heads>", "blocks/<attention>/<heads>", "linear"),
            (_BLOCK + "<attention>.<qk_norm>", "blocks/<attention>/<qk_norm>", "norm"),
            (_BLOCK + "<attention>.<head_norm>", "blocks/<attention>/<head_norm>", "norm"),
            (_BLOCK + "<attention>.alpha", "blocks/<attention>/alpha", "array"),
            (_BLOCK + "<feed_forward>.<half_ff>", "blocks/<feed_forward>/<half_ff>", "linear"),
            (_BLOCK + "<block_table>", "blocks/<block_table>", "array"),
        ),
    ),
    "connectors": (
        "",
        (
            ("text_embedding_projection.<aggregate>", "<aggregate>", "linear"),
            (_CONNECTOR + "learnable_registers", "<connector>/registers", "array"),
            (_CONNECTOR_BLOCK + "attn1.<heads>", "<connector>/blocks/attn/<heads>", "linear"),
            (_CONNECTOR_BLOCK + "attn1.<qk_norm>", "<connector>/blocks/attn/<qk_norm>", "norm"),
            (_CONNECTOR_BLOCK + "ff.<half_ff>", "<connector>/blocks/ff/<half_ff>", "linear"),
        ),
    ),
    "video_vae": (
        "vae.",
        (
            ("<coder>.<end>.conv", "<coder>/<end>", "conv3d"),
            (
                "<coder>.<stage>.<i>.res_blocks.<j>.<conv>.conv",
                "<coder>/<stage>_<i>/res_blocks_<j>/<conv>",
                "conv3d",
            ),
            ("<coder>.<stage>.<i>.conv.conv", "<coder>/<stage>_<i>/conv", "conv3d"),
            ("per_channel_statistics.<statistic>", "per_channel_statistics/<statistic>", "array"),
        ),
    ),
    "audio_vae": (
        "audio_vae.",
        (
            ("<coder>.<end>.conv", "<coder>/<end>", "conv2d"),
            ("<coder>.mid.block_<i>.<conv>.conv", "<coder>/mid/block_<i>/<conv>", "conv2d"),
            (
                "<coder>.<level>.<i>.block.<j>.<audio_conv>.conv",
                "<coder>/<level>_<i>/block_<j>/<audio_conv>",
                "conv2d",
            ),
            ("<coder>.down.<i>.downsample.conv", "<coder>/down_<i>/downsample", "conv2d"),
            ("<coder>.up.<i>.upsample.conv.conv", "<coder>/up_<i>/upsample/conv", "conv2d"),
            ("per_channel_statistics.<statistic>", "per_channel_statistics/<statistic>", "array"),
        ),
    ),
    "vocoder": (
        "vocoder.",
        (
            ("<generator><wave_end>", "<generator><wave_end>", "conv1d"),
            ("<generator>ups.<i>", "<generator>ups_<i>", "conv_transpose1d"),
            (
                "<generator>resblocks.<i>.<wave_conv>.<j>",
                "<generator>resblocks_<i>/<wave_conv>_<j>",
                "conv1d",
            ),
            (
                "<generator>resblocks.<i>.<wave_act>.<j>.<snake>",
                "<generator>resblocks_<i>/<wave_act>_<j>/<snake>",
                "array",
            ),
            ("<generator>act_post.<snake>", "<generator>act_post/<snake>", "array"),
            ("mel_stft.<stft>", "mel_stft/<stft>", "array"),
        ),
    ),
    # the files of upsamplers have no prefix; checkpoint_converters.upsampler puts one in front
    "spatial_upsampler": (
        "spatial_upsampler.",
        (
            *_UPSAMPLER,
            ("upsampler.0", "up", "conv2d"),
            ("upsampler.conv", "rational_up", "conv2d"),
            ("upsampler.blur_down.kernel", "blur", "array"),
        ),
    ),
    # nor have those of tiny decoders; checkpoint_converters.tiny_decoder puts one in front
    "tiny_decoder": (
        "tiny_decoder.",
        (
            ("decoder.<i>", "layers_<i>", "conv2d"),
            ("decoder.<i>.conv", "growth_<i>", "conv2d"),
            ("decoder.<i>.conv.<j>", "layers_<i>/conv_<j>", "conv2d"),
        ),
    ),
    "temporal_upsampler": (
        "temporal_upsampler.",
        (*_UPSAMPLER, ("upsampler.0", "up", "conv3d")),
    ),
    TEXT_TOWER: (
        GEMMA,
        (
            ("embed_tokens", "embed", "embedding"),
            ("norm", "final_norm", "norm"),
            ("layers.<layer>.<gemma_norm>", "blocks/<gemma_norm>", "norm"),
            ("layers.<layer>.self_attn.<gemma_heads>", "blocks/attn/<gemma_heads>", "linear"),
            ("layers.<layer>.self_attn.<qk_norm>", "blocks/attn/<qk_norm>", "norm"),
            ("layers.<layer>.mlp.<gemma_ff>", "blocks/ff/<gemma_ff>", "linear"),
            # Gemma 4's layers differ, so they are not stacked. They are called `layers` as well;
            # checkpoint_converters.gemma4 writes `sequence` instead, to tell them apart.
            (_GEMMA4_LAYER + "<gemma_norm>", "layers_<i>/<gemma_norm>", "norm"),
            (_GEMMA4_LAYER + "self_attn.<gemma_heads>", "layers_<i>/attn/<gemma_heads>", "linear"),
            (_GEMMA4_LAYER + "self_attn.<qk_norm>", "layers_<i>/attn/<qk_norm>", "norm"),
            (_GEMMA4_LAYER + "mlp.<gemma_ff>", "layers_<i>/ff/<gemma_ff>", "linear"),
            (_GEMMA4_LAYER + "layer_scalar", "layers_<i>/scalar", "array"),
        ),
    ),
}

# official tensors that no reader uses
IGNORED = (
    r"(audio_)?vae\.per_channel_statistics\.(mean-of-stds|mean-of-stds_over_std-of-means|channel)",
    r"duration_head\..*",  # LTX-2.5: guesses a clip length from the prompt
)


class Place(NamedTuple):
    """Where one official tensor goes.

    Attributes:
      component: one of `checkpoints.COMPONENTS`, or `TEXT_TOWER`.
      path: "/"-separated path of the leaf in that component's tree.
      layer: index along the leaf's leading (layer) axis, None for a leaf that is not stacked.
      transform: layout change of the tensor.
    """

    component: str
    path: str
    layer: int | None
    transform: Transform


class _Rule(NamedTuple):
    """One row of the table with one entry of its kind; a side is (pattern, parts to fill)."""

    component: str
    official: tuple[re.Pattern, tuple[str, ...]]
    path: tuple[re.Pattern, tuple[str, ...]]
    transform: Transform


def _side(template: str, side: int) -> tuple[re.Pattern, tuple[str, ...]]:
    """Pattern and parts, such as ('a.', '<i>', '.b'), of one side: 0 official, 1 ours."""
    parts = tuple(part for part in re.split(r"(<\w+>)", template) if part)
    pattern = ""
    for part in parts:
        name = part[1:-1]
        if not part.startswith("<"):
            pattern += re.escape(part)
        elif name in NAMES:
            choices = "|".join(re.escape(pair[side]) for pair in NAMES[name].items())
            pattern += f"(?P<{name}>{choices})"
        else:
            pattern += rf"(?P<{name}>0|[1-9]\d*)"
    return re.compile(pattern), parts


@functools.cache
def _rules() -> tuple[_Rule, ...]:
    return tuple(
        _Rule(component, _side(prefix + official + suffix, 0), _side(path + leaf, 1), transform)
        for component, (prefix, rows) in KEY_MAP.items()
        for official, path, kind in rows
        for suffix, (leaf, transform) in KINDS[kind].items()
    )


def _fill(parts: tuple[str, ...], values: dict[str, str]) -> str:
    return "".join(values[part[1:-1]] if part.startswith("<") else part for part in parts)


def find_place(key: str) -> Place | None:
    """Where the official key `key` goes; None if no row of the table matches."""
    for rule in _rules():
        match = rule.official[0].fullmatch(key)
        if match:
            found = match.groupdict()
            layer = found.pop("layer", None)
            values = {n: NAMES[n][v] if n in NAMES else v for n, v in found.items()}
            path = _fill(rule.path[1], values)
            layer = None if layer is None else int(layer)
            return Place(rule.component, path, layer, rule.transform)
    return None


@functools.cache
def _reverse_names(name: str) -> dict[str, str]:
    return {ours: official for official, ours in NAMES[name].items()}


def official_key(component: str, path: str, layer: int | None = None) -> tuple[str, Transform]:
    """Official key and transform of a leaf, the inverse of `find_place`.

    Args:
      component: one of `checkpoints.COMPONENTS`, or `TEXT_TOWER`.
      path: "/"-separated path of the leaf.
      layer: which layer of a stacked leaf (see `is_stacked`); None for other leaves.

    Raises:
      ValueError: no row of the table yields this path.
    """
    for rule in _rules():
        match = rule.path[0].fullmatch(path) if rule.component == component else None
        parts = rule.official[1]
        if match and ("<layer>" in parts) == (layer is not None):
            found = match.groupdict()
            values = {n: _reverse_names(n)[v] if n in NAMES else v for n, v in found.items()}
            return _fill(parts, values | {"layer": str(layer)}), rule.transform
    raise ValueError(f"{component}: no official key for the path {path!r} (layer {layer})")


def is_stacked(path: str) -> bool:
    """Whether axis 0 of the leaf at `path` runs over layers, in whatever component."""
    return "blocks" in path.split("/")


def is_ignored(key: str) -> bool:
    """Whether an official tensor is one that nothing reads."""
    return any(re.fullmatch(pattern, key) for pattern in IGNORED)


class Piece(NamedTuple):
    """One official tensor in our layout: a leaf, or one layer of a stacked leaf.

    Attributes:
      leaf: has a shape and a dtype; only for `read` must it be an array, in memory or on disk.
      layer: index along the leading axis, None takes the whole leaf.
    """

    leaf: Any
    layer: int | None
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        """Official shape."""
        shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
        return self.transform.invert(np.broadcast_to(np.float32(0), shape)).shape

    def read(self) -> np.ndarray:
        """The tensor in the official layout."""
        return self.transform.invert(
            np.asarray(self.leaf if self.layer is None else self.leaf[self.layer])
        )


def official_pieces(component: str, path: str, leaf: Any) -> dict[str, Piece]:
    """{official key: piece} of the leaf at a "/"-separated path; of a stacked leaf one per layer.

    Raises:
      ValueError: the leaf does not exist in the official layout.
    """
    pieces = {}
    for layer in range(leaf.shape[0]) if is_stacked(path) else (None,):
        key, transform = official_key(component, path, layer)
        pieces[key] = Piece(leaf, layer, transform)
    return pieces
