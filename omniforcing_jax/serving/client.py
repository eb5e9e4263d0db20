"""A small client: streams into a file, and steers.

    python -m omniforcing_jax.serving.client ws://localhost:8000 --prompt "a calm sea" \\
        --at 5 "a storm comes up" --seconds 12 --output sea.mp4
"""

import asyncio
import contextlib
import pathlib
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from omniforcing_jax import programs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.serving import protocol
from omniforcing_jax.serving.protocol import Message


class Session:
    """One session of a server; made by `open_session`.

    Attributes:
      hello: what the server has said of itself.
    """

    def __init__(self, connection: ClientConnection, hello: protocol.Hello):
        self._connection, self.hello = connection, hello

    async def send(self, message: Message, data: bytes | None = None) -> None:
        """Sends a message, and the binary one that it announces."""
        await self._connection.send(message.to_json())
        if data is not None:
            await self._connection.send(data)

    async def __aiter__(self) -> AsyncIterator[Message | bytes]:
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
            if isinstance(message, protocol.Block):
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
    turns: dict[float, Message] | None = None,
    seed: int | None = None,
    token: str | None = None,
) -> list[tuple[float, protocol.Block]]:
    """Streams until so many seconds are there.

    Args:
      address, token: see `open_session`.
      prompt, seed: see `protocol.Start`.
      path: of the MP4; an older file is replaced when the new one is complete.
      seconds: of the clip, at least.
      turns: messages to be sent as soon as so many seconds are there.

    Returns:
      The blocks with the time at which they came, in seconds since the session began.

    Raises:
      RuntimeError: the server ended the session because of an error, which it names.
    """
    due, blocks = dict(sorted((turns or {}).items())), []
    async with open_session(address, token) as session:
        start = time.monotonic()
        await session.send(protocol.Start(prompt, seed))
        with new_file(pathlib.Path(path)) as temporary, temporary.open("wb") as file:
            async for received in session:
                match received:
                    case bytes():
                        file.write(received)
                    case protocol.Block(end=end):
                        blocks.append((time.monotonic() - start, received))
                        for when in [when for when in due if when <= end]:
                            await session.send(due.pop(when))
                        if end >= seconds:
                            await session.send(protocol.Stop())
                    case protocol.Ended(reason, True):
                        raise RuntimeError(reason)
    return blocks


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = programs.Parser("omniforcing_jax.serving.client", __doc__)
    add = parser.add_argument
    add("address", help="ws://HOST:PORT")
    add("--prompt", required=True, help="what to show")
    add("--at", nargs=2, action="append", default=[], metavar=("SECOND", "TEXT"),
        help="another prompt once so many seconds are there")  # fmt: skip
    add("--seconds", type=float, default=10.0, help="at least (default 10)")
    add("--seed", type=int)
    add("--token")
    add("--output", type=pathlib.Path, required=True, help="MP4 file")
    args = parser.parse_args(argv)
    turns = {float(second): protocol.Prompt(text) for second, text in args.at}
    blocks = asyncio.run(
        record(
            args.address, args.prompt, args.output, args.seconds,
            turns=turns, seed=args.seed, token=args.token,
        )
    )  # fmt: skip
    first, late = blocks[0][0], sum(block.late > 0 for _, block in blocks)
    print(f"{args.output}: {blocks[-1][1].end:.2f} s; first block after {first:.2f} s, {late} late")
    return 0


if __name__ == "__main__":
    sys.exit(main())
