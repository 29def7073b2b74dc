"""Child processes of checks: started on the suite's URL, read line by line, killed at will."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self, cast

from pyworkflow.errors import StorageError
from pyworkflow.spi.storage import StorageBackend
from pyworkflow.storekit import fsck
from pyworkflow_conformance import _worker
from pyworkflow_conformance._case import Case

__all__ = [
    "Child",
    "Snapshot",
    "alone",
    "check_batches",
    "dice",
    "opened_or_refused",
    "sizes",
    "sound",
]

#: Seconds after which a child that says nothing is a failure.
PATIENCE = 90.0
_LOOKS = 1000
Line = dict[str, Any]


def sizes(small: int, full: int | None = None) -> int:
    """How much a check does: twenty times as much, or ``full``, under ``PYWORKFLOW_FULL=1``."""
    if os.environ.get("PYWORKFLOW_FULL") != "1":
        return small
    return small * 20 if full is None else full


def dice(t: Case, salt: str) -> random.Random:
    """Chance that follows the suite's seed, so that a failure can be repeated."""
    return random.Random(f"{getattr(t.suite, 'seed', 0)}:{salt}")


class Child:
    """A process that does one task of ``_worker``; ended at the latest with the block."""

    def __init__(
        self,
        t: Case,
        task: str,
        *,
        namespace: str | None = None,
        url: str | None = None,
        script: str = _worker.__file__,
        **options: Any,
    ) -> None:
        namespace = namespace or t.namespace
        url = url or t.suite.url(namespace)
        assert url is not None, "the suite gives no URL"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, url, namespace, task, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self.lines: list[Line] = []
        """What it said so far."""
        self._taken = 0
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            # A stopped one must be continued to be reaped.
            self.signal(signal.SIGCONT)
        await self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # the last one may be torn
                with self._news:
                    self.lines.append(cast("Line", json.loads(line)))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _next(self, what: str, patience: float) -> Line | None:
        end = monotonic() + patience
        with self._news:
            while True:
                while self._taken < len(self.lines):
                    line = self.lines[self._taken]
                    self._taken += 1
                    if what in line:
                        return line
                if self._ended:
                    return None
                left = end - monotonic()
                assert left > 0, f"the child process does not say {what!r}: {self.lines[-3:]}"
                self._news.wait(left)

    async def line(self, what: str) -> Line:
        """The next line that has the field; those before it are skipped."""
        found = await asyncio.to_thread(self._next, what, PATIENCE)
        assert found is not None, (
            f"the child process ended before it said {what!r}: {self.lines[-3:]} {self.trouble()}"
        )
        return found

    async def go(self) -> None:
        """Let it go on from where it waits."""
        await self.line("ready")
        self.let_go()

    def let_go(self) -> None:
        """Let it go on; it is known to wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    async def ended(self) -> int:
        """Wait until it has ended; its exit code."""

        def wait() -> int:
            code = self._process.wait(PATIENCE)
            self._reader.join()
            return code

        return await asyncio.to_thread(wait)

    async def finished(self) -> None:
        """Wait until it has ended well."""
        code = await self.ended()
        assert code == 0, (
            f"the child process failed: exit={code} {self.lines[-3:]} {self.trouble()}"
        )

    async def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        if self._process.poll() is None:
            self._process.kill()
        await self.ended()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def acknowledged(self) -> list[Line]:
        """What the store told it was done."""
        return [line for line in self.lines if "ack" in line]

    def tried(self) -> list[int]:
        """What it began."""
        return [line["at"] for line in self.lines if "at" in line]

    def trouble(self) -> str:
        """The end of what it wrote on stderr."""
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace")


@asynccontextmanager
async def alone(t: Case) -> AsyncGenerator[None]:
    """For a block, no object of the check is open: stores for one process can be checked, too."""
    await t.store.close()
    try:
        yield
    finally:
        t.store = await t.open()


async def check_batches(
    store: StorageBackend, run_id: str, writer: str, acknowledged: list[Line], *, more: int = 1
) -> int:
    """Whole batches only, every acknowledged one where the answer said; how many there are.

    At most ``more`` batches that nobody was told of may be there.
    """
    # A server may still be at what a killed client sent last: look until it is done.
    for _ in range(_LOOKS):
        run = await store.get_run(run_id)
        assert run is not None, "an acknowledged run is gone"
        events = await store.get_events(run_id)
        work = await store.list_work(run_id)
        latest = await store.get_run(run_id)
        if latest is not None and latest.updated_at == run.updated_at:
            break
    else:
        raise AssertionError("the run does not come to rest")
    assert [e.seq for e in events] == list(range(1, len(events) + 1)), "a hole in the history"
    assert run.history_length == len(events)
    found: dict[int, list[int]] = {}
    for event in events:
        if event.data.get("writer") == writer:
            found.setdefault(cast("int", event.data["n"]), []).append(event.seq)
    for n, seqs in found.items():
        whole = list(range(seqs[0], seqs[0] + _worker.BATCH))
        assert seqs == whole, f"half a change is stored: n={n} seqs={seqs}"
    for line in acknowledged:
        n = line["ack"]
        assert found.get(n) == line["seqs"], f"an acknowledged change is lost: n={n}"
    unknown = set(found) - {line["ack"] for line in acknowledged}
    assert len(unknown) <= more, f"changes that nobody sent: {sorted(unknown)}"
    items = {item.item_id for item in work}
    last = max(found, default=None)
    assert run.attributes.get(writer) == last, "events and fields of one change do not agree"
    assert (f"step:{writer}" in items) == bool(found), "events and items of one change do not agree"
    return len(found)


async def sound(store: StorageBackend) -> None:
    """The store has no violation."""
    violations = await fsck(store)
    assert not violations, "fsck: " + "; ".join(map(str, violations[:10]))


class Snapshot:
    """The bytes of a store's files, to put back as often as needed. Nobody may have them open."""

    def __init__(self, paths: list[Path]) -> None:
        self.content = {path: path.read_bytes() for path in paths if path.is_file()}

    def restore(self, current: list[Path]) -> None:
        """Make the files exactly these."""
        for path in current:
            if path not in self.content and path.is_file():
                path.unlink()
        for path, content in self.content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


async def opened_or_refused(t: Case, namespace: str | None = None) -> StorageBackend | None:
    """Another object on the namespace, or None when the store refuses to be opened."""
    store = await t.suite.make(namespace or t.namespace)
    try:
        await store.open()
    except StorageError:
        await store.close()
        return None
    return store
