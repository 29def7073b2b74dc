"""Prefect: its Python library and its server. Not durable in our sense: no run goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers import environments
from benchmarks.peers.peer import PROGRAMS, Server, answers, scratch, server_process


class Prefect(Server):
    NAME = "prefect"
    STORES: ClassVar[Mapping[str, str]] = {"server": "sqlite"}
    #: Tens of milliseconds a step.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "W1": {"runs": 10},
        "W2": {"runs": 10},
        "W3": {"times": 1},
        "W4": {"short": 100, "long": 800},
    }
    SKIPS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("W5", "W6", "W6B", "W7"),
        "no durable sleep, and a run whose process died does not go on where it was",
    )

    def setup(self, cache: Path) -> list[str]:
        interpreter = environments.python(cache, self.NAME, ["prefect==3.8.8", "fastapi==0.139.*"])
        self._server = interpreter.with_name("prefect")
        return [str(interpreter), str(PROGRAMS / "run_prefect.py")]

    @contextmanager
    def place(self, store: str, directory: Path) -> Iterator[dict[str, Any]]:
        from tests.watched import free_port

        port = free_port()
        url = f"http://127.0.0.1:{port}/api"
        with scratch(directory) as path:
            settings = {
                "PREFECT_HOME": str(path / "home"),
                "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}/server.db",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_UI_ENABLED": "false",
            }
            command = [
                *(str(self._server), "server", "start"),
                *("--host", "127.0.0.1", "--port", str(port), "--no-ui"),
            ]
            with server_process(command, path, lambda: answers(f"{url}/health"), **settings) as pid:
                yield {"api": url, "home": str(path / "client"), "server": pid}


PEER = Prefect()
