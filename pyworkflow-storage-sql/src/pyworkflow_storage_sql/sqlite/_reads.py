"""Statements that read runs, events and items."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from pyworkflow.spi import Event, Page, Run, RunQuery, RunStatus
from pyworkflow_storage_sql.sqlite._buckets import HEADS
from pyworkflow_storage_sql.sqlite._reader import NOW, Reader
from pyworkflow_storage_sql.sqlite._rows import EVENT, RUN, events_in, listed_run_in, whole

__all__ = ["get_events", "list_runs", "stats"]

#: What an index knows of a run's status, in the words of the index.
_STATE: Final = """coalesce(r.final, case when r.stalled is not null then 'stalled'
    when r.paused then 'paused' when r.started_at is null then 'unstarted' else 'started' end)"""
# The rest of the status, as ``derive_status`` has it.
_LEASED: Final = "exists (select 1 from work_items i where i.run = r.id and i.lease_until > (select now from clock))"
_CLAIMED: Final = "exists (select 1 from work_items i where i.run = r.id and i.claims > 0)"
_DUE: Final = (
    "exists (select 1 from work_items i where i.run = r.id and i.kind <> 'deliver' "
    "and i.due_at <= (select now from clock))"
)
_STATUS: Final = f"""
case {_STATE}
    when 'unstarted' then
        case when {_LEASED} then 'running' when not {_CLAIMED} then 'pending'
            when {_DUE} then 'running' else 'suspended' end
    when 'started' then case when {_LEASED} or {_DUE} then 'running' else 'suspended' end
    else {_STATE}
end"""
_COUNTS: Final = ("runs", "events", "items")

# Listings: the clock is read once; what follows refers to it.
_CLOCK: Final = f"clock (namespace, now) as (select n.id, {NOW} from namespaces n where n.name = ?)"  # noqa: S608 - constant text
_NOW: Final = "(select now from clock)"
_NAMESPACE: Final = "(select namespace from clock)"
#: Statuses that depend on a run's items.
_BY_ITEMS: Final = (RunStatus.PENDING, RunStatus.RUNNING, RunStatus.SUSPENDED)
#: So many runs that may be running are looked up; where there are more, the newest runs have them.
_MOST_AWAKE: Final = 1000
#: Runs with a lease or a due item, up to one too many.
_AWAKE: Final = f"""
heads (id) as (
    {HEADS.format(namespace=_NAMESPACE)}
), awake (run) as (
    select run from work_items indexed by work_held
    where token is not null and namespace = {_NAMESPACE}
    union all
    select i.run from heads h cross join work_items w on w.id = h.id
    cross join work_items i indexed by work_free
    on i.queue = w.queue and i.workflow = w.workflow and i.kind = w.kind and i.priority = w.priority
    where w.due_at <= {_NOW}
    and i.token is null and i.parked = 0 and i.namespace = {_NAMESPACE} and i.due_at <= {_NOW}
    limit {_MOST_AWAKE + 1}
)"""  # noqa: S608 - constant text
#: Runs of which an item was claimed, that of most unstarted ones never was; up to one too many.
_TRIED: Final = f"""
tried (run) as (
    select run from work_items indexed by work_held
    where token is not null and namespace = {_NAMESPACE}
    union all
    select run from work_items indexed by work_tried
    where claims > 0 and token is null and namespace = {_NAMESPACE}
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
    clauses = ", ".join([_CLOCK, *parts.clauses])
    rows = await reader.fetch(
        f"with recursive {clauses} select {_NOW}, r.id, {RUN} "  # noqa: S608 - constant text
        f"from (select id from ({' union all '.join(parts.sql)}) order by id desc limit ?) p "
        "cross join runs r on r.id = p.id join run_data d on d.run = r.id order by r.id desc",
        (reader.shown(), namespace, *parts.values, query.limit + 1),
    )
    shown = rows[: query.limit]
    file = str(reader.path)
    return Page(
        items=[listed_run_in(row[2:], row[0], file) for row in shown],
        cursor=f"run-{shown[-1][1]}" if len(rows) > query.limit else None,
    )


class _Parts:
    """What a page consists of, each part in the order of an index: the newest of all are shown."""

    def __init__(self, below: int, workflow: str | None, limit: int) -> None:
        self._where = f"r.namespace = {_NAMESPACE} and r.id < ?"
        self._given: list[object] = [below]
        self._index = "runs_by_state"
        if workflow is not None:
            self._where += " and r.workflow = ?"
            self._given.append(workflow)
            self._index = "runs_by_workflow_state"
        self._limit = limit
        self.sql: list[str] = []
        self.values: list[object] = []
        self.clauses: list[str] = []
        """What the parts read besides."""

    def add_asked(self, asked: Collection[RunStatus]) -> None:
        """Parts for the statuses; without conditions where all runs of a state have them."""
        for status in RunStatus:
            if status in asked and status not in _BY_ITEMS:
                self._add(status.value)
        pending, running, suspended = (status in asked for status in _BY_ITEMS)
        if running and suspended:
            self._add("started")
        elif suspended:
            self._add("started", f"not {_LEASED} and not {_DUE}")
        elif running:
            self._add("started", f"({_LEASED} or {_DUE})", few="awake")
            self.clauses.append(_AWAKE)
        if pending and running and suspended:
            self._add("unstarted")
            return
        if pending:
            self._add("unstarted", f"not {_LEASED} and not {_CLAIMED}")
        if running:
            self._add("unstarted", f"({_LEASED} or {_CLAIMED} and {_DUE})", few="tried")
        if suspended:
            self._add("unstarted", f"{_CLAIMED} and not {_LEASED} and not {_DUE}", few="tried")
        if running or suspended:
            self.clauses.append(_TRIED)

    def _add(self, state: str, condition: str = "true", *, few: str | None = None) -> None:
        """Runs of a state: if ``few`` has few, those that are in it, else by the index."""
        condition = f"{_STATE} = '{state}' and {condition}"
        source = f"runs r indexed by {self._index}"
        if few is None:
            self._select(source, condition, "?")
            return
        listed = f"(select distinct run from {few}) a cross join runs r on r.id = a.run"  # noqa: S608 - constant text
        for where, bound in ((listed, f"<= {_MOST_AWAKE}"), (source, f"> {_MOST_AWAKE}")):
            limit = f"(select case when count(*) {bound} then ? else 0 end from {few})"  # noqa: S608 - constant text
            self._select(where, condition, limit)

    def _select(self, source: str, condition: str, limit: str) -> None:
        self.sql.append(
            f"select * from (select r.id as id from {source} "  # noqa: S608 - constant text
            f"where {self._where} and {condition} order by r.id desc limit {limit})"
        )
        self.values += [*self._given, self._limit]


async def stats(reader: Reader, namespace: str) -> Mapping[str, int]:
    """Numbers of runs, per status, of events and of items."""
    rows = await reader.fetch(
        f"with {_CLOCK} select {_STATUS} as status, count(*), sum(r.last_seq), "  # noqa: S608 - constant text
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
