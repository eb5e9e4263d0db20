"""Sampling whole clips from the bidirectional model (the teacher): guided Euler steps.

    x <- noise
    for sigma, next in the schedule:
        x0 <- guide(x - sigma * velocity(x, sigma), one velocity per pass)
        x0 <- mask * x0 + (1 - mask) * clean                  (what is given, if anything)
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

from omniforcing_jax.geometry import ClipGeometry, draw_noise, modalities, normal_latents
from omniforcing_jax.models.transformer.inputs import Pathways, TextKV
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import VIDEO_SPATIAL_COMPRESSION, ClipRope
from omniforcing_jax.sampling import flow
from omniforcing_jax.sampling.conditions import Condition, check_same_shapes
from omniforcing_jax.sampling.guidance import (
    NO_GUIDANCE,
    PASSES,
    AVGuidance,
    guide,
    interleave_rows,
    keep_frozen_streams,
    keep_pathways,
)
from omniforcing_jax.sampling.recipes import SamplingRecipe
from omniforcing_jax.types import AVLatents

STEP_NOISE = 2  # folded into a sample's key; what is appended to a clip has 1


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
      recipe: noise levels, decreasing to 0, and guidance. The levels begin with 1 (noise), or lower
        where a clip is taken up again at that level (`sample`'s `initial`).
      clip: sizes of the clip in latents.
    """

    recipe: SamplingRecipe
    clip: ClipGeometry

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.recipe.sigmas

    @property
    def guidance(self) -> AVGuidance:
        return self.recipe.guidance

    @classmethod
    def for_clip(
        cls,
        *,
        frames: int,
        height: int,
        width: int,
        recipe: SamplingRecipe,
        frame_rate: float = 24.0,
        spatial_compression: int = VIDEO_SPATIAL_COMPRESSION,
    ) -> "SampleConfig":
        """The config for a clip given in pixels, with sound as long as it.

        Args:
          frames, height, width: of the video, in pixel frames (8k + 1) and pixels.
          recipe: noise levels and guidance.
          frame_rate: pixel frames per second.
          spatial_compression: pixels per latent of the VAE.

        Raises:
          ValueError: see `ClipGeometry.from_pixels`.
        """
        clip = ClipGeometry.from_pixels(
            frames, height, width, frame_rate, spatial_compression=spatial_compression
        )
        return cls(recipe, clip)

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
    model: Transformer,
    params,
    prompt: Prompt,
    negative: Prompt | None,
    guidance: AVGuidance,
    frozen: AVLatents | None = None,
) -> PassInputs:
    """Everything about the passes that does not change from step to step.

    Args:
      prompt: [B, S, text_dim] contexts.
      negative: of the same shapes; None when the guidance has no "uncond" pass.
      guidance: decides which passes there are.
      frozen: [B or 1] boolean of each stream: one that is given as a whole is not guided, so the
        perturbed pass leaves its self-attention as it is. None: neither is.
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
    if keep is not None and frozen is not None:
        keep = keep_frozen_streams(keep, frozen, batch)
    if model.config.text_adaln:
        return PassInputs(context, None, keep)

    def text_kv(p: Prompt) -> TextKV:
        contexts = (p.video_context, p.audio_context)
        return model.apply({"params": params}, *contexts, method="text_kv")

    texts = {"prompt": text_kv(prompt)}
    if "uncond" in passes:
        texts["uncond"] = text_kv(negative)
    by_pass = [texts.get(name, texts["prompt"]) for name in passes]
    # [L, B, S, N, H], or of each layer [B, S, N, H]
    text = jax.tree.map(lambda *x: interleave_rows(x, axis=x[0].ndim - 4), *by_pass)
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
    video_bias: jax.Array | None = None,
) -> AVLatents:
    """The guided prediction of the clean clip, all passes in one call of the network.

    Args:
      x: noisy tokens [B, T, C], those that are appended to the clip last.
      sigma: [B or 1, G] noise levels of each stream, of G equal groups of its tokens.
      inputs: from `prepare_passes`, with the guidance of `config`.
      rope: tables that cover the clip, and behind it what is appended.
      global_sigma: [B] the samples' own noise levels, where they are not max(sigma).
      video_bias: [B or 1, F, F] added to the logits of the video's self-attention.

    Returns:
      AVLatents [B, T, C] float32.
    """
    batch, num_passes = x.video.shape[0], len(config.guidance.passes())

    def rows(values: jax.Array) -> jax.Array:  # [B or 1, ...] -> [B * P, ...]
        values = jnp.broadcast_to(values, (batch, *values.shape[1:]))
        return interleave_rows([values] * num_passes)

    context, clip = inputs.context, config.clip
    appended = (
        x.video.shape[1] // clip.patches - clip.video_frames,
        x.audio.shape[1] - clip.audio_frames,
    )
    video, audio = modalities(
        jax.tree.map(rows, x),
        jax.tree.map(rows, sigma),
        clip.stream_ropes(model, rope, appended),
        (context.video_context, context.audio_context),
        context_mask=context.mask,
        global_sigma=jax.tree.map(rows, global_sigma),
        video_bias=None if video_bias is None else rows(video_bias),
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


def sample(
    model: Transformer,
    params,
    prompt: Prompt | tuple[jax.Array, jax.Array],
    negative: Prompt | tuple[jax.Array, jax.Array] | None,
    key: jax.Array,
    config: SampleConfig,
    *,
    condition: Condition | None = None,
    initial: AVLatents | None = None,
    trajectory: bool = False,
) -> AVLatents:
    """Samples a batch of clips.

    Args:
      model, params: the transformer and its parameter tree.
      prompt: text contexts [B, S, text_dim] of video and audio.
      negative: contexts [B or 1, S, text_dim] of the negative prompt; None where the guidance has
        cfg 1 for the streams that are generated.
      key: a key, from which sample i gets `fold_in(key, i)`, or [B] keys, one per sample.
      config: clip, schedule and guidance. A stream that is given as a whole is not guided.
      condition: what is given, for B samples or one for all; None is nothing. What is generated
        starts from the same noise with it as without.
      initial: [B, T, C] clip to start from at the noise level `config.sigmas[0]`; None starts from
        noise.
      trajectory: return x at every sigma, from the noise to the sample (for ODE regression).

    Returns:
      AVLatents [B, T, C] float32, normalised latents; with `trajectory` [N + 1, B, T, C].

    Raises:
      ValueError: inputs that do not fit each other, the model or the config.
    """
    if condition is not None:
        frozen = jax.tree.map(lambda f: bool(jnp.all(f)), condition.frozen)
        guided, config = config, without_guidance_of(config, frozen)
        if "uncond" in guided.guidance.passes() and "uncond" not in config.guidance.passes():
            negative = None  # it was the given stream's
    inputs = _check_inputs(model, prompt, negative, key, config, condition, initial)
    return _sample(model, params, *inputs, config=config, trajectory=trajectory)


def without_guidance_of(config: SampleConfig, frozen: AVLatents) -> SampleConfig:
    """Without scales for a stream that is given as a whole; `frozen` says which is, as bools.

    Passes that only this stream's scales asked for are not run.
    """
    guidance = AVGuidance(
        NO_GUIDANCE.video if frozen.video else config.guidance.video,
        NO_GUIDANCE.audio if frozen.audio else config.guidance.audio,
    )
    return SampleConfig(dataclasses.replace(config.recipe, guidance=guidance), config.clip)


@functools.partial(jax.jit, static_argnames=("model", "config", "trajectory"))
def _sample(
    model, params, prompt, negative, keys, noise, rope, condition, initial, *, config, trajectory
):
    """`noise` covers what is appended, `condition` is joined with it."""
    sigmas = jnp.asarray(config.sigmas, jnp.float32)
    x, frozen = noise, None
    if condition is not None:
        x, frozen = condition.start(noise, initial, sigmas[0]), condition.frozen
    elif initial is not None:
        x = jax.tree.map(lambda i, n: flow.add_noise(i, n, sigmas[0]), initial, noise)
    inputs = prepare_passes(model, params, prompt, negative, config.guidance, frozen)

    def step(x, levels):
        sigma, sigma_next, index = levels
        token_sigma = AVLatents(sigma[None, None], sigma[None, None])
        how = {"global_sigma": AVLatents(sigma[None], sigma[None])}
        if condition is not None:
            token_sigma = condition.sigma(sigma)
            how = {
                "global_sigma": condition.stream_sigma(sigma),
                "video_bias": condition.video_bias,
            }
        x0 = guided_x0(model, params, x, token_sigma, inputs, rope, config, **how)
        if condition is not None:
            x0 = condition.keep(x0)
        if config.recipe.ancestral:
            more = step_noise(keys, index, x)
            x = jax.tree.map(
                lambda x, x0, n: flow.ancestral_step(x, x0, n, sigma, sigma_next), x, x0, more
            )
            x = x if condition is None else condition.keep(x)
        else:
            x = jax.tree.map(lambda x, x0: flow.euler_step(x, x0, sigma, sigma_next), x, x0)
        return x, (x if trajectory else None)

    steps = jnp.arange(sigmas.shape[0] - 1)
    last, visited = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:], steps))
    if trajectory:
        last = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), x, visited)
    clip = config.clip  # cut off what was appended
    return AVLatents(
        last.video[..., : clip.video_tokens, :], last.audio[..., : clip.audio_frames, :]
    )


def step_noise(keys: jax.Array, index: jax.Array, x: AVLatents) -> AVLatents:
    """Noise like x [B, T, C] that an ancestral sampler adds behind step `index`, from [B] keys."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, STEP_NOISE)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(lambda key: normal_latents(key, x.video.shape[1:], x.audio.shape[1:]))(keys)


def _check_inputs(model, prompt, negative, key, config, condition, initial):
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
    if initial is None and config.sigmas[0] != 1.0:
        raise ValueError(
            f"sampling starts from noise: sigmas[0] must be 1, not {config.sigmas[0]}; only an "
            "initial clip is taken up at a lower noise level"
        )
    noise = draw_noise(keys, config.clip, model)
    if initial is not None:
        check_same_shapes("the initial clip", initial, noise)
    if condition is None:
        return prompt, negative, keys, noise, config.clip.rope(model), None, initial
    condition.check(noise)
    times = condition.appended_times()
    rope = config.clip.rope(model, times)
    if times is not None:
        more = condition.appended_noise(keys)
        noise = jax.tree.map(lambda n, m: jnp.concatenate([n, m], axis=1), noise, more)
        if initial is not None:  # appended latents are not taken up again: they start from zeros
            initial = jax.tree.map(
                lambda i, m: jnp.concatenate([i, jnp.zeros_like(m)], axis=1), initial, more
            )
    return prompt, negative, keys, noise, rope, condition.joined().of_batch(batch), initial


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
