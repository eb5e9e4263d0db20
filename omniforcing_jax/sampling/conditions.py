"""What of a clip, or of a block, is given instead of generated, and how samplers keep to it.

A condition is a mask (LTX-2): every latent frame of either stream has a number m in [0, 1], 1 where
it is generated, 0 where it is given, 1 - strength between. A sampler then does three things:

    x     <- (1 - m) clean + m x     once, on the noise it starts from     (`Condition.start`)
    sigma <- m sigma                 what the network is told of a token   (`Condition.sigma`)
    x0    <- (1 - m) clean + m x0    after every prediction                (`Condition.keep`)

and leaves its steps as they are: they move no token whose x0 is its x. Latents may also be appended
to a clip at times of their own (keyframes, a reference voice): the clip attends to them, and they
are cut off at the end.

Everything is data, so that one compiled program serves all conditions of the same sizes.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax.blocks import BlockLayout
from omniforcing_jax.geometry import ClipGeometry, normal_latents, split_blocks
from omniforcing_jax.models.transformer.model import Transformer
from omniforcing_jax.models.transformer.rope import audio_time_bounds
from omniforcing_jax.sampling import flow
from omniforcing_jax.types import AVLatents


class Mode(NamedTuple):
    """What a mode gives of each stream.

    "nothing", its "first" latent, its "start" (of both streams the same blocks), or "all" of it.
    """

    video: str
    audio: str


MODES = {
    "t2av": Mode("nothing", "nothing"),  # text alone
    "i2av": Mode("first", "nothing"),  # a first picture
    "extend": Mode("start", "start"),  # go on from a clip
    "a2v": Mode("nothing", "all"),  # picture to a sound
    "ia2v": Mode("first", "all"),  # the same with a first picture: a talking portrait
    "v2a": Mode("all", "nothing"),  # sound to a picture (foley)
}
VOICE_GAP = np.float32(0.04)  # seconds between a reference voice and the clip


@flax.struct.dataclass
class Appended:
    """Given latents beside those of the clip.

    Attributes:
      latents: [B or 1, n * P, C] tokens (P = 1 for audio) float32.
      mask: [B or 1, n] float32, 1 - strength.
      times: [n, 2] float32 seconds, begin and end of each latent: an array of the host, for the
        phases of its RoPE are formed there.
      attention: [n] float32 in [0, 1], how strongly the clip and each latent attend to one another;
        None is fully, as do all appended latents then.
    """

    latents: jax.Array
    mask: jax.Array
    times: np.ndarray
    attention: np.ndarray | None = None


@flax.struct.dataclass
class Condition:
    """What is given of a clip or a block of F video latents and T_a audio latents.

    Attributes:
      clean: [B or 1, T, C] float32 tokens; where nothing is given their values do not matter, but
        they must be finite.
      mask: [B or 1, F] and [B or 1, T_a] float32 in [0, 1]: 1 generates, 0 keeps `clean`.
      frozen: [B or 1] boolean, whether a stream is given as a whole, of the clip and not of one
        block. The network is told that it is clean, also in what it reads of the other stream and
        of the text (LTX-2.3), and it is not guided.
      appended: latents beside the clip, of either stream; None where there are none.
      video_bias: [B or 1, F, F] float32 added to the logits of the video's self-attention, where
        `joined` finds that appended latents have less of it than others.
    """

    clean: AVLatents
    mask: AVLatents
    frozen: AVLatents
    appended: AVLatents = AVLatents(None, None)
    video_bias: jax.Array | None = None

    @classmethod
    def of_clip(cls, clean: AVLatents, mask: AVLatents) -> "Condition":
        """Of a whole clip: a stream of which nothing is generated is frozen."""
        return cls(clean, mask, jax.tree.map(lambda m: jnp.max(m, axis=1) <= 0, mask))

    @classmethod
    def given(
        cls,
        clip: ClipGeometry,
        model: Transformer,
        *,
        video: jax.Array | None = None,
        audio: jax.Array | None = None,
        strength: float = 1.0,
    ) -> "Condition":
        """The clip, or block, begins with these latents.

        Args:
          clip: sizes.
          model: for the channels.
          video: [B, f, h, w, C] normalised latents, up to all of the clip.
          audio: [B, t, C].
          strength: of the video: 1 keeps it exactly; less lets it be denoised from the noise level
            1 - strength.

        Raises:
          ValueError: latents that do not fit the clip, or a strength outside [0, 1].
        """
        check_strength(strength)
        size = (clip.height, clip.width, model.config.video_channels)
        if video is not None:
            check_latents("video", video, clip.video_frames, size)
            video = video.reshape(video.shape[0], -1, size[2])
        if audio is not None:
            check_latents("audio", audio, clip.audio_frames, (model.config.audio_channels,))
        frames = 0 if video is None else video.shape[1] // clip.patches
        clean = AVLatents(
            _padded(video, clip.video_tokens, size[2]),
            _padded(audio, clip.audio_frames, model.config.audio_channels),
        )
        mask = AVLatents(
            first_given(clip.video_frames, frames, strength)[None],
            first_given(clip.audio_frames, 0 if audio is None else audio.shape[1])[None],
        )
        return cls.of_clip(clean, jax.tree.map(jnp.asarray, mask))

    @classmethod
    def for_mode(
        cls,
        mode: str,
        clip: ClipGeometry,
        model: Transformer,
        *,
        video: jax.Array | None = None,
        audio: jax.Array | None = None,
        strength: float = 1.0,
    ) -> "Condition":
        """`given`, after a check that the latents are what the mode asks for.

        Raises:
          ValueError: an unknown mode, latents that it does not take, or that are missing; see also
            `given`.
        """
        sizes = {"video": clip.video_frames, "audio": clip.audio_frames}
        streams = {"video": video, "audio": audio}
        for name, amount in find_mode(mode)._asdict().items():
            latents, frames = streams[name], sizes[name]
            count = 0 if latents is None else latents.shape[1]
            wanted = {
                "nothing": ((0,), f"takes no {name} latents"),
                "first": ((1,), f"takes one {name} latent"),
                "start": (range(1, frames + 1), f"takes 1 to {frames} {name} latents"),
                "all": ((frames,), f"takes all {frames} {name} latents of the clip"),
            }
            counts, says = wanted[amount]
            if count not in counts:
                raise ValueError(f"mode {mode} {says}, not {count}")
        return cls.given(clip, model, video=video, audio=audio, strength=strength)

    def with_keyframe(
        self,
        clip: ClipGeometry,
        picture: jax.Array,
        frame: int,
        strength: float = 1.0,
        attention: float = 1.0,
    ) -> "Condition":
        """Appends a picture that the clip shows at a pixel frame, or comes near to.

        Args:
          picture: [B, 1, h, w, C] latents.
          frame: index of the pixel frame.
          strength: 1 keeps the picture exactly, less lets it be denoised.
          attention: how strongly the clip and the picture attend to one another: 1 fully, 0 not at
            all. With less than 1 it and those that come later do not attend to other keyframes.

        Raises:
          ValueError: a picture of another size, a frame outside the clip, or a number outside
            [0, 1].
        """
        check_strength(strength)
        check_strength(attention, "attention")
        size = (clip.height, clip.width, self.clean.video.shape[-1])
        check_latents("keyframe", picture, 1, size)
        if not 0 <= frame < clip.pixel_frames:
            raise ValueError(
                f"keyframe {frame} is outside the clip's frames 0 to {clip.pixel_frames - 1}"
            )
        bounds = np.array([[0, 1]], np.float32) + np.float32(frame)
        tokens = jnp.asarray(picture, jnp.float32).reshape(picture.shape[0], -1, size[2])
        mask = first_given(1, 1, strength)[None]
        times = bounds / np.float32(clip.frame_rate)
        weight = np.array([attention], np.float32)
        new = Appended(tokens, jnp.asarray(mask), times, weight)
        video = new if self.appended.video is None else _both(self.appended.video, new)
        return self.replace(appended=self.appended.replace(video=video))

    def with_voice(self, latents: jax.Array) -> "Condition":
        """Appends a voice to speak with: audio latents [B, t, C] at times that end before zero.

        Raises:
          ValueError: there is a voice already, or the latents are not audio.
        """
        if self.appended.audio is not None:
            raise ValueError("there is a reference voice already")
        check_latents("voice", latents, latents.shape[1], (self.clean.audio.shape[-1],))
        times = audio_time_bounds(latents.shape[1])
        times = times - times[-1, 1] - VOICE_GAP
        mask = jnp.zeros((1, latents.shape[1]))
        voice = Appended(jnp.asarray(latents, jnp.float32), mask, times)
        return self.replace(appended=self.appended.replace(audio=voice))

    # What a sampler does

    def start(
        self, noise: AVLatents, initial: AVLatents | None = None, sigma: jax.Array | float = 1.0
    ) -> AVLatents:
        """The state that sampling starts from: blended with what is given once, and only here.

        Args:
          noise: [B, T, C].
          initial: [B, T, C] a clip that is taken up again at the noise level `sigma`; None starts
            from noise alone.
        """
        x = noise
        if initial is not None:
            x = jax.tree.map(lambda i, n: flow.add_noise(i, n, sigma), initial, noise)
        return self.keep(x)

    def sigma(self, sigma: jax.Array) -> AVLatents:
        """[B or 1, G] noise level of every latent frame, from the samples' own [] or [B]."""
        return jax.tree.map(lambda m: jnp.reshape(sigma, (-1, 1)) * m, self.mask)

    def stream_sigma(self, sigma: jax.Array) -> AVLatents:
        """[B or 1] noise level of each stream: 0 for one that is frozen (`Modality`)."""
        return jax.tree.map(lambda f: jnp.where(f, 0.0, jnp.reshape(sigma, -1)), self.frozen)

    def keep(self, x0: AVLatents) -> AVLatents:
        """x0 [B, T, C] with what is given in its place; no gradient passes to x0 there."""

        def keep(clean, x0, mask):
            weight = flow.per_token(mask, x0.shape[1])[..., None]  # [B or 1, T, 1]
            mixed = (1.0 - weight) * clean + weight * x0
            # Selected, so that what is generated keeps its bits, and what is given is kept
            # whatever the network made of it.
            return jnp.where(weight < 1.0, jnp.where(weight > 0.0, mixed, clean), x0)

        return jax.tree.map(keep, self.clean, x0, self.mask)

    def check(self, x: AVLatents) -> None:
        """Raises ValueError unless it is a condition of clips of x's shapes [B, T, C]."""
        for stream in ("video", "audio"):
            shape, clean = getattr(x, stream).shape, getattr(self.clean, stream).shape
            if clean not in (shape, (1, *shape[1:])):
                raise ValueError(f"clean {stream} must be {list(shape)}, not {list(clean)}")
            mask = np.asarray(getattr(self.mask, stream))
            rows, groups = mask.shape if mask.ndim == 2 else (0, 0)
            if rows not in (1, shape[0]) or not groups or shape[1] % groups:
                raise ValueError(
                    f"mask {stream} must be [1 or {shape[0]}, frames], not {list(mask.shape)}"
                )
            if not ((mask >= 0.0) & (mask <= 1.0)).all():
                raise ValueError(f"mask {stream} must lie in [0, 1]: 1 generates, 0 keeps clean")

    def frame_weights(self) -> AVLatents:
        """[B or 1, F] weights that make a mean over latents one over those that are generated.

        Of a stream of which nothing is generated they are all 0.
        """

        def weights(mask: jax.Array) -> jax.Array:
            generated = (mask > 0).astype(jnp.float32)
            share = jnp.mean(generated, axis=1, keepdims=True)
            return generated / jnp.maximum(share, 1.0 / mask.shape[1])

        return jax.tree.map(weights, self.mask)

    def token_weights(self) -> AVLatents:
        """`frame_weights` of every token, [B or 1, T, 1]."""
        return jax.tree.map(
            lambda w, clean: flow.per_token(w, clean.shape[1])[..., None],
            self.frame_weights(),
            self.clean,
        )

    def of_batch(self, batch: int) -> "Condition":
        """With arrays for `batch` samples: one program serves all conditions of these sizes."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), self)

    # What is appended

    def joined(self) -> "Condition":
        """The clip and what is appended to it as one: tokens [B or 1, T + n P, C]."""
        clean, mask = self.clean, self.mask
        for stream in ("video", "audio"):
            more = getattr(self.appended, stream)
            if more is not None:
                clean = clean.replace(
                    **{stream: _concatenated(getattr(clean, stream), more.latents)}
                )
                mask = mask.replace(**{stream: _concatenated(getattr(mask, stream), more.mask)})
        bias = None
        if (video := self.appended.video) is not None and np.any(video.attention < 1):
            bias = jnp.asarray(_attention_bias(self.mask.video.shape[1], video.attention))[None]
        return Condition(clean, mask, self.frozen, video_bias=bias)

    def appended_noise(self, keys: jax.Array) -> AVLatents:
        """Noise [B, n P, C] of the appended latents from the samples' [B] keys.

        The clip's own noise does not depend on it.
        """

        def shape(clean: jax.Array, more: Appended | None) -> tuple[int, int]:
            return (0 if more is None else more.latents.shape[1], clean.shape[-1])

        shapes = (
            shape(self.clean.video, self.appended.video),
            shape(self.clean.audio, self.appended.audio),
        )
        return jax.vmap(lambda key: normal_latents(jax.random.fold_in(key, 1), *shapes))(keys)

    def appended_times(self) -> AVLatents | None:
        """[n, 2] seconds of both streams' appended latents, for `ClipGeometry.rope`."""
        if self.appended.video is None and self.appended.audio is None:
            return None
        nothing = np.zeros((0, 2), np.float32)
        video, audio = (
            nothing if more is None else np.asarray(more.times, np.float32)
            for more in (self.appended.video, self.appended.audio)
        )
        return AVLatents(video, audio)


def split_condition(
    condition: Condition, layout: BlockLayout, patches: int
) -> tuple[Condition, Condition]:
    """A clip's condition -> that of block 0, and those of the later blocks [K - 1, B or 1, ...]."""
    columns = jax.tree.map(lambda m: m[..., None], condition.mask)
    cleans = split_blocks(condition.clean, layout, patches)
    masks = split_blocks(columns, layout, 1)
    masks = [jax.tree.map(lambda m: m[..., 0], mask) for mask in masks]
    count = masks[1].video.shape[0]
    repeated = jax.tree.map(lambda f: jnp.broadcast_to(f, (count, *f.shape)), condition.frozen)
    first = Condition(cleans[0], masks[0], condition.frozen)
    return first, Condition(cleans[1], masks[1], repeated)


def add_noise(
    x0: AVLatents, noise: AVLatents, sigma: jax.Array | float, condition: Condition | None
) -> AVLatents:
    """x0 [B, T, C] at the noise level `sigma` [] or [B]; what is given stays clean."""
    if condition is None:
        return jax.tree.map(lambda x, n: flow.add_noise(x, n, sigma), x0, noise)
    return jax.tree.map(flow.add_noise, x0, noise, condition.sigma(sigma))


def velocity_to_x0(
    x: AVLatents,
    velocity: AVLatents,
    sigma: AVLatents | jax.Array,
    condition: Condition | None,
) -> AVLatents:
    """Clean prediction x0 = x - sigma v of x [B, T, C], with what is given in its place.

    Args:
      sigma: [] or [B] of the samples, or, without a condition, of each stream's groups of tokens.
    """
    if condition is not None:
        sigmas = condition.sigma(sigma)
        return condition.keep(jax.tree.map(flow.velocity_to_x0, x, velocity, sigmas))
    sigmas = sigma if isinstance(sigma, AVLatents) else AVLatents(sigma, sigma)
    return jax.tree.map(flow.velocity_to_x0, x, velocity, sigmas)


def check_same_shapes(name: str, x: AVLatents, expected: AVLatents) -> None:
    """Raises ValueError unless both streams have the shapes of `expected`."""
    for stream in ("video", "audio"):
        shape, wanted = getattr(x, stream).shape, getattr(expected, stream).shape
        if shape != wanted:
            raise ValueError(f"{name}: {stream} must be {list(wanted)}, not {list(shape)}")


def find_mode(name: str) -> Mode:
    """The mode of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in MODES:
        raise ValueError(f"there is no mode {name!r}; there are {', '.join(MODES)}")
    return MODES[name]


def mode_frozen(name: str) -> AVLatents:
    """Whether the mode gives a stream as a whole."""
    mode = find_mode(name)
    return AVLatents(mode.video == "all", mode.audio == "all")


def mode_mask(mode: str, clip: ClipGeometry, start: AVLatents) -> AVLatents:
    """The mask of a mode, [F] and [T_a] float32.

    Args:
      clip: sizes.
      start: latents that the mode `extend` gives of both streams.
    """

    def mask(amount: str, frames: int, start: int) -> np.ndarray:
        counts = {"nothing": 0, "first": 1, "start": start, "all": frames}
        return first_given(frames, counts[amount])

    video, audio = find_mode(mode)
    return AVLatents(
        mask(video, clip.video_frames, start.video), mask(audio, clip.audio_frames, start.audio)
    )


def first_given(frames: int, given: int, strength: float = 1.0) -> np.ndarray:
    """[frames] float32 mask of which the first ones are given."""
    mask = np.ones(frames, np.float32)
    mask[:given] = np.float32(1.0) - np.float32(strength)
    return mask


def check_strength(strength: float, name: str = "strength") -> None:
    """Raises ValueError unless it lies in [0, 1]."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], not {strength}")


def check_latents(name: str, latents: jax.Array, frames: int, size: tuple[int, ...]) -> None:
    """Raises ValueError unless they are [B, 1 to `frames`, *size]."""
    if latents.ndim != 2 + len(size) or latents.shape[2:] != size:
        raise ValueError(
            f"{name} latents must be [B, frames, {', '.join(map(str, size))}], got "
            f"{list(latents.shape)}"
        )
    if not 1 <= latents.shape[1] <= frames:
        raise ValueError(f"there are {latents.shape[1]} {name} latents; 1 to {frames} fit")


def _padded(tokens: jax.Array | None, count: int, channels: int) -> jax.Array:
    """[B, n, C] -> [B, count, C] float32, zeros behind; all zeros [1, count, C] for None."""
    if tokens is None:
        return jnp.zeros((1, count, channels))
    return jnp.pad(jnp.asarray(tokens, jnp.float32), ((0, 0), (0, count - tokens.shape[1]), (0, 0)))


def _both(first: Appended, second: Appended) -> Appended:
    return Appended(
        _concatenated(first.latents, second.latents),
        _concatenated(first.mask, second.mask),
        np.concatenate([first.times, second.times]),
        np.concatenate([first.attention, second.attention]),
    )


def _attention_bias(frames: int, attention: np.ndarray) -> np.ndarray:
    """[F, F] float32 logarithms of how strongly the latents of a clip with keyframes attend.

    Args:
      frames: latents of the clip, which stand first.
      attention: [n] of the clip to each keyframe and back.
    """
    weights = np.ones((frames + len(attention), frames + len(attention)), np.float32)
    weights[:frames, frames:] = attention
    weights[frames:, :frames] = attention[:, None]
    index = np.arange(len(attention))
    later = np.maximum(index[:, None], index) >= np.argmax(attention < 1)
    weights[frames:, frames:] = np.where(later & (index[:, None] != index), 0.0, 1.0)
    lowest = np.finfo(np.float32).min
    return np.where(weights > 0, np.log(np.where(weights > 0, weights, 1.0)), lowest)


def _concatenated(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B or 1, n, ...] and [B or 1, m, ...] -> [B or 1, n + m, ...]."""
    batch = max(x.shape[0], y.shape[0])
    return jnp.concatenate([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (x, y)], axis=1)
