"""Exceptions come back as themselves where every worker has their type, else as StepError."""

import asyncio
import json
import pickle
import sqlite3
import subprocess
import sys
import traceback
import urllib.error
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow import errors
from pyworkflow._failures import TRACEBACK, decode_error, encode_error
from pyworkflow._portable import register_portable
from pyworkflow._serialization import NotSerializable, StoredValueInvalid
from pyworkflow.errors import FatalError, RetryableError, SerializationError, StepError
from pyworkflow.runs import ErrorInfo


class Unregistered(Exception):
    """Of a package that no test registers."""


Unregistered.__module__ = "elsewhere"


def raised(exc):
    try:
        raise exc
    except BaseException as caught:  # noqa: BLE001
        return caught


def raised_by(fn, *args):
    try:
        fn(*args)
    except Exception as caught:  # noqa: BLE001
        return caught
    raise AssertionError("nothing was raised")


def round_trip(exc):
    info = json.loads(json.dumps(encode_error(exc)))
    return decode_error(info)


class Portable:
    """Stands for a package of a registered module: its classes are looked up here."""

    class TakesTwo(Exception):
        def __init__(self, code, detail):
            super().__init__(f"{code}: {detail}")
            self.code = code
            self.detail = detail

    class MakesItsMessage(Exception):
        def __init__(self, code):
            super().__init__(f"code {code}")
            self.code = code

    class Slotted(Exception):
        __slots__ = ("hidden",)

        def __init__(self, *, hidden):
            super().__init__()
            self.hidden = hidden

    class Guarded(FatalError):
        @property
        def fixed(self):
            return 1

    class Group(ExceptionGroup):
        def derive(self, excs):
            return Portable.Group(self.message, excs)

    class Silent(Exception):
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    class Stubborn(Exception):
        def __new__(cls, *args):
            if args:
                raise RuntimeError("never again")
            return super().__new__(cls)

    class Wrapper(Exception):
        def __init__(self, wrapped, key="wrapped"):
            super().__init__("wrapper")
            self.wrapped = wrapped
            self.key = key

        def __getattr__(self, name):
            return getattr(self.__dict__[self.__dict__["key"]], name)

    class BadNotes(Exception):
        @property
        def __notes__(self):
            raise RuntimeError("no notes")

    class BadDict(Exception):
        @property
        def __dict__(self):
            raise RuntimeError("no dict")

    class BadCause(Exception):
        @property
        def __cause__(self):
            raise RuntimeError("no cause")

        __context__ = __cause__

    class BadArgs(Exception):
        @property
        def args(self):
            raise RuntimeError("no args")

    class BadAccess(Exception):
        def __getattribute__(self, name):
            raise KeyError(name)

    class BadReduce(Exception):
        def __reduce__(self):
            raise SystemExit(3)

        def __str__(self):
            raise SystemExit(4)

    class NotesOfText(Exception):
        __notes__ = "text"


@pytest.fixture
def registered(monkeypatch):
    from pyworkflow import _portable

    monkeypatch.setattr(_portable, "_registered", set(_portable._registered))
    register_portable(__name__)


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("bad"), ValueError(), ValueError("a", 1, (2, 3), {"k": b"v"}), KeyError("k"),
        FileNotFoundError(2, "gone", "/some/file"), OSError(5, "io", "a", None, "b"), TimeoutError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), sqlite3.IntegrityError("UNIQUE"),
        json.JSONDecodeError("Expecting value", "doc", 1), ZeroDivisionError("x"), AssertionError(),
        subprocess.CalledProcessError(3, ["ls"], b"out"), ModuleNotFoundError("no x", name="x"),
        FatalError("final"), RetryableError("later", retry_after="30s"),
        RetryableError("later", retry_after=timedelta(seconds=3)), StepError("m:T", "msg", "tb"),
        errors.StepTimeout("slow"), errors.NonDeterminism("a", "b", 3), errors.RunNotFound("r1"),
        errors.IdempotencyConflict("k", "r", {"workflow": ("a", "b")}),
        errors.RunIdConflict("r", {"workflow": ("a", "b")}),
        errors.RunStalled("r", "NonDeterminism: why"),
        StoredValueInvalid("m:T", "why"), NotSerializable("result", "T", "why", "remedy"),
    ],
    ids=lambda exc: type(exc).__name__,
)  # fmt: skip
def test_m05_portable_exceptions_come_back_as_themselves(exc):
    exc.add_note("seen by a step")
    again = round_trip(raised(exc))
    assert type(again) is type(exc)
    assert again.args == exc.args
    assert str(again) == str(exc)
    assert vars(again) == vars(exc)
    for name in ("errno", "filename", "filename2", "name", "reason", "object", "pos", "doc"):
        assert getattr(again, name, None) == getattr(exc, name, None)


def every_error():
    made = {
        "DuplicateName": ("step", "a", "b", "c"), "IdempotencyConflict": ("k", "r", {"a": ["b", "c"]}), "RunIdConflict": ("r", {"a": ["b", "c"]}), "RunStalled": ("r", "c"),
        "NonDeterminism": ("a", "b", 1), "PayloadTooLarge": ("x", 1, 2), "HistoryTooLong": (1, 2),
        "RunNotFound": ("r",), "RunClosed": ("r", "s"), "PluginNotFound": ("k", "s", None),
        "PluginBroken": ("a", "b", "c"), "StorageDamaged": ("f", 1, "d"), "SchemaTooNew": ("w", 2, 1),
        "StepError": ("m:T", "msg"), "PayloadUnreadable": ("aesgcm", "no key", "add it", "2026"),
    }  # fmt: skip
    for name in errors.__all__:
        yield getattr(errors, name)(*made.get(name, ("message",)))


@pytest.mark.parametrize("exc", list(every_error()), ids=lambda exc: type(exc).__name__)
def test_every_error_of_ours_survives_storage_and_pickle(exc):
    for again in (round_trip(exc), pickle.loads(pickle.dumps(exc))):
        assert type(again) is type(exc)
        assert (again.args, str(again)) == (exc.args, str(exc))


def test_h07_a_type_that_other_workers_may_lack_is_a_step_error_from_the_first_time():
    info = encode_error(raised(Unregistered("boom")))
    assert info["portable"] is False
    again = decode_error(info)
    assert type(again) is StepError
    assert again.type == "elsewhere:Unregistered"
    assert again.message == "boom"
    assert "raise exc" in again.traceback
    assert str(again) == "elsewhere:Unregistered: boom"


def test_h07_what_is_decided_at_the_first_time_holds_whatever_is_registered_later(registered):
    info = encode_error(Portable.TakesTwo(1, "a"))
    assert info["portable"] is True
    info = {**info, "portable": False}
    assert type(decode_error(info)) is StepError


def test_h07_a_portable_type_that_is_missing_is_an_error_of_serialization_not_of_the_step():
    info = encode_error(sqlite3.IntegrityError("x"))
    with pytest.raises(SerializationError, match="import it in the module"):
        decode_error({**info, "type": "not_here_at_all:Error"})
    with pytest.raises(SerializationError, match="keep an alias"):
        decode_error({**info, "type": "sqlite3:RemovedError"})


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "builtins:SystemExit", "os:system", "builtins:eval"]
)
def test_only_exceptions_are_ever_made(name):
    with pytest.raises(SerializationError):
        decode_error({**encode_error(ValueError("ls")), "type": name})


def test_constructors_of_other_shapes(registered):
    two = round_trip(Portable.TakesTwo(404, "missing"))
    assert (type(two), two.code, two.detail) == (Portable.TakesTwo, 404, "missing")
    assert str(two) == "404: missing"
    made = round_trip(Portable.MakesItsMessage(5))
    assert (type(made), made.code, made.args, str(made)) == (
        Portable.MakesItsMessage, 5, ("code 5",), "code 5",
    )  # fmt: skip
    assert type(round_trip(Portable.Slotted(hidden=1))) is Portable.Slotted
    assert type(round_trip(Portable.Guarded("no"))) is Portable.Guarded


def test_attributes_and_arguments_that_cannot_be_stored_do_not_lose_the_rest():
    exc = ValueError("a", object())
    exc.kept = {1: (2,)}
    exc.lost = object()
    again = round_trip(exc)
    assert again.kept == {1: (2,)}
    assert not hasattr(again, "lost")
    assert again.args[0] == "a"
    assert again.args[1].startswith("<object object at")
    (note,) = again.__notes__
    assert note.startswith("stored as text: args[1]; not stored: lost; its message when it was")


@pytest.mark.parametrize(
    ("exc", "args", "notes"),
    [
        (ValueError(float("nan")), ("nan",), ["stored as text: args[0]"]),
        (
            ValueError("a", int),
            ("a", "<class 'int'>"),
            ["stored as text: args[1]; its message when it was raised: ('a', <class 'int'>)"],
        ),
        (ValueError("\udcff"), ("\\udcff",), ["stored as text: args[0]"]),
        (
            raised_by("\udcff".encode),
            ("utf-8", "\\udcff", 0, 1, "surrogates not allowed"),
            [
                (
                    "stored as text: args[1]; its message when it was raised: 'utf-8' codec can't "
                    "encode character '\\udcff' in position 0: surrogates not allowed"
                )
            ],
        ),
        (ValueError("x", 1, "é"), ("x", 1, "é"), []),
    ],
    ids=["nan", "class", "surrogate", "encode", "whole"],
)
def test_a_note_says_which_arguments_were_replaced_by_their_text(exc, args, notes):
    again = round_trip(raised(exc))
    assert again.args == args
    assert getattr(again, "__notes__", []) == notes


def test_a_note_on_what_was_left_out_is_stored_once_however_often_it_is_raised_again():
    exc = ValueError("a", object())
    exc.response = object()
    exc.add_note("first")
    once = round_trip(raised(exc))
    twice = round_trip(raised(once))
    thrice = round_trip(raised(twice))
    assert len(once.__notes__) == 2
    assert once.__notes__ == twice.__notes__ == thrice.__notes__
    assert encode_error(once)["details"] == encode_error(thrice)["details"]
    long = ValueError("x" * 100_000, object())
    assert round_trip(raised(round_trip(long))).__notes__ == round_trip(long).__notes__
    assert not hasattr(round_trip(Unregistered(object())), "__notes__")


def test_histories_without_the_places_of_texts_name_what_they_lost():
    stored = encode_error(ValueError("a"))
    stored["details"]["lost"] = ["response", "request"]
    assert decode_error(stored).__notes__ == ["not stored: response, request"]


def test_names_that_were_looked_up_in_vain_are_kept():
    class Secret:
        password = "secret"

    found = round_trip(raised_by(lambda: (1).real.nothing))
    assert (found.name, found.obj, getattr(found, "__notes__", [])) == ("nothing", 1, [])
    found = round_trip(raised_by(lambda: Secret().nothing))
    assert (found.name, found.obj, found.__notes__) == ("nothing", None, ["not stored: obj"])
    found = round_trip(raised_by(lambda: not_a_name))  # noqa: F821
    assert (found.name, getattr(found, "__notes__", [])) == ("not_a_name", [])


@pytest.mark.parametrize(
    "exc",
    [
        SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1), StopAsyncIteration(),
        asyncio.CancelledError(), BaseExceptionGroup("g", [SystemExit(1)]),
    ],
    ids=lambda exc: type(exc).__name__,
)  # fmt: skip
def test_what_would_end_the_worker_or_confuse_coroutines_comes_back_as_a_step_error(exc):
    again = round_trip(exc)
    assert type(again) is StepError
    assert again.type.endswith(f":{type(exc).__name__}")


def test_groups_come_back_with_each_member_by_its_own_rule(registered):
    group = ExceptionGroup("both", [ValueError(1), Portable.Group("in", [KeyError("k")])])
    again = round_trip(raised(group))
    assert type(again) is ExceptionGroup
    assert str(again) == str(group)
    assert [type(member) for member in again.exceptions] == [ValueError, Portable.Group]
    assert again.exceptions[1].exceptions[0].args == ("k",)


def test_a_group_keeps_foreign_members_as_step_errors():
    again = round_trip(ExceptionGroup("g", [Unregistered("x"), ValueError("y")]))
    assert [type(member) for member in again.exceptions] == [StepError, ValueError]


def test_very_deep_groups_come_back_as_step_errors_inside():
    exc: Exception = ValueError("x")
    for _ in range(60):
        exc = ExceptionGroup("g", [exc])
    assert type(round_trip(exc)) is ExceptionGroup


def test_notes_and_the_cause_are_kept():
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as outer:
        outer.add_note("first")
        outer.add_note("second")
        again = round_trip(outer)
    assert again.__notes__ == ["first", "second"]
    assert type(again.__cause__) is KeyError
    assert again.__cause__.args == ("inner",)
    assert round_trip(ValueError("alone")).__cause__ is None


def test_encoding_never_raises_and_is_bounded(registered):
    for exc in (
        Portable.Silent("x"),
        ValueError("\ud800" * 3),
        ValueError("x" * 100_000, Portable.Silent()),
        ExceptionGroup("\udfff", [Portable.Silent()]),
    ):
        info = json.loads(json.dumps(encode_error(raised(exc)), ensure_ascii=False).encode())
        assert len(info["traceback"]) <= TRACEBACK
        assert len(info["message"]) <= 9000
        assert type(decode_error(info)) is type(exc)


def test_a_class_that_cannot_be_made_again_is_an_error_of_serialization(registered):
    exc = Portable.Stubborn()
    exc.args = ("later",)
    with pytest.raises(SerializationError, match="cannot be made again"):
        round_trip(exc)


def test_an_exception_of_a_function_body_is_a_step_error(registered):
    class Local(Exception):
        pass

    assert type(round_trip(Local("x"))) is StepError


@given(st.lists(st.text() | st.integers() | st.binary() | st.tuples(st.integers()), max_size=3))
def test_any_plain_arguments_survive(args):
    args = [a if not isinstance(a, str) else a.encode("utf-8", "replace").decode() for a in args]
    for kind in (ValueError, RuntimeError, LookupError):
        again = round_trip(kind(*args))
        assert (type(again), again.args) == (kind, tuple(args))


def test_tracebacks_keep_both_ends():
    def ping(n):  # two functions: the interpreter folds equal frames
        return pong(n - 1)

    def pong(n):
        return ping(n) if n else 1 / 0

    info = encode_error(raised_by(ping, 150))
    assert len(info["traceback"]) > TRACEBACK / 2
    assert len(info["traceback"]) <= TRACEBACK
    assert info["traceback"].startswith("Traceback")
    assert "… (cut) …" in info["traceback"]
    assert info["traceback"].rstrip().endswith("ZeroDivisionError: division by zero")


def test_an_encoded_error_is_the_error_of_a_run():
    info = encode_error(raised(ValueError("x")))
    assert ErrorInfo.from_json(info).to_json() == info


def test_nothing_of_this_needs_the_module_of_the_step(tmp_path):
    info = encode_error(raised(ValueError("x")))
    code = (
        "import json, sys; from pyworkflow._failures import decode_error;"
        "assert type(decode_error(json.loads(sys.argv[1]))) is ValueError"
    )
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(info)],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Portable.Wrapper(object()), Portable.Wrapper),
        (lambda: Portable.Wrapper(object(), "missing"), StepError),
        (Portable.BadNotes, StepError),
        (Portable.BadDict, Portable.BadDict),
        (Portable.BadCause, Portable.BadCause),
        (Portable.BadArgs, Portable.BadArgs),
        (Portable.BadAccess, StepError),
        (Portable.BadReduce, StepError),
        (Portable.NotesOfText, Portable.NotesOfText),
    ],
)
def test_a_class_whose_attributes_raise_is_stored_and_comes_back_without_traps(
    registered, make, expected
):
    exc = make()
    outer = ValueError("outer")
    outer.__cause__ = exc
    group = round_trip(ExceptionGroup("both", [ValueError("fine"), exc]))
    for one in (
        round_trip(exc),
        round_trip(raised(make())),
        round_trip(outer).__cause__,
        group.exceptions[1],
    ):
        assert type(one) is expected
        assert getattr(one, "__notes__", None) in (None, "text", ["not stored: wrapped"])
        assert isinstance(str(one), str)
        if expected is StepError:
            assert one.type.rpartition(".")[2] == type(exc).__name__
    assert type(group.exceptions[0]) is ValueError


def test_a_class_without_a_module_is_a_step_error():
    kind = type("Homeless", (Exception,), {"__module__": None})
    again = round_trip(kind("x"))
    assert type(again) is StepError
    assert (again.type, again.message) == ("None:Homeless", "x")


def test_an_error_of_http_keeps_its_code_and_is_no_trap():
    again = round_trip(raised(urllib.error.HTTPError("http://x", 404, "Not Found", {}, None)))
    assert (type(again), again.code, str(again)) == (
        urllib.error.HTTPError, 404, "HTTP Error 404: Not Found",
    )  # fmt: skip
    assert again.fp is None
    again.add_note("handled")
    assert "handled" in "".join(traceback.format_exception(again))
    assert not hasattr(again, "unknown")


def test_an_error_of_http_that_010_recorded_comes_back_as_itself():
    attributes = {"code": 404, "msg": "Not Found", "hdrs": {}, "name": "<urllib response>"}
    stored = {
        "type": "urllib.error:HTTPError",
        "message": "HTTP Error 404: Not Found",
        "traceback": "",
        "portable": True,
        "details": {"args": "[]", "attrs": json.dumps(attributes)},
    }
    again = decode_error(stored)
    assert (type(again), again.code) == (urllib.error.HTTPError, 404)
    again.add_note("handled")
    assert "handled" in "".join(traceback.format_exception(again))
    failed = round_trip(raised(again))  # the run fails with it
    assert (type(failed), failed.type) == (StepError, "urllib.error:HTTPError")
