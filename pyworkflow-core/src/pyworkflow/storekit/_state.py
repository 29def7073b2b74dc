"""What the reference store keeps of one run, and how it looks from outside."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, cast

from pyworkflow._clock import EPOCH
from pyworkflow.events import Event, Json
from pyworkflow.runs import ErrorInfo, ParentRef, Run, RunStatus, WorkItem, derive_status
from pyworkflow.spi._delta import Record, RunDelta

if TYPE_CHECKING:
    from pyworkflow.storekit._dormant import DormantRun
    from pyworkflow.storekit._listing import OrderedRuns

__all__ = ["KEPT_TOKENS", "RunState", "RunView", "size_of"]

#: Of how many claims a run keeps the last change's answer.
KEPT_TOKENS = 64


class RunView(Protocol):
    """What ``decide`` reads of a run, and no more: a backend may load each part when it is asked.

    ``run_id, create_key, attributes, queue, priority, updated_at, seen_seq, paused, stalled,
    final`` are the row's. ``last_input`` is the seq of the last event of class ``I``.
    """

    @property
    def run_id(self) -> str: ...
    @property
    def create_key(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, Json]: ...
    @property
    def queue(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def updated_at(self) -> datetime: ...
    @property
    def seen_seq(self) -> int: ...
    @property
    def paused(self) -> bool: ...
    @property
    def stalled(self) -> str | None: ...
    @property
    def final(self) -> RunStatus | None: ...
    @property
    def last_input(self) -> int: ...
    @property
    def events(self) -> Sequence[Event]:
        """The history: its length is asked of every change, slices from ``seen_seq`` of some."""
        ...

    @property
    def keys(self) -> Mapping[str, int]:
        """Event key → seq; only ``get`` is called, once per event with a key."""
        ...

    @property
    def items(self) -> Mapping[str, WorkItem]:
        """Work items by id: ``get``, ``in``, and all of them when the run ends."""
        ...

    @property
    def external_answers(self) -> Mapping[str, Record]:
        """Change key → answer, of changes from outside."""
        ...

    @property
    def answers_by_token(self) -> Mapping[str, Record]:
        """Claim token → answer to the last change under it, of ``KEPT_TOKENS`` tokens."""
        ...


class RunState:
    """One run: its row, history, items and the answers that may be asked for again."""

    __slots__ = (
        "answers_by_token",
        "args",
        "attributes",
        "create_key",
        "created_at",
        "deadline",
        "error",
        "events",
        "external_answers",
        "final",
        "finished_at",
        "home",
        "idempotency_key",
        "items",
        "keys",
        "last_input",
        "look_at",
        "next",
        "number",
        "parent",
        "paused",
        "place",
        "priority",
        "queue",
        "result",
        "root",
        "run_id",
        "seen_seq",
        "sizes",
        "stalled",
        "started_at",
        "tags",
        "updated_at",
        "version",
        "workflow",
    )

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.number = 0
        self.create_key = ""
        self.workflow = ""
        self.version = ""
        self.args = ""
        self.result: str | None = None
        self.error: ErrorInfo | None = None
        self.idempotency_key: str | None = None
        self.parent: ParentRef | None = None
        self.root: str | None = None
        self.next: str | None = None
        self.queue = "default"
        self.priority = 0
        self.tags: tuple[str, ...] = ()
        self.attributes: Mapping[str, Json] = {}
        self.created_at = EPOCH
        self.started_at: datetime | None = None
        self.updated_at = EPOCH
        self.finished_at: datetime | None = None
        self.deadline: datetime | None = None
        self.seen_seq = 0
        self.paused = False
        self.stalled: str | None = None
        self.final: RunStatus | None = None
        self.events: list[Event] = []
        self.keys: dict[str, int] = {}
        self.last_input = 0
        self.items: dict[str, WorkItem] = {}
        self.external_answers: dict[str, Record] = {}
        self.answers_by_token: dict[str, Record] = {}
        self.sizes: list[int] = [0]
        self.place: OrderedRuns | None = None
        self.look_at: datetime | None = None
        self.home: DormantRun | None = None
        """Where it was loaded from, for a store that keeps runs outside of memory."""

    @property
    def length(self) -> int:
        """The number of events."""
        return len(self.events)

    @property
    def parent_id(self) -> str | None:
        """The id of the run that started this one."""
        return None if self.parent is None else self.parent.run_id

    def apply(self, part: RunDelta) -> None:
        """Take over row fields, events and records; the store does the items."""
        for name, value in part.fields.items():
            setattr(self, name, value)
        self.events.extend(part.events)
        for event in part.events:
            key = event.key
            if key is not None:
                self.keys[key] = event.seq
            if event.klass == "I":
                self.last_input = event.seq
        for record in part.records:
            if record.token is None:
                self.external_answers[record.key] = record
            else:
                answers_by_token = self.answers_by_token
                answers_by_token.pop(record.token, None)
                answers_by_token[record.token] = record
                if len(answers_by_token) > KEPT_TOKENS:
                    del answers_by_token[next(iter(answers_by_token))]

    def row(self) -> dict[str, object]:
        """The fields that differ from a fresh run's, as a delta has them."""
        fresh = RunState(self.run_id)
        return {
            name: value
            for name in _ROW
            if (value := cast("object", getattr(self, name))) != getattr(fresh, name)
        }

    def view(self, now: datetime, length: int | None = None) -> Run:
        """The run as ``get_run`` shows it; ``length`` is that of a history that was not loaded."""
        return Run(
            run_id=self.run_id,
            workflow=self.workflow,
            version=self.version,
            status=derive_status(
                final=self.final,
                stalled=self.stalled,
                paused=self.paused,
                seen_seq=self.seen_seq,
                items=list(self.items.values()),
                now=now,
            ),
            args_text=self.args,
            result_text=self.result,
            error=self.error,
            idempotency_key=self.idempotency_key,
            parent=self.parent,
            root=self.root,
            next=self.next,
            queue=self.queue,
            priority=self.priority,
            tags=self.tags,
            attributes=self.attributes,
            created_at=self.created_at,
            started_at=self.started_at,
            updated_at=self.updated_at,
            finished_at=self.finished_at,
            deadline=self.deadline,
            history_length=len(self.events) if length is None else length,
            seen_seq=self.seen_seq,
            paused=self.paused,
            stalled=self.stalled,
        )

    def within(self, after: int, budget: int) -> tuple[list[Event], int]:
        """Events after seq ``after`` of ``budget`` bytes at most, and how many bytes they are."""
        sizes = self.sizes
        for event in self.events[len(sizes) - 1 :]:
            sizes.append(sizes[-1] + 96 + size_of(event.data))
        start = sizes[after]
        end = bisect_right(sizes, start + budget, lo=after) - 1
        return self.events[after:end], sizes[end] - start


_ROW = (
    "number",
    "create_key",
    "workflow",
    "version",
    "args",
    "result",
    "error",
    "idempotency_key",
    "parent",
    "root",
    "next",
    "queue",
    "priority",
    "tags",
    "attributes",
    "created_at",
    "started_at",
    "updated_at",
    "finished_at",
    "deadline",
    "seen_seq",
    "paused",
    "stalled",
    "final",
)


def size_of(value: Any) -> int:
    """About how many bytes of JSON a value is."""
    if isinstance(value, str):
        return len(value) + 2 if value.isascii() else len(value.encode()) + 2
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        return sum(len(key) + 4 + size_of(entry) for key, entry in fields.items())
    if isinstance(value, list):
        entries = cast("Sequence[Any]", value)
        return sum(size_of(entry) + 2 for entry in entries)
    return 8
