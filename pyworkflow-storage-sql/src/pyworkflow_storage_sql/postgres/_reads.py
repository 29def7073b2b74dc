"""The part of the PostgreSQL backend that reads: runs, events, items, and all of it for a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from pyworkflow.spi import (
    ClaimRef,
    Event,
    KeyMark,
    Page,
    Run,
    RunDelta,
    RunQuery,
    RunStatus,
    WorkItem,
)
from pyworkflow_storage_sql.postgres._answers import parse_cursor
from pyworkflow_storage_sql.postgres._base import PostgresBase

__all__ = ["PostgresReads"]

_STATUSES = [status.value for status in RunStatus]


class PostgresReads(PostgresBase):
    """What writes nothing."""

    async def now(self) -> datetime:
        """The server's clock, moved by ``shift_clock``."""
        now: datetime = await self._ask("{schema}.instant()")
        return now

    async def get_run(self, run_id: str) -> Run | None:
        """The run, or None."""
        await self._use()
        return await self._reads.add(run_id)

    async def _send_reads(self, run_ids: Sequence[str]) -> list[Run | None]:
        rows = await self._call(self._run_sql, [self._name(run_id) for run_id in run_ids])
        read = self._reader.run
        return [None if row["run"] is None else read(row["run"]) for row in rows]

    async def find_run(self, idempotency_key: str) -> str | None:
        """Who has the key."""
        rows = await self._call(
            self._schema.fill(
                "SELECT run_id FROM {schema}.idempotency_keys WHERE key = $1 "
                "AND (until IS NULL OR until > {schema}.instant())"
            ),
            self._name(idempotency_key),
        )
        return self._names.full(rows[0]["run_id"]) if rows else None

    async def list_runs(self, query: RunQuery, cursor: str | None = None) -> Page[Run]:
        """Runs, newest first."""
        if not 1 <= query.limit <= 1000:
            raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
        below = 2**62 if cursor is None else parse_cursor(cursor)
        rows = await self._call(
            self._schema.fill("SELECT {schema}.show_runs($1, $2, $3, $4) AS run"),
            below,
            None if query.workflow is None else self._name(query.workflow),
            None if query.status is None else [status.value for status in query.status],
            query.limit + 1,
        )
        texts = [row["run"] for row in rows]
        items = [self._reader.run(text) for text in texts[: query.limit]]
        if len(texts) <= query.limit:
            return Page(items=items)
        return Page(items=items, cursor=f"run-{self._reader.number(texts[query.limit - 1])}")

    async def get_events(
        self, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """Events in order of seq."""
        rows = await self._call(
            self._schema.fill(
                'SELECT seq, "timestamp", type, class, op, key, v, data FROM {schema}.events '
                "WHERE run_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"
            ),
            self._name(run_id),
            max(0, after),
            None if limit is None else max(0, limit),
        )
        return [self._reader.row(run_id, row) for row in rows]

    async def list_work(self, run_id: str) -> list[WorkItem]:
        """The run's items."""
        rows = await self._call(
            self._schema.fill(
                "SELECT {schema}.show_item(w)::text AS item FROM {schema}.work_items w "
                "WHERE w.run_id = $1"
            ),
            self._name(run_id),
        )
        items = self._reader.items([row["item"] for row in rows])
        return sorted(items, key=lambda item: item.item_id)

    async def stats(self) -> Mapping[str, int]:
        """Numbers of runs, per status, of events and of items."""
        rows = await self._call(
            self._schema.fill(
                "SELECT 'events' AS name, count(*) AS n FROM {schema}.events UNION ALL "
                "SELECT 'items', count(*) FROM {schema}.work_items UNION ALL "
                "SELECT final, count(*) FROM {schema}.runs WHERE final IS NOT NULL GROUP BY 1 "
                "UNION ALL SELECT s.status, count(*) FROM {schema}.run_status s "
                "WHERE s.final IS NULL GROUP BY 1"
            )
        )
        found = {row["name"]: row["n"] for row in rows}
        counts = {name: found.get(name, 0) for name in ["events", "items", *_STATUSES]}
        return {"runs": sum(counts[status] for status in _STATUSES), **counts}

    async def holders(self) -> list[str]:
        """Owners of leases that have not ended."""
        rows = await self._call(
            self._schema.fill(
                "SELECT DISTINCT owner FROM {schema}.work_items "
                "WHERE token IS NOT NULL AND lease_until > (SELECT {schema}.instant())"
            )
        )
        return sorted(self._names.full(row["owner"]) for row in rows)

    async def leases(self, owner: str) -> list[ClaimRef]:
        """The claims of ``owner`` whose leases have not ended."""
        rows = await self._call(
            self._schema.fill(
                "SELECT run_id, item_id, token FROM {schema}.work_items "
                "WHERE token IS NOT NULL AND lease_until > (SELECT {schema}.instant()) "
                "AND owner = $1"
            ),
            self._name(owner),
        )
        full = self._names.full
        return [ClaimRef(full(row["run_id"]), full(row["item_id"]), row["token"]) for row in rows]

    async def next_due(
        self,
        *,
        queues: frozenset[str] | None = None,
        workflows: frozenset[str] | None = None,
    ) -> datetime | None:
        """When to look again."""
        due: datetime | None = await self._ask(
            "{schema}.next_due($1, $2)",
            None if queues is None else [self._name(queue) for queue in queues],
            None if workflows is None else [self._name(workflow) for workflow in workflows],
        )
        return due

    async def export_run(self, run_id: str) -> RunDelta | None:
        """The run without its events."""
        name = self._name(run_id)
        rows = await self._call(
            self._schema.fill(
                "SELECT 1 AS kind, {schema}.show_run($1, {schema}.instant()) AS a, "
                "NULL AS b, NULL AS c, 0 AS n UNION ALL "
                "SELECT 2, {schema}.show_item(w)::text, NULL, NULL, 0 FROM {schema}.work_items w "
                "WHERE w.run_id = $1 UNION ALL "
                "SELECT 3, substr(place, 1, 1), CASE WHEN place LIKE 'o%' THEN NULL "
                "ELSE substr(place, 2) END, key || E'\\x04' || answer, number "
                "FROM {schema}.answers WHERE run_id = $1 UNION ALL "
                "SELECT 4, 't', answer_token, answer_key || E'\\x04' || answer, 0 "
                "FROM {schema}.runs WHERE run_id = $1 AND answer_token IS NOT NULL "
                "ORDER BY 1, 5"
            ),
            name,
        )
        if rows[0]["a"] is None:
            return None
        items = self._reader.items([row["a"] for row in rows if row["kind"] == 2])
        records = [
            self._reader.record(row["b"], *row["c"].rsplit("\x04", 1))
            for row in rows
            if row["kind"] > 2
        ]
        return RunDelta(
            run_id,
            self._reader.fields(rows[0]["a"]),
            items=sorted(items, key=lambda item: item.item_id),
            records=records,
        )

    async def export_keys(self, cursor: str | None = None) -> Page[tuple[str, KeyMark]]:
        """Idempotency keys and their owners."""
        rows = await self._call(
            self._schema.fill(
                "SELECT key, run_id, until FROM {schema}.idempotency_keys "
                "WHERE $1::text IS NULL OR key > $1 ORDER BY key LIMIT 1001"
            ),
            None if cursor is None else self._name(cursor),
        )
        full = self._names.full
        items = [
            (full(row["key"]), KeyMark(full(row["run_id"]), row["until"])) for row in rows[:1000]
        ]
        return Page(items=items, cursor=items[-1][0] if len(rows) > 1000 else None)
