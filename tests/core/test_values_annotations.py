"""What annotations make of arguments: of those that callers pass, and of stored ones."""

from __future__ import annotations

import asyncio
import logging
import pickle
import typing
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, Unpack

import pytest
import typing_extensions
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    FutureDatetime,
    Json,
    SecretStr,
)

from pyworkflow import ArgumentError, SerializationError, sleep, step, workflow
from pyworkflow._annotations import check_for, supported
from pyworkflow._serialization import StoredArgumentInvalid
from pyworkflow.cli.run import _arguments
from pyworkflow.testing import TestEnvironment
from tests.core._driving import bench

if typing.TYPE_CHECKING:
    from decimal import Decimal as Hidden


class Order(BaseModel):
    amount: int
    due: date


@dataclass
class Line:
    data: bytes


class Tree(typing.TypedDict):
    value: int
    nodes: list[Tree]


class Base(typing.TypedDict):
    amount: Required[int]


class Partial(Base, total=False):
    due: date
    note: Required[str]


class Extended(typing_extensions.TypedDict):
    due: NotRequired[date]


def defined(annotation: Any, body: Callable[[Any], Any] = repr, name: str = "notes.flow") -> Any:
    async def flow(x: Any) -> Any:
        return body(x)

    flow.__annotations__["x"] = annotation
    return workflow(name=name)(flow)


def run(annotation: Any, value: Any) -> Any:
    async def main() -> Any:
        async with TestEnvironment() as env:
            return await env.run(flow, value)

    flow = defined(annotation)
    return asyncio.run(main())


# Values of callers.


@pytest.mark.parametrize("text", ["abc", "cGFpZA==", "hello world", "ä"])
def test_v05_text_for_bytes_is_its_characters(text: str) -> None:
    for annotation in (bytes, bytes | None, Annotated[bytes, Field(min_length=1)]):
        assert run(annotation, text) == repr(text.encode())
    assert run(list[bytes], [text]) == repr([text.encode()])
    assert run(Line, {"data": text}) == repr(Line(text.encode()))
    assert run(dict[str, bytes], {"a": text}) == repr({"a": text.encode()})


def test_v05_bytes_stay_bytes() -> None:
    for value in (b"\x00\xff", b"abc", b""):
        assert run(bytes, value) == repr(value)


@pytest.mark.parametrize("module", [typing, typing_extensions])
def test_v06_a_typed_dict_is_validated_whatever_module_it_comes_from(module: Any) -> None:
    form = module.TypedDict("Form", {"amount": int, "due": date})
    wanted = repr({"amount": 5, "due": date(2026, 3, 29)})
    given = {"amount": "5", "due": "2026-03-29"}
    assert run(form, given) == wanted
    assert run(list[form], [given]) == f"[{wanted}]"
    assert run(form | None, given) == wanted
    assert run(Optional[form], given) == wanted  # noqa: UP045 - the older way to write it
    assert run(Annotated[form, "a note"], given) == wanted
    assert run(dict[str, tuple[form, ...]], {"a": [given]}) == f"{{'a': ({wanted},)}}"
    with pytest.raises(ArgumentError, match=r"x\['amount'\]"):
        run(form, {"amount": "many", "due": "2026-03-29"})
    with pytest.raises(ArgumentError, match="due"):
        run(form, {"amount": 1})


def test_v06_typed_dicts_keep_what_they_require_and_may_contain_themselves() -> None:
    assert run(Partial, {"amount": "1", "note": "n"}) == repr({"amount": 1, "note": "n"})
    with pytest.raises(ArgumentError, match="note"):
        run(Partial, {"amount": 1})
    tree = {"value": "1", "nodes": [{"value": "2", "nodes": []}]}
    assert run(Tree, tree) == repr({"value": 1, "nodes": [{"value": 2, "nodes": []}]})
    with pytest.raises(ArgumentError, match="nodes"):
        run(Tree, {"value": 1, "nodes": [{"value": 2}]})
    assert run(Extended, {"due": "2026-03-29"}) == repr({"due": date(2026, 3, 29)})
    assert supported(Extended) is Extended


def test_v06_keywords_of_a_typed_dict_are_validated() -> None:
    @workflow(name="notes.unpacked")
    async def unpacked(**options: Unpack[Partial]) -> Any:
        return repr(options)

    async def main() -> None:
        async with TestEnvironment() as env:
            found = await env.run(unpacked, amount="1", note="n")
            assert found == repr({"amount": 1, "note": "n"})
            with pytest.raises(ArgumentError, match="amount"):
                await env.start(unpacked, amount="many", note="n")

    asyncio.run(main())


class Plain:
    """No type of pydantic's."""


def test_v06_an_annotation_that_cannot_be_validated_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @workflow(name="notes.partly")
    async def partly(x: list[Hidden], plain: Plain, day: date, y: Any, z) -> Any:  # type: ignore[no-untyped-def]
        return repr(day)

    async def main() -> None:
        async with TestEnvironment() as env:
            for _ in range(2):
                assert await env.run(partly, [Decimal(1)], 1, "2026-03-29", 1, 1) == repr(
                    date(2026, 3, 29)
                )

    with caplog.at_level(logging.WARNING, logger="pyworkflow"):
        asyncio.run(main())
    said = [r.getMessage() for r in caplog.records if "not validated" in r.getMessage()]
    assert len(said) == 2
    assert "parameter=x annotation=list[Hidden]" in said[0]
    assert "parameter=plain" in said[1]
    assert all("annotate it with" in line for line in said)


# The command line.


@pytest.mark.parametrize(
    ("annotation", "text", "wanted"),
    [
        (Decimal, "1.10", Decimal("1.10")),
        (Decimal, "12345678901234567.89", Decimal("12345678901234567.89")),
        (Decimal, "1e400", Decimal("1e400")),
        (Decimal, "3", Decimal(3)),
        (Decimal | None, "0.1000000000000000000001", Decimal("0.1000000000000000000001")),
        (Decimal | None, "null", None),
        (list[Decimal], "[1.10, 2]", [Decimal("1.10"), Decimal(2)]),
        (dict[str, Decimal], '{"a": 1.10}', {"a": Decimal("1.10")}),
        (float, "1.10", 1.1),
        (dict[str, float], '{"a": 1.10}', {"a": 1.1}),
        (Any, "1.10", 1.1),
        (Any, "[1.10]", [1.1]),
        (str, "007", "007"),
        (str, "7", "7"),
        (str, "1.10", "1.10"),
        (str, '"7"', "7"),
        (int | str, "7", 7),
        (int | str, "1.0", "1.0"),
        (bool | str, "1", "1"),
        (bool, "true", True),
        (int, "7", 7),
        (date, "2026-03-29", date(2026, 3, 29)),
        (Literal["1", "2"], "1", "1"),
        (bytes, "abc", b"abc"),
        (Path, "a/b", Path("a/b")),
    ],
)
def test_v06_text_of_the_command_line_is_offered_to_the_annotation(
    annotation: Any, text: str, wanted: Any
) -> None:
    flow = defined(annotation)
    _, kwargs = _arguments(flow, [f"x={text}"], None)
    (found,), _ = flow._signature.validate("flow", (), kwargs)
    assert (found, type(found), str(found)) == (wanted, type(wanted), str(wanted))


def test_v06_numbers_of_a_whole_document_keep_their_digits_too() -> None:
    flow = defined(list[Decimal])
    for document in ('{"x": [1.10]}', "[[1.10]]"):
        args, kwargs = _arguments(flow, [], document)
        (found,), _ = flow._signature.validate("flow", tuple(args), kwargs)
        assert str(found[0]) == "1.10"
    assert _arguments(defined(Any), [], '{"x": {"y": 1.10}}')[1] == {"x": {"y": 1.1}}


class Options(typing.TypedDict):
    code: str
    amount: NotRequired[Decimal]


def test_text_for_keyword_arguments_without_a_parameter_is_what_their_annotation_takes() -> None:
    async def words(**rest: str) -> None: ...
    async def options(**rest: Unpack[Options]) -> None: ...
    async def mixed(rest: int, /, **others: str) -> None: ...

    for body, texts, wanted in (
        (words, ["x=1"], {"x": "1"}),
        (words, ["rest=1"], {"rest": "1"}),
        (options, ["code=007", "amount=1.10"], {"code": "007", "amount": Decimal("1.10")}),
        (mixed, ["rest=007"], {"rest": "007"}),
    ):
        flow = workflow(name=f"notes.{body.__name__}")(body)
        assert repr(_arguments(flow, texts, None)[1]) == repr(wanted)


def test_numbers_by_position_keep_the_digits_that_the_rest_of_the_arguments_wants() -> None:
    async def rest(first: float, *others: Decimal) -> None: ...

    flow = workflow(name="notes.rest")(rest)
    args, _ = _arguments(flow, [], "[1.10, 1.10, 1.20]")
    assert args == [1.1, Decimal("1.10"), Decimal("1.20")]
    args, _ = flow._signature.validate("flow", tuple(args), {})
    assert [str(one) for one in args] == ["1.1", "1.10", "1.20"]


def test_a_wrong_argument_goes_by_the_name_that_the_caller_wrote() -> None:
    async def words(*numbers: int, **rest: str) -> None: ...
    async def options(**rest: Unpack[Options]) -> None: ...

    flow = workflow(name="notes.words")(words)
    with pytest.raises(ArgumentError) as found:
        flow._signature.validate("flow", (1, "b"), {"x": 1, "y": 2})
    for said in ("numbers[1]: ", "x: Input should be a valid string (got 1)", "y: ", "(got 2)"):
        assert said in str(found.value)
    assert "rest" not in str(found.value)
    flow = workflow(name="notes.options")(options)
    with pytest.raises(ArgumentError, match="flow: code: Input should be a valid string"):
        flow._signature.validate("flow", (), {"code": 1})


@pytest.mark.parametrize(
    ("annotation", "given", "wanted"),
    [
        (Iterable[int], [1, "2"], [1, 2]),
        (Iterable[int], (1, "2"), [1, 2]),
        (Iterable, [1, "2"], [1, "2"]),
        (Generator[int, None, None], [1, "2"], [1, 2]),
        (Iterable[int] | None, ["1"], [1]),
        (dict[str, Iterable[int]], {"a": ["1"]}, {"a": [1]}),
        (Iterable[date], ["2025-12-25"], [date(2025, 12, 25)]),
    ],
)
def test_an_iterable_argument_is_a_list(annotation: Any, given: Any, wanted: Any) -> None:
    flow = defined(annotation)
    assert flow._signature.validate("flow", (given,), {}) == ((wanted,), {})
    with pytest.raises(ArgumentError, match=r"flow: x.*: Input should be"):
        flow._signature.validate("flow", ("zz",), {})

    async def main() -> object:
        async with TestEnvironment() as env:
            return await env.run(flow, given)

    assert asyncio.run(main()) == repr(wanted)


def test_an_argument_that_cannot_be_stored_goes_by_its_name() -> None:
    flow = defined(SecretStr)
    wanted = (
        "argument 'x' cannot be stored: type=pydantic.types.SecretStr: this type has no exact form "
        "in JSON; pass plain data, a dataclass or a pydantic model, and annotate it with that"
    )
    for args, kwargs in (((SecretStr("s"),), {}), ((), {"x": SecretStr("s")})):
        with pytest.raises(SerializationError) as found:
            flow.encode_call(args, kwargs)
        assert str(found.value) == f"{wanted}; nothing was started"

    @step(name="notes.secret")
    async def secret(x: Any) -> None: ...

    with pytest.raises(SerializationError) as found:
        secret.encode_call((SecretStr("s"),), {})
    assert str(found.value) == wanted
    with pytest.raises(SerializationError, match=r"^argument 'x'\['a'\]\[1\] cannot be stored"):
        secret.encode_call(({"a": [1, SecretStr("s")]},), {})


# Stored arguments.


def later(older: Any, value: Any, newer: Any, **options: Any) -> Any:
    """What a body gets whose annotation was changed while its run was stored."""

    async def main() -> Any:
        async with bench() as b:
            await b.rest()
            run_id = await b.start(defined(older), value)
            flow = defined(newer)
            await b.work()
            run = await b.until(run_id, "completed", "stalled", "failed")
            del flow
            return await b.result(run_id) if run.status == "completed" else run

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("older", "value", "newer", "wanted"),
    [
        (dict, {"amount": 1, "due": "2026-03-29"}, Order, Order(amount=1, due=date(2026, 3, 29))),
        (str, "5", int, 5),
        (int, 5, float, 5.0),
        (str, "2026-03-29", date, date(2026, 3, 29)),
        (list[int], [1, 1], set[int], {1}),
        (Any, "abc", bytes, b"abc"),
        (str, "5", int | None, 5),
        (dict, {"a": 1}, Any, {"a": 1}),
    ],
)
def test_v04_stored_arguments_are_decoded_with_the_annotations_of_today(
    older: Any, value: Any, newer: Any, wanted: Any
) -> None:
    assert later(older, value, newer) == repr(wanted)


def test_v04_a_stored_argument_that_does_not_fit_stalls_its_run_until_it_does() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.rest()
            old = defined(dict)
            run_id = await b.start(old, {"amount": "secret", "due": "2026-03-29"})
            wrong = defined(Order)
            await b.work()
            run = await b.until(run_id, "stalled")
            said = str(run.stalled)
            assert "workflow=notes.flow parameter=x expected=Order found=dict" in said
            assert "amount: Input should be a valid integer" in said
            assert "put the old one back" in said
            assert "secret" not in said.replace("'secret'", "")
            await b.rest()
            right = defined(dict[str, str])
            await b.work()
            assert await b.result(run_id) == repr({"amount": "secret", "due": "2026-03-29"})
            del old, wrong, right

    asyncio.run(main())


def test_v04_a_run_that_has_started_stalls_likewise_and_resumes() -> None:
    def version(annotation: Any) -> Any:
        @workflow(name="notes.started")
        async def started(x: Any) -> Any:
            await sleep("1h")
            return repr(x)

        started.fn.__annotations__["x"] = annotation
        return started

    async def main() -> None:
        async with bench() as b:
            old = version(str)
            run_id = await b.start(old, "five")
            await b.until(run_id, "suspended")
            await b.rest()
            new = version(int)
            await b.work()
            await b.pass_time("2h")
            run = await b.until(run_id, "stalled")
            assert "parameter=x expected=int found=str" in str(run.stalled)
            await b.rest()
            newest = version(int | str)
            await b.work()
            assert await b.result(run_id) == "'five'"
            del old, new, newest

    asyncio.run(main())


def test_v04_parameters_that_no_longer_fit_stall_likewise() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.rest()

            @workflow(name="notes.renamed")
            async def older(amount: int) -> int:
                return amount

            run_id = await b.ops.start(older, (), {"amount": 1}, older.options().options)

            @workflow(name="notes.renamed")
            async def newer(total: int, tax: int) -> int:
                return total

            await b.work()
            run = await b.until(run_id, "stalled")
            assert "give new parameters a default" in str(run.stalled)
            await b.rest()

            @workflow(name="notes.renamed")
            async def newest(amount: int, tax: int = 0) -> int:
                return amount + tax

            await b.work()
            assert await b.result(run_id) == 1
            del newer, newest

    asyncio.run(main())


def test_v04_a_dispatched_step_waits_for_code_that_takes_its_arguments() -> None:
    def version(number: int) -> Any:
        if number == 1:

            @step(name="notes.parcel", dispatch="queue", retry_delay="1h")
            async def older(weight: int, *, fast: bool) -> int:
                raise ConnectionError("not yet")

            return older

        if number == 2:

            @step(name="notes.parcel", dispatch="queue")
            async def wrong(grams: int) -> int:
                return grams

            return wrong

        @step(name="notes.parcel", dispatch="queue")
        async def right(weight: int, *, fast: bool, grams: int = 0) -> int:
            return weight

        return right

    async def main() -> None:
        async with bench() as b:
            first = version(1)

            @workflow(name="notes.sending")
            async def sending() -> int:
                return int(await first(weight=3, fast=True))

            run_id = await b.start(sending)
            await b.has(run_id, "step.retrying")
            second = version(2)
            await b.pass_time("2h")
            await b.has(run_id, "log.error")
            assert "do not fit notes.parcel" in str(await b.events(run_id, "log.error"))
            assert not await b.events(run_id, "step.failed")
            third = version(3)
            await b.pass_time("1h")
            assert await b.result(run_id) == 3
            del second, third

    asyncio.run(main())


ran: list[Any] = []


def note(value: Any) -> Any:
    ran.append(value)
    return value


AN_HOUR = datetime.now(UTC) + timedelta(hours=1)


@pytest.mark.parametrize(
    ("annotation", "value", "stored"),
    [
        (Annotated[int, AfterValidator(lambda n: n + 1)], 1, 2),
        (Annotated[str, AfterValidator(lambda s: s.split(","))], "a,b", ["a", "b"]),
        (Annotated[list[str], BeforeValidator(lambda s: s.split(","))], "a,b", ["a", "b"]),
        (Json[list[int]], "[1]", [1]),
        (FutureDatetime, AN_HOUR, AN_HOUR),
        (Annotated[list[int], AfterValidator(note)], [1], [1]),
    ],
)
def test_v04_validators_that_are_functions_do_not_run_over_stored_values(
    annotation: Any, value: Any, stored: Any
) -> None:
    check = check_for(annotation)
    validated = check.from_caller(value)
    assert validated == stored
    ran.clear()
    assert check.from_store(validated) == stored
    assert not ran


def test_v04_a_future_instant_may_have_passed_when_its_run_begins() -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    assert check_for(FutureDatetime).from_store(past) == past
    with pytest.raises(ValueError, match="future"):
        check_for(FutureDatetime).from_caller(past)


def test_v04_an_error_of_a_stored_argument_has_its_facts_as_attributes() -> None:
    with pytest.raises(StoredArgumentInvalid) as caught:
        defined(int).call('{"args":["five"]}')
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.workflow, error.parameter, error.expected, error.found) == (
        "notes.flow", "x", "int", "str",
    )  # fmt: skip
