"""Calls of workflows and steps: how they are written, wrapped, named and misspelt."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from pyworkflow import (
    ArgumentError,
    ConfigurationError,
    DefinitionError,
    DuplicateName,
    IdempotencyConflict,
    StepTimeout,
    configure,
    step,
    workflow,
)
from pyworkflow import sleep as durable_sleep
from pyworkflow._definitions import find_step, find_workflow
from pyworkflow._registry import is_findable
from pyworkflow._serialization import digest_arguments
from pyworkflow.testing import History, TestEnvironment, replay
from tests.core._driving import bench


@step(name="calls.charge")
async def charge(amount: int, currency: str = "EUR", *, note: str | None = None) -> int:
    return amount


@step(name="calls.only")
async def only(first: int, /, second: int = 2, **rest: Any) -> int:
    return first


@step(name="calls.rest")
async def many(*numbers: int, scale: int = 1) -> int:
    return sum(numbers)


def run(flow: Any, *args: Any) -> Any:
    async def main() -> Any:
        async with TestEnvironment() as env:
            return await env.run(flow, *args)

    return asyncio.run(main())


def history_of(flow: Any) -> History:
    async def main() -> History:
        async with TestEnvironment() as env:
            run_id = await env.start(flow)
            await env.result(run_id)
            return await History.fetch(run_id, env.storage)

    return asyncio.run(main())


def calling(call: Any) -> Any:
    @workflow(name="calls.flow")
    async def flow() -> Any:
        return await call()

    return flow


# Calls that are equal.

EQUAL = [
    (lambda: charge(5), lambda: charge(amount=5)),
    (lambda: charge(amount=5), lambda: charge(5)),
    (lambda: charge(5), lambda: charge(5, "EUR")),
    (lambda: charge(5, "EUR"), lambda: charge(5)),
    (lambda: charge(5, "EUR"), lambda: charge(currency="EUR", amount=5, note=None)),
    (lambda: charge(5, note=None), lambda: charge(5)),
    (lambda: charge(5, "USD"), lambda: charge(currency="USD", amount=5)),
    (lambda: only(1), lambda: only(1, second=2)),
    (lambda: only(1, 3, x=4), lambda: only(1, second=3, x=4)),
    (lambda: many(1, 2), lambda: many(1, 2, scale=1)),
]
OTHER = [
    (lambda: charge(5), lambda: charge(6)),
    (lambda: charge(5), lambda: charge(5, "USD")),
    (lambda: charge(5, "USD"), lambda: charge(5)),
    (lambda: only(1, x=4), lambda: only(1, x=5)),
    (lambda: many(1, 2), lambda: many(1, 2, 2)),
    (lambda: many(1, 2), lambda: many(2, 1)),
]


@pytest.mark.parametrize(("older", "newer"), EQUAL)
def test_v09_a_call_written_in_another_way_replays(older: Any, newer: Any) -> None:
    history = history_of(calling(older))
    again = replay(history, calling(newer))
    assert again.ok, again.mismatch


@pytest.mark.parametrize(("older", "newer"), OTHER)
def test_v09_a_call_with_other_values_does_not(older: Any, newer: Any) -> None:
    history = history_of(calling(older))
    assert not replay(history, calling(newer)).ok


def test_v09_the_digest_is_of_the_bound_call() -> None:
    digests = {
        event.data["digest"]
        for call in (lambda: charge(5), lambda: charge(amount=5))
        for event in history_of(calling(call)).events
        if event.type == "step.completed"
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "recorded",
    [
        '{"args":[],"kwargs":{"amount":5,"currency":"USD"}}',
        '{"args":[5],"kwargs":{"currency":"USD"}}',
        '{"args":[5,"USD"],"kwargs":{"note":null}}',
    ],
)
def test_v09_digests_of_calls_as_they_were_written_are_known(recorded: str) -> None:
    # 0.1.0 made digests of the call as it was written.
    history = history_of(calling(lambda: charge(5, "USD")))
    events = [
        event._replace(data={**event.data, "digest": digest_arguments(recorded)})
        if "digest" in event.data
        else event
        for event in history.events
    ]
    old = dataclasses.replace(history, events=tuple(events))
    again = replay(old, calling(lambda: charge(currency="USD", amount=5)))
    assert again.ok, again.mismatch


def test_v09_a_new_parameter_with_a_default_changes_no_call() -> None:
    def made(newer: bool) -> Any:
        if newer:

            @step(name="calls.grown")
            async def grown(amount: int, tip: int = 0) -> int:
                return amount + tip
        else:

            @step(name="calls.grown")
            async def grown(amount: int) -> int:  # type: ignore[misc]  # the older one
                return amount

        return calling(lambda: grown(amount=5))

    history = history_of(made(False))
    assert replay(history, made(True)).ok


def test_v09_a_start_with_the_same_key_is_the_same_call_however_it_is_written() -> None:
    @workflow(name="calls.keyed")
    async def keyed(amount: int, currency: str = "EUR") -> int:
        return amount

    async def main() -> None:
        async with bench() as b:
            first = await b.ops.start(keyed, (5,), {}, keyed.options(idempotency_key="k").options)
            again = keyed.options(idempotency_key="k").options
            assert await b.ops.start(keyed, (), {"amount": 5}, again) == first
            assert await b.ops.start(keyed, (5, "EUR"), {}, again) == first
            with pytest.raises(IdempotencyConflict, match="currency"):
                await b.ops.start(keyed, (5, "USD"), {}, again)

    asyncio.run(main())


# Wrappers.


def plain_wrapper(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def bare_wrapper(fn: Any) -> Any:
    def wrapped(x: int) -> Any:
        return fn(x)

    return wrapped


def loop_of_its_own(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(x: int) -> Any:
        return asyncio.run(fn(x))

    return wrapper


@pytest.mark.parametrize("decorate", [plain_wrapper, bare_wrapper, loop_of_its_own])
@pytest.mark.parametrize("dispatch", ["auto", "queue"])
def test_v08_the_body_of_a_wrapped_async_step_runs(decorate: Any, dispatch: Any) -> None:
    bodies = []

    async def add(x: int) -> int:
        await asyncio.sleep(0)
        bodies.append(threading.current_thread())
        return x + 1

    wrapped = step(max_retries=0, dispatch=dispatch, name="calls.add")(decorate(add))

    @workflow(name="calls.wrapped")
    async def flow(x: int) -> int:
        return await wrapped(x)

    assert run(flow, 1) == 2
    assert len(bodies) == 1
    if decorate is not loop_of_its_own:
        assert asyncio.run(wrapped(4)) == 5


def test_v08_a_wrapped_async_step_fails_and_is_tried_again_as_any() -> None:
    attempts = []

    @step(name="calls.retried", max_retries=1, retry_delay=0.001)
    @plain_wrapper
    async def retried() -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise ConnectionError("not yet")
        return len(attempts)

    @workflow(name="calls.retrying")
    async def flow() -> int:
        return await retried()

    assert run(flow) == 2


def test_v08_the_time_limit_bounds_the_body_of_a_wrapped_step() -> None:
    ended = []

    @step(name="calls.limited", max_retries=0, timeout=0.05)
    @plain_wrapper
    async def limited() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(True)

    @workflow(name="calls.limited")
    async def flow() -> str:
        try:
            await limited()
        except StepTimeout as error:
            return type(error).__name__
        return "no error"

    assert run(flow) == "StepTimeout"
    assert ended == [True]


def test_v08_a_workflow_in_a_plain_wrapper_is_refused_with_the_remedy() -> None:
    async def flow() -> None: ...

    with pytest.raises(DefinitionError, match="wrapper as `async def`"):
        workflow(plain_wrapper(flow))


# Defaults.


def test_v03_a_mutable_default_is_fresh_in_each_run_and_replay() -> None:
    @workflow(name="calls.collecting")
    async def collecting(x: int, seen: list[int] = [], *, more: dict[str, Any] = {"n": [0]}) -> Any:  # noqa: B006 - on purpose
        seen.append(x)
        more["n"].append(x)
        await durable_sleep("1h")
        return [seen, more]

    async def main() -> None:
        async with TestEnvironment() as env:
            ids = [await env.start(collecting, x) for x in (1, 2)]
            for x, run_id in zip((1, 2), ids, strict=True):
                assert await env.result(run_id) == [[x], {"n": [0, x]}]
                history = await History.fetch(run_id, env.storage)
                for _ in range(2):
                    assert replay(history, collecting).ok

    asyncio.run(main())


class Sentinel:
    """A value that code compares with ``is``."""


UNSET = Sentinel()


@pytest.mark.parametrize(
    "default", [UNSET, object(), charge, logging.getLogger("x"), Path, asyncio]
)
def test_v03_a_default_that_nothing_changes_stays_the_same_object(default: Any) -> None:
    @workflow(name="calls.sentinel")
    async def flow(x: Any = default) -> bool:
        return x is default

    assert run(flow) is True


def test_v03_a_default_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"parameter=guard type=lock .*guard=None"):

        @workflow(name="calls.locked")
        async def flow(guard: Any = threading.Lock()) -> None: ...  # noqa: B008 - on purpose


def test_v03_each_attempt_of_a_step_gets_lists_and_dicts_of_its_own() -> None:
    @step(name="calls.pages", max_retries=1, retry_delay=0.001)
    async def pages(found: list[int] = []) -> list[int]:  # noqa: B006 - on purpose
        found.append(len(found))
        if not tried:
            tried.append(1)
            raise ConnectionError("not yet")
        return found

    @workflow(name="calls.paging")
    async def flow() -> list[int]:
        return await pages()

    tried: list[int] = []
    assert run(flow) == [0]


# Names.


def test_r12_a_local_definition_replaces_an_earlier_one_of_its_name() -> None:
    def first() -> Any:
        @step(name="calls.local")
        async def one() -> int:
            return 1

        return one

    def second() -> Any:
        @step(name="calls.local")
        async def two() -> int:
            return 2

        return two

    kept = first()
    later = second()
    assert find_step("calls.local") is later
    assert kept is not later


def test_r12_a_local_definition_does_not_replace_one_of_a_module() -> None:
    with pytest.raises(DuplicateName, match=r"'calls\.charge'"):

        @step(name="calls.charge")
        async def other() -> None: ...

    assert find_step("calls.charge") is charge


def test_r12_a_replaced_workflow_is_not_started_as_another() -> None:
    def version(number: int) -> Any:
        if number == 1:

            @workflow(name="calls.versions")
            async def older() -> int:
                return 1

            return older

        @workflow(name="calls.versions")
        async def newer() -> int:
            return 2

        return newer

    old, new = version(1), version(2)
    assert run(new) == 2
    with pytest.raises(ArgumentError, match="another workflow took the name"):
        run(old)

    async def main() -> None:
        async with bench() as b:
            with pytest.raises(DuplicateName, match=r"older.*newer"):
                await b.start(old)

    asyncio.run(main())


def test_n30_the_warning_of_a_forgotten_await_names_step_and_workflow() -> None:
    @workflow(name="calls.forgetful")
    async def flow() -> None:
        charge(1)  # pyright: ignore[reportUnusedCoroutine] - on purpose

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(flow)
        gc.collect()
    said = [str(w.message) for w in caught if "never awaited" in str(w.message)]
    assert said == ["coroutine 'step calls.charge of workflow calls.forgetful' was never awaited"]


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (lambda: step(max_retrys=3), r"@step option=max_retrys; did you mean max_retries\?"),
        (lambda: workflow(max_durations=3), r"@workflow option=max_durations; did you mean max_du"),
        (lambda: workflow(retries=3), r"@workflow option=retries; .*the options are name, version"),
    ],
)
def test_n31_a_misspelt_option_is_answered_with_the_right_one(define: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=words) as caught:

        @define()  # type: ignore[misc]  # it is refused
        async def calls_misspelt() -> None: ...

    assert "queue" in str(caught.value)


def test_n31_options_of_one_start_are_checked_too() -> None:
    @workflow(name="calls.optional")
    async def flow() -> None: ...

    wrong: Any = {"idempotencykey": "k"}
    with pytest.raises(DefinitionError, match=r"calls\.optional\.options .*did you mean idempot"):
        flow.options(**wrong)


def test_n31_a_misspelt_setting_gets_the_nearest_name_and_all_names() -> None:
    wrong: Any = {"max_payloads": 3}
    with pytest.raises(ConfigurationError, match=r"did you mean max_payload.*there are st"):
        configure(**wrong)


# Workflows that no other process finds.


def test_n32_a_local_workflow_is_refused_by_a_distributed_executor_and_warned_of_elsewhere(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from pyworkflow._registry import check_findable

    @workflow(name="calls.hidden")
    async def hidden() -> None: ...

    check_findable(hidden, "memory", outlives=False, distributed=False)
    assert not caplog.records
    for _ in range(2):
        check_findable(hidden, "/a/store", outlives=True, distributed=False)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "workflow=calls.hidden" in caplog.text
    assert "storage=/a/store" in caplog.text
    with pytest.raises(DefinitionError, match="top level of its module"):
        check_findable(hidden, "/a/store", outlives=True, distributed=True)


def _made() -> Any:
    @workflow(name="calls.made")
    async def made() -> None: ...

    return made


MADE = _made()


def test_n32_a_workflow_that_a_factory_makes_for_its_module_is_found() -> None:
    assert is_findable(MADE)
    assert not is_findable(_made())
    assert find_workflow("calls.made") is MADE
