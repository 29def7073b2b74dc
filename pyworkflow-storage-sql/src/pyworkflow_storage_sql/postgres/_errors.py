"""asyncpg's exceptions, translated: who must act, and whether asking again is right.

A message may name host, port and database, never a user's password: the driver's own texts about
the connection string are not passed on.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no types

from pyworkflow.spi import (
    ConfigurationError,
    PayloadTooLarge,
    SerializationError,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

__all__ = ["AGAIN", "translate"]

#: Serialization failure and deadlock: nothing was written, and the same call may be sent again.
AGAIN = frozenset({"40001", "40P01"})

#: What whoever set the server up has to mend: what happened, and what to do.
_INSTALL = {
    "28P01": (
        "the server refuses the user or the password",
        "see to both in the URL, with special characters written as %XX",
    ),
    "28000": (
        "the server refuses the user, or demands another way to connect",
        "see to the user, to sslmode, and to the server's pg_hba.conf",
    ),
    "3D000": ("there is no such database", "create it, or name another in the URL"),
    "42501": (
        "the user may not do this",
        "give it CREATE on the database, or a schema that it owns (option schema)",
    ),
}
_FULL = frozenset({"53100"})
_TOO_LARGE = frozenset({"54000", "54001", "22023", "XX000"})
_INDEX_ROW = re.compile(r"index row size (\d+) exceeds \D*4 maximum (\d+)")
_SCHEMA = frozenset({"42P01", "42883", "3F000", "42703"})


def translate(exc: BaseException, where: str) -> Exception:
    """The contract's exception for one of the driver's or the network's."""
    if isinstance(exc, asyncpg.PostgresError):
        return _server(exc, where)
    if isinstance(exc, socket.gaierror):
        return StorageUnavailable(
            f"the server's name is unknown: storage={where}; is the host written right?"
        )
    if isinstance(exc, ssl.SSLError):
        return ConfigurationError(
            f"no encrypted connection to the server: storage={where} reason={exc.reason}; "
            "see the options sslmode and sslrootcert"
        )
    if isinstance(exc, TimeoutError):
        return StorageUnavailable(
            f"the server did not answer in time: storage={where}; is it overloaded, or behind a "
            "firewall that drops connections?"
        )
    if isinstance(exc, OSError):
        reason = exc.strerror or type(exc).__name__
        return StorageUnavailable(
            f"the server cannot be reached: storage={where} reason={reason}; does it run, and does "
            "it listen on this host and port?"
        )
    if isinstance(exc, asyncpg.DataError):
        return SerializationError(f"the server cannot hold a value: storage={where} reason={exc}")
    if isinstance(exc, asyncpg.ClientConfigurationError):
        return ConfigurationError(
            f"the connection string is wrong: storage={where}; "
            "write postgresql://USER:PASSWORD@HOST:5432/DATABASE"
        )
    if isinstance(exc, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return StorageUnavailable(
            f"the connection is broken: storage={where} reason={type(exc).__name__}"
        )
    return StorageError(f"the driver failed: storage={where} reason={type(exc).__name__}")


def _server(exc: Any, where: str) -> Exception:
    state = str(exc.sqlstate)
    if state in _INSTALL:
        what, remedy = _INSTALL[state]
        return ConfigurationError(f"{what}: storage={where} sqlstate={state}; {remedy}")
    if state in _FULL:
        return StorageFull(f"the server's disk is full: storage={where}; make room")
    if state == "25006":
        return StorageUnavailable(
            f"the server takes no writes now: storage={where}; it is a standby, or "
            "default_transaction_read_only is on"
        )
    if state in _SCHEMA:
        return StorageError(
            f"tables or functions are missing: storage={where} sqlstate={state}; "
            "whatever opens the store next, such as `pyworkflow storage stats`, makes what is left out"
        )
    if state.startswith("22"):
        return SerializationError(f"the server cannot hold a value: storage={where} reason={exc}")
    too_long = _INDEX_ROW.match(str(exc)) if state == "54000" else None
    if too_long is not None:
        return PayloadTooLarge("a name", int(too_long[1]), int(too_long[2]), "store")
    if state in _TOO_LARGE and "exceed" in str(exc):
        return PayloadTooLarge("a change", 256 * 1024 * 1024, 256 * 1024 * 1024, "store")
    if state in {"XX001", "XX002"}:
        return StorageDamaged(where, None, f"the server reports sqlstate={state}")
    if state[:2] in {"08", "53", "55", "57", "58", "40"}:
        return StorageUnavailable(
            f"the server gave up: storage={where} sqlstate={state} reason={type(exc).__name__}"
        )
    return StorageError(f"the server refused: storage={where} sqlstate={state} reason={exc}")
