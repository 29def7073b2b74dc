"""Outages of the store: growing pauses, few log lines, quick recovery (found.md M2)."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta

import pytest

from pyworkflow import step, workflow
from pyworkflow._engine import outages as outages_module
from pyworkflow._engine.outages import Backoff, OutageLog, Outages
from pyworkflow.errors import StorageFull, StorageUnavailable
from pyworkflow.spi import Claimed, ClaimRef, ClaimRequest
from pyworkflow.storage.memory import MemoryStorageBackend
from tests.core._driving import bench, eventually

AWAY = StorageUnavailable("the server cannot be reached")


class Away(MemoryStorageBackend):
    """A store that can be made unreachable."""

    away = False
    failed = 0

    def _look(self) -> None:
        if self.away:
            self.failed += 1
            raise AWAY

    async def claim(self, request: ClaimRequest) -> Claimed:
        self._look()
        return await super().claim(request)

    async def now(self):  # type: ignore[no-untyped-def]
        self._look()
        return await super().now()

    async def watch(self, run_id: str | None, *, after: int, timeout: timedelta) -> bool:
        self._look()
        return await super().watch(run_id, after=after, timeout=timeout)

    async def leases(self, owner: str) -> list[ClaimRef]:
        self._look()
        return await super().leases(owner)


@step
async def ou_one() -> int:
    return 1


@workflow
async def ou_flow() -> int:
    return await ou_one()


def test_found_m02_an_outage_is_logged_once_then_once_a_minute_then_at_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(outages_module, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, "pyworkflow.engine")

    async def probe() -> None: ...

    outages = Outages(probe, "me")
    for _ in range(700):  # an hour and ten minutes, a failure every 6 s
        outages.failed("claim", "no work can be claimed", AWAY)
        now += 6
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "no work can be claimed: the server cannot be reached"
    assert lines[1].startswith("no work can be claimed: still failing: failures=11 seconds=60")
    assert 60 <= len(lines) <= 71
    caplog.clear()
    outages.worked("commit")
    assert not caplog.records
    outages.worked("claim")
    outages.worked("claim")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "works again: operation=claim failures=700 seconds=4200" in line


def test_found_m02_what_fails_and_works_in_turn_is_one_warning_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(outages_module, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, "test.outages")
    log = OutageLog("the broker", logging.getLogger("test.outages"))
    for _ in range(10):  # ten times twelve seconds
        for _ in range(100):
            log.failed("send", "nothing is sent", AWAY)
            log.worked("send")
        now += 12
    shown = [record.getMessage() for record in caplog.records]
    assert len(shown) == 4
    assert shown[0] == "nothing is sent: the server cannot be reached"
    assert shown[1].startswith("the broker works again: operation=send failures=1 seconds=0")
    assert shown[2].startswith("nothing is sent: still failing: failures=501 seconds=60")
    assert shown[3].startswith("the broker works again: operation=send failures=501 seconds=60")
    # After a quiet minute an outage is a new one.
    now += 120
    caplog.clear()
    log.failed("send", "nothing is sent", AWAY)
    assert [r.getMessage() for r in caplog.records] == [shown[0]]


def test_found_m02_a_server_that_stood_still_ends_the_pauses_when_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages_module, "PROBE_EVERY_S", 0.01)

    async def main() -> None:
        asked, answers = asyncio.Event(), asyncio.Event()

        async def probe() -> None:
            asked.set()
            await answers.wait()

        outages = Outages(probe, "me")
        pause = asyncio.create_task(outages.pause(600.0))
        await asked.wait()
        await asyncio.sleep(0.02)
        answers.set()
        await asyncio.wait_for(pause, 60)
        outages.close()

    asyncio.run(main())


def test_found_m02_pauses_double_to_five_seconds_with_jitter() -> None:
    async def probe() -> None: ...

    backoff = Backoff(Outages(probe, "a").jitter)
    pauses = [backoff.seconds(AWAY) for _ in range(12)]
    assert pauses[0] <= 0.05
    assert all(3.75 <= pause <= 5.0 for pause in pauses[7:])
    assert len(set(pauses[7:])) > 1
    other = Backoff(Outages(probe, "b").jitter)
    assert pauses != [other.seconds(AWAY) for _ in range(12)]
    backoff.reset()
    assert backoff.seconds(AWAY) <= 0.05
    # A store that answers and refuses is asked each second: no probe shows when it is over.
    full = Backoff(Outages(probe, "a").jitter)
    assert max(full.seconds(StorageFull("no space")) for _ in range(12)) <= 1.0


def test_found_m02_a_worker_works_within_a_second_of_the_stores_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages_module, "FIRST_PAUSE_S", 30.0)
    monkeypatch.setattr(outages_module, "LONGEST_PAUSE_S", 30.0)

    async def main() -> float:
        store = Away()
        async with bench(store) as b:
            await eventually(lambda: b.worker is not None and b.worker.recovery is not None)
            store.away = True
            # One failed claim, whose pause is long, and a probe that was not answered.
            await eventually(lambda: store.failed >= 5)
            store.away = False
            began = time.monotonic()
            run_id = await b.start(ou_flow)
            assert await b.result(run_id) == 1
            return time.monotonic() - began

    # A second, and what a busy machine needs; the pause is 22 s at least.
    assert asyncio.run(main()) < 15


def test_found_m02_an_hour_of_an_idle_workers_outage_is_a_handful_of_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        store = Away()
        async with bench(store):
            store.away = True
            await eventually(lambda: store.failed >= 20)
            store.away = False
            await eventually(lambda: any("works again" in r.getMessage() for r in caplog.records))

    caplog.set_level(logging.INFO, "pyworkflow.engine")
    asyncio.run(main())
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert 1 <= len(warnings) <= 4, warnings
