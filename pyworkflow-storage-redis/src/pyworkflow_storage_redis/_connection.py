"""What is used of a connection of redis-py, whose own types say little."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol, cast

from redis.asyncio import connection as library

__all__ = ["RedisConnection", "make_connection"]


class RedisConnection(Protocol):
    """One connection, used by one reader and one writer."""

    def connect(self) -> Awaitable[None]:
        """Connect and sign in."""
        ...

    def pack_command(self, *args: bytes | str) -> list[bytes]:
        """The command as it goes over the wire."""
        ...

    def send_packed_command(
        self, command: list[bytes], *, check_health: bool
    ) -> Coroutine[Any, Any, None]:
        """Write it; a caller that is cancelled meanwhile loses the connection."""
        ...

    def read_response(
        self, *, disable_decoding: bool, timeout: float, disconnect_on_error: bool
    ) -> Awaitable[Any]:
        """The next answer; an error that the server sent is raised."""
        ...

    def disconnect(self, *, nowait: bool) -> Awaitable[None]:
        """Let go of it."""
        ...


def make_connection(arguments: dict[str, Any], *, tls: bool) -> RedisConnection:
    """A connection that is not connected yet."""
    kind: Any = library.SSLConnection if tls else library.Connection
    return cast("RedisConnection", kind(**arguments))
