"""Processes that are only clients, workers that take some queues, workflows started by name."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import pyworkflow
from pyworkflow import (
    ArgumentError,
    Client,
    ConfigurationError,
    DefinitionError,
    WorkflowContextError,
    _config,
    configure,
    declare_workflow,
    step,
    workflow,
)
from pyworkflow._config import settings
from pyworkflow._declared import known_workflow
from pyworkflow._definitions import find_workflow, workflow_names
from pyworkflow._engine.worker import Worker
from pyworkflow._local import host, reset_host
from pyworkflow.spi.storage import Claim
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import TestEnvironment
from tests.core._driving import eventually

PATIENCE = 120


class Order(BaseModel):
    """What is ordered."""

    sku: str
    count: int = 1


class Receipt(BaseModel):
    """What comes of it."""

    total: int


@workflow
async def cp_flow(n: int) -> int:
    return n + 1


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Path]:
    """A process that was not configured yet; the place of its store."""
    _config._reset_for_tests()
    reset_host()
    yield tmp_path
    reset_host()
    _config._reset_for_tests()


# --- R3, N19: only clients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("0", False), ("false", False), ("No", False), ("1", True), ("on", True), ("TRUE", True)],
)
def test_r03_worker_is_a_setting_of_every_kind(
    given: str, wanted: bool, process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYWORKFLOW_WORKER", given)
    assert settings().worker is wanted


@pytest.mark.usefixtures("process")
def test_r03_worker_and_queues_in_the_project_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pyworkflow]\nworker = false\nqueues = ["a", "b"]\nstalled_after = "1m"\n'
    )
    monkeypatch.chdir(tmp_path)
    found = settings()
    assert (found.worker, found.queues) == (False, ("a", "b"))
    assert found.stalled_after.total_seconds() == 60


@pytest.mark.usefixtures("process")
def test_r03_what_is_no_flag_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="true or false"):
        configure(worker="maybe")
    with pytest.raises(ConfigurationError, match="true or false"):
        configure(worker=2)


def test_n19_a_process_without_a_worker_works_on_nothing(process: Path) -> None:
    url = f"file://{process}/runs"
    configure(storage=url, worker=False)
    run_id = pyworkflow.start(cp_flow, 1)

    async def main() -> None:
        async with Client() as shared, Client(storage=url) as own:
            for client in (shared, own):
                with pytest.raises(TimeoutError):
                    await client.result(run_id, timeout=0.3)
                assert (await client.get_run(run_id)).status == "pending"
            assert host().worker is None
            # A worker elsewhere takes it.
            from pyworkflow._config import Settings
            from pyworkflow._plugins import make_storage

            worker = Worker(make_storage(url), Settings(), owns_storage=True)
            await worker.open()
            worker.serve()
            assert await shared.result(run_id, timeout=PATIENCE) == 2
            await worker.drain(1)
            await worker.close()

    asyncio.run(main())


@pytest.mark.usefixtures("process")
def test_r03_a_client_alone_refuses_a_store_that_no_worker_can_see() -> None:
    configure(storage="memory://", worker=False)
    with pytest.raises(ConfigurationError, match="in this process only"):
        pyworkflow.start(cp_flow, 1)

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="in this process only"):
            await Client(storage="memory://").start(cp_flow, 1)

    asyncio.run(main())


def test_n19_a_script_that_is_only_a_client_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from pyworkflow import start, workflow\n"
        "@workflow\nasync def flow() -> int:\n    return 1\n"
        "if __name__ == '__main__':\n    print(start(flow))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")}
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={**env, "PYWORKFLOW_WORKER": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    run_id = done.stdout.strip()
    for command, said in [
        (["runs", "show", run_id], "pending"),
        (["run", "app.py:flow", "--key", "k"], "completed"),
    ]:
        shown = subprocess.run(
            [sys.executable, "-m", "pyworkflow.cli", *command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert said in shown.stdout or said == "completed"


# --- R3: queues bind --------------------------------------------------------------------------------


ran: list[str] = []


@step
async def cp_here(tag: str) -> None:
    ran.append(f"{tag} here")


@step(queue="gpu")
async def cp_gpu(tag: str) -> None:
    ran.append(f"{tag} gpu")


@workflow
async def cp_routed(tag: str) -> str:
    await cp_here(tag)
    await cp_gpu(tag)
    await cp_here(tag)
    return "routed"


def test_r03_the_embedded_worker_takes_from_its_queues_alone(process: Path) -> None:
    configure(storage=f"file://{process}/runs", queues=["api"])
    assert pyworkflow.run(cp_flow.options(queue="api"), 1, timeout=PATIENCE) == 2
    other = pyworkflow.start(cp_flow, 1)
    with pytest.raises(TimeoutError):
        pyworkflow.result(other, timeout=0.5)
    assert pyworkflow.get_run(other).status == "pending"
    assert other not in host().started  # the end of the process does not wait for it


def test_n19_a_clients_own_worker_takes_from_the_configured_queues(process: Path) -> None:
    configure(queues="api, more", storage=f"file://{process}/runs")

    async def main() -> None:
        async with Client(storage=f"file://{process}/own") as client:
            assert await client.run(cp_flow.options(queue="more"), 1, timeout=PATIENCE) == 2
            other = await client.start(cp_flow, 1)
            with pytest.raises(TimeoutError):
                await client.result(other, timeout=0.5)

    asyncio.run(main())


def test_r03_a_worker_of_a_steps_queue_leaves_the_turn_to_the_runs_own_queue() -> None:
    async def main() -> None:
        storage = MemoryStorageBackend()
        turns: list[str] = []

        class Noting(Worker):
            def begin_turn(self, claim: Claim, *, resumed: bool = True) -> None:
                turns.append(self.owner)
                super().begin_turn(claim, resumed=resumed)

        gpu = Noting(storage, settings(), queues=["gpu"])
        main_worker = Noting(storage, settings(), queues=["default"])
        for worker in (gpu, main_worker):
            await worker.open()
            worker.serve()
        async with Client(storage=storage) as client:
            assert client._worker is not None
            await client._worker.drain(0)  # a client, and no worker
            run_id = await client.start(cp_routed, "q")
            assert await client.result(run_id, timeout=PATIENCE) == "routed"
        await eventually(lambda: ran.count("q here") == 2)
        assert ran.count("q gpu") == 1
        assert set(turns) == {main_worker.owner}
        for worker in (gpu, main_worker):
            await worker.drain(1)
            await worker.close()

    asyncio.run(main())


# --- R3: start by name ------------------------------------------------------------------------------


cp_named = declare_workflow("cp_elsewhere")


@declare_workflow("cp_ship", queue="depot", tags=["t"], priority=2, max_duration="1h")
async def cp_ship(order: Order, fast: bool = False) -> Receipt: ...


def test_r03_a_declared_workflow_is_started_and_never_claimed() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            run_id = await client.start(cp_named, 1, two=2)
            typed = await client.start(cp_ship, Order(sku="a"), fast=True)
            with pytest.raises(TimeoutError):
                await client.result(run_id, timeout=0.3)
            for each in (run_id, typed):
                assert (await client.get_run(each)).status == "pending"
            run = await client.get_run(typed)
            assert (run.workflow, run.queue, run.tags, run.priority) == (
                "cp_ship",
                "depot",
                ("t",),
                2,
            )
            assert run.deadline is not None
            assert (
                await client.start(cp_ship.options(run_id="s-1", queue="q"), Order(sku="b"))
                == "s-1"
            )
            assert (await client.get_run("s-1")).queue == "q"

    asyncio.run(main())
    assert not {"cp_elsewhere", "cp_ship"} & workflow_names()
    assert find_workflow("cp_ship") is None
    assert known_workflow("cp_ship") is cp_ship


def test_r03_arguments_of_a_declaration_are_validated_by_its_annotations() -> None:
    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            with pytest.raises(ArgumentError, match="do not fit"):
                await client.start(cp_ship)
            with pytest.raises(ArgumentError, match="count"):
                await client.start(cp_ship, {"sku": "a", "count": "many"})
            assert (await client.list_runs()).items == []

    asyncio.run(main())


MODELS = """
from pydantic import BaseModel

class Order(BaseModel):
    sku: str
    count: int = 1

class Receipt(BaseModel):
    total: int
"""

WORKER = """
from models import Order, Receipt
from pyworkflow import workflow

@workflow(name="cp_ship_there")
async def ship(order: Order, fast: bool = False) -> Receipt:
    return Receipt(total=order.count * (2 if fast else 1))

@workflow
async def cp_anything(*args, **kwargs):
    return [list(args), kwargs]
"""

API = """
from models import Order, Receipt
from pyworkflow import declare_workflow, result, run, start

@declare_workflow("cp_ship_there")
async def ship(order: Order, fast: bool = False) -> Receipt:
    "Ships."
    ...

anything = declare_workflow("cp_anything")

if __name__ == "__main__":
    receipt = run(ship, Order(sku="a", count=3), fast=True, timeout=100)
    assert type(receipt) is Receipt and receipt.total == 6, receipt
    assert run(anything, 1, two=[2], timeout=100) == [[1], {"two": [2]}]
    assert result(start(ship, Order(sku="b")), timeout=100) == Receipt(total=1)
    print("done")
"""


def test_r03_an_api_starts_by_name_what_a_worker_defines(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "flows.py").write_text(WORKER)
    (tmp_path / "api.py").write_text(API)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")}
    env["PYWORKFLOW_STORAGE"] = f"sqlite:///{tmp_path}/runs.db"
    worker = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow.cli", "worker", "flows.py"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for only_client in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "api.py"],
                cwd=tmp_path,
                env={**env, "PYWORKFLOW_WORKER": only_client},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pyworkflow.cli",
                "run",
                "api.py:ship",
                "--args",
                '{"order": {"sku": "c", "count": 4}}',
            ],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "total" in done.stdout
    finally:
        worker.terminate()
        worker.wait(PATIENCE)


def test_r03_a_definition_here_takes_the_runs_of_a_declaration() -> None:
    named = declare_workflow("cp_both")

    @workflow(name="cp_both")
    async def cp_both(n: int) -> int:
        return n * 2

    async def main() -> None:
        async with Client(storage=MemoryStorageBackend()) as client:
            assert await client.run(named, 4, timeout=PATIENCE) == 8
        async with TestEnvironment() as env:
            assert await env.run(named, 5) == 10
            with pytest.raises(ArgumentError, match="only declared here"):
                await env.run(cp_ship, Order(sku="a"))

    asyncio.run(main())
    assert known_workflow("cp_both") is cp_both


def test_r03_what_declares_has_no_code() -> None:
    with pytest.raises(DefinitionError, match="has a body"):

        @declare_workflow("cp_body")
        async def with_body(n: int) -> int:
            return n

    with pytest.raises(DefinitionError, match="has a body"):

        @declare_workflow("cp_body")
        async def raising(n: int) -> int:
            raise NotImplementedError

    with pytest.raises(DefinitionError, match="not async"):

        @declare_workflow("cp_body")  # type: ignore[arg-type]  # that is the point
        def sync(n: int) -> int: ...

    for wrong in ("", 5, None, len):
        with pytest.raises(DefinitionError, match="a name is text"):
            declare_workflow(wrong)  # type: ignore[arg-type]  # that is the point

    @declare_workflow("cp_fine")
    async def fine(n: int, *, kind: str = "x") -> int:
        """Of this only the parameters count."""

    assert known_workflow("cp_fine") is fine
    assert declare_workflow("cp_fine") is not fine
    assert known_workflow("cp_fine") is fine  # a name alone does not take the annotations away


def test_r03_a_declared_workflow_cannot_be_called() -> None:
    with pytest.raises(WorkflowContextError, match="cannot be called"):
        cp_ship(Order(sku="a"))
    with pytest.raises(WorkflowContextError, match="cannot be called"):
        cp_named(5)  # type: ignore[arg-type]  # that is the point
