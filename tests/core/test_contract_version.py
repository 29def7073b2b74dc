"""A backend or an executor of another version of the contract is refused where it is made."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pyworkflow import Client, configure
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._plugins import make_executor, make_storage, register, unregister
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import (
    CONTRACT_VERSION,
    Capabilities,
    ExecutorCapabilities,
    StorageInfo,
    hookimpl,
)
from pyworkflow.testing import TestEnvironment
from pyworkflow.worker import create_runtime

STORAGE = r"storage backend .*type=Other .*contract_version={} supported=2"
EXECUTOR = r"executor .*type=OtherExecutor .*contract_version={} supported=2"


class Other(MemoryStorageBackend):
    """States the version that it is given."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version

    def info(self) -> StorageInfo:
        return replace(super().info(), contract_version=self.version)


class OtherExecutor:
    """States the version that it is given."""

    name = "other"

    def __init__(self, version: int) -> None:
        self.capabilities = ExecutorCapabilities(contract_version=version)

    async def open(self, config: Any) -> None: ...
    async def notify(self, bells: Any) -> None: ...
    def serve(self, runtime: Any, queues: Any) -> None: ...
    async def close(self) -> None: ...


class Plugin:
    """Makes both of version 1, and of version 3 when the URL says so."""

    @hookimpl
    def pyworkflow_make_storage(self, url: str, options: Any) -> Any:
        return Other(3 if "3" in url else 1) if url.startswith("othercontract:") else None

    @hookimpl
    def pyworkflow_make_executor(self, url: str, options: Any) -> Any:
        return OtherExecutor(3 if "3" in url else 1) if url.startswith("othercontract:") else None


def test_p03_a_backend_has_to_write_its_contract_version():
    assert CONTRACT_VERSION == 2
    with pytest.raises(TypeError, match="contract_version"):
        StorageInfo(name="x", location="y", capabilities=Capabilities())  # type: ignore[call-arg]  # the point
    with pytest.raises(TypeError, match="contract_version"):
        ExecutorCapabilities()  # type: ignore[call-arg]  # the point


@pytest.mark.parametrize("version", [0, 1, 3])
def test_g18_a_given_backend_of_another_contract_is_refused(version: int) -> None:
    store: Any = Other(version)
    with pytest.raises(ConfigurationError, match=STORAGE.format(version)):
        Client(storage=store)
    with pytest.raises(ConfigurationError, match=STORAGE.format(version)):
        create_runtime(storage=store)
    with pytest.raises(ConfigurationError, match=STORAGE.format(version)):
        configure(storage=store)

    async def test() -> None:
        async with TestEnvironment(store):
            pass

    with pytest.raises(ConfigurationError, match=STORAGE.format(version)):
        asyncio.run(test())


@pytest.mark.parametrize("version", [0, 1, 3])
def test_g18_a_given_executor_of_another_contract_is_refused(version: int) -> None:
    executor: Any = OtherExecutor(version)
    with pytest.raises(ConfigurationError, match=EXECUTOR.format(version)):
        Client(storage=MemoryStorageBackend(), executor=executor)
    with pytest.raises(ConfigurationError, match=EXECUTOR.format(version)):
        configure(executor=executor)


@pytest.mark.parametrize(("url", "version"), [("othercontract://1", 1), ("othercontract://3", 3)])
def test_g18_what_a_plugin_makes_of_another_contract_is_refused(url: str, version: int) -> None:
    plugin = Plugin()
    register(plugin, "othercontract")
    try:
        with pytest.raises(ConfigurationError, match=STORAGE.format(version)):
            make_storage(url)
        with pytest.raises(ConfigurationError, match=EXECUTOR.format(version)):
            make_executor(url)
    finally:
        unregister(plugin)


def test_g18_what_was_written_before_versions_were_stated_is_refused() -> None:
    class Old(MemoryStorageBackend):
        def info(self) -> StorageInfo:
            return StorageInfo(name="old", location="here", capabilities=Capabilities())  # type: ignore[call-arg]  # as 0.1 allowed

    with pytest.raises(ConfigurationError, match=r"type=Old .*contract_version=None supported=2"):
        Client(storage=Old())


def test_g18_the_distribution_is_named() -> None:
    from pyworkflow_storage_file import FileStorageBackend

    class Older(FileStorageBackend):
        def info(self) -> StorageInfo:
            return replace(super().info(), contract_version=1)

    Older.__module__ = FileStorageBackend.__module__
    with pytest.raises(ConfigurationError, match=r"distribution=pyworkflow-storage-file \d"):
        Client(storage=Older("/tmp/never-made"))
