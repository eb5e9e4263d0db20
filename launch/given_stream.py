"""What a command line gives to a stream: the files of `launch.given_files`, and a face and a voice.

They are read and checked before any weight is, and handed to the session before its first block.
"""

import argparse
import dataclasses

import numpy as np

from launch import given_files
from launch.given_files import GivenFiles
from omniforcing_jax import (
    ClipGeometry,
    PipelineConfig,
    RolloutConfig,
    Sound,
    StreamingSession,
)
from omniforcing_jax.io import media_files
from omniforcing_jax.streaming.given import unshown_blocks

_STREAMS = {"a2v": "audio", "ia2v": "audio", "v2a": "video"}  # given as a whole, by mode
_ENDLESS = 10**5  # blocks, for the checks


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = given_files.add_options(parser)
    add(
        "--reference", nargs=2, metavar=("PICTURE", "VOICE"),
        help="a face and a voice, seen and heard before the stream begins, and kept with --anchors",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GivenToStream:
    """What was read.

    Attributes:
      files: picture, film or sound; None where there is none.
      face, voice: [H, W, 3] float32 in [-1, 1] and a sound, or None.
      unshown: blocks of the references before the first block that is shown.
      seconds: of all blocks of the stream.
      notes: for the user.
    """

    files: GivenFiles | None = None
    face: np.ndarray | None = None
    voice: Sound | None = None
    unshown: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def encoders(self) -> bool:
        """Whether the VAEs' encoders are needed."""
        return self.files is not None or self.face is not None

    @property
    def stream(self) -> str | None:
        """Which stream is given as a whole; see `StreamingSession`."""
        return None if self.files is None else _STREAMS.get(self.files.mode)

    def start(self, session: StreamingSession) -> None:
        """Gives it to a session that has not begun."""
        if self.voice is not None:
            session.set_reference(self.face, self.voice.waveform[None], self.voice.sample_rate)
        if (files := self.files) is None:
            return
        if files.picture is not None:
            session.set_image(files.picture, files.strength)
        frames = None if files.frames is None else files.shown_frames[None]
        if files.mode == "extend":
            session.extend(frames, files.sound.waveform[None], files.sound.sample_rate)
        elif files.sound is not None:
            # to the last block's end, and what its latents need of the time behind it
            sound = files.sound.lasting(self.seconds + 1)
            session.push_audio(sound.waveform[None], sound.sample_rate)
        elif frames is not None:
            session.push_frames(frames)


def read(
    args: argparse.Namespace,
    rollout: RolloutConfig,
    length: tuple[int, int] | None,
    config: PipelineConfig,
) -> GivenToStream:
    """Reads and checks what the options of `add_options` give.

    Args:
      args: also with `height` and `width` in pixels.
      length: blocks of the stream, and the frames of them that are shown; None is without end.

    Raises:
      ValueError, FileNotFoundError: see `given_files.read`.
    """
    layout = rollout.cache.layout
    if length is None and (args.audio or args.foley):
        what = "--audio" if args.audio else "--foley"
        raise ValueError(f"{what} gives what has an end, --endless none: give --seconds instead")
    if args.reference and args.video:
        raise ValueError("--video gives the beginning or the picture itself: leave out --reference")
    blocks, shown = length or (_ENDLESS, None)
    clip = ClipGeometry.from_blocks(layout, blocks, rollout.height, rollout.width)
    plain = argparse.Namespace(**vars(args) | {"reference": None, "keyframe": []})
    files = given_files.read(plain, clip, config, shown, as_bytes=True)
    notes = [] if files is None else list(files.notes)
    face = voice = None
    if args.reference:
        face = given_files.read_picture(args.reference[0], args, config)
        voice = media_files.read_sound(args.reference[1])
        if not rollout.cache.anchors:
            notes.append(
                "--reference with no anchors is one block of which the voice is 1/25 s: "
                "--anchors 3 --window 1 keeps three seconds of it"
            )
    warning = files and config.trained.untrained_mode(files.mode)
    notes += [warning] if warning else []
    unshown = unshown_blocks(layout, 1 + rollout.cache.anchors) if args.reference else 0
    seconds = layout.pixel_frames(blocks) / layout.frame_rate
    return GivenToStream(files, face, voice, unshown, seconds, tuple(notes))
