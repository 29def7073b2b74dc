"""Log records of failures: their exceptions, their stacks, and the templates that group them."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import Any

import pytest

from pyworkflow import FatalError, StepError, step, workflow
from pyworkflow._engine.observers import Raised
from pyworkflow._failures import encode_error
from pyworkflow._logging import _TextFormatter
from pyworkflow._tracebacks import join_stacks, rebuilt, stack_of
from pyworkflow.runs import ErrorInfo
from tests.core._driving import bench


class Declined(Exception):
    """An error of the application."""


@step(name="n07.charge", max_retries=1, retry_delay=0)
async def charge(order: str) -> None:
    _ask_the_bank(order)


def _ask_the_bank(order: str) -> None:
    raise Declined(f"card of {order}\nis refused: 100% sure")


@step(name="n07.ship", max_retries=0)
def ship(order: str) -> None:
    raise ConnectionError(f"no carrier for {order}")


@workflow(name="n07.pays")
async def pays(order: str) -> None:
    await charge(order)


@workflow(name="n07.pays_100%d")
async def pays_too(order: str) -> None:
    await charge(order)


@workflow(name="n07.ships")
async def ships(order: str) -> None:
    await ship(order)


@workflow(name="n07.wraps")
async def wraps(order: str) -> None:
    try:
        await ship(order)
    except ConnectionError as error:
        raise ValueError("not sent") from error


@workflow(name="n07.own")
async def own(order: str) -> None:
    raise KeyError(order)


def _records(caplog: pytest.LogCaptureFixture, start: str) -> list[logging.LogRecord]:
    return [
        r
        for r in caplog.records
        if r.name == "pyworkflow.engine" and r.getMessage().startswith(start)
    ]


def _fail(caplog: pytest.LogCaptureFixture, *starts: tuple[Any, str]) -> list[str]:
    async def main() -> list[str]:
        async with bench() as b:
            ids = []
            for flow, order in starts:
                ids.append(await b.start(flow, order))
                await b.until(ids[-1], "failed")
            return ids

    caplog.clear()
    return asyncio.run(main())


def _any(record: Any) -> Any:
    return record  # it has the context of the run, which no type knows


def _functions(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def _error_of(record: logging.LogRecord) -> BaseException:
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    return record.exc_info[1]


def test_n07_a_failed_run_has_the_error_with_the_stack_of_workflow_and_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (run_id,) = _fail(caplog, (pays, "order-1"))
    (record,) = _records(caplog, "run failed")
    error = _error_of(record)
    assert record.levelname == "ERROR"
    assert type(error).__name__ == "Declined"
    names = _functions(error)
    assert names.index("pays") < names.index("charge") < names.index("_ask_the_bank")
    assert names[-1] == "_ask_the_bank"
    assert record.exc_info is not None
    assert record.exc_info[2] is error.__traceback__
    text = "".join(traceback.format_exception(error))
    assert 'raise Declined(f"card of {order}' in text  # the line of the source
    assert vars(record)["run_id"] == run_id
    assert vars(record)["workflow_name"] == "n07.pays"


def test_n07_a_failed_step_has_its_error_and_an_attempt_before_it_is_a_warning_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _fail(caplog, (pays, "order-1"))
    attempt, last = _records(caplog, "step failed")
    assert (attempt.levelname, attempt.exc_info) == ("WARNING", None)
    assert last.levelname == "WARNING"
    error = _error_of(last)
    assert isinstance(error, Declined)  # the one that the step raised
    assert _functions(error)[-2:] == ["charge", "_ask_the_bank"]
    # The workflow may handle it: a line of text says where, and no more.
    for formatter in (_TextFormatter(True), logging.Formatter()):
        text = formatter.format(last)
        assert text.splitlines()[-1].startswith(f'    File "{__file__}", line ')
        assert text.endswith("in _ask_the_bank")
        assert "Traceback" not in text
    # One failure is one record for those who alert on errors.
    assert [r.levelname for r in caplog.records].count("ERROR") == 1


def test_n07_templates_group_by_workflow_and_error_and_by_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _fail(
        caplog,
        *[(pays, "order-1"), (pays, "order-2"), (pays_too, "order-3"), (ships, "order-4")],
        *[(ships, "order-5"), (own, "order-6")],
    )
    runs = _records(caplog, "run failed")
    groups = [r.msg for r in runs]
    assert groups[0] == groups[1]
    assert groups[3] == groups[4]
    assert len(set(groups)) == 4
    assert [r.getMessage().partition("run_id=")[0] for r in runs[:3]] == [
        "run failed: workflow=n07.pays ",
        "run failed: workflow=n07.pays ",
        "run failed: workflow=n07.pays_100%d ",
    ]
    steps = _records(caplog, "step failed, no further try")
    assert len({r.msg for r in steps}) == 3
    assert steps[0].msg == steps[1].msg
    assert not any("order-" in r.msg or r.run_id in r.msg for r in map(_any, runs))
    assert "card of order-2" in runs[1].getMessage()


def test_n07_the_cause_of_a_failed_run_has_the_stack_of_its_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _fail(caplog, (wraps, "order-1"))
    (record,) = _records(caplog, "run failed")
    error = _error_of(record)
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, ConnectionError)
    names = _functions(error.__cause__)
    assert names[0] == "wraps"
    assert names[-1] == "ship"


def test_n07_a_stalled_run_has_its_problem(caplog: pytest.LogCaptureFixture) -> None:
    @workflow(name="n07.stalls")
    async def n07_stalls() -> None:
        asyncio.get_running_loop().run_in_executor(None, print)

    async def main() -> str:
        async with bench() as b:
            run_id = await b.start(n07_stalls)
            await b.until(run_id, "stalled")
            return run_id

    run_id = asyncio.run(main())
    (record,) = _records(caplog, "the run stalled")
    error = _error_of(record)
    assert type(error).__name__ == "WorkflowContextError"
    assert record.levelname == "ERROR"
    assert record.msg == ("the run stalled: WorkflowContextError%s workflow=n07.stalls run_id=%s")
    assert record.getMessage().startswith(f"the run stalled: WorkflowContextError: {error}")
    assert record.getMessage().endswith(f"workflow=n07.stalls run_id={run_id}")
    assert vars(record)["workflow_name"] == "n07.stalls"


def test_n07_lines_of_a_traceback_in_the_text_log_are_no_records(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @step(max_retries=0)
    async def n07_forges() -> None:
        raise FatalError("x\n2026-01-01T00:00:00.000+00:00 INFO forged\n\x1b[2J\r\x85\u2028")

    @workflow(name="n07.forged")
    async def n07_forged() -> None:
        await n07_forges()

    async def main() -> None:
        async with bench() as b:
            await b.until(await b.start(n07_forged), "failed")

    asyncio.run(main())
    (record,) = _records(caplog, "run failed")
    lines = _TextFormatter(True).format(record).splitlines()[1:]
    assert len(lines) > 5
    assert all(line.startswith("    ") for line in lines)
    assert "\x1b" not in "".join(lines)
    assert any("2026-01-01" in line for line in lines)


# --- stored tracebacks ----------------------------------------------------------------------------


def _stored(error: BaseException) -> ErrorInfo:
    return ErrorInfo.from_json(dict(encode_error(error)))


def _raised(call: Any) -> BaseException:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - what the test looks at
        return error
    raise AssertionError("nothing was raised")


def test_n07_a_stored_error_is_rebuilt_with_its_type_message_and_frames() -> None:
    original = _raised(lambda: _ask_the_bank("order-1"))
    error = rebuilt(_stored(original))
    assert type(error).__name__ == "Declined"
    assert type(error).__module__ == Declined.__module__
    assert str(error) == str(original)
    frames, expected = (
        [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(e.__traceback__)]
        for e in (error, original)
    )
    assert frames == expected
    assert type(rebuilt(_stored(original))) is type(error)  # trackers compare types
    line = "".join(traceback.format_exception(error))
    assert 'raise Declined(f"card of {order}' in line


def test_n07_rebuilding_imports_nothing_and_takes_any_text() -> None:
    for kind in ("no_such_module:Error", "x", "", "a:b.<locals>.C", "os:system", "m:\0"):
        info = ErrorInfo(type=kind, message="m", traceback="nonsense")
        error = rebuilt(info)
        assert str(error) == "m"
        assert error.__traceback__ is None
    odd = 'Traceback (most recent call last):\n  File "a\0b", line 1, in f\n'
    assert stack_of(odd) is None or stack_of(odd) is not None
    far = f'Traceback (most recent call last):\n  File "a.py", line {10**30}, in f\n'
    assert stack_of(far) is not None
    many = "Traceback (most recent call last):\n" + '  File "a.py", line 7, in f\n' * 5000
    assert len(traceback.extract_tb(stack_of(many))) == 200


def test_n07_the_last_traceback_of_a_chain_is_the_errors_own() -> None:
    def chained() -> None:
        try:
            _ask_the_bank("order-1")
        except Declined as error:
            raise ValueError("second") from error

    error = _raised(chained)
    names = [f.name for f in traceback.extract_tb(stack_of(_stored(error).traceback))]
    assert names == ["_raised", "chained"]

    def grouped() -> None:
        raise ExceptionGroup("all", [_raised(lambda: _ask_the_bank("order-1"))])  # type: ignore[list-item]  # an Exception

    error = _raised(grouped)
    names = [f.name for f in traceback.extract_tb(stack_of(_stored(error).traceback))]
    assert names == ["_raised", "grouped"]


def test_n07_stacks_are_joined_in_chains_and_groups_that_lead_in_circles() -> None:
    text = _stored(_raised(lambda: _ask_the_bank("order-1"))).traceback
    member, cause = ValueError("member"), StepError("m:T", "cause", "")
    group = ExceptionGroup("all", [member])
    group.__cause__ = cause
    cause.__context__ = group
    join_stacks(group, [(member, text), (cause, text)])
    assert _functions(member)[-1] == _functions(cause)[-1] == "_ask_the_bank"
    assert group.__traceback__ is None


def test_n07_errors_whose_records_never_come_are_forgotten() -> None:
    raised = Raised()
    for number in range(5000):
        raised.note("run", str(number), ValueError(number))
    assert raised.take("run", "0") is None
    last = raised.take("run", "4999")
    assert isinstance(last, ValueError)
    assert last.args == (4999,)
    assert raised.take("run", "4999") is None
