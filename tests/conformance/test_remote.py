"""A store behind a network, made with ``pyworkflow.storekit.remote``, passes the suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyworkflow.spi import StorageBackend
from pyworkflow_conformance import StorageConformance
from tests.conformance.sizes import MANY_RUNS
from tests.core.remote_store import RemoteBackend, Server


class TestRemote(StorageConformance):
    capabilities = RemoteBackend.capabilities
    many_runs = MANY_RUNS

    @pytest.fixture(autouse=True)
    def running(self) -> Iterator[None]:
        self.there = Server()
        yield
        self.there.stop()

    async def make(self, namespace: str) -> StorageBackend:
        return RemoteBackend(self.there.port, namespace)
