"""Stores that cannot be used say so clearly and early, lose nothing and tell no secret."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
import socket
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from pyworkflow._plugins import make_storage
from pyworkflow.errors import (
    ConfigurationError,
    SchemaTooNew,
    StorageError,
    StorageFull,
    StorageUnavailable,
    WorkflowError,
)
from pyworkflow.spi import StorageBackend
from tests.e2e import _program
from tests.e2e._stage import SERVED, Stage, eventually, served, stage, staged, start_one
from tests.servers import shared_postgres

__all__ = ["served", "stage"]

SECRET = "s3cr3t-that-nobody-may-see"
#: The driver of each kind, which a user may not have installed, and what installs it.
DRIVERS = [
    ("sqlite", "aiosqlite", "pyworkflow-storage-sql[sqlite]"),
    ("postgresql", "asyncpg", "pyworkflow-storage-sql[postgres]"),
    ("redis", "redis", "pyworkflow-storage-redis"),
]

# Put where Python looks at its start: a module cannot be found, as if it were not installed.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def texts(error: BaseException) -> str:
    """All that an exception and what led to it show, in every form they are shown in."""
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in chain:
            chain.append(one)
            todo += [one.__cause__, one.__context__]
    parts = ["".join(traceback.format_exception(error))]
    for one in chain:
        parts += [str(one), repr(one), repr(one.args), repr(vars(one))]
        parts += getattr(one, "__notes__", [])
    assert isinstance(pickle.loads(pickle.dumps(error)), type(error))
    return "\n".join(parts)


def refusal(
    url: str, use: Callable[[StorageBackend], object] | None = None, kind: type = WorkflowError
) -> WorkflowError:
    """How a store with this URL refuses to be opened, or used."""

    async def main() -> None:
        storage = make_storage(url, "default")
        assert SECRET not in repr(storage)
        try:
            await storage.open()
            assert SECRET not in repr(storage.info())
            if use is not None:
                await use(storage)  # type: ignore[misc]  # a coroutine, by whoever gives it
        finally:
            await storage.close()

    with pytest.raises(kind) as caught:
        asyncio.run(main())
    return caught.value


@contextmanager
def dead_port() -> Iterator[int]:
    """A port of the loopback that nobody listens at, and nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test's log shows the secret, whoever logs, at any level."""
    caplog.set_level(logging.DEBUG)
    yield
    shown = [record.getMessage() + repr(record.args) for record in caplog.get_records("call")]
    assert not [line for line in shown if SECRET in line]


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"postgresql://app:{SECRET}@127.0.0.1:many/db", "HOST:5432"),
        (f"postgresql://app:{SECRET}@127.0.0.1:99999/db", "HOST:5432"),
        (f"postgresql://app:{SECRET}@127.0.0.1/db?shema=x", "shema"),
        (f"postgresql://app:{SECRET}@127.0.0.1/db?pooled=perhaps", "pooled"),
        (f"postgresql://127.0.0.1/db?password={SECRET}&nope=1", "nope"),
        (f"redis://:{SECRET}@127.0.0.1:many/0", "port"),
        (f"redis://:{SECRET}@127.0.0.1:99999/0", "port"),
        (f"redis://:{SECRET}@127.0.0.1/first", "database"),
        (f"redis://:{SECRET}@127.0.0.1/0?nope=1", "nope"),
        (f"redys://:{SECRET}@127.0.0.1/0", "redys"),
        ("sqlite:///runs.db?nope=1", "nope"),
        ("sqlite://", "sqlite:///"),
        ("file:", "file:"),
    ],
)
def test_a_wrong_url_is_refused_before_anything_is_opened(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        make_storage(url, "default")
    assert SECRET not in texts(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:{}@127.0.0.1:many/db",
        "redis://:{}@127.0.0.1:6379/0?nope=1",
        "redys://:{}@127.0.0.1/0",
    ],
)
@pytest.mark.parametrize("words", [("runs", "list"), ("worker", _program.__name__)])
def test_commands_refuse_a_wrong_url_in_one_line(
    url: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    done = Stage(tmp_path, url.format(SECRET), "default").command(*words)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith("pyworkflow: ")
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


# --- servers that are not there, or not for us -----------------------------------------------------


@pytest.mark.parametrize("scheme", SERVED)
def test_a_server_that_is_not_there_is_named_without_the_password(scheme: str) -> None:
    user = "app" if scheme == "postgresql" else ""
    path = "db" if scheme == "postgresql" else "0"
    with dead_port() as port:
        url = f"{scheme}://{user}:{SECRET}@127.0.0.1:{port}/{path}"
        error = refusal(url, kind=StorageUnavailable)
    assert f"127.0.0.1:{port}" in str(error)
    assert SECRET not in texts(error)


@pytest.mark.parametrize("scheme", SERVED)
def test_commands_say_that_a_server_is_not_there(scheme: str, tmp_path: Path) -> None:
    user = "app" if scheme == "postgresql" else ""
    path = "db" if scheme == "postgresql" else "0"
    with dead_port() as port:
        stage = Stage(tmp_path, f"{scheme}://{user}:{SECRET}@127.0.0.1:{port}/{path}", "default")
        for words in [("runs", "list"), ("storage", "stats"), ("worker", _program.__name__)]:
            done = stage.command(*words)
            assert (done.returncode, done.stdout) == (3, ""), done.stderr
            assert f"127.0.0.1:{port}" in done.stderr
            assert "Traceback" not in done.stderr
            assert SECRET not in done.stderr


def test_a_wrong_password_is_told_without_showing_either(served: Stage) -> None:
    right = served.server.password
    wrong = served.url.replace(right, SECRET)
    error = refusal(wrong)
    assert "password" in str(error).lower()
    assert f"127.0.0.1:{served.server.port}" in str(error)
    assert right not in texts(error)
    assert SECRET not in texts(error)
    for words in [("runs", "list"), ("storage", "stats"), ("worker", _program.__name__)]:
        done = served.command(*words, url=wrong)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "password" in done.stderr.lower()
        assert "Traceback" not in done.stderr
        assert right not in done.stderr
        assert SECRET not in done.stderr


def test_a_missing_password_is_told(served: Stage) -> None:
    error = refusal(served.url.replace(f":{served.server.password}", "").replace("//@", "//"))
    assert "password" in str(error).lower() or "authentication" in str(error).lower()
    assert served.server.password not in texts(error)


def test_a_database_that_does_not_exist_is_named(postgres) -> None:
    error = refusal(postgres.url.rpartition("/")[0] + "/no_such_database")
    assert "no_such_database" in str(error)


def test_nothing_that_works_shows_the_password_either(served: Stage) -> None:
    password = served.server.password
    served.start(_program.errand, range(3))
    served.worker()
    eventually(served.all_over, "all runs end", say=served.output)
    run_id = served.runs()[0].run_id
    shown = [served.output()]
    for words in [
        ("runs", "list"),
        ("runs", "show", run_id),
        ("runs", "events", run_id),
        ("storage", "stats"),
        ("storage", "check"),
        ("plugins",),
    ]:
        for form in ((), ("--json",)):
            done = served.command(*words, *form)
            assert done.returncode == 0, done.stderr
            shown += [done.stdout, done.stderr]
    shown += [repr(event) for events in served.histories().values() for event in events]
    shown += [repr(served.storage()), repr(served.storage().info())]
    assert not [text for text in shown if password in text]
    assert f"127.0.0.1:{served.server.port}" in served.output()


# --- drivers and plugins ---------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "module", "install"), DRIVERS)
def test_a_missing_driver_is_named_with_what_installs_it(
    scheme: str, module: str, install: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(module=module))
    url = f"sqlite:///{tmp_path}/x.db" if scheme == "sqlite" else f"{scheme}://127.0.0.1/0"
    stage = Stage(tmp_path, url, "default")
    environment = stage.environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyworkflow.cli", *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    for words in [("runs", "list"), ("worker", _program.__name__)]:
        done = command(*words)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "pip install" in done.stderr
        assert install in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.db*"))
    # The others work as before, and the list of plugins is no worse for it.
    other = f"file://{tmp_path}/store"
    asyncio.run(_make_store(other))
    assert command("runs", "list", "--storage", other).returncode == 0
    assert command("plugins").returncode == 0


async def _make_store(url: str) -> None:
    async with make_storage(url):
        pass


# --- stores of a newer version ---------------------------------------------------------------------


def versions(stage: Stage) -> tuple[Callable[[int], None], str]:
    """How the version of the store's format is set from outside, and what it is."""
    kind = stage.url.partition(":")[0]
    if kind == "sqlite":

        def lite(number: int) -> None:
            with closing(sqlite3.connect(stage.path / "store.db")) as db:
                db.execute(f"PRAGMA user_version = {number}")

        with closing(sqlite3.connect(stage.path / "store.db")) as db:
            return lite, str(db.execute("PRAGMA user_version").fetchone()[0])
    if kind == "redis":
        client = redis.Redis.from_url(stage.url, decode_responses=True)
        key = f"pyworkflow:{{{stage.namespace}}}:meta"

        def remote(number: int) -> None:
            client.hset(key, "format", str(number))

        return remote, str(client.hget(key, "format"))
    sql = partial(shared_postgres().sql, url=stage.url)
    schema = sql("SELECT quote_ident(schemaname) FROM pg_tables WHERE tablename = 'migrations'")

    def postgres(number: int) -> None:
        sql(f"DELETE FROM {schema}.migrations WHERE number > {number}")
        if number == 99:
            sql(f"INSERT INTO {schema}.migrations (number, name) VALUES (99, 'future')")

    return postgres, sql(f"SELECT max(number) FROM {schema}.migrations")


@pytest.mark.parametrize("stage", ["sqlite", "postgresql", "redis"], indirect=True)
def test_f50_a_store_of_a_newer_version_is_refused_and_left_as_it_is(stage: Stage) -> None:
    (first,) = stage.start(_program.errand, [0])
    put, version = versions(stage)
    put(99)
    with pytest.raises(SchemaTooNew) as caught:
        stage.start(_program.errand, [1])
    assert "99" in str(caught.value)
    for words in [("runs", "list"), ("storage", "stats"), ("worker", _program.__name__)]:
        done = stage.command(*words)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "99" in done.stderr
        assert "Traceback" not in done.stderr
    put(int(version))
    assert [run.run_id for run in stage.runs()] == [first]
    stage.check()


# --- stores that only read, or are full ------------------------------------------------------------


def read_only(stage: Stage) -> None:
    """Let the store's server accept nothing more, as a stand-by does."""
    assert stage.server is not None
    if stage.url.startswith("redis"):
        stage.server.command("REPLICAOF", "127.0.0.1", "1")
    else:
        stage.server.sql("ALTER DATABASE postgres SET default_transaction_read_only = on")
        stage.server.sql(  # sessions that stand go on as they began
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )


def writable_again(stage: Stage) -> None:
    assert stage.server is not None
    if stage.url.startswith("redis"):
        stage.server.command("REPLICAOF", "NO", "ONE")
    else:
        stage.server.sql(
            "SET default_transaction_read_only = off; "
            "ALTER DATABASE postgres RESET default_transaction_read_only"
        )


def test_a_store_that_only_reads_refuses_changes_and_goes_on_when_it_may_write(
    served: Stage,
) -> None:
    (first,) = served.start(_program.errand, [0])

    async def main() -> WorkflowError:
        async with served.storage() as storage:
            read_only(served)
            with pytest.raises(StorageError) as caught:
                await start_one(storage, _program.errand, 1)
            if not served.url.startswith("redis"):  # what a replica shows may be old
                assert await storage.get_run(first) is not None
            return caught.value

    error = asyncio.run(main())
    assert re.search("read.only|replica", str(error))
    assert served.server.password not in texts(error)
    listed = served.command("runs", "list", "--json")
    if served.url.startswith("redis"):
        assert listed.returncode == 3
        assert "replica" in listed.stderr
    else:
        assert listed.returncode == 0, listed.stderr
        assert first in listed.stdout
    assert served.server.password not in listed.stdout + listed.stderr
    writable_again(served)
    assert served.start(_program.errand, [0, 1])[0] == first
    served.check()


def test_f18_valkey_that_may_throw_data_away_is_refused(make_valkey) -> None:
    server = make_valkey({"maxmemory": "3mb", "maxmemory-policy": "allkeys-lru"}, password=True)
    error = refusal(server.url, kind=ConfigurationError)
    assert "allkeys-lru" in str(error)
    assert "noeviction" in str(error)
    assert server.password not in texts(error)


def test_f17_valkey_that_keeps_no_file_does_not_call_itself_durable(make_valkey) -> None:
    for settings, durable in [
        ({"appendonly": "no"}, False),
        ({"appendfsync": "everysec"}, False),
        ({}, True),
    ]:

        async def main(url: str = make_valkey(settings).url) -> bool:
            async with make_storage(url, "default") as storage:
                return storage.info().capabilities.durable

        assert asyncio.run(main()) is durable


def test_f19_valkey_without_memory_refuses_whole_starts_and_goes_on_when_it_has_some(
    tmp_path: Path,
) -> None:
    with staged("redis", tmp_path, own=True, settings={"maxmemory": "6mb"}) as stage:
        acknowledged, error = asyncio.run(fill(stage, "x" * 20_000))
        assert isinstance(error, StorageFull), repr(error)
        assert {run.run_id for run in stage.runs()} >= set(acknowledged)
        stage.check()
        stage.server.command("CONFIG", "SET", "maxmemory", "200mb")
        stage.start(_program.errand, range(9000, 9003))
        stage.worker()
        eventually(
            lambda: sum(run.status.is_terminal for run in stage.runs()) >= 3,
            "runs end",
            say=stage.output,
        )
        stage.check()


async def fill(stage: Stage, ballast: str) -> tuple[list[str], WorkflowError]:
    """Start runs until the store says that it is full."""
    started: list[str] = []
    async with stage.storage() as storage:
        for number in range(5_000):
            try:
                started.append(await start_one(storage, _program.heavy, number, ballast))
            except WorkflowError as error:
                return started, error
    raise AssertionError("the store never was full")


def test_every_kind_of_store_says_where_it_is_without_credentials(stage: Stage) -> None:
    async def location(storage: StorageBackend) -> str:
        return storage.info().location

    where = stage.ask(location)
    done = stage.command("storage", "stats", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["location"] == where
    port = str(urlsplit(stage.url).port or "")
    assert (port or str(stage.path)) in where
