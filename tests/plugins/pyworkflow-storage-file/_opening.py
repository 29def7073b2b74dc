"""A process that fills a store with ended runs, or opens it and says what that took."""

import asyncio
import json
import resource
import sys
import time
from datetime import timedelta

from pyworkflow.spi import (
    Change,
    ClaimRef,
    Event,
    ItemKind,
    LeaseFor,
    NewRun,
    Put,
    RunStatus,
    Settle,
)
from pyworkflow_storage_file import FileStorageBackend

SEGMENT = 512 * 1024


def make(path):
    backend = FileStorageBackend(path, fsync=False)
    backend._segment_bytes = SEGMENT
    return backend


async def fill(path, runs):
    held = LeaseFor(owner="w", lease=timedelta(minutes=1))
    async with make(path) as backend:
        for start in range(0, runs, 250):
            answers = await backend.commit(
                [
                    Change(
                        run_id=f"run_{number:012x}",
                        key="start",
                        create=NewRun(workflow="three", version="1", args="[]"),
                        events=[Event("workflow.started", "I", {"workflow": "three"})],
                        put=[Put(item_id="turn", kind=ItemKind.TURN, claimed=held)],
                    )
                    for number in range(start, min(start + 250, runs))
                ]
            )
            claims = [item for answer in answers for item in answer.claims]
            steps = [
                Event(kind, klass, {"name": "one", "worker": "host:123:456", "result": "1"})
                for _ in range(3)
                for kind, klass in (("step.started", "O"), ("step.completed", "I"))
            ]
            await backend.commit(
                [
                    Change(
                        run_id=item.run_id,
                        key=f"{item.lease.token}:1",
                        claim=ClaimRef(item.run_id, item.item_id, item.lease.token),
                        seen=7,
                        events=[*steps, Event("workflow.completed", "C", {"result": "1"})],
                        final=RunStatus.COMPLETED,
                        settle=Settle(),
                    )
                    for item in claims
                ]
            )
        backend._started()._writer._packer.wait(60)


async def open_(path):
    began = time.process_time()
    async with make(path) as backend:
        stats = await backend.stats()
        seconds = time.process_time() - began
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": most, "runs": stats["runs"]}))


if sys.argv[1] == "fill":
    asyncio.run(fill(sys.argv[2], int(sys.argv[3])))
else:
    asyncio.run(open_(sys.argv[2]))
