"""Group CRA, the part with damaged files, full disks and disks that fail."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pyworkflow.errors import StorageError
from pyworkflow.spi.storage import RunQuery, StorageBackend
from pyworkflow_conformance import _worker
from pyworkflow_conformance._case import Case, Suite, note, scenario
from pyworkflow_conformance._children import (
    Child,
    Snapshot,
    alone,
    check_batches,
    dice,
    opened_or_refused,
    sizes,
    sound,
)

__all__ = ["DamageChecks"]


class DamageChecks(Suite):
    """CRA-03 to 06."""

    @scenario(needs=("url", "files"))
    async def test_CRA_03_torn_tail_recovered(self, t: Case) -> None:
        """CRA-03 (I1): a file that was cut in its last write loses that write, as a whole.

        Power loss leaves such files. Applies to files that a commit only appends to. Usual cause:
        the torn end is read as damage, or something is appended behind it.
        """
        await t.start()
        async with alone(t):
            async with Child(t, "batches", run_id="run", writer="w", stops=[4, 5]) as child:
                await _reach(child, 4)
                before = Snapshot(self.files(t.namespace))
                acknowledged = child.acknowledged()
                child.let_go()
                await _reach(child, 5)
                after = Snapshot(self.files(t.namespace))
                await child.kill()
            cuts = _cuts(before, after, sizes(24, 2000))
            if not cuts:
                pytest.skip("does not apply: CRA-03 needs files that commits only append to")
            for path, length in cuts:
                after.restore(self.files(t.namespace))
                path.write_bytes(after.content[path][:length])
                for again in range(2):
                    store = await asyncio.wait_for(t.open(), 60)
                    where = f"cut={path.name}:{length} again={again}"
                    try:
                        # The change that was cut off is sent again, and is there once.
                        found = await check_batches(store, "run", "w", acknowledged)
                        assert found >= 4, where
                        await store.commit_one(_worker.batch("run", "w", 4))
                        assert await check_batches(store, "run", "w", acknowledged) == 5, where
                    finally:
                        await store.close()
            after.restore(self.files(t.namespace))

    @scenario(needs=("url", "files"), sampled=True)
    async def test_CRA_04_bitflip_detected(self, t: Case) -> None:
        """CRA-04: a bit that flipped on the disk is noticed: right data or a refusal, never wrong.

        The last change may be missing: a damaged end cannot be told from a torn one. Usual cause:
        no checksums; then the gap is declared.
        """
        for n in range(3):
            await t.start(f"run-{n}", idempotency_key=f"key-{n}", attributes={"n": n})
            await t.send(*(note(f"{n}:{m}" * 20, key=f"k{m}") for m in range(8)), run_id=f"run-{n}")
        # What the last change is does not matter: it is the one that may be lost.
        await t.send(note("last" * 20), run_id="run-0")
        truth = await _everything(t.store)
        chance = dice(t, "CRA-04")
        async with alone(t):
            sane = Snapshot(self.files(t.namespace))
            places = [
                (path, offset)
                for path, content in sane.content.items()
                for offset in range(len(content))
                # Where nothing was written nothing can be damaged.
                if content[offset]
            ]
            assert places, "the suite names no files with content"
            for path, offset in chance.sample(places, min(len(places), sizes(60, 2000))):
                content = bytearray(sane.content[path])
                content[offset] ^= 1 << chance.randrange(8)
                sane.restore(self.files(t.namespace))
                path.write_bytes(content)
                store = await opened_or_refused(t)
                if store is None:
                    continue
                try:
                    found = await _everything(store)
                except StorageError:
                    continue
                finally:
                    await store.close()
                for place, value in truth.items():
                    got = found.get(place)
                    if got != value and not _lost_last(place, got, value):
                        raise AssertionError(
                            f"wrong data in silence: file={path.name} offset={offset} "
                            f"{place}: {value!r:.300} became {got!r:.300}"
                        )
            sane.restore(self.files(t.namespace))

    @scenario(needs=("url", "files"))
    async def test_CRA_05_enospc_clean_refusal(self, t: Case) -> None:
        """CRA-05: when nothing more can be written the change is refused by type, and only it.

        Usual cause: an ``OSError`` gets through, or half a change stays behind.
        """
        await t.start()
        size = 4000
        async with alone(t):
            largest = max(p.stat().st_size for p in self.files(t.namespace) if p.is_file())
            async with Child(
                t,
                "fills",
                run_id="run",
                bytes=largest + 20 * size,
                size=size,
                number=sizes(400, 4000),
            ) as child:
                await child.finished()
        refused = [line for line in child.lines if "refused" in line]
        if not refused:
            pytest.skip("does not apply: CRA-05 needs files that grow with their content")
        assert refused[0]["refused"] in {"StorageFull", "StorageUnavailable"}, refused
        # A refusal of "unknown" may have been written.
        await check_batches(t.store, "run", "full", child.acknowledged())
        await t.send(note("afterwards"))
        await sound(t.store)

    @scenario(needs=("url", "files", "durable"))
    async def test_CRA_06_eio_on_fsync_poisons_not_lies(self, t: Case) -> None:
        """CRA-06 (I3): a change whose flush failed is not acknowledged, then or later.

        Applies to stores that flush with ``os.fsync``. Usual cause: the flush is tried again, and
        succeeds, for the kernel has forgotten what it could not write.
        """
        # A store may refuse to be opened ever after: not the one that every check ends with.
        namespace = f"{t.namespace}-eio"
        store = await t.open(namespace)
        await t.start(store=store)
        await store.close()
        async with Child(t, "flush_fails", namespace=namespace, run_id="run") as child:
            await child.finished()
        (calls,) = (line["calls"] for line in child.lines if "calls" in line)
        if calls == 0:
            pytest.skip("does not apply: CRA-06 needs a store that flushes with os.fsync")
        lies = [line for line in child.acknowledged() if line["failing"]]
        assert not lies, f"acknowledged although the flush failed: {lies}"
        for line in child.lines:
            assert "error" not in line or "StorageError" in line["kinds"], line
        reopened = await opened_or_refused(t, namespace)
        if reopened is not None:
            try:
                await check_batches(reopened, "run", "eio", child.acknowledged(), more=3)
                await sound(reopened)
            finally:
                await reopened.close()


async def _reach(child: Child, number: int) -> None:
    while len(child.acknowledged()) < number:
        await child.line("ack")
    await child.line("ready")


def _cuts(before: Snapshot, after: Snapshot, number: int) -> list[tuple[Path, int]]:
    """Where files that only grew can be cut within what was added last."""
    cuts: list[tuple[Path, int]] = []
    for path, content in after.content.items():
        old = before.content.get(path, b"")
        if old and len(content) > len(old) and content.startswith(old):
            lengths = range(len(old), len(content))
            stride = max(1, len(lengths) // number)
            cuts += [(path, n) for n in {*lengths[::stride], *lengths[-3:], len(content)}]
    return sorted(cuts)


async def _everything(store: StorageBackend) -> dict[str, Any]:
    """All that the store shows."""
    shown: dict[str, Any] = {}
    listed = (await store.list_runs(RunQuery(limit=1000))).items
    shown["list"] = [run.run_id for run in listed]
    for n in range(3):
        run_id = f"run-{n}"
        shown[f"row {n}"] = await store.get_run(run_id)
        shown[f"events {n}"] = await store.get_events(run_id)
        shown[f"items {n}"] = await store.list_work(run_id)
        shown[f"key {n}"] = await store.find_run(f"key-{n}")
    return shown


def _lost_last(place: str, got: Any, value: Any) -> bool:
    """Whether only the very last change of the store is missing."""
    if place == "events 0":
        return bool(got == value[:-1])
    return (
        place == "row 0"
        and got is not None
        and got.history_length == value.history_length - 1
        and got.updated_at <= value.updated_at
    )
