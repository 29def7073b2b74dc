"""Long names in PostgreSQL: those of 0.1.0, which stored digests, and what an index cannot have."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, ClassVar

import pytest

from pyworkflow.errors import PayloadTooLarge, StorageUnavailable
from pyworkflow.spi import (
    Change,
    Claim,
    ClaimRequest,
    Committed,
    Delta,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    ParentRef,
    Put,
    RunQuery,
    RunStatus,
    Settle,
)
from pyworkflow.storekit import failpoints, fsck
from pyworkflow_storage_sql import PostgresStorageBackend
from pyworkflow_storage_sql.postgres import _handle, _schema
from pyworkflow_storage_sql.postgres._names import Names, escape
from tests.servers import GivenServer, PostgresServer

Given = PostgresServer | GivenServer
MINUTE = timedelta(minutes=1)
#: Bytes: of what 0.1.0 kept as it was, of what migration 11 writes back, and of what it leaves.
SIZES = (600, 601, 1300, 1301, 4096)
NOT_WRITTEN_BACK = 2


def name(size: int, seed: str) -> str:
    """A name of so many bytes as it is stored, which the server cannot compress."""
    letters = random.Random(f"{size}{seed}")
    text = "\x00\x03é\x01" + "".join(
        letters.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size)
    )
    while len(escape(text).encode()) > size:
        text = text[:-1]
    assert len(escape(text).encode()) == size
    return text


class OldNames(Names):
    """The rule of 0.1.0."""

    met: ClassVar[dict[str, str]] = {}

    def column(self, name: str) -> str:
        escaped = escape(name)
        if len(escaped.encode()) > 600:
            digest = sha256(escaped.encode()).hexdigest()
            self.met[digest] = escaped
            self.learn([(digest, escaped)])
        return super().column(name)


@pytest.fixture
def url(postgres: Given) -> str:
    return postgres.database()


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As it was before migration 11; ``undo`` ends it."""
    earlier = [each for each in _schema.migrations() if each[0] < 11]
    OldNames.met = {}
    with monkeypatch.context() as patch:
        patch.setattr(_handle, "Names", OldNames)
        patch.setattr(_schema, "migrations", lambda: earlier)
        yield patch


def start(size: int) -> Change:
    return Change(
        run_id=name(size, "run"),
        key=name(size, "start"),
        create=NewRun(
            workflow=name(size, "workflow"),
            version="1",
            args="[]",
            queue=name(size, "queue"),
            idempotency_key=name(size, "key"),
            parent=ParentRef(run_id=name(size, "parent"), op="1"),
            root=name(size, "root"),
        ),
        events=[Event("workflow.started", "I", {}, key=name(size, "event"))],
    )


def outside(size: int) -> Change:
    return Change(
        run_id=name(size, "run"),
        key=name(size, "outside"),
        events=[Event("note", "I", {}, key=name(size, "note"))],
    )


def turn(size: int, claim: Claim) -> Change:
    """A step for others, and one that is claimed at once."""
    held = LeaseFor(owner="o", lease=MINUTE)
    puts = [
        Put(item_id=name(size, "step"), kind=ItemKind.STEP),
        Put(item_id=name(size, "held"), kind=ItemKind.STEP, claimed=held),
    ]
    return Change(
        run_id=claim.ref.run_id, key=name(size, "turn"), claim=claim.ref, seen=2, put=puts
    )


def end(claim: Claim) -> Change:
    event = Event("workflow.completed", "C", {"result": "1"})
    return Change(
        run_id=claim.ref.run_id, key="end", claim=claim.ref, seen=1, events=[event],
        final=RunStatus.COMPLETED, settle=Settle(),
    )  # fmt: skip


async def turn_of(store: PostgresStorageBackend, size: int) -> Claim:
    request = ClaimRequest(
        owner="o",
        lease=timedelta(days=1),
        queues=frozenset({name(size, "queue")}),
        workflows=frozenset({name(size, "workflow")}),
        kinds=frozenset({ItemKind.TURN}),
    )
    (claim,) = (await store.claim(request)).claims
    return claim


async def fill(store: PostgresStorageBackend) -> dict[int, list[tuple[Change, Committed]]]:
    """Write with names of each size; the changes and their answers."""
    sent: dict[int, list[tuple[Change, Committed]]] = {}
    for size in SIZES:
        changes = [start(size), outside(size)]
        answers = [await store.commit_one(change) for change in changes]
        changes.append(turn(size, await turn_of(store, size)))
        answers.append(await store.commit_one(changes[-1]))
        assert [item.item_id for item in answers[-1].claims] == [name(size, "held")]
        sent[size] = list(zip(changes, answers, strict=True))
    # A purged run leaves its key behind.
    purged = NewRun(workflow="w", version="1", args="[]", idempotency_key=name(601, "purged"))
    first = [Event("workflow.started", "I", {})]
    await store.commit_one(Change(run_id="purged", key="s", create=purged, events=first))
    request = ClaimRequest(owner="o", lease=MINUTE, workflows=frozenset({"w"}))
    (claim,) = (await store.claim(request)).claims
    await store.commit_one(end(claim))
    assert await store.purge(before=datetime.now(UTC) + MINUTE) == 1
    return sent


async def shown(store: PostgresStorageBackend) -> list[Any]:
    """All that the store says, but for statuses, which the clock changes."""
    found: list[Any] = []
    for size in SIZES:
        run_id = name(size, "run")
        found += [
            await store.export_run(run_id),
            await store.get_events(run_id),
            await store.list_work(run_id),
            await store.find_run(name(size, "key")),
        ]
    page = await store.list_runs(RunQuery())
    keys = await store.export_keys()
    leases = sorted(await store.leases("o"), key=str)
    return [*found, [run.run_id for run in page.items], dict(keys.items), leases]


def keep_met(postgres: Given, url: str) -> None:
    """0.1.0 wrote these before it used them."""
    for digest, text in OldNames.met.items():
        literal = "".join(f"\\{ord(c):04x}" for c in text)
        postgres.sql(f"INSERT INTO pyworkflow.names VALUES ('{digest}', U&'{literal}')", url=url)


def test_names_of_before_stay_names_whatever_their_length(
    postgres: Given, url: str, before: pytest.MonkeyPatch
) -> None:
    async def earlier() -> tuple[Any, Any]:
        async with PostgresStorageBackend(url) as store:
            return await fill(store), await shown(store)

    async def later(sent: dict[int, list[tuple[Change, Committed]]], expected: list[Any]) -> None:
        async with PostgresStorageBackend(url) as store:
            assert await shown(store) == expected
            for size, pairs in sent.items():
                for change, answer in pairs:
                    again = await store.commit_one(change)
                    assert again.duplicate
                    assert (again.seqs, again.skipped) == (answer.seqs, answer.skipped)
                    assert [i.item_id for i in again.claims] == [i.item_id for i in answer.claims]
                await goes_on(store, size, pairs[2][1])
            assert await fsck(store) == []
        # The first call of an object finds them, too.
        for size in SIZES:
            async with PostgresStorageBackend(url) as store:
                assert await store.find_run(name(size, "key")) == name(size, "run")

    sent, expected = asyncio.run(earlier())
    keep_met(postgres, url)
    digests = len(OldNames.met)
    before.undo()
    asyncio.run(later(sent, expected))
    mark = "position(E'\\x01\\x03' IN {0}) > 0"
    left = postgres.sql("SELECT count(*) FROM pyworkflow.names", url=url)
    kinds = (digests - 1) // (len(SIZES) - 1)  # but for the purged run's key
    assert int(left) == NOT_WRITTEN_BACK * kinds
    short = " AND ".join(("octet_length(run_id) < 300", mark.format("right(run_id, 66)")))
    counted = postgres.sql(f"SELECT count(*) FROM pyworkflow.runs WHERE {short}", url=url)
    assert int(counted) == NOT_WRITTEN_BACK


async def goes_on(store: PostgresStorageBackend, size: int, answer: Committed) -> None:
    """The run continues: its names are compared as names, by what writes and by what claims."""
    run_id = name(size, "run")
    same = Change(
        run_id=run_id, key="again", events=[Event("note", "I", {}, key=name(size, "note"))]
    )
    assert (await store.commit_one(same)).skipped == {0}
    new = Change(run_id=run_id, key="new", events=[Event("note", "I", {}, key="k" * 512)])
    assert (await store.commit_one(new)).skipped == frozenset()
    refs = [(run_id, name(size, "step"))]
    (claim,) = (await store.claim(ClaimRequest(owner="p", lease=MINUTE, items=refs))).claims
    assert claim.run.workflow == name(size, "workflow")
    assert await store.renew([claim.ref], MINUTE) == [True]
    assert await store.release(claim.ref)
    assert (await store.list_runs(RunQuery(workflow=claim.run.workflow))).items[0].run_id == run_id
    assert answer.claims[0].lease is not None


def test_a_migration_that_is_cut_off_changes_nothing_and_is_made_by_the_next(
    postgres: Given, url: str, before: pytest.MonkeyPatch
) -> None:
    async def earlier() -> list[Any]:
        async with PostgresStorageBackend(url) as store:
            await fill(store)
            return await shown(store)

    async def cut_off() -> None:
        with pytest.raises(StorageUnavailable):
            await PostgresStorageBackend(url).open()

    async def later() -> list[Any]:
        async with PostgresStorageBackend(url) as store:
            return await shown(store)

    expected = asyncio.run(earlier())
    keep_met(postgres, url)
    before.undo()
    dumped = "SELECT count(*), max(number) FROM pyworkflow.names, pyworkflow.migrations"
    stored = postgres.sql(dumped, url=url)
    failpoints.read("postgres.migrating=raise")
    try:
        asyncio.run(cut_off())
    finally:
        failpoints.read("")
    assert postgres.sql(dumped, url=url) == stored
    assert asyncio.run(later()) == expected


def test_a_name_that_no_index_can_have_is_refused_and_asked_for_without_an_error(url: str) -> None:
    long = name(3000, "run")

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            new = NewRun(workflow="w", version="1", args="[]")
            with pytest.raises(PayloadTooLarge, match=r"a name size=\d+ limit=2704") as caught:
                await store.commit_one(Change(run_id=long, key="s", create=new))
            assert caught.value.limited_by == "store"
            assert await store.get_run(long) is None
            assert await store.find_run(long) is None
            assert await store.get_events(long) == []

    asyncio.run(main())


def test_a_copy_brings_no_run_id_that_leaves_no_room_for_keys(url: str) -> None:
    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            for size in (2000, 2001):
                new = NewRun(workflow="w", version="1", args="[]")
                await store.commit_one(Change(run_id=name(size, "run"), key="s", create=new))
            parts = [await store.export_run(name(size, "run")) for size in (2000, 2001)]
        async with PostgresStorageBackend(url, namespace="to") as store:
            fits, too_long = [Delta([part]) for part in parts if part is not None]
            await store.import_delta(fits)
            note = Event("note", "I", {}, key="k" * 512)
            run_id = name(2000, "run")
            await store.commit_one(Change(run_id=run_id, key="c" * 512, events=[note]))
            with pytest.raises(PayloadTooLarge, match="a run id size=2001 limit=2000"):
                await store.import_delta(too_long)

    asyncio.run(main())


def test_keys_of_1024_letters_come_in_by_a_copy(url: str) -> None:
    async def copied(key: str) -> Sequence[Any]:
        async with PostgresStorageBackend(url, namespace="from") as store:
            new = NewRun(workflow="w", version="1", args="[]", idempotency_key=key)
            await store.commit_one(Change(run_id="r", key="s", create=new))
            part = await store.export_run("r")
            (taken,) = (await store.export_keys()).items
        assert part is not None
        async with PostgresStorageBackend(url, namespace="to") as store:
            await store.import_delta(Delta([part], taken=dict([taken])))
            return [await store.find_run(key), (await store.export_keys()).items[0][0]]

    key = name(2048, "key")
    assert asyncio.run(copied(key)) == ["r", key]
