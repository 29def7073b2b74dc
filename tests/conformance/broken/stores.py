"""Backends that are wrong on purpose, each in one way. The suite must catch every one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import KeyTaken, Refusal, RunClosed, RunExists, RunNotFound
from pyworkflow.runs import RunStatus, derive_status
from pyworkflow.spi import ClaimRef, Committed, ControlKind, Fenced

#: For stores that would keep their check waiting.
SOON = timedelta(milliseconds=50)


class Broken(MemoryStorageBackend):
    """Clones are broken the same way."""

    def clone(self):
        other = type(self)(namespace=self._namespace)
        other._shared = self._shared
        return other

    async def commit(self, changes):
        answers = []
        for change in changes:
            try:
                answers.append(await self.one(change))
            except (Refusal, RunNotFound, RunClosed) as refusal:
                answers.append(refusal)
        return answers

    async def one(self, change):
        """Commit a single change; what subclasses get wrong."""
        (answer,) = await super().commit([change])
        if isinstance(answer, Exception):
            raise answer
        return answer


class LostAppend(Broken):
    """Acknowledges an event and forgets it when it comes in a pair."""

    async def one(self, change):
        if len(change.events) > 1:
            change = replace(change, events=change.events[:1])
        return await super().one(change)


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

    async def one(self, change):
        try:
            return await super().one(change)
        except Fenced:
            loose = replace(change, claim=None, seen=None, settle=None, drop=(), control=None)
            return await super().one(loose)


class OutOfOrder(Broken):
    """Reads the newest event first."""

    async def get_events(self, run_id, *, after=0, limit=None):
        return (await super().get_events(run_id, after=after, limit=limit))[::-1]


class SwallowedWakeUp(Broken):
    """An input does not make the turn due when the turn lies in the future."""

    async def one(self, change):
        before = {i.item_id: i for i in await self.list_work(change.run_id)}.get("turn")
        committed = await super().one(change)
        if before is not None and change.claim is None and not change.create:
            run = self._shared.store._runs[change.run_id]
            if "turn" in run.items and not run.paused:
                run.items["turn"] = before
                self._shared.store._index.put(before, run.workflow)
        return committed


class TornBatch(Broken):
    """Writes what came before the refusal."""

    async def one(self, change):
        try:
            return await super().one(change)
        except Exception:
            if change.events and change.create is None and "out" not in change.key:
                part = replace(change, final=None, put=(), update=None, key="torn")
                await super().one(part)
            raise


class KeyTwice(Broken):
    """Forgets who has an idempotency key."""

    async def one(self, change):
        if change.create is not None:
            self._shared.store._keys.pop(change.create.idempotency_key, None)
        return await super().one(change)


class OwnClock(Broken):
    """Shifts the clock for itself alone."""

    _ahead = timedelta(0)

    async def now(self):
        return await super().now() + self._ahead

    async def shift_clock(self, by):
        self._ahead += by


def change_item(store, run_id, item_id, **fields):
    """Put an item in place behind the contract's back."""
    run = store._shared.store._runs[run_id]
    item = run.items[item_id] = replace(run.items[item_id], **fields)
    store._shared.store._index.put(item, run.workflow)


class ClaimsNotCounted(Broken):
    """Every claim is the first."""

    async def claim(self, request):
        claimed = await super().claim(request)
        claims = []
        for claim in claimed.claims:
            change_item(self, claim.item.run_id, claim.item.item_id, claims=1)
            claims.append(replace(claim, item=replace(claim.item, claims=1)))
        return replace(claimed, claims=claims)


class SameToken(Broken):
    """Fences by owner: whoever claims again has the token it had."""

    async def claim(self, request):
        claimed = await super().claim(request)
        claims = []
        for claim in claimed.claims:
            item = claim.item
            lease = replace(item.lease, token=f"of-{request.owner}")
            change_item(self, item.run_id, item.item_id, lease=lease)
            claims.append(replace(claim, item=replace(item, lease=lease)))
        return replace(claimed, claims=claims)


class RenewsWhatIsLost(Broken):
    """Says that a lease was extended although it is over."""

    async def renew(self, refs, lease):
        await super().renew(refs, lease)
        return [True] * len(refs)


class ReleaseResetsDue(Broken):
    """What is given back without a delay is due now, and so behind what is due since then."""

    async def release(self, ref, *, delay=None):
        return await super().release(ref, delay=timedelta(0) if delay is None else delay)


class PurgesOpenRuns(Broken):
    """Age is all that counts."""

    async def purge(self, *, before, limit=1000, key_retention=timedelta(days=30)):
        store = self._shared.store
        for run_id, run in list(store._runs.items()):
            if run.final is None and run.created_at < before:
                for item_id in list(run.items):
                    store._index.drop((run_id, item_id))
                del store._runs[run_id]
        return await super().purge(before=before, limit=limit, key_retention=key_retention)


class PurgeFreesKeys(Broken):
    """The key goes with the run."""

    async def purge(self, *, before, limit=1000, key_retention=timedelta(days=30)):
        return await super().purge(before=before, limit=limit, key_retention=timedelta(0))


class NumberedPages(Broken):
    """The cursor counts runs from the newest: one that appears moves all of them."""

    async def list_runs(self, query, cursor=None):
        found, at = [], None
        while True:
            page = await super().list_runs(replace(query, limit=1000), at)
            found += page.items
            at = page.cursor
            if at is None:
                break
        first = int(cursor or 0)
        rest = first + query.limit < len(found)
        end = first + query.limit
        return replace(page, items=found[first:end], cursor=str(end) if rest else None)


class AppliesTwice(Broken):
    """A change that is sent again is another change."""

    async def one(self, change):
        committed = await super().one(change)
        if committed.duplicate and change.create is None:
            again = replace(change, key=f"{change.key}+")
            events = [replace_key(event) for event in change.events]
            return await super().one(replace(again, events=events))
        return committed


def replace_key(event):
    """The event without its key."""
    return type(event)(event.type, event.klass, event.data, op=event.op)


class SeenByAnybody(Broken):
    """``seen`` is believed from a step's holder, too."""

    async def one(self, change):
        if change.seen is not None and change.claim is not None and change.claim.item_id != "turn":
            seen, change = change.seen, replace(change, seen=None)
            committed = await super().one(change)
            self._shared.store._runs[change.run_id].seen_seq = seen
            return committed
        return await super().one(change)


class PausedWorks(Broken):
    """A pause is noted, and hides nothing."""

    async def one(self, change):
        committed = await super().one(change)
        if change.control is not None and change.control.kind is ControlKind.PAUSE:
            run = self._shared.store._runs[change.run_id]
            for item in list(run.items.values()):
                self._shared.store._index.put(item, run.workflow)
        return committed


class EndDropsDeliveries(Broken):
    """A run that ends owes nothing any more."""

    async def list_work(self, run_id):
        run = await self.get_run(run_id)
        ended = run is not None and run.status.is_terminal
        return [] if ended else await super().list_work(run_id)

    async def claim(self, request):
        claimed = await super().claim(request)
        open_ = [claim for claim in claimed.claims if not claim.run.status.is_terminal]
        return replace(claimed, claims=open_)


class TimeGoesBack(Broken):
    """Stamps events with the clock as it is."""

    async def one(self, change):
        now = await self.now()
        committed = await super().one(change)
        return replace(committed, timestamp=now)


class RoundsNumbers(Broken):
    """Keeps numbers as a database's floats."""

    async def get_events(self, run_id, *, after=0, limit=None):
        found = await super().get_events(run_id, after=after, limit=limit)
        return [replace_data(event, rounded(event.data)) for event in found]


def replace_data(event, data):
    """The event with other data."""
    return event._replace(data=data)


def rounded(value):
    """Every whole number beyond 2**53 as a float, and zero without its sign."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
        return int(float(value)) if abs(value) < 2**1000 else value
    return 0.0 if value == 0 and isinstance(value, float) else value


class AcknowledgesEarly(Broken):
    """The last change is in a buffer of the object, and goes with it."""

    _buffered = None

    async def _flush(self):
        change, self._buffered = self._buffered, None
        if change is not None:
            await super().one(change)

    async def one(self, change):
        await self._flush()
        if change.events and change.create is None and change.claim is None:
            run = await super().get_run(change.run_id)
            if run is not None and all(event.klass == "O" for event in change.events):
                self._buffered = change
                first = run.history_length + 1
                seqs = list(range(first, first + len(change.events)))
                now = await self.now()
                return Committed(
                    last_seq=seqs[-1], seen_seq=0, paused=False, timestamp=now, now=now, seqs=seqs
                )
        return await super().one(change)

    async def get_events(self, run_id, *, after=0, limit=None):
        await self._flush()
        return await super().get_events(run_id, after=after, limit=limit)


class OneNamespace(Broken):
    """All namespaces lie in one place."""

    _all = MemoryStorageBackend()

    def __init__(self, *, namespace="default"):
        super().__init__(namespace=namespace)
        self._shared = self._all._shared


class MissesChanges(Broken):
    """Who waits hears of what comes after it began to wait, not of what came since it looked."""

    async def watch(self, run_id, *, after, timeout):
        self._looked = self._shared.news
        return await super().watch(run_id, after=after, timeout=min(timeout, SOON))


class SettleKeepsEarlier(Broken):
    """Give an item back for later, and it stays due as it was."""

    async def one(self, change):
        settle, claim = change.settle, change.claim
        if settle is None or claim is None or settle.reschedule_at is None:
            return await super().one(change)
        before = {i.item_id: i for i in await self.list_work(change.run_id)}.get(claim.item_id)
        committed = await super().one(change)
        run = self._shared.store._runs[change.run_id]
        if not committed.duplicate and before is not None and claim.item_id in run.items:
            change_item(self, change.run_id, claim.item_id, due_at=before.due_at)
        return committed


class KeyBeforeRun(Broken):
    """Looks at the idempotency key first."""

    async def one(self, change):
        try:
            return await super().one(change)
        except RunExists:
            key = None if change.create is None else change.create.idempotency_key
            owner = None if key is None else await self.find_run(key)
            if owner is not None:
                raise KeyTaken(key, owner) from None
            raise


class ClosedRunTakesInput(Broken):
    """What ended takes inputs as if it had not."""

    async def one(self, change):
        run = self._shared.store._runs.get(change.run_id)
        if run is None or run.final is None or not change.events or change.claim is not None:
            return await super().one(change)
        final, run.final = run.final, None
        try:
            return await super().one(change)
        finally:
            run.final = final


class LosesUpdate(Broken):
    """Attributes are replaced, not merged."""

    async def one(self, change):
        committed = await super().one(change)
        if change.update is not None and change.update.attributes is not None:
            run = self._shared.store._runs[change.run_id]
            run.attributes = dict(change.update.attributes)
        return committed


class EndsUnseen(Broken):
    """A run may end although an input waits for it."""

    async def one(self, change):
        if change.final is RunStatus.COMPLETED and change.claim is not None:
            run = self._shared.store._runs.get(change.run_id)
            if run is not None:
                change = replace(change, seen=len(run.events))
        return await super().one(change)


class LoopsOverCommit(Broken):
    """Declares batches and sends one by one."""

    async def commit(self, changes):
        if len(changes) > 1:
            return [answer for change in changes for answer in await self.commit([change])]
        return await super().commit(changes)


class LeasesOfAll(Broken):
    """Lists the leases of all owners whose names differ in case."""

    async def leases(self, owner):
        found = [await super(LeasesOfAll, self).leases(name) for name in await self.holders()]
        return [ref for refs in found for ref in refs]


class RecoversLive(Broken):
    """A recovery ends leases, and leaves their tokens valid."""

    async def recover(self):
        for owner in await self.holders():
            await self.free(owner)


class StatusOfOneItem(Broken):
    """Derives the status from the first item of each kind."""

    async def get_run(self, run_id):
        run = await super().get_run(run_id)
        if run is None or run.status not in (RunStatus.RUNNING, RunStatus.SUSPENDED):
            return run
        first = {item.kind: item for item in reversed(await self.list_work(run_id))}
        now = await self.now()
        status = derive_status(
            final=None,
            stalled=None,
            paused=False,
            seen_seq=run.seen_seq,
            items=list(first.values()),
            now=now,
        )
        return replace(run, status=status)
