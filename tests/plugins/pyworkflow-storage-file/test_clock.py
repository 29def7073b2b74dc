"""The clock of the file store: it never stops, never goes back, and keeps the pace of real time."""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from pyworkflow.spi import Change, ClaimRequest, ItemKind, NewRun, Put, RunStatus
from pyworkflow_storage_file import FileStorageBackend
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._lock import Marker

MINUTE = timedelta(minutes=1)
DAY = 86_400
FIRST = datetime.fromtimestamp(1_800_000_000, UTC)


class Machine(Calls):
    """A machine whose clocks the test moves."""

    def __init__(self, ahead=0):
        self.wall = (1_800_000_000 + ahead) * 10**9
        self.boot = 10**12

    def clocks(self):
        return self.wall, self.boot

    def advance(self, seconds):
        self.wall += int(seconds * 10**9)
        self.boot += int(seconds * 10**9)


def on(machine, path):
    backend = FileStorageBackend(path)
    backend._calls = machine
    return backend


def create(run_id, due=timedelta(0), now=FIRST):
    return Change(
        run_id=run_id,
        key="start",
        create=NewRun(workflow="w", version="1", args="[]"),
        put=[Put(item_id="turn", kind=ItemKind.TURN, due_at=now + due)],
    )


def shown(backend):
    async def main():
        async with backend:
            return await backend.now()

    return asyncio.run(main())


def test_found_h05_after_a_wall_clock_that_was_ahead_time_passes_at_its_pace(tmp_path):
    wrong, right = Machine(ahead=2 * DAY), Machine()

    async def main():
        async with on(wrong, tmp_path) as backend:
            ahead = await backend.now()
            await backend.commit_one(create("r", due=timedelta(seconds=1), now=ahead))
        assert ahead == FIRST + timedelta(days=2)
        right.advance(0.5)
        async with on(right, tmp_path) as backend:
            request = ClaimRequest(owner="o", lease=MINUTE)
            assert await backend.now() == ahead + timedelta(seconds=0.5)
            assert not (await backend.claim(request)).claims
            right.advance(0.5)
            assert (await backend.claim(request)).claims  # after one second, not after two days
            right.advance(61)
            assert (await backend.claim(request)).claims  # so do leases end

    asyncio.run(main())


def test_found_h05_processes_with_different_clocks_agree_and_do_not_drive_time_ahead(tmp_path):
    wrong, right = Machine(ahead=2 * DAY), Machine()

    async def main():
        async with on(wrong, tmp_path) as one, on(right, tmp_path) as two:
            for n in range(20):
                await one.commit_one(create(f"a{n}"))
                await two.commit_one(create(f"b{n}"))
                for machine in (wrong, right):
                    machine.advance(1)
                expected = FIRST + timedelta(days=2, seconds=n + 1)
                assert await two.now() == await one.now() == expected
            times = [(await two.get_run(f"b{n}")).created_at for n in range(20)]
            gaps = {after - before for before, after in pairwise(times)}
            assert gaps == {timedelta(seconds=1)}

    asyncio.run(main())


@pytest.mark.parametrize("marker", ["kept", "lost"])
def test_found_h05_the_clock_does_not_go_back_over_a_restart_of_the_machine(tmp_path, marker):
    async def main(machine):
        async with on(machine, tmp_path) as backend:
            await backend.commit_one(create(f"r{machine.boot}", now=await backend.now()))
            return await backend.now()

    before = asyncio.run(main(Machine(ahead=2 * DAY)))
    lock = tmp_path / "default" / "lock"
    if marker == "kept":
        lock.write_bytes(Marker.unpack(lock.read_bytes())._replace(boot=bytes(range(16))).pack())
    else:
        lock.write_bytes(b"")
    again = Machine(ahead=60)
    again.boot = 7 * 10**9
    after = asyncio.run(main(again))
    assert before <= after < before + timedelta(seconds=5)
    again.advance(100)
    assert shown(on(again, tmp_path)) == after + timedelta(seconds=100)


def test_found_h05_a_clock_set_back_while_in_use_stops_nothing(tmp_path):
    machine = Machine()

    async def main():
        async with on(machine, tmp_path) as backend:
            await backend.commit_one(create("r", due=timedelta(seconds=10)))
            machine.wall -= 3600 * 10**9
            machine.advance(9)
            assert await backend.now() == FIRST + timedelta(seconds=9)
            assert (await backend.get_run("r")).status is RunStatus.PENDING
            assert not (await backend.claim(ClaimRequest(owner="o", lease=MINUTE))).claims
            machine.advance(1)
            assert (await backend.claim(ClaimRequest(owner="o", lease=MINUTE))).claims

    asyncio.run(main())


def test_a_clock_set_forward_is_followed_and_leases_keep_their_time(tmp_path):
    machine = Machine()

    async def main():
        async with on(machine, tmp_path) as backend, on(machine, tmp_path) as other:
            await backend.commit_one(create("held"))
            await backend.commit_one(create("timer", due=timedelta(hours=1)))
            request = ClaimRequest(owner="o", lease=MINUTE)
            assert (await backend.claim(request)).claims
            machine.wall += 2 * 3600 * 10**9
            machine.advance(1)
            assert await other.now() == FIRST + timedelta(hours=2, seconds=1)
            (claim,) = (await other.claim(ClaimRequest(owner="o", lease=MINUTE, limit=9))).claims
            assert claim.item.run_id == "timer"
            machine.advance(60)
            claims = (await other.claim(ClaimRequest(owner="o", lease=MINUTE, limit=9))).claims
            assert "held" in {claim.item.run_id for claim in claims}

    asyncio.run(main())
