"""Carrying out ``deliver`` items: what one run owes to another.

The item was put by the sender's commit; its id makes a key at the receiver, so that a delivery
repeated after a crash is recognised: exactly once, without a transaction over two runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pyworkflow._names import derived_name
from pyworkflow.errors import RunClosed, RunExists, RunNotFound, StorageUnavailable
from pyworkflow.events import Event, EventClass, Json
from pyworkflow.runs import ItemKind, ParentRef
from pyworkflow.spi.storage import TURN, Change, Claim, NewRun, Put, Settle
from pyworkflow.storekit import failpoints

if TYPE_CHECKING:
    from pyworkflow._engine.worker import Worker

__all__ = ["deliver", "event_payload", "run_payload"]

_log = logging.getLogger("pyworkflow.engine")
_HOPS = 1000

failpoints.register(
    __name__,
    StorageUnavailable,
    {
        "deliver.before": "a delivery is claimed, and nothing of it was done",
        "deliver.after_create": "the other run exists, nobody was told, the delivery is still owed",
        "deliver.before_settle": "the delivery was made, and is still owed",
    },
)


def event_payload(to: str, type: str, data: Mapping[str, Json]) -> dict[str, Json]:
    """The payload of an item that gives run ``to`` an input."""
    return {"v": 1, "to": to, "type": type, "data": dict(data)}


def run_payload(run_id: str, new: NewRun, started: Mapping[str, Json]) -> dict[str, Json]:
    """The payload of an item that starts another run; ``started`` is its first event's data."""
    parent = new.parent
    run: dict[str, Json] = {
        "workflow": new.workflow,
        "version": new.version,
        "args": new.args,
        "queue": new.queue,
        "priority": new.priority,
        "tags": list(new.tags),
        "parent": None if parent is None else {"run_id": parent.run_id, "op": parent.op},
        "root": new.root,
    }
    return {"v": 1, "to": run_id, "run": run, "started": dict(started)}


async def deliver(worker: Worker, claim: Claim) -> None:
    """Do what the item says, then settle it."""
    item = claim.item
    payload = cast("dict[str, Any]", item.payload)
    key = derived_name("deliver", item.run_id, item.item_id)
    to = str(payload["to"])
    if failpoints.active:
        failpoints.hit("deliver.before")
    if "run" in payload:
        await _start(worker, to, key, payload)
    else:
        await _input(worker, to, key, payload)
    if failpoints.active:
        failpoints.hit("deliver.before_settle")
    await worker.pipeline.commit(
        Change(run_id=item.run_id, key=f"{claim.ref.token}:1", claim=claim.ref, settle=Settle())
    )


async def _start(worker: Worker, run_id: str, key: str, payload: dict[str, Any]) -> None:
    run = payload["run"]
    parent = run.get("parent")
    new = NewRun(
        workflow=run["workflow"],
        version=run["version"],
        args=run["args"],
        queue=run["queue"],
        priority=run["priority"],
        tags=tuple(run["tags"]),
        parent=None if parent is None else ParentRef(run_id=parent["run_id"], op=parent["op"]),
        root=run.get("root"),
    )
    started = Event("workflow.started", EventClass.INPUT, payload["started"], None, "started")
    put = Put(item_id=TURN, kind=ItemKind.TURN, notified=worker.rings)
    change = Change(run_id=run_id, key=key, create=new, events=[started], put=[put])
    try:
        await worker.pipeline.commit(change)
    except RunExists:
        standing = await worker.storage.get_run(run_id)
        if standing is None or standing.parent != new.parent:
            _log.error("a run cannot start: its id is somebody else's: run_id=%s", run_id)
    else:
        if failpoints.active:
            failpoints.hit("deliver.after_create")
        worker.tell_of(run_id, new, [put])


async def _input(worker: Worker, run_id: str, key: str, payload: dict[str, Any]) -> None:
    event = Event(payload["type"], EventClass.INPUT, payload["data"], None, key)
    for _ in range(_HOPS):
        try:
            await worker.pipeline.commit(Change(run_id=run_id, key=key, events=[event]))
        except RunNotFound:
            _log.warning("a message finds no run and is dropped: to=%s key=%s", run_id, key)
            return
        except RunClosed:
            target = await worker.storage.get_run(run_id)
            if target is None or target.next is None:
                return  # the run has ended: nobody waits for it
            run_id = target.next
        else:
            worker.wake()
            return
