"""``postgresql:`` and ``postgres:`` URLs, as libpq reads them, with options of our own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import quote, urlencode

from pyworkflow.spi import ConfigurationError, StorageBackend

__all__ = ["make"]

_OWN = frozenset({"namespace", "schema", "connections", "pooled", "timeout"})
#: Passed on to the driver.
_DRIVER = frozenset(
    {
        *("host", "port", "user", "password", "passfile", "dbname", "database", "options"),
        *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "sslnegotiation"),
        *("target_session_attrs", "application_name", "krbsrvname", "gsslib"),
    }
)


def make(url: str, options: Mapping[str, str]) -> StorageBackend:
    """Make the backend for a PostgreSQL URL. Does no I/O.

    Options: ``namespace``, ``schema``, ``connections``, ``pooled`` (``true`` behind a pooler in
    transaction mode), ``timeout`` in seconds, and the driver's (``sslmode`` and others).

    Raises:
        ConfigurationError: An option is wrong, or the driver is not installed.
    """
    unknown = sorted(set(options) - _OWN - _DRIVER)
    if unknown:
        raise ConfigurationError(
            f"postgresql URLs have no such options: options={','.join(unknown)}; there are "
            f"{', '.join(sorted(_OWN))} and those of the driver, such as sslmode"
        )
    if find_spec("asyncpg") is None:
        raise ConfigurationError(
            "the driver asyncpg is not installed: storage=postgresql; "
            "pip install 'pyworkflow-storage-sql[postgres]', "
            "from a clone './pyworkflow-storage-sql[postgres]'"
        )
    from pyworkflow_storage_sql.postgres._backend import PostgresStorageBackend

    pooled = options.get("pooled")
    if pooled is not None and pooled.lower() not in {"true", "false"}:
        raise ConfigurationError(f"option pooled is neither true nor false: pooled={pooled!r}")
    passed = {name: value for name, value in options.items() if name in _DRIVER}
    base = url.partition("#")[0].partition("?")[0]
    return PostgresStorageBackend(
        base + (f"?{urlencode(passed, quote_via=quote)}" if passed else ""),
        namespace=options.get("namespace", "default"),
        schema=options.get("schema", "pyworkflow"),
        connections=int(_number(options, "connections", 2, whole=True)),
        pooled=None if pooled is None else pooled.lower() == "true",
        timeout=_number(options, "timeout", 30),
    )


def _number(options: Mapping[str, str], name: str, default: float, *, whole: bool = False) -> float:
    text = options.get(name)
    if text is None:
        return default
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1000:
        raise ConfigurationError(f"option {name} is no number from 1 to 1000: {name}={text!r}")
    return number
