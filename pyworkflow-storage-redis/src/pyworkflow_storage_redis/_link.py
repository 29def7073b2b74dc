"""From a storage object to its server: connecting, what is asked of a server, calls of scripts."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast
from uuid import uuid4

from redis import exceptions

from pyworkflow.spi import ConfigurationError, SchemaTooNew, StorageError, StorageUnavailable
from pyworkflow.storekit import failpoints
from pyworkflow_storage_redis._channel import Answer, Channel
from pyworkflow_storage_redis._connection import RedisConnection, make_connection
from pyworkflow_storage_redis._errors import text_of, translate
from pyworkflow_storage_redis._keys import FORMAT, Address, prefix_of
from pyworkflow_storage_redis._news import News
from pyworkflow_storage_redis._scripts import NAMES, sha, source

__all__ = ["Link"]

_log = logging.getLogger("pyworkflow.storage")

failpoints.register(
    __name__,
    OSError,
    {
        "redis.before_send": "a call of a script is complete, and was not sent",
        "redis.after_answer": "the server has answered a call, and nobody has the answer yet",
    },
)

_OLDEST = (6, 2)
_PAUSE = 0.05
_REDIRECTS = 5


class Link:
    """The connection of one storage object in one event loop; connects again when it is lost."""

    def __init__(
        self, address: Address, namespace: str, *, timeout: float, must_be_durable: bool = False
    ) -> None:
        self.address = address
        self.location = address.location
        self.prefix = prefix_of(namespace)
        self.meta = f"{self.prefix}meta".encode()
        self.durable = False
        self._must_be_durable = must_be_durable
        self._timeout = timeout
        self._host: str = address.host
        self._port = address.port
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()
        self._serial = 0
        self._identity = b""
        self._told = False
        self._closed = False
        self.news = News(self._subscribed)

    # --- calls --------------------------------------------------------------------------------

    async def call(self, script: str, *args: bytes | str, again: bool = True) -> Any:
        """What the script answers, without serial and clock.

        ``again``: doing it twice does no harm, so it is sent once more when the connection was
        lost.
        """
        return (await self.ask(script, *args, again=again))[2]

    async def ask(self, script: str, *args: bytes | str, again: bool = True) -> list[Any]:
        """What the script answers: serial, clock, answer."""
        failure: Exception | None = None
        for _ in range(_REDIRECTS):
            channel = self._channel
            if channel is None or not channel.alive:
                channel = await self.connect()
            try:
                if failpoints.active:
                    failpoints.hit("redis.before_send")
                raw = await self.send(channel, script, *args)
                if failpoints.active:
                    failpoints.hit("redis.after_answer")
            except exceptions.NoScriptError:
                # Another server, or somebody flushed its scripts.
                await self._load(channel)
            except exceptions.MovedError as moved:
                await self._move(moved)
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                lost = isinstance(error, _LOST)
                if "READONLY" in text_of(error):
                    # A failover may have put another server behind the name.
                    await self._hang_up()
                if not (lost and again) or failure is not None:
                    raise translate(error, self.location) from error
                failure = error
            else:
                answer = _answer_in(raw)
                if answer is not None:
                    self._serial = max(self._serial, answer[0])
                    return answer
                # Whatever comes next over this connection may be as wrong.
                await self._hang_up()
                if not again or failure is not None:
                    raise StorageUnavailable(
                        f"the Redis server's answer is damaged: location={self.location}; the "
                        "connection was closed, and it is unknown what was done: try again"
                    )
                failure = exceptions.InvalidResponse("damaged")
        raise StorageUnavailable(
            f"the Redis server does not do what is asked: location={self.location}; try again later"
        )

    def send(self, channel: Channel, script: str, *args: bytes | str) -> Answer:
        """Send a call without waiting for its answer."""
        return channel.call(
            b"EVALSHA", sha(script), b"1", self.meta, str(self._serial), self._identity, *args
        )

    async def close(self) -> None:
        """Let go of the connections, for good: a call that is under way must not connect again."""
        self._closed = True
        await self.news.close()
        await self._hang_up()

    async def _hang_up(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _move(self, moved: exceptions.MovedError) -> None:
        """In a cluster the slot is another node's."""
        node = cast("Any", moved)  # redis-py does not say of what type its parts are
        self._host, self._port = str(node.host or self._host), int(node.port)
        await self._hang_up()

    async def _load(self, channel: Channel) -> None:
        try:
            answers = [channel.call(b"SCRIPT", b"LOAD", source(name)) for name in NAMES]
            await asyncio.gather(*answers)
        except (exceptions.RedisError, OSError) as error:
            raise translate(error, self.location) from error

    # --- connecting ---------------------------------------------------------------------------

    def connection(self) -> RedisConnection:
        """A connection to the server, not connected yet."""
        arguments = self.address.arguments() | {
            "host": self._host,
            "port": self._port,
            # Our own watch over silence looks at all calls at once.
            "socket_timeout": None,
            "socket_connect_timeout": self._timeout,
            "socket_keepalive": True,
            "protocol": 2,
        }
        return make_connection(arguments, tls=self.address.scheme == "rediss")

    async def _subscribed(self) -> RedisConnection:
        """A connection for messages alone."""
        connection = self.connection()
        try:
            async with asyncio.timeout(self._timeout):
                await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def connect(self) -> Channel:
        """The connection, checked; waits while the server loads its data."""
        async with self._lock:
            self._check_open()
            channel = self._channel
            if channel is not None and channel.alive:
                return channel
            await self._hang_up()
            loop = asyncio.get_running_loop()
            end = loop.time() + self._timeout
            while True:
                channel = Channel(self.connection(), timeout=self._timeout)
                try:
                    await channel.connect()
                    await self._prove(channel)
                    self._check_open()
                except exceptions.MovedError as moved:
                    await channel.close()
                    await self._move(moved)
                except (exceptions.RedisError, OSError, TimeoutError) as error:
                    await channel.close()
                    if "LOADING" not in text_of(error) or loop.time() > end:
                        raise translate(error, self.location) from error
                    await asyncio.sleep(_PAUSE)
                except (ValueError, TypeError, AttributeError, LookupError) as error:
                    await channel.close()
                    damaged = exceptions.InvalidResponse(type(error).__name__)
                    raise translate(damaged, self.location) from error
                except BaseException:
                    await channel.close()
                    raise
                else:
                    self._channel = channel
                    return channel

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"the storage was closed: location={self.location}")

    async def _prove(self, channel: Channel) -> None:
        """Refuse a server that would lose what it is given.

        Raises:
            ConfigurationError: Too old, evicts keys, or a replica.
            SchemaTooNew: A newer version wrote the namespace.
        """
        facts = _facts(await channel.call(b"INFO"))
        if facts.get("loading", "0") != "0":
            raise exceptions.BusyLoadingError("LOADING")
        version = facts.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            raise ConfigurationError(
                f"the Redis server is too old: location={self.location} version={version}; "
                "Redis 6.2 or Valkey is needed"
            )
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ConfigurationError(
                f"the Redis server may throw keys away: location={self.location} "
                f"maxmemory-policy={policy}; runs would be lost without an error. "
                "Set maxmemory-policy to noeviction, or use another server for PyWorkflow"
            )
        if facts.get("role") != "master":
            raise ConfigurationError(
                f"the Redis server is a replica: location={self.location} "
                f"role={facts.get('role')}; name its primary in the storage URL"
            )
        self.durable = await self._is_durable(channel, facts)
        if self._must_be_durable and not self.durable:
            raise ConfigurationError(
                f"the Redis server is not durable: location={self.location}; the storage URL says "
                "durable=true. Set appendonly yes and appendfsync always, and let CONFIG GET be "
                "allowed, or leave the option out"
            )
        for name in NAMES:
            await channel.call(b"SCRIPT", b"LOAD", source(name))
        found, identity = await self._format(channel, make=True)
        if found > FORMAT:
            raise SchemaTooNew(f"location={self.location}", found, FORMAT)
        if found < FORMAT:
            await self._upgrade(channel)
        self._identity = self._identity or identity
        if not self._told:
            self._told = True
            how = "appendfsync=always" if self.durable else "commits may be lost with the server"
            _log.info(
                "Redis storage opened: location=%s version=%s durable=%s (%s)",
                self.location,
                facts.get("valkey_version", version),
                str(self.durable).lower(),
                how,
            )

    async def _is_durable(self, channel: Channel, facts: dict[str, str]) -> bool:
        if facts.get("aof_enabled") != "1":
            return False
        try:
            answer = await channel.call(b"CONFIG", b"GET", b"appendfsync")
        except exceptions.ResponseError:
            return False  # a managed service does not say
        return bool(answer) and answer[-1] == b"always"

    async def _format(self, channel: Channel, *, make: bool) -> tuple[int, bytes]:
        fresh = uuid4().hex if make else ""
        raw: Any = await channel.call(
            b"EVALSHA", sha("open"), b"1", self.meta, b"0", b"", fresh, str(FORMAT)
        )
        found, identity = json.loads(raw.decode())[2]
        return found or 0, (identity or "").encode()

    async def _upgrade(self, channel: Channel) -> None:
        # Part by part: others are served in between, and one that dies leaves nothing half done.
        after: int | None = 0
        while after is not None:
            raw: Any = await channel.call(
                b"EVALSHA", sha("upgrade"), b"1", self.meta, b"0", b"", str(after)
            )
            after = json.loads(raw.decode())[2]

    async def pending_migrations(self) -> list[str]:
        """What ``migrate`` would do; writes nothing."""
        channel = Channel(self.connection(), timeout=self._timeout)
        try:
            await channel.connect()
            meta: Any = await channel.call(b"HGET", self.meta, b"format")
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise translate(error, self.location) from error
        finally:
            await channel.close()
        found = int(meta or 0)
        if found > FORMAT:
            raise SchemaTooNew(f"location={self.location}", found, FORMAT)
        return [f"{number:04d}" for number in range(found + 1, FORMAT + 1)]


_LOST = (exceptions.ConnectionError, exceptions.InvalidResponse, OSError, TimeoutError)


def _answer_in(raw: object) -> list[Any] | None:
    """Serial, clock and answer; None when it is none of a script's answers."""
    try:
        answer: Any = json.loads(cast("bytes", raw))
        serial, _clock, _value = answer
    except (ValueError, TypeError, RecursionError):
        return None
    return cast("list[Any]", answer) if isinstance(serial, int) else None


def _facts(answer: Any) -> dict[str, str]:
    lines = cast("bytes", answer).decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
