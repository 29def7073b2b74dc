"""Objects that behave badly in their process are failed by the checks of their conduct."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._plugins import register, unregister
from pyworkflow_conformance import StorageConformance
from pyworkflow_storage_sql import SQLiteStorageBackend
from tests.conformance.broken import conduct

URL = "broken://user:s3cret-of-the-url@127.0.0.1/base"


def check(kind, check_id):
    """Run one check on a store that has a URL and a server."""
    made = {}

    class Suite(StorageConformance):
        capabilities = MemoryStorageBackend().info().capabilities

        async def make(self, namespace):
            if namespace not in made:
                made[namespace] = kind(namespace=namespace)
            return made[namespace].clone()

        def url(self, namespace):
            return URL

        def server(self, namespace):
            return conduct.GATE

    (name,) = (name for name in dir(Suite) if name.startswith(f"test_{check_id}_"))
    plugin = conduct.Plugin(kind)
    register(plugin, "broken-conduct")
    try:
        getattr(Suite(), name)()
    finally:
        unregister(plugin)


def is_failed(kind, check_id, match):
    with pytest.raises(BaseException, match=match) as failure:
        check(kind, check_id)
    assert check_id.replace("_", "-") in "\n".join(getattr(failure.value, "__notes__", [check_id]))


@pytest.mark.parametrize("check_id", ["META_06", "META_07"])
def test_an_object_of_a_url_without_faults_passes(check_id):
    check(conduct.Polite, check_id)


def test_a_server_that_is_waited_for_in_a_thread_passes():
    check(conduct.Waits, "CON_19")


@pytest.mark.parametrize(
    "kind",
    [
        conduct.SecretInLocation,
        conduct.SecretInRepr,
        conduct.SecretInError,
        conduct.SecretInCause,
    ],
)
def test_g09_a_password_that_is_shown_is_noticed(kind):
    is_failed(kind, "META_06", "the password is shown")


def test_g12_calls_that_block_the_loop_are_noticed():
    is_failed(conduct.BlocksLoop, "CON_19", "the loop was blocked")


def test_g13_a_constructor_that_connects_is_noticed():
    is_failed(conduct.ConnectsInConstructor, "META_07", "connects to the server")


@pytest.mark.parametrize("kind", [conduct.NoLoopCheck, conduct.RefusesLoopsAsOutage])
def test_g14_a_second_loop_that_ends_in_a_muddle_is_noticed(kind):
    is_failed(kind, "CON_18", "loop")


def test_g08_the_clock_of_the_process_is_noticed(tmp_path):
    declared = SQLiteStorageBackend("unused").info().capabilities

    class Suite(StorageConformance):
        # It has the clock of its process, and says that clients may be on other machines.
        capabilities = replace(declared, multi_host=True, server_clock=True)

        async def make(self, namespace):
            return SQLiteStorageBackend(tmp_path / "store.db", namespace=namespace)

        def url(self, namespace):
            return f"sqlite:///{tmp_path / 'store.db'}"

    with pytest.raises(AssertionError, match="client"):
        Suite().test_TIM_08_a_client_with_a_false_clock()
