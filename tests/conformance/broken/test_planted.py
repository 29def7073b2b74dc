"""Faults that once reached FULL: each is failed by the check that was made for it."""

from __future__ import annotations

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow_conformance import run_conformance, summary
from tests.conformance.broken import planted as planted_stores
from tests.conformance.broken.planted import PLANTED
from tests.conformance.broken.test_suite_bites import check


def planted(entry):
    """Parametrize a test by the broken stores of an entry, and the checks that fail them."""
    found = [
        pytest.param(kind, check_id, id=f"{kind.__name__}-{check_id}")
        for one, kind, check_id in PLANTED
        if one == entry
    ]
    assert found
    return pytest.mark.parametrize(("kind", "check_id"), found)


def is_failed(kind, check_id):
    with pytest.raises(Exception) as failure:  # noqa: PT011 - a broken store breaks in any way
        check(kind, check_id)
    assert check_id.replace("_", "-") in "\n".join(failure.value.__notes__)


@planted("g01")
def test_g01_what_is_lost_at_the_declared_limit_is_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g02")
def test_g02_names_that_count_by_a_prefix_are_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g03")
def test_g03_a_pause_that_new_items_ignore_is_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g04")
def test_g04_a_claim_that_does_not_take_the_oldest_is_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g05")
def test_g05_what_ends_with_the_first_page_is_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g06")
def test_g06_names_compared_without_case_accents_or_blanks_are_noticed(kind, check_id):
    is_failed(kind, check_id)


@planted("g07")
def test_g07_a_change_larger_than_a_packet_is_noticed(kind, check_id):
    is_failed(kind, check_id)


class ManyFaults(
    planted_stores.PauseIgnoredForNew,
    planted_stores.ClaimsByRun,
    planted_stores.ExportsOnePageOfKeys,
    planted_stores.EventsLostAfter5000,
    planted_stores.FoldsOwners,
):
    """Wrong in five ways."""


def test_a_store_with_many_faults_reaches_no_level():
    made = {}

    def make(namespace):
        return made.setdefault(namespace, ManyFaults(namespace=namespace)).clone()

    checks = ["PAY-08", "CTL", "CLM-30", "CPY-11", "UNI-11", "CON"]
    report = run_conformance(make, profile="full", only=checks)
    failed = {one.id for one in report.results if one.status == "failed"}
    assert failed == {"PAY-08", "CTL-09", "CLM-30", "CPY-11", "UNI-11"}
    assert report.level is None
    assert not any(judged.reached for judged in report.levels.values())
    assert "reaches no level" in summary(report)


@pytest.mark.parametrize("check_id", sorted({check_id for *_, check_id in PLANTED}))
def test_the_same_check_passes_the_sound_store(check_id):
    check(MemoryStorageBackend, check_id)
