"""The workflow's logger and configure_logging: context, once-only lines, both formats."""

import io
import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from pyworkflow import _context, _logging
from pyworkflow._logging import configure_logging, logger
from pyworkflow.errors import ConfigurationError


class InWorkflow:
    """What the engine shows of a run whose code is running."""

    run_id, workflow_name, step_id, step_name, in_workflow = "r1", "orders", None, None, True

    def __init__(self):
        self.replaying = False
        self.recorded = []

    def emit_log(self, level, message, fields):
        if self.replaying:
            return False
        json.dumps(fields, allow_nan=False).encode()
        self.recorded.append((level, message, fields))
        return True


@pytest.fixture(autouse=True)
def fresh():
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    _logging._reset_for_tests()
    root.setLevel(before[0])
    assert list(root.handlers) == before[1]


@pytest.fixture
def run(monkeypatch):
    context = InWorkflow()
    monkeypatch.setattr(_context, "log_context", lambda: context)
    return context


class Running:
    opener = None

    def __init__(self, context):
        self.context = context


@pytest.fixture
def step():
    context = _context.StepContext(
        run_id="r1", step_id="1#2:step", step_name="charge", workflow_name="orders", attempt=1
    )
    token = _context.running_try.set(Running(context))
    yield context
    _context.running_try.reset(token)


@pytest.fixture
def err(capsys):
    class Stderr:
        text = ""

        def getvalue(self):
            self.text += capsys.readouterr().err
            return self.text

    return Stderr()


def json_lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --- the logger -----------------------------------------------------------------------------------


def test_a_line_of_workflow_code_is_recorded_and_passed_on_once(run, err):
    configure_logging(json_logs=True)
    logger.info("paid %s of %d", "order", 3, extra={"amount": 5})
    run.replaying = True
    logger.info("paid %s of %d", "order", 3, extra={"amount": 5})
    assert run.recorded == [("info", "paid order of 3", {"amount": 5})]
    (line,) = json_lines(err)
    assert line["message"] == "paid order of 3"
    assert line["amount"] == 5
    assert (line["run_id"], line["workflow_name"]) == ("r1", "orders")
    assert (line["step_id"], line["step_name"]) == (None, None)
    assert line["logger"] == "pyworkflow.workflow"


def test_a_line_that_the_engine_calls_new_is_not_muted_by_the_filter(run, err):
    configure_logging()
    run.emit_log = lambda *_: True
    run.replaying = True
    logger.warning("new")
    logging.getLogger("other").warning("old")
    assert "new" in err.getvalue()
    assert "old" not in err.getvalue()


def test_events_do_not_depend_on_levels_of_handlers(run, err):
    configure_logging(level="ERROR")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    logger.critical("e")
    logger.log(5, "f")
    assert [(level, message) for level, message, _ in run.recorded] == [
        ("debug", "a"),
        ("info", "b"),
        ("warning", "c"),
        ("error", "d"),
        ("error", "e"),
        ("debug", "f"),
    ]
    assert [line.split(": ")[1].split(" ")[0] for line in err.getvalue().splitlines()] == ["d", "e"]


def test_steps_and_plain_code_log_without_events(step, err):
    configure_logging(json_logs=True)
    logger.info("in a step", extra={"n": 1})
    logging.getLogger("library").info("from a library")
    _context.running_try.set(None)
    logger.info("outside")
    first, second, third = json_lines(err)
    for line in (first, second):
        assert (line["run_id"], line["workflow_name"]) == ("r1", "orders")
        assert (line["step_id"], line["step_name"]) == ("1#2:step", "charge")
    assert first["n"] == 1
    assert "run_id" not in third


def test_users_own_handlers_get_the_names_too(step):
    records = []

    class Mine(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Mine()
    logger.logger.addHandler(handler)
    try:
        logger.error("x", extra={"amount": 5, "message": "taken", "run_id": "mine"})
    finally:
        logger.logger.removeHandler(handler)
    (record,) = records
    assert (record.run_id, record.workflow_name) == ("r1", "orders")
    assert (record.step_id, record.step_name) == ("1#2:step", "charge")
    assert (record.amount, record.message_, record.run_id_) == (5, "taken", "mine")


def test_a_record_factory_that_sets_the_same_names_does_no_harm(run, err):
    configure_logging()
    standing = logging.getLogRecordFactory()

    def factory(*args, **kwargs):
        record = standing(*args, **kwargs)
        record.run_id = "theirs"
        return record

    logging.setLogRecordFactory(factory)
    try:
        logger.info("x")
    finally:
        logging.setLogRecordFactory(standing)
    assert "[run_id=theirs]" in err.getvalue()


@pytest.mark.parametrize("in_run", [True, False])
def test_the_caller_is_the_line_that_logs(in_run, request):
    if in_run:
        request.getfixturevalue("run")
    records = []

    class Mine(logging.Handler):
        def emit(self, record):
            records.append(record)

    def helper():
        logger.error("x", stacklevel=2)

    handler = Mine()
    logger.logger.addHandler(handler)
    try:
        logger.error("x")
        logger.log(logging.ERROR, "x")
        helper()
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("x")
    finally:
        logger.logger.removeHandler(handler)
    here = "test_the_caller_is_the_line_that_logs"
    assert [record.funcName for record in records] == [here] * 4
    assert all(record.filename == "test_logging.py" for record in records)


def test_exceptions_are_fields_of_the_event_and_of_the_line(run, err):
    configure_logging(json_logs=True)
    try:
        raise ValueError("inner")
    except ValueError as error:
        logger.exception("failed")
        caught = error
    logger.error("again", exc_info=caught)
    logger.error("none", exc_info=True)
    for _, _, fields in run.recorded[:2]:
        assert fields["exception"].endswith("ValueError: inner")
    assert run.recorded[2][2] == {}
    first, second, third = json_lines(err)
    assert first["exception"].startswith("Traceback")
    assert second["exception"].endswith("ValueError: inner")
    assert "exception" not in third


def test_nothing_that_logging_does_wrong_reaches_the_workflow(run, err, monkeypatch):
    class Breaks(logging.Handler):
        def filter(self, record):
            raise RuntimeError("a filter of theirs")

    class NoText:
        def __str__(self):
            raise RuntimeError("no text")

    configure_logging(json_logs=True)
    handler = Breaks()
    logger.logger.addHandler(handler)
    try:
        logger.info("still here")
    finally:
        logger.logger.removeHandler(handler)
    assert "a filter of theirs" in err.getvalue()
    err.text = ""
    # The test runner's handlers raise for records that have no text.
    monkeypatch.setattr(logging.getLogger(), "handlers", [*_logging._installed.handlers])
    logger.info("%d apples", "no number")
    logger.info("x", extra={"a": NoText(), "b": float("nan"), "c": 10**5000, "d": "\ud800"})
    logger.info(NoText())
    logger.info("%(a)s", {"a": 1})
    assert [message for _, message, _ in run.recorded] == [
        "still here",
        "%d apples ['no number']",
        "x",
        "<NoText> []",
        "1",
    ]
    fields = run.recorded[2][2]
    assert fields["a"] == "<NoText>"
    assert fields["b"] == "nan"
    assert fields["c"].startswith("0x")
    assert fields["d"] == "\\ud800"
    assert len(json_lines(err)) == 4


def test_fields_of_every_kind_become_json(run):
    circular = {}
    circular["self"] = circular
    when = datetime.fromisoformat("2025-01-02T03:04:05+00:00")
    logger.info(
        "x",
        extra={
            "a": {"b": [1, (2.5, None, True)], 3: when},
            "gap": timedelta(seconds=5),
            "circular": circular,
        },
    )
    fields = run.recorded[0][2]
    assert fields["a"] == {"b": [1, [2.5, None, True]], "3": "2025-01-02T03:04:05+00:00"}
    assert fields["gap"] == "0:00:05"
    assert "..." in json.dumps(fields["circular"])


# --- configure_logging ----------------------------------------------------------------------------


def test_other_loggers_are_muted_while_replaying_only(run, err):
    configure_logging()
    other = logging.getLogger("library")
    other.warning("first")
    run.replaying = True
    other.warning("repeated")
    assert "first [run_id=r1]" in err.getvalue()
    assert "repeated" not in err.getvalue()


def test_the_text_format_shows_run_and_step(step, err):
    configure_logging()
    logger.info("paid")
    configure_logging(show_context=False)
    logger.info("paid")
    first, second = err.getvalue().splitlines()
    assert first.endswith(
        "+00:00 INFO pyworkflow.workflow: paid [run_id=r1 step=charge]",
    )
    assert second.endswith("INFO pyworkflow.workflow: paid")
    assert datetime.fromisoformat(first.split(" ")[0]).utcoffset() == timedelta(0)


def test_the_json_format_is_one_object_a_line_with_extra_and_exceptions(step, err):
    configure_logging(json_logs=True)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("library").exception(
            "it\nfailed", extra={"amount": 5, "time": "noon"}, stack_info=True
        )
    configure_logging(json_logs=True, show_context=False)
    logger.info("%s", "bare")
    first, second = json_lines(err)
    assert list(first)[:4] == ["time", "level", "logger", "message"]
    assert (first["level"], first["message"]) == ("ERROR", "it\nfailed")
    assert (first["amount"], first["time_"]) == (5, "noon")
    assert "ValueError: two\nlines" in first["exception"]
    assert first["stack"].startswith("Stack")
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    assert "run_id" not in second
    assert set(second) == {"time", "level", "logger", "message"}


def test_the_file_gets_every_line_too(tmp_path, err, monkeypatch):
    # The test runner's own handlers keep the text, and cannot send a lone surrogate on.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    path = tmp_path / "workflow.log"
    configure_logging(log_file=path, json_logs=True)
    logger.info("grüße \ud800")
    configure_logging()
    logger.info("to stderr only")
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["message"] == "grüße \\ud800"
    assert "to stderr only" in err.getvalue()


def test_called_again_it_replaces_its_own_handlers_and_no_others(err):
    root = logging.getLogger()
    mine = logging.NullHandler()
    root.addHandler(mine)
    try:
        root.setLevel(logging.WARNING)
        before = len(root.handlers)
        configure_logging(level="DEBUG")
        assert root.level == logging.DEBUG
        configure_logging(level="error")
        assert len(root.handlers) == before + 1
        assert mine in root.handlers
        assert root.level == logging.WARNING, "lowered only while it was needed"
        configure_logging(level=logging.INFO)
        root.setLevel(logging.CRITICAL)
        configure_logging(level="CRITICAL")
        assert root.level == logging.CRITICAL, "somebody else's choice stands"
    finally:
        root.removeHandler(mine)


@pytest.mark.parametrize("level", ["LOUD", "", -1, True, None, 2.5])
def test_an_unknown_level_changes_nothing(level, err):
    before = list(logging.getLogger().handlers)
    with pytest.raises(ConfigurationError, match="log level"):
        configure_logging(level=level)
    assert list(logging.getLogger().handlers) == before


@pytest.mark.parametrize("name", ["missing/x.log", "", ".", "nul\0"])
def test_a_file_that_cannot_be_written_changes_nothing(name, tmp_path, err):
    path = str(tmp_path / name) if name else ""
    configure_logging()
    before = list(logging.getLogger().handlers)
    with pytest.raises(ConfigurationError, match="log_file="):
        configure_logging(log_file=path)
    assert list(logging.getLogger().handlers) == before


def test_stderr_may_be_replaced_or_absent(monkeypatch):
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    configure_logging()
    first.close()
    monkeypatch.setattr(sys, "stderr", second)
    logger.info("x")
    assert "x" in second.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    logger.info("x")


def test_importing_touches_no_logging_configuration():
    code = (
        "import logging, pyworkflow._logging; root = logging.getLogger(); "
        "ours = logging.getLogger('pyworkflow.workflow'); "
        "print(root.level, root.handlers, ours.level, ours.handlers, ours.filters, ours.propagate)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "30 [] 0 [] [] True"
