"""The messages between a server and its clients, version 1; docs/protocol.md explains them.

Text messages are JSON objects whose `type` names one of these classes in lower case; binary ones
are MP4 to the client, and to the server the file or the samples that the message before announced.
"""

import dataclasses
import json
import math
import types
import typing
from typing import Any, Self

VERSION = 1
LONGEST_TEXT_MESSAGE = 64 * 1024  # characters
SAMPLE_RATES = (8_000, 96_000)  # of pushed sound, lowest and highest


class ProtocolError(ValueError):
    """A message that is not one of the protocol's; says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A text message; reads and writes itself."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Checks names and types.

        Raises:
          ProtocolError: a field is missing, unknown, or of another type.
        """
        hints, name = typing.get_type_hints(cls), cls.__name__.lower()
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
        return json.dumps({"type": type(self).__name__.lower()} | dataclasses.asdict(self))


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
class Start(Message):
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
class Prompt(Message):
    """Another prompt from the next block on."""

    text: str


@dataclasses.dataclass(frozen=True)
class Image(Message):
    """The next block begins with a picture, whose file (PNG, JPEG, …) is the next binary message.

    Attributes:
      strength: 1 shows it exactly, less only nearly.
    """

    strength: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ProtocolError("'strength' must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Audio(Message):
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
class Progress(Message):
    """How far the client has the stream, about once a second; silent clients lose their place.

    Attributes:
      seconds: end of what it has received and can play.
    """

    seconds: float


@dataclasses.dataclass(frozen=True)
class Pause(Message):
    """Makes no more blocks."""


@dataclasses.dataclass(frozen=True)
class Resume(Message):
    """Goes on."""


@dataclasses.dataclass(frozen=True)
class Stop(Message):
    """Ends the stream; what is made is still sent."""


# From the server


@dataclasses.dataclass(frozen=True)
class Hello(Message):
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
class Waiting(Message):
    """All places are taken; the position in the queue, from 1."""

    position: int


@dataclasses.dataclass(frozen=True)
class Begun(Message):
    """The stream has its place."""

    seed: int


@dataclasses.dataclass(frozen=True)
class Media(Message):
    """What the binary messages are from now on, as MediaSource takes it."""

    mime: str


@dataclasses.dataclass(frozen=True)
class Block(Message):
    """A block was made; its bytes follow.

    Attributes:
      block: its index; -1 for the rest at the end.
      end: seconds of the stream that are made.
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


@dataclasses.dataclass(frozen=True)
class Problem(Message):
    """A message or a turn that was refused; the stream goes on."""

    message: str


@dataclasses.dataclass(frozen=True)
class Ended(Message):
    """The last message.

    Attributes:
      failed: whether that is an error's doing.
    """

    reason: str
    failed: bool


CLIENT = (Start, Prompt, Image, Audio, Progress, Pause, Resume, Stop)
SERVER = (Hello, Waiting, Begun, Media, Block, Problem, Ended)


def read(text: str, kinds: tuple[type[Message], ...] = CLIENT) -> Message:
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
    names = {kind.__name__.lower(): kind for kind in kinds}
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise ProtocolError("a message must be an object with a 'type'")
    if (kind := names.get(fields.pop("type"))) is None:
        raise ProtocolError(f"'type' must be one of {', '.join(names)}")
    return kind.from_fields(fields)
