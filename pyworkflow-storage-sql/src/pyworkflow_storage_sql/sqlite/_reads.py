"""Statements that read runs, events and items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pyworkflow.spi import Event, Page, Run, RunQuery, RunStatus
from pyworkflow_storage_sql.sqlite._reader import NOW, Reader
from pyworkflow_storage_sql.sqlite._rows import EVENT, RUN, events_in, run_in, whole

__all__ = ["get_events", "list_runs", "stats"]

_FROM: Final = "from runs r join namespaces n on n.id = r.namespace join run_data d on d.run = r.id"
_FINAL: Final = tuple(status for status in RunStatus if status.is_terminal)
#: The status of a run that has not ended, as ``derive_status`` has it.
_STATUS: Final = f"""
case
    when r.stalled is not null then 'stalled'
    when r.paused then 'paused'
    when exists (select 1 from work_items i where i.run = r.id and i.lease_until > {NOW})
        then 'running'
    when r.seen_seq = 0
        and not exists (select 1 from work_items i where i.run = r.id and i.claims > 0)
        then 'pending'
    when exists (select 1 from work_items i
        where i.run = r.id and i.due_at <= {NOW} and i.kind <> 'deliver')
        then 'running'
    else 'suspended'
end"""  # noqa: S608 - constant text
_COUNTS: Final = ("runs", "events", "items")


async def get_events(
    reader: Reader, namespace: str, run_id: str, after: int, limit: int | None
) -> list[Event]:
    """Events after ``after``."""
    after = min(max(0, after), 2**62)
    rows = await reader.fetch(
        f"select r.last_seq, {EVENT} from runs r join namespaces n on n.id = r.namespace "  # noqa: S608 - constant columns
        "left join events e on e.run = r.id and e.seq > ? where n.name = ? and r.run_id = ? "
        "order by e.seq limit ?",
        (after, namespace, run_id, -1 if limit is None else min(max(0, limit), 2**62)),
    )
    if not rows or rows[0][0] <= after:
        return []
    file = str(reader.path)
    last = rows[0][0] if limit is None else min(rows[0][0], after + limit)
    return whole(events_in((row[1:] for row in rows), run_id, file, after), run_id, file, last)


async def list_runs(
    reader: Reader, namespace: str, query: RunQuery, cursor: str | None
) -> Page[Run]:
    """Newest first; the cursor names the last run shown."""
    if not 1 <= query.limit <= 1000:
        raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
    below = 2**62 if cursor is None else _parse_cursor(cursor)
    now = reader.shown()
    where, values = "n.name = ? and r.id < ?", [namespace, below]
    index = "runs_by_final"
    if query.workflow is not None:
        where += " and r.workflow = ?"
        values.append(query.workflow)
        index = "runs_by_workflow"
    parts: list[str] = []
    all_values: list[object] = [now]

    def part(more: str, *given: object) -> None:
        # Each part is in the order of an index; the newest of all parts are the page.
        parts.append(
            "select * from (select r.id as id from namespaces n "  # noqa: S608 - constant text
            f"cross join runs r indexed by {index} on r.namespace = n.id "
            f"where {where}{more} order by r.id desc limit ?)"
        )
        all_values.extend((*values, *given, query.limit + 1))

    asked = frozenset(RunStatus) if query.status is None else query.status
    for final in _FINAL:
        if final in asked:
            part(" and r.final = ?", str(final))
    rest = sorted(str(status) for status in asked if status not in _FINAL)
    if len(rest) == len(RunStatus) - len(_FINAL):
        part(" and r.final is null")
    elif rest:
        marks = ", ".join("?" * len(rest))
        part(f" and r.final is null and {_STATUS} in ({marks})", now, now, *rest)
    if not parts:
        return Page(items=[])
    rows = await reader.fetch(
        f"select {NOW}, r.id, {RUN} from (select id from ({' union all '.join(parts)}) "  # noqa: S608 - constant text
        "order by id desc limit ?) p cross join runs r on r.id = p.id "
        "join namespaces n on n.id = r.namespace join run_data d on d.run = r.id "
        "order by r.id desc",
        (*all_values, query.limit + 1),
    )
    shown = rows[: query.limit]
    return Page(
        items=[run_in(row[2:], row[0]) for row in shown],
        cursor=f"run-{shown[-1][1]}" if len(rows) > query.limit else None,
    )


async def stats(reader: Reader, namespace: str) -> Mapping[str, int]:
    """Numbers of runs, per status, of events and of items."""
    now = reader.shown()
    rows = await reader.fetch(
        f"select coalesce(r.final, {_STATUS}) as status, count(*), sum(r.last_seq), "  # noqa: S608 - constant text
        "sum((select count(*) from work_items i where i.run = r.id)) "
        "from runs r join namespaces n on n.id = r.namespace where n.name = ? group by 1",
        (now, now, namespace),
    )
    counts = dict.fromkeys(_COUNTS, 0) | {status.value: 0 for status in RunStatus}
    for status, runs, events, items in rows:
        counts["runs"] += runs
        counts["events"] += events
        counts["items"] += items
        counts[status] += runs
    return counts


def _parse_cursor(cursor: str) -> int:
    number = cursor.removeprefix("run-")
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValueError(f"not a cursor of this store: cursor={cursor!r}; start without one")
    return int(number)
