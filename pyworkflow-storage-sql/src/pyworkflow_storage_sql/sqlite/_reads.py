"""Statements that read runs, events and items."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from pyworkflow.spi import Event, Page, Run, RunQuery, RunStatus
from pyworkflow_storage_sql.sqlite._reader import NOW, Reader
from pyworkflow_storage_sql.sqlite._rows import EVENT, RUN, events_in, run_in, whole

__all__ = ["get_events", "list_runs", "stats"]

#: The status of a run that has not ended, as ``derive_status`` has it.
_STATUS: Final = """
case
    when r.stalled is not null then 'stalled'
    when r.paused then 'paused'
    when exists (select 1 from work_items i where i.run = r.id and i.lease_until > (select now from clock))
        then 'running'
    when r.seen_seq = 0
        and not exists (select 1 from work_items i where i.run = r.id and i.claims > 0)
        then 'pending'
    when exists (select 1 from work_items i
        where i.run = r.id and i.due_at <= (select now from clock) and i.kind <> 'deliver')
        then 'running'
    else 'suspended'
end"""
_COUNTS: Final = ("runs", "events", "items")

# Listings: the clock is read once; what follows refers to it.
_CLOCK: Final = f"clock (namespace, now) as (select n.id, {NOW} from namespaces n where n.name = ?)"  # noqa: S608 - constant text
_NOW: Final = "(select now from clock)"
_NAMESPACE: Final = "(select namespace from clock)"
#: Statuses of which an index has just the runs that may have them: the index, and its condition.
_FEW: Final = {
    RunStatus.STALLED: ("runs_stalled", "r.stalled is not null"),
    RunStatus.PAUSED: ("runs_paused", "r.paused <> 0"),
    RunStatus.PENDING: ("runs_unstarted", "r.started_at is null"),
}
#: So many runs that may be running are looked up; where there are more, the newest runs have them.
_MOST_AWAKE: Final = 1000
_FREE: Final = (
    "work_items indexed by work_free where token is null and parked = 0 "
    f"and namespace = {_NAMESPACE}"
)
#: Runs with a lease or a due item, up to one too many: by the queues and priorities of free items.
_AWAKE: Final = f"""
queues (queue) as (
    select min(queue) from {_FREE}
    union all select (select min(queue) from {_FREE} and queue > queues.queue) from queues
    where queues.queue is not null
), priorities (queue, priority) as (
    select queue, (select max(priority) from {_FREE} and queue = queues.queue) from queues
    where queue is not null
    union all
    select p.queue, (select max(priority) from {_FREE} and queue = p.queue and priority < p.priority)
    from priorities p where p.priority is not null
), awake (run) as (
    select run from work_items indexed by work_held
    where token is not null and namespace = {_NAMESPACE}
    union all
    select i.run from priorities p cross join work_items i indexed by work_free
    on i.queue = p.queue and i.priority = p.priority
    where i.token is null and i.parked = 0 and i.namespace = {_NAMESPACE} and i.due_at <= {_NOW}
    limit {_MOST_AWAKE + 1}
)"""  # noqa: S608 - constant text


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
    parts = _Parts(below, query.workflow, query.limit + 1)
    parts.add_asked(frozenset(RunStatus) if query.status is None else query.status)
    if not parts.sql:
        return Page(items=[])
    clauses = ", ".join([_CLOCK, _AWAKE] if parts.awake else [_CLOCK])
    rows = await reader.fetch(
        f"with recursive {clauses} select {_NOW}, r.id, {RUN} "  # noqa: S608 - constant text
        f"from (select id from ({' union all '.join(parts.sql)}) order by id desc limit ?) p "
        "cross join runs r on r.id = p.id join run_data d on d.run = r.id order by r.id desc",
        (reader.shown(), namespace, *parts.values, query.limit + 1),
    )
    shown = rows[: query.limit]
    return Page(
        items=[run_in(row[2:], row[0]) for row in shown],
        cursor=f"run-{shown[-1][1]}" if len(rows) > query.limit else None,
    )


class _Parts:
    """What a page consists of, each part in the order of an index: the newest of all are shown."""

    def __init__(self, below: int, workflow: str | None, limit: int) -> None:
        self._where = f"r.namespace = {_NAMESPACE} and r.id < ?"
        self._given: list[object] = [below]
        self._index = "runs_by_final"
        if workflow is not None:
            self._where += " and r.workflow = ?"
            self._given.append(workflow)
            self._index = "runs_by_workflow"
        self._limit = limit
        self.sql: list[str] = []
        self.values: list[object] = []
        self.awake = False
        """Whether a part reads ``awake``."""

    def add_asked(self, asked: Collection[RunStatus]) -> None:
        """A part for each of the statuses; one for all that are open, when all are asked for."""
        rest = [status for status in RunStatus if status in asked]
        if all(status.is_terminal or status in asked for status in RunStatus):
            rest = [status for status in rest if status.is_terminal]
            self._add("r.final is null")
        for status in rest:
            if status.is_terminal:
                self._add(f"r.final = '{status}'")
                continue
            condition = f"r.final is null and {_STATUS} = '{status}'"
            if status in _FEW:
                index, few = _FEW[status]
                self._add(f"{few} and {condition}", source=f"runs r indexed by {index}")
            elif status is RunStatus.RUNNING:
                self.awake = True
                found = "(select distinct run from awake) a cross join runs r on r.id = a.run"
                self._add(condition, source=found, only=f"<= {_MOST_AWAKE}")
                self._add(condition, only=f"> {_MOST_AWAKE}")
            else:
                self._add(condition)

    def _add(self, condition: str, *, source: str | None = None, only: str | None = None) -> None:
        limit = "?"
        if only is not None:
            limit = f"(select case when count(*) {only} then ? else 0 end from awake)"  # noqa: S608 - constant text
        self.sql.append(
            f"select * from (select r.id as id from {source or f'runs r indexed by {self._index}'} "  # noqa: S608 - constant text
            f"where {self._where} and {condition} order by r.id desc limit {limit})"
        )
        self.values += [*self._given, self._limit]


async def stats(reader: Reader, namespace: str) -> Mapping[str, int]:
    """Numbers of runs, per status, of events and of items."""
    rows = await reader.fetch(
        f"with {_CLOCK} select coalesce(r.final, {_STATUS}) as status, count(*), sum(r.last_seq), "  # noqa: S608 - constant text
        "sum((select count(*) from work_items i where i.run = r.id)) "
        f"from runs r where r.namespace = {_NAMESPACE} group by 1",
        (reader.shown(), namespace),
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
