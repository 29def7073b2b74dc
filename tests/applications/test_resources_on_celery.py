"""Resources of steps on Celery's pools, and the examples of their page there."""

from __future__ import annotations

import http.server
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.applications._processes import block_of, call
from tests.celery._harness import Fleet, fleet_on

POOLS = ("prefork", "threads", "solo")

APP = """
import asyncio, os
from collections.abc import AsyncIterator, Iterator
from pyworkflow import resource, step, workflow

def note(what):
    with open(os.environ["RESOURCE_LOG"], "a") as file:
        file.write(f"{os.getpid()} {what}\\n")

@resource
async def client() -> AsyncIterator[asyncio.Queue]:
    note("open client")
    queue = asyncio.Queue()  # bound to the loop that waits in it
    task = asyncio.create_task(pump(queue))
    try:
        yield queue
    finally:
        task.cancel()
        note("close client")

async def pump(queue):
    while True:
        (await queue.get()).set_result("answer")

@resource
def model() -> Iterator[str]:
    note("open model")
    try:
        yield "model"
    finally:
        note("close model")

@step(max_retries=0)
async def ask(n: int) -> str:
    answer = asyncio.get_running_loop().create_future()
    await (await client.get()).put(answer)
    return await asyncio.wait_for(answer, 60) + (await model.get())

@step(max_retries=0)
def think(n: int) -> str:
    client.get_sync()
    return model.get_sync()

@workflow
async def flow(number: int) -> int:
    found = await asyncio.gather(*[ask(n) for n in range(number)], *[think(n) for n in range(number)])
    assert found == ["answermodel"] * number + ["model"] * number
    return len(found)
"""


@pytest.mark.parametrize("pool", POOLS)
def test_n09_each_process_of_a_celery_worker_opens_one_and_closes_it(
    pool: str, tmp_path: Path
) -> None:
    with fleet_on(tmp_path, "sqlite") as fleet:
        (fleet.path / "shop.py").write_text(APP, "utf-8")
        log = fleet.path / "resources.log"
        log.touch()
        env = {"PYWORKFLOW_MODULES": "shop", "RESOURCE_LOG": str(log), "PYTHONPATH": _path(fleet)}
        worker = fleet.begin(pool=pool, **env)
        fleet.eventually(lambda: worker.ready, "the worker is ready")
        code = "import shop; from pyworkflow import run; print(run(shop.flow, 6, timeout=150))"
        for _ in range(3):
            assert call(fleet, code, fleet.path, **env) == "12\n"
        said = worker.log
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        lines = log.read_text("utf-8").splitlines()
        processes = {line.split()[0] for line in lines}
        assert len(processes) <= (2 if pool == "prefork" else 1)
        for process in processes:
            did = [line.partition(" ")[2] for line in lines if line.startswith(f"{process} ")]
            opened = [one.removeprefix("open ") for one in did if one.startswith("open ")]
            closed = [one.removeprefix("close ") for one in did if one.startswith("close ")]
            assert len(opened) == len(set(opened)), did
            assert closed == opened[::-1], (did, worker.log)
    # What the worker's own log says of its tasks.
    assert re.search(r"Task flow\[\S+\] succeeded in \S+: 'turn of run_\w+: handled'", said), said
    if "Task ask[" in said:
        assert re.search(r"Task ask\[\S+\] succeeded in \S+: 'step of run_\w+: ", said), said


def _path(fleet: Fleet) -> str:
    return f"{fleet.path}:{fleet.environment()['PYTHONPATH']}"


# --- the page -------------------------------------------------------------------------------------


class Rates(http.server.BaseHTTPRequestHandler):
    """A service that steps ask."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"EUR": 1.5}')

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def rates() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rates) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


PROGRAMS = {
    "create_async_engine": 'print(run(shop.order, "o-1"), run(shop.order, "o-1"))',
    "create_engine(": 'print(run(shop.bill, "o-1"), run(shop.bill, "o-1"))',
    "httpx.AsyncClient": 'print(run(shop.convert, 2.0, "EUR"), run(shop.convert, 4.0, "EUR"))',
    "django.setup()": """
with shop.connection.schema_editor() as editor:
    editor.create_model(shop.Order)
print(result(shop.place("o-1")), result(shop.place("o-2")), shop.Order.objects.count())
""",
}
EXPECTED = {
    "create_async_engine": "True False\n",
    "create_engine(": "True False\n",
    "httpx.AsyncClient": "3.0 6.0\n",
    "django.setup()": "['packed', 'shipped'] ['packed', 'shipped'] 2\n",
}


@pytest.mark.parametrize("pool", POOLS)
def test_n09_the_examples_of_the_page_run_on_celery(pool: str, tmp_path: Path, rates: str) -> None:
    with fleet_on(tmp_path, "sqlite") as fleet:
        modules = {mark: f"shop{number}" for number, mark in enumerate(PROGRAMS)}
        for mark, module in modules.items():
            code = block_of("resources-in-steps.md", mark)
            (fleet.path / f"{module}.py").write_text(code, "utf-8")
        env = {
            "PYWORKFLOW_MODULES": ",".join(modules.values()),
            "RATES_URL": rates,
            "SHOP_DATABASE": str(fleet.path / "orders.db"),
            "PYTHONPATH": _path(fleet),
        }
        worker = fleet.begin(pool=pool, **env)
        fleet.eventually(lambda: worker.ready, "the worker is ready")
        for mark, program in PROGRAMS.items():
            code = f"import {modules[mark]} as shop\nfrom pyworkflow import result, run\n{program}"
            assert call(fleet, code, fleet.path, **env) == EXPECTED[mark]
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "failed to close" not in worker.log
