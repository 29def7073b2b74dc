"""Stored tracebacks as real ones: what log records and error trackers show of a failure.

Nothing is imported by a stored name, and no stored code runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePath
from types import CodeType, FunctionType, TracebackType
from typing import Any, cast

from pyworkflow._failures import part_of
from pyworkflow.runs import ErrorInfo

__all__ = ["join_stacks", "rebuilt", "stack_of"]

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$', re.MULTILINE)
_START = "Traceback (most recent call last):"
_GROUP = "  + Exception Group " + _START
_GROUP_FRAME = re.compile(_FRAME.pattern.replace("^  ", r"^  \|   "), re.MULTILINE)
_MOST = 200
"""Frames of a stack, and exceptions of a chain, that are looked at."""


def rebuilt(info: ErrorInfo) -> BaseException:
    """An exception that looks like the stored one: its type's name, its message and its stack."""
    module, _, name = info.type.rpartition(":")
    error = _type_of(module or "builtins", name or "Exception")(info.message)
    return error.with_traceback(stack_of(info.traceback))


def join_stacks(error: BaseException, stored: Sequence[tuple[BaseException, str]]) -> None:
    """Continue the stack of an error that came from a step with the step's own stack.

    ``stored`` has the exceptions that were raised where the workflow awaited a step, with the
    traceback that the step had. Those are looked for in ``error``, its causes and its members.
    """
    todo, seen = [error], set[int]()
    while todo and len(seen) < _MOST:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        text = next((text for known, text in stored if known is one), None)
        if text is not None:
            one.__traceback__ = _joined(part_of(one, "__traceback__"), stack_of(text))
        causes = (part_of(one, "__cause__"), part_of(one, "__context__"))
        todo += [e for e in causes if isinstance(e, BaseException)]
        if isinstance(one, BaseExceptionGroup):
            todo += cast("tuple[BaseException, ...]", one.exceptions)  # pyright: ignore[reportUnknownMemberType] # a bare group has no type argument


def stack_of(text: str) -> TracebackType | None:
    """The frames of the last traceback in ``text``; None when it has none.

    Frames have the file, line and function that the text names, and no variables.
    """
    of_group = _GROUP in text
    last = text.rpartition(_GROUP if of_group else _START)[2]
    frames = (_GROUP_FRAME if of_group else _FRAME).finditer(last)
    stack: TracebackType | None = None
    for found in reversed(list(frames)[:_MOST]):
        frame = _frame_of(found["file"], found["name"])
        line = min(int(found["line"][:9]), 2**31 - 1)
        if frame is not None:
            # Without an instruction: it would mark columns of our own code in their line.
            stack = TracebackType(stack, frame, -1, line)
    return stack


def _joined(first: TracebackType | None, rest: TracebackType | None) -> TracebackType | None:
    frames: list[TracebackType] = []
    while first is not None:
        frames.append(first)
        first = first.tb_next
    for one in reversed(frames):
        rest = TracebackType(rest, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return rest


@lru_cache(maxsize=256)
def _type_of(module: str, name: str) -> type[Exception]:
    made: type[Exception] = type(
        name.rpartition(".")[2].replace("\0", ""), (Exception,), {"__module__": module}
    )
    return made


def _raise() -> None:
    raise LookupError


def _frame_of(file: str, name: str) -> Any:
    """A frame of a function of this name in this file, that has run."""
    try:
        code = _code_of(file, name)
        FunctionType(code, {"__name__": PurePath(file).stem, "__file__": file, **_NAMES})()
    except LookupError:
        traceback = sys.exc_info()[2]
        return traceback and traceback.tb_next and traceback.tb_next.tb_frame
    except ValueError:
        pass  # a NUL in a name
    return None


_NAMES = {"LookupError": LookupError}


@lru_cache(maxsize=1024)
def _code_of(file: str, name: str) -> CodeType:
    return _raise.__code__.replace(co_filename=file, co_name=name, co_qualname=name)
