"""The Lua scripts, one per method: each is the common prelude with the method's own text."""

from __future__ import annotations

from functools import cache
from hashlib import sha1
from importlib.resources import files

__all__ = ["NAMES", "sha", "source"]

NAMES = (
    "announce",
    "claim",
    "commit",
    "free",
    "import",
    "list",
    "next_due",
    "open",
    "purge",
    "read",
    "recover",
    "release",
    "renew",
    "shift",
    "upgrade",
)


@cache
def source(name: str) -> bytes:
    """The script's text."""
    folder = files("pyworkflow_storage_redis") / "lua"
    return (folder / "prelude.lua").read_bytes() + (folder / f"{name}.lua").read_bytes()


@cache
def sha(name: str) -> bytes:
    """Under what the server knows the script."""
    return sha1(source(name), usedforsecurity=False).hexdigest().encode()
