"""Whose a storage object is: one loop's, one process's, until it is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import StorageError, StorageUnavailable
from pyworkflow.storekit import LoopBound

STORAGE = MemoryStorageBackend(namespace="here")


class Pool:
    pass


async def used(bound: LoopBound[Pool]) -> Pool:
    return bound.get() or bound.put(Pool())


def test_the_same_loop_finds_what_it_put() -> None:
    async def main() -> None:
        bound = LoopBound[Pool](STORAGE)
        assert bound.get() is None
        pool = bound.put(Pool())
        assert bound.get() is pool
        assert bound.close() is pool

    asyncio.run(main())


def test_another_loop_is_refused_with_the_location_and_the_remedy() -> None:
    bound = LoopBound[Pool](STORAGE)
    asyncio.run(used(bound))
    with pytest.raises(StorageError, match=r"another event loop: location=memory:here; use clone"):
        asyncio.run(used(bound))


def test_a_closed_one_is_refused_also_when_it_was_never_used() -> None:
    async def main(bound: LoopBound[Pool]) -> None:
        with pytest.raises(StorageError, match=r"was closed: location=memory:here; make") as caught:
            bound.get()
        assert not isinstance(caught.value, StorageUnavailable)  # which would be tried again

    for use in (True, False):
        bound = LoopBound[Pool](STORAGE)
        if use:
            asyncio.run(used(bound))
        assert (bound.close() is not None) is use
        assert bound.close() is None
        asyncio.run(main(bound))


def forked(child: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()  # type: ignore[operator]
        except BaseException:  # noqa: BLE001 - told by the status
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # other tests left threads
@pytest.mark.parametrize("use", [True, False], ids=["used", "closed"])
def test_a_child_has_its_own_and_neither_uses_nor_collects_its_parents(use: bool) -> None:
    bound = LoopBound[Pool](STORAGE)
    parents = weakref.ref(asyncio.run(used(bound)))

    def child() -> None:
        if use:
            own = asyncio.run(used(bound))
            assert own is not parents()
            assert bound.close() is own
        else:
            assert bound.close() is None
        gc.collect()
        assert parents() is not None

    assert forked(child) == 0
    assert bound.close() is parents()
