"""Query plans on PostgreSQL: what a listing reads does not grow with what is stored.

The server counts the blocks that a call touches. The store is made of rows by the thousand, since
a plan that scans is no slower than another in a small one.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import GivenServer, PostgresServer

FEW, MANY = 2_000, 12_000
FILL = """
insert into pyworkflow.runs (run_id, number, workflow, version, final, args, queue, priority, tags,
    attributes, created_at, started_at, updated_at, finished_at, last_seq, last_input, seen_seq,
    paused, create_key)
select 'r' || i, nextval('pyworkflow.numbers'), 'busy', '1',
    case when i % 2 = 0 then 'completed' end, '[]', 'default', 0, '{{}}', '{{}}', now(), now(), now(),
    case when i % 2 = 0 then now() end, 1, 1, 1, false, 'k'
from generate_series({first}, {last}) i;
insert into pyworkflow.work_items (run_id, item_id, kind, workflow, queue, priority, due_at, paused,
    payload, claims)
select run_id, 'turn', 'turn', workflow, queue, 0, now() + interval '10 days', false, '{{}}', 0
from pyworkflow.runs where final is null on conflict do nothing;
analyze;
"""
NO_HIT = [
    ["failed"],
    ["failed", "cancelled"],
    ["failed", "stalled"],
    ["stalled"],
    ["paused"],
    ["pending"],
    ["running"],
    ["pending", "running", "failed"],
]
"""Statuses that no run of the store has: half of the runs are completed, half suspended."""


class Store:
    def __init__(self, server: PostgresServer | GivenServer) -> None:
        self._server = server
        self._url = server.database()

        async def make() -> None:
            async with PostgresStorageBackend(self._url):
                pass

        asyncio.run(make())
        self._runs = 0

    def sql(self, statement: str) -> str:
        return self._server.sql(statement, url=self._url)

    def grow(self, runs: int) -> None:
        self.sql(FILL.format(first=self._runs + 1, last=runs))
        self._runs = runs

    def blocks(self, call: str) -> int:
        """Blocks that a call of a function touches, after others that load the catalogue."""
        select = f"select * from pyworkflow.{call}"
        explain = f"explain (analyze, buffers, format json) {select};"
        said = self.sql(f"{explain * 7} select 'the last'; {explain}")
        plan = json.loads(said.partition("the last")[2])[0]["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def listing(statuses: list[str] | None, workflow: str | None, below: int = 2**62) -> str:
    names = "null" if statuses is None else f"array{statuses}"
    of = "null" if workflow is None else f"'{workflow}'"
    return f"show_runs({below}, {of}, {names}::text[], 101)"


CALLS = {
    f"{'+'.join(statuses or ['all'])} of {workflow}": listing(statuses, workflow)
    for statuses in [None, ["completed"], ["suspended"], ["completed", "suspended"], *NO_HIT]
    for workflow in (None, "busy", "absent")
}
CALLS["a deep page"] = listing(None, None, 150)
CALLS["a deep page of a workflow"] = listing(["completed"], "busy", 150)


@pytest.fixture(scope="module")
def counted(postgres: PostgresServer | GivenServer) -> tuple[dict[str, int], Store]:
    """Blocks per call in the small store; the store itself, grown."""
    store = Store(postgres)
    store.grow(FEW)
    few = {name: store.blocks(call) for name, call in CALLS.items()}
    store.grow(MANY)
    return few, store


@pytest.mark.parametrize("name", CALLS)
def test_found_m03_a_listing_reads_no_more_in_a_larger_store(
    name: str, counted: tuple[dict[str, int], Store]
) -> None:
    few, store = counted
    assert store.blocks(CALLS[name]) <= 1.5 * few[name] + 50


@pytest.mark.parametrize(
    ("index", "call"),
    [
        # Without runs_final, PostgreSQL 18 skips through runs_workflow_final; older ones scan.
        ("runs_stalled", listing(["stalled"], None)),
        ("runs_paused", listing(["paused"], None)),
        ("runs_unstarted", listing(["pending"], None)),
        ("runs_workflow_final", listing(["failed", "completed"], "absent")),
    ],
)
def test_found_m03_a_dropped_index_would_be_noticed(
    index: str, call: str, counted: tuple[dict[str, int], Store]
) -> None:
    _, store = counted
    before = store.blocks(call)
    definition = store.sql(f"select pg_get_indexdef('pyworkflow.{index}'::regclass)")
    store.sql(f"drop index pyworkflow.{index}")
    try:
        assert store.blocks(call) > 1.5 * before + 50
    finally:
        store.sql(definition)
