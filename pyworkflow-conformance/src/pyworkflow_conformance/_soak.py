"""Layer L6 (group SOAK): eight clients for a while; every run's log is linear."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from time import monotonic

from pyworkflow.errors import Fenced
from pyworkflow.spi.storage import Change, ClaimRequest, Settle, StorageBackend
from pyworkflow_conformance._case import (
    Case,
    Suite,
    command,
    in_threads,
    incoming,
    note,
    scenario,
    seconds,
    under,
)
from pyworkflow_conformance._children import sizes

__all__ = ["SoakChecks"]

CLIENTS = 8
RUNS = 5


@dataclass(slots=True)
class _Told:
    """One acknowledged change, with the time around it."""

    run_id: str
    key: str
    seqs: list[int]
    before: float
    after: float


class SoakChecks(Suite):
    """SOAK."""

    @scenario
    async def test_SOAK_01_eight_clients(self, t: Case) -> None:
        """SOAK-01 (L6, I2, I10): what eight clients do for a while has one order in every run.

        A change that was acknowledged before another was sent comes before it; claims exclude
        each other; reads see what was acknowledged. Usual cause: reads from a copy that lags, or
        numbers given out before the lock is held.
        """
        for n in range(RUNS):
            await t.start(f"run-{n}")
        limit = 60.0 if os.environ.get("PYWORKFLOW_FULL") == "1" else 2.0
        most = sizes(120, 100_000)
        seed = int(getattr(self, "seed", 0))

        async def work(store: StorageBackend, client: int) -> list[_Told]:
            return await _client(store, client, random.Random(seed * 100 + client), limit, most)

        told = [one for found in await in_threads(t, CLIENTS, work) for one in found]
        for n in range(RUNS):
            run_id = f"run-{n}"
            mine = [one for one in told if one.run_id == run_id]
            events = await t.store.get_events(run_id)
            assert [e.seq for e in events] == list(range(1, len(events) + 1))
            by_key: dict[str, list[int]] = {}
            for event in events[1:]:
                by_key.setdefault(str(event.data["change"]), []).append(event.seq)
            assert by_key == {one.key: one.seqs for one in mine}, "lost, doubled or unacknowledged"
            # Real time orders what did not overlap.
            latest, mine_by_end = 0, sorted(mine, key=lambda one: one.after)
            done = 0
            for one in sorted(mine, key=lambda one: one.before):
                while done < len(mine_by_end) and mine_by_end[done].after < one.before:
                    latest = max(latest, mine_by_end[done].seqs[-1])
                    done += 1
                assert one.seqs[0] > latest, f"{one.key} was put before what was there already"


async def _client(
    store: StorageBackend, client: int, chance: random.Random, limit: float, most: int
) -> list[_Told]:
    told: list[_Told] = []
    end = monotonic() + limit
    for n in range(most):
        if monotonic() > end:
            break
        key, run_id = f"{client}:{n}", f"run-{chance.randrange(RUNS)}"
        if chance.random() < 0.5:
            made = [incoming(change=key), note()][: 1 + chance.randrange(2)]
            events = [e._replace(data={**e.data, "change": key}) for e in made]
            change = Change(run_id=run_id, key=key, events=events)
            told.append(await _commit(store, change, key))
            continue
        request = ClaimRequest(
            owner=f"client-{client}",
            lease=seconds(60),
            limit=1 + chance.randrange(2),
            known={run_id: chance.randrange(9)},
        )
        for claim in (await store.claim(request)).claims:
            run_id = claim.item.run_id
            mark = f"{key}:{run_id}"
            # Nobody else holds the turn, so what was delivered is what this client delivered.
            length = claim.after + len(claim.events)
            if claim.cut:  # the history is longer than a claim brings
                length = max(length, claim.run.seen_seq)
            assert claim.run.seen_seq <= length
            change = under(
                claim,
                seen=length,
                events=[command(change=mark)],
                settle=Settle(reschedule_at=(await store.now())),
            )
            try:
                told.append(await _commit(store, change, mark))
            except Fenced as error:
                raise AssertionError("a claim that was held was fenced") from error
    return told


async def _commit(store: StorageBackend, change: Change, key: str) -> _Told:
    before = monotonic()
    answer = await store.commit_one(change)
    after = monotonic()
    read = await store.get_events(change.run_id, after=answer.seqs[0] - 1, limit=len(answer.seqs))
    assert [e.seq for e in read] == list(answer.seqs), "what was acknowledged is not there to read"
    run = await store.get_run(change.run_id)
    assert run is not None
    assert run.history_length >= answer.last_seq, "the run is older than its acknowledged change"
    return _Told(change.run_id, key, list(answer.seqs), before, after)
