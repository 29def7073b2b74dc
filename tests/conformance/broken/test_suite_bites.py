"""Each deliberately broken store is failed by the check that is there for it."""

from __future__ import annotations

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.spi import Capabilities
from pyworkflow_conformance import StorageConformance
from tests.conformance.broken import stores

CAUGHT = [
    (stores.LostAppend, "ORD_02"),
    (stores.TwoHolders, "CLM_03"),
    (stores.TwoHolders, "CCY_01"),
    (stores.StaleFence, "CLM_07"),
    (stores.StaleFence, "CCY_04"),
    (stores.OutOfOrder, "ORD_05"),
    (stores.SwallowedWakeUp, "DUE_01"),
    (stores.TornBatch, "CON_07"),
    (stores.KeyTwice, "IDM_05"),
    (stores.KeyTwice, "IDM_09"),
    (stores.OwnClock, "TIM_01"),
    (stores.ClaimsNotCounted, "CLM_14"),
    (stores.SameToken, "CLM_05"),
    (stores.RenewsWhatIsLost, "CLM_11"),
    (stores.ReleaseResetsDue, "MOD_02"),
    (stores.PurgesOpenRuns, "GC_01"),
    (stores.PurgeFreesKeys, "GC_03"),
    (stores.NumberedPages, "ORD_09"),
    (stores.NumberedPages, "PAG_05"),
    (stores.AppliesTwice, "IDM_13"),
    (stores.SeenByAnybody, "DUE_04"),
    (stores.PausedWorks, "CTL_01"),
    (stores.EndDropsDeliveries, "CTL_07"),
    (stores.TimeGoesBack, "ORD_04"),
    (stores.RoundsNumbers, "PAY_06"),
    (stores.AcknowledgesEarly, "ORD_08"),
    (stores.OneNamespace, "META_04"),
    (stores.MissesChanges, "WATCH_02"),
    (stores.SettleKeepsEarlier, "CLM_22"),
    (stores.KeyBeforeRun, "CON_06"),
    (stores.ClosedRunTakesInput, "CON_04"),
    (stores.LosesUpdate, "CON_08"),
    (stores.EndsUnseen, "CLM_20"),
    (stores.LoopsOverCommit, "META_05"),
    (stores.LeasesOfAll, "CLM_29"),
    (stores.RecoversLive, "CLM_31"),
    (stores.StatusOfOneItem, "DUE_06"),
]


def check(kind: type[MemoryStorageBackend], check_id: str) -> None:
    made: dict[str, MemoryStorageBackend] = {}

    class Suite(StorageConformance):
        capabilities = MemoryStorageBackend().info().capabilities

        async def make(self, namespace):
            return made.setdefault(namespace, kind(namespace=namespace)).clone()

    (name,) = (name for name in dir(Suite) if name.startswith(f"test_{check_id}_"))
    getattr(Suite(), name)()


@pytest.mark.parametrize(("kind", "check_id"), CAUGHT)
def test_the_named_check_fails_the_broken_store(kind, check_id):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        check(kind, check_id)


@pytest.mark.parametrize("check_id", sorted({check_id for _, check_id in CAUGHT}))
def test_the_same_check_passes_the_sound_store(check_id):
    check(MemoryStorageBackend, check_id)


class Sound(StorageConformance):
    """The suite on the memory store, to be varied by tests."""

    __test__ = False
    capabilities = MemoryStorageBackend().info().capabilities

    async def make(self, namespace):
        made = vars(self).setdefault("made", {})
        return made.setdefault(namespace, MemoryStorageBackend(namespace=namespace)).clone()


@pytest.mark.parametrize(
    "members",
    [
        {"test_CON_01_create_then_get": lambda self: None},
        {"test_CON_01_create_then_get": None},
        {"test_CON_01_create_then_get": pytest.mark.xfail(lambda self: None)},
    ],
    ids=["overridden", "taken away", "xfail without a reason"],
)
def test_an_override_is_noticed(members):
    suite = type("Skips", (Sound,), {"__test__": True, **members})
    with pytest.raises(AssertionError, match="CON_01"):
        suite().test_META_01_no_overrides()


def test_a_class_that_is_not_collected_or_skipped_is_noticed():
    with pytest.raises(AssertionError, match="__test__"):
        Sound().test_META_01_no_overrides()
    skipped = type("Skips", (Sound,), {"__test__": True, "pytestmark": [pytest.mark.skip]})
    with pytest.raises(AssertionError, match="skipped"):
        skipped().test_META_01_no_overrides()


def test_an_xfail_with_a_reason_is_allowed():
    class Marks(Sound):
        __test__ = True

        @pytest.mark.xfail(reason="no such thing")
        def test_CON_01_create_then_get(self): ...

    Marks().test_META_01_no_overrides()


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [
        (Capabilities(gaps={"CON-99": "x"}), "names no check"),
        (Capabilities(gaps={"CON-01": " "}), "no reason"),
        (Capabilities(large_history=True, gaps={"PAY-05": "x"}), "large_history is declared"),
    ],
)
def test_gaps_that_say_nothing_are_noticed(capabilities, text):
    suite = type("Gaps", (Sound,), {"capabilities": capabilities})
    with pytest.raises(AssertionError, match=text):
        suite().test_META_03_declared_caps_proved()


def test_a_gap_that_fails_is_expected_and_one_that_passes_must_go():
    class Gaps(Sound):
        capabilities = Capabilities(gaps={"ORD-05": "newest first", "CON-10": "not there"})

        async def make(self, namespace):
            made = vars(self).setdefault("made", {})
            return made.setdefault(namespace, stores.OutOfOrder(namespace=namespace)).clone()

    with pytest.raises(pytest.xfail.Exception, match="newest first"):
        Gaps().test_ORD_05_read_after_excludes()
    with pytest.raises(pytest.fail.Exception, match="CON-10 is declared a gap and passes"):
        Gaps().test_CON_10_get_missing_none()


def test_a_failure_tells_seed_calls_and_state():
    class Fails(Sound):
        seed = 41

        async def make(self, namespace):
            made = vars(self).setdefault("made", {})
            return made.setdefault(namespace, stores.OutOfOrder(namespace=namespace)).clone()

    with pytest.raises(AssertionError) as caught:
        Fails().test_ORD_05_read_after_excludes()
    (told,) = caught.value.__notes__
    assert "check=ORD-05 seed=41" in told
    assert "PYWORKFLOW_CONFORMANCE_SEED=41 pytest -k ORD_05" in told
    assert "state check (fsck): " in told
    assert "store 1: commit_one(Change(run_id='run', key='start'" in told
    assert "get_events('run'" in told
