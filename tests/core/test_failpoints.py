"""Failpoints: what turns them on, what they do, and that their places keep to the rules."""

from __future__ import annotations

import ast
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyworkflow.errors import ConfigurationError, StorageUnavailable
from pyworkflow.storekit import failpoints

ROOT = Path(__file__).parents[2]

failpoints.register(
    __name__,
    StorageUnavailable,
    {"test.first": "a place of this test", "test.second": "another place of this test"},
)
failpoints.register(__name__, OSError, {"test.system": "a place where the system fails"})
failpoints.register(__name__, None, {"test.safe": "a place where nothing fails"})


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    failpoints.read("")


def hit(name: str) -> None:
    if failpoints.active:
        failpoints.hit(name)


def test_failpoints_are_off_and_free_of_effect_by_default() -> None:
    failpoints.read("")
    assert not failpoints.active
    failpoints.check()
    hit("test.first")
    assert "test.first" not in failpoints.hits()


def test_an_action_is_done_at_the_hit_that_is_named() -> None:
    failpoints.read("test.first=raise@3")
    hit("test.first")
    hit("test.second")
    hit("test.first")
    with pytest.raises(StorageUnavailable, match=r"name=test\.first hit=3"):
        hit("test.first")
    hit("test.first")
    assert failpoints.hits() == {"test.first": 4, "test.second": 1}


def test_without_a_number_an_action_is_done_at_every_hit() -> None:
    failpoints.read("test.system=raise, test.second=sleep:0.01")
    for _ in range(3):
        with pytest.raises(OSError, match=r"name=test\.system"):
            hit("test.system")
    began = time.monotonic()
    hit("test.second")
    assert time.monotonic() - began >= 0.01


@pytest.mark.parametrize(
    "text",
    [
        "test.first",
        "test.first=",
        "=kill",
        "test.first=explode",
        "test.first=kill@",
        "test.first=kill@0",
        "test.first=kill@x",
        "test.first=kill:3",
        "test.first=sleep",
        "test.first=sleep:",
        "test.first=sleep:-1",
        "test.first=sleep:nan",
        "test.first=kill,test.first=stop",
        "test.frist=kill",
        "test.safe=raise",
    ],
)
def test_what_is_wrong_is_refused_with_the_names_that_there_are(text: str) -> None:
    failpoints.read(text)
    with pytest.raises(ConfigurationError, match=r"^PYWORKFLOW_FAILPOINTS: .*test\.first, test\."):
        failpoints.check()


def test_that_failpoints_are_on_is_said_once_and_loudly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failpoints.read("test.first=kill@5")
    with caplog.at_level(logging.WARNING, "pyworkflow"):
        failpoints.check()
        failpoints.check()
    (record,) = caplog.records
    assert "FAILPOINTS ARE ON" in record.getMessage()
    assert "test.first=kill@5" in record.getMessage()


def test_a_name_belongs_to_one_module() -> None:
    with pytest.raises(ValueError, match=r"name=test\.first"):
        failpoints.register("another", None, {"test.first": "taken"})


def in_a_process(orders: str, code: str) -> subprocess.Popen[bytes]:
    head = "from pyworkflow.spi import failpoints; failpoints.register('m', None, {'p': ''}); "
    environment = {**os.environ, "PYWORKFLOW_FAILPOINTS": orders}
    return subprocess.Popen([sys.executable, "-c", head + code], env=environment)


@pytest.mark.parametrize(
    ("action", "status"), [("kill", -signal.SIGKILL), ("exit", failpoints.EXIT_STATUS)]
)
def test_a_process_ends_at_the_failpoint_that_its_environment_names(
    action: str, status: int
) -> None:
    process = in_a_process(f"p={action}@2", "failpoints.hit('p'); failpoints.hit('p'); print(1)")
    assert process.wait(60) == status


def test_a_process_stops_at_a_failpoint_and_goes_on() -> None:
    process = in_a_process("p=stop", "failpoints.hit('p'); raise SystemExit(5)")
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 5
    finally:
        process.kill()


def test_a_worker_refuses_an_unknown_failpoint_and_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    environment = {
        **os.environ,
        "PYWORKFLOW_STORAGE": f"file://{tmp_path}/store",
        "PYWORKFLOW_FAILPOINTS": "turn.after_comit=kill",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pyworkflow.cli", "worker", "empty.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert "'turn.after_comit'" in done.stderr
    assert "turn.after_commit, turn.before_commit" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


SOURCES = sorted(
    path
    for path in ROOT.glob("pyworkflow-*/src/**/*.py")
    if "failpoints.hit(" in path.read_text("utf-8") and path.name != "failpoints.py"
)


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and ast.unparse(node.func.value) == "failpoints"
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_module_registers_the_failpoints_that_it_hits_and_hits_them_only_when_on(
    path: Path,
) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    hits = calls(tree, "hit")
    guarded = [
        call
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "failpoints.active"
        for call in calls(node, "hit")
    ]
    assert len(guarded) == len(hits)
    named = [ast.literal_eval(call.args[0]) for call in hits]
    registered = [
        name for call in calls(tree, "register") for name in ast.literal_eval(call.args[2])
    ]
    assert sorted(named) == sorted(registered)
