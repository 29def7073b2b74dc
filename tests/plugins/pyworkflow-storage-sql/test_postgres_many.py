"""With thousands of runs asleep, looking for work and listing read what they need and no more."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Event,
    ItemKind,
    NewRun,
    Put,
    RunQuery,
    RunStatus,
)
from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import PostgresServer

SLEEPING = 3000
#: More rows than the few that any of the questions needs, far fewer than there are.
FEW = 400

EXPLAIN = {
    "fsync": "off",
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": -1,
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
    "log_line_prefix": "@@",
}


def asleep(n: int) -> Change:
    new = NewRun(workflow=f"flow{n % 10}", version="1", args="[]")
    due = datetime.now(UTC) + timedelta(days=1, seconds=n)
    return Change(
        run_id=f"run{n}",
        key="start",
        create=new,
        # An output: an input would be a reason to wake.
        events=[Event("log.info", "O", {"message": "asleep"})],
        put=[Put(item_id="step:1", kind=ItemKind.STEP, due_at=due)],
    )


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


def scans(server: PostgresServer, since: int) -> list[dict[str, Any]]:
    """What was read from tables, in the plans that the server has logged since."""
    found = re.findall(r"plan:\n(.*?)(?=\n@@|\Z)", server.log_text()[since:], re.DOTALL)
    return [
        node
        for text in found
        for node in nodes(json.loads(text)["Plan"])
        if node.get("Relation Name") in {"runs", "work_items", "events", "idempotency_keys"}
    ]


def test_nothing_that_is_asked_often_reads_all_of_a_table(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    server = make_postgres(EXPLAIN)

    async def main() -> None:
        async with PostgresStorageBackend(server.url) as store:
            for n in range(0, SLEEPING, 1000):
                await store.commit([asleep(n + i) for i in range(1000)])
        # The sessions of this one log every plan.
        server.sql("ALTER SYSTEM SET auto_explain.log_min_duration = 0")
        server.sql("SELECT pg_reload_conf()")
        async with PostgresStorageBackend(server.url) as store:
            request = ClaimRequest(owner="me", lease=timedelta(seconds=30), limit=10)
            for name, question in {
                "claim": lambda: store.claim(request),
                "next_due": lambda: store.next_due(),
                "announce": lambda: store.announce(100, timedelta(seconds=5)),
                "list": lambda: store.list_runs(RunQuery(limit=100)),
                "list workflow": lambda: store.list_runs(RunQuery(limit=20, workflow="flow3")),
                "list no workflow": lambda: store.list_runs(RunQuery(workflow="none")),
                **{
                    f"list {status}": lambda status=status: store.list_runs(
                        RunQuery(limit=100, status=[status])
                    )
                    for status in RunStatus
                    if status not in {RunStatus.SUSPENDED, RunStatus.PENDING}
                },
                "holders": lambda: store.holders(),
                "find_run": lambda: store.find_run("nobody"),
                "get_run": lambda: store.get_run("run7"),
                "get_events": lambda: store.get_events("run7"),
                "list_work": lambda: store.list_work("run7"),
                "free": lambda: store.free("nobody"),
                "purge": lambda: store.purge(before=datetime.now(UTC)),
            }.items():
                since = len(server.log_text())
                await question()
                read = scans(server, since)
                assert read or name == "holders", name
                for node in read:
                    assert node["Node Type"] != "Seq Scan", (name, node)
                    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                    assert rows * node["Actual Loops"] <= FEW, (name, node)

    asyncio.run(main())
