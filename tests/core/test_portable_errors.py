"""Errors of steps in workflow code: which types arrive as themselves, and how whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Self

import click
import pytest

from pyworkflow import _portable
from pyworkflow._failures import WHOLE, decode_error, encode_error
from pyworkflow._portable import import_listed, is_portable, note_imports, register_portable
from pyworkflow.errors import ConfigurationError, SerializationError, StepError


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> _portable._Process:
    """A process in which no worker has started."""
    fresh = _portable._Process()
    monkeypatch.setattr(_portable, "_process", fresh)
    monkeypatch.setattr(_portable, "_registered", set(_portable._registered))
    return fresh


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module with an exception, imported now."""
    made = types.ModuleType(name)
    exec("class Boom(Exception): pass", vars(made))
    monkeypatch.setitem(sys.modules, name, made)
    return made


def again(exc: BaseException, *, exact: bool = True) -> Any:
    return decode_error(json.loads(json.dumps(encode_error(exc))), exact=exact)


# --- types ----------------------------------------------------------------------------------------


def test_found_m07_what_is_imported_at_the_start_is_portable_and_what_a_step_imports_is_not(
    process: _portable._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = module(monkeypatch, "m07_early")
    note_imports()
    late = module(monkeypatch, "m07_late")
    note_imports()  # a second worker of the process
    assert type(again(early.Boom("x"))) is early.Boom
    found = again(late.Boom("x"))
    assert type(found) is StepError
    assert (found.type, found.message) == ("m07_late:Boom", "x")


def test_found_m07_definitions_after_the_start_bring_what_is_imported_by_then(
    process: _portable._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_imports()
    module(monkeypatch, "m07_by_step")
    register_portable("m07_flows_in_step", in_step=True)
    assert is_portable("m07_flows_in_step")
    note_imports()
    assert not is_portable("m07_by_step")
    register_portable("m07_flows")
    assert is_portable("m07_by_step")


def test_found_m07_builtins_the_standard_library_and_the_core_are_portable(
    process: _portable._Process,
) -> None:
    for name in ("builtins", "sqlite3", "xml.etree.ElementTree", "pyworkflow.errors"):
        assert is_portable(name)
    assert not is_portable("m07_never_imported")


def test_found_m07_modules_of_the_setting_are_imported_and_portable(
    process: _portable._Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_imports()
    package = tmp_path / "m07_listed"
    package.mkdir()
    (package / "__init__.py").write_text("from m07_listed.inner import Boom\n")
    (package / "inner.py").write_text("class Boom(Exception): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_portable("m07_listed.inner")
    try:
        import_listed(["m07_listed"])
        kind = sys.modules["m07_listed"].Boom  # type: ignore[attr-defined]
        assert type(again(kind("x"))) is kind
    finally:
        for name in ("m07_listed", "m07_listed.inner"):
            sys.modules.pop(name, None)
    with pytest.raises(ConfigurationError, match=r"portable_modules.*module=m07_not_there"):
        import_listed(["m07_not_there"])
    import_listed(["m07_not_there"], required=False)


def test_found_m07_a_recorded_type_that_is_not_imported_here_is_named_with_the_remedies(
    process: _portable._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(monkeypatch, "m07_elsewhere")
    for exc in (made.Boom("x"), ExceptionGroup("g", [made.Boom("x")]), _caused(made.Boom("x"))):
        info = encode_error(exc)
        monkeypatch.delitem(sys.modules, "m07_elsewhere")
        with pytest.raises(SerializationError, match=r"import it .*'m07_elsewhere'.*portable_mod"):
            decode_error(info)
        outside = decode_error(info, exact=False)
        while not isinstance(outside, StepError):
            outside = (
                outside.exceptions[0]
                if isinstance(outside, BaseExceptionGroup)
                else outside.__cause__
            )  # type: ignore[assignment]
        assert (outside.type, outside.message) == ("m07_elsewhere:Boom", "x")
        monkeypatch.setitem(sys.modules, "m07_elsewhere", made)
        assert type(decode_error(info)) is type(exc)


def _caused(cause: Exception) -> Exception:
    exc = ValueError("outer")
    exc.__cause__ = cause
    return exc


class Fussy(Exception):
    """As of a library: cannot be made from what it keeps."""

    def __new__(cls, *args: object) -> Self:
        if args != (1, 2):
            raise TypeError("two numbers, please")
        return super().__new__(cls, *args)

    def __init__(self, *args: object) -> None:
        super().__init__("a message")

    def __reduce__(self) -> Any:
        return (print, ())


def test_n18_a_librarys_type_that_cannot_be_made_again_is_a_step_error(
    process: _portable._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(monkeypatch, "n18_library")
    made.Fussy = Fussy
    monkeypatch.setattr(Fussy, "__module__", "n18_library")
    found = again(Fussy(1, 2))
    assert type(found) is StepError
    assert found.type == "n18_library:Fussy"


def test_n18_errors_of_libraries_that_are_imported_keep_their_types(
    process: _portable._Process,
) -> None:
    import pydantic
    import pydantic_core

    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(int).validate_python("x")
    assert type(again(caught.value)) is StepError  # it has no constructor
    error = pydantic_core.PydanticCustomError("kind", "message {n}", {"n": 5})
    assert type(again(error)) in (pydantic_core.PydanticCustomError, StepError)
    assert type(again(click.BadParameter("wrong", param_hint="--x"))) is click.BadParameter


@pytest.mark.parametrize(
    "name",
    [
        "builtins:StopIteration", "builtins:StopAsyncIteration", "builtins:GeneratorExit",
        "builtins:KeyboardInterrupt", "builtins:SystemExit", "asyncio.exceptions:CancelledError",
        "builtins:BaseException", "builtins:BaseExceptionGroup",
    ],
)  # fmt: skip
def test_l02_types_that_end_other_things_are_not_made_from_a_store(name: str) -> None:
    info = {**encode_error(ValueError("x")), "type": name}
    with pytest.raises(SerializationError, match=name):
        decode_error(info)
    with pytest.raises(SerializationError, match=name):
        decode_error({**encode_error(ValueError()), "details": {"cause": info}})
    assert type(decode_error(info, exact=False)) is StepError


# --- whole ----------------------------------------------------------------------------------------


class Slots(Exception):
    __slots__ = ("__private", "code", "connection")

    def __init__(self, code: int, connection: object = None) -> None:
        super().__init__(f"code {code}")
        self.code, self.__private, self.connection = code, [code], connection

    def private(self) -> object:
        return self.__private


class Sub(Slots):
    def __init__(self, response: object) -> None:
        super().__init__(5)
        self.response = response
        self.status = 404


def test_v07_attributes_come_back_as_they_were_or_not_at_all() -> None:
    register_portable(__name__)
    found = again(Slots(7))
    assert (found.code, found.private(), found.args) == (7, [7], ("code 7",))
    found = again(Sub(object()))
    assert (found.code, found.private(), found.status) == (5, [5], 404)
    # The constructor ran with the message: what it made of it is no response.
    assert not hasattr(found, "response")
    found = again(Slots(8, connection=object()))
    assert found.code == 8
    assert getattr(found, "connection", None) is None


def test_v07_all_members_of_a_group_that_fit_and_a_note_for_the_others() -> None:
    whole = again(ExceptionGroup("rows", [ValueError(n) for n in range(1000)]))
    assert [member.args for member in whole.exceptions] == [(n,) for n in range(1000)]
    assert not hasattr(whole, "__notes__")
    many = ExceptionGroup("rows", [ValueError("x" * 4000) for _ in range(1000)])
    many.add_note("mine")
    text = json.dumps(encode_error(many))
    assert len(text) < 2 * WHOLE
    cut = decode_error(json.loads(text))
    assert isinstance(cut, ExceptionGroup)
    left = 1000 - len(cut.exceptions)
    assert 0 < left < 1000
    assert cut.__notes__ == [
        "mine",
        f"{left} more exceptions of this group did not fit into the history",
    ]
    large = ExceptionGroup("g", [ValueError("y" * 60_000, "z" * 60_000) for _ in range(50)])
    assert len(again(ExceptionGroup("outer", [large, KeyError(1)])).exceptions) >= 1


def test_v07_causes_keep_types_attributes_and_kind() -> None:
    register_portable(__name__)

    def fail() -> None:
        try:
            try:
                raise Slots(7)
            except Slots as first:
                raise KeyError("rate") from first
        except KeyError:
            raise RuntimeError("no price")  # noqa: B904 - a context is what this is about

    with pytest.raises(RuntimeError) as caught:
        fail()
    found = again(caught.value)
    assert found.__cause__ is None
    assert type(found.__context__) is KeyError
    assert (type(found.__context__.__cause__), found.__context__.__cause__.code) == (Slots, 7)
    grouped = again(ExceptionGroup("g", [_caused(Slots(3))]))
    assert grouped.exceptions[0].__cause__.code == 3


def test_v07_loops_and_long_chains_of_causes_end() -> None:
    one, two = ValueError(1), ValueError(2)
    one.__cause__, two.__cause__ = two, one
    found = again(one)
    assert found.__cause__.args == (2,)
    assert found.__cause__.__cause__ is None
    top = last = ValueError(0)
    for n in range(1, 300):
        last.__cause__ = ValueError(n)
        last = last.__cause__
    found, depth = again(top), 0
    while found.__cause__ is not None:
        found, depth = found.__cause__, depth + 1
    assert depth == 21
    assert type(found) is StepError
    assert (found.type, found.message) == ("builtins:ValueError", "21")


def test_v07_a_cause_that_0_1_stored_is_a_step_error() -> None:
    info: Any = encode_error(ValueError("x"))
    info["details"]["cause"] = {"type": "builtins:KeyError", "message": "'k'"}
    cause = decode_error(info).__cause__
    assert isinstance(cause, StepError)
    assert (cause.type, cause.message) == ("builtins:KeyError", "'k'")


# --- in workflows ---------------------------------------------------------------------------------

FLOWS = """
import os, sys
from pyworkflow import sleep, step, workflow
if os.environ.get("WITH_LIBRARY"):
    import m07_library
@step(max_retries=0)
async def call() -> None:
    raise sys.modules["m07_library"].ConnectError("refused", host="h")
@workflow()
async def pay() -> list[str]:
    try:
        await call()
    except Exception as error:
        seen = [type(error).__module__, type(error).__name__, error.host]
    await sleep("1s")
    return seen
"""
LIBRARY = """
class ConnectError(Exception):
    def __init__(self, message, *, host=None):
        super().__init__(message)
        self.host = host
"""
START = """
import os, m07_flows
from pyworkflow import get_events, start
run_id = start(m07_flows.pay)
while not any(e.type == "sleep.created" for e in get_events(run_id)):
    pass
print(run_id, flush=True)
os._exit(0)
"""
WORK = """
import os, sys, time, m07_flows
from pyworkflow import get_run, result, start
run_id, end = sys.argv[1], time.monotonic() + 60
start(m07_flows.pay)  # the embedded worker begins
while (run := get_run(run_id)).status not in sys.argv[2:] and time.monotonic() < end:
    time.sleep(0.02)
print(run.status, run.stalled or run.result, flush=True)
os._exit(0)
"""


def test_n18_a_librarys_exception_arrives_where_it_is_imported_and_stalls_elsewhere(
    tmp_path: Path,
) -> None:
    (tmp_path / "m07_flows.py").write_text(FLOWS)
    (tmp_path / "m07_library.py").write_text(LIBRARY)
    paths = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])

    def python(code: str, *args: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *args],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": paths, "PYWORKFLOW_STORAGE": f"file:{tmp_path}/runs"}
            | {"PYWORKFLOW_LEASE": "2s"}
            | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run_id = python(START, WITH_LIBRARY="1")
    said = python(WORK, run_id, "stalled", "completed", "failed")
    assert said.startswith("stalled"), said
    assert "m07_library:ConnectError" in said
    assert "portable_modules" in said
    said = python(WORK, run_id, "completed", "failed", PYWORKFLOW_PORTABLE_MODULES="m07_library")
    assert said == "completed ['m07_library', 'ConnectError', 'h']"
