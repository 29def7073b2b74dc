"""What the task of a doorbell returns, which Celery logs as its result."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from pyworkflow.spi import Outcome
from pyworkflow_celery import _tasks
from pyworkflow_celery._publish import HANDLE


@pytest.mark.parametrize(
    ("item_id", "outcome", "result"),
    [
        ("turn", Outcome.HANDLED, "turn of run_1: handled"),
        ("step:1.3#2:step", Outcome.HANDLED, "step of run_1: handled"),
        ("step:1.3#2:step", Outcome.BUSY, "step of run_1: busy"),
        ("deliver:1", Outcome.GONE, "delivery of run_1: gone"),
    ],
)
def test_n35_the_result_of_a_doorbell_says_what_it_was_for(
    item_id: str, outcome: Outcome, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells: list[Any] = []

    def handled(app: Any, request: Any, bell: Any) -> str:
        bells.append(bell)
        return str(outcome)

    monkeypatch.setattr(_tasks, "_handle", handled)
    app = Celery("results", set_as_current=False)
    _tasks.register_tasks(app)
    assert app.tasks[HANDLE].run("run_1", item_id) == result
    assert [(bell.run_id, bell.item_id) for bell in bells] == [("run_1", item_id)]
