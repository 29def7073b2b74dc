"""Backends that are wrong on purpose, each in one way. The suite must catch every one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.spi import ClaimRef, Fenced


class Broken(MemoryStorageBackend):
    """Twins are broken the same way."""

    def twin(self):
        other = type(self)(namespace=self._namespace)
        other._shared = self._shared
        return other


class LostAppend(Broken):
    """Acknowledges an event and forgets it when it comes in a pair."""

    async def commit(self, change):
        if len(change.events) > 1:
            change = replace(change, events=change.events[:1])
        return await super().commit(change)


class TwoHolders(Broken):
    """Gives an item away although it is held: the first holder's lease is ended behind its back."""

    async def claim(self, request):
        for run_id, item_id in request.items or ():
            for item in await self.list_work(run_id):
                if item.item_id == item_id and item.lease is not None:
                    ref = ClaimRef(run_id, item_id, item.lease.token)
                    await super().renew([ref], timedelta(0))
        return await super().claim(request)


class StaleFence(Broken):
    """Believes whoever was fenced."""

    async def commit(self, change):
        try:
            return await super().commit(change)
        except Fenced:
            loose = replace(change, claim=None, seen=None, settle=None, drop=(), control=None)
            return await super().commit(loose)


class OutOfOrder(Broken):
    """Reads the newest event first."""

    async def get_events(self, run_id, *, after=0, limit=None):
        return (await super().get_events(run_id, after=after, limit=limit))[::-1]


class SwallowedWakeUp(Broken):
    """An input does not make the turn due when the turn lies in the future."""

    async def commit(self, change):
        before = {i.item_id: i for i in await self.list_work(change.run_id)}.get("turn")
        committed = await super().commit(change)
        if before is not None and change.claim is None and not change.create:
            run = self._shared.store._runs[change.run_id]
            if "turn" in run.items and not run.paused:
                run.items["turn"] = before
                self._shared.store._index.put(before, run.workflow)
        return committed


class TornBatch(Broken):
    """Writes what came before the refusal."""

    async def commit(self, change):
        try:
            return await super().commit(change)
        except Exception:
            if change.events and change.create is None and "out" not in change.key:
                part = replace(change, final=None, put=(), update=None, key="torn")
                await super().commit(part)
            raise


class KeyTwice(Broken):
    """Forgets who has an idempotency key."""

    async def commit(self, change):
        if change.create is not None:
            self._shared.store._keys.pop(change.create.idempotency_key, None)
        return await super().commit(change)


class OwnClock(Broken):
    """Shifts the clock for itself alone."""

    _ahead = timedelta(0)

    async def now(self):
        return await super().now() + self._ahead

    async def shift_clock(self, by):
        self._ahead += by
