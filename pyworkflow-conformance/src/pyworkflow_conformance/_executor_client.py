"""The client of the executor checks: a process of its own, which starts runs and rings.

Reads requests from stdin and answers on stdout, a JSON line each. It never works on a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from time import monotonic
from typing import Any

from pyworkflow.errors import WorkflowError
from pyworkflow.spi.executor import Doorbell, Executor
from pyworkflow.testing.internals import (
    Operations,
    RunOptions,
    configured_executor,
    configured_storage,
    find_workflow,
    settings,
)
from pyworkflow.worker import import_modules

__all__ = ["serve"]

_OURS = ("pyworkflow_conformance._executor_programs", "pyworkflow_conformance._executor_other")


async def serve() -> None:
    """Answer until stdin ends."""
    import_modules(_OURS)
    config = settings()
    storage, executor = configured_storage(config), configured_executor(config)
    await executor.open({})
    ringing = Operations(storage, None, executor if executor.capabilities.distributed else None)
    silent = Operations(storage, None, None)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            began = monotonic()
            answer: dict[str, Any]
            try:
                answer = await _answer(json.loads(line), ringing, silent, executor)
            except WorkflowError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answer["seconds"] = monotonic() - began
            os.write(1, (json.dumps(answer) + "\n").encode())
    finally:
        await executor.close()
        await storage.close()


async def _answer(
    asked: dict[str, Any], ringing: Operations, silent: Operations, executor: Executor
) -> dict[str, Any]:
    if "bells" in asked:
        await executor.notify([Doorbell(run_id, item) for run_id, item in asked["bells"]])
        return {}
    flow = find_workflow(f"conformance_exe.{asked['start']}")
    assert flow is not None, asked["start"]
    options = RunOptions(run_id=asked["run_id"], priority=asked["priority"])
    client = ringing if asked["ring"] else silent
    return {"run_id": await client.start(flow, tuple(asked["args"]), {}, options)}


if __name__ == "__main__":
    asyncio.run(serve())
