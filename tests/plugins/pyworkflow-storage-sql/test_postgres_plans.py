"""Query plans on PostgreSQL: what a call reads does not grow with what is stored.

The server counts the blocks that a call touches. The store is made of rows by the thousand, since
a plan that scans is no slower than another in a small one.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import GivenServer, PostgresServer
from tests.statuses import check_listings, make_every_status

FEW, MANY = 2_000, 12_000
FILL = """
insert into pyworkflow.runs (run_id, number, workflow, version, final, args, queue, priority, tags,
    attributes, created_at, started_at, updated_at, finished_at, last_seq, last_input, seen_seq,
    paused, stalled, create_key)
select 'r' || i, nextval('pyworkflow.numbers'),
    case when i % 6 < 4 then 'busy' when i % 6 = 4 then 'waiting' else 'stuck' end, '1',
    case when i % 6 < 2 then 'completed' end, '[]', 'default', 0, '{{}}', '{{}}', now(),
    case when i % 6 <> 4 then now() end, now(), case when i % 6 < 2 then now() end, 1, 1,
    case when i % 6 <> 4 then 1 else 0 end, i % 12 = 5,
    case when i % 12 = 11 then 'no code' end, 'k'
from generate_series({first}, {last}) i;
insert into pyworkflow.work_items (run_id, item_id, kind, workflow, queue, priority, due_at, paused,
    payload, claims)
select run_id, 'turn', 'turn', workflow, queue, 0, now() + interval '10 days', paused, '{{}}', 0
from pyworkflow.runs where final is null on conflict do nothing;
insert into pyworkflow.idempotency_keys (key, run_id, until)
select 'k' || i, 'r' || i, case when i % 2 = 0 then now() + interval '10 days' end
from generate_series({first}, {last}) i;
analyze;
"""
"""Of twelve runs four are completed, four suspended, two pending, one stalled, one paused."""
STATUSES = [
    None,
    ["completed"],
    ["suspended"],
    ["completed", "suspended"],
    ["failed"],
    ["failed", "cancelled"],
    ["failed", "stalled"],
    ["stalled"],
    ["paused"],
    ["pending"],
    ["running"],
    ["pending", "running", "failed"],
    ["running", "suspended"],
]


class Store:
    def __init__(self, server: PostgresServer | GivenServer) -> None:
        self._server = server
        self.url = server.database()

        async def make() -> None:
            async with PostgresStorageBackend(self.url):
                pass

        asyncio.run(make())
        self._runs = 0

    def sql(self, statement: str) -> str:
        return self._server.sql(statement, url=self.url)

    def grow(self, runs: int) -> None:
        self.sql(FILL.format(first=self._runs + 1, last=runs))
        self._runs = runs

    def patch(self, function: str, old: str, new: str) -> None:
        """Replace a part of a function."""
        text = self.sql(f"select pg_get_functiondef('pyworkflow.{function}'::regprocedure)")
        assert text.count(old) == 1
        self.sql(text.replace(old, new))

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


def claim(**filters: object) -> str:
    """A claim of what fits the filters: nothing is due."""
    request = {"owner": "w", "lease": "PT60S", "limit": 10, "max_bytes": 1000, "known": {}}
    return f"claim_many('{json.dumps([request | filters])}')"


CALLS = {
    f"{'+'.join(statuses or ['all'])} of {workflow}": listing(statuses, workflow)
    for statuses in STATUSES
    for workflow in (None, "busy", "absent")
}
CALLS |= {
    f"{status} of {workflow}": listing([status], workflow)
    for status in ("suspended", "running")
    for workflow in ("waiting", "stuck")
}
CALLS["a deep page"] = listing(None, None, 150)
CALLS["a deep page of a workflow"] = listing(["completed"], "busy", 150)
CALLS["a claim"] = claim()
CALLS["a claim of another queue"] = claim(queues=["other"])
CALLS["a claim of another workflow"] = claim(workflows=["other"])
CALLS["a claim of another kind"] = claim(kinds=["step"])
CALLS["a claim by reference"] = claim(items=[["r9", "turn"], ["r1", "turn"]])
CALLS["a renewal"] = """renew('[["r9", "turn", "t"], ["r1", "turn", "t"]]', interval '1 s')"""
CALLS["next_due"] = "next_due(null, null)"
CALLS["next_due of another queue"] = "next_due(array['other'], null)"
CALLS["next_due of another workflow"] = "next_due(null, array['other'])"
CALLS["announce"] = "announce(100, interval '5 s')"
CALLS["holders"] = "holders()"
CALLS["leases"] = "leases('w')"
CALLS["free"] = "free('w')"
CALLS["a purge that finds nothing"] = "purge(now() - interval '1 day', 1000, interval '1 day')"


@pytest.fixture(scope="module")
def counted(postgres: PostgresServer | GivenServer) -> tuple[dict[str, int], Store]:
    """Blocks per call in the small store; the store itself, grown."""
    store = Store(postgres)
    store.grow(FEW)
    few = {name: store.blocks(call) for name, call in CALLS.items()}
    store.grow(MANY)
    return few, store


@pytest.mark.parametrize("name", CALLS)
def test_found_m03_a_call_reads_no_more_in_a_larger_store(
    name: str, counted: tuple[dict[str, int], Store]
) -> None:
    few, store = counted
    assert store.blocks(CALLS[name]) <= 1.5 * few[name] + 50


@pytest.mark.parametrize(
    ("index", "call"),
    [
        ("runs_state", listing(["failed", "stalled"], None)),
        ("runs_workflow_state", listing(["failed", "completed"], "absent")),
        ("runs_finished", CALLS["a purge that finds nothing"]),
        ("idempotency_keys_until", CALLS["a purge that finds nothing"]),
        ("work_items_free", CALLS["next_due of another queue"]),
        ("work_items_held", CALLS["holders"]),
        ("work_items_tried", listing(["suspended"], "waiting")),
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


def test_announcing_looks_at_so_many_items_that_were_rung_for(
    postgres: PostgresServer | GivenServer,
) -> None:
    store = Store(postgres)
    store.patch("pick_due(timestamptz, int, text[], text[], text[], timestamptz)", "2000", "20")
    found = []
    for runs in (1_000, 4_000):
        store.grow(runs)
        store.sql(
            "update pyworkflow.work_items set due_at = now() - interval '1 day', rung_at = now()"
        )
        store.sql("vacuum pyworkflow.work_items")
        found.append(store.blocks("announce(100, interval '1 hour')"))
    assert found[1] <= 1.5 * found[0] + 50


def test_found_m03_open_statuses_are_those_of_the_runs(
    postgres: PostgresServer | GivenServer,
) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(postgres.database()) as store:
            await make_every_status(store)
            await check_listings(store)

    asyncio.run(main())


def test_found_m03_where_many_are_awake_the_newest_runs_are_looked_at(
    postgres: PostgresServer | GivenServer,
) -> None:
    stored = Store(postgres)
    stored.patch("show_runs(bigint, text, text[], int)", "v_most int := 1000;", "v_most int := 2;")

    async def main() -> None:
        async with PostgresStorageBackend(stored.url) as store:
            await make_every_status(store)
            await check_listings(store)

    asyncio.run(main())
