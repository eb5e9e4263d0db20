"""A small client: streams into a file, and steers.

    python -m omniforcing_jax.serving.client ws://localhost:8000 --prompt "a calm sea" \\
        --at 5 "a storm comes up" --rewind 8 4 --new-seed 8 1 --seconds 12 --output sea.mp4
"""

import asyncio
import contextlib
import math
import pathlib
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Sequence

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from omniforcing_jax import programs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.serving import protocol
from omniforcing_jax.serving.protocol import WireMessage


class Session:
    """One session of a server; made by `open_session`.

    Attributes:
      hello: what the server has said of itself.
    """

    def __init__(self, connection: ClientConnection, hello: protocol.Hello):
        self._connection, self.hello = connection, hello

    async def send(self, message: WireMessage, data: bytes | None = None) -> None:
        """Sends a message, and the binary one that it announces.

        Nothing happens if the server has closed the connection: why is still to be read.
        """
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(message.to_json())
            if data is not None:
                await self._connection.send(data)

    async def __aiter__(self) -> AsyncIterator[WireMessage | bytes]:
        """What comes: messages, and the MP4 in pieces; `protocol.Ended` is the last.

        The server is told how far the stream is there, as it makes no more than it is taken.
        """
        while True:
            try:
                received = await self._connection.recv()
            except ConnectionClosed as error:
                raise RuntimeError(f"the server has closed the connection: {error}") from error
            if isinstance(received, bytes):
                yield received
                continue
            message = protocol.read(received, protocol.SERVER)
            if isinstance(message, protocol.BlockMade):
                await self.send(protocol.Progress(message.end))
            yield message
            if isinstance(message, protocol.Ended):
                return


@contextlib.asynccontextmanager
async def open_session(address: str, token: str | None = None) -> AsyncIterator[Session]:
    """Connects to a server.

    Args:
      address: "ws://HOST:PORT".
      token: if the server wants one.

    Raises:
      OSError: nobody answers there.
      PermissionError: the token is missing or wrong.
      ValueError: that is no such address.
      ProtocolError: it speaks another version of the protocol.
    """
    query = f"?{urllib.parse.urlencode({'token': token})}" if token else ""
    try:
        connection = await connect(f"{address.rstrip('/')}/session{query}", max_size=64 << 20)
    except InvalidStatus as error:
        raise PermissionError(f"{address} refuses the session: is the token right?") from error
    except InvalidURI as error:
        raise ValueError(f"{address!r} is no address of a server: give ws://HOST:PORT") from error
    except InvalidHandshake as error:
        raise OSError(f"no live server answers at {address}: {error}") from error
    async with connection:
        hello = protocol.read(await connection.recv(), (protocol.Hello,))
        if hello.protocol != protocol.VERSION:
            raise protocol.ProtocolError(
                f"the server speaks version {hello.protocol}, this client {protocol.VERSION}"
            )
        yield Session(connection, hello)


async def record(
    address: str,
    prompt: str,
    path: pathlib.Path,
    seconds: float,
    *,
    turns: Sequence[tuple[float, WireMessage]] = (),
    seed: int | None = None,
    token: str | None = None,
    log: pathlib.Path | None = None,
    take_up: str | None = None,
) -> list[tuple[float, protocol.BlockMade]]:
    """Streams until so many seconds are there.

    Args:
      address, token: see `open_session`.
      prompt, seed: see `protocol.Start`.
      path: of the MP4; an older file is replaced when the new one is complete.
      seconds: of the clip, at least.
      turns: messages to be sent as soon as so many seconds are there.
      log: file for the log of the turns, if it is wanted (`serving.turn_log`).
      take_up: name of a session that is taken up again, in place of a new one.

    Returns:
      The blocks with the time at which they came, in seconds since the session began.

    Raises:
      RuntimeError: the server ended the session because of an error, which it names.
    """
    due, blocks, name = sorted(turns, key=lambda turn: turn[0]), [], None
    async with open_session(address, token) as session:
        start = time.monotonic()
        first = protocol.Start(prompt, seed) if take_up is None else protocol.TakeUp(take_up)
        await session.send(first)
        with new_file(pathlib.Path(path)) as temporary, temporary.open("wb") as file:
            async for received in session:
                match received:
                    case bytes():
                        file.write(received)
                    case protocol.BlockMade(end=end):
                        blocks.append((time.monotonic() - start, received))
                        while due and due[0][0] <= end:
                            await session.send(due.pop(0)[1])
                        if end >= seconds:
                            await session.send(protocol.Stop())
                    case protocol.Begun(session=name):
                        programs.say(f"session {name}")
                    case protocol.ProblemFound(problem):
                        programs.say(f"refused: {problem}")
                    case protocol.Ended(reason, True):
                        raise RuntimeError(reason)
    if log is not None:
        await asyncio.to_thread(fetch_log, address, name, log, token)
    return blocks


def fetch_log(address: str, name: str, path: pathlib.Path, token: str | None = None) -> None:
    """Writes the log of a session's turns.

    Raises:
      OSError: the server has none, or does not answer.
    """
    http = address.rstrip("/").replace("ws", "http", 1)
    request = urllib.request.Request(f"{http}/turns/{name}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as response, new_file(path) as temporary:
        temporary.write_bytes(response.read())


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"blocks and seeds are whole numbers, not {number:g}")
    return int(number)


def _second(word: str) -> float:
    try:
        second = float(word)
    except ValueError:
        second = math.nan
    if not 0 <= second < math.inf:
        raise ValueError(f"--at takes a second from 0 on, not {word!r}")
    return second


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("omniforcing_jax.serving.client", __doc__)
    add = parser.add_argument
    add("address", help="ws://HOST:PORT")
    add("--prompt", default="", help="what to show")
    add("--at", nargs=2, action="append", default=[], metavar=("SECOND", "TEXT"),
        help="another prompt once so many seconds are there")  # fmt: skip
    add("--rewind", nargs=2, type=float, action="append", default=[], metavar=("SECOND", "BLOCK"),
        help="back to this block once so many seconds are there")  # fmt: skip
    add("--new-seed", nargs=2, type=float, action="append", default=[], metavar=("SECOND", "SEED"),
        help="other noise once so many seconds are there")  # fmt: skip
    add("--take-up", metavar="SESSION", help="go on with a session that was saved, by its name")
    add("--turns", type=pathlib.Path, metavar="FILE", help="write the log of the turns there, too")
    add("--seconds", type=float, default=10.0, help="at least (default 10)")
    add("--seed", type=int)
    add("--token")
    add("--output", type=pathlib.Path, required=True, help="MP4 file")
    args = parser.parse_args(argv)
    if not (args.prompt or args.take_up):
        raise ValueError("give --prompt, or --take-up to go on with a session")
    turns = [(_second(second), protocol.NewPrompt(text)) for second, text in args.at]
    turns += [(second, protocol.GoBack(_whole(block))) for second, block in args.rewind]
    turns += [(second, protocol.NewSeed(_whole(seed))) for second, seed in args.new_seed]
    blocks = asyncio.run(
        record(
            args.address, args.prompt, args.output, args.seconds,
            turns=turns, seed=args.seed, token=args.token, log=args.turns, take_up=args.take_up,
        )
    )  # fmt: skip
    first, late = blocks[0][0], sum(block.late > 0 for _, block in blocks)
    print(f"{args.output}: {blocks[-1][1].end:.2f} s; first block after {first:.2f} s, {late} late")
    return 0


if __name__ == "__main__":
    sys.exit(main())
