"""Faults that authors of backends plant without noticing: each passes a small sample."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from pyworkflow.errors import StorageUnavailable
from pyworkflow.spi import Page
from tests.conformance.broken.stores import Broken


class EventsLostAfter5000(Broken):
    """Acknowledges 10,000 events and writes 5,000."""

    async def one(self, change):
        lost = len(change.events) - 5000
        if lost <= 0:
            return await super().one(change)
        answer = await super().one(replace(change, events=change.events[:5000]))
        more = range(answer.last_seq + 1, answer.last_seq + 1 + lost)
        return replace(answer, seqs=[*answer.seqs, *more], last_seq=answer.last_seq + lost)


class PayloadsCut(Broken):
    """A column takes eight megabytes."""

    async def get_events(self, run_id, *, after=0, limit=None):
        found = await super().get_events(run_id, after=after, limit=limit)
        return [event._replace(data=cut(event.data)) for event in found]


def cut(data):
    return {k: v[: 8 * 2**20] if isinstance(v, str) else v for k, v in data.items()}


class OnePacket(Broken):
    """The server cuts the connection at a packet of 16 MiB."""

    async def one(self, change):
        sizes = (len(v) for e in change.events for v in e.data.values() if isinstance(v, str))
        if sum(sizes) > 16 * 2**20:
            raise StorageUnavailable("the server has gone away")
        return await super().one(change)


def prefix(name):
    return name.encode()[:191]


def without_case(name):
    return name.lower()


def without_accents(name):
    return "".join(c for c in unicodedata.normalize("NFD", name) if not unicodedata.combining(c))


def without_blanks(name):
    return name.rstrip(" ")


FOLDS = (prefix, without_case, without_accents, without_blanks)


class Folding(Broken):
    """Takes names that it folds to the same text for one: the one that came first."""

    fold = staticmethod(without_case)

    def _first(self, kind, name):
        if name is None:
            return None
        known = vars(self._shared).setdefault("folded", {})
        return known.setdefault((kind, self.fold(name)), name)

    def _firsts(self, kind, names):
        return None if names is None else frozenset(self._first(kind, name) for name in names)


class FoldsRunIds(Folding):
    async def one(self, change):
        return await super().one(replace(change, run_id=self._first("run", change.run_id)))

    async def get_run(self, run_id):
        return await super().get_run(self._first("run", run_id))


class FoldsParents(Folding):
    """Purge asks for a parent without looking at the case of its id."""

    async def one(self, change):
        create = change.create
        if create is not None and create.parent is not None:
            parent = replace(create.parent, run_id=self._first("run", create.parent.run_id))
            change = replace(change, create=replace(create, parent=parent))
        elif create is not None:
            self._first("run", change.run_id)
        return await super().one(change)


class FoldsKeys(Folding):
    async def find_run(self, idempotency_key):
        return await super().find_run(self._first("key", idempotency_key))

    async def one(self, change):
        if change.create is not None:
            self._first("key", change.create.idempotency_key)
        return await super().one(change)


class FoldsChangeKeys(Folding):
    async def one(self, change):
        return await super().one(replace(change, key=self._first("change", change.key)))


class FoldsEventKeys(Folding):
    async def one(self, change):
        events = [event._replace(key=self._first("event", event.key)) for event in change.events]
        return await super().one(replace(change, events=events))


class FoldsItems(Folding):
    async def one(self, change):
        put = [replace(put, item_id=self._first("item", put.item_id)) for put in change.put]
        return await super().one(replace(change, put=put))


class FoldsQueues(Folding):
    async def one(self, change):
        create = change.create
        if create is not None:
            create = replace(create, queue=self._first("queue", create.queue))
        return await super().one(replace(change, create=create))

    async def claim(self, request):
        return await super().claim(replace(request, queues=self._firsts("queue", request.queues)))


class FoldsWorkflows(Folding):
    """Only claims fold: the run itself shows its workflow as it was given."""

    async def claim(self, request):
        if request.workflows is None:
            return await super().claim(request)
        runs = self._shared.store._runs.values()
        wanted = {self.fold(name) for name in request.workflows}
        names = {run.workflow for run in runs if self.fold(run.workflow) in wanted}
        return await super().claim(replace(request, workflows=frozenset(names)))


class FoldsListedWorkflows(Folding):
    async def list_runs(self, query, cursor=None):
        if query.workflow is None:
            return await super().list_runs(query, cursor)
        page = await super().list_runs(replace(query, workflow=None), cursor)
        wanted = self.fold(query.workflow)
        items = [run for run in page.items if self.fold(run.workflow) == wanted]
        return replace(page, items=items)


class FoldsOwners(Folding):
    async def free(self, owner):
        alike = [one for one in await self.holders() if self.fold(one) == self.fold(owner)]
        return sum([await super(FoldsOwners, self).free(one) for one in alike])


class PauseIgnoredForNew(Broken):
    """The pause marks the items that exist."""

    async def one(self, change):
        answer = await super().one(change)
        run = self._shared.store._runs.get(change.run_id)
        if run is not None and run.paused and not answer.duplicate:
            for put in change.put:
                if put.item_id in run.items:
                    self._shared.store._index.put(run.items[put.item_id], run.workflow)
        return answer


class PauseIgnoredForReleased(Broken):
    """An item that is released is due, whatever its run is."""

    async def release(self, ref, *, delay=None):
        done = await super().release(ref, delay=delay)
        run = self._shared.store._runs.get(ref.run_id)
        if done and run is not None and run.paused:
            self._shared.store._index.put(run.items[ref.item_id], run.workflow)
        return done


class ClaimsByRun(Broken):
    """With more due than a claim takes, the first by run id are taken."""

    async def claim(self, request):
        if request.items is not None:
            return await super().claim(request)
        runs = self._shared.store._runs
        all_items = [
            (run_id, item.item_id)
            for run_id in sorted(runs)
            for item in await self.list_work(run_id)
            if item.due_at <= await self.now() and not item.lease
        ]
        if len(all_items) <= request.limit:
            return await super().claim(request)
        return await super().claim(replace(request, items=all_items[: request.limit]))


class ExportsOnePageOfKeys(Broken):
    """Keys after the first 1,000 are missing in a copy."""

    async def export_keys(self, cursor=None):
        page = await super().export_keys(cursor)
        return Page(items=page.items[:1000], cursor=None)


class CountsOnePage(Broken):
    """Frees the leases of the first 1,000 items."""

    async def free(self, owner):
        refs = await self.leases(owner)
        freed = await super().free(owner)
        return min(freed, 1000) if len(refs) > 1000 else freed


def folding(kind, fold):
    """The store with another idea of which names are one."""
    return type(f"{kind.__name__}_{fold.__name__}", (kind,), {"fold": staticmethod(fold)})


FOLDED = [
    (FoldsRunIds, "UNI_07"),
    (FoldsParents, "UNI_07"),
    (FoldsKeys, "UNI_08"),
    (FoldsChangeKeys, "UNI_08"),
    (FoldsEventKeys, "UNI_08"),
    (FoldsItems, "UNI_09"),
    (FoldsQueues, "UNI_10"),
    (FoldsWorkflows, "UNI_10"),
    (FoldsListedWorkflows, "UNI_10"),
    (FoldsOwners, "UNI_11"),
]
PLANTED = [
    ("g01", EventsLostAfter5000, "PAY_08"),
    ("g01", PayloadsCut, "PAY_09"),
    *(
        ("g02" if fold is prefix else "g06", folding(kind, fold), check_id)
        for kind, check_id in FOLDED
        for fold in FOLDS
    ),
    ("g03", PauseIgnoredForNew, "CTL_09"),
    ("g03", PauseIgnoredForReleased, "CTL_09"),
    ("g04", ClaimsByRun, "CLM_30"),
    ("g05", ExportsOnePageOfKeys, "CPY_11"),
    ("g05", CountsOnePage, "PAG_08"),
    ("g07", OnePacket, "PAY_10"),
]
