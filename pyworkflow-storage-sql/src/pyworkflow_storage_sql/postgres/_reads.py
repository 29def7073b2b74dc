"""The longer reads: listings, counts, and all of a run for a copy."""

from __future__ import annotations

from collections.abc import Mapping

from pyworkflow.spi import KeyMark, Page, Run, RunDelta, RunQuery, RunStatus
from pyworkflow_storage_sql.postgres._answers import parse_cursor
from pyworkflow_storage_sql.postgres._handle import StoreHandle

__all__ = ["export_keys", "export_run", "list_runs", "stats"]

_STATUSES = [status.value for status in RunStatus]


async def list_runs(store: StoreHandle, query: RunQuery, cursor: str | None) -> Page[Run]:
    """Runs, newest first."""
    if not 1 <= query.limit <= 1000:
        raise ValueError(f"the limit is 1 to 1000: limit={query.limit}")
    below = 2**62 if cursor is None else parse_cursor(cursor)
    name, decoder = (await store.encoder()).maybe, store.decoder
    rows = await store.call(
        "SELECT {schema}.show_runs($1, $2, $3, $4) AS run",
        below,
        name(query.workflow),
        None if query.status is None else [status.value for status in query.status],
        query.limit + 1,
    )
    texts = [row["run"] for row in rows]
    items = [decoder.run(text) for text in texts[: query.limit]]
    if len(texts) <= query.limit:
        return Page(items=items)
    return Page(items=items, cursor=f"run-{decoder.number(texts[query.limit - 1])}")


async def stats(store: StoreHandle) -> Mapping[str, int]:
    """Numbers of runs, per status, of events and of items."""
    rows = await store.call(
        "SELECT 'events' AS name, count(*) AS n FROM {schema}.events UNION ALL "
        "SELECT 'items', count(*) FROM {schema}.work_items UNION ALL "
        "SELECT final, count(*) FROM {schema}.runs WHERE final IS NOT NULL GROUP BY 1 "
        "UNION ALL SELECT s.status, count(*) FROM {schema}.run_status s "
        "WHERE s.final IS NULL GROUP BY 1"
    )
    found = {row["name"]: row["n"] for row in rows}
    counts = {name: found.get(name, 0) for name in ["events", "items", *_STATUSES]}
    return {"runs": sum(counts[status] for status in _STATUSES), **counts}


async def export_run(store: StoreHandle, run_id: str) -> RunDelta | None:
    """The run without its events."""
    name, decoder = (await store.encoder()).name, store.decoder
    rows = await store.call(
        "SELECT 1 AS kind, {schema}.show_run($1, {schema}.instant()) AS a, "
        "NULL AS b, NULL AS c, 0 AS n UNION ALL "
        "SELECT 2, {schema}.show_item(w)::text, NULL, NULL, 0 FROM {schema}.work_items w "
        "WHERE w.run_id = $1 UNION ALL "
        "SELECT 3, substr(place, 1, 1), CASE WHEN place LIKE 'o%' THEN NULL "
        "ELSE substr(place, 2) END, key || E'\\x04' || answer, number "
        "FROM {schema}.answers WHERE run_id = $1 UNION ALL "
        "SELECT 4, 't', answer_token, answer_key || E'\\x04' || answer, 0 "
        "FROM {schema}.runs WHERE run_id = $1 AND answer_token IS NOT NULL "
        "ORDER BY 1, 5",
        name(run_id),
    )
    if rows[0]["a"] is None:
        return None
    items = decoder.items([row["a"] for row in rows if row["kind"] == 2])
    records = [
        decoder.record(row["b"], *row["c"].rsplit("\x04", 1)) for row in rows if row["kind"] > 2
    ]
    return RunDelta(
        run_id,
        decoder.fields(rows[0]["a"]),
        items=sorted(items, key=lambda item: item.item_id),
        records=records,
    )


async def export_keys(store: StoreHandle, cursor: str | None) -> Page[tuple[str, KeyMark]]:
    """Idempotency keys and their owners."""
    encoder, name = await store.encoder(), store.decoder.name
    after = "key >= $1" if cursor is None else "key > $1"
    rows = await store.call(
        "SELECT key, run_id, until FROM {schema}.idempotency_keys "  # noqa: S608 - constant text
        f"WHERE {after} ORDER BY key LIMIT 1001",
        "" if cursor is None else encoder.name(cursor),
    )
    items = [(name(row["key"]), KeyMark(name(row["run_id"]), row["until"])) for row in rows[:1000]]
    return Page(items=items, cursor=items[-1][0] if len(rows) > 1000 else None)
