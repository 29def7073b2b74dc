"""What the workers of ``pyworkflow dev`` will find, looked at before any of them starts.

In a process of its own, because modules may set settings, and those of the command itself are read
before it knows which modules there are.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pyworkflow.errors import (
    ConfigurationError,
    PluginNotFound,
    StorageError,
    WorkflowError,
)
from pyworkflow.spi import Runtime
from pyworkflow.worker import create_runtime, import_modules, settings, workflow_names
from pyworkflow_celery._config import queue_of

__all__ = ["Given"]

MISUSED, UNUSABLE = 2, 3


@dataclass(frozen=True, slots=True)
class Given:
    """The settings that the command needs to know."""

    namespace: str
    storage: str | None
    """The URL, None when ``configure`` was given an object."""
    location: str
    """The same without credentials."""
    grace: float
    queues: list[str]
    """Celery's names of the queues that workers serve."""


def look(modules: list[str], queues: list[str]) -> Given:
    """Import the modules, and check the settings; ask the store whether it answers.

    Raises:
        ConfigurationError: What is given cannot work.
        StorageError: The store does not answer, or is of no use.
    """
    import_modules(modules)  # first: they may call configure()
    config = settings()
    import_modules(config.modules)
    from pyworkflow_celery.app import app  # reads the settings, too

    runtime = create_runtime(spread=True)
    info = runtime.info()
    for name in ("executor", "broker_url"):
        if getattr(config, name) != os.environ[f"PYWORKFLOW_{name.upper()}"]:
            raise ConfigurationError(
                "a module calls configure() with a setting that this command has to make: "
                f"setting={name}; leave it to PYWORKFLOW_{name.upper()}"
            )
    if not info.capabilities.multi_process:
        raise ConfigurationError(
            f"the store exists in one process only: storage={info.location}; give --storage "
            "file:DIR, sqlite:///FILE, postgresql://… or redis://…"
        )
    if not workflow_names():
        named = list(dict.fromkeys([*modules, *config.modules]))
        if named:
            raise ConfigurationError(
                f"no workflow is defined: modules={','.join(named)}; decorate an async function "
                "with @workflow()"
            )
        raise ConfigurationError(
            "no workflow is defined: write `pyworkflow dev MODULE`, or set modules in "
            "[tool.pyworkflow] or PYWORKFLOW_MODULES"
        )
    asyncio.run(_open(runtime))
    return Given(
        namespace=config.namespace,
        storage=config.storage if isinstance(config.storage, str) else None,
        location=info.location,
        grace=config.drain.total_seconds(),
        queues=[queue_of(app, queue) for queue in dict.fromkeys(["default", *queues])],
    )


async def _open(runtime: Runtime) -> None:
    try:
        await runtime.open()
    finally:
        await runtime.close()


def main(answer: str, modules: str, queues: str) -> int:
    """Write what was found as JSON into the file ``answer``; the exit status."""
    try:
        given = look([m for m in modules.split(",") if m], [q for q in queues.split(",") if q])
    except WorkflowError as exc:
        sys.stderr.write(f"pyworkflow: {exc}\n")
        return UNUSABLE if isinstance(exc, (PluginNotFound, StorageError)) else MISUSED
    Path(answer).write_text(json.dumps(asdict(given)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
