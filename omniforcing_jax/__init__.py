"""Streaming generation of video with sound in JAX: LTX-2 and its block-causal student.

    from omniforcing_jax import PromptEncoder, load_pipeline

    prompts = PromptEncoder("checkpoints/gemma3", "checkpoints/student", cache=None)
    pipeline = load_pipeline("checkpoints/student", dtype=jnp.bfloat16)
    session = pipeline.session(pipeline.config.rollout(), "A calm sea.", prompts=prompts)
    chunk = session.step()

The names below are the public ones. A module is imported when one of its names is first used, so
that programs that need little start fast. docs/architecture.md says where everything else is.
"""

import importlib

_MODULES = {
    # a converted checkpoint, and what is made with it
    "pipeline": ("Pipeline", "PipelineConfig", "decode_clip", "load_pipeline"),
    "streaming.session": ("Chunk", "StreamingSession"),
    "streaming.media": ("ClipWriter", "read_clip"),
    # what is given: pictures, clips and sound from files, and their latents
    "io.media_files": (
        "Sound",
        "compress_image",
        "fit_pixels",
        "read_image",
        "read_sound",
        "read_video",
    ),
    "encoding": ("MediaEncoder", "load_encoders"),
    "streaming.encoders": ("StreamingAudioEncoder", "StreamingVideoEncoder"),
    "text.prompts": ("PromptEncoder",),
    # the samplers
    "sampling.student": (
        "RolloutConfig",
        "block_noise",
        "block_step",
        "new_cache",
        "prompt_kv",
        "rollout",
    ),
    "sampling.kv_cache": ("CacheConfig",),
    "sampling.conditions": ("Condition",),
    "sampling.teacher": ("SampleConfig", "sample"),
    "sampling.guidance": ("AVGuidance", "Guidance"),
    "sampling.recipes": ("SamplingRecipe",),
    # sizes, types and the network
    "blocks": ("BlockLayout",),
    "geometry": ("ClipGeometry",),
    "types": ("AVLatents",),
    "models.transformer.config": ("TransformerConfig",),
    "models.transformer.model": ("Transformer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
