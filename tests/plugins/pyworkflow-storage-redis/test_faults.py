"""Faults of the server and of the way to it: nothing acknowledged is lost, nothing is half done."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import pytest
from redis.exceptions import ResponseError

from pyworkflow.errors import WorkflowError
from pyworkflow.spi import (
    Change,
    ClaimRequest,
    ConfigurationError,
    Event,
    NewRun,
    SchemaTooNew,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.storekit import fsck
from pyworkflow_storage_redis import LostWrites, RedisStorageBackend
from pyworkflow_storage_redis._errors import translate
from tests.proxy import Proxy
from tests.servers import GivenServer, ValkeyServer

T = TypeVar("T")
MakeValkey = Callable[..., ValkeyServer]


def create(run_id: str = "run", size: int = 0) -> Change:
    new = NewRun(workflow="flow", version="1", args='"' + "x" * size + '"')
    return Change(
        run_id=run_id, key="start", create=new, events=[Event("workflow.started", "I", {})]
    )


def note(run_id: str, n: int) -> Change:
    return Change(run_id=run_id, key=f"note:{n}", events=[Event("log.info", "O", {"n": n})])


async def until_it_answers(call: Callable[[], Awaitable[T]]) -> T:
    """The answer of a store whose server comes back."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except StorageUnavailable:
                await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task or process does."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


async def until_it_fails(store: RedisStorageBackend) -> str:
    """What the store says once its server is in trouble."""
    async with asyncio.timeout(20):
        while True:
            try:
                await store.now()
            except StorageUnavailable as error:
                return str(error)


async def refused(url: str) -> WorkflowError:
    store = RedisStorageBackend(url, namespace=uuid4().hex, timeout=3)
    with pytest.raises(WorkflowError) as caught:
        await store.open()
    await store.close()
    return caught.value


def test_wrong_and_missing_passwords_are_configuration_errors(make_valkey: MakeValkey) -> None:
    server = make_valkey(password=True)
    assert server.password is not None
    for url in (
        server.url.replace(server.password, "not-the-password"),
        server.url.replace(f":{server.password}@", ""),
    ):
        error = asyncio.run(refused(url))
        assert isinstance(error, ConfigurationError)
        assert "password" in str(error)
        assert "not-the-password" not in f"{error} {error!r} {error.__cause__!r}"


def test_credentials_are_in_no_text(
    make_valkey: MakeValkey, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_valkey(password=True)
    caplog.set_level(logging.DEBUG)

    async def main() -> list[str]:
        store = RedisStorageBackend(server.url, timeout=2)
        texts = [repr(store), str(store.info())]
        async with store:
            texts.append(repr(store.info()))
            server.kill()
            with pytest.raises(StorageUnavailable) as caught:
                await store.now()
            error: BaseException | None = caught.value
            while error is not None:
                texts.append(f"{error} {error!r}")
                error = error.__cause__ or error.__context__
        return texts

    texts = asyncio.run(main())
    assert server.password
    assert not any(server.password in text for text in [*texts, caplog.text])
    assert "durable=true" in caplog.text


def test_a_server_that_is_not_there_is_unavailable() -> None:
    error = asyncio.run(refused("redis://127.0.0.1:1/0"))
    assert isinstance(error, StorageUnavailable)
    assert "location=redis://127.0.0.1:1/0" in str(error)


def test_f18_a_server_that_may_evict_is_refused(make_valkey: MakeValkey) -> None:
    server = make_valkey({"maxmemory": "20mb", "maxmemory-policy": "allkeys-lru"})
    error = asyncio.run(refused(server.url))
    assert isinstance(error, ConfigurationError)
    assert "maxmemory-policy=allkeys-lru" in str(error)
    assert "noeviction" in str(error)


def test_f18_the_policy_is_known_where_config_is_forbidden(make_valkey: MakeValkey) -> None:
    server = make_valkey({"maxmemory-policy": "volatile-lru", "rename-command": 'CONFIG ""'})
    assert isinstance(asyncio.run(refused(server.url)), ConfigurationError)


def test_f17_durable_is_said_only_when_proved(make_valkey: MakeValkey) -> None:
    async def durable(server: ValkeyServer) -> bool:
        async with RedisStorageBackend(server.url) as store:
            return store.info().capabilities.durable

    assert not RedisStorageBackend("redis://unused").info().capabilities.durable
    assert asyncio.run(durable(make_valkey()))
    weak = make_valkey({"appendfsync": "everysec"})
    assert not asyncio.run(durable(weak))
    assert isinstance(asyncio.run(refused(f"{weak.url}?durable=true")), ConfigurationError)
    silent = make_valkey({"rename-command": 'CONFIG ""'})
    assert not asyncio.run(durable(silent))


def test_f17_a_server_that_lost_everything_is_noticed(make_valkey: MakeValkey) -> None:
    server = make_valkey({"appendonly": "no"})

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            await store.commit_one(create())
            server.kill()
            server.start()
            with pytest.raises(LostWrites) as caught:
                await until_it_answers(lambda: store.get_run("run"))
            with pytest.raises(LostWrites):
                await store.commit_one(create("other"))
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        async with RedisStorageBackend(server.url) as fresh:
            assert await fresh.get_run("run") is None

    asyncio.run(main())


async def fill(store: RedisStorageBackend) -> int:
    """Create runs until the server has no memory for another; how many."""
    for number in range(500):
        try:
            await store.commit_one(create(f"run-{number}", 200_000))
        except StorageFull as error:
            if "memory" in str(error):
                return number
            raise
    raise AssertionError("the memory is never full")


def test_f19_without_memory_a_change_is_refused_whole(make_valkey: MakeValkey) -> None:
    server = make_valkey({"maxmemory": "12mb", "maxmemory-policy": "noeviction"})

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            stored = await fill(store)
            assert stored > 5
            assert await store.get_run(f"run-{stored}") is None
            server.command("CONFIG", "SET", "maxmemory", "1mb")
            with pytest.raises(StorageFull):
                await store.commit([note(f"run-{n}", n) for n in range(5)])
            for n in range(5):
                assert len(await store.get_events(f"run-{n}")) == 1
            assert (await store.stats())["runs"] == stored
            assert await fsck(store) == []
            server.command("CONFIG", "SET", "maxmemory", "0")
            await store.commit_one(create(f"run-{stored}"))
            assert await fsck(store) == []

    asyncio.run(main())


def test_f20_a_failover_that_lost_writes_is_noticed(make_valkey: MakeValkey) -> None:
    primary, replica = make_valkey(), make_valkey({"repl-diskless-sync-delay": "0"})

    async def main() -> None:
        async with RedisStorageBackend(primary.url) as store:
            await store.commit_one(create())
            replica.command("REPLICAOF", "127.0.0.1", str(primary.port))
            await until_copied()
            error = await refused(replica.url)
            assert isinstance(error, ConfigurationError)
            assert "replica" in str(error)
            replica.command("REPLICAOF", "NO", "ONE")
            await store.commit_one(note("run", 1))
            async with RedisStorageBackend(replica.url) as other:
                assert len(await other.get_events("run")) == 1
            # The client goes on with the promoted replica, as behind a name that moved.
            store._address = RedisStorageBackend(replica.url)._address
            link = store._started()
            link._port = replica.port
            await link._hang_up()
            with pytest.raises(LostWrites):
                await store.get_run("run")

    async def until_copied() -> None:
        key = "pyworkflow:{default}:run:run"
        await until(lambda: replica.command("EXISTS", key) == ":1")

    asyncio.run(main())


def test_f22_a_silent_connection_is_given_up(valkey: ValkeyServer | GivenServer) -> None:
    async def main(proxy: Proxy) -> None:
        async with RedisStorageBackend(proxy.url, namespace=uuid4().hex, timeout=2) as store:
            await store.commit_one(create())
            proxy.blackhole()
            with pytest.raises(StorageUnavailable):
                await store.commit_one(note("run", 1))
            proxy.heal()
            await until_it_answers(lambda: store.commit_one(note("run", 1)))
            assert len(await store.get_events("run")) == 2

    with Proxy(valkey.url) as proxy:
        asyncio.run(main(proxy))


def test_an_answer_that_was_lost_is_given_again(valkey: ValkeyServer | GivenServer) -> None:
    async def main(proxy: Proxy) -> None:
        async with RedisStorageBackend(proxy.url, namespace=uuid4().hex) as store:
            await store.commit_one(create())
            proxy.drop_before_answer()
            again = await until_it_answers(lambda: store.commit_one(note("run", 1)))
            assert again.duplicate
            assert again.seqs == [2]
            assert len(await store.get_events("run")) == 2

    with Proxy(valkey.url) as proxy:
        asyncio.run(main(proxy))


def test_f23_killed_connections_are_made_again(valkey: ValkeyServer | GivenServer) -> None:
    async def main() -> None:
        from redis.asyncio import Redis

        namespace = uuid4().hex
        async with (
            RedisStorageBackend(valkey.url, namespace=namespace) as store,
            RedisStorageBackend(valkey.url, namespace=namespace) as other,
            Redis.from_url(valkey.url) as admin,
        ):
            await store.commit_one(create())

            async def news() -> bool:
                while True:
                    try:
                        return await store.watch("run", after=1, timeout=timedelta(seconds=20))
                    except StorageUnavailable:
                        pass  # what is sent again is sent once more: killed twice, its caller hears

            watching = asyncio.create_task(news())
            for kind in ("normal", "pubsub"):
                for _ in range(3):
                    await asyncio.sleep(0)
                    await admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
                    await store.now()
            await other.commit_one(note("run", 1))
            assert await watching

    asyncio.run(main())


def test_a_server_that_loses_its_scripts_is_given_them_again(make_valkey: MakeValkey) -> None:
    server = make_valkey()

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            server.command("SCRIPT", "FLUSH")
            await store.commit_one(create())
            server.command("SCRIPT", "FLUSH")
            answers = await store.commit([note("run", n) for n in range(120)])
            assert [getattr(answer, "seqs", None) for answer in answers] == [
                [n + 2] for n in range(120)
            ]

    asyncio.run(main())


def test_a_killed_server_keeps_what_it_acknowledged(make_valkey: MakeValkey) -> None:
    server = make_valkey()

    async def main() -> None:
        acknowledged: list[int] = []

        async def write(store: RedisStorageBackend) -> None:
            for n in range(400):
                try:
                    await store.commit_one(note("run", n))
                except StorageUnavailable:
                    return
                acknowledged.append(n)

        async with RedisStorageBackend(server.url) as store:
            await store.commit_one(create())
            writing = asyncio.create_task(write(store))
            await until(lambda: len(acknowledged) >= 20)
            await asyncio.to_thread(server.kill)
            await writing
            server.start()
            events = await until_it_answers(lambda: store.get_events("run", after=1))
            stored = [event.data["n"] for event in events]
            assert stored[: len(acknowledged)] == acknowledged
            assert len(stored) <= len(acknowledged) + 1
            assert await fsck(store) == []

    asyncio.run(main())


def test_a_paused_server_only_takes_longer(make_valkey: MakeValkey) -> None:
    server = make_valkey()

    async def main() -> None:
        async with RedisStorageBackend(server.url) as store:
            await store.commit_one(create())
            server.command("CLIENT", "PAUSE", "200", "ALL")
            await store.commit_one(note("run", 1))
            assert len(await store.get_events("run")) == 2

    asyncio.run(main())


def test_a_busy_server_is_unavailable(make_valkey: MakeValkey) -> None:
    server = make_valkey({"busy-reply-threshold": "20"})

    async def main() -> None:
        from redis.asyncio import Redis

        async with RedisStorageBackend(server.url) as store, Redis.from_url(server.url) as other:
            endless = asyncio.create_task(other.execute_command("EVAL", "while true do end", 0))
            assert "busy" in await until_it_fails(store)
            server.command("SCRIPT", "KILL")
            with pytest.raises(Exception, match="killed"):
                await endless
            await store.now()

    asyncio.run(main())


def test_cancelled_callers_disturb_nobody(valkey: ValkeyServer | GivenServer) -> None:
    async def main() -> None:
        async with RedisStorageBackend(valkey.url, namespace=uuid4().hex) as store:
            await store.commit_one(create())
            for n in range(60):
                call = asyncio.create_task(store.commit_one(note("run", n)))
                for _ in range(n % 6):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                run = await store.get_run("run")
                assert run is not None
                assert run.run_id == "run"
            claim = asyncio.create_task(
                store.claim(ClaimRequest(owner="w", lease=timedelta(seconds=60)))
            )
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            claim.cancel()
            await asyncio.gather(claim, return_exceptions=True)
            async with asyncio.timeout(20):
                held = True
                while held:
                    held = bool(await store.holders())
            (turn,) = await store.list_work("run")
            assert (turn.item_id, turn.claims, turn.lease) == ("turn", 0, None)

    asyncio.run(main())


def test_a_newer_layout_is_refused_and_a_dry_run_writes_nothing(make_valkey: MakeValkey) -> None:
    server = make_valkey()

    async def main() -> None:
        store = RedisStorageBackend(server.url)
        assert await store.pending_migrations() == ["0001", "0002"]
        assert server.command("DBSIZE") == ":0"
        await store.migrate()
        assert await store.pending_migrations() == []
        await store.close()
        server.command("HSET", "pyworkflow:{default}:meta", "format", "99")
        with pytest.raises(SchemaTooNew):
            await RedisStorageBackend(server.url).pending_migrations()

    asyncio.run(main())
    error = asyncio.run(_opened(server.url))
    assert isinstance(error, SchemaTooNew)
    assert (error.found, error.supported) == (99, 2)


async def _opened(url: str) -> WorkflowError | None:
    store = RedisStorageBackend(url)
    try:
        await store.open()
    except WorkflowError as error:
        return error
    finally:
        await store.close()
    return None


def test_a_cluster_of_one_serves_a_namespace(valkey_cluster: ValkeyServer) -> None:
    async def main() -> None:
        async with RedisStorageBackend(valkey_cluster.url, namespace="a}b{c:ü") as store:
            await store.commit_one(create())
            assert (await store.claim(ClaimRequest(owner="w", lease=timedelta(seconds=9)))).claims
            assert await fsck(store) == []

    asyncio.run(main())


def test_an_object_belongs_to_one_loop_and_ends_with_close(
    valkey: ValkeyServer | GivenServer,
) -> None:
    store = RedisStorageBackend(valkey.url, namespace=uuid4().hex)

    async def main() -> None:
        await store.now()

        def elsewhere() -> None:
            with pytest.raises(StorageError, match="clone"):
                asyncio.run(store.open())

        await asyncio.to_thread(elsewhere)
        await store.close()
        with pytest.raises(StorageError, match="closed"):
            await store.now()

    asyncio.run(main())


def test_a_watch_that_is_under_way_when_the_object_is_closed_ends_and_connects_no_more(
    valkey: ValkeyServer | GivenServer,
) -> None:
    async def main() -> None:
        store = RedisStorageBackend(valkey.url)
        watch = asyncio.create_task(store.watch("run", after=0, timeout=timedelta(minutes=5)))
        link = store._started()
        async with asyncio.timeout(60):
            while not any(ready.done() for ready in link.news._ready.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await store.close()
            with pytest.raises(StorageError, match="was closed"):
                await watch
        assert link._channel is None
        assert link.news._connection is None

    asyncio.run(main())


FORKING = """
import asyncio, os, sys
from pyworkflow_storage_redis import RedisStorageBackend

store = RedisStorageBackend(sys.argv[1])


async def main():
    before = await store.now()
    child = os.fork()
    if child == 0:
        return
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    for _ in range(20):
        assert await store.now() > before
    await store.close()


async def in_child():
    for _ in range(20):
        await store.now()
    await store.close()


parent = os.getpid()
runner = asyncio.Runner()
runner.run(main())
if os.getpid() != parent:
    try:
        asyncio.run(in_child())
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
runner.close()
"""


def test_after_a_fork_parent_and_child_have_connections_of_their_own(
    valkey: ValkeyServer | GivenServer,
) -> None:
    command = [sys.executable, "-c", FORKING, valkey.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", StorageFull),
        ("MISCONF Redis is configured to save RDB snapshots, but cannot", StorageUnavailable),
        ("Error running script (call to f_1): -OOM command not allowed", StorageFull),
        ("-READONLY You can't write against a read only replica.", StorageUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", StorageUnavailable),
        ("CLUSTERDOWN Hash slot not served", StorageUnavailable),
        ("NOPERM this user has no permissions to run the 'evalsha' command", ConfigurationError),
        ("ERR something new", StorageError),
    ],
)
def test_what_a_server_says_has_a_type(said: str, kind: type[WorkflowError]) -> None:
    error = translate(ResponseError(said), "redis://h:1/0")
    assert type(error) is kind
    assert "location=redis://h:1/0" in str(error)
