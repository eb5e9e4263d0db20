"""Which part of the transformer a parameter belongs to, from its path in the tree.

Gradient norms are reported by these groups, and a run that diverges names one of them.
"""

from typing import Any

import jax

GROUPS = (
    "embeddings",
    "adaln",
    "video_self_attn",
    "video_text_attn",
    "video_ff",
    "audio_self_attn",
    "audio_text_attn",
    "audio_ff",
    "a2v_attn",
    "v2a_attn",
    "sinks",
    "heads",
)

# names below `blocks`
_BLOCK = {
    "video_attn": "video_self_attn",
    "video_text_attn": "video_text_attn",
    "video_ff": "video_ff",
    "audio_attn": "audio_self_attn",
    "audio_text_attn": "audio_text_attn",
    "audio_ff": "audio_ff",
    "a2v_attn": "a2v_attn",
    "v2a_attn": "v2a_attn",
    "video_table": "adaln",
    "audio_table": "adaln",
    "video_cross_table": "adaln",
    "audio_cross_table": "adaln",
    "video_prompt_table": "adaln",
    "audio_prompt_table": "adaln",
}
# names at the top of the tree
_TOP = {
    "video_in": "embeddings",
    "audio_in": "embeddings",
    "video_caption": "embeddings",
    "audio_caption": "embeddings",
    "keyframe_embedding": "embeddings",
    "video_adaln": "adaln",
    "audio_adaln": "adaln",
    "video_cross_adaln": "adaln",
    "audio_cross_adaln": "adaln",
    "a2v_gate_adaln": "adaln",
    "v2a_gate_adaln": "adaln",
    "video_prompt_adaln": "adaln",
    "audio_prompt_adaln": "adaln",
    "audio_sinks": "sinks",
    "video_out": "heads",
    "audio_out": "heads",
    "video_out_table": "heads",
    "audio_out_table": "heads",
}


def path_names(path: tuple) -> tuple[str, ...]:
    """A key path of `jax.tree_util`, or a tuple of names, as names."""
    return tuple(key if isinstance(key, str) else str(key.key) for key in path)


def group_of(path: tuple) -> str:
    """The entry of `GROUPS` to which the parameter at `path` belongs.

    Raises:
      ValueError: the transformer has no such parameter.
    """
    names = path_names(path)
    table, name = (_BLOCK, names[1]) if names[0] == "blocks" else (_TOP, names[0])
    if name not in table:
        raise ValueError(
            f"the parameter {'/'.join(names)} belongs to no group of the transformer; add "
            f"{name!r} to parameter_groups.py"
        )
    return table[name]


def is_audio(path: tuple) -> bool:
    """Whether the parameter acts on the audio stream: what it computes is added to that stream.

    Video-to-audio attention does, audio-to-video attention does not.
    """
    names = path_names(path)
    name = names[1] if names[0] == "blocks" else names[0]
    return name.startswith(("audio_", "v2a_"))


def is_kernel(path: tuple) -> bool:
    """Whether the parameter is the matrix of a linear layer."""
    return path_names(path)[-1] == "kernel"


def label_tree(params: Any, label: Any) -> Any:
    """The tree of `label(path)` for every leaf of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: label(path), params)
