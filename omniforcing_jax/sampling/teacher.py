"""Sampling whole clips from the bidirectional model (the teacher): guided Euler steps.

    x <- noise
    for sigma, next in the schedule:
        x0 <- guide(x - sigma * velocity(x, sigma), one velocity per pass)
        x0 <- mask * x0 + (1 - mask) * clean                  (conditioning on frames, if any)
        x  <- x + (next - sigma) * (x - x0) / sigma

The passes that the guidance needs (prompt, negative prompt, perturbed, isolated) are rows of one
batch, so a step is one call of the network, and the steps are one `lax.scan` in one program.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.geometry import ClipGeometry, draw_noise, modalities
from omniforcing_jax.models.transformer.inputs import Pathways, TextKV
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import VIDEO_SPATIAL_COMPRESSION, ClipRope
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.guidance import (
    LTX20_GUIDANCE,
    PASSES,
    AVGuidance,
    guide,
    interleave_rows,
    keep_pathways,
)
from omniforcing_jax.types import AVLatents


class Prompt(NamedTuple):
    """Text contexts, as the connectors produce them; a plain (video, audio) tuple will do, too.

    Attributes:
      video_context, audio_context: [B, S, text_dim] of each stream.
      mask: [B, S] boolean, True = attend; None attends to all tokens.
    """

    video_context: jax.Array
    audio_context: jax.Array
    mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What clip is sampled, and how.

    Attributes:
      sigmas: noise levels, decreasing from 1 to 0, as `flow.ltx2_schedule` gives them.
      clip: sizes of the clip in latents.
      guidance: scales of both modalities.

    Raises:
      ValueError: sigmas that do not start at 1; see also `flow.check_sigmas`.
    """

    sigmas: tuple[float, ...]
    clip: ClipGeometry
    guidance: AVGuidance = LTX20_GUIDANCE

    def __post_init__(self):
        sigmas = flow.check_sigmas(self.sigmas)
        if sigmas[0] != 1.0:
            raise ValueError(
                f"sampling starts from pure noise: sigmas[0] must be 1, not {sigmas[0]}"
            )

    @classmethod
    def for_clip(
        cls,
        *,
        frames: int,
        height: int,
        width: int,
        frame_rate: float = 24.0,
        num_steps: int = 40,
        guidance: AVGuidance = LTX20_GUIDANCE,
        spatial_compression: int = VIDEO_SPATIAL_COMPRESSION,
    ) -> "SampleConfig":
        """The config for a clip given in pixels, with the LTX-2 schedule and sound as long as it.

        Args:
          frames, height, width: of the video, in pixel frames (8k + 1) and pixels.
          frame_rate: pixel frames per second.
          num_steps: Euler steps.
          guidance: scales of both modalities.
          spatial_compression: pixels per latent of the VAE.

        Raises:
          ValueError: see `ClipGeometry.from_pixels`.
        """
        clip = ClipGeometry.from_pixels(
            frames, height, width, frame_rate, spatial_compression=spatial_compression
        )
        return cls(tuple(flow.ltx2_schedule(num_steps).tolist()), clip, guidance)

    def check_model(self, model: Transformer) -> None:
        """Raises ValueError when the guidance names blocks that the model does not have."""
        for stream, guidance in zip(AVGuidance._fields, self.guidance, strict=True):
            try:
                guidance.check_layers(model.config.num_layers)
            except ValueError as error:
                raise ValueError(f"{stream} guidance: {error}") from None


@flax.struct.dataclass
class PassInputs:
    """What the rows of a guided call read besides latents and sigma.

    A call has B * P rows, P passes of each sample side by side: a batch that is sharded over
    devices stays where it is.

    Attributes:
      context: text contexts, and the mask; without contexts when `text` has been computed.
      text: text keys and values [L, B * P, S, N, H]; None where they depend on sigma (LTX-2.3).
      keep: [L, B * P] arrays, zero skips an attention; None when no pass skips any.
    """

    context: Prompt
    text: TextKV | None
    keep: Pathways | None


def prepare_passes(
    model: Transformer, params, prompt: Prompt, negative: Prompt | None, guidance: AVGuidance
) -> PassInputs:
    """Everything about the passes that does not change from step to step.

    Args:
      prompt: [B, S, text_dim] contexts.
      negative: of the same shapes; None when the guidance has no "uncond" pass.
      guidance: decides which passes there are.
    """
    passes = guidance.passes()
    batch = prompt.video_context.shape[0]
    if negative is not None and (prompt.mask is None) != (negative.mask is None):
        everything = jnp.ones(prompt.video_context.shape[:2], bool)
        prompt, negative = (
            p._replace(mask=everything) if p.mask is None else p for p in (prompt, negative)
        )
    by_pass = [negative if name == "uncond" else prompt for name in passes]
    context = jax.tree.map(lambda *x: interleave_rows(x), *by_pass)
    skipped = (guidance.video.skipped, guidance.audio.skipped)
    keep = keep_pathways(passes, skipped, model.config.num_layers, batch)
    if model.config.text_adaln:
        return PassInputs(context, None, keep)

    def text_kv(p: Prompt) -> TextKV:
        contexts = (p.video_context, p.audio_context)
        return model.apply({"params": params}, *contexts, method="text_kv")

    texts = {"prompt": text_kv(prompt)}
    if "uncond" in passes:
        texts["uncond"] = text_kv(negative)
    by_pass = [texts.get(name, texts["prompt"]) for name in passes]
    text = jax.tree.map(lambda *x: interleave_rows(x, axis=1), *by_pass)
    return PassInputs(Prompt(None, None, context.mask), text, keep)


def guided_x0(
    model: Transformer,
    params,
    x: AVLatents,
    sigma: AVLatents,
    inputs: PassInputs,
    rope: ClipRope,
    config: SampleConfig,
    *,
    global_sigma: AVLatents | None = None,
) -> AVLatents:
    """The guided prediction of the clean clip, all passes in one call of the network.

    Args:
      x: noisy tokens [B, T, C].
      sigma: [B or 1, G] noise levels of each stream, of G equal groups of its tokens.
      inputs: from `prepare_passes`, with the guidance of `config`.
      rope: tables that cover the clip.
      global_sigma: [B] the samples' own noise levels, where they are not max(sigma).

    Returns:
      AVLatents [B, T, C] float32.
    """
    batch, num_passes = x.video.shape[0], len(config.guidance.passes())

    def rows(values: jax.Array) -> jax.Array:  # [B or 1, ...] -> [B * P, ...]
        values = jnp.broadcast_to(values, (batch, *values.shape[1:]))
        return interleave_rows([values] * num_passes)

    context = inputs.context
    video, audio = modalities(
        jax.tree.map(rows, x),
        jax.tree.map(rows, sigma),
        config.clip.stream_ropes(model, rope),
        (context.video_context, context.audio_context),
        context_mask=context.mask,
        global_sigma=jax.tree.map(rows, global_sigma),
    )
    (video, audio), _ = model.apply(
        {"params": params}, video, audio, text=inputs.text, keep=inputs.keep
    )

    def combine(x, velocity, sigma, guidance):
        velocity = velocity.reshape(batch, num_passes, *x.shape[1:])  # [B, P, T, C]
        passes = {
            name: flow.velocity_to_x0(x, velocity[:, i], sigma)
            for i, name in enumerate(config.guidance.passes())
        }
        predictions = [passes.get(name) for name in PASSES]
        # Per sample, unlike the reference: a sample must not depend on what else is in the batch.
        return guide(*predictions, guidance, per_sample_std=True)

    return jax.tree.map(combine, x, AVLatents(video, audio), sigma, AVLatents(*config.guidance))


def condition_on_first_frames(
    latents: jax.Array, config: SampleConfig, model: Transformer, strength: float = 1.0
) -> tuple[AVLatents, AVLatents]:
    """`clean` and `mask` for `sample`: the clip starts with these video latents (image to video).

    Args:
      latents: [B, f, h, w, C] normalised; an image is one latent frame.
      strength: 1 keeps them exactly; less lets them be denoised from noise level 1 - strength.

    Returns:
      clean [B, T, C], mask [1, F] for the video and [1, 1] for the audio (1 = generate).

    Raises:
      ValueError: latents that do not fit the clip, or a strength outside [0, 1].
    """
    clip = config.clip
    size = (clip.height, clip.width, model.config.video_channels)
    if latents.ndim != 5 or latents.shape[2:] != size or latents.shape[1] > clip.video_frames:
        raise ValueError(
            f"latents must be [B, up to {clip.video_frames} frames, {size[0]}, {size[1]}, "
            f"{size[2]}], got {list(latents.shape)}"
        )
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be in [0, 1], not {strength}")
    batch, frames = latents.shape[:2]
    tokens = latents.astype(jnp.float32).reshape(batch, -1, latents.shape[-1])
    rest = config.clip.video_tokens - tokens.shape[1]
    mask = np.ones((1, config.clip.video_frames), np.float32)
    mask[:, :frames] -= strength
    clean = AVLatents(
        jnp.pad(tokens, ((0, 0), (0, rest), (0, 0))),
        jnp.zeros((batch, config.clip.audio_frames, model.config.audio_channels)),
    )
    return clean, AVLatents(jnp.asarray(mask), jnp.ones((1, 1)))


def sample(
    model: Transformer,
    params,
    prompt: Prompt | tuple[jax.Array, jax.Array],
    negative: Prompt | tuple[jax.Array, jax.Array] | None,
    key: jax.Array,
    config: SampleConfig,
    *,
    clean: AVLatents | None = None,
    mask: AVLatents | None = None,
    trajectory: bool = False,
) -> AVLatents:
    """Samples a batch of clips.

    Args:
      model, params: the transformer and its parameter tree.
      prompt: text contexts [B, S, text_dim] of video and audio.
      negative: contexts [B or 1, S, text_dim] of the negative prompt; None exactly when the
        guidance has cfg 1 for both modalities.
      key: a key, from which sample i gets `fold_in(key, i)`, or [B] keys, one per sample.
      config: clip, schedule and guidance.
      clean: [B, T, C] tokens to condition on; needs `mask`.
      mask: [B or 1, G] for G equal groups of tokens (frames, say): 1 generates, 0 keeps `clean`
        exactly, and a value m between starts from `clean` at noise level m. See
        `condition_on_first_frames`.
      trajectory: return x at every sigma, from the noise to the sample (for ODE regression).

    Returns:
      AVLatents [B, T, C] float32, normalised latents; with `trajectory` [N + 1, B, T, C].

    Raises:
      ValueError: inputs that do not fit each other, the model or the config.
    """
    inputs = _check_inputs(model, prompt, negative, key, config, clean, mask)
    return _sample(model, params, *inputs, config=config, trajectory=trajectory)


@functools.partial(jax.jit, static_argnames=("model", "config", "trajectory"))
def _sample(model, params, prompt, negative, noise, rope, clean, mask, *, config, trajectory):
    inputs = prepare_passes(model, params, prompt, negative, config.guidance)
    x = noise
    if mask is None:
        mask = AVLatents(jnp.ones((1, 1)), jnp.ones((1, 1)))
    else:
        x = jax.tree.map(flow.add_noise, clean, x, mask)
    # A stream that is given as a whole is clean, and the other one is told so.
    generated = jax.tree.map(lambda m: jnp.max(m, axis=1) > 0, mask)

    def step(x, sigmas):
        sigma, sigma_next = sigmas
        x0 = guided_x0(
            model,
            params,
            x,
            jax.tree.map(lambda m: sigma * m, mask),
            inputs,
            rope,
            config,
            global_sigma=jax.tree.map(lambda g: jnp.where(g, sigma, 0.0), generated),
        )
        if clean is not None:
            x0 = jax.tree.map(flow.add_noise, clean, x0, mask)  # (1 - mask) clean + mask x0
        x = jax.tree.map(lambda x, x0: flow.euler_step(x, x0, sigma, sigma_next), x, x0)
        return x, (x if trajectory else None)

    sigmas = jnp.asarray(config.sigmas, jnp.float32)
    last, visited = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
    if not trajectory:
        return last
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), x, visited)


def _check_inputs(model, prompt, negative, key, config, clean, mask):
    """The checked inputs of `_sample`, in its order."""
    config.check_model(model)
    prompt = Prompt(*prompt)
    negative = None if negative is None else Prompt(*negative)
    check_prompts(model, prompt, negative, config.guidance)
    batch = prompt.video_context.shape[0]
    negative = jax.tree.map(lambda p: jnp.broadcast_to(p, (batch, *p.shape[1:])), negative)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise ValueError(
            f"key must be one key of `jax.random.key` or {batch}, one per sample; got "
            f"{key.dtype} {list(key.shape)}"
        )
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if (clean is None) != (mask is None):
        raise ValueError("clean and mask must be given together: the mask says what is kept")
    if mask is not None:
        _check_condition(model, config, batch, clean, mask)
    noise = draw_noise(keys, config.clip, model)
    return prompt, negative, noise, config.clip.rope(model), clean, mask


def check_prompts(
    model: Transformer, prompt: Prompt, negative: Prompt | None, guidance: AVGuidance
) -> None:
    """Raises ValueError for contexts that do not fit the model, each other or the guidance."""
    needed = "uncond" in guidance.passes()
    scales = f"cfg {guidance.video.cfg:g} (video) and {guidance.audio.cfg:g} (audio)"
    if needed and negative is None:
        raise ValueError(f"{scales} need a negative prompt; pass one or set both to 1")
    if negative is not None and not needed:
        raise ValueError(f"{scales} do not use the negative prompt; pass None or raise cfg")
    widths = model.config.text_dims
    batch, length = prompt.video_context.shape[:2]
    for name, p in (("prompt", prompt), ("negative prompt", negative)):
        if p is None:
            continue
        rows = batch if p is prompt or p.video_context.shape[0] != 1 else 1
        expected = tuple((rows, length, width) for width in widths)
        if (p.video_context.shape, p.audio_context.shape) != expected:
            raise ValueError(
                f"the {name}'s contexts are {list(p.video_context.shape)} (video) and "
                f"{list(p.audio_context.shape)} (audio); this model and batch take "
                f"{list(expected[0])} and {list(expected[1])}"
            )
        if p.mask is not None and p.mask.shape != (rows, length):
            raise ValueError(
                f"the {name}'s mask is {list(p.mask.shape)}; expected {[rows, length]}"
            )


def _check_condition(model, config, batch, clean, mask):
    sizes = {
        "video": (config.clip.video_tokens, model.config.video_channels),
        "audio": (config.clip.audio_frames, model.config.audio_channels),
    }
    for stream, (tokens, channels) in sizes.items():
        shape = getattr(clean, stream).shape
        weights = np.asarray(getattr(mask, stream))
        if shape != (batch, tokens, channels):
            raise ValueError(f"clean {stream} must be {[batch, tokens, channels]}, not {shape}")
        rows, groups = weights.shape if weights.ndim == 2 else (0, 0)
        if rows not in (1, batch) or not groups or tokens % groups:
            raise ValueError(
                f"mask {stream} must be [1 or {batch}, G] with G a divisor of the {tokens} tokens, "
                f"not {weights.shape}"
            )
        if not ((weights >= 0.0) & (weights <= 1.0)).all():
            raise ValueError(f"mask {stream} must lie in [0, 1]: 1 generates, 0 keeps clean")
