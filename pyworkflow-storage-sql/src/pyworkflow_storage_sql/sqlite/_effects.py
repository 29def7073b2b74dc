"""One run as ``decide`` reads it, each part when it is asked for, and what a change does to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

from pyworkflow.spi import (
    ErrorInfo,
    Event,
    Json,
    ParentRef,
    Record,
    RunDelta,
    RunStatus,
    StorageDamaged,
    WorkItem,
    record_from_json,
    record_to_json,
)
from pyworkflow.storekit import KEPT_TOKENS
from pyworkflow_storage_sql.sqlite._rows import (
    EVENT,
    ITEM,
    UNREADABLE,
    damaged_run,
    decode,
    encode,
    event_out,
    events_in,
    fitting,
    from_micros,
    item_in,
    item_out,
    to_micros,
    whole,
)

__all__ = [
    "LoadedRun",
    "create_run",
    "insert_events",
    "last_input_of",
    "load_run",
    "set_fields",
    "set_last",
    "trim_answers",
    "write_delta",
    "write_items",
    "write_new",
]

_ROW: Final = (
    "select id, create_key, workflow, queue, priority, updated_at, seen_seq, paused, stalled, "
    "final, last_seq, last_input, answer_token, answer_key, answer "
    "from runs where namespace = ? and run_id = ?"
)


#: The keys of a history of up to so many events are read at once.
_FEW_KEYS: Final = 2000


class LoadedRun:
    """A run as it stands in this transaction; ``advance`` makes it what a change left behind."""

    __slots__ = (
        "answer",
        "answer_key",
        "answer_token",
        "answers_by_token",
        "change_key",
        "conn",
        "create_key",
        "delivers",
        "events",
        "external_answers",
        "file",
        "final",
        "id",
        "items",
        "kept",
        "keys",
        "last_input",
        "paused",
        "priority",
        "queue",
        "run_id",
        "seen_seq",
        "stalled",
        "updated_at",
        "workflow",
    )

    def __init__(
        self, conn: sqlite3.Connection, file: str, run_id: str, change_key: str, row: Any
    ) -> None:
        self.conn = conn
        self.file = file
        self.run_id = run_id
        self.change_key = change_key
        self.delivers = True
        """Whether the answer's unseen events are delivered to code: then they must be readable."""
        self.id: int = row[0]
        self.create_key: str = row[1]
        self.workflow: str = row[2]
        self.queue: str = row[3]
        self.priority: int = row[4]
        self.updated_at = from_micros(row[5])
        self.seen_seq: int = row[6]
        self.paused = bool(row[7])
        self.stalled: str | None = row[8]
        self.final = None if row[9] is None else RunStatus(row[9])
        self.last_input: int = row[11]
        self.answer_token: str | None = row[12]
        self.answer_key: str | None = row[13]
        self.answer: str | None = row[14]
        self.kept = True
        """Whether there may be answers under earlier claims than that of the row's own."""
        self.events = _Events(self, row[10])
        self.keys = _Keys(self)
        self.items = _Items(self)
        self.external_answers: Mapping[str, Record] = _ExternalAnswers(self)
        self.answers_by_token: Mapping[str, Record] = _AnswersByToken(self)

    def advance(self, part: RunDelta, length: int, last_input: int) -> None:
        """These effects were written, but for the answer, which ``write_delta`` notes."""
        fields: Mapping[str, Any] = part.fields
        for name in _KNOWN & fields.keys():
            setattr(self, name, fields[name])
        self.events.length = length
        self.last_input = last_input
        self.keys.add(part.events)
        self.items.replace(part.gone, part.items)

    @property
    def attributes(self) -> Mapping[str, Json]:
        row = self.conn.execute(
            "select attributes from run_data where run = ?", (self.id,)
        ).fetchone()
        attributes: Mapping[str, Json] = decode(row[0])
        return attributes


#: Fields of a delta that ``LoadedRun`` has.
_KNOWN: Final = frozenset(
    {
        "create_key",
        "final",
        "paused",
        "priority",
        "queue",
        "seen_seq",
        "stalled",
        "updated_at",
        "workflow",
    }
)


def load_run(
    conn: sqlite3.Connection, file: str, namespace: int, run_id: str, change_key: str = ""
) -> LoadedRun | None:
    """The run, or None. ``change_key`` is that of the change to be decided."""
    row = conn.execute(_ROW, (namespace, run_id)).fetchone()
    if row is None:
        return None
    try:
        return LoadedRun(conn, file, run_id, change_key, row)
    except UNREADABLE as error:
        raise damaged_run(file, run_id, error) from error


class _Events(Sequence[Event]):
    __slots__ = ("length", "run")

    def __init__(self, run: LoadedRun, length: int) -> None:
        self.run = run
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            return self[place : place + 1][0]
        start, stop, _ = place.indices(self.length)
        if start >= stop:
            return []
        run = self.run
        rows = (
            run.conn.execute(
                f"select {EVENT} from events where run = ? and seq > ? and seq <= ? order by seq",  # noqa: S608 - constant columns
                (run.id, start, stop),
            ).fetchall()
        )  # an unfinished statement would hold its snapshot for as long as an error lives
        try:
            return whole(events_in(rows, run.run_id, run.file, start), run.run_id, run.file, stop)
        except StorageDamaged:
            if run.delivers:
                raise
            return []


class _Lookup(Mapping[str, Any]):
    """A mapping of which single entries are looked up."""

    __slots__ = ("run",)

    def __init__(self, run: LoadedRun) -> None:
        self.run = run

    def get(self, key: str, default: Any = None) -> Any:
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        return self.get(cast("str", key)) is not None

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class _Keys(_Lookup):
    __slots__ = ("asked", "known")

    def __init__(self, run: LoadedRun) -> None:
        super().__init__(run)
        self.asked = False
        self.known: dict[str, int] | None = None
        """All keys of the run, once it is worth it."""

    def add(self, events: Sequence[Event]) -> None:
        """The history has grown by these."""
        if self.known is not None:
            for event in events:
                if event.key is not None:
                    self.known[event.key] = event.seq

    def get(self, key: str, default: Any = None) -> Any:
        known = self.known
        if known is not None:
            return known.get(key, default)
        if self.asked and len(self.run.events) <= _FEW_KEYS:
            # Asked again: the run is worked on here, and will be asked for every step.
            rows = self.run.conn.execute(
                "select key, seq from events where run = ? and key is not null", (self.run.id,)
            )
            self.known = dict(rows.fetchall())
            return self.known.get(key, default)
        self.asked = True
        row = self.run.conn.execute(
            "select seq from events where run = ? and key = ?", (self.run.id, key)
        ).fetchone()
        return default if row is None else row[0]


class _Items(_Lookup):
    __slots__ = ("known", "whole")

    def __init__(self, run: LoadedRun) -> None:
        super().__init__(run)
        self.known: dict[str, WorkItem | None] = {}
        self.whole = False

    def get(self, key: str, default: Any = None) -> Any:
        known = self.known
        if key in known or self.whole:
            return known.get(key) or default
        run = self.run
        row = run.conn.execute(
            f"select {ITEM} from work_items where run = ? and item_id = ?",  # noqa: S608 - constant columns
            (run.id, key),
        ).fetchone()
        item = known[key] = None if row is None else item_in(row, run.run_id)
        return default if item is None else item

    def replace(self, gone: Iterable[str], items: Iterable[WorkItem]) -> None:
        """Some are gone, some are new or changed."""
        for item_id in gone:
            if self.whole:
                self.known.pop(item_id, None)
            else:
                self.known[item_id] = None
        for item in items:
            self.known[item.item_id] = item

    def _load(self) -> dict[str, WorkItem | None]:
        if not self.whole:
            run = self.run
            rows = run.conn.execute(
                f"select {ITEM} from work_items where run = ? order by item_id",  # noqa: S608 - constant columns
                (run.id,),
            )
            self.known = {row[0]: item_in(row, run.run_id) for row in rows}
            self.whole = True
        return self.known

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


class _ExternalAnswers(_Lookup):
    __slots__ = ()

    def get(self, key: str, default: Any = None) -> Any:
        row = self.run.conn.execute(
            "select answer from answers where run = ? and token is null and key = ?",
            (self.run.id, key),
        ).fetchone()
        return default if row is None else record_from_json(decode(row[0]))


class _AnswersByToken(_Lookup):
    __slots__ = ()

    def get(self, key: str, default: Any = None) -> Any:
        run = self.run
        if key == run.answer_token:
            # Decided by the change's key alone: the answer to another change is not unpacked.
            if run.answer is None or run.answer_key != run.change_key:
                return default
            return record_from_json(decode(run.answer))
        if not run.kept:
            return default
        row = run.conn.execute(
            "select answer from answers where run = ? and token = ?", (run.id, key)
        ).fetchone()
        return default if row is None else record_from_json(decode(row[0]))


# --- effects ----------------------------------------------------------------------------------

_INSERT_EVENT: Final = f"insert into events (run, {EVENT}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constant columns
_PUT_ITEM: Final = (
    "insert into work_items (run, item_id, namespace, workflow, kind, queue, priority, parked, "
    "due_at, free_at, claims, owner, token, lease_until, rung_at, payload) "
    "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "on conflict (run, item_id) do update set kind = excluded.kind, queue = excluded.queue, "
    "priority = excluded.priority, parked = excluded.parked, due_at = excluded.due_at, "
    "free_at = excluded.free_at, claims = excluded.claims, owner = excluded.owner, "
    "token = excluded.token, lease_until = excluded.lease_until, rung_at = excluded.rung_at, "
    "payload = excluded.payload"
)
#: Columns of ``runs`` that every step changes.
_STEP_COLUMNS: Final = (
    "last_seq", "last_input", "seen_seq", "updated_at", "answer_token", "answer_key", "answer",
)  # fmt: skip
_STEP: Final = f"update runs set {', '.join(f'{c} = ?' for c in _STEP_COLUMNS)} where id = ?"  # noqa: S608 - constant columns
_INSERT_RUN: Final = (
    "insert into runs (namespace, run_id, workflow, version, queue, priority, idempotency_key, "
    "parent_run_id, parent_op, root, created_at, updated_at, deadline, last_seq, last_input, "
    "seen_seq, paused, create_key) "
    "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)"
)
#: Names of a delta that are columns of ``runs``, in the order of a fixed update.
_HOT: Final = (
    "workflow", "version", "queue", "priority", "idempotency_key", "root", "next", "created_at",
    "started_at", "updated_at", "finished_at", "deadline", "seen_seq", "paused", "stalled",
    "final", "create_key",
)  # fmt: skip
_COLD: Final = ("args", "result", "error", "tags", "attributes")
_AFTER_CREATE: Final = ("started_at", "finished_at", "stalled", "final", "next")
_USUAL: Final = frozenset({"seen_seq", "updated_at"})


def create_run(
    conn: sqlite3.Connection,
    namespace: int,
    run_id: str,
    given: Mapping[str, Any],
    events: Sequence[Event] = (),
) -> int:
    """Make the row of a run of what a delta says, with these events to come; the row's id."""
    parent: ParentRef | None = given.get("parent")
    error: ErrorInfo | None = given.get("error")
    deadline: datetime | None = given.get("deadline")
    created = to_micros(given["created_at"])
    updated: datetime | None = given.get("updated_at")
    number = conn.execute(
        _INSERT_RUN,
        (
            namespace,
            run_id,
            given.get("workflow", ""),
            given.get("version", ""),
            given.get("queue", "default"),
            fitting(given.get("priority", 0), "priority"),
            given.get("idempotency_key"),
            None if parent is None else parent.run_id,
            None if parent is None else parent.op,
            given.get("root"),
            created,
            created if updated is None else to_micros(updated),
            None if deadline is None else to_micros(deadline),
            len(events),
            last_input_of(events, 0),
            given.get("seen_seq", 0),
            given.get("create_key", ""),
        ),
    ).lastrowid
    assert number is not None
    conn.execute(
        "insert into run_data (run, args, result, error, tags, attributes) values (?, ?, ?, ?, ?, ?)",
        (
            number,
            given.get("args", ""),
            given.get("result"),
            None if error is None else encode(error.to_json()),
            encode(list(given.get("tags", ()))),
            encode(given.get("attributes", {})),
        ),
    )
    return number


def set_fields(
    conn: sqlite3.Connection,
    run: int,
    fields: Mapping[str, Any],
    others: Sequence[tuple[str, object]] = (),
) -> None:
    """Set what a delta says of a run's row, and these other columns with it."""
    hot = [*others]
    for name, value in fields.items():
        if name == "parent":
            hot += [
                ("parent_run_id", None if value is None else value.run_id),
                ("parent_op", None if value is None else value.op),
            ]
        elif name in _HOT:
            if isinstance(value, datetime):
                value = to_micros(value)
            elif isinstance(value, RunStatus):
                value = str(value)
            hot.append((name, value))
        elif name in _COLD:
            if name in {"tags", "attributes"}:
                value = encode(list(value) if name == "tags" else value)
            elif isinstance(value, ErrorInfo):
                value = encode(value.to_json())
            conn.execute(f"update run_data set {name} = ? where run = ?", (value, run))  # noqa: S608 - a name of _COLD
    if hot:
        names = ", ".join(f"{name} = ?" for name, _ in hot)
        conn.execute(
            f"update runs set {names} where id = ?",  # noqa: S608 - names of _HOT
            (*(value for _, value in hot), run),
        )


def write_items(
    conn: sqlite3.Connection,
    namespace: int,
    run: int,
    workflow: str,
    items: Sequence[WorkItem],
    *,
    paused: bool,
) -> None:
    """Put items in place of what has the same id."""
    for item in items:
        conn.execute(
            _PUT_ITEM,
            (run, item.item_id, namespace, workflow, *item_out(item, parked=paused)),
        )


def insert_events(conn: sqlite3.Connection, run: int, events: Sequence[Event]) -> None:
    """Append to the history."""
    if len(events) == 1:
        conn.execute(_INSERT_EVENT, event_out(run, events[0]))
    elif events:
        conn.executemany(_INSERT_EVENT, [event_out(run, event) for event in events])


def set_last(conn: sqlite3.Connection, run: int, last_seq: int, last_input: int) -> None:
    """Note how long the history is."""
    conn.execute(
        "update runs set last_seq = ?, last_input = ? where id = ?", (last_seq, last_input, run)
    )


def last_input_of(events: Sequence[Event], before: int) -> int:
    """The seq of the last input, which was ``before`` these events came."""
    return next((event.seq for event in reversed(events) if event.klass == "I"), before)


def write_new(
    conn: sqlite3.Connection, file: str, namespace: int, change_key: str, part: RunDelta
) -> LoadedRun:
    """Write the effects of an accepted change that creates a run; the run as it then stands."""
    fields, events = part.fields, part.events
    number = create_run(conn, namespace, part.run_id, fields, events)
    later: dict[str, object] = {name: fields[name] for name in _AFTER_CREATE if name in fields}
    if later:
        set_fields(conn, number, later)
    insert_events(conn, number, events)
    (record,) = part.records  # nobody has a claim on what is not there: it has no token
    _remember(conn, number, record)
    workflow, create_key = str(fields["workflow"]), str(fields["create_key"])
    row = (
        number, create_key, workflow, fields.get("queue", "default"), fields.get("priority", 0),
        to_micros(cast("datetime", fields["updated_at"])), fields.get("seen_seq", 0), False,
        fields.get("stalled"), fields.get("final"), len(events), last_input_of(events, 0),
        None, None, None,
    )  # fmt: skip
    run = LoadedRun(conn, file, part.run_id, change_key, row)
    run.kept = False
    run.keys.known = {}
    run.keys.add(events)
    run.items.whole = True
    write_items(conn, namespace, number, workflow, part.items, paused=False)
    run.items.replace((), part.items)
    return run


def write_delta(conn: sqlite3.Connection, namespace: int, run: LoadedRun, part: RunDelta) -> None:
    """Write the effects of an accepted change to a run, which is told of them."""
    fields, events, number = part.fields, part.events, run.id
    insert_events(conn, number, events)
    length = events[-1].seq if events else len(run.events)
    last_input = last_input_of(events, run.last_input)
    (record,) = part.records
    if record.token is None:
        _remember(conn, number, record)
    else:
        if run.answer_token is not None and run.answer_token != record.token:
            keep_answer(conn, run, record.token)
        run.answer_token, run.answer_key = record.token, record.key
        run.answer = encode(record_to_json(record))
    if fields or events or record.token is not None:
        step = (
            length,
            last_input,
            fields.get("seen_seq", run.seen_seq),
            to_micros(cast("datetime", fields.get("updated_at", run.updated_at))),
            run.answer_token,
            run.answer_key,
            run.answer,
        )
        rare = {k: v for k, v in fields.items() if k not in _USUAL}
        if rare:
            set_fields(conn, number, rare, [*zip(_STEP_COLUMNS, step, strict=True)])
        else:
            conn.execute(_STEP, (*step, number))
    for item_id in part.gone:
        conn.execute("delete from work_items where run = ? and item_id = ?", (number, item_id))
    paused = cast("bool", fields.get("paused", run.paused))
    if "paused" in fields:
        conn.execute(
            "update work_items set parked = ? where run = ? and kind <> 'deliver'", (paused, number)
        )
    if part.items:
        write_items(conn, namespace, number, run.workflow, part.items, paused=paused)
    run.advance(part, length, last_input)


def _remember(conn: sqlite3.Connection, run: int, record: Record) -> None:
    """Keep the answer to a change without a claim as long as the run."""
    conn.execute(
        "insert into answers (run, key, answer) values (?, ?, ?)",
        (run, record.key, encode(record_to_json(record))),
    )


def keep_answer(conn: sqlite3.Connection, run: LoadedRun, now_token: str) -> None:
    """The last answer under an earlier claim joins the others; what is too old goes."""
    token = run.answer_token
    conn.execute(
        "delete from answers where run = ? and token in (?, ?)", (run.id, now_token, token)
    )
    conn.execute(
        "insert into answers (run, token, key, answer) values (?, ?, ?, ?)",
        (run.id, token, run.answer_key or "", run.answer or ""),
    )
    run.kept = True
    trim_answers(conn, run.id, spare=True)


def trim_answers(conn: sqlite3.Connection, run: int, *, spare: bool) -> None:
    """Forget the answers under claims too long ago; ``spare``: one more stands in the run's row."""
    conn.execute(
        "delete from answers where id in (select id from answers "
        "where run = ? and token is not null order by id desc limit -1 offset ?)",
        (run, KEPT_TOKENS - spare),
    )
