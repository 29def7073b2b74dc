"""What the server and redis-py say, told as the errors of the storage contract."""

from __future__ import annotations

from redis import exceptions

from pyworkflow.errors import WorkflowError
from pyworkflow.spi import (
    ConfigurationError,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

__all__ = ["LostWrites", "text_of", "translate"]


class LostWrites(StorageDamaged):
    """The server knows less than it told this client: acknowledged writes are gone."""

    def __str__(self) -> str:
        return (
            f"the store has lost writes: location={self.file} serial={self.offset}: {self.detail}; "
            "nothing was changed. Probably a replica took over before it had them, or the server "
            "came back without its data. Promote a server that has them or restore a copy; to go "
            "on with what is there, restart every worker"
        )


def translate(error: Exception, location: str) -> WorkflowError:
    """The error to raise for one of redis-py's."""
    text = text_of(error)
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError) or any(
        code in text for code in ("NOAUTH", "WRONGPASS", "invalid password", "invalid username")
    ):
        return ConfigurationError(
            f"the Redis server refuses the credentials: location={location}; "
            "check user and password of the storage URL"
        )
    if "LOSTWRITES" in text:
        found = text.rpartition(" ")[2]
        return LostWrites(
            location,
            int(found) if found.isdigit() else 0,
            "this client was told of later writes, or the store was another one",
        )
    if "OOM " in text:
        return StorageFull(
            f"the Redis server has no memory left: location={location}; nothing was written. "
            "Raise maxmemory, or purge old runs"
        )
    if "MISCONF" in text:
        detail = f"the Redis server cannot write to its disk: location={location}; nothing was "
        if "space" in text:
            return StorageFull(detail + "written. Free some space there")
        return StorageUnavailable(detail + "written. Look at its log and its disk")
    if "NOPERM" in text:
        return ConfigurationError(
            f"the Redis account may not do this: location={location}; "
            "allow it EVALSHA, SCRIPT LOAD, INFO and all that writes on pyworkflow:*"
        )
    for code, meaning in _BUSY.items():
        if code in text:
            return StorageUnavailable(f"{meaning}: location={location}; try again later")
    if isinstance(error, exceptions.InvalidResponse):
        return StorageUnavailable(
            f"the Redis server's answer is damaged: location={location} error={text[:100]!r}; the "
            "connection was closed, and it is unknown what was done: try again"
        )
    if isinstance(
        error, exceptions.ConnectionError | exceptions.TimeoutError | OSError | TimeoutError
    ):
        return StorageUnavailable(
            f"the Redis server does not answer: location={location} error={_cause(error)}; "
            "is it running, and reachable from here?"
        )
    return StorageError(f"the Redis server refused: location={location} error={text[:300]}")


def text_of(error: BaseException) -> str:
    """What the server said, with the code in front that redis-py makes a class of."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return f"{code} {error}"
    return str(error)


def _cause(error: BaseException) -> str:
    """The innermost reason: redis-py's own text says the address again."""
    while isinstance(error.__cause__, OSError | exceptions.RedisError):
        error = error.__cause__
    return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__


_CODES = (
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MasterDownError, "MASTERDOWN"),
)
_BUSY = {
    "LOADING": "the Redis server is still loading its data",
    "READONLY": "the Redis server is a read-only replica",
    "BUSY": "the Redis server is busy with a script",
    "NOREPLICAS": "the Redis server misses its replicas",
    "CLUSTERDOWN": "the Redis cluster is down",
    "TRYAGAIN": "the Redis cluster is moving the slot",
    "MASTERDOWN": "the Redis server has lost its master",
}
