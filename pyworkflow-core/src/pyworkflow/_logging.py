"""Logging with the context of a run: the workflow's ``logger`` and ``configure_logging``.

Importing this touches no logging configuration. Whether a line of workflow code is new is the
engine's to say (``_context.py``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from os import PathLike
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from pyworkflow._text import cut, escaped, escaped_json, indented
from pyworkflow.errors import ConfigurationError

if TYPE_CHECKING:
    from pyworkflow._context import LogContext
    from pyworkflow.events import Json

__all__ = ["WorkflowLogger", "configure_logging", "logger", "replay_filter", "show_lines_alone"]

_CONTEXT = ("run_id", "workflow_name", "step_id", "step_name")
#: Set on records of workflow code that the engine found to be new: they are not muted.
_LIVE = "_pyworkflow_live"
#: Set on records whose ``exc_text`` is the place of the error alone: text shows no more of it.
BRIEF = "_pyworkflow_brief"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    _LIVE,
    BRIEF,
}

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class WorkflowLogger(logging.LoggerAdapter[logging.Logger]):
    """Works in workflows, steps and outside; ``extra`` may hold any names.

    In workflow code every line becomes a ``log.*`` event, whatever the level of the handlers, and
    reaches them while it is new, not when replay repeats it. Its ``extra`` are the event's fields.
    The lines of a step become events with the end of the attempt: 200 lines and 64 KiB of each
    attempt at most, the rest is counted.
    Nothing that a handler does wrong reaches the workflow.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log ``msg % args``, as ``logging.Logger.log`` does."""
        context = _current()
        extra = _own_names(kwargs.get("extra"))
        exc_info = _exc_info(kwargs.get("exc_info"))
        in_workflow = context is not None and context.in_workflow
        if context is not None:
            fields = {name: to_json(value) for name, value in extra.items()}
            if exc_info is not None:
                fields["exception"] = "".join(traceback.format_exception(*exc_info)).rstrip()
            if not context.emit_log(
                _event_level(level),
                _message(logging.LogRecord("", level, "", 0, msg, args, None)),
                fields,
            ):
                return
        if not self.isEnabledFor(level):
            return
        # Not `extra=`: that raises for names of a record, and for those that a record factory set.
        path, line, function, stack = self.logger.findCaller(
            bool(kwargs.get("stack_info", False)), int(kwargs.get("stacklevel", 1)) + 1
        )
        record = self.logger.makeRecord(
            self.logger.name,
            level,
            path,
            line,
            msg,
            args,
            exc_info,
            function,
            None,
            stack,
        )
        vars(record).update(extra)
        _set_context(record, context)
        if not in_workflow:
            self.logger.handle(record)
            return
        setattr(record, _LIVE, True)
        try:
            self.logger.handle(record)
        except Exception:  # noqa: BLE001 - logging must not decide what a workflow does
            # Raised here it would change the workflow, and on replay it would not come again.
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()


logger: logging.LoggerAdapter[logging.Logger] = WorkflowLogger(
    logging.getLogger("pyworkflow.workflow"), {}
)


def configure_logging(
    *,
    level: str | int = "INFO",
    log_file: str | PathLike[str] | None = None,
    json_logs: bool = False,
    show_context: bool = True,
) -> None:
    """Send log records of the whole process to stderr and, when given, to ``log_file`` as well.

    Records made in a run carry ``run_id``, ``workflow_name``, ``step_id`` and ``step_name``;
    records that replay makes again are muted, whichever logger they come from. ``json_logs``
    writes one JSON object per line; ``show_context`` shows the names of the run and step.

    Called again, it replaces what it installed. Handlers of others stay as they are; the root
    logger's level is lowered to ``level`` when it is higher.

    Raises:
        ConfigurationError: An unknown level, or a file that cannot be written. Nothing is changed.
    """
    number = _level(level)
    handlers: list[logging.Handler] = [_StderrHandler()]
    if log_file is not None:
        handlers.append(_file_handler(log_file))
    formatter = _JsonFormatter(show_context) if json_logs else _TextFormatter(show_context)
    for handler in handlers:
        handler.setLevel(number)
        handler.setFormatter(formatter)
        handler.addFilter(replay_filter)
    _installed.replace(handlers, number)


class _Installed:
    """What ``configure_logging`` added to the root logger."""

    def __init__(self) -> None:
        self.handlers: list[logging.Handler] = []
        self.levels: tuple[int, int] | None = None
        """The root's level before, and the one that we set."""

    def replace(self, handlers: list[logging.Handler], level: int) -> None:
        root = logging.getLogger()
        for handler in self.handlers:
            root.removeHandler(handler)
            handler.close()
        if self.levels is not None and root.level == self.levels[1]:
            root.setLevel(self.levels[0])
        self.levels = None
        if handlers and root.level > level:
            self.levels = (root.level, level)
            root.setLevel(level)
        for handler in handlers:
            root.addHandler(handler)
        self.handlers = handlers


_installed = _Installed()


def _reset_for_tests() -> None:  # pyright: ignore[reportUnusedFunction] - by tests
    _installed.replace([], logging.NOTSET)


_REPORT_EVERY_S = 60.0


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is now: it may be replaced, and the old one closed."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            self.stream = sys.stderr
            super().emit(record)

    def flush(self) -> None:
        self.stream = sys.stderr
        super().flush()


class _ReopeningFileHandler(logging.FileHandler):
    """Writes to the file that has the path now: it may be renamed or deleted (logrotate).

    Each record looks, so that all processes that log into one file follow a rotation.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._file = self._identity()
        self._report_at = 0.0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        """Report a line that could not be written, at most once a minute: a full disk fails each."""
        if (now := monotonic()) >= self._report_at:
            self._report_at = now + _REPORT_EVERY_S
            super().handleError(record)

    def _open(self) -> Any:
        return open(  # as the base class
            self.baseFilename,
            self.mode,
            encoding=self.encoding,
            errors=self.errors,
            opener=lambda path, flags: os.open(path, flags, 0o600),
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._follow()
        except OSError:
            # The folder is gone, say, or the new file is not ours to write: the next line tries
            # again, and the code that logs must not fail for it.
            self.handleError(record)
            return
        super().emit(record)

    def _follow(self) -> None:
        try:
            found = os.stat(self.baseFilename)  # noqa: PTH116 - no path object for each record
            if self.stream is not None and (found.st_dev, found.st_ino) == self._file:
                return
        except FileNotFoundError:
            pass
        old, self.stream = self.stream, None
        if old is not None:
            try:
                old.close()
            except OSError:
                pass  # a full disk: what could not be flushed is lost
        self.stream = self._open()
        self._file = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        if self.stream is None:
            return None
        status = os.fstat(self.stream.fileno())
        return status.st_dev, status.st_ino


def _file_handler(log_file: str | PathLike[str]) -> logging.Handler:
    path = os.fspath(log_file)
    if not path:
        raise ConfigurationError("the log file has no name: log_file=''; give a path or None")
    try:
        return _ReopeningFileHandler(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the log file cannot be written: log_file={path!r}: {error}; "
            "create its folder, or choose another path"
        ) from error


def _level(level: object) -> int:
    names = logging.getLevelNamesMapping()
    if isinstance(level, str) and level.strip().upper() in names:
        return names[level.strip().upper()]
    if isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise ConfigurationError(
        f"there is no such log level: level={level!r}; use DEBUG, INFO, WARNING, ERROR, CRITICAL "
        "or a number"
    )


# --- context ----------------------------------------------------------------------------------


def _current() -> LogContext | None:
    from pyworkflow._context import log_context

    return log_context()


def replay_filter(record: logging.LogRecord) -> bool:
    """Filter of log handlers: names the run in a record, and mutes what replay repeats."""
    context = _current()
    _set_context(record, context)
    live = getattr(record, _LIVE, False)
    return live or context is None or not (context.in_workflow and context.replaying)


def _set_context(record: logging.LogRecord, context: LogContext | None) -> None:
    for name in _CONTEXT:
        if not hasattr(record, name):
            setattr(record, name, None if context is None else getattr(context, name))


def _own_names(extra: object) -> dict[str, object]:
    """The extra fields under names that neither a record nor the context needs."""
    if not isinstance(extra, Mapping):
        return {}
    return {
        f"{name}_" if name in _STANDARD or name in _CONTEXT else _storable(str(name)): value
        for name, value in cast("Mapping[object, object]", extra).items()
    }


def _exc_info(given: object) -> _ExcInfo | None:
    if isinstance(given, BaseException):
        return type(given), given, given.__traceback__
    found = cast("tuple[object, ...]", given) if isinstance(given, tuple) else sys.exc_info()
    if not given or len(found) != 3 or not isinstance(found[1], BaseException):
        return None
    return cast("_ExcInfo", found)


def _message(record: logging.LogRecord) -> str:
    try:
        return _storable(record.getMessage())
    except Exception:  # noqa: BLE001 - a wrong format costs its form, as everywhere in logging
        return _storable(f"{to_json(record.msg)} {to_json(record.args)}")


def _event_level(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warning"
    return "info" if level >= logging.INFO else "debug"


# --- formats ----------------------------------------------------------------------------------

_LONGEST_LINE = 16_384
"""Characters of a line in a text log."""
_LONGEST_TRACE = 65_536


class _TextFormatter(logging.Formatter):
    """One line for each record, and indented lines for its traceback: values cannot add others."""

    def __init__(self, show_context: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._show_context = show_context

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - the name that logging has
        del datefmt
        return _instant(record, "milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = _message(record), self.formatTime(record)
        parts = [escaped(cut(self.formatMessage(record), _LONGEST_LINE))]
        if getattr(record, BRIEF, False) and record.exc_text:
            parts.append(record.exc_text)
        elif record.exc_info:
            # Not record.exc_text: another handler's formatter may have set it.
            parts.append(indented(cut(self.formatException(record.exc_info), _LONGEST_TRACE)))
        elif record.exc_text:
            parts.append(indented(cut(record.exc_text, _LONGEST_TRACE)))
        if record.stack_info:
            parts.append(indented(cut(record.stack_info, _LONGEST_TRACE)))
        return "\n".join(parts)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        run_id, step = getattr(record, "run_id", None), getattr(record, "step_name", None)
        if not self._show_context or run_id is None or f"run_id={run_id}" in line:
            return line
        # The context stays, however long the message is.
        line = cut(line, _LONGEST_LINE - 3000)
        return f"{line} [run_id={run_id}{'' if step is None else f' step={step}'}]"


class _LineFormatter(logging.Formatter):
    """The message alone, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(cut(_message(record), _LONGEST_LINE))


def show_lines_alone() -> None:
    """Where no handler is configured, let Python's own print one line for each warning.

    For a command that shows errors and their tracebacks itself.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LineFormatter())


class _JsonFormatter(logging.Formatter):
    def __init__(self, show_context: bool) -> None:
        super().__init__()
        self._show_context = show_context

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Json] = {
            "time": _instant(record, "microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        if self._show_context and getattr(record, "run_id", None) is not None:
            line.update((name, to_json(getattr(record, name, None))) for name in _CONTEXT)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in _CONTEXT:
                line[f"{name}_" if name in line else name] = to_json(value)
        return escaped_json(json.dumps(line, ensure_ascii=False))


def _instant(record: logging.LogRecord, timespec: str) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec=timespec)


def to_json(value: object, depth: int = 8) -> Json:
    """The value as JSON that every store takes: what JSON lacks becomes text. Never raises."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Python refuses to write longer ones in decimal.
        return int(value) if value.bit_length() < 4096 else hex(value)
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    given = value  # the type checkers narrow `value` to containers of unknown things
    try:
        if depth > 0 and isinstance(value, Mapping):
            items = cast("Mapping[object, object]", value).items()
            return {_storable(str(name)): to_json(one, depth - 1) for name, one in items}
        if depth > 0 and isinstance(value, list | tuple):
            return [to_json(one, depth - 1) for one in cast("list[object]", value)]
        return _storable(str(given))
    except Exception:  # noqa: BLE001 - a log line must not fail for a broken __str__
        return f"<{type(given).__name__}>"


def _storable(text: str) -> str:
    # No store takes a lone surrogate, and a log line must not stop a run.
    return text.encode("utf-8", "backslashreplace").decode()
