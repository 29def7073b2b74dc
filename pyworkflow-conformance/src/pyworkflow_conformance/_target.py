"""The test class for a store that is given by URL or factory, in namespaces of its own."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias

from pyworkflow.errors import WorkflowError
from pyworkflow.runs import ItemKind, RunStatus
from pyworkflow.spi.capabilities import Capabilities
from pyworkflow.spi.storage import (
    Change,
    ClaimRequest,
    Control,
    ControlKind,
    RunQuery,
    Settle,
    StorageBackend,
)
from pyworkflow_conformance._clock import shift_clock
from pyworkflow_conformance.storage import StorageConformance

__all__ = ["Factory", "suite_for", "tidy"]

Factory: TypeAlias = Callable[[str], StorageBackend | Awaitable[StorageBackend]]
_AGES = timedelta(days=1)


def suite_for(
    make: Factory, *, url: str | None, declared: Capabilities, seed: int, prefix: str
) -> type[StorageConformance]:
    """A class of checks for this store.

    Args:
        make: Makes a store object for a namespace.
        url: What other processes open the store by.
        declared: What the backend declares.
        seed: Decides what is left to chance.
        prefix: Begins every namespace.
    """
    # Other processes see what is durable or meant for them; the memory of this one they do not.
    reachable = declared.durable or declared.multi_process

    first: dict[str, StorageBackend] = {}  # of the check in progress, by namespace

    class _Target(StorageConformance):
        capabilities = declared
        namespace_prefix = prefix

        async def make(self, namespace: str) -> StorageBackend:
            # In memory the first object is the store: others are its clones, as in the engine.
            standing = first.get(namespace)
            if standing is not None and not reachable:
                return standing.clone()
            store = await _made(make, namespace)
            first.setdefault(namespace, store)
            return store if reachable else store.clone()

        async def finished(self) -> None:
            names = list(first) if reachable else []
            first.clear()
            for namespace in names:
                await tidy(await _made(make, namespace))

    class _Reachable(_Target):
        def url(self, namespace: str) -> str | None:
            return url

    found = _Target if url is None or not reachable else _Reachable
    found.seed = seed
    # pytest shows the class by this name.
    found.__name__ = found.__qualname__ = "TestStore"
    return found


async def _made(make: Factory, namespace: str) -> StorageBackend:
    made = make(namespace)
    return await made if inspect.isawaitable(made) else made


async def tidy(store: StorageBackend) -> None:
    """End and remove all runs of the namespace, as far as the contract has means; never raises.

    What stays is what a backend keeps of an empty namespace: its clock and, for as long as it
    keeps them, answers to idempotency keys.
    """
    try:
        async with store:
            while (page := await store.list_runs(RunQuery(limit=1000))).items:
                await store.commit(
                    [_ending(run.run_id) for run in page.items if not run.status.is_terminal]
                )
                while await _settle(store):
                    pass
                before = await store.now() + _AGES
                if not await store.purge(before=before, key_retention=timedelta(0)):
                    break
    except (WorkflowError, OSError, NotImplementedError, TimeoutError):
        return  # a store that fails here fails in its checks, too


def _ending(run_id: str) -> Change:
    end = Control(ControlKind.TERMINATE, "end of the check")
    return Change(run_id=run_id, key="conformance:end", control=end, final=RunStatus.TERMINATED)


async def _settle(store: StorageBackend) -> int:
    """Take and drop deliveries, which outlive their run."""
    request = ClaimRequest(
        owner="conformance",
        lease=timedelta(minutes=1),
        limit=1000,
        kinds=frozenset({ItemKind.DELIVER}),
    )
    claims = (await store.claim(request)).claims
    for claim in claims:
        ref = claim.ref
        await store.commit_one(
            Change(run_id=ref.run_id, key=f"{ref.token}:1", claim=ref, settle=Settle())
        )
    if claims:
        return len(claims)
    due = await store.next_due()
    now = await store.now()
    if due is None or due <= now:
        return 0
    await shift_clock(store, due - now)  # the clock of a namespace that nobody else uses
    return 1
