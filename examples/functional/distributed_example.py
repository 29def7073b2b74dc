"""Parallel branches over many runs, on whatever executor is configured.

    python examples/functional/distributed_example.py

With the local executor this process does the work. Other workers may help, as long as they see
the same store:

    pyworkflow worker examples/functional/distributed_example.py

With Celery, its workers do all of it. This brings up a broker and two workers, and prints what
another terminal has to set before it runs this script:

    pyworkflow dev examples/functional/distributed_example.py

Nothing here changes with the number of workers: `asyncio.gather` is durable, each page is read
once, and whoever finishes the last branch goes on with the run.
"""

import asyncio
import os

from pyworkflow import result, sleep, start, step, workflow

SITES = {"north": 3, "south": 4, "west": 2}


@step(max_retries=5, retry_delay="exponential")
async def read_page(site: str, number: int) -> tuple[int, int]:
    await asyncio.sleep(0.2)  # a request that takes its time
    return len(site) * 100 + number, os.getpid()


@step()
def write_report(site: str, words: int) -> str:
    return f"{site}: {words} words"


@workflow(tags=["crawl"])
async def crawl_site(site: str, pages: int) -> dict[str, object]:
    async with asyncio.timeout(60):  # durable as well: it counts from the run's history
        found = await asyncio.gather(*(read_page(site, number) for number in range(pages)))
    await sleep("500ms")  # be polite before the next request
    report = await write_report(site, sum(words for words, _ in found))
    return {"report": report, "workers": len({worker for _, worker in found})}


if __name__ == "__main__":
    runs = {site: start(crawl_site, site, pages) for site, pages in SITES.items()}
    for site, run_id in runs.items():
        print(f"{site}: run {run_id}")
    for run_id in runs.values():
        print(f"result: {result(run_id, timeout='60s')}")
