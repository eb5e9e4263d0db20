"""What a Gemma 3 or Gemma 4 says about its text tower, as one frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from omniforcing_jax.models.metadata import find_problems, raise_problems
from omniforcing_jax.ranges import MOST_LAYERS, hold_fields

_LAYER_TYPES = {"sliding_attention": False, "full_attention": True}
_ROPE_TYPES = ("default", "linear")
_ROPE_TYPES_4 = ("default", "proportional")
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")

# Settings with a single value in every published Gemma 3; absent means that value.
_FIXED = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}

# Gemma 4 as LTX-2.5 has it: no embeddings per layer, no experts, no shared keys and values.
GEMMA_4_TYPES = ("gemma4_unified_text", "gemma4_text")
_FIXED_4 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
}


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma text tower. The defaults are Gemma 3 12B.

    Attributes:
      vocab_size: V, rows of the embedding table.
      hidden_size: D.
      intermediate_size: hidden width of the gated feed-forward.
      is_global: one flag per layer; without it a token sees the last `sliding_window` tokens only.
      num_heads, num_kv_heads: N and K; N / K query heads share a key/value head.
      query_pre_attn_scalar: the logits are divided by its square root.
      local_rope_theta, local_rope_factor: base of the rotary embedding and divisor of the positions
        in layers with a window.
      global_rope_theta, global_rope_factor: the same in global layers.
      gemma4: the tower is a Gemma 4, and has the following; its logits are not divided.
      global_head_dim, global_num_kv_heads: of global layers; None: as in the others.
      global_keys_are_values: global layers have no values of their own.
      global_rope_fraction: of the channels that global layers rotate.
    """

    vocab_size: int = 262208
    hidden_size: int = 3840
    intermediate_size: int = 15360
    is_global: tuple[bool, ...] = (False, False, False, False, False, True) * 8
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 1024
    local_rope_theta: float = 10000.0
    local_rope_factor: float = 1.0
    global_rope_theta: float = 1000000.0
    global_rope_factor: float = 8.0
    norm_eps: float = 1e-6
    gemma4: bool = False
    global_head_dim: int | None = None
    global_num_kv_heads: int | None = None
    global_keys_are_values: bool = False
    global_rope_fraction: float = 1.0

    def __post_init__(self):
        hold_fields(self)
        if self.global_head_dim is None:
            object.__setattr__(self, "global_head_dim", self.head_dim)
        if self.global_num_kv_heads is None:
            object.__setattr__(self, "global_num_kv_heads", self.num_kv_heads)
        problems = []
        for kv_heads in {self.num_kv_heads, self.global_num_kv_heads}:
            if self.num_heads % kv_heads:
                problems.append(
                    f"{self.num_heads} heads cannot share {kv_heads} key/value heads evenly"
                )
        for head_dim in {self.head_dim, self.global_head_dim}:
            if head_dim % 2:
                problems.append(f"RoPE rotates pairs of channels, so head_dim {head_dim} is odd")
        if not self.is_global:
            problems.append("there must be at least one layer")
        raise_problems("Gemma", problems)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.is_global)

    @property
    def norm_offset(self) -> float:
        """What is added to the scales of the norms."""
        return 0.0 if self.gemma4 else 1.0

    def heads(self, is_global: bool) -> tuple[int, int]:
        """Head dim and number of key/value heads of a layer."""
        if is_global:
            return self.global_head_dim, self.global_num_kv_heads
        return self.head_dim, self.num_kv_heads

    def batch_bytes(self, batch: int, length: int, dtype: DTypeLike) -> int:
        """What a layer's input and the hidden values of its feed-forward take, at least."""
        width = self.hidden_size + self.intermediate_size
        return batch * length * width * jnp.dtype(dtype).itemsize

    @property
    def num_states(self) -> int:
        """L + 1 hidden states: the embeddings and one per layer."""
        return self.num_layers + 1

    @classmethod
    def from_metadata(cls, text_config: Mapping[str, Any]) -> "GemmaConfig":
        """Reads `text_config` of a Hugging Face config.json, in the old or the new form.

        Published files leave out what equals the defaults of `transformers`; absent settings have
        these defaults here as well.

        Raises:
          ValueError: a missing key, or a setting this implementation does not have; names all of
            them and what is supported.
        """
        t = dict(text_config)
        if t.get("model_type") in GEMMA_4_TYPES:
            return cls._of_gemma4(t)
        ropes = {kind: _rope_settings(t, kind) for kind in _LAYER_TYPES}
        _check_metadata(t, ropes)
        local, glob = ropes["sliding_attention"], ropes["full_attention"]
        return cls(
            vocab_size=t.get("vocab_size", 262208),
            hidden_size=t["hidden_size"],
            intermediate_size=t["intermediate_size"],
            is_global=tuple(_LAYER_TYPES[kind] for kind in _layer_types(t)),
            num_heads=t.get("num_attention_heads", 8),
            num_kv_heads=t.get("num_key_value_heads", 4),
            head_dim=t.get("head_dim", 256),
            query_pre_attn_scalar=t.get("query_pre_attn_scalar", 256),
            sliding_window=t.get("sliding_window", 4096),
            local_rope_theta=local["rope_theta"],
            local_rope_factor=local.get("factor", 1.0),
            global_rope_theta=glob["rope_theta"],
            global_rope_factor=glob.get("factor", 1.0),
            norm_eps=t.get("rms_norm_eps", 1e-6),
        )

    @classmethod
    def _of_gemma4(cls, t: Mapping[str, Any]) -> "GemmaConfig":
        defaults = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
        }
        ropes = defaults | (t.get("rope_parameters") or {})
        local, glob = ropes["sliding_attention"], ropes["full_attention"]
        # the one setting whose default is another architecture
        plain = {} if t["model_type"] == "gemma4_unified_text" else {
            "hidden_size_per_layer_input": 256
        }  # fmt: skip
        given = plain | {name: value for name, value in t.items() if value is not None}
        problems = find_problems(given, required=_REQUIRED, fixed=_FIXED_4)
        if t.get("use_bidirectional_attention") == "all":
            problems.append(
                "use_bidirectional_attention is 'all'; only causal towers are supported"
            )
        problems += [
            f"rope_type of {kind} is {settings.get('rope_type')!r}; only "
            f"{' and '.join(_ROPE_TYPES_4)} are supported"
            for kind, settings in ropes.items()
            if settings.get("rope_type") not in _ROPE_TYPES_4
        ]
        problems += [
            f"rope_parameters of {kind} have no rope_theta"
            for kind, settings in ropes.items()
            if "rope_theta" not in settings
        ]
        problems += _layer_problems(t)
        raise_problems("Gemma 4 text config", problems)
        shared = bool(t.get("attention_k_eq_v", False))
        return cls(
            vocab_size=t.get("vocab_size", 262144),
            hidden_size=t["hidden_size"],
            intermediate_size=t["intermediate_size"],
            is_global=tuple(_LAYER_TYPES[kind] for kind in _layer_types(t)),
            num_heads=t.get("num_attention_heads", 8),
            num_kv_heads=t.get("num_key_value_heads", 4),
            head_dim=t.get("head_dim", 256),
            query_pre_attn_scalar=1.0,
            sliding_window=t.get("sliding_window", 1024),
            local_rope_theta=local["rope_theta"],
            local_rope_factor=local.get("factor", 1.0),
            global_rope_theta=glob["rope_theta"],
            global_rope_factor=glob.get("factor", 1.0),
            norm_eps=t.get("rms_norm_eps", 1e-6),
            gemma4=True,
            global_head_dim=t.get("global_head_dim", 512),
            global_num_kv_heads=t.get("num_global_key_value_heads") if shared else None,
            global_keys_are_values=shared,
            global_rope_fraction=glob.get("partial_rotary_factor", 1.0),
        )


def _layer_types(t: Mapping[str, Any]) -> list[str]:
    """One type per layer; older files give the distance between global layers instead."""
    if t.get("layer_types") is not None:
        return list(t["layer_types"])
    pattern, count = t.get("sliding_window_pattern", 6), t.get("num_hidden_layers", 0)
    if type(count) is not int or not 0 <= count <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, not {count!r:.60}")
    kinds = ("full_attention", "sliding_attention")
    return [kinds[bool((i + 1) % pattern)] for i in range(count)]


def _rope_settings(t: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """{"rope_type", "rope_theta", ...} of a layer type, from `rope_parameters` or older keys."""
    is_global = _LAYER_TYPES[kind]
    theta_key, default = ("rope_theta", 1e6) if is_global else ("rope_local_base_freq", 1e4)
    settings: dict[str, Any] = {}
    if t.get("rope_parameters") is not None:
        settings |= t["rope_parameters"].get(kind) or {}
    elif is_global:  # the older `rope_scaling` never applied to layers with a window
        settings |= t.get("rope_scaling") or {}
    if "type" in settings:  # oldest name
        settings.setdefault("rope_type", settings["type"])
    settings.setdefault("rope_type", "default")
    settings.setdefault("rope_theta", t.get(theta_key, default))
    return settings


def _check_metadata(t: Mapping[str, Any], ropes: Mapping[str, Mapping[str, Any]]) -> None:
    # null means the same as false
    settings = {k: v for k, v in t.items() if v is not None or _FIXED.get(k) is not False}
    problems = find_problems(settings, required=_REQUIRED, fixed=_FIXED) + _layer_problems(t)
    for kind, settings in ropes.items():
        if settings["rope_type"] not in _ROPE_TYPES:
            problems.append(
                f"rope_type of {kind} is {settings['rope_type']!r}; only "
                f"{' and '.join(_ROPE_TYPES)} are supported"
            )
        elif settings["rope_type"] == "linear" and "factor" not in settings:
            problems.append(f"rope_type of {kind} is 'linear', but its factor is missing")
        if settings.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(
                f"partial_rotary_factor of {kind} is {settings['partial_rotary_factor']!r}; only "
                "1.0 is supported"
            )
    raise_problems("Gemma text config", problems)


def _layer_problems(t: Mapping[str, Any]) -> list[str]:
    kinds = _layer_types(t)
    problems = []
    unknown = sorted(set(kinds) - set(_LAYER_TYPES))
    if unknown:
        known = ", ".join(_LAYER_TYPES)
        problems.append(f"layer_types has {', '.join(unknown)}; only {known} are supported")
    if "num_hidden_layers" in t and len(kinds) != t["num_hidden_layers"]:
        problems.append(
            f"layer_types has {len(kinds)} entries for {t['num_hidden_layers']} layers; one per "
            "layer is supported"
        )
    return problems
