"""The memory backend passes the suite."""

from __future__ import annotations

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.spi import Capabilities, StorageBackend
from pyworkflow_conformance import StorageConformance
from tests.conformance.sizes import MANY_RUNS


class TestMemory(StorageConformance):
    capabilities = Capabilities(
        server_clock=True, watch=True, batched=True, purge_by_age=True, large_history=True
    )

    many_runs = MANY_RUNS

    async def make(self, namespace: str) -> StorageBackend:
        self.stores = getattr(self, "stores", {})
        if namespace not in self.stores:
            self.stores[namespace] = MemoryStorageBackend(namespace=namespace)
        return self.stores[namespace].clone()
