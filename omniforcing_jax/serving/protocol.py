"""The messages between a server and its clients, version 2; docs/protocol.md explains them.

Text messages are JSON objects whose `type` is the `wire_type` of one of these classes; binary ones
are MP4 to the client, and to the server the file or the samples that the message before announced.
"""

import dataclasses
import json
import math
import types
import typing
from typing import Any, Self

VERSION = 2
LONGEST_TEXT_MESSAGE = 64 * 1024  # characters
LONGEST_BLEND = 60  # blocks
SAMPLE_RATES = (8_000, 96_000)  # of pushed sound, lowest and highest


class ProtocolError(ValueError):
    """A message that is not one of the protocol's; says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class WireMessage:
    """A text message; reads and writes itself.

    Attributes:
      wire_type: what `type` says of it.
    """

    wire_type: typing.ClassVar[str]

    def __init_subclass__(cls, wire_type: str):
        cls.wire_type = wire_type

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Checks names and types.

        Raises:
          ProtocolError: a field is missing, unknown, or of another type.
        """
        hints, name = typing.get_type_hints(cls), cls.wire_type
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise ProtocolError(f"{name!r} has no field {unknown[0][:40]!r}")
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING]
        if lacking := [n for n in missing if n not in fields]:
            raise ProtocolError(f"{name!r} needs the field {lacking[0]!r}")
        for field, value in fields.items():
            if not _fits(value, hints[field]):
                raise ProtocolError(f"{field!r} of {name!r} cannot be {str(value)[:40]!r}")
        try:
            return cls(**fields)
        except ProtocolError:
            raise
        except (ValueError, OverflowError) as error:
            raise ProtocolError(str(error)) from error

    def to_json(self) -> str:
        """The message as it is sent."""
        return json.dumps({"type": self.wire_type} | dataclasses.asdict(self))


def check_seed(seed: int | None) -> None:
    """Raises ProtocolError for what is no seed; None draws one."""
    if seed is not None and not 0 <= seed < 2**32:
        raise ProtocolError(f"'seed' must be from 0 to {2**32 - 1}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if hint is type(None) else type(value) is hint


# From the client


@dataclasses.dataclass(frozen=True)
class Start(WireMessage, wire_type="start"):
    """Begins the session; the first message.

    Attributes:
      prompt: what to show.
      seed: of all noise; None draws one.
      sound: whether the client will push the sound (`Audio`), which the stream then waits for.
    """

    prompt: str
    seed: int | None = None
    sound: bool = False

    def __post_init__(self):
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class TakeUp(WireMessage, wire_type="take_up"):
    """Goes on with a session that was saved; the first message, in place of `Start`.

    Attributes:
      session: its name, from `Begun`.
    """

    session: str


@dataclasses.dataclass(frozen=True)
class NewPrompt(WireMessage, wire_type="prompt"):
    """Another prompt from the next block on.

    Attributes:
      text: what to show.
      blend: blocks that are between the old prompt and the new one.
      recache: whether what was made is written anew into the model's memory, under the new prompt;
        None as the server usually does.
    """

    text: str
    blend: int = 0
    recache: bool | None = None

    def __post_init__(self):
        if not 0 <= self.blend <= LONGEST_BLEND:
            raise ProtocolError(f"'blend' must be from 0 to {LONGEST_BLEND}")


@dataclasses.dataclass(frozen=True)
class NewSeed(WireMessage, wire_type="seed"):
    """Other noise from the next block on."""

    seed: int

    def __post_init__(self):
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class GoBack(WireMessage, wire_type="rewind"):
    """The next block takes the place of an earlier one, as if those from it on were not made.

    Attributes:
      block: its index, as `BlockMade` told it.
    """

    block: int


@dataclasses.dataclass(frozen=True)
class Image(WireMessage, wire_type="image"):
    """The next block begins with a picture, whose file (PNG, JPEG, …) is the next binary message.

    Attributes:
      strength: 1 shows it exactly, less only nearly.
    """

    strength: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ProtocolError("'strength' must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Audio(WireMessage, wire_type="audio"):
    """The next sound, whose samples (int16, little endian, one channel) are the next binary one.

    Attributes:
      rate: samples per second.
    """

    rate: int

    def __post_init__(self):
        low, high = SAMPLE_RATES
        if not low <= self.rate <= high:
            raise ProtocolError(f"'rate' must be from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Progress(WireMessage, wire_type="progress"):
    """How far the client has the stream, about once a second; silent clients lose their place.

    Attributes:
      seconds: end of what it has received and can play.
    """

    seconds: float


@dataclasses.dataclass(frozen=True)
class Pause(WireMessage, wire_type="pause"):
    """Makes no more blocks."""


@dataclasses.dataclass(frozen=True)
class Resume(WireMessage, wire_type="resume"):
    """Goes on."""


@dataclasses.dataclass(frozen=True)
class Stop(WireMessage, wire_type="stop"):
    """Ends the stream; what is made is still sent."""


# From the server


@dataclasses.dataclass(frozen=True)
class Hello(WireMessage, wire_type="hello"):
    """The first message: what streams are like here, and what is taken."""

    protocol: int
    width: int
    height: int
    frame_rate: float
    sample_rate: int
    lead: float
    longest_prompt: int  # characters
    largest_upload: int  # bytes


@dataclasses.dataclass(frozen=True)
class Waiting(WireMessage, wire_type="waiting"):
    """All places are taken; the position in the queue, from 1."""

    position: int


@dataclasses.dataclass(frozen=True)
class Begun(WireMessage, wire_type="begun"):
    """The stream has its place; turns are taken from now on.

    Attributes:
      seed: of all noise.
      session: a name that nobody else knows, by which the session can be taken up again.
    """

    seed: int
    session: str


@dataclasses.dataclass(frozen=True)
class Media(WireMessage, wire_type="media"):
    """What the binary messages are from now on, as MediaSource takes it."""

    mime: str


@dataclasses.dataclass(frozen=True)
class BlockMade(WireMessage, wire_type="block"):
    """A block was made; its bytes follow.

    Attributes:
      block: its index; a rewind goes back in it.
      end: seconds that are made since `Begun`.
      steps: of denoising that it had, as far as is known.
      took: seconds that it took.
      lead: seconds that are made and not played.
      late: seconds that playback stood still for.
      missing: seconds of pushed sound that had not arrived and are silence.
    """

    block: int
    end: float
    took: float
    lead: float
    late: float
    missing: float
    steps: int


@dataclasses.dataclass(frozen=True)
class LoadShed(WireMessage, wire_type="load"):
    """The server leaves something out as it has too much to do, or brings it back.

    Attributes:
      steps: of denoising that all sessions have.
      waiting: clients that may wait for a place.
    """

    steps: int
    waiting: int


@dataclasses.dataclass(frozen=True)
class ProblemFound(WireMessage, wire_type="problem"):
    """A message or a turn that was refused; the stream goes on."""

    message: str


@dataclasses.dataclass(frozen=True)
class Ended(WireMessage, wire_type="ended"):
    """The last message.

    Attributes:
      failed: whether that is an error's doing.
      saved: whether the session can be taken up again.
    """

    reason: str
    failed: bool
    saved: bool = False


CLIENT = (Start, TakeUp, NewPrompt, NewSeed, GoBack, Image, Audio, Progress, Pause, Resume, Stop)
SERVER = (Hello, Waiting, Begun, Media, BlockMade, LoadShed, ProblemFound, Ended)


def read(text: str, kinds: tuple[type[WireMessage], ...] = CLIENT) -> WireMessage:
    """A text message.

    Args:
      text: as it came.
      kinds: that are expected.

    Raises:
      ProtocolError: it is none of them; the message says why.
    """
    if len(text) > LONGEST_TEXT_MESSAGE:
        raise ProtocolError(f"a message has at most {LONGEST_TEXT_MESSAGE} characters")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a text message must be JSON") from error
    names = {kind.wire_type: kind for kind in kinds}
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise ProtocolError("a message must be an object with a 'type'")
    if (kind := names.get(fields.pop("type"))) is None:
        raise ProtocolError(f"'type' must be one of {', '.join(names)}")
    return kind.from_fields(fields)
