"""MIG-08: where nothing was made yet, and all come at once."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pyworkflow.spi.storage import RunQuery
from pyworkflow.testing.internals import make_storage
from pyworkflow_conformance import _worker
from pyworkflow_conformance._at_once import OPENERS, run_id_of
from pyworkflow_conformance._case import Case, Suite, scenario
from pyworkflow_conformance._children import sound

__all__ = ["FreshChecks", "all_work"]


class FreshChecks(Suite):
    """MIG-08."""

    @scenario(needs=("multi_process", "make_fresh"))
    async def test_MIG_08_eight_openers_of_nothing(self, t: Case) -> None:
        """MIG-08: eight that open an empty database at once make its tables, and all get to work.

        Objects of one process, for two namespaces; MIG-04 does it with processes. By URL, these are
        eight processes, which open the store before all else: on an empty database, that proves
        it. Usual cause: "create if absent" looks and creates in two steps without a lock, or under
        a lock of the namespace although the tables are shared.
        """
        if self.opened_first is not None:
            for namespace in self.opened_namespaces:
                await t.open(namespace)  # and so its runs are removed
            assert not self.opened_first, f"eight processes: {'; '.join(self.opened_first)}"
            return
        namespaces = [t.namespace, f"{t.namespace}-other"]
        url = await self.make_fresh()
        problems = await _by_objects(url, namespaces)
        assert not problems, f"eight objects in one process: {'; '.join(problems)}"
        await all_work(t, url, namespaces)


async def _by_objects(url: str, namespaces: Sequence[str]) -> list[str]:
    """Like ``by_processes``, with objects in this process, whose round trips alternate."""
    stores = [make_storage(url, namespaces[n % len(namespaces)]) for n in range(OPENERS)]

    async def begin(n: int) -> None:
        await stores[n].open()
        await stores[n].commit_one(_worker.creation(run_id_of(n)))

    try:
        ended = await asyncio.gather(*map(begin, range(OPENERS)), return_exceptions=True)
    finally:
        for store in stores:
            await store.close()
    return [
        f"object {n}: {type(error).__name__}: {error}" for n, error in enumerate(ended) if error
    ]


async def all_work(t: Case, url: str | None, namespaces: Sequence[str]) -> None:
    """Each opener's run is there, and nothing else."""
    for n, namespace in enumerate(namespaces):
        store = await t.open(namespace, url=url)
        found = {run.run_id for run in (await store.list_runs(RunQuery())).items}
        assert found == {run_id_of(one) for one in range(n, OPENERS, len(namespaces))}
        await sound(store)
