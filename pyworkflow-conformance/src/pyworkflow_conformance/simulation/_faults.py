"""What goes wrong, and when: a plan that a seed makes, as a list from which faults can be dropped.

Every fault says by itself when it comes and what it is, so that leaving one out changes none of
the others: a failing plan can be made smaller fault by fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["PROFILES", "Fault", "Plan", "Setup"]

LEASE = 2.0
"""Seconds of virtual time that a claim holds in simulated clusters."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    """See ``PROFILES``."""
    at: int
    """With the so manieth call of the store; ``bell_…``: with the so manieth doorbell; a fault of a
    call whose ``choice`` is not 0: with the so manieth commit or claim."""
    steps: int = 0
    """So many callbacks after that."""
    target: int = 0
    """Which process, counted round."""
    seconds: float = 0.0
    """How long, or by how much."""
    choice: int = 0
    """What else there is to choose."""

    def __str__(self) -> str:
        where = "bell" if self.kind in _BELLS else "write" if self.of_writes else "call"
        steps = f"+{self.steps}" if self.steps else ""
        return (
            f"{self.kind}@{where}={self.at}{steps} target={self.target} "
            f"seconds={self.seconds:g} choice={self.choice}"
        )

    # What the server and the broker ask.

    @property
    def of_writes(self) -> bool:
        return self.kind in _CALLS and self.choice > 0

    @property
    def fails_before(self) -> bool:
        return self.kind in ("fails_before", "hangs_fails_before")

    @property
    def fails_after(self) -> bool:
        return self.kind in ("fails_after", "hangs_fails_after")

    @property
    def hangs_before(self) -> bool:
        return self.kind in ("hangs_before", "hangs_fails_before")

    @property
    def hangs_after(self) -> bool:
        return self.kind in ("hangs_after", "hangs_fails_after")

    @property
    def doubles(self) -> bool:
        return self.kind == "doubles"


_CALLS = (
    "fails_before", "fails_after", "fails_after", "hangs_before", "hangs_after",
    "hangs_fails_before", "hangs_fails_after", "doubles",
)  # fmt: skip
_BELLS = ("bell_lost", "bell_doubled", "bell_delayed")
_CRASH = ("kill", "kill", "pause", "pause", "drain", "evict", "evict", "caller")

#: Profile → the kinds of faults that it draws from, and how many at most.
PROFILES: dict[str, tuple[tuple[str, ...], int]] = {
    "calm": ((), 0),
    "crash": (_CRASH, 5),
    "network": ((*_CALLS, *_BELLS, *_BELLS, "caller"), 10),
    "storage": ((*_CALLS, "outage", "outage", "outage"), 8),
    "clock": (("jump", "jump", "pause", "pause", "kill"), 5),
    "versions": (("deploy", "deploy", "deploy", "kill", "evict", "pause"), 6),
    "all": (
        (*_CRASH, *_CRASH, *_CALLS, *_BELLS, *_BELLS, "outage", "jump", "jump", "deploy", "deploy"),
        12,
    ),
}
#: After these an item may count a claim more that made no progress.
_HARD = frozenset(
    {"kill", "pause", "fails_after", "hangs_before", "hangs_after", "hangs_fails_after", "jump",
     "deploy", "outage", "hangs_fails_before", "drain"}
)  # fmt: skip
_MOST_HARD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a cluster is made of."""

    workers: tuple[str, ...]
    """For each worker ``polls`` or ``bells``."""
    spread: bool
    sessions: int
    concurrency: int
    latency: float
    """Longest delay of a message, in seconds."""
    shuffled: bool
    runs: int
    size: int
    """About how many leaves each program has."""
    versions: tuple[str, ...]
    """For each worker what it starts with."""
    last_version: str
    """What every worker has in the end."""
    heals_at: float
    """When that is so, at the latest."""
    skews: tuple[float, ...]
    one_machine: bool
    """Workers see it when a process of the others is gone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a seed decides but the programs and the order of callbacks."""

    seed: int
    profile: str
    setup: Setup
    faults: tuple[Fault, ...]

    def without(self, index: int) -> Plan:
        """The plan less one fault."""
        return Plan(
            self.seed, self.profile, self.setup, self.faults[:index] + self.faults[index + 1 :]
        )


def make_plan(seed: int, profile: str) -> Plan:
    """The plan of a seed."""
    random = Random(f"plan {profile} {seed}")
    setup = _setup(random, profile)
    kinds, most = PROFILES[profile]
    faults: list[Fault] = []
    hard = 0
    for _ in range(random.randint(1, most) if most else 0):
        kind = random.choice(kinds)
        fault = _fault(random, kind)
        if kind in _HARD:
            hard += 1
            if hard > _MOST_HARD:
                continue
        faults.append(fault)
    return Plan(seed, profile, setup, tuple(faults))


def _setup(random: Random, profile: str) -> Setup:
    number = random.choice((1, 2, 2, 3))
    kinds = random.choice(("polls", "bells", "bells", "mixed"))
    workers = tuple(
        random.choice(("polls", "bells")) if kinds == "mixed" else kinds for _ in range(number)
    )
    mixed = profile in ("versions", "all") and random.random() < (
        1.0 if profile == "versions" else 0.5
    )
    last, versions = "1", ("1",) * number
    if mixed and random.random() < 0.5:
        last = "2"
        versions = tuple(random.choice(("1", "1", "2")) for _ in range(number))
    elif mixed:
        versions = tuple(random.choice(("1", "1", "1", "broken", "missing")) for _ in range(number))
    return Setup(
        workers=workers,
        spread=random.random() < 0.4,
        sessions=random.choice((0, 1, 10_000, 10_000)),
        concurrency=random.choice((1, 2, 100, 100)),
        latency=random.choice((0.0, 0.0, 0.002, 0.01, 0.05)),
        shuffled=random.random() < 0.8,
        runs=random.choice((1, 1, 2, 3)),
        size=random.choice((2, 4, 6, 9)),
        versions=versions,
        last_version=last,
        heals_at=random.choice((2.0, 5.0, 12.0)) if mixed else 0.0,
        skews=tuple(
            random.choice((-3600.0, -5.0, 0.0, 5.0, 3600.0)) if profile in ("clock", "all") else 0.0
            for _ in range(number)
        ),
        one_machine=random.random() < 0.4,
    )


def _fault(random: Random, kind: str) -> Fault:
    at = 1 + int(math.exp(random.random() * math.log(150)))
    seconds = 0.0
    match kind:
        case "kill" | "drain" | "deploy":
            seconds = random.choice((0.0, 0.1, 1.0, 3 * LEASE))
        case "pause":
            seconds = random.choice((0.05, 0.5, LEASE * 1.1, LEASE * 1.5, LEASE * 3))
        case "outage":
            seconds = random.choice((0.02, 0.3, LEASE, LEASE * 3))
        case "jump":
            seconds = random.choice((-6.0, -LEASE, -0.5, 0.5, LEASE, LEASE * 1.5, 3600.0))
        case "bell_delayed":
            seconds = random.choice((0.01, 0.3, 3.0))
        case _ if kind.startswith("hangs"):
            seconds = random.choice((0.03, 0.4, LEASE * 1.2, LEASE * 2.5))
        case _:
            pass
    choice = random.randrange(12)
    if kind in _CALLS and choice:
        at = 1 + int(math.exp(random.random() * math.log(60)))
    if kind in _BELLS:
        at = 1 + random.randrange(25)
    return Fault(
        kind,
        at,
        steps=0 if kind in _CALLS or kind in _BELLS else random.randrange(12),
        target=random.randrange(6),
        seconds=seconds,
        choice=choice,
    )


class Faults:
    """A plan while it is carried out."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.calls: dict[int, Fault] = {}
        self.writes: dict[int, Fault] = {}
        self.bells: dict[int, Fault] = {}
        self.others: list[Fault] = []
        """In order of their calls."""
        for fault in faults:
            if fault.kind in _BELLS:
                self.bells[fault.at] = fault
            elif fault.kind in _CALLS:
                (self.writes if fault.of_writes else self.calls)[fault.at] = fault
            else:
                self.others.append(fault)
        self.others.sort(key=lambda f: (f.at, f.steps))
