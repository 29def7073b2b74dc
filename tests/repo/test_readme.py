"""The snippets of README and docs do what the text around them says.

That every block of the README runs is for run_readme.py; here those that only define are used.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyworkflow.worker import Settings
from tests.devops.processes import Program, environment
from tests.devops.processes import run as run_program
from tests.repo.clone import ROOT
from tests.repo.run_readme import blocks, run
from tests.servers import ValkeyServer
from tests.watched import until

USES = {
    "async def call_external_api": """
from pyworkflow import run, workflow

@workflow()
async def ask(url: str):
    try:
        return await call_external_api(url)
    except FatalError as error:
        return str(error)

assert run(ask, "https://example.org/api") == {"ok": True}
assert run(ask, "https://example.org/missing") == "Resource not found"
""",
    "async def scheduled_reminder": """
import asyncio
from pyworkflow.testing import TestEnvironment

async def skip_a_week():
    async with TestEnvironment() as env:
        begun = await env.now()
        assert await env.run(scheduled_reminder, "user_123") == "All reminders sent"
        assert (await env.now() - begun).days == 8

asyncio.run(skip_a_week())
""",
    "payment_gateway.charge(amount)": """
import asyncio
from pyworkflow import workflow
from pyworkflow.testing import TestEnvironment

@workflow()
async def pay(amount: float):
    try:
        return await process_payment(amount)
    except FatalError as error:
        return str(error)

async def both():
    async with TestEnvironment() as env:
        assert await env.run(pay, 1000.0) == "Insufficient funds"
        payment_gateway.tries = 0
        assert await env.run(pay, 10.0) == "charged"
        assert payment_gateway.tries == 2

asyncio.run(both())
""",
}


# The README's own blocks are run by `tox -e readme`, with its commands.
# The blocks of that page are excerpts of a program that tests run: `test_server_guide.py`.
EXCERPTS = ROOT / "docs" / "how-to" / "write-a-backend-for-a-server.md"
PAGES = [
    page
    for page in sorted(ROOT.glob("docs/**/*.md"))
    if "```python" in page.read_text("utf-8") and page != EXCERPTS
]


def script(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = folder / "snippet.py"
    path.write_text(code, "utf-8")
    return subprocess.run(
        [sys.executable, path.name],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYWORKFLOW_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("mark", USES)
def test_a_snippet_does_what_it_says(mark: str, tmp_path: Path) -> None:
    found = [b for b in blocks((ROOT / "README.md").read_text("utf-8")) if mark in b.code]
    assert len(found) == 1
    done = script(tmp_path, found[0].code + USES[mark])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_snippet_says_what_waits_and_how_to_go_on(tmp_path: Path) -> None:
    (first,) = [
        b
        for b in blocks((ROOT / "README.md").read_text("utf-8"))
        if "async def onboarding_workflow" in b.code
    ]
    done = script(tmp_path, first.code)
    assert done.returncode == 0, done.stderr
    assert "Sending welcome email to user user_123" in done.stdout
    assert "Sending tips" not in done.stdout
    assert "pyworkflow worker snippet.py" in done.stderr


def test_the_commands_for_celery_work_as_they_are_written(
    tmp_path: Path, make_valkey: Callable[..., ValkeyServer]
) -> None:
    """Each in a terminal of its own; Valkey on some port stands in for Redis in a container."""
    text = (ROOT / "README.md").read_text("utf-8")
    (app,) = [b.code for b in blocks(text) if "async def onboarding_workflow" in b.code]
    (page,) = [b.code for b in blocks(text) if "docker run" in b.code]
    (tmp_path / "app.py").write_text(app, "utf-8")
    lines = [line for line in page.splitlines() if line and not line.startswith("#")]
    (given,) = (shlex.split(line)[1:] for line in lines if line.startswith("export "))
    commands = [shlex.split(line) for line in lines if not line.startswith("export ")]
    docker, worker_command, beat_command, start = commands
    assert docker[-3:] == ["-p", "6379:6379", "redis:7-alpine"]
    assert Settings().broker_url == "redis://localhost:6379/0"
    broker = make_valkey({"appendonly": "no"}).url
    env = environment(**dict(each.split("=", 1) for each in given), PYWORKFLOW_BROKER_URL=broker)
    with (
        Program(worker_command, env=env, cwd=tmp_path, log=tmp_path / "worker.log") as worker,
        Program(beat_command, env=env, cwd=tmp_path, log=tmp_path / "beat.log") as beat,
    ):
        worker.wait_for(" ready.")
        done = run_program(*start, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^Workflow started: run_\w+$", done.stdout, re.MULTILINE)
        worker.wait_for("Sending welcome email to user user_123")
        beat.wait_for("Sending due task pyworkflow-sweep")
        show = ("pyworkflow", "runs", "list", "--status", "suspended")
        until(
            lambda: "onboarding_workflow" in run_program(*show, env=env, cwd=tmp_path).stdout,
            "the run does not sleep",
        )
        assert "Sending tips" not in worker.said()
        assert (worker.end(), beat.end()) == (0, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    assert not any(block.is_command for block in blocks(page.read_text("utf-8")))
    assert run(page) == 0


def test_every_link_of_the_pages_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        for target in re.findall(
            r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`\n]+`", "code", page.read_text("utf-8"))
        )
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)
