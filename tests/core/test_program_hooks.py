"""Hooks of a program and of installed plugins: called wherever runs are worked on."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyworkflow
from pyworkflow import (
    ArgumentError,
    Client,
    ConfigurationError,
    _config,
    configure,
    list_plugins,
    register_plugin,
    step,
    unregister_plugin,
    workflow,
)
from pyworkflow._local import reset_host
from pyworkflow.spi import hookimpl
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import TestEnvironment, registered_plugin, start_local

PATIENCE = 120


@step
async def ph_step(n: int) -> int:
    return n


@workflow
async def ph_flow(n: int) -> int:
    return await ph_step(n)


class Seen:
    """A plugin that notes what it observes."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @hookimpl
    def pyworkflow_run_created(self, run_id: str, workflow: str) -> None:
        self.told.append(f"created {workflow}")

    @hookimpl
    def pyworkflow_step_ended(self, step_name: str, error: Any) -> None:
        self.told.append(f"step {step_name} {error}")

    @hookimpl
    def pyworkflow_run_ended(self, workflow: str, status: str) -> None:
        self.told.append(f"ended {workflow} {status}")


WHOLE = ["created ph_flow", "step ph_step None", "ended ph_flow completed"]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Path]:
    _config._reset_for_tests()
    reset_host()
    configure(storage=f"file://{tmp_path}/runs")
    yield tmp_path
    reset_host()
    _config._reset_for_tests()


# --- plugins of a program ---------------------------------------------------------------------------


@pytest.mark.usefixtures("process")
def test_r10_a_registered_plugin_observes_the_embedded_worker() -> None:
    seen = Seen()
    register_plugin(seen)
    register_plugin(seen)  # once is enough
    try:
        assert pyworkflow.run(ph_flow, 1, timeout=PATIENCE) == 1
        assert seen.told == WHOLE
        unregister_plugin(seen)
        unregister_plugin(seen)
        assert pyworkflow.run(ph_flow, 2, timeout=PATIENCE) == 2
        assert seen.told == WHOLE
    finally:
        unregister_plugin(seen)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_a_hook_that_raises_anything_never_changes_a_runs_outcome(
    error: type[BaseException],
) -> None:
    class Raises:
        @hookimpl
        def pyworkflow_turn_started(self) -> None:
            raise error

        @hookimpl
        def pyworkflow_step_ended(self) -> None:
            raise error

        @hookimpl
        def pyworkflow_run_ended(self) -> None:
            raise error

    with registered_plugin(Raises()), registered_plugin(Seen()) as seen:
        assert pyworkflow.run(ph_flow, 1, timeout=PATIENCE) == 1
        assert seen.told == WHOLE


def test_r10_a_registered_plugin_observes_clients_and_the_test_kit() -> None:
    async def main() -> None:
        with registered_plugin(Seen()) as seen:
            async with TestEnvironment() as env:
                assert await env.run(ph_flow, 1) == 1
            assert seen.told == WHOLE
            await start_local(ph_flow, 2, storage=MemoryStorageBackend())
            assert seen.told == WHOLE * 2
            async with Client(storage=MemoryStorageBackend()) as client:
                assert await client.run(ph_flow, 3) == 3
            assert seen.told == WHOLE * 3
        async with TestEnvironment() as env:
            await env.run(ph_flow, 4)
        assert seen.told == WHOLE * 3

    asyncio.run(main())


def test_r10_a_plugin_that_was_there_before_a_test_is_there_after_it() -> None:
    seen = Seen()
    register_plugin(seen, "outer")
    try:
        with registered_plugin(seen):
            pass
        assert [p.name for p in list_plugins() if p.distribution == ""] == ["outer"]
    finally:
        unregister_plugin(seen)
    assert [p for p in list_plugins() if p.distribution == ""] == []


def test_r10_a_hook_of_the_wrong_form_is_refused() -> None:
    class Wrong:
        @hookimpl
        def pyworkflow_step_ended(self, no_such_argument: int) -> None: ...

    class Async:
        @hookimpl
        async def pyworkflow_run_ended(self, run_id: str) -> None: ...

    for plugin in (Wrong(), Async()):
        with pytest.raises(ConfigurationError, match="cannot be registered"):
            register_plugin(plugin)


def test_what_is_no_plugin_is_refused_with_the_remedy() -> None:
    for plugin in (None, "x", 5):
        with pytest.raises(ArgumentError, match=r"with hooks, not plugin=.*@hookimpl"):
            register_plugin(plugin)
    with pytest.raises(ArgumentError, match=r"not a class: .*write register_plugin\(Seen\(\)\)"):
        register_plugin(Seen)
    assert [p for p in list_plugins() if p.distribution == ""] == []


def test_a_plugin_without_hooks_warns_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    class Unmarked:
        def pyworkflow_run_ended(self, run_id: str) -> None: ...

    for plugin in (Unmarked(), Seen()):
        with registered_plugin(plugin, "mine"):
            pass
    (line,) = [m for m in caplog.messages if "has no hooks" in m]
    assert line.startswith("the plugin has no hooks: plugin=mine; mark its methods")
    assert "@hookimpl" in line


def test_r10_a_hook_that_raises_harms_neither_run_nor_other_plugins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        @hookimpl
        def pyworkflow_step_ended(self, step_name: str) -> None:
            raise RuntimeError("in a hook")

    async def main() -> None:
        with registered_plugin(Seen()) as seen, registered_plugin(Broken()):
            async with TestEnvironment() as env:
                assert await env.run(ph_flow, 1) == 1
        assert seen.told == WHOLE

    with caplog.at_level(logging.ERROR, "pyworkflow.plugins"):
        asyncio.run(main())
    assert "a plugin's hook failed" in caplog.text


def test_r10_what_a_client_commits_is_observed_too() -> None:
    class Events:
        def __init__(self) -> None:
            self.types: list[str] = []
            self.ended: list[tuple[str, str]] = []

        @hookimpl
        def pyworkflow_events_committed(self, events: Any) -> None:
            self.types += [f"{e.seq} {e.type}" for e in events]

        @hookimpl
        def pyworkflow_run_ended(self, status: str, error: Any) -> None:
            self.ended.append((str(status), error.message))

    async def main() -> None:
        from pyworkflow._operations import Operations

        operations = Operations(MemoryStorageBackend(), None, None)
        with registered_plugin(Events()) as seen:
            run_id = await operations.start(ph_flow, (1,), {}, ph_flow.options().options)
            await operations.cancel(run_id, "no longer wanted")
        assert seen.types == ["1 workflow.started", "2 workflow.cancelled"]
        assert seen.ended == [("cancelled", "no longer wanted")]

    asyncio.run(main())


# --- installed plugins --------------------------------------------------------------------------------

PLUGIN = """
import sys
from pyworkflow.spi import hookimpl

@hookimpl
def pyworkflow_configure(config):
    print(f"configured {config['namespace']}", flush=True)

@hookimpl
def pyworkflow_step_ended(step_name):
    print(f"observed {step_name}", flush=True)
"""

APP = """
import asyncio
import sys
import pyworkflow
from pyworkflow import Client, run, start, result, step, workflow
from pyworkflow.testing import TestEnvironment, start_local

@step
async def ph_work() -> int:
    return 1

@workflow
async def flow() -> int:
    return await ph_work()

async def client():
    async with Client(storage="file:other") as client:
        await client.run(flow)

async def kit():
    async with TestEnvironment() as env:
        await env.run(flow)

WAYS = {
    "run": lambda: run(flow),
    "start": lambda: result(start(flow)),
    "client": lambda: asyncio.run(client()),
    "kit": lambda: asyncio.run(kit()),
    "local": lambda: asyncio.run(start_local(flow)),
}
if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    print(sorted(m for m in sys.modules if m in ("celery", "pyworkflow_celery", "pyworkflow_storage_redis")))
"""


def installed(folder: Path, name: str, module: str, source: str) -> None:
    """A distribution with one plugin that is named as it is."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pyworkflow]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with an observer, a broken one, and a program; and the environment for it."""
    site = tmp_path / "site"
    site.mkdir()
    installed(site, "step-counter", "ph_counter", PLUGIN)
    installed(site, "broken-observer", "ph_broken", "raise RuntimeError('not today')\n")
    (tmp_path / "app.py").write_text(APP)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")}
    paths = [str(site), *filter(None, [env.get("PYTHONPATH")])]
    return tmp_path, {**env, "PYTHONPATH": os.pathsep.join(paths)}


def said(
    site: tuple[Path, dict[str, str]], *command: str, status: int = 0, **more: str
) -> tuple[str, str]:
    folder, env = site
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**env, **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("way", ["run", "start", "client", "kit", "local"])
def test_p01_an_installed_observer_is_called_in_every_runtime(
    way: str, site: tuple[Path, dict[str, str]]
) -> None:
    out, err = said(site, "app.py", way)
    assert out.splitlines() == ["configured default", "observed ph_work", "[]"]
    assert err.count("does not load") == 1
    assert "RuntimeError: not today" in err


def test_p01_an_installed_observer_is_called_by_the_command_run(
    site: tuple[Path, dict[str, str]],
) -> None:
    out, _ = said(site, "-m", "pyworkflow.cli", "run", "app.py:flow")
    assert "observed ph_work" in out
    out, _ = said(site, "-m", "pyworkflow.cli", "plugins", status=3)  # one is broken
    assert "step-counter" in out
    assert "broken-observer" in out


def test_p01_an_installed_observer_is_called_by_a_worker(site: tuple[Path, dict[str, str]]) -> None:
    folder, env = site
    said(site, "-c", "import app; print(app.start(app.flow))", PYWORKFLOW_WORKER="0")
    with (folder / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "pyworkflow.cli", "worker", "app.py"],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + PATIENCE
        while "observed ph_work" not in (folder / "worker.log").read_text():
            assert worker.poll() is None, (folder / "worker.log").read_text()
            assert time.monotonic() < end, (folder / "worker.log").read_text()
            time.sleep(0.02)
    finally:
        worker.terminate()
        worker.wait(PATIENCE)


def test_p01_a_plugin_that_is_disabled_is_not_loaded(site: tuple[Path, dict[str, str]]) -> None:
    out, err = said(
        site, "app.py", "run", PYWORKFLOW_DISABLE_PLUGINS="step-counter,broken-observer"
    )
    assert out.splitlines() == ["[]"]
    assert err == ""


def test_p02_the_public_names_list_and_register(site: tuple[Path, dict[str, str]]) -> None:
    code = (
        "import pyworkflow as p\n"
        "class Mine: pass\n"
        "p.register_plugin(Mine(), 'mine')\n"
        "print({i.name: (i.status, i.distribution, i.kinds) for i in p.list_plugins()"
        " if i.name in ('step-counter', 'broken-observer', 'mine')})\n"
    )
    out, _ = said(site, "-c", code)
    found = eval(out)
    assert found["step-counter"] == ("loaded", "step-counter", ("hooks",))
    assert found["broken-observer"][0] == "broken"
    assert found["mine"][:2] == ("loaded", "")
