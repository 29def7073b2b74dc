"""Changes, purges and copies of runs. Run in the writer's transaction."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final

from pyworkflow.spi import (
    Answer,
    Change,
    Committed,
    ControlKind,
    Delta,
    ErrorInfo,
    KeyMark,
    Page,
    ParentRef,
    Run,
    RunDelta,
    RunStatus,
    WorkItem,
    record_from_json,
    record_to_json,
)
from pyworkflow.storekit import answer_each, decide
from pyworkflow_storage_sql.sqlite._effects import (
    LoadedRun,
    create_run,
    insert_events,
    last_input_of,
    load_run,
    set_fields,
    set_last,
    trim_answers,
    write_delta,
    write_items,
    write_new,
)
from pyworkflow_storage_sql.sqlite._rows import (
    ITEM,
    RUN,
    UNREADABLE,
    damaged_run,
    decode,
    encode,
    from_micros,
    item_in,
    run_in,
    to_micros,
)
from pyworkflow_storage_sql.sqlite._writer import Batch

__all__ = [
    "commit",
    "commit_all",
    "export_keys",
    "export_run",
    "find_run",
    "get_run",
    "import_delta",
    "list_work",
    "purge",
]

_PAGE: Final = 1000
#: Columns of a run's row that a delta names as they are.
_PLAIN: Final = (
    "create_key", "workflow", "version", "idempotency_key", "root", "next", "queue", "priority",
    "seen_seq", "stalled",
)  # fmt: skip
_GET_RUN: Final = f"select {RUN} from runs r join run_data d on d.run = r.id where r.namespace = ? and r.run_id = ?"  # noqa: S608 - constant columns
_LIST_WORK: Final = (
    f"select {ITEM} from work_items where run = "  # noqa: S608 - constant columns
    "(select id from runs where namespace = ? and run_id = ?)"
)
#: Their sender delivers no events: a damaged one must not keep a run from being stalled or ended.
_WITHOUT_CODE: Final = (ControlKind.STALL, ControlKind.TERMINATE)
_INSTANTS: Final = ("created_at", "started_at", "updated_at", "finished_at", "deadline")


def commit(change: Change, batch: Batch) -> Committed:
    """Accept or refuse a change."""
    run = batch.runs.load(batch.conn, batch.file, batch.namespace, change.run_id, change.key)
    if run is not None:
        run.delivers = change.control is None or change.control.kind not in _WITHOUT_CODE
    committed, part = decide(
        run,
        change,
        now=batch.now,
        token=batch.token,
        owner_of=lambda key: _owner(batch, key),
    )
    if part is None:
        return committed
    batch.changes(work=_is_work(part, batch.now))
    if run is None:
        run = write_new(batch.conn, batch.file, batch.namespace, change.key, part)
    else:
        write_delta(batch.conn, batch.namespace, run, part)
    batch.runs.keep(run, len(part.events))
    new = change.create
    if new is not None and new.idempotency_key is not None:
        _take_key(batch, new.idempotency_key, KeyMark(change.run_id))
    batch.touched[change.run_id] = (committed.last_seq, "final" in part.fields)
    return committed


def commit_all(changes: Sequence[Change], batch: Batch) -> list[Answer]:
    """Each change accepted or refused alone."""
    return answer_each(changes, lambda change: commit(change, batch))


# --- reads that look up one run ---------------------------------------------------------------


def get_run(run_id: str, batch: Batch) -> Run | None:
    """The run, or None."""
    row = batch.conn.execute(_GET_RUN, (batch.namespace, run_id)).fetchone()
    if row is None:
        return None
    with _intact(batch, run_id):
        return run_in(row, batch.micros)


def list_work(run_id: str, batch: Batch) -> list[WorkItem]:
    """The run's items, ordered by id."""
    rows = batch.conn.execute(_LIST_WORK, (batch.namespace, run_id)).fetchall()
    with _intact(batch, run_id):
        return [item_in(row, run_id) for row in sorted(rows)]


def find_run(key: str, batch: Batch) -> str | None:
    """The run that has the idempotency key, or had it; or None."""
    return _owner(batch, key)


@contextmanager
def _intact(batch: Batch, run_id: str) -> Generator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise damaged_run(batch.file, run_id, error) from error


# --- changes ----------------------------------------------------------------------------------


def _is_work(part: RunDelta, now: datetime) -> bool:
    """Whether the effects may give somebody something to claim, sooner or later."""
    return "paused" in part.fields or any(
        item.lease is None or item.lease.until <= now for item in part.items
    )


def _owner(batch: Batch, key: str) -> str | None:
    row = batch.conn.execute(
        "select owner from idempotency_keys where namespace = ? and key = ? "
        "and (until is null or until > ?)",
        (batch.namespace, key, batch.micros),
    ).fetchone()
    return None if row is None else row[0]


def _take_key(batch: Batch, key: str, mark: KeyMark) -> None:
    batch.conn.execute(
        "insert or replace into idempotency_keys (namespace, key, owner, until) "
        "values (?, ?, ?, ?)",
        (batch.namespace, key, mark.owner, None if mark.until is None else to_micros(mark.until)),
    )


_MOST_PURGED = 20_000
"""Rows that one purge deletes, about: its transaction keeps all other writers waiting."""


def purge(before: datetime, limit: int, key_retention: timedelta, batch: Batch) -> int:
    """Remove ended runs; let go of keys whose time is over."""
    conn, namespace = batch.conn, batch.namespace
    batch.writes()
    conn.execute(
        "delete from idempotency_keys where namespace = ? and until is not null and until <= ?",
        (namespace, batch.micros),
    )
    rows = conn.execute(
        "select r.id, r.idempotency_key, r.finished_at, r.run_id from runs r "
        "indexed by runs_by_end where r.namespace = ? and r.finished_at is not null "
        "and r.finished_at < ? "
        "and not exists (select 1 from work_items i where i.run = r.id) "
        "and not exists (select 1 from runs p where p.namespace = r.namespace "
        "and p.run_id = r.parent_run_id and p.final is null) "
        "order by r.finished_at, r.id limit ?",
        (namespace, to_micros(before), max(0, limit)),
    ).fetchall()
    removed = deleted = 0
    for run, key, finished, run_id in rows:
        if deleted > _MOST_PURGED:
            break
        for table in ("events", "answers", "run_data"):
            deleted += conn.execute(f"delete from {table} where run = ?", (run,)).rowcount  # noqa: S608 - a name from above
        conn.execute("delete from runs where id = ?", (run,))
        removed += 1
        if key is None:
            continue
        until = from_micros(finished) + key_retention
        if until > batch.now:
            _take_key(batch, key, KeyMark(run_id, until))
        else:
            conn.execute(
                "delete from idempotency_keys where namespace = ? and key = ?", (namespace, key)
            )
    return removed


# --- copies -----------------------------------------------------------------------------------


def export_run(run_id: str, batch: Batch) -> RunDelta | None:
    """The run without its events."""
    run = load_run(batch.conn, batch.file, batch.namespace, run_id)
    if run is None:
        return None
    items = batch.conn.execute(
        f"select {ITEM} from work_items where run = ?",  # noqa: S608 - constant columns
        (run.id,),
    ).fetchall()
    answers = batch.conn.execute(
        "select answer from answers where run = ? order by token is not null, id", (run.id,)
    ).fetchall()
    if run.answer is not None:
        answers.append((run.answer,))
    return RunDelta(
        run_id,
        _row(batch, run),
        items=[item_in(row, run_id) for row in sorted(items)],
        records=[record_from_json(decode(row[0])) for row in answers],
    )


def _row(batch: Batch, run: LoadedRun) -> dict[str, object]:
    columns = (*_PLAIN, *_INSTANTS, "paused", "final", "parent_run_id", "parent_op")
    row = batch.conn.execute(
        f"select id, {', '.join(columns)}, args, result, error, tags, attributes "  # noqa: S608 - constant columns
        "from runs join run_data on run = id where id = ?",
        (run.id,),
    ).fetchone()
    found: dict[str, Any] = dict(
        zip(("number", *columns, "args", "result", "error", "tags", "attributes"), row, strict=True)
    )
    for name in _INSTANTS:
        if found[name] is not None:
            found[name] = from_micros(found[name])
    parent, op = found.pop("parent_run_id"), found.pop("parent_op")
    found["parent"] = None if parent is None else ParentRef(run_id=parent, op=op)
    found["paused"] = bool(found["paused"])
    found["final"] = None if found["final"] is None else RunStatus(found["final"])
    found["error"] = None if found["error"] is None else ErrorInfo.from_json(decode(found["error"]))
    found["tags"] = tuple(decode(found["tags"]))
    found["attributes"] = decode(found["attributes"])
    if found["queue"] == "default":
        del found["queue"]
    return {k: v for k, v in found.items() if v is not None and v not in (0, "", (), {})}


def export_keys(cursor: str | None, batch: Batch) -> Page[tuple[str, KeyMark]]:
    """Idempotency keys in their order; the cursor is the last one shown."""
    rows = batch.conn.execute(
        "select key, owner, until from idempotency_keys where namespace = ? "  # noqa: S608 - constant text
        f"and key {'>=' if cursor is None else '>'} ? order by key limit ?",
        (batch.namespace, cursor or "", _PAGE + 1),
    ).fetchall()
    return Page(
        items=[
            (key, KeyMark(owner, None if until is None else from_micros(until)))
            for key, owner, until in rows[:_PAGE]
        ],
        cursor=rows[_PAGE - 1][0] if len(rows) > _PAGE else None,
    )


def import_delta(delta: Delta, batch: Batch) -> None:
    """Take over what another store had.

    Raises:
        ValueError: Events are missing between the run's last and the first given.
    """
    conn = batch.conn
    batch.writes(work=True)
    conn.execute("savepoint import_delta")
    try:
        for part in delta.parts:
            _import_part(part, batch)
        for key in delta.freed:
            conn.execute(
                "delete from idempotency_keys where namespace = ? and key = ?",
                (batch.namespace, key),
            )
        for key, mark in delta.taken.items():
            _take_key(batch, key, mark)
    except ValueError:
        conn.execute("rollback to import_delta")
        raise
    finally:
        if conn.in_transaction:
            conn.execute("release import_delta")


def _import_part(part: RunDelta, batch: Batch) -> None:
    conn, namespace = batch.conn, batch.namespace
    run = load_run(conn, batch.file, namespace, part.run_id)
    if part.removed:
        if run is not None:
            for table in ("events", "answers", "run_data", "work_items"):
                conn.execute(f"delete from {table} where run = ?", (run.id,))  # noqa: S608 - a name from above
            conn.execute("delete from runs where id = ?", (run.id,))
        return
    fields: Mapping[str, Any] = {k: v for k, v in part.fields.items() if k != "number"}
    if run is None:
        create_run(
            conn,
            namespace,
            part.run_id,
            {"created_at": from_micros(0), "updated_at": from_micros(0), **fields},
        )
        run = load_run(conn, batch.file, namespace, part.run_id)
        assert run is not None
    length = len(run.events)
    events = [event for event in part.events if event.seq > length]
    for place, event in enumerate(events):
        if event.seq != length + 1 + place:
            raise ValueError(
                f"events are missing: run_id={part.run_id} last_seq={length + place} "
                f"next={event.seq}"
            )
    set_fields(conn, run.id, fields)
    insert_events(conn, run.id, events)
    if events:
        set_last(conn, run.id, events[-1].seq, last_input_of(events, run.last_input))
    for item_id in part.gone:
        conn.execute("delete from work_items where run = ? and item_id = ?", (run.id, item_id))
    _import_items(part.items, batch, part.run_id)
    for record in part.records:
        answer = encode(record_to_json(record))
        if record.token is None:
            conn.execute(
                "insert into answers (run, key, answer) values (?, ?, ?) "
                "on conflict (run, key) where token is null do update set answer = excluded.answer",
                (run.id, record.key, answer),
            )
            continue
        if record.token == run.answer_token:
            conn.execute(
                "update runs set answer_key = ?, answer = ? where id = ?",
                (record.key, answer, run.id),
            )
            continue
        conn.execute("delete from answers where run = ? and token = ?", (run.id, record.token))
        conn.execute(
            "insert into answers (run, token, key, answer) values (?, ?, ?, ?)",
            (run.id, record.token, record.key, answer),
        )
    trim_answers(conn, run.id, spare=run.answer_token is not None)
    batch.touched[part.run_id] = (max(length, events[-1].seq if events else 0), "final" in fields)


def _import_items(items: Sequence[WorkItem], batch: Batch, run_id: str) -> None:
    run = load_run(batch.conn, batch.file, batch.namespace, run_id)
    assert run is not None
    write_items(batch.conn, batch.namespace, run.id, run.workflow, items, paused=run.paused)
    batch.conn.execute(
        "update work_items set parked = (kind <> 'deliver' and ?), workflow = ? where run = ?",
        (run.paused, run.workflow, run.id),
    )
