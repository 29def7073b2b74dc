"""Layer L2: Hypothesis drives a store and the reference store, and shortens what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from pyworkflow.spi.storage import StorageBackend
from pyworkflow_conformance._case import Suite
from pyworkflow_conformance._model import ACTIONS, Actions
from pyworkflow_conformance._oracle import Pair

__all__ = ["explore"]

T = TypeVar("T")
#: Seconds for which a failure is made shorter.
SHRINKING_S = 20.0
_LIMIT = "MAX_SHRINKING_SECONDS"


class _Drawn:
    """Choices that Hypothesis makes, and can make smaller."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def choice(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def below(self, number: int) -> int:
        """A number."""
        return self._data.draw(st.integers(0, number - 1))


def explore(suite: Suite, namespace: str, start: int, examples: int, steps: int) -> None:
    """Run the machine in this thread, with a loop of its own.

    Raises:
        AssertionError: The shortest sequence found after which the stores differ.
    """
    with asyncio.Runner() as runner:
        numbers = count(1)

        class Machine(RuleBasedStateMachine):
            def __init__(self) -> None:
                super().__init__()
                self.name = f"{namespace}-{next(numbers)}"
                self.made: list[StorageBackend] = []
                pair = Pair([self._run(self.opened()) for _ in range(2)])
                self.actions = Actions(pair, self.opened)

            def _run(self, work: Any) -> Any:
                return runner.run(work)

            async def opened(self) -> StorageBackend:
                store = await suite.make(self.name)
                await store.open()
                self.made.append(store)
                return store

            def teardown(self) -> None:
                self._run(self.ended())

            async def ended(self) -> None:
                try:
                    await self.actions.pair.compare_all()
                finally:
                    for store in self.made:
                        await store.close()

        for name, weight in ACTIONS.items():
            # A rule's weight is how often it is there.
            for n in range(max(1, weight // 3)):
                setattr(Machine, f"{name}_{n}", _rule(name, n))
        # Hypothesis keeps what the class looked like before.
        with _shrinking_for(SHRINKING_S):
            run_state_machine_as_test(
                seed(start)(Machine),
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=steps,
                    database=None,
                    deadline=None,
                    print_blob=False,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=[
                        HealthCheck.too_slow,
                        HealthCheck.data_too_large,
                        HealthCheck.filter_too_much,
                    ],
                    derandomize=False,
                ),
            )


@contextmanager
def _shrinking_for(seconds: float) -> Generator[None]:
    """Let Hypothesis shorten a failure for so long at most; its own limit is five minutes.

    There is no setting for it. With a version that has no such limit, nothing changes.
    """
    usual = getattr(engine, _LIMIT, None)
    if usual is None:
        yield
        return
    setattr(engine, _LIMIT, seconds)
    try:
        yield
    finally:
        setattr(engine, _LIMIT, usual)


def _rule(name: str, n: int) -> Any:
    def act(self: Any, data: st.DataObject) -> None:
        self._run(getattr(self.actions, name)(_Drawn(data)))

    act.__name__ = f"{name}_{n}"
    return rule(data=st.data())(act)
