"""The pure rules of items, purged runs and keys: what a backend writes besides ``decide``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Lease, WorkItem
from pyworkflow.spi import ClaimRef, ClaimRequest, KeyMark, RunDelta
from pyworkflow.storekit import (
    claimable,
    claimed,
    freed,
    imported,
    is_free,
    key_owner,
    notified,
    postponed,
    purgeable,
    released,
    renewed,
    tombstone,
    wakes_at,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
S = timedelta(seconds=1)
REF = ClaimRef("run", "turn", "t1")


def item(kind: ItemKind = ItemKind.TURN, **fields: object) -> WorkItem:
    values = {
        "run_id": "run",
        "item_id": "turn",
        "kind": kind,
        "queue": "default",
        "priority": 0,
        "due_at": NOW,
        "payload": {},
        "claims": 0,
        "lease": None,
        "rung_at": None,
    }
    return WorkItem(**(values | fields))


def lease(until: datetime, *, owner: str = "a", token: str = "t1") -> Lease:
    return Lease(owner=owner, token=token, until=until)


def test_d02_an_item_is_free_when_due_unleased_and_not_paused() -> None:
    assert is_free(item(), paused=False, now=NOW)
    assert not is_free(item(due_at=NOW + S), paused=False, now=NOW)
    assert not is_free(item(), paused=True, now=NOW)
    assert is_free(item(ItemKind.DELIVER), paused=True, now=NOW)
    assert is_free(item(lease=lease(NOW)), paused=False, now=NOW)
    assert not is_free(item(lease=lease(NOW + S)), paused=False, now=NOW)


def test_d02_an_item_is_free_from_the_instant_at_which_it_wakes() -> None:
    for held in (None, lease(NOW - S), lease(NOW + S), lease(NOW + 3 * S)):
        for due_at in (NOW, NOW + 2 * S):
            each = item(due_at=due_at, lease=held)
            wake = wakes_at(each, paused=False)
            assert wake is not None
            assert is_free(each, paused=False, now=wake)
            assert not is_free(each, paused=False, now=wake - timedelta(microseconds=1))
    assert wakes_at(item(), paused=True) is None
    assert wakes_at(item(ItemKind.DELIVER), paused=True) == NOW


def test_d02_deliveries_pass_the_filter_of_workflows() -> None:
    def takes(each: WorkItem, **filters: frozenset[str]) -> bool:
        request = ClaimRequest(owner="a", lease=S, **filters)
        return claimable(each, request, paused=False, workflow="flow", now=NOW)

    assert takes(item(), queues=frozenset({"default"}), workflows=frozenset({"flow"}))
    assert not takes(item(), workflows=frozenset({"other"}))
    assert takes(item(ItemKind.DELIVER), workflows=frozenset({"other"}))
    assert not takes(item(ItemKind.DELIVER), queues=frozenset({"other"}))
    assert not takes(item(), kinds=frozenset({ItemKind.STEP}))


def test_d02_a_claim_counts_and_ends_rung_at() -> None:
    taken = claimed(item(rung_at=NOW, claims=2), owner="a", token="t1", until=NOW + S)
    assert (taken.claims, taken.rung_at, taken.lease) == (3, None, lease(NOW + S))


def test_d02_a_renewal_keeps_rung_at_and_counts_the_token_alone() -> None:
    kept = renewed(item(lease=lease(NOW - S), rung_at=NOW - S), REF, S, now=NOW)
    assert kept is not None
    assert (kept.rung_at, kept.lease) == (NOW - S, lease(NOW + S))
    assert renewed(item(lease=lease(NOW + S, token="t2")), REF, S, now=NOW) is None
    assert renewed(item(), REF, S, now=NOW) is None
    assert renewed(None, REF, S, now=NOW) is None


def test_d02_a_release_ends_rung_at_and_is_not_counted() -> None:
    held = item(lease=lease(NOW - S), rung_at=NOW, claims=2, due_at=NOW - S)
    free = released(held, REF, None, now=NOW)
    assert free == item(claims=1, due_at=NOW - S)
    assert released(held, REF, 5 * S, now=NOW) == item(claims=1, due_at=NOW + 5 * S)
    assert released(item(lease=lease(NOW + S, token="t2")), REF, None, now=NOW) is None
    assert released(None, REF, None, now=NOW) is None


def test_d02_a_notification_is_muted_until_its_time_is_over() -> None:
    assert notified(item(rung_at=NOW - S), 2 * S, now=NOW) is None
    again = notified(item(rung_at=NOW - 2 * S, lease=lease(NOW)), 2 * S, now=NOW)
    assert again == item(rung_at=NOW, lease=lease(NOW))


def test_d02_free_ends_rung_at_moves_due_at_and_keeps_the_count_and_the_token() -> None:
    held = item(lease=lease(NOW + S), rung_at=NOW, claims=2, due_at=NOW + 9 * S)
    assert freed(held, "a", now=NOW) == item(lease=lease(NOW), claims=2, due_at=NOW)
    early = item(lease=lease(NOW + S), due_at=NOW - S)
    assert freed(early, "a", now=NOW) == item(lease=lease(NOW), due_at=NOW - S)
    assert freed(held, "b", now=NOW) is None
    assert freed(item(lease=lease(NOW)), "a", now=NOW) is None
    assert freed(item(), "a", now=NOW) is None


def test_d02_a_postponed_lease_keeps_rung_at() -> None:
    held = item(lease=lease(NOW), rung_at=NOW)
    assert postponed(held, S) == item(lease=lease(NOW + S), rung_at=NOW)
    assert postponed(item(), S) is None


def test_d02_purge_compares_strictly_and_keeps_runs_with_items_or_an_open_parent() -> None:
    def goes(ended: datetime | None, *, items: tuple[str, ...] = (), parent: bool = False) -> bool:
        return purgeable(ended, before=NOW, items=items, parent_open=parent)

    assert goes(NOW - timedelta(microseconds=1))
    assert not goes(NOW)
    assert not goes(None)
    assert not goes(NOW - S, items=("deliver:1",))
    assert not goes(NOW - S, parent=True)


def test_d02_a_tombstone_counts_from_the_end_of_the_run() -> None:
    mark = tombstone("run", NOW - S, 2 * S, now=NOW)
    assert mark == KeyMark("run", NOW + S)
    assert key_owner(mark, now=NOW) == "run"
    assert key_owner(mark, now=NOW + S) is None
    assert tombstone("run", NOW - S, S, now=NOW) is None
    assert key_owner(KeyMark("run"), now=NOW + timedelta(days=9999)) == "run"
    assert key_owner(None, now=NOW) is None


def test_d02_an_import_skips_what_is_there_and_refuses_a_gap() -> None:
    events = [Event("log.info", "O", {}, None, None, "run", seq, NOW) for seq in (2, 3)]
    part = RunDelta("run", {"number": 7, "version": "1"}, events, gone=["turn", "step:1"])
    new = imported(part, 2, {"turn"})
    assert (new.fields, new.events, new.gone) == ({"version": "1"}, events[1:], ["turn"])
    assert imported(part, 3, ()).events == []
    with pytest.raises(ValueError, match="last_seq=0 next=2"):
        imported(part, None, ())
    assert part.fields["number"] == 7
