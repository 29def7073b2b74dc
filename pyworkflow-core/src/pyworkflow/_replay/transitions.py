"""The life of an op, as one table.

Theory of operation. Workflow code creates *ops*: a step it awaits, a sleep, an asyncio timer. Each
is emitted once, by the delivery of one input, and has a state of its own. Two things move it:
what the code does (``emit``, ``cancel``), and events of the history that carry its op. A command
event (class C) says that somebody wrote down what the code emitted; an input event (class I) says
how it ended, and delivers that to the code. Which commands were written down depends on when
turns committed, so *recorded* is never demanded, only checked: a command event whose op the code
has not emitted, or emitted as something else, has no row here and is non-determinism. An input
for an op that is over or cancelled changes nothing but the time.

A run ends with its root. The turn that ends it gives up the steps that are pending then: their
``step.cancelled`` comes before the closing event, and is valid only once the code has ended. The
rows in ``AFTER_END`` say so.

``TABLE[kind, state, event type]`` gives the next state and the action. A missing row is
non-determinism. The diagram in the docs is drawn from this table.
"""

from __future__ import annotations

from enum import StrEnum

from pyworkflow.events import EventType as E

__all__ = ["AFTER_END", "TABLE", "Action", "OpKind", "OpState"]


class OpKind(StrEnum):
    """What an op is; the last part of its identity."""

    STEP = "step"
    SLEEP = "sleep"
    TIMER = "timer"


class OpState(StrEnum):
    """Where an op stands."""

    EMITTED = "emitted"
    """The code asked for it; no event carries it yet."""
    RECORDED = "recorded"
    """A command event carries it."""
    CANCELLED = "cancelled"
    """The code gave it up."""
    OVER = "over"
    """Its input was delivered."""


class Action(StrEnum):
    """What replay does besides changing the state."""

    RECORD = "record"
    """Take over what the command event recorded."""
    DELIVER = "deliver"
    """Give the input to the waiting code and let it run."""
    IGNORE = "ignore"


_S, _A = OpState, Action

_STEP: dict[tuple[OpState, str], tuple[OpState, Action]] = {
    (_S.EMITTED, E.STEP_SCHEDULED): (_S.RECORDED, _A.RECORD),
    (_S.CANCELLED, E.STEP_SCHEDULED): (_S.CANCELLED, _A.RECORD),
    (_S.CANCELLED, E.STEP_CANCELLED): (_S.CANCELLED, _A.RECORD),
    (_S.EMITTED, E.STEP_CANCELLED): (_S.CANCELLED, _A.RECORD),
    (_S.RECORDED, E.STEP_CANCELLED): (_S.CANCELLED, _A.RECORD),
    (_S.OVER, E.STEP_CANCELLED): (_S.OVER, _A.RECORD),
    **{
        (state, ended): outcome
        for ended in (E.STEP_COMPLETED, E.STEP_FAILED)
        for state, outcome in {
            _S.EMITTED: (_S.OVER, _A.DELIVER),
            _S.RECORDED: (_S.OVER, _A.DELIVER),
            _S.CANCELLED: (_S.CANCELLED, _A.IGNORE),
            _S.OVER: (_S.OVER, _A.IGNORE),
        }.items()
    },
}
_SLEEP: dict[tuple[OpState, str], tuple[OpState, Action]] = {
    (_S.EMITTED, E.SLEEP_CREATED): (_S.RECORDED, _A.RECORD),
    (_S.CANCELLED, E.SLEEP_CREATED): (_S.CANCELLED, _A.RECORD),
    (_S.EMITTED, E.SLEEP_COMPLETED): (_S.OVER, _A.DELIVER),
    (_S.RECORDED, E.SLEEP_COMPLETED): (_S.OVER, _A.DELIVER),
    (_S.CANCELLED, E.SLEEP_COMPLETED): (_S.CANCELLED, _A.IGNORE),
    (_S.OVER, E.SLEEP_COMPLETED): (_S.OVER, _A.IGNORE),
}
_TIMER: dict[tuple[OpState, str], tuple[OpState, Action]] = {
    (_S.EMITTED, E.TIMER_FIRED): (_S.OVER, _A.DELIVER),
    (_S.CANCELLED, E.TIMER_FIRED): (_S.CANCELLED, _A.IGNORE),
    (_S.OVER, E.TIMER_FIRED): (_S.OVER, _A.IGNORE),
}

#: (kind, state, event type) → (next state, action)
TABLE: dict[tuple[OpKind, OpState, str], tuple[OpState, Action]] = {
    (kind, state, event): outcome
    for kind, rows in ((OpKind.STEP, _STEP), (OpKind.SLEEP, _SLEEP), (OpKind.TIMER, _TIMER))
    for (state, event), outcome in rows.items()
}

#: Rows that are valid only once the code has ended. A step that another worker completed while a
#: very wide run was ending is over, and cancelled all the same.
AFTER_END: frozenset[tuple[OpState, str]] = frozenset(
    (state, str(E.STEP_CANCELLED)) for state in (_S.EMITTED, _S.RECORDED, _S.OVER)
)
