"""The executor ``celery://``: rings by Celery messages, and serves as a Celery worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import Doorbell, ExecutorCapabilities, Runtime
from pyworkflow.worker import settings

__all__ = ["CeleryExecutor", "check_executor_url"]


def check_executor_url(url: str) -> None:
    """Refuse what an executor URL does not say.

    Raises:
        ConfigurationError: A host, or an option.
    """
    rest = url.partition(":")[2]
    place, _, query = rest.removeprefix("//").partition("?")
    if place.strip("/"):
        # Not repeated: it may be a broker's URL, with a password.
        raise ConfigurationError(
            "the executor's URL names a place: write celery://, and give the broker as "
            "PYWORKFLOW_BROKER_URL=redis://HOST:6379/0"
        )
    if query:
        names = ", ".join(sorted(part.partition("=")[0] for part in query.split("&")))
        raise ConfigurationError(
            f"the Celery executor has no such option: option={names}; write celery://, and set "
            "PYWORKFLOW_BROKER_URL for the broker"
        )


class CeleryExecutor:
    """Doorbells by Celery, from any number of processes. Its application is made at first use."""

    name = "celery"
    capabilities = ExecutorCapabilities(
        contract_version=2,
        distributed=True,
        priority=True,
        hard_time_limit=True,
        kill_detection=True,
        graceful_drain=True,
    )

    async def open(self, config: Mapping[str, str]) -> None:
        """Import Celery and check the configuration. Connects to nothing.

        Raises:
            ConfigurationError: The broker's URL is wrong, or tasks run in their caller.
        """
        await asyncio.to_thread(_checked_app)

    async def notify(self, bells: Sequence[Doorbell]) -> None:
        """Hand the doorbells to the process's publisher; never waits for the broker."""
        from pyworkflow_celery._publish import publisher_for

        publisher_for(_checked_app()).notify(bells)

    def serve(self, runtime: Runtime, queues: Sequence[str]) -> None:
        """Be a Celery worker, in this process: one event loop, doorbells in threads.

        ``runtime`` is not used: what handles doorbells is made when the worker has started, so
        that it rings through the worker's own application.
        """
        from pyworkflow_celery._config import queue_of

        app = _checked_app()
        wanted = [queue_of(app, queue) for queue in queues] or None
        worker = app.Worker(
            pool="threads",
            # A doorbell holds a thread until nothing is left to do for it, and does not work in
            # it: async steps run in the loop, sync ones in threads of their own.
            concurrency=settings().concurrency,
            queues=wanted,
            loglevel="INFO",
            quiet=True,
            without_mingle=True,
        )
        worker.start()

    async def close(self) -> None:
        """Wait a little for doorbells that are not sent yet."""
        from pyworkflow_celery._publish import publisher_for

        publisher = publisher_for(_checked_app())
        await asyncio.to_thread(publisher.flush)


def _checked_app() -> Any:
    from pyworkflow_celery._attach import current_app
    from pyworkflow_celery._config import check_app

    app = current_app()
    check_app(app)
    return app
