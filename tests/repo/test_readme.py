"""The snippets of README and docs do what the text around them says.

That every block of the README runs is for run_readme.py; here those that only define are used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.clone import ROOT
from tests.repo.run_readme import blocks, run

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
PAGES = [
    page for page in sorted(ROOT.glob("docs/**/*.md")) if "```python" in page.read_text("utf-8")
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    assert not any(block.is_command for block in blocks(page.read_text("utf-8")))
    assert run(page) == 0


def test_every_link_of_the_pages_leads_somewhere() -> None:
    import re

    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)
