"""What was measured on both sides, as one table: medians, spreads, ratios, and how they stand to the aims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

OURS = "ours"


class Metric(NamedTuple):
    """One number that a workload yields on either side."""

    key: str
    what: str
    unit: str
    better: str = "less"
    """``less`` or ``more``."""
    ratios: Mapping[str, float] = MappingProxyType({})
    """Aim for ours : DBOS's, by our store; ``*`` for all."""
    own: float | None = None
    """Aim for ours alone."""
    scales: bool = False
    """Whether it depends on how many runs there are: no ratio between different sizes."""
    compared: bool = True
    """Whether a ratio says anything."""


class Row(NamedTuple):
    """One line of the table."""

    workload: str
    store: str
    peer: str
    what: str
    unit: str
    ours: float | None
    ours_spread: tuple[float, float] | None
    theirs: float | None
    theirs_spread: tuple[float, float] | None
    ratio: float | None
    aim: str
    verdict: str
    note: str


@dataclass
class Figure:
    """All readings of one number, of our side and of one peer, by round."""

    workload: str
    metric: Metric
    peer: str
    """Name of the peer, also of the one whose aims count."""
    store: str
    """The peer's store."""
    our_store: str
    same_size: bool = True
    note: str = ""
    ours: dict[int, float] = field(default_factory=dict[int, float])
    theirs: dict[int, float] = field(default_factory=dict[int, float])

    @property
    def _rounds(self) -> range:
        return range(1 + max([*self.ours, *self.theirs], default=-1))

    @property
    def ratios(self) -> list[float]:
        """Ours : theirs, round by round."""
        if not self.metric.compared or (self.metric.scales and not self.same_size):
            return []
        both = sorted(self.ours.keys() & self.theirs.keys())
        return [self.ours[n] / self.theirs[n] for n in both if self.theirs[n]]

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def ratio_aim(self) -> float | None:
        """What the ratio should be, at most or at least; only DBOS is an aim."""
        if self.peer != "dbos":
            return None
        return self.metric.ratios.get(self.our_store, self.metric.ratios.get("*"))

    @property
    def aim(self) -> str:
        sign = ">=" if self.metric.better == "more" else "<="
        if self.ratio_aim is not None:
            return f"{sign} {number(self.ratio_aim)} x"
        return "" if self.metric.own is None else f"{sign} {number(self.metric.own)}"

    @property
    def verdict(self) -> str:
        """``reached``, or ``missed`` and by how much."""
        aim, value = self.ratio_aim, self.ratio
        if aim is None:
            aim = self.metric.own
            value = statistics.median(self.ours.values()) if self.ours else None
        if aim is None or value is None:
            return ""
        if self.metric.better == "more":
            return "reached" if value >= aim else f"missed: {number(value / aim)} of it"
        if value <= aim:
            return "reached"
        return f"missed: {number(value / aim)} x the aim" if aim else f"missed by {number(value)}"

    def further(self, other: Figure) -> None:
        """Take another run's readings as rounds after these."""
        after = len(self._rounds)
        self.ours |= {after + n: value for n, value in other.ours.items()}
        self.theirs |= {after + n: value for n, value in other.theirs.items()}

    def row(self) -> Row:
        return Row(
            self.workload, self.store, self.peer, self.metric.what, self.metric.unit,
            _median(self.ours.values()), _spread(self.ours.values()),
            _median(self.theirs.values()), _spread(self.theirs.values()),
            self.ratio, self.aim, self.verdict, self.note,
        )  # fmt: skip

    def to_json(self) -> dict[str, object]:
        return {
            "workload": self.workload,
            "key": self.metric.key,
            "what": self.metric.what,
            "unit": self.metric.unit,
            "better": self.metric.better,
            "peer": self.peer,
            "store": self.store,
            "our_store": self.our_store,
            "same_size": self.same_size,
            # By round; null where that side was not measured.
            "ours": [self.ours.get(n) for n in self._rounds],
            "theirs": [self.theirs.get(n) for n in self._rounds],
            "ratios": self.ratios,
            "ratio": self.ratio,
            "aim": self.aim,
            "verdict": self.verdict,
            "note": self.note,
        }


def figure(saved: Mapping[str, Any], metric: Metric) -> Figure:
    """What ``to_json`` has written."""
    made = Figure(
        saved["workload"], metric, saved["peer"], saved["store"], saved["our_store"],
        saved["same_size"], saved["note"],
    )  # fmt: skip
    for values, into in ((saved["ours"], made.ours), (saved["theirs"], made.theirs)):
        into.update({n: value for n, value in enumerate(values) if value is not None})
    return made


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _spread(values: Iterable[float]) -> tuple[float, float] | None:
    known = list(values)
    return (min(known), max(known)) if len(known) > 1 else None


def number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def _side(value: float | None, spread: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    between = "" if spread is None else f" ({number(spread[0])} .. {number(spread[1])})"
    return number(value) + between


HEAD = (
    "workload", "what", "unit", "peer", "store", "ours", "theirs", "ours : theirs", "aim",
    "verdict", "note",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as it is printed."""
    return (
        row.workload, row.what, row.unit, row.peer, row.store,
        _side(row.ours, row.ours_spread), _side(row.theirs, row.theirs_spread),
        "" if row.ratio is None else number(row.ratio), row.aim, row.verdict, row.note,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows in columns; columns that are empty throughout are left out."""
    lines = [HEAD, *[cells(row) for row in rows]]
    used = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    lines = [tuple(line[i] for i in used) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
