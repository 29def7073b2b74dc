"""The memory backend passes the suite."""

from __future__ import annotations

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.conformance import StorageConformance
from pyworkflow.spi import Capabilities, StorageBackend


class TestMemory(StorageConformance):
    capabilities = Capabilities(
        server_clock=True, watch=True, batched=True, purge_by_age=True, large_history=True
    )

    async def make(self, namespace: str) -> StorageBackend:
        self.stores = getattr(self, "stores", {})
        if namespace not in self.stores:
            self.stores[namespace] = MemoryStorageBackend(namespace=namespace)
        return self.stores[namespace].twin()
