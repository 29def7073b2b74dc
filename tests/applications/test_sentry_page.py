"""The recipe for Sentry, with its real client and a transport in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.clone import ROOT
from tests.repo.run_readme import blocks

# What the page defines is in front of each of these programs.
KEPT = """
import asyncio
from sentry_sdk.transport import Transport
from pyworkflow import FatalError, configure, run, start, get_run
from pyworkflow.runs import RunStatus

configure(storage="memory://")


class Kept(Transport):
    def __init__(self):
        self.events = []

    def capture_envelope(self, envelope):
        event = envelope.get_event()
        if event is not None:
            self.events.append(event)


kept = Kept()
sentry_sdk.get_client().transport = kept


def failures(*calls):
    for flow, *args in calls:
        try:
            run(flow, *args, timeout=60)
        except Exception as error:
            print("run:", type(error).__name__, error)
    sentry_sdk.flush()
    return kept.events


def group_of(event):
    values = event["exception"]["values"]
    frames = [(f["filename"], f["function"], f["lineno"]) for f in values[-1]["stacktrace"]["frames"]]
    # What a server does with {{ default }}: types and stacks first, then the template.
    return (values[-1]["type"], *frames, event["logentry"]["message"], *event["fingerprint"])
"""

GROUPS = """
@workflow
async def other(order_id: str) -> None:
    await charge(order_id)

@step(max_retries=0)
async def charge_twice(order_id: str) -> None:
    raise FatalError(f"twice {order_id}")

@workflow
async def twice(order_id: str) -> None:
    await charge_twice(order_id)

events = failures(
    (order, "order-1"), (order, "order-2"), (other, "order-3"), (twice, "order-4"), (twice, "order-5"),
)
assert len(events) == 5, [e["logentry"] for e in events]
groups = [group_of(e) for e in events]
assert groups[0] == groups[1] and groups[3] == groups[4], groups
assert len(set(groups)) == 3, groups
# The templates alone are groups as well: for trackers that know nothing of fingerprints.
assert len({e["logentry"]["message"] for e in events}) == 3
for event, name in zip(events, ("order", "order", "other", "twice", "twice")):
    assert event["level"] == "error"
    assert event["tags"]["workflow"] == name and event["tags"]["step"] is None
    assert event["tags"]["run_id"].startswith("run_")
    (value,) = event["exception"]["values"]
    functions = [f["function"] for f in value["stacktrace"]["frames"]]
    assert functions[0] == name and functions[-1] in ("charge", "charge_twice"), functions
    lines = [f.get("context_line", "") for f in value["stacktrace"]["frames"]]
    assert "raise" in lines[-1], lines
assert events[0]["exception"]["values"][0]["value"] == "no bank for order-1"
"""

STALLED = """
@workflow
async def stalls() -> None:
    asyncio.get_running_loop().run_in_executor(None, print)

run_id = start(stalls)
while get_run(run_id).status is not RunStatus.STALLED:
    pass
sentry_sdk.flush()
(event,) = kept.events
assert event["tags"] == {"run_id": run_id, "workflow": "stalls", "step": None}
assert event["exception"]["values"][-1]["type"] == "WorkflowContextError"
assert "stalls" in [f["function"] for f in event["exception"]["values"][-1]["stacktrace"]["frames"]]
"""

CAPTURED = """
@step(max_retries=0)
def in_a_thread() -> None:
    try:
        raise ValueError("handled")
    except ValueError as error:
        sentry_sdk.capture_exception(error)

@step(max_retries=0)
async def on_the_loop() -> None:
    sentry_sdk.capture_message("a note")

@workflow
async def captures() -> None:
    await in_a_thread()
    await on_the_loop()

events = failures((captures,))
sentry_sdk.capture_message("outside")
assert [e.get("tags", {}).get("step") for e in events] == ["in_a_thread", "on_the_loop", None]
assert [e.get("tags", {}).get("workflow") for e in events] == ["captures", "captures", None]
"""

RECOVERED = """
tries = []

@step(retry_delay="10ms")
async def flaky() -> str:
    tries.append(1)
    if len(tries) < 4:
        raise ConnectionError("again")
    return "done"

@step(max_retries=0)
async def declined() -> None:
    raise FatalError("no money")

@workflow
async def recovers() -> str:
    try:
        await declined()
    except FatalError:
        return await flaky()

assert failures((recovers,)) == [] and len(tries) == 4
"""


@pytest.mark.parametrize(
    "program",
    [GROUPS, STALLED, CAPTURED, RECOVERED],
    ids=["groups", "stalled", "captured", "recovered"],
)
def test_n07_the_page_for_sentry_makes_one_issue_of_each_workflow_and_error(
    program: str, tmp_path: Path
) -> None:
    text = (ROOT / "docs/how-to/sentry.md").read_text("utf-8")
    (page,) = [b.code for b in blocks(text) if "sentry_sdk.init" in b.code]
    (tmp_path / "app.py").write_text(page + KEPT + program, "utf-8")
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYWORKFLOW_", "SENTRY_"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
