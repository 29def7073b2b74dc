"""Restate: its Python SDK, and its server from the npm registry."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers import environments
from benchmarks.peers.peer import PROGRAMS, Server, answers, scratch, server_process

SERVER = "1.7.12"
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}


class Restate(Server):
    NAME = "restate"
    STORES: ClassVar[Mapping[str, str]] = {"server": "sqlite"}
    #: Creating them one by one over HTTP takes the time.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]] = {"W7": {"runs": 10_000}}

    def setup(self, cache: Path) -> list[str]:
        machine = platform.machine().lower()
        system = f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"
        packages = [f"@restatedev/restate-server@{SERVER}"]
        modules = environments.node(cache, self.NAME, packages)
        program = modules / "@restatedev" / f"restate-server-{system}" / "bin" / "restate-server"
        if not program.exists():
            raise environments.CannotSetUp(f"restate has no server for {system} in its npm package")
        self._server = program
        wanted = ["restate-sdk==1.2.0", "hypercorn==0.18.0", "httpx==0.28.1"]
        interpreter = environments.python(cache, self.NAME, wanted)
        return [str(interpreter), str(PROGRAMS / "run_restate.py")]

    @contextmanager
    def place(self, store: str, directory: Path) -> Iterator[dict[str, Any]]:
        from tests.watched import free_port

        ingress, admin, node, port = (free_port() for _ in range(4))
        health = (f"http://127.0.0.1:{admin}/health", f"http://127.0.0.1:{ingress}/restate/health")
        with scratch(directory) as path:
            command = [str(self._server), "--base-dir", str(path / "data"), "--node-name", "peers"]
            settings = {
                "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
                "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
                "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
                "RESTATE_DISABLE_TELEMETRY": "true",
                "RESTATE_LOG_FILTER": "error",
                "DO_NOT_TRACK": "1",
            }
            with server_process(
                command, path, lambda: all(answers(url) for url in health), **settings
            ) as pid:
                yield {
                    "ingress": f"http://127.0.0.1:{ingress}",
                    "admin": f"http://127.0.0.1:{admin}",
                    "port": port,
                    "server": pid,
                    "facts": {
                        "server": f"restate-server {SERVER}",
                        "durability": "the server's log, flushed to disk (its default)",
                    },
                }


PEER = Restate()
