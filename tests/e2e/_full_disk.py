"""A worker, its store and its log on a disk that is full for a while; what happened, as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

from pyworkflow import Client, configure, configure_logging, step, workflow
from pyworkflow._plugins import make_storage
from pyworkflow.errors import StorageError, StorageFull
from pyworkflow.storekit import fsck

FOLDER = Path(sys.argv[1])
URL = f"file://{FOLDER}/store" if sys.argv[2] == "file" else f"sqlite:///{FOLDER}/store.db"
RUNS, STEPS, REFUSALS = 10, 10, 3
executions: Counter[tuple[int, int]] = Counter()
warnings: list[str] = []


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warnings.append(record.getMessage())


@step(name="fd_work", max_retries=0)
async def work(number: int, part: int) -> str:
    """A result of some size."""
    executions[number, part] += 1
    await asyncio.sleep(0.05)
    return f"{number}.{part}" + "x" * 1000


@workflow(name="fd_flow")
async def flow(number: int) -> int:
    """Steps in a row."""
    return sum([len(await work(number, part)) for part in range(STEPS)])


def right(number: int) -> int:
    """The result of a run."""
    return sum(len(f"{number}.{part}") + 1000 for part in range(STEPS))


def fill() -> None:
    """Take all the room there is."""
    with (FOLDER / "ballast").open("ab", buffering=0) as ballast:
        for size in (65536, 512, 1):
            try:
                while True:
                    ballast.write(b"x" * size)
            except OSError:
                continue


async def main() -> None:
    """Fill the disk in the middle of the runs, and make room again."""
    async with Client() as client:
        runs = [await client.start(flow, number) for number in range(RUNS)]
        while sum(executions.values()) < RUNS * STEPS // 4:  # noqa: ASYNC110 - steps set no event
            await asyncio.sleep(0.005)
        fill()
        refused: list[StorageError] = []
        while len(refused) < REFUSALS:
            try:
                runs.append(await client.start(flow, len(runs)))
            except StorageError as error:
                refused.append(error)
            fill()  # what was freed meanwhile
        while not any("committed" in line for line in warnings):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
        before = sum(executions.values())
        (FOLDER / "ballast").unlink()
        began = time.monotonic()
        while sum(executions.values()) == before:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
        recovered = time.monotonic() - began
        results = [await client.result(run_id, timeout=120) for run_id in runs]
    async with make_storage(URL, "default") as storage:
        violations = [str(violation) for violation in await fsck(storage)]
    print(
        json.dumps(
            {
                "refused": sorted({type(error).__name__ for error in refused}),
                "message": str(refused[0]),
                "is_full": all(isinstance(error, StorageFull) for error in refused),
                "results": len(results),
                "right": results == [right(number) for number in range(len(runs))],
                "violations": violations,
                "warnings": warnings,
                "recovered_s": recovered,
            }
        )
    )


if __name__ == "__main__":
    configure(storage=URL, lease="600s", renew_every="60s")
    configure_logging(log_file=FOLDER / "workflow.log")
    logging.getLogger("pyworkflow").addHandler(_Warnings(logging.WARNING))
    asyncio.run(main())
