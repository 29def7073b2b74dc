"""PostgreSQL and the network fail: what was acknowledged is there, what was not can be sent again."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import TypeVar

import pytest

from pyworkflow.errors import SchemaTooNew, StorageError, StorageUnavailable
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Committed,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    StorageBackend,
)
from pyworkflow_storage_sql import PostgresStorageBackend
from pyworkflow_storage_sql.postgres._watch import News
from tests.proxy import Proxy
from tests.servers import GivenServer, PostgresServer

T = TypeVar("T")
Given = PostgresServer | GivenServer

OTHERS = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() "
    "AND datname = current_database()"
)


def start(run_id: str) -> Change:
    new = NewRun(workflow="flow", version="1", args="[]")
    first = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})
    put = [Put(item_id="turn", kind=ItemKind.TURN)]
    return Change(run_id=run_id, key="start", create=new, events=[first], put=put)


def log(run_id: str, key: str) -> Change:
    return Change(run_id=run_id, key=key, events=[Event("log.info", "O", {"n": key}, key=key)])


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """As a client does it: the same again while the outcome is unknown."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except StorageUnavailable:
                await asyncio.sleep(0.01)


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if look():
                return
            await asyncio.sleep(0.005)


def test_who_cannot_open_leaves_no_connection_behind(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        async with PostgresStorageBackend(url):
            pass
        newer = "UPDATE pyworkflow.migrations SET number = 99 WHERE number = 1"
        postgres.sql(newer, url=url)
        with pytest.raises(SchemaTooNew):
            async with PostgresStorageBackend(url):
                raise AssertionError("a newer schema was opened")

    asyncio.run(main())
    gc.collect()  # an open connection would complain


def test_f25_idle_sessions_that_were_terminated_are_made_again(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(start("run"))
            for n in range(3):
                postgres.sql(OTHERS, url=url)
                await again(lambda n=n: store.commit_one(log("run", f"{n}")))
            assert len(await store.get_events("run")) == 4

    asyncio.run(main())


@pytest.mark.parametrize("committed", [False, True], ids=["before", "after"])
def test_f25_a_commit_whose_outcome_is_unknown_is_answered_when_it_is_sent_again(
    postgres: Given, make_proxy: Callable[[str], Proxy], committed: bool
) -> None:
    url = postgres.database()
    proxy = make_proxy(url)

    async def main() -> None:
        async with (
            PostgresStorageBackend(proxy.url, connections=1) as store,
            PostgresStorageBackend(url) as other,
        ):
            await store.commit_one(start("run"))
            if committed:
                proxy.drop_before_answer()
                with pytest.raises(StorageUnavailable):
                    await store.commit_one(log("run", "one"))
            else:
                # It waits for the run's lock, in the middle of its transaction, and is ended.
                held = await (await other._store.use()).connections.borrow()
                transaction = held.transaction()
                await transaction.start()
                await held.execute("SELECT 1 FROM pyworkflow.runs FOR UPDATE")
                waiting = asyncio.create_task(store.commit_one(log("run", "one")))
                victims = (
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
                await until(lambda: postgres.sql(victims, url=url) != "0")
                with pytest.raises(StorageUnavailable):
                    await waiting
                await transaction.rollback()
                (await other._store.use()).connections.give(held)
            answer = await again(lambda: store.commit_one(log("run", "one")))
            assert answer.duplicate is committed
            assert answer.seqs == [2]
            assert [event.seq for event in await store.get_events("run")] == [1, 2]

    asyncio.run(main())


def test_found_m02_a_worker_that_waits_for_news_notices_the_loss_of_its_listener(
    postgres: Given,
) -> None:
    url = postgres.database()
    listeners = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE query LIKE 'LISTEN%' AND datname = current_database()"
    )

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            while await store.watch(None, after=0, timeout=timedelta(milliseconds=20)):
                pass
            waits = asyncio.create_task(store.watch(None, after=0, timeout=timedelta(minutes=10)))
            await until(lambda: postgres.sql(listeners, url=url) != "0")
            assert not waits.done()
            postgres.sql(OTHERS, url=url)
            async with asyncio.timeout(60):
                assert await waits  # so it asks, and learns of the outage

    asyncio.run(main())


def test_f24_a_server_that_is_killed_under_load_keeps_what_it_acknowledged(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    server = make_postgres()

    async def main() -> None:
        acknowledged: dict[str, Committed] = {}
        async with PostgresStorageBackend(server.url) as store:
            await asyncio.gather(*(store.commit_one(start(f"run{n}")) for n in range(8)))

            async def write(run: int) -> None:
                for n in range(60):
                    key = f"{run}:{n}"
                    acknowledged[key] = await again(
                        partial(store.commit_one, log(f"run{run}", key))
                    )

            writers = [asyncio.create_task(write(n)) for n in range(8)]
            for some in (80, 240):
                await until(lambda some=some: len(acknowledged) >= some)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await asyncio.gather(*writers)
            for run in range(8):
                events = await store.get_events(f"run{run}")
                assert [event.seq for event in events] == list(range(1, 62))
                for event in events[1:]:
                    assert acknowledged[str(event.key)].seqs == [event.seq]

    asyncio.run(main())


def test_f26_fifty_writers_of_one_run_lose_no_event(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        stores = [PostgresStorageBackend(url) for _ in range(10)]
        await stores[0].commit_one(start("run"))
        await asyncio.gather(
            *(
                stores[n % 10].commit_one(log("run", f"{n}:{i}"))
                for n in range(50)
                for i in range(5)
            )
        )
        events = await stores[0].get_events("run")
        assert [event.seq for event in events] == list(range(1, 252))
        for store in stores:
            await store.close()

    asyncio.run(main())


def test_a_server_that_takes_no_writes_now_says_so_and_is_used_again_when_it_does(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    server = make_postgres({"fsync": "off"})

    async def main() -> None:
        async with PostgresStorageBackend(server.url) as store:
            await store.commit_one(start("run"))
            server.sql("ALTER SYSTEM SET default_transaction_read_only = on")
            server.sql("SELECT pg_reload_conf()")
            with pytest.raises(StorageUnavailable, match="standby"):
                await _commit_on(store)  # until the session has read the file
            assert await store.get_run("run") is not None
            # Opening what is there writes nothing.
            async with store.clone() as other:
                assert await other.get_run("run") is not None
                with pytest.raises(StorageUnavailable, match="standby"):
                    await other.claim(ClaimRequest(owner="me", lease=timedelta(seconds=9)))
            server.sql(
                "SET default_transaction_read_only = off; "
                "ALTER SYSTEM RESET default_transaction_read_only"
            )
            server.sql("SELECT pg_reload_conf()")
            await again(lambda: store.commit_one(log("run", "after")))

    asyncio.run(main())


async def _commit_on(store: StorageBackend) -> None:
    for n in count():
        await store.commit_one(log("run", f"{n}"))


def test_f22_a_connection_that_nothing_comes_through_is_given_up_after_the_timeout(
    postgres: Given, make_proxy: Callable[[str], Proxy]
) -> None:
    proxy = make_proxy(postgres.database())

    async def main() -> None:
        async with PostgresStorageBackend(proxy.url, timeout=2, connections=1) as store:
            await store.commit_one(start("run"))
            proxy.blackhole()
            with pytest.raises(StorageUnavailable, match="in time"):
                await store.commit_one(log("run", "one"))
            proxy.drop()
            proxy.heal()
            await again(lambda: store.commit_one(log("run", "one")))
            assert len(await store.get_events("run")) == 2

    asyncio.run(main())


def test_a_statement_that_the_server_cancels_is_an_unknown_outcome(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        async with PostgresStorageBackend(url) as store, store.clone() as other:
            await store.commit_one(start("run"))
            connections = (await other._store.use()).connections
            held = await connections.borrow()
            async with held.transaction():
                await held.execute("SELECT 1 FROM pyworkflow.runs FOR UPDATE")
                waiting = asyncio.create_task(store.commit_one(log("run", "one")))
                cancel = (
                    "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity "
                    "WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
                await until(lambda: postgres.sql(cancel, url=url) != "0")
                with pytest.raises(StorageUnavailable, match="57014"):
                    await waiting
            connections.give(held)
            assert not (await store.commit_one(log("run", "one"))).duplicate

    asyncio.run(main())


def test_a_caller_that_gives_up_leaves_connections_and_claims_in_order(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            await store.commit_one(start("run"))
            for turn in range(30):
                request = ClaimRequest(owner="gone", lease=timedelta(hours=1))
                calls = [
                    asyncio.create_task(store.claim(request)),
                    asyncio.create_task(store.commit_one(log("run", f"{turn}"))),
                    asyncio.create_task(store.watch("run", after=999, timeout=timedelta(9))),
                ]
                for _ in range(turn):
                    await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
            async with asyncio.timeout(30):
                while not (await store.claim(ClaimRequest(owner="me", lease=timedelta(1)))).claims:
                    await store.free("gone")
        gc.collect()  # a connection that nobody closed would say so here

    asyncio.run(main())


def test_closing_while_calls_are_under_way_leaves_no_session(postgres: Given) -> None:
    url = postgres.database()

    async def main() -> None:
        for turn in range(12):
            store = PostgresStorageBackend(url)
            await store.open()
            calls = [
                asyncio.create_task(store.watch(None, after=0, timeout=timedelta(9))),
                asyncio.create_task(store.get_run("run")),
            ]
            for _ in range(turn * 3):
                await asyncio.sleep(0)
            await store.close()
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(StorageError, match="closed"):
                await store.get_run("run")
        gc.collect()
        # The sessions end on the server a moment after their connections.
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        await until(lambda: postgres.sql(sessions, url=url) == "1")

    asyncio.run(main())


def test_work_whose_news_were_lost_is_found_within_seconds(
    postgres: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    monkeypatch.setattr("pyworkflow_storage_sql.postgres._watch._LOOK_AGAIN", 0.1)

    async def main() -> None:
        async with PostgresStorageBackend(url) as store, PostgresStorageBackend(url) as other:
            watching = asyncio.create_task(
                store.watch(None, after=0, timeout=timedelta(seconds=30))
            )
            await other.open()
            # Whoever writes dies before the others are told.
            monkeypatch.setattr(News, "tell_of", lambda *_: None)
            await other.commit_one(start("run"))
            assert await watching
            # What is held or not due is no news.
            assert (await store.claim(ClaimRequest(owner="me", lease=timedelta(1)))).claims
            assert not await store.watch(None, after=0, timeout=timedelta(seconds=0.3))

    asyncio.run(main())


def test_a_run_that_is_created_with_a_lease_is_no_news_for_workers(postgres: Given) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(postgres.database()) as store:
            await store.watch(None, after=0, timeout=timedelta(0))  # it listens from now on
            await store.claim(ClaimRequest(owner="me", lease=timedelta(minutes=1)))
            lease = LeaseFor(owner="me", lease=timedelta(minutes=1))
            held = Put(item_id="turn", kind=ItemKind.TURN, claimed=lease)
            assert (await store.commit_one(replace(start("held"), put=[held]))).claims
            assert not await store.watch(None, after=0, timeout=timedelta(0))
            await store.commit_one(start("free"))
            assert await store.watch(None, after=0, timeout=timedelta(0))

    asyncio.run(main())


# --- processes and loops --------------------------------------------------------------------------


def test_after_a_fork_parent_and_child_go_on_with_connections_of_their_own(
    postgres: Given,
) -> None:
    url = postgres.database()
    loop = asyncio.new_event_loop()
    try:
        store = PostgresStorageBackend(url)
        loop.run_until_complete(store.commit_one(start("run")))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.set_event_loop(None)
                own = asyncio.new_event_loop()
                own.run_until_complete(store.commit_one(log("run", "child")))
                own.run_until_complete(store.close())
                own.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.run_until_complete(store.commit_one(log("run", "parent")))
        assert len(loop.run_until_complete(store.get_events("run"))) == 3
        loop.run_until_complete(store.close())
    finally:
        loop.close()


def test_another_loop_is_refused_and_a_clone_serves_it(postgres: Given) -> None:
    url = postgres.database()
    refused: list[BaseException] = []

    async def use(store: StorageBackend) -> None:
        try:
            await store.get_run("run")
        except StorageError as error:
            refused.append(error)

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            thread = threading.Thread(target=lambda: asyncio.run(use(store)))
            thread.start()
            await asyncio.to_thread(thread.join)
            clone = store.clone()

            def elsewhere() -> None:
                async def own() -> None:
                    async with clone:
                        await clone.commit_one(start("run"))

                asyncio.run(own())

            await asyncio.to_thread(elsewhere)
            assert await store.get_run("run") is not None

    asyncio.run(main())
    assert "clone()" in str(refused[0])
    assert isinstance(pickle.loads(pickle.dumps(refused[0])), StorageError)


# --- durability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_f17_a_server_that_may_lose_what_it_told_does_not_call_itself_durable(
    make_postgres: Callable[..., PostgresServer],
    caplog: pytest.LogCaptureFixture,
    setting: str,
) -> None:
    caplog.set_level(logging.WARNING)

    async def durable(server: PostgresServer) -> bool:
        async with PostgresStorageBackend(server.url) as store:
            return store.info().capabilities.durable

    assert not asyncio.run(durable(make_postgres({setting: "off"})))
    assert "may lose" in caplog.text


def test_f17_commits_wait_for_the_disk_though_the_role_does_not(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    server = make_postgres()
    server.sql("ALTER ROLE postgres SET synchronous_commit = off")

    async def main() -> None:
        async with PostgresStorageBackend(server.url, connections=1) as store:
            assert store.info().capabilities.durable
            (row,) = await store._store.call("SHOW synchronous_commit")
            assert row[0] == "on"
        async with PostgresStorageBackend(server.url, pooled=True) as store:
            (row,) = await store._store.call("SHOW synchronous_commit")
            assert row[0] == "on"
        server.sql("ALTER ROLE postgres SET synchronous_commit = remote_apply")
        async with PostgresStorageBackend(server.url, connections=1) as store:
            (row,) = await store._store.call("SHOW synchronous_commit")
            assert row[0] == "remote_apply"

    asyncio.run(main())
