"""What a child process of a check does: opens the store by URL, works, prints JSON lines.

Run as a script, ``python -P _worker.py URL NAMESPACE TASK OPTIONS``, so that it starts without
pytest. A line ``{"at": ...}`` is printed before something is tried, ``{"ack": ...}`` once the store
has acknowledged it, ``{"error": ...}`` when it raised. ``wait_for_go`` reads a line of stdin.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pyworkflow.errors import WorkflowError
from pyworkflow.events import Event
from pyworkflow.runs import ItemKind
from pyworkflow.spi.storage import (
    TURN,
    Change,
    ClaimRef,
    ClaimRequest,
    NewRun,
    Put,
    StorageBackend,
    Update,
)
from pyworkflow.testing.internals import make_storage

__all__ = ["BATCH", "batch", "creation"]

#: Events of one change of the task ``batches``.
BATCH = 3

Options = dict[str, Any]


def say(**fields: Any) -> None:
    """One line for the check; whole, since a pipe takes short writes whole."""
    os.write(1, (json.dumps(fields) + "\n").encode())


def wait_for_go() -> None:
    """Until the check says so."""
    say(ready=True)
    sys.stdin.readline()


def batch(run_id: str, writer: str, n: int, size: int = 20) -> Change:
    """The ``n``-th change of a writer: a batch, a field and an item that belong together."""
    events = [
        Event("log.info", "O", {"writer": writer, "n": n, "part": part, "pad": "x" * size})
        for part in range(BATCH)
    ]
    return Change(
        run_id=run_id,
        key=f"{writer}:{n}",
        events=events,
        update=Update(attributes={writer: n}),
        put=[Put(item_id=f"step:{writer}", kind=ItemKind.STEP)],
    )


def creation(run_id: str, key: str | None = None) -> Change:
    """A run with its first event."""
    first = Event("workflow.started", "I", {"workflow": "flow", "args": "[]"})
    new = NewRun(workflow="flow", version="1", args="[]", idempotency_key=key)
    return Change(run_id=run_id, key="start", create=new, events=[first])


async def batches(store: StorageBackend, options: Options) -> None:
    """Commit batch after batch, until killed or for ``number`` of them."""
    run_id, writer = options["run_id"], options["writer"]
    for n in range(options.get("first", 0), options.get("number", 1_000_000)):
        say(at=n)
        answer = await store.commit_one(batch(run_id, writer, n, options.get("size", 20)))
        say(ack=n, seqs=list(answer.seqs))
        if n + 1 in options.get("stops", ()):
            wait_for_go()


async def clock(store: StorageBackend, options: Options) -> None:
    """What the clock is to this process: read, stamped on an event, and in a lease."""
    del options
    now = await store.now()
    answer = await store.commit_one(creation("of-child"))
    request = ClaimRequest(owner="child", lease=timedelta(seconds=60), limit=9)
    claims = (await store.claim(request)).claims
    ends = [claim.item.lease.until.timestamp() for claim in claims if claim.item.lease]
    say(
        now=now.timestamp(),
        stamped=answer.timestamp.timestamp(),
        claimed=[claim.item.run_id for claim in claims],
        until=max(ends, default=0.0),
    )


async def starts(store: StorageBackend, options: Options) -> None:
    """Create run after run, each under an idempotency key."""
    for n in range(options.get("number", 1_000_000)):
        say(at=n)
        await store.commit_one(creation(f"run-{n}", f"key-{n}"))
        say(ack=n)


async def purges(store: StorageBackend, options: Options) -> None:
    """Purge in small parts."""
    before = await store.now() + timedelta(days=1)
    say(at=0)
    while removed := await store.purge(before=before, limit=options["limit"]):
        say(ack=removed)


async def opens(store: StorageBackend, options: Options) -> None:
    """Migrate, and create a run: what the first processes after an upgrade do at once."""
    await store.migrate()
    await store.commit_one(creation(options["run_id"]))
    say(ack=0)


async def holds(store: StorageBackend, options: Options) -> None:
    """Claim the turn, stop, and commit under the claim once told to go on."""
    lease = timedelta(seconds=options["lease"])
    request = ClaimRequest(owner="child", lease=lease, items=[(options["run_id"], TURN)])
    (claim,) = (await store.claim(request)).claims
    lease_held = claim.item.lease
    assert lease_held is not None
    say(token=lease_held.token)
    wait_for_go()
    ref = ClaimRef(options["run_id"], TURN, lease_held.token)
    event = Event("sleep.created", "C", {}, op="1#1:sleep")
    await store.commit_one(
        Change(run_id=ref.run_id, key=f"{ref.token}:1", claim=ref, seen=1, events=[event])
    )
    say(ack=0)


async def fills(store: StorageBackend, options: Options) -> None:
    """Commit until the files may grow no further; then lift the limit and commit on."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (options["bytes"], hard))
    run_id, n = options["run_id"], 0
    try:
        while n < options["number"]:
            say(at=n)
            answer = await store.commit_one(batch(run_id, "full", n, options["size"]))
            say(ack=n, seqs=list(answer.seqs))
            n += 1
    except WorkflowError as error:
        say(refused=type(error).__name__, kinds=[t.__name__ for t in type(error).__mro__])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for later in range(n + 1, n + 4):
        try:
            answer = await store.commit_one(batch(run_id, "full", later, 20))
        except WorkflowError as error:
            say(later=type(error).__name__)
        else:
            say(ack=later, seqs=list(answer.seqs))


class Flushes:
    """``os.fsync`` and its like, which fail while ``failing``. Counted."""

    def __init__(self) -> None:
        self.failing = False
        self.calls = 0
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                setattr(os, name, self._of(getattr(os, name)))

    def _of(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def flush(fd: int) -> None:
            self.calls += 1
            if self.failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        return flush


async def flush_fails(store: StorageBackend, options: Options, flushes: Flushes) -> None:
    """Commit; then while every flush fails; then again."""
    run_id = options["run_id"]
    flushes.calls = 0
    for n in range(9):
        flushes.failing = 3 <= n < 6
        say(at=n)
        try:
            answer = await store.commit_one(batch(run_id, "eio", n))
        except WorkflowError as error:
            say(error=type(error).__name__, kinds=[t.__name__ for t in type(error).__mro__], n=n)
        else:
            say(ack=n, seqs=list(answer.seqs), failing=flushes.failing)
        if n == 2:
            say(calls=flushes.calls)
    flushes.failing = False


async def forks(store: StorageBackend, options: Options) -> None:
    """Use the store, fork, and use object and clone in the forked child; then in the parent."""
    run_id = options["run_id"]
    await store.commit_one(batch(run_id, "before", 0))
    for kind in ("object", "clone", "new"):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                code = _in_fork(store, options, kind)
            os._exit(code)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        answer = await store.commit_one(batch(run_id, f"after-{kind}", 0))
        say(parent=kind, status=os.waitstatus_to_exitcode(status), seqs=list(answer.seqs))
    say(ack=0)


def _in_fork(store: StorageBackend, options: Options, kind: str) -> int:
    # The parent's loop is running as far as this thread knows: another one needs another thread.
    from threading import Thread

    outcome = [3]

    async def use() -> None:
        used = store
        if kind == "clone":
            used = store.clone()
        elif kind == "new":
            used = make_storage(options["url"], options["namespace"])
        try:
            await used.commit_one(batch(options["run_id"], f"fork-{kind}", 0))
        except WorkflowError as error:
            say(
                fork=kind, error=type(error).__name__, kinds=[t.__name__ for t in type(error).mro()]
            )
        else:
            say(fork=kind, ack=0)
        with suppress(WorkflowError):
            await used.close()
        outcome[0] = 0

    def body() -> None:
        try:
            asyncio.run(asyncio.wait_for(use(), 60))
        except BaseException as error:  # noqa: BLE001 - told to the check, which judges
            say(fork=kind, error=type(error).__name__, kinds=[], message=str(error))

    thread = Thread(target=body)
    thread.start()
    thread.join(90)
    return outcome[0]


TASKS: dict[str, Callable[[StorageBackend, Options], Awaitable[None]]] = {
    task.__name__: task for task in (batches, clock, starts, purges, opens, holds, fills, forks)
}


async def main(url: str, namespace: str, task: str, options: Options) -> None:
    """Open the store and do the task."""
    flushes = Flushes() if task == "flush_fails" else None
    store = make_storage(url, namespace)
    options = {**options, "url": url, "namespace": namespace}
    if options.get("gate"):
        wait_for_go()
    await store.open()
    if options.get("opened"):
        wait_for_go()
    if flushes is not None:
        await flush_fails(store, options, flushes)
    else:
        await TASKS[task](store, options)
    with suppress(WorkflowError):
        await store.close()


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
    except WorkflowError as problem:
        say(error=type(problem).__name__, kinds=[t.__name__ for t in type(problem).mro()])
        sys.stderr.write(f"{problem}\n")
        sys.exit(3)
