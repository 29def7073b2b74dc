"""Errors of stores say what fits: a server has no offset, and its limit is no setting."""

from __future__ import annotations

import pickle

import pytest

from pyworkflow.errors import PayloadTooLarge, StorageDamaged
from pyworkflow.events import Event
from pyworkflow.spi import Change
from pyworkflow.storekit import check_change


def test_d10_damage_in_a_server_has_a_place_and_no_offset() -> None:
    error = StorageDamaged("table runs, run 'x'", None, "no JSON")
    assert str(error).startswith("the store is damaged: place=table runs, run 'x': no JSON;")
    assert "offset" not in str(error)
    assert "file" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.file, again.offset, again.detail) == ("table runs, run 'x'", None, "no JSON")
    assert "file=a.log offset=7" in str(StorageDamaged("a.log", 7, "torn"))
    assert "move it aside" in str(StorageDamaged("a.log", 7, "torn"))
    assert "move it aside" not in str(StorageDamaged("a.db", 0, "an event: run_id=r seq=1"))


def test_d10_a_limit_of_the_store_is_not_blamed_on_a_setting() -> None:
    error = PayloadTooLarge("a change", 9, 8, "store")
    assert "max_payload" not in str(error)
    assert "the limit of the store" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "raise the setting max_payload" in str(PayloadTooLarge("a value", 9, 8))
    assert PayloadTooLarge("a value", 9, 8).args == ("a value", 9, 8)


@pytest.mark.parametrize("events", [1, 9])
def test_d10_check_change_names_the_store(events: int) -> None:
    event = Event("log.info", "O", {"message": "x" * 50})
    change = Change(run_id="run", key="k", events=[event] * events)
    with pytest.raises(PayloadTooLarge) as caught:
        check_change(change, max_payload=40, max_events=8)
    assert caught.value.limited_by == "store"
