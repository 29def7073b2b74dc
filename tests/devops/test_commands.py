"""The commands of compose file and manifests, to the letter, on servers from wheels."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.devops.processes import Program, environment, run
from tests.devops.test_manifests import COMPOSE, MANIFESTS, SERVICES
from tests.repo.clone import ROOT
from tests.servers import PostgresServer, ValkeyServer
from tests.watched import free_port, until


def container(manifest: str) -> dict[str, Any]:
    return MANIFESTS[manifest][0]["spec"]["template"]["spec"]["containers"][0]


class Stack:
    """The stack of the compose file, its services as programs of this machine."""

    def __init__(self, folder: Path, valkey: ValkeyServer, postgres: PostgresServer) -> None:
        self.folder = folder
        self.app = folder / "app"
        shutil.copytree(
            ROOT / "examples/functional", self.app, ignore=shutil.ignore_patterns(".*", "__*")
        )
        self.database = postgres.database()
        self.sql = postgres.sql
        variables = {
            name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
            for name, value in COMPOSE["x-pyworkflow"]["environment"].items()
        }
        self.env = environment(
            **variables
            | {
                "PYWORKFLOW_STORAGE": self.database,
                "PYWORKFLOW_BROKER_URL": valkey.url,
                "PYTHONDONTWRITEBYTECODE": "1",
                "FLOWER_UNAUTHENTICATED_API": "true",
            }
        )
        self.flower_port = free_port()

    def env_of(self, name: str) -> dict[str, str]:
        return {**self.env, "PYWORKFLOW_HEARTBEAT": str(self.folder / f"heartbeat {name}")}

    def start(self, name: str, command: list[str]) -> Program:
        """In the container, host names differ; here the node's name must."""
        words = [word.replace("--port=5555", f"--port={self.flower_port}") for word in command]
        if "worker" in words:
            words += ["-n", f"{name}@%h"]
        log = self.folder / f"{name}.log"
        return Program(words, env=self.env_of(name), cwd=self.app, log=log)

    def example(self, name: str) -> str:
        done = run(sys.executable, name, env=self.env, cwd=self.app)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def healthy(self, name: str, *commands: list[str]) -> bool:
        env = self.env_of(name)
        return all(run(*each, env=env, cwd=self.app).returncode == 0 for each in commands)


def probes(kind: str) -> list[list[str]]:
    """The probes of compose file and manifests that a shell runs."""
    pod = container("worker.yaml")
    if kind == "started":
        return [pod["startupProbe"]["exec"]["command"]]
    (form, compose) = SERVICES["worker"]["healthcheck"]["test"]
    assert form == "CMD-SHELL"
    return [["sh", "-c", compose.replace("$$", "$")], pod["livenessProbe"]["exec"]["command"]]


def test_the_deployed_commands_work_and_their_probes_tell_the_truth(
    tmp_path: Path,
    make_valkey: Callable[..., ValkeyServer],
    make_postgres: Callable[..., PostgresServer],
) -> None:
    stack = Stack(
        tmp_path,
        make_valkey({"appendonly": "no"}, password=True),
        make_postgres({"fsync": "off"}),
    )
    commands = {
        "worker": [*shlex.split(SERVICES["worker"]["command"]), "--concurrency=1"],
        "pod": container("worker.yaml")["args"],
        "beat": shlex.split(SERVICES["beat"]["command"]),
        "flower": shlex.split(SERVICES["flower"]["command"]),
    }
    assert container("beat.yaml")["args"] == commands["beat"]
    assert container("flower.yaml")["args"] == commands["flower"]
    with ExitStack() as opened:
        programs = {
            name: opened.enter_context(stack.start(name, command))
            for name, command in commands.items()
        }
        for name in ("worker", "pod"):
            programs[name].wait_for(" ready.")
        probes_tell_the_living_from_the_dead(stack, programs)
        flower_shows_runs_by_name(stack, programs)
        workers_are_scaled_by_what_nobody_holds(stack, programs)
        the_guide_looks_at_what_is_there(stack)
        programs["beat"].wait_for("Sending due task pyworkflow-sweep")
        # The image's file system may be read-only.
        assert {path.suffix for path in stack.app.iterdir()} == {".py"}
        for program in programs.values():
            program.send(signal.SIGTERM)
        ends = {name: program.wait(40) for name, program in programs.items()}
    assert ends == dict.fromkeys(programs, 0)


def probes_tell_the_living_from_the_dead(stack: Stack, programs: dict[str, Program]) -> None:
    for name in ("worker", "pod"):
        assert stack.healthy(name, *probes("started"), *probes("alive"))
    assert not any(stack.healthy("nobody", each) for each in probes("started") + probes("alive"))
    heartbeat = stack.folder / "heartbeat worker"
    programs["worker"].send(signal.SIGSTOP)
    try:
        os.utime(heartbeat, (1, 1))  # as if it had hung for long
        assert not any(stack.healthy("worker", each) for each in probes("alive"))
    finally:
        programs["worker"].send(signal.SIGCONT)
    until(lambda: stack.healthy("worker", *probes("alive")), "its file is not touched again")


def flower_shows_runs_by_name(stack: Stack, programs: dict[str, Program]) -> None:
    base = f"http://127.0.0.1:{stack.flower_port}"
    form, python, *words = SERVICES["flower"]["healthcheck"]["test"]
    assert (form, python) == ("CMD", "python")
    probe = [sys.executable, *(word.replace("5555", str(stack.flower_port)) for word in words)]
    until(lambda: stack.healthy("flower", probe), "flower does not answer")
    assert fetch(base + container("flower.yaml")["readinessProbe"]["httpGet"]["path"]) == "OK"

    def shown() -> bool:
        # It sees what happens from when it has told the workers to send events.
        out = stack.example("simple_example.py")
        assert "status: completed" in out
        assert "welcome, user_123" not in out  # it was printed where the step ran
        return "onboarding" in fetch(f"{base}/api/tasks")

    until(shown, "flower does not show the workflow")
    said = programs["worker"].said() + programs["pod"].said()
    assert "welcome, user_123" in said
    assert re.search(r"Task onboarding\[\S+\] received", said)


def workers_are_scaled_by_what_nobody_holds(stack: Stack, programs: dict[str, Program]) -> None:
    query = MANIFESTS["keda.yaml"][0]["spec"]["triggers"][0]["metadata"]["query"]

    def waiting() -> int:
        return int(stack.sql(query, url=stack.database))

    until(lambda: waiting() == 0, "something waits although all has ended")
    for name in ("worker", "pod"):
        programs[name].send(signal.SIGSTOP)
        for child in psutil.Process(programs[name].pid).children():
            child.suspend()
    try:
        code = "import simple_no_sleep, pyworkflow as p; p.start(simple_no_sleep.buy, 'tea', 1)"
        done = run(sys.executable, "-c", code, env=stack.env, cwd=stack.app)
        assert done.returncode == 0, done.stderr
        assert waiting() == 1
    finally:
        for name in ("worker", "pod"):
            for child in psutil.Process(programs[name].pid).children():
                child.resume()
            programs[name].send(signal.SIGCONT)
    until(lambda: waiting() == 0, "nobody takes what waits")


def the_guide_looks_at_what_is_there(stack: Stack) -> None:
    text = (ROOT / "DISTRIBUTED.md").read_text("utf-8")
    waiting, late = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    assert stack.sql(waiting, url=stack.database) == ""
    sleeps, p99 = stack.sql(late, url=stack.database).split("|")
    assert int(sleeps) > 0
    assert float(p99) >= 0
    (ping,) = re.findall(r"`(celery -A \S+ inspect ping -d) celery@HOST`", text)
    assert "celery -A pyworkflow.celery.app status" in text
    node = f"pod@{socket.gethostname()}"
    asked = run(*ping.split(), node, env=stack.env, cwd=stack.app)
    assert (asked.returncode, asked.stdout.count("pong")) == (0, 1), asked.stdout + asked.stderr
    stats = run("pyworkflow", "storage", "stats", "--json", env=stack.env, cwd=stack.app)
    assert json.loads(stats.stdout)["counts"]["pending"] == 0


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()
