"""What must hold when everything has ended: results, histories, and that nothing was lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from pyworkflow.events import Event
from pyworkflow.runs import ItemKind, Run, RunStatus
from pyworkflow.storekit import fsck
from pyworkflow.testing.internals import CancelRun, CompleteRun, EmitLog, FailRun, Replay, decode
from pyworkflow_conformance.simulation._checks import Broken
from pyworkflow_conformance.simulation._cluster import Ended
from pyworkflow_conformance.simulation._processes import Job
from pyworkflow_conformance.simulation._programs import VERSIONS

__all__ = ["judge"]

_GIVEN_UP = "worker_lost"


def judge(ended: Ended, version: str, expected: Sequence[object] | None) -> list[object]:
    """Check what is left; the results of the jobs. Raises ``Broken``.

    ``expected``: what the undisturbed cluster came to; None for that cluster itself.
    """
    return asyncio.run(_judge(ended, version, expected))


async def _judge(ended: Ended, version: str, expected: Sequence[object] | None) -> list[object]:
    store = ended.store.clone()
    results: list[object] = []
    owners: set[str] = set()
    for number, job in enumerate(ended.jobs):
        if len(job.ids) != 1:
            raise Broken("idempotency", "-", f"one key, several runs: {job.key} {sorted(job.ids)}")
        (run_id,) = job.ids
        owners.add(run_id)
        run = await store.get_run(run_id)
        if run is None:
            raise Broken("lost", run_id, "a start was answered, and there is no run")
        events = await store.get_events(run_id)
        if events != ended.checks.known(run_id):
            raise Broken("I2", run_id, "events were altered after they were recorded")
        _history(run, events, version)
        for item in await store.list_work(run_id):
            if item.kind is not ItemKind.DELIVER:
                raise Broken("I8", run_id, f"the run has ended, and owns {item.item_id}")
        cut_short = _interrupted(ended, job, run, events, version)
        value = (
            decode(run.result_text or "") if run.status is RunStatus.COMPLETED else str(run.status)
        )
        results.append(value)
        wanted = None if expected is None else expected[number]
        _results(ended, job, run, events, value, wanted, cut_short=cut_short)
    unknown = set(ended.checks.runs()) - owners
    # Without a key, a start of which nobody heard may have made a run.
    if len(unknown) > sum(job.unanswered for job in ended.jobs if job.key is None):
        raise Broken("idempotency", min(unknown), "a run that nobody was told of")
    _bodies(ended)
    problems = await fsck(store)
    if problems:
        raise Broken("fsck", problems[0].run_id, "; ".join(str(p) for p in problems[:3]))
    return results


def _history(run: Run, events: list[Event], version: str) -> None:
    """Replay of the history is a fixed point: it asks for nothing, and ends as recorded."""
    last = [e for e in events if e.klass == "C" and e.type.startswith("workflow.")]
    if len(last) != 1:
        raise Broken("once", run.run_id, f"ends recorded: {[e.type for e in last]}")
    if last[0].data.get("kind") == "control":
        return  # closed without code
    workflow = VERSIONS[version]
    assert workflow is not None
    replay = Replay(workflow, run.run_id)
    if version != "1":
        replay.acknowledge(run.seen_seq)  # ``patched`` decides by it
    try:
        replay.feed(events)
        if replay.problem is not None:
            raise Broken("replay", run.run_id, f"the history does not replay: {replay.problem}")
        match replay.outcome:
            case CompleteRun():
                found = "completed"
            case FailRun():
                found = "failed"
            case CancelRun():
                found = "cancelled"
            case None:
                found = "none"
        if found != run.status:
            raise Broken("replay", run.run_id, f"replay ends {found}, the run {run.status}")
        if isinstance(replay.outcome, CompleteRun) and replay.outcome.result != run.result_text:
            raise Broken(
                "replay",
                run.run_id,
                f"replay gives {replay.outcome.result}, the run {run.result_text}",
            )
        lines = [c.message for c in replay.take() if isinstance(c, EmitLog)]
        recorded = [e.data["message"] for e in events if e.type == "log.info"]
        if lines != recorded and version == "1":
            raise Broken("logs", run.run_id, f"replay logs {lines}, recorded are {recorded}")
    finally:
        replay.close()


def _interrupted(ended: Ended, job: Job, run: Run, events: list[Event], version: str) -> bool:
    """Whether a cancel or a deadline came while the code ran; then that is how the run ended."""
    if run.status is RunStatus.TERMINATED and not job.terminate_asked:
        raise Broken("result", run.run_id, "terminated, and nobody asked for it")
    if job.terminated and run.status is not RunStatus.TERMINATED:
        raise Broken("lost", run.run_id, f"a termination was answered, and it is {run.status}")
    if run.status is RunStatus.TERMINATED:
        return True
    if run.status is RunStatus.CANCELLED and not job.cancel_asked:
        raise Broken("result", run.run_id, "cancelled, and nobody asked for it")
    first = next((e for e in events if e.type in ("cancel.requested", "workflow.deadline")), None)
    asked = any(e.type == "cancel.requested" for e in events)
    if job.cancel_accepted and run.status is not RunStatus.CANCELLED and not asked:
        raise Broken("lost", run.run_id, "a cancel was answered, and is nowhere")
    if first is None or any(e.data.get("kind") == "control" for e in events if e.klass == "C"):
        return run.status is RunStatus.CANCELLED  # closed before its code began, or without it
    workflow = VERSIONS[version]
    assert workflow is not None
    replay = Replay(workflow, run.run_id)
    try:
        if version != "1":
            replay.acknowledge(run.seen_seq)
        replay.know_markers(events)
        replay.feed(events[: first.seq - 1])
        if replay.outcome is not None:
            return False  # it had come to its end before
    finally:
        replay.close()
    if first.type == "cancel.requested":
        ended.seen["code cancelled"] += 1
        if run.status is not RunStatus.CANCELLED:
            raise Broken("interrupted", run.run_id, f"cancelled while it ran, and {run.status}")
    else:
        ended.seen["code out of time"] += 1
        kind = "" if run.error is None else run.error.type.rpartition(":")[2]
        if run.status is not RunStatus.CANCELLED and kind != "WorkflowTimeout":
            raise Broken("interrupted", run.run_id, f"out of time, and {run.status} {kind}")
    return True


def _results(
    ended: Ended,
    job: Job,
    run: Run,
    events: list[Event],
    value: object,
    expected: object,
    *,
    cut_short: bool,
) -> None:
    for told in job.results:
        if run.status is RunStatus.COMPLETED and told != value:
            raise Broken("result", run.run_id, f"a caller got {told!r}, the run has {value!r}")
    if len(job.results) != job.callers:
        raise Broken("lost", run.run_id, f"callers={job.callers} answers={len(job.results)}")
    if cut_short:
        return
    if run.status is not RunStatus.COMPLETED:
        raise Broken("result", run.run_id, f"status={run.status}, nobody asked for that")
    given_up = [e for e in events if e.type == "step.failed" and e.data.get("kind") == _GIVEN_UP]
    if given_up:
        if ended.losses < 3:
            raise Broken(
                "result", run.run_id, f"a step was given up after {ended.losses} losses of claims"
            )
        ended.seen["step given up after its workers died"] += 1
        return
    if expected is not None and value != expected:
        raise Broken("result", run.run_id, f"result={value!r} undisturbed={expected!r}")


def _bodies(ended: Ended) -> None:
    """At-most-once steps begin at most once; with nothing wrong, every body does."""
    once: Counter[tuple[str, str]] = Counter()
    for (run_id, op, attempt, name), times in ended.bodies.items():
        if name == "once":
            once[run_id, op] += times
            if once[run_id, op] > 1:
                raise Broken("at most once", run_id, f"begun {once[run_id, op]} times: op={op}")
        if times > 1 and not any(_disturbs(what) for what in ended.seen):
            raise Broken(
                "exactly once", run_id,
                f"nothing went wrong, and a body began {times} times: op={op} try={attempt}",
            )  # fmt: skip
        if times > 1:
            ended.seen["body begun again"] += 1


_HARMLESS = frozenset(
    {"bell lost", "bell doubled", "bell delayed", "call: fails_before", "caller cancelled",
     "call: doubles"}
)  # fmt: skip
_DISTURBING = (
    "worker", "call", "answer", "outage", "clock", "version", "coroutine", "run stalled",
    "unknown", "lease",
)  # fmt: skip


def _disturbs(what: str) -> bool:
    return what not in _HARMLESS and what.startswith(_DISTURBING)
