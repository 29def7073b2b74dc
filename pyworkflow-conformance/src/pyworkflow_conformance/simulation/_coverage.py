"""Which paths of recovery a run of many seeds must have taken: a test that never was there proves nothing."""

from __future__ import annotations

from collections import Counter

from pyworkflow_conformance.simulation._programs import KINDS

__all__ = ["ENOUGH", "SOMETIMES", "missing", "table"]

ENOUGH = 400
"""Seeds of one profile from which on every path of it must have been taken."""

_ALWAYS = (
    "step handed off",
    "turn taken with a result",
    "inputs of others delivered",
    "step retried",
    "dispatched step cancelled",
    "run resumed from its history",
    *(f"program: {kind}" for kind in sorted(KINDS)),
)
_CRASH = (
    "worker killed",
    "worker drained",
    "worker stopped past its lease",
    "lease takeover",
    "fenced commit",
    "unseen input",
    "commit under an expired lease",
    "body begun again",
    "leases of a process that is gone freed",
    "evicted and reloaded",
    "caller cancelled",
    "idempotency key taken",
    "cancel delivered",
    "code cancelled",
    "deadline passed",
    "code out of time",
    "control: pause",
    "control: unpause",
    "control: terminate",
    "started without a key",
)
_CALLS = (
    "answer lost",
    "call failed before",
    "call: hangs_before",
    "call: hangs_after",
    "duplicate change answered",
    "claims in a late answer",
)

#: Profile → what must have happened at least once in a run of ``ENOUGH`` seeds.
SOMETIMES: dict[str, tuple[str, ...]] = {
    "calm": _ALWAYS,
    "crash": (*_ALWAYS, *_CRASH),
    "network": (
        *_ALWAYS, *_CALLS, "bell lost", "bell doubled", "bell delayed", "bell lost and swept",
        "caller cancelled", "idempotency key taken", "lease takeover",
    ),
    "storage": (
        *_ALWAYS, *_CALLS, "outage", "call during an outage", "lease takeover", "fenced commit",
    ),
    "clock": (
        *_ALWAYS, "clock forward", "clock back", "lease takeover", "fenced commit",
        "commit under an expired lease", "worker stopped past its lease",
    ),
    "versions": (
        *_ALWAYS, "version changed", "run stalled", "stalled and healed", "version marked",
        "unknown workflow released",
    ),
    "all": (
        *_ALWAYS, *_CRASH, *_CALLS, "bell lost", "bell doubled", "bell delayed", "outage",
        "clock forward", "clock back", "run stalled", "stalled and healed", "version marked",
    ),
}  # fmt: skip


def missing(profile: str, seeds: int, seen: Counter[str]) -> list[str]:
    """What a run of so many seeds should have taken, and did not."""
    if seeds < ENOUGH:
        return []
    return [what for what in SOMETIMES[profile] if not seen[what]]


def table(profile: str, seen: Counter[str]) -> str:
    """What happened and how often, and what should have."""
    names = [*SOMETIMES[profile], *sorted(seen.keys() - set(SOMETIMES[profile]))]
    width = max(map(len, names))
    return "\n".join(
        f"  {name:<{width}} {seen[name]:>9,}{'' if seen[name] or name not in SOMETIMES[profile] else '  never'}"
        for name in names
    )
