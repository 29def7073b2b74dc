"""A tour in one workflow: steps, a retry, three branches at once, a durable sleep.

pyworkflow run examples/quickstart.py:tour --arg visitor=Ada
python examples/quickstart.py
"""

import asyncio

from pyworkflow import RetryableError, result, sleep, start, step, step_context, workflow


@step()
async def greet(visitor: str) -> str:
    return f"Welcome, {visitor}"


@step(max_retries=3, retry_delay="500ms")
async def book_guide() -> str:
    # The first try fails, as a service does now and then; the second one is the engine's doing.
    if step_context().attempt == 1:
        raise RetryableError("all guides are busy")
    return "Grace"


@step()
async def visit(room: str, minutes: float) -> str:
    await asyncio.sleep(minutes / 10)
    return f"saw the {room}"


@workflow()
async def tour(visitor: str = "you") -> dict[str, object]:
    """Shows a visitor around. Kill it at any moment: a worker goes on where it was."""
    welcome = await greet(visitor)
    guide = await book_guide()
    seen = await asyncio.gather(visit("library", 3), visit("workshop", 5), visit("garden", 2))
    await sleep("2s")  # nothing is held meanwhile: it could be two weeks
    return {"welcome": welcome, "guide": guide, "seen": seen}


if __name__ == "__main__":
    run_id = start(tour, "Ada")
    print(f"run {run_id}")
    print(f"result: {result(run_id)}")
