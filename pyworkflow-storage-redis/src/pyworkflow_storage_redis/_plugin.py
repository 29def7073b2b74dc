"""Serves ``redis://host:port/0`` and ``rediss://…`` (TLS)."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from pyworkflow.spi import ConfigurationError, StorageBackend, hookimpl

__all__ = ["pyworkflow_make_storage"]


@hookimpl
def pyworkflow_make_storage(url: str, options: Mapping[str, str]) -> StorageBackend | None:
    """Make the backend for a ``redis:`` or ``rediss:`` URL; None for other schemes. No I/O.

    Options: ``namespace``, ``timeout`` (seconds until a silent server counts as gone),
    ``durable`` (``true`` refuses a server that is not), ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``.

    Raises:
        ConfigurationError: An unknown option, or a URL that names no server.
    """
    base = url.partition("#")[0].partition("?")[0]
    if base.partition(":")[0].lower() not in {"redis", "rediss"}:
        return None
    try:
        from pyworkflow_storage_redis._backend import RedisStorageBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "redis":
            raise
        raise ConfigurationError(
            "the driver of Redis storage is not installed: package=redis; "
            "pip install 'pyworkflow-storage-redis', from a clone './pyworkflow-storage-redis'"
        ) from error
    from pyworkflow_storage_redis._keys import OPTIONS

    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigurationError(
            f"Redis URLs have no such options: options={','.join(unknown)}; "
            f"there are {', '.join(OPTIONS)}"
        )
    given = {name: value for name, value in options.items() if name != "namespace"}
    return RedisStorageBackend(
        f"{base}?{urlencode(given)}" if given else base,
        namespace=options.get("namespace", "default"),
    )
