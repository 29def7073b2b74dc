"""What the process and crash tests run in processes of their own."""

import asyncio
import contextlib
import os
import sys
from datetime import timedelta

from pyworkflow.spi import (
    Change,
    ClaimRequest,
    Event,
    Fenced,
    KeyTaken,
    NewRun,
    RunExists,
    Settle,
    StorageFull,
)
from pyworkflow_storage_file import FileStorageBackend, _writer

LEASE = timedelta(minutes=1)


def create(run_id, idempotency_key=None):
    new = NewRun(workflow="w", version="1", args="[]", idempotency_key=idempotency_key)
    started = Event("workflow.started", "I", {}, key="started")
    return Change(run_id=run_id, key=f"start:{run_id}", create=new, events=[started])


def pair(run_id, name, number):
    """Two events that are there both or not at all."""
    events = [
        Event("log.info", "O", {"writer": name, "number": number, "part": part, "pad": "x" * 50})
        for part in (1, 2)
    ]
    return Change(run_id=run_id, key=f"{name}:{number}", events=events)


async def write(path, name, count):
    """Commit pairs to a run that all writers share and to one of this writer's own."""
    async with FileStorageBackend(path) as backend:
        with contextlib.suppress(RunExists):
            await backend.commit_one(create("shared"))
        await backend.commit_one(create(name))
        for number in range(int(count)):
            await asyncio.gather(
                backend.commit_one(pair("shared", name, number)),
                backend.commit_one(pair(name, name, number)),
            )


async def endless(path, name):
    """Commit pairs for ever, and say so after each acknowledgement."""
    async with FileStorageBackend(path) as backend:
        await backend.commit_one(create(name))
        number = 0
        while True:
            await backend.commit_one(pair(name, name, number))
            print(number, flush=True)
            number += 1


async def keys(path, name, count):
    """Race for idempotency keys; print the ones that were won."""
    async with FileStorageBackend(path) as backend:
        for number in range(int(count)):
            try:
                await backend.commit_one(create(f"{name}-{number}", idempotency_key=f"k{number}"))
                print(number, flush=True)
            except KeyTaken:
                pass


async def work(path, name):
    """Claim turns and settle them until none is left; print what was done."""
    async with FileStorageBackend(path) as backend:
        while True:
            claimed = await backend.claim(ClaimRequest(owner=name, lease=LEASE, limit=3))
            if not claimed.claims:
                return
            for claim in claimed.claims:
                change = Change(
                    run_id=claim.item.run_id,
                    key=f"{claim.ref.token}:1",
                    claim=claim.ref,
                    seen=1,
                    settle=Settle(),
                )
                with contextlib.suppress(Fenced):
                    await backend.commit_one(change)
                    print(claim.item.run_id, claim.ref.token, flush=True)


async def rewrite(path):
    """Make garbage and rewrite the journal for ever."""
    _writer._GARBAGE_BYTES = 4_000
    async with FileStorageBackend(path) as backend:
        await backend.commit_one(create("r"))
        number = 0
        while True:
            await backend.commit_one(pair("r", "r", number))
            print(number, flush=True)
            number += 1
            for _ in range(5):
                claimed = await backend.claim(ClaimRequest(owner="o", lease=LEASE))
                for claim in claimed.claims:
                    await backend.release(claim.ref)


async def limited(path, name):
    """Commit pairs until the file size limit of the process stops it, then once more."""
    async with FileStorageBackend(path) as backend:
        await backend.commit_one(create(name))
        number = 0
        refused = 0
        while refused < 3:
            try:
                await backend.commit_one(pair(name, name, number))
                print(number, flush=True)
                number += 1
            except StorageFull:
                refused += 1
        print("full", flush=True)


if __name__ == "__main__":
    if "FSIZE" in os.environ:
        import resource

        limit = int(os.environ["FSIZE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
