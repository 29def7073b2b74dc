"""Copies all runs of one store into another, by the contract alone; resumable and verified."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pyworkflow.errors import StorageError, WorkflowError
from pyworkflow.events import Event, EventType, Json, event_class
from pyworkflow.runs import RunStatus
from pyworkflow.spi._delta import Delta, KeyMark, RunDelta
from pyworkflow.spi.storage import RunQuery, StorageBackend
from pyworkflow.storekit._check import check_json
from pyworkflow.storekit._state import size_of

__all__ = ["CopyConflict", "CopyReport", "copy_store"]

_EVENTS_AT_ONCE: Final = 1000
_PART_BYTES: Final = 256 * 1024
#: Shown on a run of which only a part has arrived. It owns no work until the rest is there.
_UNFINISHED: Final = "copied in part: run `pyworkflow storage copy` again"


class CopyConflict(WorkflowError):
    """The target has something else under the same name; nothing of the run was overwritten."""

    def __init__(self, run_id: str, detail: str) -> None:
        super().__init__(run_id, detail)
        self.run_id = run_id
        self.detail = detail

    def __str__(self) -> str:
        return (
            f"the target differs from the source: run_id={self.run_id}: {self.detail}; "
            "the copy stopped here, and what was copied before stays; copy into an empty namespace"
        )


@dataclass(slots=True)
class CopyReport:
    """What a copy did."""

    runs: int = 0
    """In the source, all of them now equal in the target."""
    copied: int = 0
    """Runs written by this call; the others were there already."""
    events: int = 0
    """Events written by this call."""
    keys: int = 0
    """Idempotency keys of runs that were purged, in the source."""


async def copy_store(
    source: StorageBackend,
    target: StorageBackend,
    *,
    in_use: bool = False,
    abandon_parts: bool = False,
    progress: Callable[[CopyReport], None] | None = None,
) -> CopyReport:
    """Copy every run and key of ``source``, then read all of it back and compare.

    A run arrives whole: until its last part it owns no work and shows itself as stalled. Called
    again after an interruption it goes on where it stopped. Leases are not copied: what workers
    hold is due again in the target. Rows, histories, items, kept answers and keys are.

    Args:
        source: Opened; only read.
        target: Opened.
        in_use: Copy although leases stand in the source. Whatever its workers do from then on is
            missing in the target.
        abandon_parts: What an interrupted copy left of runs that the source no longer has is
            ended as terminated, so that a purge can remove it.
        progress: Called after each run.

    Raises:
        StorageError: The source is in use, or both are one store.
        CopyConflict: The target has another run or owner under the same id or key, or a part of
            a run that the source no longer has; or the source itself has a run only in part.
        PayloadTooLarge: The target stores no texts of that size.
        ConfigurationError: The target takes no copies.
    """
    ours, theirs = source.info(), target.info()
    if _same_place(ours.location, theirs.location) and ours.namespace == theirs.namespace:
        raise StorageError(
            f"source and target are the same store: location={theirs.location} "
            f"namespace={theirs.namespace}"
        )
    holders = await source.holders()
    if holders and not in_use:
        raise StorageError(
            f"workers hold work in the source: owners={', '.join(holders[:5])}; stop them, wait "
            "until their leases end, or copy with --in-use"
        )
    report = CopyReport()
    ids, parts = await _ids(source)
    for run_id in parts:
        raise CopyConflict(run_id, "the source has only a part of it: finish the copy into it")
    for run_id in ids:
        await _copy_run(source, target, run_id, report)
        if progress is not None:
            progress(report)
    marks = {key: mark async for key, mark in _keys(source)}
    gone = {key: mark for key, mark in marks.items() if mark.owner not in ids}
    await _copy_keys(target, gone)
    report.keys = len(gone)
    for run_id in ids:
        await _verify(source, target, run_id)
        report.runs += 1
    _, parts = await _ids(target)
    for run_id in parts:
        if run_id not in ids:
            await _abandon(target, run_id, abandon_parts)
    for key, mark in marks.items():
        if (owner := await target.find_run(key)) != await source.find_run(key):
            raise CopyConflict(mark.owner, f"its idempotency key is owned by {owner}: key={key!r}")
    return report


def _same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    try:  # one directory or file may have many names
        return Path(one).is_absolute() and Path(other).is_absolute() and Path(one).samefile(other)
    except OSError:
        return False


async def _abandon(target: StorageBackend, run_id: str, allowed: bool) -> None:
    """End what is there of a run that nothing can complete any more."""
    if not allowed:
        raise CopyConflict(
            run_id,
            "an interrupted copy left a part of it, and this source does not have it; finish the "
            "copy that it belongs to, or with --abandon-parts it is ended, for a purge to remove",
        )
    part, run = await target.export_run(run_id), await target.get_run(run_id)
    if part is None or run is None:
        return
    events = await target.get_events(run_id, after=run.history_length - 1)
    at = max([await target.now(), run.updated_at, *(event.timestamp for event in events)])
    data: dict[str, Json] = {"reason": "the source of its copy does not have it"}
    last = Event(
        EventType.WORKFLOW_TERMINATED,
        event_class(EventType.WORKFLOW_TERMINATED),
        data,
        run_id=run_id,
        seq=run.history_length + 1,
        timestamp=at,
    )
    fields = {name: value for name, value in part.fields.items() if name != "number"} | {
        "stalled": None,
        "final": RunStatus.TERMINATED,
        "updated_at": at,
        "finished_at": at,
    }
    await target.import_delta(Delta([RunDelta(run_id, fields, [last])]))


async def _ids(store: StorageBackend) -> tuple[dict[str, None], list[str]]:
    """Oldest first, so that the copies are listed in the order of the originals; and the parts."""
    ids: list[str] = []
    parts: list[str] = []
    cursor: str | None = None
    while True:
        page = await store.list_runs(RunQuery(limit=1000), cursor)
        ids += [run.run_id for run in page.items]
        parts += [run.run_id for run in page.items if run.stalled == _UNFINISHED]
        cursor = page.cursor
        if cursor is None:
            return dict.fromkeys(reversed(ids)), parts


async def _keys(store: StorageBackend) -> AsyncIterator[tuple[str, KeyMark]]:
    cursor: str | None = None
    while True:
        page = await store.export_keys(cursor)
        for entry in page.items:
            yield entry
        cursor = page.cursor
        if cursor is None:
            return


async def _events(store: StorageBackend, run_id: str, after: int) -> AsyncIterator[list[Event]]:
    """The history in parts of bounded size."""
    while True:
        page = await store.get_events(run_id, after=after, limit=_EVENTS_AT_ONCE)
        part: list[Event] = []
        size = 0
        for event in page:
            size += 96 + size_of(event.data)
            if part and size > _PART_BYTES:
                yield part
                part, size = [], 96 + size_of(event.data)
            part.append(event)
        if part:
            yield part
        if len(page) < _EVENTS_AT_ONCE:
            return
        after = page[-1].seq


async def _copy_run(
    source: StorageBackend, target: StorageBackend, run_id: str, report: CopyReport
) -> None:
    part = await _exported(source, run_id)
    limits = target.info()
    done = 0
    present = await target.get_run(run_id)
    if present is not None:
        if present.stalled != _UNFINISHED:
            return  # compared in the end
        done = present.history_length
    key = part.fields.get("idempotency_key")
    taken: dict[str, KeyMark] = {}
    if isinstance(key, str):
        owner = await target.find_run(key)
        if owner not in {None, run_id}:
            raise CopyConflict(run_id, f"its idempotency key is owned by {owner}: key={key!r}")
        taken[key] = KeyMark(run_id)
    fields = {name: value for name, value in part.fields.items() if name != "number"}
    # Until the last part it has no turn, so nothing in it may be unseen.
    begun = fields.get("started_at") or fields.get("created_at")
    unfinished = {**fields, "stalled": _UNFINISHED, "final": None, "finished_at": None}
    waiting: list[Event] = []
    async for events in _events(source, run_id, done):
        for event in events:
            check_json(event.data, limits.max_payload)
        for start in range(0, len(events), limits.max_events_per_commit):
            if waiting:
                unfinished |= {"started_at": begun, "seen_seq": waiting[-1].seq}
                await target.import_delta(Delta([RunDelta(run_id, unfinished, waiting)], taken))
            waiting = events[start : start + limits.max_events_per_commit]
        report.events += len(events)
    shown = {"stalled": None, "started_at": None, "seen_seq": 0, **fields}
    last = RunDelta(run_id, shown, waiting, part.items, [], part.records)
    await target.import_delta(Delta([last], taken))
    report.copied += 1


async def _exported(store: StorageBackend, run_id: str) -> RunDelta:
    part = await store.export_run(run_id)
    if part is None:
        raise CopyConflict(run_id, "it was purged while it was copied")
    items = [replace(item, lease=None, rung_at=None) for item in part.items]
    return RunDelta(run_id, part.fields, items=items, records=part.records)


async def _copy_keys(target: StorageBackend, marks: dict[str, KeyMark]) -> None:
    names = list(marks)
    for start in range(0, len(names), _EVENTS_AT_ONCE):
        taken = {key: marks[key] for key in names[start : start + _EVENTS_AT_ONCE]}
        for key, mark in taken.items():
            owner = await target.find_run(key)
            if owner not in {None, mark.owner}:
                raise CopyConflict(mark.owner, f"its key is owned by {owner}: key={key!r}")
        await target.import_delta(Delta(taken=taken))


async def _verify(source: StorageBackend, target: StorageBackend, run_id: str) -> None:
    ours, theirs = await _exported(source, run_id), await target.export_run(run_id)
    if theirs is None:
        raise CopyConflict(run_id, "it is not in the target")
    for name in sorted({*ours.fields, *theirs.fields} - {"number", "create_key"}):
        if ours.fields.get(name) != theirs.fields.get(name):
            raise CopyConflict(run_id, f"the field {name} differs")
    items = sorted(ours.items, key=lambda item: item.item_id)
    found = [replace(item, lease=None, rung_at=None) for item in theirs.items]
    if items != sorted(found, key=lambda item: item.item_id):
        raise CopyConflict(run_id, "its work items differ")
    answers = {(record.token, record.key): record for record in theirs.records}
    if any(answers.get((r.token, r.key)) != r for r in ours.records):
        raise CopyConflict(run_id, "its kept answers differ")
    after = 0
    while True:
        ours_now = await source.get_events(run_id, after=after, limit=_EVENTS_AT_ONCE)
        if ours_now != await target.get_events(run_id, after=after, limit=_EVENTS_AT_ONCE):
            raise CopyConflict(run_id, f"its history differs after seq={after}")
        if not ours_now:
            return
        after = ours_now[-1].seq
