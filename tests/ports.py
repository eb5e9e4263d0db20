"""Ports for servers that are told theirs before they are started, as the coordinators of jobs."""

import contextlib
import socket
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine that no other process is given until the block ends.

    One that was looked up and closed again may be anybody's a moment later. Here the socket stays
    bound; with SO_REUSEADDR, which servers set as well, Linux lets one of them listen there, and
    until then refuses who connects.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":  # others let nobody in beside it
            held.close()
        yield port
