"""Each deliberately broken store is failed by the check that is there for it."""

from __future__ import annotations

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.conformance import StorageConformance
from tests.conformance.broken import stores

CAUGHT = [
    (stores.LostAppend, "ORD_02"),
    (stores.TwoHolders, "CLM_03"),
    (stores.TwoHolders, "CCY_01"),
    (stores.StaleFence, "CLM_07"),
    (stores.StaleFence, "CCY_04"),
    (stores.OutOfOrder, "ORD_05"),
    (stores.SwallowedWakeUp, "DUE_01"),
    (stores.TornBatch, "CON_07"),
    (stores.KeyTwice, "IDM_05"),
    (stores.KeyTwice, "IDM_09"),
    (stores.OwnClock, "TIM_01"),
]


def check(kind: type[MemoryStorageBackend], check_id: str) -> None:
    made: dict[str, MemoryStorageBackend] = {}

    class Suite(StorageConformance):
        capabilities = MemoryStorageBackend().info().capabilities

        async def make(self, namespace):
            return made.setdefault(namespace, kind(namespace=namespace)).twin()

    (name,) = (name for name in dir(Suite) if name.startswith(f"test_{check_id}_"))
    getattr(Suite(), name)()


@pytest.mark.parametrize(("kind", "check_id"), CAUGHT)
def test_the_named_check_fails_the_broken_store(kind, check_id):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        check(kind, check_id)


@pytest.mark.parametrize("check_id", sorted({check_id for _, check_id in CAUGHT}))
def test_the_same_check_passes_the_sound_store(check_id):
    check(MemoryStorageBackend, check_id)


def test_an_override_is_noticed():
    class Skips(StorageConformance):
        def test_CON_01_create_then_get(self): ...

    with pytest.raises(AssertionError, match="CON_01"):
        Skips().test_META_01_no_overrides()
