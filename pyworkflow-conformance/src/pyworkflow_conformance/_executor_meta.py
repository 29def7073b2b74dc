"""The executor suite itself: nothing is left out, and gaps have reasons."""
# ruff: noqa: N802 - the ids are part of the names

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from pyworkflow.spi.capabilities import ExecutorCapabilities
from pyworkflow.testing.internals import make_executor
from pyworkflow_conformance._executor_case import ExecutorCase, ExecutorSuite, check
from pyworkflow_conformance._levels import Check

__all__ = ["EXECUTOR_PROOFS", "MetaChecks", "executor_checks"]

#: Capability → the checks that prove it.
EXECUTOR_PROOFS = {
    "distributed": ("EXE-01", "EXE-02", "EXE-21"),
    "priority": ("EXE-25",),
    "hard_time_limit": ("EXE-23",),
    "kill_detection": ("EXE-24",),
    "graceful_drain": ("EXE-07",),
}


class MetaChecks(ExecutorSuite):
    """META."""

    def test_META_01_no_overrides(self) -> None:
        """META-01: every check is there, as it was written.

        A suite that leaves checks out proves nothing. Usual cause: a check that fails was
        overridden; declare it in ``gaps`` instead.
        """
        from pyworkflow_conformance.executor import ExecutorConformance

        mine = type(self)
        marks: list[pytest.Mark] = list(getattr(mine, "pytestmark", []))
        assert not {mark.name for mark in marks} & {"skip", "skipif"}, "the class is skipped"
        names = [name for name in dir(ExecutorConformance) if name.startswith("test_")]
        for name in names:
            own = getattr(mine, name, None) is getattr(ExecutorConformance, name)
            assert own, f"{name} is overridden: declare a gap with its reason"
        ids = {"-".join(name.split("_")[1:3]) for name in names}
        for check_id, reason in self.gaps.items():
            assert check_id in ids, f"the declared gap {check_id!r} names no check"
            assert reason.strip(), f"the declared gap {check_id} has no reason"

    @check
    async def test_META_03_declared_caps_proved(self, t: ExecutorCase) -> None:
        """META-03: the class and the executor declare the same, and a check of each is left.

        The engine spreads branches over workers if ``distributed`` is declared. Usual cause: a
        capability is declared in one of the two places only, or all its checks are gaps.
        """
        executor = make_executor(
            t.environment["PYWORKFLOW_EXECUTOR"],
            {"broker_url": t.environment.get("PYWORKFLOW_BROKER_URL", "")},
        )
        assert executor.capabilities == self.capabilities, "the suite and the executor must agree"
        for field in fields(ExecutorCapabilities):
            if field.name != "contract_version" and getattr(self.capabilities, field.name):
                left = [proof for proof in EXECUTOR_PROOFS[field.name] if proof not in self.gaps]
                assert left, f"{field.name} is declared, and every check that proves it is a gap"


def executor_checks() -> list[Check]:
    """All checks of the executor suite, by id. Imports them."""
    from pyworkflow_conformance.executor import ExecutorConformance

    found: list[Check] = []
    for name in dir(ExecutorConformance):
        test = getattr(ExecutorConformance, name)
        if not name.startswith("test_"):
            continue
        head, _, rest = inspect.cleandoc(test.__doc__ or "").partition("\n\n")
        found.append(
            Check(
                id="-".join(name.split("_")[1:3]),
                name=name,
                level="full",
                needs=getattr(test, "needs", ()),
                guarantee=" ".join(head.split()).partition(": ")[2],
                why=" ".join(rest.split()),
            )
        )
    return sorted(found, key=lambda check: (not check.id.startswith("META"), check.id))
