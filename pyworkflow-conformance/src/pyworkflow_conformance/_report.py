"""What a run of the suite found: results, capabilities, levels, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pyworkflow.spi.capabilities import Capabilities
from pyworkflow_conformance._levels import KILLS, LEVELS, PROOFS, REQUIRED, Check, Level, own_proofs

__all__ = ["SCHEMA", "Capability", "Judged", "Report", "Result", "Status", "highest", "judge"]

#: Of the JSON report. Grows when a field changes its meaning or goes; new fields may come any time.
SCHEMA = 1


class Status(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    GAP = "gap"
    """It fails, and the backend declares that it does."""
    NOT_APPLICABLE = "not_applicable"
    """It needs a capability that is not declared, or a URL, server or files that are not given."""
    SKIPPED = "skipped"
    """Left out for another reason: counts as a failure of its level."""
    MISSING = "missing"
    """It did not run, although the profile includes it."""


class Capability(StrEnum):
    """What became of a capability."""

    PROVED = "proved"
    FAILED = "failed"
    """Declared, and a check of it fails."""
    GAP = "gap"
    """Declared; what is left of its checks beside declared gaps passes."""
    BY_ITS_WORD = "by_its_word"
    """Declared; no check can tell, or the one that can needs a server that may be killed."""
    UNCOVERED = "uncovered"
    """Declared, and no check exercised it."""
    NOT_TRIED = "not_tried"
    """Declared; its checks are not part of this run."""
    UNDECLARED_WORKS = "undeclared_works"
    """Not declared, and its checks pass all the same."""
    NOT_DECLARED = "not_declared"


@dataclass(frozen=True, slots=True)
class Result:
    """One check and what became of it."""

    id: str
    title: str
    level: Level
    status: Status
    seconds: float = 0.0
    reason: str = ""
    """Of a gap, of not applying, or the first line of a failure."""
    detail: str = ""
    """The failure at length: what was compared, seed, calls, state check."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A level, and why it is or is not reached."""

    reached: bool
    why: str
    passed: int
    failed: Sequence[str]
    gaps: Sequence[str]
    not_applicable: Sequence[str]
    missing: Sequence[str]
    without: Sequence[str] = ()
    """Of the capabilities that this level and those below are about, those not declared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The findings of one run of the suite."""

    schema: int = SCHEMA
    backend: str
    location: str
    contract_version: int
    version: str
    """Of pyworkflow-core, whose suite this is."""
    profile: Level
    seed: int
    started: str
    """ISO 8601."""
    seconds: float
    capabilities: Mapping[str, Capability]
    levels: Mapping[Level, Judged]
    level: Level | None
    """The highest that is reached. None for none, and when any check failed: a backend that is
    wrong is not right at a lower level. What it lacks is a gap, or not declared."""
    results: Sequence[Result] = field(default_factory=list[Result])
    remains: str = ""
    """What the run left in the store."""
    namespaces: Sequence[str] = field(default_factory=list[str])
    """Every namespace that the run used, for those who drop them."""
    unproved: Sequence[str] = field(default_factory=list[str])
    """Checks of a store for many hosts that need more than a URL, and so did not apply."""

    @property
    def level_text(self) -> str:
        """The level in words: a networked store that was given by URL alone is not FULL."""
        if self.level is None:
            return "none"
        return self.level.upper() + (" by URL" if self.unproved else "")

    @property
    def reached(self) -> bool:
        """Whether the profile that was asked for is reached."""
        return self.levels[self.profile].reached

    def to_json(self) -> dict[str, Any]:
        """For ``json.dump``."""
        return {**asdict(self), "reached": self.reached}


def judge(
    all_checks: Mapping[str, Check],
    results: Mapping[str, Result],
    declared: Capabilities,
    profile: Level,
) -> tuple[dict[str, Capability], dict[Level, Judged]]:
    """What the results say about the capabilities, and about each level up to ``profile``."""
    capabilities = {
        name: _capability(
            proofs,
            results,
            declared=bool(getattr(declared, name)),
            word=declared.multi_host and KILLS.get(name),
        )
        for name, proofs in PROOFS.items()
    }
    levels: dict[Level, Judged] = {}
    below: Level | None = None
    for level in LEVELS[: LEVELS.index(profile) + 1]:
        levels[level] = _level(level, all_checks, results, capabilities, below, levels)
        below = level
    return capabilities, levels


def highest(levels: Mapping[Level, Judged], results: Mapping[str, Result]) -> Level | None:
    """The level that a run shows: none when anything failed, at whatever level."""
    if any(one.status in {Status.FAILED, Status.SKIPPED} for one in results.values()):
        return None
    reached: list[Level] = [level for level, judged in levels.items() if judged.reached]
    return reached[-1] if reached else None


def _capability(
    proofs: Sequence[str],
    results: Mapping[str, Result],
    *,
    declared: bool,
    word: str | Literal[False] | None,
) -> Capability:
    """``word``: the check without which the capability is only the backend's word."""
    seen = [results[proof].status for proof in proofs if proof in results]
    if not declared:
        own = [results[proof].status for proof in own_proofs(proofs) if proof in results]
        works = len(own) == len(own_proofs(proofs)) > 0 and set(own) == {Status.PASSED}
        return Capability.UNDECLARED_WORKS if works else Capability.NOT_DECLARED
    if Status.FAILED in seen:
        return Capability.FAILED
    if not proofs:
        return Capability.BY_ITS_WORD
    if not seen:
        return Capability.NOT_TRIED
    if Status.PASSED not in seen:
        return Capability.UNCOVERED
    if word and word in results and results[word].status is Status.NOT_APPLICABLE:
        return Capability.BY_ITS_WORD
    return Capability.GAP if Status.GAP in seen else Capability.PROVED


_UNDECLARED = frozenset({Capability.NOT_DECLARED, Capability.UNDECLARED_WORKS})


def _level(
    level: Level,
    all_checks: Mapping[str, Check],
    results: Mapping[str, Result],
    capabilities: Mapping[str, Capability],
    below: Level | None,
    levels: Mapping[Level, Judged],
) -> Judged:
    ids = {status: list[str]() for status in Status}
    for check in all_checks.values():
        if LEVELS.index(check.level) <= LEVELS.index(level):
            result = results.get(check.id)
            ids[Status.MISSING if result is None else result.status].append(check.id)
    failed = [*ids[Status.FAILED], *ids[Status.SKIPPED]]
    needed = REQUIRED.get(level)
    without = [] if below is None else [*levels[below].without]
    if needed is not None and capabilities[needed] in _UNDECLARED:
        without.append(needed)
    state = None if needed is None else capabilities[needed]
    if below is not None and not levels[below].reached:
        why = f"{below} is not reached"
    elif failed:
        why = f"{len(failed)} failed"
    elif ids[Status.MISSING]:
        why = f"{len(ids[Status.MISSING])} did not run"
    elif state in {Capability.UNCOVERED, Capability.NOT_TRIED}:
        why = f"nothing exercised {needed}"
    else:
        why = ""
    return Judged(
        reached=not why,
        why=why,
        passed=len(ids[Status.PASSED]),
        failed=failed,
        gaps=ids[Status.GAP],
        not_applicable=ids[Status.NOT_APPLICABLE],
        missing=ids[Status.MISSING],
        without=without,
    )
