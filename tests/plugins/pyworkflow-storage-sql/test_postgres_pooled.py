"""Behind a pooler in transaction mode nothing is kept in a session, and everything works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest

from pyworkflow.spi import Change, ClaimRequest, Event, ItemKind, NewRun, Put, StorageBackend
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_sql import PostgresStorageBackend
from tests.pooler import FOREIGN, Pooler
from tests.servers import GivenServer, PostgresServer

#: Settings on which a statement alone is a transaction as it should be.
PLAIN = {name: FOREIGN[name] for name in ("timezone", "datestyle", "search_path")}


@pytest.fixture(params=[PLAIN, FOREIGN], ids=["plain", "foreign"])
def pooler(
    postgres: PostgresServer | GivenServer, request: pytest.FixtureRequest
) -> Iterator[Pooler]:
    if isinstance(postgres, GivenServer):
        pytest.skip("the pooler's server must trust its clients")
    with Pooler(postgres.database(), settings=request.param) as pooler:
        yield pooler


def test_many_clients_share_two_sessions_whose_settings_are_foreign(pooler: Pooler) -> None:
    async def work(store: StorageBackend, number: int) -> None:
        for each in range(10):
            run_id = f"run {number} {each}"
            new = NewRun(workflow="flow", version="1", args=f'["Größe \\\\ {each}"]')
            first = Event("workflow.started", "I", {"workflow": "flow", "backslash": "\\'"})
            put = [Put(item_id="turn", kind=ItemKind.TURN)]
            change = Change(run_id=run_id, key="start", create=new, events=[first], put=put)
            committed = await store.commit_one(change)
            again = await store.commit_one(change)
            assert again.duplicate
            assert again.last_seq == committed.last_seq
            run = await store.get_run(run_id)
            assert run is not None
            assert run.args_text == new.args
            (event,) = await store.get_events(run_id)
            assert event.data == first.data
            assert event.timestamp.utcoffset() == timedelta(0)
            assert abs(event.timestamp - await store.now()) < timedelta(minutes=5)

    async def main() -> None:
        stores = [PostgresStorageBackend(pooler.url, pooled=True) for _ in range(5)]
        await asyncio.gather(*(work(store, n) for n, store in enumerate(stores)))
        assert (await stores[0].stats())["runs"] == 50
        assert not stores[0].info().capabilities.watch
        claimed = await stores[1].claim(
            ClaimRequest(owner="me", lease=timedelta(seconds=30), limit=100)
        )
        assert len({claim.ref.run_id for claim in claimed.claims}) == 50
        for store in stores:
            await store.close()

    asyncio.run(main())
    assert pooler.switches > 20
    assert pooler.named == 0


def test_an_unknown_startup_parameter_is_not_sent_and_one_that_is_sent_is_refused(
    pooler: Pooler,
) -> None:
    # What a client that does not know of the pooler meets: an error, before anything is written.
    async def main() -> None:
        store = PostgresStorageBackend(pooler.url, pooled=False)
        with pytest.raises(Exception, match="storage="):
            await store.open()
        await store.close()

    asyncio.run(main())


@pytest.mark.long
class TestPooled(StorageConformance):
    capabilities = PostgresStorageBackend("postgresql://host/base", pooled=True).info().capabilities
    pooler: Pooler

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _pooler(cls) -> Iterator[None]:
        with (
            PostgresServer() as server,
            Pooler(server.url, servers=4, settings=PLAIN) as cls.pooler,
        ):
            yield

    async def make(self, namespace: str) -> StorageBackend:
        return PostgresStorageBackend(self.pooler.url, namespace=namespace, pooled=True)

    def url(self, namespace: str) -> str:
        return f"{self.pooler.url}?pooled=true"
