"""What the suite is made of: groups, levels, and which checks prove which capability."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

__all__ = [
    "DECLARED_ONLY",
    "GROUPS",
    "KILLS",
    "LEVELS",
    "PROOFS",
    "REQUIRED",
    "Check",
    "Level",
    "checks",
    "checks_of",
    "own_proofs",
]

Level = Literal["base", "durable", "distributed", "full"]

#: In order: each one includes those before it.
LEVELS: tuple[Level, ...] = ("base", "durable", "distributed", "full")

#: Prefix of the ids → the level that the group belongs to, and what it is about.
GROUPS: Mapping[str, tuple[Level, str]] = {
    "META": ("base", "the suite itself: nothing left out, capabilities as declared"),
    "CON": ("base", "the contract of commit, and reads"),
    "ORD": ("base", "histories: numbered without a gap, in order, unchangeable"),
    "IDM": ("base", "idempotency: changes, events and starts that come again"),
    "PAG": ("base", "listings in pages"),
    "PAY": ("base", "sizes and kinds of payloads"),
    "UNI": ("base", "texts of all kinds"),
    "DUE": ("base", "when work is due"),
    "CTL": ("base", "pause, stall, cancel, terminate"),
    "CRA": ("durable", "crashes: what was acknowledged is there afterwards"),
    "CLM": ("distributed", "claims: leases, tokens, fencing"),
    "CCY": ("distributed", "many clients at once"),
    "TIM": ("distributed", "the storage's clock"),
    "WATCH": ("distributed", "being woken"),
    "GC": ("full", "purge"),
    "MIG": ("full", "schemas, old and new"),
    "COST": ("full", "costs that do not grow with the number of runs"),
    "CPY": ("full", "copies to and from other stores"),
    "MOD": ("full", "random calls, compared with the reference store"),
    "FLT": ("full", "errors, delays, cancellation and repetition at every call"),
    "SOAK": ("full", "eight clients for a while"),
    "ENG": ("full", "the engine on the backend, under hostile profiles"),
}

#: What the level is about. A backend that does not declare it reaches the level by what applies to
#: it, and the report says "without"; one that declares it must have been seen to have it.
REQUIRED: Mapping[Level, str] = {"durable": "durable", "distributed": "multi_process"}

#: Capability → the checks that prove it. Empty: no check can tell.
PROOFS: Mapping[str, tuple[str, ...]] = {
    "durable": ("CRA-01", "CRA-02", "CRA-06", "CRA-07", "CRA-09"),
    "multi_process": ("CCY-09", "CRA-08", "CRA-12", "MIG-04", "MIG-08"),
    "multi_host": (),
    "server_clock": ("TIM-01", "TIM-02", "TIM-03", "TIM-08"),
    "watch": ("WATCH-01", "WATCH-02", "WATCH-03", "WATCH-04"),
    "batched": ("META-05",),
    "indexed_filters": ("COST-01",),
    # PAY-01: right, wherever a payload lies.
    "payload_offload": (),
    "purge_by_age": ("GC-01", "GC-02", "GC-04", "COST-01"),
    "large_history": ("PAY-05", "COST-01"),
}

#: Checks that try of several capabilities those that are declared, and so prove no other.
DECLARED_ONLY = frozenset({"COST-01"})


#: Capability → the check that kills the server, without which a networked store is only believed.
KILLS: Mapping[str, str] = {"durable": "CRA-09", "watch": "WATCH-03"}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the suite."""

    id: str
    name: str
    """Of the test function."""
    level: Level
    needs: tuple[str, ...]
    guarantee: str
    why: str
    """Why the engine needs it, and the usual cause of a failure."""

    @property
    def title(self) -> str:
        """The part of the name after the id."""
        return self.name.removeprefix("test_").split("_", 2)[2]


def own_proofs(proofs: Sequence[str]) -> list[str]:
    """The proofs that are about this capability alone."""
    return [proof for proof in proofs if proof not in DECLARED_ONLY]


def checks_of(suite: type) -> dict[str, Check]:
    """The checks of a class by id, in the order of the groups."""
    found: list[Check] = []
    for name in dir(suite):
        test = getattr(suite, name)
        if not name.startswith("test_") or not callable(test):
            continue
        group, number = name.removeprefix("test_").split("_")[:2]
        head, _, rest = inspect.cleandoc(test.__doc__ or "").partition("\n\n")
        guarantee = " ".join(head.split()).partition(": ")[2]
        found.append(
            Check(
                f"{group}-{number}",
                name,
                GROUPS[group][0],
                getattr(test, "needs", ()),
                guarantee,
                " ".join(rest.split()),
            )
        )
    order = list(GROUPS)
    found.sort(key=lambda check: (order.index(check.id.split("-")[0]), check.id))
    return {check.id: check for check in found}


@cache
def checks() -> Mapping[str, Check]:
    """All checks of the storage suite. Imports them."""
    from pyworkflow_conformance.storage import StorageConformance

    return checks_of(StorageConformance)
