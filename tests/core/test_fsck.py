from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from pyworkflow._clock import EPOCH
from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Lease, RunStatus
from pyworkflow.spi import Change, ClaimRequest, NewRun, Put
from pyworkflow.storekit._fsck import fsck

HOUR = timedelta(hours=1)


async def sound():
    store = MemoryStorageBackend()
    for run_id in ("open", "done"):
        await store.commit_one(
            Change(
                run_id=run_id,
                key="start",
                create=NewRun(workflow="w", version="1", args="[]", idempotency_key=run_id),
                events=[Event("workflow.started", "I", {}), Event("log.info", "O", {}, key="k")],
                put=[Put(item_id="step:1", kind=ItemKind.STEP)],
            )
        )
        await store.claim(ClaimRequest(owner="o", lease=HOUR, limit=5))
    (turn,) = [i for i in await store.list_work("done") if i.item_id == "turn"]
    from pyworkflow.spi import ClaimRef

    ref = ClaimRef("done", "turn", turn.lease.token)
    done = Event("workflow.completed", "C", {})
    await store.commit_one(
        Change(
            run_id="done",
            key=f"{ref.token}:1",
            claim=ref,
            seen=1,
            events=[done],
            final=RunStatus.COMPLETED,
        )
    )
    return store


def state(store, run_id):
    return store._shared.store._runs[run_id]


def event(run_id, index, /, **fields):
    def damage(store):
        run = state(store, run_id)
        run.events[index] = run.events[index]._replace(**fields)

    return damage


def row(run_id, /, **fields):
    def damage(store):
        for name, value in fields.items():
            setattr(state(store, run_id), name, value)

    return damage


def item(item_id, /, **fields):
    def damage(store):
        items = state(store, "open").items
        items[item_id] = replace(items[item_id], **fields)

    return damage


def no_turn(store):
    del state(store, "open").items["turn"]


def leftover(store):
    state(store, "done").items["turn"] = replace(
        state(store, "open").items["turn"], run_id="done", lease=None
    )


def stolen_key(store):
    store._shared.store._keys["open"].owner = "done"


def same_token(store):
    items = state(store, "open").items
    items["step:1"] = replace(items["step:1"], lease=items["turn"].lease)


DAMAGE = [
    ("I2", "not dense", event("open", 1, seq=3)),
    ("I2", "decrease", event("open", 0, timestamp=EPOCH + timedelta(days=99_999))),
    ("I2", "another run", event("open", 1, run_id="done")),
    ("I2", "class", event("open", 1, klass="X")),
    ("I7", "one key", event("done", 2, key="k")),
    ("run", "begins with", event("open", 0, type="log.info")),
    ("run", "seen_seq", row("open", seen_seq=9)),
    ("run", "started_at", row("open", started_at=EPOCH)),
    ("run", "finished_at", row("open", finished_at=EPOCH)),
    ("run", "updated_at", row("done", updated_at=EPOCH)),
    ("I8", "after the end", row("done", finished_at=EPOCH)),
    ("I7", "another's", stolen_key),
    ("I5", "no turn", no_turn),
    ("I8", "owns 'turn'", leftover),
    ("items", "another run", item("turn", run_id="done")),
    ("items", "kind and id", item("turn", kind=ItemKind.STEP)),
    ("items", "claims=-1", item("turn", claims=-1)),
    ("I6", "never claimed", item("turn", claims=0)),
    ("I4", "without owner", item("turn", lease=Lease(owner="", token="t", until=EPOCH))),
    ("I4", "one token", same_token),
]


def test_a_sound_store_has_no_violation():
    async def main():
        assert await fsck(await sound()) == []

    asyncio.run(main())


@pytest.mark.parametrize(("rule", "text", "damage"), DAMAGE)
def test_damage_is_named(rule, text, damage):
    async def main():
        store = await sound()
        damage(store)
        found = await fsck(store)
        assert any(v.rule == rule and text in v.detail for v in found), found
        assert "run_id=" in str(found[0])

    asyncio.run(main())


def test_a_run_that_changes_while_it_is_read_is_read_again():
    class Busy(MemoryStorageBackend):
        left = 3

        async def get_events(self, run_id, *, after=0, limit=None):
            events = await super().get_events(run_id, after=after, limit=limit)
            if self.left:
                self.left -= 1
                await self.commit_one(
                    Change(run_id=run_id, key=f"k{self.left}", events=[Event("log.info", "O", {})])
                )
            return events

    async def main():
        store = Busy()
        store._shared = (await sound())._shared
        assert await fsck(store) == []
        assert store.left == 0

    asyncio.run(main())
