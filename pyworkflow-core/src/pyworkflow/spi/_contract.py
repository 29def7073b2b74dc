"""The version of the contract that a backend or an executor is written for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi.capabilities import CONTRACT_VERSION

if TYPE_CHECKING:
    from pyworkflow.spi.executor import Executor
    from pyworkflow.spi.storage import StorageBackend

__all__ = ["check_executor_contract", "check_storage_contract"]


def check_storage_contract(storage: StorageBackend) -> None:
    """Refuse a storage backend that states another version than ``CONTRACT_VERSION``.

    Raises:
        ConfigurationError: names both versions and the distribution.
    """
    try:
        stated: object = storage.info().contract_version
    except (AttributeError, TypeError) as error:
        if "contract_version" not in str(error):
            raise
        raise _refusal("storage backend", storage, None) from error
    if stated != CONTRACT_VERSION:
        raise _refusal("storage backend", storage, stated)


def check_executor_contract(executor: Executor) -> None:
    """Refuse an executor that states another version than ``CONTRACT_VERSION``.

    Raises:
        ConfigurationError: names both versions and the distribution.
    """
    try:
        stated: object = executor.capabilities.contract_version
    except AttributeError as error:
        if "contract_version" not in str(error):
            raise
        raise _refusal("executor", executor, None) from error
    if stated != CONTRACT_VERSION:
        raise _refusal("executor", executor, stated)


def _refusal(kind: str, made: object, stated: object) -> ConfigurationError:
    return ConfigurationError(
        f"the {kind} is written for another version of the contract: "
        f"type={type(made).__name__} {_distribution(made)} "
        f"contract_version={stated} supported={CONTRACT_VERSION}; "
        "install a version of the distribution that fits this version of pyworkflow-core"
    )


def _distribution(made: object) -> str:
    from importlib.metadata import entry_points

    module = type(made).__module__
    for entry in entry_points(group="pyworkflow"):
        if entry.module.partition(".")[0] == module.partition(".")[0] and entry.dist is not None:
            return f"distribution={entry.dist.name} {entry.dist.version}"
    return f"module={module}"
