"""Files that a command line gives to a clip: pictures, sound, film and a voice.

They are read and checked before any weight is, and encoded once the text has been.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from omniforcing_jax import (
    ClipGeometry,
    Condition,
    PipelineConfig,
    Sound,
    Transformer,
    load_encoders,
)
from omniforcing_jax.io import media_files
from omniforcing_jax.models.transformer.rope import VIDEO_TEMPORAL_COMPRESSION, audio_time_bounds
from omniforcing_jax.sampling.conditions import check_strength
from omniforcing_jax.scaling.devices import check_memory

_SOUND_BYTES_PER_SECOND = 48_000 * 2 * 4  # of most files, as float32 of two channels


def add_options(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Adds the options that clips and streams have; returns what adds more to their group."""
    add = parser.add_argument_group("what is given").add_argument
    add("--image", metavar="PICTURE", help="the clip begins with this picture")
    add("--strength", type=float, default=1.0, help="of pictures (default 1: exactly)")
    add("--audio", metavar="SOUND", help="picture for this sound, which is kept as it is")
    add("--video", metavar="FILM", help="with --extend or --foley")
    add("--extend", action="store_true", help="go on from the film, picture and sound")
    add("--foley", action="store_true", help="sound for the film, whose picture is kept as it is")
    add("--crf", type=int, help="H.264 quality that pictures are given, 0: as they are (default: "
        "what the model was trained with)")  # fmt: skip
    return add


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Adds `add_options` and what is given to whole clips alone."""
    add = add_options(parser)
    add("--keyframe", nargs=2, action="append", default=[], metavar=("PICTURE", "FRAME"),
        help="shown at this frame, or nearly; may be repeated")  # fmt: skip
    add("--keyframe-attention", type=float, default=1.0, metavar="STRENGTH",
        help="how strongly the clip attends to keyframes: 1 (default) fully, 0 not")  # fmt: skip
    add("--reference", metavar="VOICE", help="sound of a voice to speak with")


@dataclasses.dataclass(frozen=True)
class GivenFiles:
    """What was read.

    Attributes:
      mode: of `sampling.conditions.MODES`.
      picture: [H, W, 3] float32 in [-1, 1], the first; `keyframes`: others and their frames.
      strength: of the pictures; `attention`: of the clip to the keyframes.
      frames: [F, H, W, 3] of the film, float32 in [-1, 1], or uint8 as they are shown.
      sound: to keep, or that of the film to go on from; `voice`: to speak with.
      notes: for the user.
    """

    mode: str
    picture: np.ndarray | None = None
    keyframes: tuple[tuple[np.ndarray, int], ...] = ()
    strength: float = 1.0
    attention: float = 1.0
    frames: np.ndarray | None = None
    sound: Sound | None = None
    voice: Sound | None = None
    notes: tuple[str, ...] = ()

    @property
    def played(self) -> Sound | None:
        """The sound that the clip has, as it was given."""
        return self.sound if self.mode in ("a2v", "ia2v") else None

    @property
    def shown(self) -> np.ndarray | None:
        """The frames [F, H, W, 3] uint8 that the clip has, as they were given."""
        return self.shown_frames if self.mode == "v2a" else None

    @property
    def shown_frames(self) -> np.ndarray:
        """The film's frames [F, H, W, 3] uint8."""
        shown = self.frames.dtype == np.uint8
        return self.frames if shown else media_files.to_bytes(self.frames)

    def condition(
        self,
        checkpoint: str | os.PathLike,
        clip: ClipGeometry,
        config: PipelineConfig,
        dtype: jnp.dtype,
        *,
        verify: bool,
    ) -> Condition:
        """Encodes it by the checkpoint's encoders, which are loaded for that and let go.

        Args:
          clip: what is sampled.
          dtype: in which the encoders compute.
          verify: compare their files with the checksums.
        """
        needed = {
            "video": self.picture is not None or self.keyframes or self.frames is not None,
            "audio": self.sound is not None or self.voice is not None,
        }
        streams = [name for name, need in needed.items() if need]
        encoder = load_encoders(checkpoint, dtype=dtype, streams=streams, verify=verify)
        model = Transformer(config.transformer)

        def grid(tokens: jax.Array) -> jax.Array:  # [B, f P, C] -> [B, f, h, w, C]
            return tokens.reshape(1, -1, clip.height, clip.width, tokens.shape[-1])

        video = audio = None
        if self.picture is not None:
            video = grid(encoder.encode_image(self.picture))
        elif self.frames is not None:
            video = grid(encoder.encode_frames(self.frames[None]))
        if self.sound is not None:
            count = clip.audio_frames
            if self.mode == "extend":  # the latents that end by the last frame
                seconds = np.float32(len(self.frames)) / np.float32(clip.frame_rate)
                count = int(np.sum(audio_time_bounds(count)[:, 1] <= seconds))
            audio = encoder.encode_sound(self.sound, count)
        made = Condition.for_mode(
            self.mode, clip, model, video=video, audio=audio, strength=self.strength
        )
        for picture, frame in self.keyframes:
            latent = grid(encoder.encode_image(picture))
            made = made.with_keyframe(clip, latent, frame, self.strength, self.attention)
        if self.voice is not None:
            made = made.with_voice(encoder.encode_sound(self.voice))
        return made


def read(
    args: argparse.Namespace,
    clip: ClipGeometry,
    config: PipelineConfig,
    shown: int | None = None,
    *,
    as_bytes: bool = False,
) -> GivenFiles | None:
    """Reads and checks what the options of `add_options` give; None if they give nothing.

    Args:
      args: also with the clip's `height` and `width` in pixels.
      shown: frames of the clip that are shown, and have to be given; None is all of them.
      as_bytes: whether the film's are read as they are shown, and not as the encoder takes them.

    Raises:
      ValueError: options that do not go together, or a file that does not fit (into memory, too);
        says what would.
      FileNotFoundError: a file that is not there.
    """
    if wrong := next(_contradictions(args), None):
        raise ValueError(wrong)
    if not (args.image or args.keyframe or args.audio or args.video or args.reference):
        return None
    check_strength(args.strength)
    attention = vars(args).get("keyframe_attention", 1.0)
    check_strength(attention, "--keyframe-attention")
    size = args.height, args.width
    shown = shown or clip.pixel_frames
    seconds = shown / clip.frame_rate
    notes, frames, sound = [], None, None
    if args.audio:
        # twice, as its pieces are put together
        check_memory("the sound", 2 * seconds * _SOUND_BYTES_PER_SECOND)
        sound = media_files.read_sound(args.audio, seconds)
        notes.append(media_files.check_sound_length(sound, seconds, args.audio))
        sound = sound.lasting(seconds)
    if args.foley:
        _check_film_memory(shown, args, as_bytes)
        frames = media_files.read_video(
            args.video, clip.frame_rate, *size, shown, as_bytes=as_bytes
        )
    if args.extend:
        frames = _film_to_extend(args, clip, as_bytes)
        sound = media_files.read_sound(args.video, len(frames) / clip.frame_rate)
    keyframes = tuple(
        (read_picture(path, args, config), _frame_number(frame, clip))
        for path, frame in args.keyframe
    )
    return GivenFiles(
        mode=_mode(args),
        picture=read_picture(args.image, args, config) if args.image else None,
        keyframes=keyframes,
        strength=args.strength,
        attention=attention,
        frames=frames,
        sound=sound,
        voice=media_files.read_sound(args.reference) if args.reference else None,
        notes=tuple(note for note in notes if note),
    )


def read_picture(path: str, args: argparse.Namespace, config: PipelineConfig) -> np.ndarray:
    """A picture as the model was trained with them, [H, W, 3] float32 in [-1, 1].

    Raises:
      ValueError, FileNotFoundError: it cannot be read, or is too small.
    """
    size, crf = (args.height, args.width), config.image_crf if args.crf is None else args.crf
    pixels = media_files.read_image(path)
    media_files.check_enlargement(pixels.shape[:2], *size, path)
    return media_files.fit_pixels(media_files.compress_image(pixels, crf), *size)


def _mode(args: argparse.Namespace) -> str:
    if args.video:
        return "extend" if args.extend else "v2a"
    return {(0, 0): "t2av", (1, 0): "i2av", (0, 1): "a2v", (1, 1): "ia2v"}[
        bool(args.image), bool(args.audio)
    ]


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    if (args.extend or args.foley) and not args.video:
        yield f"--{'extend' if args.extend else 'foley'} needs --video FILM"
    if args.video and args.extend == args.foley:
        yield "--video FILM goes with either --extend (go on from it) or --foley (make its sound)"
    if args.video and (args.image or args.audio):
        yield "--video gives the beginning or the picture itself: leave out --image and --audio"
    if args.foley and args.keyframe:
        yield "--foley gives the whole picture: leave out --keyframe"
    if args.reference and args.audio:
        yield "--audio gives the whole sound, so there is nothing to say in the --reference voice"
    if vars(args).get("keyframe_attention", 1.0) != 1.0 and not args.keyframe:
        yield "--keyframe-attention is that of --keyframe, of which there is none"
    if args.strength != 1.0 and not (args.image or args.keyframe):
        yield "--strength is that of --image and --keyframe, of which there is none"


def _check_film_memory(num_frames: float, args: argparse.Namespace, as_bytes: bool) -> None:
    """Raises ValueError for a film that does not fit, while its frames are put together."""
    values = num_frames * args.height * args.width * 3
    check_memory("the film", 2 * values * (1 if as_bytes else 4))


def _film_to_extend(args: argparse.Namespace, clip: ClipGeometry, as_bytes: bool) -> np.ndarray:
    """As many whole latents of the film as it has, [8k + 1, H, W, 3]."""
    step = VIDEO_TEMPORAL_COMPRESSION
    about = media_files.describe_clip(args.video)
    if not about.has_sound:
        raise ValueError(
            f"{args.video} has no sound to go on with: --extend goes on from picture and sound; "
            "make a sound for it first, with --foley"
        )
    rate, size = clip.frame_rate, (args.height, args.width)
    if about.seconds is not None and about.seconds * rate > clip.pixel_frames:
        raise ValueError(
            f"{args.video} lasts {about.seconds:.2f} s, the clip {clip.pixel_frames / rate:.2f} s: "
            "the clip includes the film and has to be longer (--seconds)"
        )
    _check_film_memory((about.seconds or 0) * rate, args, as_bytes)
    frames = media_files.read_video(args.video, rate, *size, as_bytes=as_bytes)
    whole = (len(frames) - 1) // step * step + 1
    if whole >= clip.pixel_frames:
        raise ValueError(
            f"{args.video} has {len(frames)} frames at {rate:g} per second, the clip "
            f"{clip.pixel_frames}: it has to be longer (--seconds)"
        )
    return frames[:whole]


def _frame_number(text: str, clip: ClipGeometry) -> int:
    if not text.isdigit() or int(text) >= clip.pixel_frames:
        raise ValueError(
            f"--keyframe takes a picture and a frame from 0 to {clip.pixel_frames - 1}, not {text}"
        )
    return int(text)
