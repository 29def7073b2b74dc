"""Runs of which only the head is in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import datetime

from pyworkflow.runs import RunStatus, WorkItem
from pyworkflow.storekit._listing import OrderedRuns
from pyworkflow.storekit._state import RunState

__all__ = ["DormantRun"]

#: What runs without items share. It stays empty: a dormant run never changes.
_NO_ITEMS: dict[str, WorkItem] = {}


class DormantRun(ABC):
    """The head of a run whose row, events and answers lie elsewhere.

    The reference store lists it, claims its items and counts it by its head, and loads it before a
    change is decided or a read needs more.
    """

    __slots__ = (
        "final",
        "finished_at",
        "idempotency_key",
        "items",
        "length",
        "look_at",
        "number",
        "parent_id",
        "paused",
        "place",
        "run_id",
        "seen_seq",
        "stalled",
        "workflow",
    )

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.number = 0
        self.workflow = ""
        self.final: RunStatus | None = None
        self.finished_at: datetime | None = None
        self.idempotency_key: str | None = None
        self.parent_id: str | None = None
        self.paused = False
        self.seen_seq = 0
        self.stalled: str | None = None
        self.length: int = 0
        self.items = _NO_ITEMS
        self.place: OrderedRuns | None = None
        self.look_at: datetime | None = None

    @abstractmethod
    def load(self) -> RunState:
        """The whole run.

        Raises:
            StorageError: It cannot be read.
        """

    @abstractmethod
    def load_row(self) -> RunState:
        """The run without its events and answers: enough for ``view`` with ``length``."""

    def released(self) -> None:
        """The store has removed the run."""
        return

    def take_head(self, run: RunState) -> None:
        """Have the head of a run that is in memory."""
        self.number = run.number
        self.workflow = run.workflow
        self.final = run.final
        self.finished_at = run.finished_at
        self.idempotency_key = run.idempotency_key
        self.parent_id = run.parent_id
        self.paused = run.paused
        self.seen_seq = run.seen_seq
        self.stalled = run.stalled
        self.length = run.length
        self.items = run.items or _NO_ITEMS
        self.place = run.place
        self.look_at = run.look_at

    def give_head(self, run: RunState) -> None:
        """Let a loaded run have the items and the place in the lists."""
        run.items = dict(self.items)
        run.place = self.place
        run.look_at = self.look_at
        run.home = self
