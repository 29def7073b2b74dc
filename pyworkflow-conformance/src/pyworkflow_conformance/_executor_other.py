"""A workflow that another version of the workers has, beside a plugin that sends headers."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager

from pyworkflow.spi import doorbell_headers
from pyworkflow.spi.hookspecs import hookimpl
from pyworkflow.testing.internals import register, step, workflow
from pyworkflow_conformance._executor_effects import leave

__all__ = ["HEADER", "TRACES", "other"]

HEADER = "conformance-trace"
#: The variable that names the folder where a turn leaves what it was sent.
TRACES = "PYWORKFLOW_CONFORMANCE_TRACES"


@step(name="conformance_exe.other_step", max_retries=0)
async def other_step(folder: str, name: str) -> str:
    """Nothing but its trace."""
    leave(folder, name, "begin")
    leave(folder, name, "end")
    return name


@workflow(name="conformance_exe.other")
async def other(folder: str, name: str) -> str:
    """One short step."""
    return await other_step(folder, name)


class _Headers:
    @hookimpl
    def pyworkflow_inject_headers(self, run_id: str, headers: dict[str, str]) -> None:
        headers[HEADER] = f"trace-of-{run_id}"

    @hookimpl
    def pyworkflow_around_turn(self, run_id: str, workflow: str) -> AbstractContextManager[None]:
        return _seen(run_id, doorbell_headers.get().get(HEADER, ""))


@contextmanager
def _seen(run_id: str, header: str) -> Generator[None]:
    folder = os.environ.get(TRACES)
    if folder is not None:
        leave(folder, run_id, "headers", header)
    yield


register(_Headers(), "conformance-headers")
