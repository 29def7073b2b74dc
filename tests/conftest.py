"""Shared by all tests: deterministic property tests, and the servers that tests ask for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.interpreters import on_this_python
from tests.seconds import pytest_terminal_summary as pytest_terminal_summary
from tests.signals import children_take_signals

# Imported by the fixtures: environments that run only tests of the tree have no servers.
if TYPE_CHECKING:
    from tests.proxy import Proxy
    from tests.servers import GivenServer, PostgresServer, ValkeyServer

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,  # a slow machine is not a failure
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")

children_take_signals()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what runs on the oldest Python alone, where the environment says so."""
    return None if on_this_python(collection_path) else True


@pytest.fixture(scope="session")
def postgres() -> PostgresServer | GivenServer:
    """The PostgreSQL that tests share; each takes a namespace or a ``.database()`` of its own."""
    from tests.servers import shared_postgres

    return shared_postgres()


@pytest.fixture(scope="session")
def valkey() -> ValkeyServer | GivenServer:
    """The Valkey that tests share; each takes a namespace of its own."""
    from tests.servers import shared_valkey

    return shared_valkey()


@pytest.fixture(scope="session")
def valkey_cluster() -> ValkeyServer:
    """A Valkey cluster of one node that tests share."""
    from tests.servers import shared_valkey_cluster

    return shared_valkey_cluster()


@pytest.fixture
def make_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Makes PostgreSQL servers that belong to the test alone; they go when it ends."""
    from tests.servers import PostgresServer

    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(PostgresServer(*args, **options))


@pytest.fixture
def make_valkey() -> Iterator[Callable[..., ValkeyServer]]:
    """Makes Valkey servers that belong to the test alone; they go when it ends."""
    from tests.servers import ValkeyServer

    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(ValkeyServer(*args, **options))


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    """Makes proxies before a server, by its URL; they go when the test ends."""
    from tests.proxy import Proxy

    with ExitStack() as stack:
        yield lambda url: stack.enter_context(Proxy(url))
