"""What helps the author of a backend: the rules of a change, a reference store, checks of a store.

The contract itself is ``pyworkflow.spi``. ``embedded`` is for stores in this process, ``remote``
for those behind a network, ``failpoints`` for tests of crashes. Nothing here loads before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyworkflow.storekit import embedded, failpoints, reference, remote
    from pyworkflow.storekit._check import check_change
    from pyworkflow.storekit._decide import answer_each, decide
    from pyworkflow.storekit._dormant import DormantRun
    from pyworkflow.storekit._fsck import fsck
    from pyworkflow.storekit._items import (
        claimable,
        claimed,
        freed,
        imported,
        is_free,
        key_owner,
        notified,
        postponed,
        purgeable,
        released,
        renewed,
        tombstone,
        wakes_at,
    )
    from pyworkflow.storekit._loop_bound import LoopBound
    from pyworkflow.storekit._state import KEPT_TOKENS, RunState, RunView
    from pyworkflow.storekit._steady import SteadyClock, boot_id, machine_clocks
    from pyworkflow.storekit.reference import ReferenceStore

__all__ = [
    # the rules
    "KEPT_TOKENS",
    "RunState",
    "RunView",
    "answer_each",
    "check_change",
    "decide",
    # the rules of items, of purged runs and of keys
    "claimable",
    "claimed",
    "freed",
    "imported",
    "is_free",
    "key_owner",
    "notified",
    "postponed",
    "purgeable",
    "released",
    "renewed",
    "tombstone",
    "wakes_at",
    # a whole store in memory, and the check of a store
    "DormantRun",
    "ReferenceStore",
    "fsck",
    # the loop and the process of a storage object
    "LoopBound",
    # a clock that never goes back
    "SteadyClock",
    "boot_id",
    "machine_clocks",
    # modules
    "embedded",
    "failpoints",
    "reference",
    "remote",
]

_HOMES = {
    "DormantRun": "_dormant",
    "KEPT_TOKENS": "_state",
    "LoopBound": "_loop_bound",
    "ReferenceStore": "reference",
    "RunState": "_state",
    "RunView": "_state",
    "answer_each": "_decide",
    "SteadyClock": "_steady",
    "boot_id": "_steady",
    "machine_clocks": "_steady",
    "check_change": "_check",
    "decide": "_decide",
    **dict.fromkeys(
        (
            "claimable",
            "claimed",
            "freed",
            "imported",
            "is_free",
            "key_owner",
            "notified",
            "postponed",
            "purgeable",
            "released",
            "renewed",
            "tombstone",
            "wakes_at",
        ),
        "_items",
    ),
    "fsck": "_fsck",
}
_MODULES = frozenset({"embedded", "failpoints", "reference", "remote"})


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
