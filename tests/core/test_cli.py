"""The command line, as a process of its own on a file store: output, exit statuses, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

DEADLINE = 60.0
APP = """
import asyncio
from dataclasses import dataclass
from datetime import datetime

from pyworkflow import RetryableError, logger, sleep, step, step_context, workflow


@dataclass
class Order:
    id: str
    amount: int


@step(max_retries=2, retry_delay="20ms")
async def flaky(text: str) -> str:
    if step_context().attempt == 1:
        raise RetryableError("not yet")
    return text


@step()
def loud(number: int) -> int:
    print("printed by a step")
    return number * 2


@workflow(tags=["demo"])
async def doubled(number: int = 1, text: str = "x") -> dict:
    logger.info("doubling", extra={"number": number})
    first = await flaky(text)
    found = await asyncio.gather(loud(number), loud(number + 1))
    await sleep("10ms")
    return {"text": first, "numbers": found}


@workflow(name="by-another-name")
async def renamed(order: Order, at: datetime, code: str) -> list:
    return [order.amount, at.year, code]


@step(max_retries=0)
async def broken() -> None:
    raise KeyError("the step's own words")


@workflow()
async def failing() -> None:
    await broken()


@workflow()
async def misbehaving() -> None:
    open("somewhere")


@step()
async def note(text: str) -> str:
    return text


@workflow()
async def sleeper(pause: str = "1h") -> str:
    await note("before")
    await sleep(pause)
    return await note("after")


not_a_workflow = 5
"""


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "pyworkflow.cli", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def cli(
    *args: str | Path, cwd: Path, status: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*args),
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    if status != 1:  # a failed run shows the traceback of the user's code
        assert "Traceback" not in done.stderr, done.stderr
    return done


def document(*args: str | Path, cwd: Path, status: int = 0) -> Any:
    return json.loads(cli(*args, "--json", cwd=cwd, status=status).stdout)


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run that completed, one that failed and one that was cancelled."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "app.py").write_text(APP)
    cli("run", "app.py:doubled", "--arg", "number=4", cwd=folder)
    cli("run", "app.py:failing", cwd=folder, status=1)
    return folder


def ids(folder: Path) -> dict[str, str]:
    runs = document("runs", "list", cwd=folder)["runs"]
    return {run["workflow"]: run["run_id"] for run in runs}


class Running:
    """A command that goes on; reads its lines up to one that is waited for."""

    def __init__(self, *args: str | Path, cwd: Path) -> None:
        self.process = subprocess.Popen(
            command(*args),
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, words: str, stream: IO[str] | None) -> str:
        assert stream is not None
        seen = ""
        for line in stream:
            seen += line
            if words in line:
                return line
        raise AssertionError(f"{words!r} never came: {seen}")

    def stop(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


@pytest.fixture
def running() -> Iterator[Any]:
    begun: list[Running] = []

    def begin(*args: str | Path, cwd: Path) -> Running:
        begun.append(Running(*args, cwd=cwd))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


# --- run ----------------------------------------------------------------------------------------


def test_run_shows_what_happens_the_result_and_where_the_history_is(here: Path) -> None:
    out = cli("run", "app.py:doubled", "--arg", "number=4", cwd=here).stdout
    run_id = ids(here)["doubled"]
    assert f"started doubled(4)  {run_id}" in out or f"(number=4)  {run_id}" in out
    assert "step flaky failed on try 1, next try in" in out
    assert "RetryableError: not yet" in out
    assert "completed on try 2: 'x'" in out
    assert "[1] step loud" in out
    assert "[2] step loud" in out
    assert "sleeps" in out
    assert "info: doubling number=4" in out
    assert "result   {'text': 'x', 'numbers': [8, 10]}" in out
    assert f"history  {here / '.pyworkflow'}, run {run_id}" in out
    assert f"pyworkflow runs events {run_id}" in out
    assert "\x1b" not in out, "no colours where no terminal is"


def test_run_as_json_is_a_stream_of_lines_that_the_users_prints_do_not_disturb(here: Path) -> None:
    done = cli("run", "app.py:doubled", "--json", cwd=here)
    *events, end = lines(done.stdout)
    assert [one["event"]["seq"] for one in events] == list(range(1, len(events) + 1))
    assert events[0]["event"]["type"] == "workflow.started"
    assert end["status"] == "completed"
    assert end["result"] == {"text": "x", "numbers": [2, 4]}
    assert end["storage"] == str(here / ".pyworkflow")
    assert "printed by a step" in done.stderr


def test_arguments_are_json_or_text_as_the_annotations_want_them(here: Path) -> None:
    order = 'order={"id": "a", "amount": "7"}'
    done = cli(
        *("run", "app.py:renamed", "--json", "--arg", order),
        *("--arg", "at=2025-12-25T09:00:00Z", "--arg", "code=007"),
        cwd=here,
    )
    assert lines(done.stdout)[-1]["result"] == [7, 2025, "007"]


def test_a_workflow_goes_by_its_variable_or_by_its_name(here: Path) -> None:
    args = '{"order": {"id": "a", "amount": 1}, "at": "2025-01-01", "code": "x"}'
    for name in ("renamed", "by-another-name"):
        done = cli("run", f"app.py:{name}", "--args", args, "--json", cwd=here)
        assert lines(done.stdout)[-1]["workflow"] == "by-another-name"


def test_a_module_is_a_dotted_name_or_a_path(here: Path) -> None:
    package = here / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "orders.py").write_text(APP)
    done = cli("run", "shop.orders:doubled", "--args", "[5]", cwd=here)
    assert "'numbers': [10, 12]" in done.stdout


def test_a_key_is_one_run_and_other_arguments_are_refused(here: Path) -> None:
    first = cli("run", "app.py:doubled", "--key", "k", "--json", cwd=here)
    again = cli("run", "app.py:doubled", "--key", "k", "--json", cwd=here)
    assert lines(first.stdout)[-1] == lines(again.stdout)[-1]
    other = cli("run", "app.py:doubled", "--key", "k", "--arg", "number=9", cwd=here, status=2)
    assert "idempotency key" in other.stderr
    assert "number" in other.stderr
    assert len(document("runs", "list", cwd=here)["runs"]) == 1


def test_a_failed_run_is_status_1_and_shows_the_users_frames_alone(here: Path) -> None:
    done = cli("run", "app.py:failing", cwd=here, status=1)
    assert 'KeyError: "the step\'s own words"' in done.stderr
    assert "in broken" in done.stderr
    assert "in failing" in done.stderr
    assert "pyworkflow/_" not in done.stderr
    assert "runs events" in done.stdout


def test_a_stalled_run_is_status_1_and_said_to_be_durable(here: Path) -> None:
    done = cli("run", "app.py:misbehaving", cwd=here, status=1)
    assert "is stalled: WorkflowContextError" in done.stderr
    assert "corrected code goes on" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run", "app.py"), "write MODULE:WORKFLOW"),
        (("run", "nowhere.py:x"), "no such file: nowhere.py"),
        (("run", "no.such:x"), "No module named 'no'"),
        (("run", "app.py:doubledd"), "did you mean doubled?"),
        (("run", "app.py:not_a_workflow"), "decorate it with @workflow()"),
        (("run", "app.py:doubled", "--arg", "number=many"), "valid integer"),
        (("run", "app.py:doubled", "--arg", "nmber=1"), "unexpected keyword argument 'nmber'"),
        (("run", "app.py:doubled", "--arg", "number"), "is not NAME=VALUE"),
        (("run", "app.py:doubled", "--arg", "number=1", "--arg", "number=2"), "given twice"),
        (("run", "app.py:doubled", "--args", '{"number": 1}', "--arg", "number=2"), "given twice"),
        (("run", "app.py:doubled", "--args", "{"), "--args is no JSON"),
        (("run", "app.py:doubled", "--args", "3"), "JSON object, or a list"),
        (("runs", "show", "run_none"), "no such run: run_id=run_none"),
        (("run", "app.py:renamed", "--arg", "x=1"), "unexpected keyword argument 'x'"),
        (("runs", "list", "--cursor", "none"), "--cursor"),
        (
            ("runs", "events", "run_none", "--type", "nope"),
            "there are cancel.requested, limit.reached",
        ),
        (("runs", "events", "run_none", "--type", "no."), "'no.' is no type of events"),
        (("worker",), "no module is named"),
        (("worker", "app.py", "--queue", ""), "'--queue': a queue's name is empty"),
        (("worker", "app.py", "--queue", "a,,b"), "'--queue': a queue's name is empty"),
        (("worker", "app.py", "--queue", "q" * 256), "bytes=256"),
        (("replay", "none.json"), "no such file"),
        (("rnu",), "Did you mean run"),
        (("runs", "list", "--storage", "nonsense"), "has no scheme"),
    ],
)
def test_wrong_use_is_status_2_and_says_what_to_write(
    used: Path, args: tuple[str, ...], words: str
) -> None:
    done = cli(*args, cwd=used, status=2)
    assert words in done.stderr
    assert done.stdout == ""


def test_wrong_arguments_leave_no_store_behind(here: Path) -> None:
    cli("run", "app.py:doubled", "--arg", "number=many", cwd=here, status=2)
    assert not (here / ".pyworkflow").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:app.py", "not a directory"),
        ("nosuch://x", "no installed plugin serves"),
        ("redis://localhost:1", "does not answer"),
    ],
)
def test_a_store_that_cannot_be_used_is_status_3(used: Path, url: str, words: str) -> None:
    for args in (("runs", "list"), ("run", "app.py:doubled"), ("worker", "app.py")):
        assert words in cli(*args, "--storage", url, cwd=used, status=3).stderr


def test_a_module_that_raises_is_named_with_the_line(here: Path) -> None:
    (here / "bad.py").write_text("def f():\n    raise ValueError('nope')\n\nf()\n")
    done = cli("run", "bad.py:x", cwd=here, status=2)
    assert "ValueError: nope" in done.stderr
    assert "bad.py:2 in f" in done.stderr


def test_the_options_beat_the_module_and_may_stand_before_the_command(here: Path) -> None:
    (here / "app.py").write_text(
        "from pyworkflow import configure\nconfigure(storage='file:theirs')\n" + APP
    )
    cli("--storage", "file:mine", "run", "app.py:doubled", cwd=here)
    assert not (here / "theirs").exists()
    assert len(document("--storage", "file:mine", "runs", "list", cwd=here)["runs"]) == 1
    cli("run", "app.py:doubled", cwd=here)
    assert (here / "theirs").is_dir()


def test_interrupted_run_is_status_130_says_how_to_go_on_and_a_worker_does(
    here: Path, running: Any
) -> None:
    run = running("run", "app.py:sleeper", "--arg", "pause=2s", cwd=here)
    run.until("sleeps", run.process.stdout)
    status, _, err = run.stop(signal.SIGINT)
    assert status == 130, err
    run_id = ids(here)["sleeper"]
    assert f"run_id={run_id}" in err
    assert "pyworkflow worker app.py" in err
    assert f"pyworkflow runs cancel {run_id}" in err
    assert "Traceback" not in err
    assert document("runs", "show", run_id, cwd=here)["status"] in ("suspended", "running")

    worker = running("worker", "app.py", cwd=here)
    cli("runs", "events", run_id, "--follow", cwd=here)
    assert document("runs", "show", run_id, cwd=here)["result"] == "after"
    status, _, err = worker.stop(signal.SIGTERM)
    assert status == 0, err


# --- worker -------------------------------------------------------------------------------------


def test_a_worker_names_its_store_and_workflows_and_drains_on_sigterm(
    here: Path, running: Any
) -> None:
    queues = ("--queue", "default, slow", "--queue", "slow")
    worker = running("worker", "app.py", "--concurrency", "3", *queues, cwd=here)
    line = worker.until("takes from queues", worker.process.stderr)
    assert line.rstrip().endswith("takes from queues: default, slow")
    assert "doubled" in worker.until("has workflows", worker.process.stderr)
    line = worker.until("claims work", worker.process.stderr)
    assert f"storage={here / '.pyworkflow'}" in line
    status, out, err = worker.stop(signal.SIGTERM)
    assert status == 0, err
    assert "has stopped" in err
    assert out == ""


def test_a_worker_takes_its_modules_from_the_settings(here: Path, running: Any) -> None:
    (here / "pyproject.toml").write_text("[tool.pyworkflow]\nmodules = 'app'\n")
    worker = running("worker", "--json", cwd=here)
    line = json.loads(worker.until("takes from queues", worker.process.stderr))
    assert line["message"] == "the worker takes from queues: every queue"
    line = json.loads(worker.until("has workflows", worker.process.stderr))
    assert "doubled" in line["message"]
    worker.until("claims work", worker.process.stderr)
    assert worker.stop(signal.SIGINT)[0] == 0


def test_a_worker_without_a_workflow_is_wrong_use(here: Path) -> None:
    (here / "empty.py").write_text("")
    assert "no workflow is defined" in cli("worker", "empty.py", cwd=here, status=2).stderr


# --- runs, storage, plugins -----------------------------------------------------------------------


def test_runs_are_listed_newest_first_by_status_and_in_pages(used: Path) -> None:
    out = cli("runs", "list", cwd=used).stdout.splitlines()
    assert out[0].split() == ["RUN", "WORKFLOW", "STATUS", "CREATED", "ENDED"]
    assert [line.split()[1] for line in out[1:]] == ["failing", "doubled"]
    failed = document("runs", "list", "--status", "failed", cwd=used)["runs"]
    assert [run["workflow"] for run in failed] == ["failing"]
    page = document("runs", "list", "--limit", "1", cwd=used)
    rest = document("runs", "list", "--limit", "1", "--cursor", page["cursor"], cwd=used)
    assert [page["runs"][0]["workflow"], rest["runs"][0]["workflow"]] == ["failing", "doubled"]
    none = cli("runs", "list", "--workflow", "nothing", cwd=used)
    assert none.stdout == ""
    assert "no such runs in" in none.stderr


def test_asking_about_a_store_that_is_not_there_makes_none(tmp_path: Path) -> None:
    for words in (["runs", "list"], ["runs", "show", "x"], ["storage", "stats"]):
        done = cli(*words, "--storage", "sqlite:///mistyped.db", cwd=tmp_path, status=3)
        assert "there is no store" in done.stderr
        assert "mistyped.db" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_is_shown_with_arguments_and_result_or_error(used: Path) -> None:
    run = document("runs", "show", ids(used)["doubled"], cwd=used)
    assert run["result"] == {"text": "x", "numbers": [8, 10]}
    assert run["tags"] == ["demo"]
    assert run["work"] == []
    out = cli("runs", "show", ids(used)["failing"], cwd=used).stdout
    assert "failed" in out
    step, _, workflow = out.partition("In the workflow:")
    assert "In the step that failed last:" in step
    assert "in broken\n" in step
    assert 'KeyError: "the step\'s own words"' in step
    assert "in failing\n" in workflow
    assert "pyworkflow/_" not in out
    assert 'KeyError: "the step\'s own words"' in workflow


def test_events_are_shown_in_order_and_filtered(used: Path) -> None:
    run_id = ids(used)["doubled"]
    events = lines(cli("runs", "events", run_id, "--json", cwd=used).stdout)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert set(events[0]) == {
        *("v", "run_id", "seq", "timestamp", "type", "class", "op", "key", "data"),
    }
    out = cli("runs", "events", run_id, "--type", "step.retrying", cwd=used).stdout
    assert len(out.splitlines()) == 1
    assert "RetryableError: not yet" in out
    part = lines(
        cli("runs", "events", run_id, "--after", "2", "--limit", "3", "--json", cwd=used).stdout
    )
    assert [event["seq"] for event in part] == [3, 4, 5]


def test_a_run_that_no_worker_has_is_asked_to_cancel_and_ends_at_a_worker(
    here: Path, running: Any
) -> None:
    run = running("run", "app.py:sleeper", cwd=here)
    run.until("sleeps", run.process.stdout)
    run.stop(signal.SIGINT)
    run_id = ids(here)["sleeper"]
    asked = cli("runs", "cancel", run_id, "--reason", "twice", cwd=here)
    assert "asked to cancel" in asked.stdout
    running("worker", "app.py", cwd=here)
    followed = cli("runs", "events", run_id, "--follow", cwd=here).stdout
    assert "asked to cancel: twice" in followed
    assert document("runs", "show", run_id, cwd=here)["status"] == "cancelled"
    assert document("runs", "cancel", run_id, cwd=here)["status"] == "cancelled"


def test_an_ended_run_cannot_be_cancelled(used: Path) -> None:
    done = cli("runs", "cancel", ids(used)["doubled"], cwd=used, status=1)
    assert "the run has ended" in done.stderr


def test_a_store_is_checked_and_counted(used: Path) -> None:
    assert document("storage", "check", cwd=used)["violations"] == []
    assert "sound" in cli("storage", "check", cwd=used).stdout
    stats = document("storage", "stats", cwd=used)
    assert stats["counts"]["runs"] == 2
    assert stats["location"] == str(used / ".pyworkflow")
    assert stats["capabilities"]["durable"] is True


def test_plugins_are_listed_and_a_broken_one_is_status_3(used: Path, tmp_path: Path) -> None:
    listed = document("plugins", cwd=used)["plugins"]
    assert {"file", "local", "memory"} <= {one["name"] for one in listed}
    info = tmp_path / "their_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pyworkflow]\ntheirs = no_such_module\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = cli("plugins", cwd=used, status=3, PYTHONPATH=path)
    assert "broken" in done.stdout
    assert "no_such_module" in done.stderr


def test_a_plugin_adds_a_command(used: Path, tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text(
        "import click\n"
        "from pyworkflow.spi import hookimpl\n\n"
        "@hookimpl\n"
        "def pyworkflow_cli(group):\n"
        "    group.add_command(click.Command('greet', callback=lambda: print('hello')))\n"
    )
    info = tmp_path / "greeting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pyworkflow]\ngreeting = greeting\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert cli("greet", cwd=used, PYTHONPATH=path).stdout == "hello\n"
    assert "greet" in cli("--help", cwd=used, PYTHONPATH=path).stdout


# --- replay ---------------------------------------------------------------------------------------


def test_a_history_is_replayed_from_the_store_and_from_a_file(used: Path, tmp_path: Path) -> None:
    run_id = ids(used)["doubled"]
    saved = tmp_path / "doubled.json"
    done = cli("replay", run_id, "--module", "app.py", "--save", saved, cwd=used)
    assert "the code fits" in done.stdout
    assert document("replay", saved, "--module", "app.py", cwd=used)["status"] == "completed"


def test_changed_code_does_not_fit_and_is_status_1(used: Path, tmp_path: Path) -> None:
    changed = tmp_path / "app.py"
    changed.write_text(APP.replace("await flaky(text)", "await note(text)"))
    found = document("replay", ids(used)["doubled"], "--module", changed, cwd=used, status=1)
    assert not found["ok"]
    assert "flaky" in found["mismatch"]
    assert "note" in found["mismatch"]


def test_replay_needs_the_workflows_module(used: Path) -> None:
    done = cli("replay", ids(used)["doubled"], cwd=used, status=2)
    assert "no workflow of this name" in done.stderr
    assert "--module" in done.stderr


# --- the command itself ---------------------------------------------------------------------------


def test_every_command_has_help_and_the_shared_options(tmp_path: Path) -> None:
    script = (
        "from pyworkflow.cli._root import execute\n"
        "for name in ['', 'run', 'worker', 'runs', 'runs list', 'runs show', 'runs events',\n"
        "             'runs cancel', 'replay', 'storage', 'storage check', 'storage stats',\n"
        "             'plugins']:\n"
        "    assert execute([*name.split(), '--help']) == 0\n"
        "    print('=====')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    texts = done.stdout.split("=====\n")[:-1]
    assert len(texts) == 13
    for text in texts:
        for option in ("--storage", "--executor", "--json"):
            assert option in text
        assert "\\b" not in text


def test_without_its_extra_the_command_names_the_install_line_and_is_status_2(
    tmp_path: Path,
) -> None:
    script = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rich' else real(name, *a)\n"
        "from pyworkflow.cli import main\n"
        "main(['plugins'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'pyworkflow-core[cli]'" in done.stderr


def test_help_loads_neither_the_engine_nor_pydantic_nor_rich(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pyworkflow.cli import main\n"
        "try:\n"
        "    main(['run', '--help'])\n"
        "finally:\n"
        "    heavy = {'pydantic', 'asyncio', 'rich', 'pyworkflow._client'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_a_reader_that_has_seen_enough_is_no_error(used: Path) -> None:
    run_id = ids(used)["doubled"]
    one = subprocess.Popen(
        command("runs", "events", run_id, "--json"),
        cwd=used,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert one.stdout is not None
    assert one.stderr is not None
    one.stdout.close()
    assert one.wait(timeout=DEADLINE) == 0
    assert one.stderr.read() == b""
    one.stderr.close()
