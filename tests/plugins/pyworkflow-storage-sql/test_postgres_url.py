"""PostgreSQL's URLs and names: what they mean, what is refused, and who is told no secret."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from pyworkflow._plugins import make_storage
from pyworkflow.errors import ConfigurationError, SchemaTooNew, StorageUnavailable
from pyworkflow.spi import StorageBackend
from pyworkflow_storage_sql import PostgresStorageBackend
from pyworkflow_storage_sql.postgres._schema import Schema, migrations, schema_name
from tests.servers import GivenServer, PostgresServer

SECRET = "s3cr3t-that-nobody-may-see"
BASE = f"postgresql://app:{SECRET}@127.0.0.1:1/base"


def made(url: str, namespace: str = "default") -> PostgresStorageBackend:
    store = make_storage(url, namespace)
    assert isinstance(store, PostgresStorageBackend)
    return store


def use(store: StorageBackend) -> None:
    """Open, ask, close."""

    async def main() -> None:
        try:
            await store.open()
            assert await store.get_run("nobody") is None
        finally:
            await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "PostgreSQL"])
def test_both_schemes_are_served(scheme: str) -> None:
    info = made(BASE.replace("postgresql", scheme)).info()
    assert info.name == "postgresql"
    assert info.location == "postgresql://127.0.0.1:1/base?schema=pyworkflow"


def test_making_one_does_no_io_and_shows_no_password() -> None:
    store = made(f"{BASE}?sslmode=require&timeout=2.5&connections=3&schema=own")
    assert store.info().location == "postgresql://127.0.0.1:1/base?schema=own"
    shown = [repr(store), str(store), repr(store.info()), repr(store.clone()), repr(vars(store))]
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("shema=x", "shema"),
        ("schema=a-b", "a-b"),
        ("schema=pg_mine", "pg_mine"),
        ("schema=" + "a" * 32, "31"),
        ("connections=0", "connections"),
        ("connections=1.5", "connections"),
        ("connections=many", "connections"),
        ("pooled=perhaps", "pooled"),
        ("timeout=0", "timeout"),
        ("timeout=nan", "timeout"),
        ("timeout=-1", "timeout"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(option: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        make_storage(f"{BASE}?{option}", "default")
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize(
    ("url", "pooled"),
    [
        ("postgresql://h/b", False),
        ("postgresql://h:6432/b", True),
        ("postgresql://h:6432/b?pooled=false", False),
        ("postgresql://h:6543/b", True),
        ("postgresql://h/b?pooled=TRUE", True),
    ],
)
def test_a_pooler_is_known_by_its_port_or_by_the_option(url: str, pooled: bool) -> None:
    assert made(url).info().capabilities.watch is not pooled


def test_the_schema_of_the_url_holds_the_tables(postgres: PostgresServer | GivenServer) -> None:
    url = postgres.database()
    use(made(f"{url}?schema=own"))
    use(made(f"{url}?schema=own", "Team.a-b"))
    found = postgres.sql(
        "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'own%' ORDER BY 1", url=url
    ).split()
    assert found == ["own", schema_name("own", "Team.a-b")]


def test_user_and_database_may_stand_in_options(postgres: PostgresServer | GivenServer) -> None:
    parts = urlsplit(postgres.database())
    url = (
        f"postgresql://{parts.hostname}:{parts.port}?user={parts.username}&dbname={parts.path[1:]}"
    )
    if parts.password:
        url += f"&password={parts.password}"
    use(made(url))


def test_an_encrypted_connection_can_be_demanded(postgres: PostgresServer | GivenServer) -> None:
    if isinstance(postgres, GivenServer):
        pytest.skip("a server from elsewhere may speak TLS")
    with pytest.raises((ConfigurationError, StorageUnavailable)):
        use(made(f"{postgres.url}?sslmode=require"))
    use(made(f"{postgres.url}?sslmode=prefer"))


def test_a_missing_driver_is_named_with_what_installs_it() -> None:
    program = (
        "import sys; sys.modules['asyncpg'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'asyncpg' else find(name, *a)\n"
        "from pyworkflow._plugins import make_storage\n"
        "make_storage('postgresql://h/b', 'default')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "pyworkflow-storage-sql[postgres]" in done.stderr.splitlines()[-1]


def test_what_is_wrong_with_an_address_is_told_without_the_password(
    make_postgres: Callable[..., PostgresServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = make_postgres({"fsync": "off"}, password=True)
    assert server.password is not None
    use(made(server.url))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = taken.getsockname()[1]
        for url, kind, says in [
            (server.url.replace(server.password, SECRET), ConfigurationError, "password"),
            (server.url.replace("//postgres:", "//nobody:"), ConfigurationError, "user"),
            (server.url.replace("/postgres", "/nowhere"), ConfigurationError, "no such database"),
            (server.url.replace(str(server.port), str(dead)), StorageUnavailable, str(dead)),
            (server.url.replace("127.0.0.1", "host.invalid"), StorageUnavailable, "host.invalid"),
        ]:
            # "/postgres" is in "//postgres:" as well.
            url = url.replace("//nowhere:", "//postgres:").replace("/nowhere/", "/postgres/")
            url = url if says != "no such database" else server.url + "_not_there"
            with pytest.raises(kind, match=says) as caught:
                use(made(url))
            text = repr(caught.value) + str(caught.value) + repr(caught.value.__cause__)
            assert SECRET not in text
            assert server.password not in text
    assert SECRET not in caplog.text
    assert server.password not in caplog.text


def test_a_user_who_may_not_create_is_told_what_is_needed(
    make_postgres: Callable[..., PostgresServer],
) -> None:
    server = make_postgres({"fsync": "off"})
    server.sql("CREATE ROLE poor LOGIN")
    with pytest.raises(ConfigurationError, match="CREATE"):
        use(made(server.url.replace("//postgres", "//poor")))


# --- schemas and migrations -----------------------------------------------------------------------


def test_different_namespaces_have_different_schemas_of_allowed_length() -> None:
    spaces = ["default", "a", "A", "a b", "a_b", "a-b", "ä", "x" * 40, "x" * 400, "X" * 400]
    spaces += ["x" * 399 + "y", "pyworkflow", "", '"; DROP TABLE x; --', "\x00", "a\nb", "'"]
    for base in ("pyworkflow", "s" * 31):
        names = [schema_name(base, space) for space in spaces]
        assert len(set(names)) == len(spaces)
        assert all(len(name.encode()) <= 63 for name in names)
        assert all(name.startswith(base) for name in names)
        # No plain namespace can be made to look like a digested one.
        assert schema_name(base, names[2].removeprefix(f"{base}_")) not in names


@pytest.mark.parametrize("namespace", ["with space", "Größe", 'a"b', "a'b", "x" * 300])
def test_odd_namespaces_work(postgres: PostgresServer | GivenServer, namespace: str) -> None:
    use(PostgresStorageBackend(postgres.database(), namespace=namespace))


def test_pending_migrations_are_named_and_nothing_is_written_by_asking(
    postgres: PostgresServer | GivenServer,
) -> None:
    url = postgres.database()
    names = [name for _, name, _ in migrations()]

    async def main() -> None:
        store = made(url)
        assert await store.pending_migrations() == names
        assert postgres.sql("SELECT to_regnamespace('pyworkflow') IS NULL", url=url) == "t"
        await store.migrate()
        assert await store.pending_migrations() == []
        await store.migrate()
        await store.close()

    asyncio.run(main())
    applied = postgres.sql("SELECT name FROM pyworkflow.migrations ORDER BY number", url=url)
    assert applied.split() == names


def test_an_interrupted_set_up_goes_on_where_it_stopped(
    postgres: PostgresServer | GivenServer,
) -> None:
    url = postgres.database()
    schema = Schema("pyworkflow")
    number, name, text = migrations()[0]
    postgres.sql(
        f"CREATE SCHEMA {schema.quoted}; CREATE TABLE {schema.quoted}.migrations (number int "
        "PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now());"
        f"{schema.fill(text)}; INSERT INTO {schema.quoted}.migrations VALUES ({number}, '{name}')",
        url=url,
    )
    use(made(url))


def test_many_who_open_a_new_schema_at_once_all_succeed(
    postgres: PostgresServer | GivenServer,
) -> None:
    url = postgres.database()

    async def main() -> None:
        stores = [made(url) for _ in range(8)]
        await asyncio.gather(*(store.open() for store in stores))
        for store in stores:
            await store.close()

    asyncio.run(main())


def test_a_newer_schema_is_left_alone(postgres: PostgresServer | GivenServer) -> None:
    url = postgres.database()
    use(made(url))
    postgres.sql("INSERT INTO pyworkflow.migrations VALUES (9999, 'of a newer version')", url=url)
    with pytest.raises(SchemaTooNew, match="9999"):
        use(made(url))


def test_a_database_that_cannot_hold_every_text_is_refused(
    postgres: PostgresServer | GivenServer,
) -> None:
    url = postgres.database() + "_latin"
    name = urlsplit(url).path[1:]
    postgres.sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(ConfigurationError, match="LATIN1"):
        use(made(url))
